"""Run by test_update.py, also under torchrun: one mini-batch's gradient, then one optimiser step.

usage: gradient_worker.py MODEL fsdp|ddp MICRO_BATCH_TOKENS OUT.pt [flags of a3po.py]
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import a3po
import rollout


def fixed_rows() -> list[a3po.Row]:
    """The same ten responses on every rank, of very different lengths, one with advantage 0. Five
    are to the same prompt, two to another: wherever such rows meet, they share its tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 90, 4 + i).tolist() for i in range(10)]
    prompts[1] = prompts[3] = prompts[7] = prompts[9] = prompts[0]
    prompts[8] = prompts[2]
    rows = []
    for i, length in enumerate([1, 2, 3, 5, 9, 14, 20, 27, 31, 40]):
        logprobs = -rng.exponential(1.0, length).astype(np.float32)
        ids = rng.integers(3, 90, length).astype(np.int32)
        advantage = 0.0 if i == 4 else 1.5 - i
        rows.append(a3po.Row(prompts[i], ids, logprobs, i % 2 == 0, 1.0, advantage))
    return rows


def main(model: str, parallel: str, tokens: str, out: str, *flags: str) -> None:
    device = rollout.init_distributed()
    config = a3po.parse_args(
        ["--setting=demo", f"--model={model}", f"--parallel={parallel}", *flags,
         f"--micro_batch_tokens={tokens}", "--lr=1e-3", "--weight_decay=0.1"]
    )
    policy, inner, reference, optimizer = a3po.build(config, device)
    shares = a3po.deal(fixed_rows(), rollout.world_size())
    a3po.score(policy, reference, shares, config, device)
    knobs = a3po.set_knobs(shares[rollout.rank()], config, step=0)
    sums = a3po.all_reduce(a3po.backward(policy, shares, config, knobs, device))
    gradient = {}
    for name, parameter in inner.named_parameters():
        grad = parameter.grad
        gradient[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    policy.zero_grad()
    a3po.update(policy, optimizer, [shares], config, knobs, device)
    weights = {name: tensor.clone() for name, tensor in a3po.full_weights(inner)}
    if rollout.rank() == 0:
        torch.save(dict(gradient=gradient, weights=weights, sums=sums), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    rollout.leave()
