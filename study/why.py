"""Why entropy moves: does the covariance of log-probability and weighted advantage foretell it?

    python study/why.py            train what is missing of 15 runs, one of each method, then judge
    python study/why.py --judge    results/why.md and why.png of the runs that are there

To first order a policy-gradient update changes the entropy H of the next token by minus the
covariance, over the tokens that could come, of log p and p times the weighted advantage w A
(2505.22617), which is minus the mean of p (log p + H) w A, as the mean of log p is -H. Here that
mean is over all tokens that a step has sampled, w being the method's weight and A the response's
advantage. results/why.jsonl has the runs: means over ten steps, and some of every step.
"""

import argparse
import json
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

import make_bases
import study

RESULTS = study.HERE / "results"
SEED = 300
RUNS = [study.Run(place, method, SEED) for place, methods in (
    (study.MAIN, ("dapo", "a3po")), ("saturating", ("dapo", "a3po")), (study.MAIN, ("random",)),
    ("saturating", ("+low_prob", "-low_prob", "+high_prob", "-high_prob", "psr", "nsr",
                    *(cell for cell in study.CELLS if cell.endswith("entropy")))))
    for method in methods]
DECAY = {study.MAIN: 0.0066667, "saturating": 0.015}
SURE = 0.99  # probability from which a token is as good as certain
CLIP = (0.8, 1.28)


def padded(rows: list[dict], name: str) -> torch.Tensor:
    """Return a value of all tokens, (B, T); responses without a gradient have no weight."""
    default = dict(weight=lambda row: [0.0] * len(row["old"]), new=lambda row: row["old"])
    values = [row[name] if row[name] is not None else default[name](row) for row in rows]
    values = [torch.tensor(value, dtype=torch.float64) for value in values]
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def weights(place: str, step: int, correct, logprobs, mask, entropy) -> dict[str, torch.Tensor]:
    """Return the factors that methods would give the same tokens, (B, T): what one run says of all
    the others."""
    import a3po

    rho = a3po.decayed_rho(2.0, step, DECAY[place])
    choices = dict(a3po=dict(rho_positive=rho, rho_negative=rho))
    for cell in study.CELLS:
        up = cell[0] == "+"
        choices[cell] = dict(rho_positive=2.0 if up else 1.0, rho_negative=1.0 if up else 2.0)
        choices[cell]["positive_cell" if up else "negative_cell"] = cell[1:]
    ones = torch.ones_like(logprobs)
    return {name: a3po.shape_advantages(ones, correct, logprobs, mask, entropy=entropy, **choice)
            for name, choice in choices.items()}


def foretold(rows: list[dict], place: str) -> dict[str, float]:
    """Return of a step's responses: tokens, their entropy, and what their weights foretell of the
    change of entropy, in units of the step size: minus the means of p (log p + H) w A."""
    old, new, entropy, own = (padded(rows, name) for name in ("old", "new", "entropy", "weight"))
    mask = torch.arange(old.shape[1]) < torch.tensor([[len(row["old"])] for row in rows])
    correct = torch.tensor([row["correct"] for row in rows])
    advantage = torch.tensor([[row["advantage"]] for row in rows], dtype=torch.float64)
    natural = -(old + entropy) * advantage
    gradient = natural * old.exp()
    ratio, n = (new - old).exp(), mask.sum()
    clipped = torch.where(advantage > 0, ratio > CLIP[1], ratio < CLIP[0])

    def mean(values):
        return (values * mask).sum().item() / n.item()

    weighted, logprobs = (own * advantage)[mask], old[mask]
    found = dict(
        tokens=n.item(), entropy=mean(entropy), own=mean(gradient * own), flat=mean(gradient),
        natural=mean(natural * own), natural_flat=mean(natural),
        plain=-torch.cov(torch.stack([logprobs, weighted]))[0, 1].item(),
        unclipped=mean(gradient * own * ~clipped), clipped=mean(clipped.double()),
        sure=mean((old.exp() > SURE).double()),
        sure_part=mean(gradient * own * (old.exp() > SURE)),
        chosen_sure=mean(((own > 1) & (old.exp() > SURE)).double()),
        chosen=mean((own > 1).double()))
    for name, weight in weights(place, rows[0]["step"], correct, old, mask, entropy).items():
        found[f"as {name}"] = mean(gradient * weight)
        found[f"natural as {name}"] = mean(natural * weight)
    return found


def reduce(run: study.Run, out: Path) -> dict:
    """Return what is kept of a run: of every ten steps the mean entropy, else sums over the steps
    of what they foretell; "steps" has entropy and what is foretold of each."""
    with (out / "tokens.jsonl").open() as lines:
        steps = [foretold(list(rows), run.place)
                 for _, rows in groupby(map(json.loads, lines), lambda row: row["step"])]
    short = {name: [study.short(np.mean([x[name] for x in steps[i : i + 10]]))
                    for i in range(0, len(steps), 10)] for name in steps[0]}
    per_step = {name: [study.short(x[name]) for x in steps] for name in ("entropy", "own", "flat")}
    return dict(name=run.name, place=run.place, method=run.method, seed=run.seed, windows=short,
                steps=per_step)


def train(runs: list[study.Run], work: Path) -> None:
    if not (study.BASES / "train.jsonl").exists():
        make_bases.make_problems(study.BASES)
    done = study.read_runs(RESULTS / "why.jsonl")
    for run in [run for run in runs if run.name not in done]:
        out = work / run.name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        one = "--one=" + json.dumps([run.place, run.method, run.seed, str(out)])
        with (work / f"{run.name}.log").open("w") as log:
            subprocess.run([sys.executable, __file__, one], stdout=log, stderr=log, check=True)
        with (RESULTS / "why.jsonl").open("a") as file:
            file.write(json.dumps(reduce(run, out)) + "\n")
        (out / "tokens.jsonl").unlink()
        print(run.name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="train nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/why"), help="folder of the runs")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        *run, out = args.one
        everything = ["--log_tokens=256", "--eval_every=0"]
        return study.train_one(study.Run(*run), Path(out), everything)
    if not args.judge:
        train(RUNS, args.work)


if __name__ == "__main__":
    main()
