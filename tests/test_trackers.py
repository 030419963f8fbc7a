"""--log_to: what TensorBoard, wandb (offline) and trackio (local) get of a run, where they are
installed; what is refused; that a tracker which fails ends nothing."""

import dataclasses
import importlib
import json
import os

import pytest

from shelf import folder as run_folder
from shelf.config import parse_args
from shelf.folder import RunFolder, installed_sinks
from shelf.ranks import UsageError

ROWS = [dict(step=s, reward=s / 8, truncated=0.0, rollout_tokens=10, seconds_generate=1.0,
             entropy=None if s == 1 else 0.5) for s in range(4)]


def log(folder, name, steps, start=0, **changes):
    config = parse_args(["--setting=demo", f"--output_dir={folder}", f"--log_to={name}"])
    run = RunFolder(dataclasses.replace(config, **changes))
    run.open(start)
    for step in steps:
        run.log_step(dict(ROWS[step]))
    run.close_sinks()


def test_what_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--log_to mlflow: give any of tensorboard, wandb, trac"):
        installed_sinks("mlflow")
    monkeypatch.setitem(importlib.sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--log_to wandb does not load .*: pip install"):
        RunFolder(parse_args(["--setting=demo", "--log_to=wandb", f"--output_dir={tmp_path}/run"]))
    assert installed_sinks("") == []


def test_one_that_fails_is_left_out_and_the_other_goes_on(tmp_path, monkeypatch, capsys):
    seen = []

    def flaky(metrics, step):
        if step == 1:
            raise ConnectionError("no route")
        seen.append(("flaky", step))

    def open_sink(name, folder, settings, start):
        if name == "trackio":
            raise RuntimeError("no account")
        log = flaky if name == "wandb" else lambda metrics, step: seen.append((step, metrics))
        return log, lambda: seen.append(f"closed {name}")

    monkeypatch.setattr(run_folder, "open_sink", open_sink)
    monkeypatch.setattr(run_folder, "installed_sinks", lambda names: names.split(","))
    run = RunFolder(parse_args(["--setting=demo", f"--output_dir={tmp_path / 'run'}",
                                "--log_to=wandb,trackio,tensorboard"]))
    run.open(0)
    for step in range(3):
        run.log_metrics(dict(step=step, entropy=None, reward=0.5))
    run.close_sinks()
    run.close_sinks()
    assert seen == [("flaky", 0), *((step, dict(reward=0.5)) for step in range(3)),
                    "closed tensorboard"]
    said = capsys.readouterr().out
    assert said.count("left out") == 2 and "(ConnectionError: no route)" in said


def test_tensorboard_has_every_value_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path / "run", "tensorboard", range(3))
    log(tmp_path / "run", "tensorboard", range(2, 4), start=2, resume="auto")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [
        (0, 0), (1, 0.125), (2, 0.25), (3, 0.375)]
    assert [e.step for e in events.Scalars("entropy")] == [0, 2, 3]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_wandb_offline_keeps_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path / "run", "wandb", range(3))
    log(tmp_path / "run", "wandb", range(2, 4), start=2, resume="auto")
    name = (tmp_path / "run" / "wandb-id").read_text()
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
    assert len(files) == 2  # two parts of one run, which `wandb sync` joins
    assert b"seconds_generate" in files[0].read_bytes()


def test_trackio_keeps_one_curve(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("TRACKIO_PROJECT", f"test-{os.getpid()}")
    import trackio

    log(tmp_path / "run", "trackio", range(3))
    log(tmp_path / "run", "trackio", range(2, 4), start=2, resume="auto")
    runs = list(trackio.Api().runs(f"test-{os.getpid()}"))
    assert [run.name for run in runs] == ["run"]
    from trackio.sqlite_storage import SQLiteStorage

    points = {(x["step"], x["reward"]) for x in SQLiteStorage.get_logs(runs[0].project, "run")}
    assert points == {(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375)}
