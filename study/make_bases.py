"""Make the shortcut regime: its problems, and bases that are more or less likely to find out.

    python study/make_bases.py [--out study/bases] [--only 2]    about 2 minutes a base, one core

Going from left to right solves three of four problems, the plain ones; the others are the demo's
traps, which only precedence solves. The bases imitate solvers nearly all of whom go from left to
right; `skill` is the share, in per cent, of those who do it right: the dial of the study. The
tokenizer, the size of the model and the style of solutions are the demo's. Nothing is shared
between warm-up, training and held-out problems.
"""

import argparse
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))
import make_demo  # noqa: E402

SKILLS = (1, 4, 8, 10)  # per cent of the demonstrations that follow precedence
TEST_SIZE, TRAIN_PLAIN, TRAIN_TRAPS = 256, 3072, 1024
STEPS = 1600  # of warm-up, each of 64 demonstrations


def plain() -> Iterator[make_demo.Problem]:
    """Every problem of four operands, none a 1, whose answer one also gets from left to right."""
    for ops in itertools.product("+*", repeat=3):
        if len(set(ops)) < 2:
            continue
        for values in itertools.product(range(2, 10), repeat=4):
            answer = sum(map(math.prod, make_demo.group(values, ops, "*")))
            if answer == make_demo.left_to_right(values, ops) <= make_demo.LARGEST:
                text = "".join(f"{v}{op}" for v, op in zip(values, [*ops, "."], strict=True))
                yield {"problem": f"Compute {text}", "answer": str(answer)}


def strategies(skill: float) -> dict[str, float]:
    return {"precedence": skill, "left to right": 83, "sums first": 100 - 83 - skill}


# ---- what an answer shows ----


def steps_of(response: str) -> list[tuple[str, ...]]:
    """Return the steps (operator, smaller, larger, result) of a solution; a re-check is none."""
    found = re.findall(r"(\d+)([+*])(\d+)=(\d+)", response)
    steps = [(op, *sorted((a, b), key=int), c) for a, op, b, c in found]
    return [step for step, _ in itertools.groupby(steps)]


def by_precedence(problem: str, response: str) -> bool:
    """Return whether every product is one of factors of the same term, and none is left out: a
    right answer without that is luck."""
    terms = [Counter(re.findall(r"\d+", term)) for term in problem.split("+")]
    for op, a, b, c in steps_of(response):
        if op == "*":
            term = next((t for t in terms if not Counter((a, b)) - t), None)
            if term is None:
                return False
            term.subtract((a, b))
            term[c] += 1
    return all(term.total() == 1 for term in terms)


def distinct_of_4(groups: list[list[dict]]) -> float | None:
    """Return how many different derivations four right answers to a problem have, expected."""
    found = []
    for group in groups:
        right = Counter(str(steps_of(x["response"])) for x in group if x["correct"])
        n = right.total()
        if n >= 4:
            alone = [math.comb(n - count, 4) / math.comb(n, 4) for count in right.values()]
            found.append(len(alone) - sum(alone))
    return float(np.mean(found)) if found else None


# ---- making them ----


def make_problems(out: Path) -> list[make_demo.Problem]:
    """Write train.jsonl, plain.jsonl and traps.jsonl; return the problems of the warm-up. As in
    training, a quarter of those are traps."""
    easy = make_demo.in_hash_order(plain())
    # without a 1: times 1 changes nothing, so there a wrong order is often right by luck
    traps = [row for row in make_demo.in_hash_order(make_demo.traps(4)) if "1" not in
             re.findall(r"\d", row["problem"])]
    end_easy, end_traps = TEST_SIZE + TRAIN_PLAIN, TEST_SIZE + TRAIN_TRAPS
    out.mkdir(parents=True, exist_ok=True)
    make_demo.write_rows(out / "plain.jsonl", easy[:TEST_SIZE])
    make_demo.write_rows(out / "traps.jsonl", traps[:TEST_SIZE])
    train = easy[TEST_SIZE:end_easy] + traps[TEST_SIZE:end_traps]
    make_demo.write_rows(out / "train.jsonl", make_demo.in_hash_order(train))
    rest = easy[end_easy:]
    return rest + traps[end_traps : end_traps + len(rest) // 3]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the study's problems and base models.")
    parser.add_argument("--out", type=Path, default=HERE / "bases", help="folder to write")
    parser.add_argument("--only", type=float, choices=SKILLS, help="make this base alone")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for threads to pay
    problems = make_problems(args.out)
    for skill in [args.only] if args.only else SKILLS:
        torch.manual_seed(0)
        tokenizer = make_demo.make_tokenizer()
        model = make_demo.make_model(tokenizer)
        print(f"skill-{skill:g}: {strategies(skill)}")
        make_demo.warm_up(model, tokenizer, problems, STEPS, 0, strategies=strategies(skill))
        make_demo.save(model, tokenizer, args.out / f"skill-{skill:g}")


if __name__ == "__main__":
    main()
