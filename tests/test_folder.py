"""Checkpoints that are kept, damaged or do not fit; files that cannot be written; the program where
something is missing."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import a3po
from rollout import load_tokenizer
from shelf.folder import Checkpoints, RunFolder, all_see
from shelf.ranks import UsageError


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
    assert "checkpoint of step 2 was not written" in said and "It needs 1.53 MB, free are" in said
    assert "Older ones stay" in said and said.count("\n") == 1
    assert before == {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    assert kept.resume() == (1, {}) and kept.save(2, {}) == 2


def test_the_newest_are_kept_with_ordinary_modes(tmp_path, parts):
    kept = checkpoints(tmp_path, parts, keep=2)
    for step in (8, 9, 10, 11):
        kept.save(step, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]
    modes = {path.stat().st_mode for path in tmp_path.glob("step_11/*") if path.is_file()}
    (tmp_path / "file").touch()
    assert modes == {(tmp_path / "file").stat().st_mode}


def test_large_checkpoints_are_announced(tmp_path, parts, capsys):
    kept = checkpoints(tmp_path / "not yet", parts, keep=0)
    kept.announce(300, 50)
    assert capsys.readouterr().out == ""  # the demo's are small
    kept.weights_bytes, kept.resume_bytes = 16_400_000_000, 98_400_000_000
    kept.announce(300, 50)
    said = capsys.readouterr().out
    assert "takes 16.4 GB, and the newest 98.4 GB more" in said and "6 of them: 295 GB" in said
    kept.keep, kept.weights_bytes = 2, 10**18
    kept.announce(300, 50)
    assert "2 of them: 2e+09 GB" in (said := capsys.readouterr().out) and "TOO LITTLE" in said


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    folder = RunFolder(vars(a3po.parse_args(["--setting=demo", f"--output_dir={tmp_path}"])))
    folder.open(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(UsageError, match="metrics.jsonl cannot be written .*make room.*resume"):
            folder.append("metrics.jsonl", dict(step=0, text="x" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_whose_folder_is_lost_ends_with_a_sentence(tmp_path):
    folder = RunFolder(vars(a3po.parse_args(["--setting=demo", f"--output_dir={tmp_path}/run"])))
    folder.open(0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UsageError, match="metrics.jsonl cannot be written .No such file.*go on"):
        folder.append("metrics.jsonl", dict(step=0))
    assert folder.asked_to_stop() is False


def test_a_folder_that_cannot_be_written_is_found_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr(a3po, "load_inputs", lambda _: pytest.fail("work started"))
    with pytest.raises(SystemExit):
        a3po.main(["--setting=demo", "--output_dir=/proc/run"])  # not even root can
    assert "--output_dir /proc/run: /proc cannot be written to" in capsys.readouterr().err


# ---- what is missing ----------------------------------------------------------------------------

WITHOUT = """
import sys
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
    assert done.returncode and done.stderr.count("(not on this machine)") == 1


TWO = """
import sys
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
    lines = done.stdout.splitlines()
    for r in (0, 1):
        assert lines.count(f"{r} got 0") == lines.count(f"{r} ends: rank 0 has no data") == 2


def test_a_folder_that_a_rank_does_not_see_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("shelf.folder.gather", lambda sees: [True, *sees, True, False])
    with pytest.raises(UsageError, match=r"nowhere is not there for rank\(s\) 1, 3: give an --out"):
        all_see(tmp_path / "nowhere")


def test_ten_bad_gradients_in_a_row_end_the_run(parts):
    optimizer = parts[2]
    group = optimizer.param_groups[0]
    for _ in range(9):
        a3po.adjust_scale(optimizer, finite=False)
    a3po.adjust_scale(optimizer, finite=True)
    for _ in range(9):
        a3po.adjust_scale(optimizer, finite=False)
    with pytest.raises(UsageError, match="ten gradients in a row were not finite"):
        a3po.adjust_scale(optimizer, finite=False)
    group.update(loss_scale=2.0**16, skipped=0)
    for _ in range(12):  # fp16: the scale was too high
        a3po.adjust_scale(optimizer, finite=False)
    assert group["loss_scale"] == 2.0**4
    for _ in range(400):
        a3po.adjust_scale(optimizer, finite=True)
    assert group["loss_scale"] == 2.0**6
    group.update(loss_scale=1.0, skipped=0)


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
