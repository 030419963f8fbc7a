"""Every preset against its own formula in plain Python, and the invariants that tie them."""

import copy
import math
import statistics

import numpy as np
import pytest
import torch
from gradient_worker import Recorder, fixed_samples, one_mini_batch
from transformers import AutoModelForCausalLM

import a3po
from shelf.config import CELLS, LOSS_AGGS, PRESETS
from verify import Grade

G = 5  # the ten fixed samples are two groups


@pytest.fixture(scope="module")
def situation(tiny_model):
    """Samples scored by an old policy, the policy three small steps later, a reference model; and
    of the last two the full distributions, from transformers' own forward pass."""
    torch.manual_seed(0)
    models = {}
    for name, noise in (("old", 0.0), ("new", 0.02), ("ref", 0.02)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        models[name] = model
    samples, slow = fixed_samples(), []
    for i, sample in enumerate(samples):
        sample.grade, sample.reward = Grade(i % 3 == 0, None), float(i % 3 == 0)
        prompt = sample.prompt.ids
        ids = torch.tensor([*prompt, *sample.ids.tolist()])
        facts = dict(correct=sample.correct, n=len(sample.ids), ids=sample.ids.tolist())
        for name, model in models.items():
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
            facts[name] = logits.log_softmax(-1).tolist()
        sampled = [facts["old"][t][i] for t, i in enumerate(facts["ids"])]
        noise = torch.randn(len(sampled), dtype=torch.float64) * 0.5
        facts["rollout"] = [p + z for p, z in zip(sampled, noise.tolist(), strict=True)]
        sample.logprobs = np.array(facts["rollout"], np.float32)
        slow.append(facts)
    return tiny_model, models, samples, slow


def loss_of(situation, *flags: str, step: int = 0) -> tuple[float, torch.Tensor]:
    """Our loss of one mini-batch, and its gradient."""
    path, models, samples, _ = situation
    config = a3po.parse_args(["--setting=demo", f"--model={path}", f"--group_size={G}",
                              "--max_grad_norm=1e9", *flags])
    policy, model, reference, _ = a3po.build(config, "cpu", "grids", None)
    if reference is not None:
        reference.model.load_state_dict(models["ref"].state_dict())
    samples = copy.deepcopy(samples)
    a3po.set_advantages([samples[:G], samples[G:]], config)
    mini_batches = one_mini_batch(samples, config)
    a3po.score(policy, reference, mini_batches, config)
    a3po.mask_by_the_whole_batch(mini_batches, config)
    model.load_state_dict(models["new"].state_dict())
    recorder = Recorder(model)
    metrics = a3po.update(policy, recorder, mini_batches, config, a3po.rho_at(step, config))
    return metrics["loss"], recorder.flat()


def slow_loss(preset: str, slow: list[dict], step: int = 0) -> float:
    """The method written out, token by token."""
    rewards = [float(row["correct"]) for row in slow]
    entropies = [[-sum(math.exp(p) * p for p in dist) for dist in row["old"]] for row in slow]
    flat = sorted((h for row in entropies for h in row), reverse=True)
    fork_floor = flat[int(0.2 * len(flat)) - 1]
    sampled = [[row["old"][t][i] for t, i in enumerate(row["ids"])] for row in slow]
    ascending = sorted(p for row in sampled for p in row)
    unlikely = ascending[math.ceil(0.01 * len(ascending)) - 1]
    total, weight_sum, rows_sum = 0.0, 0, 0.0
    for i, row in enumerate(slow):
        group = rewards[i // G * G : i // G * G + G]
        A_row = rewards[i] - statistics.mean(group)
        if preset != "dr_grpo":
            A_row /= statistics.stdev(group) + 1e-6
        if preset in ("psr_raw", "nsr_raw", "w_reinforce"):
            A_row = 1.0 if row["correct"] else -1.0
        A_row *= {
            ("psr", False): 0, ("nsr", True): 0, ("psr_raw", False): 0, ("nsr_raw", True): 0,
            ("w_reinforce", True): 0.1, ("polarity", True): 0.5,
        }.get((preset, row["correct"]), 1)
        k = max(1, int(0.2 * row["n"]))
        low = sorted(range(row["n"]), key=lambda t, i=i: sampled[i][t])[:k]
        high = sorted(range(row["n"]), key=lambda t, i=i: -sampled[i][t])[:k]
        linear, chosen = max(1.0, 2 - 0.015 * step), low if row["correct"] else high
        rho, tokens = {
            "a3po": (linear, chosen), "a3po_grpo": (linear, chosen), "symmetric": (linear, low),
            "a3po_exp": (1 + math.exp(-0.015 * step), chosen), "a3po_constant": (2.0, chosen),
            "token_cell": (2.0, low if row["correct"] else []),
        }.get(preset, (1.0, []))
        grpo_like = preset in ("grpo", "dr_grpo", "a3po_grpo")
        eps_high = 0.2 if grpo_like or "raw" in preset or preset == "w_reinforce" else 0.28
        row_loss = 0.0
        for t, token in enumerate(row["ids"]):
            A = A_row * (rho if t in tokens else 1.0)
            old, new = row["old"][t][token], row["new"][t][token]
            r = math.exp(new - old)
            if preset == "lp_reg":
                objective = min(r, 10.0) * A
            else:
                objective = min(r * A, min(max(r, 0.8), 1 + eps_high) * A)
            loss = -objective * min(math.exp(old - row["rollout"][t]), 2.0)
            if preset in ("grpo", "a3po_grpo"):
                d = row["ref"][t][token] - new
                loss += 0.001 * (math.exp(d) - d - 1)
            if preset == "lp_reg" and A < 0 and old <= unlikely:
                dist = [math.exp(p) for p in row["old"][t]]
                kept = [p for p in dist if p > 0.02 * max(dist)]
                if dist[token] in kept:
                    d = math.log(dist[token] / sum(kept)) - new
                    loss += math.exp(d) - d - 1
            counted = preset != "fork_tokens" or entropies[i][t] >= fork_floor
            total += loss * counted
            row_loss += loss
            weight_sum += counted
        rows_sum += row_loss / (64 if preset == "dr_grpo" else row["n"])
    return rows_sum / len(slow) if grpo_like else total / weight_sum


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_equals_its_formula(situation, preset):
    for step in (0, 30, 90):
        loss, gradient = loss_of(situation, f"--preset={preset}", step=step)
        assert loss == pytest.approx(slow_loss(preset, situation[-1], step), rel=2e-4, abs=2e-6)
        assert gradient.abs().max() > 0


def test_lp_regs_penalty_is_in_play(situation):
    with_penalty = loss_of(situation, "--preset=lp_reg", "--proxy_delta=0.4")[0]
    without = loss_of(situation, "--preset=lp_reg", "--proxy_delta=0.4", "--kl_coef=1e-9")[0]
    assert with_penalty > without + 1e-3


def test_psr_and_nsr_gradients_add_up_to_daposs(situation):
    psr, nsr, dapo = (loss_of(situation, f"--preset={p}")[1] for p in ("psr", "nsr", "dapo"))
    assert torch.allclose(psr + nsr, dapo, atol=1e-5 * dapo.abs().max().item())


def test_equal_polarity_weights_scale_the_gradient(situation):
    weights = ["--positive_weight=3", "--negative_weight=3"]
    scaled, plain = (loss_of(situation, "--preset=dapo", *w)[1] for w in (weights, []))
    assert torch.allclose(scaled, 3 * plain, atol=1e-5 * scaled.abs().max().item())


def test_without_or_after_the_shaping_a3po_is_dapo(situation):
    dapo = loss_of(situation, "--preset=dapo")[1]
    after = loss_of(situation, "--preset=a3po", step=67)[1]  # (2 - 1) / 0.015 steps
    assert torch.equal(loss_of(situation, "--rho_positive=1", "--rho_negative=1")[1], dapo)
    assert torch.equal(after, dapo)
    assert not torch.equal(loss_of(situation, "--preset=a3po", step=66)[1], dapo)


@pytest.mark.parametrize("cell", CELLS)
def test_cells_choose_what_they_say(cell):
    generator = torch.Generator().manual_seed(0)
    logprobs, entropy = -torch.rand(2, 10, generator=generator), torch.rand(2, 10)
    shaped = a3po.shape_advantages(
        torch.ones(2, 10), torch.tensor([True, False]), logprobs, torch.ones(2, 10),
        entropy=entropy, rho_positive=5.0, rho_negative=0.5, positive_cell=cell, negative_cell=cell,
    )
    values = logprobs if cell.endswith("prob") else entropy
    for row, rho in ((0, 5.0), (1, 0.5)):
        order = values[row].argsort(descending=cell.startswith("high"))
        assert set((shaped[row] == rho).nonzero()[:, 0].tolist()) == set(order[:2].tolist())


def test_methods_make_equally_many_updates(tiny_model):
    counts = []
    for preset in ("dapo", "psr", "nsr", "a3po"):
        config = a3po.parse_args(["--setting=demo", f"--model={tiny_model}", f"--preset={preset}",
                                  "--mini_batches=2"])
        policy, _, _, optimizer = a3po.build(config, "cpu", "grids", None)
        samples = fixed_samples()
        mini_batches = a3po.make_batches([samples[:5], samples[5:]], config, 0, "cpu", "grids")
        a3po.score(policy, None, mini_batches, config)
        metrics = a3po.update(policy, optimizer, mini_batches, config, a3po.rho_at(0, config))
        counts.append(metrics["updates"])
    assert counts == [2, 2, 2, 2]


@pytest.mark.parametrize("agg", LOSS_AGGS)
def test_dead_groups_have_no_gradient_but_count_in_the_mean(situation, agg):
    """A group with equal rewards has advantage 0; without dynamic sampling its tokens (or
    responses) stay in the denominator, as in GRPO."""
    path, _, samples, _ = situation
    config = a3po.parse_args(["--setting=demo", f"--model={path}", "--preset=dapo",
                              f"--loss_agg={agg}"])
    policy, model, _, _ = a3po.build(config, "cpu", "grids", None)
    live, dead = copy.deepcopy(samples[:5]), copy.deepcopy(samples[5:])
    for sample in live:
        sample.advantage = 1.0 if sample.correct else -1.0
    for sample in dead:
        sample.advantage = 0.0
    losses = []
    for chosen in (live, live + dead):
        mini_batches = one_mini_batch(chosen, config)
        a3po.score(policy, None, mini_batches, config)
        rho = a3po.rho_at(0, config)
        losses.append(a3po.update(policy, Recorder(model), mini_batches, config, rho)["loss"])
    tokens = [sum(len(sample.ids) for sample in part) for part in (live, live + dead)]
    share = tokens[0] / tokens[1] if agg == "token-mean" else 0.5
    assert losses[1] == pytest.approx(losses[0] * share, rel=1e-4)
