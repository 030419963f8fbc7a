"""Ranks: joining and leaving the group, passing things between its members, printing and timing on
them; and the one exception that is for the user. All import this, so torch and tqdm come late.
"""

import atexit
import contextlib
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

# Read when torch is imported: its C++ parts write of NUMA nodes and the like
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class UsageError(ValueError):
    """Bad input: one sentence saying what, where and what to do; shown without a traceback."""


def brief(error: BaseException) -> str:  # cut at a word
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


@contextlib.contextmanager
def explain(what: str, cure: str | Callable, kinds: Any = (Exception, SystemExit)):
    """Turn what a library raises in the block into a UsageError: what went wrong (why): a cure, or
    what `cure` says of the error."""
    try:
        yield
    except UsageError:
        raise
    except kinds as why:
        cure = cure(why) if callable(cure) else cure
        raise UsageError(f"{what} ({brief(why)}): {cure}") from why


def init_distributed() -> str:
    """Join torchrun's process group, or be a group of one; return this rank's device."""
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:  # not under torchrun: set what it would have set
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any free one
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    else:  # before vLLM starts; more threads than idle cores collapse to a tenth of the speed
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not dist.is_initialized():  # the long timeout: ranks wait for the longest rollout
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def launch(main: Callable[[], None]) -> NoReturn:
    """Run a program's main and leave with its status; after an error that it does not handle, with
    the traceback, at once, for the other ranks wait for this one."""
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        status = 1
        traceback.print_exc()
    if status:
        signal.alarm(30)  # ends the process where an exit handler waits for a rank that is gone
    leave(status)


def give_up(error: UsageError, more: str = "") -> NoReturn:
    """Print the error, and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # if all ranks have this error, torchrun ends this one meanwhile
    print(f"error: {error}", *filter(None, [more]), sep="\n", file=sys.stderr)
    sys.exit(2)


def leave(status: int = 0) -> NoReturn:
    """End a finished process after its exit handlers, without the rest of Python's shutdown: there,
    a thread of gloo that has yet to free a tensor aborts the process (PyTorch's pull request
    179291); after destroy_process_group too, as DTensor's caches keep the group."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def distributed():
    """Return torch.distributed where there is a group of several ranks, else None."""
    import torch.distributed as dist

    return dist if world_size() > 1 and dist.is_initialized() else None


def gather(items: list) -> list:
    """Return the lists of all ranks, one after the other, on every rank."""
    dist = distributed()
    if dist is None:
        return items
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_0(make: Callable[[], Any]) -> Any:
    """Return on all ranks what rank 0 makes; a UsageError there is raised on all."""
    dist, made = distributed(), [None]
    if rank() == 0 or dist is None:
        try:
            made = [make()]
        except UsageError as why:
            made = [why]
    if dist is not None:
        dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], UsageError):
        raise made[0]
    return made[0]


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str):
    """Add the duration of the block to seconds["seconds_" + name]."""
    import torch

    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    key = f"seconds_{name}"
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - began


def say(*parts: object) -> None:
    """Print on rank 0, above a progress bar if there is one."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(" ".join(map(str, parts)))
        sys.stdout.flush()  # a log file or a pipe would show it minutes later
