"""The command line, and the pool behind it: order, clear errors, nothing that raises."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
from test_sandbox import BURN, children

import verify
from shelf.ranks import UsageError
from verify import read_jsonl

VERIFY = str(Path(verify.__file__))
MATH = {"id": 1, "kind": "math", "response": "\\boxed{5}", "answer": "5"}
QUESTION = {"public_test_cases": json.dumps([{"input": "", "output": "7", "testtype": "stdin"}])}
CODE = {"id": 2, "kind": "code", "response": "```\nprint(7)\n```", "question": QUESTION}


def cli(tmp_path, rows, *options):
    path = tmp_path / "rows.jsonl"
    lines = rows if isinstance(rows, bytes) else "\n".join(
        r if isinstance(r, str) else json.dumps(r) for r in rows).encode()  # fmt: skip
    path.write_bytes(lines)
    command = [sys.executable, VERIFY, str(path), "--workers", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_rows_in_order(tmp_path):
    rows = [
        MATH,
        MATH | {"id": "two", "response": None},
        CODE | {"id": 3},
        MATH | {"id": [4], "response": "\\boxed{y+x}", "answer": '["x+y"]'},
        CODE | {"id": 5, "response": "```\nwhile True: pass\n```", "time_limit": 1},
        {"id": 6, "kind": "choice", "response": "Answer: B", "answer": "B", "n_choices": 2},
        {"id": 7, "kind": "choice", "response": "Answer: B", "answer": "C", "n_choices": 2},
        MATH | {"id": 8, "answer": ""},
        MATH | {"id": 9, "response": "\\boxed{\ud800\x00}"},
        MATH | {"id": None, "answer": 5},
        CODE | {"id": 11, "question": {}},
        "",
        MATH | {"id": 12, "response": "\\boxed{4}", "extra": "field"},
    ]
    done = cli(tmp_path, rows, "--timeout", "20")
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["id"] for x in out] == [1, "two", 3, [4], 5, 6, 7, 8, 9, None, 11, 12]
    assert [x["correct"] for x in out] == [
        True, False, True, True, False, True, False, False, False, True, False, False
    ]  # fmt: skip
    assert [x["status"] for x in out] == [
        "ok", "no_answer", "ok", "ok", "timeout", "ok", "bad_reference", "bad_reference", "ok",
        "ok", "bad_reference", "ok",
    ]  # fmt: skip
    assert [x["extracted"] for x in out][:3] == ["5", None, "print(7)"]
    assert {tuple(x) for x in out} == {("id", "correct", "extracted", "status", "detail")}
    assert "5 of 12 correct" in done.stderr and "3 bad_reference" in done.stderr
    assert "resource limits" in done.stderr  # the protections, since there is code


@pytest.mark.parametrize(
    "rows, parts",
    [
        ([MATH, "{broken"], [":2", "JSON"]),
        ([MATH, "", "[1]"], [":3", "object"]),
        ([{"id": 1}], [":1", "'kind'", "missing"]),
        *[([MATH, {k: v for k, v in MATH.items() if k != gone}], [":2", f"'{gone}'", "missing"])
          for gone in MATH],
        ([{k: v for k, v in CODE.items() if k != "question"}], [":1", "'question'", "missing"]),
        ([MATH | {"kind": "essay"}], [":1", "'kind'", "essay"]),
        ([MATH | {"kind": ["math"]}], [":1", "'kind'"]),
        ([MATH | {"response": 5}], [":1", "'response'"]),
        ([MATH | {"answer": None}], [":1", "'answer'"]),
        ([MATH | {"answer": ["5"]}], [":1", "'answer'"]),
        ([CODE | {"question": "text"}], [":1", "'question'"]),
        ([CODE | {"time_limit": 0}], [":1", "'time_limit'"]),
        ([CODE | {"time_limit": "1"}], [":1", "'time_limit'"]),
        ([MATH | {"n_choices": 0}], [":1", "'n_choices'"]),
        (["[" * 100_000], [":1", "JSON"]),
        (b"\xff\xfe", ["cannot be read"]),
    ],
)  # fmt: skip
def test_bad_rows_give_one_line(tmp_path, rows, parts):
    done = cli(tmp_path, rows)
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(part in done.stderr for part in ["rows.jsonl", *parts]), done.stderr


def test_missing_file(tmp_path):
    done = subprocess.run([sys.executable, VERIFY, str(tmp_path / "none")], capture_output=True)
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1


def test_empty_file(tmp_path):
    done = cli(tmp_path, b"")
    assert (done.returncode, done.stdout) == (0, "")


def test_import_is_light():
    code = (
        "import sys, verify\n"
        "others = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(sorted(others))\n"
    )
    command = [sys.executable, "-S", "-c", code]  # without what a site-packages may load at start
    done = subprocess.run(command, cwd=Path(VERIFY).parent, capture_output=True, text=True)
    assert done.stdout == "['__main__', 'shelf', 'verify']\n", done.stderr


def test_submit_from_many_threads():
    futures = []
    with verify.Graders(workers=2, timeout=60) as graders:
        def submit(n):
            for i in range(20):
                response, gold = f"\\boxed{{x+{n * 100 + i}}}", f"{n * 100 + i // 2 * 2}+x"
                futures.append((i % 2 == 0, graders.submit("math", response, gold)))

        threads = [threading.Thread(target=submit, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait([f for _, f in futures])
        assert all(f.result().correct == right for right, f in futures) and len(futures) == 160
        assert graders.counts == {"ok": 160}


def test_list_keeps_order_and_counts():
    items = [("math", f"\\boxed{{{'x+' * (i % 3 == 0)}{i}}}", f"{'x+' * (i % 3 == 0)}{i}")
             for i in range(50)]  # fmt: skip
    items += [("choice", "Answer: C", "C", {"n_choices": 3}), ("math", "none", "5")]
    with verify.Graders(workers=2, timeout=60) as graders:
        grades = graders.grade(items)
        assert [g.correct for g in grades] == [True] * 51 + [False]
        assert graders.counts == {"ok": 51, "no_answer": 1}


def test_a_dead_worker_is_replaced():
    before = children()
    with verify.Graders(workers=1, timeout=60) as graders:
        assert graders.submit("math", "\\boxed{x+1}", "1+x").result().correct
        (worker,) = children() - before
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # it is dead, and not yet reaped
        assert graders.submit("math", "\\boxed{x+2}", "2+x").result().correct
        assert graders.counts == {"ok": 2}


def test_patient_close_counts_the_cpu_time_of_programs():
    family, reaped = children(), sum(os.times()[2:4])
    with verify.Graders(workers=1, timeout=60) as graders:
        response = f"```\n{BURN}\n```"
        assert graders.submit("code", response, QUESTION, time_limit=20).result().correct
        (worker,) = children() - family
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        own = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # the worker's imports
        graders._take_idle().close(patience=20)
    assert sum(os.times()[2:4]) - reaped - own > 0.5


def test_unknown_kind_is_a_programming_error():
    with pytest.raises(ValueError, match="essay"):
        verify.grade("essay", "x", "y")


# ---- JSON lines ---------------------------------------------------------------------------------


def read(tmp_path, data, **options):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return [(where.removeprefix(f"{path}:"), row) for where, row in read_jsonl(path, **options)]


@pytest.mark.parametrize(
    "data, rows",
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b'{"a": 1}', [("1", {"a": 1})]),
        (b'\n{"a": 1}\r\n\n{}\n', [("2", {"a": 1}), ("4", {})]),
        # What other readers take for the end of a line: it may stand within a string.
        ('{"a": "\u2028\u0085"}\n{}'.encode(), [("1", {"a": "\u2028\u0085"}), ("2", {})]),
        (b'{"a":\r1}\n{"b": 2}', [("1", {"a": 1}), ("2", {"b": 2})]),
    ],
)
def test_read_jsonl(tmp_path, data, rows):
    assert read(tmp_path, data) == read(tmp_path, data, skip_broken=True) == rows


BROKEN = [b'{"a": ', b"[" * 100_000, b'{"a": "\xc3', b"\x00\x00", b"9" * 5000, b'{"a": 1} {}']


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_lines(tmp_path, line):
    data = b'{"a": 1}\n' + line
    with pytest.raises(UsageError, match="rows.jsonl(:2: broken JSON: |: cannot be read: .*utf-8)"):
        read(tmp_path, data)
    assert read(tmp_path, data, skip_broken=True) == [("1", {"a": 1})]
    after = read(tmp_path, data + b'\n{"b": 2}\n', skip_broken=True)
    assert after == [("1", {"a": 1}), ("3", {"b": 2})]


@pytest.mark.parametrize("line", [b"[1]", b"7", b"null", b'"text"'])
@pytest.mark.parametrize("skip_broken", [False, True])
def test_lines_that_are_no_objects(tmp_path, line, skip_broken):
    with pytest.raises(UsageError, match=":2: a JSON object is expected, one per line$"):
        read(tmp_path, b"{}\n" + line, skip_broken=skip_broken)


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "none.jsonl"
    with pytest.raises(UsageError, match="none.jsonl: cannot be read: "):
        list(read_jsonl(missing))
    assert list(read_jsonl(missing, skip_broken=True)) == []
    for skip_broken in (False, True):
        with pytest.raises(UsageError, match=": cannot be read: "):
            list(read_jsonl(tmp_path, skip_broken))  # a folder
    assert issubclass(UsageError, ValueError)
