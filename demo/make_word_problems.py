"""Write the word problems of the second demo, SmolLM2: one operation on small numbers.

    python demo/make_word_problems.py runs/smollm2   # train, test and probe.jsonl in that folder

"Ann has 7 boxes with 4 pens each. How many pens does Ann have?"  There are four kinds: gets
(a + b), gives (a + b less b), boxes (a * b) and shares (a * b over b).

The split is by the numbers.  All problems on the same two numbers from 2 to 12, in any kind and
order, form one family, and a family is either trained on or held out: where 7 + 4, 11 - 4, 7 * 4
and 28 / 4 are held out, none of them is in the training set under another name either.  The two
families of the examples that the prompt shows are in neither.

The probe is the held-out set and, to see how far it carries: the same problems in other words
("reworded"), larger numbers ("larger"), and two operations ("two").  Nothing trains on it.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

Problem = dict[str, str]  # {"id": "boxes-7-4", "problem": "Ann has 7 ...", "answer": "28"}
Pair = tuple[int, int]
NUMBERS, LARGER = range(2, 13), range(13, 21)
IN_THE_PROMPT = {(3, 5), (4, 6)}  # the worked examples of smollm2/template.txt
HELD_OUT = 16  # of the other 64 families
NAMES = ("Ann", "Ben", "Dan", "Eva", "Jim", "Kim", "Leo", "Max", "Sam", "Sue")
THINGS = ("pens", "cards", "coins", "balls", "books", "cups", "eggs", "nuts", "shells", "stamps")
HOLDERS = ("boxes", "bags", "baskets", "jars")
# Each kind: its text, and the number to be found; {sum} is a + b and {product} is a * b.
KINDS = {
    "gets": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{sum}",
    ),
    "gives": (
        "{name} has {sum} {things} and gives {b} of them away. "
        "How many {things} does {name} have left?",
        "{a}",
    ),
    "boxes": (
        "{name} has {a} {holders} with {b} {things} each. How many {things} does {name} have?",
        "{product}",
    ),
    "shares": (
        "{name} shares {product} {things} equally among {b} friends. "
        "How many {things} does each friend get?",
        "{a}",
    ),
}
REWORDED = {
    "reworded-gets": (
        "On Monday {name} found {a} {things}, on Tuesday {b}. How many is that together?",
        "{sum}",
    ),
    "reworded-gives": (
        "There were {sum} {things} on the table until {name} took {b}. How many are still there?",
        "{a}",
    ),
    "reworded-boxes": (
        "Each of the {a} {holders} that {name} packed holds {b} {things}. "
        "How many {things} is that?",
        "{product}",
    ),
    "reworded-shares": (
        "{name} puts {product} {things} into {b} {holders}, "
        "the same number into each. How many go into one?",
        "{a}",
    ),
}
TWO = {
    "two-gives": (
        "{name} has {a} {holders} with {b} {things} each and gives {c} {things} away. "
        "How many {things} does {name} have left?",
        "{product_less_c}",
    ),
    "two-gets": (
        "{name} has {a} {holders} with {b} {things} each and gets {c} {things} more. "
        "How many {things} does {name} have now?",
        "{product_and_c}",
    ),
}


def families(seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return the families (a, b), a <= b, of the training set and of the held-out set."""
    every = list(itertools.combinations_with_replacement(NUMBERS, 2))
    every = [family for family in every if family not in IN_THE_PROMPT]
    random.Random(seed).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def write_problem(kind: str, form: tuple[str, str], a: int, b: int, rng: random.Random) -> Problem:
    """Return the problem with a name and things drawn from the lists."""
    words = dict(
        a=a,
        b=b,
        sum=a + b,
        product=a * b,
        name=rng.choice(NAMES),
        things=rng.choice(THINGS),
        holders=rng.choice(HOLDERS),
    )
    if kind in TWO:
        c = rng.choice([number for number in NUMBERS if number < a * b])
        words |= dict(c=c, product_less_c=a * b - c, product_and_c=a * b + c)
    text, answer = (part.format(**words) for part in form)
    return {"id": f"{kind}-{a}-{b}", "problem": text, "answer": answer}


def make_problems(pairs: list[Pair], seed: int) -> list[Problem]:
    """Return a problem of each kind for both orders of each family (twice a, b where a = b)."""
    rng, problems = random.Random(f"{seed} {pairs}"), {}
    for (a, b), kind, swap in itertools.product(pairs, KINDS, (False, True)):
        order = (b, a) if swap else (a, b)
        problem = write_problem(kind, KINDS[kind], *order, rng)
        while problem["problem"] in problems:  # a = b, and the same words were drawn
            problem = write_problem(kind, KINDS[kind], *order, rng)
        if swap and a == b:
            problem["id"] += "-again"
        problems[problem["problem"]] = problem
    return list(problems.values())


def make_probe(held_out: list[Pair], seed: int) -> list[Problem]:
    """Return the problems that nothing trains on and that are not like the training set's."""
    rng = random.Random(f"probe {seed}")
    rows = [
        write_problem(kind, form, *rng.sample(pair, 2), rng)
        for pair in held_out
        for kind, form in REWORDED.items()
    ]
    larger = rng.sample(list(itertools.product(LARGER, LARGER)), 8 * len(KINDS))
    for kind, form in 8 * list(KINDS.items()):
        rows.append(write_problem(f"larger-{kind}", form, *larger.pop(), rng))
    rows += [
        write_problem(kind, form, *rng.sample(pair, 2), rng)
        for pair in held_out
        for kind, form in TWO.items()
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train, test and probe.jsonl.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the words")
    args = parser.parse_args()
    train, held_out = families(args.seed)
    test = make_problems(held_out, args.seed)
    files = {
        "train": (make_problems(train, args.seed), train),
        "test": (test, held_out),
        "probe": (test + make_probe(held_out, args.seed), []),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (rows, pairs) in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines)
        numbers = f" on {len(pairs)} pairs of numbers" if pairs else ""
        print(f"{args.out}/{name}.jsonl: {len(rows)} problems{numbers}")
    print(f"for example: {rows[0]['problem']} {rows[0]['answer']}", flush=True)


if __name__ == "__main__":
    main()
