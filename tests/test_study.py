"""The study: its problems, what it takes for the right strategy, its verdicts, a quick run."""

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

sys.path[:0] = [str(ROOT / "study"), str(ROOT / "demo")]
import make_bases  # noqa: E402
import make_demo  # noqa: E402
import power  # noqa: E402
import readings  # noqa: E402
import smollm2  # noqa: E402
import why  # noqa: E402

import a3po  # noqa: E402
import study  # noqa: E402


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    warm_up = make_bases.make_problems(folder)
    read = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
            for name in ("train", "plain", "traps")}
    return read | dict(warm_up=warm_up)


def left_to_right(row):
    values, ops = row["problem"].strip("Compute .").replace("*", "+").split("+"), [
        c for c in row["problem"] if c in "+*"]
    return make_demo.left_to_right(list(map(int, values)), ops)


def test_a_quarter_are_traps_and_nothing_is_shared(problems):
    texts = [{row["problem"] for row in problems[name]} for name in problems]
    assert sum(map(len, texts)) == len(set.union(*texts))
    for name, share in (("train", 0.25), ("plain", 0), ("traps", 1), ("warm_up", 0.25)):
        rows = problems[name]
        assert all(eval(row["problem"][8:-1]) == int(row["answer"]) for row in rows)
        assert "1" not in "".join(row["problem"] for row in rows)
        shortcut_fails = sum(left_to_right(row) != int(row["answer"]) for row in rows)
        assert shortcut_fails == pytest.approx(share * len(rows), abs=1)


@pytest.mark.parametrize("response, right", [
    ("First 4*4=16, check 4*4=16, so 2*2=4, then 16+4=20. So \\boxed{20}", True),
    ("2*2=4; 4*4=16; 4+16=20, giving \\boxed{20}", True),
    ("4*2=8; 8+2=10; 10*2=20. So \\boxed{20}", False),  # luck
    ("4*4=16; 16+2=18; 18+2=20. So \\boxed{20}", False),  # one product is missing
    ("", False),
])
def test_luck_is_told_from_precedence(response, right):
    assert make_bases.by_precedence("Compute 4*4+2*2.", response) == right


def test_every_right_demonstration_is_by_precedence(problems):
    rng = random.Random(0)
    for row in problems["traps"]:
        shown = make_demo.demonstrate(rng, **row, strategies={"precedence": 1})
        slipped = any(eval(f"{a}{op}{b}") != int(c)
                      for op, a, b, c in make_bases.steps_of(shown))
        assert slipped or make_bases.by_precedence(row["problem"], shown)


def test_distinct_is_the_expected_number_of_derivations_among_four():
    texts = ["1+2=3", "2+1=3, so", "1+2=3", "1*2=2", "1*3=3", "9+9=18"]
    group = [dict(correct=True, response=text) for text in texts]
    rng, derivations = random.Random(0), [0, 0, 0, 1, 2, 3]
    drawn = np.mean([len(set(rng.sample(derivations, 4))) for _ in range(20_000)])
    assert make_bases.distinct_of_4([group]) == pytest.approx(drawn, abs=0.02)
    assert make_bases.distinct_of_4([group[:3]]) is None


# ---- verdicts -----------------------------------------------------------------------------------


def record(place, method, seed, accuracy, entropy=0.4):
    evals = [dict(step=s, accuracy=a, **{"pass@8": a, "pass@32": a}, plain_accuracy=a) for s, a in
             zip((0, 25, 50, 75, 100), accuracy, strict=True)]
    trained = {name: [entropy] * 10 for name in study.TRAINED}
    return dict(name=f"{place}-{method}-seed{seed}", place=place, method=method, seed=seed,
                evals=evals, trained=trained)


def test_values_of_a_run():
    x = record("saturating", "a3po", 0, [0.0, 0.05, 0.15, 0.3, 0.9])
    x["trained"]["reward"] = list(range(10))
    for metric, expected in ((("eval", "accuracy", 50), 0.15), (("eval", "accuracy", "last"), 0.9),
                             (("eval", "accuracy", ">0.1"), 37.5), (("train", "reward", 30), 3),
                             (("eval", "accuracy", ">0.95"), 100.0),  # not reached
                             (("train", "reward", "mean"), 4.5), (("train", "reward", "last"), 9)):
        assert study.value(x, metric) == pytest.approx(expected), metric


def test_intervals_against_a_slow_one():
    """Student's t by permutation-free textbook numbers: n = 5, t(.975, 4) = 2.7764."""
    differences = np.array([0.1, 0.3, 0.2, 0.4, 0.5])
    mean, half, p = study.measure(differences, "more")
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.7764 * math.sqrt(0.025) / math.sqrt(5), rel=1e-4)
    assert p == pytest.approx(0.01324, rel=1e-2)  # t = 4.243
    assert study.measure(np.array([1.0, 1, 1, 0, 1, 1]), "found")[2] == pytest.approx(2 / 32)
    assert study.measure(differences, "more", 5)[1] == pytest.approx(  # t(.995, 4) = 4.6041
        4.6041 * math.sqrt(0.025) / math.sqrt(5), rel=1e-4)
    assert study.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


@pytest.mark.parametrize("kind, mean, half, p, expected, side", [
    ("more", 0.2, 0.05, 0.01, "holds", "lower end"),
    ("more", 0.2, 0.25, 0.2, "not decidable here", "neither end"),
    ("more", 0.02, 0.05, 0.3, "does not hold", "upper end"),
    ("more", -0.5, 0.05, 0.001, "does not hold", "upper end"),
    ("more", 0.05, 0.04, 0.01, "does not hold", "upper end"),  # above 0, too small to matter
    ("more", 0.2, 0.05, 0.06, "not decidable here", "neither end"),
    ("differs", -0.2, 0.05, 0.01, "holds", "end nearer 0"),
    ("differs", 0.01, 0.02, 0.5, "does not hold", "both ends"),
    ("same", 0.01, 0.02, 0.5, "holds", "both ends"),
    ("same", -0.2, 0.05, 0.01, "does not hold", "end nearer 0"),
    ("same", 0.05, 0.2, 0.5, "not decidable here", "neither end"),
    *((kind, mean, 0.0, 1.0, "not decidable here", "no spread")
      for kind in ("more", "differs", "same", "found") for mean in (0.0, 1.0)),
])
def test_verdicts_follow_the_rule(kind, mean, half, p, expected, side):
    claim = study.Claim("f", "t", "s", "saturating", "a", "b", study.END, 0.1, kind)
    assert study.verdict(claim, mean, half, p) == (expected, side)


@pytest.mark.parametrize("kind", ["more", "differs", "same", "found"])
def test_differences_without_spread_decide_nothing(kind):
    """Both at the ceiling, or rounded to the same difference, whatever its size."""
    claim = study.Claim("f", "t", "s", "saturating", "a", "b", study.END, 0.1, kind)
    for values in (np.zeros(3), np.ones(20), np.array([0.3, 0.4, 0.7]) - [0.2, 0.3, 0.6]):
        found = study.verdict(claim, *study.measure(values, kind))
        assert found == ("not decidable here", "no spread")


def test_three_verdicts_come_from_one_interval():
    """A family of ten: what an interval of one claim alone would decide either way is undecided."""
    rng = np.random.default_rng(3)
    differences = rng.normal(0, 1, 8)
    differences = (differences - differences.mean()) / differences.std(ddof=1)
    for mean, kind, alone in ((0.9, "more", "holds"), (0.9, "same", "does not hold"),
                              (0.0, "more", "does not hold"), (0.0, "same", "holds")):
        claim = study.Claim("f", "t", "s", "saturating", "a", "b", study.END, 0.86, kind)
        for m, expected in ((1, alone), (10, "not decidable here")):
            middle, half, p = study.measure(differences + mean, kind, m)
            assert study.verdict(claim, middle, half, m * p)[0] == expected


def test_what_is_significant_is_what_the_interval_says():
    rng = np.random.default_rng(5)
    for n, m in ((3, 1), (3, 8), (20, 6), (30, 13)):
        for _ in range(100):
            mean, half, p = study.measure(rng.normal(0.5, 1, n), "more", m)
            assert (m * p < study.LEVEL) == (abs(mean) > half)


def test_planted_runs_are_judged_by_pairs_of_seeds():
    rng, runs = np.random.default_rng(0), []
    for seed in range(20):
        level = rng.normal(0.3, 0.1)  # what a seed's two runs share, far larger than the noise
        for method, gain in (("a3po", 0.2), ("dapo", 0.0)):
            accuracy = [0, 0, level + gain + rng.normal(0, 0.02), 0.5, 0.5]
            runs.append(record(study.MAIN, method, seed, accuracy))
    [ahead] = [r for r in study.judge(runs)
               if r["claim"].text == "on traps A3PO is ahead of DAPO at step 50"]
    assert ahead["n"] == 20 and ahead["verdict"] == "holds"
    assert ahead["mean"] == pytest.approx(0.2, abs=0.02) and ahead["half"] < 0.03
    family = [claim for claim in study.CLAIMS if claim.family == "exploration"]
    alone = study.measure(study.pairs(ahead["claim"], runs), "more")[1]
    assert ahead["half"] == pytest.approx(alone * 3.2906 / 2.0930, rel=1e-4)  # t(1-.05/26), t(.975)
    assert len(family) == 13 and ahead["before"] == "holds"
    assert study.pairs(ahead["claim"], runs[:-1]).shape == (19,)
    assert {r["verdict"] for r in study.judge([])} == {"not run"}


def test_false_claims_seldom_hold():
    """Of 400 claims about noise, each alone in its family, at most about 5 % are significant."""
    rng = np.random.default_rng(1)
    claim = study.Claim("f", "t", "s", "saturating", "a", "b", study.END, 0.0, "differs")
    held = [study.verdict(claim, *study.measure(rng.normal(0, 1, 5), "differs"))[0] == "holds"
            for _ in range(400)]
    assert sum(held) <= 32


def test_claims_and_runs_fit_each_other():
    runs = study.planned(study.GROUPS)
    assert len({run.name for run in runs}) == len(runs) == 239
    there = {(run.place, run.method) for run in runs}
    steps = {"shortcut": range(0, 151, 25), "saturating": range(0, 101, 20)}
    for claim in study.CLAIMS:
        places = (claim.places,) if isinstance(claim.places, str) else claim.places
        for place in places:
            assert {(place, claim.a), (place, claim.b)} <= there, claim
            if claim.metric[0] == "eval" and isinstance(claim.metric[2], int):
                assert claim.metric[2] in steps[place.partition("-")[0]]
        assert claim.effect > 0 and claim.kind in ("more", "same", "differs", "found")
    for x in {(x.place, x.method): x for x in runs}.values():
        a3po.check_config(a3po.parse_args(x.flags))


def test_the_lists_of_claims_are_those_written_down_before_the_runs():
    """The study's as of its first run, the confirmation's as of its first."""
    for claims, digest in ((study.CLAIMS, "c967c42664151e5f"),
                           (study.CONFIRM_CLAIMS, "1516b40e97bcb7ca")):
        text = json.dumps([dataclasses.astuple(claim) for claim in claims])
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def confirmed(entropy, count=90):
    runs = []
    for x in study.planned([study.CONFIRMED["confirmation"]])[:count]:
        level = 0.4 + 0.001 * (x.seed * 7 % 11) + entropy * (x.method == "a3po")
        runs.append(record(x.place, x.method, x.seed, [0, 0, 0.1, 0.2, 0.3], level))
    return runs


def judge_confirmation(runs, others=()):
    later = study.judge_later(runs, list(others), study.CONFIRMED, study.CONFIRM_CLAIMS, "Fresh.")
    assert later["cells again"]["words"].startswith("0 of 90 runs are there; judged")
    return later["confirmation"]


def test_a_confirmation_is_judged_once_and_on_its_own_seeds():
    """Not before the last of its runs is there, and no other seed's run is pooled in."""
    part = judge_confirmation(confirmed(0.1, 89))
    assert {r["verdict"] for r in part["results"]} == {"not run"} and not part["pooled"]
    assert part["words"] == "89 of 90 runs are there; judged when all are. Fresh."
    whole = confirmed(0.1)
    for x in whole:
        x["trained"]["entropy"][0] += 1e-4 * (x["seed"] % 3) * (x["method"] == "a3po")
    strangers = [record(study.MAIN, m, 0, [0] * 5, 9.0 * (m == "dapo")) for m in ("a3po", "dapo")]
    found = judge_confirmation(whole + strangers, strangers)
    assert found["words"] == "90 of 90 runs are there. Fresh."
    first = found["results"][0]
    assert (first["n"], first["verdict"]) == (30, "holds")
    assert first["mean"] == pytest.approx(0.1, abs=1e-3)
    assert found["results"][2]["side"] == "no spread"
    assert {run["seed"] for run in found["runs"]} == {*range(200, 230)} and not part["runs"]
    assert [r["n"] for r in found["pooled"]] == [31, 30, 31, 30, 31, 31]


def test_a_stop_of_the_confirmation_leaves_complete_pairs():
    """All methods of a seed come before those of the next; no seed is one of the study's."""
    runs = study.planned(list(study.CONFIRMED.values()))
    assert len({run.name for run in runs}) == len(runs) == 180
    assert [run.method for run in runs[:6]] == ["a3po", "dapo", "random"] * 2
    for part in (runs[:90], runs[90:]):
        assert [run.seed for run in part] == sorted(run.seed for run in part)
    assert min(run.seed for run in runs) == 200 > max(run.seed for run in
                                                      study.planned(study.GROUPS, 100))
    there = {(run.place, run.method) for run in runs}
    for claim in study.CONFIRM_CLAIMS:
        assert {(claim.places, claim.a), (claim.places, claim.b)} <= there


@pytest.mark.parametrize("method", study.METHODS)
def test_any_run_can_be_named_to_its_process(method, tmp_path, monkeypatch):
    """Also those whose method begins with a minus, as an option does."""
    wanted, commands, seen = study.Run("saturating", method, 7), [], []
    monkeypatch.setattr(study.subprocess, "call", lambda line, **_: commands.append(line) or 1)
    monkeypatch.setattr(study, "train_one", lambda *found: seen.append(found))
    assert "ended with 1" in study.do(wanted, tmp_path, tmp_path / "runs.jsonl", study.__file__)
    monkeypatch.setattr(sys, "argv", commands[0][1:])
    study.main()
    assert seen == [(wanted, tmp_path / wanted.name)]


def test_random_tokens_are_as_many(monkeypatch):
    """The control replaces the choice alone, and differs from it."""
    seen = {}
    monkeypatch.setattr(a3po, "main", lambda flags: seen.update(choose=a3po.smallest))
    monkeypatch.setattr(a3po, "smallest", a3po.smallest)
    monkeypatch.setattr(a3po, "run_eval", a3po.run_eval)
    original = a3po.smallest
    if not (study.BASES / "plain.jsonl").exists():
        make_bases.make_problems(study.BASES)
    study.train_one(study.Run("quick-4", "random", 0), ROOT / "nowhere")
    mask = torch.arange(30) < torch.tensor([[30], [1], [12]])
    values = torch.arange(90.0).view(3, 30)
    chosen, ours = (choose(values, mask, 0.2) for choose in (seen["choose"], original))
    assert chosen.sum(1).tolist() == ours.sum(1).tolist() == [6, 1, 2]
    assert not (chosen & ~mask).any() and not torch.equal(chosen, ours)


def test_what_the_readmes_quote_is_in_the_summary_and_that_in_the_runs(tmp_path, monkeypatch):
    results = ROOT / "study" / "results"
    summary = (results / "summary.md").read_text()
    for readme in ("README.md", "demo/README.md"):
        quoted = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", (ROOT / readme).read_text())
        assert not [figure for figure in quoted if figure not in summary]
    for undecided, claims in re.findall(r"(\d+) of (\d+) claims", (ROOT / "README.md").read_text()):
        assert f"{claims} claims: " in summary and f" {undecided} are not decidable" in summary
    [undecided] = re.findall(r"all (\d+) on SmolLM2", (ROOT / "README.md").read_text())
    assert f"; smollm2: {undecided} are not decidable here." in summary
    again = Path(shutil.copytree(results, tmp_path / "again"))
    (again / "summary.md").unlink()
    monkeypatch.setattr("pictures.draw_all", lambda *_: None)
    study.report(again, 239)
    assert (again / "summary.md").read_text() == summary


# ---- what goes with it --------------------------------------------------------------------------


def test_foretold_is_what_a_small_step_does_to_entropy(monkeypatch):
    """Thirty places with their own logits: sampled tokens, some of which weigh twice, push them by
    w A (onehot - p); the natural gradient pushes by w A itself."""
    rng = np.random.default_rng(0)
    logits, gain = rng.normal(0, 1.5, (30, 5)), rng.normal(0.3, 1, (30, 5))

    def entropies(logits):
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return p, -(p * np.log(p)).sum(1)

    p, entropy = entropies(logits)
    gain = (gain + (p < 0.2)) * np.where(p < 0.2, 2, 1)
    tokens = 2000 * len(p)
    counts = np.array([rng.multinomial(2000, row) for row in p])
    place, token = np.repeat(np.indices(p.shape).reshape(2, -1), counts.ravel(), axis=1)
    monkeypatch.setattr(why, "LIKE", 30)
    found = why.estimates(*(torch.tensor(x) for x in (
        np.log(p)[place, token], entropy[place], gain[place, token])))
    step = 1e-4 / tokens
    for form, push in (
            ("gradient", counts * gain - p * (counts * gain).sum(1, keepdims=True)),
            ("natural", tokens / len(p) * gain)):
        change = (entropies(logits + step * push)[1] - entropy).sum() / step / tokens
        assert change > 0.05 and found[form] == pytest.approx(change, rel=0.05), form


def test_a_step_is_read_from_the_tokens_of_its_responses():
    """Those without a gradient count as tokens and push nothing; A3PO's weights are a3po.py's."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        length, right = 5 + i, i % 2 == 0
        old = np.log(rng.uniform(0.1, 1, length))
        rows.append(dict(step=0, correct=right, advantage=1.0 if right else -1.0, old=list(old),
                         new=list(old), entropy=list(rng.uniform(0, 1, length)),
                         weight=[1.0] * length))
    rows[1]["new"] = [x - 0.5 for x in rows[1]["old"]]  # a wrong one that has fallen: clipped
    found = why.foretold(rows, "saturating")
    assert found["tokens"] == sum(range(5, 13)) and found["clipped"] == pytest.approx(6 / 68)
    for form in why.FORMS:
        assert found[f"{form} own"] == found[f"{form} flat"] != found[f"{form} a3po"]
    doubled = [row | dict(weight=[2.0] * len(row["old"])) for row in rows]
    assert why.foretold(doubled, "saturating")["natural own"] == 2 * found["natural own"]
    silent = [row | dict(weight=None, new=None) for row in rows]
    assert why.foretold(silent, "saturating")["natural own"] == 0


def test_readings_are_compared_with_one_deviation_for_all():
    """The seeds' and the methods' own levels do not count; noise of 1 gives differences of 1.41."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (9, 400))
    levels = 5.0 * np.arange(9)[:, None] + rng.normal(0, 30, 400)
    differences, half, deviation = readings.compare(noise + levels)
    assert deviation == pytest.approx(2**0.5, rel=0.05)
    assert half == pytest.approx(2.73 * 2**0.5 / 20, rel=0.05)  # the normal's quantile at .05 / 16
    assert differences == pytest.approx(5.0 * np.arange(1, 9), abs=0.3)
    assert readings.decide(0.2, 0.05, 0.1) == readings.decide(-0.2, 0.05, 0.1) == "**matters**"
    assert readings.decide(0.02, 0.05, 0.1) == "does not"
    assert readings.decide(0.2, 0.3, 0.1) == readings.decide(0.05, 0.06, 0.1) == "?"


def test_power_is_small_where_nothing_is_true_and_whole_where_much_is():
    claims = [claim for claim in study.CONFIRM_CLAIMS if claim.family == "confirmation"]
    found = np.random.default_rng(0).normal(0.1, 0.1, (6, 20))
    for scale, least, most in ((0, 0.0, study.LEVEL), (20, 1.0, 1.0)):
        for held in power.draw(found, claims, scale, 30):
            assert least <= held.any(1).mean() <= most


def test_hard_word_problems_are_right_and_split_by_their_numbers(tmp_path):
    smollm2.make_problems(tmp_path)
    numbers = {}
    for name in ("hard_train", "hard_test"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        assert len({row["problem"] for row in rows}) == len(rows) == (128 if "test" in name else
                                                                      4196)
        for row in rows:
            a, b = map(int, re.findall(r"\d+", row["problem"]))
            right = a + b if row["id"].startswith("gets") else a - b
            assert int(row["answer"]) == right and a > 12 and b > 12
        numbers[name] = {frozenset(row["id"].split("-")[1:]) for row in rows}
    assert not numbers["hard_train"] & numbers["hard_test"]
    for x in study.planned([*smollm2.PLANNED.values()]):
        config = a3po.parse_args(smollm2.Run(x.place, x.method, x.seed).flags)
        assert config.template.endswith("<|im_start|>assistant\n") and config.steps == 20
        assert a3po.decayed_rho(2.0, 19, config.decay_rate) == pytest.approx(1.05)


@pytest.mark.slow
def test_the_quick_study(tmp_path):
    flags = ["--quick", f"--out={tmp_path}/out", f"--work={tmp_path}/work"]
    done = run("study/study.py", *flags, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").open()]
    assert {line["method"] for line in lines} == {"a3po", "dapo", "random"}
    for line in lines:
        assert [x["step"] for x in line["evals"]] == [0, 10] and line["seconds"] > 0
        assert len(line["trained"]["entropy"]) == 1
        assert max(line["trained"]["ratio_max_deviation"]) == 0
        assert str(tmp_path) not in json.dumps(line)
    assert "3 of 3 runs" in (tmp_path / "out/summary.md").read_text()
    assert len(list((tmp_path / "out").glob("*.png"))) == 7
    again = subprocess.run([sys.executable, "study/study.py", *flags], cwd=ROOT, timeout=100,
                           capture_output=True, text=True)
    assert "3 runs, 3 of them done" in again.stdout  # nothing is trained twice
