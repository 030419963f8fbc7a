"""What the recipes and the READMEs tell a reader to type, without running any of it."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

import a3po
import eval as evaluation

RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
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
def known_flags(*command: str) -> set[str]:
    run = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    return set(re.findall(r"--[\w-]+", run.stdout))


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
    except SystemExit:
        pytest.fail(f"{shlex.join(command)}\n{capsys.readouterr().err.splitlines()[-1]}")


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
        with pytest.raises((SystemExit, AssertionError)):
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


def test_every_test_file_is_described():
    text = (ROOT / "tests" / "README.md").read_text()
    assert not [p.name for p in (ROOT / "tests").glob("*.py") if f"`{p.name}`" not in text]


def test_run_sh_says_what_is_missing(tmp_path):
    cases = [("install", dict(PYTHON="/no/such/python"), "PYTHON=/no/such/python: no such program")]
    if not shutil.which("nvidia-smi"):
        cases.append(("train", {}, "no NVIDIA GPU found"))
    for command, changes, says in cases:
        env = os.environ | {"VENV": str(tmp_path / "venv")} | changes
        done = subprocess.run(["bash", "run.sh", command], cwd=ROOT, env=env, text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
