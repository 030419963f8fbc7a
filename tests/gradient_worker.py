"""Run by test_update.py under torchrun: one mini-batch's gradient, then one optimiser step, for
each job; a list of results goes to OUT.

usage: gradient_worker.py OUT.pt JOB...    a job in JSON: [model, "fsdp" or "ddp",
                                           micro_batch_tokens, further flags of a3po.py...]
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
import torch._dynamo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import a3po
import model as policy_model
from rollout import Prompt, Sample
from shelf import ranks
from verify import Grade


def fixed_samples() -> list[Sample]:
    """The same ten responses on every rank, of very different lengths, one with advantage 0. Five
    are to the same prompt, two to another: wherever such samples meet, they share its tokens."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(None, rng.integers(3, 90, 4 + i).tolist()) for i in range(10)]
    prompts[1] = prompts[3] = prompts[7] = prompts[9] = prompts[0]
    prompts[8] = prompts[2]
    samples = []
    for i, length in enumerate([1, 2, 3, 5, 9, 14, 20, 27, 31, 40]):
        logprobs = -rng.exponential(1.0, length).astype(np.float32)
        ids = rng.integers(3, 90, length).astype(np.int32)
        advantage = 0.0 if i == 4 else 1.5 - i
        grade = Grade(i % 2 == 0, None)
        samples.append(Sample(prompts[i], ids, logprobs, "stop", "", grade, 1.0, advantage))
    return samples


def one_mini_batch(samples: list[Sample], config: a3po.Config, kernel: str = "grids"):
    """[[micro-batch, ...]], scored before the update if config.mini_batches is above 1."""
    return a3po.make_batches([samples], config, step=0, device="cpu", kernel=kernel)


class Recorder:
    """In the optimiser's place: keeps the gradient and takes no step."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.gradient = model, {}
        self.param_groups = [dict(skipped=0)]

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            self.gradient[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad

    def zero_grad(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def flat(self) -> torch.Tensor:
        return torch.cat([grad.flatten() for grad in self.gradient.values()])


def measure(model: str, parallel: str, tokens: int, *flags: str, device: str = "cpu") -> dict:
    """Return a mini-batch's gradient and metrics, and the weights after a step with it."""
    config = a3po.parse_args(
        ["--setting=demo", f"--model={model}", f"--parallel={parallel}", *flags,
         f"--micro_batch_tokens={tokens}", "--lr=1e-3", "--weight_decay=0.1"]
    )
    policy, inner, reference, optimizer = a3po.build(config, device, "grids", None)
    mini_batches = one_mini_batch(fixed_samples(), config)
    a3po.score(policy, reference, mini_batches, config)
    a3po.mask_by_the_whole_batch(mini_batches, config)
    rho, recorder = a3po.rho_at(0, config), Recorder(inner)
    unclipped = dataclasses.replace(config, max_grad_norm=1e9)
    metrics = a3po.update(policy, recorder, mini_batches, unclipped, rho)
    a3po.update(policy, optimizer, mini_batches, config, rho)
    weights = {name: tensor.clone() for name, tensor in policy_model.full_weights(inner)}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # compiled
    return dict(gradient=recorder.gradient, weights=weights, metrics=metrics, graphs=graphs)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def overflow(model: str, parallel: str, device: str = "cpu") -> dict:
    """Return what an fp16 update that overflows on one rank does on each of them, and then one that
    does not: [metrics, the loss scale after it, whether this rank's weights have changed]."""
    config = a3po.parse_args(["--setting=demo", f"--model={model}", f"--parallel={parallel}"])
    policy, _, _, optimizer = a3po.build(config, device, "grids", torch.float16)
    scaler, found = torch.amp.GradScaler(device), []
    for advantage in (math.inf, 1.0):
        samples = fixed_samples()
        samples[0].advantage = advantage
        mini_batches = one_mini_batch(samples, config)
        before = [local(p).clone() for p in policy.parameters()]  # before a forward
        a3po.score(policy, None, mini_batches, config)
        metrics = a3po.update(policy, optimizer, mini_batches, config, a3po.rho_at(0, config),
                              scaler)
        moved = any(not torch.equal(local(p), old)
                    for p, old in zip(policy.parameters(), before, strict=True))
        found.append([metrics["skipped_updates"], scaler.get_scale(), moved])
    return dict(found=ranks.gather([found]))


def main(out: str, *jobs: str) -> None:
    device = ranks.init_distributed()
    results = []
    for job in map(json.loads, jobs):
        what = overflow if len(job) == 2 else measure
        results.append(what(*job, device=device))
    if ranks.rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    ranks.leave()
