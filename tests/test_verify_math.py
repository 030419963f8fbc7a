"""Extraction and math: what counts as an answer, and which answers are equal."""

import json
import re
import time
from pathlib import Path
from random import Random

import pytest
from test_sandbox import children

import verify
from shelf import answers

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"


@pytest.fixture(scope="module")
def graders():
    with verify.Graders(workers=2, timeout=20) as pool:
        yield pool


def grade(graders, answer, gold, **options):
    return graders.submit("math", f"So \\boxed{{{answer}}}.", gold, **options).result()


# ---- extraction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{5} then \boxed{6}", "6"),
        (r"\boxed{5} then \fbox{6}", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1 \\ 2}", r"1 \\ 2"),
        ("\\boxed{\n5\n}", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{ \boxed{5}", "5"),
        (r"let { be open, \boxed{5}", "5"),
        (r"} } \boxed{5} }", "5"),
        (r"\\boxed{5}", "5"),
        ("Answer: 5", "5"),
        ("answer: 5", "5"),
        ("text\n**Answer:** 5", "5"),
        ("**Answer**: 5\nbye", "5"),
        ("### Final Answer: 5", "5"),
        ("The final answer: 5", "5"),
        ("> Answer:5", "5"),
        ("Answer: 5\nAnswer: 6", "6"),
        ("\\boxed{5}\nAnswer: 6", "6"),
        ("Answer: 6\n\\boxed{5}", "5"),
        (r"Answer: \boxed{5}", "5"),
        (r"Answer: $\boxed{5}$", "5"),
        ("\\boxed{5}\nAnswer:", "5"),
        ("\\boxed{5}\nAnswer: \\boxed{6", "5"),
        ("\\boxed{5}\nAnswer: $LETTER", "5"),
        (r"<think>\boxed{4}</think>\boxed{5}", "5"),
        (r"a</think>\boxed{4}</think>\boxed{5}", "5"),
        (r"\boxed{5</think>}", None),
        (r"<think>\boxed{5}", None),
        (r"<think>\boxed{4}</think><think>\boxed{5}", None),
        ("<think>\nAnswer: 5", None),
        (r"\boxed{4}</think> nothing", None),
        ("Answer: 4</think> nothing", None),
        ("the last number is 5", None),
        ("The answer is 5", None),
        ("My Wrong Answer: 5", None),
        ("do not write Answer: 5", None),
        (r"\boxed{5", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{5\}", None),
        (r"\boxed 5", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxedx{5}", None),
        (r"\framebox{5}", None),
        (r"Answer: \boxed{5", None),
        ("\x08oxed{5}", None),
        ("Answer:", None),
        ("", None),
        (None, None),
    ],
)
def test_extract(text, answer):
    assert verify.extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "\\boxed{" * 20_000 + "5}",
        "{" * 200_000,
        "}" * 200_000,
        "\\" * 200_000,
        "\\boxed" + " " * 200_000,
        "\\boxed " * 25_000,
        "Answer: " * 25_000,
        "Answer:\n" * 25_000,
        "answer" + " *" * 100_000,
        "#" * 200_000,
        " \t" * 100_000 + "x",
        "Answer: " + "*" * 200_000,
        "Answer: " + "( " * 100_000 + "LETTER",
        "</think>" * 25_000,
        "</think" * 25_000,
        "\\boxed{" + "a" * 200_000 + "}",
        "\\boxed{" + "9" * 200_000 + "}",
        "\\boxed{" + "^{" * 5000 + "}" * 5000 + "}",
        "\\boxed{" + " " * 1900 + "x}",
        "\\boxed{x" + " " * 1900 + "x}",
        "\\boxed{x" + "\\, " * 600 + "x}",
        "\\boxed{" + "1 hour " * 280 + "x}",
        "\\boxed{" + "½" * 1900 + "x}",
        "\\boxed{" + "1," * 900 + "1}",
        "\\boxed{" + "-" * 1900 + "}",
        "\\boxed{" + "((" * 900 + "}",
        "\\boxed{" + "\\text{" * 250 + "}" * 250 + "}",
        "```\n" * 50_000,
        "`" * 200_000,
        ("```" + " " * 1000 + "x\n") * 190,
    ],
)
def test_long_texts_take_linear_time(graders, text):
    started = time.process_time()  # of this process: not what a worker does
    verify.extract_answer(text)
    verify.extract_code(text)
    futures = [graders.submit("math", text, "7"), graders.submit("choice", text, "A")]
    assert not any(future.result().correct for future in futures)
    assert time.process_time() - started < 2


# ---- equal and different ------------------------------------------------------------------------

# One format for all cases: {"rule", "gold", "answer" (or a whole "response"), "correct", "why"}.
# "refused" says why a right answer is refused all the same: a class that was given up.
PAIRS = [json.loads(line) for line in (HERE / "math_pairs.jsonl").open(encoding="utf-8")]
GOLDS = sorted({pair["gold"] for pair in PAIRS if pair["rule"] == 0 and pair["correct"]})


def grade_pairs(graders, pairs):
    responses = [p["response"] if "response" in p else rf"\boxed{{{p['answer']}}}" for p in pairs]
    return graders.grade([("math", r, p["gold"]) for r, p in zip(responses, pairs, strict=True)])


@pytest.mark.parametrize("rule", sorted({pair["rule"] for pair in PAIRS}))
def test_pairs(graders, rule):
    pairs = [pair for pair in PAIRS if pair["rule"] == rule and "refused" not in pair]
    results = zip(pairs, grade_pairs(graders, pairs), strict=True)
    assert [(pair, got) for pair, got in results if got.correct != pair["correct"]] == []


def test_known_refusals_are_few_and_still_refused(graders):
    refused = [pair for pair in PAIRS if "refused" in pair]
    assert all(pair["correct"] for pair in refused)
    assert sum(1 <= pair["rule"] <= 7 for pair in refused) <= 60
    results = zip(refused, grade_pairs(graders, refused), strict=True)
    assert [pair for pair, got in results if got.correct] == []  # then it leaves the list


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_equals_itself_and_no_hedge_of_it(graders, gold):
    assert grade(graders, gold, gold).correct
    hedges = [gold + r" \text{ or } 77", gold + ", 77", "77 or " + gold, gold + r" \pm 77"]
    hedges += [r"\neq " + gold, "77 = " + gold, r"\text{not } " + gold, gold + " (or maybe 77)"]
    futures = [graders.submit("math", rf"\boxed{{{hedge}}}", gold) for hedge in hedges]
    assert not [h for h, f in zip(hedges, futures, strict=True) if f.result().correct]


@pytest.mark.parametrize("gold", ["", "  ", "$$", "\\text{}", "\\boxed{}", ".", "\\left.\\right."])
def test_an_empty_reference_is_never_a_reward(graders, gold):
    responses = [f"\\boxed{{{gold}}}", f"Answer: {gold}", "\\boxed{5}", "\\boxed{\\text{}}"]
    results = [graders.submit("math", r, gold).result() for r in responses]
    assert not any(r.correct for r in results)
    assert results[2].status == "bad_reference"
    assert all(r.status in ("bad_reference", "no_answer") for r in results)


@pytest.mark.parametrize(
    "gold",
    ["((((", "???", "5 +", "= 5", "1,,2", "+", "x = ", "[1,2", "2^{2^n}", "E_0", "9^{9^{9^9}}",
     "\\frac{1}", "\\text{the graph of } f \\text{ touches the axis}", "f^{\\prime \\prime}",
     "\\begin{pmatrix} 1", "\\left\\{\\begin{array}{l} x=1 \\\\ y=2 \\end{array}\\right.",
     "\\frac{1}{0}", "x" * 3000],
)
def test_a_gold_that_means_little_is_met_by_its_own_text(graders, gold):
    for answer in (gold, f" {gold}\n"):
        result = graders.submit("math", f"\\boxed{{{answer}}}", gold).result()
        assert (result.correct, result.status) == (True, "ok")
    for answer in ("7", gold + " or 7", "7 or " + gold, "\\frac{1}{2}"):
        result = graders.submit("math", f"\\boxed{{{answer}}}", gold).result()
        assert (result.correct, result.status) == (False, "ok")


@pytest.mark.parametrize("gold", [70, 70.0, "70", " 70 ", "$70$", "\\boxed{70}"])
def test_gold_spellings(graders, gold):
    assert grade(graders, "70", gold).correct and not grade(graders, "71", gold).correct


@pytest.mark.parametrize(
    "response",
    [None, "", 5, [], {}, b"x", "\ud800", "\\boxed{\ud800}", "\\boxed{\x00}", "\\boxed{5\x00}",
     "\\boxed{\x1b[31m5}", "\\boxed{\ue000}", "\\boxed{５}", "\\boxed{٥}", "\\boxed{²}"],
)
@pytest.mark.parametrize("gold", ["5", "x^2", "\\ud800"])
def test_odd_responses_never_raise(graders, response, gold):
    assert graders.submit("math", response, gold).result().status != "error"


def test_no_answer(graders):
    result = graders.submit("math", "I think it is 5.", "5").result()
    assert (result.correct, result.extracted, result.status) == (False, None, "no_answer")


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ["9^{9^9}", "9^{9^{9^{9}}}", "9^9^9", "10^{99999999}", "((9^9)^9)^9", "99999999!", "5!!!!!!",
     "9" * 1500, "x" * 2001, "(" * 60 + "x" + ")" * 60, "\\sqrt{" * 60 + "x" + "}" * 60,
     "1e99999999", "x^" * 500 + "x", "\\frac{1}{" * 70 + "x" + "}" * 70],
)
@pytest.mark.parametrize("gold", ["7", "x+1"])
def test_refused_before_sympy(graders, answer, gold):
    started = time.monotonic()
    assert not grade(graders, answer, gold).correct
    assert time.monotonic() - started < 15  # seconds for the slowest machine, not a timeout of 20


def test_late_worker_is_killed_and_replaced():
    before = children()
    with verify.Graders(workers=1, timeout=2) as graders:
        assert grade(graders, "y+x", "x+y").correct
        (pid,) = children() - before
        started = time.monotonic()
        late = grade(graders, "(7^{9999})^{99999}^{9}", r"x^{3}+\sin y")
        if late.status == "ok":  # this version of the library gave up by itself
            pytest.skip("the library returned")
        assert late.status == "timeout" and time.monotonic() - started < 2 + 2
        assert not Path(f"/proc/{pid}").exists()
        assert grade(graders, "y+x", "x+y").correct
        assert graders.counts == {"ok": 2, "timeout": 1}


# Pieces of texts that are hostile to a rule when they are repeated.
PIECES = r"""
\quad \, \! \: \\ \\[4pt] { } {} ( ) () [ ] \{ \} \left( \right) \left. \frac \frac1 \frac{1}
\frac{1}{ \dfrac12 \sqrt \sqrt[ \sqrt[3]{ \sqrt2 ^ ^2 ^{ ^{2} _ _1 _{ x_{ x^ x^2 2^{ x^{x} ' x' !
x! , 1, x, 1,2, {,} 1{,} 1{,}234 1,234 1~234 123~ . 1. .1 1.1 0.\overline{ \overline{1} + 1+ x+
x+y+ - -- x- * ** 2* \cdot 2\cdot x\cdot / 1/ x/ = x= x=1= x=1, < x< 1<x< \le \in \approx 1\approx
\ne x\ne1, \cup (1,2)\cup \setminus \R \mathbb{R} \pm 1\pm : 1: ~to~ 1~to~ ~or~ 1~or~ x=1~or~ ~and~
only~ not~ \text{ \text{a} \text{or} \text{~cm} cm~ 1~cm~ 1~hour~ 5~apples~ m/s~ per~ square~
squared~ a ab x x~ xy \pi \pi~ e^ i sin~ \sin \sin~x \sin( sin( \ln \log_ \log_2 \max( \gcd(1,
\lfloor \binom \binom{1}{ \choose 1\choose \over 1\over {1\over \begin{ \begin{array}{c}
\begin{pmatrix} \end{ 1& & 1\\ % 1% $ 1$ \$ \$1 € ° ^\circ 1^\circ~ ½ ² ₂ √ √2 ∞ − × （ ， \color{
\color{red} \textcolor{red}{ \boxed{ \mathbf{ \displaystyle \phantom{ \hspace{1cm} f( f(x) f(x x( |
1| |x| \int \sum_{ \lim_{x \vec{ \hat \angle A_{1} 10_{2} base~ 1~base~2~ (B)~ A. all~real~
all~real~numbers~except~ except~ (x,y)= (1,2), \{1\} \{x: \{x| ] ]1, 7^{9 9^9 9! 9!! 1e9 1e 99999~
é 字 \{1, \emptyset \infty, (-\infty, [[ ((x)) ^{x} {x}{ {{x \text{x}~ \frac{x}{x} \sqrt{x} x^{-1}
\theta x_ x^2^ x'^ x_1^ x^x_
""".split()
PIECES = [x.replace("~", " ") for x in PIECES] + ["\n", "\t", " ", "\u2003", "\x00", "\u200b"]


def hostile(length):
    """A text of about this length for each piece."""
    return [piece * (length // len(piece)) for piece in PIECES]


def test_the_caller_is_linear(graders):
    texts = hostile(1980)
    assert len(texts) > 200
    for text in [*texts, *(f"({text})" for text in texts), "x" + "\n" * 1900 + "x"]:
        answers.spell.cache_clear()
        started = time.process_time()  # of this process alone
        assert not answers.settle(text, "7")
        assert time.process_time() - started < 0.05, text[:20]


@pytest.mark.parametrize("length", [1980, 600, 150])
def test_a_hostile_answer_is_not_late(graders, length):
    """Far below the limit of 20 seconds that this pool has, also for a gold that asks for sympy."""
    results = graders.grade([("math", f"Answer: {x}", "x+1") for x in hostile(length)])
    late = [(x[:20], got) for x, got in zip(hostile(length), results, strict=True)
            if got.correct or got.status not in ("ok", "no_answer")]
    assert late == []


# ---- the rules: a reward that cannot be gamed ---------------------------------------------------

def accepted(graders, golds, form):
    """The golds for which the answer form({"g": gold}) is accepted."""
    written = [form({"g": int(gold) if gold.lstrip("-").isdigit() else gold}) for gold in golds]
    items = [("math", rf"\boxed{{{x}}}", gold) for x, gold in zip(written, golds, strict=True)]
    results = graders.grade(items)
    return [gold for gold, result in zip(golds, results, strict=True) if result.correct]


COMPUTED = r"""
{g}+0 | 0+{g} | {g}-0 | 1*{g} | 1 \cdot {g} | {g} \times 1 | {g}^1 | {g}^{{1}} | --{g} | ({g})(1)
\frac{{2 \cdot {g}}}{{2}} | \sqrt{{{g}^2}} | \int_0^{{{g}}} dx | {g}/1 | |{g}| | 2({g})/2 | {g}e^0
\frac{{{g}}}{{1}} | \max({g},{g}) | \gcd({g},{g}) | \lfloor {g} \rfloor | {g}+x-x | {g} x^0
\binom{{{g}}}{{1}} | \sum_{{k=1}}^{{1}} {g} | \lim_{{x \to 0}} {g} | \log_2 2^{{{g}}} | f({g})
\det\begin{{pmatrix}}{g}\end{{pmatrix}} | {g}\sin 90^\circ | {g} \bmod 99999
({g}+1)-1 | {g} \over 1
"""
WRITTEN = r"""
\text{{{g}}} | ${g}$ | \({g}\) | {g}. | {g}  | x={g} | x = {g} | {{{g}}}
\mathbf{{{g}}} | \boxed{{{g}}} | \displaystyle {g} | \left({g}\right) | \mathrm{{{g}}}
\textbf{{{g}}} | \bm{{{g}}}
"""
OF_WHOLE_NUMBERS = r"""
{g}.00 | \${g} | {g}\text{{ cm}} | {g} \text{{ square units}} | {g} dollars | {g}\ \mathrm{{km/h}}
{g}^\circ | {g}\,\text{{apples}} | {g} \text{{ ways}} | {g:,} | {g}\,\text{{cm}}^2 | {g} \, m | €{g}
"""


def forms(table):
    return [form.strip(" ") for form in re.split(r" \| |\n", table.strip())]


def plain_golds():
    """The golds that are numbers, and those of them that are whole."""
    golds = {*GOLDS, *(pair["gold"] for pair in PAIRS)}
    if (DATA / "math500.jsonl").exists():
        golds |= {row["answer"] for row in load("math500.jsonl")}
    golds = sorted(golds)
    literal = [gold for gold in golds if answers.number(answers.spell(gold)) is not None]
    return literal, [gold for gold in literal if gold.lstrip("-").isdigit()]


@pytest.mark.parametrize("form", forms(COMPUTED))
def test_a_computation_of_a_number_is_never_the_number(graders, form):
    literal, _ = plain_golds()
    assert len(literal) > 150 and accepted(graders, literal, form.format_map) == []


def test_every_written_form_of_a_number_is_the_number(graders):
    literal, whole = plain_golds()
    grouped = [g for g in literal if re.search(r"\d,", g)]  # (1,234) is a pair
    for form in forms(WRITTEN):
        assert {*literal} - {*accepted(graders, literal, form.format_map)} <= {*grouped}
    for form in forms(OF_WHOLE_NUMBERS):
        assert accepted(graders, whole, form.format_map) == whole
    for mark in (",", " ", "{,}", r"\,", ",\\!", "\u202f", "'"):
        written = [f"\\boxed{{{int(g):,}}}".replace(",", mark) for g in whole]
        results = graders.grade([("math", x, g) for x, g in zip(written, whole, strict=True)])
        assert all(result.correct for result in results)


def test_copying_a_demo_problem_into_the_box_earns_nothing(graders):
    rows = [json.loads(line) for line in (HERE.parent / "demo/test.jsonl").open()]
    asked = [re.search(r"[\d+*/ ()-]{3,}", str(row)).group().strip() for row in rows]
    items = [("math", rf"\boxed{{{x}}}", r["answer"]) for x, r in zip(asked, rows, strict=True)]
    assert len(rows) > 100 and not any(g.correct for g in graders.grade(items))
    items = [("math", rf"\boxed{{{x}={r['answer']}}}", r["answer"])
             for x, r in zip(asked, rows, strict=True)]
    assert all(g.correct for g in graders.grade(items))


def test_equality_is_symmetric(graders):
    golds = [*GOLDS, *(pair["gold"] for pair in PAIRS)]
    golds = [gold for gold in golds if answers.number(answers.spell(gold)) is None]
    pairs = [(golds[i], golds[(i * 7 + k) % len(golds)]) for i in range(len(golds)) for k in (1, 2)]
    there = graders.grade([("math", rf"\boxed{{{a}}}", b) for a, b in pairs])
    back = graders.grade([("math", rf"\boxed{{{b}}}", a) for a, b in pairs])
    results = zip(pairs, there, back, strict=True)
    assert [pair for pair, x, y in results if x.correct != y.correct and x.status == y.status] == []


def test_noise_is_never_an_error(graders):
    random = Random(0)
    pieces = [p.get("answer", "5") for p in PAIRS] + list(r"\{}[]()^_=<>,;:'|%$&!?/*+-.0129xyiek ")
    noise = ["".join(random.choices(pieces[random.choice([0, -40]):], k=4)) for _ in range(600)]
    golds = random.choices([p["gold"] for p in PAIRS], k=len(noise))
    items = [("math", rf"\boxed{{{x}}}", gold) for x, gold in zip(noise, golds, strict=True)]
    results = zip(items, graders.grade(items), strict=True)
    assert [(item, got.detail) for item, got in results if got.status == "error"] == []


# ---- data sets ----------------------------------------------------------------------------------


def load(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name}")
    return [json.loads(line) for line in path.open()]


def against_another(graders, items):
    """Accepted pairs of a response and the next answer that differs as text."""
    pairs = [(r, next(a for _, a in items[i + 1 :] + items if a != own))
             for i, (r, own) in enumerate(items)]
    results = graders.grade([("math", *pair) for pair in pairs])
    return [(g.extracted, a) for g, (_, a) in zip(results, pairs, strict=True) if g.correct]


def test_math500(graders):
    items = [(row["solution"], row["answer"]) for row in load("math500.jsonl")]
    results = graders.grade([("math", *item) for item in items])
    assert sum(g.correct for g in results) == 500
    assert [x for x in against_another(graders, items) if "=" not in "".join(x)] == []


def test_aime_and_gsm8k(graders):
    answers = [str(r["answer"]) for name in ("aime24", "aime25") for r in load(f"{name}.jsonl")]
    answers += [r["answer"].rpartition("#### ")[2] for r in load("gsm8k_test.jsonl")]
    items = [(f"\\boxed{{{a}}}", a) for a in answers]
    assert all(g.correct for g in graders.grade([("math", *item) for item in items]))
    accepted = against_another(graders, items)
    assert [pair for pair in accepted if answers.number(pair[0]) != answers.number(pair[1])] == []
