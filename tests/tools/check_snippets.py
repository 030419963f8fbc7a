"""The README's copy-paste claims, checked with a Python that has trl==1.16.0:

    python tests/tools/check_snippets.py

The loss section of a3po.py is executed alone, then the README's TRL trainer and verl lines run on
it, and their advantages are compared, token by token, with `shape_advantages` called directly.
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
names: dict = {"GRPOTrainer": GRPOTrainer}
exec(section.split("# ---- loss: to here ----")[0], names)
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def snippet(marker: str) -> str:
    return next(text for text in SNIPPETS if marker in text)


def check_trl() -> None:
    exec(snippet("class A3POTrainer"), names)
    seen = []

    class Spy(names["A3POTrainer"]):
        def _compute_loss(self, model, inputs):
            seen.append({key: value.clone() for key, value in inputs.items()
                         if isinstance(value, torch.Tensor)})
            return super()._compute_loss(model, inputs)

    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, sharpen=1.0)
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=8, num_generations=8, max_steps=4,
            steps_per_generation=2, max_completion_length=24, use_cpu=True, bf16=False, beta=0.0,
            report_to="none", save_strategy="no", disable_tqdm=True, loss_type="dapo",
        )
        trainer = Spy(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=digits_are_even, args=config,
            train_dataset=Dataset.from_list([{"prompt": f"Compute {i}+1."} for i in range(8)]),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        )
        trainer.train()
    amplified = 0
    for batch in seen:
        A, mask = batch["advantages"], batch["completion_mask"].bool()
        assert A.shape == mask.shape
        for row, keep, old in zip(A, mask, batch["old_per_token_logps"], strict=True):
            row, old = row[keep].tolist(), old[keep].tolist()
            if not any(row):
                continue
            base = min(row, key=abs)
            k = max(1, int(0.2 * len(row)))
            chosen = sorted(range(len(row)), key=lambda t: old[t] if base > 0 else -old[t])[:k]
            # the two updates of a generation share its step; rho is 2 - 0.005 * step
            ratios = {round(row[t] / base, 3) for t in chosen} if k < len(row) else {2.0}
            assert ratios <= {2.0, 1.995}, ratios
            assert all(row[t] == base for t in range(len(row)) if t not in chosen)
            amplified += k
    assert amplified
    print(f"TRL: {len(seen)} batches, {amplified} tokens amplified, all as in shape_advantages")


def check_verl() -> None:
    class Data:
        batch: dict

    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    scores = torch.zeros(4, 9)
    scores[0, 8] = scores[2, 0] = 1.0
    data = Data()
    advantages = torch.randn(4, 1).expand(4, 9)
    data.batch = dict(advantages=advantages, token_level_scores=scores, response_mask=mask.long(),
                      old_log_probs=-torch.rand(4, 9))
    exec(snippet("token_level_scores"), names | dict(data=data, step=100))
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
    check_trl()
