"""Checkpoints: written under another name and renamed when complete, so that a kill at any moment
leaves one that `--resume auto` can go on from.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model import full_weights
from shelf.folder import all_see, checkpoints_in, existing
from shelf.ranks import UsageError, brief, gather, rank, say


class Checkpoints:
    """The folders step_N of a run. Each is a save_pretrained folder with weights of `dtype`; in
    the newest, resume/ is what training goes on from, on any number of ranks: float32 weights and
    optimiser state, and what `save` is given as state. All ranks make the same calls.

    keep: how many folders stay, the newest; 0 is all. Where resume/ takes less than SMALL bytes,
    the second newest has one too, to fall back to."""

    SMALL = 1 << 30

    def __init__(self, folder: Path, policy, model, optimizer, tokenizer, dtype: torch.dtype,
                 keep: int = 0):
        self.folder, self.policy, self.optimizer, self.keep = folder, policy, optimizer, keep
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.weights_bytes, self.resume_bytes = parameters * dtype.itemsize, parameters * 12
        self.announce()

    def announce(self) -> None:
        """Say what a checkpoint takes, if that is much or more than there is."""
        free = shutil.disk_usage(existing(self.folder)).free
        total = self.weights_bytes + 2 * self.resume_bytes  # the old one stays until then
        if total > min(self.SMALL, free):
            say(f"a checkpoint takes {size(self.weights_bytes)}, and the newest "
                f"{size(self.resume_bytes)} more to resume from, twice while it is written; "
                f"{size(free)} are free{': TOO LITTLE' * (total > free)} (see --keep_checkpoints)")

    def save(self, step: int, state: dict) -> int:
        """Write step_N under another name, rename it when it is complete, and delete what is not
        kept. Returns the step, or 0 where that failed: then the older ones stay as they are."""
        final, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        why = None
        for part in (self._write_weights, self._write_state, self._put_in_place):
            try:
                part(partial, final, dict(step=step, state=state))
            except (Exception, CheckpointException) as error:  # a full disk, a folder that is gone
                why = reason(error)
                takes = self.weights_bytes + self.resume_bytes
                free = shutil.disk_usage(existing(self.folder)).free  # beside what was written
                if free < takes or "[Errno" in why or "(os error" in why:  # torch's hide the cause
                    why += f"; it takes over {size(takes)}, {size(free)} were left: make room"
            if why := next(filter(None, gather([why])), None):  # also a barrier
                break
        if why and rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            say(f"the checkpoint of step {step} was not written: {why}. Older ones stay, and "
                "training goes on")
        return 0 if why else step

    def _write_weights(self, partial: Path, final: Path, at: dict) -> None:
        weights = {}
        for name, tensor in full_weights(self.model, self.dtype):
            if rank() == 0:
                weights[name] = tensor.cpu()
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.model.save_pretrained(partial, state_dict=weights)
            self.model.config.dtype = self.dtype  # the model has float32, and wrote that
            self.model.config.save_pretrained(partial)
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
        older = checkpoints_in(self.folder)
        for path in older[: -(2 if self.resume_bytes < self.SMALL else 1)]:
            shutil.rmtree(path / "resume", ignore_errors=True)
        for path in older[: -self.keep] if self.keep else ():
            shutil.rmtree(path, ignore_errors=True)

    def resume(self) -> tuple[int, dict]:
        """Restore weights and optimiser from the newest checkpoint that can be read; return (step,
        the state that was saved with it), (0, {}) where there is none. Raises UsageError where none
        can be read."""
        found = [path / "resume" for path in reversed(checkpoints_in(self.folder))
                 if (path / "resume/step.json").exists()]
        found = gather([found])[0]  # rank 0 decides
        for newest in found:
            all_see(newest)
            try:
                at = json.loads((newest / "step.json").read_text())
                state = self.training_state()
                dcp.load(state, checkpoint_id=newest)
            except (Exception, CheckpointException) as error:  # of many types, on all ranks
                say(f"{newest} is damaged: {reason(error)}")
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


def reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # what the ranks raised
        error = next(iter(error.failures.values()))[0]
    return brief(error)


def size(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"
