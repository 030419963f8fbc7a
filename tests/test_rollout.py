"""Data, template, sampler (fast); the engine and its weight sync (real vLLM, in a subprocess)."""

import json

import pytest
from conftest import ROOT, make_model, run

import rollout
from rollout import PromptSampler, UsageError


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
    [problem] = rollout.load_problems(write(tmp_path / "d.jsonl", [row]))
    assert (problem.text, problem.reference, problem.kind) == (text, reference, "math")


def test_dapo_wrapper_is_taken_off_and_duplicates_dropped(tmp_path):
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\nFind $x$.\n\nThen $y$.\n\nRemember to put your answer on its own line after "Answer:".'
    )
    row = {"prompt": [{"role": "user", "content": wrapped}], "reward_model": {"ground_truth": "2"}}
    problems = rollout.load_problems(write(tmp_path / "d.jsonl", [row] * 5))
    assert [p.text for p in problems] == ["Find $x$.\n\nThen $y$."]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": [{"role": "user", "content": f"p{i % 3}"}],
             "reward_model": {"ground_truth": str(i % 3)}} for i in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    problems = rollout.load_problems(str(tmp_path / "d.parquet"))
    assert [(p.text, p.reference) for p in problems] == [("p0", "0"), ("p1", "1"), ("p2", "2")]


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"problem": "a", "answer": "1"}\n{"problem": \n', "d.jsonl:2: broken JSON"),
        ("[1]\n", "d.jsonl:1: a JSON object"),
        ('{"text": "a", "label": "1"}\n', "found columns ['label', 'text'], expected"),
        ('{"problem": "a", "answer": ""}\n', "d.jsonl:1: found columns"),
        ("", "no rows"),
    ],
)
def test_bad_files_are_named(tmp_path, content, says):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        rollout.load_problems(str(path))
    assert says in str(error.value)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "/no/such/dir", "x.csv", "word"])
def test_missing_files_are_named(source):
    with pytest.raises(UsageError, match="expected an existing"):
        rollout.load_problems(source)


def test_a_hub_data_set_that_does_not_load_is_named():
    with pytest.raises(UsageError, match="no such local file, and the hub data set did not load"):
        rollout.load_problems("nobody/nothing")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "demo" / "model")


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_template(tokenizer, monkeypatch):
    plain = f"1+1\n{rollout.INSTRUCTION}\n"
    assert rollout.format_prompt("1+1", tokenizer) == plain
    assert rollout.format_prompt("{}", tokenizer, "Q: {problem} \\boxed{}") == "Q: {} \\boxed{}"
    with pytest.raises(UsageError, match="no chat template"):
        rollout.check_template(tokenizer, "chat")
    with pytest.raises(UsageError, match="{problem}"):
        rollout.check_template(tokenizer, "Q:")
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
    assert ids(PromptSampler(prompts, seed=1, cursor=6).next(15)) == ids(first)[6:]
    assert ids(PromptSampler(prompts, seed=2).next(7)) != ids(first)[:7]


def test_request_seeds_are_far_apart():
    seeds = sorted(rollout.request_seed("train", s, d) for s in range(3) for d in range(2000))
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 1024
    assert 0 <= seeds[0] and seeds[-1] < 2**63 - 1024


def test_leave_runs_exit_handlers_and_writes_all_but_does_not_shut_python_down():
    """The shutdown would call __del__ here; in a rank, a thread of gloo may abort it."""
    made = "type('Kept', (), {'__del__': lambda self: print('shut down')})()"
    done = run("-c", f"import atexit, rollout; atexit.register(print, 'handler'); kept = {made}; "
               "print('end', end=' '); rollout.leave()")
    assert (done.returncode, done.stdout) == (0, "end handler\n")


@pytest.mark.parametrize("tied", [True, False])
def test_engine_follows_the_trainer(tmp_path, tied):
    """After a real optimiser step and sync, vLLM's and the trainer's log-probs agree to 1e-4; a
    response depends on its own seed alone; EOS ends a response; greedy answers agree."""
    model = make_model(tmp_path / "model", tied=tied)
    done = run("tests/engine_worker.py", model)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["gap_at_start"] <= 1e-4
    assert report["gap_before_sync"] > 0.1  # the step really changed the model
    assert report["gap_after_sync"] <= 1e-4
    assert report["ratio_deviation"] <= 1e-5
    assert report["same_alone_as_in_a_batch"] and report["seeds_differ"]
    assert report["stopped"] > 0 and report["all_stops_end_with_eos"]
    assert report["greedy_agrees"]
