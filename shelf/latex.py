r"""What a LaTeX text says: its one spelling, its parts, the number or the expression that it is.

`spell` gives LaTeX one spelling in linear time: arguments in braces, one name for each sign.
`split` cuts it where no bracket is open. `number` is the exact value of a number that is written
out. `expression` is math-verify's converter to sympy, and `same_values` compares two expressions at
a few points; sympy may never return: these two run in a process that can be killed.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_LENGTH, MAX_DEPTH = 2000, 16  # characters and open brackets of a text that is read


# ---- spelling -----------------------------------------------------------------------------------
# One linear pass cuts LaTeX into tokens, a table gives each its one spelling, and a stack puts
# every argument into braces.

_TOKEN = re.compile(
    r"(?P<nothing>\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?|\\!|\\[()\[\]])"
    r"|(?P<row>\\\\(?:\s*\[[-\d.]+\s*[a-z]+\])?)|(?P<dollar>^\$(?=[^$]*$))|(?P<power>\*\*)"
    r"|\\begin\{(?:array\}\s*\{[^{}]*\}|[^{}]*\})|(?P<end>\\end\{[^{}]*\})"
    # 1 234, 1{,}234, 1'234; {15} by itself; 1,234 in braces or behind a relation
    r"|(?P<number>(?<![\w.,}])\d{1,3}(?:(?:(?:\\[,;: ]|~|[ \u00a0\u2009\u202f])+|\{\\?,\}|,\\!\s*"
    r"|')\d{3})+(?!\d)|(?:^|(?<=[-+=(,]))\{\d+\}(?!\s*[{^!\d])"
    r"|(?:(?<=[=<>{])|(?<=[=<>] )|(?<=\\[lg]e )|(?<=\\[lg]eq ))\d{1,3}(?:,\d{3})+(?![\d,]))"
    r"|(?P<function>(?<![A-Za-z\\])(?:(?:arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp"
    r"|max|min|gcd|lcm)(?=\s*\}?\s*[({_^])|(?:sin|cos|tan|cot|log|ln)(?=\s*[\d\\]|\s+[a-z]\b)))"
    r"|\\[A-Za-z]+|\\.|\d+|[A-Za-z]+|\s+|.",
    re.S,
)
PIECE = re.compile(r"\\[A-Za-z]+|\\.|\d+|[A-Za-z]+|.", re.S)  # of a text that is spelled
_WIDE = "\u2003"  # a space that parts numbers
_KINDS = {"nothing": "", "row": r"\\", "dollar": "dollars", "power": "^", "end": r"\end"}
_SPELLINGS = {}  # the first of each part stands for the others
for _part in r"""
- − – ﹣; \cdot · ⋅ ∗ * \times × \ast; / ÷ ⁄ \div; \pi π pi; \infty ∞ infinity inf; \sqrt √ sqrt;
\le ≤ \leq \leqslant; \ge ≥ \geq \geqslant; \ne ≠ \neq; < \lt; > \gt; \pm ±; \mp ∓; . 。; , 、;
\cup ∪; \in ∈; \setminus ∖ \smallsetminus \backslash; \emptyset ∅ \varnothing; \approx ≈; \R ℝ;
\equiv ≡; \lor ∨ \vee; \Z ℤ; ' ′ ’ \prime; T \top \intercal; i \imath; \mod \pmod \bmod; : \colon;
° \degree \circ degree degrees deg; \{ \lbrace; \} \rbrace; ( \langle ⟨; ) \rangle ⟩; cents ¢;
| \vert \lvert \rvert \mid; % \% \percent percent percentage; euros € \euro; gbp £ \pounds;
dollars \$; \color \textcolor; \frac \dfrac \tfrac \cfrac; \binom \dbinom \tbinom; \phantom
\hphantom \hspace \vspace; \text \textrm \textbf \textit \textsf \texttt \textnormal \mbox \hbox
\mathrm \mathbf \mathit \mathsf \mathtt \mathcal \bm \boldsymbol \operatorname \boxed \fbox
\underline \emph \mathbin; WIDE $ \quad \qquad; NOTHING \displaystyle \textstyle \scriptstyle
\limits \nolimits \large \Large \LARGE \huge \Huge \small \bf \it \rm \bfseries
""".split(";"):
    _SPELLINGS |= dict.fromkeys(_part.split()[1:], _part.split()[0])
_SPELLINGS |= dict.fromkeys([r"\,", r"\;", r"\:", r"\ ", "~"], " ") | {"\n": _WIDE}
_WRITTEN = {  # commands with arguments: how many, and what becomes of them
    r"\frac": (2, r"\frac{%s}{%s}"), r"\binom": (2, r"\binom{%s}{%s}"), r"\text": (1, " %s "),
    r"\color": (1, "%.0s "), r"\phantom": (1, "%.0s" + _WIDE), r"\mathbb": (1, r"\%s "),
    r"\overline": (1, r"\overline{%s}"), r"\bar": (1, r"\bar{%s}"), r"\vec": (1, r"\vec{%s}"),
    r"\dot": (1, r"\dot{%s}"), r"\mod": (1, r"\mod{%s}"),
}  # fmt: skip
PARTNERS = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\begin": r"\end"}
CLOSING = frozenset(PARTNERS.values())
_SCRIPTS = {  # x⁻², x₁, √13, 1½
    "[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+": "^{%s}", "[₀-₉]+": "_{%s}", r"(?<=√)\d+": "{%s}", "[½⅓⅔¼¾⅕-⅞]": " %s ",
}  # fmt: skip
_REPLACED = (  # in the raw text
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\left\\\{\s*\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{cases}"),
)


@lru_cache(4096)
def spell(text: str) -> str:
    """Return LaTeX in its one spelling: arguments in braces, no fonts, no space that says nothing.
    A text that is too long or too deeply nested, or lacks a brace, is left as it is."""
    text = text.strip().strip("\u200b\ufeff")
    if len(text) > MAX_LENGTH:
        return text
    plain = text.translate({x: x - 0xFEE0 for x in range(0xFF01, 0xFF5F)})  # full-width signs
    for signs, form in _SCRIPTS.items():
        plain = re.sub(signs, lambda m, x=form: x % unicodedata.normalize("NFKC", m[0]), plain)
    for pattern, new in _REPLACED:
        plain = re.sub(pattern, new, plain)
    if "begin{" not in plain:  # escaped once too often; in a matrix it ends a row
        plain = re.sub(r"\\\\(?=[A-Za-z])", r"\\", plain)
    tokens = []
    for found in _TOKEN.finditer(plain.removeprefix("**").removesuffix("**")):
        token = _KINDS.get(found.lastgroup, found[0])
        if found.lastgroup == "number":
            token = re.sub(r"\D", "", token)
        token = "\\" + token if found.lastgroup == "function" else _SPELLINGS.get(token, token)
        if token not in ("", "NOTHING"):
            tokens.append(_WIDE if token == "WIDE" else token)
    try:
        plain = _read(tokens[::-1], "", 0)
    except (ValueError, IndexError):
        return text
    plain = re.sub(r"\s+", lambda m: _WIDE if _WIDE in m[0] or "\n" in m[0] else " ", plain)
    plain = re.sub(r"(?<![\w)\]}%!°'])(?<!\d,)\s|\s(?!\w)", "", plain)  # 1, 234 is a list
    return plain.rstrip(".,;:").removesuffix(" only").rstrip(",")


def _read(rest: list[str], closing: str, depth: int) -> str:
    """Take tokens off a stack up to the closing one, and return them with arguments in braces."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    out = []
    while rest and (rest[-1] != closing or not closing):
        out.append(_construct(rest, depth))
    if closing:
        rest.pop()  # an IndexError: it is not there
    return "".join(out).strip()


def _construct(rest: list[str], depth: int) -> str:
    """Take one token with its arguments off the stack, and return its spelling."""
    token = rest.pop()
    if token in _WRITTEN:
        count, form = _WRITTEN[token]
        return form % tuple(_argument(rest, depth) for _ in range(count))
    if token == "{":
        inner = _read(rest, "}", depth + 1)
        return inner if len(inner) == 1 and not inner.isalnum() else f"{{{inner}}}"
    if token in ("^", "_"):
        inner = _argument(rest, depth)
        return inner if inner and not inner.strip("'°") else f"{token}{{{inner}}}"
    if token == r"\sqrt":
        index = _argument(rest, depth, "[") if rest[-1] == "[" else "2"
        inner = _argument(rest, depth)
        return rf"\sqrt{{{inner}}}" if index == "2" else rf"({inner})^{{\frac{{1}}{{{index}}}}}"
    if token.startswith(r"\begin{"):
        kind = "matrix" if re.search("matrix|array", token) else "list"
        kind = "det" if token[7] in "vV" else kind
        return rf"\begin{{{kind}}}" + _read(rest, r"\end", depth + 1) + r"\end "
    return token + " " if token[0] == "\\" and token[-1].isalpha() else token


def _argument(rest: list[str], depth: int, opening: str = "(") -> str:
    """Take an argument off the stack: a group, one sign, or a command with its own arguments."""
    while rest[-1].isspace():
        rest.pop()
    first = rest.pop()
    if first in ("{", opening):
        return _read(rest, PARTNERS[first], depth + 1)
    if first == "}" or depth > MAX_DEPTH:
        raise ValueError("no argument")
    if len(first) > 1 and first[0] != "\\":  # \frac12
        rest.append(first[1:])
    rest.append(first if first[0] == "\\" else first[0])
    return _construct(rest, depth + 1).strip()


def key(text: str) -> str:
    """Return what equal texts have in common: all but the spaces that do not part digits."""
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", text)


def split(text: str, marks: frozenset) -> tuple[list[str], list[str]]:
    """Return the parts between the marks that are outside all brackets, and these marks."""
    parts, found = [""], []
    depth = 0
    for token in PIECE.findall(text):
        depth += (token in PARTNERS) - (token in CLOSING)
        if not 0 <= depth <= MAX_DEPTH:
            break
        if depth == 0 and token in marks:
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    if depth:
        raise ValueError("unbalanced, or nested too deeply")
    return [part.strip() for part in parts], found


# ---- numbers ------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}")
_FRACTION = re.compile(
    r"([+-]?) ?(?:(\d+) )?(\{[+-]?[\d,]+\}|[\d,]+)/(\{?[+-]?[\d,]+\}?)"
)


@lru_cache(4096)
def number(text: str) -> Fraction | None:
    r"""Return the exact value of a number that is written out, spelled before: 1,234  -0.5  3.2e5
    0.1\overline{6}  \frac{4}{3}  1 1/2  3.2\cdot 10^{5}; else None."""
    while re.fullmatch(r"\{[^{}]*\}|\([^(),]*\)", text):
        text = text[1:-1].strip()
    text = re.sub(r"\\cdot ?10\^\{([+-]?\d+)\}$", r"e\1", text)
    if (m := _DECIMAL.fullmatch(text)) and (m[2] or m[3]):
        digits = m[2].replace(",", "") + (m[3] or "")
        places = len(m[3] or "")
        return Fraction(int(m[1] + digits)) * Fraction(10) ** (int(m[4] or 0) - places)
    if m := _REPEATING.fullmatch(text):
        nines = 10 ** len(m[4]) - 1
        places = 10 ** len(m[3])
        value = Fraction(int(m[2] + m[3] or 0) * nines + int(m[4]), nines * places)
        return -value if m[1] == "-" else value
    fraction = re.sub(r" ?\\frac(\{[^{}]*\})(\{[^{}]*\})", r" \1/\2 ", text).strip()
    if m := _FRACTION.fullmatch(fraction):
        top, bottom = number(m[3]), number(m[4])
        if top is not None and bottom and (not m[2] or 0 < top < bottom):
            return (-1 if m[1] == "-" else 1) * (int(m[2] or 0) + top / bottom)
    return None


# ---- words --------------------------------------------------------------------------------------
# The closed class of words that are never only the name of what is counted.

_NUMERAL = re.compile(
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|.*(?:teen|[dfhnrx]th|ieth|illi(?:on|ard))"
)
_NUMERALS = frozenset(  # more words that make another number of the one before
    "zero nil one two three four five six seven eight nine ten eleven twelve hundred thousand "
    "gross milliarden millone mille mil lakh crore wan kilo mega giga googol dozen score couple "
    "pair half halve third quarter percent ppm permille factorial squared cubed root power "
    "exponent log sin reciprocal inverse prime plus minus times time over divided multiplied "
    "added less more fewer greater smaller double doubled triple tripled quadruple quadrupled "
    "twice thrice halved point base mod modulo negative below above each every per choose minimum "
    "maximum max min up down off oh ish".split()
)
HEDGES = frozenset(  # words that deny it, or leave it open
    "and or to not no nor never none nope neither either but except without if unless under when "
    "where else otherwise instead than then with since because so alternatively maybe perhaps "
    "possibly may probably likely unlikely approx approximately approximate about around roughly "
    "nearly almost least most between is isn are was were be wrong incorrect false invalid error "
    "true correct hmm guess think wait might could should would equal unsure something etc "
    "versus".split()
)


def changes(word: str) -> bool:
    return word in _NUMERALS or word in HEDGES or bool(_NUMERAL.fullmatch(word))


# ---- expressions --------------------------------------------------------------------------------

_REFUSED = re.compile(  # for sympy: towers, many digits, two numbers, words, many bars
    r"\d{200}|\^\{[+-]?\d+\}\^|\^\{[+-]?(?!2\^\{1?\d\}|[3-9]\^\{[1-4]\})\d+\^|\^\{[+-]?\d{6}|\d{5}\)?!"
    r"|!!|\d\s\d|\u2003|:|(?:\^\{\w*\}){4}|(?:\w[\^_]){5}"
    r"|(?<![\\A-Za-z])[A-Za-z]{5,}|(?:\|[^|]*){20}"
)
_FOR_THE_LIBRARY = (
    (r"(\d+(?:\.\d+)?)°", r"{\\frac{\1\\pi}{180}}"),
    (r"(\d+) ?(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),  # a mixed number, not a product
    (r"(?<=[\d)])\s*(?=\()", r"\\cdot "),  # it takes 3(5) for a mixed number
    (r"(\d+)/(\d+)(?=\s*[\\a-z(])", r"\\frac{\1}{\2} "),  # 1/2x for 1/(2x)
    (r"(?<![\\A-Za-z])e_", r"\\varpi_"),  # e_0 and E_0 are not Euler's number
    (r"(?<![\\A-Za-z])E_", r"\\vartheta_"),
    (r"\^\{(\d)\}(?!\d)", r"^\1"),  # braces take it twice as long
)
# Where the first letter's value starts, and the step to the next one's: below 1 (twice), above, of
# both signs, large, very large, negative; over 10007.
_POINTS = (
    (7309, 613), (3571, 401), (23171, 9341), (-17393, 7411), (1234577, 83311), (9876543, 71311),
    (-2345681, -9133),
)  # fmt: skip


@lru_cache(4096)
def expression(text: str) -> Any:
    """Return what math-verify's converter makes of a leaf, decimals as fractions; None if it is no
    expression, or too long or too large for sympy."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Expr, Float, I, Rational, Symbol

    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)  # or is not a product
    if not text or len(text) > 700 or _REFUSED.search(text) or any(map(changes, words)):
        return None
    if (value := number(text)) is not None:
        return Rational(value.numerator, value.denominator)
    for pattern, new in _FOR_THE_LIBRARY:
        text = re.sub(pattern, new, text)
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        tree = latex2sympy(text, normalization_config=None, conversion_config=config)
        decimals = {x: Rational(str(x)) for x in tree.atoms(Float)}
        return tree.xreplace({**decimals, Symbol("i"): I}) if isinstance(tree, Expr) else None
    except Exception:  # the library raises anything
        return None


def _says_nothing(tree: Any, point: dict) -> bool:
    """Tell whether a root, fractional or symbolic power or logarithm of a negative occurs."""
    from sympy import Pow, log

    risky = [x.args[0] for x in tree.atoms(Pow, log) if x.func is log or not x.exp.is_integer]
    values = [x.xreplace(point).evalf(15) for x in risky if x.free_symbols]
    return any(x.is_real and x < 0 for x in values)


def same_values(a: Any, b: Any, factor: bool = False) -> bool:
    """Tell whether two expressions have the same value (factor: up to one factor) at all of a few
    points that say something."""
    from sympy import Derivative, Float
    from sympy.core.function import AppliedUndef

    unknown = a.has(Derivative, AppliedUndef) or b.has(Derivative, AppliedUndef)
    if unknown or bool(a.free_symbols) != bool(b.free_symbols):
        return False
    a, b = a.doit(), b.doit()
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        difference = a - b
        size = abs(b.evalf(15))
        if factor or difference.is_Rational or not size.is_finite:
            return not factor and difference == 0
        return bool(abs(difference.evalf(15, maxn=400)) <= size * 1e-200)
    values = []
    for start, step in _POINTS:
        point = {x: Float(start + i * step, 100) / 10007 for i, x in enumerate(symbols)}
        if not _says_nothing(a, point) and not _says_nothing(b, point):
            x, y = (tree.xreplace(point).evalf(100) for tree in (a, b))
            if x.is_number and y.is_number and abs(x).is_finite and abs(y).is_finite:
                values.append((x, y))
                p, q = values[0] if factor else (1, 1)
                if not (p != 0 != q and abs(x * q - y * p) <= abs(y * p) * 1e-70):
                    return False
    return len(values) > 1 + factor
