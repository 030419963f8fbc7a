"""The first hour on a GPU: a line for each check, the measured figure beside the expected one.

    python tests/tools/gpu_check.py --model Qwen/Qwen3-1.7B-Base --data D.jsonl one GPU
    python tests/tools/gpu_check.py --ranks 8                                   8, the paper's model
    python tests/tools/gpu_check.py                                             a CPU: the demo, toy

Each precision trains three steps as a3po.py does, in processes of its own; other flags go to it.
Once more with compiled layers. That weights reach vLLM, and that
it wakes up as it fell asleep, is checked by each run itself. Never run on a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
from rollout import Prompt, Sample  # noqa: E402
from shelf import plan, report  # noqa: E402
from verify import Grade  # noqa: E402

GPU = torch.cuda.is_available()
MISMATCH = dict(fp32=1e-5, fp16=5e-3, bf16=5e-2)  # nats; means of more are not the same model
SMALL = ["--steps=3", "--eval_data=", "--save_every=0", "--prompts_per_step=32", "--mini_batches=2"]


def line(what: str, measured: str, expected: str, ok: bool | None) -> None:
    expected = expected if ok is None else f"expected {expected:20}{'ok' if ok else 'LOOK'}"
    print(f"{what:44}{measured:>14}   {expected}", flush=True)


def check_attention() -> None:
    """Compare attention over packed sequences, four query heads to one of keys, with attention over
    each sequence alone: with torch's kernel on a GPU, with grids on a CPU."""
    kernel, device = ("varlen", "cuda") if GPU else ("grids", "cpu")
    dtype = torch.bfloat16 if GPU else torch.float32
    prompt, rng = Prompt(None, [1] * 7), np.random.default_rng(0)
    samples = [Sample(prompt, np.ones(n, np.int32), np.zeros(n, np.float32), "stop",
                      grade=Grade(True, None)) for n in rng.integers(1, 300, 8)]
    layout = model.collate(samples, device, kernel)["attention"]
    tokens = 7 + sum(len(sample.ids) for sample in samples)
    query, key, value = (torch.randn(1, heads, tokens, 64, device=device, dtype=dtype)
                         for heads in (8, 2, 2))
    attend = model.varlen_attention if GPU else model.grid_attention
    ours, begin, worst = attend(None, query, key, value, None, **layout)[0][0], 7, 0.0
    for sample in samples:
        end = begin + len(sample.ids)
        at = torch.cat([torch.arange(7), torch.arange(begin, end)]).to(device)
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x.index_select(2, at).float() for x in (query, key, value)), is_causal=True,
            enable_gqa=True)[0].transpose(0, 1)
        worst = max(worst, (ours[at[7:]].float() - alone[7:]).abs().max().item())
        begin = end
    line(f"attention, {kernel}: packed against alone", f"{worst:.1e}", f"at most {3e-2:g}",
         worst < 3e-2)


def train(precision: str, ranks: int, flags: list[str], folder: Path) -> list[dict]:
    """Return the steps' metrics; a run that fails has said why."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "a3po.py", *flags,
               f"--precision={precision}", f"--output_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        line(f"{precision}: three steps", "failed", "to end", False)
        print(done.stderr[-2000:], file=sys.stderr)
        return []
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def check(how: str, ranks: int, steps: list[dict], planned: dict | None) -> None:
    most = MISMATCH[how.partition(" ")[0]]
    for step, when in ((0, "before an update"), (2, "after two syncs")):
        value = steps[step]["mismatch_mean"]
        if value is not None:
            line(f"{how}: mismatch, {when}", f"{value:.1e}", f"at most {most:g}",
                 value < most)
    ratios = [s["ratio_max_deviation"] for s in steps if s["ratio_max_deviation"] is not None]
    line(f"{how}: |ratio - 1| at a first update", f"{max(ratios, default=0):.1e}",
         "at most 1e-5", max(ratios, default=0) <= 1e-5)
    skipped = sum(s["skipped_updates"] for s in steps)
    line(f"{how}: skipped updates", str(skipped), "0; in fp16 a few", skipped == 0)
    last, speed = steps[-1], steps[-1]["tokens_per_second"] / ranks
    parts = {key[8:]: value for key, value in last.items() if key.startswith("seconds_")}
    line(f"{how}: tokens/s/GPU, whole step", f"{speed:.0f}",
         "NeMo-RL has 1,581 for 8B on 16 H100s", None)
    line(f"{how}: seconds of a step", f"{last['seconds']:.1f}",
         ", ".join(f"{k} {v:.1f}" for k, v in parts.items()), None)
    if planned:
        flops = planned["update_flops"] / planned["tokens"] * last["rollout_tokens"]
        mfu = flops / last["seconds_update"] / ranks / report.SPEEDS["flops"]
        line(f"{how}: MFU of the update, at most", f"{mfu:.1%}", "40 % of an H100", mfu > 0.3)
    if planned and "memory_gib" in last:
        expected = planned["peak"] / plan.GIB
        line(f"{how}: memory of the update, GiB", f"{last['memory_gib']:.1f}",
             f"{expected:.1f} by the plan", abs(last["memory_gib"] / expected - 1) < 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    args, flags = parser.parse_known_args()
    flags = [f"--setting={'paper' if GPU else 'demo'}", *SMALL, *flags]
    device = torch.cuda.get_device_name() if GPU else "CPU: toy figures, none of them a speed"
    print(f"{device}, {args.ranks} rank(s), torch {torch.__version__}")
    planned = plan.in_process(args.ranks, flags) if GPU else None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    check_attention()
    for how in ("bf16", "bf16 compiled", "fp16") if GPU else ("fp32", "fp16", "bf16 compiled"):
        precision, _, compile = how.partition(" ")
        more = ["--compile"] * bool(compile)
        with tempfile.TemporaryDirectory() as folder:
            if steps := train(precision, args.ranks, [*flags, *more], Path(folder) / "run"):
                check(how, args.ranks, steps, planned)


if __name__ == "__main__":
    main()
