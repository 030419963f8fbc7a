r"""Tell whether a math answer is the gold one: the equality behind the math reward. A policy finds
whatever a grader pays for, so these are rules, and an answer that no rule understands is wrong.

    from shelf.answers import equal
    equal(r"\frac12", "0.5"), equal("2+3", "5")      # (True, False)

- The gold's own text is right, whether or not it can be parsed.
- A number wants a number: a gold that is written out (also in a list, tuple, set or interval) is
  met by a written number of equal value, never by a computation of it. Other expressions are met
  by equal ones, but what asks to be evaluated (a sum, a limit, 5!, \sin 60^\circ) counts only where
  the gold has it. 2 + 3 = 5 counts by its last side if all sides are equal.
- Words behind a number that change it or hedge are refused; units compare by name and size; any
  other word or two, or a missing unit, is forgiven.
- Order, brackets, names, primes and marks mean something.

`parse` makes a tree of a text that `latex.spell` has spelled; trees are compared part by part
(`match`), down to leaves (`same_leaf`): words, bases, units and numbers exactly, other expressions
by their values. `settle` is linear; `equal` may not return: run it in a process that can be killed.
"""

import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from shelf import latex
from shelf.latex import changes, expression, key, number, same_values, spell, split


class BadReference(ValueError):
    """The reference answer is empty: its fault, not the response's."""


# ---- units and words ----------------------------------------------------------------------------
# What may stand behind a value without changing it.

_UNITS = {}  # by name: what it is, in LaTeX
for _part in r"""
m meter metre = m; cm centimeter centimetre = m/100; mm millimeter millimetre = m/1000; km kilometer
kilometre = 1000m; in inch = 0.0254m; ft foot feet = 0.3048m; yd yard = 0.9144m; mi mile = 1609.344m
; l L liter litre = m^3/1000; ml mL cc milliliter millilitre = m^3/1000000; g gram = k/1000; kg kilo
kilogram = k; mg milligram = k/1000000; lb pound = 0.45359237k; oz ounce = 0.028349523125k; s sec
second = s; ms millisecond = s/1000; min minute = 60s; h hr hour = 3600s; day = 86400s; week =
604800s; gallon = 0.003785411784m^3; month = n; yr year = 12n; mph = 0.44704m/s; kph = 5m/(18s); Hz
hertz = 1/s; N newton = km/s^2; J joule = km^2/s^2; kJ = 1000km^2/s^2; W watt = km^2/s^3; kW
kilowatt = 1000km^2/s^3; kWh = 3600000km^2/s^2; V volt = v; A amp = a; mol mole = p; C celsius = c;
F fahrenheit = f; ° = \theta; rad radian = \rho; grad gradian = \sigma; unit = u; dollar USD = D;
cent = D/100; euro = U; gbp = L""".split(";"):
    _names, _size = _part.split("=")
    _UNITS |= dict.fromkeys(_names.split(), _size.strip())
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_NAME = re.compile(r"(?<!\\)\b[A-Za-z]+|°")
_CUT = re.compile(r"\s(?=[A-Za-z°])|(?<=\d)(?=[A-Za-z]{2})|(?=°|\\frac\{[A-Za-z])")


def _stem(word: str) -> str:
    """Return a word without case and plural; a unit's name as it stands in the table."""
    if word in _UNITS or len(word) == 1:
        return word
    word = word.lower()
    forms = (word, word[:-1], word[:-2]) if word.endswith("s") else (word,)
    return next((x for x in forms if x in _UNITS or changes(x)), word.removesuffix("s"))


def _unit(text: str) -> Any:
    """Return what a unit like m/s^{2}, square inches, kilometers per hour is, as an expression."""
    text = re.sub(r"\b(?:per|an)\b", "/", re.sub(r"(?<!\{)[.()-]", " ", text))
    text = re.sub(r"\b(square|sq|cubic|cu)\b *(\w+)", lambda m: f"{m[2]}^{{{_POWERS[m[1]]}}}", text)
    text = re.sub(r" (squared|cubed)\b", lambda m: f"^{{{_POWERS[m[1]]}}}", text)
    plain = re.fullmatch(r"(?:[A-Za-z° /{}]|\\cdot|\\frac|\^\{(?:-\d|[2-9])\})*", text)
    if not plain or not {*map(_stem, re.findall(_NAME, text))} <= _UNITS.keys():
        return None
    text = re.sub(_NAME, lambda m: f"({_UNITS[_stem(m[0])]})", text).strip()
    unit = expression("1" + text if text.startswith("/") else text)
    return None if unit is None else unit.doit()


def _words(text: str, known: frozenset | None) -> frozenset | None:
    """Return the words that a text is: of an answer at most two that are not in the gold (known;
    None: this is the gold), and none that changes a number."""
    if not re.fullmatch(r"(?:[^\W\d_]|[ .()-])+", text):
        return None
    words = [*map(_stem, re.findall(r"[^\W\d_]+", text))]
    stems = frozenset(words) - {"of", "the", "total"}
    new = frozenset() if known is None else stems - known
    if len({*words}) < len(words):  # million million
        return None
    plain = all(len(x) > 2 and x.isascii() and not changes(x) for x in new)
    return stems if plain and len(new) <= 2 else None


@lru_cache(4096)
def quantity(text: str, known: frozenset | None = None) -> tuple[str, Any]:
    r"""Return (value, unit or words or None) of 5 cm^{2}, 2\pi in, 12 apples, $5. known: the stems
    of the gold's words; None: this is the gold, whose words are right."""
    text = re.sub(r"^(-?)(dollars|euros|gbp) ?(.*)", r"\1\3 \2", text)  # $5
    for cut in _CUT.finditer(text):
        value, tail = text[: cut.start()], text[cut.end() :]
        amount = number(value.removesuffix("%"))
        variable = len(tail) == 1 and tail.isalpha() and amount is None and not known  # of 5x m
        if not value or _word(value) or variable or (tail[0] == "°" and _TRIG.search(value)):
            continue
        unit = _unit(tail)
        if unit is None and amount is not None:
            unit = _words(tail, known)
        if unit is not None:
            return value, unit
    return text, None


def _scale(gold: Any, answer: Any, texts: tuple[str, str]) -> Any:
    """Return by what the answer's value is to be multiplied; None if the units differ. A unit that
    is missing is forgiven; a bare angle is in radians if it has a pi, else in degrees."""
    if isinstance(gold, frozenset) or isinstance(answer, frozenset):
        g, a = gold or frozenset(), answer or frozenset()
        alike = isinstance(g, frozenset) and isinstance(a, frozenset) and (g <= a or a <= g)
        return 1 if alike and not any(map(changes, g ^ a)) else None
    if gold is not None and answer is not None:
        return answer / gold if (answer / gold).is_Rational else None
    unit, bare = (gold, texts[1]) if answer is None else (answer, texts[0])
    letters = {str(x) for x in unit.free_symbols} if unit is not None else set()
    angle = letters & {"theta", "rho", "sigma", "tau"}
    return None if angle and angle != {"rho" if r"\pi" in bare else "theta"} else 1


def _word(text: str) -> str:
    """Return the letters of a purely alphabetic text, without case if more than one; else ""."""
    text = re.sub(r"^(?:[Aa]n?|[Tt]he) (?=\w\w)|[\s{}.]|(?<=[A-Za-z])['-](?=[a-z])", "", text)
    return (text if len(text) == 1 else text.casefold()) if text.isalpha() else ""


# ---- structure ----------------------------------------------------------------------------------
# An answer is a tree of lists, sets, intervals, equations: trees are compared part by part, for a
# number has to be written out wherever it stands.


class Node(NamedTuple):
    """kind: "leaf", "set" (items in any order), "()" "[)" "matrix" "row" "ratio" ... (in order),
    "chain" (sides of 2 + 3 = 5), "region" (end points as items; value: a sympy set). name: x, of
    x = 5 and x > 5. equation: all of its text."""

    kind: str
    text: str = ""
    items: list = []
    name: str = ""
    equation: str = ""
    value: Any = None


_OR = frozenset({"or", r"\lor"})
_LIST = frozenset({",", ";", "and"}) | _OR
_EQUALS = frozenset({"=", r"\in", r"\approx"})
_RELATIONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!="}
_VARIABLE = re.compile(r"[A-Za-z](?:_\{\w+\})?|\\(?!pi|infty)[a-z]+|f\(x\)")
_TIME = re.compile(r"\d\d?(?::[0-5]\d)+")
_ALL_REALS = re.compile(
    r"(?:all|any|every)(?: the)? reals?(?: numbers?| values?)?(?: of)?(?: [a-z])?"
    r"(?:,? (?:except|other than|but not|excluding|without)(?: for)? (?:[a-z]=)?(.*))?"
)


@lru_cache(4096)
def parse(text: str) -> Node:
    """Return the tree of an answer, spelled before. Raises ValueError if there is none."""
    if not text:
        raise ValueError("an empty part")
    if number(quantity(text, frozenset())[0]) is not None:
        return Node("leaf", text)
    pieces = latex.PIECE.findall(text.strip())
    first, last = pieces[0], pieces[-1]
    enclosed = first in latex.PARTNERS and last in latex.CLOSING
    if enclosed or {first, last} <= {"[", "]"}:  # also ]0, 1[
        with suppress(ValueError):  # they are no partners
            return _bracketed(first, text[len(first) : text.rindex(last)].strip(), last)
    if reals := _ALL_REALS.fullmatch(text):
        return parse(r"\R\setminus" + reals[1] if reals[1] else r"\R")
    for marks, make in _STRUCTURES:
        parts, found = split(text, marks)
        if found and (node := make(parts, found, text)):
            return node
    if text.count(r"\pm") == 1:
        both = [text.replace(r"\pm", x).replace(r"\mp", y) for x, y in ("+-", "-+")]
        return Node("set", "", [parse(x.removeprefix("+").strip()) for x in both])
    return parse(r"(-\infty,\infty)") if text == r"\R" else Node("leaf", text)


def _bracketed(opening: str, inner: str, closing: str) -> Node:
    """Return the tree of a group, set, tuple, interval or matrix."""
    parts, marks = split(inner, _LIST)
    if opening == r"\begin":
        kind, _, rows = inner[1:].partition("}")
        rows = [row for row in split(rows, frozenset({r"\\"}))[0] if row]
        if kind == "list":
            return _listed(rows, ["and"], inner)
        cells = [split(row, frozenset("&"))[0] for row in rows]
        return Node(kind, "", [Node("row", "", [*map(parse, row)]) for row in cells])
    if opening == "{" or inner.startswith(r"\begin") or (opening + closing == "()" and not marks):
        return parse(inner)
    if opening != r"\{":
        brackets = opening.replace("]", "(") + closing.replace("[", ")")
        return Node(brackets, "", [*map(parse, split(inner, frozenset({",", ";"}))[0])])
    variable, *condition = split(inner, frozenset({":", "|"}))[0]
    if condition:  # {x | x > 5}
        node = parse(condition[0])
        if not node.name or node.name != re.sub(r"\\in ?\\R", "", variable).strip():
            raise ValueError("a set of what is not understood")
        return node._replace(name="")
    if inner == r"\emptyset" or any(part.startswith(r"\{") for part in parts):
        return Node("{}", "", [*map(parse, parts)])  # a set of sets
    return _listed(parts, marks, inner) if inner else Node("leaf", r"\emptyset")


def _listed(parts: list[str], marks: list[str], _: str) -> Node:
    r"""Return the tree of a list: 1 \pm 2 within it is two of its items, a set of one is that one,
    conditions on one variable are a region (joined, if they exclude each other behind a comma)."""
    spare = {i for i, mark in enumerate(marks) if i and not parts[i] and mark in ("and", "or")}
    items = [parse(part) for i, part in enumerate(parts) if i not in spare]  # 1, 2, and 3
    names = {item.name for item in items}
    any_of = bool(_OR & {*marks})
    if len(names) == 1 and "" not in names and any(x.kind == "region" for x in items):
        if "and" in marks and any_of:
            raise ValueError("and mixed with or")
        region = _region("Union" if any_of else "Intersection", items)
        if region.value.is_empty and "and" not in marks:
            region = _region("Union", items)
        return region._replace(name=names.pop())
    flat = []
    for item in items:
        flat += [x._replace(name=item.name) for x in item.items] if item.kind == "set" else [item]
    if flat[0].name.startswith("("):  # (x, y) = (1, 2), (2, 1)
        flat = [x._replace(name=flat[0].name) for x in flat]
    any_of = any_of and all(_word(x.text) for x in flat)  # I or II
    return flat[0] if len(flat) == 1 else Node("set", "or" if any_of else "", flat)


def _region(operation: str, nodes: list[Node]) -> Node:
    """Return the union, intersection or complement of intervals, points and sets of points."""
    import sympy

    values, ends = [], []
    for node in nodes:
        points = node.items or [node] * (node.kind == "leaf")
        ends += points
        numbers = [expression(point.text) for point in points]
        if node.kind == "region":
            values.append(node.value)
        elif None in numbers:
            raise ValueError("no set of numbers")
        elif node.kind in ("()", "[]", "(]", "[)") and len(points) == 2:
            ends_open = [bracket in "()" for bracket in node.kind]
            values.append(sympy.Interval(*(x.doit() for x in numbers), *ends_open))
        elif node.kind in ("leaf", "set"):
            values.append(sympy.FiniteSet(*(x.doit() for x in numbers)))
        else:
            raise ValueError("no set of numbers")
    return Node("region", "", ends, value=getattr(sympy, operation)(*values))


def _inequality(parts: list[str], marks: list[str], _: str) -> Node | None:
    r"""Return the region, named x, of x > 5, 1 \ge x > 0 or x \ne 3; None if there is none."""
    import sympy

    here = [i for i, part in enumerate(parts) if _VARIABLE.fullmatch(part)]
    if len(here) != 1 or (len(parts) == 3 and here != [1]) or len(parts) > 3:
        return None
    x = sympy.Symbol("x", real=True)
    sides = [x if i == here[0] else expression(part) for i, part in enumerate(parts)]
    if None in sides or len(set().union(*(side.free_symbols for side in sides))) > 1:
        raise ValueError("a bound is no number")
    relations = [sympy.Rel(sides[i].doit(), sides[i + 1].doit(), _RELATIONS[mark])
                 for i, mark in enumerate(marks)]
    ends = [Node("leaf", part) for part in parts if part != parts[here[0]]]
    value = sympy.And(*relations).as_set() & sympy.Reals
    return Node("region", "", ends, parts[here[0]], value=value)


def _is_name(text: str) -> bool:
    r"""Tell whether a text names a quantity (x, f(x), m+n, \angle ABC, Area), not computes one."""
    text = re.sub(r"\\(?:sin|cos|tan|cot|sec|csc|det) *\(?(\\[a-z]+|[A-Za-z])\)?", r"\1", text)
    text = re.sub(r"_\{[^{}]*\}|(?<=[A-Za-z])\([^()]*\)|\^\{-1\}|'", "", text)
    words = set(re.findall(r"[a-z]+", text.lower()))
    return bool(words) and not words & _NO_NAMES and not re.search(r"^-|\d|[\^!/]", text)


_COMPUTING = "any all pi infty pm mp neg sqrt exp gcd lcm lim sum lnot"
_NO_NAMES = latex.HEDGES - {"is"} | {*_COMPUTING.split()}


def _equation(parts: list[str], marks: list[str], text: str) -> Node:
    """Return the value of x = 5 with its name, or the chain of sides, without roundings of the
    side before. The last side is a value, even if it is a letter."""
    if re.fullmatch(r"\\approx ?-?\d*\.\d+", text):  # a decimal may say that it is rounded
        return parse(parts[1])
    first = next((i for i, x in enumerate(parts[:-1]) if not _is_name(x)), len(parts) - 1)
    kept = [parse(parts[first])]
    for exact, mark, side in zip(parts[first:], marks[first:], parts[first + 1 :], strict=False):
        if not _is_rounding(exact, side, mark == r"\approx"):
            kept.append(parse(side if mark != r"\approx" else ""))  # a rounding of nothing exact
    name = re.sub(r"[\s{}]", "", parts[0]) if first else ""
    value = kept[0] if len(kept) == 1 else Node("chain", "", kept)
    names = name[1:-1].split(",")
    if name[:1] == "(" and value.kind == "()" and len(names) == len(value.items):
        items = [x._replace(name=y) for x, y in zip(value.items, names, strict=True)]
        value = value._replace(items=items)
    return value._replace(name=name or value.name, equation=text)


def _is_rounding(exact: str, decimal: str, announced: bool) -> bool:
    """Tell whether a decimal is an exact number's rounding."""
    places = re.fullmatch(r"[+-]?[\d,]*\.?(\d*)", decimal)
    value = number(decimal)
    exact = expression(exact) if places and value is not None else None
    if exact is None or not (exact.is_number and exact.doit().is_real):
        return False
    gap = abs(exact.doit() - value).evalf()
    half = Fraction(1, 2 * 10 ** len(places[1]))
    return bool(gap <= half) and (announced or bool(gap > 0 and len(places[1]) >= 2))


_STRUCTURES = (  # the first that is found outside all brackets
    (_LIST, _listed),
    (_EQUALS, _equation),
    (frozenset(_RELATIONS), _inequality),
    (frozenset({r"\cup"}), lambda parts, *_: _region("Union", [*map(parse, parts)])),
    (frozenset({r"\setminus"}), lambda parts, *_: _region("Complement", [*map(parse, parts)])),
    (frozenset({":", "to"}), lambda parts, _, text: None if _TIME.fullmatch(text)
     else Node("ratio", "", [*map(parse, parts)])),
)  # fmt: skip


def match(gold: Node, answer: Node, computed: bool = False) -> bool:
    """Compare two trees; two names have to be equal, or y and f(x), or their equations are."""
    names = {gold.name, answer.name} - {""}
    chain = gold.kind == "chain"
    functions = "y" in names and all(re.fullmatch(r"y|[a-zA-Z]\([a-z]\)", x) for x in names)
    if (len(names) < 2 or functions) and not chain and _same_value(gold, answer, computed):
        return True
    written = not chain and (gold.kind != "leaf" or _is_literal(gold.text))
    if written or "=" not in gold.equation or "=" not in answer.equation or not (names or chain):
        return False
    sides = [[*map(expression, split(x.equation, _EQUALS)[0])] for x in (gold, answer)]
    if None in sides[0] + sides[1] or not len(sides[0]) == len(sides[1]) == 2:
        return False
    a, b = (left - right for left, right in sides)
    texts = gold.equation, answer.equation
    fine = _MARKS.findall(texts[0]) == _MARKS.findall(texts[1]) and _is_allowed(*zip(texts))
    return fine and same_values(a, b, factor=True)


def _same_value(gold: Node, answer: Node, computed: bool) -> bool:
    """Compare two trees, whatever their names. computed: a number may be computed."""
    kinds = {gold.kind, answer.kind}
    texts = [[x.text for x in node.items] for node in (gold, answer)]
    if answer.kind == "chain":
        *sides, last = answer.items
        return match(gold, last) and all(match(last, side, True) for side in sides)
    if kinds == {"leaf"}:
        return same_leaf(gold.text, answer.text, computed)
    if "region" in kinds and "leaf" not in kinds:
        same = _region("Union", [gold]).value == _region("Union", [answer]).value
        return same and _is_allowed(*texts)
    if len(gold.items) != len(answer.items) or gold.text != answer.text:
        return False
    if kinds == {"ratio"}:  # 3:9 = 1:3
        g, a = ([*map(expression, side)] for side in texts)
        fine = None not in g + a and not any(x.is_zero for x in g + a) and _is_allowed(*texts)
        return fine and all(same_values(x * a[0], y * g[0]) for x, y in zip(g, a, strict=True))
    names = [{x.name.partition("_")[0] for x in node.items} - {""} for node in (gold, answer)]
    by_name = bool(names[0]) != bool(names[1]) and max(map(len, names)) > 1  # p=4, q=9, and 4, 9
    if len(kinds) > 1 and not (kinds == {"()", "set"} and (by_name or all(names))):
        return False
    sides = [gold.items, answer.items]
    if by_name:
        sides = [sorted(side, key=lambda item: item.name.strip("\\")) for side in sides]
    if by_name or not kinds <= {"set", "{}", "()"} or (kinds == {"()"} and not all(names)):
        return all(match(x, y, computed) for x, y in zip(*sides, strict=True))
    unmatched = list(answer.items)  # any order, each item used once
    for item in gold.items:
        found = next((i for i, x in enumerate(unmatched) if match(item, x, computed)), None)
        if found is None:
            return False
        del unmatched[found]
    return True


# ---- leaves -------------------------------------------------------------------------------------
# Words, units, bases and numbers are compared exactly, other expressions by their values.

_OPERATORS = re.compile(  # what asks to be evaluated
    r"\\(?:sum|prod|i*int|oint|lim|max|min|gcd|lcm|lfloor|lceil|binom|det|sup|partial|mod|[lc]?dots|"
    r"sim|to|not|ne|[pm]m|mp|equiv|begin)(?![A-Za-z])|[!?]|(?=\|\\begin)"
    r"|\\frac\{(?=[^{}\\]*(?<![a-z])d[^{}]*\}\{[^{}\\]*(?<![a-z])d[a-z])"
)
_TRIG = re.compile(  # with its argument
    r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?:\^\{[^{}]*\})? ?"
    r"(\([^)]*|\{[^}]*|(?:(?!\\(?:arc|sin|cos|tan|cot|sec|csc))[^-+=,)])*)"
)
_MARKS = re.compile(  # what sympy would lose
    r"\w?'+|\w?\^\{[T*]\}|\\(?:overline|bar|hat|tilde|d?dot|vec|overrightarrow|(?:tri)?angle)"
    r"(?![A-Za-z])[^\\+=-]*|(?<![A-Za-z\\])\w\^\{-1\}\("
)
_IN_BASE = re.compile(  # 52_{8}, (52)_{8}, 52 base 8, 52 (base eight)
    r"[({]*(\d[\dA-Fa-f]*|[A-F]\d*(?=_\{1\d))[)}]*(?:_\{(?:base)?| ?\(?(?:in )?base)[ -]*(\w+)[})]*"
)
_BASES = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _is_literal(text: str) -> bool:
    """Tell whether a number, with or without unit, or infinity is written out."""
    text = quantity(text, frozenset())[0].removesuffix("%")
    value = number(text)
    divided = "/" in text or r"\frac" in text
    whole_fraction = value is not None and divided and value.denominator == 1
    return text.lstrip("+-") == r"\infty" or (value is not None and not whole_fraction)


def _operators(texts: list[str], constant: bool) -> set[str]:
    """Return what in expressions asks to be evaluated; constant: the gold has no variable."""
    found = set(_OPERATORS.findall(" ; ".join(texts)))
    arguments = [re.sub(r"\\(?:pi|frac|sqrt|cdot)", "", y) for x in texts for y in _TRIG.findall(x)]
    numeric = any(constant or not re.search(r"[a-df-hj-zA-Z]", x) for x in arguments)
    return found | ({"of a number"} if numeric else set())


def _is_allowed(gold: list[str], answer: list[str]) -> bool:
    """Tell whether the answer computes nothing that the gold does not; e^{i...} has cosines."""
    constant = not re.search(r"(?<![\\A-Za-z])[a-df-hj-zA-Z]", " ".join(gold))
    polar = {"of a number"} if re.search(r"e\^\{.*i", " ".join(gold)) else set()
    allowed, found = _operators(gold, constant) | polar, _operators(answer, constant)
    computed = [sum(not _is_literal(text) for text in texts) for texts in (gold, answer)]
    return found <= allowed and computed[1] <= computed[0]


def same_leaf(gold: str, answer: str, computed: bool = False) -> bool:
    """Compare words, bases and numbers, or expressions; a number is met by a number only, unless
    it may be computed."""
    words = _word(gold), _word(answer)
    bases = _in_base(gold), _in_base(answer)
    if key(gold) == key(answer) or all(words) or any(bases):
        return key(gold) == key(answer) or (words[0] == words[1] and bases[0] == bases[1])
    gold, unit = quantity(gold)
    answer, other = quantity(answer, unit if isinstance(unit, frozenset) else frozenset())
    scale = _scale(unit, other, (gold, answer))
    percent = (unit is not None and answer[-1] == "%") or (other is not None and gold[-1] == "%")
    g, a = number(gold.removesuffix("%")), number(answer.removesuffix("%"))
    if scale is None or percent:
        return False
    if g is not None and a is not None:
        return _same_number(gold, answer, g, a * Fraction(str(scale)))
    if not (computed or _is_allowed([gold], [answer])):
        return False
    wanted, target = expression(gold), expression(answer)
    if wanted is None or target is None or _MARKS.findall(gold) != _MARKS.findall(answer):
        return False
    return wanted == target * scale or same_values(wanted, target * scale)


def _in_base(text: str) -> tuple[str, str] | None:
    """Return the digits and the base of a number that has one."""
    found = _IN_BASE.fullmatch(text)
    base = found and (str(_BASES.index(found[2])) if found[2] in _BASES else found[2])
    return (found[1].lstrip("0").upper(), base) if found and base.isdecimal() else None


def _same_number(gold: str, answer: str, g: Fraction, a: Fraction) -> bool:
    """Compare two written numbers: a whole one is not met by a fraction, x% is x/100, and x where
    x is 1 or more."""
    if gold.endswith("%") != answer.endswith("%"):
        percent, plain = (g, a) if gold.endswith("%") else (a, g)
        return percent / 100 == plain or (percent == plain and abs(plain) >= 1)
    divided = (r"\frac" in answer or "/" in answer) and not (r"\frac" in gold or "/" in gold)
    return g == a and not (divided and number(answer.removesuffix("%")).denominator == 1)


# ---- verdicts -----------------------------------------------------------------------------------

_INTEGER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)")
_CHOICE = re.compile(  # (B) 12, but neither (B)+1 nor (B) or (C)
    r"[(\[]?([A-H])[)\].:]+ ?(?![+^_=/'!,|]|-|\\c[ua]p|.*(?:\b(?:or|not|and)\b|\\pm|\\lor))(.+)"
)


def settle(extracted: str, reference: str) -> bool | None:
    """Compare texts, and integers, in linear time; None where it takes more."""
    gold, answer = spell(reference), spell(extracted)
    if gold and key(gold) == key(answer):
        return True
    if len(gold + answer) < 2000 and _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return int(gold.replace(",", "")) == int(answer.replace(",", ""))
    return None


def equal(extracted: str, reference: str) -> bool:
    """Compare an answer with the gold one; raises BadReference, or ValueError where one of them
    means nothing. Runs where it can be killed: sympy may never return."""
    gold, answer = spell(reference), spell(extracted)
    if not gold:
        raise BadReference("empty")
    if key(gold) == key(answer):
        return True
    if max(len(gold), len(answer)) > latex.MAX_LENGTH:
        raise ValueError(f"longer than {latex.MAX_LENGTH:,} characters")
    if choice := _CHOICE.fullmatch(answer):
        letter, answer = gold.strip("()."), choice[2]
        if re.fullmatch("[A-Z]", letter):  # B, and (B) 12
            written = _is_literal(answer) or (expression(answer) is not None and not _word(answer))
            return letter == choice[1] and written and not re.match(r"\(?[A-H]\b", answer)
    return match(parse(gold), parse(answer))
