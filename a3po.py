"""A3PO: adaptive, asymmetric, token-level advantage shaping for RL with verifiable rewards.

    python a3po.py                                   one process, CPU or one GPU
    torchrun --nproc_per_node 8 a3po.py              eight GPUs; Qwen3-8B-Base on DAPO-Math-17k
    python a3po.py --setting demo                    the embedded tiny model, on anything
    python a3po.py --help                            every knob, with its source

Read it from the top: the configuration, the loss (copy it, it needs torch alone), then the model,
batches, the update, checkpoints, and at the end `train`, the loop itself.

Sources: [P] the paper (arXiv 2512.21625), [C] its authors' code, [O] our reading where neither
says. Left out: the critic, sequence and tensor parallel training, asynchronous rollouts.

Shapes: B responses, T response tokens, L prompt + response tokens, V vocabulary, H hidden size.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import eval as evaluation
import rollout
from rollout import UsageError, say, timed
from verify import Graders

CELLS = ("low_prob", "high_prob", "low_entropy", "high_entropy")
LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def opt(default, help: str, choices: tuple | None = None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every knob. The defaults are the paper's setting for Qwen3-8B-Base."""

    # what to run
    preset: str = opt("a3po", "the method: a set of the fields below, see PRESETS")
    setting: str = opt("auto", "size of the job: paper, demo, or auto = paper on a GPU, else demo",
                       ("auto", "paper", "demo"))
    model: str = opt("Qwen/Qwen3-8B-Base", "hub name or save_pretrained folder [P]")
    data: str = opt("BytedTsinghua-SIA/DAPO-Math-17k", ".jsonl, .parquet or hub data set [P]")
    eval_data: str = opt("math-ai/aime24,math-ai/aime25", "held-out data, comma separated [C]")
    output_dir: str = opt("", "run folder (default runs/SETTING-PRESET-seedN-TIME)")
    seed: int = opt(0, "seed of sampling and shuffling")
    resume: str = opt("", "'auto': go on from the newest checkpoint in --output_dir, if any",
                      ("", "auto"))
    # batch
    steps: int = opt(300, "training steps [P]")
    prompts_per_step: int = opt(512, "prompts a step, over all ranks [P]")
    group_size: int = opt(8, "responses per prompt [C]")
    mini_batches: int = opt(16, "optimiser updates a step [C]")
    micro_batch_tokens: int = opt(16384, "tokens packed into one forward/backward on a rank")
    dynamic_sampling: bool = opt(True, "drop all-correct and all-wrong groups, refill [DAPO]")
    max_refills: int = opt(3, "most refills a step for dropped groups")
    # rollouts
    template: str = opt("auto", "auto (chat if the tokenizer has one), chat, plain, or a text "
                        "with {problem}")
    max_prompt_length: int = opt(1024, "tokens; longer prompts are dropped [C]")
    max_response_length: int = opt(8192, "tokens [C]")
    temperature: float = opt(1.0, "sampling temperature, also of the trainer's log-probs [C]")
    max_num_seqs: int = opt(256, "responses decoded at once by one engine")
    gpu_memory: float = opt(0.6, "share of GPU memory for vLLM while the trainer is idle")
    # advantages
    reward: str = opt("", "module:function(response, problem) instead of the built-in graders")
    advantage: str = opt("group", "group: GRPO's; raw: +1 / -1 (2506.01347)", ("group", "raw"))
    norm_std: bool = opt(True, "divide by the group's standard deviation [C]")
    overlong_buffer: int = opt(0, "soft length penalty over the last N tokens, 0 = off [DAPO]")
    positive_weight: float = opt(1.0, "weight of correct responses [P]")
    negative_weight: float = opt(1.0, "weight of incorrect responses [P]")
    rho_positive: float = opt(2.0, "initial weight of the chosen tokens of correct responses [O]")
    rho_negative: float = opt(2.0, "initial weight of the chosen tokens of incorrect ones [O]")
    positive_cell: str = opt("low_prob", "tokens chosen in correct responses [P]", CELLS)
    negative_cell: str = opt("high_prob", "tokens chosen in incorrect responses [P]", CELLS)
    token_fraction: float = opt(0.2, "share of a response's tokens that are chosen [C]")
    decay: str = opt("linear", "how rho falls to 1 [P: it decays; O: the form]",
                     ("linear", "exp", "none"))
    decay_rate: float = opt(0.005, "alpha, per step [P]")
    # loss
    clip_low: float = opt(0.2, "ratio clipped at 1 - clip_low [C]")
    clip_high: float = opt(0.28, "ratio clipped at 1 + clip_high [DAPO]")
    dual_clip: float = opt(0.0, "bound on ratio * |A| for A < 0; 0 = off (verl uses 3)")
    loss_agg: str = opt("token-mean", "how token losses are averaged [DAPO]", LOSS_AGGS)
    kl_coef: float = opt(0.0, "weight of the k3 KL to the initial model, or to Lp-Reg's proxy")
    proxy_kappa: float = opt(0.0, "Lp-Reg (2510.03222): proxy keeps tokens with p > kappa * max p")
    proxy_delta: float = opt(0.01, "Lp-Reg: acts on the batch's tokens of lowest p, this share")
    entropy_fraction: float = opt(1.0, "share of the batch's tokens, those of highest entropy, "
                                  "that have a loss (2506.01939)")
    tis_cap: float = opt(2.0, "cap of the vLLM -> trainer importance weight, 0 = off [O]")
    # optimiser
    lr: float = opt(1e-6, "AdamW learning rate [P]")
    warmup_steps: int = opt(0, "steps of linear learning-rate warm-up [C]")
    adam_beta2: float = opt(0.999, "AdamW beta2 [C]")
    weight_decay: float = opt(0.01, "AdamW weight decay [C]")
    max_grad_norm: float = opt(1.0, "gradient clipping [C]")
    # devices
    parallel: str = opt("fsdp", "how ranks share the model", ("fsdp", "ddp"))
    gradient_checkpointing: bool = opt(True, "recompute activations in the backward pass")
    head_chunk: int = opt(1024, "tokens whose logits exist at one time")
    # evaluation, checkpoints, logs
    eval_every: int = opt(20, "steps between evaluations, 0 = only before and after")
    eval_n: int = opt(8, "responses per held-out problem [C]")
    eval_limit: int = opt(0, "held-out problems, 0 = all")
    eval_temperature: float = opt(0.6, "[C]")
    eval_top_p: float = opt(0.95, "[C]")
    save_every: int = opt(50, "steps between checkpoints, 0 = only after the last step")
    log_rollouts: int = opt(4, "responses a step written to rollouts.jsonl")
    grade_timeout: float = opt(10.0, "seconds a grader may take for one response")


# The demo: the same job at laptop size. Every other field keeps its default.
DEMO_DIR = Path(__file__).resolve().parent / "demo"
SETTINGS = {
    "paper": {},
    "demo": dict(
        model=str(DEMO_DIR / "model"), data=str(DEMO_DIR / "train.jsonl"),
        eval_data=str(DEMO_DIR / "test.jsonl"), steps=100, prompts_per_step=32, group_size=8,
        mini_batches=8, max_prompt_length=64, max_response_length=64, lr=1.5e-4, warmup_steps=5,
        adam_beta2=0.95, weight_decay=0.0, head_chunk=256, micro_batch_tokens=2048,
        eval_every=20, eval_n=4, eval_temperature=1.0, eval_top_p=1.0, save_every=0,
        gradient_checkpointing=False, decay_rate=0.015,
    ),
}

# Each method is the same loss with other weights: name -> (what it is, fields).
NO_SHAPING = dict(rho_positive=1.0, rho_negative=1.0)
GRPO = dict(clip_high=0.2, dynamic_sampling=False, kl_coef=0.001, loss_agg="seq-mean-token-mean")
RAW = NO_SHAPING | dict(advantage="raw", dynamic_sampling=False, clip_high=0.2)
PRESETS = {
    "a3po": ("the paper's token-level shaping on DAPO's surrogate [O]", {}),
    "a3po_exp": ("A3PO with rho decaying exponentially", dict(decay="exp")),
    "a3po_constant": ("A3PO without decay, the ablation", dict(decay="none")),
    "a3po_grpo": ("A3PO's shaping on GRPO's surrogate", GRPO),
    "grpo": ("sequence mean, symmetric clip, k3 KL to the initial model", NO_SHAPING | GRPO),
    "dr_grpo": ("GRPO without length and deviation normalisation, no KL", NO_SHAPING | GRPO | dict(
        norm_std=False, loss_agg="seq-mean-token-sum-norm", kl_coef=0.0)),
    "dapo": ("clip-higher, token mean, dynamic sampling, no KL", NO_SHAPING),
    "fork_tokens": ("DAPO on the 20 % of tokens with the highest entropy", NO_SHAPING | dict(
        entropy_fraction=0.2)),
    "psr": ("DAPO on positive samples only", NO_SHAPING | dict(negative_weight=0.0)),
    "nsr": ("DAPO on negative samples only", NO_SHAPING | dict(positive_weight=0.0)),
    "psr_raw": ("advantage +1, correct responses only (2506.01347)", RAW | dict(
        negative_weight=0.0)),
    "nsr_raw": ("advantage -1, incorrect responses only (2506.01347)", RAW | dict(
        positive_weight=0.0)),
    "w_reinforce": ("advantage +0.1 / -1 (2506.01347)", RAW | dict(positive_weight=0.1)),
    "lp_reg": ("ratio clipped to [0, 10], k3 to a proxy on unlikely tokens with A < 0", NO_SHAPING
               | dict(clip_low=1.0, clip_high=9.0, dual_clip=10.0, proxy_kappa=0.02, kl_coef=1.0)),
    "polarity": ("DAPO with A * w_pos or w_neg; 0.5 : 1, the paper's best ratio", NO_SHAPING | dict(
        positive_weight=0.5)),
    "token_cell": ("one cell {positive, negative} x CELLS, constant weight; see --rho_*, --*_cell",
                   dict(rho_negative=1.0, decay="none")),
    "symmetric": ("the control: low-probability tokens for both polarities", dict(
        negative_cell="low_prob")),
}


def parse_args(argv: list[str] | None = None) -> Config:
    """Defaults < setting < preset < flags. Unknown flags are an error."""
    parser = argparse.ArgumentParser(
        description="Train a language model with A3PO or a method it is compared with.",
        epilog="presets:\n" + "\n".join(f"  {k:15}{text}" for k, (text, _) in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for f in dataclasses.fields(Config):
        choices = tuple(PRESETS) if f.name == "preset" else f.metadata["choices"]
        default = "off" if f.default == "" else f.default
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=f.type, choices=choices, metavar=f.name.upper())
        parser.add_argument(f"--{f.name}", help=text, **kind)
    flags = vars(parser.parse_args(argv))
    config = Config(**{k: flags[k] for k in ("setting", "preset") if k in flags})
    if config.setting == "auto":
        config.setting = "paper" if torch.cuda.is_available() else "demo"
    for fields in (SETTINGS[config.setting], PRESETS[config.preset][1], flags):
        config = dataclasses.replace(config, **{**fields, "setting": config.setting})
    return config


def check_config(config: Config) -> None:
    """Refuse impossible combinations before any work starts."""
    c = config
    for bad, what in (
        (c.group_size < 2, f"--group_size {c.group_size}: a group needs at least 2 responses, "
         "since advantages compare the responses to one prompt"),
        (c.prompts_per_step % rollout.world_size() != 0,
         f"--prompts_per_step {c.prompts_per_step} is not divisible by the "
         f"{rollout.world_size()} ranks: change one of them"),
        (not 0 < c.mini_batches <= c.prompts_per_step, f"--mini_batches {c.mini_batches}: give 1 "
         f"to --prompts_per_step ({c.prompts_per_step})"),
        (not 0 < c.token_fraction <= 1, f"--token_fraction {c.token_fraction}: give a share in "
         "(0, 1]"),
        (not 0 < c.entropy_fraction <= 1, f"--entropy_fraction {c.entropy_fraction}: give a share "
         "in (0, 1]"),
        (c.proxy_kappa and not c.kl_coef, "--proxy_kappa needs a --kl_coef above 0"),
        (c.temperature <= 0, f"--temperature {c.temperature}: training samples need T > 0"),
        (not 0 <= c.overlong_buffer < c.max_response_length, f"--overlong_buffer "
         f"{c.overlong_buffer}: give less than --max_response_length ({c.max_response_length})"),
        (min(c.steps, c.lr, c.decay_rate, c.rho_positive, c.rho_negative) < 0,
         "--steps, --lr, --decay_rate and --rho_* must not be negative"),
        (min(c.max_prompt_length, c.max_response_length, c.micro_batch_tokens, c.eval_n,
             c.head_chunk, c.max_num_seqs) < 1,
         "--max_prompt_length, --max_response_length, --micro_batch_tokens, --eval_n, "
         "--head_chunk and --max_num_seqs must be at least 1"),
    ):
        if bad:
            raise UsageError(what)


# ---- loss: copy from here ----
import torch  # noqa: E402


def group_advantages(
    rewards: torch.Tensor, group_size: int, norm_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """GRPO's advantage of each response within its group [C]; norm_std=False is Dr. GRPO's.

    rewards: (P * G,), the G responses to a prompt side by side. Returns (P * G,). The standard
    deviation is the unbiased one; a group of one has mean 0 and deviation 1.
    """
    if group_size == 1:
        return rewards / (1 + eps) if norm_std else rewards.clone()
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if norm_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    return advantages.view(-1)


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int) -> torch.Tensor:
    """DAPO's soft overlong punishment (2503.14476, eq. 13), to be added to the reward: 0 up to
    max_length - buffer tokens, then linearly down to -1 at max_length. lengths: (B,)."""
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def decayed_rho(rho: float, step: int, decay_rate: float, decay: str = "linear") -> float:
    """The weight rho at a 0-based training step. It decays to 1 [P]; the forms are ours [O]:
    linear = max(1, rho - decay_rate * step), exp = 1 + (rho - 1) * exp(-decay_rate * step)."""
    if decay == "linear":
        return max(1.0, rho - decay_rate * step) if rho > 1 else min(1.0, rho + decay_rate * step)
    if decay == "exp":
        return 1.0 + (rho - 1.0) * 2.718281828459045 ** (-decay_rate * step)
    return rho


@torch.no_grad()
def shape_advantages(
    advantages: torch.Tensor,
    correct: torch.Tensor,
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    rho_positive: float,
    rho_negative: float,
    token_fraction: float = 0.2,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
    positive_cell: str = "low_prob",
    negative_cell: str = "high_prob",
    entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """A3PO's shaping: A * rho_positive on the lowest-probability tokens of correct responses, A *
    rho_negative on the highest-probability tokens of incorrect ones, A elsewhere [P].

    advantages, logprobs and entropy (of the old policy), mask: (B, T); correct: (B,), a flag and
    not a reward. A response has max(1, int(token_fraction * length)) such tokens [C]; of equal
    ones the earlier are taken [O]. positive_weight and negative_weight multiply whole responses
    (polarity level [P]); the cells "low_prob", "high_prob", "low_entropy" and "high_entropy"
    choose other tokens (token level [P]).
    """
    if not mask.shape[1]:
        return advantages.clone()
    correct, mask = correct.bool()[:, None], mask.bool()
    lengths = mask.sum(1, keepdim=True, dtype=torch.int32)
    # double: in float32 the product can round up to a whole number that int() then keeps
    counts = (lengths.double() * token_fraction).long().clamp_(min=1)
    values = {"prob": logprobs, "entropy": entropy}
    (p_side, p_name), (n_side, n_name) = positive_cell.split("_"), negative_cell.split("_")
    key = values[p_name]
    if n_name != p_name:
        key = torch.where(correct, key, values[n_name])
    signs = (1.0 if side == "low" else -1.0 for side in (p_side, n_side))
    key = key.float() * torch.where(correct, *signs)
    ordered = torch.where(mask, key, torch.inf)
    if key.device.type == "cpu":
        ordered.numpy().sort(axis=1)  # in place, and many times faster than torch's sort there
    else:
        ordered = ordered.sort(dim=1).values
    threshold = ordered.gather(1, counts - 1)  # the counts-th smallest key of each row
    chosen = (key <= threshold).logical_and_(mask)
    # Rows where the next key is as small hold more tied tokens than there is room for
    after = ordered.gather(1, counts.clamp(max=key.shape[1] - 1))
    rows = ((after == threshold) & (counts < lengths))[:, 0].nonzero()[:, 0]
    tied = (key[rows] == threshold[rows]) & mask[rows]
    room = counts[rows] - ((key[rows] < threshold[rows]) & mask[rows]).sum(1, keepdim=True)
    chosen[rows] &= ~tied | (tied.cumsum(1) <= room)
    weight = torch.where(correct, positive_weight, negative_weight)
    rho = torch.where(correct, rho_positive, rho_negative)
    return advantages * torch.where(chosen, weight * rho, weight)


def aggregate(
    losses: torch.Tensor,
    mask: torch.Tensor,
    loss_agg: str = "token-mean",
    denominator: float | None = None,
    max_length: int | None = None,
) -> torch.Tensor:
    """Average token losses (B, T) to a scalar.

    token-mean: over all tokens (DAPO); seq-mean-token-mean: over each response's tokens, then
    over responses (GRPO); seq-mean-token-sum-norm: sum over tokens / max_length, mean over
    responses (Dr. GRPO). `denominator` is the number of tokens (token-mean) or of responses in
    the *global* batch; with it the parts of any split add up to the same loss and gradient.
    """
    losses, lengths = losses.masked_fill(~mask, 0.0), mask.sum(1)
    if loss_agg == "token-mean":
        return losses.sum() / max(denominator or lengths.sum(), 1)
    rows = losses.sum(1)
    if loss_agg == "seq-mean-token-mean":
        rows = rows / lengths.clamp(min=1)
    elif loss_agg == "seq-mean-token-sum-norm":
        rows = rows / (max_length or mask.shape[1])
    else:
        raise ValueError(f"unknown loss_agg {loss_agg!r}")
    return rows.sum() / max(denominator or len(rows), 1)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 0.0,
    rollout_logprobs: torch.Tensor | None = None,
    tis_cap: float = 2.0,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_mask: torch.Tensor | None = None,
    loss_agg: str = "token-mean",
    denominator: float | None = None,
    max_length: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = new / old.

    All tensors (B, T); gradients flow through logprobs only. dual_clip bounds the loss of tokens
    with A < 0. rollout_logprobs (as sampled by the inference engine) weight each token by
    min(old / rollout, tis_cap), truncated importance sampling; ref_logprobs add kl_coef times the
    k3 estimate exp(d) - d - 1, d = ref - new (on the tokens of kl_mask, if given). Aggregation:
    see `aggregate`. Returns the loss and diagnostics: sums over tokens, and max_ratio_deviation.
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


# ---- model --------------------------------------------------------------------------------------


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of the target tokens and entropies of their distributions, in chunks.

    hidden (N, H), weight (V, H), targets (N,) -> logprobs, entropy, proxy: each (N,) in float32.
    proxy is Lp-Reg's target for the token (no gradient): its log-probability renormalised over
    the tokens with p > kappa * max p, -inf if it is not one of them (undefined if kappa is 0).
    Logits exist for `chunk` tokens at a time and are computed again in the backward pass, so no
    (N, V) tensor is ever kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, kappa):
        logprobs = torch.empty(len(hidden), device=hidden.device)
        entropy, normaliser, proxy = (torch.empty_like(logprobs) for _ in range(3))
        for s in _chunks(len(hidden), chunk):
            logits = _logits(hidden[s], weight, temperature)
            sampled = logits.gather(1, targets[s, None])[:, 0]
            peak = logits.amax(-1)
            probs = logits.sub_(peak[:, None]).exp()  # not normalised: the sum comes below
            total = probs.sum(-1)
            log_total = total.log()
            normaliser[s] = peak + log_total
            logprobs[s] = sampled - normaliser[s]
            # sum of p (log total - logit), as a product of rows that needs no third (chunk, V)
            entropy[s] = log_total - torch.einsum("nv,nv->n", probs, logits) / total
            if kappa:  # the largest of probs is 1
                kept = (probs * (probs > kappa)).sum(-1) / total
                outside = (sampled - peak).exp() <= kappa
                proxy[s] = (logprobs[s] - kept.log()).masked_fill(outside, -torch.inf)
            del logits, probs  # before the next chunk's are made
        ctx.mark_non_differentiable(proxy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy, proxy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _):
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normaliser)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for s in _chunks(len(hidden), ctx.chunk):
            logp = _logits(hidden[s], weight, ctx.temperature).sub_(normaliser[s, None])
            up = grad_logprobs[s, None]
            # d logprob / d logit = onehot - p,  d entropy / d logit = -p (log p + entropy)
            if grad_entropy is None:
                grad = logp.exp_().mul_(-up)
            else:
                up_entropy = grad_entropy[s, None]
                grad = logp.exp()
                grad.mul_(logp.mul_(-up_entropy).sub_(up + up_entropy * entropy[s, None]))
            grad.scatter_add_(1, targets[s, None], up)
            if ctx.temperature != 1:
                grad.div_(ctx.temperature)
            grad = grad.to(hidden.dtype)
            grad_hidden[s] = grad @ weight
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[s])  # without a temporary of the weight's size
            else:
                grad_weight += grad.T @ hidden[s]
            del logp, grad
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden, weight, temperature):
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _chunks(n: int, size: int):
    return [slice(i, i + size) for i in range(0, n, size)]


class Packing:
    """Where the sequences (prompt + response) lie in a packed batch of N tokens, in which equal
    prompts are there once: sequence i is the tokens index[bounds[i] : bounds[i + 1]], and first
    (N,) is where in index (M,) each token is named first. Computed once per batch; every layer's
    attention spreads its inputs to whole sequences, all else is done for the N tokens alone."""

    def __init__(self, index: torch.Tensor, first: torch.Tensor, bounds: torch.Tensor):
        self.index, self.first, self.bounds = index, first, bounds.to(torch.int32)
        lengths, device = bounds.diff(), bounds.device
        self.longest = int(lengths.max())
        positions = torch.arange(len(index), device=device)
        self.positions = (positions - bounds[:-1].repeat_interleave(lengths))[first]
        # For devices without a varlen kernel: index grids (sequences, length) of sequences of
        # similar length, padded on the right, where causal attention needs no mask.
        self.grids: list[tuple[torch.Tensor, torch.Tensor]] = []
        if device.type == "cpu":
            is_first = torch.zeros(len(index), dtype=torch.bool)
            is_first[first] = True
            order = lengths.argsort(descending=True)
            while len(order):
                longest = lengths[order[0]]
                group = order[lengths[order] > 0.75 * longest]
                order = order[len(group) :]
                t = torch.arange(int(longest))
                place = (bounds[group, None] + t).clamp(max=len(index) - 1)
                self.grids.append((index[place], (t < lengths[group, None]) & is_first[place]))


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None, **_):
    """Causal attention within each sequence of a packed batch, in the form transformers calls:
    query (1, heads, N, d), key and value (1, kv_heads, N, d) -> (1, N, heads, d), None."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if not packing.grids:
        from torch.nn.attention.varlen import varlen_attn

        if len(packing.index) > len(packing.first):  # prompts are shared
            query, key, value = (x.index_select(0, packing.index) for x in (query, key, value))
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
        bounds, longest = packing.bounds, packing.longest
        out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling,
                          window_size=(-1, 0))
        return out[packing.first][None], None
    out = torch.empty_like(query)
    for index, is_first in packing.grids:
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))
        grid = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        out[index[is_first]] = grid.transpose(1, 2)[is_first]
    return out[None], None


class Policy(nn.Module):
    """A causal language model whose forward returns token log-probabilities and entropies. The
    head is applied here, inside the module that FSDP unshards, to response tokens only."""

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids, index, first, bounds, prompt_lengths, mask):
        """ids (N,): prompts and responses, packed without padding, and index, first, bounds: see
        Packing; prompt_lengths (B,); mask (B, T) of response tokens. Returns log-probs, entropies
        and Lp-Reg proxies, each (B, T)."""
        packing = Packing(index, first, bounds)
        hidden = self.model.get_decoder()(
            input_ids=ids[None], position_ids=packing.positions[None], use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        row, t = mask.nonzero(as_tuple=True)
        position = bounds[row] + prompt_lengths[row] + t
        hidden = hidden[index[position - 1]]  # the state that predicts token t
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        weight = self.model.get_output_embeddings().weight.to(hidden.dtype)
        targets, c = ids[index[position]], self.config
        outputs = TokenLogprobs.apply(
            hidden, weight, targets, c.temperature, c.head_chunk, c.proxy_kappa
        )
        blank = torch.zeros(mask.shape, device=mask.device)
        return [blank.masked_scatter(mask, x) for x in outputs]


def load_model(config: Config, path: str, device: str) -> nn.Module:
    """The model in float32: bf16 weights would lose updates of 1e-6. Dropout is off, so that the
    ratio of an unchanged policy is 1."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="packed")
    model = model.to(device).float()
    if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise UsageError(f"model {path!r}: only layers of full attention are supported")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UsageError(f"model {path!r}: an output layer with a bias is not supported")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def distribute(policy: Policy, parallel: str, device: str) -> nn.Module:
    """Share the policy among the ranks: FSDP2 shards every layer, DDP replicates. On a GPU the
    float32 weights are computed with in bfloat16."""
    if parallel == "fsdp" and (rollout.world_size() > 1 or device != "cpu"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        options = {}
        if device != "cpu":
            precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
            options = dict(mp_policy=precision)
        mesh = dist.init_device_mesh(device.partition(":")[0], (rollout.world_size(),))
        for layer in policy.model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, **options)
        return fully_shard(policy, mesh=mesh, **options)
    if rollout.world_size() > 1:
        return nn.parallel.DistributedDataParallel(policy)
    return policy


def full_weights(model: nn.Module, dtype: torch.dtype | None = None):
    """Yield (name, whole tensor) in layer order; every rank must iterate: gathering a shard is a
    collective. A tied head is not listed."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        yield name, tensor.to(dtype or tensor.dtype)


# ---- batches ------------------------------------------------------------------------------------


@dataclass
class Row:
    """One response as training data; tensors (T,), filled in on the rank that trains on it."""

    prompt_ids: list[int]
    ids: np.ndarray
    rollout_logprobs: np.ndarray
    correct: bool
    reward: float
    advantage: float
    old_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.ids)

    def is_trained(self, config: Config) -> bool:
        """Whether the row has a gradient; with advantage 0 only a KL term has one."""
        weight = config.positive_weight if self.correct else config.negative_weight
        return bool(self.advantage * weight or (config.kl_coef and not config.proxy_kappa))


def collate(rows: list[Row], device: str) -> dict[str, torch.Tensor]:
    """Pack rows one after the other, a group's prompt only once (see Packing); per-token values
    come as (B, T), padded on the right. Masks come from lengths, never from token ids."""
    T = max(len(row.ids) for row in rows)
    ids, index, begins = [], [], {}
    for row in rows:
        begin = begins.setdefault(id(row.prompt_ids), len(ids))
        if begin == len(ids):
            ids += row.prompt_ids
        index += range(begin, begin + len(row.prompt_ids))
        index += range(len(ids), len(ids) + len(row.ids))
        ids += row.ids.tolist()
    lengths = torch.tensor([len(row.ids) for row in rows])
    batch = dict(
        ids=torch.tensor(ids),
        index=torch.tensor(index),
        first=torch.from_numpy(np.unique(index, return_index=True)[1]),
        bounds=torch.tensor([0, *(len(row) for row in rows)]).cumsum(0),
        prompt_lengths=torch.tensor([len(row.prompt_ids) for row in rows]),
        mask=torch.arange(T) < lengths[:, None],
        correct=torch.tensor([row.correct for row in rows]),
        advantage=torch.tensor([row.advantage for row in rows])[:, None].expand(-1, T),
    )
    for name in ("rollout_logprobs", "old_logprobs", "entropy", "ref_logprobs"):
        if getattr(rows[0], name) is not None:
            batch[name] = torch.zeros(len(rows), T)
            for i, row in enumerate(rows):
                batch[name][i, : len(row.ids)] = torch.as_tensor(getattr(row, name))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def packed_length(rows: list[Row]) -> int:
    """Tokens of the rows' micro-batch, where equal prompts are there once."""
    prompts = {id(row.prompt_ids): len(row.prompt_ids) for row in rows}
    return sum(prompts.values()) + sum(len(row.ids) for row in rows)


def pack(rows: list[Row], token_budget: int) -> list[list[Row]]:
    """First-fit decreasing: bins of at most token_budget tokens (a longer row has its own). Rows
    of one group that fit into a bin stay together and share their prompt."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(id(row.prompt_ids), []).append(row)
    items = []
    for group in groups.values():
        whole = packed_length(group) <= token_budget
        items += [group] if whole else [[row] for row in group]
    bins: list[list[Row]] = []
    free: list[int] = []
    for item in sorted(items, key=packed_length, reverse=True):
        size = packed_length(item)
        i = next((i for i, room in enumerate(free) if room >= size), len(bins))
        if i == len(bins):
            bins.append([])
            free.append(token_budget)
        bins[i] += item
        free[i] -= size
    return bins


def deal(rows: list[Row], ranks: int) -> list[list[Row]]:
    """Balance the rows' tokens over the ranks, longest first to the least loaded."""
    shares: list[list[Row]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=len, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(row)
        loads[least] += len(row)
    return shares


def schedule(shares: list[list[Row]], token_budget: int) -> list[tuple[list[Row], float]]:
    """This rank's micro-batches, each with weight 1. Every rank knows all shares and gets equally
    many, since each forward under FSDP is a collective: surplus ones, of one token, weigh 0."""
    packs = [pack(share, token_budget) for share in shares]
    mine = [(rows, 1.0) for rows in packs[rollout.rank()]]
    filler = Row([0], np.zeros(1, np.int32), np.zeros(1, np.float32), False, 0.0, 0.0)
    filler.old_logprobs = filler.entropy = filler.ref_logprobs = torch.zeros(1)
    return mine + [([filler], 0.0)] * (max(map(len, packs)) - len(mine))


# ---- update -------------------------------------------------------------------------------------


@dataclass
class Knobs:
    """What the loss needs to know about the step: rho now, and Lp-Reg's and Fork Tokens'
    thresholds over the whole batch."""

    rho_positive: float = 1.0
    rho_negative: float = 1.0
    unlikely: float = -math.inf  # log-probs up to here are Lp-Reg's
    forking: float = -math.inf  # entropies from here on are forking tokens


def run_policy(policy: nn.Module, batch: dict[str, torch.Tensor], config: Config):
    """policy(batch), in bfloat16 on a GPU where FSDP's own mixed precision does not see to it."""
    device = batch["ids"].device.type
    with torch.autocast(device, torch.bfloat16, device != "cpu" and config.parallel == "ddp"):
        layout = ("ids", "index", "first", "bounds", "prompt_lengths", "mask")
        return policy(*(batch[name] for name in layout))


def remember(rows: list[Row], **values: torch.Tensor) -> None:
    """Store (B, T) results in the rows they belong to."""
    for name, tensor in values.items():
        tensor = tensor.detach().cpu()
        for i, row in enumerate(rows):
            setattr(row, name, tensor[i, : len(row.ids)].clone())


@torch.no_grad()
def score(policy, reference, shares: list[list[Row]], config: Config, device: str) -> None:
    """Log-probs and entropies of this rank's rows under the old policy, and log-probs under the
    reference model (or Lp-Reg's proxy).

    With one update a step the old policy is the one being trained, so `backward` sees the same
    numbers, and this pass is skipped unless a method needs them for the whole batch beforehand.
    """
    old = config.mini_batches > 1 or config.proxy_kappa or config.entropy_fraction < 1
    if not old and reference is None:
        return
    for rows, weight in schedule(shares, config.micro_batch_tokens):
        batch, results = collate(rows, device), {}
        if old:
            logprobs, entropy, proxy = run_policy(policy, batch, config)
            results = dict(old_logprobs=logprobs, entropy=entropy)
            if config.proxy_kappa:
                results["ref_logprobs"] = proxy
        if reference is not None:
            results["ref_logprobs"] = run_policy(reference, batch, config)[0]
        if weight:
            remember(rows, **results)


def set_knobs(rows: list[Row], config: Config, step: int) -> Knobs:
    """rows: this rank's, scored."""
    when = (step, config.decay_rate, config.decay)
    knobs = Knobs(decayed_rho(config.rho_positive, *when), decayed_rho(config.rho_negative, *when))

    def over_the_batch(name: str) -> torch.Tensor:
        """A token value of all rows on all ranks, sorted."""
        values = rollout.gather([getattr(row, name) for row in rows]) or [torch.zeros(1)]
        return torch.cat(values).sort().values

    if config.proxy_kappa:
        values = over_the_batch("old_logprobs")
        knobs.unlikely = values[math.ceil(config.proxy_delta * len(values)) - 1].item()
    if config.entropy_fraction < 1:
        values = over_the_batch("entropy")
        knobs.forking = values[-max(1, int(config.entropy_fraction * len(values)))].item()
    return knobs


def denominator(shares: list[list[Row]], config: Config, knobs: Knobs) -> float:
    """Of the whole mini-batch's loss: its tokens (token-mean), of which only forking ones count,
    or its responses. Rows without a gradient, dead groups among them, count too."""
    if config.loss_agg != "token-mean":
        return sum(map(len, shares))
    if config.entropy_fraction == 1:
        return sum(len(row.ids) for share in shares for row in share)
    mine = sum((row.entropy >= knobs.forking).sum().item() for row in shares[rollout.rank()])
    return all_reduce(dict(tokens=mine))["tokens"]


def micro_batch_loss(policy, rows: list[Row], config: Config, knobs: Knobs, device: str, **scale):
    """The loss and diagnostics (sums over tokens) of one micro-batch."""
    batch = collate(rows, device)
    logprobs, entropy, _ = run_policy(policy, batch, config)
    if "old_logprobs" not in batch:  # on-policy: score() left it to us
        batch |= dict(old_logprobs=logprobs.detach(), entropy=entropy.detach())
        remember(rows, old_logprobs=logprobs, entropy=entropy)
    old_logprobs, mask = batch["old_logprobs"], batch["mask"]
    advantages = shape_advantages(
        batch["advantage"], batch["correct"], old_logprobs, mask, entropy=batch["entropy"],
        rho_positive=knobs.rho_positive, rho_negative=knobs.rho_negative,
        positive_cell=config.positive_cell, negative_cell=config.negative_cell,
        token_fraction=config.token_fraction, positive_weight=config.positive_weight,
        negative_weight=config.negative_weight,
    )
    kl_mask = None
    if config.proxy_kappa:
        kl_mask = (old_logprobs <= knobs.unlikely) & (advantages < 0)
        kl_mask &= batch["ref_logprobs"].isfinite()
    if config.entropy_fraction < 1:
        mask = mask & (batch["entropy"] >= knobs.forking)
    loss, stats = policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_low=config.clip_low,
        clip_high=config.clip_high, dual_clip=config.dual_clip,
        rollout_logprobs=batch["rollout_logprobs"], tis_cap=config.tis_cap,
        ref_logprobs=batch.get("ref_logprobs"), kl_coef=config.kl_coef, kl_mask=kl_mask,
        loss_agg=config.loss_agg, max_length=config.max_response_length, **scale,
    )
    return loss, stats | dict(loss=loss.detach(), tokens=mask.sum())


def backward(
    policy: nn.Module, shares: list[list[Row]], config: Config, knobs: Knobs, device: str
) -> dict[str, float]:
    """Accumulate the gradient of one mini-batch, of which this rank works on its share.

    The loss is divided by the token (or response) count of the whole mini-batch, the same on every
    rank; so the gradient is the same for any micro-batch split and any number of ranks.
    """
    scale = dict(denominator=denominator(shares, config, knobs))
    shares = [[row for row in share if row.is_trained(config)] for share in shares]
    sums: dict[str, torch.Tensor] = {}
    for rows, weight in schedule(shares, config.micro_batch_tokens) if any(shares) else ():
        loss, stats = micro_batch_loss(policy, rows, config, knobs, device, **scale)
        # FSDP and DDP average gradients over ranks; we want their sum
        (loss * weight * rollout.world_size()).backward()
        accumulate(sums, {key: value * weight for key, value in stats.items()})
    return {key: float(value) for key, value in sums.items()}


def accumulate(sums: dict, more: dict) -> None:
    """Add `more` to `sums`; of keys that start with max_ keep the larger."""
    for key, value in more.items():
        old = sums.get(key, 0.0)
        sums[key] = value + old if key[:4] != "max_" else max(old, value)


def update(policy, optimizer, mini_batches, config: Config, knobs: Knobs, device: str):
    """One optimiser step per mini-batch (a list of shares, one per rank); returns diagnostics."""
    totals: dict[str, float] = {}
    norms, first_deviation, skipped = [], 0.0, 0
    for i, shares in enumerate(mini_batches):
        sums = all_reduce(backward(policy, shares, config, knobs, device))
        if not sums:
            continue
        norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if math.isfinite(norm):  # the norm is global, so all ranks agree
            optimizer.step()
            norms.append(norm)
        else:
            skipped += 1
        optimizer.zero_grad()
        if i == 0:  # the policy is still the old one: anything but ~0 is a bug
            first_deviation = sums["max_ratio_deviation"]
        accumulate(totals, sums)
    tokens = max(totals.pop("tokens", 0.0), 1.0)
    loss, ratio_max = totals.pop("loss", 0.0), totals.pop("max_ratio_deviation", 0.0)
    return {key: value / tokens for key, value in totals.items()} | dict(
        loss=loss / max(len(mini_batches), 1),
        ratio_max=ratio_max,
        ratio_max_deviation=first_deviation,
        grad_norm=sum(norms) / max(len(norms), 1),
        updates=len(norms),
        skipped_updates=skipped,
    )


def all_reduce(sums: dict[str, float]) -> dict[str, float]:
    """Sum over ranks; of keys that start with max_ the maximum. All ranks have the same keys."""
    if not sums or rollout.world_size() == 1:
        return sums
    for op, chosen in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
        keys = [key for key in sums if (key[:4] == "max_") == chosen]
        values = torch.tensor([sums[key] for key in keys], dtype=torch.float64)
        dist.all_reduce(values, op)
        sums |= dict(zip(keys, values.tolist(), strict=True))
    return sums


# ---- rollouts -----------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What a reward function said, in the form of a verify.Grade."""

    reward: float
    correct: bool | None
    extracted: str | None = None
    status: str = "ok"


class RewardFunction:
    """--reward module:function in place of the graders. function(response, problem) gets the text
    and a rollout.Problem and returns a reward, or (reward, correct); without the flag, polarity is
    the sign of the advantage. The module is found from the working directory."""

    def __init__(self, name: str):
        module, _, function = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            self.function = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(f"--reward {name!r}: expected module:function ({error})") from None

    def submit(self, kind: str, response: str, problem: rollout.Problem) -> Future:
        result, future = self.function(response, problem), Future()
        reward, correct = result if isinstance(result, tuple) else (result, None)
        future.set_result(Verdict(float(reward), correct))
        return future


def collect(engine, tokenizer, graders, sampler, config: Config, seconds: dict[str, float]):
    """Sample until prompts_per_step groups carry a signal (dynamic sampling), at most max_refills
    times more. Returns the groups to train on and all that were drawn, each a (prompt, samples)."""
    kept, drawn = [], []
    for attempt in range(1 + (config.max_refills if config.dynamic_sampling else 0)):
        missing = config.prompts_per_step - len(kept)
        if not missing:
            break
        draws = sampler.next(missing)
        prompts = [prompt for _, prompt in draws]
        groups = rollout.sample(
            engine, tokenizer, graders, prompts, config.group_size,
            [rollout.request_seed("train", config.seed, draw) for draw, _ in draws],
            max_tokens=config.max_response_length, temperature=config.temperature,
            progress=f"rollouts (refill {attempt})" if attempt else "rollouts", seconds=seconds,
        )
        groups = list(zip(prompts, groups, strict=True))
        drawn += groups
        kept += [g for g in groups if not config.dynamic_sampling or is_live(g[1])]
    return kept, drawn


def is_live(samples: list) -> bool:
    """Whether the group's rewards differ: else its advantages are all 0."""
    return len({sample.reward for sample in samples}) > 1


def rewards_of(groups, config: Config) -> torch.Tensor:
    """The rewards of all samples in order, with the overlong penalty."""
    samples = [sample for _, group in groups for sample in group]
    rewards = torch.tensor([sample.reward for sample in samples])
    if config.overlong_buffer:
        lengths = torch.tensor([len(sample.response.ids) for sample in samples])
        rewards += overlong_penalty(lengths, config.max_response_length, config.overlong_buffer)
    return rewards


def make_rows(groups, config: Config) -> list[list[Row]]:
    """Advantages, and one row per response, by group."""
    if not groups:
        return []
    samples = [sample for _, group in groups for sample in group]
    rewards = rewards_of(groups, config)
    if config.advantage == "raw":
        flags = torch.tensor([bool(sample.grade.correct) for sample in samples])
        advantages = torch.where(flags, 1.0, -1.0)
    else:
        advantages = group_advantages(rewards, config.group_size, config.norm_std)
    prompts = [prompt for prompt, group in groups for _ in group]
    rows = []
    for prompt, s, reward, advantage in zip(
        prompts, samples, rewards.tolist(), advantages.tolist(), strict=True
    ):
        correct = s.grade.correct
        if correct is None:  # a reward function without a flag: the advantage's sign decides
            correct = advantage > 0
        rows.append(
            Row(prompt.ids, s.response.ids, s.response.logprobs, correct, reward, advantage)
        )
    return [rows[i : i + config.group_size] for i in range(0, len(rows), config.group_size)]


def rollout_metrics(groups, config: Config) -> dict[str, float]:
    """What was sampled, dead groups included."""
    samples = [sample for _, group in groups for sample in group]
    lengths = np.array([len(s.response.ids) for s in samples])
    correct = np.array([bool(s.grade.correct) for s in samples])
    live = [is_live(group) for _, group in groups]
    solved = [all(s.grade.correct for s in group) for _, group in groups]
    return dict(
        reward=rewards_of(groups, config).double().mean().item(),
        accuracy=correct.mean(),
        response_length=lengths.mean(),
        response_length_positive=_mean(lengths[correct]),
        response_length_negative=_mean(lengths[~correct]),
        truncated=np.mean([s.response.finish_reason == "length" for s in samples]),
        no_answer=np.mean([s.grade.status == "no_answer" for s in samples]),
        **{f"grader_{status}": sum(s.grade.status == status for s in samples)
           for status in ("timeout", "error", "bad_reference")},
        groups_drawn=len(groups),
        dead_groups=1 - np.mean(live),
        dead_all_correct=np.mean(solved),
        rollout_tokens=int(lengths.sum()),
    )


def row_metrics(shares: list[list[Row]]) -> dict[str, float]:
    """Entropy (nats) by polarity and the mismatch |log p_vLLM - log p_trainer| of the rows that
    are trained on, over all ranks."""
    sums = dict.fromkeys(("n_pos", "n_neg", "h_pos", "h_neg", "gap", "max_gap"), 0.0)
    for row in shares[rollout.rank()]:
        if row.old_logprobs is None:  # without a gradient, in an on-policy step
            continue
        sign = "pos" if row.correct else "neg"
        sums[f"n_{sign}"] += len(row.ids)
        sums[f"h_{sign}"] += row.entropy.sum().item()
        gap = (row.old_logprobs - torch.from_numpy(row.rollout_logprobs)).abs()
        sums["gap"] += gap.sum().item()
        sums["max_gap"] = max(sums["max_gap"], gap.max().item())
    sums = all_reduce(sums)
    n_pos, n_neg = max(sums["n_pos"], 1), max(sums["n_neg"], 1)
    n = max(sums["n_pos"] + sums["n_neg"], 1)
    return dict(
        entropy=(sums["h_pos"] + sums["h_neg"]) / n,
        entropy_positive=sums["h_pos"] / n_pos,
        entropy_negative=sums["h_neg"] / n_neg,
        mismatch_mean=sums["gap"] / n,
        mismatch_max=sums["max_gap"],
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


# ---- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, cursor: int, policy, model, optimizer, tokenizer, device: str
) -> None:
    """Write checkpoints/step_N: a save_pretrained folder, and in resume/ what training goes on
    from (float32 weights, optimiser state, data cursor), sharded over the ranks. The folder gets
    its name only when it is complete; resume/ of older checkpoints is then deleted."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    final, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    if rollout.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    weights = {}
    for name, tensor in full_weights(model, dtype):
        if rollout.rank() == 0:
            weights[name] = tensor.cpu()
    if rollout.rank() == 0:
        model.config.dtype = dtype
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
    del weights
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.save(state, checkpoint_id=partial / "resume")
    if rollout.rank() == 0:
        (partial / "resume" / "step.json").write_text(json.dumps(dict(step=step, cursor=cursor)))
        os.sync()
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for other in folder.glob("step_*"):
            if other != final:
                shutil.rmtree(other / "resume", ignore_errors=True)
    dist.barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    found = [path.parent.parent for path in folder.glob("step_*/resume/step.json")]
    return max(found, key=lambda path: int(path.name.partition("_")[2]), default=None)


def load_checkpoint(checkpoint: Path, policy, optimizer) -> tuple[int, int]:
    """Restore weights and optimiser, for any number of ranks; returns (step, data cursor)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=checkpoint / "resume")
    set_state_dict(
        policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    at = json.loads((checkpoint / "resume" / "step.json").read_text())
    return at["step"], at["cursor"]


# ---- run folder ---------------------------------------------------------------------------------


class RunFolder:
    """config.json, metrics.jsonl, rollouts.jsonl, summary.md and curves.png of one run; rank 0
    writes. Going on from step `start` drops the lines that will be written again."""

    def __init__(self, config: Config, start: int):
        self.path = Path(config.output_dir)
        self.started, self.printed, self.lines = time.time(), 0.0, 0
        self.evals: list[dict] = []
        if rollout.rank() != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        about = dataclasses.asdict(config) | dict(environment=evaluation.environment())
        (self.path / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            records = [r for r in evaluation.read_records(self.path / name) if r["step"] < start]
            lines = [json.dumps(record) + "\n" for record in records]
            (self.path / f".{name}").write_text("".join(lines))
            (self.path / f".{name}").rename(self.path / name)
            self.evals += [record for record in records if "eval_accuracy" in record]

    def append(self, name: str, record: dict) -> None:
        if rollout.rank() == 0:
            with (self.path / name).open("a") as file:
                file.write(json.dumps(record, default=_plain) + "\n")

    def log_step(self, metrics: dict) -> None:
        """Append the step's metrics; a console line at most every two seconds."""
        self.append("metrics.jsonl", metrics)
        if time.time() - self.printed < 2:
            return
        if self.lines % 20 == 0:
            say(f"{'step':>6}" + "".join(f"{name:>10}" for name, _, _ in CONSOLE))
        say(f"{metrics['step']:6d}" + "".join(f"{metrics[k]:>10{form}}" for _, k, form in CONSOLE))
        self.printed, self.lines = time.time(), self.lines + 1

    def log_eval(self, step: int, metrics: dict) -> None:
        record = dict(step=step) | {f"eval_{key}": value for key, value in metrics.items()}
        self.evals.append(record)
        self.append("metrics.jsonl", record)
        say(f"{step:6d}  held-out accuracy {metrics['accuracy']:.3f} "
            f"+- {metrics['accuracy_stderr']:.3f}, length {metrics['length']:.1f}")

    def log_rollouts(self, step: int, groups, count: int) -> None:
        """The first response of `count` of the step's groups, as text."""
        for prompt, samples in groups[:count]:
            s, problem = samples[0], prompt.problem
            record = dict(step=step, id=problem.id, problem=problem.text, response=s.text)
            record |= dict(reference=problem.reference, extracted=s.grade.extracted)
            record |= dict(correct=s.grade.correct, status=s.grade.status, reward=s.reward)
            record |= dict(length=len(s.response.ids), finish_reason=s.response.finish_reason)
            self.append("rollouts.jsonl", record)

    def finish(self) -> None:
        """Draw the curves; print and write the before/after table."""
        if rollout.rank() != 0:
            return
        evaluation.plot_run(self.path)
        table = evaluation.before_after(self.evals)
        (self.path / "summary.md").write_text(table + "\n")
        say(f"\n{table}\n\ntrained for {time.time() - self.started:.0f} s; everything is in "
            f"{self.path}/ (curves.png is the picture)")


def _plain(value):
    """NumPy numbers as numbers, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


CONSOLE = (  # heading, metric, format
    ("reward", "reward", ".3f"), ("entropy", "entropy", ".3f"),
    ("length", "response_length", ".1f"), ("rho", "rho_positive", ".3f"),
    ("ratio max", "ratio_max", ".3f"),
    ("mismatch", "mismatch_mean", ".1e"), ("dead", "dead_groups", ".2f"),
    ("grad norm", "grad_norm", ".3f"), ("tokens/s", "tokens_per_second", ".0f"),
    ("seconds", "seconds", ".2f"),
)


def show_example(prompt, sample, tokenizer) -> None:
    """One decoded response with its mask, to see the template and where the loss applies."""
    ids, grade = sample.response.ids.tolist(), sample.grade
    say(f"--- one example: {len(prompt.ids)} prompt tokens (mask 0), {len(ids)} response tokens "
        f"(mask 1), finish reason {sample.response.finish_reason}\n"
        f"[0] {tokenizer.decode(prompt.ids)!r}\n[1] {tokenizer.decode(ids)!r}\n"
        f"    extracted {grade.extracted!r}, reference {prompt.problem.reference!r}: "
        f"{'correct' if grade.correct else 'incorrect'} ({grade.status})\n---")


# ---- training -----------------------------------------------------------------------------------


def build(config: Config, device: str):
    """Policy, its inner model, the frozen reference (with KL only) and the optimiser."""
    model = load_model(config, config.model, device)
    policy = distribute(Policy(model, config), config.parallel, device)
    reference = None
    if config.kl_coef and not config.proxy_kappa:
        frozen = load_model(config, config.model, device).requires_grad_(False)
        reference = Policy(frozen, config)
        # DDP refuses a model without gradients, and needs none: every rank has a copy
        if config.parallel == "fsdp":
            reference = distribute(reference, "fsdp", device)
    optimizer = torch.optim.AdamW(
        policy.parameters(), config.lr, (0.9, config.adam_beta2), weight_decay=config.weight_decay
    )
    return policy, model, reference, optimizer


def prepare(config: Config, groups, step: int) -> list[list[list[Row]]]:
    """Rows of the kept groups, split by prompts into mini-batches, each dealt to the ranks."""
    rows = make_rows(groups, config)
    order = np.random.default_rng([config.seed, step]).permutation(len(rows))
    splits = [split for split in np.array_split(order, config.mini_batches) if len(split)]
    return [deal([row for g in split for row in rows[g]], rollout.world_size()) for split in splits]


def load_inputs(config: Config):
    """Tokenizer, prompt sampler and held-out prompts; bad input is refused here."""
    tokenizer, model_config = rollout.load_tokenizer(
        config.model, config.max_prompt_length, config.max_response_length
    )
    if any(getattr(model_config, k, None) for k in ("final_logit_softcapping", "logit_scale")):
        raise UsageError(f"model {config.model!r} rescales its logits, which Policy does not do")

    def encode(problems: list[rollout.Problem]) -> list[rollout.Prompt]:
        return rollout.encode_prompts(
            problems, tokenizer, config.template, config.max_prompt_length
        )

    problems = rollout.load_problems(config.data, needs_answer=not config.reward)
    if config.reward:  # the function gets the whole problem
        problems = [dataclasses.replace(problem, reference=problem) for problem in problems]
    sampler = rollout.PromptSampler(encode(problems), config.seed)
    sources = [source for source in config.eval_data.split(",") if source]
    held_out = [p for source in sources for p in encode(rollout.load_problems(source, "test"))]
    return tokenizer, sampler, held_out[: config.eval_limit or None]


def build_engine(config: Config, tokenizer) -> rollout.Engine:
    return rollout.Engine(
        config.model,
        max_model_len=config.max_prompt_length + config.max_response_length,
        stop_ids=rollout.stop_token_ids(tokenizer, config.model),
        max_num_seqs=config.max_num_seqs,
        gpu_memory=config.gpu_memory,
        seed=config.seed,
    )


def run_eval(engine, tokenizer, graders, prompts, config: Config) -> dict[str, float]:
    metrics, _ = evaluation.evaluate(
        engine, tokenizer, graders, prompts, n=config.eval_n, seed=config.seed,
        max_tokens=config.max_response_length, temperature=config.eval_temperature,
        top_p=config.eval_top_p,
    )
    return metrics


def is_due(step: int, every: int, last: int, at_start: bool = False) -> bool:
    """Whether something done every `every` steps (0: never) and at the end is due at `step`."""
    if step == 0:
        return at_start
    return step == last or (every > 0 and step % every == 0)


def timings(seconds: dict[str, float], tokens: int) -> dict[str, float]:
    total = sum(seconds.values())
    return {
        "tokens_per_second": tokens / total,
        "seconds": total,
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


def train(config: Config) -> None:
    check_config(config)
    name_run(config)
    tokenizer, sampler, eval_prompts = load_inputs(config)
    reward = RewardFunction(config.reward) if config.reward else None
    device = rollout.init_distributed()
    config.output_dir = rollout.gather([config.output_dir])[0]  # it may hold rank 0's clock
    policy, model, reference, optimizer = build(config, device)
    checkpoints = Path(config.output_dir) / "checkpoints"
    checkpoint = newest_checkpoint(checkpoints) if config.resume else None
    start = 0
    if checkpoint:
        start, sampler.cursor = load_checkpoint(checkpoint, policy, optimizer)
        say(f"going on from {checkpoint}")
    engine = build_engine(config, tokenizer)
    tied = model.config.tie_word_embeddings
    if start:
        engine.load_weights(full_weights(model), tied)
    run = RunFolder(config, start)

    with Graders(timeout=config.grade_timeout) as graders:
        progress = tqdm(total=config.steps, initial=start, desc="training", leave=False,
                        disable=None if rollout.rank() == 0 else True)
        for step in range(start, config.steps + 1):
            if eval_prompts and is_due(step, config.eval_every, config.steps, at_start=True):
                run.log_eval(step, run_eval(engine, tokenizer, graders, eval_prompts, config))
            if step == config.steps:
                break
            seconds: dict[str, float] = {}
            kept, drawn = collect(engine, tokenizer, reward or graders, sampler, config, seconds)
            engine.sleep()
            if step == start:
                show_example(drawn[0][0], drawn[0][1][0], tokenizer)
            mini_batches = prepare(config, kept, step)
            shares = [[row for mini in mini_batches for row in mini[r]]
                      for r in range(rollout.world_size())]
            with timed(seconds, "score"):
                score(policy, reference, shares, config, device)
            with timed(seconds, "update"):
                knobs = set_knobs(shares[rollout.rank()], config, step)
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
                diagnostics = update(policy, optimizer, mini_batches, config, knobs, device)
            with timed(seconds, "sync"):
                engine.load_weights(full_weights(model), tied)

            metrics = dict(step=step, **rollout_metrics(drawn, config), **row_metrics(shares))
            metrics |= diagnostics | timings(seconds, metrics["rollout_tokens"])
            metrics |= dict(rho_positive=knobs.rho_positive, rho_negative=knobs.rho_negative)
            metrics |= dict(lr=optimizer.param_groups[0]["lr"])
            run.log_step(metrics)
            run.log_rollouts(step, drawn, config.log_rollouts)
            progress.update()
            if is_due(step + 1, config.save_every, config.steps):
                save_checkpoint(checkpoints, step + 1, sampler.cursor, policy, model, optimizer,
                                tokenizer, device)
        progress.close()
    run.finish()


def announce(config: Config) -> None:
    other = {"paper": "the demo: --setting demo", "demo": "the paper's: --setting paper"}
    say(f"{config.preset} in the {config.setting} setting: {config.model} on {config.data}, "
        f"{config.steps} steps of {config.prompts_per_step} x {config.group_size} responses, "
        f"{rollout.world_size()} rank(s). For {other[config.setting]}")


def name_run(config: Config) -> None:
    """Fill in --output_dir, and refuse to write over another run."""
    if not config.output_dir:
        name = f"{config.setting}-{config.preset}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}"
        config.output_dir = str(Path("runs") / name)
    if (Path(config.output_dir) / "metrics.jsonl").exists() and not config.resume:
        raise UsageError(f"--output_dir {config.output_dir} holds a run already: go on with it "
                         "(--resume auto) or give another folder")


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are enough
    config = parse_args(argv)
    try:
        announce(config)
        train(config)
    except UsageError as error:
        if rollout.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
    rollout.leave()
