"""Why entropy moves: does the covariance of log-probability and weighted advantage foretell it?

    python study/why.py                train what is missing of 15 runs, one of each method
    python study/study.py --judge      then summary.md and why.png say what they show

THEORY says what is estimated, from tokens.jsonl; results/why.jsonl has that of each run.
"""

import argparse
import json
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import make_bases
import numpy as np
import torch

import study

RESULTS = study.HERE / "results"
SEED = 300
RUNS = [study.Run(place, method, SEED) for place, methods in (
    (study.MAIN, ("dapo", "a3po")), ("saturating", ("dapo", "a3po")), (study.MAIN, ("random",)),
    ("saturating", ("+low_prob", "-low_prob", "+high_prob", "-high_prob", "psr", "nsr",
                    *(cell for cell in study.CELLS if cell.endswith("entropy")))))
    for method in methods]
DECAY = {study.MAIN: 0.0066667, "saturating": 0.015}
FORMS = ("gradient", "natural", "plain")
LIKE = 40  # parts of equal size, by entropy, into which a step's tokens are put
THEORY = """\
To first order an update changes the entropy H of the next token by minus the covariance, over the
tokens that could come, of log p and w A (a natural policy gradient, 2505.22617) or of log p and p
w A (a plain one): A is the advantage of the response, w the method's weight on the token.
tokens.jsonl has log p and H where a token was sampled, not the rest of its distribution, so there
are three estimates of the mean over a step's tokens. **gradient**: minus the mean of (x - c) w A
with x = p (log p + H), where c, what x is on average at that place, is taken from the step's
tokens of like H. **natural**: minus the mean of (log p + H) w A, since the mean of log p is -H.
**plain**: minus the covariance of log p and w A over all tokens of a step, places mixed."""
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


def estimates(logprobs: torch.Tensor, entropy: torch.Tensor,
              advantages: torch.Tensor) -> dict[str, float]:
    """Return what tokens foretell of the change of entropy, in units of the step size, by FORMS.
    logprobs, entropy, the weighted advantages: (N,)."""
    surprise = logprobs + entropy
    x = logprobs.exp() * surprise
    here = torch.empty_like(x)
    for part in entropy.argsort().tensor_split(LIKE):
        here[part] = x[part].mean() if len(part) else 0.0
    return dict(gradient=-((x - here) * advantages).mean().item(),
                natural=-(surprise * advantages).mean().item(),
                plain=-torch.cov(torch.stack([logprobs, advantages]))[0, 1].item())


def foretold(rows: list[dict], place: str) -> dict[str, float]:
    """Return of a step's responses: tokens, their entropy, shares of some of them, and what is
    foretold with the run's weights (own), with none (flat), and as each method would weigh them."""
    old, new, entropy, own = (padded(rows, name) for name in ("old", "new", "entropy", "weight"))
    mask = torch.arange(old.shape[1]) < torch.tensor([[len(row["old"])] for row in rows])
    correct = torch.tensor([row["correct"] for row in rows])
    advantage = torch.tensor([[row["advantage"]] for row in rows], dtype=torch.float64)
    ratio, chosen, sure = (new - old).exp(), own > 1, old.exp() > SURE
    clipped = torch.where(advantage > 0, ratio > CLIP[1], ratio < CLIP[0]) & (advantage != 0)
    factors = dict(own=own, flat=torch.ones_like(old), unclipped=own * ~clipped)
    factors |= weights(place, rows[0]["step"], correct, old, mask, entropy)
    found = dict(tokens=mask.sum().item(), entropy=entropy[mask].mean().item(),
                 clipped=clipped[mask].double().mean().item(),
                 sure=sure[mask].double().mean().item(),
                 sure_chosen=sure[chosen & mask].double().mean().item())
    for name, weight in factors.items():
        values = estimates(old[mask], entropy[mask], (weight * advantage)[mask])
        found |= {f"{form} {name}": value for form, value in values.items()}
    return found


def reduce(run: study.Run, out: Path) -> dict:
    """Return what is kept of a run: means over every ten steps, of some values each step's."""
    with (out / "tokens.jsonl").open() as lines:
        steps = [foretold(list(rows), run.place)
                 for _, rows in groupby(map(json.loads, lines), lambda row: row["step"])]
    windows = {}
    for name in steps[0]:
        parts = [[x[name] for x in steps[i : i + 10]] for i in range(0, len(steps), 10)]
        windows[name] = [study.short(float(np.mean(part))) for part in parts]  # None: of no token
    each = {name: [study.short(x[name]) for x in steps]
            for name in ("entropy", "gradient own", "gradient flat")}
    return dict(name=run.name, place=run.place, method=run.method, seed=run.seed, windows=windows,
                steps=each)


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


# ---- what it shows ------------------------------------------------------------------------------


def summed(record: dict, name: str) -> np.ndarray:
    """Return the sum of what is foretold up to the middle of each ten steps, from the first on."""
    means = np.array(record["windows"][name])
    sums = 10 * means.cumsum() - 5 * means
    return sums - sums[0]


def entropy_of(record: dict) -> np.ndarray:
    return np.array(record["windows"]["entropy"])


def scale(dapo: dict, form: str) -> float:
    """Return the step size, the one free number: with it DAPO's tokens foretell DAPO's entropy."""
    sums, change = summed(dapo, f"{form} flat"), entropy_of(dapo) - entropy_of(dapo)[0]
    return float(sums @ change / (sums @ sums))


def from_dapo(dapo: dict, method: str, form: str) -> float:
    """Return the foretold difference of the mean entropy, in nats, of a method from DAPO, from
    DAPO's tokens alone."""
    more = summed(dapo, f"{form} {method}") - summed(dapo, f"{form} flat")
    return scale(dapo, form) * float(more.mean())


def from_itself(run: dict, dapo: dict) -> float:
    """Return the same from the tokens of the method's own run ("gradient")."""
    more = summed(run, "gradient own") - summed(dapo, "gradient flat")
    return scale(dapo, "gradient") * float(more.mean())


def comparisons(records: dict, measured: dict[tuple, dict]) -> list[dict]:
    """Return for each method that DAPO's tokens can be weighed like: foretold and measured."""
    rows = []
    for place in DECAY:
        dapo = records.get((place, "dapo"))
        for method in ("a3po", *study.CELLS):
            if dapo and (place, method) in measured:
                rows.append(dict(
                    place=place, method=method, **measured[place, method],
                    **{form: from_dapo(dapo, method, form) for form in FORMS},
                    own=from_itself(records[place, method], dapo)
                    if (place, method) in records else None))
    return rows


def agreement(rows: list[dict], form: str) -> str:
    """Say how often the sign is right, of the differences that the study decides; how often the
    foretold is within the interval; and how foretold and measured go together in one regime."""
    decided = [row for row in rows if abs(row["mean"]) > row["half"]]
    right = sum(row[form] * row["mean"] > 0 for row in decided)
    inside = sum(abs(row[form] - row["mean"]) <= row["half"] for row in rows)
    mine = [row for row in rows if row["place"] == "saturating"]
    x, y = (np.array([row[key] for row in mine]) for key in (form, "mean"))
    factor = x @ y / (x @ x)
    distance = np.abs(factor * x - y).mean()
    return (f"| {form} | {right} of {len(decided)} | {inside} of {len(rows)} | "
            f"{np.corrcoef(x, y)[0, 1]:+.3f} | {factor:.2f} | {distance:.3f} |")


def section(runs: list[dict], measured: dict[tuple, dict]) -> list[str]:
    """Return the page of summary.md."""
    records = {(x["place"], x["method"]): x for x in runs}
    rows = comparisons(records, measured)
    if len(rows) < 3:
        return []
    lines = ["## Why entropy moves", "", *THEORY.splitlines(), "",
             "Exploratory: the estimates were worked out on the tokens of the first of these "
             "runs, with the study's differences known, before there were fresh seeds. One number "
             "is fitted, the step size, to DAPO's own entropy in each regime; the rest is "
             "foretold from the tokens of that one run of DAPO, weighed as another method would "
             "have weighed them. Differences from DAPO of the mean entropy, nats; measured: on "
             "the fresh seeds where there are any, simultaneous 95 % intervals.", "",
             "![Foretold and measured entropy](why.png)", "",
             "| regime | method | gradient | natural | plain | gradient, from its own run | "
             "measured | pairs |", "|" + "---|" * 8]
    for row in rows:
        own = "-" if row["own"] is None else f"{row['own']:+.3f}"
        forms = " | ".join(f"{row[form]:+.3f}" for form in FORMS)
        lines.append(f"| {row['place']} | {row['method']} | {forms} | {own} | {row['mean']:+.3f} ± "
                     f"{row['half']:.3f} | {row['pairs']} |")
    lines += ["", "| form | signs right, of those decided | within the interval | correlation, "
              "saturating | factor that fits best | mean distance with it, nats |",
              "|" + "---|" * 6]
    lines += [agreement(rows, form) for form in FORMS]
    return [*lines, "", reading(rows), "", *limits(records), ""]


def reading(rows: list[dict]) -> str:
    """Say in words what the tables show."""
    rest = [row for row in rows if row["method"] not in ("a3po", "+low_prob", "-low_prob")]
    gradient, natural, plain, most = (max(abs(row[key]) for row in rest)
                                      for key in (*FORMS, "mean"))
    decided = sum(abs(row["mean"]) > row["half"] for row in rest)
    [up, down] = [next(row for row in rows if row["method"] == cell)
                  for cell in ("+low_prob", "-low_prob")]
    ratios = [row["gradient"] / row["mean"] for row in rows if row["method"] == "a3po"]
    return ("The gradient form has signs and proportions. Twice the weight on the rare tokens of "
            "right responses raises entropy, on those of wrong responses lowers it, "
            f"{-down['gradient'] / up['gradient']:.1f} times as much (measured: "
            f"{-down['mean'] / up['mean']:.1f} times); the other six cells move it by at most "
            f"{gradient:.3f} (measured: {most:.3f}, {decided or 'none'} of them told from 0). It "
            "does not have the size: of A3PO's difference it foretells " +
            " and ".join(f"{x:.1f}" for x in ratios) + " times what was measured, in the order of "
            "the table. The plain form misleads: it "
            f"foretells up to {plain:.3f} for the six cells; natural, which keeps places apart, "
            f"{natural:.3f}.")


def limits(records: dict) -> list[str]:
    """Say where "gradient" fails: a run's own entropy, sure tokens, clipping, a step size that is
    not one."""
    lines = ["Each run by itself: the change of entropy from its first ten steps to its last, "
             "what \"gradient\" foretells of it, and where that can fail. A token of probability "
             "near 1 foretells nothing whatever it weighs; a clipped one has no gradient; the "
             "optimiser is Adam, so no one step size fits both halves of a run.",
             "", "| regime | run | change | foretold | without the run's weights | tokens of p > "
             ".99 | of the chosen ones | clipped | their part of the foretold | measured / "
             "foretold, first half | second half |", "|" + "---|" * 11]
    for (place, method), run in records.items():
        windows, step = run["windows"], scale(records[place, "dapo"], "gradient")
        sums, entropy = step * summed(run, "gradient own"), entropy_of(run)
        flat = step * summed(run, "gradient flat")
        ratios = []
        for part in np.array_split(np.arange(len(sums)), 2):
            change, foretold_change = (x[part[-1]] - x[part[0]] for x in (entropy, sums))
            ratios.append(f"{change / foretold_change:.2f}")
        whole, without = (sum(windows[f"gradient {name}"]) for name in ("own", "unclipped"))
        chosen = [x for x in windows["sure_chosen"] if x is not None]
        cells = [f"{entropy[-1] - entropy[0]:+.3f}", f"{sums[-1]:+.3f}", f"{flat[-1]:+.3f}",
                 f"{np.mean(windows['sure']):.2f}", f"{np.mean(chosen):.2f}" if chosen else "-",
                 f"{np.mean(windows['clipped']):.4f}", f"{1 - without / whole:.2f}", *ratios]
        lines.append(f"| {place} | {method} | " + " | ".join(cells) + " |")
    return lines


def draw(runs: list[dict], measured: dict[tuple, dict], path: Path) -> None:
    import pictures

    records = {(x["place"], x["method"]): x for x in runs}
    rows = comparisons(records, measured)
    if len(rows) < 3:
        return
    figure, axes = pictures.pyplot.subplots(1, 3, figsize=(11, 3.4))
    for method in ("a3po", "dapo", "random"):
        if (study.MAIN, method) in records:
            run, dapo = records[study.MAIN, method], records[study.MAIN, "dapo"]
            x = np.arange(len(entropy_of(run))) * 10 + 5
            colour = pictures.COLOURS[method]
            axes[0].plot(x, entropy_of(run), ".", color=colour, label=pictures.NAMES[method])
            start = entropy_of(run)[0]
            axes[0].plot(x, start + scale(dapo, "gradient") * summed(run, "gradient own"),
                         color=colour)
    axes[0].set(xlabel="training step", ylabel="entropy, nats per token",
                title="measured (dots), foretold (lines)")
    for axis, form in zip(axes[1:], ("gradient", "plain"), strict=True):
        for row in rows:
            colour = "#0072B2" if row["method"] == "a3po" else "#444444"
            axis.errorbar(row[form], row["mean"], row["half"], fmt="o", markersize=4, capsize=2,
                          color=colour, ecolor=colour, elinewidth=0.8)
            if abs(row["mean"]) > row["half"]:
                short = row["place"] == study.MAIN
                axis.annotate("shortcut: " * short + row["method"], (row[form], row["mean"]),
                              xytext=(-6 if short else 6, 6 if short else -9), fontsize=8,
                              textcoords="offset points", ha="right" if short else "left")
        ends = [f(row[key] for row in rows for key in (form, "mean")) for f in (min, max)]
        axis.plot(ends, ends, color="#999999", linewidth=1)
        axis.margins(x=0.2)
        axis.set(xlabel="foretold from DAPO's tokens, nats", ylabel="measured, nats",
                 title=f"entropy against DAPO's: {form}")
    pictures.finish(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/why"), help="folder of the runs")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        *run, out = args.one
        everything = ["--log_tokens=256", "--eval_every=0"]
        return study.train_one(study.Run(*run), Path(out), everything)
    train(RUNS, args.work)


if __name__ == "__main__":
    main()
