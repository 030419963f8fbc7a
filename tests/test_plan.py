"""The plan of a run: what is measured under fake tensors is what an update holds."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from model_worker import make

import model
from shelf import plan
from shelf.ranks import UsageError

FLAGS = ["--setting=paper", "--max_prompt_length=64", "--max_response_length=128",
         "--micro_batch_tokens=512"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return {name: make(name, folder / name) for name in ("qwen3", "qwen2")}


@pytest.fixture(scope="session")
def measured(models):
    """Return what two ranks need: the one measurement of the tests that are not slow."""
    return plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}"])


def check_states(measured, ranks, parallel="fsdp"):
    """Assert sixteen bytes a parameter, over the ranks under fsdp, on each under ddp."""
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


def test_states_are_sixteen_bytes_a_parameter(measured):
    check_states(measured, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, parallel", [
    ("qwen3", 1, "fsdp"), ("qwen2", 8, "fsdp"), ("qwen3", 2, "ddp")])
def test_states_of_other_ranks_and_models(name, ranks, parallel, models):
    flags = [f"--model={models[name]}", f"--parallel={parallel}"]
    check_states(plan.in_process(ranks, [*FLAGS, *flags]), ranks, parallel)


@pytest.mark.slow
def test_more_tokens_need_more_and_a_reference_too(measured, models):
    more = ["--micro_batch_tokens=2048", "--preset=grpo"]
    large = plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}", *more])
    assert large["held"]["activations"] > 2 * measured["held"]["activations"]
    assert measured["held"]["reference"] == 0
    assert large["held"]["reference"] == 2 * large["parameters"]


@pytest.mark.slow
def test_fp16_takes_what_bf16_takes(measured, models):
    half = plan.in_process(2, [*FLAGS, f"--model={models['qwen3']}", "--precision=fp16"])
    assert half["held"] == measured["held"] and half["peak"] == measured["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["query.dtype == key", "result.dtype == torch.float32"])
def test_a_wrong_dtype_is_seen(broken, models, tmp_path):
    """fake kernels take what the real ones refuse."""
    wrong = {"query.dtype == key": ("to(value.dtype)", "to(torch.float16)"),
             "result.dtype == torch.float32": (", out_dtype=torch.float32", "")}[broken]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("shelf/*.py")]:
        text = path.read_text()
        assert path.stem != "model" or wrong[0] in text
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text.replace(*wrong) if path.stem == "model" else text)
    done = dry_run(*FLAGS, f"--model={models['qwen3']}", folder=tmp_path)
    assert done.returncode == 1 and "AssertionError: " in done.stderr.splitlines()[-1]


def test_attention_is_counted_causal_and_within_each_sequence():
    """Packed sequences of unequal length cost what each costs alone."""
    import torch.nn.attention.varlen  # which has the counter told of it
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    heads, size, found = 4, 16, []
    for lengths in ([300, 7, 50], [300], [7], [50]):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.zeros(1, heads, sum(lengths), size, dtype=torch.bfloat16, requires_grad=True)
            bounds = np.cumsum([0, *lengths])
            layout = model.attention_layout(np.arange(sum(lengths)), np.arange(sum(lengths)),
                                            bounds, "varlen", "cpu")
            with FlopCounterMode(display=False) as flops:
                model.varlen_attention(None, x, x, x, None, **layout)
        found.append(plan.count(flops, np.array(lengths)))
        assert found[-1] == 4 * heads * size * sum(n**2 for n in lengths) / 2
    assert found[0] == sum(found[1:])


def test_what_does_not_fit_is_refused_with_what_does(measured, monkeypatch):
    """An 8B model on one GPU; then GPUs that hold the states but not the activations; then vLLM;
    then what nothing helps."""
    gpu = 80 * plan.GIB
    small = copy.deepcopy(measured)
    monkeypatch.setattr(plan, "in_process", lambda ranks, argv: tried.append((ranks, argv)) or (
        small if ranks >= 4 or ("--head_chunk" in argv and x["parameters"] < 2e9) else x))
    x = copy.deepcopy(measured) | dict(parameters=8_000_000_000, peak=int(16 * 8e9))
    tried = []
    assert "takes 124.2 GiB a GPU; it fits with 4 GPUs" in plan.refusal(x, gpu, 1, FLAGS)
    assert [(n, argv[len(FLAGS):][-1:]) for n, argv in tried] == [
        (1, ["512"]), (1, ["--offload"]), (4, [])]
    x |= dict(parameters=1_000_000_000, peak=int(90e9))
    why = plan.refusal(x, gpu, 2, FLAGS)
    assert "; it fits with --micro_batch_tokens 256 --head_chunk 512" in why
    assert tried[3:] == [(2, [*FLAGS, "--micro_batch_tokens", "256", "--head_chunk", "512"])]
    x = copy.deepcopy(measured)
    x["config"].gpu_memory = 0.99
    assert "--gpu_memory 0.99 leaves no room" in (why := plan.problem(x, gpu))
    x["config"].gpu_memory = float(why.rpartition(" ")[2])
    assert not plan.problem(x, gpu)
    x["config"].max_response_length = 10**9
    assert "vLLM has room for" in plan.problem(x, gpu)
    assert plan.refusal(small, 1 << 30, 2, FLAGS).endswith("; nothing that was tried helps")


def test_a_gpu_has_less_than_its_name_says(measured, monkeypatch, capsys):
    x = copy.deepcopy(measured)  # 8B on one of 141 GB, of which torch sees 139.8 GiB
    x["peak"] = int(135.4 * plan.GIB)
    monkeypatch.setattr(plan, "in_process", lambda ranks, argv: copy.deepcopy(x))
    with pytest.raises(SystemExit):
        plan.main(["--gpus=1", "--gpu_gb=141"])
    assert "the update takes 140.4 GiB a GPU" in capsys.readouterr().err
    for name, seen in ((40, 39.39), (80, 79.1), (141, 139.8)):
        assert 0.98 < name * plan.NOMINAL_GB / plan.GIB / seen <= 1.001


def test_under_ddp_sharding_is_tried_first(measured, monkeypatch):
    tried = []
    monkeypatch.setattr(plan, "in_process", lambda ranks, argv: tried.append(argv) or measured)
    x = copy.deepcopy(measured) | dict(peak=int(90e9))
    x["config"].parallel = "ddp"
    assert plan.refusal(x, 80 * plan.GIB, 2, FLAGS).endswith("it fits with --parallel fsdp")
    assert tried == [[*FLAGS, "--parallel", "fsdp"]]


def test_the_command_says_what_was_measured(measured, monkeypatch, capsys):
    monkeypatch.setattr(plan, "in_process", lambda ranks, argv: copy.deepcopy(measured))
    plan.main(["--gpus=4", "--nodes=2"])
    out = capsys.readouterr().out
    assert "parameters on 8 GPUs" in out and "measured at 512 tokens:\n  weights" in out
    assert "beside about 5 of CUDA" in out
    assert out.splitlines()[-1].startswith("it fits; with 0% fewer FLOPs in the update so does")
    with pytest.raises(SystemExit) as ended:
        plan.main(["--gpu_gb=1"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == ("error: it does not fit: the update takes 5.0 GiB a GPU; nothing that was "
                    "tried helps\n")


def dry_run(*flags, folder=ROOT):
    command = [sys.executable, "a3po.py", "--dry_run", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | dict(COLUMNS="100"))


def test_the_folder_it_is_started_in_is_not_searched_for_modules(tmp_path):
    (tmp_path / "argparse.py").write_text("raise SystemExit('of the working directory')\n")
    done = subprocess.run([sys.executable, ROOT / "a3po.py", "--dry_run", "--help"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--mean_length" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags, says", [
    (["--model=/nowhere"], "error: model '/nowhere' has no config.json that can be read"),
    (["--precision=fp32"], "error: --precision fp32: the GPU's attention"),
    (["--gpuz=2"], "error: --gpuz=2: no such flag")])
def test_a_mistake_is_a_sentence(flags, says, models):
    done = dry_run(*FLAGS, f"--model={models['qwen3']}", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command(models):
    done = dry_run("--gpus=8", f"--model={models['qwen3']}", *FLAGS)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert "parameters on 8 GPUs" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("it fits; with ")


def test_what_a_measurement_refuses_is_an_error_here(models):
    """and not a traceback of another process."""
    before = dict(os.environ)
    with pytest.raises(UsageError, match="model '/nowhere' has no config.json"):
        plan.in_process(2, [*FLAGS, "--model=/nowhere"])
    assert dict(os.environ) == before  # what starts after it sees the GPUs
