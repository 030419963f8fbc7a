"""What a run will need, measured by its own code without a GPU and without weights.

    python plan.py --gpus 8 [--nodes 2] [--gpu_gb 80] [--mean_length 3000] [flags of a3po.py]

`update` runs as it is, under fake tensors and a fake process group: the real sharding, precision,
packing at the token budget, attention kernel's shapes, chunked head, loss and Adam. Of a model only
the config.json is read. What is not the trainer's (vLLM, CUDA's context, speeds) is calculated, and
says so. Exit status 2 and one sentence if it does not fit.
"""

import argparse
import json
import math
import os
import subprocess
import sys

import numpy as np

GIB = 2**30
CONTEXT = 5 * GIB  # calculated: CUDA's context, NCCL's buffers, what a sleeping vLLM keeps
GRAPHS = 3 * GIB  # calculated: vLLM's activations and CUDA graphs
SPEEDS = dict(flops=990e12, update=0.4, score=0.4, generate=0.08)  # an H100's, and shares of it


def measure(argv: list[str]) -> dict:
    """Return the bytes and FLOPs of an update on one of WORLD_SIZE ranks, by what they are for."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig

    import a3po
    import model

    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    config = a3po.parse_args(argv)
    try:
        about = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError):
        sys.exit(f"error: model {config.model!r} has no config.json that can be read")
    a3po.check_model(config.model, about)
    pretend(about)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        precision = torch.float16 if config.precision == "fp16" else torch.bfloat16
        policy, inner, reference, optimizer = a3po.build(config, "cpu", "varlen", precision)
        batches = [full_batch(config, fake) for _ in range(2)]
        tokens = len(batches[0]["ids"])
        rho = a3po.rho_at(0, config)
        tracker = FSDPMemTracker(policy, optimizer)

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
    parameters = sum(parameter.numel() for parameter in inner.parameters())
    head_dim = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    kv_heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
    return dict(
        peak=found, parameters=parameters, tokens=tokens, update_flops=flops.get_total_flops(),
        reference=4 * parameters // (config.shard_ranks or world) if reference else 0,
        kv_bytes=4 * about.num_hidden_layers * kv_heads * head_dim, setting=vars(config),
    )


def pretend(about) -> None:
    """Replace what reads values, which fake tensors have not, or files. about: model's config."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import AutoModelForCausalLM

    import a3po
    import model

    make_mesh = dist.init_device_mesh

    def mesh(*args, **kwargs):
        with unset_fake_temporarily():
            return make_mesh(*args, **kwargs)

    dist.init_device_mesh, model.GPU = mesh, True
    AutoModelForCausalLM.from_pretrained = lambda path, dtype, **kernel: (
        AutoModelForCausalLM.from_config(about, dtype=torch.float32, **kernel))
    torch.nn.Module.to = torch.nn.Module.float = lambda self, *_: self  # it is float32 already
    a3po.read = lambda sums: dict.fromkeys(sums, 1.0)
    # DTensor derives the shapes of clipping from whole tensors, which would be counted
    a3po.clip_gradients = lambda *_: torch.ones(())


def full_batch(config, fake) -> dict:
    """Return a micro-batch of config.micro_batch_tokens tokens: a response of full length, others
    of a quarter of it, to one prompt."""
    import torch

    from a3po import Grade, Prompt, Sample, collate

    prompt = Prompt(None, [1] * min(256, config.max_prompt_length))
    room, samples = max(config.micro_batch_tokens - len(prompt.ids), 1), []
    while room:
        share = 1 if not samples else 4
        length = min(max(config.max_response_length // share, 1), room)
        samples.append(Sample(prompt, np.ones(length, np.int32), np.zeros(length, np.float32),
                              "stop", grade=Grade(True, None), advantage=1.0))
        room -= length
    batch = collate(samples, "cpu", "varlen")
    attention = batch.pop("attention")
    for part in (batch, attention):
        part |= {k: fake.from_tensor(v) for k, v in part.items() if isinstance(v, torch.Tensor)}
    names = ("old_logprobs", "entropy", "ref_logprobs")[: 3 if config.kl_coef else 2]
    zeros = {name: torch.zeros(batch["mask"].shape) for name in names}
    return batch | zeros | dict(attention=attention, trained=True)


def in_process(ranks: int, argv: list[str]) -> dict:
    """Measure in a process of its own, for its group has one number of ranks."""
    env = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_PORT="29511",
                            MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, __file__, "--measure", *argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the plan ended with {done.returncode}"]
        sys.exit(said[-1])
    return json.loads(done.stdout.splitlines()[-1])


def problems(x: dict, gpu: int, ranks: int) -> dict[str, list[str]]:
    """Return what does not fit into GPUs of so many bytes, with flags that might help."""
    c, held = x["setting"], x["peak"]["sharded_param"] + x["peak"]["opt"] + x["reference"]
    x["most"] = most = max(0.01, math.floor(100 * (1 - (held + CONTEXT) / gpu)) / 100)
    vllm = int(c["gpu_memory"] * gpu) - 2 * x["parameters"] - GRAPHS
    x["kv_tokens"] = max(0, vllm) // x["kv_bytes"]
    found, peak = {}, x["peak"]["total"] + x["reference"] + CONTEXT
    if peak > gpu:
        states = 16 * x["parameters"] // ranks
        more = 2 ** math.ceil(math.log2(max(1.0, states / (0.6 * gpu))))  # ranks, times this
        help = ["--gpus", str(ranks * more)] if more > 1 else [
            "--micro_batch_tokens", str(c["micro_batch_tokens"] // 2), "--head_chunk", "512"]
        found[f"the update takes {peak / GIB:.1f} GiB a GPU"] = help
    elif c["gpu_memory"] > most:
        found[f"--gpu_memory {c['gpu_memory']} leaves no room for weights and Adam"] = [
            "--gpu_memory", str(most)]
    elif x["kv_tokens"] < c["max_prompt_length"] + c["max_response_length"]:
        found[f"vLLM has room for {x['kv_tokens']:,} tokens, less than one response"] = [
            "--gpu_memory", str(most)]
    return found


def table(x: dict, ranks: int, mean: int) -> str:
    """Show what was measured, and what follows from it for a step with responses of mean length."""
    c, peak, n = x["setting"], x["peak"], x["parameters"]
    gathered = sum(peak[k] for k in ("unsharded_param", "unsharded_grad", "all_gather",
                                     "reduce_scatter"))
    rows = [("weights", peak["sharded_param"]), ("gradients", peak["sharded_grad"]),
            ("Adam", peak["opt"]), ("gathered weights and gradients", gathered), ("activations",
             peak["act"]), ("temporary", peak["temp"]), ("reference", x["reference"])]
    lines = [f"{c['model']}: {n / 1e9:.2f}B parameters on {ranks} GPUs. An update's peak, GiB a "
             f"GPU, measured at {c['micro_batch_tokens']} tokens:"]
    lines += [f"  {name:32}{size / GIB:7.1f}" for name, size in rows if size]
    lines += [f"  {'together':32}{(peak['total'] + x['reference']) / GIB:7.1f}   beside about "
              f"{CONTEXT / GIB:.0f} of CUDA, NCCL and the sleeping vLLM (calculated)"]
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
    gb = n / 1e9
    lines += [f"GB: gathered for each forward and backward {4 * gb:.1f}, reduced {4 * gb:.1f}, "
              f"synced {2 * gb:.1f} a step; disk {2 * gb:.1f} a checkpoint, {12 * gb:.0f} more of "
              "the newest, twice while it is written"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--measure"]:
        return print(json.dumps(measure(argv[1:])))
    parser = argparse.ArgumentParser("plan.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("gpus", 8, "GPUs a machine"), ("nodes", 1, "machines"),
                                ("gpu_gb", 80, "memory of a GPU, GiB"),
                                ("mean_length", 3000, "tokens of a mean response")):
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{text} (default: {default})")
    args, rest = parser.parse_known_args(argv)
    flags, ranks, gpu = ["--setting=paper", *rest], args.gpus * args.nodes, args.gpu_gb * GIB
    measured = in_process(ranks, flags)
    found = problems(measured, gpu, ranks)
    print(table(measured, ranks, args.mean_length))
    if not found:
        return print("it fits")
    [what], [help] = found, found.values()
    more = int(help[1]) if help[0] == "--gpus" else ranks  # what would help is tried, by running it
    left = problems(in_process(more, [*flags, *(help if more == ranks else [])]), gpu, more)
    advice = f"; still {next(iter(left))} with" if left else "; it fits with"
    print(f"error: it does not fit: {what}{advice} {' '.join(help)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
