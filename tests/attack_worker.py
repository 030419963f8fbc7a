"""Run the attacks in one mode: python attack_worker.py REPOSITORY USER_ID "unshare,landlock".

Writes [what protects, the results] as JSON; a result is [what fell, seconds] of a row of
attacks.jsonl. USER_ID -1: the present user. What is named last is denied to this process.
"""

import ctypes
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

repository, uid, deny = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.path.insert(0, repository)
import verify  # noqa: E402
from shelf import sandbox  # noqa: E402

CALLS = {"unshare": (272, 97), "landlock": (444, 444)}
PLANT = "x = 'PLANTED' * 999\n# " + "PLANTED" * 999 + "\nprint(input())"


def family() -> set[int]:
    """Process ids of all descendants."""
    found, new = set(), {os.getpid()}
    while new:
        found |= new
        paths = [path for pid in new for path in Path(f"/proc/{pid}/task").glob("*/children")]
        new = {int(child) for path in paths for child in path.read_text().split()}
    return found


def state(folder: Path) -> list:
    """All that a program might change of the user's folder."""
    found = []
    for path in sorted(folder.parent.rglob("*")):
        info = path.lstat()
        content = repr(path.read_bytes()) if path.is_file() else ""
        marks = [(x, os.getxattr(path, x)) for x in os.listxattr(path, follow_symlinks=False)]
        found.append([str(path), info.st_mode, info.st_uid, info.st_gid, info.st_nlink,
                      info.st_mtime_ns, content, marks])
    return found


def canary(folder: Path) -> Path:
    """Make the user's private file again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(0o700)
    path = folder / "canary.py"
    path.write_text("SECRET")
    path.chmod(0o600)
    try:
        os.setxattr(path, "user.canary", b"x")
    except OSError:  # not on this file system
        pass
    return path


def attack(row: dict, box: sandbox.Sandbox, folder: Path) -> str:
    """Run one program; return what fell: "" if nothing did."""
    path = canary(folder)
    before = state(folder)
    if row.get("after_planting"):
        assert box.run(PLANT, "PLANTED" * 999)[0] == "ok"
    function = row.get("function")
    places = {"{CANARY}": str(path), "{VERIFY}": verify.answers.__file__}
    tests = []
    for given, wanted in row["tests"]:
        for name, place in places.items():
            given = given.replace(name, place)
        tests.append(dict(input=given, output=wanted))
    question = dict(public_test_cases=tests, metadata=dict(func_name=function))
    limit = row.get("time_limit", 5)
    started = time.monotonic()
    grade = verify.grade_code(row["code"], question, limit, box, lambda: None)
    late = time.monotonic() - started > limit + 12  # the machine may be busy
    fell = ["a reward"] * grade.correct + ["the user's files"] * (state(folder) != before)
    for _ in range(20):  # the server reaps what it killed
        if left := len(family()) > 3:
            time.sleep(0.05)
    fell += ["processes left"] * left + ["late"] * late
    return ", ".join(fell + [grade.detail] * (grade.status == "error"))


def main() -> None:
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what is left becomes ours
    if deny:
        program = sandbox.seccomp_filter([CALLS[name] for name in deny.split(",")])
        assert sandbox.apply_seccomp(program)
    if uid >= 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    rows = map(json.loads, (Path(repository) / "tests/attacks.jsonl").open(encoding="utf-8"))
    results = []
    with sandbox.Sandbox() as box, tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        protections, contained = box.protections, box.contained
        for row in rows:
            started = time.monotonic()
            results.append([attack(row, box, Path(home) / "home"), time.monotonic() - started])
    print(json.dumps([protections, contained, results]))


if __name__ == "__main__":
    main()
