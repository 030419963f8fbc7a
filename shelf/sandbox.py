r"""Run one untrusted Python program on one input, for rewards and benchmarks of generated code.
Needs Linux 5.3 or later and the standard library alone: copy this file into any project.

    from sandbox import Sandbox
    with Sandbox() as sandbox:
        status, output = sandbox.run("print(int(input()) + 1)", "41", time_limit=2)  # "ok", "42\n"

    python sandbox.py PROGRAM.py [--function NAME] [--time_limit S] < input
    python sandbox.py --protections

A warm process forks a child for each run, one at a time. Only the child reads the code and the
input, from descriptors that the warm process hands on unread: nothing of one run is in the memory
of the next. Expected outputs stay with the caller, who compares, so printing, patching `json` or
`__eq__`, walking frames or writing to descriptors cannot produce a pass. Programs run as real
processes: all ways to read stdin and to write stdout work. Only the standard library is there.

What protects; `Sandbox().protections` is a line that names what is active and what is MISSING:
- Always: limits on time, memory (2 GiB per process), output and file size (8 MB), processes and
  descriptors; a fresh folder, a scrubbed environment, all processes killed after each run.
- x86-64, arm64: seccomp allows the system calls that Python, threads and temporary files need; no
  sockets (so no asyncio), signals, other programs, or changes to a file's mode, owner or times.
- Linux 5.13+: Landlock leaves only the standard library and the program's own folder.
- As root: a user id of its own, without capabilities.
- Where `unshare` works: own pid, network, ipc and mount namespaces, a 64 MB private tmpfs.

What it does *not*: protect against kernel bugs or timing side channels, or limit the total memory
of several processes (they are first in line for the OOM killer). Without Landlock, what the user
may read, data sets and memory included, can be read; an ordinary user's files can be changed too:
`Sandbox().contained` is False. Without namespaces, the total size of files on disk is not limited.
Use a container or VM for hostile code.
"""

import argparse
import atexit
import builtins
import ctypes
import gc
import io
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import groupby
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

    def __init__(self, command: list[str], env: dict | None = None, stdin: Any = subprocess.PIPE):
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        super().__init__(command, env=env, start_new_session=True, **pipes)
        self._answers = select.poll()
        self._answers.register(self.stdout, select.POLLIN)
        self.greeting = self.answer(60)  # the start is not on the first task's clock

    def ask(self, task: Any, seconds: float) -> Any:
        """Send a task and return the answer to it."""
        self.stdin.write(json.dumps(task).encode() + b"\n")
        self.stdin.flush()
        return self.answer(seconds)

    def answer(self, seconds: float) -> Any:
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
        texts = stdin.encode("utf-8", "surrogatepass"), json.dumps([code, function]).encode(), b""
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(_memory_file(text)).fileno() for text in texts]
                server = self._server()
                socket.send_fds(server.stdin, [struct.pack("d", time_limit)], files)
                status, why = server.answer(time_limit + 10)  # 10: a starved machine
                return status, _printed(files[2]) if status == "ok" else why
        except BaseException as why:
            self.close()  # an answer still to come would be taken for the next program's
            if isinstance(why, TimeoutError | EOFError | BrokenPipeError):
                return "error", f"sandbox: {why}"
            raise

    @property
    def protections(self) -> str:
        """Return one line that says which protections a program runs with on this machine."""
        return self._server().greeting

    @property
    def contained(self) -> bool:
        """True unless a program could change files of the user, or none can be run."""
        active = self.protections.partition("MISSING")[0]
        return "user id" in active or ("landlock" in active and "seccomp" in active)

    def close(self) -> None:
        """End the process and all that its programs left; the next run starts another."""
        child, self._child = self._child, None
        if child:
            child.close(patience=5)

    def _server(self) -> Child:
        if self._child is None:
            me = os.path.abspath(__file__)
            env = {"TMPDIR": tempfile.gettempdir(), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-I", "-S", "-X", "utf8", me, "--serve"]
            with theirs:
                self._child = Child(command, env, theirs)
            self._child.stdin = ours
        return self._child

    def __exit__(self, *_: object) -> None:
        self.close()


def _memory_file(data: bytes) -> io.FileIO:
    """Return a file without a name, to be read from its start."""
    file = open(os.memfd_create("a3po"), "w+b", buffering=0)
    file.write(data)
    file.seek(0)
    return file


def _printed(file: int) -> str:
    return os.pread(file, MAX_OUTPUT, 0).decode("utf-8", "surrogateescape")


# ---- locks: rights that a process gives up, for itself and for its children ---------------------

# System calls that a program may make: name, number on x86-64, number on arm64 (-1: none).
_CALLS = """
read 0 63, write 1 64, open 2 -1, close 3 57, stat 4 -1, fstat 5 80, lstat 6 -1, poll 7 -1,
lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68, readv 19 65,
writev 20 66, access 21 -1, pipe 22 -1, select 23 -1, sched_yield 24 124, mremap 25 216,
msync 26 227, madvise 28 233, dup 32 23, dup2 33 -1, pause 34 -1, nanosleep 35 101,
getitimer 36 102, alarm 37 -1, setitimer 38 103, getpid 39 172, sendfile 40 71, fork 57 -1,
vfork 58 -1, exit 60 93, wait4 61 260, uname 63 160, flock 73 32, fsync 74 82, fdatasync 75 83,
ftruncate 77 46, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -1, mkdir 83 -1, rmdir 84 -1,
unlink 87 -1, readlink 89 -1, umask 95 166, gettimeofday 96 169, getrusage 98 165, sysinfo 99 179,
times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173,
getpgrp 111 -1, getpgid 121 155, getsid 124 156, getgroups 115 158, getresuid 118 148,
getresgid 120 150, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133,
sigaltstack 131 132, statfs 137 43, fstatfs 138 44, gettid 186 178, time 201 -1, futex 202 98,
sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128,
fadvise64 221 223, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
exit_group 231 94, waitid 247 95, openat 257 56, mkdirat 258 34, newfstatat 262 79,
unlinkat 263 35, renameat 264 38, readlinkat 267 78, faccessat 269 48, pselect6 270 72,
ppoll 271 73, set_robust_list 273 99, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70,
renameat2 316 276, getrandom 318 278, statx 332 291, rseq 334 293"""
_ALLOWED = [[int(number) for number in call.split()[1:]] for call in _CALLS.split(",")]
_CHMOD = [(90, -1), (91, 52), (268, 53)]  # with a user id of its own: all other files are foreign
_IGNORED = [(112, 157), (109, 154)]  # setsid, setpgid, answered 0: stay in the group we kill
_CHECKED = [  # allowed if an argument, masked, has one of these values: call, which, mask, values
    ((56, 220), 0, 0x7E02A000, [0]),  # clone: no new namespaces, no sibling, no tracing
    ((302, 261), 0, 0xFFFFFFFF, [0]),  # prlimit64: its own limits
    ((203, 122), 0, 0xFFFFFFFF, [0]),  # sched_setaffinity: itself
    ((72, 25), 1, 0xFFFFFFFF, [*range(8), 1030]),  # fcntl: F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC
    # ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    ((16, 29), 1, 0xFFFFFFFF, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),
    ((157, 167), 0, 0xFFFFFFFF, [15, 16]),  # prctl: PR_SET_NAME, PR_GET_NAME
]
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def seccomp_filter(
    denied: Iterable = (), allowed: Iterable = (), ignored: Iterable = (), checked: Iterable = ()
) -> bytes:
    """Return a BPF program that refuses denied calls (pairs of numbers: x86-64, arm64) or, given
    allowed ones, all others; ignored calls answer 0, checked ones depend on an argument. b"" on
    other machines."""
    column, arch = _ARCH.get(os.uname().machine, (None, 0))
    if column is None:
        return b""
    load, equal, mask = 0x20, 0x15, 0x54  # BPF_LD|W|ABS, JEQ, AND
    allow, zero, refuse, unknown = (  # BPF_RET: ALLOW; ERRNO 0, EPERM, ENOSYS
        [(0x06, 0, 0, reply)] for reply in (0x7FFF0000, 0x00050000, 0x00050001, 0x00050026)
    )
    # C libraries try newer calls (from 424 on) first and fall back where there are none. The
    # numbers from 0x40000000 on are the x32 twins of all calls.
    others, newer = (refuse, unknown) if allowed else (allow, allow)
    steps = {0: others, 424: newer, 0x40000000: refuse}  # from a number up to the next
    rules = [(call, reply) for calls, reply in ((allowed, allow), (ignored, zero), (denied, refuse))
             for call in calls]  # fmt: skip
    for call, argument, bits, values in checked:
        tests = [step for value in values for step in ((equal, 0, 1, value), *allow)]
        rules += [(call, [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits), *tests, *refuse])]
    for call, reply in rules:
        if call[column] >= 0:
            steps[call[column]] = reply
            steps.setdefault(call[column] + 1, others)
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), *refuse, (load, 0, 0, 0)]
    program += _search([next(run) for _, run in groupby(sorted(steps.items()), lambda x: x[1])])
    return b"".join(struct.pack("HBBI", *step) for step in program)


def _search(steps: list) -> list:
    """Return a BPF search tree: in a plain chain, each call and each new filter take longer."""
    if len(steps) == 1:
        return steps[0][1]
    half = len(steps) // 2
    low, high = _search(steps[:half]), _search(steps[half:])
    return [(0x35, len(low), 0, steps[half][0]), *low, *high]  # BPF_JGE


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
    """Lower a resource limit for good; one that is lower already stays. Programs may raise the
    stack's again."""
    which = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, hard if name == "STACK" else value))


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
        self.root, self.uid = os.geteuid() == 0, 20000 + keeper % 40000
        allowed = _ALLOWED + (_CHMOD if self.root else [])
        self.filter = seccomp_filter((), allowed, _IGNORED, _CHECKED)
        self.max_processes = 32 + (0 if self.root else _threads_of(os.getuid()))
        with suppress(OSError):  # if the machine runs out of memory, we and the programs go first
            Path("/proc/self/oom_score_adj").write_text("1000")
        libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: a program's orphans become our children
        die_with_parent()
        # An installation below /root is closed to another uid; a descriptor is a way in.
        os.dup2(os.open(LIBRARY, os.O_PATH), LIBRARY_FD)
        self.tmpfs = namespaces and _mount_tmpfs()
        sys.argv = ["solution.py"]
        self.module = types.ModuleType("__main__")  # every program starts with a copy of it
        stars = "".join(f"from {name} import *\n" for name in _STAR)
        exec(f"{stars}import {', '.join(_STAR)}", vars(self.module))
        exec(f"import {', '.join(_IMPORTED)}", {})
        packages = [vars(module).get("__path__") for module in list(sys.modules.values())]
        for path in [sys.path, *(x for x in packages if isinstance(x, list))]:
            inside = [x.removeprefix(LIBRARY) for x in path if x.startswith(LIBRARY)]
            path += [f"/proc/self/fd/{LIBRARY_FD}{x}" for x in inside]
        builtins.exit = builtins.quit = sys.exit
        sys.set_int_max_str_digits(0)
        gc.freeze()  # the children share these pages

    def serve(self) -> None:
        """Answer time limits, each with a program's files, with [status, why] lines."""
        with ExitStack() as stack:  # a dry run without a program, to see what is in force
            files = [stack.enter_context(_memory_file(b"")).fileno() for _ in range(3)]
            status, why = self.run(50, *files)
            self.report = _printed(files[2])
        greeting = self.report if status == "ok" else f"does not work here: {why}"
        print(json.dumps(greeting), flush=True)
        requests = socket.socket(fileno=0)
        while True:
            data, files, *_ = socket.recv_fds(requests, 8, 3)
            if not data:
                return
            print(json.dumps(self.run(*struct.unpack("d", data), *files)), flush=True)
            for file in files:
                os.close(file)

    def run(self, limit: float, stdin: int, program: int, output: int) -> tuple[str, str]:
        """Run a program on its input, both of which we never read; return (status, why)."""
        folder = tempfile.mkdtemp(prefix=f"a3po-{self.keeper}-", dir=SHM if self.tmpfs else None)
        try:
            if self.root:
                os.chown(folder, self.uid, self.uid)
            pid = os.fork()
            if pid == 0:
                self._child(limit, folder, stdin, program, output)
            pidfd = os.pidfd_open(pid)
            in_time = bool(select.select([pidfd], [], [], limit)[0])
            os.close(pidfd)
            status = _kill_children(pid, self.namespaces)
            if not in_time or status == -signal.SIGXCPU:
                return "timeout", f"over {limit:g} s"
            if status == LOCK_FAILED:
                return "error", "the sandbox could not be locked"
            return ("failed", f"exit status {status}") if status else ("ok", "")
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
            _kill_children(0, self.namespaces)  # an rm that takes too long

    def _child(self, limit: float, folder: str, stdin: int, program: int, output: int) -> None:
        """In the fork: lock down, run the program, exit. Never returns."""
        status, leave = LOCK_FAILED, os._exit  # before a program may replace it
        try:
            os.setsid()
            with open(program, closefd=False) as file:
                task = file.read()  # nothing in the dry run
            code, func = json.loads(task) if task else (None, None)
            null = os.open(os.devnull, os.O_RDWR)
            for target, source in enumerate((stdin, null if func else output, null, output)):
                os.dup2(source, target)
            os.closerange(4, LIBRARY_FD)
            os.environ.update(HOME=folder, TMPDIR=folder)
            self.module.__file__ = f"{folder}/solution.py"
            report = self._lock_down(folder, limit)
            if code is None:
                os.write(1, report.encode())
                status = 0
            elif report == self.report:
                status = 1  # of a program that manages to break out of _execute
                status = _execute(code, func, self.module)
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


def _remove_tree(folder: str, seconds: float = 5) -> None:
    """Remove a folder, even a closed one. One that takes longer, for making entries is faster than
    removing them, is left to the keeper at its end, whose `rm` may outlive it."""
    remove = 'rm -rf "$0" || { chmod -R u+rwx "$0"; rm -rf "$0"; }'
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(["sh", "-c", remove, folder], timeout=seconds)


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


def _execute(code: str, func: str | None, module: types.ModuleType) -> int:
    """Run the program the way `python solution.py` would, or call its function and write the
    result to descriptor 3; return the exit status."""
    dumps = json.dumps  # before the program may replace it
    sys.setrecursionlimit(50_000)
    module.__name__ = "solution" if func else "__main__"
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    scope, status, stdout = vars(module), 0, sys.stdout
    known, library = len(scope), scope.get(func)
    # The interpreter's own would not take "\r\n" for the end of a line.
    sys.stdin = sys.__stdin__ = scope["stdin"] = open(0, errors="surrogateescape", closefd=False)
    gc.freeze()  # what is there now is not the program's
    try:
        exec(compile(code, "solution.py", "exec"), scope)
        if func:
            return _call(scope, func, dumps, library)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        status = 1
    if func:
        return 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        _flush(scope, known, stdout)
    except BaseException:
        status = status or 120
    return status & 0xFF


def _call(scope: dict, func: str, dumps: Callable[[Any], str], library: Any) -> int:
    """Call the function with the arguments of descriptor 0; 0 if its result could be written."""
    with open(0, "rb", closefd=False) as file:
        lines = file.read().decode("utf-8", "surrogatepass").split("\n")
    if "Solution" in scope:  # it decides, as in LiveCodeBench's harness
        call = getattr(scope["Solution"](), func)  # also one that its __init__ sets
    else:
        call = scope[func] if scope[func] is not library else None  # the prelude's: nobody's own
    data = dumps(call(*[json.loads(line) for line in lines if line.strip()])).encode()
    os.ftruncate(3, 0)
    return int(os.pwrite(3, data, 0) != len(data))


def _flush(scope: dict, known: int, stdout: Any) -> None:
    """Write what is still in buffers, as the interpreter does at its end: of all streams that the
    program made, outer ones first (of a cycle that is collected, inner ones may be closed first),
    then what its destructors write."""
    replaced, sys.stdout = getattr(sys, "stdout", None), stdout
    streams = [thing for thing in gc.get_objects() if isinstance(thing, io.IOBase.__base__)]
    for stream in [replaced, sys.__stdout__, *reversed(streams)]:
        with suppress(Exception):  # it is gone, closed or detached
            stream.flush()
    del streams, stream, replaced
    while len(scope) > known:  # its own names only: touching all would copy the shared pages
        scope.popitem()
    gc.collect()
    with suppress(ValueError):
        stdout.flush()


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
