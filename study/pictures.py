"""The study's summary.md and its pictures, from runs.jsonl and the verdicts."""

import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from shelf.report import COLOURS  # noqa: E402

NAMES = dict(a3po="A3PO", dapo="DAPO", random="random 20 %", grpo="GRPO", psr="PSR", nsr="NSR",
             a3po_constant="A3PO, no decay", base="base")
CELLS = ("low_prob", "high_prob", "low_entropy", "high_entropy")
FOUND = 0.1  # as in study.py
PLURAL = {"holds": "hold", "does not hold": "do not hold",
          "not decidable here": "are not decidable here", "not run": "not run yet"}
SIZE = dict(dpi=110, bbox_inches="tight")


def band(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and half width of the 95 % interval over seeds."""
    values = np.array(rows, float)
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5 if n > 1 else 0 * values[0]
    return values.mean(0), half


def select(runs: list[dict], place: str, method: str) -> list[dict]:
    return [run for run in runs if (run["place"], run["method"]) == (place, method)]


def draw_line(axis, x, rows: list, method: str, **style) -> None:
    if not rows:
        return
    mean, half = band(rows)
    colour = COLOURS[method]
    axis.plot(x, mean, color=colour, label=f"{NAMES[method]} ({len(rows)})", **style)
    axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)


def evals(runs: list[dict], name: str) -> tuple[list, list]:
    """Return the steps and, for each run, a metric of its evaluations."""
    steps = [x["step"] for x in runs[0]["evals"]] if runs else []
    return steps, [[x[name] for x in run["evals"]] for run in runs]


def over_steps(runs: list[dict], place: str, methods: tuple, title: str, path: Path) -> None:
    """Held-out accuracy and entropy over the steps."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.3))
    for method in methods:
        mine = select(runs, place, method)
        draw_line(axes[0], *evals(mine, "accuracy"), method)
        rows = [run["trained"]["entropy"] for run in mine]
        if rows:
            draw_line(axes[1], np.arange(len(rows[0])) * 10 + 5, rows, method)
    axes[0].set(xlabel="training step", ylabel="held-out accuracy, share", title=title)
    axes[1].set(xlabel="training step", ylabel="entropy, nats per token",
                title="means over (seeds), 95 % intervals")
    finish(figure, path)


def dial(runs: list[dict], places: tuple, path: Path) -> None:
    """Accuracy on traps at step 50, and share of seeds that found the strategy, over the skill that
    the base has: the share of its answers to traps that are right by precedence."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.3))
    skills = {place: np.mean(base) for place in places if (base := [
        run["evals"][0]["by_precedence"] for run in runs if run["place"] == place])}
    for shift, method in enumerate(("a3po", "dapo", "random")):
        points = []
        for place, skill in skills.items():
            values = [x["accuracy"] for run in select(runs, place, method) for x in run["evals"]
                      if x["step"] == 50]
            if len(values) > 1:
                low, high = stats.binomtest(sum(v > FOUND for v in values),
                                            len(values)).proportion_ci(method="wilson")
                mean, half = band([[v] for v in values])
                points.append((skill * 1.06 ** (shift - 1), mean[0], half[0],
                               np.mean([v > FOUND for v in values]), low, high))
        if points:
            x, mean, half, share, low, high = map(np.array, zip(*sorted(points), strict=True))
            style = dict(color=COLOURS[method], marker="o", capsize=3, label=NAMES[method])
            axes[0].errorbar(x, mean, half, **style)
            axes[1].errorbar(x, share, np.maximum([share - low, high - share], 0), **style)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(list(skills.values()), [f"{100 * x:.2g} %" for x in skills.values()],
                        rotation=30)
        axis.minorticks_off()
        axis.set_xlabel("the base's share of traps right by precedence")
    axes[0].set(ylabel="accuracy on traps, step 50")
    axes[1].set(ylabel=f"share of seeds over {FOUND}", ylim=(-0.05, 1.05))
    finish(figure, path)


def cell_map(entropy: dict[tuple, dict], path: Path) -> None:
    """What each cell's tokens do to entropy, against DAPO's, as a heat map with intervals."""
    grid, words, seeds = np.full((2, 4), np.nan), {}, 0
    for (_, method), found in entropy.items():
        if method[1:] in CELLS:
            at, seeds = ("+-".index(method[0]), CELLS.index(method[1:])), found["pairs"]
            grid[at], words[at] = found["mean"], f"{found['mean']:+.3f}\n± {found['half']:.3f}"
    figure, axis = pyplot.subplots(figsize=(7.5, 2.8))
    most = np.nanmax(np.abs(grid)) if words else 1.0
    image = axis.imshow(grid, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
    for (row, column), text in words.items():
        dark = abs(grid[row, column]) > 0.6 * most
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(4), [cell.replace("_", " ").replace("prob", "probability")
                               for cell in CELLS])
    axis.set_yticks(range(2), ["right\nresponses", "wrong\nresponses"])
    axis.set_title("entropy against DAPO's, nats, if these tokens weigh twice "
                   f"({seeds} seeds)", fontsize=11)
    figure.colorbar(image, ax=axis)
    finish(figure, path)


def pass_curves(runs: list[dict], place: str, path: Path) -> None:
    """pass@k of the base and of trained models, and on the right of these alone, from near."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.3))
    ks = (1, 2, 4, 8, 16, 32)
    for method in ("base", "a3po", "dapo", "grpo", "psr", "nsr"):
        rows = [[run["evals"][-1][f"pass@{k}"] for k in ks] for run in select(runs, place, method)]
        if not rows:
            continue
        mean, half = band(rows)
        for axis in axes[: 1 if method == "base" else 2]:
            axis.errorbar(ks, mean, half, capsize=2, color=COLOURS[method], label=NAMES[method])
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, map(str, ks))
        axis.set(xlabel="samples k", ylabel="pass@k, share of problems")
    axes[1].set_title("the trained ones from near")
    finish(figure, path)


def story(runs: list[dict], place: str, path: Path) -> None:
    """The README's figure: who finds the rare strategy, when, and what that does to entropy."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.1))
    for method in ("a3po", "dapo", "random"):
        mine = select(runs, place, method)
        steps, rows = evals(mine, "accuracy")
        draw_line(axes[0], steps, rows, method)
        if rows:
            found = np.mean(np.maximum.accumulate(np.array(rows), 1) > FOUND, 0)
            axes[1].plot(steps, found, color=COLOURS[method], marker="o", markersize=3)
            entropy = [run["trained"]["entropy"] for run in mine]
            draw_line(axes[2], np.arange(len(entropy[0])) * 10 + 5, entropy, method)
    for axis, title, label in zip(axes, (
            "problems that only the rare strategy solves", "seeds that have found it",
            "room to explore"), ("accuracy", "share", "entropy, nats per token"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="training step", ylabel=label)
    finish(figure, path)


def finish(figure, path: Path) -> None:
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, **SIZE)
    pyplot.close(figure)


def draw_all(runs: list[dict], entropy: dict[tuple, dict], main: str, places: tuple,
             out: Path) -> None:
    """Draw every picture into out; entropy: differences from DAPO by (place, method)."""
    over_steps(runs, main, ("a3po", "dapo", "random"), "traps of the shortcut regime",
               out / "shortcut.png")
    over_steps(runs, "saturating", ("a3po", "dapo", "grpo", "random", "psr", "nsr"),
               "the saturating regime", out / "saturating.png")
    over_steps(runs, "long", ("a3po", "dapo", "a3po_constant"), "300 steps", out / "long.png")
    dial(runs, places, out / "dial.png")
    cell_map(entropy, out / "cells.png")
    pass_curves(runs, "saturating", out / "pass_at_k.png")
    story(runs, main, out / "story.png")


# ---- summary.md ---------------------------------------------------------------------------------


def number(value: float, effect: float) -> str:
    return f"{value:.1e}" if effect < 1e-4 else f"{value:.1f}" if effect >= 1 else f"{value:.3f}"


def beyond(r: dict) -> bool:
    """Return whether a claim holds and all of its interval is beyond what matters ("same": within),
    the stricter reading."""
    size = abs(r["mean"]) if r["claim"].kind == "differs" else r["mean"]
    whole = r["claim"].kind == "same" or size - r["half"] >= r["claim"].effect
    return r["verdict"] == "holds" and bool(whole)


def claim_row(r: dict) -> str:
    claim, when = r["claim"], r["claim"].metric
    metric = f"{when[1]}, {when[2] if isinstance(when[2], str) else f'step {when[2]}'}"
    difference, p = "-", "-"
    if r["n"] > 1:
        p = f"{min(r['p'], 1):.2g}"
        mean, half = number(r["mean"], claim.effect), number(r["half"], claim.effect)
        difference = f"{'' if mean[0] == '-' else '+'}{mean} ± {half}"
    kinds = {"same": "within ", "differs": "either way ", "found": "", "more": ""}
    strict = {"holds": "yes" if beyond(r) else "no"}.get(r["verdict"], "")
    return (f"| **{r['verdict']}** | {r['side']} | {claim.text} | {claim.source} | "
            f"{claim.a} - {claim.b}: {metric} | {difference} | {r['n']} | {p} | "
            f"{kinds[claim.kind]}{claim.effect:g} | {strict} |")


def claims_table(results: list[dict]) -> list[str]:
    return ["| verdict | decided by | claim | source | difference of | ± simultaneous 95 % "
            "| pairs | p (Holm) | smallest that matters | all of the interval beyond it |",
            "|" + "---|" * 10, *map(claim_row, results)]


def means_table(runs: list[dict]) -> list[str]:
    """Show, for each place and method, means over seeds of what the runs end with."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["place"], run["method"]].append(run)
    lines = ["| regime | method | seeds | accuracy, end ± deviation | pass@8 | pass@32 | "
             "entropy, mean | length | updates a step | mismatch |", "|" + "---|" * 10]
    for (place, method), mine in sorted(groups.items()):
        last = [run["evals"][-1] for run in mine]
        accuracy = [x["accuracy"] for x in last]
        spread = f" ± {np.std(accuracy, ddof=1):.3f}" if len(mine) > 1 else ""
        cells = [f"{np.mean(accuracy):.3f}{spread}"]
        cells += [f"{np.mean([x[k] for x in last]):.3f}" if k in last[0] else "-"
                  for k in ("pass@8", "pass@32")]
        if mine[0]["trained"]["entropy"]:
            trained = [run["trained"] for run in mine]
            cells += [f"{np.mean([np.mean(t['entropy']) for t in trained]):.3f}",
                      f"{np.mean([t['response_length'][-1] for t in trained]):.1f}",
                      f"{np.mean([np.mean(t['updates']) for t in trained]):.2f}",
                      f"{np.mean([np.mean(t['mismatch_mean']) for t in trained]):.1e}"]
        else:
            cells += ["-"] * 4
        lines.append(f"| {place} | {method} | {len(mine)} | " + " | ".join(cells) + " |")
    return lines


def counted(results: list[dict], key: str = "verdict") -> str:
    """Return how many claims have each verdict, in words."""
    count = Counter(r[key] for r in results)
    return ", ".join(f"{count[v]} {words}" for v, words in PLURAL.items() if count[v])


def moved(results: list[dict]) -> list[str]:
    """Say which verdicts the rule has moved since the study was first judged."""
    rows = [f"| {r['claim'].family} | {r['claim'].text} | {r['before']} | {r['verdict']} "
            f"({r['side']}) |" for r in results if r["before"] != r["verdict"]]
    return ["## Verdicts that the rule has moved", "",
            "At first \"holds\" asked for Holm's p alone, while the other verdicts came from the "
            f"plain 95 % interval of each claim: {counted(results, 'before')}. With one "
            f"interval for all three: {counted(results)}. "
            f"{len(rows)} of {len(results)} have moved.", "",
            "| family | claim | before | now |", "|" + "---|" * 4, *rows, ""]


def write_summary(runs: list[dict], results: list[dict], later: dict[str, dict],
                  sections: list[str], planned: int, rule: str, out: Path) -> None:
    """Write summary.md: what was run, the verdicts by family, the means."""
    commits = sorted({run["environment"]["commit"] for run in runs})
    hours = sum(run["seconds"] for run in runs) / 3600
    machines = sorted({run.get("machine", "?") for run in runs})
    fresh = "; ".join(f"{name}: {counted(found['results'])}" for name, found in later.items())
    lines = ["# The paper's findings in miniature", "",
             f"{len(runs)} of {planned} runs, {hours:.1f} hours one after the other; commit "
             f"{', '.join(commits)}; `bash run.sh study`; {'; '.join(machines)}.", "",
             f"{len(results)} claims: {counted(results)}. Of those that hold, "
             f"{sum(map(beyond, results))} do so by the stricter reading, that all of the "
             "interval reaches what matters (the last column). "
             f"Those written down later, on seeds of their own: {fresh}.", "",
             textwrap.fill(rule, 100), "",
             "![Who finds the rare strategy](story.png)", ""]
    for family in dict.fromkeys(r["claim"].family for r in results):
        mine = [r for r in results if r["claim"].family == family]
        lines += [f"## {family}", "", *claims_table(mine), ""]
    for family, found in later.items():
        lines += [f"## {family}", "", found["words"], "", *claims_table(found["results"]), ""]
        lines += [*means_table(found["runs"]), ""] if found["runs"] else []
        if found["pooled"]:
            lines += ["Exploratory: the same with the pairs of all seeds that exist pooled.", "",
                      *claims_table(found["pooled"]), ""]
    lines += moved(results) + sections
    lines += ["## Means over seeds", "", *means_table(runs), ""]
    for name, text in (("shortcut", "Shortcut regime"), ("saturating", "Saturating regime"),
                       ("long", "300 steps"), ("dial", "The dial: bases of different skill"),
                       ("cells", "Eight token cells"), ("pass_at_k", "pass@k")):
        lines += [f"![{text}]({name}.png)", ""]
    (out / "summary.md").write_text("\n".join(lines))
