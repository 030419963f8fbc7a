"""The update: token log-probs, and a gradient that no split of the batch can change."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import make_model, run
from gradient_worker import Recorder, fixed_samples, measure, one_mini_batch
from model_worker import make
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import a3po
import model as policy_model
from rollout import empty_sample
from shelf import memory, ranks
from shelf.metrics import token_metrics


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
    chunked = policy_model.TokenLogprobs.apply
    for function, extra in ((full_logprobs, ()), (chunked, (chunk, 0.0))):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy, *_ = function(h, w, targets, temperature, *extra)
        (logprobs * up[0] + entropy * up[1]).sum().backward()
        grads.append((logprobs, entropy, h.grad, w.grad))
    for full, chunked in zip(*grads, strict=True):
        assert n == 0 or (full - chunked).abs().max() <= 1e-5 * full.abs().max()


def demo_config(model: str, *flags: str) -> a3po.Config:
    return a3po.parse_args(["--setting=demo", f"--model={model}", "--max_grad_norm=1e9", *flags])


def build(model: str, *flags: str):
    """(config, policy, inner model)"""
    config = demo_config(model, *flags)
    policy, inner, _, _ = a3po.build(config, "cpu", "grids", None)
    return config, policy, inner


def gradient_of(config, policy, inner, mini_batches, rho=None) -> torch.Tensor:
    recorder = Recorder(inner)
    a3po.update(policy, recorder, mini_batches, config, rho or a3po.rho_at(0, config))
    return recorder.flat()


def scored(config, policy, samples=None):
    mini_batches = one_mini_batch(samples or fixed_samples(), config)
    a3po.score(policy, None, mini_batches, config)
    return mini_batches


def test_sure_tokens_keep_their_order():
    """A3PO chooses among log-probs near 0: at logits of 26 they have to be exact to 1e-7."""
    gap = torch.linspace(9.0, 19.0, 2000)  # of the only other token: 1 - p from 1e-4 to 6e-9
    hidden = torch.stack([torch.full_like(gap, 26.0), 26.0 - gap], 1)
    apply = policy_model.TokenLogprobs.apply
    logprobs = apply(hidden, torch.eye(2), torch.zeros(2000).long(), 1.0, 512, 0.0)[0]
    exact = -torch.log1p(torch.exp(-(hidden[:, 0].double() - hidden[:, 1].double())))
    assert (logprobs - exact).abs().max() < 1e-7
    assert (logprobs.diff() >= 0).all() and len(logprobs.unique()) > 400


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_to_sixteen_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (40, 300))
    targets = torch.randint(300, (40,), generator=generator)
    exact = torch.log_softmax(2 * hidden.double() @ weight.double().T, -1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    logprobs = policy_model.TokenLogprobs.apply(hidden, weight, targets, 0.5, 16, 0.0)[0]
    assert (logprobs - exact).abs().max() < 1e-4  # rounded logits are off by 0.1


def test_packed_policy_equals_the_models_own_logits_row_by_row(tiny_model):
    _, policy, _ = build(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    samples = fixed_samples()
    with torch.no_grad():
        logprobs, entropy, _ = policy(policy_model.collate(samples, "cpu", "grids"))
        for i, sample in enumerate(samples):
            prompt, n = len(sample.prompt.ids), len(sample.ids)
            ids = torch.tensor([*sample.prompt.ids, *sample.ids.tolist()])
            logp = model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
            expected = logp.gather(1, ids[prompt:, None])[:, 0]
            assert torch.allclose(logprobs[i, :n], expected, atol=1e-5)
            assert torch.allclose(entropy[i, :n], -(logp.exp() * logp).sum(-1), atol=1e-5)
            assert (logprobs[i, n:] == 0).all()


def test_a_batch_holds_what_its_samples_hold():
    samples = fixed_samples()
    batch = policy_model.collate(samples, "cpu", "grids")
    assert batch["mask"].sum(1).tolist() == [len(sample.ids) for sample in samples]
    assert batch["correct"].tolist() == [sample.correct for sample in samples]
    assert batch["targets"].tolist() == [i for sample in samples for i in sample.ids]
    assert torch.equal(batch["places"], batch["mask"].flatten().nonzero()[:, 0])
    for i, sample in enumerate(samples):
        n = len(sample.ids)
        assert batch["rollout_logprobs"][i, :n].tolist() == sample.logprobs.tolist()
        assert (batch["rollout_logprobs"][i, n:] == 0).all()
        assert (batch["advantage"][i] == sample.advantage).all()
    first = batch["ids"][: len(samples[0].prompt.ids) + 1].tolist()  # its prompt and its one token
    assert first == [*samples[0].prompt.ids, *samples[0].ids]
    assert batch["positions"][:5].tolist() == [0, 1, 2, 3, 4]


def written_out(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """varlen_attn's contract."""
    assert torch.equal(bounds, bounds_k) and bounds[-1] == len(q) == len(k)
    assert bounds.dtype == torch.int32 and bounds[0] == 0
    assert window_size == (-1, 0) and longest == longest_k == bounds.diff().max()
    assert q.dtype == k.dtype == v.dtype and enable_gqa == (q.shape[1] > k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    pieces = []
    for a, b in pairwise(bounds.tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v[a:b]))
    return torch.cat(pieces)


@pytest.mark.parametrize("kv_heads", ["as many", "half as many"])
def test_varlen_path_equals_the_cpu_path(kv_heads, tiny_model, monkeypatch, tmp_path):
    """With the GPU kernel's contract written out in its place, what surrounds it can be tested."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", written_out)
    model = tiny_model if kv_heads == "as many" else make("qwen3", tmp_path)
    results = []
    for kernel in ("varlen", "grids"):
        policy, _, _, _ = a3po.build(demo_config(model), "cpu", kernel, None)
        logprobs, entropy, _ = policy(policy_model.collate(fixed_samples(), "cpu", kernel))
        (logprobs + entropy).square().sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in policy.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class NothingIsRead(TorchDispatchMode):
    """Refuses reads from the device and shapes that depend on data."""

    REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "unique_dim", "equal"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.REFUSED, function
        if function.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["a3po", "grpo", "fork_tokens", "lp_reg"])
@pytest.mark.parametrize("kernel", ["grids", "varlen"])
def test_from_the_batch_to_the_step_nothing_is_read_but_the_statistics(
    tiny_model, monkeypatch, preset, kernel
):
    """Each read from a GPU waits for it. `read` is called once per mini-batch."""
    flags = [f"--preset={preset}", "--micro_batch_tokens=60", "--mini_batches=2"]
    config = demo_config(tiny_model, *flags)
    policy, inner, reference, _ = a3po.build(config, "cpu", kernel, None)
    samples, reads = fixed_samples(), []

    def attention(q, k, v, bounds, *_, scale, **__):
        return q * scale + k + v

    def read(sums):
        reads.append(sums)
        return dict.fromkeys(sums, 1.0)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention)
    monkeypatch.setattr(a3po, "reduce_over_ranks", read)
    mini_batches = a3po.make_batches([samples[:5], samples[5:]], config, 0, "cpu", kernel)
    with NothingIsRead():
        a3po.score(policy, reference, mini_batches, config)
        a3po.update(policy, Recorder(inner), mini_batches, config, a3po.rho_at(0, config))
    assert len(reads) == len(mini_batches) == 2
    with pytest.raises(AssertionError), NothingIsRead():
        torch.ones(3)[torch.tensor([True, False, True])]


def on_ranks(ranks: int, out: Path, jobs: list[list]) -> list[dict]:
    """The results of gradient_worker.measure for all jobs, from one start of several ranks."""
    command = ["tests/gradient_worker.py", str(out), *map(json.dumps, jobs)]
    done = run(*command, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


CASES = {  # flags, and the splits to compare: ranks, how, tokens of a micro-batch
    "kl": (["--kl_coef=0.1"], [(1, "fsdp", 60), (2, "fsdp", 60), (2, "ddp", 100)]),
    "lp_reg": (["--preset=lp_reg", "--proxy_delta=0.3"], [(2, "fsdp", 60)]),
    "sequence means": (["--loss_agg=seq-mean-token-mean", "--preset=fork_tokens"],
                       [(2, "fsdp", 60)]),
    "fork_tokens": (["--preset=fork_tokens"], [(1, "fsdp", 60), (2, "ddp", 60)]),
}


@pytest.fixture(scope="module")
def by_two_ranks(tiny_model, tmp_path_factory) -> dict:
    """The results of two ranks, by case and split."""
    names = [(case, split) for case, (_, splits) in CASES.items() for split in splits
             if split[0] == 2]
    jobs = [[tiny_model, *split[1:], *CASES[case][0]] for case, split in names]
    names += ["overflow fsdp", "overflow ddp", "offload"]
    jobs += [[tiny_model, "fsdp"], [tiny_model, "ddp"]]
    jobs += [[tiny_model, "fsdp", 60, *CASES["kl"][0], "--offload"]]
    results = on_ranks(2, tmp_path_factory.mktemp("two") / "results.pt", jobs)
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_an_overflow_on_one_rank_skips_the_step_on_both(by_two_ranks, parallel):
    """fp16: the loss scale is halved on both, no weight moves; the next update is as usual."""
    each = [[1, 2.0**15, False], [0, 2.0**15, True]]
    assert by_two_ranks[f"overflow {parallel}"]["found"] == [each, each]


@pytest.mark.parametrize("case", CASES)
def test_gradient_does_not_depend_on_micro_batches_or_ranks(case, tiny_model, by_two_ranks):
    """All in one bin; many micro-batches; two ranks with FSDP2 and with DDP, where one rank runs
    out of micro-batches first."""
    flags, splits = CASES[case]
    whole = measure(tiny_model, "fsdp", 100_000, *flags)
    assert max(g.abs().max() for g in whole["gradient"].values()) > 1e-3
    for split in splits:
        if split[0] == 2:
            other = by_two_ranks[case, split]
        else:
            other = measure(tiny_model, *split[1:], *flags)
        for name, gradient in whole["gradient"].items():
            scale = gradient.abs().max()
            assert (gradient - other["gradient"][name]).abs().max() <= 1e-5 * scale, (split, name)
        for name, weight in whole["weights"].items():
            assert torch.allclose(weight, other["weights"][name], atol=2e-4), (split, name)
        for key, value in whole["metrics"].items():
            assert other["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (split, key)


def check_same(one: dict, other: dict):
    for name, gradient in one["gradient"].items():
        assert (gradient - other["gradient"][name]).abs().max() <= 1e-5 * gradient.abs().max(), name
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, other["weights"][name], atol=2e-4), name


def test_states_on_the_host_change_nothing(tiny_model, by_two_ranks):
    check_same(measure(tiny_model, "fsdp", 60, *CASES["kl"][0]), by_two_ranks["offload"])


@pytest.mark.slow
def test_compiled_layers_change_nothing(tmp_path, tiny_model):
    jobs = [[tiny_model, "fsdp", 60, f"--recompute={every}", "--compile"] for every in (0, 1)]
    for compiled in on_ranks(2, tmp_path / "two.pt", jobs):
        check_same(measure(tiny_model, "fsdp", 60), compiled)
        assert compiled["graphs"] > 0


def test_adam_with_its_states_from_the_start_takes_the_same_steps():
    """As on a GPU, against torch's own, whose states come with the first step."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(7, 5), torch.nn.Linear(7, 5))
    theirs.load_state_dict(ours.state_dict())
    optimizer = memory.adam(ours, 1e-2, 0.95, 0.1, "cuda")
    assert len(optimizer.state) == 2
    lazy = torch.optim.AdamW(theirs.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(3):
        x = torch.randn(4, 7)
        for model, adam in ((ours, optimizer), (theirs, lazy)):
            model(x).square().sum().backward()
            adam.step()
            adam.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)
    for a, b in zip(optimizer.state.values(), lazy.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_copies_within_machines_have_the_gradient_of_one(tmp_path, tiny_model):
    """HSDP: two copies, each over two ranks; also where the layers are not called `layers`."""
    whole = measure(tiny_model, "fsdp", 100_000)
    [parts] = on_ranks(4, tmp_path / "four.pt", [[tiny_model, "fsdp", 60, "--shard_ranks=2"]])
    for name, gradient in whole["gradient"].items():
        assert (gradient - parts["gradient"][name]).abs().max() <= 1e-5 * gradient.abs().max(), name
    for key, value in whole["metrics"].items():
        assert parts["metrics"][key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    gpt2 = make("gpt2", tmp_path / "gpt2")
    [two] = on_ranks(2, tmp_path / "two.pt", [[gpt2, "fsdp", 60]])
    one = measure(gpt2, "fsdp", 60)
    assert one["metrics"]["grad_norm"] == pytest.approx(two["metrics"]["grad_norm"], rel=1e-5)


def test_fresh_policy_has_ratio_one_whatever_the_batching(tiny_model):
    for tokens in (50, 100_000):
        config, policy, inner = build(tiny_model, f"--micro_batch_tokens={tokens}")
        mini_batches = scored(config, policy)
        metrics = a3po.update(policy, Recorder(inner), mini_batches, config, a3po.rho_at(0, config))
        assert metrics["ratio_max_deviation"] == metrics["ratio_max"] == 0.0


def test_metrics_do_not_depend_on_micro_batches(tiny_model):
    """Here off-policy, so that ratios differ from token to token and from batch to batch."""
    results = []
    for tokens in (50, 100_000):
        config, policy, inner = build(tiny_model, f"--micro_batch_tokens={tokens}")
        mini_batches = scored(config, policy)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in inner.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        metrics = a3po.update(policy, Recorder(inner), mini_batches, config, a3po.rho_at(0, config))
        results.append(metrics | token_metrics(mini_batches))
    assert results[0]["ratio_max"] > 0.1 and results[0]["clip_high"] > 0
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6)


def test_on_policy_steps_skip_the_scoring_pass_and_get_the_same_gradient(tiny_model):
    gradients = []
    for mini_batches in (1, 2):
        config, policy, inner = build(tiny_model, f"--mini_batches={mini_batches}")
        batches = scored(config, policy)
        assert ("old_logprobs" in batches[0][0]) == (mini_batches > 1)
        gradients.append(gradient_of(config, policy, inner, batches))
        assert {"old_logprobs", "entropy"} <= batches[0][0].keys()
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6 * gradients[0].abs().max().item())


def test_a_non_finite_gradient_is_skipped_and_counted(tiny_model):
    config = demo_config(tiny_model)
    policy, model, _, optimizer = a3po.build(config, "cpu", "grids", None)
    before = copy.deepcopy(model.state_dict())
    broken = fixed_samples()
    broken[7].advantage = math.inf
    rho = a3po.rho_at(0, config)
    metrics = a3po.update(policy, optimizer, scored(config, policy, broken), config, rho)
    assert metrics["skipped_updates"] == 1 and metrics["updates"] == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    metrics = a3po.update(policy, optimizer, scored(config, policy), config, rho)
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bins_keep_every_sample_within_the_budget():
    samples = fixed_samples()
    for budget in (1, 30, 60, 100, 10_000):
        bins = policy_model.pack(samples, budget)
        assert sorted(id(s) for chosen in bins for s in chosen) == sorted(map(id, samples))
        for chosen in bins:
            ids = policy_model.collate(chosen, "cpu", "grids")["ids"]
            assert len(ids) == policy_model.packed_length(chosen)
            assert len(ids) <= budget or len(chosen) == 1


def test_a_group_shares_its_prompt_where_it_fits():
    samples = fixed_samples()
    prompts = {id(sample.prompt): len(sample.prompt.ids) for sample in samples}
    for budget in (80, 10_000):  # the largest group has 4 + 75 tokens
        bins = policy_model.pack(samples, budget)
        tokens = sum(len(policy_model.collate(chosen, "cpu", "grids")["ids"]) for chosen in bins)
        assert tokens == sum(prompts.values()) + sum(len(sample.ids) for sample in samples)


def test_every_rank_gets_equally_many_micro_batches(monkeypatch):
    """Of each kind, with and without a gradient; and all samples once."""
    samples = fixed_samples()
    shares = policy_model.deal(samples, 3)
    assert sorted(id(s) for share in shares for s in share) == sorted(map(id, samples))
    config = a3po.parse_args(["--setting=demo", "--micro_batch_tokens=50", "--mini_batches=2"])
    monkeypatch.setattr(a3po, "world_size", lambda: 3)
    plans = []
    for rank in range(3):
        monkeypatch.setattr(a3po, "rank", lambda rank=rank: rank)
        plans.append(a3po.make_batches([samples[:5], samples[5:]], config, 0, "cpu", "grids"))
    for i in range(2):
        kinds = [[batch["trained"] for batch in plan[i]] for plan in plans]
        assert kinds[0] == kinds[1] == kinds[2]
    batches = [batch for plan in plans for mini_batch in plan for batch in mini_batch]
    lengths = [n for batch in batches for n in batch["mask"].sum(1).tolist() if n]
    assert sorted(lengths) == sorted(len(sample.ids) for sample in samples)
    assert any(not batch["mask"].any() for batch in batches)  # a rank had fewer
    idle = [n for b in batches if not b["trained"] for n in b["mask"].sum(1).tolist() if n]
    assert idle == [len(sample.ids) for sample in samples if sample.advantage == 0]


def test_an_empty_micro_batch_has_a_gradient_of_zeros(tiny_model):
    """Under FSDP and DDP its backward pass takes part in the collectives of all parameters."""
    config, policy, inner = build(tiny_model, "--kl_coef=0.1")
    empty = policy_model.collate([empty_sample()], "cpu", "grids") | dict(trained=True)
    real = one_mini_batch(fixed_samples(), config)
    a3po.score(policy, policy, [[empty], *real], config)
    alone = gradient_of(config, policy, inner, real)
    assert torch.equal(gradient_of(config, policy, inner, [[*real[0], empty]]), alone)
    policy(empty)[0].sum().backward()
    assert all((p.grad == 0).all() for p in inner.parameters())


def test_untied_heads_get_a_gradient(tmp_path):
    config, policy, inner = build(make_model(tmp_path / "untied", tied=False))
    recorder = Recorder(inner)
    a3po.update(policy, recorder, scored(config, policy), config, a3po.rho_at(0, config))
    assert recorder.gradient["lm_head.weight"].abs().max() > 0


def test_recomputing_changes_nothing(tiny_model):
    gradients = []
    for every, layers in ((0, []), (1, [True, True]), (2, [True, False])):
        config, policy, inner = build(tiny_model, f"--recompute={every}")
        again = [layer.gradient_checkpointing for layer in inner.get_decoder().layers]
        assert again == (layers or [False, False])
        gradients.append(gradient_of(config, policy, inner, scored(config, policy)))
    assert torch.allclose(gradients[0], gradients[1]) and torch.equal(*gradients[1:])


def test_proxy_is_the_renormalised_distribution():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 8), torch.randn(30, 8), torch.randint(30, (40,))
    proxy = policy_model.TokenLogprobs.apply(hidden, weight, targets, 1.0, 7, 0.2)[2]
    for i, p in enumerate((hidden @ weight.T).softmax(-1).tolist()):
        kept = [x for x in p if x > 0.2 * max(p)]
        expected = math.log(p[targets[i]] / sum(kept)) if p[targets[i]] in kept else -math.inf
        assert proxy[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert proxy.isinf().any() and proxy.isfinite().any()


def test_all_tokens_are_sorted_without_padding_and_over_ranks(tiny_model):
    config, policy, _ = build(tiny_model, "--micro_batch_tokens=60")
    batches = sum(scored(config, policy), [])
    values = a3po.sort_all_tokens(batches, "old_logprobs")
    expected = torch.cat([batch["old_logprobs"][batch["mask"]] for batch in batches])
    assert torch.equal(values, expected.sort().values) and ranks.world_size() == 1
