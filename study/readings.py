"""Do our readings of the paper matter? The eight of study.READINGS against ours, from all runs.

Three pairs of seeds give hardly a deviation, so one is pooled: that of the runs about the sum of a
method's and a seed's effect, over the nine methods together. This was decided after the runs.
"""

import numpy as np
from scipy import stats

import study

METRICS = {  # what is compared: metric, the smallest difference that matters
    "entropy, mean": (study.ENTROPY, 0.01),
    "reward, steps 50-59": (("train", "reward", 50), 0.03),
    "reward, steps 100-109": (("train", "reward", 100), 0.03),
    "reward, steps 140-149": (("train", "reward", 140), 0.03),
    "traps, step 50": (study.AT_50, 0.03),
    "traps, step 100": (("eval", "accuracy", 100), 0.03),
    "traps, end": (study.END, 0.05),
}


def values_of(runs: list[dict], metric: tuple) -> np.ndarray:
    """Return the metric of ours and of the eight, (methods, seeds), of the seeds that all have."""
    methods = ("a3po", *study.READINGS)
    found = {(x["method"], x["seed"]): study.value(x, metric) for x in runs
             if x["place"] == study.MAIN and x["method"] in methods}
    seeds = sorted({seed for _, seed in found if all((m, seed) in found for m in methods)})
    return np.array([[found[m, seed] for seed in seeds] for m in methods])


def compare(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return the differences from the first method, half the width of their simultaneous intervals
    and the deviation of a difference of one pair."""
    methods, seeds = values.shape
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    freedom = (methods - 1) * (seeds - 1)
    deviation = (2 * (rest**2).sum() / freedom) ** 0.5
    half = stats.t.ppf(1 - study.LEVEL / (methods - 1) / 2, freedom) * deviation / seeds**0.5
    return values[1:].mean(1) - values[0].mean(), half, deviation


def seeds_needed(deviation: float, effect: float, comparisons: int) -> int:
    """Return the seeds with which half an interval is half of what matters, so that whatever is
    below half of it or above one and a half times is likely to be decided."""
    n = 2
    while (stats.t.ppf(1 - study.LEVEL / comparisons / 2, comparisons * (n - 1)) * deviation
           / n**0.5 > effect / 2):
        n += 1
    return n


def decide(difference: float, half: float, effect: float) -> str:
    claim = study.Claim("", "", "", "", "", "", (), effect, "differs")
    apart = 0.0 if abs(difference) > half else 1.0  # what stands for p: the interval excludes 0
    word = study.verdict(claim, difference, half, apart)[0]
    return {"holds": "**matters**", "does not hold": "does not"}.get(word, "?")


def section(runs: list[dict]) -> list[str]:
    """Return the section of summary.md."""
    columns, needs = [], []
    for name, (metric, effect) in METRICS.items():
        values = values_of(runs, metric)
        if values.ndim < 2 or values.shape[1] < 2:
            return []
        differences, half, deviation = compare(values)
        columns.append([f"{d:+.3f} ± {half:.3f} {decide(d, half, effect)}" for d in differences])
        n = seeds_needed(deviation, effect, len(differences))
        needs.append(f"{name} {n} ({effect:g})")
    lines = ["## Readings, on entropy and reward", "",
             f"Exploratory: from the {values.shape[1]} seeds that all have, judged after the runs. "
             "Each reading in place of ours, less ours; intervals simultaneous for the eight of a "
             "column, with one deviation pooled over the methods; a change matters if its interval "
             "excludes 0 and it reaches the smallest one that does, it does not if its interval is "
             "within that.", "",
             "| reading | " + " | ".join(METRICS) + " |", "|" + "---|" * (len(METRICS) + 1)]
    for name, *row in zip(study.READINGS, *columns, strict=True):
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return [*lines, "", "Seeds of each with which half an interval would be half of what matters "
            "(in brackets): " + "; ".join(needs) + ".", ""]
