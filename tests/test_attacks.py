"""Hostile programs get nothing, in any mode; honest ones run. `python tests/test_attacks.py` prints
the table: a mode a row, with what is missing there, and how many attacks held and fell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import verify  # noqa: E402
from shelf.sandbox import Sandbox  # noqa: E402

HERE = Path(__file__).parent


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).open(encoding="utf-8")]


ATTACKS, PROGRAMS = rows_of("attacks.jsonl"), rows_of("programs.jsonl")
MODES = [(user, deny) for user in ("root", "user")
         for deny in ("", "unshare", "landlock", "unshare,landlock")]  # fmt: skip


def python_for(user: str) -> tuple[str, str]:
    """An interpreter that the user may run, and the user id to take (-1: none)."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("not root")
    if user == "root" or os.geteuid() != 0:
        return sys.executable, "-1"
    for python in (sys.executable, "/usr/bin/python3"):
        code = "import os, sys; os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
        probe = f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import verify"
        command = [sys.executable, "-c", code, python, "-B", "-c", probe]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return python, "65534"
    pytest.skip("an ordinary user cannot run Python here")


def run_mode(user: str, deny: str) -> tuple[str, bool, list[str]]:
    """Return what protects, whether the user's files are safe, and what fell of each attack."""
    python, uid = python_for(user)
    command = [python, "-B", str(HERE / "attack_worker.py"), str(HERE.parent), uid, deny]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    protections, contained, results = json.loads(done.stdout)
    return protections, contained, [fell for fell, _ in results]


def unexplained(protections: str, fell: list[str]) -> list[tuple[str, str]]:
    """The attacks that fell, but for those that need a protection, all forms of it missing."""
    active = protections.partition("MISSING")[0]
    return [(row["tries"], what) for row, what in zip(ATTACKS, fell, strict=True) if what
            and not ("needs" in row and not any(name in active for name in row["needs"]))]


def check(user: str, deny: str) -> list[str]:
    protections, contained, fell = run_mode(user, deny)
    assert unexplained(protections, fell) == []
    assert contained == (not any("the user's files" in what for what in fell))
    return fell


def test_there_are_enough():
    assert len({row["code"] for row in ATTACKS}) >= 150
    assert len({row["code"] for row in PROGRAMS}) >= 100
    assert all(row["tries"] for row in ATTACKS + PROGRAMS)


def test_attacks_get_nothing():
    check("root" if os.geteuid() == 0 else "user", "")


@pytest.mark.slow
@pytest.mark.parametrize("user, deny", MODES[1:])
def test_attacks_get_nothing_in_other_modes(user, deny):
    fell = check(user, deny)
    if user == "user" and deny == "unshare,landlock":  # there is nothing between: they do work
        assert sum(map(bool, fell)) > 30


@pytest.fixture(scope="module")
def box():
    with Sandbox() as sandbox:
        yield sandbox


def test_honest_programs_run(box):
    wrong = []
    for row in PROGRAMS:
        tests = [dict(input=given, output=wanted) for given, wanted in row["tests"]]
        question = dict(public_test_cases=tests, metadata=dict(func_name=row.get("function")))
        grade = verify.grade_code(row["code"], question, 10, box, lambda: None)
        if not grade.correct:
            wrong.append((row["tries"], grade.detail))
    assert wrong == []


def main() -> None:
    print("| mode | missing | held | fell | user's files |\n|---|---|---|---|---|")
    for user, deny in MODES:
        protections, contained, fell = run_mode(user, deny)
        name = f"{user}, without {deny.replace(',', ' and ')}" if deny else user
        missing, n = protections.partition("MISSING: ")[2], sum(map(bool, fell))
        print(f"| {name} | {missing} | {len(fell) - n} | {n} | {'safe' if contained else 'open'} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
