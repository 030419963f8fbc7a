"""Run by bench_update.py with a Python that has TRL: the same RL step with TRL's GRPOTrainer.

usage: bench_trl.py MODEL_FOLDER MAX_TOKENS STEPS
"""

import json
import sys
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

WARMUP = 2


def digits_are_even(completions, **_):
    return [float(sum(int(c) for c in text if c.isdigit()) % 2 == 0) for text in completions]


class Clock(TrainerCallback):
    """CPU seconds of whole steps and of their rollout part, from the step WARMUP on."""

    def __init__(self):
        self.step, self.rollout, self.tokens = [], [], []

    def on_step_begin(self, *args, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.step.append(time.process_time() - self.began)


def main(folder: str, max_tokens: int, steps: int) -> None:
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in open(f"{folder}/prompts.jsonl")]
    config = GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=64, gradient_accumulation_steps=4,
        num_generations=8, max_completion_length=max_tokens, max_steps=steps + WARMUP,
        learning_rate=1e-4, lr_scheduler_type="constant", beta=0.0, temperature=1.0,
        loss_type="dapo", scale_rewards="group", use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=0, dataloader_num_workers=0,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=digits_are_even, args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )
    clock = Clock()
    generate = trainer._generate_and_score_completions

    def timed(inputs):  # generation, rewards and advantages: all that is not the update
        began = time.process_time()
        result = generate(inputs)
        clock.rollout.append(time.process_time() - began)
        clock.tokens.append(result["completion_mask"].sum().item())
        return result

    trainer._generate_and_score_completions = timed
    trainer.add_callback(clock)
    stdout, sys.stdout = sys.stdout, sys.stderr
    trainer.train()
    sys.stdout = stdout
    step, rollout, tokens = (sum(x[WARMUP:]) for x in (clock.step, clock.rollout, clock.tokens))
    length = tokens / steps / 256
    print(json.dumps(dict(update=tokens / (step - rollout), step=tokens / step, length=length)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
