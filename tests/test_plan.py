"""The plan of a run: what is measured under fake tensors is what an update holds."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from model_worker import make

import plan

FLAGS = ["--setting=paper", "--max_prompt_length=64", "--max_response_length=128",
         "--micro_batch_tokens=512"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return {name: make(name, folder / name) for name in ("qwen3", "qwen2")}


@pytest.mark.parametrize("name, ranks", [("qwen3", 1), ("qwen2", 8)])
def test_states_are_sixteen_bytes_a_parameter_over_the_ranks(name, ranks, models):
    measured = plan.in_process(ranks, [*FLAGS, f"--model={models[name]}"])
    peak, share = measured["peak"], measured["parameters"] / ranks
    for key, size in (("sharded_param", 4), ("sharded_grad", 4), ("opt", 8)):
        assert peak[key] == pytest.approx(size * share, rel=0.05), key  # padded to the ranks
    assert peak["total"] > 16 * share and peak["act"] > 0
    assert measured["tokens"] == 512
    # 6 a parameter and token for forward and backward, 2 more for what is computed again, and
    # attention, which is the larger part in a model so narrow
    matrices = measured["parameters"] * 8 * 512
    assert matrices < measured["update_flops"] < 4 * matrices


def test_more_tokens_need_more_and_a_reference_too(models):
    small, large = (plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}", *more]) for more in (
        (), ("--micro_batch_tokens=2048", "--preset=grpo")))
    assert large["peak"]["act"] > 2 * small["peak"]["act"]
    assert small["reference"] == 0 and large["reference"] == 2 * large["parameters"]


def test_what_does_not_fit_is_refused_with_what_does(models):
    x = plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}"])
    x["parameters"], huge = 8_000_000_000, 80 * plan.GIB
    x["peak"] |= dict(sharded_param=4 * 8e9, opt=8 * 8e9, total=16 * 8e9)
    [(what, help)] = plan.problems(x, huge, 1).items()
    assert "the update takes" in what and help == ["--gpus", "4"]
    x["peak"] |= dict(sharded_param=4e9, opt=8e9, total=30e9)
    x["setting"]["gpu_memory"] = 0.9
    [(what, help)] = plan.problems(x, huge, 8).items()
    assert "--gpu_memory 0.9 leaves no room" in what and help[0] == "--gpu_memory"
    x["setting"]["gpu_memory"] = float(help[1])
    assert not plan.problems(x, huge, 8)
    x["setting"] |= dict(gpu_memory=0.21, max_response_length=10**6)
    assert "less than one response" in next(iter(plan.problems(x, huge, 8)))


def test_the_command(models):
    command = [sys.executable, "a3po.py", "--dry_run", "--gpus=8", f"--model={models['qwen3']}"]
    done = subprocess.run([*command, *FLAGS], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(COLUMNS="100"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters on 8 GPUs" in done.stdout and done.stdout.endswith("it fits\n")
