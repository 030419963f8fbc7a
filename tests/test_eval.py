"""Evaluation: the estimators, every benchmark's rows, resuming, ranks, the words for metrics,
comparisons, pictures."""

import base64
import itertools
import json
import math
import pickle
import re
import zlib
from argparse import Namespace

import numpy as np
import pytest
from conftest import ROOT, kill, run, start, wait_for

import eval as evaluation
import rollout
import verify
from rollout import Problem, Prompt, Sample
from shelf import metrics as words
from shelf import report
from shelf.ranks import UsageError
from verify import Grade, Graders

# ---- estimators ---------------------------------------------------------------------------------


def test_pass_at_k_is_the_exact_combinatorial_value():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([i < c for i in range(n)], k))
                exact = sum(map(any, draws)) / len(draws)
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12), (n, c, k)
    n, c, k = 1024, 3, 512
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over simulated samples its mean is 1 - (1 - p)^k; the plug-in 1 - (1 - c/n)^k is not."""
    rng = np.random.default_rng(0)
    n, k, p = 8, 4, 0.15
    counts = rng.binomial(n, p, 100_000)
    truth = 1 - (1 - p) ** k
    values = np.array([evaluation.pass_at_k(n, c, k) for c in range(n + 1)])
    assert values[counts].mean() == pytest.approx(truth, abs=0.004)
    assert abs(np.mean(1 - (1 - counts / n) ** k) - truth) > 0.02


def records(correct: list[int], answers: list | None = None, name="b", identity="0") -> list[dict]:
    answers = answers or [str(i) for i in range(len(correct))]
    return [
        dict(benchmark=name, id=identity, sample=j, seed=j, correct=bool(c), extracted=a, length=10,
             status="ok" if a is not None else "no_answer", finish_reason="stop", logprob=-5.0,
             response="r")
        for j, (c, a) in enumerate(zip(correct, answers, strict=True))
    ]


@pytest.mark.parametrize("code, counts", [
    ("import numpy as np\nprint(1)", 1), ("def f():\n    from torch.nn import Linear", 1),
    ("import os, sys\nfrom collections import deque", 0), ("print('import numpy')", 0),
    (None, 0), ("\n" * 100_000 + " " * 100_000, 0)])
def test_programs_that_lack_a_module_are_counted(code, counts):
    both = records([0, 1], [code, code])
    assert evaluation.summarize("code", [[dict(record, kind="code") for record in both]])[
        "missing_modules"] == counts
    assert evaluation.summarize("math", [both])["missing_modules"] == 0


def test_standard_error_is_that_of_a_bootstrap_over_problems():
    rng = np.random.default_rng(1)
    p = rng.beta(0.5, 0.5, 200)  # problems differ much: the samples of one are correlated
    correct = rng.random((200, 8)) < p[:, None]
    metrics = evaluation.summarize("code", [records(row.tolist()) for row in correct])
    means = correct.mean(1)
    bootstrap = np.std([means[rng.integers(0, 200, 200)].mean() for _ in range(4000)])
    assert metrics["accuracy"] == pytest.approx(correct.mean())
    assert metrics["accuracy_stderr"] == pytest.approx(bootstrap, rel=0.05)
    naive = correct.std() / correct.size**0.5
    assert metrics["accuracy_stderr"] > 1.5 * naive


@pytest.mark.parametrize(
    "correct, answers, expected",
    [
        ([1, 1, 0], ["2", "2", "3"], 1.0),
        ([1, 0, 0], ["2", "3", "3"], 0.0),
        ([1, 1, 0, 0], ["2", "2", "3", "3"], 0.5),  # a tie of two
        ([1, 0, 0], ["2", "3", "4"], 1 / 3),  # a tie of three
        ([1, 0, 0, 0], ["2", None, None, None], 1.0),  # no answer is no vote
        ([0, 0], [None, None], 0.0),
        ([1, 1, 0, 0, 0], ["1/2", "\\frac{1}{2}", "3", "3", "0.25"], 0.5),  # 1/2 = \frac12
        ([0, 0, 1], ["0.25", "\\frac14", "5"], 0.0),  # equal wrong answers vote together too
    ],
)
def test_majority(correct, answers, expected):
    assert evaluation.majority("math", records(correct, answers)) == pytest.approx(expected)


def test_summary():
    groups = [records([1, 0], ["2", None]), records([0, 0], ["1", "1"])]
    groups[0][1].update(finish_reason="length", length=30, status="timeout")
    metrics = evaluation.summarize("math", groups)
    wanted = dict(accuracy=0.25, accuracy_stderr=0.25, length=15, truncated=0.25, timeouts=1,
                  problems=2, n=2, entropy=20 / 60, no_answer=0)
    assert {key: metrics[key] for key in wanted} == pytest.approx(wanted)
    assert metrics["pass@2"] == 0.5 and metrics["maj@2"] == 0.5
    assert "maj@2" not in evaluation.summarize("code", groups)
    assert [k for k in evaluation.summarize("code", [records([0] * 12)]) if "pass" in k] == [
        "pass@1", "pass@2", "pass@4", "pass@8"]


# ---- benchmarks ---------------------------------------------------------------------------------


def lines(path):
    return [row for _, row in verify.read_jsonl(path, skip_broken=True)]


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(name, folder, **flags):
    args = evaluation.parse_args(["--model=m", f"--data-dir={folder}"])
    args = Namespace(**vars(args) | flags)
    return evaluation.load_benchmark(name, evaluation.BENCHMARKS[name], args)


def gpqa_rows(count):
    """GPQA's columns around invented questions."""
    return [
        {"Record ID": f"rec{i}", "Question": f"Which one is {i}?", "Correct Answer": f"right {i}\n",
         "Incorrect Answer 1": f"wrong {i}.1", "Incorrect Answer 2": f"wrong {i}.2",
         "Incorrect Answer 3": f"wrong {i}.3", "Subdomain": "-"}
        for i in range(count)
    ]


def lcb_row(i, day="2024-09-01", starter="", func=None):
    """A problem in LiveCodeBench's format: print or return the sum of two numbers."""
    form = "functional" if func else "stdin"
    join = "\n" if func else " "
    public = [dict(input=f"1{join}2", output="3", testtype=form)]
    private = [dict(input=f"{i}{join}{i}", output=str(2 * i), testtype=form)]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode()
    return dict(
        question_id=f"q{i}", question_title="sum", question_content=f"Sum two numbers ({i}).",
        platform="none", contest_date=f"{day}T00:00:00", starter_code=starter, difficulty="easy",
        public_test_cases=json.dumps(public), private_test_cases=packed,
        metadata=json.dumps({"func_name": func} if func else {}),
    )


@pytest.mark.parametrize(
    "name, file, row, identity, reference",
    [
        ("aime24", "aime24.jsonl", dict(id=60, problem="p", answer="204", solution="x"), "60",
         "204"),
        ("aime24", "aime24.jsonl", dict(id=60, problem="p", solution="a \\boxed{204}"), "60",
         "204"),
        ("aime25", "aime25.jsonl", dict(id="0", problem="p", answer=70), "0", "70"),
        ("math500", "math500.jsonl", dict(unique_id="test/a/1.json", problem="p",
                                           answer="\\frac{1}{2}"), "test/a/1.json", "\\frac{1}{2}"),
        ("gsm8k", "gsm8k_test.jsonl", dict(question="p", answer="so\n#### 1,200"),
         "gsm8k_test.jsonl:1", "1,200"),
    ],
)
def test_math_rows(tmp_path, name, file, row, identity, reference):
    write(tmp_path / file, [row])
    [problem] = load(name, tmp_path)
    assert (problem.id, problem.text, problem.reference) == (identity, "p", reference)


def test_gpqa_shuffles_by_question_alone(tmp_path):
    rows = gpqa_rows(40)
    write(tmp_path / "gpqa_diamond.jsonl", rows)
    problems = load("gpqa", tmp_path)
    letters = [p.reference for p in problems]
    for i, problem in enumerate(problems):
        assert f"\n{problem.reference}) right {i}" in problem.text
        assert all(f") wrong {i}.{j}" in problem.text for j in (1, 2, 3))
        assert (problem.id, problem.kind) == (f"rec{i}", "choice")
        assert problem.options == {"n_choices": 4, "unpublished": True}
    assert all(4 <= letters.count(x) <= 18 for x in "ABCD")  # 40 fair draws
    write(tmp_path / "gpqa_diamond.jsonl", rows[::-1])
    assert [p.reference for p in load("gpqa", tmp_path)] == letters[::-1]


@pytest.mark.parametrize("row, kept", [
    (dict(problem="1+1?", answer="2"), True),
    (dict(prompt="1+1?", answer="2", unpublished=True), False),
    (gpqa_rows(1)[0], False)])
def test_what_is_not_published_is_not_kept(row, kept, tmp_path):
    """GPQA's questions, whatever the file's name, and what a row says of itself."""
    write(tmp_path / "mine.jsonl", [row])
    kind = "math" if "answer" in row else "choice"
    bench = evaluation.Benchmark(str(tmp_path / "mine.jsonl"), kind=kind)
    args = Namespace(data_dir="", lcb_release=0, lcb_from="", lcb_to="", limit=0)
    [problem] = evaluation.load_benchmark("mine", bench, args)
    sample = Sample(Prompt(problem, [1]), np.ones(1), np.ones(1), "stop", "r", Grade(False, None))
    [record] = evaluation.make_records("mine", Prompt(problem, [1]), 0, [sample])
    assert record.get("problem") == (problem.text if kept else None)


def test_gpqa_csv(tmp_path):
    import csv

    rows = gpqa_rows(3)
    with open(tmp_path / "gpqa_diamond.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert len(load("gpqa", tmp_path)) == 3


def test_livecodebench_files_and_window(tmp_path):
    write(tmp_path / "test.jsonl", [lcb_row(1, "2024-01-31"), lcb_row(2, "2024-08-01")])
    write(tmp_path / "test2.jsonl", [lcb_row(3, "2025-01-31"), lcb_row(4, "2025-02-01")])
    ids = lambda **flags: [p.id for p in load("livecodebench", tmp_path, **flags)]  # noqa: E731
    assert ids() == ["q1", "q2", "q3", "q4"]
    assert ids(lcb_release=1) == ["q1", "q2"]
    assert ids(lcb_from="2024-08-01", lcb_to="2025-01-31") == ["q2", "q3"]
    assert ids(lcb_from="2025-02-01") == ["q4"]
    with pytest.raises(UsageError, match="has no test3.jsonl$"):
        ids(lcb_release=3)
    with pytest.raises(UsageError, match="no problems with a contest date in 2030-01-01"):
        ids(lcb_from="2030-01-01")


def test_livecodebench_prompts(tmp_path):
    starter = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    write(tmp_path / "test.jsonl", [lcb_row(1), lcb_row(2, starter=starter, func="add")])
    plain, functional = load("livecodebench", tmp_path)
    assert "standard input" in plain.text and "starter" not in plain.text
    assert "def add(self, a: int, b: int)" in functional.text
    assert functional.kind == "code" and "private_test_cases" in functional.reference


@pytest.mark.parametrize("name, file", [
    ("aime24", "aime24.jsonl"), ("math500", "math500.jsonl"), ("gpqa", "gpqa_diamond.jsonl"),
    ("livecodebench", "test.jsonl or test2.jsonl")])
def test_a_missing_file_is_named(tmp_path, name, file):
    with pytest.raises(UsageError, match=f"benchmark {name}: .* has no {file}"):
        load(name, tmp_path)


def test_repeated_rows_are_counted_and_equal_ids_told_apart(tmp_path, capsys):
    rows = [dict(id=1, problem=p, answer="2") for p in "aab"]
    write(tmp_path / "aime24.jsonl", rows)
    assert len({p.id for p in load("aime24", tmp_path)}) == 2
    assert "1 of 3 rows repeat" in capsys.readouterr().out


# ---- sampling, with an engine that says what it is told -----------------------------------------


class Script:
    """Engine and tokenizer: response j to a prompt is answers(prompt's first id, j)."""

    tensor_parallel, max_model_len, chat_template = 1, 50, None
    stop_ids, pad_token_id, bos_token_id = (), None, None

    def __init__(self, answers):
        self.answers, self.texts, self.sampled = answers, {}, []

    def generate(self, prompts, n, seeds, **_):
        for i in reversed(range(len(prompts) * n)):  # responses end in any order
            prompt = prompts[i // n]
            self.texts[i] = self.answers(prompt.ids[0], i % n)
            self.sampled.append((prompt.ids[0], i % n))
            yield i, Sample(prompt, np.array([i]), np.array([-0.5], np.float32), "stop")

    def decode(self, ids, **_):
        return self.texts[int(ids[0])]


def test_all_kinds_are_graded_and_every_row_counts(tmp_path):
    write(tmp_path / "gpqa_diamond.jsonl", gpqa_rows(3))
    starter = "class Solution:\n    def add(self, a, b):\n        "
    write(tmp_path / "test.jsonl", [lcb_row(1), lcb_row(2, starter=starter, func="add")])
    choice, code = load("gpqa", tmp_path), load("livecodebench", tmp_path)
    function = "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```"
    program = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    scripts = {
        "choice": lambda i, j: f"\\boxed{{{choice[i].reference}}}" if j else "Answer: E",
        "code": lambda i, j: ("no code", function if i else program)[j],
    }
    with Graders(workers=1) as graders:
        judge = rollout.judge_by_rules(graders)
        for kind, problems in (("choice", choice), ("code", code)):
            engine, kept = Script(scripts[kind]), []
            prompts = [Prompt(problem, [i]) for i, problem in enumerate(problems)]
            prompts.append(Prompt(Problem("long", "too long", "A", kind), [9] * 50))
            metrics, groups = evaluation.evaluate(
                engine, engine, judge, prompts, n=2, seed=0, name=kind, keep=kept.append,
                max_tokens=9)
            assert [[r["correct"] for r in group] for group in groups] == [
                *[[False, True]] * len(problems), [False, False]]
            assert metrics["problems"] == len(prompts) and metrics["prompts_too_long"] == 1
            assert len(kept) == len(prompts)
            assert len({r["seed"] for group in groups for r in group}) == 2 * len(prompts)
            text = json.dumps(groups)  # GPQA's questions are not in it
            assert [problem.text[:12] in text for problem in problems] == (
                [kind == "code"] * len(problems))
            again = Script(scripts[kind])  # what is finished is not sampled again
            finished = {problems[0].id: groups[0]}
            assert evaluation.evaluate(again, again, judge, prompts, n=2, seed=0, name=kind,
                                       finished=finished, max_tokens=9)[1] == groups
            assert 0 not in [i for i, _ in again.sampled] and len(again.sampled) == 2 * (
                len(problems) - 1)


def test_grading_overlaps_and_problems_are_kept_while_others_run():
    order = []
    engine = Script(lambda i, j: order.append("sampled") or "\\boxed{1}")
    prompts = [Prompt(Problem(str(i), f"p{i}", "1"), [i]) for i in range(3)]
    with Graders(workers=1) as graders:
        evaluation.evaluate(engine, engine, rollout.judge_by_rules(graders), prompts, n=2, seed=0,
                            max_tokens=9, keep=lambda group: order.append("kept"))
    assert order == ["sampled", "sampled", "kept"] * 3


def test_each_rank_hands_on_the_records_of_its_own_share_alone(tmp_path, monkeypatch):
    """Two ranks, one after the other, with what they would gather: the result of one rank. What
    goes from rank to rank are records, without a problem's text."""
    write(tmp_path / "gpqa_diamond.jsonl", gpqa_rows(5))
    prompts = [Prompt(problem, [i]) for i, problem in enumerate(load("gpqa", tmp_path))]
    prompts.append(Prompt(Problem("long", "too long", "A", "choice"), [9] * 50))

    def run_rank(keep):
        engine = Script(lambda i, j: f"\\boxed{{{'AB'[(i + j) % 2]}}}")
        with Graders(workers=1) as graders:
            metrics, groups = evaluation.evaluate(
                engine, engine, rollout.judge_by_rules(graders), prompts, n=3, seed=1, keep=keep,
                max_tokens=9)
        return {k: v for k, v in metrics.items() if k != "seconds"}, groups, len(engine.sampled)

    alone, parts, kept = run_rank([].append), [], {"0": [], "1": []}
    ready = [(group[0]["id"], group) for group in alone[1][:-1]]
    monkeypatch.setattr(evaluation, "gather", lambda items: parts.append(items) or ready)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sampled = 0
    for rank in kept:
        monkeypatch.setenv("RANK", rank)
        result = run_rank(kept[rank].append)
        assert result[:2] == alone[:2]
        sampled += result[2]
    assert sampled == alone[2] == 15
    assert sorted(parts[0] + parts[1]) == sorted(ready) and len(parts[0]) == 3
    assert kept == {"0": [g for _, g in parts[0]] + alone[1][-1:], "1": [g for _, g in parts[1]]}
    assert not any(prompt.problem.text[:12] in json.dumps(parts) for prompt in prompts)


def test_custom_data(tmp_path):
    rows = [dict(problem="Pick", choices=["x", "y"], answer="B"),
            dict(question="Pick: A) x B) y C) z", answer="C", n_choices=3)]
    args = evaluation.parse_args(["--model=m", "--kind=choice",
                                  f"--data={write(tmp_path / 'mine.jsonl', rows)}"])
    [(name, bench)] = evaluation.check_args(args).items()
    one, two = evaluation.load_benchmark(name, bench, args)
    assert name == "mine" and one.text == "Pick\n\nA) x\nB) y" and one.options == {"n_choices": 2}
    assert two.text == "Pick: A) x B) y C) z" and two.options == {"n_choices": 3}


# ---- whole runs ---------------------------------------------------------------------------------

FLAGS = ["eval.py", "--model=demo/model", "--benchmarks=demo,gpqa,livecodebench,aime25",
         "--samples=4", "--limit=160", "--max_response_length=48", "--seed=5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = gpqa_rows(5)
    rows[3]["Question"] = "Which? " * 2000  # longer than the context
    write(folder / "gpqa_diamond.jsonl", rows)
    write(folder / "test6.jsonl", [lcb_row(1), lcb_row(2)])
    write(folder / "aime25.jsonl", [dict(id=i, problem=f"What is {i}+1?", answer=i + 1)
                                    for i in range(4)])
    return folder


def samples(folder):
    """samples.jsonl in order: its lines are in the order in which problems were finished."""
    return sorted(lines(folder / "samples.jsonl"),
                  key=lambda r: (r["benchmark"], r["id"], r["sample"]))


def numbers(folder):
    """results.json's numbers, without the clock."""
    results = json.loads((folder / "results.json").read_text())
    return {name: {k: v for k, v in metrics.items() if k != "seconds"}
            for name, metrics in results["benchmarks"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("evals") / "whole"
    done = run(*FLAGS, f"--data-dir={data}", f"--out={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_outputs(whole):
    folder, console = whole
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"]["temperature"] == 0.6 and results["settings"]["top_p"] == 0.95
    assert {"commit", "torch", "transformers", "sandbox"} <= results["environment"].keys()
    assert "{problem}" in results["prompts"]["code"] and "python" in results["prompts"]["code"]
    metrics = results["benchmarks"]
    counts = dict(demo=160, gpqa=5, livecodebench=2, aime25=4)
    assert {name: m["problems"] for name, m in metrics.items()} == counts
    assert metrics["gpqa"]["prompts_too_long"] == 1
    assert 0.1 < metrics["demo"]["accuracy"] < 0.5 < metrics["demo"]["pass@4"] + 0.1
    assert len(lines(folder / "samples.jsonl")) == 4 * sum(counts.values())
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "results.json", "samples.jsonl"]
    asked = {r["benchmark"] for r in lines(folder / "samples.jsonl") if "problem" in r}
    assert asked == {"aime25", "livecodebench", "demo"}  # GPQA's questions are nowhere
    text = (folder / "samples.jsonl").read_text() + (folder / "results.json").read_text() + console
    assert "Which one is" not in text and "right 1" not in text
    heading = next(line for line in console.splitlines() if line.startswith("| model"))
    assert [cell.strip() for cell in heading.split("|")[2:-1]] == [
        "aime25", "gpqa", "livecodebench", "demo", "average"]
    assert "sandbox:" in console


def test_killed_on_one_rank_and_finished_by_two(whole, data, tmp_path):
    """Killed with -9 while problems finish, a line cut short; two ranks do the rest: the same
    samples as from one rank left alone, and what was finished is kept."""
    out, log = tmp_path / "killed", tmp_path / "log"
    command, path = [*FLAGS, f"--data-dir={data}", f"--out={out}"], out / "samples.jsonl"
    process = start(*command, log=log)
    wait_for(lambda: path.exists() and path.stat().st_size > 2000, process, log)
    kill(process)
    before = lines(path)
    assert 4 <= len(before) < 4 * 160
    with path.open("a") as file:
        file.write('{"benchmark": "demo", "id"')
    done = run(*command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(0 were finished before)" not in done.stdout
    assert samples(out) == samples(whole[0])
    assert lines(path)[: len(before)] == before
    assert numbers(out) == numbers(whole[0])
    assert sorted(p.name for p in out.iterdir()) == [".lock", "results.json", "samples.jsonl"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_finished_evaluations_need_no_engine_and_keep_their_settings(whole, data, monkeypatch,
                                                                     capsys):
    monkeypatch.setattr(rollout, "Engine", lambda *_, **__: pytest.fail("an engine was started"))
    monkeypatch.setattr(evaluation, "init_distributed", lambda: "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.chdir(ROOT)
    before = numbers(whole[0]), (whole[0] / "samples.jsonl").read_text()
    evaluation.main([*FLAGS[1:], f"--data-dir={data}", f"--out={whole[0]}"])
    assert (numbers(whole[0]), (whole[0] / "samples.jsonl").read_text()) == before
    for flag, says in (("--seed=6", "--seed 5, not 6"), ("--n=2", "--n 4, not 2"),
                       ("--temperature=1", "--temperature 0.6, not 1.0")):
        with pytest.raises(SystemExit):
            evaluation.main([*FLAGS[1:], f"--data-dir={data}", f"--out={whole[0]}", flag])
        assert says in capsys.readouterr().err


def test_the_papers_average_is_a_column_of_its_own():
    five = {name: dict(accuracy=i / 10, accuracy_stderr=0.01) for i, name in
            enumerate(report.PAPER)}
    more = five | {"hmmt25": dict(accuracy=0.8, accuracy_stderr=0.02)}
    assert "paper's five" not in report.results_table("m", five)
    heads, _, cells = report.results_table("m", more).splitlines()[:3]
    heads, cells = ([x.strip() for x in row.split("|")[1:-1]] for row in (heads, cells))
    assert dict(zip(heads, cells, strict=True))["paper's five"] == "20.0 ± 0.4"
    assert dict(zip(heads, cells, strict=True))["average"] == "30.0 ± 0.5"


def test_heads_that_the_ranks_cannot_share_are_refused(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluation, "world_size", lambda: 3)
    monkeypatch.setattr(rollout, "Engine", lambda *_, **__: pytest.fail("an engine was started"))
    with pytest.raises(SystemExit):
        evaluation.main(["--model=demo/model", "--benchmarks=demo", "--tensor_parallel=3"])
    assert "--tensor_parallel 3 does not divide the model's 2 attention" in capsys.readouterr().err


def test_another_model_at_the_same_path_is_refused(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(1_000_000))
    first = evaluation.fingerprint(str(model))
    flags = evaluation.parse_args([f"--model={model}"])
    flags.weights = first
    evaluation.OutputFolder(str(tmp_path / "out"), vars(flags)).path.mkdir()
    evaluation.OutputFolder(str(tmp_path / "out"), vars(flags)).write()
    evaluation.OutputFolder(str(tmp_path / "out"), vars(flags))
    (model / "model.safetensors").write_bytes(bytes(999_999) + b"x")
    flags.weights = evaluation.fingerprint(str(model))
    assert flags.weights != first  # the file's end is looked at too
    with pytest.raises(UsageError, match="other weights"):
        evaluation.OutputFolder(str(tmp_path / "out"), vars(flags))
    assert evaluation.fingerprint("owner/name") == ""


def test_samples_can_be_graded_again_as_they_are(whole):
    samples = [row for row in lines(whole[0] / "samples.jsonl") if row["kind"] != "code"]
    assert {row["kind"] for row in samples} == {"math", "choice"}
    again = [verify.grade(row["kind"], row["response"], row["answer"],
                          **{x: row[x] for x in ("n_choices",) if x in row}) for row in samples]
    assert [grade.correct for grade in again] == [row["correct"] for row in samples]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--benchmarks=aime24,nope"], "--benchmarks nope: unknown"),
        (["--model=/no/such"], "neither a save_pretrained folder"),
        (["--benchmarks=aime24", "--data-dir=/no/such"], "/no/such has no aime24.jsonl"),
        (["--benchmarks=aime24", "--data-dir=tests"], "tests has no aime24.jsonl"),
        (["--data=missing.jsonl"], "expected an existing"),
        (["--n=-1"], "--n"),
        (["--top_p=0"], "--top_p"),
        (["--temperature=-1"], "--temperature"),
        (["--lcb_from=yesterday"], "--lcb_from yesterday"),
        (["--lcb_release=7"], "--lcb_release 7"),
        (["--tensor_parallel=2"], "does not divide the 1 rank"),
        (["--max_response_length=9999999"], "exceed the context"),
        (["--template=Q"], "{problem}"),
        (["--out=eval.py"], "--out eval.py: eval.py cannot be written to (NotADirectoryError"),
    ],
)
def test_bad_input_is_one_sentence(flags, says, capsys, monkeypatch):
    monkeypatch.setattr(rollout, "Engine", lambda *_, **__: pytest.fail("an engine was started"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--model=demo/model", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert says in error


# ---- words ---------------------------------------------------------------------------------------

# The metrics of a training run with a reference model, besides those of its evaluations.
TRAINED = set("""
    step reward accuracy response_length response_length_positive response_length_negative
    truncated no_answer grader_timeout grader_error grader_bad_reference groups_drawn
    surplus_groups dead_groups dead_all_correct rollout_tokens entropy entropy_positive
    entropy_negative mismatch_mean mismatch_max tis_weight tis_capped kl_ref ratio clip_low
    clip_high kl_old loss ratio_max ratio_max_deviation grad_norm updates skipped_updates
    tokens_per_second seconds seconds_generate seconds_grade seconds_score seconds_update
    seconds_sync rho_positive rho_negative lr
""".split())


def names_of(folder):
    """The metrics that a run's or an evaluation's folder has, under the names of metrics.jsonl."""
    path = folder / "results.json"
    results = json.loads(path.read_text())["benchmarks"] if path.exists() else {}
    return {name for line in lines(folder / "metrics.jsonl") for name in line} | {
        f"eval_{name}" for metrics in results.values() for name in metrics}


@pytest.mark.parametrize("command, says", [
    ("shwo runs/X", "shwo: no such command, did you mean show?"),
    ("compre a", "did you mean compare?"),
    ("runs/X", "runs/X: no such command; --help"), ("--n 3", "are required: --model"),
    ("--model m --sampels 3", "--sampels: no such flag, did you mean --samples?"),
    ("--model m --temperature=hot", "--temperature: invalid float value: 'hot'"),
])
def test_a_wrong_command_or_flag_is_one_sentence(command, says, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main(command.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said
    assert said.count("\n") == 1


def test_the_words_are_those_of_the_metrics_there_are(whole):
    names = TRAINED | names_of(whole[0])
    for name in ("accuracy", "reward", "eval_accuracy"):
        names |= {f"{name}_{kind}" for kind in verify.KINDS}
    names |= {"reward_errors", "reward_form", "memory_gib", "preemptions"}  # of --reward, of a GPU
    described = {name: words.describe(name) for name in names}
    assert all(all(entry) for entry in described.values())  # label, unit, meaning
    assert set(map(words.describe, words.METRICS)) == set(described.values())
    assert len({label for label, _, _ in set(described.values())}) == len(words.METRICS)
    assert words.describe("pass@16") == words.describe("eval_pass@2")
    assert words.describe("length") == words.describe("eval_length")
    for unknown in ("nope", "pass@", "eval_reward", "maj@k", "eval_eval_n"):
        with pytest.raises(KeyError):
            words.describe(unknown)


def test_glossary(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    evaluation.main(["glossary"])
    text = capsys.readouterr().out.splitlines()
    assert max(map(len, text)) <= 72
    assert [line.split()[0] for line in text if line[0] != " "] == list(words.METRICS)
    assert {re.match(" *", line).end() for line in text if line[0] == " "} == {
        text[0].index(words.describe("step")[0], 4)}  # one column
    evaluation.main(["glossary", "entropy", "eval_maj@8"])
    text = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in text if line[0] != " "] == ["entropy", "eval_maj@8"]
    evaluation.main(["glossary", *(report.describe(name)[0] for name in report.CONSOLE), "ratio-1"])
    text = capsys.readouterr().out.splitlines()  # the console's headings, of which | needs quotes
    assert [x.split()[0] for x in text if x[0] != " "] == [*report.CONSOLE, "ratio_max"]
    with pytest.raises(SystemExit):
        evaluation.main(["glossary", "nope"])
    assert capsys.readouterr().err == (
        "error: glossary nope: no such metric; give none to see all, and a heading of two words in "
        "quotes\n")


def test_help_has_the_protocol_and_the_file_names(capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    text = capsys.readouterr().out
    files = {bench.file for bench in evaluation.BENCHMARKS.values()} | {evaluation.LCB_FILES[-1]}
    words = {"temperature 0.6", "top_p 0.95", "8192", "clustered by problem", "default: 0.95"}
    assert not [word for word in words | files if word not in text]


# ---- compare and plot ---------------------------------------------------------------------------


def made_evaluation(folder, p, names=("aime24",), seed=0, n=8):
    """An evaluation whose problem i has chance p[i] of being solved."""
    rng = np.random.default_rng(seed)
    groups = [(name, records((rng.random(n) < q).tolist(), name=name, identity=str(i)))
              for name in names for i, q in enumerate(p)]
    scores = {name: {g[0]["id"]: np.mean([r["correct"] for r in g]) for x, g in groups if x == name}
              for name in names}
    settings = dict(model="m", n=n, seed=seed, template="auto", temperature=0.6, top_p=0.95,
                    max_response_length=8192)
    benchmarks = {name: evaluation.summarize("code", [g for x, g in groups if x == name])
                  for name in names}
    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps(dict(settings=settings, benchmarks=benchmarks, scores=scores)))
    return str(folder)


def test_paired_bootstrap_covers_the_true_difference():
    """95 % intervals hold the true difference about 95 times in 100, and no difference is called
    significant about 5 times in 100."""
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1):
        covered = significant = 0
        for _ in range(200):
            p = rng.uniform(0.1, 0.8, 60)  # pairing matters: the problems differ
            a, b = rng.binomial(8, p) / 8, rng.binomial(8, p + shift) / 8
            mean, low, high, star = report.paired_bootstrap([b - a], resamples=1000)
            covered += low <= shift <= high
            significant += star
        assert 178 <= covered <= 199
        assert significant <= 24 if shift == 0 else significant > 150


def test_a_few_problems_are_never_significant():
    assert not report.paired_bootstrap([np.ones(5)])[3]
    assert report.paired_bootstrap([np.ones(6)])[3]
    assert not report.paired_bootstrap([np.zeros(100)])[3]


def test_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    p, both, folders = np.linspace(0.1, 0.7, 100), ("aime24", "gpqa"), ["a", "same", "better"]
    made_evaluation(tmp_path / "a", p, both)
    made_evaluation(tmp_path / "same", p, both, seed=1)
    made_evaluation(tmp_path / "better", p + 0.2, both[::-1], seed=2)
    evaluation.main(["compare", *folders])
    text = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    assert rows["accuracy, %"] == ["aime24 (100)", "gpqa (100)", "average"]
    assert rows["a"] == report.score_cells([
        json.loads((tmp_path / "a/results.json").read_text())["benchmarks"][b] for b in both])
    assert not any("*" in cell for cell in rows["same"])
    assert all(cell.endswith(" *)") for cell in rows["better"])
    assert "note: --seed is 1 in same, 0 in a" in text
    assert text == (report.compare(folders) + "\n")  # no chance between two calls


def test_compare_pairs_by_problem(tmp_path):
    a = made_evaluation(tmp_path / "a", np.full(40, 0.5))
    b = made_evaluation(tmp_path / "b", np.full(30, 0.5), seed=1)
    assert "aime24 (30)" in report.compare([a, b])
    with pytest.raises(UsageError, match="no finished evaluation"):
        report.compare([a, str(tmp_path)])
    c = made_evaluation(tmp_path / "c", np.full(30, 0.5), ("gpqa",))
    with pytest.raises(UsageError, match="no problem in common"):
        report.compare([a, c])


def made_run(folder, preset, seed, level):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    config = dict(preset=preset, seed=seed, output_dir=str(folder), resume="", environment={},
                  lr=1e-4, rho_positive=2.0 if preset == "a3po" else 1.0)
    (folder / "config.json").write_text(json.dumps(config))
    records = [dict(step=s, accuracy=level + 0.002 * s + 0.02 * rng.normal(), entropy=0.5,
                    eval_accuracy=level + 0.002 * s, eval_accuracy_stderr=0.01)
               for s in range(30 + seed)]
    write(folder / "metrics.jsonl", records)
    return folder


def test_runs_that_differ_in_the_seed_become_one_band(tmp_path, monkeypatch, capsys):
    folders = [made_run(tmp_path / f"{p}{s}", p, s, level) for p, level in
               (("a3po", 0.3), ("dapo", 0.2)) for s in range(3)]
    groups = report.group_runs(folders)
    assert {x: len(runs) for x, runs in groups.items()} == {"a3po": 3, "dapo": 3}
    monkeypatch.chdir(tmp_path)
    evaluation.main(["plot", *map(str, folders)])
    assert capsys.readouterr().out.strip() == "curves.png"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    report.draw_runs(folders[:1]).savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    import matplotlib.pyplot as pyplot

    axis = pyplot.subplots()[1]
    report.draw_series(axis, groups["a3po"], "accuracy", "x", "k")
    [line], [_band] = axis.lines, axis.collections
    mean = np.mean([[r["accuracy"] for r in runs[:30]] for runs in groups["a3po"]], axis=0)
    assert np.allclose(line.get_ydata(), mean)  # at the 30 steps that all three have
    with pytest.raises(SystemExit):
        evaluation.main(["plot", "nowhere"])
    assert "nowhere/metrics.jsonl" in capsys.readouterr().err


def test_pictures_are_true_for_one_run_and_for_many(tmp_path):
    """No panel is empty, one legend names the groups, the title says what bars and bands are, and a
    method has its colour whoever else is there."""
    folders = [made_run(tmp_path / f"{p}{s}", p, s, 0.3) for p in ("a3po", "dapo") for s in (0, 1)]
    for chosen, named, says in (
        (folders[:1], ["a3po"], "one run a line, bars: standard errors"),
        (folders[2:3], ["dapo"], "one run a line, bars: standard errors"),
        (folders[::2], ["a3po", "dapo"], "one run a line, bars: standard errors"),
        (folders[:2], ["a3po"], "mean over 2 seeds, bands and bars: one standard deviation"),
        (folders, ["a3po", "dapo"], "mean over 2 seeds, bands and bars: one standard deviation"),
        (folders[1:], ["a3po", "dapo"], "mean over 1 and 2 seeds, bands and bars: one standard"),
    ):
        figure = report.draw_runs(chosen)
        assert figure._suptitle.get_text().startswith(says)
        assert all(axis.lines and not axis.get_legend() for axis in figure.axes)
        titles = [axis.get_title() for axis in figure.axes]
        assert "held-out accuracy" in titles and "truncated" not in titles  # not in these runs
        held_out = figure.axes[titles.index("held-out accuracy")]
        assert len(held_out.containers) == len(named)  # error bars
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == named
        colours = [axis.lines[0].get_color() for axis in figure.axes if axis.lines]
        assert set(colours) == {report.COLOURS[named[0]]}


def test_no_two_groups_of_a_picture_have_one_colour():
    labels = ["lp_reg", "a3po, lr 1", "dapo", "a3po, lr 2", "nsr", "psr", "grpo"]
    colours = report.colours_of(labels)
    assert len(set(colours.values())) == len(labels)
    assert all(colours[x] == report.COLOURS[x] for x in ("dapo", "nsr", "psr", "grpo"))
    assert colours["a3po, lr 1"] == report.COLOURS["a3po"] != colours["lp_reg"]
    assert len(report.colours_of(list("abcdefghijklm"))) == 13  # more than there are


def test_a_legend_has_the_groups_that_the_first_panel_lacks(tmp_path):
    folders = [made_run(tmp_path / preset, preset, 0, 0.3) for preset in ("a3po", "dapo")]
    write(folders[1] / "metrics.jsonl", [dict(step=s, entropy=0.5) for s in range(9)])
    [legend] = report.draw_runs(folders).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a3po", "dapo"]


def test_groups_of_one_preset_are_told_apart_by_what_differs(tmp_path):
    folders = [made_run(tmp_path / str(lr), "a3po", 0, 0.3) for lr in (1, 2)]
    for folder, lr in zip(folders, (1e-5, 2e-5), strict=True):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(lr=lr)))
    assert list(report.group_runs(folders)) == ["a3po, lr 1e-05", "a3po, lr 2e-05"]
    for folder, data in zip(folders, "ab", strict=True):  # what differs is at a path's end
        config = json.loads((folder / "config.json").read_text())
        config |= dict(lr=1e-5, data=f"{'x' * 80}/{data}")
        (folder / "config.json").write_text(json.dumps(config))
    assert len(report.group_runs(folders)) == 2
    figure = report.draw_runs(folders)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width  # the longest labels are in the picture
