"""What the confirmation can show: its power, from the deviations of the study before it.

    python study/power.py        writes results/power.md; run before the confirmation's first run

The differences of a family's claims are drawn together from a normal distribution with the study's
covariance over its pairs of seeds, around the study's means, around 3/4 and 1/2 of them, since what
is picked because it came out well is likely to be smaller than it looked, and around 0.
"""

import numpy as np
from scipy import stats

import study

DRAWS = 10_000
SCALES = (1, 0.75, 0.5, 0)


def draw(found: np.ndarray, claims: list, scale: float, pairs: int) -> list[np.ndarray]:
    """Return in which of DRAWS confirmations each claim holds, (draws, claims): by the rule of
    study.py, and if Holm's p decided in place of the simultaneous interval."""
    rng, m = np.random.default_rng(0), len(found)
    effects = np.array([c.effect for c in claims])
    drawn = rng.multivariate_normal(scale * found.mean(1), np.cov(found), (DRAWS, pairs))
    mean = drawn.mean(1)
    t = mean / (drawn.std(1, ddof=1) / pairs**0.5)
    p = 2 * stats.t.sf(np.abs(t), pairs - 1)
    either = np.array([c.kind == "differs" for c in claims])
    large = np.where(either, np.abs(mean), mean) >= effects
    return [(x < study.LEVEL) & large for x in (m * p, np.array(list(map(study.holm, p))))]


def table(family: str, runs: list[dict]) -> list[str]:
    claims = [c for c in study.CONFIRM_CLAIMS if c.family == family]
    pairs, m = len(study.CONFIRMED[family][2]), len(claims)
    found = np.array([study.pairs(claim, runs) for claim in claims])
    held = {scale: draw(found, claims, scale, pairs) for scale in SCALES}
    truths = " | ".join(f"true: {scale:g} × mean" for scale in SCALES)
    half = stats.t.ppf(1 - study.LEVEL / m / 2, pairs - 1) / pairs**0.5
    lines = [f"## {family}", "", f"{pairs} pairs of seeds; the study had {found.shape[1]}. Half an "
             f"interval will be about {half:.2f} deviations. Share of {DRAWS:,} draws in which a "
             "claim holds:", "", "| claim | study: mean | deviation | half an interval | must "
             f"reach | {truths} |", "|" + "---|" * 9]
    for i, claim in enumerate(claims):
        deviation = found[i].std(ddof=1)
        powers = " | ".join(f"{held[s][0][:, i].mean():.2f}" for s in SCALES)
        lines.append(f"| {claim.text} | {found[i].mean():+.3f} | {deviation:.3f} | "
                     f"{half * deviation:.3f} | {claim.effect:g} | {powers} |")
    for name, which, of in (("any of them", 0, np.any), ("all of them", 0, np.all),
                            ("all of them, if Holm's p decided", 1, np.all)):
        powers = " | ".join(f"{of(held[s][which], 1).mean():.2f}" for s in SCALES)
        lines.append(f"| {name} | | | | | {powers} |")
    return [*lines, ""]


def main() -> None:
    runs = list(study.read_runs(study.HERE / "results" / "runs.jsonl").values())
    lines = ["# What the confirmation can show, calculated before its first run", "",
             *__doc__.partition("first run\n\n")[2].splitlines(), ""]
    for family in study.CONFIRMED:
        lines += table(family, runs)
    lines += ["Three pairs give a rough deviation: the second table is a rough one too.", ""]
    (study.HERE / "results" / "power.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
