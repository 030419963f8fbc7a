"""Answer extraction and graders for math, multiple choice and code; one engine for the training
reward and for the benchmarks. A grader never guesses and never raises.

    python verify.py FILE.jsonl [--workers N] [--timeout S]    # one JSON verdict a line on stdout

Rows: {"id", "kind": "math" | "choice" | "code", "response", "answer"}; for code "question" (a
LiveCodeBench row) in place of "answer". In Python: `grade(...)`, or a pool of workers, `Graders`.

The caller settles the easy cases. A worker (this file with --worker) runs sympy, or for code has a
sandbox (shelf/sandbox.py), which never sees an expected output; late, it is killed and replaced.
"""

import argparse
import atexit
import base64
import io
import json
import os
import pickle
import re
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from functools import lru_cache, partial
from typing import Any

from shelf import answers
from shelf.answers import BadReference
from shelf.ranks import UsageError, explain
from shelf.sandbox import Child, Sandbox, die_with_parent, set_limit

WORKER_MEMORY = 8 << 30  # bytes of address space for sympy, and for decoding tests
MAX_TESTS = 256 << 20  # bytes of decoded private tests
KINDS = ("math", "choice", "code")


@dataclass(frozen=True)
class Grade:
    """A verdict. status: ok (the verdict is sure), no_answer, timeout, error (of the grader) or
    bad_reference; all but ok are incorrect. detail says why a program failed."""

    correct: bool | None  # None: a reward function did not say
    extracted: str | None
    status: str = "ok"
    detail: str = ""
    reward: float | None = None  # set by a reward function; None: 1 or 0 by correctness
    parts: dict[str, float] = field(default_factory=dict)  # what the reward is made of


class _NeedsSympy(Exception):
    """Raised in the caller, with the extracted answer, where only a worker can decide."""


# ---- input: the project's one reader of JSON lines -----------------------------------------------


def read_json(path: Any) -> dict:
    """Return the object in a file of our own; raises UsageError where it was cut or damaged."""
    with (explain(f"{path}: damaged or unreadable", "restore it, or give another"),
          open(path, encoding="utf-8") as file):
        return dict(json.load(file))


def read_jsonl(path: str, skip_broken: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE:LINE", row) for each line that is not blank; raises UsageError. skip_broken:
    broken lines (cut short by a kill) are left out, and a missing file is empty."""
    if skip_broken and not os.path.exists(path):
        return
    errors = "replace" if skip_broken else "strict"  # a cut may fall inside a character
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline="\n") as file:
            for number, line in enumerate(file, 1):
                row = _parse_row(line, f"{path}:{number}", skip_broken) if line.strip() else None
                if row is not None:
                    yield f"{path}:{number}", row
    except (OSError, UnicodeDecodeError) as why:
        raise UsageError(f"{path}: cannot be read: {why}") from None


def _parse_row(line: str, where: str, skip_broken: bool) -> dict | None:
    """Return the line's object; None if it is broken and such lines are left out."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as why:
        if skip_broken:
            return None
        raise UsageError(f"{where}: broken JSON: {why}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a JSON object is expected, one per line")
    return row


def only_item(reference: Any) -> Any:
    """Return a reference; of a list, or a JSON text of one ('["12"]'), its only item."""
    with suppress(AttributeError, TypeError, ValueError, RecursionError):
        text = reference if '"' in reference else reference.replace("'", '"')  # as Python writes it
        inside = json.loads(text)  # of several numbers it is an interval
        reference = inside if '"' in text or len(inside) == 1 else reference
    alone = isinstance(reference, list) and len(reference) < 2
    return next(iter(reference), None) if alone else reference


# ---- extraction: which part of a response is the answer; linear in its length --------------------

_BOX_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
_ANSWER_LINE = re.compile(r"^[ \t>*_#-]*(?:(?:the|my|our)[ \t]+)?(?:(?:final|correct|best)[ \t]+)?"
                          r"answer[ \t*_]*:(.*)$", re.I | re.M)
_PROMPT_ECHO = re.compile(r"[\s*$\\\[(<{]*(?:LETTER|ANSWER)[\s*$\\\])>}.]*", re.I)


def _after_thinking(text: str | None) -> str:
    """Return what follows the last </think>; nothing if a <think> is never closed."""
    text = text.rpartition("</think>")[2] if isinstance(text, str) else ""
    return "" if "<think>" in text else text


def extract_answer(text: str | None) -> str | None:
    r"""Return the content of the last complete \boxed{} or \fbox{}, or of the last "Answer: ..."
    line, whichever comes later, after the last </think>; None if there is neither. Linear time."""
    text = _after_thinking(text)
    start, answer, open_braces = -1, "", []
    first = min(i for i in (text.find("\\boxed"), text.find("\\fbox"), len(text)) if i >= 0)
    while text[first - 1 : first] == "\\":  # an escaped backslash is no opener
        first -= 1
    for token in _BOX_TOKEN.finditer(text, first):
        if token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opener = open_braces.pop()
            if opener[0] != "{":  # of a box
                start, answer = opener.start(), text[opener.end() : token.start()]
    for line in _ANSWER_LINE.finditer(text):
        content = re.sub(r"\*\*|__|`", "", line[1]).strip()
        boxed = "\\boxed" in content or "\\fbox" in content
        if line.start() > start and content and not boxed and not _PROMPT_ECHO.fullmatch(content):
            answer = content
    return answer.strip() or None


def extract_code(text: str | None) -> str | None:
    """Return the last complete fenced block after the last </think>, without its common indent."""
    block, code, fence = [], "", ""
    for line in _after_thinking(text).split("\n"):
        mark = re.match(r"[ \t]*(`{3,}|~{3,})([^`]*)$", line)
        if mark and (not fence or mark[2].strip()):  # a new opening also ends an unclosed block
            block, fence, indent = [], mark[1], len(line) - len(line.lstrip(" \t"))
        elif mark and mark[1].startswith(fence):
            code, fence = "\n".join(block), ""
        elif fence:
            block.append(line[min(indent, len(line) - len(line.lstrip(" \t"))) :])
    return code if code.strip() else None


# ---- choice -------------------------------------------------------------------------------------

_NEGATION = re.compile(  # before the letter
    r"\b(?:not?|non|never|neither|nor|but|except|excluding|other|without|unlike|wrong|incorrect|false"
    r"|rules? out|eliminat\w+|exclud\w+|cannot|\w+n['’]t)\b|[~¬!≠-]\s*[({\[]*$", re.I)
_DENIAL = re.compile(  # behind it, but not in the words of its option: "B) not enough is known"
    r"\s*not\b|[\s)\]]*(?:\?|(?:\w+ )?(?:or|is|was|does|can|could) ?n[o'’]?t\b|cannot\b|excluded"
    r"|(?:(?:is|was|seems|looks) )?(?:wrong|incorrect|false|impossible|excluded|out)\b)", re.I)


def grade_choice(extracted: str, reference: Any, n_choices: int = 4) -> Grade:
    """Compare with the one capital letter, standing alone, that the answer names; two letters get
    no credit, and a negation names none."""
    letters = [chr(ord("A") + i) for i in range(n_choices)]
    gold = str(reference).strip(" ().\n").upper()
    if gold not in letters:
        raise BadReference(f"{reference!r} is not one of the {n_choices} letters")
    plain = re.sub(r"\\(?:l?n?not|neg?|x?cancel|overline|sout)\b", " not ", extracted)
    plain = re.sub(r"\\[A-Za-z]+|[*$`]", " ", plain)
    # Letters just past the options count as named too ("A or E" of four), save the pronoun I.
    known = {*letters, *"ABCDEFGHJ"}
    places = [x for x in re.finditer(r"(?<![^\W_])[A-Z](?![^\W_])", plain) if x[0] in known]
    if not places and re.fullmatch(r"[\s({\[]*[a-z][\s)}\].:]*", plain):
        plain = plain.upper()
        places = [*re.finditer("[A-Z]", plain)]
    named = {place[0] for place in places}
    if places and _NEGATION.search(plain, 0, places[0].start()):
        named = set()
    if len(named) != 1 or any(_DENIAL.match(plain, place.end()) for place in places):
        return Grade(False, extracted if named else None, "ok" if named else "no_answer")
    return Grade(named == {gold}, *named)


# ---- math: texts and integers in the caller, all else in a worker, for sympy may never return ----


def grade_number(extracted: str, reference: str) -> Grade | None:
    """Settle equal texts, and two integers, in linear time; None where it takes more."""
    verdict = answers.settle(extracted, reference)
    return None if verdict is None else Grade(verdict, extracted)


def grade_math(extracted: str, reference: str) -> Grade:
    """Compare a boxed answer with the gold one; raises BadReference."""
    try:
        return Grade(answers.equal(extracted, reference), extracted)
    except BadReference:
        raise
    except ValueError as why:  # the answer means nothing
        return Grade(False, extracted, detail=str(why))


# ---- code: tests, decoded without trusting them; outputs, compared where no program runs ---------


class _NoGlobals(pickle.Unpickler):
    """Plain data needs no globals; a pickle that asks for one wants to run something."""

    def find_class(self, module: str, name: str) -> Any:
        raise BadReference(f"the pickled tests ask for {module}.{name}")


@lru_cache(12)  # the responses to one problem come together
def _decode(text: str) -> Any:
    """Decode LiveCodeBench's encodings: JSON, or base64 of zlib of pickle of JSON."""
    if text.lstrip().startswith(("[", "{")):
        return json.loads(text)
    inflate = zlib.decompressobj()
    data = inflate.decompress(base64.b64decode(text, validate=True), MAX_TESTS)
    if not inflate.eof:
        raise BadReference(f"they are cut off or over {MAX_TESTS >> 20} MiB")
    return json.loads(_NoGlobals(io.BytesIO(data)).load())


def read_tests(row: Any) -> tuple[list[dict], str | None]:
    """Return a LiveCodeBench row's public and private tests, checked, and metadata.func_name."""
    try:
        empty = dict(public_test_cases="[]", private_test_cases="[]", metadata="{}")
        fields = [row.get(name) or value for name, value in empty.items()]
        public, private, metadata = (_decode(x) if isinstance(x, str) else x for x in fields)
        tests = [dict(test) for test in public + private]
        func_name = metadata.get("func_name")
        for test in tests:
            kind = test.setdefault("testtype", "functional" if func_name else "stdin")
            test["input"].encode(), test["output"].encode()
            if kind == "functional":
                [_json_value(line) for line in test["input"].split("\n") if line.strip()]
                _json_value(test["output"])
            if kind not in ("stdin", "functional") or (kind == "functional" and not func_name):
                raise BadReference(f"test type {kind!r} with func_name {func_name!r}")
    except Exception as why:
        raise BadReference(f"tests: {type(why).__name__}: {why}"[:200]) from None
    if not tests:
        raise BadReference("the row has no tests")
    return tests, func_name


def same_output(output: str, expected: str) -> bool:
    """Compare stripped texts: as many lines, each equal as text or as a list of decimals."""
    got, want = output.strip().split("\n"), expected.strip().split("\n")
    return len(got) == len(want) and all(map(_same_line, got, want))


def _same_line(got: str, want: str) -> bool:
    got, want = got.strip(), want.strip()
    if got == want:
        return True
    try:
        return "_" not in got and [*map(Decimal, got.split())] == [*map(Decimal, want.split())]
    except InvalidOperation:
        return False


# Decimal takes integers of any length, in linear time; NaN and Infinity equal themselves alone.
_json_value = partial(json.loads, parse_int=Decimal, parse_constant=lambda name: (name,))


def _same_json(output: str, expected: str) -> bool:
    try:
        return _same_value(_json_value(output), _json_value(expected))
    except (ValueError, RecursionError):
        return False


def _same_value(got: Any, want: Any) -> bool:
    """Compare as JSON: 1 and 1.0 are one number, but unlike in Python 1 is not true."""
    if isinstance(want, list) and isinstance(got, list):
        return len(got) == len(want) and all(map(_same_value, got, want))
    if isinstance(want, dict) and isinstance(got, dict):
        return got.keys() == want.keys() and all(_same_value(got[x], want[x]) for x in want)
    return got == want and isinstance(got, bool) == isinstance(want, bool)


def grade_code(code: str, row: Any, time_limit: float, sandbox: Sandbox, alive: Callable) -> Grade:
    """Run all tests, stopping at the first that fails. time_limit: seconds of wall time per test.
    Unlike in LiveCodeBench's harness programs are real processes: all ways to read stdin work, a
    non-zero exit fails; results of functions compare as JSON with its types, not by ==."""
    tests, func_name = read_tests(row)
    for index, test in enumerate(tests, 1):
        alive()
        function = func_name if test["testtype"] == "functional" else None
        same = _same_json if function else same_output
        status, output = sandbox.run(code, test["input"], function, time_limit)
        if status != "ok":
            verdict = status if status in ("timeout", "error") else "ok"
            return Grade(False, code, verdict, f"test {index} of {len(tests)}: {output}"[:200])
        if not same(output, test["output"]):
            return Grade(False, code, "ok", f"test {index} of {len(tests)}: wrong output")
    return Grade(True, code)


# ---- a worker: the process that may hang or die instead of the caller ----------------------------


def _verdict(grader: Callable[..., Grade], extracted: str, *more: Any) -> Grade:
    """Call a grader; bad golds and failures become statuses."""
    try:
        return grader(extracted, *more)
    except BadReference as why:
        return Grade(False, extracted, "bad_reference", str(why))
    except Exception as why:  # a verdict of any kind is worth more than a dead training run
        return Grade(False, extracted, "error", f"{type(why).__name__}: {why}"[:200])


def worker_main() -> None:
    """Serve tasks, one JSON line each, until standard input ends."""
    die_with_parent()
    set_limit("AS", WORKER_MEMORY)
    requests, replies = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # nothing a library prints may look like a reply
    import math_verify  # noqa: F401  (the slow import, before the clock of the first task starts)

    os.write(replies, b'"ready"\n')
    alive = partial(os.write, replies, b"\n")
    with Sandbox() as sandbox:
        for line in requests:
            kind, extracted, reference, time_limit = json.loads(line)
            if kind == "math":
                grade = _verdict(grade_math, extracted, reference)
            else:
                grade = _verdict(grade_code, extracted, reference, time_limit, sandbox, alive)
            reply = dict(correct=grade.correct, status=grade.status, detail=grade.detail)
            os.write(replies, json.dumps(reply).encode() + b"\n")


# ---- the pool: the interface for other programs --------------------------------------------------


class Graders(AbstractContextManager):
    """A pool of persistent worker processes, started when first needed. `timeout`: seconds for a
    math answer or a code test (a code row's time_limit wins). Thread-safe. `counts` holds how often
    each status occurred."""

    def __init__(self, workers: int | None = None, timeout: float = 10.0):
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = workers or min(16, max(1, cores))  # the ranks of a machine share its cores
        self.timeout = timeout
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.workers, "grader")
        self._idle: list[Child] = []

    def submit(self, kind: str, response: str | None, reference: Any, **options: Any) -> Future:
        """Return a future of the Grade; easy cases are settled at once, without a worker."""
        future: Future[Grade] = Future()
        try:
            future.set_result(self._count(self._quick(kind, response, reference, options)))
            return future
        except _NeedsSympy as needed:
            return self._threads.submit(self._run, kind, *needed.args, reference, options)

    def grade(self, items: Iterable[tuple]) -> list[Grade]:
        """Grade (kind, response, reference[, options]) tuples, keeping their order."""
        futures = [self.submit(*item[:3], **dict(*item[3:])) for item in items]
        return [future.result() for future in futures]

    def _quick(self, kind: str, response: str | None, reference: Any, options: dict) -> Grade:
        """Settle in this process what is safe and quick; raises _NeedsSympy(extracted) else."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: expected math, choice or code")
        extract = extract_code if kind == "code" else extract_answer
        extracted = extract(response)
        if extracted is None:
            empty = not reference or not str(reference).strip()
            return Grade(False, None, "bad_reference" if empty else "no_answer")
        if kind == "choice":
            n_choices = options.get("n_choices", 4)
            return _verdict(grade_choice, extracted, str(reference), n_choices)
        if kind == "math" and (grade := grade_number(extracted, str(reference))):
            return grade
        raise _NeedsSympy(extracted)

    def _run(self, kind: str, extracted: str, reference: Any, options: dict) -> Grade:
        time_limit = options.get("time_limit", min(6.0, self.timeout))
        patience = self.timeout + (time_limit + 20 if kind == "code" else 0)
        task = (kind, extracted, reference if kind == "code" else str(reference), time_limit)
        worker = self._take_idle()
        try:
            if worker is None or worker.poll() is not None:
                worker = Child([sys.executable, os.path.abspath(__file__), "--worker"])
            verdict = Grade(extracted=extracted, **worker.ask(task, patience))
            self._idle.append(worker)
        except Exception as why:
            if worker is not None:
                worker.close()
            status = "timeout" if isinstance(why, TimeoutError) else "error"
            verdict = Grade(False, extracted, status, f"worker: {why}"[:200])
        return self._count(verdict)

    def _take_idle(self) -> Child | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _count(self, grade: Grade) -> Grade:
        with self._lock:
            self.counts[grade.status] += 1
        return grade

    def close(self) -> None:
        """End the workers; tasks not yet started are cancelled."""
        self._threads.shutdown(cancel_futures=True)  # workers die with the thread that started them
        while worker := self._take_idle():
            worker.close()

    def __exit__(self, *_: object) -> None:
        self.close()


@lru_cache(1)
def _default_graders() -> Graders:
    graders = Graders(workers=1)
    atexit.register(graders.close)
    return graders


def grade(kind: str, response: str | None, reference: Any, **options: Any) -> Grade:
    """Grade one response, in a worker that is killed when late. options: n_choices, time_limit."""
    return _default_graders().submit(kind, response, reference, **options).result()


def protections(unsafe_code: bool = True) -> str:
    """Return one line that says which protections a program runs with on this machine; raises
    UsageError where they do not keep it from the user's files, unless `unsafe_code`."""
    with Sandbox() as sandbox:
        if not (unsafe_code or sandbox.contained):
            raise UsageError("programs could change your files here, for the sandbox has neither "
                             "Landlock nor a user id of its own: run as root in a container, or "
                             "give --unsafe_code")
        return f"sandbox: {sandbox.protections}"


# ---- command line -------------------------------------------------------------------------------


_FIELDS = {  # of a row: (is this value right?, what is expected)
    "id": (lambda x: True, "anything"),
    "kind": (lambda x: x in KINDS, "math, choice or code"),
    "response": (lambda x: isinstance(x, str | None), "text or null"),
    "answer": (lambda x: isinstance(x, str | int | float), "text"),
    "question": (lambda x: isinstance(x, dict), "a LiveCodeBench row (an object)"),
    "n_choices": (lambda x: isinstance(x, int) and 1 <= x <= 26, "a number from 1 to 26"),
    "time_limit": (lambda x: isinstance(x, int | float) and 0 < x <= 3600,
                   "seconds, more than 0 and at most 3600"),
}  # fmt: skip
_OPTIONS = ("n_choices", "time_limit")  # the fields that may be absent


def _read_row(where: str, row: dict) -> tuple:
    """Return (id, kind, response, reference, options) of a row; UsageError names a wrong field."""
    reference = "question" if row.get("kind") == "code" else "answer"
    for name in ("id", "kind", "response", reference, *_OPTIONS):
        is_right, expected = _FIELDS[name]
        if name not in row and name not in _OPTIONS:
            raise UsageError(f"{where}: field {name!r}: missing")
        if name in row and not is_right(row[name]):
            got = repr(row[name])[:50]
            raise UsageError(f"{where}: field {name!r}: expected {expected}, not {got}")
    options = {name: row[name] for name in _OPTIONS if name in row}
    return row["id"], row["kind"], row["response"], only_item(row[reference]), options


def main() -> None:
    """Grade the rows of the command line's file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="rows to grade, one JSON object a line")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 16)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for a math answer, or "
                        "for a code test without a time_limit (then 6 at most); default 10")
    args = parser.parse_args()
    if args.timeout <= 0 or (args.workers is not None and args.workers < 1):
        parser.error("--timeout and --workers must be positive")
    try:
        rows = [_read_row(where, row) for where, row in read_jsonl(args.file)]
    except UsageError as why:
        sys.exit(f"verify.py: {why}")
    if any(kind == "code" for _, kind, *_ in rows):
        print(protections(), file=sys.stderr)
    started, correct = time.monotonic(), 0
    with Graders(args.workers, args.timeout) as graders:
        futures = [graders.submit(*task, **options) for _, *task, options in rows]
        for (identity, *_), future in zip(rows, futures, strict=True):
            verdict = asdict(future.result())
            correct += verdict["correct"]
            del verdict["reward"], verdict["parts"]  # for reward functions only
            print(json.dumps({"id": identity} | verdict), flush=True)
        counts = ", ".join(f"{n} {status}" for status, n in graders.counts.most_common())
    seconds = time.monotonic() - started
    print(f"{correct} of {len(rows)} correct ({counts}) in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker_main()
    else:
        main()
