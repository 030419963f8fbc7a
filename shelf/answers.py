r"""Tell whether a math answer is the gold one: the equality behind the math reward. A policy finds
whatever a grader pays for, so these are rules, and an answer that no rule understands is wrong.

    from shelf.answers import equal
    equal(r"\frac12", "0.5"), equal("2+3", "5")      # (True, False)

- A number wants a number: a gold that is written out (also in a list, tuple, set or interval) is
  met by a written number of equal value, never by a computation of it. Other expressions are met by
  equal ones, but sums, limits, maxima, factorials ... count only where the gold has them.
- 2 + 3 = 5 counts by its last side if all sides are equal; a rounding may stand behind.
- Words after a number change it, unless they are a unit, a plain noun, or in the gold. Units
  compare by their dimensions and sizes; one that is missing is forgiven.
- Order, brackets, names, primes and marks mean something.

An answer becomes a tree of parts (`parse_answer`), compared part by part (`match`), down to leaves
(`same_leaf`): words, bases, units and numbers exactly, other expressions by their values at three
points, after math-verify's converter from LaTeX to sympy. That may take forever: run it in a
process that can be killed, as verify.py does.
"""

import calendar
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple


class BadReference(ValueError):
    """The reference answer cannot be used: its fault, not the response's."""


# ---- notation -----------------------------------------------------------------------------------
# One spelling for everything, and the exact value of a number that is written out.

_ROW = "\ue000"  # stands for \\\\ while spacing commands are removed
_GAP = "\ue001"  # stands for a wide space, which never groups digits
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ",
    "∈": r"\in ", "∖": r"\setminus ", "°": r"^\circ ", "∅": r"\emptyset ", "≈": r"\approx ",
    "≡": r"\equiv ", "∨": r"\lor ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "√": r"\sqrt ",
    "′": "'", "’": "'", "％": "%", "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\n": _GAP,
    "\t": " ", "⁄": "/", "¢": r"\text{ cents}",
})  # fmt: skip
_ALIASES = {
    "boxed": "", "fbox": "", "displaystyle": "", "textstyle": "", "limits": "", "nolimits": "",
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "degree": r"^\circ ", "neq": r"\ne ",
    "leq": r"\le ", "leqslant": r"\le ", "le": r"\le ", "lt": "<", "quad": _GAP, "qquad": _GAP,
    "geq": r"\ge ", "geqslant": r"\ge ", "ge": r"\ge ", "gt": ">", "lbrace": r"\{", "euro": "€",
    "rbrace": r"\}", "varnothing": r"\emptyset ", "langle": "(", "rangle": ")", "pounds": "£",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "colon": ":", "vee": r"\lor ",
    "dbinom": r"\binom", "tbinom": r"\binom", "R": r"\mathbb{R}", "Z": r"\mathbb{Z}",
    "smallsetminus": r"\setminus ", "backslash": r"\setminus ", "prime": "'", "percent": "%",
    "top": "T", "intercal": "T", "imath": "i", "pmod": r"\mod", "bmod": r"\mod",
}  # fmt: skip
_DEGREES = r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\bdeg(?:rees?)?\b)\s*"
_BRACED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_FUNCTIONS = (
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp max min gcd lcm"
)
_BASES = "zero one two three four five six seven eight nine ten eleven twelve".split()
_REAL = r"(?:all|every|any)(?: the)? reals?(?: numbers?| values?(?: of)?)?(?: [a-z](?![a-z]))?"
_EXCEPT = r"(?:-|\\setminus|(?i:except|other than|but not|excluding|without)(?: for| when)?)"
_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    # currency, brackets and fonts
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[bB]igg?[lrm]?(?![A-Za-z])|\\!\s*", ""),
    (r"\\phantom\{[^{}\d]*\}", ""),
    (r"^\*\*(.*)\*\*$", r"\1"), (r"\*\*", "^"),
    (_ROW + r"\s*\[[-\d.]+\s*[a-z]+\]", _ROW),
    (r"(?:(?<!\d)\\\$|^\$(?!.*\$))\s*([-\d.,{}]*\d)(?!\d)", r"\1 \\text{dollars}"),
    (r"(?<!\d)€\s*([-\d.,{}]*\d)|(?<=\d)\s*€(?!\d)", r"\1 \\text{euros}"),
    (r"(?<!\d)£\s*([-\d.,{}]*\d)|(?<=\d)\s*£(?!\d)", r"\1 \\text{gbp}"),
    (r"\\\$|\$", " "), (r"\\[()\[\]](?=$|[^A-Za-z])", ""),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"(^|[-+=(,])\s*\{([\d.]+)\}(?!\{)", r"\1\2"),
    (r"\\(?:text(?:rm|bf|it|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf)|bm|operatorname)\*?\s*"
     + _BRACED, r"\\text{\1}"),
    (r"(?<![\\A-Za-z])(?:\\text\{\s*)?(" + _FUNCTIONS.replace(" ", "|") + r")\s*\}?(?=\s*[({_])",
     r"\\\1 "),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|log|ln)(?=\s*[\\\d]|\s[a-z](?![a-z]))", r"\\\1 "),
    (r"\\text\{\s*([dei\d])\s*\}", r"\1"),
    (r"\\text(?!\{\s*[A-Za-z]\s*\})" + _BRACED, r" \1 "),  # words are plain: with and without \text
    # digits in groups, spaces
    (r"(?<=\d)(?:\\[,;: ]|~|\{,\}|\{\\,\}|')(?=\d{3}(?!\d))", ""),
    (r"(?:\\[,;: ]|~|\s)+", " "),
    (r"(?<![\w.,])\d{1,3}(?: \d{3})+(?!\d)", lambda m: m[0].replace(" ", "")),
    (_GAP + r"|\\[hv]space\*?\{[^{}]*\}", " "),
    (r"(?:[=<>{]|\\[lg]e )\s*-?\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    # degrees and percent
    (r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({]?\s*)(-?\d+)" + _DEGREES,
     r"\1 \\frac{\2\\pi}{180} "),
    (_DEGREES + r"(?:\\text\{)?C(?:elsius)?\b\}?", r" \\text{celsius}"),
    (_DEGREES + r"(?:\\text\{)?F(?:ahrenheit)?\b\}?", r" \\text{fahrenheit}"),
    (_DEGREES, r" \\text{deg} "),
    (r"\\%|\s*\bper ?cent(?:age)?\b", "%"),
    # relations, sets, marks
    (r"<=|=<", r"\\le "), (r">=|=>", r"\\ge "), (r"!=", r"\\ne "),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"(?<![\\A-Za-z])(?:infinity|inf)\b", r"\\infty"),
    (r"(^|[(\[,])\s*\+\s*\\infty", r"\1\\infty"),
    (r"(?<![\\A-Za-z])pi\b", r"\\pi"),
    (r"(?<![\\A-Za-z])(?i:" + _REAL + ")", r"\\mathbb{R}"),
    (r"(\\mathbb\{R\}),?\s*" + _EXCEPT + r"\s*(?:[a-z]\s*(?:\\ne|=)\s*)?", r"\1\\setminus "),
    (r"\]([^\[\](),]+,[^\[\](),]+)(?=[\[\]])", r"(\1"),  # ]0, 1[
    (r"([(\[][^\[\](),]+,[^\[\](),]+)\[", r"\1)"),
    (r"\^\s*\{?\s*(?:\\text\{T\}|T)\s*\}?(?![A-Za-z])", "^{T}"),
    (r"\^\s*\{?\s*('+)\s*\}?", r"\1"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}|^([^{}]*)\\over(?![A-Za-z])([^{}]*)$",
     r"\\frac{\1\3}{\2\4}"),
    # bases in words
    (r"(?i:\s*(?:\(|_\s*\{)?\s*\b(?:in\s+)?base[\s-]*|(?<=\d)\s*_\s*\{?\s*)("
     + "|".join(_BASES[2:]) + r"|\d+)\s*[)}]?",
     lambda m: f"_{{{_BASES.index(m[1]) if m[1] in _BASES else m[1]}}}"),
    (r",?\s*\bonly\s*$", ""),
)]  # fmt: skip
_ARGUMENT = r"\s*(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|[^\s\\{}^_]|\\[A-Za-z]+(?:\{[^{}]*\})*)"
_FRAC = re.compile(r"\\frac" + _ARGUMENT + _ARGUMENT)
_ROOT = re.compile(r"(\\sqrt\s*(?:\[[^\[\]]*\])?|(?<!\\)[\^_])(?!\s*[{\[])" + _ARGUMENT)


def _spell(match: re.Match) -> str:
    """Write ½ as a fraction, x⁻² and x₁ with ^ and _."""
    plain = unicodedata.normalize("NFKC", match[0])
    if "\u2044" in plain:  # the fraction slash
        return " \\frac{" + plain.replace("\u2044", "}{") + "}"
    return f"{'_' if '₀' <= match[0] <= '₉' else '^'}{{{plain}}}"


def _group(text: str) -> str:
    return text if text.startswith("{") else "{" + text + "}"


@lru_cache(4096)
def clean_latex(text: str) -> str:
    """Give one spelling to what LaTeX can write in several ways."""
    if "begin{" not in text:  # escaped once too often; in a matrix it ends a row
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = re.sub(r"[^\S\n]+", " ", text.strip("\u200b\ufeff"))  # many spaces would be slow below
    text = re.sub("[½⅓⅔¼¾⅕-⅞]|[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+|[₀-₉]+", _spell, text)
    text = re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", text)
    text = text.replace(r"\\", _ROW).translate(_UNICODE)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _ALIASES.get(m[1], m[0]), text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _ROOT.sub(lambda m: m[1] + _group(m[2]), text)
    text = _FRAC.sub(lambda m: r"\frac" + _group(m[1]) + _group(m[2]), text)
    return re.sub(r"\s+", " ", text).strip()


_DECIMAL = re.compile(
    r"([+-]?)(\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\.\d{3}){2,}(?![\d.])|\d*)"
    r"(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{?(\d+)\}?(?:\\l?dots)?")
_FRACTION = re.compile(
    r"([+-]?)(?:(\d+) ?)?\\frac\{([+-]?[\d,]+)\}\{([+-]?[\d,]+)\}"
    r"|([+-]?)(?:(\d+) )?([\d,]+)/([+-]?[\d,]+)"
)


def number(text: str) -> Fraction | None:
    """Return the exact value of a number that is written out, cleaned before: 1,234  -0.5  3.2e5
    0.1\\overline{6}  \\frac{4}{3}  1 1/2  3.2 \\times 10^{5}; else None."""
    if len(text) > 2000:
        return None
    text = re.sub(r" *([-+\\/{}^*]|(?<=\\times)|(?<=\\cdot)) *", r"\1", text.strip())
    while re.fullmatch(r"\{[^{}]*\}|\([^(),]*\)", text):
        text = text[1:-1].strip()
    text = re.sub(r"(?:\\times|\\cdot|\*)10\^\{([+-]?\d+)\}$", r"e\1", text)
    if (m := _DECIMAL.fullmatch(text)) and (m[2] or m[3]):
        digits, after = re.sub("[.,]", "", m[2]) + (m[3] or ""), len(m[3] or "")
        return Fraction(int(m[1] + digits)) * Fraction(10) ** (int(m[4] or 0) - after)
    if m := _REPEATING.fullmatch(text):
        head, tail = m[2] + m[3], m[4]
        value = Fraction(int(head + tail) - int(head or 0), (10 ** len(tail) - 1) * 10 ** len(m[3]))
        return -value if m[1] == "-" else value
    if m := _FRACTION.fullmatch(text):
        sign, whole, top, bottom = m.groups()[:4] if m[3] else m.groups()[4:]
        top, bottom = number(top), number(bottom)
        if top is None or not bottom or (whole and not 0 < top < bottom):
            return None
        return (-1 if sign == "-" else 1) * (int(whole or 0) + top / bottom)
    return None


# ---- units and words ----------------------------------------------------------------------------
# What may stand behind a value without changing it.

_UNITS = {}  # by name: size, and dimensions as a list of letters
for _line in """
m meter metre = 1 m; cm centimeter centimetre = .01 m; mm millimeter millimetre = .001 m; km
kilometer kilometre = 1000 m; in inch = .0254 m; ft foot feet = .3048 m; yd yard = .9144 m; mi
mile = 1609.344 m; acre = 4046.8564224 m m; hectare = 10000 m m; l L liter litre = .001 m m m; ml
cc milliliter millilitre = .000001 m m m; gal gallon = .003785411784 m m m; g gram gm = .001 kg;
kg kilogram kilo = 1 kg; mg milligram = .000001 kg; lb pound = .45359237 kg; oz ounce =
.028349523125 kg; ton tonne = 1000 kg; s sec second = 1 s; ms millisecond = .001 s; min minute =
60 s; h hr hour = 3600 s; day = 86400 s; wk week = 604800 s; mo month = 1 mo; yr year = 12 mo;
decade = 120 mo; century = 1200 mo; pint = .000473176473 m m m; quart = .000946352946 m m m; kj =
1000 kg m m /s /s; mph = .44704 m /s; kph kmh kmph = 5/18 m /s; hz hertz = 1 /s; N newton = 1 kg m
/s /s; J joule = 1 kg m m /s /s; W watt = 1 kg m m /s /s /s; kw kilowatt = 1000 kg m m /s /s /s;
kwh = 3600000 kg m m /s /s; pa pascal = 1 kg /m /s /s; V volt = 1 v; A amp ampere = 1 a; ohm = 1
ohm; mol mole = 1 mol; kelvin = 1 kelvin; celsius = 1 celsius; fahrenheit = 1 fahrenheit; deg
degree = 1 deg; rad radian = 1 rad; unit = 1 unit; dollar usd = 1 dollar; cent = .01 dollar; euro
eur = 1 euro; gbp = 1 gbp; rupee rs = 1 rupee; yen = 1 yen; yuan = 1 yuan
""".replace("\n", " ").split(";"):
    _names, _size = _line.split("=")
    _UNITS |= dict.fromkeys(_names.split(), (Fraction(_size.split()[0]), _size.split()[1:]))
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_NOUNS = frozenset(
    "people person child children men man women woman kid boy girl student teacher friend guest "
    "customer worker player team member family adult group class point piece page book story word "
    "letter line row column item thing object box bag pack basket bucket jar can bottle cup glass "
    "slice loaf cookie cake cupcake pizza pie sandwich apple orange banana lemon peach pear plum "
    "cherry grape berry strawberry potato carrot onion egg candy chip nut marble ball balloon toy "
    "game card sticker stamp coin penny nickel dime ticket pencil pen crayon notebook sheet shirt "
    "shoe sock hat dress button bead ring gift flower rose plant tree leaf seed stick branch "
    "animal dog cat puppy kitten bird chicken duck cow pig horse goat sheep rabbit fish bee ant "
    "bug spider fly car truck bus bike train plane boat ship wheel seat table chair desk bed room "
    "window house home building floor shelf store farm city town state country street road trip "
    "lap race step stop vote question problem answer solution way method path arrangement "
    "combination permutation set subset element number integer digit value root factor divisor "
    "multiple prime term function triple tuple sequence case outcome choice possibility side edge "
    "vertex vertice face angle triangle square rectangle circle polygon cube block tile brick "
    "stone rock star candle battery phone computer picture photo song movie video episode lesson "
    "test grade mark goal win loss match round turn move roll flip head tail dice shift job task "
    "report email message call visit leg pet employee lollipop serving shell fruit petal hole copy "
    "tomato passenger calorie meal recipe batch share handshake committee route diagonal region "
    "revolution rotation mouse mice tooth teeth goose geese".split()
)
_PLURALS = frozenset("people children men women sheep fish dice mice teeth geese".split())
_ADJECTIVES = frozenset(
    "of the in total different distinct possible real positive integer whole red blue green yellow "
    "black white such ordered valid".split()
)
_CHANGES = frozenset(  # words that may be in a gold, and make another number of the one before
    "million billion trillion thousand hundred dozen score half third quarter fourth fifth tenth "
    "hundredth thousandth percent plus minus times less more over squared cubed base mod".split()
)


class Unit(NamedTuple):
    """What follows a value: a physical unit (its size and dimensions), or the words of a noun."""

    size: Fraction = Fraction(1)
    dimensions: tuple = ()
    words: frozenset = frozenset()


def _stem(word: str) -> str:
    """Return a word without case and, if that makes a word we know, without its plural."""
    if len(word) == 1:
        return word
    word = word.lower()
    forms = (word, word[:-1], word[:-2], word[:-3] + "y") if word.endswith("s") else (word,)
    return next((form for form in forms if form in _UNITS or form in _NOUNS), word)


def _unit(text: str) -> Unit | None:
    """Return the unit that a text names, like m/s^{2}, square inches, kilometers per hour."""
    size, dimensions, sign, power, last = Fraction(1), Counter(), 1, 1, None
    text = re.sub(r"\\(?:text|cdot|times)", " ", _FRAC.sub(r"\1/\2", text))
    for token in re.findall(r"[A-Za-z]+|/|\^\{[+-]?\d\}|[^\s{}.*()-]", text):
        word, times = _stem(token), 0
        if word in ("/", "per", "an"):
            sign, last = -1, None
        elif word in _POWERS and last is None:
            power = _POWERS[word]
        elif last and (word in _POWERS or token.startswith("^{")):
            times = (_POWERS.get(word) or int(token[2:-1])) - 1
            if not times:  # nobody writes cm^1
                return None
        elif word in _UNITS:
            last, times, power = _UNITS[word], power, 1
        else:
            return None
        if times:
            size *= last[0] ** (times * sign)
            for name in last[1]:
                dimensions[name.strip("/")] += times * sign * (-1 if name[0] == "/" else 1)
    named = tuple(sorted((name, n) for name, n in dimensions.items() if n))
    return Unit(size, named) if last else None


def _noun(text: str, one: bool, known: frozenset | None) -> Unit | None:
    """Return the count noun that a text is: plain words in the plural (one: or not), or those of
    the gold (None: all are)."""
    text = text.replace(r"\text", "")
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", text)]
    stems = {word: _stem(word) for word in words if word not in _ADJECTIVES}
    for word, stem in stems.items() if known is not None else ():
        counted = stem in _NOUNS and (one or stem != word or word in _PLURALS)
        if not counted and stem not in known:
            return None
    letters = not re.search(r"[^A-Za-z\s{}().-]", text)
    return Unit(words=frozenset(stems.values())) if letters else None


def quantity(text: str, known: frozenset | None = None) -> tuple[str, Unit | None]:
    """Return (value, unit) of 5 \\text{cm}^{2}, 2\\pi in, 12 apples, 1 hour 15 minutes. known: the
    stems of the gold's words; None: this is the gold, whose words are right."""
    item = r"(\d[\d.]*) ?(?:\\text\{)? ?([A-Za-z]+)\}?\.?"
    if len(text) < 99 and re.fullmatch(rf"{item}(?:,? ?(?:and )?{item}){{1,3}}", text):
        parts = [(number(n), _unit(name)) for n, name in re.findall(item, text)]
        if None not in sum(parts, ()) and len({unit.dimensions for _, unit in parts}) == 1:
            sizes = [unit.size for _, unit in parts]
            small = all(
                max(n, 1) * x < y for (n, _), x, y in zip(parts[1:], sizes[1:], sizes, strict=False)
            )
            if small:  # 15 minutes are less than an hour: else it is a sum
                total = sum(n * unit.size for n, unit in parts)
                return str(total / sizes[-1]), parts[-1][1]
    for cut in re.finditer(r"(?<=[\w)}\]%!.])(?=\s|\\text)|(?<=\d)(?=[A-Za-z]{2})", text):
        value, tail = text[: cut.start()].strip(), text[cut.start() :].strip()
        if not re.match(r"(?:\\frac\{\s*)?(?:[A-Za-z]|\\text)", tail) or _word(value):
            continue
        amount = number(value.removesuffix("%"))
        if len(tail) == 1 and amount is None and not known:  # in 5x m, m may be a variable
            continue
        unit = _unit(tail)
        if unit is None and amount is not None:
            unit = _noun(tail, abs(amount) <= 1, known)
        if unit:
            return value, unit
    return text, None


def _word(text: str) -> str:
    """Return the letters of a purely alphabetic text, without case if more than one; else ""."""
    text = re.sub(r"^(?:an?|the) (?=\w\w)|\\text|[{}\s.]|(?<=[A-Za-z])['-](?=[a-z])", "", text)
    return (text if len(text) == 1 else text.casefold()) if text.isalpha() else ""


# ---- structure ----------------------------------------------------------------------------------
# Lists, sets, intervals, equations: an answer is a tree, and trees are compared part by part, for
# a number has to be written out wherever it stands.


class Node(NamedTuple):
    """Part of an answer. kind: a "leaf" or "text" (its text), "set" (items in any order), "()"
    "[)" "matrix" "row" "ratio" ... (ordered items), "region" of real numbers (its end points, and
    value, a sympy set), "named" (one item, as in x = 5 and x > 5), "chain" (sides of 2 + 3 = 5)."""

    kind: str
    items: list
    text: str = ""
    name: str = ""
    value: Any = None


_LIST = re.compile(
    r"[,;](?:\s*(?:or|and)(?![A-Za-z]))?|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\\lor(?![a-z])"
)
_EQUALS = re.compile(r"(?<![!<>:\\])=|\\in(?![A-Za-z])|\\approx(?![A-Za-z])")
_RELATION = re.compile(r"\\le |\\ge |[<>]|\\ne ")
_UNION, _MINUS = re.compile(r"\\cup(?![A-Za-z])"), re.compile(r"\\setminus(?![A-Za-z])")
_PLUS_MINUS, _MINUS_PLUS = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
_RATIO = re.compile(r":|(?<=\d) to (?=\d)")
_ROWS = re.compile(
    r"([(\[]|\\\{)?\s*\\begin\{(array|cases|aligned|[pbvBV]?(?:small)?matrix)\}"
    r"(?:(?<=array\})\{[^{}]*\})?(.*)\\end\{\2\}\s*[)\]]?"
)
_VARIABLE = re.compile(r"[A-Za-z](?:_\{\w+\})?|\\(?!(?:pi|infty)(?![A-Za-z]))[a-z]+|f\(x\)")
_BUILDER = re.compile(rf"({_VARIABLE.pattern})\s*(?:\\in\s*\\mathbb\{{R\}})?\s*[:|](.*)")
_TIME = re.compile(r"(\d{1,2})(?=:| ?[ap])((?::[0-5]\d){0,2})\s*(?:([ap])\.?\s*m\.?)?", re.I)
_MONTHS = {m.lower() for m in (*calendar.month_name[1:], *calendar.month_abbr[1:], "Sept")}
_NO_NAMES = frozenset(
    "not no never nor neither maybe perhaps possibly probably about approx approximately around "
    "roughly nearly almost under over if unless most least any all pi infty mathbb emptyset cup pm "
    "mp neg lnot likely guess might could should would sqrt sin cos tan cot sec csc log ln exp gcd "
    "lcm det lim sum".split()
)


def _split(text: str, separator: re.Pattern) -> tuple[list[str], list[str]]:
    """Return the parts between the matches of `separator` that are outside all brackets, and the
    matches."""
    depths, depth = [], 0
    for token in re.finditer(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|\\.|.", text, re.S):
        opens = token[0][-1] in "([{" or token[0].startswith(r"\begin")
        closes = token[0][-1] in ")]}" and not opens
        depth -= closes
        depths += [depth] * len(token[0])  # a bracket is outside itself
        depth += opens
    cuts = [m for m in separator.finditer(text) if depths[m.start()] == 0]
    starts, ends = [0, *(m.end() for m in cuts)], [*(m.start() for m in cuts), len(text)]
    parts = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return parts, [m[0].strip(",; ") or "," for m in cuts]


def parse_answer(text: str, depth: int = 0) -> Node:
    """Return the tree of an answer, cleaned before. Raises ValueError if there is none."""
    text = re.sub(r"[.,;:]?\s*$", "", text.strip()) if depth == 0 else text.strip()
    if depth > 12 or not text:
        raise ValueError("nested too deeply" if text else "an empty part")

    def parse(parts: list[str]) -> list[Node]:
        return [parse_answer(part, depth + 1) for part in parts]

    if number(quantity(text, frozenset())[0]) is not None:
        return Node("leaf", [], text)
    if date_or_time := _date_or_time(text):
        return Node("text", [], date_or_time)
    if rows := _ROWS.fullmatch(text):
        return _matrix(rows, parse)
    if len((split := _split(text, _LIST))[0]) > 1:
        return _list(parse(split[0]), split[1])
    around = re.fullmatch(r"(\\?[([{])(.*?)(\\?[)\]}])", text, re.S)
    if around and len(_split(text, re.compile(r"\\?[([{]"))[0]) == 2:
        return _bracketed(*around.groups(), parse)
    if len((split := _split(text, _EQUALS))[0]) > 1:
        return _equation(*split, parse(split[0]), text)
    if len((split := _split(text, _RELATION))[0]) in (2, 3):
        return _inequality(*split, text)
    if len(parts := _split(text, _UNION)[0]) > 1:
        return _region("Union", *parse(parts))
    if len(parts := _split(text, _MINUS)[0]) == 2:
        return _region("Complement", *parse(parts))
    if len(parts := _split(text, _RATIO)[0]) > 1:
        return Node("ratio", parse(parts))
    if len(_PLUS_MINUS.findall(text)) == 1:
        both = [_PLUS_MINUS.sub(p, _MINUS_PLUS.sub(m, text)) for p, m in ("+-", "-+")]
        return Node("set", [Node("leaf", [], x.strip(" +")) for x in both])
    return parse_answer(r"(-\infty,\infty)") if text == r"\mathbb{R}" else Node("leaf", [], text)


def _date_or_time(text: str) -> str:
    """Return July 4, the 4th of July 2020, 12:30 and 3 p.m. in one spelling; else ""."""
    text = re.sub(r"\\text|[{}]", "", text)
    words = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\b(?:of|the)\b|[,.]", "", text.lower()).split()
    if len(words) in (2, 3) and sum(w.isdigit() for w in words) == len(words) - 1:
        if _MONTHS & {*words}:
            return " ".join(sorted(x[:3] if x in _MONTHS else x for x in words))
    time = _TIME.fullmatch(text.strip())
    return f"{int(time[1])}{time[2] or ':00'} {time[3] or ''}".lower() if time else ""


def _matrix(rows: re.Match, parse: Callable) -> Node:
    """Return the tree of a matrix, or of the list of cases or equations that rows may be."""
    cells = [x.split("&") for x in rows[3].split(_ROW) if x.strip()]
    if rows[2] not in ("cases", "aligned") and rows[1] != r"\{":
        kind = "det" if rows[2][0] in "vV" else "matrix"
        return Node(kind, [Node("row", parse(row)) for row in cells])
    nodes = []
    for row in cells:
        row = [re.sub(r"\b(?:if|when|for)\b|,\s*$", "", x) for x in row if x.strip()]
        nodes += [Node("row", parse(row))] if len(row) > 1 else parse(row)
    return _list(nodes, ["and"])


def _bracketed(opening: str, content: str, closing: str, parse: Callable) -> Node:
    """Return the tree of a group, set, tuple or interval."""
    if opening == r"\{" and (builder := _BUILDER.fullmatch(content.strip())):
        [condition] = parse([builder[2]])
        if condition.kind != "named" or condition.name != builder[1]:
            raise ValueError("a set of what is not understood")
        return condition.items[0]
    parts, marks = _split(content, _LIST if opening == r"\{" else re.compile("[,;]"))
    if opening == "{" or (opening == "(" and len(parts) == 1):
        return parse([content])[0]
    items = parse(parts)
    if opening != r"\{":
        return Node(opening + closing, items)
    empty = len(items) == 1 and re.search(r"\\emptyset|\\\{", content)
    return Node("{}", items) if empty else _list(items, marks)


def _list(items: list[Node], marks: list[str]) -> Node:
    """Flatten: 1 \\pm 2 within a list is two of its items, a set of one is that one. Conditions on
    one variable become one region; those that exclude each other, behind a comma, are joined."""
    names, values = {item.name for item in items}, [x.items[0] for x in items if x.kind == "named"]
    if len(values) == len(items) and len(names) == 1 and any(x.kind == "region" for x in values):
        if {"and"} < {*marks} & {"and", "or", r"\lor"}:
            raise ValueError("and mixed with or")
        region = _region("Union" if {"or", r"\lor"} & set(marks) else "Intersection", *values)
        if region.value.is_empty and "and" not in marks:
            region = _region("Union", *values)
        return Node("named", [region], name=names.pop())
    flat = []
    for item in items:
        inner = item.items[0] if item.kind == "named" else item
        many = inner.items if inner.kind == "set" else [inner]
        flat += [Node("named", [x], name=item.name) if item is not inner else x for x in many]
    any_of = {"or", r"\lor"} & set(marks) and all(_word(x.text) for x in flat)  # I or II
    return flat[0] if len(flat) == 1 else Node("set", flat, "or" if any_of else "")


def _region(operation: str, *nodes: Node) -> Node:
    """Return the union, intersection or complement of intervals, points and sets of points."""
    import sympy

    values, ends = [], []
    for node in nodes:
        items = node.items or [node]
        ends += items
        if node.kind == "region":
            values.append(node.value)
            continue
        interval = node.kind in ("()", "[]", "(]", "[)") and len(items) == 2
        points = [_sympy(x.text) if x.kind == "leaf" else None for x in items]
        if None in points or not (interval or node.kind in ("leaf", "set")):
            raise ValueError("no set of numbers")
        ends_open = [bracket in "()" for bracket in node.kind] if interval else []
        make = sympy.Interval if interval else sympy.FiniteSet
        values.append(make(*(point.doit() for point in points), *ends_open))
    return Node("region", ends, value=getattr(sympy, operation)(*values))


def _inequality(parts: list[str], relations: list[str], text: str) -> Node:
    """Return the region, named x, of x > 5, 1 \\ge x > 0 or x \\ne 3; a leaf if there is none."""
    here = [i for i, part in enumerate(parts) if _VARIABLE.fullmatch(part)]
    if len(here) != 1 or (len(parts) == 3 and here != [1]) or not all(parts):
        return Node("leaf", [], text)
    regions = []
    for i, relation in enumerate(relations):
        bound, on_left = parts[i if here[0] > i else i + 1], here[0] > i
        strict = relation in "<>"
        if relation == r"\ne":
            regions.append(_region("Complement", *map(parse_answer, (r"\mathbb{R}", bound))))
        elif (relation in (">", r"\ge")) != on_left:
            regions.append(parse_answer(("(" if strict else "[") + bound + r",\infty)"))
        else:
            regions.append(parse_answer(r"(-\infty," + bound + (")" if strict else "]")))
    return Node("named", [_region("Intersection", *regions)], text, parts[here[0]])


def _is_name(text: str) -> bool:
    """Tell whether a text names a quantity (x, f(x), m+n, \\angle ABC, Area), not computes one."""
    text = re.sub(r"\\(?:sin|cos|tan|cot|sec|csc|det)\s*\(?(\\[a-z]+|[A-Za-z])\)?", r"\1", text)
    arguments = r"_\{[^{}]*\}|(?<=[A-Za-z])\([^()]*\)|\^\{-1\}|\\text(?=\{)|'"
    text = re.sub(arguments, "", text.strip())
    words = set(re.findall(r"[a-z]+", text.lower()))
    return bool(words) and not words & _NO_NAMES and not re.search(r"^-|\d|[\^!/]", text)


def _equation(parts: list[str], marks: list[str], sides: list[Node], text: str) -> Node:
    """Return the value of x = 5 with its name, or the chain of sides; an exact side followed by
    its rounding stands for both."""
    first = next((i for i, part in enumerate(parts) if not _is_name(part)), 0)
    kept = [sides[first]]
    for mark, side in zip(marks[first:], sides[first + 1 :], strict=True):
        places = re.fullmatch(r"[+-]?[\d,]*\.?(\d*)", side.text)
        exact, decimal = _sympy(kept[-1].text), number(side.text)
        exact = exact.doit() if _is_expression(exact) else None
        if places and decimal is not None and exact is not None and exact.is_number:
            gap, half = abs(exact - decimal).evalf(), Fraction(1, 2 * 10 ** len(places[1]))
            if gap <= half and (mark == r"\approx" or (gap > 0 and len(places[1]) >= 2)):
                continue
        if mark == r"\approx":
            raise ValueError("a rounding of nothing exact")
        kept.append(side)
    value = kept[0] if len(kept) == 1 else Node("chain", kept, text)
    names = re.fullmatch(r"\(([^()]*)\)", parts[0])
    if first == 1 and names and value.kind == "()":  # (x, y) = (1, 2)
        named = zip(names[1].split(","), value.items, strict=False)
        return Node("set", [Node("named", [x], text, name.strip()) for name, x in named])
    return Node("named", [value], text, re.sub(r"[\s{}]|\\text", "", parts[0])) if first else value


def match(gold: Node, answer: Node) -> bool:
    """Compare two trees."""
    if gold.kind == "named" or answer.kind == "named":
        return _match_named(gold, answer)
    if answer.kind == "chain":
        *sides, last = answer.items
        if gold.kind == "chain":
            return _same_equation(gold.text, answer.text)
        return match(gold, last) and all(_same_value(last, side) for side in sides)
    if gold.kind == "leaf" == answer.kind:
        return same_leaf(gold.text, answer.text)
    if gold.kind == "ratio" == answer.kind and len(gold.items) == len(answer.items):
        return _same_ratio(gold.items, answer.items)
    if "region" in (gold.kind, answer.kind) and "leaf" not in (gold.kind, answer.kind):
        fine = _is_allowed(*([x.text for x in node.items] for node in (gold, answer)))
        return fine and _region("Union", gold).value == _region("Union", answer).value
    names = [{item.name for item in x.items if item.kind == "named"} for x in (gold, answer)]
    in_order = bool(names[0]) != bool(names[1]) and max(map(len, names)) > 1  # p=4, q=9 and 4, 9
    if gold.kind != answer.kind and not (in_order and {gold.kind, answer.kind} == {"()", "set"}):
        return False
    if gold.kind == "text":  # 3:00 and 3:00 p.m.
        return gold.text.startswith(answer.text) or answer.text.startswith(gold.text)
    if len(gold.items) != len(answer.items) or gold.text != answer.text:
        return False
    if in_order or gold.kind not in ("set", "{}"):
        items = (
            sorted(answer.items, key=lambda x: x.name.strip("\\"))
            if in_order and names[1]
            else answer.items
        )
        return all(map(match, gold.items, items))
    unmatched = list(answer.items)  # any order, each item used once
    for item in gold.items:
        found = next((i for i, x in enumerate(unmatched) if match(item, x)), None)
        if found is None:
            return False
        del unmatched[found]
    return True


def _match_named(gold: Node, answer: Node) -> bool:
    """Compare where a side is named: the names have to be equal, if there are two."""
    names = {x.name for x in (gold, answer) if x.kind == "named"}
    function = all(re.fullmatch(r"y|[a-zA-Z]\([a-z]\)", x) for x in names) and "y" in names
    values = [x.items[0] if x.kind == "named" else x for x in (gold, answer)]
    if (len(names) == 1 or function) and gold.kind != "chain" and match(*values):
        return True
    value = values[0]
    if value.kind != "chain" and (value.kind != "leaf" or _is_literal(value.text)):
        return False
    return "=" in gold.text and "=" in answer.text and _same_equation(gold.text, answer.text)


def _same_ratio(gold: list[Node], answer: list[Node]) -> bool:
    """Compare ratios, which are ordered: 3:9 = 1:3."""
    texts = [[x.text for x in side] for side in (gold, answer)]
    g, a = (list(map(_sympy, side)) for side in texts)
    if not _is_allowed(*texts) or None in g + a:
        return False
    zeros = [[x.is_zero for x in side] for side in (g, a)]
    if zeros[0] != zeros[1] or all(zeros[0]):
        return False
    first = zeros[0].index(False) if False in zeros[0] else 0
    return all(_equal(x * a[first], y * g[first]) for x, y in zip(g, a, strict=True))


# ---- leaves -------------------------------------------------------------------------------------
# Words, units, bases and numbers are compared here, exactly; other expressions by their values.

_REFUSED = re.compile(
    r"\d{200}|\^\s*[{(]*\s*[+-]?\d+\s*\)?\s*\^|\^\s*[{(]*\s*[+-]?\d{6}|\d{5}\s*\)?!|!\s*!\s*!"
)
_WORDS = re.compile(r"\d \d|(?<![\\A-Za-z])(?:or|and|not|if|[A-Za-z]{5,})(?![A-Za-z])")  # 0 or 7
_OPERATORS = re.compile(  # what asks to be evaluated
    r"\\(?:sum|prod|i*int|oint|lim|max|min|gcd|lcm|lfloor|lceil|binom|choose|det|sup|partial|mod|"
    r"l?c?dots|sim|to|not|ne|pm|mp|equiv)(?![A-Za-z])|[!?]|matrix"
    r"|\\frac\{(?:d|\\partial)[^{}]*\}\{(?:d|\\partial)"
)
_MARKS = re.compile(  # what sympy would lose
    r"\w?'+|\w?\^\{[T*]\}|\\(?:overline|bar|hat|tilde|dot|vec|(?:tri)?angle)(?![A-Za-z])[^\\+=-]*"
    r"|(?<![A-Za-z\\])\w\^\{-1\}\s*\("
)
_IN_BASE = re.compile(r"(?:\d[\dA-Fa-f]*|[A-F][\dA-F]*(?=_\{1\d\}))\s*_\s*\{\s*\d+\s*\}")


def _refused(text: str) -> bool:
    """Tell whether a text is too long, too deeply nested or has too large numbers for sympy."""
    if not text or len(text) > 2000 or text.count("^") > 100 or _REFUSED.search(text):
        return True
    if text.count("|") > 20 or len(re.findall(r"[A-Za-z]\(", text)) > 50:
        return True
    opened = accumulate((c in "([{") - (c in ")]}") for c in text)
    return max(opened) >= 50 or bool(_WORDS.search(text))


def _is_literal(text: str) -> bool:
    """Tell whether a number, with or without unit, or infinity is written out."""
    text = quantity(text, frozenset())[0].removesuffix("%")
    value, fraction = number(text), "/" in text or r"\frac" in text
    if value is not None:
        return not (fraction and value.denominator == 1)  # a whole number is no fraction
    return text.lstrip("+-") == r"\infty"


def _is_allowed(gold: list[str], answer: list[str]) -> bool:
    """Tell whether the answer's leaves compute nothing that the gold's do not."""
    operators = [set(_OPERATORS.findall(" ".join(texts))) for texts in (gold, answer)]
    computed = [sum(not _is_literal(text) for text in texts) for texts in (gold, answer)]
    return operators[1] <= operators[0] and computed[1] <= computed[0]


def _scale(gold: Unit | None, answer: Unit | None, values: tuple[str, str]) -> Fraction | None:
    """Return by what the answer's value is to be multiplied; None if the units differ. A unit that
    is missing is forgiven; a bare angle is in radians if it has a pi, else in degrees."""
    if gold and answer:
        same = gold.words <= answer.words or answer.words <= gold.words
        same = same and not (gold.words ^ answer.words) & _CHANGES
        return answer.size / gold.size if same and gold.dimensions == answer.dimensions else None
    bare, unit = values[0] if answer else values[1], gold or answer or Unit()
    wrong_angle = unit.dimensions == (("rad" if "pi" not in bare else "deg", 1),)
    return None if wrong_angle or unit.words & _CHANGES else Fraction(1)


def same_leaf(gold: str, answer: str, computed: bool = False) -> bool:
    """Settle text, bases and numbers here, exactly; a number is met by a number only, unless it
    may be computed."""
    spaced = re.search(r"\d \d", gold + answer)
    if gold == answer or (not spaced and gold.replace(" ", "") == answer.replace(" ", "")):
        return True
    words = _word(gold), _word(answer)
    if all(words):
        return words[0] == words[1]
    gold, unit = quantity(gold)
    answer, other = quantity(answer, unit.words if unit else frozenset())
    scale = _scale(unit, other, (gold, answer))
    if scale is None or _refused(answer):
        return False
    if (unit and answer.endswith("%")) or (other and gold.endswith("%")):
        return False
    if _IN_BASE.fullmatch(gold) or _IN_BASE.fullmatch(answer):
        plain = [re.sub(r"[\s{}]", "", x).lstrip("0").upper() for x in (gold, answer)]
        return plain[0] == plain[1]
    g, a = number(gold.removesuffix("%")), number(answer.removesuffix("%"))
    if g is not None and a is not None:
        return _same_number(gold, answer, g, a * scale)
    if not computed and not _is_allowed([gold], [answer]):
        return False
    if _MARKS.findall(answer) != _MARKS.findall(gold):
        return False
    wanted, target = _sympy(gold), _sympy(answer)
    if not (_is_expression(wanted) and _is_expression(target)):
        return False
    target *= scale
    if a is not None and "." in answer and wanted.is_number and not wanted.doit().is_rational:
        return bool(abs((wanted - target).evalf(20)) <= abs(target) / 10**6)  # to six figures
    return wanted == target or _equal(wanted, target)


def _same_number(gold: str, answer: str, g: Fraction, a: Fraction) -> bool:
    """Compare two written numbers: a whole one is not met by a fraction, x% is x/100, and x where
    x is 1 or more; 1/3 is met by its rounding to six figures or more."""
    fractions = ["\\frac" in x or "/" in x for x in (gold, answer)]
    if fractions == [False, True] and number(answer.removesuffix("%")).denominator == 1:
        return False
    percents = gold.endswith("%"), answer.endswith("%")
    if percents[0] != percents[1]:
        percent, plain = (g, a) if percents[0] else (a, g)
        return percent / 100 == plain or (percent == plain and abs(plain) >= 1)
    decimal, exact = (answer, g) if fractions[0] else (gold, a)
    places = re.fullmatch(r"[+-]?\d*\.(\d{6,})", decimal) if fractions[0] != fractions[1] else None
    return g == a or bool(
        places and round(exact, len(places[1])) == number(decimal) and abs(g - a) * 10**5 < abs(a)
    )


# ---- expressions --------------------------------------------------------------------------------


@lru_cache(4096)
def _sympy(latex: str) -> Any:
    """Return what math-verify's converter makes of a leaf, decimals as fractions; None if it means
    nothing."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Basic, Float, I, Rational, Symbol

    if _refused(latex):
        return None
    if (value := number(latex)) is not None:
        return Rational(value.numerator, value.denominator)
    latex = re.sub(
        r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}",  # a mixed number, not a product
        lambda m: rf"\frac{{{int(m[1]) * int(m[3]) + int(m[2])}}}{{{m[3]}}}",
        latex,
    )
    latex = re.sub(r"(?<=[\d)])\s*(?=\()", r"\\cdot ", latex)  # it takes 3(5) for a mixed number
    latex = re.sub(r"(\d+)/(\d+)(?=\s*[\\a-z(])", r"\\frac{\1}{\2} ", latex)  # 1/2x for 1/(2x)
    latex = re.sub(r"\\text\{([A-Za-z])\}", r"\1", latex)
    latex = re.sub(r"\^\{(\d)\}(?!\d)", r"^\1", latex)  # braces take it twice as long
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        tree = latex2sympy(latex, normalization_config=None, conversion_config=config)
        decimals = {x: Rational(str(x)) for x in tree.atoms(Float)}
        return tree.xreplace({**decimals, Symbol("i"): I}) if isinstance(tree, Basic) else None
    except Exception:  # the library raises anything
        return None


def _is_expression(tree: Any) -> bool:
    """Tell whether it has a value: not None, a set, a relation or a matrix."""
    from sympy import Expr

    return isinstance(tree, Expr)


def _equal(a: Any, b: Any, factor: bool = False) -> bool:
    """Tell whether two sympy expressions have the same value (factor: up to one factor) at three
    points, or, with \\kappa, the same values over the integers."""
    from sympy import Derivative, Rational, Symbol, simplify
    from sympy.core.function import AppliedUndef

    if not _is_expression(a) or not _is_expression(b) or a.has(Derivative) or b.has(Derivative):
        return False
    if (a.has(AppliedUndef) or b.has(AppliedUndef)) and not factor:
        return simplify(a - b) == 0
    if (k := Symbol("kappa")) in a.free_symbols & b.free_symbols:
        steps = [[simplify(x.subs(k, n + 1) - x.subs(k, n)) for n in (0, 1)] for x in (a, b)]
        if steps[0][0] == 0 or any(first != second for first, second in steps):
            return False  # not linear in k
        shift = simplify((a.subs(k, 0) - b.subs(k, 0)) / steps[0][0])
        return bool(shift.is_integer) and simplify(steps[0][0] ** 2 - steps[1][0] ** 2) == 0
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    pairs = []
    for start, step in ((7309, 613), (23171, 9341), (-17393, 7411)):  # below 1, above, both signs
        point = {x: Rational(start + i * step, 10007) for i, x in enumerate(symbols)}
        x, y = a.xreplace(point).doit(), b.xreplace(point).doit()
        if x.is_number and y.is_number and abs(y.evalf()).is_finite:
            pairs.append((x, y))
    if factor:
        x, y = pairs.pop() if len(pairs) > 2 else (0, 0)
        pairs = [(p * y, q * x) for p, q in pairs if x.evalf() != 0 != y.evalf()]
    return bool(pairs) and all(_same_constant(x, y) for x, y in pairs)


def _same_constant(x: Any, y: Any) -> bool:
    difference = x - y
    if difference.is_Rational:
        return difference == 0
    return bool(abs(difference.evalf(15, maxn=400)) <= abs(y.evalf(15)) * 1e-200)


def _same_value(last: Node, side: Node) -> bool:
    """Tell whether two sides of a chain are equal, computed or not."""
    if last.kind == "leaf" == side.kind:
        return same_leaf(last.text, side.text, computed=True)
    alike = last.kind == side.kind and len(last.items) == len(side.items)
    return alike and all(map(_same_value, last.items, side.items))


def _same_equation(gold: str, answer: str) -> bool:
    """Tell whether one equation of two sides is a multiple of the other."""
    trees = []
    if _MARKS.findall(gold) != _MARKS.findall(answer):
        return False
    for text in (gold, answer):
        sides = list(map(_sympy, _split(text, _EQUALS)[0]))
        if len(sides) != 2 or not all(map(_is_expression, sides)):
            return False
        trees.append(sides[0] - sides[1])
    return trees[0].free_symbols == trees[1].free_symbols and _equal(*trees, factor=True)


# ---- verdicts -----------------------------------------------------------------------------------

_QUANTIFIER = re.compile(  # k \in \mathbb{Z}, where k is an integer, for any integer k
    r"(?:[\s,;:|(]|(?:where|for|with|and|such that|any|all|some|every|integers?)\s)+"
    r"(?<![A-Za-z])([a-zA-Z])\s*"
    r"(?:\\in\s*\\mathbb\{Z\}|(?:(?:is|are|being|an?|any)\s+)*integers?|(?<=integer [a-z])|"
    r"(?<=integers [a-z]))\s*\)?(?:\\\})?$"
)
_CONGRUENT = re.compile(
    r"(?:[a-zA-Z]\s*(?:\\equiv|=)\s*)?(-?\d+)\s*\(?\s*\\?mod(?:ulo)?\s*\{?\s*(\d+)\s*\}?\s*\)?"
)
_CHOICE = re.compile(  # (B) 12, but neither (B)+1 nor (B) or (C)
    r"[(\[]?\s*([A-H])\s*[)\].:][).:]?\s*"
    r"(?![+^_=/*'!,]|-?\s*\\c[ua]p|.*(?:\b(?:or|not)\b|\\pm|\\lor))(\S.*)"
)


def _over_integers(gold: str, answer: str) -> tuple[str, str]:
    """Write congruences and families over the integers with one letter, \\kappa; of an answer to
    an ordinary gold only the quantifier is left out."""
    texts, letters = [], []
    for text in (gold, answer):
        found, congruent = _QUANTIFIER.search(text), _CONGRUENT.fullmatch(text)
        letters.append(r"\kappa" if congruent else found[1] if found else "")
        if congruent:
            text = rf"{congruent[2]}\kappa+{congruent[1]}"
        elif found:
            text = text[: found.start()].removeprefix(r"\{").strip(" ,")
        texts.append(text)
    if not letters[0]:
        return texts[0], texts[1] if letters[1] != r"\kappa" else answer
    free = [set(re.findall(r"[a-zA-Z]", re.sub(r"\\?[A-Za-z]{2,}", " ", text))) for text in texts]
    letters[1] = letters[1] or (letters[0] if letters[0] in free[1] else "".join(free[1] - free[0]))
    for i, letter in enumerate(letters):
        if len(letter) == 1:
            texts[i] = re.sub(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", r"\\kappa ", texts[i])
    return texts[0], texts[1]


def _leaves(tree: Node) -> list[str]:
    """Return all texts that comparing with this tree may hand to sympy."""
    return [tree.text] if tree.kind == "leaf" else [x for item in tree.items for x in _leaves(item)]


@lru_cache(4096)
def parse_reference(text: str) -> Node:
    """Return the tree of a gold answer, cleaned before. Raises BadReference if it is empty or
    unbalanced, or if a leaf of it means nothing to the library."""
    if not text or sum(map(text.count, "([{")) != sum(map(text.count, ")]}")):
        raise BadReference("empty, unbalanced or longer than 2,000 characters")
    try:
        tree = parse_answer(text)
    except ValueError as why:
        raise BadReference(str(why)) from None
    for leaf in _leaves(tree):
        value = quantity(leaf)[0]
        known = _word(leaf) or _is_literal(value) or _IN_BASE.fullmatch(value)
        if not known and _sympy(value) is None:
            raise BadReference(f"cannot be parsed: {leaf[:80]!r}")
    return tree


def settle(extracted: str, reference: str) -> bool | None:
    """Compare two equal numbers, or two different integers, at once; None where it takes more."""
    if max(len(extracted), len(reference)) > 2000:
        return None
    texts = clean_latex(reference), clean_latex(extracted)
    gold, answer = map(number, texts)
    if gold is None or answer is None:
        return None
    whole = gold.denominator == answer.denominator == 1
    return _same_number(*texts, gold, answer) if gold == answer or whole else None


def equal(extracted: str, reference: str) -> bool:
    """Compare an answer with the gold one; raises BadReference, or ValueError where the answer
    means nothing. Runs where it can be killed: sympy may never return."""
    texts, letters = [], []
    for text in (reference, extracted):
        text = clean_latex(text) if len(text) <= 2000 else ""
        choice = _CHOICE.fullmatch(text)  # (B) 12
        texts.append(choice[2] if choice else text)
        letters.append(choice[1] if choice else "")
    gold, answer = _over_integers(*texts)
    tree = parse_reference(gold)
    if extracted == reference:
        return True
    alone = [letter or text.strip("() ") for letter, text in zip(letters, texts, strict=True)]
    if any(letters) and alone[0] != alone[1] and len(alone[0]) == len(alone[1]) == 1:
        return False
    if letters[1] and len(alone[0]) == 1 and not letters[0]:  # B, and (B) 12
        return not re.fullmatch(r"\(?[A-H]\)?", answer) and (
            _is_literal(answer)
            or (parse_answer(answer).kind == "leaf" and _sympy(answer) is not None)
        )
    if letters[0] and alone[0] == alone[1] and not letters[1]:  # (B) 12, and B
        return True
    return match(tree, parse_answer(answer))
