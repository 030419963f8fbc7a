"""Families of models: those on the list train, the others are refused or found out."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from model_worker import FAMILIES, make
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import a3po
import eval as evaluation
import rollout
from shelf import checks
from shelf.ranks import UsageError

REFUSED = {
    "mistral_window": "attention with a window",
    "gemma2": "layers without full attention",
    "gemma3": "layers without full attention",
    "granite": "rescaled logits",
    "cohere": "rescaled logits",
    "mixtral": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
}
EVERYDAY = ("qwen2", "gpt2")  # biases and an own tokenizer; a tied head and absolute positions
TRAINED = [name for name in FAMILIES if name not in {*REFUSED, "mamba", "opt"}]


MATRIX = [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow)
          for name in TRAINED]


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory) -> dict:
    """By family, for all that are asked for: they share one process, which takes long to start."""
    families = [item.callspec.params["family"] for item in request.session.items
                if getattr(item, "originalname", "") == "test_vllm_follows_the_trainer"]
    folder = str(tmp_path_factory.mktemp("families"))
    done = run("tests/model_worker.py", folder, *families, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", MATRIX)
def test_vllm_follows_the_trainer(family, reports):
    """The same tokens get the same log-probs before and after an update that moves them far."""
    report = reports[family]
    assert isinstance(report, dict), report  # else a traceback
    assert report["before"] < 1e-4 and report["after"] < 1e-4
    assert report["moved"] > 0.1 and report["ratio"] == 0


def test_the_list_is_what_is_trained(tmp_path, capsys):
    configs = [AutoConfig.from_pretrained(make(name, tmp_path / name)) for name in TRAINED]
    assert {config.model_type for config in configs} == checks.FAMILIES.keys()
    for name, config in zip(TRAINED, configs, strict=True):
        checks.check_weights(str(tmp_path / name), config)
    checks.check_model("m", AutoConfig.from_pretrained(tmp_path / "llama"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("family, what", REFUSED.items())
def test_what_would_train_wrongly_is_refused(family, what, tmp_path):
    config = AutoConfig.from_pretrained(make(family, tmp_path))
    with pytest.raises(UsageError, match=f"{what}, which cannot be trained here; these can: Llama"):
        checks.check_model("m", config)


def test_heads_that_vllm_has_not_on_a_cpu_are_refused(tiny_model, monkeypatch):
    config = AutoConfig.from_pretrained(tiny_model)
    for config.head_dim in (16, 48):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UsageError, match=f"has heads of {config.head_dim} numbers, unknown"):
            checks.check_model("m", config)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        checks.check_model("m", config)


GPUS = {  # what torch sees, CUDA_VISIBLE_DEVICES, of what CUDA torch is built, the setting: said
    "no GPU": ([], False, None, None, True, ""),
    "a GPU": (["/dev/nvidia0"], True, None, "13.0", True, ""),
    "old driver": (["/dev/nvidia0"], False, None, "13.0", True, "may be too old for CUDA 13.0"),
    "old driver, demo": (["/dev/nvidia0"], False, None, "13.0", False, "may be too old"),
    "a wrong one": (["/dev/nvidia0"], False, "7", "13.0", False, "DEVICES=7 name none"),
    "hidden": (["/dev/nvidia0"], False, "", "13.0", True, "CUDA_VISIBLE_DEVICES='' hides them"),
    "hidden, demo": (["/dev/nvidia0"], False, "-1", "13.0", False, ""),
    "CPU build": (["/dev/nvidia0"], False, None, None, True, "its CPU build, remove .venv and run"),
    "CPU build, demo": (["/dev/nvidia0"], False, None, None, False, ""),
}


@pytest.mark.parametrize("files, seen, visible, cuda, wanted, says", GPUS.values(), ids=GPUS)
def test_gpus_that_torch_does_not_see_are_named(files, seen, visible, cuda, wanted, says,
                                                monkeypatch):
    monkeypatch.setattr(checks, "glob", lambda _: files)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda _: str(ROOT))
    monkeypatch.setattr(checks.os.path, "exists", lambda path: not path.startswith("/usr/lib/wsl"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match=says) if says else contextlib.nullcontext():
        checks.check_machine(wanted)


@pytest.mark.parametrize("CC, header, says", [
    ("", True, "no C compiler: install gcc"), ("cc", False, "Python.h: install python3-dev"),
    ("cc", True, "")])
def test_a_gpu_needs_a_compiler(CC, header, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CC", CC)
    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    monkeypatch.setattr(checks.os.path, "exists", lambda _: header)
    with pytest.raises(UsageError, match=says) if says else contextlib.nullcontext():
        checks.check_machine(True)


def drop(file, name):
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata=dict(format="pt"))


DAMAGE = {  # what happens to model.safetensors: what is said
    "lacks q_proj": (lambda file: drop(file, "model.layers.1.self_attn.q_proj.weight"),
                     "1 weights are not in its files, model.layers.1.self_attn.q_proj.weight"),
    "lacks a norm": (lambda file: drop(file, "model.norm.weight"), "1 weights are not in its"),
    "is cut short": (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "do not load"),
    "is empty": (lambda file: file.write_bytes(b""), "do not load"),
    "is not there": (lambda file: file.rename(f"{file}.safetensors"), "do not load"),
}


@pytest.mark.parametrize("main, flags", [
    (a3po.main, ["--setting=demo", "--check"]), (evaluation.main, ["--benchmarks=demo"])])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_one_sentence_before_work_starts(main, flags, damage, tmp_path, capsys,
                                                             monkeypatch):
    monkeypatch.setattr(rollout, "Engine", lambda *_, **__: pytest.fail("an engine was started"))
    change, says = DAMAGE[damage]
    change(Path(make("qwen2", tmp_path)) / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        main([*flags, f"--model={tmp_path}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and f"error: model '{tmp_path}'" in error


def test_whole_weights_of_any_kind_are_let_through(tmp_path):
    """Without the prefix of names, as a base model is saved; and pickled ones, left to others."""
    config = AutoConfig.from_pretrained(make("qwen2", tmp_path))
    file = tmp_path / "model.safetensors"
    checks.check_weights(str(tmp_path), config)
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata=dict(format="pt"))
    checks.check_weights(str(tmp_path), config)
    file.unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    checks.check_weights(str(tmp_path), config)


@pytest.mark.slow
def test_a_family_that_was_never_tried_is_found_out(tmp_path):
    """OPT: dropout that the model applies by itself, and other positions than vLLM's."""
    (tmp_path / "taste.py").write_text("def length(response, problem): return len(response) % 7\n")
    done = run(str(ROOT / "a3po.py"), "--setting=demo", f"--model={make('opt', tmp_path / 'opt')}",
               "--eval_data=", "--reward=taste:length", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "type opt was never tried" in done.stdout and "vLLM and the trainer" in done.stderr


def test_a_model_without_attention_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        a3po.main(["--setting=demo", "--check", f"--model={make('mamba', tmp_path)}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "no max_position_embeddings" in error
    assert "Traceback" not in error
