"""The plan of a run: what is measured under fake tensors is what an update holds."""

import copy
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from model_worker import make

import a3po
from shelf import plan
from shelf.ranks import UsageError

FLAGS = ["--setting=paper", "--max_prompt_length=64", "--max_response_length=128",
         "--micro_batch_tokens=512"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return {name: make(name, folder / name) for name in ("qwen3", "qwen2")}


@pytest.mark.parametrize("name, ranks, parallel", [
    ("qwen3", 1, "fsdp"), ("qwen2", 8, "fsdp"), ("qwen3", 2, "ddp")])
def test_states_are_sixteen_bytes_a_parameter(name, ranks, parallel, models):
    """Over the ranks under fsdp, on each under ddp. The dtypes of attention and logits are asserted
    on the way."""
    flags = [f"--model={models[name]}", f"--parallel={parallel}"]
    measured = plan.in_process(ranks, [*FLAGS, *flags])
    share = measured["parameters"] / (ranks if parallel == "fsdp" else 1)
    for key, size in (("weights", 4), ("gradients", 4), ("Adam", 8)):
        assert measured["held"][key] == pytest.approx(size * share, rel=0.05), key  # padded
    assert measured["peak"] > 16 * share and measured["held"]["activations"] > 0
    assert measured["held"]["gathered"] >= (4 * share if parallel == "ddp" else 0)
    assert measured["tokens"] == 512
    # 6 a parameter and token for forward and backward, 2 more for what is computed again, and
    # attention, which is the larger part in a model so narrow
    matrices = measured["parameters"] * 8 * 512
    assert matrices < measured["update_flops"] < 4 * matrices


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["query.dtype == key", "result.dtype == torch.float32"])
def test_a_wrong_dtype_is_seen(broken, models, tmp_path, monkeypatch):
    """fake kernels take what the real ones refuse."""
    wrong = {"query.dtype == key": ("to(value.dtype)", "to(torch.float16)"),
             "result.dtype == torch.float32": (", out_dtype=torch.float32", "")}[broken]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("shelf/*.py")]:
        text = path.read_text()
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text.replace(*wrong) if path.stem == "model" else text)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    with pytest.raises(UsageError, match="AssertionError"):
        plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}"])


def test_more_tokens_need_more_and_a_reference_too(models):
    small, large = (plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}", *more]) for more in (
        (), ("--micro_batch_tokens=2048", "--preset=grpo")))
    assert large["held"]["activations"] > 2 * small["held"]["activations"]
    assert small["held"]["reference"] == 0
    assert large["held"]["reference"] == 2 * large["parameters"]


@pytest.fixture(scope="module")
def measured(models):
    return plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}"])


def test_what_does_not_fit_is_refused_with_what_does(measured, monkeypatch):
    """An 8B model on one GPU; then GPUs that hold the states but not the activations; then vLLM."""
    gpu = 80 * plan.GIB
    small = copy.deepcopy(measured)
    monkeypatch.setattr(plan, "in_process", lambda ranks, argv: tried.append((ranks, argv)) or (
        small if ranks >= 4 or "--head_chunk" in argv or "--gpu_memory" in argv else x))
    x = copy.deepcopy(measured) | dict(parameters=8_000_000_000, peak=int(16 * 8e9))
    tried = []
    assert "takes 124.2 GiB a GPU; it fits with 4 GPUs" in plan.refusal(x, gpu, 1, FLAGS)
    assert [ranks for ranks, _ in tried] == [4]
    x |= dict(parameters=1_000_000_000, peak=int(90e9))
    why = plan.refusal(x, gpu, 2, FLAGS)
    assert "; it fits with --micro_batch_tokens 256 --head_chunk 512" in why
    x = copy.deepcopy(measured)
    x["setting"]["gpu_memory"] = 0.99
    assert "--gpu_memory 0.99 leaves no room" in (why := plan.refusal(x, gpu, 8, FLAGS))
    x["setting"]["gpu_memory"] = float(why.rpartition(" ")[2])
    assert not plan.refusal(x, gpu, 8, FLAGS)
    x["setting"] |= dict(gpu_memory=0.21, max_response_length=10**9)
    assert "less than one response" in plan.problem(x, gpu)


def test_a_run_on_gpus_begins_with_it(measured, models, monkeypatch):
    config = a3po.parse_args([*FLAGS, f"--model={models['qwen3']}"])
    assert "it fits: an update takes 5.0 of 80 GiB a GPU" in plan.check_run(config, 80 << 30, 2)
    measure, measured = plan.in_process, copy.deepcopy(measured)
    monkeypatch.setattr(plan, "in_process", lambda *_: measured)
    with pytest.raises(UsageError, match="does not fit: .*nothing that was tried helps"):
        plan.check_run(config, 1 << 30, 2)
    monkeypatch.setattr(plan, "in_process", measure)
    monkeypatch.setattr(config, "model", "/nowhere")
    assert "NOTE: what it needs could not be measured (model" in plan.check_run(config, 1, 2)


def test_the_command(models):
    command = [sys.executable, "a3po.py", "--dry_run", "--gpus=8", f"--model={models['qwen3']}"]
    done = subprocess.run([*command, *FLAGS], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(COLUMNS="100"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters on 8 GPUs" in done.stdout and done.stdout.endswith("it fits\n")
