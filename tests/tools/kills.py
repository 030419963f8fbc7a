"""Kill a training run (SIGKILL) many times at random moments, resuming it each time, and compare it
with one that was left alone: all metrics but times have to be bitwise the same.

usage: kills.py [--kills 100] [--seed 0]      about 12 s a kill
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--setting=demo", "--prompts_per_step=8", "--group_size=4", "--mini_batches=2",
         "--eval_limit=8", "--eval_every=7", "--save_every=1", "--keep_checkpoints=2"]


def start(folder: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "a3po.py", *FLAGS, f"--steps={steps}", f"--output_dir={folder}"]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen([*command, "--resume=auto"], cwd=ROOT, env=env, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """All complete lines, without what depends on the clock."""
    path = folder / name
    text = path.read_text() if path.exists() else ""
    clock = ("seconds", "tokens_per_second", "eval_seconds")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)}
            for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def kill_often(folder: Path, steps: int, kills: int, rng: random.Random) -> list[int]:
    """Return the number of lines at each kill; the last start is left alone."""
    killed = []
    while len(killed) < kills:
        process = start(folder, steps)
        # one in ten while it starts, the others within three steps after that
        before, wanted = len(lines(folder)), rng.choice([0, 1, 2])
        if rng.random() < 0.1:
            time.sleep(rng.uniform(0, 8))
        else:
            while process.poll() is None and len(lines(folder)) <= before + wanted:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.8))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()[-3000:]
            break  # all steps are done
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed.append(len(lines(folder)))
        print(f"kill {len(killed)} at line {killed[-1]}", flush=True)
    last = start(folder, steps)
    error = last.communicate()[1].decode()
    assert last.returncode == 0, error[-3000:]
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = args.kills * 3 // 2 + 3
    with tempfile.TemporaryDirectory() as folder:
        alone, often = Path(folder) / "alone", Path(folder) / "often"
        process = start(alone, steps)
        error = process.communicate()[1].decode()
        assert process.returncode == 0, error[-3000:]
        killed = kill_often(often, steps, args.kills, random.Random(args.seed))
        for name in ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl"):
            assert lines(alone, name) == lines(often, name), f"{name} differs"
        print(f"{len(killed)} kills, {steps} steps: every line of metrics.jsonl, rollouts.jsonl "
              "and tokens.jsonl is that of the run that was left alone")


if __name__ == "__main__":
    main()
