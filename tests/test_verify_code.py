"""Code: correct programs in every input style pass, nothing else does, nothing gets out."""
# ruff: noqa: E501  (the programs)

import base64
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest
from test_sandbox import children, wait_until

import verify
from shelf import sandbox

ADD = "a, b = map(int, input().split())\nprint(a + b)"
CASES = [("3 4\n", "7\n"), ("10 20\n", "30\n")]


@pytest.fixture(scope="module")
def graders():
    with verify.Graders(workers=2, timeout=20) as pool:
        yield pool


def row(cases, func=None, private=None):
    kind = "functional" if func else "stdin"
    tests = [{"input": i, "output": o, "testtype": kind} for i, o in cases]
    return {
        "public_test_cases": json.dumps(tests),
        "private_test_cases": private or "[]",
        "metadata": json.dumps({"func_name": func} if func else {}),
    }


def run(graders, code, cases=CASES, func=None, time_limit=5, **more):
    code = textwrap.dedent(code)
    response = f"Here it is.\n```python\n{code}\n```\nDone."
    question = row(cases, func, **more)
    return graders.submit("code", response, question, time_limit=time_limit).result()


def seven(graders, code, **more):
    """Run code whose right output is 7, whatever the input."""
    return run(graders, code, [("secret 4\n", "7\n")], **more)


# ---- which block --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nx\n```", "x"),
        ("```\nx\n```", "x"),
        ("```py\nx\n```\nand\n```python\ny\n```", "y"),
        ("```python\nx\n```\n```python\ny", "x"),
        ("```python\nx\n```python\ny\n```", "y"),
        ("~~~python\nx\n~~~", "x"),
        ("````python\n```\n````", "```"),
        ("  ```python\n  if x:\n    y\n  ```", "if x:\n  y"),
        ("<think>```\nx\n```</think>\n```\ny\n```", "y"),
        ("```python\nx\n```</think> none", None),
        ("```python\nx", None),
        ("print(1)", None),
        ("```python\n\n```", None),
        ("`x`", None),
        ("", None),
        (None, None),
    ],
)
def test_last_block(text, code):
    assert verify.extract_code(text) == code


# ---- programs that are right --------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        ADD,
        "import sys\na, b = map(int, sys.stdin.readline().split())\nprint(a + b)",
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
        "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
        "import fileinput\nfor line in fileinput.input():\n    print(sum(map(int, line.split())))",
        "import io, os\ninput = io.BytesIO(os.read(0, 99)).readline\nprint(sum(map(int, input().split())))",
        "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
        "import sys\ninput = sys.stdin.readline\nprint(sum(map(int, input().split())))",
        "print(sum(map(int, stdin.readline().split())))",
        "out = open(1, 'w', closefd=False)\nout.write(str(sum(map(int, input().split()))))",
        "import sys\nout = []\nout.append(sum(map(int, input().split())))\nsys.stdout.write(f'{out[0]}')",
        ADD + "\nexit()",
        ADD + "\nimport sys\nsys.exit(0)",
        ADD + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)",
        ADD + "\nimport sys\nsys.stdout.close()",
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n" + ADD,
        "import threading\ndef f():\n    print(sum(map(int, input().split())))\n"
        "threading.stack_size(1 << 27)\nt = threading.Thread(target=f)\nt.start()\nt.join()",
        "import threading\ndef f():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=f).start()",
        ADD + "\nimport threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        ADD + "\nimport os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)",
        "import atexit\nx = sum(map(int, input().split()))\natexit.register(lambda: print(x))",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return n and 1 + f(n - 1)\nf(90000)\n" + ADD,
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int\n    b: int\n"
        "p = P(*map(int, input().split()))\nprint(p.a + p.b)",
        "import pickle\nclass C:\n    pass\npickle.loads(pickle.dumps(C()))\n" + ADD,
        "import asyncio, socket, numbers, xml.dom\n" + ADD,
        "open('note', 'w').write(input())\nprint(sum(map(int, open('note').read().split())))",
        "print(Counter([1])[1] + gcd(0, sum(map(int, input().split()))) - 1)",
        "x = b = 1\nprint('é' and sum(map(int, input().split())))",
    ],
)
def test_correct_programs(graders, code):
    result = run(graders, code)
    assert (result.correct, result.status, result.detail) == (True, "ok", "")


@pytest.mark.parametrize(
    "code, func, cases",
    [
        ("class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return sum(a) + b", "add",
         [("[1, 2]\n3", "6"), ("[]\n0", "0")]),
        ("def add(a, b):\n    return sum(a) + b", "add", [("[1, 2]\n3", "6")]),
        ("from typing import *\nclass Solution:\n    def f(self, s: Optional[str]):\n        return (s, s)", "f",
         [('"é"', '["é", "é"]')]),
        ("class Solution:\n    def f(self, a):\n        print('noise')\n        return a", "f",
         [('{"x": [1, null, true, 2.5]}', '{"x": [1, null, true, 2.5]}')]),
        ("class Solution:\n    @cache\n    def f(self, n):\n        return n and 1 + self.f(n - 1)", "f", [("99", "99")]),
        ("class Solution:\n    def f(self, n):\n        import sys\n        sys.stdout.close()\n        return n", "f",
         [("1", "1")]),
    ],
)
def test_correct_functions(graders, code, func, cases):
    result = run(graders, code, cases, func)
    assert (result.correct, result.status, result.detail) == (True, "ok", "")


def prelude_functions():
    """The names that a program finds without an import."""
    scope = {}
    exec("".join(f"from {module} import *\n" for module in sandbox._STAR), scope)
    return sorted({*scope, *sandbox._STAR} - {"__builtins__"})


def test_a_function_of_the_prelude_is_not_the_programs_own():
    """With an empty program there is no result to compare, whatever the task's function is called."""
    names = prelude_functions()
    assert len(names) > 200 and {"add", "gcd", "merge", "accumulate"} <= {*names}
    with sandbox.Sandbox() as box:
        for name in names:
            for arguments in ("[3]", "3\n4", ""):
                assert box.run("pass", arguments, name, 5)[0] == "failed", name


@pytest.mark.parametrize(
    "code, correct",
    [
        ("pass", False), ("def other(a, b):\n    return a + b", False),
        ("class Solution:\n    def other(self, a, b):\n        return a + b", False),
        ("class Solution:\n    def __init__(self, x):\n        pass", False),
        ("class Solution:\n    pass\ndef gcd(a, b):\n    return math.gcd(a, b)", False),
        ("class Solution:\n    def __init__(self, x):\n        pass\n"
         "def gcd(a, b):\n    return math.gcd(a, b)", False),
        ("def gcd(a, b):\n    return math.gcd(a, b)", True),
        ("def solve(a, b):\n    return gcd(a, b)\nclass Solution:\n    gcd = staticmethod(solve)", True),
        ("class Solution:\n    def gcd(self, a, b):\n        return gcd(a, b)", True),
        ("from math import *", False), ("import math\ngcd = math.gcd", False),
    ],
)
def test_only_what_the_program_defines_counts(graders, code, correct):
    result = run(graders, code, [("12\n18", "6")], "gcd")
    assert (result.correct, result.status) == (correct, "ok")


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("7", "7\n", True), ("7\n\n", "7", True), ("  7  ", "7", True), ("1 \n 2", "1\n2", True),
        ("7.0", "7", True), ("7.10 1e1", "7.1 10", True), ("1  2", "1 2", True), ("", "", True),
        ("7.0000001", "7", False), ("1\n\n2", "1\n2", False), ("1\n2\n3", "1\n2", False),
        ("yes", "YES", False), ("1_0", "10", False), ("nan", "NaN", False), ("sNaN", "1", False),
        ("", "7", False), ("7 7", "7", False), ("0x7", "7", False), ("Infinity", "1", False),
    ],
)
def test_output_comparison(graders, printed, expected, same):
    assert verify.same_output(printed, expected) == same
    assert run(graders, f"print({printed!r}, end='')", [("", expected)]).correct == same


# ---- programs that are wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "print(7)\n1 / 0", "print(7)\nexit(1)", "print(7)\nexit('no')", "import os\nprint(7, flush=True)\nos.abort()",
        "print(8)", "", "pass", "syntax error", "print('\\ud800')", "\x00", "print(7", "import nothing\nprint(7)",
        "import sys\nsys.stdout.buffer.write(b'\\xff7')", "print('7\\x00')", "print(7)\nprint(7)",
        "import os\nos.close(1)\nprint(7)", "import os\nos.closerange(0, 99)\nprint(7)", "raise SystemExit(3)",
        "raise KeyboardInterrupt", "def f(): f()\nf()", "print('7' * 9_000_000)", "import sys\nsys.exit(256)",
        "exec('(' * 100_000)", "class X(int):\n    __eq__ = lambda *a: True\n    __str__ = lambda s: '8'\nprint(X(7))",
    ],
)
def test_wrong_programs(graders, code):
    result = seven(graders, code)
    assert not result.correct and result.status in ("ok", "no_answer")
    assert run(graders, ADD).correct  # whatever it did, the next is graded as ever


@pytest.mark.parametrize(
    "body",
    [
        "return 8", "return None", "return [7]", "return '7'", "return {7}", "return 7.0000001",
        "import os\nos._exit(0)", "raise SystemExit", "raise SystemExit(0)", "exit()",
        "import os\nos.write(3, b'7')\nos._exit(1)", "import os\nos.write(1, b'7')\nos.close(3)",
        "import json\njson.dumps = lambda *a, **k: '7'\nreturn 8",
        "import json\njson.loads = lambda *a, **k: 7\njson.encoder.c_make_encoder = None\nreturn 8",
        "class E:\n    __eq__ = lambda *a: True\nreturn E()",
        "class E(int):\n    __eq__ = lambda *a: True\n    __repr__ = lambda *a: '7'\n    __str__ = __repr__\nreturn E(8)",
        "class E(list):\n    __eq__ = lambda *a: True\nreturn E([8])",
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_locals.update(expected=8, output='8', status=0)\n"
        "    frame = frame.f_back\nreturn 8",
        "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.zip = lambda *a, **k: []\nreturn 8",
        "print('{\"correct\": true, \"status\": \"ok\"}')\nprint(7)\nreturn 8",
        "import os\nfor fd in range(99):\n    try:\n        os.write(fd, b'[\"ok\", \"7\"]\\n')\n    except OSError:\n"
        "        pass\nreturn 8",
    ],
)
def test_functions_cannot_cheat(graders, body):
    code = "class Solution:\n    def f(self, a):\n" + textwrap.indent(body, " " * 8)
    result = run(graders, code, [("1", "7")], "f")
    assert not result.correct and result.status in ("ok", "error")
    assert run(graders, "def f(a):\n    return 7", [("1", "7")], "f").correct


def test_wrong_in_a_later_test(graders):
    result = run(graders, "print(7)")
    assert not result.correct and "2 of 2" in result.detail


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, statuses",
    [
        ("while True:\n    pass", "timeout"),
        ("import time\nprint(7, flush=True)\ntime.sleep(99)", "timeout"),
        ("import os\nos.kill(os.getpid(), 19)\nimport signal\nsignal.pause()", "timeout ok"),
        ("import signal\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
         "    except OSError:\n        pass\nwhile True:\n    pass", "timeout"),
        ("import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()", "timeout"),
        ("while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass", "timeout"),
        ("10 ** 10 ** 10", "timeout ok"),
        ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", "timeout"),
        ("import os\nwhile True:\n    try:\n        if os.fork() == 0:\n            os.setsid()\n"
         "    except OSError:\n        pass", "timeout"),
        ("while True:\n    print('x' * 1000)", "ok timeout"),
        ("x = bytearray(8 << 30)\nprint(7)", "ok"),
        ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))", "ok timeout"),
        ("import threading\nwhile True:\n    threading.Thread(target=__import__('time').sleep, args=(99,)).start()",
         "ok timeout"),
        ("f = open('big', 'wb')\nf.truncate(1 << 40)\nprint(7)", "ok"),
        ("for i in range(10**6):\n    open(f'f{i}', 'wb').write(bytes(8 << 20))", "ok timeout"),
        ("import os\nfor i in range(5000):\n    os.mkdir('d')\n    os.chdir('d')\nos.abort()", "ok timeout"),
    ],
)
def test_limits(graders, code, statuses):
    run(graders, ADD)  # the worker and its sandbox are running
    started = time.monotonic()
    result = seven(graders, code, time_limit=1)
    assert time.monotonic() - started < 1 + 2
    assert not result.correct and result.status in statuses.split()
    assert run(graders, ADD).correct


def test_cpu_heavy_neighbours_do_not_fail_each_other(graders):
    question = row(CASES)
    bad, good = ["```\nwhile True: pass\n```", f"```\n{ADD}\n```"]
    futures = [graders.submit("code", r, question, time_limit=2) for r in [bad, good] * 4]
    assert [f.result().correct for f in futures] == [False, True] * 4


# ---- isolation ----------------------------------------------------------------------------------

# Each program prints 7 only if what it tries is refused.
REFUSED = {
    "signal the parent": "import os\nos.kill(os.getppid(), 9)",
    "signal everybody": "import os\nos.kill(-1, 9)",
    "signal process one": "import os\nos.kill(1, 9)",
    "an internet socket": "import socket\nsocket.socket()",
    "a unix socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "trace the parent": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0):\n    raise OSError",
    "limit the parent": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "shared memory that stays": "import ctypes\nif ctypes.CDLL(None).shmget(77, 99, 0o1666) < 0:\n    raise OSError",
    "become root": "import os\nos.setuid(0)",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None):\n    raise OSError",
}
NEEDS_LANDLOCK = {
    "read a file of the system": "open('/etc/passwd').read()",
    "list the root": "import os\nos.listdir('/')",
    "read the parent's command line": "import os\nopen(f'/proc/{os.getppid()}/cmdline').read()",
    "read the parent's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "write to /tmp": "open('/tmp/a3po-test-file', 'w').write('x')",
    "write to /dev/shm": "open('/dev/shm/a3po-test-file', 'w').write('x')",
    "run a program": "import subprocess\nsubprocess.run(['/bin/true'])",
}
PROBE = "try:\n{}\nexcept (OSError, ValueError, PermissionError):\n    print(7)\nelse:\n    print(8)"


@pytest.mark.parametrize("what", [*REFUSED, *NEEDS_LANDLOCK])
def test_refused(graders, what):
    if what in NEEDS_LANDLOCK and "landlock" in verify.protections().partition("MISSING")[2]:
        pytest.skip("no landlock")
    probe = PROBE.format(textwrap.indent((REFUSED | NEEDS_LANDLOCK)[what], "    "))
    result = seven(graders, probe)
    assert (result.correct, result.detail) == (True, "")
    assert run(graders, ADD).correct
    assert not Path("/tmp/a3po-test-file").exists()


# The pattern does not match itself: the program's own text is in its memory too.
SEARCH = """
import gc, os, re, sys
found = []
def look(text):
    if re.search("SECRE[T]EXPECTED", text): found.append(text[:99])
def read(path):
    try: look(open(path, errors="replace").read(100_000))
    except OSError: pass
look(repr(dict(os.environ)) + repr(sys.argv + sys.orig_argv))
frame = sys._getframe()
while frame:
    look(repr(list(frame.f_locals.items())) + repr(list(frame.f_globals)))
    frame = frame.f_back
for thing in gc.get_objects():
    try: look(repr(thing)[:10_000])
    except BaseException: pass
try: pids = [x for x in os.listdir("/proc") if x.isdigit()]
except OSError: pids = [os.getppid(), 1, "self"]
for pid in pids:
    for name in ("cmdline", "environ", "fd/0", "fd/3", "fd/4", "fd/5", "fd/6"):
        read(f"/proc/{pid}/{name}")
for fd in range(64):
    try: look(os.pread(fd, 100_000, 0).decode(errors="replace"))
    except OSError: pass
try:
    for line in open("/proc/self/maps"):
        a, b = (int(x, 16) for x in line.split()[0].split("-"))
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(a)
            if re.search(b"SECRE[T]EXPECTED", memory.read(b - a)): found.append("memory")
except OSError: pass
"""


def test_expected_output_is_not_in_reach(graders):
    cases = [("1", "7"), ("2", "7"), ("3", "SECRETEXPECTED")]
    result = run(graders, SEARCH + "print(found or 7)", cases)
    assert result.detail == "test 3 of 3: wrong output"  # so 1 and 2 found nothing
    cases = [("1", "7"), ("2", '"SECRETEXPECTED"')]
    code = "def f(a):\n" + textwrap.indent(SEARCH + "return found or 7", "    ")
    assert run(graders, code, cases, "f").detail == "test 2 of 2: wrong output"
    # The search itself works: the input is there to be found.
    assert run(graders, SEARCH + "print(7 if found else 8)", [("SECRETEXPECTED", "7")]).correct


def test_one_test_leaves_nothing_for_the_next(graders):
    code = """
    import builtins, json, os, sys, math
    clean = not os.listdir(".") and not hasattr(builtins, "mark") and not hasattr(math, "mark")
    clean = clean and not any("mark" in x for x in (*os.environ, *sys.modules))
    open("mark", "w").write("x"); os.mkdir("mark2"); os.chmod("mark2", 0)
    os.environ["mark"] = builtins.mark = math.mark = "x"; sys.modules["mark"] = sys
    json.loads = builtins.print = None
    sys.stdout.write("7" if clean else "8")
    """
    assert run(graders, code, [("", "7")] * 6).correct
    assert run(graders, code, [("", "7")] * 6).correct


def leftovers():
    found = [*Path("/tmp").glob("a3po-*"), *Path("/dev/shm").glob("a3po-*")]
    return [path for path in found if not belongs_to_another_run(path)]


def belongs_to_another_run(path):
    """Whether a living process with a living parent made a3po-PID-...: an orphan is ours."""
    pid = (path.name.split("-") + [""])[1]
    try:
        return Path("/proc", pid or "x", "stat").read_text().rpartition(")")[2].split()[1] != "1"
    except OSError:
        return False


# Run in a process of its own, to deny it unshare, landlock or root.
SCENARIO = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import verify
from shelf import sandbox
deny, uid = json.loads(sys.argv[2])
if deny:
    calls = {"unshare": (272, 97), "landlock": (444, 444)}
    assert sandbox.apply_seccomp(sandbox.seccomp_filter([calls[x] for x in deny]))
if uid is not None:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
print(verify.protections())
with verify.Graders(workers=2, timeout=10) as graders:
    items = json.load(sys.stdin)
    print(json.dumps([graders.submit("code", *i[:2], **i[2]).result().__dict__ for i in items]))
"""
BOMB = "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: pass"
DAEMON = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(77)\n    os._exit(0)\n"
MESS = """import os
for i in range(1500):  # deeper than Python's recursion limit; a private tmpfs is full before that
    try:
        os.mkdir('d')
        os.chdir('d')
    except OSError:
        break
try:
    os.chmod('.', 0)
except PermissionError:  # as an ordinary user, where it could be any file's
    pass
print(7)"""


def system_python():
    """A Python that an ordinary user may run, and the path to math-verify."""
    for python in (sys.executable, "/usr/bin/python3"):
        check = "import os, sys; os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
        code = "import sys; assert sys.version_info >= (3, 11); import math_verify, verify"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search_path()))}
        command = [sys.executable, "-c", check, python, "-c", code]
        if subprocess.run(command, env=env, capture_output=True).returncode == 0:
            return python
    pytest.skip("an ordinary user cannot run Python with math-verify here")


def search_path():
    import math_verify

    return [str(Path(verify.__file__).parent), str(Path(math_verify.__file__).parent.parent)]


@pytest.mark.parametrize("ordinary", [False, True], ids=["as-is", "ordinary-user"])
@pytest.mark.parametrize("deny", [[], ["unshare"], ["unshare", "landlock"]], ids="-".join)
def test_every_mode(ordinary, deny):
    if ordinary and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    python, uid = (system_python(), 65534) if ordinary else (sys.executable, None)
    path = search_path()
    seven_row, sum_row = row([("x", "7")]), row(CASES)
    late = ["while True: pass", BOMB]
    codes = [ADD, DAEMON + ADD, *late, ADD, MESS, ADD]
    codes += [PROBE.format(textwrap.indent(code, "    ")) for code in REFUSED.values()]
    codes += [PROBE.format("    import os\n    os.chmod('.', 0o700)")]
    items = []
    for code in codes:
        limit = {"time_limit": 1 if code in late else 10}  # not a test of speed
        items.append([f"```\n{code}\n```", sum_row if ADD in code else seven_row, limit])
    done = subprocess.run(
        [python, "-c", SCENARIO, json.dumps(path), json.dumps([deny, uid])], text=True,
        input=json.dumps(items), capture_output=True, timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    protections, verdicts = done.stdout.splitlines()
    missing = protections.partition("MISSING: ")[2]
    assert ("namespaces" in missing) >= ("unshare" in deny)
    assert ("landlock" in missing) >= ("landlock" in deny)
    correct = [v["correct"] for v in json.loads(verdicts)]
    expected = [True, True, False, False, True, True, True] + [True] * len(REFUSED)
    expected += [ordinary or os.geteuid() != 0]  # no chmod where it could be any file's
    bad = [(c, v) for c, e, v in zip(codes, expected, json.loads(verdicts), strict=True) if v["correct"] != e]
    assert correct == expected, bad
    assert leftovers() == []


def family(pid):
    """Process ids of a process and of all its descendants."""
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for parent in new for child in children(parent)}
    return found


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_nothing_left(graders):
    before = children()
    with verify.Graders(workers=2, timeout=10) as pool:
        for code in (BOMB, DAEMON + ADD, MESS):
            run(pool, code, time_limit=1)
        pids = set().union(*map(family, children() - before))
        assert len(pids) >= 3  # a worker, its sandbox and the process that forks
    assert wait_until(lambda: not alive(pids))
    assert leftovers() == []


def test_workers_die_with_a_killed_parent():
    code = (
        "import sys, time\n"
        f"sys.path[:0] = {search_path()!r}\n"
        "import verify\n"
        "g = verify.Graders(workers=1)\n"
        "q = {'public_test_cases': [{'input': '', 'output': '7', 'testtype': 'stdin'}]}\n"
        "f = g.submit('code', '```\\nprint(7)\\n```', q)\n"
        "assert f.result().correct\n"
        "print('idle', flush=True)\n"
        "g.submit('code', '```\\nwhile True: pass\\n```', q, time_limit=60)\n"
        "time.sleep(99)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "idle\n"
    assert wait_until(lambda: len(family(parent.pid)) == 5)  # it, worker, sandbox (2), program
    pids = family(parent.pid)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not alive(pids)), alive(pids)


# ---- tests as published -------------------------------------------------------------------------


def encode(data):
    return base64.b64encode(zlib.compress(pickle.dumps(data))).decode()


def test_private_tests(graders):
    hidden = json.dumps([{"input": "1 1\n", "output": "2\n", "testtype": "stdin"}])
    assert run(graders, ADD, private=encode(hidden)).correct
    assert run(graders, ADD, [], private=encode(hidden)).correct
    assert run(graders, ADD, private=hidden).correct
    wrong = run(graders, "a, b = map(int, input().split())\nprint(a + b if a > 1 else 0)", private=encode(hidden))
    assert not wrong.correct and "3 of 3" in wrong.detail


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/a3po-evil",))


def raw(data):
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "private",
    [
        encode(Evil()), encode([Evil()]), "garbage!", "AAAA", encode("not json"), encode(7), encode([1]),
        encode("[1]"), encode('[{"input": "1"}]'), encode('[{"input": 1, "output": "2"}]'), encode("{}"),
        encode('[{"input": "1", "output": "2", "testtype": "odd"}]'), encode('[{"input": null, "output": "2"}]'),
        encode('[{"input": "1", "output": "2", "testtype": "functional"}]'), raw(b"\x80\x04."), raw(b"cos\nsystem\n."),
        raw(b"\x80\x02]q\xff\xff\xff\x7f."), raw(b"(" * 1_000_000 + b"."), raw(bytes(300 << 20)), encode("[" * 100_000),
        raw(pickle.dumps("[]"))[:-8],
    ],
    ids=range(21),
)
def test_unusable_private_tests(graders, private):
    result = run(graders, ADD, private=private)
    assert (result.correct, result.status) == (False, "bad_reference")
    assert not Path("/tmp/a3po-evil").exists()
    assert run(graders, ADD).correct


@pytest.mark.parametrize(
    "question",
    [{}, row([]), {"public_test_cases": None}, {"public_test_cases": "x"}, {"public_test_cases": 5},
     {"public_test_cases": "{}"}, {"public_test_cases": [7]}, row([("1", "x")], "f"), row([("x", "1")], "f"),
     row(CASES) | {"metadata": "x"}, row(CASES) | {"metadata": "[]"}, row(CASES) | {"metadata": 5}],
)
def test_unusable_rows(graders, question):
    for code in (ADD, "print(7)", "def f(x):\n    return x"):
        result = graders.submit("code", f"```\n{code}\n```", question).result()
        assert (result.correct, result.status) == (False, "bad_reference")
