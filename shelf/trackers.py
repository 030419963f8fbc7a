"""Where else a training run's metrics go: --log_to tensorboard,wandb,trackio, any of them.

A library is imported only if it is named, and none is among the requirements. metrics.jsonl is
always written; these get the same names and values, on rank 0, and a resumed run goes on with its
curve. A library that fails in the middle of a run is said once and left out: training goes on.
"""

import atexit
import importlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from shelf.ranks import UsageError, say

PACKAGES = dict(tensorboard="tensorboard", wandb="wandb", trackio="trackio")


def installed(names: str) -> list[str]:
    """Return the names in a list; UsageError for an unknown one, and one that is not installed."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in PACKAGES:
            raise UsageError(f"--log_to {name}: give any of {', '.join(PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as why:
            raise UsageError(f"--log_to {name}: pip install {PACKAGES[name]} first ({why})"
                             ) from None
    return listed


def tensorboard(folder: Path, settings: dict, start: int) -> tuple[Callable, Callable]:
    """Write event files into RUN/tensorboard; what was logged of later steps is dropped."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=start or None)

    def log(step: int, metrics: dict) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def wandb(folder: Path, settings: dict, start: int) -> tuple[Callable, Callable]:
    """Log to the project a3po, or $WANDB_PROJECT, as a run with the folder's name. It keeps its
    place by RUN/wandb-id; steps that it has already are not logged again."""
    import wandb

    kept = folder / "wandb-id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4))
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "a3po"), name=folder.name,
                     id=kept.read_text(), dir=folder, config=settings, resume="allow")
    return lambda step, metrics: run.log(metrics, step=step), run.finish


def trackio(folder: Path, settings: dict, start: int) -> tuple[Callable, Callable]:
    """Log to the project a3po, or $TRACKIO_PROJECT, as a run with the folder's name; `trackio show`
    opens it. A step done again after a kill is there twice, with the same values."""
    import trackio

    run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", "a3po"), name=folder.name,
                       config=settings, resume="allow", embed=False)
    return lambda step, metrics: run.log(metrics, step=step), run.finish


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(self, names: list[str], folder: Path, settings: dict, start: int):
        self.open: dict[str, tuple[Callable, Callable]] = {}
        for name in names:
            self._try(name, self._start, globals()[name], folder, settings, start)
        atexit.register(self.close)  # also of a run that is stopped

    def _start(self, tracker: Callable, *run) -> None:
        self.open[tracker.__name__] = tracker(*run)

    def log(self, step: int, metrics: dict) -> None:
        known = {k: v for k, v in metrics.items() if v is not None and k != "step"}
        for name, (log, _) in list(self.open.items()):
            self._try(name, log, step, known)

    def close(self) -> None:
        while self.open:
            name, (_, close) = self.open.popitem()
            self._try(name, close)

    def _try(self, name: str, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except Exception as why:  # of a network, a service, another version
            self.open.pop(name, None)
            say(f"NOTE: --log_to {name} failed and is left out ({type(why).__name__}: "
                f"{str(why)[:200]}); metrics.jsonl has everything")
