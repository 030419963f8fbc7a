"""The README's copy-paste claims, checked with a Python that has trl==1.16.0:

    python tests/tools/check_snippets.py

The loss section of a3po.py is executed alone, then the README's verl lines and TRL trainer run on
it, the trainer with five GRPOConfigs, and their advantages are compared, token by token, with
`shape_advantages` called directly.
"""

import re
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from bench_trl import digits_are_even  # noqa: E402
from conftest import make_model  # noqa: E402

section = (ROOT / "a3po.py").read_text().split("# ---- loss: copy from here ----")[1]
names: dict = {}
exec(section.split("# ---- loss: to here ----")[0], names)
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def snippet(marker: str) -> str:
    return next(text for text in SNIPPETS if marker in text)


CONFIGS = (  # accumulation, steps_per_generation, num_iterations; updates, the step of each batch
    (1, None, 1, 1, None),  # the defaults: there are no old log-probs
    (1, 2, 1, 8, [0, 1, 2, 3]),
    (1, 2, 2, 12, [0, 1, 2]),
    (2, None, 2, 6, [0, 1, 2]),
    (3, 2, 1, 4, [0, 0, 1, 3, 3, 4]),  # generations within an update count from its beginning
)


def check_trl(accumulation: int, per_generation: int | None, iterations: int, updates: int,
              steps: list[int] | None) -> None:
    batches = []

    class Recorder(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batches.append((batch, dict(batch)))  # what A3POTrainer will change, and a copy
            return batch

        def _compute_loss(self, model, inputs):
            assert inputs["advantages"].shape == inputs["completion_mask"].shape
            return super()._compute_loss(model, inputs)

    exec(snippet("class A3POTrainer"), names | dict(GRPOTrainer=Recorder), found := {})
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, sharpen=1.0)
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=8, num_generations=8,
            gradient_accumulation_steps=accumulation, steps_per_generation=per_generation,
            num_iterations=iterations, max_steps=updates,
            max_completion_length=24, use_cpu=True, bf16=False, beta=0.0, report_to="none",
            save_strategy="no", disable_tqdm=True, loss_type="dapo", logging_strategy="no",
        )
        trainer = found["A3POTrainer"](
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=digits_are_even, args=config,
            train_dataset=Dataset.from_list([{"prompt": f"Compute {i}+1."} for i in range(64)]),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        )
        try:
            trainer.train()
        except ValueError as error:
            assert steps is None and "give GRPOConfig steps_per_generation=2" in str(error), error
            return print("TRL, GRPOConfig's defaults:", error)
    amplified = 0
    for step, (batch, before) in zip(steps, batches, strict=True):
        A, old = before["advantages"], before["old_per_token_logps"]
        mask, rho = before["completion_mask"], 2 - 0.005 * step
        expected = names["shape_advantages"](A[:, None].expand_as(old), A > 0, old, mask,
                                             rho_positive=rho, rho_negative=rho)
        assert torch.equal(batch["advantages"], expected), step
        amplified += ((expected != A[:, None]) & mask.bool()).sum().item()
    assert amplified
    print(f"TRL, {accumulation=}, {per_generation=}, {iterations=}: {amplified} tokens amplified "
          f"in {len(batches)} batches, all as in shape_advantages at steps {steps}")


def check_verl() -> None:
    class Data:  # the trainer, too
        batch: dict
        global_steps = 101

    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    scores = torch.zeros(4, 9)
    scores[0, 8] = scores[2, 0] = 1.0
    data = Data()
    advantages = torch.randn(4, 1).expand(4, 9)
    data.batch = dict(advantages=advantages, token_level_scores=scores, response_mask=mask.long(),
                      old_log_probs=-torch.rand(4, 9))
    exec(snippet("token_level_scores"), names | dict(data=data, self=data))
    expected = names["shape_advantages"](
        advantages, torch.tensor([1, 0, 1, 0]), data.batch["old_log_probs"], mask,
        rho_positive=1.5, rho_negative=1.5,
    )
    assert torch.equal(data.batch["advantages"], expected)
    changed = (data.batch["advantages"] != advantages)[mask].sum().item()
    assert changed == 4  # one token each of 9, 4, 1 and 7
    print(f"verl: {changed} of {mask.sum().item()} tokens amplified, as in shape_advantages")


if __name__ == "__main__":
    check_verl()
    for config in CONFIGS:
        check_trl(*config)
