"""What study.sh has found: its metrics, tables, a picture, answers before and after.

python demo/smollm2/results.py runs/smollm2   gather the finished runs of that folder in results/
                                              beside this script, then as below
python demo/smollm2/results.py                print the tables of results/, draw curves.png
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
METHODS = {"a3po": ("A3PO", "tab:blue"), "dapo": ("DAPO", "tab:orange")}
KINDS = {  # ids of the probe's problems begin with these
    "boxes": "boxes\na × b",
    "gets": "gets\na + b",
    "gives": "gives\na − b",
    "shares": "shares\na ÷ b",
    "reworded": "other\nwords",
    "larger": "numbers\n13 to 400",
    "two": "two\noperations",
}
EXAMPLES = ("boxes-", "shares-")  # of each the first held-out problem is shown
EVALUATED = (0, 5, 10, 15, 20)
DIGITS = 4  # that the gathered metrics keep

Records = list[dict]


def read_records(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_records(path: Path, records: Records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- gather -------------------------------------------------------------------------------------


def shorten(record: dict) -> dict:
    """Round to DIGITS; zeros and what the run did not measure are left out, but for the step."""
    short = {name: float(f"{value:.{DIGITS}g}") for name, value in record.items() if value}
    short = {name: int(value) if value.is_integer() else value for name, value in short.items()}
    return {"step": record["step"]} | short


def gather(runs: Path) -> None:
    """Copy what is worth keeping: metrics, the command's settings, right answers by problem."""
    RESULTS.mkdir(exist_ok=True)
    probes = {"base": runs / "eval-base"}
    for folder in sorted(runs.glob("*-seed*")):
        if (folder / "summary.md").exists():  # else it has not finished
            records = read_records(folder / "metrics.jsonl")
            write_records(RESULTS / f"{folder.name}.jsonl", [shorten(r) for r in records])
            probes[folder.name] = folder / "eval"
            settings = json.loads((folder / "config.json").read_text())
    settings |= dict(preset="a3po or dapo", seed="0, 1, 2", output_dir="runs/smollm2/PRESET-seedN")
    (RESULTS / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    probe, examples = {}, defaultdict(dict)
    for name, folder in probes.items():
        if not (folder / "samples.jsonl").exists():
            continue
        counts = defaultdict(lambda: [0, 0])  # kind: right, all
        for sample in read_records(folder / "samples.jsonl"):
            count = counts[sample["id"].partition("-")[0]]
            count[0] += sample["correct"]
            count[1] += 1
            if sample["id"].startswith(EXAMPLES) and sample["sample"] == 0:
                examples[sample["id"]][name] = sample["response"]
        probe[name] = counts
    lines = ",\n".join(f' "{name}": {json.dumps(counts)}' for name, counts in probe.items())
    (RESULTS / "probe.json").write_text(f"{{\n{lines}\n}}\n")
    problems = {row["id"]: row["problem"] for row in read_records(runs / "probe.jsonl")}
    for start in EXAMPLES:
        name = next(name for name in problems if name.startswith(start))
        print(f"\n{problems[name]}")
        for model, response in examples[name].items():
            print(f"    {model:12}{response!r}")


# ---- tables -------------------------------------------------------------------------------------


def runs_of(method: str) -> list[Records]:
    return [read_records(path) for path in sorted(RESULTS.glob(f"{method}-seed*.jsonl"))]


def series(runs: list[Records], name: str) -> tuple[list[int], np.ndarray]:
    """Return the steps that all runs have and the metric there: (runs, steps)."""
    points = [{r["step"]: r[name] for r in run if name in r} for run in runs]
    steps = sorted(set.intersection(*map(set, points)))
    return steps, np.array([[run[step] for step in steps] for run in points])


def deviation(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation over seeds, the first axis; 0 for one."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def with_error(mean: float, error: float, digits: int = 0) -> str:
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def over_seeds(values: np.ndarray, digits: int = 0) -> list[str]:
    """Return mean ± deviation of each column; the mean alone of a single row."""
    if len(values) == 1:
        return [f"{mean:.{digits}f}" for mean in values[0]]
    columns = zip(values.mean(0), deviation(values), strict=True)
    return [with_error(*column, digits) for column in columns]


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def print_runs() -> None:
    """Held-out accuracy (± its standard error, clustered by problem), entropy, dead groups."""
    row("run", *(f"step {step}, %" for step in EVALUATED), "entropy, steps 0-4", "15-19", "dead, %")
    row(*["---"] * (4 + len(EVALUATED)))
    for method, (title, _) in METHODS.items():
        scores, others = [], []
        for seed, run in enumerate(runs_of(method)):
            evals = {r["step"]: r for r in run if "eval_accuracy" in r}
            steps = [r for r in run if "entropy" in r]
            scores.append([100 * evals[step]["eval_accuracy"] for step in EVALUATED])
            errors = [100 * evals[step]["eval_accuracy_stderr"] for step in EVALUATED]
            entropy = [np.mean([r["entropy"] for r in part]) for part in (steps[:5], steps[-5:])]
            dead = 100 * np.mean([r.get("dead_groups", 0) for r in steps[-5:]])
            others.append([*entropy, dead])
            row(
                f"{title}, seed {seed}",
                *map(with_error, scores[-1], errors),
                *(f"{value:.3f}" for value in entropy),
                f"{dead:.0f}",
            )
        if len(scores) > 1:
            others = np.array(others)
            row(
                f"**{title}**, mean ± deviation",
                *over_seeds(np.array(scores)),
                *over_seeds(others[:, :2], 3),
                *over_seeds(others[:, 2:]),
            )


def print_probe() -> None:
    print()
    row("right answers, %", *(title.replace("\n", " ") for title in KINDS.values()))
    row(*["---"] * (1 + len(KINDS)))
    for title, values in probe_rows().items():
        row(title, *over_seeds(values))


def probe_rows() -> dict[str, np.ndarray]:
    """Return the percentage right of each kind, (runs, kinds), for the base and each method."""
    probe = json.loads((RESULTS / "probe.json").read_text())
    titles = {"base": "before"} | {key: title for key, (title, _) in METHODS.items()}
    rows = defaultdict(list)
    for name, counts in probe.items():
        shares = [100 * counts[kind][0] / counts[kind][1] for kind in KINDS]
        rows[titles[name.partition("-")[0]]].append(shares)
    return {title: np.array(values) for title, values in rows.items()}


# ---- picture ------------------------------------------------------------------------------------


def draw(path: Path) -> None:
    figure = Figure((10, 6), dpi=120, layout="constrained")
    axes = figure.subplot_mosaic([["accuracy", "entropy"], ["kinds", "kinds"]])
    for method, (title, colour) in METHODS.items():
        runs = runs_of(method)
        if not runs:
            continue
        steps, values = series(runs, "eval_accuracy")
        shift = 0.12 if method == "dapo" else -0.12  # so that no bar hides another
        axes["accuracy"].errorbar(
            np.array(steps) + shift,
            100 * values.mean(0),
            100 * deviation(values),
            color=colour, capsize=4, marker="o", label=f"{title}, {len(runs)} seeds",
        )
        steps, values = series(runs, "entropy")
        axes["entropy"].plot(steps, values.mean(0), color=colour)
        axes["entropy"].fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2)
    axes["accuracy"].set(
        title="right answers to held-out problems, %",
        xlabel="training step",
        ylim=(0, 100),
        xticks=range(0, 21, 5),
    )
    axes["accuracy"].legend(loc="lower right")
    axes["entropy"].set(
        title="entropy of the training answers, nats a token",
        yscale="log",
        xlabel="training step",
        xticks=range(0, 21, 5),
    )
    rows = probe_rows()
    colours = {"before": "silver"} | dict(METHODS.values())
    for number, (title, values) in enumerate(rows.items()):
        places = np.arange(len(KINDS)) + 0.27 * (number - (len(rows) - 1) / 2)
        bars = axes["kinds"].bar(
            places,
            values.mean(0),
            0.25,
            color=colours[title],
            label=title,
            yerr=deviation(values) if len(values) > 1 else None,
            capsize=3,
        )
        axes["kinds"].bar_label(bars, [f"{v:.0f}" for v in values.mean(0)], padding=2, fontsize=9)
    axes["kinds"].axvline(3.5, color="grey", linewidth=1, linestyle=":")
    axes["kinds"].set_xticks(range(len(KINDS)), KINDS.values())
    axes["kinds"].set(
        title="right answers before and after 20 steps, %: the four kinds held out, "
        "and what training never showed",
        ylim=(0, 108),
    )
    axes["kinds"].legend(loc="upper right")
    for axis in axes.values():
        axis.grid(alpha=0.3, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the size


if __name__ == "__main__":
    if len(sys.argv) > 1:
        gather(Path(sys.argv[1]))
    print_runs()
    print_probe()
    draw(HERE / "curves.png")
