"""The paper's findings in miniature: claims, written down before the runs; runs; verdicts by rule.

    python study/study.py [--jobs 2]            train what is missing of 239 runs, then judge
    python study/study.py --quick               three short runs, to see that the machinery works
    python study/study.py --first_seed 100      the same study with other seeds
    python study/study.py --judge               verdicts and pictures of the runs that are there
    python study/study.py --confirm             the claims that matter again, with fresh seeds

results/runs.jsonl has the study; results/confirm.jsonl what --confirm has run, judged by itself;
results/seeds-100 the beginning of another study with fresh seeds (--judge --out judges it).
power.py calculates what a confirmation can show, readings.py compares our readings of the paper,
why.py asks what moves entropy, and smollm2.py takes a real language model: all in summary.md.

A run is `a3po.main` with flags, in a process of its own: the demo's size of model, one core, 2 to 8
minutes. Its numbers become a line of runs.jsonl, and a run with a line is not trained again, so the
study can be stopped and started. The control "random" replaces `a3po.smallest`, nothing else.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from math import isfinite
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

# ---- what is run --------------------------------------------------------------------------------

BASES = HERE / "bases"
SHORTCUT = (f"--data {BASES}/train.jsonl --eval_data {BASES}/traps.jsonl,{BASES}/plain.jsonl "
            "--steps 150 --decay_rate 0.0066667 --max_refills 0 --eval_every 25")
REGIMES = {  # name: what it is, flags beyond the demo's
    "saturating": ("the demo: everybody learns it", "--eval_every 20"),
    "shortcut": ("a shortcut solves three of four problems, a rare right strategy solves all",
                 SHORTCUT),
    "long": ("the demo for 300 steps with the paper's alpha: rho is 1 from step 200", "--steps 300 "
             "--decay_rate 0.005 --max_refills 0 --eval_every 50"),
    "quick": ("10 steps of the shortcut", SHORTCUT + " --steps 10 --eval_every 10"),
}
MAIN = "shortcut-4"  # the number is the base's skill, per cent: see make_bases.py
PLACES = ("shortcut-1", MAIN, "shortcut-8", "shortcut-10")
CELLS = [f"{sign}{side}_{what}" for sign in "+-" for side in ("low", "high")
         for what in ("prob", "entropy")]
RHO = "--rho_positive {0} --rho_negative {0}"
READINGS = {  # our choices [O], each changed alone; rho reaches 1 at the last step
    "rho 1.5": RHO.format(1.5) + " --decay_rate 0.0033333",
    "rho 3": RHO.format(3) + " --decay_rate 0.0133333",
    "rho 5": RHO.format(5) + " --decay_rate 0.0266667",
    "fraction .05": "--token_fraction 0.05", "fraction .5": "--token_fraction 0.5",
    "exponential": "--preset a3po_exp", "no decay": "--preset a3po_constant",
    "on GRPO": "--preset a3po_grpo",
}
RATIOS = {f"{p}:{n}": f"--preset polarity --positive_weight {p} --negative_weight {n}"
          for p, n in (("0.5", "1"), ("1", "2"), ("1", "0.5"), ("2", "1"))}
PRESETS = ("dapo", "grpo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po_constant",
           "symmetric", "a3po_exp")
METHODS = {  # name: flags
    "a3po": "", "random": "", "base": "--steps 0", **{p: f"--preset {p}" for p in PRESETS},
    **READINGS, **RATIOS,
    **{cell: "--preset token_cell " + (
        f"--positive_cell {cell[1:]}" if cell[0] == "+" else
        f"--rho_positive 1 --rho_negative 2 --negative_cell {cell[1:]}") for cell in CELLS},
}
GROUPS = [  # (where, methods, seeds), in this order
    (MAIN, ("a3po", "dapo", "random"), 20),
    ("saturating", ("a3po", "dapo", "grpo", "random"), 5),
    ("saturating", ("psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po_constant",
                    "symmetric", "a3po_exp"), 3),
    *((place, ("a3po", "dapo", "random"), 5) for place in PLACES if place != MAIN),
    (MAIN, tuple(READINGS), 3),
    ("long", ("a3po", "dapo", "a3po_constant"), 5),
    ("saturating", tuple(CELLS), 3),
    ("saturating", tuple(RATIOS), 3),
    *((place, ("base",), 3) for place in ("saturating", *PLACES)),
]
QUICK = [("quick-4", ("a3po", "dapo", "random"), 1)]

# ---- what is claimed, before any run ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    """`a` exceeds `b` in the metric by at least `effect`, the smallest difference that matters.

    metric: "train" or "eval", name in metrics.jsonl, when: a step; "last"; "mean" over the run; or
    ">x", the step at which x is reached. kind: "more"; "differs" in either direction; "same" to
    within the effect; "found": in more seeds the metric exceeds FOUND.
    """

    family: str
    text: str
    source: str
    places: str | tuple
    a: str
    b: str
    metric: tuple
    effect: float
    kind: str = "more"


FOUND = 0.1  # held-out accuracy on traps from which the right strategy counts as found
ENTROPY = ("train", "entropy", "mean")
LENGTH = ("train", "response_length", "last")
END = ("eval", "accuracy", "last")
AT_50 = ("eval", "accuracy", 50)
DIAL = tuple(place for place in PLACES if place != MAIN)
READ = "our reading"
CLAIMS = [
    Claim("polarity", "positive samples alone lose entropy against GRPO", "paper, claim 1",
          "saturating", "grpo", "psr", ENTROPY, 0.02),
    Claim("polarity", "negative samples alone keep more entropy than GRPO", "paper, claim 1",
          "saturating", "nsr", "grpo", ENTROPY, 0.02),
    Claim("polarity", "positive samples alone shorten responses, against DAPO", "paper, claim 1",
          "saturating", "dapo", "psr", LENGTH, 0.5),
    Claim("polarity", "negative samples alone lengthen responses, against DAPO", "paper, claim 1",
          "saturating", "nsr", "dapo", LENGTH, 0.5),
    Claim("polarity", "negative samples alone keep more pass@32 than positive alone",
          "paper, claim 1", "saturating", "nsr", "psr", ("eval", "pass@32", "last"), 0.01),
    Claim("polarity", "negative samples alone keep the base's pass@32", "paper, claim 1",
          "saturating", "nsr", "base", ("eval", "pass@32", "last"), 0.02, "same"),
    *(Claim("entropy", f"A3PO keeps more entropy than {name} ({place})", source, place, "a3po", b,
            ENTROPY, 0.01)
      for place in ("saturating", MAIN) for b, name, source in (
          ("dapo", "DAPO", "paper, claim 5"), ("random", "random tokens", READ))),
    *(Claim("entropy", f"random tokens have DAPO's entropy ({place})", READ, place, "random",
            "dapo", ENTROPY, 0.02, "same") for place in ("saturating", MAIN)),
    *(Claim("accuracy", f"A3PO ends more accurate than {b} ({place})", "paper, claim 5", place,
            "a3po", b, END, effect)
      for place, b, effect in (
          ("saturating", "dapo", 0.01), ("saturating", "grpo", 0.01),
          ("saturating", "fork_tokens", 0.01), ("saturating", "w_reinforce", 0.01),
          ("saturating", "lp_reg", 0.01), ("saturating", "symmetric", 0.01), (MAIN, "dapo", 0.05),
          ("long", "dapo", 0.01))),
    *(Claim("exploration", f"on traps A3PO is ahead of {name} at step {step}", source, MAIN, "a3po",
            b, ("eval", "accuracy", step), 0.03)
      for step in (50, 100) for b, name, source in (
          ("dapo", "DAPO", "paper, claim 5"), ("random", "random tokens", READ))),
    Claim("exploration", "random tokens are as good as DAPO on traps at step 50", READ, MAIN,
          "random", "dapo", AT_50, 0.03, "same"),
    *(Claim("exploration", f"by step 50 A3PO has found the right strategy in more seeds than {b}",
            READ, MAIN, "a3po", b, AT_50, 0.1, "found") for b in ("dapo", "random")),
    *(Claim("exploration", f"A3PO finds it in fewer steps than {b}", READ, MAIN, b, "a3po",
            ("eval", "accuracy", f">{FOUND}"), 5) for b in ("dapo", "random")),
    Claim("exploration", "A3PO solves more traps in one of eight tries at step 50", READ, MAIN,
          "a3po", "dapo", ("eval", "pass@8", 50), 0.03),
    *(Claim("exploration", f"ahead of {b} at step 50 on the three other bases", READ, DIAL, "a3po",
            b, AT_50, 0.03) for b in ("dapo", "random")),
    Claim("exploration", "it costs accuracy on plain problems", READ, MAIN, "dapo", "a3po",
          ("eval", "plain_accuracy", "last"), 0.01),
    Claim("decay", "without decay A3PO ends less accurate (300 steps)", "paper, claim 4", "long",
          "a3po", "a3po_constant", END, 0.01),
    Claim("decay", "without decay the mismatch grows (300 steps)", "paper, claim 4", "long",
          "a3po_constant", "a3po", ("train", "mismatch_mean", "last"), 1e-7),
    Claim("decay", "without decay entropy stays higher (300 steps)", "paper, claim 4", "long",
          "a3po_constant", "a3po", ("train", "entropy", "last"), 0.01),
    Claim("decay", "once rho is 1, A3PO has DAPO's entropy (300 steps)", READ, "long", "a3po",
          "dapo", ("train", "entropy", "last"), 0.02, "same"),
    *(Claim("cells", f"{'+' if up else '-'} entropy: {cell}", "paper, claim 3", "saturating",
            *((cell, "dapo") if up else ("dapo", cell)), ENTROPY, 0.01)
      for cell, up in (("+low_prob", True), ("+high_prob", False), ("-high_prob", True),
                       ("-low_prob", False))),
    *(Claim("cells", f"entropy changes: {cell}", "paper, claim 3", "saturating", cell, "dapo",
            ENTROPY, 0.01, "differs") for cell in CELLS if cell.endswith("entropy")),
    *(Claim("ratio", f"the scale does not matter: {a} has the entropy of {b}", "paper, claim 2",
            "saturating", a, b, ENTROPY, 0.02, "same")
      for a, b in (("1:2", "0.5:1"), ("2:1", "1:0.5"))),
    Claim("ratio", "more weight on wrong responses keeps more entropy: 0.5:1 over 1:0.5",
          "paper, claim 2", "saturating", "0.5:1", "1:0.5", ENTROPY, 0.01),
    Claim("ratio", "more weight on right responses learns faster: 2:1 over 1:2", "paper, claim 2",
          "saturating", "2:1", "1:2", ("train", "reward", 30), 0.01),
    Claim("cost", "A3PO needs more steps than DAPO to reach 80 %", READ, "saturating", "a3po",
          "dapo", ("eval", "accuracy", ">0.8"), 5),
    *(Claim("readings", f"it matters on traps at step 50: {name} in place of ours", READ, MAIN,
            name, "a3po", AT_50, 0.03, "differs") for name in READINGS),
]

# Written down after the study and before the first run with these seeds; the study's own seeds and
# those of results/seeds-100 are not pooled in. results/power.md says what 30 pairs can show. The
# runs are made in the order of the seeds, so that a stop leaves complete pairs; a family is judged
# once, when all of its runs are there.
CONFIRMED = {  # family: where, methods, seeds
    "confirmation": (MAIN, ("a3po", "dapo", "random"), range(200, 230)),
    "cells again": ("saturating", ("dapo", *CELLS), range(200, 210)),
}
CONFIRM_CLAIMS = [
    *(Claim("confirmation", f"A3PO keeps more entropy than {name}", source, MAIN, "a3po", b,
            ENTROPY, 0.01) for b, name, source in (
                ("dapo", "DAPO", "paper, claim 5"), ("random", "random tokens", READ))),
    *(Claim("confirmation", f"on traps A3PO is ahead of {name} at step 100", source, MAIN, "a3po",
            b, ("eval", "accuracy", 100), 0.03) for b, name, source in (
                ("dapo", "DAPO", "paper, claim 5"), ("random", "random tokens", READ))),
    Claim("confirmation", "on traps A3PO ends more accurate than DAPO", "paper, claim 5", MAIN,
          "a3po", "dapo", END, 0.05),
    Claim("confirmation", "A3PO solves more traps than DAPO in one of eight tries at step 50",
          READ, MAIN, "a3po", "dapo", ("eval", "pass@8", 50), 0.03),
    *(dataclasses.replace(claim, family="cells again") for claim in CLAIMS
      if claim.family == "cells"),
]
LEVEL = 0.05  # of the verdicts of a family together
RULE = """Each claim was written down in study.py before its runs. Seeds are paired. The intervals
of a family of m claims are simultaneous, each Student's t over the pairs at the level 1 - .05 / m,
and all three verdicts come from them. A level that a run does not reach counts as reached at its
last step. p is Holm's, for comparison. """


# ---- one run ------------------------------------------------------------------------------------

PROBLEMS, PLAIN_PROBLEMS = 192, 96  # held-out ones
SAMPLES, LAST_SAMPLES = 8, 32
WINDOW = 10  # steps that one training value is the mean of
TRAINED = ("reward accuracy entropy entropy_positive entropy_negative response_length "
           "response_length_positive response_length_negative mismatch_mean clip_low clip_high "
           "kl_old ratio_max ratio_max_deviation dead_groups groups_drawn grad_norm updates "
           "skipped_updates rollout_tokens rho_positive").split()


@dataclasses.dataclass(frozen=True)
class Run:
    place: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.+-]", "_", f"{self.place}-{self.method}-seed{self.seed}")

    @property
    def flags(self) -> list[str]:
        regime, _, skill = self.place.partition("-")
        model = ["--model", str(BASES / f"skill-{skill}")] if skill else []
        return ["--setting=demo", "--log_rollouts=1", "--save_every=0", *model,
                *REGIMES[regime][1].split(), *METHODS[self.method].split(), f"--seed={self.seed}"]


def train_one(run: Run, out: Path, more_flags: tuple = ()) -> None:
    """Train in this process, with the study's evaluation and, for "random", its choice."""
    from make_bases import by_precedence, distinct_of_4

    import a3po

    def held_out(engine, tokenizer, judge, prompts, config):
        due.pop()
        plain = [p for p in prompts if p.problem.text in plain_texts][:PLAIN_PROBLEMS]
        hard = [p for p in prompts if p.problem.text not in plain_texts][:PROBLEMS]
        sampling = dict(seed=config.seed, max_tokens=config.max_response_length, temperature=1.0)
        n = SAMPLES if due else LAST_SAMPLES
        metrics, groups = a3po.evaluation.evaluate(engine, tokenizer, judge, hard, n=n, **sampling)
        knows = [x["correct"] and by_precedence(p.problem.text, x["response"])
                 for p, group in zip(hard, groups, strict=True) for x in group]
        metrics |= dict(distinct_of_4=distinct_of_4(groups), by_precedence=float(np.mean(knows)))
        if plain:
            easy, _ = a3po.evaluation.evaluate(engine, tokenizer, judge, plain, n=SAMPLES,
                                               **sampling)
            metrics |= dict(plain_accuracy=easy["accuracy"])
        return metrics

    flags = [*run.flags, *more_flags, f"--output_dir={out}"]
    config = a3po.parse_args(flags)
    due = [s for s in range(config.steps + 1) if a3po.is_due(s, config.eval_every, config.steps)]
    lines = (BASES / "plain.jsonl").read_text().splitlines()
    plain_texts = {json.loads(line)["problem"] for line in lines}
    a3po.run_eval = held_out
    if run.method == "random":
        choose_at_random(run.seed)
    a3po.main(flags)


def choose_at_random(seed: int) -> None:
    """Let A3PO choose as many tokens as ever, but at random: the control."""
    import a3po

    a3po.torch.manual_seed(seed)
    choose = a3po.smallest
    a3po.smallest = lambda values, *rest: choose(a3po.torch.rand(values.shape), *rest)


def machine() -> str:
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else 'an unnamed CPU'}"


def short(value):
    return None if value is None or not isfinite(value) else float(f"{value:.4g}")


def gather(run: Run, out: Path) -> dict:
    """Return what is kept of a finished run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = [{"step": x["step"]} | {k[5:]: short(v) for k, v in x.items() if k.startswith("eval_")}
             for x in lines if "eval_accuracy" in x]
    steps, trained = [x for x in lines if "loss" in x], {}
    for name in TRAINED:
        windows = [[x[name] for x in steps[i : i + WINDOW] if x.get(name) is not None]
                   for i in range(0, len(steps), WINDOW)]
        trained[name] = [short(np.mean(window)) if window else None for window in windows]
    about = json.loads((out / "config.json").read_text())["environment"]
    about.pop("command")  # with the paths of this machine
    flags = [flag.replace(str(HERE), "study") for flag in run.flags]
    return dict(name=run.name, **dataclasses.asdict(run), flags=" ".join(flags), environment=about,
                evals=evals, trained=trained)


def do(run: Run, work: Path, file: Path, script: str) -> str:
    """Train a run in a process of its own, append its line; return what went wrong, or ""."""
    out, began = work / run.name, time.time()
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    one = "--one=" + json.dumps([run.place, run.method, run.seed, str(out)])  # some begin with -
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    with (work / f"{run.name}.log").open("w") as log:
        code = subprocess.call([sys.executable, script, one], env=env, stdout=log, stderr=log)
    if code:
        return f"{run.name} ended with {code}: see {work / run.name}.log"
    record = gather(run, out) | dict(seconds=round(time.time() - began), machine=machine())
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    return ""


def read_runs(file: Path) -> dict[str, dict]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def train_all(runs: list[Run], jobs: int, work: Path, file: Path, script: str = __file__) -> bool:
    """Train what has no line in the file yet, `jobs` at a time, each by `script --one=...`; return
    whether all went well."""
    import make_bases

    if not (BASES / "train.jsonl").exists():
        make_bases.make_problems(BASES)
    file.parent.mkdir(parents=True, exist_ok=True)
    done = read_runs(file)
    todo = [run for run in runs if run.name not in done]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done; logs are in {work}", flush=True)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(do, run, work, file, script) for run in todo]
        for task in tqdm(concurrent.futures.as_completed(tasks), "runs", len(runs),
                         initial=len(runs) - len(todo)):
            if wrong := task.result():
                failed += 1
                tqdm.write(wrong)
    if failed:
        print(f"{failed} runs failed, see above; the same command tries them again")
    return not failed


# ---- verdicts -----------------------------------------------------------------------------------


def value(record: dict, metric: tuple) -> float | None:
    """Return a run's value of a claim's metric, None where it has none."""
    where, name, when = metric
    if where == "train":
        values = record["trained"][name]
        if when == "mean":
            return float(np.mean(values))
        return values[-1 if when == "last" else when // WINDOW]
    points = [(x["step"], x[name]) for x in record["evals"] if x.get(name) is not None]
    if when == "last":
        return points[-1][1]
    if isinstance(when, int):
        return dict(points)[when]
    level = float(when[1:])
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if v0 <= level < v1:  # between two evaluations on the line through them
            return s0 + (level - v0) / (v1 - v0) * (s1 - s0)
    return float(points[-1][0])  # not reached: the last step, to the disadvantage of no one else


def pairs(claim: Claim, runs: list[dict]) -> np.ndarray:
    """Return the differences a - b of the seeds that have both."""
    places = (claim.places,) if isinstance(claim.places, str) else claim.places
    values = {(x["place"], x["method"], x["seed"]): value(x, claim.metric) for x in runs
              if x["place"] in places and x["method"] in (claim.a, claim.b)}
    if claim.kind == "found":
        values = {key: float(v > FOUND) for key, v in values.items()}
    return np.array([v - values[place, claim.b, seed] for (place, method, seed), v in values.items()
                     if method == claim.a and (place, claim.b, seed) in values])


def measure(differences: np.ndarray, kind: str, m: int = 1) -> tuple[float, float, float]:
    """Return mean, half width of its simultaneous interval among m (Student's t over seeds) and
    two-sided p: of the t test, or of the exact sign test for "found". Without spread: 0 and 1."""
    n, mean = len(differences), float(differences.mean())
    if np.ptp(differences) < 1e-12:
        return mean, 0.0, 1.0
    error = float(differences.std(ddof=1)) / n**0.5
    half = float(stats.t.ppf(1 - LEVEL / m / 2, n - 1)) * error
    if kind == "found":
        more, fewer = int((differences > 0).sum()), int((differences < 0).sum())
        p = stats.binomtest(more, more + fewer).pvalue
    else:
        p = 2 * stats.t.sf(abs(mean) / error, n - 1)
    return mean, half, float(p)


def holm(values: list[float]) -> list[float]:
    """Return Holm's adjusted p of the claims of a family."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(np.argsort(values)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(claim: Claim, mean: float, half: float, p: float) -> tuple[str, str]:
    """Return "holds", "does not hold" or "not decidable here", and which side of the interval
    decides; p is m times that of one claim, below LEVEL where the interval excludes 0.

    A claim holds if the interval lies above 0 and the estimate reaches the effect; it does not if
    the whole interval lies below the effect; else, and where the differences have no spread, it is
    not decidable. "same" holds if the interval lies within the effect, and does not if it excludes
    0 and the estimate reaches the effect; for "found" the exact sign test says what excludes 0.
    """
    return by_interval(claim, mean, half, p) if half else ("not decidable here", "no spread")


def by_interval(claim: Claim, mean: float, half: float, p: float) -> tuple[str, str]:
    two_sided = claim.kind in ("differs", "same")
    size = abs(mean) if two_sided else mean
    large, small = p < LEVEL and size >= claim.effect, size + half < claim.effect
    sides = ("end nearer 0", "both ends") if two_sided else ("lower end", "upper end")
    side = sides[0] if large else sides[1] if small else "neither end"
    if claim.kind == "same":
        large, small = small, large
    return "holds" if large else "does not hold" if small else "not decidable here", side


def judge(runs: list[dict], claims: list[Claim] = CLAIMS) -> list[dict]:
    """Return for each claim: n, mean, half, p (Holm's), verdict and the side that decides; also the
    verdict "before", by the rule that the study was first judged by: Holm's p for what is
    significant, a plain interval for what is small, without a look at the spread."""
    results = []
    size = Counter(claim.family for claim in claims)
    for claim in claims:
        differences, m = pairs(claim, runs), size[claim.family]
        r = dict(claim=claim, n=len(differences), mean=float("nan"), half=float("inf"), p=1.0,
                 verdict="not run", side="")
        if r["n"] > 1:
            r["mean"], r["half"], r["p"] = measure(differences, claim.kind, m)
            r["verdict"], r["side"] = verdict(claim, r["mean"], r["half"], m * r["p"])
        results.append(r)
    for family in size:
        mine = [r for r in results if r["claim"].family == family]
        for r, p in zip(mine, holm([r["p"] for r in mine]), strict=True):
            r["p"], r["before"] = p, "not run"
            if r["n"] > 1:
                plain = measure(pairs(r["claim"], runs), r["claim"].kind)
                r["before"] = by_interval(r["claim"], *plain[:2], p)[0]
    return results


FRESH = """Fresh seeds (`--confirm`), none of the study's pooled in; what they can show was
calculated before: [power.md](power.md)."""


def judge_later(runs: list[dict], others: list[dict], families: dict, claims: list[Claim],
                about: str) -> dict[str, dict]:
    """Judge what was written down for later, a family's claims on its planned runs alone and only
    when all of them are there. Return for each family: words, how many runs are there; these runs
    and results; pooled, for exploration the results with the pairs of the `others`."""
    done, later = {record["name"]: record for record in runs}, {}
    for family, group in families.items():
        names = [run.name for run in planned([group])]
        mine = [done[name] for name in names if name in done]
        words = f"{len(mine)} of {len(names)} runs are there"
        if len(mine) < len(names):
            mine, words = [], f"{words}; judged when all are"
        own = [claim for claim in claims if claim.family == family]
        later[family] = dict(words=f"{words}. {' '.join(about.split())}", runs=mine,
                             results=judge(mine, own),
                             pooled=judge(mine + others, own) if mine and others else [])
    return later


def entropy_against_dapo(results: list[dict]) -> dict[tuple, dict]:
    """Return for each (place, method) what the first result says of it: the difference of the mean
    entropy from DAPO's, half its interval, the pairs."""
    found = {}
    for r in results:
        claim = r["claim"]
        if claim.metric == ENTROPY and "dapo" in (claim.a, claim.b) and r["n"] > 1:
            method, sign = (claim.a, 1) if claim.b == "dapo" else (claim.b, -1)
            found.setdefault((claim.places, method), dict(
                mean=sign * r["mean"], half=r["half"], pairs=r["n"]))
    return found


def report(out: Path, runs_planned: int) -> None:
    """Judge the runs in out; write summary.md and the pictures there."""
    import pictures
    import readings
    import smollm2
    import why

    runs, fresh, hundred, real, explored = (list(read_runs(out / f"{name}.jsonl").values()) for name
                                            in ("runs", "confirm", "seeds-100/runs", "smollm2",
                                                "why"))
    if not runs:
        sys.exit(f"error: {out} has no runs yet")
    results = judge(runs)
    later = judge_later(fresh, runs + hundred, CONFIRMED, CONFIRM_CLAIMS, FRESH)
    later |= judge_later(real, [], smollm2.PLANNED, smollm2.CLAIMS, smollm2.ABOUT)
    rule = " ".join((RULE + verdict.__doc__.partition("\n\n")[2]).split())
    fresh_first = [r for family in CONFIRMED for r in later[family]["results"]] + results
    entropy = entropy_against_dapo(fresh_first)
    sections = readings.section(runs) + why.section(explored, entropy)
    pictures.write_summary(runs, results, later, sections, runs_planned, rule, out)
    pictures.draw_all(runs, entropy, MAIN, PLACES, out)
    why.draw(explored, entropy, out / "why.png")
    print(f"{out / 'summary.md'}: " + ", ".join(
        f"{n} {v}" for v, n in Counter(r["verdict"] for r in results).most_common()))
    for family, found in later.items():
        print(f"{family}: {found['words']}")


def planned(groups: list[tuple], first_seed: int = 0) -> list[Run]:
    """Return the runs of groups (where, methods, seeds), of each all methods of a seed first."""
    return [Run(place, method, first_seed + seed) for place, methods, seeds in groups
            for seed in (range(seeds) if isinstance(seeds, int) else seeds) for method in methods]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, help="runs at one time, a core each (default: 1, with "
                        "--quick as many as there are cores)")
    parser.add_argument("--quick", action="store_true", help="three runs of 10 steps")
    parser.add_argument("--judge", action="store_true", help="train nothing")
    parser.add_argument("--confirm", action="store_true", help="train the runs of the confirmation")
    parser.add_argument("--first_seed", type=int, default=0, help="of each group (default: 0)")
    parser.add_argument("--out", type=Path, help="default: study/results, runs/study-quick for "
                        "--quick, runs/study-N for --first_seed N")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        *run, out = args.one
        return train_one(Run(*run), Path(out))
    out = args.out or (Path("runs/study-quick") if args.quick else HERE / "results" if not
                       args.first_seed else Path(f"runs/study-{args.first_seed}"))
    runs = planned(QUICK if args.quick else GROUPS, args.first_seed)
    if args.confirm:
        todo, file = planned(list(CONFIRMED.values())), out / "confirm.jsonl"
    else:
        todo, file = runs, out / "runs.jsonl"
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if args.quick else 1)
    good = args.judge or train_all(todo, jobs, args.work, file)
    report(out, len(runs))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
