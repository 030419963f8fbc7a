"""Training on math, multiple choice and code, mixed in one file: rows, prompts, metrics."""

import dataclasses
import json
import pickle
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from conftest import make_model, run
from test_train import metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3po
import eval as evaluation
import rollout
import verify
from rollout import Problem, Prompt, Sample
from shelf.data import load_problems
from shelf.metrics import describe, rollout_metrics
from shelf.ranks import UsageError
from verify import Grade

USER, ASSISTANT = dict(role="user", content="1+1?"), dict(role="assistant", content="It is 2.")
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
    return load_problems(str(path), **how)


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
        (dict(choices=["x", "y"], answer=["B"]), "B"),
        (dict(choices=["x", "y"], answer=[1]), "B"),
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
        (CODE | dict(function="a b"), {}, "field 'function': expected a function's name"),
        (CODE | dict(starter_code=5), {}, "field 'starter_code': expected a text"),
        (CHOICE | dict(choices=["one", None]), {}, "field 'choices': expected 2 to 26"),
        (dict(prompt=["Add."], answer="1"), {}, "field 'prompt': expected turns"),
        (dict(prompt=[USER, dict(role="user")], answer="1"), {}, "not {'role': 'user'}"),
        (dict(prompt=[dict(role="system"), USER], answer="1"), {}, "not {'role': 'system'}"),
        (dict(prompt=[USER | dict(content=[dict(type="text", text="1+1?")])], answer="1"), {},
         "field 'prompt': expected turns: texts as role and content, not {'role': 'user', "
         "'content': [{"),
        (dict(prompt=[{"from": "human", "value": "1+1?"}], answer="1"), {}, "expected turns"),
        (dict(prompt=[USER | dict(content=None)], answer="1"), {}, "expected turns"),
        (dict(prompt=[USER, ASSISTANT], answer="1"), {}, "the user's turn at the end, not {'role': "
         "'assistant', 'content': 'It is 2.'}"),
        (dict(prompt=[USER, dict(role="system", content="s")], answer="1"), {}, "at the end"),
        (CODE | dict(time_limit=0), {}, "field 'time_limit': expected seconds"),
        (LIVE | dict(private_test_cases="????"), dict(kind="code"), "'public_test_cases'"),
        (MATH | dict(problem=" "), {}, "field 'problem': expected a text"),
        (MATH | dict(answer=["1", "2"]), {}, "field 'answer': expected one answer, not ['1', '2']"),
        (MATH | dict(answer='["1", "2"]'), {}, "field 'answer': expected one answer"),
        (MATH | dict(answer="['1', '2']"), {}, "field 'answer': expected one answer"),
        (MATH | dict(answer={"value": "1"}), {}, "field 'answer': expected one answer"),
        (MATH | dict(answer='{"value": "1"}'), {}, "field 'answer': expected one answer"),
        (MATH | dict(answer=[["1"]]), {}, "field 'answer': expected one answer"),
        (MATH | dict(reward_model=dict(ground_truth=["1", "2"])), {},
         "field 'reward_model.ground_truth': expected one answer"),
        (MATH | dict(answer=float("nan")), {}, "field 'answer': expected a text"),
        (MATH | dict(answer=[]), {}, "field 'answer': expected a text"),
        (MATH | dict(answer="$$"), {}, "field 'answer': expected a text"),
        (MATH | dict(answer=None, final_answer=["1", "2"]), {}, "field 'final_answer'"),
        (CHOICE | dict(answer=["A", "B"]), {}, "field 'answer': expected one letter"),
        (CHOICE | dict(answer=float("nan")), {}, "field 'answer': expected one letter"),
    ],
)
def test_a_bad_row_is_one_sentence(tmp_path, row, how, says):
    with pytest.raises(UsageError) as error:
        load(tmp_path, row, **how)
    message = str(error.value)
    assert says in message and "rows.jsonl:" in message and "\n" not in message


@pytest.mark.parametrize(
    "row, reference",
    [
        (dict(answer=["12"]), "12"),
        (dict(answer=[12]), "12"),
        (dict(answer='["12"]'), "12"),  # Skywork-OR1's form
        (dict(answer='["\\\\frac{1}{2}"]'), "\\frac{1}{2}"),
        (dict(answer=" [12] "), "12"),
        (dict(answer="['12']"), "12"),  # of a list that pandas wrote as csv
        (dict(answer="['\\\\frac{1}{2}']"), "\\frac{1}{2}"),
        (dict(answer="f'(x)"), "f'(x)"),
        (dict(reward_model=dict(ground_truth='["12"]')), "12"),
        (dict(answer=None, final_answer=["$12$"], solution=["Add."]), "$12$"),  # OlympiadBench's
        (dict(answer="[1, 2]"), "[1, 2]"),  # an interval
        (dict(answer="[-2,7]"), "[-2,7]"),
        (dict(answer="\\{1, 2\\}"), "\\{1, 2\\}"),
        (dict(answer="[1, \\infty)"), "[1, \\infty)"),
        (dict(answer=0), "0"),
        (dict(answer="None"), "None"),
        (dict(answer=12, reward_model=dict(ground_truth="")), "12"),
        (dict(answer=12, reward_model=dict(ground_truth=float("nan"))), "12"),
        (dict(answer=12, reward_model=dict(ground_truth=[])), "12"),
        (dict(answer=12, reward_model=dict(ground_truth=0)), "0"),
        (dict(answer=" ", solution="It is \\boxed{12}."), "12"),
        (dict(answer=12, final_answer=["1", "2"]), "12"),
        (dict(answer="1+1=2\n#### 2"), "2"),
    ],
)
def test_the_answer_to_a_math_problem(tmp_path, row, reference):
    [problem] = load(tmp_path, MATH | row)
    assert problem.reference == reference
    assert verify.grade("math", f"\\boxed{{{reference}}}", problem.reference).correct


def test_a_reward_function_needs_no_answers(tmp_path):
    rows = [dict(problem="a"), dict(kind="choice", problem="b"), dict(kind="code", problem="c")]
    assert len(load(tmp_path, *rows, needs_answer=False)) == 3
    several = dict(problem="d", answer=["1", "2"])  # it may make something of them
    assert load(tmp_path, several, needs_answer=False)[0].reference == "['1', '2']"


class Tokenizer:
    chat_template = None

    def __call__(self, texts, add_special_tokens):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[[ord(c) for c in text] for text in texts])

    def convert_ids_to_tokens(self, ids):
        return list(map(chr, ids))


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


def test_programs_need_a_sandbox_that_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify.Sandbox, "contained", False)
    with pytest.raises(UsageError, match="--unsafe_code"):
        verify.protections(unsafe_code=False)
    assert verify.protections(unsafe_code=True).startswith("sandbox: ")
    config = a3po.parse_args(["--setting=demo", "--max_prompt_length=900"])
    a3po.load_inputs(config)  # no program, no question
    load(tmp_path, CODE)
    data = str(tmp_path / "rows.jsonl")
    for where in ("data", "eval_data"):
        with pytest.raises(UsageError, match="^programs could change your files"):
            a3po.load_inputs(dataclasses.replace(config, **{where: data}))
        a3po.load_inputs(dataclasses.replace(config, **{where: data}, unsafe_code=True))
    # a reward function judges, which runs what it likes
    a3po.load_inputs(dataclasses.replace(config, data=data, reward="operator:eq"))
    monkeypatch.setattr(evaluation, "init_distributed", lambda: "cpu")
    monkeypatch.setattr(rollout, "Engine", lambda *_, **__: pytest.fail("an engine was started"))
    with pytest.raises(SystemExit):
        evaluation.main(["--model=demo/model", f"--data={data}"])
    assert capsys.readouterr().err.startswith("error: programs could change your files")


def test_each_file_has_a_flag_for_its_kind(tmp_path):
    load(tmp_path, dict(problem="Which? A) a B) b", answer="B"))
    data = str(tmp_path / "rows.jsonl")
    config = a3po.parse_args(["--setting=demo", f"--data={data}", "--max_prompt_length=900"])
    both = dataclasses.replace(config, eval_data=data, kind="choice")
    _, sampler, held_out, _ = a3po.load_inputs(both)
    assert (sampler.prompts[0].problem.kind, held_out[0].problem.kind) == ("choice", "math")
    both = dataclasses.replace(config, eval_data=data, eval_kind="choice")
    _, sampler, held_out, _ = a3po.load_inputs(both)
    assert (sampler.prompts[0].problem.kind, held_out[0].problem.kind) == ("math", "choice")


def test_large_tests_are_read_only_when_they_are_run(tmp_path, monkeypatch):
    broken = LIVE | dict(kind="code", private_test_cases="?" * 99)
    monkeypatch.setattr("shelf.data.CHECKED_TESTS", 100)
    [problem] = load(tmp_path, broken)
    grade = verify.grade("code", "```python\nprint(3)\n```", problem.reference)
    assert grade.status == "bad_reference" and not grade.correct


def sample(kind: str, correct: bool) -> Sample:
    problem = Problem("1", "?", "1", kind)
    made = Sample(Prompt(problem, [1]), ids=[1, 2], logprobs=[0.0, 0.0], finish_reason="stop")
    made.grade, made.reward = Grade(correct, "1"), float(correct)
    return made


def described(groups: list[list[Sample]]) -> dict:
    return rollout_metrics(groups, a3po.rewards_of(groups, a3po.Config()), 1)


def test_accuracy_and_reward_by_kind_where_there_are_several():
    groups = [[sample("math", True), sample("math", False)], [sample("code", False)] * 2]
    groups[1][0].reward = 0.25  # both, they are one
    mixed = described(groups)
    assert (mixed["accuracy_math"], mixed["accuracy_code"], mixed["accuracy"]) == (0.5, 0, 0.25)
    assert (mixed["reward_math"], mixed["reward_code"], mixed["reward"]) == (0.5, 0.25, 0.375)
    alone = described(groups[:1])
    assert not [name for name in alone if name.startswith(("accuracy_", "reward_"))]
    for one in sum(groups, []):
        one.grade = Grade(None, None, reward=one.reward)  # of a reward function without a verdict
    assert described(groups)["accuracy_math"] is None
    groups[0][0].grade = Grade(True, None, reward=1.0)
    some = described(groups)
    assert (some["accuracy_math"], some["accuracy_code"], some["accuracy"]) == (0.5, None, 0.25)


def test_parts_of_a_reward_are_metrics():
    groups = [[sample("math", True), sample("math", False)], [sample("math", True)] * 2]
    for one, parts in zip(groups[0], (dict(form=1.0, right=0.5), dict(form=0.5)), strict=True):
        one.grade = Grade(True, None, reward=1.0, parts=parts)
    found = described(groups)  # of those that have it
    assert (found["reward_form"], found["reward_right"]) == (0.75, 0.5)
    for name in ("reward_form", "reward_KIND_of"):
        assert describe(name)[0] == "part of the reward"
    assert describe("reward_errors")[0] == "reward errors"
    assert describe("reward_math")[0] == "reward by kind"


def test_what_nobody_judged_is_null():
    """A failure of the reward function is no verdict."""
    group = [sample("math", True), sample("math", False)]
    group[0].grade = Grade(None, None, reward=1.0)
    group[1].grade = Grade(None, None, "error", "ValueError: no", float("nan"))
    found = described([group])
    for name in ("accuracy", "dead_all_correct", "response_length_positive",
                 "response_length_negative"):
        assert found[name] is None, name
    assert found["reward_errors"] == 1 and found["response_length"] == 2


class Echo:
    """Engine and tokenizer: every response is "\\boxed{0}"."""

    tensor_parallel, max_model_len = 1, 50
    stop_ids, pad_token_id, bos_token_id = (), None, None

    def generate(self, prompts, n, seeds, **_):
        for i in range(len(prompts) * n):
            yield i, Sample(None, np.array([i]), np.zeros(1, np.float32), "stop")

    def decode(self, ids, **_):
        return "\\boxed{0}"


def test_tests_stay_on_their_rank(tmp_path, monkeypatch):
    """Every rank has the prompts: what is gathered is without them, and gets them afterwards."""
    tests = dict(public_test_cases=TESTS, private_test_cases="x" * 10**6)
    prompts = [Prompt(Problem(str(i), f"p{i}", tests, "code"), [i]) for i in range(4)]
    sizes, config = [], a3po.Config(group_size=2, prompts_per_step=4, dynamic_sampling=False)
    monkeypatch.setattr(a3po.ranks, "gather", lambda x: sizes.append(len(pickle.dumps(x))) or x)
    sampler = rollout.PromptSampler(prompts, 0)
    with verify.Graders(workers=1) as graders:
        judge = rollout.judge_by_rules(graders)
        groups, _ = a3po.sample_groups(Echo(), Echo(), judge, sampler, config, {})
    assert sizes[0] < 10_000
    order = [prompt for _, prompt in rollout.PromptSampler(prompts, 0).next(4)]
    assert all(s.prompt is p for p, group in zip(order, groups, strict=True) for s in group)


def test_held_out_problems_of_one_name_are_told_apart(tmp_path):
    """Files of your own may number their rows alike; samples are filed under the id."""
    for name in "ab":
        row = dict(id=1, problem=f"1+1, {name}?", answer="2")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    config = a3po.parse_args([
        "--setting=demo", f"--eval_data={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"])
    held_out = a3po.load_inputs(config)[2]
    assert len({prompt.problem.id for prompt in held_out}) == 2
    _, groups = evaluation.evaluate(Echo(), Echo(), Judge(), held_out, n=1, seed=0, max_tokens=9)
    assert [group[0]["id"] for group in groups] == ["1#0", "1#1"]


def test_held_out_accuracy_by_kind():
    problems = [Problem("0", "p", "0"), Problem("1", "q", "A", "choice"), Problem("2", "r", "0")]
    prompts = [Prompt(problem, [1]) for problem in problems]
    with verify.Graders(workers=1) as graders:
        judge = rollout.judge_by_rules(graders)
        both, alone = (evaluation.evaluate(Echo(), Echo(), judge, x, n=2, seed=0, max_tokens=9)[0]
                       for x in (prompts, prompts[:1]))
    assert (both["accuracy_math"], both["accuracy_choice"]) == (1, 0)
    assert both["accuracy"] == pytest.approx(2 / 3)
    assert not [name for name in alone if name.startswith("accuracy_") and "stderr" not in name]


class Judge:
    def __call__(self, problem, text):
        future = Future()
        future.set_result(Grade(False, text))
        return future


def test_unsafe_code_is_a_flag_of_both_programs():
    assert evaluation.parse_args(["--model=m", "--unsafe_code"]).unsafe_code is True
    assert evaluation.parse_args(["--model=m"]).unsafe_code is False
    assert a3po.parse_args(["--unsafe_code"]).unsafe_code is True


LEARNED = {  # by id: a problem, and a right and a wrong response to it
    "add": (CODE, "```python\nprint(sum(map(int, input().split())))\n```",
            "```python\nprint(4)\n```"),
    "double": (CODE | dict(problem="Double.", tests=[dict(input="3", output="6")], function="f"),
               "```python\ndef f(x):\n    return 2 * x\n```",
               "```python\ndef f(x):\n    return x\n```"),
    "which": (CHOICE, "\\boxed{B}", "\\boxed{A}"),
    "sum": (MATH, "\\boxed{2}", "\\boxed{3}"),
}  # fmt: skip


def teach(folder, problems: list[Problem]) -> str:
    """Return a tiny random model that has learned either response by heart, as likely as not."""
    path = make_model(folder, sharpen=1.0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    rows = []  # (prompt's tokens, the response's)
    for prompt in rollout.encode_prompts(problems, tokenizer, "plain", 999):
        for response in LEARNED[prompt.problem.id][1:]:
            rows.append((prompt.ids, [*tokenizer(response).input_ids, tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)  # no loss
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        labels[i, len(prompt) : end] = torch.tensor(response)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return path


def test_training_on_a_mixed_file(tmp_path):
    """A tiny model that writes right and wrong programs, letters and numbers: all are told apart,
    the programs by running them in the sandbox, and it is trained on what they got."""
    problems = load(tmp_path, *(row | dict(id=name) for name, (row, *_) in LEARNED.items()))
    folder, data = tmp_path / "run", tmp_path / "rows.jsonl"
    done = run(
        "a3po.py", "--setting=demo", f"--model={teach(tmp_path / 'model', problems)}",
        f"--data={data}", f"--eval_data={data}", "--steps=2", "--prompts_per_step=4",
        "--group_size=8", "--mini_batches=2", "--eval_n=8", "--max_prompt_length=176",
        "--max_response_length=80", "--log_rollouts=4", "--no-dynamic_sampling",
        f"--output_dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sandbox: " in done.stdout
    lines = metrics(folder)
    steps = [line for line in lines if "reward" in line]
    held_out = [line for line in lines if "eval_accuracy" in line]
    assert len(steps) == 2 and all(line["updates"] and line["grad_norm"] > 0 for line in steps)
    for kind in verify.KINDS:
        for line in steps:
            assert 0.1 < line[f"accuracy_{kind}"] == line[f"reward_{kind}"] < 0.9, kind
        assert all(0.1 < line[f"eval_accuracy_{kind}"] < 0.9 for line in held_out), kind
    for line in held_out:  # half of the problems are programs
        math, choice, code = (line[f"eval_accuracy_{kind}"] for kind in verify.KINDS)
        assert line["eval_accuracy"] == pytest.approx((math + choice + 2 * code) / 4)
    assert all(describe(name) for line in lines for name in line if name != "step")
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").open()]
    assert {row["kind"] for row in rollouts} == {*verify.KINDS}
    assert all((row["answer"] is None) == (row["kind"] == "code") for row in rollouts)
    known = [row for row in rollouts if row["response"] in LEARNED[row["id"]][1:]]
    assert len(known) > 4
    assert all(row["correct"] == (row["response"] == LEARNED[row["id"]][1]) for row in known)
