"""The metrics of a training step: what they say of samples and tokens, and the words of each."""

import re
import shutil
import textwrap
from itertools import chain

import numpy as np
import torch

from rollout import Sample, is_live, reward_failed
from shelf.ranks import UsageError, distributed

# ---- numbers ------------------------------------------------------------------------------------


def accumulate(sums: dict, more: dict) -> None:
    """Add the scalar tensors in `more` to those in `sums`; of names that start with max_ keep the
    larger."""
    for name, value in more.items():
        combine = torch.maximum if name.startswith("max_") else torch.add
        sums[name] = combine(sums[name], value) if name in sums else value


def reduce_over_ranks(sums: dict) -> dict[str, float]:
    """Combine scalar tensors of all ranks as `accumulate` does, and read them from the device: at
    once, for each read waits for it. All ranks have the same names."""
    largest = [name for name in sums if name.startswith("max_")]
    names = largest + [name for name in sums if name not in largest]
    values = torch.stack([sums[name].double() for name in names])
    if dist := distributed():
        dist.all_reduce(values[: len(largest)], dist.ReduceOp.MAX)
        dist.all_reduce(values[len(largest) :], dist.ReduceOp.SUM)
    return dict(zip(names, values.tolist(), strict=True))


def rollout_metrics(
    groups: list[list[Sample]], rewards: torch.Tensor, wanted: int
) -> dict[str, float | None]:
    """Describe what was sampled for `wanted` live groups, dead ones included. rewards: of all
    samples in order, with penalties, (B,)."""
    samples = list(chain(*groups))
    lengths = np.array([len(s.ids) for s in samples])
    correct = np.array([bool(s.grade.correct) for s in samples])
    judged = np.array([s.grade.correct is not None for s in samples])
    incorrect = judged & ~correct
    statuses = [s.grade.status for s in samples]
    kinds = np.array([s.prompt.problem.kind for s in samples])
    rewards, more = rewards.double(), {}
    for kind in sorted({*kinds}) if len({*kinds}) > 1 else ():
        of = kinds == kind
        more[f"reward_{kind}"] = rewards[of].mean().item()
        more[f"accuracy_{kind}"] = correct[of].mean() if judged[of].any() else None
    parts = [s.grade.parts for s in samples]
    for name in sorted({*chain(*parts)}):
        more[f"reward_{name}"] = np.mean([x[name] for x in parts if name in x])
    if any(s.grade.reward is not None for s in samples):  # by a reward function
        more["reward_errors"] = sum(reward_failed(s.grade) for s in samples)
    return dict(
        reward=rewards.mean().item(),
        accuracy=correct.mean() if judged.any() else None,
        **more,
        response_length=lengths.mean(),
        response_length_positive=lengths[correct].mean() if correct.any() else None,
        response_length_negative=lengths[incorrect].mean() if incorrect.any() else None,
        truncated=np.mean([s.finish_reason == "length" for s in samples]),
        no_answer=statuses.count("no_answer") / len(samples),
        **{f"grader_{x}": statuses.count(x) for x in ("timeout", "error", "bad_reference")},
        groups_drawn=len(groups),
        surplus_groups=max(0, sum(map(is_live, groups)) - wanted),
        dead_groups=1 - np.mean([is_live(group) for group in groups]),
        dead_all_correct=correct.reshape(len(groups), -1).all(1).mean() if judged.any() else None,
        rollout_tokens=int(lengths.sum()),
    )


def token_metrics(mini_batches: list[list[dict]]) -> dict[str, float]:
    """Return the entropy (nats) by polarity and the mismatch |log p_vLLM - log p_trainer| of the
    tokens that the policy has scored, over all ranks."""
    zero = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(("n_pos", "n_neg", "entropy_pos", "entropy_neg", "gap", "max_gap"), zero)
    for batch in chain(*mini_batches):
        if "old_logprobs" not in batch:  # without a gradient, where the update scores
            continue
        positive = batch["mask"] & batch["correct"][:, None]
        negative = batch["mask"] & ~batch["correct"][:, None]
        gap = (batch["old_logprobs"] - batch["rollout_logprobs"]).abs()  # 0 in the padding
        gap = gap.where(batch["rollout_logprobs"].isfinite(), 0.0)
        accumulate(sums, dict(
            n_pos=positive.sum(), entropy_pos=(batch["entropy"] * positive).sum(),
            n_neg=negative.sum(), entropy_neg=(batch["entropy"] * negative).sum(),
            gap=gap.sum(), max_gap=gap.max(),
        ))  # fmt: skip
    x = reduce_over_ranks(sums)
    n = x["n_pos"] + x["n_neg"]
    return dict(
        entropy=(x["entropy_pos"] + x["entropy_neg"]) / n if n else None,
        entropy_positive=x["entropy_pos"] / x["n_pos"] if x["n_pos"] else None,
        entropy_negative=x["entropy_neg"] / x["n_neg"] if x["n_neg"] else None,
        mismatch_mean=x["gap"] / n if n else None,
        mismatch_max=x["max_gap"] if n else None,
    )


# ---- words --------------------------------------------------------------------------------------

METRICS = {  # name in metrics.jsonl: "label, unit: what it is; what is healthy"
    "step": "step, steps: counted from 0; an evaluation comes before the step of its number",
    # what was sampled, groups that are then dropped included
    "reward": "reward, points: mean of all responses, with penalties; what training raises",
    "accuracy": "accuracy, share: correct responses, at the training temperature; if it rises and "
                "eval_accuracy does not, the problems are learned by heart",
    "accuracy_KIND": "accuracy by kind, share: of the responses to problems of this kind",
    "reward_KIND": "reward by kind, points: mean of the responses to problems of this kind",
    "reward_PART": "part of the reward, points: mean of the responses to which --reward gave it",
    "reward_errors": "reward errors, responses: --reward failed, so their group's lowest reward; 0",
    "response_length": "length, tokens: mean; if it nears --max_response_length, see truncated",
    "response_length_positive": "correct length, tokens: mean of correct responses",
    "response_length_negative": "incorrect length, tokens: mean of incorrect responses",
    "truncated": "truncated, share: cut at --max_response_length, mostly wrong; over 0.1 raise it",
    "no_answer": "no answer, share: none is marked as one; if it stays high, see --template",
    "grader_timeout": "late grades, responses: over --grade_timeout, so wrong; should be near 0",
    "grader_error": "grader errors, responses: counted as wrong for them; should be 0",
    "grader_bad_reference": "bad references, responses: to problems with an unusable answer; 0",
    "groups_drawn": "groups, prompts: over --prompts_per_step they replace dead groups",
    "surplus_groups": "surplus, prompts: live groups beyond the need; drawn again in the next step",
    "dead_groups": "dead, share: of equal rewards, useless; near 1 the data is too easy or hard",
    "dead_all_correct": "all correct, share: groups that are dead because they are too easy",
    "rollout_tokens": "sampled, tokens: in all responses of the step, on all ranks",
    # the policy that sampled, on the responses that are trained on
    "entropy": "entropy, nats: mean over the tokens; near 0 nothing new is tried any more, in a "
               "rise without end the text falls apart",
    "entropy_positive": "correct entropy, nats: mean over the tokens of correct responses",
    "entropy_negative": "incorrect entropy, nats: mean over the tokens of incorrect responses",
    "mismatch_mean": "mismatch, nats: mean |log p in vLLM - log p in the trainer|: about 1e-6 in "
                     "float32, 1e-2 in bfloat16; far more, and they are not the same model",
    "mismatch_max": "mismatch max, nats: the same at the worst token",
    # the loss, over the tokens of all updates of the step
    "tis_weight": "TIS weight, factor: mean of p in trainer / p in vLLM, capped; near 1 is good",
    "tis_capped": "TIS capped, share: tokens above --tis_cap; if not near 0 see mismatch_mean",
    "kl_ref": "KL to reference, nats: how far the policy is from it (k3); only with --kl_coef",
    "ratio": "ratio, factor: mean of new / old probability; should be near 1",
    "clip_low": "clipped low, share: tokens with A < 0 and ratio < 1 - --clip_low: no gradient",
    "clip_high": "clipped high, share: tokens with A > 0 and ratio > 1 + --clip_high: no gradient; "
                 "of either more than a few per cent means too large updates",
    "kl_old": "KL to old, nats: how far the step moved the policy (k3); a jump is a warning",
    "loss": "loss, mean: near 0 by design, as advantages cancel; watch reward and grad_norm",
    "ratio_max": "|ratio-1|, largest: of a token; over 10 step after step is bad: lower --lr",
    "ratio_max_deviation": "first ratio, |ratio - 1|: at the first update of a step, where the "
                           "policy has not changed yet: above 1e-5 in float32 it is a bug",
    "grad_norm": "grad norm, L2: mean before clipping; growth without end announces divergence",
    "updates": "updates, optimiser steps: a mini-batch without a gradient makes none",
    "skipped_updates": "skipped, optimiser steps: their gradient was not finite; should be 0",
    "memory_gib": "memory, GiB: most that rank 0's trainer had on its GPU since the last update",
    "preemptions": "preempted, sequences: computed again by rank 0's engine, for want of room",
    "rho_positive": "rho, factor: on correct responses' chosen tokens; at 1 the shaping is over",
    "rho_negative": "incorrect rho, factor: on incorrect responses' chosen tokens",
    "lr": "learning rate, per update: of the step, with its warm-up",
    "tokens_per_second": "tokens/s, tokens a second: sampled ones, over the whole step",
    "seconds": "seconds, s: of the step, without evaluations: the sum of the next five",
    "seconds_generate": "generate, s: sampling, and the grading that runs meanwhile",
    "seconds_grade": "grade, s: waiting for grades after that; should be near 0",
    "seconds_score": "score, s: log-probs under the old and the reference policy",
    "seconds_update": "update, s: forward and backward passes, optimiser",
    "seconds_sync": "sync, s: handing the new weights to vLLM",
    # held-out problems; in results.json without eval_
    "eval_accuracy": "held-out accuracy, share: avg@n, of the samples those that are correct",
    "eval_accuracy_stderr": "standard error, share: of eval_accuracy, clustered by problem; what "
                            "differs by less than two of them may be chance",
    "eval_accuracy_KIND": "held-out by kind, share: accuracy on the problems of this kind",
    "eval_entropy": "held-out entropy, nats: mean -log p at the evaluation's temperature and top_p",
    "eval_length": "held-out length, tokens: mean",
    "eval_truncated": "held-out truncated, share: cut at the limit of tokens; should be low",
    "eval_no_answer": "held-out no answer, share: samples in which none is marked as one",
    "eval_timeouts": "timeouts, samples: grading or the program took too long, so wrong",
    "eval_grader_failures": "grader failures, samples: counted as wrong for them; should be 0",
    "eval_missing_modules": "missing modules, samples: programs that failed and import what is not "
                            "in the standard library; other harnesses may have it",
    "eval_prompts_too_long": "too long, problems: for the context, so wrong; should be 0",
    "eval_problems": "problems, count: of the benchmark, or of --limit",
    "eval_n": "n, samples: of each problem",
    "eval_pass@k": "pass@k, share: chance that one of k samples is correct, unbiased",
    "eval_maj@n": "maj@n, share: problems whose most frequent answer is correct",
    "eval_seconds": "held-out seconds, s: for sampling and grading",
}
HEADINGS = {text.partition(", ")[0].strip("|"): name for name, text in METRICS.items()}


def describe(name: str) -> tuple[str, str, str]:
    """Return label, unit and meaning; `name` as in metrics.jsonl or results.json, else KeyError."""
    name = re.sub(r"maj@\d+$", "maj@n", re.sub(r"pass@\d+$", "pass@k", name))
    name = re.sub("_(math|choice|code)$", "_KIND", name)
    name = re.sub("^reward_(?!(KIND|errors)$).*", "reward_PART", name)
    heading, _, meaning = METRICS[name if name in METRICS else f"eval_{name}"].partition(": ")
    label, _, unit = heading.partition(", ")
    return label, unit, meaning


def glossary(names: list[str]) -> str:
    """Explain these metrics, or headings of the console, or all, in lines that fit the terminal."""
    column = max(map(len, METRICS)) + 2
    width = max(shutil.get_terminal_size().columns, column + 20)
    lines = []
    for name in names or METRICS:
        name = HEADINGS.get(name.strip("|"), name)
        try:
            label, unit, meaning = describe(name)
        except KeyError:
            raise UsageError(f"glossary {name}: no such metric; give none to see all, and a "
                             "heading of two words in quotes") from None
        text = f"{name:{column}}{label}, {unit}: {meaning}"
        lines.append(textwrap.fill(text, width, subsequent_indent=" " * column))
    return "\n".join(lines)
