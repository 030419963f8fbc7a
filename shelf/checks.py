"""What the program checks about itself: that a model is one that can be trained here, that vLLM and
the trainer are the same model, that weights arrive.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from model import full_weights
from rollout import Engine
from shelf.ranks import UsageError, gather, say

# Families of which a tiny model is trained in tests/test_models.py, by config.model_type
FAMILIES = dict(
    llama="Llama, SmolLM2", qwen2="Qwen2, Qwen2.5", qwen3="Qwen3", gemma="Gemma 1", phi3="Phi-3",
    mistral="Mistral without window", smollm3="SmolLM3", olmo2="OLMo 2", glm4="GLM-4",
    starcoder2="StarCoder2 without window", gpt_neox="GPT-NeoX", gpt2="GPT-2",
)  # fmt: skip


def check_model(name: str, config) -> None:
    """Refuse a model that would be trained wrongly, by its configuration; say if its family was
    never tried."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    for wrong, what in (
        (layers != {"full_attention"}, "layers without full attention"),
        (window < config.max_position_embeddings, "attention with a window"),
        (any(getattr(config, key, None) not in (None, 1.0) for key in scales), "rescaled logits"),
        (any(getattr(config, key, None) for key in experts), "a mixture of experts"),
    ):
        if wrong:
            raise UsageError(f"model {name!r} ({config.model_type}) has {what}, which cannot be "
                             f"trained here; these can: {', '.join(FAMILIES.values())}")
    if config.model_type not in FAMILIES:
        say(f"NOTE: a model of type {config.model_type} was never tried here; the first two steps "
            "check that vLLM and the trainer agree about it")


def check_agreement(policy, mini_batches: list[list[dict]], limit: float) -> None:
    """Stop a run in which vLLM and the trainer are not the same model, whatever the reason, or in
    which the policy does not repeat itself; looks at the first micro-batch of each rank."""
    for batch in sum(mini_batches, [])[:1]:
        with torch.no_grad():
            logprobs = policy(batch)[0]
        mask, old = batch["mask"], batch.get("old_logprobs", logprobs)
        known = mask & batch["rollout_logprobs"].isfinite()
        gap = (logprobs - batch["rollout_logprobs"]).abs().where(known, 0.0).sum()
        moved = ((logprobs - old).abs() * mask).max().expm1()
        gaps, tokens, moves = zip(*gather([(gap.item(), known.sum().item(), moved.item())]),
                                  strict=True)
        mismatch = sum(gaps) / max(sum(tokens), 1)
        if not mismatch <= limit:
            raise UsageError(
                f"vLLM and the trainer disagree about the same tokens: mismatch_mean {mismatch:.2g}"
                f" where {limit:g} is usual. Causes: a model whose logits are scaled, or whose "
                "attention has a window; a weight that does not reach vLLM; see README, models")
        if not all(move <= 1e-3 for move in moves):
            raise UsageError(
                f"the trainer does not repeat itself: ratio_max_deviation {max(moves):.2g} "
                "without an update in between, where 1e-5 is usual. Causes: dropout, a model with "
                "a state of its own")


# ---- weights ------------------------------------------------------------------------------------


def sync(engine: Engine, model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give vLLM the trainer's weights in `dtype`; on a GPU, see that they arrived: on a CPU vLLM
    packs them into other forms, and only the next responses can show it."""
    sent: dict[str, Any] = {}
    engine.load_weights(with_checksums(full_weights(model, dtype), sent))
    if not engine.cpu and engine.tensor_parallel == 1:
        engine.llm.apply_model(lambda held: check_weights(held, sent))


def check_sleep(engine: Engine, model: nn.Module, dtype: torch.dtype | None,
                prompts: list) -> None:
    """Raise UsageError unless vLLM, asleep and given the trainer's weights, which are still its
    own, says what it said before. All ranks must call this."""
    def answer() -> list[np.ndarray]:
        return [x.logprobs for _, x in sorted(engine.generate(
            prompts, 1, [0] * len(prompts), max_tokens=16), key=lambda found: found[0])]

    before = answer()
    engine.sleep()
    sync(engine, model, dtype)
    for old, new in zip(before, answer(), strict=True):
        # the first token alone: after it rounding may lead to another one
        if not abs(float(old[0]) - float(new[0])) < 0.05:
            raise UsageError("vLLM does not say the same after it was put to sleep and given the "
                             f"weights that it had (log p {old[0]:.3f}, then {new[0]:.3f}): its "
                             "sleep mode or the sync is broken with this model")


def with_checksums(named_tensors, sent: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors, and write (shape, checksum) of each into `sent`."""
    for name, tensor in named_tensors:
        sent[name] = tuple(tensor.shape), checksum(tensor)
        yield name, tensor


def checksum(tensor):
    """Return the sum of a tensor's elements, that sum weighted by rows and by columns, which sees a
    transposition, and the sum of their sizes: (4,), float64, not read from the device."""
    matrix = tensor.detach().reshape(len(tensor), -1)
    rows, columns = (matrix.sum(axis, dtype=torch.float64) for axis in (1, 0))
    place = [torch.linspace(0.0, 1.0, len(x), dtype=x.dtype, device=x.device) for x in
             (rows, columns)]
    size = matrix.abs().sum(dtype=torch.float64)
    return torch.stack([rows.sum(), rows @ place[0], columns @ place[1], size])


def held_by(model, name: str, sent: dict[str, Any]) -> tuple[str, int]:
    """Return under which name a vLLM model holds a Hugging Face weight, and from which row on: q, k
    and v for example are one matrix there. ("", 0) if it is not found."""
    names = {held for held, _ in model.named_parameters()}
    generic = "model." + name.partition(".")[2]  # in vLLM's wrapper of a Hugging Face class
    for held in (name, generic):
        if held in names:
            return held, 0
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        for i, part in enumerate(parts):
            held = name.replace(f".{part}.", f".{fused}.")
            if held != name and held in names:
                before = [name.replace(f".{part}.", f".{other}.") for other in parts[:i]]
                return held, sum(sent[other][0][0] for other in before)
    return "", 0


def check_weights(model, sent: dict[str, Any]) -> None:
    """Raise UsageError if a weight that a vLLM model holds is not the one that was sent. Where its
    form is another one (a transposed layer, a name of its own) it is not compared."""
    held, pairs = dict(model.named_parameters()), {}
    for name, (shape, expected) in sent.items():
        there, start = held_by(model, name, sent)
        tensor = held[there][start : start + shape[0]] if there else None
        if tensor is not None and tuple(tensor.shape) == shape:
            pairs[name] = torch.stack([expected, checksum(tensor).to(expected.device)])
    both = torch.stack(list(pairs.values())).cpu()  # (weights, 2, 4), read at once
    gaps = (both[:, 0] - both[:, 1]).abs().amax(1) / both[:, 0, 3].clamp(min=1e-9)
    wrong = [name for name, gap in zip(pairs, gaps.tolist(), strict=True) if not gap <= 1e-6]
    if wrong:
        raise UsageError(f"the weight sync failed: {len(wrong)} of {len(pairs)} weights that vLLM "
                         f"holds are not those of the trainer, the first is {wrong[0]}")
