"""The demo folder: problems, tokenizer, model, and the script that rebuilds them."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
sys.path[:0] = [str(ROOT), str(DEMO)]
import make_demo  # noqa: E402
import token_kinds  # noqa: E402

from rollout import PLAIN_TEMPLATE  # noqa: E402

SIZES = {"train": 4096, "test": 512, "test_ood": 256}
ASCII = "".join(map(chr, range(32, 127))) + "\n"


def read(name: str, folder: Path = DEMO) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def expression(row: dict[str, str]) -> str:
    return re.fullmatch(r"Compute ([1-9](?:[+*][1-9])+)\.", row["problem"])[1]


def left_to_right(text: str) -> int:
    total, *rest = re.findall(r"[+*]?\d", text)
    for step in rest:
        total = eval(f"{total}{step}")
    return int(total)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()


@pytest.mark.parametrize("name", SIZES)
def test_problems_are_right_and_traps(name):
    rows = read(name)
    assert len(rows) == SIZES[name]
    for row in rows:
        text = expression(row)
        assert len(re.findall(r"\d", text)) == (5 if name == "test_ood" else 4)
        assert "+" in text and "*" in text
        assert eval(text) == int(row["answer"]) <= 99
        assert left_to_right(text) <= 99
        assert left_to_right(text) != eval(text)
        sums_first = eval("(" + text.replace("*", ")*(") + ")")
        assert sums_first != eval(text)


def test_splits_are_distinct_and_disjoint():
    warm_up = make_demo.in_hash_order(make_demo.traps(4))[512 + 4096 :]
    problems = [row["problem"] for name in SIZES for row in read(name)]
    problems += [row["problem"] for row in warm_up]
    assert len(warm_up) == 5809
    assert len(set(problems)) == len(problems)


def test_demonstrations():
    """One box each, at the end; right about as often as the docstring of make_demo says."""
    rng, rows = random.Random(0), read("train")
    texts = [make_demo.demonstrate(rng, **row) for row in rows]
    assert all(re.fullmatch(r"[^\\{}]+\\boxed\{\d\d?\}", text) for text in texts)
    right = sum(t.endswith(f"{{{r['answer']}}}") for t, r in zip(texts, rows, strict=True))
    assert 0.35 < right / len(rows) < 0.5  # "precedence" less its slips, and "one jump"


def test_prompts_are_ten_tokens(tokenizer):
    instruction = PLAIN_TEMPLATE.replace("{problem}", "")
    for row in read("train"):
        text = PLAIN_TEMPLATE.replace("{problem}", row["problem"])
        ids = tokenizer(text).input_ids
        assert len(ids) == 10 and tokenizer.decode(ids) == text
        assert tokenizer.convert_ids_to_tokens(ids)[-1] == instruction


def test_tokenizer_keeps_all_ascii(tokenizer):
    rng = random.Random(0)
    texts = [ASCII, "  a  b ", "007 = 7 , 100", "don 't\n\n x", "\\boxed{\\frac12}", ". So  , so "]
    texts += ["".join(rng.choices(ASCII, k=80)) for _ in range(200)]
    texts += [f"{a}{b}" for a in ASCII for b in ASCII]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.convert_ids_to_tokens(ids)) == text
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_tokens_of_a_solution(tokenizer):
    text = "First 4*5=20, check 4*5=20, so 3+20=23. Answer \\boxed{25}"
    tokens = tokenizer.tokenize(text)
    phrases = [token for token in tokens if len(token) > 2]
    assert phrases == ["First ", ", check ", ", so ", ". Answer ", "\\boxed{"]
    assert "20" in tokens and len(tokens) == 22
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_special_ids_agree(tokenizer, model):
    generation = GenerationConfig.from_pretrained(DEMO / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    for config in (model.config, generation):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id is None
    assert tokenizer.bos_token is None and tokenizer.chat_template is None
    assert model.config.vocab_size == len(tokenizer)


def test_model_answers(tokenizer, model):
    """The base is capable but mostly wrong, and it ends nearly all of its responses."""
    assert 150_000 < model.num_parameters() < 200_000
    assert model.config.head_dim == 32
    torch.manual_seed(0)
    figures = make_demo.measure(model.float(), tokenizer, read("test")[:48], samples=32)
    assert 0.15 < figures["pass@1"] < 0.4
    assert figures["pass@32"] > 0.9
    assert figures["entropy"] > 0.45
    assert figures["cut off"] < 0.02


def test_folder_is_small():
    files = [path for path in DEMO.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 900_000


@pytest.mark.slow
def test_rebuild(tmp_path, tokenizer):
    """Two steps of warm-up make the same problems and tokenizer, and a model that loads."""
    command = [sys.executable, DEMO / "make_demo.py", "--steps=2", "--samples=0", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for name in SIZES:
        assert read(name, tmp_path) == read(name)
    rebuilt = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
    assert rebuilt.decode(rebuilt(ASCII).input_ids) == ASCII
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() < 200_000


# ---- the second demo: word problems for SmolLM2 -------------------------------------------------


def test_word_problems_are_right_and_split_by_their_numbers(tmp_path):
    script = ROOT / "demo" / "make_word_problems.py"
    for folder in ("one", "two"):
        subprocess.run([sys.executable, str(script), str(tmp_path / folder)], check=True,
                       capture_output=True)
    sets = {}
    for name in ("train", "test", "probe"):
        one, two = ((tmp_path / x / f"{name}.jsonl").read_text() for x in ("one", "two"))
        assert one == two
        sets[name] = [json.loads(line) for line in one.splitlines()]
    right = {"gets": lambda a, b: a + b, "gives": lambda a, b: a - b, "boxes": lambda a, b: a * b,
             "shares": lambda a, b: a // b}  # fmt: skip
    numbers = {}
    for name in ("train", "test"):
        for row in sets[name]:
            kind, *pair = row["id"].split("-")
            asked = [int(x) for x in re.findall(r"\d+", row["problem"])]
            assert int(row["answer"]) == right[kind](*asked)
            numbers.setdefault(name, set()).add(frozenset(pair[:2]))
    assert not numbers["train"] & numbers["test"] and len(sets["test"]) == 128
    texts = [row["problem"] for rows in (sets["train"], sets["test"]) for row in rows]
    assert len(set(texts)) == len(texts)
    shown = (ROOT / "demo/smollm2/template.txt").read_text()
    for example in ({"5", "3"}, {"4", "6"}):
        assert example <= set(re.findall(r"\d+", shown))
        assert frozenset(example) not in numbers["train"] | numbers["test"]


@pytest.mark.slow
def test_the_figure_goes_where_it_is_told_and_nowhere_else(tmp_path):
    script = str(ROOT / "demo" / "make_figure.py")
    before = {path: path.stat().st_mtime for path in (ROOT / "demo").glob("*.png")}
    assert run(script).returncode == 2  # --out is missing
    done = run(script, "--out", str(tmp_path / "figure.png"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert before == {path: path.stat().st_mtime for path in (ROOT / "demo").glob("*.png")}


def test_kinds_of_tokens():
    tokens = ["We get ", "3", "*", "4", "=", "12", ", so ", "12", "+", "2", "=", "14", ". So ",
              "\\boxed{", "14", "}", "<eos>"]
    first, number, sign, result, words, end = token_kinds.KINDS
    assert token_kinds.kinds_of(tokens) == [
        words, first, sign, number, sign, result, words, number, sign, number, sign, result, words,
        *[end] * 4]
    row = dict(tokens=["3", "*", "4", "=", "12"], correct=True, weight=[2.0, 1.0, 1.0, 1.0, 1.0],
               entropy=[0.1, 0.2, 0.3, 0.4, 0.9])
    columns = token_kinds.count([row, row | dict(correct=False, weight=[1.0] * 5)])
    assert columns["right"] == {first: 1, sign: 2, number: 1, result: 1} == columns["wrong"]
    assert {k: n for k, n in columns["chosen in right"].items() if n} == {first: 1}
    assert not any(columns["chosen in wrong"].values())
