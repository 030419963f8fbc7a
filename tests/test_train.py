"""The whole program on the demo: learning, reproducibility, resuming, checkpoints, bad input."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, kill, run, start, wait_for

import a3po
import eval as evaluation
import verify
from rollout import Engine, Problem, Prompt, PromptSampler, Sample, is_live, of_vllm
from shelf import checks, memory
from shelf.config import PRESETS, SETTINGS
from shelf.data import read_rows
from shelf.metrics import describe, rollout_metrics, token_metrics
from shelf.ranks import UsageError

SHORT = ["a3po.py", "--setting=demo", "--eval_limit=32", "--prompts_per_step=8", "--group_size=4",
         "--mini_batches=2", "--seed=3"]


def metrics(folder: Path) -> list[dict]:
    """All lines without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "eval_seconds")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def train(folder: Path, *flags: str, ranks: int = 1) -> list[dict]:
    done = run(*SHORT, f"--output_dir={folder}", *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(folder, "--steps=6", "--save_every=2", "--eval_every=3")


def test_the_run_folder_is_complete(whole_run):
    folder, lines = whole_run
    steps = [line for line in lines if "reward" in line]
    evals = [line for line in lines if "eval_accuracy" in line]
    assert [line["step"] for line in steps] == list(range(6))
    assert [line["step"] for line in evals] == [0, 3, 6]
    wanted = "reward accuracy entropy entropy_positive entropy_negative response_length "
    wanted += "rho_positive rho_negative ratio_max_deviation mismatch_mean grad_norm clip_low "
    wanted += "clip_high dead_groups skipped_updates grader_timeout"
    assert not set(wanted.split()) - steps[0].keys()
    assert all(line["ratio_max_deviation"] == 0 for line in steps)
    for name in {name for line in lines for name in line} - {"step"}:
        assert all(describe(name)), name  # label, unit, sentence
    assert all(line["mismatch_max"] <= 1e-4 for line in steps)
    assert [line["rho_positive"] for line in steps[:2]] == [2.0, 2.0 - 0.015]
    assert json.loads((folder / "config.json").read_text())["preset"] == "a3po"
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "| accuracy " in (folder / "summary.md").read_text()
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {"problem", "response", "correct", "extracted", "answer", "kind"} <= rollouts[0].keys()
    tokens = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    assert [line["step"] for line in tokens] == [step for step in range(6) for _ in range(8)]
    for line, rho in [(line, 2.0 - 0.015 * line["step"]) for line in tokens]:
        n = len(line["tokens"])
        assert "".join(line["tokens"]).endswith("<eos>") or line["finish_reason"] == "length"
        assert all(len(line[name]) == n for name in ("vllm", "old", "new", "entropy", "weight"))
        chosen = [i for i, weight in enumerate(line["weight"]) if weight != 1]
        assert len(chosen) == max(1, int(0.2 * n)) and line["weight"][chosen[0]] == round(rho, 4)
        probable = sorted(line["old"], reverse=not line["correct"])[: len(chosen)]
        assert sorted(line["old"][i] for i in chosen) == sorted(probable)
        assert line["old"] == pytest.approx(line["vllm"], abs=2e-4)
    moved = [line["old"] != line["new"] for line in tokens]
    assert any(moved) and not all(moved)  # those of a step's first update are as they were
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step_2", "step_4", "step_6"]
    resumable = [path.parent.name for path in (folder / "checkpoints").glob("*/resume")]
    assert sorted(resumable) == ["step_4", "step_6"]  # small: two to go back to


def written(folder: Path) -> int:
    """The number of whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_run_that_is_stopped_and_killed_ends_like_one_left_alone(whole_run, tmp_path):
    """SIGTERM, which a scheduler sends before it takes the machine: the run saves after its step
    and leaves with 0. Resumed and killed after its next checkpoint, with a half-written last line,
    and resumed again, it has the same metrics to the last bit as the run that was left alone; and
    so one seed gives one result."""
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = ["--steps=6", "--eval_every=3", "--resume=auto"]
    command = [*SHORT, f"--output_dir={folder}", *flags]
    process = start(*command, "--save_every=0", log=log)
    wait_for(lambda: written(folder) >= 2, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0 and "stopped as asked" in log.read_text()
    [saved] = (folder / "checkpoints").glob("step_*/resume")
    step, before = int(saved.parent.name.removeprefix("step_")), metrics(folder)
    assert step < 5 and before == whole_run[1][: len(before)]

    process = start(*command, "--save_every=1", log=log)
    wait_for((folder / "checkpoints" / f"step_{step + 1}").exists, process, log)
    kill(process)
    assert process.returncode == -signal.SIGKILL
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step + 1}, "rewa')
    assert train(folder, *flags, "--save_every=0") == whole_run[1]


def test_the_checkpoint_is_the_trained_model(whole_run):
    """transformers and vLLM load it and give the same greedy answers."""
    done = run("tests/checkpoint_worker.py", str(whole_run[0] / "checkpoints" / "step_6"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"agree": 16, "of": 16, "boxed": 16}


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_ranks_do_the_same_as_one(whole_run, tmp_path, parallel):
    flags = ["--steps=2", "--eval_every=0", f"--parallel={parallel}"]
    lines = train(tmp_path / parallel, *flags, ranks=2)
    one = {line["step"]: line for line in whole_run[1] if "reward" in line}
    two = {line["step"]: line for line in lines if "reward" in line}
    for step in (0, 1):
        assert two[step]["accuracy"] == one[step]["accuracy"]  # the same responses
        for key in ("entropy", "grad_norm", "loss", "response_length"):
            assert two[step][key] == pytest.approx(one[step][key], rel=1e-3), (step, key)
    assert (tmp_path / parallel / "checkpoints" / "step_2" / "model.safetensors").exists()
    told = [[json.loads(line) for line in (path / "tokens.jsonl").read_text().splitlines()][:16]
            for path in (whole_run[0], tmp_path / parallel)]  # in the same order for any ranks
    for ours, theirs in zip(*told, strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["step"] == theirs["step"]
        assert ours["new"] == pytest.approx(theirs["new"], abs=1e-3)


@pytest.mark.slow
def test_ranks_with_different_clocks_share_one_run_folder(tmp_path, monkeypatch):
    """Its default name holds the time, which each rank reads for itself."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\ntime.strftime = lambda *_: 'at-' + os.environ.get('RANK', '')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [a.replace("a3po.py", str(ROOT / "a3po.py")) for a in SHORT]
    done = run(*command, "--steps=1", "--eval_every=0", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name == "demo-a3po-seed3-at-0"
    assert json.loads((folder / "config.json").read_text())["output_dir"] == f"runs/{folder.name}"
    assert (folder / "checkpoints" / "step_1" / "resume" / "step.json").exists()
    assert len(list((folder / "checkpoints" / "step_1" / "resume").glob("*.distcp"))) == 2


def test_presets_are_sets_of_fields():
    names = {field.name for field in dataclasses.fields(a3po.Config)}
    for name, (text, fields) in PRESETS.items():
        assert text and not set(fields) - names, name
        config = a3po.parse_args([f"--preset={name}", "--setting=paper"])
        assert all(getattr(config, key) == value for key, value in fields.items())
    assert a3po.parse_args(["--preset=dapo", "--rho_positive=3"]).rho_positive == 3
    assert a3po.parse_args(["--setting=paper"]).prompts_per_step == 512


def test_training_data_may_be_several_files_too(tmp_path):
    a, b, odd = (tmp_path / f"{name}.jsonl" for name in ("a", "b", "c,d"))
    for path in (a, b, odd):
        path.write_text(f'{{"problem": "Compute {path.stem}.", "answer": "1"}}\n')
    for data, stems in ((f"{a}, {b}", "ab"), (f"{b},", "b"), (str(odd), ["c,d"])):
        config = a3po.parse_args(["--setting=demo", f"--data={data}", "--eval_data="])
        read = [prompt.problem.text for prompt in a3po.load_inputs(config)[1].prompts]
        assert read == [f"Compute {stem}." for stem in stems]
    args = evaluation.parse_args(["--model=m", f"--data={a},{b}"])
    assert [*evaluation.check_args(args)] == ["a", "b"]
    with pytest.raises(UsageError, match="data '/no/b.jsonl': expected an existing"):
        list(read_rows(f"{a},/no/b.jsonl"))


def test_held_out_files_may_have_spaces_around_and_in_their_names(tmp_path):
    names = "a b.jsonl", "c.jsonl"
    for name in names:
        (tmp_path / name).write_text(f'{{"problem": "Compute {name}.", "answer": "1"}}\n')
    held_out = ", ".join(str(tmp_path / name) for name in names)
    config = a3po.parse_args(["--setting=demo", f"--eval_data={held_out}"])
    assert [prompt.problem.text for prompt in a3po.load_inputs(config)[2]] == [
        f"Compute {name}." for name in names]


@pytest.mark.parametrize("setting, lr", [("demo", 0.00015), ("paper", 1e-06)])
def test_help_has_groups_choices_and_the_defaults_of_the_setting(setting, lr, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        a3po.main([f"--setting={setting}", "--preset=grpo", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"--setting {setting} --preset grpo" in out
    assert f"AdamW learning rate [P] (default: {lr})" in out
    assert "(default: 0.001)" in out and "--decay linear|exp|none" in out  # grpo's --kl_coef
    headings = [line[:-1] for line in out.splitlines() if line[:1] not in (" ", "") and ":" in line]
    assert {"what to run", "batch", "loss", "optimiser", "presets"} <= {*headings}
    assert "[C] its authors' code" in out and all(f"  {name} " in out for name in PRESETS)


def test_what_runs_is_said_first(capsys, monkeypatch):
    monkeypatch.setattr(a3po, "load_inputs", lambda _: None)
    a3po.main(["--setting=demo", "--preset=dapo", "--data=mine.jsonl", "--steps=7", "--check"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("dapo in the demo setting: ")
    assert "mine.jsonl, 7 steps of 32 x 8" in first
    assert "at most 64 tokens, lr 0.00015, 1 rank(s)" in first


@pytest.mark.slow
def test_the_gpu_checks_run_on_a_cpu_too(tmp_path):
    out = tmp_path / "found.jsonl"
    done = run("tests/tools/gpu_check.py", f"--out={out}", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    lines = [line for line in found if "what" in line]
    assert [line["what"] for line in lines] == [
        text[:46].strip() for text in done.stdout.splitlines()[1:]]
    checks = " ".join(dict.fromkeys(line["check"] for line in lines))
    assert checks == "attention gradient parallel plan bf16 resume speed"
    assert sum(line["verdict"] == "ok" for line in lines) == 16
    assert [line["step"] for line in found if "reward" in line] == [0, 1, 2] * 2 + [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"found.jsonl", "found.log"}


@pytest.mark.slow
def test_the_gpu_checks_compare_two_ranks_with_one(tmp_path):
    done = run("tests/tools/gpu_check.py", f"--out={tmp_path / 'found.jsonl'}", "--ranks=2",
               "--only=parallel")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" ok") == 4


def test_a_gpu_check_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    """And what a run had measured before it failed is kept."""
    monkeypatch.syspath_prepend(ROOT / "tests/tools")
    import gpu_check

    def process(hour):
        code = "import sys; print('step 1'); sys.exit('error: no room')"
        gpu_check.whole(dict(failed=hour.start("-c", code)))

    def half_a_run(hour, name, save, *flags, ranks):
        folder = Path(flags[-1].partition("=")[2])
        folder.mkdir()
        step = dict(step=0, preemptions=3, rollout_tokens=9000, response_length=90, seconds=2,
                    mismatch_mean=0.01, ratio_max_deviation=0, skipped_updates=0, memory_gib=40.1,
                    tokens_per_second=90, seconds_update=1)
        (folder / "metrics.jsonl").write_text(json.dumps(step))
        return dict(failed="killed", kv_tokens=9000, planned=8900, held=2 << 30, sequences=64,
                    asleep=[dict(used=9 << 30, outside=1 << 30)])

    planned = dict(update_flops=1e12, tokens=9000, peak=40 << 30, held=dict(weights=20 << 30))
    monkeypatch.setattr(gpu_check, "GPU", True)
    monkeypatch.setattr(gpu_check.plan, "in_process", lambda *_: planned)
    monkeypatch.setattr(gpu_check.Hour, "inside", half_a_run)
    monkeypatch.setattr(gpu_check, "CHECKS", dict(
        process=process, fault=lambda hour: 1 / 0, plan=gpu_check.check_plan,
        run=lambda hour: gpu_check.check_precision(hour, "bf16"),
        good=lambda hour: hour.line("good", "1", "1", True)))
    with pytest.raises(SystemExit) as end:
        gpu_check.main([f"--out={tmp_path / 'found.jsonl'}"])
    assert end.value.code == 1
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    lines = {line["what"]: (line["measured"], line["expected"], line["verdict"])
             for line in found if "what" in line}
    assert len(lines) == len(capsys.readouterr().out.splitlines()) - 1
    assert lines["process"] == ("failed", "to end: error: no room", "LOOK")
    assert lines["fault"] == ("failed", "to end: ZeroDivisionError: division by zero", "LOOK")
    assert lines["run"] == ("failed", "to end: killed", "LOOK")
    assert lines["good"] == ("1", "1", "ok")
    assert lines["vLLM's room, tokens"][::2] == ("9,000", "ok")
    assert lines["preemptions of a step"] == ("3", "at most 36, as the mean load is 246%", "ok")
    assert lines["beside weights and Adam while vLLM sleeps, GiB"][::2] == ("7.0", "LOOK")
    assert lines["of it outside torch, GiB"][::2] == ("1.0", "ok")
    assert lines["the plan: memory of an update, GiB"][:2] == ("40", "weights 20")
    assert lines["bf16: memory of the update, GiB"] == ("40.1", "40.0 by the plan", "ok")
    assert [line["mismatch_mean"] for line in found if "step" in line] == [0.01]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_three_kills_change_nothing():
    done = run("tests/tools/kills.py", "--kills=3", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 kills, 7 steps: every line" in done.stdout


@pytest.mark.slow
def test_grpo_with_its_reference_model_runs(tmp_path):
    lines = train(tmp_path / "grpo", "--preset=grpo", "--steps=2", "--eval_every=0")
    steps = [line for line in lines if "reward" in line]
    assert len(steps) == 2 and steps[0]["kl_ref"] < 1 and steps[1]["kl_ref"] > 0


def test_a_reward_function_with_partial_credit(tmp_path):
    """Longer is better, no answers in the data; polarity is then the sign of the advantage."""
    (tmp_path / "taste.py").write_text(
        "def length(response, problem):\n"
        "    assert problem.text.startswith('Compute')\n"
        "    return len(response) / 100\n"
    )
    data = tmp_path / "open.jsonl"
    data.write_text("".join(f'{{"prompt": "Compute {i}*2+3+4."}}\n' for i in range(9)))
    command = [a.replace("a3po.py", str(ROOT / "a3po.py")) for a in SHORT]
    done = run(*command, "--steps=2", "--eval_data=", f"--data={data}", "--reward=taste:length",
               f"--output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line for line in metrics(tmp_path / "run") if "reward" in line]
    assert all(0.1 < line["reward"] < 1 and line["dead_groups"] < 0.5 for line in steps)
    assert all(line["entropy_positive"] > 0 and line["entropy_negative"] > 0 for line in steps)


TASTES = """
def none(response, problem): pass
def one(response): return 1
def ends(response, problem): raise SystemExit(3)
"""


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--reward=nowhere:f"], "expected module:function"),
        (["--reward=taste:none"], "--reward taste:none failed for an empty response: TypeError: "
         "must be real number, not NoneType; return a number, (number, correct) or (number, corr"),
        (["--reward=taste:one"], "TypeError: one() takes 1 positional argument but 2 were given"),
        (["--reward=taste:ends"], "failed for an empty response: SystemExit: 3; return"),
        (["--reward=broken:f"], "does not load (SyntaxError: invalid syntax (broken.py, line 1))"),
        (["--reward=ends:f"], "'ends:f' does not load (SystemExit: 1): expected module:function"),
        (["--model=/no/such/model"], "neither a save_pretrained folder nor a hub model"),
        (["--data=/no/such/file.jsonl"], "expected an existing .jsonl or .parquet file"),
        (["--group_size=1"], "--group_size 1: give a value in [2, inf)"),
        (["--tis_cap=-1"], "--tis_cap -1.0: give a value in [0, inf)"),
        (["--preset=lp_reg", "--proxy_delta=0"], "--proxy_delta 0.0: give a value in (0, 1]"),
        (["--max_grad_norm=0"], "--max_grad_norm"),
        (["--clip_low=-0.1"], "--clip_low"),
        (["--negative_weight=-1"], "--negative_weight"),
        (["--eval_every=-1"], "--eval_every"),
        (["--grade_timeout=0"], "--grade_timeout"),
        (["--lr=nan"], "--lr nan"),
        (["--lr=inf"], "--lr inf"),
        (["--max_refills=-1"], "--max_refills"),
        (["--seed=-1"], "--seed"),
        (["--max_response_length=100000"], "exceed the context"),
        (["--mini_batches=64"], "--mini_batches 64"),
        (["--token_fraction=0"], "--token_fraction"),
        (["--temperature=0"], "--temperature"),
        (["--template=Q"], "{problem}"),
        (["--overlong_buffer=64"], "--overlong_buffer"),
    ],
)
def test_bad_input_is_one_sentence(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(a3po, "build", lambda *_: pytest.fail("work started"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "taste.py").write_text(TASTES)
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "ends.py").write_text("raise SystemExit(1)")
    with pytest.raises(SystemExit) as stop:
        a3po.main(["--setting=demo", f"--output_dir={tmp_path / 'out'}", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "out").exists()


def test_faults_of_vllm_are_sentences(capsys, monkeypatch):
    class Dying:
        stop_ids: list = []
        asleep = False

        def __init__(self):
            self.llm = self.llm_engine = self

        def add_request(self, *_):
            pass

        def has_unfinished_requests(self):
            return True

        def step(self):
            raise RuntimeError("Traceback of the core\nCUDA out of memory. Tried 2 GiB")

        def collective_rpc(self, *_, **__):
            raise KeyError("lm_head.weight")

    engine, prompt = Dying(), Prompt(None, [1, 2])
    with pytest.raises(UsageError, match=r"failed while sampling \(RuntimeError: .*out of memory.*"
                                         "lower --max_num_seqs"):
        next(Engine.generate(engine, [prompt], 1, [0], max_tokens=3))
    with pytest.raises(UsageError, match="failed to take the new weights .KeyError: 'lm_head"):
        Engine.sync(engine, [])
    assert capsys.readouterr().err.count("Traceback (most recent call last)") == 2
    monkeypatch.setenv("LOCAL_RANK", "1")  # whose traceback would be the same once more
    for text, lacks in (("No available memory for the cache blocks", True), ("no kernel", False),
                        ("an illegal memory access was encountered", False),
                        ("out of resource: shared memory, Required: 300000", False)):
        with (pytest.raises(UsageError) as error, of_vllm("to start")):
            raise RuntimeError(text)
        assert ("--max_num_seqs" in str(error.value)) == lacks
    assert not capsys.readouterr().err


def test_graders_that_fail_end_the_run():
    def group(*statuses):
        return [Sample(None, [], [], "stop", grade=verify.Grade(False, None, s, "worker: killed"))
                for s in statuses]

    a3po.check_grades([group("ok", "timeout", "no_answer", "bad_reference")] * 5)
    a3po.check_grades([group("ok", "ok")] * 9 + [group("ok", "error")])
    with pytest.raises(UsageError, match="graders failed for 2 of 8 responses, first: worker: kil"):
        a3po.check_grades([group("ok", "error")] * 2 + [group("ok", "ok")] * 2)


def test_an_error_in_the_middle_says_where_the_run_stands(tmp_path, capsys, monkeypatch):
    def fail(config, run):
        run.step = 7
        (run.checkpoints / "step_5").mkdir(parents=True)
        raise UsageError("vLLM failed")

    monkeypatch.setattr(a3po, "train", fail)
    with pytest.raises(SystemExit):
        a3po.main(["--setting=demo", f"--output_dir={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert "error: vLLM failed\nstopped at step 7; checkpoint at step 5; go on with " in said


@pytest.mark.parametrize("broken", [False, True])
def test_an_engine_that_wakes_up_as_another_is_seen(broken, monkeypatch):
    class Sleeper:
        gap = 0.0

        def generate(self, prompts, n, seeds, **_):
            yield from reversed([(i, Sample(p, np.ones(2), np.array([-1.0 - i - self.gap, -5 * (
                self.gap > 0)]), "stop")) for i, p in enumerate(prompts)])  # in any order

        def sleep(self):
            self.gap = 0.1 if broken else 1e-3

        def sync(self, weights):
            pass

    monkeypatch.setattr(checks, "full_weights", lambda *_: None)
    if not broken:
        return checks.check_sleep(Sleeper(), None, None, [1, 2])
    with pytest.raises(UsageError, match=r"put to sleep .*log p -1.000, then -1.100"):
        checks.check_sleep(Sleeper(), None, None, [1, 2])


@pytest.mark.parametrize(
    "gap, moved, says",
    [(0, 0, ""), (5e-4, 0, ""), (2e-3, 0, "mismatch_mean 0.002"), (float("nan"), 0, "mismatch"),
     (None, None, ""), (0, 5e-4, ""), (0, 2e-3, "ratio_max_deviation 0.002"),
     (0, float("nan"), "ratio_max_deviation")],
)
def test_a_run_stops_where_vllm_and_the_trainer_differ(gap, moved, says):
    """None: a step without a signal."""
    metrics = dict(mismatch_mean=gap, ratio_max_deviation=moved)
    if not says:
        return checks.check_agreement(metrics, None)
    with pytest.raises(UsageError, match=says):
        checks.check_agreement(metrics, None)
    if gap:
        checks.check_agreement(dict(metrics, mismatch_mean=0.02), torch.bfloat16)


def test_a_token_that_vllm_gives_no_chance_is_no_mismatch():
    zeros = torch.zeros(1, 2)
    batch = dict(mask=zeros == 0, correct=torch.tensor([True]), old_logprobs=zeros - 1,
                 rollout_logprobs=torch.tensor([[-1.5, -torch.inf]]), entropy=zeros)
    assert token_metrics([[batch]])["mismatch_mean"] == 0.25


GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """Pretend a GPU of so many GiB."""
    def of(size):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda _: SimpleNamespace(total_memory=int(size * GIB)))
    return of


def sizes(parameters, *flags):
    """Return what vLLM gets beside a model of Qwen3-8B's shape and so many parameters."""
    about = SimpleNamespace(num_hidden_layers=36, num_key_value_heads=8, head_dim=128,
                            num_attention_heads=32, hidden_size=4096)
    weights = torch.empty(parameters, device="meta")
    inner = SimpleNamespace(config=about, parameters=lambda: [weights])
    return memory.engine_sizes(a3po.parse_args(["--setting=paper", *flags]), inner)


def test_what_cannot_fit_into_a_gpu_is_refused_by_arithmetic(card):
    """16 bytes a parameter that a rank holds (weights, gradients, Adam), 4 more with a reference,
    and 5 GiB beside."""
    small = ["--max_response_length=64", "--max_prompt_length=64", "--gpu_memory=0.05"]
    for reference in (0, 1):
        needed = 5 + (16 + 4 * reference) * 10**10 / GIB
        card(needed - 0.01)
        with pytest.raises(UsageError, match="does not fit: .* take more GPUs"):
            sizes(10**10, *small, f"--kl_coef={reference}")
    card(80)
    assert sizes(10**9)["gpu_memory"] == 0.76  # 0.79 are left
    assert sizes(10**9, "--gpu_memory=0.79")["gpu_memory"] == 0.79
    with pytest.raises(UsageError, match=r"--gpu_memory 0.8 leaves no room .* at most 0.79$"):
        sizes(10**9, "--gpu_memory=0.8")
    with pytest.raises(UsageError, match="vLLM has room for .* take more GPUs"):
        sizes(3 * 10**9, "--gpu_memory=0.11")
    assert sizes(8 * 10**9, "--offload")["gpu_memory"] == 0.9


def test_sequences_follow_the_room(card):
    seen = []
    for size in (30, 80, 141, 200):
        card(size)
        seen.append(sizes(10**9)["max_num_seqs"])
    assert 64 == seen[0] < seen[1] < seen[2] < 512 == seen[3]
    assert sizes(10**9, "--max_num_seqs=17")["max_num_seqs"] == 17


@pytest.mark.parametrize("flags, held", [
    ([], 0.25), (["--shard_ranks=2"], 0.5), (["--parallel=ddp"], 1), (["--offload"], 0)])
def test_the_arithmetic_comes_before_the_weights_are_moved(
        flags, held, tiny_model, monkeypatch, card):
    whole = sum(p.numel() for p in a3po.load_model(tiny_model, "grids").parameters())
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(a3po, "distribute", lambda *_: pytest.fail("moved"))
    config = a3po.parse_args(["--setting=demo", f"--model={tiny_model}", *flags])
    assert memory.states(config, whole) == (12 * int(held * whole), 16 * int(held * whole))
    card(1)
    with pytest.raises(UsageError, match="^it does not fit"):
        a3po.build(config, "cuda:0", "varlen", torch.bfloat16)


def planted(draw: int, dead: float) -> list[Sample]:
    """A group that is dead with this probability, and is longer then."""
    rng = np.random.default_rng(draw)
    live = rng.random() >= dead
    length = int(rng.lognormal(3, 1) * (1 if live else 3)) + 1
    return [Sample(Prompt(draw, [1]), np.zeros(length, int), np.zeros(length), "stop", reward=x,
                   grade=verify.Grade(x > 0, None)) for x in (1.0, float(not live))]


@pytest.mark.parametrize("dead", [0.0, 0.2, 0.4, 0.6, 0.95])
def test_draws_by_expected_need_choose_no_group_by_its_length(dead, monkeypatch):
    """What is trained on are all live groups in the order of their draws: none twice, none left
    out, none because it ended first; mostly in one round."""
    rounds, used = [], []
    monkeypatch.setattr(a3po, "sample_draws", lambda _engine, _tokenizer, _judge, draws, *rest: (
        rounds.append(rest[-1]) or [planted(draw, dead) for draw, _ in draws]))
    config = a3po.Config(prompts_per_step=64, group_size=2)
    sampler = PromptSampler([Prompt(None, [1])] * 7, seed=0)
    for step in range(100):
        if step == 50:  # a resumed run goes on in the same way
            state, sampler = sampler.state(), PromptSampler([Prompt(None, [1])] * 7, seed=0)
            sampler.restore(json.loads(json.dumps(state)))
        groups, drawn = a3po.sample_groups(None, None, None, sampler, config, {})
        assert len(groups) <= 64 and len(drawn) <= 4 * 64
        used += [group[0].prompt.problem for group in groups]
    expected = [draw for draw in range(sampler.cursor) if is_live(planted(draw, dead))]
    assert used == expected
    if dead < 0.9:
        assert len(used) == 6400 and len(rounds) <= 1.25 * 100


def test_training_on_nothing_is_said():
    problem = Problem("1", "?", "1")
    grades = [verify.Grade(False, None, "bad_reference", "cannot be parsed")] * 2
    group = [Sample(Prompt(problem, [1]), [1], [0.0], "stop", grade=grade) for grade in grades]
    said = a3po.no_signal([group], "")
    assert "0 of 2 responses are correct, 2 bad_reference, first: cannot be parsed" in said
    for sample in group:
        sample.grade = verify.Grade(False, None, "error", "ValueError: no", float("nan"))
    with pytest.raises(UsageError, match="--reward x:y failed for all 2 responses, first: Value"):
        a3po.no_signal([group], "x:y")
    metrics = rollout_metrics([group], torch.zeros(2), 1)
    assert metrics["reward_errors"] == 2 and metrics["response_length_positive"] is None
    nothing = token_metrics([]) | a3po.diagnose([], 4)
    empty = ("entropy", "entropy_positive", "mismatch_mean", "loss", "ratio_max", "grad_norm")
    assert all(nothing[name] is None for name in empty)


def test_every_number_has_a_range_that_holds_the_presets():
    for field in dataclasses.fields(a3po.Config):
        if type(field.default) in (int, float):
            assert field.metadata["low"] >= 0
            with pytest.raises(UsageError, match=f"--{field.name} nan: give a value in [\\[(]"):
                a3po.check_config(a3po.Config(**{field.name: float("nan")}))
    for setting in SETTINGS:
        for preset in PRESETS:
            a3po.check_config(a3po.parse_args([f"--setting={setting}", f"--preset={preset}"]))


def test_unknown_flags_and_indivisible_batches_are_refused(tmp_path, capsys, monkeypatch):
    for flags, says in (
        (["--learning_rate=1"], "--learning_rate=1: no such flag, did you mean --lr?"),
        (["--temprature", "1"], "--temprature: no such flag, did you mean --temperature?"),
        (["--max-prompt-length=9"], "no such flag, did you mean --max_prompt_length?"),
        (["--zzz"], "--zzz: no such flag; --help has"), (["--lr=x"], "--lr: invalid float value"),
        (["--preset=no"], "argument --preset: invalid choice"), (["--lr"], "expected one argument"),
    ):
        with pytest.raises(SystemExit) as stop:
            a3po.main(flags)
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.err.startswith("error: ") and says in said.err
        assert said.err.count("\n") == 1 and not said.out
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        a3po.main(["--setting=demo"])
    assert "--prompts_per_step 32 is not divisible by the 3 ranks" in capsys.readouterr().err


def test_a_runs_own_configuration_is_where_another_starts(tmp_path, capsys):
    own = ["--setting=demo", "--preset=dapo", "--lr=0.5", "--no-norm_std",
           "--template=Q: {problem}\nA:"]
    about = vars(a3po.parse_args([*own, "--output_dir=x", "--resume=auto"]))
    (tmp_path / "config.json").write_text(json.dumps(about | dict(environment={})))
    def read(*flags, file="config.json"):
        return a3po.parse_args(a3po.with_config([f"--config={tmp_path / file}", *flags]))

    again = vars(read("--seed=7"))
    differ = {name for name in about if again[name] != about[name]}
    assert differ == {"seed", "config", "output_dir", "resume"} and again["seed"] == 7
    assert (read("--lr=2", "--norm_std").lr, read("--norm_std").norm_std) == (2.0, True)
    other = read("--preset=grpo")  # its fields are the preset's, what the run changed stays
    assert (other.preset, other.clip_high, other.lr, other.steps) == ("grpo", 0.2, 0.5, 100)
    (tmp_path / "part.json").write_text(json.dumps(dict(clip_high=0.3, dynamic_sampling=True)))
    part = read("--preset=grpo", file="part.json")
    assert (part.clip_high, part.dynamic_sampling, part.kl_coef) == (0.3, True, 0.001)
    (tmp_path / "wrong.json").write_text('{"learning_rate": 1}')
    for file, says in (("wrong.json", "did you mean --lr"), ("none.json", "damaged or unreadable")):
        with pytest.raises(SystemExit):
            a3po.main([f"--config={tmp_path / file}"])
        assert says in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(whole_run, capsys):
    with pytest.raises(SystemExit):
        a3po.main(["--setting=demo", f"--output_dir={whole_run[0]}"])
    assert "holds a run already" in capsys.readouterr().err
