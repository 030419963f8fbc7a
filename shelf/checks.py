"""What the program checks about itself: that torch sees the GPUs, that a model is one that can be
trained here, that vLLM survives a sleep, and that vLLM and the trainer stay the same model.
"""

import os
import shutil
import sysconfig
import tempfile
from glob import glob

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging

from model import full_weights, load_model, make_valid
from rollout import Engine, Prompt
from shelf.ranks import UsageError, explain, say

# Families of which a tiny model is trained in tests/test_models.py, by config.model_type
FAMILIES = dict(
    llama="Llama, SmolLM2", qwen2="Qwen2, Qwen2.5", qwen3="Qwen3", gemma="Gemma 1", phi3="Phi-3",
    mistral="Mistral without window", smollm3="SmolLM3", olmo2="OLMo 2", glm4="GLM-4",
    starcoder2="StarCoder2 without window", gpt_neox="GPT-NeoX", gpt2="GPT-2",
)  # fmt: skip
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM's
SAME_ANSWER = 0.05  # nats; 16 bits and another batch move a log-prob by less
SAME_POLICY = 1e-3  # |ratio - 1| without an update in between; usual is 0
# Of a step's mean |log p in vLLM - log p in the trainer|, nats, by the 16 bits; None: float32
SAME_MODEL = {None: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


def check_machine(wants_gpu: bool) -> None:
    """Refuse a machine whose NVIDIA GPUs torch cannot see, unless that is meant and none is wanted;
    and one where Triton, which compiles kernels as it meets them, could not."""
    hidden, cuda = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.version.cuda
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if torch.cuda.is_available():
        if not compiler or not os.path.exists(header):
            missing = f"{header}: install python3-dev" if compiler else "C compiler: install gcc"
            raise UsageError(f"a GPU's kernels are compiled here, and there is no {missing}")
    elif glob("/dev/nvidia[0-9]*") or os.path.exists("/usr/lib/wsl/lib/nvidia-smi"):
        why = (f"CUDA_VISIBLE_DEVICES={hidden!r} hides them, unset it" if hidden in ("", "-1") else
               "" if cuda else "this is its CPU build, remove .venv and run bash run.sh install")
        if wants_gpu or not why:
            raise UsageError("torch sees none of this machine's NVIDIA GPUs: " + (why or (
                f"the driver, see nvidia-smi, may be too old for CUDA {cuda} (13 needs 580), or "
                f"CUDA_VISIBLE_DEVICES={hidden} name none")))


def check_model(name: str, config) -> None:
    """Refuse a model that would be trained wrongly, by its configuration; say if its family was
    never tried."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    for wrong, what in (
        (layers != {"full_attention"}, "layers without full attention"),
        (window < config.max_position_embeddings, "attention with a window"),
        (any(getattr(config, key, None) not in (None, 1.0) for key in scales), "rescaled logits"),
        (any(getattr(config, key, None) for key in experts), "a mixture of experts"),
        (not torch.cuda.is_available() and head not in CPU_HEADS,
         f"heads of {head} numbers, unknown to vLLM on a CPU"),
    ):
        if wrong:
            raise UsageError(f"model {name!r} ({config.model_type}) has {what}, which cannot be "
                             f"trained here; these can: {', '.join(FAMILIES.values())}")
    if config.model_type not in FAMILIES:
        say(f"NOTE: a model of type {config.model_type} was never tried here; every step checks "
            "that vLLM and the trainer agree about it")


def check_weights(name: str, config) -> None:
    """Refuse a folder of a family tried here whose files lack weights or are cut short: of weights
    that vLLM joins, one is enough for it. With fake tensors none is read."""
    tried = config.model_type in FAMILIES and not hasattr(config, "quantization_config")
    if tried and glob(os.path.join(name, "*.safetensors")):  # others torch cannot load as fakes
        logging.disable_progress_bar()  # it would say that weights are loaded
        with FakeTensorMode(allow_non_fake_inputs=True):
            load_model(name, "grids")
        logging.enable_progress_bar()


def check_saving(name: str, config, tokenizer) -> None:
    """Write a checkpoint without weights into a temporary folder; UsageError if that fails."""
    from transformers import AutoModelForCausalLM

    with (explain(f"model {name!r} cannot be built and saved again", "mend its files"),
          torch.device("meta"), tempfile.TemporaryDirectory() as folder):
        model = AutoModelForCausalLM.from_config(config)
        make_valid(model.generation_config)
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(folder)


def check_sleep(engine: Engine, model: nn.Module, dtype: torch.dtype | None,
                prompts: list[Prompt]) -> None:
    """Raise UsageError unless vLLM says the same after a sleep, in which it forgets its weights,
    and a sync: one that does not arrive, or in another form, is seen. All ranks must call this."""
    def first_logprobs():  # of the first token alone: after it rounding may lead to another one
        found = dict(engine.generate(prompts, 1, [0] * len(prompts), max_tokens=1))
        return [float(found[i].logprobs[0]) for i in range(len(prompts))]

    before = first_logprobs()
    engine.sleep()
    engine.sync(full_weights(model, dtype))
    for old, new in zip(before, first_logprobs(), strict=True):
        if not abs(old - new) < SAME_ANSWER:
            raise UsageError("vLLM does not say the same after it was put to sleep and given the "
                             f"weights that it had (log p {old:.3f}, then {new:.3f}): its sleep "
                             "mode or the sync is broken with this model")


def check_agreement(metrics: dict, precision: torch.dtype | None) -> None:
    """End a run in which vLLM and the trainer are not the same model, or the policy does not repeat
    itself. metrics: of a step, the same on all ranks; precision: see precision_of."""
    mismatch, moved = metrics["mismatch_mean"], metrics["ratio_max_deviation"]
    if mismatch is not None and not mismatch <= SAME_MODEL[precision]:
        raise UsageError(
            f"vLLM and the trainer disagree about the same tokens: mismatch_mean {mismatch:.2g}"
            f" where {SAME_MODEL[precision]:g} is the limit. Causes: a model whose logits are "
            "scaled, or whose attention has a window; a weight that does not reach vLLM")
    if moved is not None and not moved <= SAME_POLICY:
        raise UsageError(f"the trainer does not repeat itself: ratio_max_deviation {moved:.2g} "
                         "without an update in between, where 1e-5 is usual. Causes: dropout, a "
                         "model with a state of its own")
