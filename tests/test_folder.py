"""Checkpoints that are kept, damaged or do not fit; the run folder, and files that cannot be
written; the program where something is missing."""

import dataclasses
import errno
import fcntl
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, run
from test_eval import TRAINED, lines, records

import a3po
import eval as evaluation
from rollout import Problem, Prompt, Sample, load_tokenizer
from shelf import checks
from shelf.checkpoints import Checkpoints
from shelf.config import Config
from shelf.folder import RunFolder, all_see, append_records, claim
from shelf.ranks import UsageError
from shelf.show import show_example
from verify import Grade


@pytest.fixture(scope="module")
def parts(tiny_model):
    config = a3po.parse_args(["--setting=demo", f"--model={tiny_model}"])
    policy, model, _, optimizer = a3po.build(config, "cpu", "grids", None)
    for parameter in model.parameters():  # so that Adam has a state
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return policy, model, optimizer, load_tokenizer(tiny_model, 8, 8)[0]


def checkpoints(folder: Path, parts, keep: int = 0) -> Checkpoints:
    return Checkpoints(folder, *parts, torch.float32, keep)


def fill(model, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, parts, capsys):
    kept, model = checkpoints(tmp_path, parts), parts[1]
    for step in (1, 2, 3):
        fill(model, step)
        assert kept.save(step, dict(cursor=10 * step)) == step
    assert not (tmp_path / "step_1/resume").exists()
    assert kept.resume() == (3, dict(cursor=30))
    [shard] = (tmp_path / "step_3/resume").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert kept.resume() == (2, dict(cursor=20))
    assert all((parameter == 2).all() for parameter in model.parameters())
    assert "step_3/resume is damaged" in capsys.readouterr().out
    (tmp_path / "step_2/resume/step.json").write_text("{")
    with pytest.raises(UsageError, match="no checkpoint in .* can be resumed from: restore one"):
        kept.resume()
    assert checkpoints(tmp_path / "none", parts).resume() == (0, {})


@pytest.mark.parametrize("room", [100_000, 1_000_000], ids=["in the weights", "in resume"])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, parts, capsys, room):
    """A limit on the size of files stands for the disk."""
    kept = checkpoints(tmp_path, parts)
    assert kept.save(1, {}) == 1
    weights = (tmp_path / "step_1/model.safetensors").stat().st_size
    [shard] = tmp_path.glob("step_1/resume/*.distcp")
    assert (weights > room) == (room == 100_000) and shard.stat().st_size > room
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        assert kept.save(2, {}) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().out
    assert "checkpoint of step 2 was not written: " in said and "File too large" in said
    assert "; it takes over 1.53 MB, " in said and "were left: make room. Older ones stay" in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert before == {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    assert kept.resume() == (1, {}) and kept.save(2, {}) == 2


def test_what_is_no_lack_of_room_is_not_called_one(tmp_path, parts, capsys, monkeypatch):
    kept = checkpoints(tmp_path, parts)
    monkeypatch.setattr(kept.model.generation_config, "temperature", 0.5)
    assert kept.save(1, {}) == 0
    said = capsys.readouterr().out
    assert "GenerationConfig is invalid" in said and "`temperature`" in said and "room" not in said


@pytest.mark.parametrize("generation, kept", [
    (dict(temperature=0.9, top_p=0.6), dict(temperature=0.9, top_p=0.6, do_sample=True)),  # Vicuna
    (dict(temperature=0.7, do_sample=True), dict(temperature=0.7, do_sample=True)),
    (dict(eos_token_id=[1, 2], pad_token_id=-1), dict(eos_token_id=[1, 2])),  # LLaMA
    (dict(early_stopping=True, length_penalty=2.0), {}),
    (None, dict(temperature=0.7, do_sample=True)),  # in config.json
])
def test_a_checkpoint_of_any_generation_config_can_be_written(tmp_path, generation, kept):
    model = Path(make_model(tmp_path / "model"))
    (model / "generation_config.json").unlink()
    if generation is None:
        about = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(about | dict(temperature=0.7)))
    else:
        (model / "generation_config.json").write_text(json.dumps(generation))
    a3po.main(["--setting=demo", f"--model={model}", "--check"])
    a3po.load_model(str(model), "grids").save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert again.items() >= kept.items() and again.get("pad_token_id") != -1
    assert again.keys() & {*(generation or {})} == kept.keys() & {*(generation or {})}


def test_what_cannot_be_saved_is_refused_before_it_is_trained(tmp_path, tiny_model):
    tokenizer, config = load_tokenizer(tiny_model, 8, 8)
    checks.check_saving("m", config, tokenizer)
    with pytest.raises(UsageError, match="model 'm' cannot be built and saved again .KeyErr"):
        config.hidden_act = "no"
        checks.check_saving("m", config, tokenizer)


def test_a_checkpoint_in_16_bits_says_so(tmp_path, parts):
    kept = Checkpoints(tmp_path, *parts, torch.bfloat16, 0)
    kept.save(1, {})
    assert json.loads((tmp_path / "step_1/config.json").read_text())["dtype"] == "bfloat16"


def test_the_newest_are_kept_with_ordinary_modes(tmp_path, parts):
    kept = checkpoints(tmp_path, parts, keep=2)
    for step in (8, 9, 10, 11):
        kept.save(step, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]
    modes = {path.stat().st_mode for path in tmp_path.glob("step_11/*") if path.is_file()}
    (tmp_path / "file").touch()
    assert modes == {(tmp_path / "file").stat().st_mode}


def test_a_copy_that_the_user_made_is_left_alone(tmp_path, parts):
    """It is no checkpoint to resume from, and is not deleted as an old one."""
    kept = checkpoints(tmp_path / "checkpoints", parts, keep=1)
    kept.save(1, {})
    shutil.copytree(kept.folder / "step_1", kept.folder / "step_1-best")
    (kept.folder / "step_").mkdir()
    assert kept.save(2, {}) == 2 and kept.resume() == (2, {})
    assert sorted(path.name for path in kept.folder.iterdir()) == ["step_", "step_1-best", "step_2"]
    assert (kept.folder / "step_1-best/resume/step.json").exists()
    assert RunFolder(settings(tmp_path)).saved() == 2


def test_large_checkpoints_are_announced(tmp_path, parts, capsys):
    kept = checkpoints(tmp_path / "not yet", parts, keep=0)
    kept.announce()
    assert capsys.readouterr().out == ""  # the demo's are small
    kept.weights_bytes, kept.resume_bytes = 16_400_000_000, 98_400_000_000
    kept.announce()
    assert "takes 16.4 GB, and the newest 98.4 GB more" in capsys.readouterr().out
    kept.weights_bytes = 10**18
    kept.announce()
    assert "takes 1e+09 GB" in (said := capsys.readouterr().out) and "TOO LITTLE" in said


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    folder = RunFolder(a3po.parse_args(["--setting=demo", f"--output_dir={tmp_path}"]))
    folder.open(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(UsageError, match="metrics.jsonl cannot be written .*large.*: make ro"):
            folder.append("metrics.jsonl", dict(step=0, text="x" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_whose_folder_is_lost_ends_with_a_sentence(tmp_path):
    folder = RunFolder(a3po.parse_args(["--setting=demo", f"--output_dir={tmp_path}/run"]))
    folder.open(0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UsageError, match="metrics.jsonl cannot be written .*No such.*: make room"):
        folder.append("metrics.jsonl", dict(step=0))
    assert folder.asked_to_stop() is False


def test_a_folder_that_cannot_be_written_is_found_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr(a3po, "load_inputs", lambda _: pytest.fail("work started"))
    with pytest.raises(SystemExit):
        a3po.main(["--setting=demo", "--output_dir=/proc/run"])  # not even root can
    assert "--output_dir /proc/run: /proc cannot be written to" in capsys.readouterr().err


# ---- the run folder -----------------------------------------------------------------------------


def settings(path, **changes) -> Config:
    fixed = dict(setting="demo", preset="a3po", seed=3, steps=60, log_rollouts=1,
                 output_dir=str(path))
    return Config(**fixed | changes)


def add_checkpoint(folder: RunFolder, step: int) -> None:
    (folder.checkpoints / f"step_{step}").mkdir(parents=True)


def test_a_run_names_its_folder_and_writes_over_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(settings(""))
    assert re.fullmatch(r"runs/demo-a3po-seed3-\d{4}-\d{6}", str(folder.path))
    assert folder.checkpoints == folder.path / "checkpoints" and not list(tmp_path.iterdir())
    folder.open(0)
    config = json.loads((folder.path / "config.json").read_text())
    assert config.pop("environment").keys() >= {"commit", "torch", "python", "command"}
    assert config == vars(settings(folder.path))
    with pytest.raises(UsageError) as error:  # a run that was killed early is one too
        RunFolder(settings(folder.path))
    assert str(error.value) == (f"--output_dir {folder.path} holds a run already: go on with it "
                                "(--resume auto) or give another folder")
    assert RunFolder(settings(folder.path, resume="auto")).path == folder.path
    with pytest.raises(UsageError, match="^--output_dir .*config.json cannot .*Not a dire"):
        RunFolder(settings(folder.path / "config.json", resume="auto"))


def made_groups():
    """Two groups of two samples, with what a user's reward function may return."""
    groups = []
    for i in range(2):
        prompt = Prompt(Problem(f"p{i}", f"What is {i}+1?", str(i + 1)), [7, 8])
        grade = Grade(np.bool_(i == 0), "1", "ok", reward=np.float32(0.5))
        one = Sample(prompt, np.arange(3), np.zeros(3), "stop", f"\\boxed{{{i}}}", grade)
        one.reward = np.float32(0.5)
        groups.append([one, Sample(prompt, np.arange(2), np.zeros(2), "length", "other", grade)])
    return groups


def log(folder, steps, evaluate_at=()):
    """Metrics and a response of each of the steps, and evaluations before some of them."""
    values = np.random.default_rng(1).random((100, len(TRAINED)))
    for step in steps:
        if step in evaluate_at:
            folder.log_eval(step, evaluation.summarize("math", [records([1, step > 2])]))
        folder.log_step(dict(zip(sorted(TRAINED), values[step], strict=True)) | dict(step=step))
        folder.log_rollouts(step, made_groups())


def test_a_run_folder_and_its_console(tmp_path, capsys, monkeypatch):
    clock = itertools.count(1000.0)  # a second from each look at it to the next
    monkeypatch.setattr("shelf.report.time.time", lambda: next(clock))
    folder = RunFolder(settings(tmp_path / "run"))
    folder.open(0)
    log(folder, range(60), [0, 20])
    folder.log_eval(60, evaluation.summarize("math", [records([1, 1])]))
    add_checkpoint(folder, 60)
    folder.finish()
    out = capsys.readouterr().out
    (folder.checkpoints / "step_60").rename(folder.checkpoints / "step_40")
    with pytest.raises(UsageError, match="trained model was not saved"):
        folder.finish()
    console = [line for line in out.splitlines() if line[:1] == " "]
    assert console[0] == "     0  held-out accuracy 0.500 +- 0.000, length 10.0"
    heading = ("  step  reward entropy  length    rho |ratio-1| mismatch dead grad norm seconds")
    assert len(heading) <= 80 and "python eval.py glossary; |ratio-1| over 10 " in out
    table = [line for line in console if "held-out" not in line]
    assert 22 < len(table) < 60  # not every step
    assert [i for i, line in enumerate(table) if line == heading] == list(range(0, len(table), 21))
    steps = [line for line in lines(folder.path / "metrics.jsonl") if "reward" in line]
    at, reward = table[1].split()[:2]
    assert reward == f"{steps[int(at)]['reward']:.3f}" and len(table[1]) == len(heading)
    assert len(steps) == 60 and steps[0].keys() == TRAINED
    first, *_ = rollouts = lines(folder.path / "rollouts.jsonl")
    assert len(rollouts) == 60 and first == dict(
        step=0, id="p0", problem="What is 0+1?", response="\\boxed{0}", kind="math", answer="1",
        extracted="1", correct=True, status="ok", detail="", reward=0.5, parts={}, length=3,
        finish_reason="stop")
    summary = (folder.path / "summary.md").read_text()
    assert "before (step 0)" in summary and "after (step 60)" in summary and summary in out
    assert (folder.path / "curves.png").stat().st_size > 10_000
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "checkpoints", "config.json", "curves.png", "metrics.jsonl", "rollouts.jsonl", "summary.md"]


def test_a_reward_function_that_fails_now_and_then_is_said_once(tmp_path, capsys):
    folder = RunFolder(settings(tmp_path))
    folder.open(0)
    for step in range(3):
        groups = made_groups()
        if step:
            groups[1][1].grade = Grade(None, None, "error", f"ValueError: bad {step}", math.nan)
        folder.log_rollouts(step, groups)
    said = capsys.readouterr().out
    assert said.count("NOTE") == 1
    assert "NOTE: --reward failed for 1 responses (ValueError: bad 1): their reward is" in said
    found = [(x["step"], x["response"], x["detail"]) for x in lines(tmp_path / "rollouts.jsonl")]
    right, failed = "\\boxed{0}", "ValueError: bad"
    assert found == [(0, right, ""), (1, right, ""), (1, "other", f"{failed} 1"),
                     (2, right, ""), (2, "other", f"{failed} 2")]


def test_what_cannot_be_resumed_is_kept(tmp_path, capsys):
    again = settings(tmp_path / "run", resume="auto")
    for lost in (1, 2):
        folder = RunFolder(again)
        folder.open(0)
        log(folder, range(lost))
        assert len(lines(folder.path / "metrics.jsonl")) == lost
    assert len(lines(tmp_path / "run/lost-1/metrics.jsonl")) == 1
    assert (tmp_path / "run/lost-1/config.json").exists()
    assert "lost-1" in capsys.readouterr().out
    RunFolder(again).open(0)
    assert len(lines(tmp_path / "run/lost-2/metrics.jsonl")) == 2


HOLD = """
import sys
import time
sys.path.insert(0, {root!r})
from shelf.folder import claim
from shelf.ranks import UsageError
try:
    claim("--out", __import__("pathlib").Path({folder!r}))
except UsageError as why:
    print(why)
print("holds", flush=True)
input()
"""


def test_a_folder_is_one_runs_at_a_time(tmp_path, monkeypatch):
    def other() -> subprocess.Popen:
        code = HOLD.format(root=str(ROOT), folder=str(tmp_path / "run"))
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, "-c", code], **pipes)

    with other() as first, other() as second:
        said = sorted(process.stdout.readline() for process in (first, second))
        assert said == [f"--out {tmp_path}/run: another run is writing there: wait until it ends, "
                        "or give another folder\n", "holds\n"]
        with pytest.raises(UsageError, match="^--output_dir .*another run is writing there"):
            claim("--output_dir", tmp_path / "run")
        first.kill()  # a lock ends with its process, however that ends
        second.kill()
    for _ in range(2):  # the process itself may go on with its own
        assert claim("--output_dir", tmp_path / "run") == tmp_path / "run"


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert claim("--output_dir", tmp_path / "run") == tmp_path / "run"
    append_records(tmp_path / "run/x.jsonl", [dict(step=np.int64(1))])
    assert lines(tmp_path / "run/x.jsonl") == [dict(step=1)]


def test_two_runs_into_one_folder_and_two_evaluations(tmp_path, monkeypatch, capsys):
    """The second is refused before anything in the folder changes."""
    monkeypatch.setattr(a3po, "build", lambda *_: pytest.fail("work started"))
    monkeypatch.setattr(a3po.ranks, "init_distributed", lambda: "cpu")
    monkeypatch.setattr(a3po, "load_inputs", lambda _: [None] * 4)
    monkeypatch.setattr(evaluation, "init_distributed", lambda: "cpu")
    first = RunFolder(settings(tmp_path))
    with (tmp_path / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        first.open(0)
        log(first, range(2))
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        for main, flags in (
            (a3po.main, ["--setting=demo", f"--output_dir={tmp_path}", "--resume=auto",
                         "--resume_changed"]),
            (evaluation.main, ["--model=demo/model", "--limit=1", f"--out={tmp_path}"]),
        ):
            with pytest.raises(SystemExit) as stop:
                main(flags)
            said = capsys.readouterr().err
            assert stop.value.code == 2 and "another run is writing there" in said
            assert said.startswith("error: --out") and said.count("\n") == 1
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_does_not_fit_on_the_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(settings(tmp_path))
    folder.open(0)
    add_checkpoint(folder, 60)
    monkeypatch.setattr("shelf.folder.draw_runs", full)
    with pytest.raises(UsageError, match="curves.png cannot be written .*No space left.*make room"):
        folder.finish()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match="config.json cannot be written .*No space left.*make ro"):
        folder.open(0)


def test_changed_flags_are_said_and_refused(tmp_path, capsys):
    folder = RunFolder(settings(tmp_path / "run", lr=1.0, steps=5))
    folder.open(0)
    log(folder, range(2))
    again = settings(tmp_path / "run", resume="auto", lr=2.0, steps=9)
    with pytest.raises(UsageError, match="--lr 1.0 -> 2.0; .*--resume_changed"):
        RunFolder(again)
    folder = RunFolder(dataclasses.replace(again, resume_changed=True))
    folder.open(2)
    assert "--lr 1.0 -> 2.0" in capsys.readouterr().out
    paths = [tmp_path / "run" / name for name in ("config.1.json", "config.json")]
    old, new = (json.loads(path.read_text()) for path in paths)
    assert (old["lr"], new["lr"]) == (1.0, 2.0)
    RunFolder(settings(tmp_path / "run", resume="auto", lr=2.0, steps=11))


@pytest.mark.parametrize("command", ["resume", "plot", "show", "compare", "eval"])
@pytest.mark.parametrize("text", ["", '{"seed": 1, "pre', "[1]"])
def test_a_damaged_file_of_ours_is_one_sentence(command, text, tmp_path, capsys):
    name = "results.json" if command in ("compare", "eval") else "config.json"
    if name == "config.json":
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        if command == "resume":
            a3po.main(["--setting=demo", f"--output_dir={tmp_path}", "--resume=auto"])
        elif command == "eval":
            evaluation.main(["--model=demo/model", "--limit=1", f"--out={tmp_path}"])
        else:
            evaluation.main([command, str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {tmp_path / name}: damaged or unreada")


def test_a_file_stops_a_run_and_an_interrupt_says_how_to_go_on(tmp_path, capsys):
    folder = RunFolder(settings(tmp_path / "run"))
    folder.open(0)
    assert "touch" in capsys.readouterr().out and not folder.asked_to_stop()
    (folder.path / "stop").touch()
    assert folder.asked_to_stop() and not folder.asked_to_stop()
    assert "no checkpoint yet" in folder.where()
    log(folder, range(3))
    add_checkpoint(folder, 2)
    assert folder.where() == (f"stopped at step 2; checkpoint at step 2; go on with --resume "
                              f"auto --output_dir {folder.path}")


def test_going_on_drops_what_will_be_written_again(tmp_path, capsys):
    whole, cut = (RunFolder(settings(tmp_path / name)) for name in ("whole", "cut"))
    whole.open(0)
    cut.open(0)
    log(whole, range(6), [0, 3, 5])
    log(cut, range(5), [0, 3])
    for name in ("metrics.jsonl", "rollouts.jsonl"):  # by a kill
        with (cut.path / name).open("a") as file:
            file.write('{"step": 5, "rew')
    again = RunFolder(settings(cut.path, resume="auto"))
    again.open(3)
    once = [(cut.path / name).read_text() for name in ("metrics.jsonl", "rollouts.jsonl")]
    again.open(3)  # opened twice it is the same
    assert once == [(cut.path / name).read_text() for name in ("metrics.jsonl", "rollouts.jsonl")]
    assert {line["step"] for text in once for line in map(json.loads, text.splitlines())} == {
        0, 1, 2}
    log(again, range(3, 6), [0, 3, 5])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (cut.path / name).read_text() == (whole.path / name).read_text()
    add_checkpoint(whole, 60)
    add_checkpoint(again, 60)
    whole.finish()
    again.finish()
    assert (cut.path / "summary.md").read_text() == (whole.path / "summary.md").read_text()
    assert not [path for path in cut.path.iterdir() if path.name[0] == "."]


def test_a_kill_while_a_run_is_reopened_loses_nothing(tmp_path, monkeypatch):
    folder = RunFolder(settings(tmp_path))
    folder.open(0)
    log(folder, range(6))
    before = (tmp_path / "metrics.jsonl").read_text()
    replace = Path.replace

    def killed(self, target):
        if target.name == "metrics.jsonl":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.open(3)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    monkeypatch.undo()
    folder.open(3)
    assert before.startswith((tmp_path / "metrics.jsonl").read_text())


def test_other_ranks_take_rank_0s_folder_and_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("shelf.folder.on_rank_0", lambda make: Path("runs/of-rank-0"))
    monkeypatch.setattr("shelf.folder.all_see", lambda path: None)
    folder = RunFolder(settings(""))
    folder.path = claim("--output_dir", folder.path)
    assert folder.checkpoints == Path("runs/of-rank-0/checkpoints")
    folder.open(0)
    log(folder, range(3), [0])
    with pytest.raises(UsageError, match="trained model was not saved"):
        folder.finish()
    assert folder.checkpoints == Path("runs/of-rank-0/checkpoints")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_the_example_shows_where_the_loss_applies(capsys):
    class Letters:
        def decode(self, ids):
            return "".join("abcdefghi"[i] for i in ids)

    show_example(made_groups()[0][0], Letters())
    out = capsys.readouterr().out
    assert "2 prompt tokens (mask 0), 3 response tokens (mask 1), finish reason stop" in out
    assert "[0] 'hi'\n[1] 'abc'\n    extracted '1', reference '1': correct (ok)\n" in out
    tests = dict(public_test_cases=[], private_test_cases="x" * 10**6)  # too much for a console
    prompt = Prompt(Problem("1", "", tests, "code"), [])
    show_example(dataclasses.replace(made_groups()[0][0], prompt=prompt), Letters())
    assert len(capsys.readouterr().out) < 1000
    unjudged = Grade(None, None, reward=0.5)  # a reward function's
    show_example(dataclasses.replace(made_groups()[0][0], grade=unjudged), Letters())
    assert "no verdict (ok)" in capsys.readouterr().out


# ---- what is missing ----------------------------------------------------------------------------

WITHOUT = """
import sys
import time
for name in "numpy tqdm transformers vllm fcntl resource pyarrow math_verify sympy".split():
    sys.modules[name] = None
"""


def test_the_loss_needs_torch_alone():
    code = WITHOUT + """
import torch, a3po
A = a3po.group_advantages(torch.tensor([1.0, 0.0]), 2)[:, None].expand(2, 5)
p, mask = torch.rand(2, 5).log(), torch.ones(2, 5)
A = a3po.shape_advantages(A, A[:, 0] > 0, p, mask, rho_positive=2.0, rho_negative=2.0)
print(a3po.policy_loss(p, p, A, mask)[0].item() < 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_the_program_says_what_it_lacks():
    code = WITHOUT + "import runpy; runpy.run_path('a3po.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "bash run.sh install" in done.stderr.splitlines()[-1]


def test_a_mistake_under_torchrun_is_said_once():
    done = run("a3po.py", "--setting=demo", "--tis_cap=-1", ranks=2)
    assert done.returncode and done.stderr.count("error: --tis_cap -1.0") == 1


@pytest.mark.slow
def test_an_error_of_one_rank_is_said_and_ends_all(tmp_path):
    (tmp_path / "taste.py").write_text(
        "import os\nif os.environ['RANK'] == '1': raise ImportError('not on this machine')\n"
        "def length(response, problem): return len(response)\n")
    done = run(str(ROOT / "a3po.py"), "--setting=demo", "--reward=taste:length", ranks=2,
               cwd=tmp_path, timeout=100)
    assert done.returncode and done.stderr.count("not on this machine") == 1


BROKEN = """
import sys
import time
sys.path.insert(0, {root!r})
import a3po
from shelf import ranks
def update(*_):
    assert ranks.rank() == 0, "a fault of rank 1"
    ranks.gather([])  # it waits for the other
a3po.update = update
ranks.launch(a3po.main)
"""


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_ends_all_ranks_at_once(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN.format(root=str(ROOT)))
    command = [str(tmp_path / "broken.py"), "--setting=demo", f"--output_dir={tmp_path / 'run'}",
               "--eval_every=0", "--steps=2"]
    began = time.monotonic()
    done = run(*command, ranks=2)
    started = (tmp_path / "run/config.json").stat().st_mtime - (time.time() - time.monotonic())
    assert done.returncode and done.stderr.count("AssertionError: a fault of rank 1") == 1
    assert "\nstopped at step 0; no checkpoint yet; go on with --resume auto" in done.stderr
    assert began < started and time.monotonic() - started < 60


ENDS = {"pass": 0, "raise SystemExit(3)": 3, "raise SystemExit": 0, "raise KeyError('lost')": 1,
        "raise KeyboardInterrupt": 1}


@pytest.mark.parametrize("what, status", ENDS.items())
def test_a_program_leaves_with_its_status(what, status):
    code = (f"import atexit\nfrom shelf.ranks import launch\ndef main():\n    {what}\n"
            "atexit.register(print, 'handlers ran')\nlaunch(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and done.stdout == "handlers ran\n"
    assert ("Traceback" in done.stderr) == (status == 1)


@pytest.mark.parametrize("main, argv", [(a3po.main, ["--setting=demo", "--tis_cap=-1"]),
                                        (evaluation.main, ["nonsense"])])
def test_what_one_rank_alone_has_to_say_is_said(main, argv, monkeypatch, capsys):
    waited: list = []
    monkeypatch.setattr("time.sleep", waited.append)
    for place, seconds in (("0", []), ("3", [10])):
        monkeypatch.setenv("LOCAL_RANK", place)
        monkeypatch.setenv("RANK", place)
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and waited == seconds


TWO = """
import sys
import time
sys.path.insert(0, {root!r})
from shelf import ranks
from shelf.ranks import UsageError
ranks.init_distributed()
rank = ranks.rank()
def refuse():
    raise UsageError(f"rank {{rank}} has no data")
said = [f"{{rank}} got {{ranks.on_rank_0(lambda: rank)}}"]
try:
    ranks.on_rank_0(refuse)
except UsageError as why:
    said.append(f"{{rank}} ends: {{why}}")
print(*ranks.gather(said), sep="\\n", flush=True)
ranks.leave()
"""


def test_what_rank_0_makes_all_have_its_errors_too(tmp_path):
    (tmp_path / "two.py").write_text(TWO.format(root=str(ROOT)))
    done = run(str(tmp_path / "two.py"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout  # of two ranks, whose lines may meet in one
    for r in (0, 1):
        assert said.count(f"{r} got 0") == said.count(f"{r} ends: rank 0 has no data") == 2


def test_a_folder_that_a_rank_does_not_see_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("shelf.folder.gather", lambda sees: [True, *sees, True, False])
    with pytest.raises(UsageError, match=r"nowhere is not there for rank\(s\) 1, 3: give an --out"):
        all_see(tmp_path / "nowhere")


def give_gradient(scaler, model, optimizer, value: float) -> float:
    """As `update` does, with the loss scaled; return what step_or_skip is given."""
    scale = scaler.scale(torch.ones(())).item()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value) * scale
    scaler.unscale_(optimizer)
    return value


def test_ten_bad_gradients_in_a_row_end_the_run(parts):
    _, model, optimizer, _ = parts
    for good in (9, 0):
        for _ in range(9):
            a3po.step_or_skip(optimizer, a3po.NO_SCALING, math.inf)
        if good:
            a3po.step_or_skip(optimizer, a3po.NO_SCALING, 1.0)
    with pytest.raises(UsageError, match="ten gradients in a row were not finite"):
        a3po.step_or_skip(optimizer, a3po.NO_SCALING, math.nan)
    optimizer.param_groups[0]["skipped"] = 0
    scaler = torch.amp.GradScaler("cpu", growth_interval=200)
    for _ in range(12):  # fp16: the scale was too high
        norm = give_gradient(scaler, model, optimizer, math.inf)
        a3po.step_or_skip(optimizer, scaler, norm)
    assert scaler.get_scale() == 2.0**4
    for _ in range(400):
        a3po.step_or_skip(optimizer, scaler, give_gradient(scaler, model, optimizer, 0.0))
    assert scaler.get_scale() == 2.0**6
    again = torch.amp.GradScaler("cpu", growth_interval=200)
    again.load_state_dict(json.loads(json.dumps(scaler.state_dict())))  # as step.json has it
    assert again.get_scale() == 2.0**6


def test_check_reads_all_inputs_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(a3po, "build", lambda *_: pytest.fail("work started"))
    monkeypatch.chdir(tmp_path)
    a3po.main(["--setting=demo", "--check"])
    assert "can be used" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        a3po.main(["--setting=demo", "--check", "--data=no.jsonl"])
    assert "no.jsonl" in capsys.readouterr().err


def test_run_sh_checks_before_it_starts_torchrun(tmp_path):
    """With two GPUs that a false nvidia-smi lists, and programs that say how they were called."""
    sums = subprocess.run("cksum <requirements.txt | cut -d' ' -f1", shell=True, cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout.strip()
    bin = tmp_path / "bin"
    bin.mkdir()
    (tmp_path / f".installed-gpu-{sums}").touch()
    for name, does in (("nvidia-smi", "echo GPU 0; echo GPU 1"),
                       ("torchrun", 'echo "torchrun $*"'), ("python",
                        'echo "$WORLD_SIZE $*"; [ "${!#}" != --seed=-1 ]')):
        (bin / name).write_text(f"#!/bin/bash\n{does}\n")
        (bin / name).chmod(0o755)
    env = dict(PATH=f"{bin}:/usr/bin:/bin", VENV=str(tmp_path), PYTHON=sys.executable)
    for flag, ok in (("--seed=1", True), ("--seed=-1", False)):
        done = subprocess.run(["bash", "run.sh", "train", flag], cwd=ROOT, env=env,
                              capture_output=True, text=True)
        assert f"2 a3po.py --setting paper --check {flag}" in done.stdout, done.stderr
        assert ("torchrun" in done.stdout) == ok and (done.returncode == 0) == ok
