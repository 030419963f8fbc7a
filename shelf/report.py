"""What is shown of runs and evaluations: the console, tables, comparison, curves."""

import json
import time
from pathlib import Path

import numpy as np

from shelf.metrics import describe
from shelf.ranks import UsageError, say
from verify import read_json, read_jsonl

PAPER = "aime24 aime25 math500 gpqa livecodebench".split()  # the five that it averages
# The flags of an evaluation without which its numbers mean something else
KEPT = ("model", "n", "seed", "template", "temperature", "top_p", "max_response_length")

# ---- the console ---------------------------------------------------------------------------------

CONSOLE = {  # metric: width and format of its column; with the step 79 columns
    "reward": (8, ".3f"), "entropy": (8, ".3f"), "response_length": (8, ".1f"),
    "rho_positive": (7, ".3f"), "ratio_max": (10, ".3g"), "mismatch_mean": (9, ".1e"),
    "dead_groups": (5, ".2f"), "grad_norm": (10, ".3g"), "seconds": (8, ".1f"),
}


class Console:
    """Prints a line of a step's metrics, at most every two seconds; now and then a heading."""

    def __init__(self):
        self.printed, self.lines = 0.0, 0  # when, and how many

    def show(self, metrics: dict) -> None:
        if time.time() - self.printed < 2:
            return
        if self.lines == 0:
            say("(a line at most every two seconds; metrics.jsonl has every step; what a heading\n"
                "means: python eval.py glossary; |ratio-1| over 10 step after step is too much)")
        if self.lines % 20 == 0:
            heads = [describe(name)[0].rjust(width) for name, (width, _) in CONSOLE.items()]
            say("  step" + "".join(heads))
        line = f"{metrics['step']:6d}"
        for name, (width, form) in CONSOLE.items():
            value = metrics.get(name)
            line += ("-" if value is None else f"{value:{form}}").rjust(width)
        say(line)
        self.printed, self.lines = time.time(), self.lines + 1


# ---- tables -------------------------------------------------------------------------------------


def markdown(rows: list) -> str:
    """Lay out rows of cells, the first of them headings, as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        lines.append("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    return "\n".join(lines)


def in_paper_order(names) -> list[str]:
    return sorted(names, key=[*PAPER, *names].index)


def score_cells(metrics: list[dict]) -> list[str]:
    """Write accuracy ± standard error in percent, of each benchmark and of the average of all."""
    means, errors = np.array([(m["accuracy"], m["accuracy_stderr"]) for m in metrics]).T
    means = [*means, means.mean()]
    errors = [*errors, np.linalg.norm(errors) / len(errors)]  # benchmarks are independent
    return [f"{100 * m:.1f} ± {100 * e:.1f}" for m, e in zip(means, errors, strict=True)]


def metric_rows(heading: str, columns: dict[str, dict[str, float]]) -> list[list[str]]:
    """Return heading and rows of a table, a row for each metric that is not 0 in all columns;
    pass@1 is the accuracy."""
    rows = [[heading, *columns]]
    for key in dict.fromkeys(key for metrics in columns.values() for key in metrics):
        values = [metrics.get(key) for metrics in columns.values()]
        if key == "accuracy" or (any(values) and key not in ("pass@1", "seconds")):
            rows.append([key, *("-" if value is None else f"{value:.4g}" for value in values)])
    return rows


def results_table(model: str, metrics: dict[str, dict]) -> str:
    """Show the paper's table for one model, and below it what lies behind each number."""
    metrics = {name: metrics[name] for name in in_paper_order(metrics)}
    heads, cells = ["model", *metrics, "average"], score_cells(list(metrics.values()))
    if len(metrics) > 5 and metrics.keys() >= set(PAPER):
        heads.append("paper's five")
        cells.append(score_cells([metrics[name] for name in PAPER])[-1])
    note = ("accuracy (avg@n) in percent ± standard error, clustered by problem; the paper's "
            f"average is over {', '.join(PAPER)}\n"
            "below, lengths are in tokens and metrics that are 0 everywhere are not shown")
    tables = [heads, [model, *cells]], metric_rows("benchmark", metrics)
    return f"{markdown(tables[0])}\n\n{note}\n\n{markdown(tables[1])}"


def before_after(path: Path) -> list[list[str]]:
    """Return the rows of a table of the first and the last evaluation of a run's metrics.jsonl."""
    evals = [record for _, record in read_jsonl(path) if "eval_accuracy" in record]
    columns = {}
    for when, record in zip(("before", "after"), evals[:1] + evals[-1:], strict=False):
        columns[f"{when} (step {record['step']})"] = {
            key[5:]: value for key, value in record.items() if key != "step"}
    return metric_rows("held-out" if evals else "no held-out data was given", columns)


SPEEDS = dict(flops=990e12, update=0.4, score=0.4, generate=0.08)  # an H100's, and shares of it


def step_costs(x: dict, ranks: int, mean: int) -> dict[str, tuple[float, float]]:
    """Return the FLOPs of each part of a step, and the seconds they take at the SPEEDS."""
    c = x["config"]
    step = c.prompts_per_step * c.group_size * mean
    update = x["update_flops"] / x["tokens"] * step
    score = update / (3 + bool(c.recompute) / max(c.recompute, 1))
    flops = dict(generate=2 * x["parameters"] * step, update=update, score=score)
    return {name: (n, n / SPEEDS["flops"] / ranks / SPEEDS[name]) for name, n in flops.items()}


def plan_table(x: dict, ranks: int, gpus: int, mean: int) -> str:
    """Show what plan.measure found, and what follows for a step with responses of mean length."""
    c, gb = x["config"], x["parameters"] / 1e9
    sizes = {name: size for name, size in x["held"].items() if size} | dict(together=x["peak"])
    parts = "\n".join(f"  {name:24}{size / 2**30:7.1f}" for name, size in sizes.items())
    long = c.max_prompt_length + c.max_response_length
    step = c.prompts_per_step * c.group_size * mean
    times = ", ".join(f"{name} {flops:.1e} FLOP, {seconds:.0f} s at {SPEEDS[name]:.0%}"
                      for name, (flops, seconds) in step_costs(x, ranks, mean).items())
    host = f", of which {x['host'] / 2**30:.1f} on the host" if x["host"] else ""
    return f"""{c.model}: {gb:.2f}B parameters on {ranks} GPUs. An update's peak, GiB a GPU, \
measured at {c.micro_batch_tokens} tokens{host}:
{parts}   beside about {x["context"] / 2**30:.0f} of CUDA, NCCL and the sleeping vLLM (calculated)
vLLM with {x["share"]:.0%} of a GPU: room for {x["kv_tokens"]:,} tokens, \
{x["kv_tokens"] // (mean + 256)} sequences of mean or {x["kv_tokens"] // long} of full length, \
{x["sequences"]} at one time (calculated)
A step of {step / 1e6:.1f}M tokens, calculated at {SPEEDS["flops"] / 1e12:.0f} TFLOP/s a GPU: \
{times}
GB: gathered for each forward and each backward {2 * gb:.1f}, reduced {4 * gb:.1f}, synced \
{2 * gb:.1f} a step; disk {2 * gb:.1f} a checkpoint, {12 * gb:.0f} more of the newest, twice while \
it is written; a machine's memory {2 * gb * gpus:.0f} while weights load, 0.1 for each grader (at \
most 16 a GPU, a core each)"""


# ---- comparison ---------------------------------------------------------------------------------


def paired_bootstrap(differences: list[np.ndarray], resamples: int = 10_000) -> tuple:
    """Return the mean difference, its 95 % percentile interval (low, high) and whether that leaves
    out 0; never for fewer than 6 problems, as in a sign test. differences: for each benchmark, one
    number per problem. Problems are resampled in their benchmark; benchmarks weigh the same."""
    rng = np.random.default_rng(0)
    means = np.mean([rng.choice(d, (resamples, len(d))).mean(1) for d in differences], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    enough = sum(map(len, differences)) >= 6
    mean = float(np.mean([d.mean() for d in differences]))
    return mean, float(low), float(high), bool(enough and (low > 0 or high < 0))


def read_results(folder: str) -> dict:
    path = Path(folder) / "results.json"
    results = read_json(path) if path.exists() else {}
    if not results.get("scores"):
        raise UsageError(f"{folder}: no finished evaluation (results.json with scores)")
    return results


def compare(folders: list[str]) -> str:
    """Show evaluations side by side, each with its difference from the first, as Markdown."""
    runs = [read_results(folder) for folder in folders]
    common = {}  # benchmark: (runs, problems that all have) means of the samples
    for name in in_paper_order(runs[0]["scores"]):
        ids = sorted(set.intersection(*(set(run["scores"].get(name, ())) for run in runs)))
        if ids:
            common[name] = np.array([list(map(run["scores"][name].get, ids)) for run in runs])
    if not common:
        raise UsageError("these evaluations have no problem in common")
    headings = [f"{name} ({scores.shape[1]})" for name, scores in common.items()]
    rows = [["accuracy, %", *headings, "average"]]
    notes = ["(problems in common); [95 % interval] of the difference from the first row, by "
             "paired bootstrap;\n* = it excludes 0; not corrected for several comparisons"]
    for number, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        cells = score_cells([run["benchmarks"][name] for name in common])
        deltas = [scores[number] - scores[0] for scores in common.values()]
        for i, differences in enumerate([*([d] for d in deltas), deltas]):
            mean, low, high, significant = paired_bootstrap(differences)
            star = " *" if significant else ""
            if number > 0:
                cells[i] += f" ({100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{star})"
        rows.append([folder, *cells])
        for key in KEPT[1:]:
            mine, theirs = run["settings"][key], runs[0]["settings"][key]
            if mine != theirs:
                notes.append(f"note: --{key} is {mine} in {folder}, {theirs} in {folders[0]}")
    return markdown(rows) + "\n\n" + "\n".join(notes)


# ---- training curves ----------------------------------------------------------------------------

PANELS = """eval_accuracy reward entropy entropy_positive entropy_negative response_length clip_low
    clip_high mismatch_mean grad_norm dead_groups truncated""".split()
# One colour a method in all pictures: Okabe and Ito's, told apart by everybody
COLOURS = dict(a3po="#0072B2", dapo="#D55E00", grpo="#009E73", nsr="#CC79A7", psr="#E69F00",
               a3po_constant="#56B4E9", base="#000000", random="#999999")


def colours_of(labels) -> dict[str, str]:
    """Return a colour for each label: its method's, else, or if that is taken, one of the last."""
    found: dict[str, str] = {}
    for label in labels:
        wanted = [COLOURS.get(label.partition(",")[0], "grey"), *reversed(COLOURS.values())]
        found[label] = next((x for x in wanted if x not in ("grey", *found.values())), "grey")
    return found


def group_runs(folders: list[Path]) -> dict[str, list[list[dict]]]:
    """Return {label: metrics of runs that differ only in the seed}. A label is the preset, with
    what else tells it from the groups of the same preset."""
    groups: dict[str, tuple[dict, list]] = {}
    for folder in folders:
        path = folder / "metrics.jsonl"
        records = [record for _, record in read_jsonl(path, skip_broken=True)]
        if not records:
            raise UsageError(f"{path}: no such file, or empty; give a run's folder")
        config = read_json(folder / "config.json")
        for key in ("seed", "output_dir", "resume", "resume_changed", "check", "environment"):
            config.pop(key, None)
        groups.setdefault(json.dumps(config, sort_keys=True), (config, []))[1].append(records)
    labelled = {}
    for config, runs in groups.values():
        rivals = [c for c, _ in groups.values() if c["preset"] == config["preset"]]
        own = [f"{key} {str(value)[-40:]}" for key, value in config.items()
               if any(rival.get(key) != value for rival in rivals)]
        labelled[", ".join([config["preset"], *own])] = runs
    return labelled


def draw_series(axis, runs: list[list[dict]], name: str, label: str, colour: str) -> None:
    """Draw the mean over the runs at the steps that all have, and one deviation; of held-out
    accuracy in bars, which for a single run are its standard errors."""
    points = [{r["step"]: r for r in run if r.get(name) is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, points)))
    values = np.array([[run[step][name] for step in steps] for run in points])  # (runs, steps)
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else None
    if name == "eval_accuracy":
        if spread is None:
            spread = [points[0][step]["eval_accuracy_stderr"] for step in steps]
        axis.errorbar(steps, mean, spread, marker="o", ms=3, capsize=2, label=label, color=colour)
        return
    axis.plot(steps, mean, label=label, color=colour, lw=1.2)
    if spread is not None:
        axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2, color=colour, lw=0)


def draw_runs(folders: list[Path]):
    """Return a matplotlib figure of the metrics of one or many runs, without empty panels."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    groups = group_runs(folders)
    colours = colours_of(groups)
    everything = [record for runs in groups.values() for run in runs for record in run]
    panels = [name for name in PANELS if any(r.get(name) is not None for r in everything)]
    rows = -(-len(panels) // 3)
    figure = Figure((11, 0.6 + 2.5 * rows), dpi=110, layout="constrained")
    for i, name in enumerate(panels):
        axis = figure.add_subplot(rows, 3, i + 1)
        for label, runs in groups.items():
            if all(any(r.get(name) is not None for r in run) for run in runs):
                draw_series(axis, runs, name, label, colours[label])
        label, unit, _ = describe(name)
        axis.set_title(label if unit == "share" else f"{label}, {unit}")
        axis.grid(alpha=0.3)
        if unit == "share":
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    counts = sorted({len(runs) for runs in groups.values()})
    title = "one run a line, bars: standard errors"
    if counts != [1]:
        seeds = " and ".join(map(str, counts))
        title = f"mean over {seeds} seeds, bands and bars: one standard deviation"
    figure.suptitle(f"{title}; by training step")
    lines = [Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    columns = max(1, 120 // (8 + max(map(len, colours))))  # that are as wide as the picture
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), columns))
    return figure
