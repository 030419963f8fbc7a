"""Which kinds of tokens weigh more: those of the demo's solutions, in a run that logged its tokens.

    python a3po.py --setting demo --steps 1 --log_tokens 256 --output_dir runs/tokens
    python demo/token_kinds.py runs/tokens                                    a table of step 0
"""

import argparse
import json
from collections import Counter
from pathlib import Path

KINDS = (FIRST, NUMBER, SIGN, RESULT, WORDS, END) = (
    "the first number", "other numbers to work on", "signs", "results, after `=`", "words",
    "the end: `\\boxed{N}`")


def kinds_of(tokens: list[str]) -> list[str]:
    """Return the kind of each token of a response."""
    kinds = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token == "\\boxed{" or END in kinds:
            kinds.append(END)
        elif token.isdigit():
            kinds.append(RESULT if before == "=" else NUMBER if FIRST in kinds else FIRST)
        else:
            kinds.append(SIGN if token in "+*=" else WORDS)
    return kinds


def count(rows: list[dict]) -> dict[str, Counter]:
    """Return, for each column of the table, how many tokens of each kind it has."""
    columns = {name: Counter() for name in ("right", "chosen in right", "wrong", "chosen in wrong",
                                            "the 20 % of most entropy")}
    entropy = sorted(value for row in rows for value in row["entropy"])
    forking = entropy[-max(1, len(entropy) // 5)]  # as a3po.score has it
    for row in rows:
        side = "right" if row["correct"] else "wrong"
        least = min(row["weight"])
        for kind, weight, value in zip(kinds_of(row["tokens"]), row["weight"], row["entropy"],
                                       strict=True):
            columns[side][kind] += 1
            columns[f"chosen in {side}"][kind] += weight > least
            columns["the 20 % of most entropy"][kind] += value >= forking
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with a tokens.jsonl")
    parser.add_argument("--step", type=int, default=0)
    args = parser.parse_args()
    path = args.run / "tokens.jsonl"
    if not path.is_file():
        parser.error(f"{path} does not exist: train with --log_tokens 256")
    rows = [row for row in map(json.loads, path.read_text().splitlines())
            if row["step"] == args.step and row["weight"]]
    if not rows:
        parser.error(f"{path} has no trained response of step {args.step}: try another --step")
    columns = count(rows)
    print(f"| share of tokens, % | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for kind in KINDS:
        cells = [f"{100 * c[kind] / max(1, sum(c.values())):.0f}" for c in columns.values()]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
