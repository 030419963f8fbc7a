"""Multiple choice: the one letter that the last statement names."""

import time

import pytest

import verify


def grade(response, gold, n_choices=4):
    return verify.grade("choice", response, gold, n_choices=n_choices)


@pytest.mark.parametrize(
    "response, letter",
    [
        ("Answer: B", "B"),
        ("Answer: b", "B"),
        ("Answer: (B)", "B"),
        ("Answer: B.", "B"),
        ("Answer: B) because it is so", "B"),
        ("Answer: **B**", "B"),
        ("**Answer: B**", "B"),
        ("**Answer:** B", "B"),
        ("Answer: $B$", "B"),
        ("Answer: [B]", "B"),
        ("Answer: Option B", "B"),
        ("Answer: B: 25 meters", "B"),
        ("ANSWER: B", "B"),
        ("The final answer: B", "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\mathbf{(B)}}", "B"),
        (r"\boxed{\text{(B) } 5 \text{ m}}", "B"),
        (r"$\boxed{B}$ is right", "B"),
        ("Answer: A\nAnswer: B", "B"),
        ("\\boxed{A}\nAnswer: B", "B"),
        ("Answer: A\n\\boxed{B}", "B"),
        ("Answer: B\nAnswer: $LETTER", "B"),
        ("Answer: A</think>Answer: B", "B"),
        ("Answer: B, I am sure", "B"),
    ],
)
def test_letter(response, letter):
    result = grade(response, letter)
    assert (result.correct, result.extracted, result.status) == (True, letter, "ok")
    assert not any(grade(response, other).correct for other in "ACD")


@pytest.mark.parametrize(
    "response",
    [
        "Answer: Bernoulli", "Answer: BC", "Answer: B2", "Answer: A and B", "Answer: A or B",
        "Answer: A, B", r"\boxed{A, B}", r"\boxed{AB}", "Answer: B or maybe C", "Answer: A/B",
        "Answer: $LETTER", "Answer: LETTER", "Answer: '$LETTER'", "B", "The answer is B", "(B)",
        "Answer: B\nAnswer: Bernoulli", "Answer: B\nAnswer: C or D", "Answer: B</think>", "", None,
        r"\boxed{B", "Answer:", "Answer: E", "Answer: B or E", "Answer: béB", "Answer: _",
        "Answer: ß", "Answer: all of the above", "Answer: 2", "Answer: a b",
    ],
)
def test_no_credit(response):
    assert not any(grade(response, gold).correct for gold in "ABCD")


@pytest.mark.parametrize(
    "response",
    [
        "Answer: not A", "Answer: anything but B", r"\boxed{\neg B}", r"\boxed{\lnot B}",
        "Answer: all except B", "Answer: C or not", "Answer: A is wrong",
        "Answer: (A) is not right",
        "Answer: never A", "Answer: neither A", r"\boxed{\text{not } B}", "Answer: ~A",
        "Answer: ¬A",
        "Answer: everything other than D", "Answer: it isn't A", "Answer: A cannot be",
        "Answer: -A",
        "Answer: B?", "Answer: rule out B", "Answer: A excluded", r"\boxed{\overline{A}}",
        "Answer: !B",
        r"\boxed{\cancel{A}}", "Answer: Not (A)", "Answer: A doesn't hold", "Answer: A was false",
    ],
)
def test_a_negation_names_no_letter(response):
    assert not any(grade(response, gold).correct for gold in "ABCD")


@pytest.mark.parametrize(
    "response",
    ["Answer: B) Not enough is known", "Answer: B: it does not react", "Answer: B (no reaction)",
     "Answer: B, since nothing else fits", "Answer: B. Nothing but water", "Answer: It is B."],
)  # fmt: skip
def test_the_words_of_an_option_may_deny_something(response):
    assert grade(response, "B").correct


@pytest.mark.parametrize(
    "text", ["A " * 50_000, "not " * 50_000 + "A", "- " * 50_000 + "A", "A" + " " * 100_000 + "x",
             "A is " * 40_000, "A w" * 60_000, "A" + ")" * 100_000, "~ " * 50_000 + "A"],
)  # fmt: skip
def test_long_texts_take_linear_time(text):
    started = time.process_time()
    grade("Answer: " + text, "A")
    assert time.process_time() - started < 1


def test_number_of_choices():
    assert grade("Answer: J", "J", n_choices=10).correct
    assert grade("Answer: J", "J", n_choices=9).status == "bad_reference"
    assert grade("Answer: Z", "Z", n_choices=26).correct
    assert not grade("Answer: I", "A", n_choices=10).correct
    assert not grade("Answer: E", "A", n_choices=4).correct
    assert grade("Answer: B", "(B)").correct and grade("Answer: B", " b ").correct


@pytest.mark.parametrize("gold", ["E", "", "AB", "1", "Bernoulli", "$LETTER", "*"])
def test_bad_reference(gold):
    for response in ("Answer: B", f"Answer: {gold}", f"\\boxed{{{gold}}}"):
        result = grade(response, gold)
        assert not result.correct and result.status in ("bad_reference", "no_answer")
    assert grade("Answer: B", gold).status == "bad_reference"
