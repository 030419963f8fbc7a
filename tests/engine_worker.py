"""Run by test_rollout.py: one engine, one policy, one optimiser step; prints a JSON report.

usage: engine_worker.py MODEL
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gradient_worker import fixed_rows

import a3po
import rollout


def main(model: str) -> None:
    config = a3po.parse_args(
        ["--setting=demo", f"--model={model}", "--lr=0.02", "--temperature=0.8",
         "--max_prompt_length=32", "--max_response_length=48"]
    )
    tokenizer, _, _ = a3po.load_inputs(config)
    device = rollout.init_distributed()
    policy, inner, _, optimizer = a3po.build(config, device)
    engine = a3po.build_engine(config, tokenizer)
    rows = fixed_rows()
    prompts = [row.prompt_ids for row in rows]
    seeds = [1000 * i for i in range(len(prompts))]

    def sample(prompts, seeds, temperature=config.temperature):
        return engine.generate(prompts, 2, seeds, max_tokens=48, temperature=temperature)

    def scored(responses):
        rows = [a3po.Row(prompts[i // 2], r.ids, r.logprobs, i % 3 == 0, 1.0, 1.0)
                for i, r in enumerate(responses)]
        a3po.score(policy, None, [rows], config, device)
        return rows, a3po.row_metrics([rows])["mismatch_max"]

    responses = sample(prompts, seeds)
    report = dict(seeds_differ=responses[0].ids.tolist() != responses[1].ids.tolist())
    alone = sample(prompts[3:4], seeds[3:4])
    report["same_alone_as_in_a_batch"] = all(
        a.ids.tolist() == b.ids.tolist() for a, b in zip(alone, responses[6:8], strict=True)
    )
    rows, report["gap_at_start"] = scored(responses)
    metrics = a3po.update(policy, optimizer, [[rows]], config, a3po.Knobs(2.0, 2.0), device)
    report["ratio_deviation"] = metrics["ratio_max_deviation"]
    _, report["gap_before_sync"] = scored(responses)
    engine.load_weights(a3po.full_weights(inner), inner.config.tie_word_embeddings)
    after = sample(prompts, seeds)
    _, report["gap_after_sync"] = scored(after)
    stopped = [r for r in responses + after if r.finish_reason == "stop"]
    report["stopped"] = len(stopped)
    report["all_stops_end_with_eos"] = all(r.ids[-1] == tokenizer.eos_token_id for r in stopped)

    inner.set_attn_implementation("sdpa")  # its own forward, without our packing
    greedy = sample(prompts, seeds, temperature=0.0)[::2]
    report["greedy_agrees"] = True
    for prompt, response in zip(prompts, greedy, strict=True):
        ids = torch.tensor([[*prompt, *response.ids.tolist()]])
        with torch.no_grad():
            predicted = inner(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        report["greedy_agrees"] &= predicted.tolist() == response.ids.tolist()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
    rollout.leave()
