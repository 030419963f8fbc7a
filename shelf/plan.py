"""What a run will need, measured by its own code without a GPU and without weights.

    python a3po.py --dry_run --gpus 8 [--nodes 2] [--gpu_gb 80] [--mean_length 3000] [flags]

`update` runs as it is, under fake tensors and a fake process group: the real sharding, precision,
packing at the token budget, attention kernel's shapes, chunked head, loss and Adam. Of a model only
the config.json is read. What is not the trainer's (vLLM, CUDA's context, speeds) is calculated, and
says so. Exit status 2 and one sentence if it does not fit.
"""

import argparse
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import a3po
import model
from rollout import Prompt, Sample, cache_bytes
from shelf.checks import check_model
from shelf.memory import CONTEXT, GIB, engine_room
from shelf.ranks import UsageError, explain
from shelf.report import plan_table
from verify import Grade

NOMINAL_GB = int(0.985 * GIB)  # bytes: torch sees 39.4 GiB of 40, 79.1 of 80, 139.8 of 141

NAMES = {  # what the trackers of FSDP and of one process call it
    "weights": ("sharded_param", "param"), "gradients": ("sharded_grad", "grad"),
    "Adam": ("opt",), "activations": ("act",), "temporary": ("temp",),
    "gathered": ("unsharded_param", "unsharded_grad", "all_gather", "reduce_scatter"),
}  # fmt: skip


def measure(ranks: int, config: a3po.Config) -> dict:
    """Return the bytes and FLOPs of an update on one of the ranks, by what they are for. For a
    process of its own: its group has one number of ranks, and it prints nothing."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with explain(f"model {config.model!r} has no config.json that can be read", "check its name"):
        about = AutoConfig.from_pretrained(config.model)
    check_model(config.model, about)
    a3po.precision_of(config.precision, "cuda")  # refuses 32 bits; both kinds of 16 are one size
    sharded = config.parallel == "fsdp"
    offload, config.offload = config.offload, False  # what is on the host is subtracted below
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    policy, inner, reference, optimizer = build(config, about, fake)
    tracker = FSDPMemTracker(policy, optimizer) if sharded else MemTracker()
    tracker.track_external(policy, optimizer)

    def watched(batch: dict) -> list[torch.Tensor]:
        tracker.reset_mod_stats()  # it wants to be told of each forward pass
        return policy(batch)

    # None to clip: DTensor derives the shapes of that from whole tensors, which would be counted
    watched.parameters = list
    with fake, Values():
        batches = [full_batch(config)[0] for _ in range(2)]
        lengths = full_batch(config)[1]
        with tracker, patch.object(model, "has_wide_products", lambda x: x.itemsize == 2):
            for n in (1, 2):  # in the second update Adam's averages exist, and gradients add up
                a3po.update(watched, optimizer, [batches[:n]], config, a3po.rho_at(0, config))
        # as on a CPU, for the counter does not know products with another result type
        with FlopCounterMode(display=False) as flops:
            a3po.update(watched, optimizer, [batches[:1]], config, a3po.rho_at(0, config))
    [peak] = tracker.get_tracker_snapshot("peak").values()
    found = {str(key).rpartition(".")[2].lower(): size for key, size in peak.items()}
    held = {name: sum(found.get(key, 0) for key in keys) for name, keys in NAMES.items()}
    parameters = sum(parameter.numel() for parameter in inner.parameters())
    shards = config.shard_ranks or ranks if sharded else 1
    buckets = 4 * parameters * (shards == 1 < ranks)
    held["gathered"] += buckets
    held["reference"] = 4 * parameters // shards if reference else 0
    host = offload * sum(held[name] for name in ("weights", "gradients", "Adam", "reference"))
    config.offload = offload
    peak = found["total"] + buckets + held["reference"] - host
    return dict(
        held=held, host=host, peak=peak, parameters=parameters,
        context=CONTEXT, tokens=len(batches[0]["ids"]), update_flops=count(flops, lengths),
        config=config, kv_bytes=cache_bytes(about, 2),
    )


def count(flops: FlopCounterMode, lengths: np.ndarray) -> float:
    """Return the FLOPs with causal attention within sequences of these lengths: torch, which cannot
    read them here, takes all for the longest, and each token to see all the others."""
    share = (lengths**2).sum() / len(lengths) / lengths.max() ** 2 / 2
    counts = flops.get_flop_counts()["Global"].items()
    return sum(n * (share if "varlen" in str(operator) else 1) for operator, n in counts)


def build(config: a3po.Config, about, fake: FakeTensorMode) -> tuple:
    """Return what a3po.build does, with fake weights. about: the model's config."""
    def load(path: str, *, attn_implementation: str, **_) -> tuple[torch.nn.Module, dict]:
        how = dict(dtype=torch.float32, attn_implementation=attn_implementation)
        with fake:
            return AutoModelForCausalLM.from_config(about, **how), dict(missing_keys=[])

    if config.parallel == "ddp":  # its buckets are calculated, for no fake can make them
        os.environ["WORLD_SIZE"] = "1"
    # _apply moves and converts parameters, which fake ones refuse: they are in place, and float32
    with (patch.object(AutoModelForCausalLM, "from_pretrained", load),
          patch.object(torch.nn.Module, "_apply", lambda self, *_: self)):
        return a3po.build(config, "cpu", "varlen", torch.bfloat16)


class Values(TorchFunctionMode):
    """Answer 1 to whoever reads a value, which fake tensors have not; assert the dtypes that their
    kernels forgive: attention computes in 16 bits, and its results of the head are float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.item:
            return 1.0
        result = function(*args, **kwargs or {})
        if str(function) == "torch_attn._varlen_attn":
            assert all(x.dtype == torch.bfloat16 for x in args[:3]), [x.dtype for x in args[:3]]
        if function is torch.mm:  # the logits
            assert result.dtype == torch.float32, result.dtype
        return result


def full_batch(config: a3po.Config) -> tuple[dict, np.ndarray]:
    """Return a micro-batch of config.micro_batch_tokens tokens: a response of full length, others
    of a quarter of it, to one prompt; and the lengths of its sequences."""
    prompt = Prompt(None, [1] * min(256, config.max_prompt_length))
    room, samples = max(config.micro_batch_tokens - len(prompt.ids), 1), []
    while room:
        length = config.max_response_length if not samples else config.max_response_length // 4
        ids = np.ones(min(max(length, 1), room), np.int32)
        samples.append(Sample(prompt, ids, ids.astype(np.float32), "stop",
                              grade=Grade(True, None), advantage=1.0))
        room -= len(ids)
    batch = model.collate(samples, "cpu", "varlen") | dict(trained=True)
    for name in ("old_logprobs", "entropy", "ref_logprobs")[: 3 if config.kl_coef else 2]:
        batch[name] = torch.zeros(batch["mask"].shape)
    return batch, np.array([len(prompt.ids) + len(sample.ids) for sample in samples])


def in_process(ranks: int, argv: list[str]) -> dict:
    """Return what `measure` finds with these flags. Raises UsageError."""
    with (patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
          ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool):
        return pool.submit(measure, ranks, a3po.parse_args(a3po.with_config(argv))).result()


def problem(x: dict, gpu: int) -> str:
    """Return what does not fit into GPUs of so many bytes, or ""; add to x what follows for vLLM:
    its share of a GPU, its room in kv_tokens, and its sequences."""
    x |= dict(share=x["config"].gpu_memory, kv_tokens=0, sequences=0)
    if x["peak"] + CONTEXT > gpu:
        return f"the update takes {(x['peak'] + CONTEXT) / GIB:.1f} GiB a GPU"
    states = x["held"]["weights"] + x["held"]["Adam"] + x["held"]["reference"]
    held = 0 if x["config"].offload else states
    try:
        room = engine_room(x["config"], x["parameters"], x["kv_bytes"], held, gpu)
    except UsageError as why:
        return str(why).removeprefix("it does not fit: ")
    x |= dict(zip(("share", "kv_tokens", "sequences"), room, strict=True))
    return ""


def first_that_fits(tries: list, gpu: int, argv: list[str]) -> tuple:
    """Return ranks and flags of the first of the tries that fits, and what it needs, or Nones."""
    for ranks, flags in tries:
        x = in_process(ranks, [*argv, *flags.split()])
        if not problem(x, gpu):
            return ranks, flags, x
    return None, None, None


def refusal(x: dict, gpu: int, ranks: int, argv: list[str]) -> str:
    """Return why it does not fit, and with which flags it does."""
    what, c = problem(x, gpu), x["config"]
    more = ranks * 2 ** max(1, math.ceil(math.log2((16 * x["parameters"] / ranks) / (0.5 * gpu))))
    tries = [(ranks, "--parallel fsdp"),
             (ranks, f"--micro_batch_tokens {c.micro_batch_tokens // 2} --head_chunk 512"),
             (ranks, "--parallel fsdp --offload"), (more, ""), (2 * more, "")]
    other, flags, _ = first_that_fits(tries[c.parallel == "fsdp" :], gpu, argv)
    helps = f"it fits with {flags or f'{other} GPUs'}" if other else "nothing that was tried helps"
    return f"it does not fit: {what}; {helps}"


def fastest(x: dict, gpu: int, ranks: int, argv: list[str]) -> str:
    """Say that it fits, and which flags that recompute less, if need be of fewer tokens at a time,
    would fit too."""
    c = x["config"]
    fewer = min(c.micro_batch_tokens, c.max_prompt_length + c.max_response_length)
    tries = [(ranks, f"--recompute {every} --micro_batch_tokens {tokens}")
             for every in (0, 2) for tokens in (c.micro_batch_tokens, fewer)]
    _, flags, y = first_that_fits(tries if c.recompute == 1 else [], gpu, argv)
    if not y:
        return "it fits"
    share = y["update_flops"] / y["tokens"] / (x["update_flops"] / x["tokens"])
    return f"it fits; with {1 - share:.0%} fewer FLOPs in the update so does {flags}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("a3po.py --dry_run", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("gpus", 8, "GPUs a machine"), ("nodes", 1, "machines"),
                                ("gpu_gb", 80, "memory of a GPU, as its name says"),
                                ("mean_length", 3000, "tokens of a mean response")):
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{text} (default: %(default)s)")
    args, rest = parser.parse_known_args(argv)
    flags, ranks, gpu = ["--setting=paper", *rest], args.gpus * args.nodes, args.gpu_gb * NOMINAL_GB
    try:
        measured = in_process(ranks, flags)
        why = problem(measured, gpu)
        print(plan_table(measured, ranks, args.gpus, args.mean_length), flush=True)
        if why:
            raise UsageError(refusal(measured, gpu, ranks, flags))
        print(fastest(measured, gpu, ranks, flags))
    except UsageError as why:
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
