"""What a run will need, measured by its own code without a GPU and without weights.

    python a3po.py --dry_run --gpus 8 [--nodes 2] [--gpu_gb 80] [--mean_length 3000] [flags]

`update` runs as it is, under fake tensors and a fake process group: the real sharding, precision,
packing at the token budget, attention kernel's shapes, chunked head, loss and Adam. Of a model only
the config.json is read. What is not the trainer's (vLLM, CUDA's context, speeds) is calculated, and
says so. Exit status 2 and one sentence if it does not fit. A run on GPUs begins with this check.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import varlen
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import a3po
import model
from rollout import Prompt, Sample
from shelf.ranks import UsageError
from verify import Grade

GIB = 2**30
ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 5 * GIB  # calculated: CUDA's context, NCCL's buffers, what a sleeping vLLM keeps
GRAPHS = 3 * GIB  # calculated: vLLM's activations and CUDA graphs
SPEEDS = dict(flops=990e12, update=0.4, score=0.4, generate=0.08)  # an H100's, and shares of it
NAMES = {  # what the trackers of FSDP and of one process call it
    "weights": ("sharded_param", "param"), "gradients": ("sharded_grad", "grad"),
    "Adam": ("opt",), "activations": ("act",), "temporary": ("temp",),
    "gathered": ("unsharded_param", "unsharded_grad", "all_gather", "reduce_scatter"),
}  # fmt: skip


def measure(argv: list[str]) -> dict:
    """Return the bytes and FLOPs of an update on one of WORLD_SIZE ranks, by what they are for."""
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    config = a3po.parse_args(argv)
    try:
        about = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError):
        sys.exit(f"error: model {config.model!r} has no config.json that can be read")
    a3po.check_model(config.model, about)
    precision = a3po.precision_of(config.precision, "cuda")
    pretend(about, precision)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy, inner, reference, optimizer = a3po.build(config, "cpu", "varlen", precision)
        batches = [full_batch(config, fake) for _ in range(2)]
        rho = a3po.rho_at(0, config)
        sharded = config.parallel == "fsdp"
        tracker = FSDPMemTracker(policy, optimizer) if sharded else MemTracker()
        if not sharded:
            tracker.track_external(policy, optimizer)

        class Watched:  # the tracker wants to be told of a second forward
            parameters = policy.parameters

            def __call__(self, batch):
                tracker.reset_mod_stats()
                return policy(batch)

        with tracker:
            for n in (1, 2):  # in the second update Adam's averages exist, and gradients add up
                a3po.update(Watched(), optimizer, [batches[:n]], config, rho)
        [peak] = tracker.get_tracker_snapshot("peak").values()
        model.GPU = False  # the counter does not know products with another result type
        with FlopCounterMode(display=False) as flops:
            a3po.update(policy, optimizer, [batches[:1]], config, rho)
    found = {str(key).rpartition(".")[2].lower(): size for key, size in peak.items()}
    held = {name: sum(found.get(key, 0) for key in keys) for name, keys in NAMES.items()}
    parameters = sum(parameter.numel() for parameter in inner.parameters())
    shards = config.shard_ranks or world if sharded else 1
    buckets = 4 * parameters * (shards == 1 < world)  # calculated: DDP's, no fake can make them
    held |= dict(gathered=held["gathered"] + buckets,
                 reference=4 * parameters // shards if reference else 0)
    head_dim = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    kv_heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
    return dict(
        held=held, peak=found["total"] + buckets + held["reference"], parameters=parameters,
        tokens=len(batches[0]["ids"]), update_flops=flops.get_total_flops(), setting=vars(config),
        kv_bytes=4 * about.num_hidden_layers * kv_heads * head_dim,
    )


def pretend(about, precision) -> None:
    """Replace what reads values, which fake tensors have not, or files; assert the dtypes that fake
    kernels forgive. about: the model's config."""
    make_mesh, attend, logits = dist.init_device_mesh, varlen.varlen_attn, model.compute_logits

    def mesh(*args, **kwargs):
        with unset_fake_temporarily():
            return make_mesh(*args, **kwargs)

    def checked_attend(query, key, value, *rest, **options):
        assert query.dtype == key.dtype == value.dtype == precision, (query.dtype, value.dtype)
        return attend(query, key, value, *rest, **options)

    def checked_logits(hidden, *rest):
        result = logits(hidden, *rest)
        assert hidden.dtype == precision and result.dtype == torch.float32, hidden.dtype
        return result

    dist.init_device_mesh, model.GPU = mesh, True
    varlen.varlen_attn, model.compute_logits = checked_attend, checked_logits
    AutoModelForCausalLM.from_pretrained = lambda path, dtype, **kernel: (
        AutoModelForCausalLM.from_config(about, dtype=torch.float32, **kernel))
    torch.nn.Module.to = torch.nn.Module.float = lambda self, *_: self  # it is float32 already
    torch.nn.parallel.DistributedDataParallel = lambda policy: policy
    a3po.read = lambda sums: dict.fromkeys(sums, 1.0)
    # DTensor derives the shapes of clipping from whole tensors, which would be counted
    a3po.clip_gradients = lambda *_: torch.ones(())


def full_batch(config, fake) -> dict:
    """Return a micro-batch of config.micro_batch_tokens tokens: a response of full length, others
    of a quarter of it, to one prompt."""
    prompt = Prompt(None, [1] * min(256, config.max_prompt_length))
    room, samples = max(config.micro_batch_tokens - len(prompt.ids), 1), []
    while room:
        share = 1 if not samples else 4
        length = min(max(config.max_response_length // share, 1), room)
        samples.append(Sample(prompt, np.ones(length, np.int32), np.zeros(length, np.float32),
                              "stop", grade=Grade(True, None), advantage=1.0))
        room -= length
    batch = model.collate(samples, "cpu", "varlen")
    attention = batch.pop("attention")
    for part in (batch, attention):
        part |= {k: fake.from_tensor(v) for k, v in part.items() if isinstance(v, torch.Tensor)}
    names = ("old_logprobs", "entropy", "ref_logprobs")[: 3 if config.kl_coef else 2]
    zeros = {name: torch.zeros(batch["mask"].shape) for name in names}
    return batch | zeros | dict(attention=attention, trained=True)


def in_process(ranks: int, argv: list[str]) -> dict:
    """Measure in a process of its own, for its group has one number of ranks. Raises UsageError
    where that fails."""
    env = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1",
                            CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "shelf.plan", "--measure", *argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"error: it ended with {done.returncode}"]
        raise UsageError(said[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def problem(x: dict, gpu: int) -> str:
    """Return what does not fit into GPUs of so many bytes, or ""; add to x what follows for vLLM:
    the `most` that --gpu_memory may be, and kv_tokens, its room for keys and values."""
    c, held = x["setting"], x["held"]["weights"] + x["held"]["Adam"] + x["held"]["reference"]
    x["most"] = max(0.01, math.floor(100 * (1 - (held + CONTEXT) / gpu)) / 100)
    vllm = int(c["gpu_memory"] * gpu) - 2 * x["parameters"] - GRAPHS
    x["kv_tokens"] = max(0, vllm) // x["kv_bytes"]
    if x["peak"] + CONTEXT > gpu:
        return f"the update takes {(x['peak'] + CONTEXT) / GIB:.1f} GiB a GPU"
    if c["gpu_memory"] > x["most"]:
        return f"--gpu_memory {c['gpu_memory']} leaves no room for weights and Adam"
    if x["kv_tokens"] < c["max_prompt_length"] + c["max_response_length"]:
        return f"vLLM has room for {x['kv_tokens']:,} tokens, less than one response"
    return ""


def help_for(x: dict, gpu: int, ranks: int) -> list[list[str]]:
    """Return what might make it fit: the flags of each attempt."""
    if x["peak"] + CONTEXT <= gpu:
        return [["--gpu_memory", str(x["most"])]]
    less = ["--micro_batch_tokens", str(x["setting"]["micro_batch_tokens"] // 2),
            "--head_chunk", "512"]
    states = 16 * x["parameters"] // ranks + CONTEXT
    more = 2 ** max(1, math.ceil(math.log2(states / (0.6 * gpu))))  # ranks, times this
    return [*([["--parallel", "fsdp"]] if x["setting"]["parallel"] == "ddp" else []),
            *([less] if states < gpu else []), ["--gpus", str(ranks * more)],
            ["--gpus", str(2 * ranks * more)]]


def refusal(x: dict, gpu: int, ranks: int, argv: list[str]) -> str:
    """Return "" if it fits, else why not and with which flags it does, found by running them."""
    what = problem(x, gpu)
    for flags in help_for(x, gpu, ranks) if what else ():
        other = int(flags[1]) if flags[0] == "--gpus" else ranks
        if not problem(in_process(other, [*argv, *(flags if other == ranks else ())]), gpu):
            found = " ".join(flags) if other == ranks else f"{other} GPUs"
            return f"it does not fit: {what}; it fits with {found}"
    return what and f"it does not fit: {what}; nothing that was tried helps"


def check_run(config, gpu: int, ranks: int) -> str:
    """Return a line that says how a run fits into GPUs of so many bytes. Raises UsageError if it
    does not."""
    argv = [f"--{name}={value}" if type(value) is not bool else f"--{'no-' * (not value)}{name}"
            for name, value in vars(config).items()]
    try:
        x = in_process(ranks, argv)
    except UsageError as why:  # the run itself may do better
        return f"NOTE: what it needs could not be measured ({why})"
    if why := refusal(x, gpu, ranks, argv):
        raise UsageError(why)
    return (f"it fits: an update takes {(x['peak'] + CONTEXT) / GIB:.1f} of {gpu / GIB:.0f} GiB a "
            f"GPU; vLLM has room for {x['kv_tokens']:,} tokens (see --dry_run)")


def table(x: dict, ranks: int, gpus: int, mean: int) -> str:
    """Show what was measured, and what follows from it for a step with responses of mean length."""
    c, n, gb = x["setting"], x["parameters"], x["parameters"] / 1e9
    lines = [f"{c['model']}: {gb:.2f}B parameters on {ranks} GPUs. An update's peak, GiB a GPU, "
             f"measured at {c['micro_batch_tokens']} tokens:"]
    lines += [f"  {name:24}{size / GIB:7.1f}" for name, size in x["held"].items() if size]
    lines += [f"  {'together':24}{x['peak'] / GIB:7.1f}   beside about {CONTEXT / GIB:.0f} of "
              "CUDA, NCCL and the sleeping vLLM (calculated)"]
    long = c["max_prompt_length"] + c["max_response_length"]
    lines += [f"vLLM at --gpu_memory {c['gpu_memory']} (at most {x['most']}): room for "
              f"{x['kv_tokens']:,} tokens, {x['kv_tokens'] // (mean + 256)} sequences of mean or "
              f"{x['kv_tokens'] // long} of full length (calculated)"]
    step = c["prompts_per_step"] * c["group_size"] * mean
    update = x["update_flops"] / x["tokens"] * step
    flops = dict(generate=2 * n * step, update=update,
                 score=update / (4 if c["gradient_checkpointing"] else 3))
    lines += [f"A step of {step / 1e6:.1f}M tokens, calculated at "
              f"{SPEEDS['flops'] / 1e12:.0f} TFLOP/s a GPU: " + ", ".join(
                  f"{name} {value:.1e} FLOP, {value / SPEEDS['flops'] / ranks / SPEEDS[name]:.0f} s"
                  f" at {SPEEDS[name]:.0%}" for name, value in flops.items())]
    lines += [f"GB: gathered for each forward and each backward {2 * gb:.1f}, reduced "
              f"{4 * gb:.1f}, synced {2 * gb:.1f} a step; disk {2 * gb:.1f} a checkpoint, "
              f"{12 * gb:.0f} more of the newest, twice while it is written; a machine's memory "
              f"{2 * gb * gpus:.0f} while weights load, 0.1 for each grader (at most 16 a GPU, a "
              "core each)"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--measure"]:
        return print(json.dumps(measure(argv[1:])))
    parser = argparse.ArgumentParser("a3po.py --dry_run", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("gpus", 8, "GPUs a machine"), ("nodes", 1, "machines"),
                                ("gpu_gb", 80, "memory of a GPU, GiB"),
                                ("mean_length", 3000, "tokens of a mean response")):
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{text} (default: {default})")
    args, rest = parser.parse_known_args(argv)
    flags, ranks, gpu = ["--setting=paper", *rest], args.gpus * args.nodes, args.gpu_gb * GIB
    try:
        measured = in_process(ranks, flags)
        problem(measured, gpu)
        print(table(measured, ranks, args.gpus, args.mean_length), flush=True)
        if why := refusal(measured, gpu, ranks, flags):
            raise UsageError(why)
        print("it fits")
    except UsageError as why:
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
