"""Run by test_train.py: greedy answers of a checkpoint from transformers and from vLLM.

usage: checkpoint_worker.py CHECKPOINT
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout  # noqa: E402
from shelf import ranks  # noqa: E402
from shelf.data import load_problems  # noqa: E402


def main(checkpoint: str) -> None:
    ranks.init_distributed()
    tokenizer, _ = rollout.load_tokenizer(checkpoint, 64, 64)
    problems = load_problems(str(ROOT / "demo" / "test.jsonl"))[:16]
    prompts = rollout.encode_prompts(problems, tokenizer, "auto", 64)
    engine = rollout.Engine(checkpoint, tokenizer, max_model_len=128)
    responses = dict(engine.generate(prompts, 1, [0] * 16, max_tokens=64, temperature=0.0))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    agree = boxed = 0
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        out = model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :].tolist()
        agree += out == responses[i].ids.tolist()
        boxed += "\\boxed{" in tokenizer.decode(out)
    print(json.dumps(dict(agree=agree, of=len(prompts), boxed=boxed)))


if __name__ == "__main__":
    main(sys.argv[1])
    ranks.leave()
