"""Answer extraction and graders for math, multiple choice and code; one engine for the training
reward and for the benchmarks. A grader never guesses and never raises.

    python verify.py FILE.jsonl [--workers N] [--timeout S]    # one JSON verdict a line on stdout

Rows: {"id", "kind": "math" | "choice" | "code", "response", "answer"}; for code "question" (a
LiveCodeBench row) in place of "answer". In Python: `grade(...)`, or a pool of workers, `Graders`.

The caller extracts the answer and settles the easy cases. A worker (this file with --worker) runs
sympy or compares program outputs, one task at a time; it is killed and replaced when late. For
code, each worker has a sandbox (sandbox.py), which never sees an expected output.
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
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, NamedTuple

from sandbox import Child, Sandbox, die_with_parent, set_limit

WORKER_MEMORY = 8 << 30  # bytes of address space for sympy, and for decoding tests
MAX_TESTS = 256 << 20  # bytes of decoded private tests
KINDS = ("math", "choice", "code")


@dataclass(frozen=True)
class Grade:
    """A verdict. status: ok (the verdict is sure), no_answer, timeout, error (of the grader) or
    bad_reference; all but ok are incorrect. detail says why a program failed."""

    correct: bool
    extracted: str | None
    status: str = "ok"
    detail: str = ""
    reward: float | None = None  # set by a reward function; None: 1 or 0 by correctness


class UsageError(ValueError):
    """Bad input: one sentence saying what, where and what to do; shown without a traceback."""


class BadReference(ValueError):
    """The reference answer cannot be used: its fault, not the response's."""


class _NeedsSympy(Exception):
    """Raised in the caller, with the extracted answer, where only a worker can decide."""


# ---- input --------------------------------------------------------------------------------------
# The project's one reader of JSON lines.


def read_jsonl(path: str, skip_broken: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE:LINE", row) for each line that is not blank; raises UsageError. skip_broken:
    broken lines (cut short by a kill) are left out, and a missing file is empty."""
    if skip_broken and not os.path.exists(path):
        return
    errors = "replace" if skip_broken else "strict"  # a cut may fall inside a character
    try:
        with open(path, encoding="utf-8", errors=errors, newline="\n") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                row = _parse_row(line, where, skip_broken) if line.strip() else None
                if row is not None:
                    yield where, row
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


# ---- extraction ---------------------------------------------------------------------------------
# Which part of a response is the answer: linear in its length, and never a guess.

_BOX_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
_ANSWER_LINE = re.compile(
    r"^[ \t>*_#-]*(?:(?:the|my|our)[ \t]+)?(?:(?:final|correct|best)[ \t]+)?answer[ \t*_]*:(.*)$",
    re.I | re.M,
)
_PROMPT_ECHO = re.compile(r"[\s*$\\\[(<{]*(?:LETTER|ANSWER)[\s*$\\\])>}.]*", re.I)


def extract_answer(text: str | None) -> str | None:
    r"""Return the content of the last complete \boxed{} or \fbox{}, or of the last "Answer: ..."
    line, whichever comes later, after the last </think>; None if there is neither. Linear time."""
    text = (text or "").rpartition("</think>")[2]
    start, answer, open_braces = -1, None, []
    first = min((i for i in map(text.find, ("\\boxed", "\\fbox")) if i >= 0), default=len(text))
    while text[first - 1 : first] == "\\":  # an escaped backslash is no opener
        first -= 1
    for token in _BOX_TOKEN.finditer(text, first):
        if token[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                start, answer = box[0], text[box[1] : token.start()]
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append((token.start(), token.end()))
    for line in _ANSWER_LINE.finditer(text):
        content = re.sub(r"\*\*|__|`", "", line[1]).strip()
        boxed = "\\boxed" in content or "\\fbox" in content
        if line.start() > start and content and not boxed and not _PROMPT_ECHO.fullmatch(content):
            answer = content
    return answer.strip() or None if answer is not None else None


def extract_code(text: str | None) -> str | None:
    """Return the last complete fenced block after the last </think>, without its common indent."""
    block, code, fence = [], None, ""
    for line in (text or "").rpartition("</think>")[2].split("\n"):
        mark = re.match(r"[ \t]*(`{3,}|~{3,})([^`]*)$", line)
        if mark and (not fence or mark[2].strip()):  # a new opening also ends an unclosed block
            block, fence, indent = [], mark[1], len(line) - len(line.lstrip(" \t"))
        elif mark and mark[1].startswith(fence):
            code, fence = "\n".join(block), ""
        elif fence:
            block.append(line[min(indent, len(line) - len(line.lstrip(" \t"))) :])
    return code if code and code.strip() else None


# ---- choice -------------------------------------------------------------------------------------
# One letter, in the caller: quick and safe.


def grade_choice(extracted: str, reference: Any, n_choices: int = 4) -> Grade:
    """Compare with the one capital letter, standing alone, that the answer names; two letters get
    no credit."""
    letters = [chr(ord("A") + i) for i in range(n_choices)]
    gold = str(reference).strip(" ().\n").upper()
    if gold not in letters:
        raise BadReference(f"{reference!r} is not one of the {n_choices} letters")
    plain = re.sub(r"\\[A-Za-z]+|[*$`]", " ", extracted)
    # Letters just past the options count as named too ("A or E" of four), save the pronoun I.
    known = {*letters, *"ABCDEFGHJ"}
    named = {x for x in re.findall(r"(?<![^\W_])[A-Z](?![^\W_])", plain) if x in known}
    if not named and re.fullmatch(r"[\s({\[]*[a-z][\s)}\].:]*", plain):
        named = set(re.findall(r"[a-z]", plain.upper(), re.I))
    if len(named) != 1:
        return Grade(False, extracted if named else None, "ok" if named else "no_answer")
    return Grade(named == {gold}, *named)


# ---- math: notation -----------------------------------------------------------------------------
# One spelling for everything, and the exact value of a plain number.

_ROW = "\ue000"  # stands for \\\\ while spacing commands are removed
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ",
    "°": r"^\circ ", "∅": r"\emptyset ", "²": "^2", "³": "^3", "\u00a0": " ", "\u2009": r"\,",
    "\u202f": r"\,", "\n": " ", "\t": " ", "≈": r"\approx ", "√": r"\sqrt ", "％": "%",
})  # fmt: skip
_ALIASES = {
    "boxed": "", "fbox": "", "displaystyle": "", "textstyle": "", "limits": "", "nolimits": "",
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "degree": r"^\circ ",
    "leq": r"\le ", "leqslant": r"\le ", "le": r"\le ", "lt": "<", "quad": " ", "qquad": " ",
    "geq": r"\ge ", "geqslant": r"\ge ", "ge": r"\ge ", "gt": ">", "lbrace": r"\{",
    "rbrace": r"\}", "varnothing": r"\emptyset ",
}  # fmt: skip
_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[bB]igg?[lrm]?(?![A-Za-z])|\\!", ""),
    (r"\\\$|\$|\\[()\[\]](?=$|[^A-Za-z])|\*\*", ""),
    (r"\\(?:text(?:rm|bf|it|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf)|operatorname)\*?\s*"
     r"\{([^{}]*)\}", r"\\text{\1}"),
    (r"(?<=\d)(?:\\[,;: ]|~|\{,\}|\{\\,\})(?=\d{3}(?!\d))", ""),
    (r"\\[,;: ]|~", " "),
    (r"(\\frac)\s+(?=[\d{])|(\\frac\d)\s+(?=[\d{])", r"\1\2"),
    (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))"
     r"|\s*\\text\{\s*degrees?\s*\}|(?<=[\d}])\s*degrees?\b", ""),
    (r"\\%|\s*\\text\{\s*(?:percent|%)\s*\}|\s*\bpercent\b", "%"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"(?<![\\A-Za-z])infinity\b", r"\\infty"),
    (r"(?<![\\A-Za-z])pi\b", r"\\pi"),
)]  # fmt: skip
_SCIENTIFIC = re.compile(r"(?:\\times|\\cdot|\*)10\^(?:\{([+-]?\d+)\}|(\d))$")
_LAST_FRAC = re.compile(r"\\frac(?:\{([^{}]*)\}|(\d))(?:\{([^{}]*)\}|(\d))$")
_DECIMAL = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)(?:\{(\d+)\}|(\d))")
_FRACTION = re.compile(r"([+-]?) *(?:(\d+) +)?([+-]?[\d.,]+)/([+-]?[\d.,]+)")


def clean_latex(text: str) -> str:
    """Give one spelling to what LaTeX can write in several ways; remove degrees and currency."""
    if "begin{" not in text:  # escaped once too often; in a matrix it ends a row
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = text.replace(r"\\", _ROW).translate(_UNICODE)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _ALIASES.get(m[1], m[0]), text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return re.sub(r"\s+", " ", text).strip()


def number(text: str) -> Fraction | None:
    """Return the exact value of 1,234  -0.5  3.2e5  0.1\\overline{6}  \\frac43  1\\frac12 ..., else
    None."""
    if len(text) > 2000:
        return None
    text = re.sub(r" *([-+\\/{}^*]|(?<=\\times)|(?<=\\cdot)) *", r"\1", text.strip())
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    text = _LAST_FRAC.sub(r" \1\2/\3\4", _SCIENTIFIC.sub(r"e\1\2", text)).strip()
    if (m := _DECIMAL.fullmatch(text)) and (m[2] or m[3]):
        digits, after = m[2].replace(",", "") + (m[3] or ""), len(m[3] or "")
        return Fraction(int(m[1] + digits)) * Fraction(10) ** (int(m[4] or 0) - after)
    if m := _REPEATING.fullmatch(text):
        head, tail = m[2] + m[3], m[4] or m[5]
        value = Fraction(int(head + tail) - int(head or 0), (10 ** len(tail) - 1) * 10 ** len(m[3]))
        return -value if m[1] == "-" else value
    if m := _FRACTION.fullmatch(text):
        whole, top, bottom = int(m[2] or 0), number(m[3]), number(m[4])
        if top is None or not bottom or (m[2] and not 0 < top < bottom):
            return None
        return (-1 if m[1] == "-" else 1) * (whole + top / bottom)
    return None


# ---- math: structure ----------------------------------------------------------------------------
# Lists, sets, intervals, equations: an answer is a tree, and trees are compared part by part.


class Node(NamedTuple):
    """Part of an answer. kind: a "leaf" (its text), "set" or "union" (items in any order), "()"
    "[)" "matrix" "row" ... (ordered items), or "eq" for x = 5 and 0 < x < 1 (one item, and the
    name x) and 2 + 3 = 5 (two). Only leaves reach sympy: it would forgive too much above them."""

    kind: str
    items: list
    text: str = ""
    name: str = ""


_LIST = re.compile(
    r"[,;]|\\text\{\s*,?\s*(?:or|and)\s*,?\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])"
)
_EQUALS = re.compile(r"(?<![!<>:\\])=|\\in(?![A-Za-z])")
_RELATION = re.compile(r"\\le |\\ge |[<>]")
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_PLUS_MINUS, _MINUS_PLUS = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?)(?:small)?matrix\}(.*)\\end\{\1(?:small)?matrix\}")
_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?|\\(?!pi(?![A-Za-z]))[a-z]+")
_HEDGES = frozenset(
    "or and not no never neither nor maybe perhaps possibly probably about approx approximately "
    "around roughly nearly almost over under at least most more less than plus minus if unless "
    "when but except either both to is are isn was wrong incorrect million thousand hundred "
    "billion trillion dozen half twice times mod modulo base squared cubed negative any all "
    "between greater fewer up remainder".split()
)
_UNITS = frozenset(  # without a plural's s
    "mm cm dm m km in inch inche ft foot feet yd yard mi mile mg g kg gram kilogram lb oz ml l "
    "liter litre s sec second min minute h hr hour day week month year mph kmh dollar cent unit sq "
    "square cubic meter metre centimeter kilometer people student way point egg apple book".split()
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt frac text arcsin arccos arctan sinh cosh tanh max min "
    "gcd lcm begin end matrix pmatrix bmatrix".split()
)


def _depths(text: str) -> list[int]:
    """Return how many brackets are open around each character; a bracket is outside itself."""
    depths, depth = [], 0
    for token in re.finditer(r"\\[A-Za-z]+|\\.|.", text, re.S):
        depth -= token[0][-1] in ")]}"
        depths += [depth] * len(token[0])
        depth += token[0][-1] in "([{"
    return depths


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Return the parts between the matches of `separator` that are outside all brackets."""
    depths = _depths(text)
    cuts = [m.span() for m in separator.finditer(text) if depths[m.start()] == 0]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def _surrounded(text: str) -> re.Match | None:
    """Match (opening)(content)(closing) if one pair of brackets spans the whole text."""
    around = re.fullmatch(r"(\\?[([{])(.*?)(\\?[)\]}])", text, re.S)
    outside = [i for i, depth in enumerate(_depths(text)) if depth == 0] if around else []
    pair = around and [*range(around.start(2)), *range(around.end(2), len(text))]
    return around if outside == pair else None


def parse_answer(text: str, depth: int = 0) -> Node:
    """Return the tree of an answer, cleaned before. Raises ValueError if nested too deeply."""
    text = re.sub(r"[.,;:]?\s*$", "", text.strip()) if depth == 0 else text.strip()
    if depth > 12 or not text:
        raise ValueError("nested too deeply" if text else "an empty part")

    def parse(parts: list[str]) -> list[Node]:
        return [parse_answer(part, depth + 1) for part in parts]

    if number(text) is not None:
        return Node("leaf", [], text)
    if matrix := _MATRIX.fullmatch(text):
        rows = [Node("row", parse(x.split("&"))) for x in matrix[2].split(_ROW) if x.strip()]
        return Node("det" if matrix[1] in ("v", "V") else "matrix", rows)
    if len(parts := _split(text, _LIST)) > 1:
        return _one_or_set(parse(parts))
    if around := _surrounded(text):
        opening, content, closing = around.groups()
        if opening == "{":
            return parse_answer(content, depth + 1)
        if opening == r"\{":
            if re.search(r":|\\mid|\|", content):  # set-builder notation
                return Node("leaf", [], text)
            return _one_or_set(parse(_split(content, _LIST)))
        parts = _split(content, re.compile("[,;]"))
        if len(parts) == 1 and opening == "(":
            return parse_answer(content, depth + 1)
        return Node(opening + closing, parse(parts))
    if len(parts := _split(text, _EQUALS)) > 1:
        named = [_is_name(part) for part in parts]
        name = re.sub(r"[\s{}]|\\text", "", parts[0]) if named == [True, False] else ""
        sides = zip(parse(parts), named, strict=True)
        return Node("eq", [side for side, is_name in sides if not is_name], text, name)
    if len(parts := _split(text, _RELATION)) in (2, 3):
        if interval := _interval(parts, _RELATION.findall(text)):
            return Node("eq", [interval], text, interval.name)
    if len(parts := _split(text, _UNION)) > 1:
        return Node("union", parse(parts))
    if len(_PLUS_MINUS.findall(text)) == 1:
        both = [_PLUS_MINUS.sub(p, _MINUS_PLUS.sub(m, text)) for p, m in ("+-", "-+")]
        return Node("set", [Node("leaf", [], x.strip(" +")) for x in both])
    return Node("leaf", [], text)


def _one_or_set(items: list[Node]) -> Node:
    """Flatten: 1 \\pm 2 within a list is two of its items; a set of one is that one."""
    flat = [x for item in items for x in (item.items if item.kind == "set" else [item])]
    return flat[0] if len(flat) == 1 else Node("set", flat)


def _is_name(text: str) -> bool:
    """Tell whether a text names a quantity (x, f(x), m+n, \\angle ABC, Area), not computes one."""
    arguments = r"_\{[^{}]*\}|_\w|(?<=[A-Za-z])\([^()]*\)|\^\{-1\}|\\text(?=\{)"
    text = re.sub(arguments, "", text.strip())
    words = set(re.findall(r"[a-z]+", text.lower()))
    computed = {"pi", "infty", "pm", "mp"} | _HEDGES | (_FUNCTIONS - {"frac", "max", "min"})
    return bool(words) and not words & computed and not re.search(r"^-|\d|\^", text)


def _interval(parts: list[str], relations: list[str]) -> Node | None:
    """Return the interval, named x, of x > 5 or 1 \\ge x > 0; None if no variable is bounded."""
    down, strict = [x in (">", r"\ge ") for x in relations], [x in "<>" for x in relations]
    if len(set(down)) != 1 or len(relations) != len(parts) - 1:
        return None
    if down[0]:
        parts, strict = parts[::-1], strict[::-1]
    if len(parts) == 2 and _VARIABLE.fullmatch(parts[0]):
        parts, strict = [r"-\infty", *parts], [True, *strict]
    elif len(parts) == 2:
        parts, strict = [*parts, r"\infty"], [*strict, True]
    if not _VARIABLE.fullmatch(parts[1]):
        return None
    brackets = ("(" if strict[0] else "[") + (")" if strict[1] else "]")
    return Node(brackets, [Node("leaf", [], x) for x in parts[::2]], name=parts[1])


def match(gold: Node, answer: Node) -> bool:
    """Compare two trees."""
    if gold.kind == "eq" != answer.kind:
        return bool(gold.name) and match(gold.items[0], answer)
    if gold.kind == "eq":
        value = gold.items[0] if gold.name else None
        if value and answer.name in ("", gold.name) and _all_match(value, answer.items):
            return True
        plain = value and (value.kind != "leaf" or number(value.text) is not None)
        return not plain and same_leaf(gold.text, answer.text)  # y = 2x and 2x - y = 0
    if answer.kind == "eq":  # every side has to be the answer: 2 + 3 = 5 is 5, 4 = 5 is not
        return _all_match(gold, answer.items)
    if gold.kind == "leaf" == answer.kind:
        return same_leaf(gold.text, answer.text)
    if gold.kind != answer.kind or len(gold.items) != len(answer.items):
        return False
    if gold.kind not in ("set", "union"):
        return all(map(match, gold.items, answer.items))
    unmatched = list(answer.items)  # any order, each item used once
    for item in gold.items:
        found = next((i for i, x in enumerate(unmatched) if match(item, x)), None)
        if found is None:
            return False
        del unmatched[found]
    return True


def _all_match(gold: Node, sides: list[Node]) -> bool:
    return bool(sides) and all(match(gold, side) for side in sides)


# ---- math: leaves -------------------------------------------------------------------------------
# Words, units, bases and numbers are compared here, exactly; other expressions by math-verify.

_REFUSED = re.compile(
    r"\d{200}|\^\s*[{(]*\s*[+-]?\d+\s*\)?\s*\^|\^\s*[{(]?\s*[+-]?\d{6}|\d{5}\s*\)?!|!\s*!\s*!"
)
_DOUBTS = re.compile(r"\\(?:n?eq?|not|approx|sim|[lc]?dots|to|pm|mp|[bp]?mod)(?![A-Za-z])")
_UNIT = re.compile(
    r"(.*[\d)}\]])\s*(?:\\text\{\s*([A-Za-z][A-Za-z .]*?)\s*\}|(?<=[\d ])([A-Za-z][A-Za-z ]+))"
    r"\s*(?:\^\s*\{?([23])\}?)?"
)
_IN_BASE = re.compile(r"[\dA-Fa-f]+\s*_\s*(?:\d|\{\s*\d+\s*\})")


def _refused(text: str) -> bool:
    """Tell whether a text is too long, too deeply nested or has too large numbers for sympy."""
    if not text or len(text) > 2000 or text.count("^") > 100 or _REFUSED.search(text):
        return True
    return max(_depths(text)) >= 50


def _unit(text: str, trusted: bool) -> tuple[str, str]:
    """Return (value, unit) of "5 \\text{ cm}^2"; an answer's bare words must be known units."""
    m = _UNIT.fullmatch(text)
    words = (m[2] or m[3]).lower().replace(".", "").split() if m else []
    plain = m and m[2] and (trusted or not _HEDGES & set(words) and len(words) <= 4)
    if not words or not plain and not {x.rstrip("s") or x for x in words} <= _UNITS:
        return text, ""
    return m[1].strip(), " ".join(word.rstrip("s") for word in words) + (m[4] or "")


def _word(text: str) -> str:
    """Return the letters of a purely alphabetic text, without case if more than one; else ""."""
    text = re.sub(r"\\text|[{}\s.']|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})", "", text)
    return (text if len(text) == 1 else text.casefold()) if text.isalpha() else ""


def _rounds_to(exact: Fraction, decimal: str, text: str) -> bool:
    """Tell whether `decimal`, of six places or more, is the rounding of `text`, like 1/3."""
    places = re.fullmatch(r"[+-]?\d*\.(\d{6,})", decimal)
    is_fraction = "/" in text or "\\" in text
    return bool(places) and is_fraction and round(exact, len(places[1])) == number(decimal)


def same_leaf(gold: str, answer: str) -> bool:
    """Settle text, bases and numbers here, exactly; the rest is left to math-verify."""
    words = _word(gold), _word(answer)
    if all(words) or any(len(word) > 1 for word in words):
        return words[0] == words[1]
    (gold, gold_unit), (answer, unit) = _unit(gold, True), _unit(answer, False)
    if unit and gold_unit and unit != gold_unit:
        return False
    if _IN_BASE.fullmatch(gold) or _IN_BASE.fullmatch(answer):
        plain = [re.sub(r"[\s{}]", "", x).lstrip("0").upper() for x in (gold, answer)]
        return plain[0] == plain[1]
    g, a = number(gold.removesuffix("%")), number(answer.removesuffix("%"))
    if g is not None and a is not None:
        percents = gold.endswith("%"), answer.endswith("%")
        if percents == (True, False) and g / 100 == a or percents == (False, True) and g == a / 100:
            return True
        return g == a or _rounds_to(g, answer, gold) or _rounds_to(a, gold, answer)
    if _refused(answer) or any(word not in gold for word in _DOUBTS.findall(answer)):
        return False
    words = {w.lower() for w in re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", answer)} - _FUNCTIONS
    words -= {w.lower() for w in re.findall(r"[A-Za-z]{2,}", gold)}
    if any(w in _HEDGES or len(w) > 3 for w in words) or re.search(r"\d \d", answer):
        return False
    return symbolic_equal(gold, answer)


@lru_cache(4096)
def _sympy_parse(latex: str) -> tuple:
    """Return what math-verify makes of \\boxed{latex}; its alarm-based timeout is off."""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig()]
    boxed = r"\boxed{" + latex + "}"
    return tuple(parse(boxed, config, fallback_mode="no_fallback", parsing_timeout=None))


def symbolic_equal(gold: str, answer: str) -> bool:
    """Return math-verify's verdict on two leaves. Runs in a worker: it may never return."""
    from math_verify import verify

    target, wanted = _sympy_parse(answer), _sympy_parse(gold)
    names = [set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", x))) for x in (gold, answer)]
    if not target or names[0] != names[1] and (
        {x.lower() for x in names[0]} == {x.lower() for x in names[1]}
    ):  # the library takes x and X for the same
        return False
    for decimal, exact in ((number(answer), wanted), (number(gold), target)):
        if decimal is not None and "." in gold + answer:  # it would round 10^{-7} to 0.0
            try:
                return bool(abs((exact[0] - decimal).evalf(20)) <= abs(decimal) / 10**6)
            except (TypeError, AttributeError):  # a set, an equation, a free variable
                return False
    return verify(list(wanted), list(target), timeout_seconds=None)


def _leaves(tree: Node) -> list[str]:
    """Return all texts that comparing with this tree may hand to sympy."""
    if tree.kind == "leaf" or (tree.kind == "eq" and not tree.name):
        return [tree.text]
    return [text for item in tree.items for text in _leaves(item)]


@lru_cache(4096)
def parse_reference(reference: str) -> Node:
    """Return the tree of a gold answer. Raises BadReference if it is empty, unbalanced or too
    long, or if a leaf of it means nothing to the library."""
    text = clean_latex(reference) if len(reference) <= 2000 else ""
    if not text or sum(map(text.count, "([{")) != sum(map(text.count, ")]}")):
        raise BadReference("empty, unbalanced or longer than 2,000 characters")
    try:
        tree = parse_answer(text)
    except ValueError as why:
        raise BadReference(str(why)) from None
    for text in _leaves(tree):
        value = _unit(text, True)[0]
        if not _word(text) and number(value.removesuffix("%")) is None:
            if _refused(value) or not _sympy_parse(value):
                raise BadReference(f"cannot be parsed: {text[:80]!r}")
    return tree


def grade_number(extracted: str, reference: str) -> Grade | None:
    """Settle two equal numbers, or two different integers; None where it takes more."""
    if max(len(extracted), len(reference)) > 2000:
        return None
    gold, answer = number(clean_latex(reference)), number(clean_latex(extracted))
    if gold is None or answer is None:
        return None
    both_whole = gold.denominator == answer.denominator == 1
    return Grade(gold == answer, extracted) if gold == answer or both_whole else None


def grade_math(extracted: str, reference: str) -> Grade:
    """Compare a boxed answer with the gold one."""
    gold = parse_reference(reference)
    if extracted == reference:
        return Grade(True, extracted)
    if len(extracted) > 2000:
        return Grade(False, extracted, detail="longer than 2,000 characters")
    try:
        answer = parse_answer(clean_latex(extracted))
    except ValueError as refused:
        return Grade(False, extracted, detail=str(refused))
    return Grade(match(gold, answer), extracted)


# ---- code: tests and their comparison, in the worker --------------------------------------------
# A row's tests are decoded without trusting them; outputs are compared where no program runs.


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
        fields = [row.get(x) or "[]" for x in ("public_test_cases", "private_test_cases")]
        fields.append(row.get("metadata") or "{}")
        public, private, metadata = (_decode(x) if isinstance(x, str) else x for x in fields)
        tests = [dict(test) for test in public + private]
        func_name = metadata.get("func_name")
        for test in tests:
            kind = test.setdefault("testtype", "functional" if func_name else "stdin")
            test["input"].encode(), test["output"].encode()
            if kind == "functional":
                [json.loads(line) for line in test["input"].splitlines() if line.strip()]
                json.loads(test["output"])
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


def _same_json(output: str, expected: str) -> bool:
    try:
        return json.loads(output) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def grade_code(
    code: str, row: Any, time_limit: float, sandbox: Sandbox, alive: Callable[[], Any]
) -> Grade:
    """Run all tests, stopping at the first that fails. time_limit: seconds of wall time per test.
    The sandbox gets the code and the input; outputs are compared here. Unlike in LiveCodeBench's
    harness programs are real processes: all ways to read stdin work, a non-zero exit fails."""
    tests, func_name = read_tests(row)
    for index, test in enumerate(tests, 1):
        alive()
        functional = test["testtype"] == "functional"
        function = func_name if functional else None
        status, output = sandbox.run(code, test["input"], function, time_limit)
        if status != "ok":
            verdict = status if status in ("timeout", "error") else "ok"
            return Grade(False, code, verdict, f"test {index} of {len(tests)}: {output}"[:200])
        if not (_same_json if functional else same_output)(output, test["output"]):
            return Grade(False, code, "ok", f"test {index} of {len(tests)}: wrong output")
    return Grade(True, code)


# ---- a worker -----------------------------------------------------------------------------------
# The process that may hang or die instead of the caller.


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
            reply = (grade.correct, grade.status, grade.detail)
            os.write(replies, json.dumps(reply).encode() + b"\n")


# ---- the pool -----------------------------------------------------------------------------------
# Starts, asks and replaces workers; the interface for other programs.


class Graders:
    """A pool of persistent worker processes, started when first needed, one task each at a time;
    a late worker is killed and replaced. `timeout`: seconds for a math answer or a code test (a
    code row's time_limit wins). Thread-safe. `counts` holds how often each status occurred."""

    def __init__(self, workers: int | None = None, timeout: float = 10.0):
        self.workers = workers or min(16, len(os.sched_getaffinity(0)))
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

    def grade(self, items: Iterable[tuple], progress: bool = False) -> list[Grade]:
        """Grade (kind, response, reference[, options]) tuples, keeping their order."""
        futures = [self.submit(*item[:3], **(item[3] if item[3:] else {})) for item in items]
        if progress:
            from tqdm import tqdm

            futures = tqdm(futures, desc="grading")
        return [future.result() for future in futures]

    def _quick(self, kind: str, response: str | None, reference: Any, options: dict) -> Grade:
        """Settle in this process what is safe and quick; raises _NeedsSympy(extracted) else."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: expected math, choice or code")
        extract = extract_code if kind == "code" else extract_answer
        extracted = extract(response if isinstance(response, str) else None)
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
        time_limit, patience = options.get("time_limit", min(6.0, self.timeout)), self.timeout
        if kind == "code":
            patience += time_limit + 20
        else:
            reference = str(reference)
        worker = self._take_idle()
        try:
            if worker is None or worker.poll() is not None:
                worker = Child([sys.executable, os.path.abspath(__file__), "--worker"])
            task = (kind, extracted, reference, time_limit)
            correct, status, detail = worker.ask(task, patience)
            self._idle.append(worker)
            return self._count(Grade(correct, extracted, status, detail))
        except Exception as why:
            if worker is not None:
                worker.close()
            status = "timeout" if isinstance(why, TimeoutError) else "error"
            return self._count(Grade(False, extracted, status, f"worker: {why}"[:200]))

    def _take_idle(self) -> Child | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _count(self, grade: Grade) -> Grade:
        with self._lock:
            self.counts[grade.status] += 1
        return grade

    def close(self, patience: float = 0) -> None:
        """End the workers; tasks not yet started are cancelled. Idle workers get `patience` seconds
        to leave by themselves: of those that are killed, the system forgets some CPU time."""
        while patience and (worker := self._take_idle()):
            worker.close(patience)
        self._threads.shutdown(cancel_futures=True)  # workers die with the thread that started them
        while worker := self._take_idle():
            worker.close()

    def __enter__(self) -> "Graders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@lru_cache(1)
def _default_graders() -> Graders:
    graders = Graders(workers=1)
    atexit.register(graders.close)
    return graders


def grade(kind: str, response: str | None, reference: Any, **options: Any) -> Grade:
    """Grade one response (options: n_choices for choice, time_limit for code). Never raises on any
    response; what may not return runs in a worker that is killed."""
    return _default_graders().submit(kind, response, reference, **options).result()


def protections() -> str:
    """Return one line that says which protections a program runs with on this machine."""
    with Sandbox() as sandbox:
        return f"sandbox: {sandbox.protections}"


# ---- command line -------------------------------------------------------------------------------
# Check all rows, then grade them in order.


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


def _check_row(where: str, row: dict) -> dict:
    """Return the row; raises UsageError at a field that is missing or of the wrong kind."""
    unused = "answer" if row.get("kind") == "code" else "question"
    for field, (is_right, expected) in _FIELDS.items():
        if field not in row and field not in (unused, *_OPTIONS):
            raise UsageError(f"{where}: field {field!r}: missing")
        if field in row and field != unused and not is_right(row[field]):
            got = repr(row[field])[:50]
            raise UsageError(f"{where}: field {field!r}: expected {expected}, not {got}")
    return row


def main() -> None:
    """Grade the rows of the command line's file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="rows to grade, one JSON object a line")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 16)")
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="seconds for a math answer, and for a code "
        "test whose row has no time_limit (then 6 at most); default 10",
    )  # fmt: skip
    args = parser.parse_args()
    if args.timeout <= 0 or (args.workers is not None and args.workers < 1):
        parser.error("--timeout and --workers must be positive")
    try:
        rows = [_check_row(where, row) for where, row in read_jsonl(args.file)]
    except UsageError as why:
        sys.exit(f"verify.py: {why}")
    if any(row["kind"] == "code" for row in rows):
        print(protections(), file=sys.stderr)
    started, correct = time.monotonic(), 0
    with Graders(args.workers, args.timeout) as graders:
        futures = []
        for row in rows:
            options = {x: row[x] for x in _OPTIONS if x in row}
            reference = row["question" if row["kind"] == "code" else "answer"]
            futures.append(graders.submit(row["kind"], row["response"], reference, **options))
        for row, future in zip(rows, futures, strict=True):
            verdict = future.result()
            correct += verdict.correct
            fields = {"id": row["id"], **asdict(verdict)}
            del fields["reward"]  # for reward functions only
            print(json.dumps(fields), flush=True)
        counts = ", ".join(f"{n} {status}" for status, n in graders.counts.most_common())
    seconds = time.monotonic() - started
    print(f"{correct} of {len(rows)} correct ({counts}) in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker_main()
    else:
        main()
