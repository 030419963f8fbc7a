"""Every block of code in README.md is run: Python as it stands, commands made short."""

import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import a3po
import rollout

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHORT = "--steps 1 --eval_limit 8 --prompts_per_step 8"
COMMANDS = {  # how a command is made short; None: not run here, as the comment says
    "bash run.sh": None,  # the next but one, after an installation
    "bash run.sh test": None,  # this
    "bash run.sh study": None,  # its quick form is in test_study.py
    "bash run.sh train": None,  # eight GPUs; how it starts is in test_folder.py
    "torchrun --nproc_per_node 8 eval.py": None,  # the same, and the hub; test_recipes.py reads it
    "python a3po.py --setting demo --preset grpo --seed 1": f"{SHORT} --output_dir runs/grpo",
    "python a3po.py --output_dir runs/mine --resume auto": f"--setting demo {SHORT}",
    "python eval.py --model demo/model --benchmarks demo": "--limit 8 --out evals/base",
    "python eval.py compare": "",
    "python eval.py plot": "",
    "python eval.py show": "",
}


def commands() -> list[str]:
    text = "".join(text for language, text in BLOCKS if language == "bash")
    lines = [line.partition("#")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line]


def known(command: str) -> str:
    """Return the entry of COMMANDS for this command."""
    found = [x for x in COMMANDS if command == x or command.startswith(x + " ")]
    assert found and (len(found[-1].split()) > 2 or command == found[-1]), f"not tested: {command}"
    return found[-1]


def test_every_block_is_known():
    assert {language for language, _ in BLOCKS} == {"bash", "python"} and len(PYTHON) == 3
    assert {known(command) for command in commands()} == {*COMMANDS}


def snippet(marker: str) -> str:
    [text] = [text for text in PYTHON if marker in text]
    return text


def responses(n: int = 6, t: int = 9):
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(n, t, generator=generator)
    return old, (torch.arange(t) < torch.tensor([[9], [4], [1], [7], [9], [2]])).long()


def test_the_verl_lines():
    old, mask = responses()
    scores = torch.zeros_like(old)
    scores[::2, 0] = 1.0
    advantages = (scores.sum(-1, keepdim=True) * 2 - 1) * mask
    data = SimpleNamespace(batch=dict(advantages=advantages, token_level_scores=scores,
                                      old_log_probs=old, response_mask=mask))
    exec(snippet("data.batch"), vars(a3po) | dict(data=data, step=100))
    changed = data.batch["advantages"] != advantages
    assert changed.sum(1).tolist() == [max(1, int(0.2 * n)) for n in mask.sum(1)]
    assert torch.allclose(data.batch["advantages"][changed].abs(), torch.tensor(1.5))


def test_the_trl_trainer():
    """With a base class that gives a batch of TRL's form; check_snippets.py has the real one."""
    old, mask = responses()

    class GRPOTrainer:
        args = SimpleNamespace(steps_per_generation=8, gradient_accumulation_steps=4)
        state = SimpleNamespace(global_step=201)  # updates: two a step

        def _generate_and_score_completions(self, inputs):
            return dict(completion_mask=mask, old_per_token_logps=old,
                        advantages=torch.tensor([1.0, -1.0] * 3))

    names = vars(a3po) | dict(GRPOTrainer=GRPOTrainer)
    exec(snippet("class A3POTrainer"), names)
    advantages = names["A3POTrainer"]()._generate_and_score_completions(None)["advantages"]
    assert advantages.shape == old.shape and (advantages[::2] > 0).all()
    assert set(advantages.abs().unique().tolist()) == {1.0, 1.5}  # rho of step 100


def test_the_reward_function(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(snippet("def my_reward"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    judge = rollout.judge_by_function("my_module:my_reward")
    problem = rollout.Problem("1", "1+1?", "2")
    worked = "first I add one and one, and so " * 2
    grades = [judge(problem, text).result() for text in (
        worked + "\\boxed{2}", "\\boxed{2}", worked + "\\boxed{3}", "no")]
    assert [(grade.reward, grade.correct) for grade in grades] == [
        (1.5, True), (1.0, True), (0.5, False), (0.0, False)]


@pytest.mark.slow
def test_the_commands(tmp_path):
    """In a folder of its own, as somebody types them with .venv active."""
    for name in os.listdir(ROOT):
        if name not in ("runs", "evals", ".git"):
            (tmp_path / name).symlink_to(ROOT / name)
    env = os.environ | dict(PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    done = []
    for command in commands():
        short = COMMANDS[known(command)]
        if short is None:
            continue
        for placeholder, folder in (("evals/X", "evals/base"), ("runs/X", "runs/grpo"),
                                    ("runs/Y", "runs/mine")):
            command = command.replace(placeholder, folder)
        ran = subprocess.run(shlex.split(f"{command} {short}"), cwd=tmp_path, env=env,
                             capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{command}\n{ran.stderr[-2000:]}"
        done.append(command)
    assert len(done) == 6 and (tmp_path / "curves.png").exists()
