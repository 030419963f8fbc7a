"""The update: token log-probs, and a gradient that no split of the batch can change."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from conftest import make_model, run
from gradient_worker import fixed_rows
from transformers import AutoModelForCausalLM

import a3po
import rollout


def full_logprobs(hidden, weight, targets, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("n, chunk", [(0, 4), (1, 4), (7, 3), (12, 4), (5, 100)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_full_logits(n, chunk, temperature):
    torch.manual_seed(n)
    hidden, weight = torch.randn(n, 16), torch.randn(50, 16)
    targets, up = torch.randint(50, (n,)), torch.randn(2, n)
    grads = []
    for function, extra in ((full_logprobs, ()), (a3po.TokenLogprobs.apply, (chunk, 0.0))):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy, *_ = function(h, w, targets, temperature, *extra)
        (logprobs * up[0] + entropy * up[1]).sum().backward()
        grads.append((logprobs, entropy, h.grad, w.grad))
    for full, chunked in zip(*grads, strict=True):
        assert n == 0 or (full - chunked).abs().max() <= 1e-5 * full.abs().max()


def demo_config(model: str, *flags: str) -> a3po.Config:
    return a3po.parse_args(["--setting=demo", f"--model={model}", *flags])


def scored_rows(policy, config) -> list[a3po.Row]:
    rows = fixed_rows()
    a3po.score(policy, None, [rows], config, "cpu")
    return rows


def test_packed_policy_equals_the_models_own_logits_row_by_row(tiny_model):
    config = demo_config(tiny_model)
    policy = a3po.Policy(a3po.load_model(config, tiny_model, "cpu"), config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    rows = fixed_rows()
    batch = a3po.collate(rows, "cpu")
    with torch.no_grad():
        logprobs, entropy, _ = a3po.run_policy(policy, batch, config)
        for i, row in enumerate(rows):
            ids = torch.tensor([*row.prompt_ids, *row.ids.tolist()])
            logp = model(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            expected = logp.gather(1, ids[len(row.prompt_ids) :, None])[:, 0]
            n = len(row.ids)
            assert torch.allclose(logprobs[i, :n], expected, atol=1e-5)
            assert torch.allclose(entropy[i, :n], -(logp.exp() * logp).sum(-1), atol=1e-5)
            assert (logprobs[i, n:] == 0).all()


def test_varlen_path_equals_the_cpu_path(tiny_model, monkeypatch):
    """With the GPU kernel's contract written out in its place, what surrounds it can be tested."""
    def varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size):
        assert torch.equal(bounds, bounds_k) and bounds[-1] == len(q) == len(k)
        assert window_size == (-1, 0) and longest == longest_k == bounds.diff().max()
        pieces = []
        for a, b in pairwise(bounds.tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
            future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            pieces.append(torch.einsum("hqk,khd->qhd", weights, v[a:b]))
        return torch.cat(pieces)

    def results():
        policy.zero_grad()
        logprobs, entropy, _ = a3po.run_policy(policy, batch, config)
        (logprobs + entropy).square().sum().backward()
        return [logprobs.detach(), *(p.grad.clone() for p in policy.parameters())]

    config = demo_config(tiny_model)
    policy = a3po.Policy(a3po.load_model(config, tiny_model, "cpu"), config)
    batch = a3po.collate(fixed_rows(), "cpu")
    expected, packing = results(), a3po.Packing

    def without_grids(*args):
        made = packing(*args)
        made.grids = []
        return made

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(a3po, "Packing", without_grids)
    for ours, theirs in zip(results(), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def worker(tmp_path, model, ranks, parallel, tokens, *flags):
    out = tmp_path / f"{ranks}-{parallel}-{tokens}.pt"
    command = ["tests/gradient_worker.py", model, parallel, str(tokens), str(out), *flags]
    done = run(*command, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize(
    "flags, splits",
    [
        (["--kl_coef=0.1"], [(1, "fsdp", 60), (2, "fsdp", 60), (2, "ddp", 100)]),
        (["--loss_agg=seq-mean-token-mean", "--preset=fork_tokens"], [(2, "fsdp", 60)]),
        (["--preset=fork_tokens"], [(1, "fsdp", 60), (2, "ddp", 60)]),
        (["--preset=lp_reg", "--proxy_delta=0.3"], [(2, "fsdp", 60)]),
    ],
)
def test_gradient_does_not_depend_on_micro_batches_or_ranks(tmp_path, tiny_model, flags, splits):
    """All in one bin; many micro-batches; two ranks with FSDP2 and with DDP, where one rank runs
    out of micro-batches first."""
    whole = worker(tmp_path, tiny_model, 1, "fsdp", 100_000, *flags)
    assert max(g.abs().max() for g in whole["gradient"].values()) > 1e-3
    for split in splits:
        other = worker(tmp_path, tiny_model, *split, *flags)
        for name, gradient in whole["gradient"].items():
            scale = gradient.abs().max()
            assert (gradient - other["gradient"][name]).abs().max() <= 1e-5 * scale, (split, name)
        for name, weight in whole["weights"].items():
            assert torch.allclose(weight, other["weights"][name], atol=2e-4), (split, name)
        for key, value in whole["sums"].items():
            assert other["sums"][key] == pytest.approx(value, rel=1e-4, abs=1e-4), (split, key)


def test_fresh_policy_has_ratio_one_whatever_the_batching(tiny_model):
    config = demo_config(tiny_model, "--micro_batch_tokens=100000")
    policy = a3po.Policy(a3po.load_model(config, tiny_model, "cpu"), config)
    rows = scored_rows(policy, config)
    config.micro_batch_tokens = 50
    sums = a3po.backward(policy, [rows], config, a3po.Knobs(2.0, 2.0), "cpu")
    assert sums["max_ratio_deviation"] <= 1e-5


def test_on_policy_steps_skip_the_scoring_pass_and_get_the_same_gradient(tiny_model):
    gradients = []
    for mini_batches in (1, 2):
        config = demo_config(tiny_model, f"--mini_batches={mini_batches}")
        policy = a3po.Policy(a3po.load_model(config, tiny_model, "cpu"), config)
        rows = scored_rows(policy, config)
        assert (rows[0].old_logprobs is None) == (mini_batches == 1)
        a3po.backward(policy, [rows], config, a3po.Knobs(2.0, 3.0), "cpu")
        assert rows[0].old_logprobs is not None and rows[0].entropy is not None
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6 * gradients[0].abs().max().item())


def test_a_non_finite_gradient_is_skipped_and_counted(tiny_model):
    config, knobs = demo_config(tiny_model), a3po.Knobs()
    policy, model, _, optimizer = a3po.build(config, "cpu")
    before = copy.deepcopy(model.state_dict())
    rows = scored_rows(policy, config)
    good = copy.deepcopy(rows)
    rows[7].advantage = math.inf
    metrics = a3po.update(policy, optimizer, [[rows]], config, knobs, "cpu")
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    metrics = a3po.update(policy, optimizer, [[good]], config, knobs, "cpu")
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bins_keep_every_row_within_the_budget():
    rows = fixed_rows()
    for budget in (1, 30, 60, 100, 10_000):
        bins = a3po.pack(rows, budget)
        assert sorted(id(r) for rows in bins for r in rows) == sorted(map(id, rows))
        for bin in bins:
            assert len(a3po.collate(bin, "cpu")["ids"]) <= budget or len(bin) == 1


def test_a_group_shares_its_prompt_where_it_fits():
    rows = fixed_rows()
    prompts = {id(row.prompt_ids): len(row.prompt_ids) for row in rows}
    for budget in (80, 10_000):  # the largest group has 4 + 75 tokens
        bins = a3po.pack(rows, budget)
        tokens = sum(len(a3po.collate(bin, "cpu")["ids"]) for bin in bins)
        assert tokens == sum(prompts.values()) + sum(len(row.ids) for row in rows)


def test_every_rank_gets_equally_many_micro_batches(monkeypatch):
    rows = fixed_rows()
    shares = a3po.deal(rows, 3)
    assert sorted(id(r) for share in shares for r in share) == sorted(map(id, rows))
    plans = []
    for rank in range(3):
        monkeypatch.setattr(rollout, "rank", lambda rank=rank: rank)
        plans.append(a3po.schedule(shares, 50))
    assert len({len(plan) for plan in plans}) == 1
    worked = [r for plan in plans for batch, weight in plan if weight for r in batch]
    assert sorted(map(id, worked)) == sorted(map(id, rows))


def test_untied_heads_get_a_gradient(tmp_path):
    config = demo_config(make_model(tmp_path / "untied", tied=False))
    policy, inner, _, _ = a3po.build(config, "cpu")
    a3po.backward(policy, [scored_rows(policy, config)], config, a3po.Knobs(), "cpu")
    assert inner.lm_head.weight.grad.abs().max() > 0


def test_gradient_checkpointing_changes_nothing(tiny_model):
    gradients = []
    for flag in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
        config = demo_config(tiny_model, flag)
        policy = a3po.Policy(a3po.load_model(config, tiny_model, "cpu"), config)
        a3po.backward(policy, [scored_rows(policy, config)], config, a3po.Knobs(), "cpu")
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(*gradients)


def test_proxy_is_the_renormalised_distribution():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 8), torch.randn(30, 8), torch.randint(30, (40,))
    proxy = a3po.TokenLogprobs.apply(hidden, weight, targets, 1.0, 7, 0.2)[2]
    for i, p in enumerate((hidden @ weight.T).softmax(-1).tolist()):
        kept = [x for x in p if x > 0.2 * max(p)]
        expected = math.log(p[targets[i]] / sum(kept)) if p[targets[i]] in kept else -math.inf
        assert proxy[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert proxy.isinf().any() and proxy.isfinite().any()
