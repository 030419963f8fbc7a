"""Build the demo: a tiny Qwen3 that does sums badly, its tokenizer, and problems to train it on.

    python demo/make_demo.py                   # rebuild demo/ in place: about 6 minutes on one core
    python demo/make_demo.py --out /tmp/demo   # the same elsewhere

The task.  "Compute 3+4*5+2." with operands 1..9.  Every problem is a trap: going from left to right
gives a wrong answer, and so does adding before multiplying.

The split.  All problems of four operands are sorted by the SHA-256 of their text: the first 512 are
held out (test.jsonl), the next 4,096 are for RL (train.jsonl), and the other 5,809 are all that the
supervised warm-up sees.  test_ood.jsonl has five operands, which nothing trains on.

The base.  Reinforcement learning picks among the strategies that a model already has; it hardly
teaches new ones.  So the warm-up makes a base that is mostly wrong but capable: it imitates careful
and careless solvers in many styles, can do each single step, and goes about it the right way in
fewer than one of three responses.  Nearly every problem is solved by some of its samples, so there
is something to reinforce in each, and much to choose from.
"""

import argparse
import hashlib
import itertools
import json
import math
import operator
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))
from rollout import PLAIN_TEMPLATE  # noqa: E402

Problem = dict[str, str]  # {"problem": "Compute 3+4*5+2.", "answer": "25"}
MAX_LENGTH = 1024  # tokens; a prompt and its response take fewer than 100
LARGEST = 99  # the largest number with a token of its own
TEST_SIZE, TRAIN_SIZE, OOD_SIZE = 512, 4096, 256

# How often each way to solve a problem is shown, in per cent.  Only "precedence" is right and
# within reach: "one jump" has the right answer without its steps, so the model can only guess it.
STRATEGIES = {"precedence": 35, "left to right": 30, "sums first": 15, "one jump": 10,
              "forgotten term": 10}
# Free choices of style: many ways to write the same solution, so that there is entropy to lose.
OPENINGS = {"": 4, "First ": 3, "We get ": 2, "Well, ": 1}
CONNECTIVES = {"; ": 5, ", so ": 4, ", then ": 3, ", now ": 2, ", and ": 2, ", next ": 1}
ENDINGS = {". So ": 3, ". Answer ": 2, ", giving ": 1}
CHECK, BOX = ", check ", "\\boxed{"
P_SWAP, P_CHECK, P_SLIP = 0.4, 0.15, 0.05  # per step: a+b as b+a, a re-check, an arithmetic slip
SLIPS = (-10, -2, -1, 1, 2, 10)

APPLY = {"+": operator.add, "*": operator.mul}
INSTRUCTION = PLAIN_TEMPLATE.replace("{problem}", "")  # what follows each problem: one token
SPECIAL = PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


# ---- problems ----


def group(values: list[int], ops: list[str], tight: str) -> list[list[int]]:
    """The operands as terms that the operator `tight` holds together: 3+4*5 as [[3], [4, 5]]."""
    terms = [[values[0]]]
    for op, value in zip(ops, values[1:], strict=True):
        if op == tight:
            terms[-1].append(value)
        else:
            terms.append([value])
    return terms


def left_to_right(values: list[int], ops: list[str]) -> int:
    total = values[0]
    for op, value in zip(ops, values[1:], strict=True):
        total = APPLY[op](total, value)
    return total


def traps(operands: int) -> Iterator[Problem]:
    """Every problem whose readings all stay below 100, and where only the right one is right."""
    for ops in itertools.product("+*", repeat=operands - 1):
        if len(set(ops)) < 2:
            continue
        for values in itertools.product(range(1, 10), repeat=operands):
            answer = sum(map(math.prod, group(values, ops, "*")))
            wrong = left_to_right(values, ops), math.prod(map(sum, group(values, ops, "+")))
            if max(answer, *wrong) <= LARGEST and answer not in wrong:
                text = "".join(f"{v}{op}" for v, op in zip(values, [*ops, "."], strict=True))
                yield {"problem": f"Compute {text}", "answer": str(answer)}


def in_hash_order(rows: Iterator[Problem]) -> list[Problem]:
    """A fixed shuffle that depends on the texts alone, so that the split outlives any seed."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["problem"].encode()).digest())


# ---- demonstrations ----


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


class Solution:
    """A worked solution in the making."""

    def __init__(self, rng: random.Random):
        self.rng, self.text, self.steps = rng, pick(rng, OPENINGS), 0

    def step(self, left: int, op: str, right: int) -> int:
        """Write `left op right = result` and return the result, which may be a slip."""
        if self.rng.random() < P_SWAP:
            left, right = right, left
        correct = written = min(APPLY[op](left, right), LARGEST)
        if self.rng.random() < P_SLIP:
            written = min(max(correct + self.rng.choice(SLIPS), 0), LARGEST)
        self.text += pick(self.rng, CONNECTIVES) if self.steps else ""
        self.text += f"{left}{op}{right}={written}"
        self.steps += 1
        if self.rng.random() < P_CHECK:  # a re-check finds the slip: longer, but more reliable
            self.text += f"{CHECK}{left}{op}{right}={correct}"
            return correct
        return written

    def finish(self, answer: int) -> str:
        return f"{self.text}{pick(self.rng, ENDINGS)}{BOX}{answer}}}"


def reduce_terms(solution: Solution, values: list[int], ops: list[str], tight: str) -> int:
    """Write the steps, in any order that lets `tight` bind first, until one number is left."""
    loose = "+" if tight == "*" else "*"
    terms = group(values, ops, tight)
    while len(terms) > 1 or len(terms[0]) > 1:
        moves: list[list[int] | None] = [term for term in terms if len(term) > 1]
        finished = [i for i, term in enumerate(terms) if len(term) == 1]
        term = solution.rng.choice(moves + [None] * (len(finished) > 1))
        if term is None:  # join two finished terms
            i, j = sorted(solution.rng.sample(finished, 2))
            right = terms.pop(j)[0]
            terms[i][0] = solution.step(terms[i][0], loose, right)
        else:  # shorten an unfinished one
            i, j = sorted(solution.rng.sample(range(len(term)), 2))
            right = term.pop(j)
            term[i] = solution.step(term[i], tight, right)
    return terms[0][0]


def demonstrate(
    rng: random.Random, problem: str, answer: str, strategies: dict[str, float] = STRATEGIES
) -> str:
    """One way to solve the problem, drawn from the strategies; most are wrong."""
    expression = problem.removeprefix("Compute ").removesuffix(".")
    values, ops = [int(v) for v in re.findall(r"\d", expression)], re.findall(r"[+*]", expression)
    strategy, solution = pick(rng, strategies), Solution(rng)
    if strategy == "one jump":
        solution.text += f"{expression}={answer}"
        return solution.finish(int(answer))
    if strategy == "left to right":
        total = values[0]
        for op, value in zip(ops, values[1:], strict=True):
            total = solution.step(total, op, value)
        return solution.finish(total)
    if strategy == "forgotten term":
        i = rng.randrange(len(values))
        del values[i], ops[max(i - 1, 0)]
    tight = "+" if strategy == "sums first" else "*"
    return solution.finish(reduce_terms(solution, values, ops, tight))


# ---- tokenizer and model ----


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Numbers to 99, phrases and the instruction are one token each: a step takes six tokens.

    Printable ASCII characters and the newline are tokens too, so any such text can be restored.
    """
    phrases = [INSTRUCTION, "Compute ", BOX, CHECK, *OPENINGS, *CONNECTIVES, *ENDINGS]
    phrases = sorted(filter(None, phrases), key=len, reverse=True)  # first match wins
    numbers = [str(number) for number in range(10, LARGEST + 1)]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = [*SPECIAL, *phrases, *numbers, *characters]
    pattern = "|".join([*map(re.escape, phrases), r"[1-9]\d", r"[\s\S]"])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()  # joins with nothing; the default would join with spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK,
        model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """173,504 parameters.  Heads of 32, since vLLM's CPU attention refuses 16."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def warm_up(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem],
    steps: int, seed: int, batch_size: int = 64, peak_lr: float = 3e-3,
    strategies: dict[str, float] = STRATEGIES,
) -> None:
    """Supervised training on fresh demonstrations; the loss counts response tokens only."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    progress = tqdm(range(steps), desc="warm-up")
    for step in progress:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / 50) * (0.05 + 0.95 * cosine)
        rows = rng.choices(problems, k=batch_size)
        prompts = tokenizer([row["problem"] + INSTRUCTION for row in rows]).input_ids
        shown = [demonstrate(rng, **row, strategies=strategies) + EOS for row in rows]
        responses = tokenizer(shown).input_ids
        width = max(map(len, prompts)) + max(map(len, responses))
        input_ids = torch.full((batch_size, width), tokenizer.pad_token_id)  # (B, T)
        labels = torch.full((batch_size, width), -100)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            input_ids[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = torch.tensor(response)
        logits = model(input_ids=input_ids).logits[:, :-1]  # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())  # skips -100
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that transformers and vLLM load; rounds the weights to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")  # the name that transformers 4 knows too


def write_rows(path: Path, rows: list[Problem]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem],
    samples: int, max_tokens: int = 64,
) -> dict[str, float]:
    """Pass rates, entropy in nats per token, mean length, share cut off; at temperature 1."""
    solved, entropy, tokens, cut_off = [], 0.0, 0, 0
    for start in tqdm(range(0, len(problems), 16), desc="measure"):
        rows = problems[start : start + 16]
        texts = [row["problem"] + INSTRUCTION for row in rows]
        prompts = tokenizer(texts, return_tensors="pt").input_ids  # equally long: no padding
        output = model.generate(
            prompts, do_sample=True, top_k=0, num_return_sequences=samples,
            max_new_tokens=max_tokens, output_logits=True, return_dict_in_generate=True,
        )
        response_ids = output.sequences[:, prompts.shape[1] :]  # (B, T)
        mask = response_ids != tokenizer.pad_token_id
        logprobs = torch.stack(output.logits, dim=1).log_softmax(-1)  # (B, T, V)
        entropy -= ((logprobs.exp() * logprobs).sum(-1) * mask).sum().item()
        tokens += mask.sum().item()
        cut_off += (response_ids != tokenizer.eos_token_id).all(1).sum().item()
        for i, text in enumerate(tokenizer.batch_decode(response_ids)):
            answers = re.findall(r"\\boxed\{([^{}]*)\}", text)
            solved.append(answers[-1:] == [rows[i // samples]["answer"]])
    rates = torch.tensor(solved, dtype=torch.float).view(-1, samples).mean(1)
    figures = {"pass@1": rates.mean().item(), f"pass@{samples}": (rates > 0).float().mean().item()}
    figures |= {"entropy": entropy / tokens, "length": tokens / len(solved)}
    return figures | {"cut off": cut_off / len(solved)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo model, tokenizer and problems.")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (default: demo/)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and demonstrations")
    parser.add_argument("--steps", type=int, default=2500, help="of warm-up, each of 64 examples")
    parser.add_argument("--samples", type=int, default=32, help="per problem, to measure; 0: skip")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for threads to pay
    torch.manual_seed(args.seed)

    problems = in_hash_order(traps(operands=4))
    splits = {
        "test": problems[:TEST_SIZE],
        "train": problems[TEST_SIZE : TEST_SIZE + TRAIN_SIZE],
        "test_ood": in_hash_order(traps(operands=5))[:OOD_SIZE],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_rows(args.out / f"{name}.jsonl", rows)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up(model, tokenizer, problems[TEST_SIZE + TRAIN_SIZE :], args.steps, args.seed)
    save(model, tokenizer, args.out / "model")
    if args.samples:
        model.float().eval()  # still the rounded weights, which are those that others will load
        for name in ("test", "test_ood"):
            figures = measure(model, tokenizer, splits[name], args.samples)
            print(name, {key: round(value, 3) for key, value in figures.items()})


if __name__ == "__main__":
    main()
