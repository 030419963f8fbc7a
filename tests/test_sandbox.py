"""The sandbox by itself: a file to copy, a command line, and nothing left behind it."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shelf import sandbox
from shelf.sandbox import Sandbox

ADD = "a, b = map(int, input().split())\nprint(a + b)"
BURN = "import time\nwhile time.process_time() < 0.5:\n    pass\nprint(7)"


def children(pid="self"):
    """Process ids of the children of all threads of a process."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= {int(child) for child in path.read_text().split()}
        except OSError:  # the thread has ended
            pass
    return found


def processes(text):
    """Command lines of all processes that contain text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [line] if text in line else []
    return found


def wait_until(condition, seconds=10):
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


@pytest.fixture(scope="module")
def box():
    with Sandbox() as box:
        yield box


@pytest.fixture
def alone(tmp_path):
    """A copy of the file in an empty folder."""
    (tmp_path / "sandbox.py").write_bytes(Path(sandbox.__file__).read_bytes())
    return tmp_path


# ---- one run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, stdin, function, reply",
    [
        (ADD, "3 4\n", None, ("ok", "7\n")),
        ("print('é', input(), end='')", "ü", None, ("ok", "é ü")),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", "", None, ("ok", "\udcff")),
        ("def f(a, b): return [a, b]", '1\n\n"x"\n', "f", ("ok", '[1, "x"]')),
        ("class Solution:\n    def f(self): return None", "", "f", ("ok", "null")),
        ("exit(3)", "", None, ("failed", "exit status 3")),
        ("import ctypes; ctypes.string_at(0)", "", None, ("failed", "exit status -11")),
        ("def f(): return {1}", "", "f", ("failed", "exit status 1")),
        ("while True: pass", "", None, ("timeout", "over 0.5 s")),
        ("import time; time.sleep(99)", "", None, ("timeout", "over 0.5 s")),
    ],
)
def test_replies(box, code, stdin, function, reply):
    time_limit = 0.5 if reply[0] == "timeout" else 10
    assert box.run(code, stdin, function, time_limit) == reply
    assert box.run(ADD, "1 2") == ("ok", "3\n")


def test_protections_are_all_that_the_machine_allows(box):
    root = os.geteuid() == 0
    flags = 0x68020000 if root else 0x78020000  # pid, net, ipc, mount; user
    code = f"import ctypes; exit(ctypes.CDLL(None).unshare({flags}) != 0)"
    allowed = {
        "resource limits": True,
        "a user id of its own": root,
        "own pid": subprocess.run([sys.executable, "-c", code]).returncode == 0,
        "landlock": ctypes.CDLL(None).syscall(444, None, 0, 1) > 0,
        "seccomp": os.uname().machine in ("x86_64", "aarch64"),
    }
    active, _, missing = box.protections.partition("; MISSING: ")
    assert {name: name in active for name in allowed} == allowed
    assert {name: name not in missing for name in allowed} == allowed


@pytest.mark.parametrize(
    "active, contained",
    [
        ("a user id of its own; landlock; seccomp", True),
        ("a user id of its own", True),
        ("landlock; seccomp", True),
        ("landlock", False),  # which leaves a file's mode, owner and times open
        ("own pid, network, ipc and mount namespaces; seccomp", False),
        ("resource limits", False),
        ("does not work here: the sandbox could not be locked", False),
    ],
)
def test_contained(monkeypatch, active, contained):
    missing = "MISSING: a user id of its own, landlock, seccomp"
    monkeypatch.setattr(Sandbox, "protections", f"{active}; {missing}")
    assert Sandbox().contained == contained


def test_a_closed_sandbox_starts_again():
    with Sandbox() as box:
        assert box.run("print(7)") == ("ok", "7\n")
        box.close()
        assert box.run("print(8)") == ("ok", "8\n")


def test_an_interrupted_run_does_not_answer_for_the_next(box):
    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        box.run("pass")  # it is running
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            box.run("import time; time.sleep(0.6); print('late')")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert box.run("print('next')") == ("ok", "next\n")


def test_cpu_time_of_programs_is_handed_up():
    before = sum(os.times()[2:4])  # of children
    with Sandbox() as box:
        assert box.run(BURN) == ("ok", "7\n")
    assert sum(os.times()[2:4]) - before > 0.5


# ---- the file by itself -------------------------------------------------------------------------


def test_a_copy_works_in_another_project(alone):
    code = (
        f"import sys\nsys.path.insert(0, {str(alone)!r})\n"
        "from sandbox import Sandbox\n"
        "with Sandbox() as box:\n"
        f"    print(box.run({ADD!r}, '3 4'), box.run('exit(2)'))\n"
        "others = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(sorted(others))\n"
    )
    command = [sys.executable, "-I", "-S", "-B", "-c", code]
    done = subprocess.run(command, cwd=alone, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "('ok', '7\\n') ('failed', 'exit status 2')\n['__main__', 'sandbox']\n"
    assert [path.name for path in alone.iterdir()] == ["sandbox.py"]


def command_line(folder, *args, stdin=b""):
    return subprocess.run(
        [sys.executable, "-I", "-B", "sandbox.py", *args], cwd=folder, env={}, input=stdin,
        capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "program, options, stdin, output, reason",
    [
        (ADD, [], b"3 4\n", b"7\n", ""),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\n')", [], b"", b"\xff\n", ""),
        ("def f(a, b): return a + b", ["--function", "f"], b"[1]\n[2]\n", b"[1, 2]", ""),
        ("print(7)\nexit(3)", [], b"", b"", "failed: exit status 3"),
        ("print(7)", ["--function", "f"], b"", b"", "failed: exit status 1"),
        ("while True: pass", ["--time_limit", "0.5"], b"", b"", "timeout: over 0.5 s"),
        ("print(7)", [], b"\xff", b"", "cannot be read"),
    ],
)
def test_command_line(alone, program, options, stdin, output, reason):
    (alone / "program.py").write_text(program)
    done = command_line(alone, "program.py", *options, stdin=stdin)
    lines = done.stderr.decode().splitlines()
    assert done.stdout == output and bool(done.returncode) == bool(reason)
    assert len(lines) == bool(reason) and reason in "".join(lines)


def test_command_line_errors(alone):
    missing = command_line(alone, "none.py")
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1
    for args in ([], ["x.py", "--protections"], ["x.py", "--time_limit", "0"], ["x.py", "--odd"]):
        assert command_line(alone, *args).returncode == 2


def test_command_line_names_the_protections(alone):
    done = command_line(alone, "--protections")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"resource limits" in done.stdout and done.stdout.count(b"\n") == 1


# ---- what a sandbox leaves behind that hangs, dies or loses its caller ---------------------------

# A process that outlives its parent, and a file in the folder of the program.
DAEMON = (
    "import os, time\nopen('file', 'w').write('x')\n"
    "if os.fork() == 0:\n    os.setsid()\ntime.sleep(77)\n"
)
# Run in a process of its own, to deny it namespaces: within them the kernel does our work.
CALLER = f"""
import os, sys, time
sys.path.insert(0, sys.argv[1])
import sandbox
if "deny" in sys.argv:
    sandbox.apply_seccomp(sandbox.seccomp_filter([(272, 97)]))  # unshare
box = sandbox.Sandbox()
first = box.run("print(7)")
other = os.fork()  # a child of the caller's own, with copies of its open pipes
if other == 0:
    time.sleep(77)
    os._exit(0)
print(first, other, flush=True)
print(box.run({DAEMON!r}, time_limit=60), flush=True)
print(box.run("print(7)"), os.waitpid(other, os.WNOHANG)[0], flush=True)
os.kill(other, 9)
box.close()
"""


@pytest.mark.parametrize(
    "dies, deny",
    [("server", []), ("server", ["deny"]), ("keeper", []), ("caller", []), ("caller", ["deny"])],
)
def test_nothing_outlives_it(alone, dies, deny):
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(alone), *deny], stdout=subprocess.PIPE, text=True
    )
    first, other = re.fullmatch(r"(\(.*\)) (\d+)\n", caller.stdout.readline()).groups()
    assert first == "('ok', '7\\n')"
    (keeper,) = children(caller.pid) - {int(other)}
    (server,) = children(keeper)
    assert wait_until(lambda: len(processes(f"{alone}/sandbox.py")) == 4)  # the daemon sleeps
    folders = list(Path(tempfile.gettempdir()).glob(f"a3po-{keeper}-*"))
    assert len(folders) == 1 or not deny  # with namespaces it may be in a tmpfs
    os.kill({"server": server, "keeper": keeper, "caller": caller.pid}[dies], signal.SIGKILL)
    if dies != "caller":
        assert caller.stdout.readline() == "('error', 'sandbox: it died')\n"
        assert caller.stdout.readline() == "('ok', '7\\n') 0\n"  # another; its own child lives
    caller.wait(10)
    assert wait_until(lambda: not processes(f"{alone}/sandbox.py"))
    if dies == "caller":
        os.kill(int(other), signal.SIGKILL)
    assert not any(map(os.path.exists, folders))


def test_close_ends_a_stopped_server():
    before = children()
    box = Sandbox()
    assert box.run("print(7)") == ("ok", "7\n")
    (keeper,) = children() - before
    (server,) = children(keeper)
    os.kill(server, signal.SIGSTOP)
    started = time.monotonic()
    box.close()
    assert time.monotonic() - started < 2
    assert not Path(f"/proc/{keeper}").exists() and not Path(f"/proc/{server}").exists()


def test_removing_takes_no_longer_than_it_may(tmp_path, monkeypatch):
    slow = tmp_path / "rm"
    slow.write_text("#!/bin/sh\nexec sleep 9\n")
    slow.chmod(0o755)
    (tmp_path / "folder" / "closed").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    sandbox._remove_tree(str(tmp_path / "link"))
    assert (tmp_path / "folder" / "closed").exists() and not (tmp_path / "link").exists()
    before, path = children(), os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    started = time.monotonic()
    sandbox._remove_tree(str(tmp_path / "folder"), 0.2)
    assert time.monotonic() - started < 5 and (tmp_path / "folder").exists()
    assert children() == before
    monkeypatch.setenv("PATH", path)
    (tmp_path / "folder" / "closed").chmod(0)
    sandbox._remove_tree(str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


FOLDERS = "import os\ni = 0\nwhile True:\n    os.mkdir(str(i))\n    i += 1"


@pytest.mark.slow
def test_folders_without_end_are_a_timeout(alone):
    code = (
        f"import sys\nsys.path.insert(0, {str(alone)!r})\nimport sandbox\n"
        "sandbox.apply_seccomp(sandbox.seccomp_filter([(272, 97)]))  # unshare\n"
        f"with sandbox.Sandbox() as box:\n    print(box.run({FOLDERS!r}, time_limit=6))\n"
        "    sys.stdout.flush()\n    sys.stdin.readline()\n    print(box.run('print(7)'))\n"
    )
    env = os.environ | {"TMPDIR": str(alone)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as caller:
        assert caller.stdout.readline() == "('timeout', 'over 6 s')\n"
        assert not processes(f"rm -rf {alone}")
        assert caller.communicate("\n")[0] == "('ok', '7\\n')\n"
    assert wait_until(lambda: not list(alone.glob("a3po-*")), 300)  # disks differ


# ---- system calls -------------------------------------------------------------------------------

CALLS = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
import sandbox
libc = ctypes.CDLL(None)
group = os.getsid(0)
checked = [((203, 122), 0, 0xFFFFFFFF, [0])]  # sched_setaffinity: of itself
filter = sandbox.seccomp_filter(denied=[(83, 34)], ignored=[(112, 157)], checked=checked)
print(sandbox.apply_seccomp(b""), sandbox.apply_seccomp(filter))
numbers = {"x86_64": (83, 112, 203), "aarch64": (34, 157, 122)}[os.uname().machine]
mkdir = lambda: libc.syscall(numbers[0], *((-100,) if numbers[0] == 34 else ()), b"folder", 0o700)
mask = (ctypes.c_uint64 * 16)()
libc.sched_getaffinity(0, ctypes.sizeof(mask), mask)
affinity = [libc.syscall(numbers[2], pid, ctypes.sizeof(mask), mask) for pid in (0, os.getppid())]
print(mkdir(), libc.syscall(numbers[1]), os.getsid(0) == group, affinity)
"""


def test_seccomp_filter(tmp_path):
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("no filter for this architecture")
    folder = str(Path(sandbox.__file__).parent)
    command = [sys.executable, "-c", CALLS, folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False True\n-1 0 True [0, -1]\n", done.stderr
    assert not (tmp_path / "folder").exists()
