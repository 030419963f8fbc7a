"""What the recipes and the READMEs tell a reader to type: the program accepts it; and every block
of code in README.md is run, Python as it stands, commands made short."""

import ast
import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import a3po
import eval as evaluation
import rollout
import verify
from shelf.ranks import UsageError

RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
OTHERS = ROOT / "recipes" / "other_trainers.md"
READMES = [ROOT / "README.md", *(ROOT / name / "README.md" for name in ("demo", "tests"))]
SCRIPTS = ("a3po.py", "eval.py", "verify.py")
LAUNCHERS = ("python", "torchrun")
VALUE = re.compile(r"^\s*(\w+)=\$\{\1:-(.*?)\}(?:\s|$)|^\s*for (\w+) in (.*); do", re.M)


def blocks(path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.S | re.M)


def shell_text(path) -> str:
    """The script, or a README's bash blocks; commands in comments are commands too."""
    text = path.read_text() if path.suffix == ".sh" else "".join(blocks(path, "bash"))
    text = re.sub(r"^# *(?=[A-Z]+=|python |torchrun |bash )", "", text, flags=re.M)
    return re.sub(r"\\\n[ #]*", " ", text)


def defaults(text: str) -> dict[str, list[str]]:
    """NAME=${NAME:-value} and `for NAME in values;`: the values that each variable can have."""
    found = {}
    for name, value, loop, values in VALUE.findall(text):
        found[name or loop] = values.split() if loop else [value]
    return found


def expand(words: list[str], values: dict[str, list[str]]) -> list[list[str]]:
    """The words with their variables replaced, once for each combination of values."""
    used = [name for name in values if any(re.search(rf"\${{?{name}\b", w) for w in words)]
    lines = []
    for chosen in itertools.product(*(values[name] for name in used)):
        line = words
        for name, value in zip(used, chosen, strict=True):
            line = [re.sub(rf"\${{{name}}}|\${name}\b", lambda _, v=value: v, w) for w in line]
        lines.append(line)
    return lines


def commands(path) -> list[list[str]]:
    """[launcher, its flags, script, arguments] of every command that calls one of SCRIPTS."""
    text = shell_text(path)
    values, found = defaults(text), []
    for line in text.splitlines():
        line = re.sub(r"^srun (--\S+ )*", "", line)
        if not re.match(r"""\s*([A-Z]+=\S* )*["$]*(python|torchrun|PYTHON|TORCHRUN)\b""", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(itertools.takewhile(lambda w: not re.fullmatch("[();<>|&]+", w), lexer))
        words = list(itertools.dropwhile(lambda w: re.match("[A-Z]+=", w), words))
        found += [c for c in expand(words, values) if any(script in c for script in SCRIPTS)]
    return found


@cache
def known_flags(script: str, *sub: str) -> set[str]:
    """The flags that its --help names."""
    main = {"verify.py": verify.main, "eval.py": evaluation.main}[script]
    out, arguments = io.StringIO(), [*sub, "--help"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit):
            main()
    return set(re.findall(r"--[\w-]+", out.getvalue()))


def check(command: list[str]) -> None:
    """The program's own parser accepts the arguments."""
    place = next(i for i, word in enumerate(command) if word in SCRIPTS)
    script, arguments = command[place], command[place + 1 :]
    assert command[0].rpartition("/")[2] in LAUNCHERS
    if script == "a3po.py":
        a3po.parse_args(arguments)
    elif script == "eval.py" and (not arguments or arguments[0].startswith("-")):
        args = evaluation.parse_args(arguments)
        assert set(filter(None, args.benchmarks.split(","))) <= set(evaluation.BENCHMARKS)
        assert "torchrun" not in command[0] or "--n" not in arguments  # torchrun would take it
    else:
        sub = arguments[:1] if script == "eval.py" else []
        assert {w for w in arguments if w.startswith("--")} <= known_flags(script, *sub)


COMMANDS = [(path, command) for path in [*RECIPES, *READMES] for command in commands(path)]


@pytest.mark.parametrize("command", [c for _, c in COMMANDS], ids=[
    f"{path.relative_to(ROOT)}-{i}" for i, (path, _) in enumerate(COMMANDS)])
def test_the_program_accepts_the_command(command, capsys):
    try:
        check(command)
    except (SystemExit, UsageError) as why:
        pytest.fail(f"{shlex.join(command)}\n{why} {capsys.readouterr().err}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path):
    """It is valid shell, calls each kind of program, and says what has never been run."""
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    scripts = {script for command in commands(path) for script in SCRIPTS if script in command}
    assert {"a3po.py", "eval.py"} <= scripts
    head = path.read_text().partition("set -euo pipefail")[0].replace("\n# ", " ")
    assert re.search("ever been run|not run", head, re.I)
    written = len(re.findall(r"^[^#\n]*\b(?:a3po|eval|verify)\.py\b", shell_text(path), re.M))
    assert len(commands(path)) >= written  # none was overlooked


def test_mistakes_are_found(tmp_path):
    right = (ROOT / "recipes" / "laptop.sh").read_text()
    for old, new in (("--eval_limit", "--eval_limits"), ("--preset dapo", "--preset dappo"),
                     ("--benchmarks demo,", "--benchmarks dem,"), ("STEPS:-100", "STEPS:-many"),
                     ("eval.py plot", "eval.py plot --outt x")):
        assert old in right
        (tmp_path / "wrong.sh").write_text(right.replace(old, new))
        with pytest.raises((SystemExit, AssertionError, UsageError)):
            for command in commands(tmp_path / "wrong.sh"):
                check(command)


def test_commands_of_run_sh():
    known = subprocess.run(["bash", "run.sh", "help"], cwd=ROOT, capture_output=True, text=True)
    known = set(re.findall(r"bash run\.sh ([a-z]+)", known.stdout))
    for path in [*RECIPES, *READMES]:
        assert set(re.findall(r"bash run\.sh ([a-z]+)", shell_text(path))) <= known


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_readme(path):
    """The files it names exist, relative to the repository or to its own folder."""
    text = path.read_text()
    named = set(re.findall(r"\]\(([\w./]+)\)", text))
    named |= set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b", text))
    named |= set(re.findall(r"\b((?:demo|recipes|tests)/[\w.-]*\w)", text))
    assert named
    missing = {name for name in named
               if not (ROOT / name).exists() and not (path.parent / name).exists()}
    assert not missing
    for source in blocks(path, "python"):
        compile(source, str(path), "exec")


def test_readme_is_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190
    assert max(map(len, (ROOT / "README.md").read_text().splitlines())) <= 120


ORDER = """ranks sandbox latex answers verify rollout config data metrics report folder model
checkpoints checks memory show eval a3po plan""".split()  # from the ground up


def imported_by(path: Path) -> set[str]:
    """Names of our modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("shelf.") for name in found} & {*ORDER}


def test_imports_point_downwards():
    files = [*ROOT.glob("*.py"), *ROOT.glob("shelf/*.py")]
    named = {path.stem: path for path in files if path.stem != "__init__"}
    assert named.keys() == {*ORDER} and len([*ROOT.glob("*.py")]) == 5
    for name, path in named.items():
        assert imported_by(path) <= {*ORDER[: ORDER.index(name)]}, name


def test_every_test_file_is_described():
    folder = ROOT / "tests"
    text = (folder / "README.md").read_text()
    assert not [p.name for p in folder.rglob("*.py") if f"`{p.relative_to(folder)}`" not in text]


def test_run_sh_says_what_is_missing(tmp_path):
    cases = [("install", dict(PYTHON="/no/such/python"), "PYTHON=/no/such/python: no such program")]
    if not shutil.which("nvidia-smi"):
        cases.append(("train", {}, "no NVIDIA GPU found"))
    for command, changes, says in cases:
        env = os.environ | {"VENV": str(tmp_path / "venv")} | changes
        done = subprocess.run(["bash", "run.sh", command], cwd=ROOT, env=env, text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


# ---- README.md's blocks, run ---------------------------------------------------------------------

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHORT = "--steps 1 --eval_limit 8 --prompts_per_step 8"
SHORTENED = {  # how a command is made short; None: not run here, as the comment says
    "bash run.sh": None,  # the next but one, after an installation
    "bash run.sh test": None,  # this
    "bash run.sh study": None,  # its quick form is in test_study.py
    "bash run.sh train": None,  # eight GPUs; how it starts is in test_folder.py
    "torchrun --nproc_per_node 8 eval.py": None,  # the same, and the hub; its flags: above
    "python a3po.py --setting demo --preset grpo --seed 1": f"{SHORT} --output_dir runs/grpo",
    "python a3po.py --output_dir runs/mine --resume auto": f"--setting demo {SHORT}",
    "python eval.py --model demo/model --benchmarks demo": "--limit 8 --out evals/base",
    "python eval.py compare": "",
    "python eval.py plot": "",
    "python eval.py show": "",
}


def readme_commands() -> list[str]:
    text = "".join(text for language, text in BLOCKS if language == "bash")
    lines = [line.partition("#")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line]


def shortened_as(command: str) -> str:
    """Return the entry of SHORTENED for this command."""
    found = [x for x in SHORTENED if command == x or command.startswith(x + " ")]
    assert found and (len(found[-1].split()) > 2 or command == found[-1]), f"not tested: {command}"
    return found[-1]


def test_every_block_is_known():
    assert {language for language, _ in BLOCKS} == {"bash", "python"} and len(PYTHON) == 3
    assert {shortened_as(command) for command in readme_commands()} == {*SHORTENED}


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
    trainer = SimpleNamespace(global_steps=101)  # from 1
    exec(snippet("data.batch"), vars(a3po) | dict(data=data, self=trainer))
    changed = data.batch["advantages"] != advantages
    assert changed.sum(1).tolist() == [max(1, int(0.2 * n)) for n in mask.sum(1)]
    assert torch.allclose(data.batch["advantages"][changed].abs(), torch.tensor(1.5))


def trl_advantages(old, mask, accumulation=1, per_generation=2, iterations=1, updates=0):
    """What the README's trainer makes of a base class that gives a batch of TRL's form;
    check_snippets.py has the real one."""

    class GRPOTrainer:
        args = SimpleNamespace(steps_per_generation=per_generation, num_iterations=iterations,
                               gradient_accumulation_steps=accumulation)
        state = SimpleNamespace(global_step=updates)

        def _generate_and_score_completions(self, inputs):
            found = dict(completion_mask=mask, advantages=torch.tensor([1.0, -1.0] * 3))
            return found if old is None else found | dict(old_per_token_logps=old)

    names = vars(a3po) | dict(GRPOTrainer=GRPOTrainer)
    exec(snippet("class A3POTrainer"), names)
    return names["A3POTrainer"]()._generate_and_score_completions(None)["advantages"]


@pytest.mark.parametrize("accumulation, per_generation, iterations, updates", [
    (4, 8, 1, 201), (1, 2, 1, 201), (1, 2, 2, 403), (2, 2, 2, 201), (3, 2, 1, 67)])
def test_the_trl_trainer(accumulation, per_generation, iterations, updates):
    """Rho is that of step 100, whatever the number of updates and micro-batches until then."""
    old, mask = responses()
    advantages = trl_advantages(old, mask, accumulation, per_generation, iterations, updates)
    assert advantages.shape == old.shape and (advantages[::2] > 0).all()
    assert set(advantages.abs().unique().tolist()) == {1.0, 1.5}


def test_the_trl_trainer_says_what_it_needs():
    """At GRPOConfig's defaults, and with accumulation, TRL leaves the old log-probs out."""
    for accumulation, says in ((1, "steps_per_generation=2"), (3, "steps_per_generation=6")):
        with pytest.raises(ValueError, match=says):
            trl_advantages(None, responses()[1], accumulation, accumulation)


def test_the_lines_for_other_trainers():
    """On what their sources say that they have there; they are not installed."""
    old, mask = responses()
    openrlhf, prime_rl = blocks(OTHERS, "python")
    rewards, A = torch.tensor([1.0, 0] * 3), torch.tensor([[0.5], [-0.5]] * 3).expand_as(old)
    batch = SimpleNamespace(advantages=A, rewards=rewards, action_log_probs=old,
                            action_mask=mask.bool())
    exec(openrlhf, vars(a3po) | dict(experiences=[batch], global_step=100))
    shaped = a3po.shape_advantages(A, rewards > 0, old, mask, rho_positive=1.5, rho_negative=1.5)
    assert torch.equal(batch.advantages, shaped) and not torch.equal(shaped, A)

    policy = SimpleNamespace(run=SimpleNamespace(work=SimpleNamespace(policy=SimpleNamespace(
        start=100))))
    for row, kept in enumerate(mask.bool()):
        given, values = [], old[row][kept].tolist()
        nodes = [SimpleNamespace(logprobs=values[:3]), SimpleNamespace(logprobs=[]),
                 SimpleNamespace(logprobs=values[3:])]  # the model's turns, and one of another
        exec(prime_rl, vars(a3po) | dict(
            episodes=[policy], trace=SimpleNamespace(nodes=nodes, reward=rewards[row].item()),
            advantage=A[row, 0].item(), assign_advantages=lambda _, x, to=given: to.append(x)))
        assert given == [shaped[row][kept].tolist()]


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
    for command in readme_commands():
        short = SHORTENED[shortened_as(command)]
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
