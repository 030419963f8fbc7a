"""The loss section against slow, obvious Python."""

import math
import random
import statistics

import pytest
import torch
from conftest import ROOT
from torch._subclasses import FakeTensorMode

import a3po
from shelf.config import LOSS_AGGS


def random_batch(seed: int, ties: bool = False):
    """Ragged rows (empty and one-token rows among them), log-probs with ties at p = 1."""
    rng = random.Random(seed)
    lengths = [0, 1, 2, 5, rng.randint(3, 40), rng.randint(3, 40), rng.randint(3, 40)]
    rng.shuffle(lengths)
    B, T = len(lengths), max(lengths) + rng.randint(0, 3)
    mask = torch.tensor([[t < n for t in range(T)] for n in lengths])
    draw = (lambda: rng.choice([0.0, 0.0, -0.5, -1.0])) if ties else (lambda: -rng.expovariate(1.0))
    old = torch.tensor([[draw() for _ in range(T)] for _ in range(B)])
    new = old + 0.5 * torch.randn(B, T, generator=torch.Generator().manual_seed(seed))
    advantages = torch.tensor([[rng.gauss(0, 1)] * T for _ in range(B)])
    correct = torch.tensor([rng.random() < 0.5 for _ in range(B)])
    old[~mask], new[~mask] = torch.nan, torch.inf  # what lies under the padding must not matter
    return lengths, mask, old, new, advantages, correct


def slow_shape(lengths, old, advantages, correct, rho_p, rho_n, fraction, w_p=1.0, w_n=1.0):
    out = advantages.tolist()
    for i, n in enumerate(lengths):
        for t in range(len(out[i])):
            out[i][t] *= w_p if correct[i] else w_n
        if n == 0:
            continue
        k = max(1, int(fraction * n))
        by_probability = sorted(range(n), key=lambda t: old[i][t] if correct[i] else -old[i][t])
        for t in by_probability[:k]:
            out[i][t] *= rho_p if correct[i] else rho_n
    return torch.tensor(out)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fraction", [0.2, 0.05, 0.5, 1.0])
def test_shaping_equals_the_loop(ties, fraction):
    for seed in range(20):
        lengths, mask, old, _, advantages, correct = random_batch(seed, ties)
        shaped = a3po.shape_advantages(
            advantages, correct, old, mask, rho_positive=2.0, rho_negative=3.0,
            token_fraction=fraction, positive_weight=0.5, negative_weight=1.5,
        )
        expected = slow_shape(
            lengths, old.tolist(), advantages, correct, 2.0, 3.0, fraction, 0.5, 1.5
        )
        assert torch.allclose(shaped[mask], expected[mask], rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0), (2, 4)])
@pytest.mark.parametrize("agg", LOSS_AGGS)
def test_no_tokens_no_responses_and_no_chosen_tokens_are_no_error(shape, agg):
    """T = 0, B = 0, and rows without a token: the loss is 0, with a gradient of zeros."""
    old, mask = torch.ones(shape), torch.zeros(shape)
    new = old.clone().requires_grad_()
    A = a3po.group_advantages(torch.zeros(shape[0] // 2 * 2), 2)
    A = torch.cat([A, torch.zeros(shape[0] % 2)])[:, None].expand(shape)
    shaped = a3po.shape_advantages(A, torch.ones(shape[0]).bool(), old, mask, rho_positive=2.0,
                                   rho_negative=2.0, entropy=old, negative_cell="low_entropy")
    assert torch.equal(shaped, A)
    loss, stats = a3po.policy_loss(new, old, shaped, mask, rollout_logprobs=old, ref_logprobs=old,
                                   kl_coef=0.1, loss_agg=agg, max_length=8)
    loss.backward()
    assert loss == 0 and torch.equal(new.grad, torch.zeros(shape))
    assert not any(value != 0 for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ratios_and_sums_of_16_bits_are_float32(dtype):
    """80,000 tokens of float16 have an infinite sum in float16."""
    old = torch.full((8, 10_000), -2.0, dtype=dtype)
    new, mask, ones = (old + 0.25).requires_grad_(), torch.ones(8, 10_000), torch.ones(8, 10_000)
    loss, stats = a3po.policy_loss(new, old, ones.to(dtype), mask, rollout_logprobs=old + 0.25)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-1.28 * math.exp(-0.25), rel=1e-4)
    assert stats["ratio"].item() == pytest.approx(80_000 * math.exp(0.25), rel=1e-4)
    assert {value.isfinite().item() for value in stats.values()} == {True}
    assert a3po.aggregate(old, mask.bool()).item() == pytest.approx(-2.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_weights_are_not_rounded_to_the_advantages_dtype(dtype):
    advantages, logprobs = torch.tensor([[1.0] * 4, [-1.0] * 4]), -torch.rand(2, 4)
    kwargs = dict(rho_positive=1.995, rho_negative=1.5, positive_weight=0.3)
    correct, mask = torch.tensor([1, 0]), torch.ones(2, 4)
    expected = a3po.shape_advantages(advantages, correct, logprobs, mask, **kwargs)
    shaped = a3po.shape_advantages(advantages.to(dtype), correct, logprobs, mask, **kwargs)
    assert torch.equal(shaped.float(), expected) and (expected == -1.5).sum() == 1


@pytest.mark.parametrize("length", [5, 2**15 - 1, 2**15, 40_000])
def test_of_equal_tokens_the_earlier_are_chosen_however_many(length):
    values = torch.zeros(2, length)
    values[1, -1] = -1.0  # the one smallest comes last
    chosen = a3po.smallest(values, torch.ones(2, length), 0.9)
    k = int(0.9 * length)
    assert chosen[0].nonzero()[:, 0].tolist() == list(range(k))
    assert chosen[1].nonzero()[:, 0].tolist() == [*range(k - 1), length - 1]


@pytest.mark.parametrize("fraction", [0.2, 0.29, 0.57, 0.1])
def test_the_count_is_pythons(fraction):
    """0.29 * 100 is 28.999... in Python and 29 in float32."""
    mask = torch.ones(300, 300).tril()  # row n - 1 has n tokens
    counts = a3po.smallest(torch.rand(300, 300), mask, fraction).sum(1).tolist()
    assert counts == [max(1, int(fraction * n)) for n in range(1, 301)]


def test_the_loss_needs_no_value_on_the_host():
    """No shape and no branch depends on data: fake tensors, which have none, pass."""
    with FakeTensorMode():
        logprobs, old, advantages = (torch.randn(3, 9) for _ in range(3))
        mask, correct = torch.ones(3, 9) > 0, torch.ones(3) > 0
        shaped = a3po.shape_advantages(advantages, correct, old, mask, entropy=old.abs(),
                                       rho_positive=2.0, rho_negative=3.0,
                                       negative_cell="low_entropy")
        for agg in LOSS_AGGS:
            loss, stats = a3po.policy_loss(
                logprobs.requires_grad_(), old, shaped, mask, dual_clip=3.0, rollout_logprobs=old,
                ref_logprobs=old, kl_coef=0.1, kl_mask=mask, loss_agg=agg,
                denominator=mask.sum(), max_length=9)
            loss.backward()
            assert loss.shape == () and {value.shape for value in stats.values()} == {()}


def test_shaping_ignores_padding_and_row_order():
    _, mask, old, _, advantages, correct = random_batch(3)
    kwargs = dict(rho_positive=2.0, rho_negative=3.0)
    shaped = a3po.shape_advantages(advantages, correct, old, mask, **kwargs)
    wide = [torch.nn.functional.pad(x, (0, 7)) for x in (advantages, old, mask)]
    padded = a3po.shape_advantages(wide[0], correct, wide[1], wide[2], **kwargs)
    assert torch.equal(padded[:, : mask.shape[1]][mask], shaped[mask])
    flip = torch.arange(len(mask) - 1, -1, -1)
    batch = [x[flip] for x in (advantages, correct, old, mask)]
    flipped = a3po.shape_advantages(*batch, **kwargs)
    assert torch.equal(flipped[flip][mask], shaped[mask])


def test_what_cannot_be_meant_is_refused():
    A, old, mask = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool()
    correct = torch.tensor([True])
    rho = dict(rho_positive=2.0, rho_negative=2.0)
    with pytest.raises(TypeError, match="flag"):
        a3po.shape_advantages(A, torch.tensor([0.5]), old, mask, **rho)
    with pytest.raises(ValueError, match="entropy"):
        a3po.shape_advantages(A, correct, old, mask, positive_cell="low_entropy", **rho)
    with pytest.raises(ValueError, match="decay"):
        a3po.decayed_rho(2.0, 1, 0.1, "cosine")


def test_polarity_comes_from_the_flag_not_from_the_reward():
    mask, old = torch.ones(2, 10), torch.linspace(-3, 0, 10).expand(2, 10)
    advantages = torch.full((2, 10), -1.0)  # both below the group's mean, yet one is correct
    shaped = a3po.shape_advantages(
        advantages, torch.tensor([1, 0]), old, mask, rho_positive=2.0, rho_negative=3.0
    )
    assert shaped[0].tolist() == [-2.0] * 2 + [-1.0] * 8
    assert shaped[1].tolist() == [-1.0] * 8 + [-3.0] * 2


@pytest.mark.parametrize("norm_std", [True, False])
def test_group_advantages_equal_the_loop(norm_std):
    rng = random.Random(0)
    rewards = [rng.choice([0.0, 1.0, 0.3]) for _ in range(5 * 6)] + [1.0] * 6
    expected = []
    for g in range(0, len(rewards), 6):
        group = rewards[g : g + 6]
        scale = statistics.stdev(group) + 1e-6 if norm_std else 1.0
        expected += [(r - statistics.mean(group)) / scale for r in group]
    actual = a3po.group_advantages(torch.tensor(rewards), 6, norm_std)
    assert torch.allclose(actual, torch.tensor(expected), atol=1e-5)
    assert (actual[-6:] == 0).all()  # a dead group


@pytest.mark.parametrize("size", [2, 3, 6, 7, 8, 16, 100])
@pytest.mark.parametrize("value", [0.1, 0.7, 100.3, 1 / 3, 1e-30, 1e30, -2.2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_have_no_advantage(size, value, dtype):
    """In float32 the mean of eight 0.7 is not 0.7, and Adam makes full updates of what is left."""
    rewards = torch.full((3 * size,), value, dtype=dtype)
    for norm_std in (True, False):
        advantages = a3po.group_advantages(rewards, size, norm_std)
        assert advantages.dtype == torch.float32 and not advantages.any()


def test_rewards_of_any_type_have_advantages():
    expected = a3po.group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), 4)
    for dtype in (torch.bool, torch.int64, torch.float16, torch.float64):
        rewards = torch.tensor([1, 0, 1, 0], dtype=dtype)
        assert torch.equal(a3po.group_advantages(rewards, 4), expected)


def test_group_of_one():
    alone = a3po.group_advantages(torch.tensor([1.0, 0.0]), 1)
    assert torch.allclose(alone, torch.tensor([1.0, 0.0]))


def test_overlong_penalty():
    lengths = torch.tensor([10, 80, 90, 100, 120])
    penalty = a3po.overlong_penalty(lengths, max_length=100, buffer=20)
    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_rho_decays_to_one_and_stays():
    assert [a3po.decayed_rho(2.0, s, 0.005) for s in (0, 100, 200, 299)] == [2.0, 1.5, 1.0, 1.0]
    assert a3po.decayed_rho(0.5, 50, 0.005) == 0.75  # weights below 1 rise to 1
    assert a3po.decayed_rho(2.0, 100, 0.005, "exp") == pytest.approx(1 + math.exp(-0.5))
    assert a3po.decayed_rho(2.0, 100, 0.005, "none") == 2.0


def slow_loss(lengths, new, old, advantages, rollout, ref, c, agg, max_length):
    """Token by token, straight from the formulas."""
    rows = []
    for i, n in enumerate(lengths):
        row = []
        for t in range(n):
            r, A = math.exp(new[i][t] - old[i][t]), advantages[i][t]
            objective = min(r * A, min(max(r, 1 - c["clip_low"]), 1 + c["clip_high"]) * A)
            if c["dual_clip"] and A < 0:
                objective = max(objective, c["dual_clip"] * A)
            if rollout is not None:
                objective *= min(math.exp(old[i][t] - rollout[i][t]), c["tis_cap"])
            loss = -objective
            if ref is not None:
                d = ref[i][t] - new[i][t]
                loss += c["kl_coef"] * (math.exp(d) - d - 1)
            row.append(loss)
        rows.append(row)
    if agg == "token-mean":
        return sum(map(sum, rows)) / sum(lengths)
    if agg == "seq-mean-token-mean":
        return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)
    return sum(sum(row) / max_length for row in rows) / len(rows)


@pytest.mark.parametrize("agg", LOSS_AGGS)
@pytest.mark.parametrize("dual_clip, tis, kl", [(0.0, False, 0.0), (1.2, True, 0.1)])
def test_policy_loss_equals_the_loop(agg, dual_clip, tis, kl):
    for seed in range(10):
        lengths, mask, old, new, advantages, _ = random_batch(seed)
        generator = torch.Generator().manual_seed(seed)
        rollout = old + 0.5 * torch.randn(old.shape, generator=generator) if tis else None
        ref = old + 0.5 * torch.randn(old.shape, generator=generator) if kl else None
        c = dict(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip, tis_cap=1.5, kl_coef=kl)
        loss, _ = a3po.policy_loss(
            new, old, advantages, mask, rollout_logprobs=rollout, ref_logprobs=ref, loss_agg=agg,
            max_length=50, **c,
        )
        rows = [x.tolist() if x is not None else None for x in (new, old, advantages, rollout, ref)]
        assert loss.item() == pytest.approx(slow_loss(lengths, *rows, c, agg, 50), rel=1e-5)


@pytest.mark.parametrize("agg", LOSS_AGGS)
def test_parts_with_the_global_denominator_add_up(agg):
    _, mask, old, new, advantages, _ = random_batch(1)
    whole, _ = a3po.policy_loss(new, old, advantages, mask, loss_agg=agg, max_length=50)
    denominator = mask.sum().item() if agg == "token-mean" else len(mask)
    parts = [
        a3po.policy_loss(
            new[i : i + 2], old[i : i + 2], advantages[i : i + 2], mask[i : i + 2],
            loss_agg=agg, max_length=50, denominator=denominator,
        )[0]
        for i in range(0, len(mask), 2)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_gradient_is_finite_whatever_is_under_the_mask_or_far_off_policy():
    _, mask, old, new, advantages, _ = random_batch(2)
    new[mask] = torch.where(torch.arange(mask.sum()) % 2 == 0, -80.0, new[mask])
    new.requires_grad_()
    rollout = old.masked_fill(mask & (old < -2), -torch.inf)
    loss, stats = a3po.policy_loss(new, old, advantages, mask, rollout_logprobs=rollout)
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all() and (new.grad[~mask] == 0).all()
    assert all(value.isfinite() for value in stats.values())


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient of token-mean is -A / number of tokens, on every token."""
    _, mask, old, _, advantages, _ = random_batch(4)
    new = old.clone().requires_grad_()
    a3po.policy_loss(new, old, advantages, mask)[0].backward()
    assert torch.allclose(new.grad[mask], -(advantages / mask.sum())[mask])


def test_diagnostics_count_the_clipped_tokens():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    _, stats = a3po.policy_loss(new, old, advantages, mask)
    assert stats["clip_high"] == 1 and stats["clip_low"] == 1
    assert stats["max_ratio_deviation"].item() == pytest.approx(0.5)


def test_the_section_runs_alone():
    source = (ROOT / "a3po.py").read_text()
    section = source.split("# ---- loss: copy from here ----")[1]
    section = section.split("# ---- loss: to here ----")[0]
    names: dict = {}
    exec(compile(section, "section", "exec"), names)
    ones = torch.ones(2, 5)
    shaped = names["shape_advantages"](
        names["group_advantages"](torch.tensor([1.0, 0.0]), 2)[:, None].expand(2, 5),
        torch.tensor([1, 0]), -ones, ones,
        rho_positive=names["decayed_rho"](2.0, 0, 0.005), rho_negative=2.0,
    )
    loss, _ = names["policy_loss"](-ones, -ones, shaped, ones, loss_agg="seq-mean-token-mean")
    assert loss.isfinite()
    assert [line for line in section.splitlines() if "import" in line.split()] == [
        "import torch  # noqa: E402"
    ]
