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

Sources: [P] the paper, [R] two public reading notes of its ACL version, [C] its authors' code, [O]
our reading where none says.

Left out: a critic (the group is the baseline), sequence and tensor parallel training (FSDP shards
what has to be), asynchronous rollouts (the policy that is updated is the one that sampled), LoRA
(the paper trains all weights), multi-turn and tools (a response is one answer).

Shapes: P prompts, G responses to each, B responses in a batch, T response tokens, N packed tokens
(prompts and responses), R response tokens without padding.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: it writes of NUMA nodes
try:
    import numpy as np
    import torch.distributed as dist
    from torch import nn
    from tqdm import tqdm

    import eval as evaluation
    import rollout
    from model import Policy, collate, deal, distribute, full_weights, load_model, pack
    from rollout import Prompt, Sample, empty_sample, is_live, reward_failed
    from shelf import checks, memory, ranks, show
    from shelf.checkpoints import Checkpoints
    from shelf.config import Config, check_config, parse_args
    from shelf.data import read_prompts
    from shelf.folder import RunFolder, claim
    from shelf.metrics import accumulate, reduce_over_ranks, rollout_metrics, token_metrics
    from shelf.ranks import UsageError, rank, say, timed, world_size
    from shelf.show import with_config
    from verify import Graders
except ModuleNotFoundError as missing:  # the loss needs torch alone, on any system
    if __name__ == "__main__":
        sys.exit(f"error: there is no module {missing.name!r}. Training needs Linux and what `bash "
                 "run.sh install` puts into .venv: then .venv/bin/python a3po.py")


# ---- loss: copy from here ----
import torch  # noqa: E402

# Differences of log-probs stay within this: e^20 = 5e8 is far beyond every clip, and its products
# and sums are still finite, so no token of however wrong a policy makes the whole gradient nan.
LOG_RATIO_LIMIT = 20.0


def group_advantages(
    rewards: torch.Tensor, group_size: int, norm_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """Return GRPO's advantage of each response in its group [C]; norm_std=False is Dr. GRPO's.

    rewards: (P * G,) of any dtype, the G responses to a prompt side by side; result: float32. The
    standard deviation is the unbiased one; a group of one has mean 0 and deviation 1.
    """
    rewards = rewards.float().double()  # sums of float32 are exact: equal rewards have advantage 0
    if group_size == 1 or not len(rewards):
        return (rewards / (1 + eps) if norm_std else rewards).float()
    groups = rewards.view(len(rewards) // group_size, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if norm_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    return advantages.flatten().float()


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int) -> torch.Tensor:
    """Return DAPO's soft overlong punishment (2503.14476, eq. 13), to be added to the reward: 0 up
    to max_length - buffer tokens, then linearly down to -1 at max_length. lengths: (B,)."""
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def decayed_rho(rho: float, step: int, decay_rate: float, decay: str = "linear") -> float:
    """Return rho at a 0-based training step. It decays to 1 [P]; the forms are ours [O]:
    linear = max(1, rho - decay_rate * step), exp = 1 + (rho - 1) * exp(-decay_rate * step).
    A rho below 1, which weakens the chosen tokens, rises to 1 in the same way."""
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
    order = torch.where(mask, values.float(), torch.inf).argsort(dim=1, stable=True)
    place = order.argsort(dim=1)  # of each token among those of its row: the smallest is 0
    # double: in float32 the product can round up to a whole number that long() then keeps
    counts = (mask.sum(1, keepdim=True).double() * fraction).long().clamp(min=1)
    return (place < counts) & mask


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
    correct = correct.bool()[:, None]  # (B, 1)
    keys = dict(low_prob=logprobs, high_prob=-logprobs)  # (B, T): the smallest are chosen
    if entropy is not None:
        keys |= dict(low_entropy=entropy, high_entropy=-entropy)
    chosen = smallest(torch.where(correct, keys[positive_cell], keys[negative_cell]), mask,
                      token_fraction)
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
    losses, lengths = losses.float().masked_fill(~mask, 0.0), mask.sum(1)
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


def log_ratio(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log (p_new / p_old) of each token in float32, 0 outside the mask, within the limit."""
    difference = (new.float() - old.float()).masked_fill(~mask, 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


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
    mask, advantages = mask.bool(), advantages.float()
    change = log_ratio(logprobs, old_logprobs, mask)
    ratio = change.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip:
        losses = torch.where(advantages < 0, losses.clamp(max=-dual_clip * advantages), losses)
    stats = {}
    if rollout_logprobs is not None and tis_cap:
        weight = log_ratio(old_logprobs, rollout_logprobs, mask).exp().detach()
        stats["tis_capped"] = ((weight > tis_cap) & mask).sum()
        weight = weight.clamp(max=tis_cap).masked_fill(~rollout_logprobs.isfinite(), 0.0)
        stats["tis_weight"] = (weight * mask).sum()
        losses = losses * weight
    if ref_logprobs is not None and kl_coef:
        d = log_ratio(ref_logprobs, logprobs, mask if kl_mask is None else mask & kl_mask)
        k3 = d.exp() - d - 1.0
        losses = losses + kl_coef * k3
        stats["kl_ref"] = (k3.detach() * mask).sum()
    with torch.no_grad():
        stats["ratio"] = (ratio * mask).sum()
        stats["clip_low"] = ((ratio < 1.0 - clip_low) & (advantages < 0) & mask).sum()
        stats["clip_high"] = ((ratio > 1.0 + clip_high) & (advantages > 0) & mask).sum()
        stats["kl_old"] = ((ratio - 1.0 - change) * mask).sum()
        deviation = (ratio - 1.0).abs().flatten()
        stats["max_ratio_deviation"] = torch.cat([deviation, deviation.new_zeros(1)]).max()
    return aggregate(losses, mask, loss_agg, denominator, max_length), stats
# ---- loss: to here ----


# ---- batches ------------------------------------------------------------------------------------
# A batch is a dict of tensors on the device, made once for score and update. Who writes its keys:
#
#   collate        ids, positions (N,), attention; predictors, targets, places (R,); correct (B,);
#                  mask, loss_mask, advantage, rollout_logprobs (B, T)
#   make_batches   samples; trained: whether they have a gradient
#   score          old_logprobs, entropy, ref_logprobs (B, T), of the models before the update
#   mask_by_the_whole_batch    loss_mask (again), kl_mask (B, T)
#   update         logprobs, shaped (B, T), the advantages with A3PO's weights


def has_gradient(sample: Sample, config: Config) -> bool:
    """Return whether a sample's loss has one; with advantage 0 only that of a KL term has."""
    weight = config.positive_weight if sample.correct else config.negative_weight
    return bool(sample.advantage * weight or (config.kl_coef and not config.proxy_kappa))


def make_batches(
    groups: list[list[Sample]], config: Config, step: int, device: str, kernel: str
) -> list[list[dict]]:
    """Return this rank's micro-batches of each mini-batch. Samples without a gradient are packed
    apart. Every rank gets equally many, for each forward under FSDP is a collective; surplus ones
    hold an `empty_sample`."""
    order = np.random.default_rng([config.seed, step]).permutation(len(groups))
    mini_batches = []
    for split in np.array_split(order, config.mini_batches):
        samples, micro_batches = list(chain(*(groups[g] for g in split))), []
        for trained in (True, False):
            chosen = [sample for sample in samples if has_gradient(sample, config) == trained]
            packs = [pack(share, config.micro_batch_tokens) for share in deal(chosen, world_size())]
            surplus = max(map(len, packs)) - len(packs[rank()])
            for mine in packs[rank()] + [[empty_sample()]] * surplus:
                batch = collate(mine, device, kernel)
                micro_batches.append(batch | dict(trained=trained, samples=mine))
        if micro_batches:
            mini_batches.append(micro_batches)
    return mini_batches


# ---- score and update ---------------------------------------------------------------------------


def needs_whole_batch(config: Config) -> bool:
    """Return whether the method compares a token with all others of the step."""
    return bool(config.proxy_kappa or config.entropy_fraction < 1)


def is_on_policy(config: Config) -> bool:
    """Return whether the update is what scores its tokens: with one update a step the policy that
    sampled is the one being trained, so their log-probs are the same numbers."""
    return config.mini_batches == 1 and not needs_whole_batch(config)


@torch.no_grad()
def score(policy, reference, mini_batches: list[list[dict]], config: Config) -> None:
    """Add to each batch what the policy that sampled says of its tokens, old_logprobs and entropy
    (unless the update will), and ref_logprobs of the reference model or Lp-Reg's proxy."""
    for batch in chain(*mini_batches):
        if not is_on_policy(config):
            batch["old_logprobs"], batch["entropy"], proxy = policy(batch)
            if config.proxy_kappa:
                batch["ref_logprobs"] = proxy
        if reference is not None:
            batch["ref_logprobs"] = reference(batch)[0]
    if hasattr(reference, "reshard"):
        reference.reshard()  # the root, 2.5 GB for 8B, stays gathered after a forward pass


def mask_by_the_whole_batch(mini_batches: list[list[dict]], config: Config) -> None:
    """Add the masks of the methods that compare a token with all others of the step: kl_mask, the
    least likely with A < 0 (Lp-Reg), and loss_mask, those of highest entropy (Fork Tokens)."""
    batches = list(chain(*mini_batches))
    if not batches or not needs_whole_batch(config):
        return
    if config.proxy_kappa:
        ascending = sort_all_tokens(batches, "old_logprobs")
        unlikely = ascending[math.ceil(config.proxy_delta * len(ascending)) - 1]
    if config.entropy_fraction < 1:
        ascending = sort_all_tokens(batches, "entropy")
        forking = ascending[-max(1, int(config.entropy_fraction * len(ascending)))]
    for batch in batches:
        if config.proxy_kappa:
            batch["kl_mask"] = (batch["old_logprobs"] <= unlikely) & (batch["advantage"] < 0)
            batch["kl_mask"] &= batch["ref_logprobs"].isfinite()
        if config.entropy_fraction < 1:
            batch["loss_mask"] = batch["mask"] & (batch["entropy"] >= forking)


def sort_all_tokens(batches: list[dict], name: str) -> torch.Tensor:
    """Return a value of all response tokens of the step on all ranks, sorted. Lengths are known on
    the host: nothing is read from the device."""
    values = torch.cat([batch[name].flatten()[batch["places"]] for batch in batches])
    lengths = ranks.gather([len(values)])
    if len(lengths) > 1:
        values = nn.functional.pad(values, (0, max(lengths) - len(values)), value=torch.inf)
        parts = [torch.empty_like(values) for _ in lengths]
        dist.all_gather(parts, values)
        values = torch.cat(parts)
    return values.sort().values[: sum(lengths)]


NO_SCALING = torch.amp.GradScaler(enabled=False)  # only fp16 wants its loss scaled


def update(policy, optimizer, mini_batches: list[list[dict]], config: Config, rho: dict,
           scaler: torch.amp.GradScaler = NO_SCALING) -> dict[str, float]:
    """Take one optimiser step per mini-batch; return diagnostics, most of them means over tokens.

    The loss is divided by the token (or response) count of the whole mini-batch over all ranks, so
    the gradient is the same for any split into micro-batches and any number of ranks.
    """
    history = []
    for micro_batches in mini_batches:
        denominator, sums = loss_denominator(micro_batches, config.loss_agg), {}
        for batch in micro_batches:
            if not batch["trained"]:
                continue
            logprobs, entropy, _ = policy(batch)  # (B, T)
            if is_on_policy(config):
                batch |= dict(old_logprobs=logprobs.detach(), entropy=entropy.detach())
            advantages = shape_advantages(
                batch["advantage"], batch["correct"], batch["old_logprobs"], batch["mask"], **rho,
                token_fraction=config.token_fraction, positive_weight=config.positive_weight,
                negative_weight=config.negative_weight, positive_cell=config.positive_cell,
                negative_cell=config.negative_cell, entropy=batch["entropy"],
            )  # (B, T)
            batch |= dict(logprobs=logprobs.detach(), shaped=advantages)  # for RunFolder.log_tokens
            loss, stats = policy_loss(
                logprobs, batch["old_logprobs"], advantages, batch["loss_mask"],
                clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
                rollout_logprobs=batch["rollout_logprobs"], tis_cap=config.tis_cap,
                ref_logprobs=batch.get("ref_logprobs"), kl_coef=config.kl_coef,
                kl_mask=batch.get("kl_mask"), loss_agg=config.loss_agg, denominator=denominator,
                max_length=config.max_response_length,
            )
            # FSDP and DDP average over ranks; we want the sum
            scaler.scale(loss * world_size()).backward()
            accumulate(sums, stats | dict(loss=loss.detach(), tokens=batch["loss_mask"].sum()))
        if sums:  # else there is nothing to learn from here, on any rank
            scaler.unscale_(optimizer)
            norm = clip_gradients(policy, config.max_grad_norm)
            history.append(reduce_over_ranks(sums | dict(max_grad_norm=norm)))
            step_or_skip(optimizer, scaler, history[-1]["max_grad_norm"])
    return diagnose(history, len(mini_batches))


def clip_gradients(policy, max_norm: float) -> torch.Tensor:
    """Clip the gradients of all ranks together; return their norm before that."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def step_or_skip(optimizer, scaler: torch.amp.GradScaler, norm: float) -> None:
    """Take the step if the gradient is finite; the norm is global, so all ranks agree. Raises
    UsageError after ten in a row that are not, if no smaller loss scale (fp16) can help."""
    state = optimizer.param_groups[0]  # is saved
    if math.isfinite(norm):
        scaler.step(optimizer)
        state["skipped"] = 0
    else:
        state["skipped"] += 1
        if state["skipped"] >= 10 and scaler.get_scale() <= 1:
            raise UsageError("ten gradients in a row were not finite: the weights may be damaged. "
                             "Go back to a checkpoint, with a lower --lr or --max_grad_norm")
    scaler.update()
    optimizer.zero_grad()


def loss_denominator(micro_batches: list[dict], loss_agg: str) -> torch.Tensor:
    """Return the denominator of a mini-batch's loss: its tokens (token-mean) or its responses, on
    all ranks. Samples without a gradient, dead groups among them, count too."""
    if loss_agg == "token-mean":
        n = sum(batch["loss_mask"].sum() for batch in micro_batches)
    else:
        n = sum(batch["mask"].any(1).sum() for batch in micro_batches)
    if world_size() > 1:
        dist.all_reduce(n)
    return n


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
        **(dict(memory_gib=memory.trainer_memory()) if torch.cuda.is_available() else {}),
    )


# ---- sampling and metrics -----------------------------------------------------------------------


def sample_groups(engine, tokenizer, judge, sampler, config: Config, seconds: dict[str, float]):
    """Sample until prompts_per_step groups carry a signal (dynamic sampling); return the groups to
    train on, the first in the order of their draws, and all that were drawn.

    As some will be dead, more are drawn than are missing. The sampler goes back to behind the last
    that is used, so the rest come again in the next step: choosing those that end first would
    favour short answers.
    """
    live, drawn, wanted = [], [], config.prompts_per_step
    share = sampler.dead_share or 0.0  # nothing is known before the first step
    for attempt in range(1 + (config.max_refills if config.dynamic_sampling else 0)):
        missing = wanted - len(live)
        most = (1 + config.max_refills) * wanted - len(drawn)
        if missing <= 0 or most <= 0:
            break
        draws = sampler.next(min(draws_for(missing, share), most))
        new = sample_draws(engine, tokenizer, judge, draws, config, seconds, attempt)
        for (draw, _), group in zip(draws, new, strict=True):
            if is_live(group) or not config.dynamic_sampling:
                live.append((draw, group))
        drawn += new
        check_grades(new)
        share = 1 - len(live) / len(drawn)
    sampler.note_dead(share)
    if len(live) >= wanted:
        sampler.rewind(live[wanted - 1][0] + 1)
    if not any(map(is_live, drawn)):
        say(no_signal(drawn, config.reward))
    return [group for _, group in live[:wanted]], drawn


def draws_for(missing: int, dead_share: float) -> int:
    """Return how many draws give `missing` live groups, with 1.5 standard deviations to spare: with
    one, every fifth step would wait for a second round of answers."""
    spare = 1.5 * math.sqrt(missing * dead_share)
    return math.ceil((missing + spare) / max(1 - dead_share, 1e-3))


def sample_draws(engine, tokenizer, judge, draws: list[tuple[int, Prompt]], config: Config,
                 seconds: dict[str, float], attempt: int) -> list[list[Sample]]:
    """Return a group of graded samples for each (draw, prompt), on all ranks."""
    mine = rollout.sample(
        engine, tokenizer, judge, [prompt for _, prompt in draws], config.group_size,
        [rollout.request_seed("train", config.seed, draw) for draw, _ in draws],
        max_tokens=config.max_response_length, temperature=config.temperature, seconds=seconds,
        progress=f"rollouts (refill {attempt})" if attempt else "rollouts",
    )
    found = dict(ranks.gather(list(mine)))
    for i, (_, prompt) in enumerate(draws):
        for sample in found[i]:
            sample.prompt = prompt
    return [found[i] for i in range(len(draws))]


def no_signal(groups: list[list[Sample]], reward: str) -> str:
    """Return what to say of a step from which nothing can be learned; UsageError if the reward
    function, named so in --reward, failed for all of it."""
    grades = [sample.grade for sample in chain(*groups)]
    first = next((f", first: {grade.detail}" for grade in grades if grade.detail), "")
    if all(map(reward_failed, grades)):
        raise UsageError(f"--reward {reward} failed for all {len(grades)} responses{first}")
    statuses = Counter(grade.status for grade in grades if grade.status != "ok")
    why = "".join(f", {n} {status}" for status, n in statuses.most_common())
    right = sum(bool(grade.correct) for grade in grades)
    return (f"nothing to learn from in this step: in no group do the rewards differ ({right} of "
            f"{len(grades)} responses are correct{why}{first})")


def check_grades(groups: list[list[Sample]]) -> None:
    """Raise UsageError if graders failed for a tenth of the responses: it would be learned from."""
    grades = [sample.grade for sample in chain(*groups)]
    failed = [g for g in grades if g.status == "error" and g.reward is None]
    if 10 * len(failed) > len(grades):
        raise UsageError(f"the graders failed for {len(failed)} of {len(grades)} responses, first: "
                         f"{failed[0].detail}. Has this machine no memory or processes left?")


def rewards_of(groups: list[list[Sample]], config: Config) -> torch.Tensor:
    """Return the rewards of all samples in order, with the overlong penalty: (B,)."""
    samples = list(chain(*groups))
    rewards = torch.tensor([sample.reward for sample in samples])
    if config.overlong_buffer:
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        rewards += overlong_penalty(lengths, config.max_response_length, config.overlong_buffer)
    return rewards


def set_advantages(groups: list[list[Sample]], config: Config) -> None:
    """Give each sample its advantage: its reward against its group's, or +1 / -1 ("raw")."""
    samples = list(chain(*groups))
    if config.advantage == "raw":
        advantages = [1.0 if sample.grade.correct else -1.0 for sample in samples]
    else:
        rewards = rewards_of(groups, config)
        advantages = group_advantages(rewards, config.group_size, config.norm_std).tolist()
    for sample, advantage in zip(samples, advantages, strict=True):
        sample.advantage = advantage


# ---- training -----------------------------------------------------------------------------------


def load_inputs(config: Config):
    """Return tokenizer, prompt sampler, held-out prompts and the judge that --reward names, or
    ""; bad input is refused here. Rank 0 alone reads the data."""
    checks.check_machine(config.setting == "paper")
    tokenizer, model_config = rollout.load_tokenizer(
        config.model, config.max_prompt_length, config.max_response_length, config.template)
    checks.check_model(config.model, model_config)
    checks.check_weights(config.model, model_config)
    checks.check_saving(config.model, model_config, tokenizer)
    judge = config.reward and rollout.judge_by_function(config.reward, config.grade_timeout)
    prompts, held_out = ranks.on_rank_0(lambda: read_prompts(config, tokenizer))
    if judge and reward_failed(grade := judge(prompts[0].problem, "").result()):
        raise UsageError(f"--reward {config.reward} failed for an empty response: {grade.detail}; "
                         "return a number, (number, correct) or (number, correct, {part: number})")
    return tokenizer, rollout.PromptSampler(prompts, config.seed), held_out, judge


def build(config: Config, device: str, kernel: str, precision: torch.dtype | None):
    """Return policy, its inner model, the frozen reference (with KL only) and the optimiser. The
    weights are float32, computed with in `precision`."""
    say("loading the model")
    shards, sharded = config.shard_ranks, config.parallel == "fsdp"
    head = dict(temperature=config.temperature, head_chunk=config.head_chunk,
                proxy_kappa=config.proxy_kappa, autocast=None if sharded else precision)
    model = load_model(config.model, kernel, config.recompute)
    needs_reference = bool(config.kl_coef and not config.proxy_kappa)
    memory.engine_sizes(config, model)  # refuses what does not fit, before it is moved there
    policy = distribute(Policy(model, **head), config.parallel, device, precision, shards,
                        config.compile, config.offload)
    reference = None
    if needs_reference:
        reference = Policy(load_model(config.model, kernel).requires_grad_(False), **head)
        # DDP refuses a model without gradients, and needs none
        reference = distribute(reference, "fsdp", device, precision, shards, config.compile,
                               config.offload) if sharded else reference.to(device).float()
    optimizer = memory.adam(policy, config.lr, config.adam_beta2, config.weight_decay, device)
    return policy, model, reference, optimizer


def precision_of(name: str, device: str) -> torch.dtype | None:
    """Return the 16 bits in which --precision computes, None for float32."""
    if name == "auto":
        name = "fp32" if device == "cpu" else "bf16"
    if name == "fp32" and device != "cpu":
        raise UsageError("--precision fp32: the GPU's attention for packed sequences computes in "
                         "16 bits; give bf16 or fp16")
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(name)


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether a thing is due that is done at 0, the last and every `every` steps (0: no)."""
    return step in (0, last) or (every > 0 and step % every == 0)


def rho_at(step: int, config: Config) -> dict[str, float]:
    """Return A3PO's weights at a 0-based training step."""
    when = (step, config.decay_rate, config.decay)
    return dict(rho_positive=decayed_rho(config.rho_positive, *when),
                rho_negative=decayed_rho(config.rho_negative, *when))


def set_lr(optimizer, lr: float, step: int, warmup_steps: int) -> float:
    """Set and return the learning rate of a 0-based step: warm-up is linear."""
    lr *= min(1.0, (step + 1) / max(warmup_steps, 1))
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    return lr


def start_engine(config: Config, tokenizer, model, precision: torch.dtype | None,
                 prompts: list[Prompt], resumed: bool) -> rollout.Engine:
    """Return vLLM with the policy's weights; it answers the prompts to see that it can sleep."""
    say("starting vLLM")
    engine = rollout.Engine(
        config.model, tokenizer, **memory.engine_sizes(config, model), seed=config.seed,
        max_model_len=config.max_prompt_length + config.max_response_length,
        dtype=precision or torch.float32, template=config.template,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    if resumed:
        engine.sync(full_weights(model, precision))
    checks.check_sleep(engine, model, precision, prompts)
    return engine


def train(config: Config, run: RunFolder) -> None:
    """Sample, score, update and sync, config.steps times."""
    device = ranks.init_distributed()  # before anything can fail on one rank alone
    tokenizer, sampler, held_out, judge = load_inputs(config)
    run.path = claim("--output_dir", run.path)  # rank 0's, whose name may hold another second
    kernel = "grids" if device == "cpu" else "varlen"
    precision = precision_of(config.precision, device)
    policy, model, reference, optimizer = build(config, device, kernel, precision)
    scaler = torch.amp.GradScaler(device.partition(":")[0], growth_interval=200,
                                  enabled=precision == torch.float16)
    checkpoints = Checkpoints(run.checkpoints, policy, model, optimizer, tokenizer,
                              precision or torch.float32, config.keep_checkpoints)
    start, state = checkpoints.resume() if config.resume else (0, {})
    sampler.restore(state)
    scaler.load_state_dict(state.get("loss_scale") or scaler.state_dict())
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
                show.show_example(drawn[0][0], tokenizer)
            # Score: what the policy that sampled says of each token, before it changes
            with timed(seconds, "score"):
                mini_batches = make_batches(groups, config, step, device, kernel)
                score(policy, reference, mini_batches, config)
                mask_by_the_whole_batch(mini_batches, config)
            # Update: one optimiser step per mini-batch, with A3PO's weights of this step
            with timed(seconds, "update"):
                rho = rho_at(step, config)
                lr = set_lr(optimizer, config.lr, step, config.warmup_steps)
                diagnostics = update(policy, optimizer, mini_batches, config, rho, scaler)
            # Sync: vLLM samples the next step from the new policy
            with timed(seconds, "sync"):
                engine.sync(full_weights(model, precision))
            sampled = rollout_metrics(drawn, rewards_of(drawn, config), config.prompts_per_step)
            metrics = dict(step=step, lr=lr) | sampled | token_metrics(mini_batches) | diagnostics
            run.log_step(metrics | seconds | rho | dict(preemptions=memory.preemptions(engine)))
            run.log_rollouts(step, drawn)
            run.log_tokens(step, groups, mini_batches, tokenizer)
            checks.check_agreement(metrics, precision)
            stop = run.asked_to_stop()
            if stop or is_due(step + 1, config.save_every, config.steps):
                checkpoints.save(step + 1, sampler.state() | dict(loss_scale=scaler.state_dict()))
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


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--dry_run" in argv:  # a program of its own, which runs this one's `update`
        paths = [os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH")]
        flags = [flag for flag in argv if flag != "--dry_run"]
        plan = [sys.executable, "-P", "-m", "shelf.plan", *flags]
        path = os.pathsep.join(filter(None, paths))  # an empty entry would be the working directory
        sys.exit(subprocess.call(plan, env=os.environ | dict(PYTHONPATH=path)))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are enough
    run = None
    try:
        config = parse_args(with_config(argv))
        say(f"{config.preset} in the {config.setting} setting: {config.model} on {config.data}, "
            f"{config.steps} steps of {config.prompts_per_step} x {config.group_size} responses of "
            f"at most {config.max_response_length} tokens, lr {config.lr}, {world_size()} rank(s)")
        check_config(config)
        run = RunFolder(config)
        if config.check:
            load_inputs(config)
            return say("flags, data and model can be used")
        run.end_at_sigterm()
        train(config, run)
    except UsageError as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        begun = run and run.step is not None and "--resume auto" not in str(error)
        ranks.give_up(error, run.where() if begun else "")
    except KeyboardInterrupt:
        if rank() == 0:
            print(run.where() if run else "interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        error.add_note(run.where() if run else "nothing was written")
        raise


if __name__ == "__main__":
    ranks.launch(main)
