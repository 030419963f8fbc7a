r"""Run one untrusted Python program on one input, for rewards and benchmarks of generated code.
Needs Linux 5.3 or later and the standard library alone: copy this file into any project.

    from sandbox import Sandbox
    with Sandbox() as sandbox:
        status, output = sandbox.run("print(int(input()) + 1)", "41", time_limit=2)  # "ok", "42\n"

    python sandbox.py PROGRAM.py [--function NAME] [--time_limit S] < input
    python sandbox.py --protections

A warm process forks a child for each run, one at a time; the child knows the code and the input.
Expected outputs stay with the caller, who compares, so printing, patching `json` or `__eq__`,
walking frames or writing to descriptors cannot produce a pass. Programs run as real processes:
`sys.stdin.buffer`, iterating stdin and `open(0)` work. Only the standard library is there.

What protects; `Sandbox().protections` is a line that names what is active and what is MISSING:
- Always: limits on time, memory (2 GiB per process), output and file size (8 MB), processes and
  descriptors; a fresh folder, a scrubbed environment, all processes killed after each run.
- x86-64, arm64: seccomp denies sockets, signals to others, ptrace and lasting IPC.
- Linux 5.13+: Landlock leaves only the standard library and the program's own folder.
- As root: a user id of its own, without capabilities.
- Where `unshare` works: own pid, network, ipc and mount namespaces, a 64 MB private tmpfs.

What it does *not*: protect against kernel bugs or timing side channels, or limit the total memory
of several processes (they are first in line for the OOM killer). Without Landlock, files that the
user may read, data sets included, can be read; an ordinary user's can be changed too. Without
namespaces, the total size of files on disk is not limited. Use a container or VM for hostile code.
"""

import argparse
import atexit
import ctypes
import gc
import json
import os
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
MEMORY_LIMIT = 2 << 30  # bytes of address space for each process of a program
MAX_OUTPUT = 8 << 20  # bytes that a program may write, to its output or to any file
LIBRARY = os.path.dirname(os.path.realpath(os.__file__))
LIBRARY_FD = 63  # of the server and the programs, open at LIBRARY
SHM = next(filter(os.path.isdir, ("/dev/shm", "/tmp")))  # where the private tmpfs is mounted
LOCK_FAILED = 117  # exit status of a child that could not be locked down


# ---- the caller's side --------------------------------------------------------------------------


class Child(subprocess.Popen):
    """A command that answers a line of JSON with a line of JSON, after a first line of greeting.
    Raises TimeoutError if it is late (times are seconds), EOFError or BrokenPipeError if dead."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        super().__init__(command, env=env, start_new_session=True, **pipes)
        self._answers = select.poll()
        self._answers.register(self.stdout, select.POLLIN)
        self.greeting = self._read(60)  # the start is not on the first task's clock

    def ask(self, task: Any, seconds: float) -> Any:
        """Send a task and return the answer to it."""
        self.stdin.write(json.dumps(task).encode() + b"\n")
        self.stdin.flush()
        return self._read(seconds)

    def _read(self, seconds: float) -> Any:
        """Return the next line's JSON; an empty line is a sign of life and restarts the clock."""
        data = bytearray()
        while not data.endswith(b"\n"):
            if not self._answers.poll(seconds * 1000):
                raise TimeoutError(f"no answer for {seconds:g} s")
            chunk = os.read(self.stdout.fileno(), 1 << 20)
            if not chunk:
                raise EOFError("it died")
            data += chunk if data else chunk.lstrip(b"\n")
        return json.loads(data)

    def close(self, patience: float = 0) -> None:
        """End it: it may leave by itself for `patience` seconds, then it is killed."""
        with suppress(OSError):  # an unwritten rest of a task
            self.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.wait(patience)
        self.kill()
        self.wait()
        self.stdout.close()


class Sandbox(AbstractContextManager):
    """Runs programs one at a time in a process that is started when first needed, and replaced
    when it hangs or dies. Use one per thread."""

    _child: Child | None = None

    def run(
        self, code: str, stdin: str = "", function: str | None = None, time_limit: float = 6.0
    ) -> tuple[str, str]:
        """Return ("ok", what the program printed), else ("timeout", "failed" by its exit status
        or "error" of the sandbox; why). time_limit: seconds of wall time. function: call it, by
        itself or of a class Solution, with JSON arguments, one a line; its result is JSON too."""
        try:
            task = (code, stdin, function, time_limit)
            return tuple(self._server().ask(task, time_limit + 10))  # 10: a starved machine
        except BaseException as why:
            self.close()  # an answer still to come would be taken for the next program's
            if isinstance(why, TimeoutError | EOFError | BrokenPipeError):
                return "error", f"sandbox: {why}"
            raise

    @property
    def protections(self) -> str:
        """Return one line that says which protections a program runs with on this machine."""
        return self._server().greeting

    def close(self) -> None:
        """End the process and all that its programs left; the next run starts another."""
        child, self._child = self._child, None
        if child:
            child.close(patience=5)

    def _server(self) -> Child:
        if self._child is None:
            me = os.path.abspath(__file__)
            env = {"TMPDIR": tempfile.gettempdir(), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
            self._child = Child([sys.executable, "-I", "-S", "-X", "utf8", me, "--serve"], env)
        return self._child

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- locks: rights that a process gives up, for itself and for its children ---------------------

# Denied system calls, (x86-64, arm64): reaching other processes, the network, lasting objects.
_DENIED = {
    "socket": (41, 198), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "io_uring_setup": (425, 425), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "add_key": (248, 217), "keyctl": (250, 219),
    "sched_setscheduler": (144, 119), "setpriority": (141, 140),
}  # fmt: skip
_IGNORED = {"setsid": (112, 157), "setpgid": (109, 154)}  # answered 0: stay in the group we kill
_ONLY_SELF = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}  # first argument 0
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def seccomp_filter(denied: Iterable, ignored: Iterable = (), only_self: Iterable = ()) -> bytes:
    """Return a BPF program that refuses denied calls (pairs of numbers: x86-64, arm64), answers 0
    to ignored ones, refuses the last unless their first argument is 0; b"" on other machines."""
    column, arch = _ARCH.get(os.uname().machine, (None, 0))
    if column is None:
        return b""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, JEQ, JGE, RET
    deny, allow = (answer, 0, 0, 0x00050001), (answer, 0, 0, 0x7FFF0000)
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), deny, (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), deny]  # the x32 twins of all calls
    for calls, reply in ((denied, deny), (ignored, (answer, 0, 0, 0x00050000))):
        for call in calls:
            program += [(equal, 0, 1, call[column]), reply]
    for call in only_self:
        program += [(equal, 0, 4, call[column]), (load, 0, 0, 16), (equal, 0, 1, 0), allow, deny]
    return b"".join(struct.pack("HBBI", *step) for step in [*program, allow])


def apply_seccomp(program: bytes) -> bool:
    """Put a filter in force for this process, for good; False if it is empty or refused."""
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return bool(program) and libc.prctl(22, 2, header) == 0  # PR_SET_SECCOMP


def _landlock(writable: str) -> bool:
    """Leave this process the standard library to read and `writable` to write in, no other file,
    and no TCP or signal to the outside where the kernel can (5.13, 6.7, 6.12)."""
    abi = libc.syscall(444, None, 0, 1)  # -1 without Landlock, where all that follows fails too
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    handled = struct.pack("QQQ", files, 3 * (abi >= 4), 3 * (abi >= 6))
    rules = libc.syscall(444, handled, len(handled), 0)
    read, write, read_dir = 1 << 2, 1 << 1, 1 << 3
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"/proc/self/fd/{LIBRARY_FD}"]
    grants = dict.fromkeys(folders, read | read_dir) | {writable: files & ~1}  # 1: execute
    grants |= {"/dev/null": read | write, "/dev/urandom": read, "/etc/ld.so.cache": read}
    for path in filter(os.path.exists, grants):
        beneath = os.open(path, os.O_PATH)
        libc.syscall(445, rules, 1, struct.pack("=Qi", grants[path], beneath), 0)
        os.close(beneath)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return rules >= 0 and libc.syscall(446, rules, 0) == 0


def _unshare() -> bool:
    """Enter new network, ipc and mount namespaces, as an ordinary user inside a new user
    namespace; the next child is the first of a pid namespace. False where not permitted."""
    root, uid, gid = os.geteuid() == 0, os.getuid(), os.getgid()
    flags = 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000  # NEWPID NEWNET NEWIPC NEWNS
    if libc.unshare(flags if root else flags | 0x10000000):  # NEWUSER
        return False
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    return True


def set_limit(name: str, value: int) -> None:
    """Lower a resource limit for good; one that is lower already stays."""
    which = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def die_with_parent() -> None:
    """SIGKILL us when the parent dies, however it dies; hide our memory from our own user."""
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    libc.prctl(4, 0)  # PR_SET_DUMPABLE: no /proc/<pid>/mem, no ptrace


def _threads_of(uid: int) -> int:
    """Return how many threads this user runs: NPROC counts them all."""
    total = 0
    for threads in Path("/proc").glob("[0-9]*/task"):
        with suppress(OSError):  # it has ended
            if threads.stat().st_uid == uid:
                total += threads.stat().st_nlink - 2
    return total


# ---- the server ---------------------------------------------------------------------------------

# What LiveCodeBench's harness imports by star ahead of every program, and what else programs like
# to import: once here, not once per run.
_STAR = ("string re datetime collections heapq bisect copy math random statistics itertools "
         "functools operator io sys json builtins typing").split()  # fmt: skip
_IMPORTED = ("array ast calendar cmath collections.abc concurrent.futures dataclasses graphlib "
             "hashlib inspect locale pprint queue secrets textwrap timeit traceback unicodedata"
             ).split()  # fmt: skip


class _Server:
    """The pristine process that forks one locked-down child per run. Where the system allows it
    is the first process of its own namespaces, and nothing outlives it."""

    def __init__(self, keeper: int, namespaces: bool):
        self.keeper, self.namespaces = keeper, namespaces
        self.filter = seccomp_filter(_DENIED.values(), _IGNORED.values(), _ONLY_SELF.values())
        self.root, self.uid = os.geteuid() == 0, 20000 + keeper % 40000
        self.max_processes = 32 + (0 if self.root else _threads_of(os.getuid()))
        with suppress(OSError):  # if the machine runs out of memory, we and the programs go first
            Path("/proc/self/oom_score_adj").write_text("1000")
        libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: a program's orphans become our children
        die_with_parent()
        # An installation below /root is closed to another uid; a descriptor is a way in.
        os.dup2(os.open(LIBRARY, os.O_PATH), LIBRARY_FD)
        inside = [x.removeprefix(LIBRARY) for x in sys.path if x.startswith(LIBRARY)]
        sys.path += [f"/proc/self/fd/{LIBRARY_FD}{x}" for x in inside]
        self.tmpfs = namespaces and _mount_tmpfs()
        sys.argv = ["solution.py"]
        self.module = types.ModuleType("__main__")  # every program starts with a copy of it
        stars = "".join(f"from {name} import *\n" for name in _STAR)
        exec(f"{stars}import {', '.join(_STAR)}", vars(self.module))
        exec(f"import {', '.join(_IMPORTED)}", {})
        gc.freeze()  # the children share these pages

    def serve(self) -> None:
        """Answer [code, input, function, time_limit] lines with [status, output] lines."""
        status, self.report = self.run(None, "", None, 50)  # a dry run, to see what is in force
        greeting = self.report if status == "ok" else f"does not work here: {self.report}"
        print(json.dumps(greeting), flush=True)
        for line in sys.stdin:
            print(json.dumps(self.run(*json.loads(line))), flush=True)

    def run(self, code: str | None, text: str, func: str | None, limit: float) -> tuple[str, str]:
        """Run one program on one input; return what Sandbox.run does."""
        folder = tempfile.mkdtemp(prefix=f"a3po-{self.keeper}-", dir=SHM if self.tmpfs else None)
        try:
            if self.root:
                os.chown(folder, self.uid, self.uid)
            with open(os.memfd_create("input"), "w+b") as stdin, \
                    open(os.memfd_create("output"), "rb") as output:  # fmt: skip
                stdin.write(text.encode("utf-8", "surrogatepass"))
                stdin.seek(0)
                pid = os.fork()
                if pid == 0:
                    self._child(code, text, func, limit, folder, stdin.fileno(), output.fileno())
                pidfd = os.pidfd_open(pid)
                in_time = bool(select.select([pidfd], [], [], limit)[0])
                os.close(pidfd)
                status = _kill_children(pid, self.namespaces)
                if not in_time or status == -signal.SIGXCPU:
                    return "timeout", f"over {limit:g} s"
                if status == LOCK_FAILED:
                    return "error", "the sandbox could not be locked"
                if status != 0:
                    return "failed", f"exit status {status}"
                printed = os.pread(output.fileno(), MAX_OUTPUT, 0)
                return "ok", printed.decode("utf-8", "surrogateescape")
        except OSError as why:
            _kill_children(0, self.namespaces)
            return "error", f"sandbox: {why}"
        finally:
            self._clean(folder)

    def _clean(self, folder: str) -> None:
        """Remove what a program left on disk; with a tmpfs also outside of its folder."""
        with suppress(OSError):  # it is not empty
            os.rmdir(folder)
        if self.tmpfs and os.listdir(SHM):
            libc.umount2(SHM.encode(), 2)  # MNT_DETACH
            self.tmpfs = _mount_tmpfs()
        elif os.path.exists(folder):
            _remove_tree(folder)

    def _child(self, code, text, func, limit, folder, stdin, output) -> None:
        """In the fork: lock down, run the program, exit. Never returns."""
        status, leave = LOCK_FAILED, os._exit  # before a program may replace it
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for target, source in enumerate((stdin, null if func else output, null, output)):
                os.dup2(source, target)
            os.closerange(4, LIBRARY_FD)
            os.environ.update(HOME=folder, TMPDIR=folder)
            report = self._lock_down(folder, limit)
            if code is None:
                os.write(1, report.encode())
                status = 0
            elif report == self.report:
                status = 1  # of a program that manages to break out of _execute
                status = _execute(code, text, func, self.module)
        finally:
            leave(status)

    def _lock_down(self, folder: str, limit: float) -> str:
        """Give up every right that a program has no use for; return which of them are gone."""
        limits = {
            "AS": MEMORY_LIMIT, "CPU": int(limit) + 3, "FSIZE": MAX_OUTPUT, "NOFILE": 64,
            "CORE": 0, "NPROC": self.max_processes, "STACK": 128 << 20,
        }  # fmt: skip
        for name, value in limits.items():
            set_limit(name, value)
        os.nice(10)  # a program that forks must not starve the process that will kill it
        os.chdir(folder)
        landlock = _landlock(folder)
        if self.root:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capability left
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which a change of user id resets
        libc.prctl(4, 1)  # PR_SET_DUMPABLE, for /dev/stdin; the parent's memory stays closed
        active = {
            "a user id of its own": self.root,
            "resource limits": True,
            "own pid, network, ipc and mount namespaces": self.namespaces,
            "private tmpfs of 64 MB": self.tmpfs,
            "landlock (no files but its own)": landlock,
            "seccomp (no sockets, signals, ptrace)": apply_seccomp(self.filter),
        }
        missing = ", ".join(name for name, on in active.items() if not on)
        return "; ".join(filter(active.get, active)) + f"; MISSING: {missing or 'nothing'}"


def _mount_tmpfs() -> bool:
    """Cover SHM with an empty tmpfs that no other process sees; False where not permitted."""
    options = b"size=64m,nr_inodes=1k,mode=1777"
    return libc.mount(b"tmpfs", SHM.encode(), b"tmpfs", 6, options) == 0


def _remove_tree(folder: str) -> None:
    with suppress(OSError, RecursionError):  # closed to us, or nested too deeply for Python
        shutil.rmtree(folder)
    if os.path.exists(folder):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, folder])


def _kill_children(first: int, namespaced: bool) -> int:
    """Kill and reap all descendants; return the exit status of the child `first` (negative: the
    signal that killed it). Atomic, for a fork bomb outruns killing one by one: as first process of
    a namespace all but us, else whole groups (seccomp denies leaving the group)."""
    status = 0
    while True:
        with suppress(OSError):
            if namespaced:
                os.kill(-1, signal.SIGKILL)
            else:  # as subreaper we have inherited the orphans
                for child in map(int, Path("/proc/thread-self/children").read_text().split()):
                    group = os.getpgid(child)
                    os.kill(child if group == os.getpgid(0) else -group, signal.SIGKILL)
        try:
            done, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        status = os.waitstatus_to_exitcode(code) if done == first else status


def _execute(code: str, text: str, func: str | None, module: types.ModuleType) -> int:
    """Run the program the way `python solution.py` would, or call its function and write the
    result to descriptor 3; return the exit status."""
    dumps = json.dumps  # before the program may replace it
    sys.setrecursionlimit(50_000)
    module.__name__ = "solution" if func else "__main__"
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    scope, status = vars(module), 0
    known = len(scope)
    # The interpreter's own would not take "\r\n" for the end of a line.
    sys.stdin = sys.__stdin__ = scope["stdin"] = open(0, errors="surrogateescape", closefd=False)
    try:
        exec(compile(code, "solution.py", "exec"), scope)
        if func:
            solution = scope.get("Solution")
            call = getattr(solution(), func) if hasattr(solution, func) else scope[func]
            result = call(*[json.loads(line) for line in text.splitlines() if line.strip()])
            data = dumps(result).encode()
            os.ftruncate(3, 0)
            return int(os.pwrite(3, data, 0) != len(data))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        status = 1
    if func:
        return 1
    try:  # what the interpreter does at its end: threads, exit handlers, open files
        threading._shutdown()
        atexit._run_exitfuncs()
        while len(scope) > known:  # its own names only: touching all would copy the shared pages
            scope.popitem()
        gc.collect()
        for name in ("stdout", "__stdout__"):
            with suppress(AttributeError, ValueError):  # it is gone, closed or detached
                getattr(sys, name).flush()
    except BaseException:
        status = status or 120
    return status & 0xFF


def _serve() -> None:
    """Fork the server and outlive it: however it ends, or the caller does, or closes its pipe,
    kill and remove all that is left."""
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: without namespaces we inherit the server's orphans
    keeper, caller, namespaces = os.getpid(), os.pidfd_open(os.getppid()), _unshare()
    server = os.fork()
    if server == 0:
        _Server(keeper, namespaces).serve()
        os._exit(0)
    libc.prctl(4, 0)  # PR_SET_DUMPABLE
    ended = select.poll()
    ended.register(0, 0)  # no event but the end of the pipe
    ended.register(caller, select.POLLIN)
    ended.register(os.pidfd_open(server), select.POLLIN)
    ended.poll()
    _kill_children(server, False)
    for folder in Path(tempfile.gettempdir()).glob(f"a3po-{keeper}-*"):
        _remove_tree(folder)


# ---- command line -------------------------------------------------------------------------------


def main() -> None:
    """Run the program of the command line on standard input."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("program", nargs="?", help="a Python file")
    parser.add_argument("--function", help="call this one; arguments and result are JSON")
    parser.add_argument("--time_limit", type=float, default=6.0, help="seconds; default 6")
    parser.add_argument("--protections", action="store_true", help="name them, run nothing")
    args = parser.parse_args()
    if bool(args.program) == args.protections or not args.time_limit > 0:
        parser.error("expected a PROGRAM or --protections, and a positive --time_limit")
    with Sandbox() as sandbox:
        if args.protections:
            print(sandbox.protections)
            return
        try:
            code, text = Path(args.program).read_text("utf-8"), sys.stdin.buffer.read().decode()
        except (OSError, UnicodeDecodeError) as why:
            sys.exit(f"sandbox.py: {args.program} or its input cannot be read: {why}")
        status, output = sandbox.run(code, text, args.function, args.time_limit)
    if status != "ok":
        sys.exit(f"sandbox.py: {status}: {output}")
    sys.stdout.buffer.write(output.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    _serve() if sys.argv[1:] == ["--serve"] else main()
