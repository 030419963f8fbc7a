"""Run by test_rollout.py: one engine, one policy, one optimiser step for each model; prints a list
of reports in JSON.

usage: engine_worker.py MODEL...
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gradient_worker import fixed_samples, one_mini_batch

import a3po
import rollout
from model import full_weights
from shelf import ranks
from shelf.metrics import token_metrics
from verify import Grade


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_weights(model)}


def broken_syncs(old: dict, new: dict) -> dict[str, dict]:
    """Return the weights that vLLM has after a sync that fails in one of four ways."""
    of = "model.layers.{}.self_attn.{}_proj.weight".format
    norm = "model.layers.1.input_layernorm.weight"
    blank = torch.zeros_like(new[of(0, "v")])  # as after a sleep
    return dict(missing=new | {of(0, "v"): blank},
                stale=new | {norm: old[norm]},
                transposed=new | {of(0, "q"): new[of(0, "q")].T.contiguous()},
                elsewhere=new | {of(0, "k"): new[of(1, "k")]})


def follow(model: str, device: str) -> dict:
    """Return how the engine samples, and how far it and the trainer are apart."""
    config = a3po.parse_args(
        ["--setting=demo", f"--model={model}", "--lr=0.02", "--temperature=0.8",
         "--max_prompt_length=32", "--max_response_length=48"]
    )
    tokenizer, *_ = a3po.load_inputs(config)
    policy, inner, _, optimizer = a3po.build(config, device, "grids", None)
    engine = rollout.Engine(model, tokenizer, max_model_len=80)
    prompts = [sample.prompt for sample in fixed_samples()]
    seeds = [1000 * i for i in range(len(prompts))]

    def sample(prompts, seeds, temperature=config.temperature):
        found = dict(engine.generate(prompts, 2, seeds, max_tokens=48, temperature=temperature))
        for i, response in found.items():
            response.grade, response.advantage = Grade(i % 3 == 0, None), 1.0
            response.prompt = prompts[i // 2]
        return [found[i] for i in range(2 * len(prompts))]

    def scored(responses):
        mini_batches = one_mini_batch(responses, config)
        a3po.score(policy, None, mini_batches, config)
        return mini_batches, token_metrics(mini_batches)

    responses = sample(prompts, seeds)
    report = dict(seeds_differ=responses[0].ids.tolist() != responses[1].ids.tolist())
    alone = sample(prompts[3:4], seeds[3:4])
    report["same_alone_as_in_a_batch"] = all(
        a.ids.tolist() == b.ids.tolist() for a, b in zip(alone, responses[6:8], strict=True)
    )
    mini_batches, found = scored(responses)
    report["gap_at_start"], before = found["mismatch_max"], copies(inner)
    metrics = a3po.update(policy, optimizer, mini_batches, config, a3po.rho_at(0, config))
    report["ratio_deviation"] = metrics["ratio_max_deviation"]
    report["gap_before_sync"] = scored(responses)[1]["mismatch_max"]
    report["broken"] = {}
    for name, weights in broken_syncs(before, copies(inner)).items():
        engine.sync(weights.items())
        report["broken"][name] = scored(sample(prompts, seeds))[1]["mismatch_mean"]
    engine.sync(full_weights(inner))
    after = sample(prompts, seeds)
    report["gap_after_sync"] = scored(after)[1]["mismatch_max"]
    stopped = [r for r in responses + after if r.finish_reason == "stop"]
    report["stopped"] = len(stopped)
    report["all_stops_end_with_eos"] = all(r.ids[-1] == tokenizer.eos_token_id for r in stopped)

    inner.set_attn_implementation("sdpa")  # its own forward, without our packing
    greedy = sample(prompts, seeds, temperature=0.0)[::2]
    report["greedy_agrees"] = True
    for response in greedy:
        prompt = response.prompt.ids
        ids = torch.tensor([[*prompt, *response.ids.tolist()]])
        with torch.no_grad():
            predicted = inner(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        report["greedy_agrees"] &= predicted.tolist() == response.ids.tolist()
    return report


def main(*models: str) -> None:
    device = ranks.init_distributed()
    print(json.dumps([follow(model, device) for model in models]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    ranks.leave()
