"""Data, template, sampler (fast); the engine and its weight sync (real vLLM, in a subprocess)."""

import copy
import json
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, run

import rollout
from rollout import PromptSampler
from shelf import checks
from shelf.data import load_problems
from shelf.ranks import UsageError
from verify import Grade


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row, text, reference",
    [
        ({"problem": "1+1", "answer": "2"}, "1+1", "2"),
        ({"problem": "1+1", "answer": 2, "solution": "x"}, "1+1", "2"),
        ({"question": "1+1", "answer": "so 1+1=<<1+1=2>>2\n#### 2"}, "1+1", "2"),
        ({"prompt": "1+1", "answer": "2"}, "1+1", "2"),
        (
            {
                "prompt": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "1+1"},
                ],
                "reward_model": {"ground_truth": "2", "style": "rule"},
                "data_source": "math_dapo",
            },
            "1+1",
            "2",
        ),
    ],
)
def test_schemas(tmp_path, row, text, reference):
    [problem] = load_problems(write(tmp_path / "d.jsonl", [row]))
    assert (problem.text, problem.reference, problem.kind) == (text, reference, "math")


def test_dapo_wrapper_is_taken_off_and_duplicates_dropped(tmp_path):
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\nFind $x$.\n\nThen $y$.\n\nRemember to put your answer on its own line after "Answer:".'
    )
    row = {"prompt": [{"role": "user", "content": wrapped}], "reward_model": {"ground_truth": "2"}}
    problems = load_problems(write(tmp_path / "d.jsonl", [row] * 5))
    assert [p.text for p in problems] == ["Find $x$.\n\nThen $y$."]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": [{"role": "user", "content": f"p{i % 3}"}],
             "reward_model": {"ground_truth": str(i % 3)}} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    problems = load_problems(str(tmp_path / "d.parquet"))
    assert [(p.text, p.reference) for p in problems] == [("p0", "0"), ("p1", "1"), ("p2", "2")]


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"problem": "a", "answer": "1"}\n{"problem": \n', "d.jsonl:2: broken JSON"),
        ("[1]\n", "d.jsonl:1: a JSON object"),
        ('{"text": "a", "label": "1"}\n', "d.jsonl:1: field 'problem': expected a text"),
        ('{"problem": "a", "answer": ""}\n', "d.jsonl:1: field 'answer': expected"),
        ("", "no rows"),
    ],
)
def test_bad_files_are_named(tmp_path, content, says):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        load_problems(str(path))
    assert says in str(error.value)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "/no/such/dir", "x.csv", "word"])
def test_missing_files_are_named(source):
    with pytest.raises(UsageError, match="expected an existing"):
        load_problems(source)


def test_a_hub_data_set_that_does_not_load_is_named():
    with pytest.raises(UsageError, match="no such local file, and the hub data set did not load"):
        load_problems("nobody/nothing")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "demo" / "model")


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_template(tokenizer, monkeypatch):
    plain = f"1+1\n{rollout.INSTRUCTION}\n"
    assert rollout.format_prompt("1+1", tokenizer) == plain
    assert rollout.format_prompt("{}", tokenizer, "Q: {problem} \\boxed{}") == "Q: {} \\boxed{}"
    for template, says in (("chat", "chat_template is not set.*--template plain"),
                           ("Q:", "{problem}")):
        with pytest.raises(UsageError, match=says):
            rollout.load_tokenizer(str(ROOT / "demo" / "model"), 8, 8, template)
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    chat = f"<user>1+1\n{rollout.INSTRUCTION}<assistant>"
    assert rollout.format_prompt("1+1", tokenizer) == chat
    assert rollout.format_prompt("1+1", tokenizer, "plain") == plain


def test_long_prompts_are_dropped(tokenizer, capsys):
    problems = [rollout.Problem(str(i), "1" * i, "1") for i in (2, 60)]
    kept = rollout.encode_prompts(problems, tokenizer, "auto", 20)
    assert [prompt.problem.id for prompt in kept] == ["2"]
    assert "1 of 2 prompts over 20 tokens were dropped" in capsys.readouterr().out
    with pytest.raises(UsageError, match="raise --max_prompt_length"):
        rollout.encode_prompts(problems, tokenizer, "auto", 1)


def test_sampler_shuffles_by_seed_covers_epochs_and_resumes():
    prompts = [rollout.Prompt(rollout.Problem(str(i), "", ""), []) for i in range(7)]
    ids = lambda draws: [prompt.problem.id for _, prompt in draws]  # noqa: E731
    sampler = PromptSampler(prompts, seed=1)
    first = sampler.next(21)
    assert [draw for draw, _ in first] == list(range(21))
    for epoch in range(3):
        assert sorted(ids(first)[epoch * 7 : epoch * 7 + 7]) == [str(i) for i in range(7)]
    assert ids(first)[:7] != ids(first)[7:14]
    parts = PromptSampler(prompts, seed=1)
    assert ids(parts.next(5)) + ids(parts.next(1)) == ids(first)[:6]
    again = PromptSampler(prompts, seed=1)
    again.restore(dict(cursor=6, dead_share=0.5))
    assert ids(again.next(15)) == ids(first)[6:]
    assert again.state() == dict(cursor=21, dead_share=0.5)
    assert ids(PromptSampler(prompts, seed=2).next(7)) != ids(first)[:7]


class SlowJudge:
    """Grades right away, or (the odd ones) only when it is told to."""

    def __init__(self):
        self.late = []

    def __call__(self, problem, text):
        future = Future()
        if int(text) % 2:
            self.late.append(future)
        else:
            future.set_result(Grade(True, text))
        return future


class Script:
    """Engine and tokenizer: the text of response j to prompt i is i * n + j."""

    tensor_parallel = 1
    stop_ids, pad_token_id, bos_token_id = (), None, None

    def __init__(self, judge):
        self.judge = judge

    def generate(self, prompts, n, seeds, **sampling):
        for i in reversed(range(len(prompts) * n)):  # responses end in any order
            ids = np.array([100 * prompts[i // n].ids[0] + i % n])
            yield i, rollout.Sample(prompts[i // n], ids, np.zeros(1), "stop")
        for future in self.judge.late:
            future.set_result(Grade(False, None))

    def decode(self, ids, **_):
        return str(ids[0])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_come_whole_graded_and_once_for_any_number_of_ranks(monkeypatch, ranks):
    prompts = [rollout.Prompt(rollout.Problem(str(p), "", ""), [p]) for p in range(5)]
    found = {}
    monkeypatch.setattr(rollout, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(rollout, "rank", lambda rank=rank: rank)
        judge = SlowJudge()
        engine = Script(judge)
        for p, group in rollout.sample(engine, engine, judge, prompts, 3, [0] * 5, seconds={}):
            assert p % ranks == rank and p not in found
            found[p] = group
    assert sorted(found) == list(range(5))
    for p, group in found.items():
        assert [sample.text for sample in group] == [str(100 * p + j) for j in range(3)]
        assert [sample.correct for sample in group] == [True, False, True]
        assert [sample.reward for sample in group] == [1.0, 0.0, 1.0]
        assert all(sample.prompt is prompts[p] for sample in group)


def test_a_group_is_yielded_while_others_are_generated():
    """And a group whose grade is late does not hold up the others."""
    prompts = [rollout.Prompt(rollout.Problem(str(p), "", ""), [p]) for p in range(3)]
    order = []

    class Watched(Script):
        def generate(self, prompts, n, seeds, **sampling):
            for i, response in super().generate(prompts, n, seeds):
                order.append(f"response {i}")
                yield i, response

    judge = SlowJudge()
    engine = Watched(judge)
    for p, _ in rollout.sample(engine, engine, judge, prompts, 1, [0] * 3, seconds={}):
        order.append(f"group {p}")
    assert order == ["response 2", "group 2", "response 1", "group 1", "response 0", "group 0"]


def test_reward_functions_are_judges(tmp_path, monkeypatch):
    """They get the text and the Problem; without a flag the advantage's sign is the polarity."""
    (tmp_path / "my_rewards.py").write_text(
        "def half(response, problem):\n    return 0.5 * (problem.reference in response)\n"
        "def flagged(response, problem):\n    return 0.25, len(response) > 3\n"
    )
    monkeypatch.chdir(tmp_path)
    problem = rollout.Problem("7", "1+1", "2")
    grade = rollout.judge_by_function("my_rewards:half")(problem, "It is 2").result()
    assert (grade.reward, grade.correct, grade.status) == (0.5, None, "ok")
    sample = rollout.Sample(None, np.zeros(1), np.zeros(1), "stop", grade=grade)
    for sample.advantage, correct in ((0.1, True), (-0.1, False)):
        assert sample.correct is correct
    grade = rollout.judge_by_function("my_rewards:flagged")(problem, "It is 2").result()
    assert (grade.reward, grade.correct) == (0.25, True)
    for name in ("my_rewards:none", "my_rewards", "nowhere:f"):
        with pytest.raises(UsageError, match="expected module:function"):
            rollout.judge_by_function(name)


@pytest.mark.parametrize("result, correct, parts", [
    (0.5, None, {}), (True, None, {}), (np.float32(2), None, {}), ((1,), None, {}),
    ((1.0, 1.0), True, {}), ((1.0, 0), False, {}), ((1, np.bool_(True)), True, {}),
    ((1, torch.tensor(False)), False, {}), ((1, None), None, {}), ((1, True, None), True, {}),
    ((1, True, dict(form=0.25, right=True)), True, dict(form=0.25, right=1.0)),
    ((torch.tensor(0.5), None, dict(reward_=1)), None, dict(reward_=1.0)),
])
def test_what_a_reward_function_may_return(result, correct, parts):
    grade = rollout.to_grade(result)
    assert grade.correct is correct and grade.parts == parts and type(grade.reward) is float


def test_reward_functions_that_fail_are_counted_and_lowest(tmp_path, monkeypatch):
    (tmp_path / "bad_rewards.py").write_text(
        "import time\n"
        "ANSWERS = dict(nan=float('nan'), inf=float('inf'), none=None, text='0.5', fine=-2.0)\n"
        "ANSWERS |= dict(huge=1e39, flag=(1.0, 'yes'), many=(1, True, {}, 2), empty=())\n"
        "ANSWERS |= dict(part=(1, True, dict(a=None)), list=(1, True, [2.0]), name=(1, None, "
        "dict(math=1)), whole=10**400)\n"
        "def judge(response, problem):\n"
        "    if response == 'raise': raise RuntimeError('no ' * 200)\n"
        "    if response == 'exit': raise SystemExit('bye')\n"
        "    if response == 'hang': time.sleep(60)\n"
        "    return ANSWERS[response]\n"
        "def by_number(response, problem):\n    return [float('nan'), -2.0, 3.0][int(response)]\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = rollout.judge_by_function("bad_rewards:judge", timeout=0.5)
    texts = ["nan", "inf", "none", "text", "raise", "hang", "fine", "huge", "flag", "many", "empty",
             "part", "list", "name", "whole", "exit"]
    started = time.monotonic()
    futures = [judge(rollout.Problem("1", "?", "2"), text) for text in texts]
    grades = dict(zip(texts, (future.result() for future in futures), strict=True))
    assert time.monotonic() - started < 5
    assert grades.pop("fine") == Grade(None, None, reward=-2.0)
    assert all(np.isnan(grade.reward) and grade.correct is None for grade in grades.values())
    assert grades.pop("hang").status == "timeout"
    assert grades["exit"].detail == "SystemExit: bye"
    assert grades["raise"].detail.endswith(" no ...") and len(grades["raise"].detail) <= 300
    assert grades["flag"].detail.startswith("ValueError: correct is 'yes', not True or False")
    assert all(grade.status == "error" and grade.detail for grade in grades.values())
    engine = Script(SlowJudge())  # its texts are 0, 1, 2
    prompts = [rollout.Prompt(rollout.Problem("1", "?", ""), [0])]
    numbers = rollout.judge_by_function("bad_rewards:by_number")
    [(_, group)] = rollout.sample(engine, engine, numbers, prompts, 3, [0], seconds={})
    assert [sample.reward for sample in group] == [-2.0, -2.0, 3.0]


def test_earlier_turns_and_typed_line_ends_reach_the_model(tmp_path):
    turns = [dict(role="system", content="Be brief."), dict(role="user", content="Hello"),
             dict(role="assistant", content="Hi")]
    row = dict(prompt=[*turns, dict(role="user", content="1+1?")], answer="2")
    [problem] = load_problems(write(tmp_path / "d.jsonl", [row]))
    assert problem.text == "1+1?" and problem.turns == turns

    class Chat:
        chat_template = "there"

        def apply_chat_template(self, messages, **_):
            return "|".join(f"{m['role']}: {m['content']}" for m in messages)

    text = rollout.format_prompt("1+1?", Chat(), "chat", turns=turns)
    assert text.startswith("system: Be brief.|user: Hello|assistant: Hi|user: 1+1?")
    plain = rollout.format_prompt("1+1?", Chat(), r"Q: {problem}\nA:", turns=turns[:1])
    assert plain == "Be brief.\n\nQ: 1+1?\nA:"


def test_damaged_files_are_one_sentence_and_a_byte_order_mark_is_fine(tmp_path):
    rows = '{"problem": "1+1", "answer": "2"}\n'
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfproblem,answer\n1+1,2\n")
    for name in ("bom.jsonl", "bom.csv"):
        assert load_problems(str(tmp_path / name))[0].reference == "2"
    (tmp_path / "latin.csv").write_bytes("problem,answer\né,1\n".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é"}\n'.encode("latin-1"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    for name in ("latin.csv", "latin.jsonl", "cut.parquet"):
        with pytest.raises(UsageError, match=f"{name}.*cannot be read"):
            load_problems(str(tmp_path / name))


def test_request_seeds_are_far_apart():
    seeds = sorted(rollout.request_seed("train", s, d) for s in range(3) for d in range(2000))
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1024
    assert 0 <= seeds[0] and seeds[-1] < 2**63 - 1024


def test_leave_runs_exit_handlers_and_writes_all_but_does_not_shut_python_down():
    """The shutdown would call __del__ here; in a rank, a thread of gloo may abort it."""
    made = "type('Kept', (), {'__del__': lambda self: print('shut down')})()"
    done = run("-c", "import atexit; from shelf import ranks; atexit.register(print, 'handler'); "
               f"kept = {made}; print('end', end=' '); ranks.leave()")
    assert (done.returncode, done.stdout) == (0, "end handler\n")


@pytest.fixture(scope="module")
def engine_reports(tmp_path_factory) -> list[dict]:
    """Of a model with a tied head and of one without, from one process."""
    folder = tmp_path_factory.mktemp("engines")
    models = [make_model(folder / str(tied), tied=tied) for tied in (True, False)]
    done = run("tests/engine_worker.py", *models)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("head", [0, 1], ids=["tied", "untied"])
def test_engine_follows_the_trainer(engine_reports, head):
    """After a real optimiser step and sync, vLLM's and the trainer's log-probs agree to 1e-4; a
    response depends on its own seed alone; EOS ends a response; greedy answers agree."""
    report = engine_reports[head]
    assert report["gap_at_start"] <= 1e-4
    assert report["gap_before_sync"] > 0.1  # the step really changed the model
    assert report["gap_after_sync"] <= 1e-4
    assert report["ratio_deviation"] <= 1e-5
    assert report["same_alone_as_in_a_batch"] and report["seeds_differ"]
    assert report["stopped"] > 0 and report["all_stops_end_with_eos"]
    assert report["greedy_agrees"]
    # of a sync that fails in any of four ways the step's metrics tell
    assert min(report["broken"].values()) > checks.SAME_MODEL[None]


@pytest.mark.parametrize("template, stops", [
    ("auto", ["<eos>", "<pad>"]), ("chat", ["<eos>", "<pad>"]), ("plain", ["<eos>"]),
    ("Q: {problem}", ["<eos>"])])
def test_a_turn_that_the_chat_template_ends_ends_a_response(template, stops, tokenizer):
    """As in base models, whose EOS is another token than the one that ends a turn."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>\n{% endfor %}"
    ids = rollout.stop_token_ids(tokenizer, str(ROOT / "demo" / "model"), template)
    assert ids == sorted(map(tokenizer.convert_tokens_to_ids, stops))
