"""Problems from files and from the hub: rows of many schemas to `rollout.Problem`s.

A row is math, choice or code; JSONL, parquet, csv and hub data sets are read alike, by training and
by evaluation. What a row lacks is an error that names its place.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import verify
from rollout import Problem, Prompt, encode_prompts
from shelf.config import Config
from shelf.ranks import UsageError, explain, say
from verify import KINDS, extract_answer

# DAPO-Math-17k's instruction around a problem: our template asks in evaluation's words instead
DAPO_PREFIX = "Solve the following math problem step by step."
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
TEXT_COLUMNS = ("prompt", "problem", "question", "question_content")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEST_FIELDS = ("public_test_cases", "private_test_cases", "metadata")  # what a code grader reads
CHECKED_TESTS = 1 << 20  # characters, decoded in 7 ms; some of LiveCodeBench's rows have far more


def read_rows(source: str, split: str = "train") -> Iterator[tuple[str, dict]]:
    """Yield (where, row) from .jsonl, .parquet or .csv files or hub data sets, with commas."""
    path = Path(source)
    if "," in source and not path.exists():
        for part in filter(None, map(str.strip, source.split(","))):
            yield from read_rows(part, split)
        return
    if path.suffix == ".jsonl" and path.is_file():
        yield from verify.read_jsonl(path)
        return
    if path.suffix in (".parquet", ".csv") and path.is_file():
        with explain(f"{source}: cannot be read", "it is damaged, or not in UTF-8"):
            rows = _table(path)
    elif path.exists() or path.suffix or source.count("/") != 1:
        raise UsageError(f"data {source!r}: expected an existing .jsonl or .parquet file, or a hub "
                         "data set 'owner/name' or 'owner/name:config'; check the path")
    else:
        rows = _hub_rows(source, split)
    for number, row in enumerate(rows):
        yield f"{source} row {number}", row


def _table(path: Path) -> Iterable[dict]:
    if path.suffix == ".csv":
        return csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _hub_rows(name: str, split: str) -> Iterable[dict]:
    import datasets

    name, _, config = name.partition(":")
    with explain(f"data {name!r}: no such local file, and the hub data set did not load",
                 "check the name"):
        splits = datasets.load_dataset(name, config or None)
    return splits[split if split in splits else next(iter(splits))]


def to_problem(where: str, row: dict, kind: str = "", needs_answer: bool = True) -> Problem:
    """Make a problem of a row, which `where` names in errors. kind: that of the whole file, or "":
    the row's own, or math. needs_answer=False: answers may be missing, a reward function judges."""
    own = row.get("kind")
    hints = [x for x in ("choices", "tests", "question_content") if row.get(x)]
    column = next((column for column in TEXT_COLUMNS if row.get(column)), "problem")
    text, turns = row.get(column), []
    try:
        if isinstance(text, list):  # chat messages; the last is the problem
            for turn in text:
                types = isinstance(turn, dict) and {type(turn.get(x)) for x in ("role", "content")}
                require(types == {str}, {column: turn}, column, "turns: texts as role and content")
            require(turn["role"] == "user", {column: turn}, column, "the user's turn at the end")
            turns, text = text[:-1], turn["content"]
        require(own in (None, kind or own) and own in (None, *KINDS), row, "kind",
                kind or "math, choice or code")
        require(own or kind or not hints, row, "kind", f"one beside {hints}, in the row or for the "
                "whole file (--kind, of held-out data --eval_kind)")
        require(isinstance(text, str) and text.strip(), row, "problem",
                f"a text, there or in 'prompt' or 'question' (found columns {sorted(row)})")
        kind = own or kind or "math"
        text, reference, options = CONVERT[kind](text, row, needs_answer)
        if row.get("unpublished"):  # then eval.py does not keep it
            options["unpublished"] = True
    except UsageError as why:
        raise UsageError(f"{where}: {why}") from None
    names = (row.get("id"), row.get("question_id"), where.rpartition("/")[2])
    identity = next(name for name in names if name is not None)
    return Problem(str(identity), text, reference, kind, options, turns)


def require(right: Any, row: dict, name: str, expected: str) -> None:
    if not right:
        raise UsageError(f"field {name!r}: expected {expected}, not {repr(row.get(name))[:80]}")


def math_problem(text: str, row: dict, needs_answer: bool) -> tuple[str, str, dict]:
    """Return text, answer and no options of a row with the usual columns."""
    given = {"answer": row.get("answer"), "final_answer": row.get("final_answer"),  # OlympiadBench
             "solution": extract_answer(row.get("solution"))}  # math-ai/aime24
    if isinstance(row.get("reward_model"), dict):
        given = {"reward_model.ground_truth": row["reward_model"].get("ground_truth")} | given
    answers = (answer_text(place, answer, needs_answer) for place, answer in given.items())
    answer = next(filter(None, answers), "")
    require(answer or not needs_answer, row, "answer",
            "a text, there or in 'reward_model.ground_truth', or a boxed 'solution'")
    if text.startswith(DAPO_PREFIX) and text.endswith(DAPO_SUFFIX):
        text = text[: -len(DAPO_SUFFIX)].partition("\n\n")[2]
    return text.strip(), answer, {}


def answer_text(place: str, answer: Any, graded: bool) -> str:
    """Return an answer as a text, "" if it says nothing; of several none can be graded."""
    answer = verify.only_item(answer)
    require(not (graded and isinstance(answer, list | dict)), {place: answer}, place, "one answer")
    text = "" if answer is None else str(answer).rpartition("#### ")[2].strip()  # as in GSM8K
    return text if text != "nan" and verify.grade_number(text, text) else ""


def choice_problem(text: str, row: dict, needs_answer: bool) -> tuple[str, str, dict]:
    """Return text, letter and options of a row with "choices", or with n_choices (4 if absent) in
    its text. The answer: a letter; of choices also an index from 0, or a text. A string is an index
    only if it is no choice's text; one choice's letter that is another's text is an error."""
    choices, answer = row.get("choices") or [], verify.only_item(row.get("answer"))
    require(isinstance(choices, list), row, "choices", "a list of texts")
    choices = ["" if choice is None else str(choice).strip() for choice in choices]
    n = len(choices) or row.get("n_choices") or 4
    require(n in range(2, 27) and "" not in choices, row, "choices" if choices else "n_choices",
            "2 to 26 options")
    letters, given = LETTERS[: int(n)], "" if answer is None else str(answer).strip()
    listed = list(zip(letters, choices, strict=bool(choices)))
    meant = {given} & {*letters} | {letter for letter, choice in listed if choice == given}
    if choices and (type(answer) is int or not meant):
        meant = {letter for i, letter in enumerate(letters) if str(i) == given}
    require(len(meant) == 1 or not (given or needs_answer), row, "answer",
            f"one letter of {letters}, or an index or a text of 'choices'")
    text = text.strip() + "\n" * bool(choices)
    text += "".join(f"\n{letter}) {choice}" for letter, choice in listed)
    return text, "".join(meant), dict(n_choices=len(letters))


def code_problem(text: str, row: dict, needs_answer: bool) -> tuple[str, dict, dict]:
    """Return text, tests and options of a LiveCodeBench row, or of one with "tests" in its form, a
    list, and the name of a "function" if they call one. Of tests over CHECKED_TESTS an error shows
    only when they are run, as the status bad_reference."""
    function, starter = row.get("function") or row.get("func_name"), row.get("starter_code")
    limit = row.get("time_limit")
    require(function is None or str(function).isidentifier(), row, "function", "a function's name")
    require(isinstance(starter, str | None), row, "starter_code", "a text")
    require(limit is None or (isinstance(limit, int | float) and 0 < limit <= 3600), row,
            "time_limit", "seconds, at most 3600")
    reference = {name: row[name] for name in TEST_FIELDS if row.get(name)}
    if row.get("tests"):
        reference = dict(public_test_cases=row["tests"], metadata=dict(func_name=function))
    size = sum(len(tests) for tests in reference.values() if isinstance(tests, str))
    try:
        if size <= CHECKED_TESTS and (reference or needs_answer):
            verify.read_tests(reference)
    except verify.BadReference as why:
        name = next((name for name in TEST_FIELDS if row.get(name)), "tests")
        require(False, row, name, f"tests like {{'input': text, 'output': text}} ({why})")
    task = "Read the input from standard input and write the output to standard output."
    if starter:
        task = f"Complete this starter code:\n```python\n{starter.rstrip()}\n```"
    elif function:
        task = f"Write a Python function `{function}`."
    options = {} if limit is None else dict(time_limit=limit)
    return f"{text.strip()}\n\n{task}", reference, options


CONVERT = dict(math=math_problem, choice=choice_problem, code=code_problem)


def load_problems(source: str, split: str = "train", rows: list | None = None,
                  **how: Any) -> list[Problem]:
    """Return a data set's problems, the first of each conversation (DAPO-Math-17k repeats each
    about 100 times). rows: those of read_rows to take; how: kind and needs_answer of to_problem."""
    problems: dict[str, Problem] = {}
    for n, (where, row) in enumerate(rows or read_rows(source, split), 1):  # noqa: B007
        problem = to_problem(where, row, **how)
        problems.setdefault(repr((problem.text, problem.turns)), problem)
    if not problems:
        raise UsageError(f"data {source!r}: no rows; give a file with at least one problem")
    if n > len(problems):
        say(f"{source}: {n - len(problems)} of {n} rows repeat a problem and were dropped")
    return list(problems.values())


def name_apart(problems: list[Problem]) -> list[Problem]:
    """Return the problems with distinct ids, under which `evaluate` files their samples."""
    if len({problem.id for problem in problems}) == len(problems):
        return problems
    return [dataclasses.replace(p, id=f"{p.id}#{i}") for i, p in enumerate(problems)]


def read_prompts(config: Config, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on, and the held-out ones."""
    form = (tokenizer, config.template, config.max_prompt_length)
    problems = load_problems(config.data, kind=config.kind, needs_answer=not config.reward)
    prompts = encode_prompts(problems, *form)
    problems = []
    for source in filter(None, config.eval_data.split(",")):
        problems += load_problems(source.strip(), "test", kind=config.eval_kind)
    held_out = encode_prompts(name_apart(problems), *form) if problems else []
    held_out = held_out[: config.eval_limit or None]
    if config.reward and held_out:
        say("held-out problems are judged by the built-in graders, not by --reward")
    judged = held_out + ([] if config.reward else prompts)
    if any(prompt.problem.kind == "code" for prompt in judged):
        say(verify.protections(config.unsafe_code))
    return prompts, held_out
