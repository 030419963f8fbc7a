"""Training on math, multiple choice and code, mixed in one file: rows, prompts, metrics."""

import dataclasses
import json

import pytest
from conftest import run
from test_train import metrics

import a3po
import eval as evaluation
import rollout
import verify
from rollout import Problem, Prompt, Sample
from verify import Grade, UsageError

TESTS = [{"input": "1 2\n", "output": "3\n"}]
LIVE = dict(
    question_content="Add.", public_test_cases=json.dumps([dict(TESTS[0], testtype="stdin")]),
    private_test_cases="[]", metadata="{}", starter_code="", question_id="abc", difficulty="easy",
)  # fmt: skip
MATH = dict(problem="1+1?", answer="2")
CHOICE = dict(kind="choice", problem="Which?", choices=["one", "two", "three"], answer="B")
CODE = dict(kind="code", problem="Add two numbers.", tests=TESTS)


def load(tmp_path, *rows, **how) -> list[Problem]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rollout.load_problems(str(path), **how)


def test_kinds_are_mixed_in_one_file(tmp_path):
    problems = load(tmp_path, MATH, CHOICE, CODE, LIVE | dict(kind="code"))
    assert [problem.kind for problem in problems] == ["math", "choice", "code", "code"]
    assert [problem.id for problem in problems][3] == "abc"
    math, choice, code, live = problems
    assert (math.text, math.reference, math.options) == ("1+1?", "2", {})
    assert choice.text == "Which?\n\nA) one\nB) two\nC) three"
    assert (choice.reference, choice.options) == ("B", {"n_choices": 3})
    assert "standard input" in code.text and verify.read_tests(code.reference)[0][0]["output"]
    assert live.reference.keys() == {"public_test_cases", "private_test_cases", "metadata"}


@pytest.mark.parametrize(
    "row, letter",
    [
        (dict(choices=["x", "y"], answer=1), "B"),
        (dict(choices=["x", "y"], answer="0"), "A"),
        (dict(choices=["x", "y"], answer="y"), "B"),
        (dict(choices=["x", "y"], answer=" B "), "B"),
        (dict(choices=["1", "0"], answer="1"), "A"),  # a text before an index
        (dict(choices=["1", "0"], answer=1), "B"),
        (dict(answer="D"), "D"),  # the options are in the text
        (dict(answer="E", n_choices=5), "E"),
    ],
)
def test_the_answer_to_a_choice(tmp_path, row, letter):
    [problem] = load(tmp_path, dict(problem="Which?", **row), kind="choice")
    assert problem.reference == letter
    grade = verify.grade("choice", f"\\boxed{{{letter}}}", problem.reference, **problem.options)
    assert grade.correct


def test_a_function_and_a_time_limit(tmp_path):
    tests = [{"input": "[1, 2]\n3", "output": "6"}]
    row = dict(kind="code", problem="Add.", tests=tests, function="add", time_limit=1.5)
    [problem] = load(tmp_path, row)
    assert "`add`" in problem.text and problem.options == {"time_limit": 1.5}
    program = "```python\ndef add(xs, y):\n    return sum(xs) + y\n```"
    assert verify.grade("code", program, problem.reference, **problem.options).correct
    assert not verify.grade("code", program.replace("+ y", ""), problem.reference).correct


@pytest.mark.parametrize(
    "row, how, says",
    [
        (MATH | dict(kind="essay"), {}, "field 'kind': expected math, choice or code"),
        (MATH | dict(kind="math"), dict(kind="code"), "field 'kind': expected code, not 'math'"),
        (dict(CHOICE, kind=None), {}, "--kind"),
        (LIVE, {}, "--kind"),
        (dict(CODE, kind=None), {}, "--kind"),
        (CHOICE | dict(answer="D"), {}, "field 'answer': expected one letter of ABC"),
        (CHOICE | dict(answer=3), {}, "field 'answer'"),
        (CHOICE | dict(choices="abc"), {}, "field 'choices': expected a list"),
        (CHOICE | dict(choices=["one"]), {}, "field 'choices': expected 2 to 26"),
        (CHOICE | dict(choices=["B", "x"], answer="B"), {}, "field 'answer'"),  # A's text, B's name
        (dict(problem="?", answer="AB"), dict(kind="choice"), "field 'answer'"),
        (CODE | dict(tests=[]), {}, "field 'tests': expected tests"),
        (CODE | dict(tests=[{"input": "1"}]), {}, "field 'tests': expected tests"),
        (CODE | dict(tests=[{"input": "1", "output": 2}]), {}, "field 'tests': expected tests"),
        (CODE | dict(time_limit=0), {}, "field 'time_limit': expected seconds"),
        (LIVE | dict(private_test_cases="????"), dict(kind="code"), "'public_test_cases'"),
        (MATH | dict(problem=" "), {}, "field 'problem': expected a text"),
    ],
)
def test_a_bad_row_is_one_sentence(tmp_path, row, how, says):
    with pytest.raises(UsageError) as error:
        load(tmp_path, row, **how)
    message = str(error.value)
    assert says in message and "rows.jsonl:" in message and "\n" not in message


def test_a_reward_function_needs_no_answers(tmp_path):
    rows = [dict(problem="a"), dict(kind="choice", problem="b"), dict(kind="code", problem="c")]
    assert len(load(tmp_path, *rows, needs_answer=False)) == 3


class Tokenizer:
    chat_template = None

    def __call__(self, texts, add_special_tokens):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[[ord(c) for c in text] for text in texts])


def test_each_kind_is_asked_in_its_own_words(tmp_path):
    problems = load(tmp_path, MATH, CHOICE, CODE)
    texts = [rollout.format_prompt(p.text, Tokenizer(), "plain", p.kind) for p in problems]
    assert all(rollout.INSTRUCTIONS[p.kind] in x for p, x in zip(problems, texts, strict=True))
    assert len(set(rollout.INSTRUCTIONS.values())) == 3


@pytest.mark.parametrize(
    "template, opening",
    [
        ("{problem}", ""),
        ("{problem}<think>\n", "<think>"),
        ("{problem}<think>Let me see. ", "<think>"),
        ("{problem}<think></think>\n", ""),
        ("Think within <think> first. {problem}", ""),
    ],
)
def test_what_a_template_opens_is_graded_with_the_response(tmp_path, template, opening):
    problems = load(tmp_path, dict(problem="Why <think>?", answer="1"))
    [prompt] = rollout.encode_prompts(problems, Tokenizer(), template, 999)
    assert prompt.opening == opening
    cut, whole = (f"{opening}so{end} \\boxed{{1}}" for end in ("", "</think>"))
    assert verify.grade("math", whole, "1").correct
    assert verify.grade("math", cut, "1").correct == (not opening)


def test_programs_need_a_sandbox_that_holds(monkeypatch):
    monkeypatch.setattr(verify.Sandbox, "contained", False)
    with pytest.raises(UsageError, match="--unsafe_code"):
        verify.protections(unsafe_code=False)
    assert verify.protections(unsafe_code=True).startswith("sandbox: ")
    config = dataclasses.replace(a3po.Config(), **a3po.SETTINGS["demo"])
    a3po.load_inputs(config)  # no program, no question


def sample(kind: str, correct: bool) -> Sample:
    problem = Problem("1", "?", "1", kind)
    made = Sample(Prompt(problem, [1]), ids=[1, 2], logprobs=[0.0, 0.0], finish_reason="stop")
    made.grade, made.reward = Grade(correct, "1"), float(correct)
    return made


def test_accuracy_by_kind_where_there_are_several():
    groups = [[sample("math", True), sample("math", False)], [sample("code", False)] * 2]
    mixed = a3po.rollout_metrics(groups, a3po.Config(group_size=2))
    assert (mixed["accuracy_math"], mixed["accuracy_code"], mixed["accuracy"]) == (0.5, 0, 0.25)
    alone = a3po.rollout_metrics(groups[:1], a3po.Config(group_size=2))
    assert not [name for name in alone if name.startswith("accuracy_")]


def test_training_on_a_mixed_file(tmp_path):
    """The demo's model knows neither letters nor programs, but all that they need is run."""
    rows = [dict(problem=f"Compute {i}+{i}.", answer=str(2 * i)) for i in range(1, 9)]
    rows += [CHOICE | dict(problem=f"Which {i}?") for i in range(8)]
    rows += [CODE | dict(problem=f"Add {i}.") for i in range(8)]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    done = run(
        "a3po.py", "--setting=demo", f"--data={data}", f"--eval_data={data}", "--steps=2",
        "--prompts_per_step=24", "--group_size=2", "--mini_batches=2", "--eval_n=2",
        "--no-dynamic_sampling", "--max_prompt_length=700", "--log_rollouts=24",
        f"--output_dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sandbox: " in done.stdout
    lines = metrics(folder)
    steps = [line for line in lines if "reward" in line]
    names = {f"accuracy_{kind}" for kind in verify.KINDS}
    assert len(steps) == 2 and all(names <= line.keys() for line in steps)
    held_out = [line for line in lines if "eval_accuracy" in line]
    assert all({f"eval_{name}" for name in names} <= line.keys() for line in held_out)
    parts = sum(held_out[0][f"eval_{name}"] for name in names)
    assert held_out[0]["eval_accuracy"] == pytest.approx(parts / 3)
    assert all(evaluation.describe(name) for line in lines for name in line if name != "step")
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").open()]
    assert {row["kind"] for row in rollouts} == {*verify.KINDS}
    assert all((row["answer"] is None) == (row["kind"] == "code") for row in rollouts)
