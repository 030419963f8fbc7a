"""A3PO: adaptive, asymmetric, token-level advantage shaping for RL with verifiable rewards
(arXiv 2512.21625).

Each problem is answered several times, and each answer is right or wrong. An answer's advantage A
compares its reward with those of the other answers to that problem; GRPO and DAPO give every token
of the answer this same A. A3PO gives more to a few tokens, early in training:

    of right answers, the 20 % of tokens with the lowest probability: right moves that are rare
    of wrong answers, the 20 % with the highest probability: wrong moves that the model is sure of

    A' = A * rho on these tokens,  rho = max(1, 2 - 0.005 * step);  A' = A on all others

Both choices keep entropy, and so exploration, up. At step 200 rho is 1 and A3PO is plain DAPO.

A step of `train` has four stages. Sample: vLLM answers each of the step's problems, and graders
say right or wrong. Score: the policy that sampled gives each token its old log-probability. Update:
a few optimiser steps, each of them forward, `shape_advantages`, `policy_loss`, backward. Sync: vLLM
gets the new weights.

    python a3po.py --setting demo                    the embedded tiny model, on anything
    torchrun --nproc_per_node 8 a3po.py              Qwen3-8B-Base on DAPO-Math-17k, eight GPUs
    python a3po.py --help                            every knob, with its source

Read on from the top: the loss (copy it, it needs torch alone), batches, score and update, sampling,
the loop. model.py and rollout.py are the rest of the sitting; shelf/config.py has the knobs.

Sources: [P] the paper, [C] its authors' code, [O] our reading where neither says. Left out: the
critic, sequence and tensor parallel training, asynchronous rollouts.

Shapes: P prompts, G responses to each, B responses in a batch, T response tokens, N packed tokens
(prompts and responses), R response tokens without padding.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import time
from collections import Counter

# Read when torch is imported: its C++ parts write of NUMA nodes and the like
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
try:
    import numpy as np
    import torch.distributed as dist
    from torch import nn
    from tqdm import tqdm

    import eval as evaluation
    import rollout
    import verify
    from model import (
        GPU,
        Policy,
        collate,
        deal,
        distribute,
        load_model,
        pack,
    )
    from rollout import Prompt, Sample
    from shelf.checks import check_agreement, check_model, check_sleep, sync
    from shelf.config import SETTINGS, Config, check_config, parse_args
    from shelf.data import load_problems
    from shelf.folder import Checkpoints, RunFolder, show_example
    from shelf.ranks import (
        UsageError,
        gather,
        init_distributed,
        leave,
        on_rank_0,
        rank,
        say,
        timed,
        world_size,
    )
    from verify import Grade, Graders
except ImportError as missing:  # the loss needs torch alone, on any system
    if __name__ == "__main__":
        sys.exit(f"error: {missing}. Training needs Linux and what `bash run.sh install` puts into "
                 ".venv: then .venv/bin/python a3po.py")


# ---- loss: copy from here ----
import torch  # noqa: E402


def group_advantages(
    rewards: torch.Tensor, group_size: int, norm_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """Return GRPO's advantage of each response in its group [C]; norm_std=False is Dr. GRPO's.

    rewards and result: (P * G,), the G responses to a prompt side by side. The standard deviation
    is the unbiased one; a group of one has mean 0 and deviation 1.
    """
    if group_size == 1:
        return rewards / (1 + eps) if norm_std else rewards.clone()
    groups = rewards.view(len(rewards) // group_size, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if norm_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    return advantages.view(-1)


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int) -> torch.Tensor:
    """Return DAPO's soft overlong punishment (2503.14476, eq. 13), to be added to the reward: 0 up
    to max_length - buffer tokens, then linearly down to -1 at max_length. lengths: (B,)."""
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def decayed_rho(rho: float, step: int, decay_rate: float, decay: str = "linear") -> float:
    """Return rho at a 0-based training step. It decays to 1 [P]; the forms are ours [O]:
    linear = max(1, rho - decay_rate * step), exp = 1 + (rho - 1) * exp(-decay_rate * step)."""
    if decay == "linear":
        return max(1.0, rho - decay_rate * step) if rho > 1 else min(1.0, rho + decay_rate * step)
    if decay == "exp":
        return 1.0 + (rho - 1.0) * 2.718281828459045 ** (-decay_rate * step)
    if decay != "none":
        raise ValueError(f"unknown decay {decay!r}: give linear, exp or none")
    return rho


@torch.no_grad()
def smallest(values: torch.Tensor, mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """Choose the max(1, int(fraction * length)) smallest values of each row [C]; of equal ones the
    earlier [O]. values, mask: (B, T); returns (B, T) of bool."""
    mask = mask.bool()
    if not mask.shape[1]:
        return mask
    short = torch.int16 if mask.shape[1] < 2**15 else torch.int32  # int16 counts 5 times faster
    # double: in float32 the product can round up to a whole number that int() then keeps
    lengths = mask.sum(1, keepdim=True, dtype=short)
    counts = (lengths.double() * fraction).long().clamp_(min=1)
    values = values.float()
    ordered = torch.where(mask, values, torch.inf)
    try:  # in place, and many times faster than torch's sort
        ordered.numpy().sort(axis=1)
    except (TypeError, RuntimeError):  # not on a CPU, a fake tensor, or no NumPy
        ordered = ordered.sort(dim=1).values
    threshold = ordered.gather(1, counts - 1)  # the counts-th smallest value of each row
    room = (counts - torch.searchsorted(ordered, threshold)).to(short)  # for values equal to it
    below, equal = (values < threshold) & mask, (values == threshold) & mask
    equal &= equal.cumsum(1, dtype=short) <= room
    return below | equal


@torch.no_grad()
def shape_advantages(
    advantages: torch.Tensor, correct: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor, *,
    rho_positive: float, rho_negative: float, token_fraction: float = 0.2,
    positive_weight: float = 1.0, negative_weight: float = 1.0,
    positive_cell: str = "low_prob", negative_cell: str = "high_prob",
    entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shape advantages: A * rho_positive on the lowest-probability tokens of correct responses, A *
    rho_negative on the highest-probability tokens of incorrect ones, A elsewhere [P].

    advantages, logprobs and entropy (of the old policy), mask: (B, T); correct: (B,), a flag and
    not a reward. How many tokens are chosen: see `smallest`. positive_weight and negative_weight
    multiply whole responses (polarity level [P]); the cells "low_prob", "high_prob", "low_entropy"
    and "high_entropy" choose other tokens (token level [P]).
    """
    if correct.is_floating_point():  # by dtype: a look at the values would wait for the device
        raise TypeError(f"correct is a flag, not a reward: give bool, not {correct.dtype}")
    if entropy is None and "entropy" in positive_cell + negative_cell:
        raise ValueError(f"{positive_cell} and {negative_cell} need the entropy")
    correct, values = correct.bool()[:, None], {"prob": logprobs, "entropy": entropy}
    (p_side, p_name), (n_side, n_name) = positive_cell.split("_"), negative_cell.split("_")
    keys = values[p_name]
    if n_name != p_name:
        keys = torch.where(correct, keys, values[n_name])
    signs = [1.0 if side == "low" else -1.0 for side in (p_side, n_side)]
    keys = keys * torch.where(correct, *signs)  # (B, T): the smallest are chosen
    chosen = smallest(keys, mask, token_fraction)
    weight = torch.where(correct, positive_weight, negative_weight)
    rho = torch.where(correct, rho_positive, rho_negative)
    return advantages * torch.where(chosen, weight * rho, weight)


def aggregate(
    losses: torch.Tensor, mask: torch.Tensor, loss_agg: str = "token-mean",
    denominator: float | torch.Tensor | None = None, max_length: int | None = None,
) -> torch.Tensor:
    """Average token losses (B, T) to a scalar.

    token-mean: over all tokens (DAPO); seq-mean-token-mean: over each response's tokens, then
    over responses (GRPO); seq-mean-token-sum-norm: sum over tokens / max_length, mean over
    responses (Dr. GRPO). `denominator` is the number of tokens (token-mean) or of responses in
    the *global* batch; with it the parts of any split add up to the same loss and gradient.
    """
    losses, lengths = losses.masked_fill(~mask, 0.0), mask.sum(1)
    rows = losses.sum(1)
    if loss_agg == "seq-mean-token-mean":
        rows = rows / lengths.clamp(min=1)
    elif loss_agg == "seq-mean-token-sum-norm":
        rows = rows / (max_length or mask.shape[1])
    elif loss_agg != "token-mean":
        raise ValueError(f"unknown loss_agg {loss_agg!r}")
    if denominator is None:
        denominator = lengths.sum() if loss_agg == "token-mean" else len(rows)
    return rows.sum() / torch.as_tensor(denominator).clamp(min=1)


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
    mask: torch.Tensor, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 0.0,
    rollout_logprobs: torch.Tensor | None = None, tis_cap: float = 2.0,
    ref_logprobs: torch.Tensor | None = None, kl_coef: float = 0.0,
    kl_mask: torch.Tensor | None = None, loss_agg: str = "token-mean",
    denominator: float | torch.Tensor | None = None, max_length: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss, -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = new / old,
    aggregated (see `aggregate`), and diagnostics: sums over tokens, and max_ratio_deviation.

    All tensors (B, T); gradients flow through logprobs only. dual_clip bounds the loss of tokens
    with A < 0. rollout_logprobs (as sampled by the inference engine) weight each token by
    min(old / rollout, tis_cap), truncated importance sampling; ref_logprobs add kl_coef times the
    k3 estimate exp(d) - d - 1, d = ref - new (on the tokens of kl_mask, if given).
    """
    mask = mask.bool()
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip:
        losses = torch.where(advantages < 0, losses.clamp(max=-dual_clip * advantages), losses)
    stats = {}
    if rollout_logprobs is not None and tis_cap:
        log_weight = (old_logprobs - rollout_logprobs).masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
        weight = log_weight.exp().clamp(max=tis_cap).masked_fill(~rollout_logprobs.isfinite(), 0.0)
        losses = losses * weight.detach()
        stats["tis_weight"] = (weight * mask).sum()
        stats["tis_capped"] = ((log_weight.exp() > tis_cap) & mask).sum()
    if ref_logprobs is not None and kl_coef:
        outside = ~mask if kl_mask is None else ~(mask & kl_mask)
        d = (ref_logprobs - logprobs).masked_fill(outside, 0.0).clamp(-20.0, 20.0)
        k3 = d.exp() - d - 1.0
        losses = losses + kl_coef * k3
        stats["kl_ref"] = (k3.detach() * mask).sum()
    with torch.no_grad():
        stats["ratio"] = (ratio * mask).sum()
        stats["clip_low"] = ((ratio < 1.0 - clip_low) & (advantages < 0) & mask).sum()
        stats["clip_high"] = ((ratio > 1.0 + clip_high) & (advantages > 0) & mask).sum()
        stats["kl_old"] = ((ratio - 1.0 - log_ratio) * mask).sum()
        stats["max_ratio_deviation"] = (ratio - 1.0).abs().max()
    return aggregate(losses, mask, loss_agg, denominator, max_length), stats
# ---- loss: to here ----


# ---- batches ------------------------------------------------------------------------------------


def nothing() -> Sample:
    """Return an empty response."""
    return Sample(Prompt(None, [0]), np.empty(0, np.int32), np.empty(0, np.float32), "stop",
                  grade=Grade(False, None))


def has_gradient(sample: Sample, config: Config) -> bool:
    """Return whether a sample's loss has one; with advantage 0 only that of a KL term has."""
    weight = config.positive_weight if sample.correct else config.negative_weight
    return bool(sample.advantage * weight or (config.kl_coef and not config.proxy_kappa))


def make_batches(
    groups: list[list[Sample]], config: Config, step: int, device: str, kernel: str
) -> list[list[dict]]:
    """Return this rank's micro-batches of each mini-batch, packed once for score and update.
    Samples without a gradient are packed apart: batch["trained"] is False. Every rank gets equally
    many micro-batches, for each forward under FSDP is a collective; surplus ones hold `nothing`.
    """
    order = np.random.default_rng([config.seed, step]).permutation(len(groups))
    mini_batches = []
    for split in np.array_split(order, config.mini_batches):
        samples, micro_batches = sum((groups[g] for g in split), []), []
        for trained in (True, False):
            chosen = [sample for sample in samples if has_gradient(sample, config) == trained]
            packs = [pack(share, config.micro_batch_tokens) for share in deal(chosen, world_size())]
            surplus = max(map(len, packs)) - len(packs[rank()])
            for mine in packs[rank()] + [[nothing()]] * surplus:
                batch = collate(mine, device, kernel)
                micro_batches.append(batch | dict(trained=trained, samples=mine))
        if micro_batches:
            mini_batches.append(micro_batches)
    return mini_batches


# ---- score and update ---------------------------------------------------------------------------


@torch.no_grad()
def score(policy, reference, mini_batches: list[list[dict]], config: Config) -> None:
    """Add to each batch what the policy that sampled says of its tokens, old_logprobs and entropy,
    ref_logprobs of the reference model (or Lp-Reg's proxy), and the masks of the methods that look
    at the whole batch: kl_mask (Lp-Reg) and loss_mask (Fork Tokens), all (B, T).

    With one update a step the policy that sampled is the one being trained, so `update` sees the
    same numbers, and this pass is skipped unless a method needs them beforehand.
    """
    batches, needs_batch = sum(mini_batches, []), config.proxy_kappa or config.entropy_fraction < 1
    for batch in batches:
        if config.mini_batches > 1 or needs_batch:
            batch["old_logprobs"], batch["entropy"], proxy = policy(batch)
            if config.proxy_kappa:
                batch["ref_logprobs"] = proxy
        if reference is not None:
            batch["ref_logprobs"] = reference(batch)[0]
    if config.proxy_kappa and batches:
        ascending = sort_all_tokens(batches, "old_logprobs")
        unlikely = ascending[math.ceil(config.proxy_delta * len(ascending)) - 1]
        for batch in batches:
            batch["kl_mask"] = (batch["old_logprobs"] <= unlikely) & (batch["advantage"] < 0)
            batch["kl_mask"] &= batch["ref_logprobs"].isfinite()
    if config.entropy_fraction < 1 and batches:
        ascending = sort_all_tokens(batches, "entropy")
        forking = ascending[-max(1, int(config.entropy_fraction * len(ascending)))]
        for batch in batches:
            batch["loss_mask"] = batch["mask"] & (batch["entropy"] >= forking)


def sort_all_tokens(batches: list[dict], name: str) -> torch.Tensor:
    """Return a value of all response tokens of the step on all ranks, sorted. Lengths are known on
    the host: nothing is read from the device."""
    values = torch.cat([batch[name].flatten()[batch["places"]] for batch in batches])
    lengths = gather([len(values)])
    if len(lengths) > 1:
        values = nn.functional.pad(values, (0, max(lengths) - len(values)), value=torch.inf)
        parts = [torch.empty_like(values) for _ in lengths]
        dist.all_gather(parts, values)
        values = torch.cat(parts)
    return values.sort().values[: sum(lengths)]


def rho_at(step: int, config: Config) -> dict[str, float]:
    """Return A3PO's weights at a 0-based training step."""
    when = (step, config.decay_rate, config.decay)
    return dict(rho_positive=decayed_rho(config.rho_positive, *when),
                rho_negative=decayed_rho(config.rho_negative, *when))


def update(policy, optimizer, mini_batches: list[list[dict]], config: Config, rho: dict) -> dict:
    """Take one optimiser step per mini-batch; return diagnostics, most of them means over tokens.

    The loss is divided by the token (or response) count of the whole mini-batch over all ranks, so
    the gradient is the same for any split into micro-batches and any number of ranks.
    """
    c, history = config, []
    for micro_batches in mini_batches:
        denominator, sums = count(micro_batches, c.loss_agg), {}
        scale = optimizer.param_groups[0]["loss_scale"]
        for batch in micro_batches:
            if not batch["trained"]:
                continue
            logprobs, entropy, _ = policy(batch)  # (B, T)
            if "old_logprobs" not in batch:  # one update a step: this is the policy that sampled
                batch |= dict(old_logprobs=logprobs.detach(), entropy=entropy.detach())
            advantages = shape_advantages(
                batch["advantage"], batch["correct"], batch["old_logprobs"], batch["mask"],
                token_fraction=c.token_fraction, positive_weight=c.positive_weight,
                negative_weight=c.negative_weight, positive_cell=c.positive_cell,
                negative_cell=c.negative_cell, entropy=batch["entropy"], **rho,
            )  # (B, T)
            batch |= dict(logprobs=logprobs.detach(), shaped=advantages)  # for RunFolder.log_tokens
            loss, stats = policy_loss(
                logprobs, batch["old_logprobs"], advantages, batch["loss_mask"],
                clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip,
                rollout_logprobs=batch["rollout_logprobs"], tis_cap=c.tis_cap,
                ref_logprobs=batch.get("ref_logprobs"), kl_coef=c.kl_coef,
                kl_mask=batch.get("kl_mask"), loss_agg=c.loss_agg, denominator=denominator,
                max_length=c.max_response_length,
            )
            # FSDP and DDP average over ranks; we want the sum
            (loss * (world_size() * scale)).backward()
            add(sums, stats | dict(loss=loss.detach(), tokens=batch["loss_mask"].sum()))
        if not sums:  # nothing to learn from here, on any rank
            continue
        norm = clip_gradients(policy, c.max_grad_norm, scale)
        sums = read(sums | dict(max_grad_norm=norm))
        finite = math.isfinite(sums["max_grad_norm"])  # the norm is global, so all ranks agree
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        adjust_scale(optimizer, finite)
        history.append(sums)
    return diagnose(history, len(mini_batches))


def clip_gradients(policy, max_norm: float, scale: float) -> torch.Tensor:
    """Divide the gradients by the loss scale, which keeps small ones in fp16; clip them; return
    their norm before that."""
    if scale != 1:
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def adjust_scale(optimizer, finite: bool) -> None:
    """Halve fp16's loss scale after a gradient that overflowed, double it after 200 that did not.
    Raises UsageError after the tenth in a row where that is no help."""
    group = optimizer.param_groups[0]
    if finite:
        group["skipped"], group["good_updates"] = 0, group["good_updates"] + 1
        if group["loss_scale"] > 1 and group["good_updates"] % 200 == 0:
            group["loss_scale"] *= 2
        return
    group["skipped"], group["good_updates"] = group["skipped"] + 1, 0
    if group["loss_scale"] > 1:
        group["loss_scale"] /= 2
    elif group["skipped"] >= 10:
        raise UsageError("ten gradients in a row were not finite: the weights may be damaged. Go "
                         "back to a checkpoint, with a lower --lr or --max_grad_norm")


def count(micro_batches: list[dict], loss_agg: str) -> torch.Tensor:
    """Return the denominator of a mini-batch's loss: its tokens (token-mean) or its responses, on
    all ranks. Samples without a gradient, dead groups among them, count too."""
    if loss_agg == "token-mean":
        n = sum(batch["loss_mask"].sum() for batch in micro_batches)
    else:
        n = sum(batch["mask"].any(1).sum() for batch in micro_batches)
    if world_size() > 1:
        dist.all_reduce(n)
    return n


def add(sums: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    """Add `more` to `sums`; of names that start with max_ keep the larger."""
    for name, value in more.items():
        combine = torch.maximum if name.startswith("max_") else torch.add
        sums[name] = combine(sums[name], value) if name in sums else value


def read(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Combine scalars of all ranks as `add` does, and read them from the device: at once, for each
    read waits for it. All ranks have the same names."""
    largest = [name for name in sums if name.startswith("max_")]
    names = largest + [name for name in sums if name not in largest]
    values = torch.stack([sums[name].double() for name in names])
    if world_size() > 1:
        dist.all_reduce(values[: len(largest)], dist.ReduceOp.MAX)
        dist.all_reduce(values[len(largest) :], dist.ReduceOp.SUM)
    return dict(zip(names, values.tolist(), strict=True))


def diagnose(history: list[dict[str, float]], mini_batches: int) -> dict[str, float]:
    """Return a step's metrics from the statistics of its updates."""
    tokens = max(sum(sums["tokens"] for sums in history), 1.0)
    norms = [x["max_grad_norm"] for x in history if math.isfinite(x["max_grad_norm"])]
    deviations = [sums["max_ratio_deviation"] for sums in history]
    metrics = {}
    for name in history[0] if history else ():
        if name not in ("loss", "tokens", "max_grad_norm", "max_ratio_deviation"):
            metrics[name] = sum(sums[name] for sums in history) / tokens
    return metrics | dict(
        loss=sum(sums["loss"] for sums in history) / mini_batches if history else None,
        ratio_max=max(deviations, default=None),
        # of the first update, where the policy is still the old one: anything but ~0 is a bug
        ratio_max_deviation=deviations[0] if deviations else None,
        grad_norm=sum(norms) / len(norms) if norms else None,
        updates=len(norms),
        skipped_updates=len(history) - len(norms),
        **(dict(memory_gib=torch.cuda.max_memory_allocated() / 2**30) if GPU else {}),
    )


# ---- sampling and metrics -----------------------------------------------------------------------


def sample_groups(engine, tokenizer, judge, sampler, config: Config, seconds: dict[str, float]):
    """Sample until prompts_per_step groups carry a signal (dynamic sampling); return the groups to
    train on, the first in the order of their draws, and all that were drawn.

    As some will be dead, more are drawn than are missing. The sampler goes back to behind the last
    that is used, so the rest come again in the next step: choosing those that end first would
    favour short answers.
    """
    c, live, drawn = config, [], []
    share = sampler.dead_share or 0.0  # nothing is known before the first step
    for attempt in range(1 + (c.max_refills if c.dynamic_sampling else 0)):
        missing = c.prompts_per_step - len(live)
        most = (1 + c.max_refills) * c.prompts_per_step - len(drawn)
        if missing <= 0 or most <= 0:
            break
        draws = sampler.next(min(draws_for(missing, share), most))
        new = sample_draws(engine, tokenizer, judge, draws, c, seconds, attempt)
        for (draw, _), group in zip(draws, new, strict=True):
            if is_live(group) or not c.dynamic_sampling:
                live.append((draw, group))
        drawn += new
        check_grades(new)
        share = 1 - len(live) / len(drawn)
    before = share if sampler.dead_share is None else sampler.dead_share
    sampler.dead_share = 0.8 * before + 0.2 * share  # it changes slowly, one step's is noisy
    if len(live) >= c.prompts_per_step:
        sampler.cursor = live[c.prompts_per_step - 1][0] + 1
    if not any(map(is_live, drawn)):
        say(no_signal(drawn, config))
    return [group for _, group in live[: c.prompts_per_step]], drawn


def draws_for(missing: int, dead_share: float) -> int:
    """Return how many draws give `missing` live groups, with 1.5 standard deviations to spare: with
    one, every fifth step would wait for a second round of answers."""
    spare = 1.5 * math.sqrt(missing * dead_share)
    return math.ceil((missing + spare) / max(1 - dead_share, 1e-3))


def sample_draws(engine, tokenizer, judge, draws, config: Config, seconds, attempt: int):
    """Return a group of graded samples for each (draw, prompt), on all ranks."""
    mine = dict(rollout.sample(
        engine, tokenizer, judge, [prompt for _, prompt in draws], config.group_size,
        [rollout.request_seed("train", config.seed, draw) for draw, _ in draws],
        max_tokens=config.max_response_length, temperature=config.temperature, seconds=seconds,
        progress=f"rollouts (refill {attempt})" if attempt else "rollouts",
    ))
    for sample in sum(mine.values(), []):
        sample.prompt = None  # other ranks have it, and the tests of a program can be megabytes
    found = dict(gather(list(mine.items())))
    for i, (_, prompt) in enumerate(draws):
        for sample in found[i]:
            sample.prompt = prompt
    return [found[i] for i in range(len(draws))]


def no_signal(groups: list[list[Sample]], config: Config) -> str:
    """Return what to say of a step from which nothing can be learned; UsageError if the reward
    function failed for all of it."""
    grades = [sample.grade for sample in sum(groups, [])]
    first = next((f", first: {grade.detail}" for grade in grades if grade.detail), "")
    if all(map(reward_failed, grades)):
        raise UsageError(f"--reward {config.reward} failed for all {len(grades)} responses{first}")
    statuses = Counter(grade.status for grade in grades if grade.status != "ok")
    why = "".join(f", {n} {status}" for status, n in statuses.most_common())
    right = sum(bool(grade.correct) for grade in grades)
    return (f"nothing to learn from in this step: in no group do the rewards differ ({right} of "
            f"{len(grades)} responses are correct{why}{first})")


def check_grades(groups: list[list[Sample]]) -> None:
    """Raise UsageError if graders failed for a tenth of the responses: all of these are wrong to
    the trainer, and it would learn from that."""
    grades = [sample.grade for sample in sum(groups, [])]
    failed = [g for g in grades if g.status == "error" and g.reward is None]
    if 10 * len(failed) > len(grades):
        raise UsageError(f"the graders failed for {len(failed)} of {len(grades)} responses, first: "
                         f"{failed[0].detail}. Has this machine no memory or processes left?")


def reward_failed(grade: Grade) -> bool:
    """Return whether --reward raised, was late or gave no number: `rollout` marks that with nan."""
    return grade.reward is not None and math.isnan(grade.reward)


def is_live(group: list[Sample]) -> bool:
    """Return whether the group's rewards differ: else its advantages are all 0."""
    return len({sample.reward for sample in group}) > 1


def rewards_of(groups: list[list[Sample]], config: Config) -> torch.Tensor:
    """Return the rewards of all samples in order, with the overlong penalty."""
    samples = sum(groups, [])
    rewards = torch.tensor([sample.reward for sample in samples])
    if config.overlong_buffer:
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        rewards += overlong_penalty(lengths, config.max_response_length, config.overlong_buffer)
    return rewards


def set_advantages(groups: list[list[Sample]], config: Config) -> None:
    """Give each sample its advantage: its reward against its group's, or +1 / -1 ("raw")."""
    samples = sum(groups, [])
    if config.advantage == "raw":
        advantages = [1.0 if sample.grade.correct else -1.0 for sample in samples]
    else:
        rewards = rewards_of(groups, config)
        advantages = group_advantages(rewards, config.group_size, config.norm_std).tolist()
    for sample, advantage in zip(samples, advantages, strict=True):
        sample.advantage = advantage


def rollout_metrics(groups: list[list[Sample]], config: Config) -> dict[str, float]:
    """Describe what was sampled, dead groups included."""
    samples = sum(groups, [])
    lengths = np.array([len(s.ids) for s in samples])
    correct = np.array([bool(s.grade.correct) for s in samples])
    judged = any(s.grade.correct is not None for s in samples)
    failed = sum(reward_failed(s.grade) for s in samples)
    statuses = [s.grade.status for s in samples]
    kinds = np.array([s.prompt.problem.kind for s in samples])
    rewards, by_kind = rewards_of(groups, config).double(), {}
    for kind in sorted({*kinds}) if len({*kinds}) > 1 else ():
        by_kind[f"reward_{kind}"] = rewards[kinds == kind].mean().item()
        by_kind[f"accuracy_{kind}"] = correct[kinds == kind].mean() if judged else None
    return dict(
        reward=rewards.mean().item(),
        accuracy=correct.mean() if judged else None,
        **by_kind,
        **(dict(reward_errors=failed) if config.reward else {}),
        response_length=lengths.mean(),
        response_length_positive=lengths[correct].mean() if correct.any() else None,
        response_length_negative=lengths[~correct].mean() if not correct.all() else None,
        truncated=np.mean([s.finish_reason == "length" for s in samples]),
        no_answer=statuses.count("no_answer") / len(samples),
        **{f"grader_{x}": statuses.count(x) for x in ("timeout", "error", "bad_reference")},
        groups_drawn=len(groups),
        surplus_groups=max(0, sum(map(is_live, groups)) - config.prompts_per_step),
        dead_groups=1 - np.mean([is_live(group) for group in groups]),
        dead_all_correct=correct.reshape(len(groups), -1).all(1).mean(),
        rollout_tokens=int(lengths.sum()),
    )


def token_metrics(mini_batches: list[list[dict]]) -> dict[str, float]:
    """Return the entropy (nats) by polarity and the mismatch |log p_vLLM - log p_trainer| of the
    tokens that the policy has scored, over all ranks."""
    zero = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(("n_pos", "n_neg", "entropy_pos", "entropy_neg", "gap", "max_gap"), zero)
    for batch in sum(mini_batches, []):
        if "old_logprobs" not in batch:  # without a gradient, in an on-policy step
            continue
        positive = batch["mask"] & batch["correct"][:, None]
        negative = batch["mask"] & ~batch["correct"][:, None]
        gap = (batch["old_logprobs"] - batch["rollout_logprobs"]).abs()  # 0 in the padding
        add(sums, dict(
            n_pos=positive.sum(), entropy_pos=(batch["entropy"] * positive).sum(),
            n_neg=negative.sum(), entropy_neg=(batch["entropy"] * negative).sum(),
            gap=gap.sum(), max_gap=gap.max(),
        ))  # fmt: skip
    x = read(sums)
    n = x["n_pos"] + x["n_neg"]
    return dict(
        entropy=(x["entropy_pos"] + x["entropy_neg"]) / n if n else None,
        entropy_positive=x["entropy_pos"] / x["n_pos"] if x["n_pos"] else None,
        entropy_negative=x["entropy_neg"] / x["n_neg"] if x["n_neg"] else None,
        mismatch_mean=x["gap"] / n if n else None,
        mismatch_max=x["max_gap"] if n else None,
    )


# ---- training -----------------------------------------------------------------------------------


def load_inputs(config: Config):
    """Return tokenizer, prompt sampler, held-out prompts and the judge that --reward names, or
    None; bad input is refused here. Rank 0 alone reads the data."""
    c = config
    tokenizer, model_config = rollout.load_tokenizer(
        c.model, c.max_prompt_length, c.max_response_length
    )
    check_model(c.model, model_config)
    judge = rollout.judge_by_function(c.reward, c.grade_timeout) if c.reward else None
    prompts, held_out = on_rank_0(lambda: read_prompts(c, tokenizer))
    return tokenizer, rollout.PromptSampler(prompts, c.seed), held_out, judge


def read_prompts(config: Config, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on, and the held-out ones."""
    c = config
    problems = load_problems(c.data, kind=c.kind, needs_answer=not c.reward)
    prompts = rollout.encode_prompts(problems, tokenizer, c.template, c.max_prompt_length)
    held_out, problems = [], []
    for source in filter(None, c.eval_data.split(",")):
        problems += load_problems(source.strip(), "test", kind=c.eval_kind)
    if problems := evaluation.name_apart(problems):
        held_out = rollout.encode_prompts(problems, tokenizer, c.template, c.max_prompt_length)
    held_out = held_out[: c.eval_limit or None]
    if c.reward and held_out:
        say("held-out problems are judged by the built-in graders, not by --reward")
    judged = held_out + ([] if c.reward else prompts)
    if any(prompt.problem.kind == "code" for prompt in judged):
        say(verify.protections(c.unsafe_code))
    return prompts, held_out


def build(config: Config, device: str, kernel: str, precision: torch.dtype | None):
    """Return policy, its inner model, the frozen reference (with KL only) and the optimiser. The
    weights are float32, computed with in `precision`."""
    c = config
    say("loading the model")
    head = dict(temperature=c.temperature, head_chunk=c.head_chunk, proxy_kappa=c.proxy_kappa,
                autocast=precision if c.parallel == "ddp" else None)
    model = load_model(c.model, kernel, c.gradient_checkpointing)
    policy = distribute(Policy(model, **head), c.parallel, device, precision, c.shard_ranks)
    reference = None
    if c.kl_coef and not c.proxy_kappa:
        reference = Policy(load_model(c.model, kernel).requires_grad_(False), **head)
        if c.parallel == "fsdp":  # DDP refuses a model without gradients, and needs none
            reference = distribute(reference, "fsdp", device, precision, c.shard_ranks)
        reference = reference.to(device).float()
    optimizer = torch.optim.AdamW(policy.parameters(), c.lr, (0.9, c.adam_beta2),
                                  weight_decay=c.weight_decay)
    optimizer.param_groups[0].update(  # saved with the optimiser's state
        loss_scale=2.0**16 if precision == torch.float16 else 1.0, good_updates=0, skipped=0)
    return policy, model, reference, optimizer


def precision_of(config: Config, device: str) -> torch.dtype | None:
    """Return the 16 bits in which --precision computes, None for float32."""
    name = config.precision
    if name == "auto":
        name = "fp32" if device == "cpu" else "bf16"
    if name == "fp32" and device != "cpu":
        raise UsageError("--precision fp32: the GPU's attention for packed sequences computes in "
                         "16 bits; give bf16 or fp16")
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(name)


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether a thing is due that is done at 0, the last and every `every` steps (0: no)."""
    return step in (0, last) or (every > 0 and step % every == 0)


def set_lr(optimizer, step: int, config: Config) -> float:
    """Set and return the learning rate of a 0-based step: warm-up is linear."""
    lr = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def join(config: Config, run: RunFolder) -> str:
    """Join the group, before anything can fail on one rank alone; return this rank's device. On
    GPUs, say how the run fits into them; UsageError on all ranks if it does not."""
    device = init_distributed()
    run.agree()
    if device != "cpu":
        from shelf import plan

        say("measuring what an update needs")
        gpu = torch.cuda.get_device_properties(0).total_memory
        say(on_rank_0(lambda: plan.check_run(config, gpu, world_size())))
    return device


def start_engine(config: Config, tokenizer, model, precision: torch.dtype | None,
                 prompts: list[Prompt], resumed: bool) -> rollout.Engine:
    """Return vLLM with the policy's weights; it answers the prompts to see that it can sleep."""
    c = config
    say("starting vLLM")
    engine = rollout.Engine(
        c.model, tokenizer, max_num_seqs=c.max_num_seqs, gpu_memory=c.gpu_memory, seed=c.seed,
        max_model_len=c.max_prompt_length + c.max_response_length,
        dtype=precision or torch.float32, template=c.template,
    )
    if resumed:
        sync(engine, model, precision)
    check_sleep(engine, model, precision, prompts)
    return engine


def train(config: Config, run: RunFolder) -> None:
    """Sample, score, update and sync, config.steps times."""
    if config.check:
        load_inputs(config)
        return say("flags, data and model can be used")
    device = join(config, run)
    tokenizer, sampler, held_out, judge = load_inputs(config)
    kernel, precision = "grids" if device == "cpu" else "varlen", precision_of(config, device)
    policy, model, reference, optimizer = build(config, device, kernel, precision)
    checkpoints = Checkpoints(run.checkpoints, policy, model, optimizer, tokenizer,
                              dtype=precision or torch.float32, keep=config.keep_checkpoints)
    checkpoints.announce(config.steps, config.save_every)
    start, state = checkpoints.resume() if config.resume else (0, {})
    sampler.restore(state)
    engine = start_engine(config, tokenizer, model, precision, sampler.prompts[:4], start > 0)
    run.open(start)

    progress = tqdm(range(start, config.steps + 1), "training", config.steps, initial=start,
                    leave=False, disable=None if rank() == 0 else True)
    with Graders(timeout=config.grade_timeout) as graders, progress:
        rules = rollout.judge_by_rules(graders)
        judge = judge or rules
        for step in progress:
            if held_out and is_due(step, config.eval_every, config.steps):
                run.log_eval(step, run_eval(engine, tokenizer, rules, held_out, config))
            if step == config.steps:
                break
            seconds: dict[str, float] = {}
            # Sample: group_size graded responses to each prompt, and from their rewards A
            groups, drawn = sample_groups(engine, tokenizer, judge, sampler, config, seconds)
            set_advantages(groups, config)
            engine.sleep()
            if step == start:
                show_example(drawn[0][0], tokenizer)
            # Score: what the policy that sampled says of each token, before it changes
            with timed(seconds, "score"):
                mini_batches = make_batches(groups, config, step, device, kernel)
                score(policy, reference, mini_batches, config)
            if step - start < 2:  # before the first update, and after the first sync
                check_agreement(policy, mini_batches, 0.2 if precision else 1e-3)
            # Update: one optimiser step per mini-batch, with A3PO's weights of this step
            with timed(seconds, "update"):
                rho, lr = rho_at(step, config), set_lr(optimizer, step, config)
                diagnostics = update(policy, optimizer, mini_batches, config, rho)
            # Sync: vLLM samples the next step from the new policy
            with timed(seconds, "sync"):
                sync(engine, model, precision)

            metrics = dict(step=step) | rollout_metrics(drawn, config) | token_metrics(mini_batches)
            run.log_step(metrics | diagnostics | seconds | rho | dict(lr=lr))
            run.log_rollouts(step, drawn, config.log_rollouts)
            run.log_tokens(step, groups, mini_batches, tokenizer)
            stop = run.asked_to_stop()
            if stop or is_due(step + 1, config.save_every, config.steps):
                run.saved = checkpoints.save(step + 1, sampler.state()) or run.saved
            if stop:
                return
    run.finish()


def run_eval(engine, tokenizer, judge, prompts: list[Prompt], config: Config) -> dict[str, float]:
    """Evaluate the policy that vLLM holds on held-out prompts."""
    say(f"evaluating on {len(prompts)} held-out problems, {config.eval_n} samples each")
    return evaluation.evaluate(
        engine, tokenizer, judge, prompts, n=config.eval_n, seed=config.seed,
        max_tokens=config.max_response_length, temperature=config.eval_temperature,
        top_p=config.eval_top_p,
    )[0]


def announce(config: Config, argv: list[str]) -> None:
    """Say what will run, and which of the demo's values stay with a user's own model or data."""
    other = {"paper": "the demo: --setting demo", "demo": "the paper's: --setting paper"}
    say(f"{config.preset} in the {config.setting} setting: {config.model} on {config.data}, "
        f"{config.steps} steps of {config.prompts_per_step} x {config.group_size} responses, "
        f"{world_size()} rank(s). For {other[config.setting]}")
    demo, names = SETTINGS["demo"], ("max_prompt_length", "max_response_length", "lr", "eval_data")
    given = {flag.partition("=")[0] for flag in argv}
    kept = [f"--{name} {demo[name]}" for name in names if f"--{name}" not in given]
    own = (config.model, config.data) != (demo["model"], demo["data"])
    if config.setting == "demo" and own and kept:
        say(f"NOTE: made for the demo, and not changed for your own: {', '.join(kept)}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--dry_run" in argv:
        from shelf import plan

        return plan.main([flag for flag in argv if flag != "--dry_run"])
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are enough
    config, run = parse_args(argv), None
    try:
        announce(config, argv)
        check_config(config)
        run = RunFolder(dataclasses.asdict(config))
        run.end_at_sigterm()
        train(config, run)
    except UsageError as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # if all ranks have this error, torchrun ends this one meanwhile
        print(f"error: {error}", file=sys.stderr)
        if run and run.step is not None and "--resume auto" not in str(error):
            print(run.where(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print(run.where() if run else "interrupted", file=sys.stderr)
        leave(130)


if __name__ == "__main__":
    main()
    leave()
