"""The tokens of a prompt and the text of a response, with small tokenizers as the families have."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

import a3po
import eval as evaluation
import rollout
import verify
from rollout import Problem, Sample
from shelf.ranks import UsageError

MARKS = ["<think>", "</think>", "<|end|>", "<pad>", "<tool>"]  # special tokens of every tokenizer
WORDS = [f"Q: What is 1+1?\nA: 2\n{rollout.INSTRUCTION} 3456789 system user Be brief."]


def make_tokenizer(folder, before=(), after=(), eos="</s>", of="PreTrainedTokenizerFast", **config):
    """Return a real tokenizer that puts `before` and `after` around a text. With a class of Llama's
    or Gemma's it is of SentencePiece's form, else of bytes."""
    special = list(dict.fromkeys([*before, *after, eos, "<unk>", *MARKS]))
    if of == "PreTrainedTokenizerFast":
        made, extra = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False,
                             initial_alphabet=extra)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)])
        extra = [f"<0x{i:02X}>" for i in range(256)]
        trainer = BpeTrainer(vocab_size=600, special_tokens=special + extra, show_progress=False)
    made.train_from_iterator(WORDS, trainer)
    around = [(token, made.token_to_id(token)) for token in [*before, *after]]
    form = " ".join([*before, "$A", *after])
    made.post_processor = processors.TemplateProcessing(single=form, special_tokens=around)
    made.save(str(folder / "tokenizer.json"))
    names = dict(bos_token=before[-1] if before else None, eos_token=eos, unk_token="<unk>",
                 pad_token="<pad>", extra_special_tokens=MARKS)
    about = names | dict(tokenizer_class=of) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return AutoTokenizer.from_pretrained(folder)


LLAMA = dict(of="LlamaTokenizer", before=["<s>"])
KINDS = {  # of tokenizers: how one is made, and what it puts before a text
    "Llama 2": (LLAMA | dict(add_bos_token=True), ["<s>"]),
    "Llama 3": (dict(before=["<|begin|>"]), ["<|begin|>"]),
    "Gemma": (dict(of="GemmaTokenizer", before=["<bos>"], eos="<eos>", add_bos_token=True),
              ["<bos>"]),
    "Mistral": (LLAMA | dict(of="LlamaTokenizerFast", add_bos_token=True), ["<s>"]),
    "GLM": (dict(before=["[gMASK]", "<sop>"], eos="<|endoftext|>"), ["[gMASK]", "<sop>"]),
    "Qwen": (dict(), []),
    "both": (LLAMA | dict(after=["</s>"], add_bos_token=True, add_eos_token=True), ["<s>"]),
    "both, of bytes": (dict(before=["<s>"], after=["</s>"]), ["<s>"]),
    "EOS alone": (dict(after=["</s>"]), []),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_text_gets_what_the_tokenizer_puts_before_one_once_and_no_eos(name, tmp_path):
    made, before = KINDS[name]
    tokenizer = make_tokenizer(tmp_path, **made)
    marked = tokenizer("Q: 1+1?\nA:").input_ids  # as the base always saw it
    start = tokenizer.convert_tokens_to_ids(before)
    assert marked[: len(start)] == start
    problems = [Problem("1", "1+1?", "2"), Problem("2", "".join(before) + "1", "1"),
                Problem("3", "2+2", "4", turns=[dict(role="system", content="Be brief.")])]
    for template in (r"Q: {problem}\nA:", "".join(before) + r"Q: {problem}\nA:", "plain", "auto"):
        prompts = rollout.encode_prompts(problems, tokenizer, template, 999)
        for prompt in prompts:
            text = tokenizer.decode(prompt.ids[len(start) :])
            assert prompt.ids[: len(start)] == start and prompt.ids[-1] != tokenizer.eos_token_id
            assert prompt.problem.id == "2" or not any(token in text for token in before)
        if "A:" in template:
            assert prompts[0].ids == marked[: len(prompts[0].ids)]
    tokenizer.chat_template = "{{ bos_token }}<user>{{ messages[0].content }}<assistant>"
    [chat] = rollout.encode_prompts(problems[:1], tokenizer, "chat", 999)
    text = rollout.format_prompt("1+1?", tokenizer, "chat")  # has its own
    assert chat.ids == tokenizer(text, add_special_tokens=False).input_ids


class Speaker:
    """An engine that says the ids that it is given."""

    tensor_parallel = 1

    def __init__(self, tokenizer, text):
        self.stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
        self.ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)

    def generate(self, prompts, n, seeds, **_):
        yield 0, Sample(None, self.ids, np.zeros(len(self.ids)), "stop")


def answered(tokenizer, template: str, response: str) -> Sample:
    """Return the graded sample whose tokens are the response's; the right answer is 2."""
    prompts = rollout.encode_prompts([Problem("1", "1+1?", "2")], tokenizer, template, 999)
    engine = Speaker(tokenizer, response)
    with verify.Graders(1) as graders:
        judge = rollout.judge_by_rules(graders)
        [(_, [sample])] = rollout.sample(engine, tokenizer, judge, prompts, 1, [0], seconds={})
    return sample


@pytest.mark.parametrize("of", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize(
    "template, response, correct, status",
    [
        ("{problem}<think>", "so 2</think>It is \\boxed{2}", True, "ok"),
        ("{problem}<think>", "so \\boxed{2}", False, "no_answer"),
        ("{problem}", "<think>so \\boxed{2}", False, "no_answer"),
        ("{problem}", "<think>so \\boxed{3}</think>\\boxed{2}", True, "ok"),
        ("{problem}", "<think>so \\boxed{2}</think>It is 2", False, "no_answer"),
        ("{problem}", "Answer: 2", True, "ok"),
    ],
)
@pytest.mark.parametrize("end", ["", "</s>", "<|end|>"])
def test_a_thought_between_special_tokens_is_seen(
        of, template, response, correct, status, end, tmp_path):
    tokenizer = make_tokenizer(tmp_path, of=of, before=["<s>"])
    grade = answered(tokenizer, template, response + end).grade
    assert (grade.correct, grade.status) == (correct, status)


def test_only_stop_pad_and_bos_tokens_are_taken_out_of_a_response(tmp_path):
    tokenizer = make_tokenizer(tmp_path, before=["<s>"])
    said = answered(tokenizer, "{problem}", "<s><think>a</think><tool>2<unk><pad><pad><|end|>")
    assert said.text == "<think>a</think><tool>2<unk>"


# ---- chat templates, and models that cannot be asked --------------------------------------------

TURN = "<{{ m.role }}>{{ m.content | trim }}<|end|>"
ASK = "{% for m in messages %}" + TURN + "{% endfor %}"
ASK += "{% if add_generation_prompt %}<assistant>{% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ASK
LEAVES_OUT = ASK.replace("messages %}", "messages if m.role != 'system' %}", 1)
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
SYSTEM = [dict(role="system", content="Be brief. ")]


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT])
def test_a_system_turn_that_the_chat_template_refuses_joins_the_users(template, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = template
    text = rollout.format_prompt("1+1?", tokenizer, turns=SYSTEM)
    assert text == f"<user>Be brief. \n\n1+1?\n{rollout.INSTRUCTION}<|end|><assistant>"
    said = [*SYSTEM, dict(role="user", content="Hi"), dict(role="assistant", content="Yes?")]
    text = rollout.format_prompt("1+1?", tokenizer, turns=said)
    assert text.startswith("<user>Be brief. \n\nHi<|end|><assistant>Yes?<|end|><user>1+1?")
    tokenizer.chat_template = ASK
    text = rollout.format_prompt("1+1?", tokenizer, turns=SYSTEM)
    assert text.startswith("<system>Be brief.<|end|><user>1+1?")


@pytest.mark.parametrize(
    "template, says",
    [
        (PARTS, "what is asked is not in its text"),
        ("<user>hello", "what is asked is not in its text"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ nothing.there }}", "UndefinedError"),
        (REFUSES.replace("[0].role == 'system'", "[-1].role == 'user'"), "no system"),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence_in_a_check(template, says, tmp_path, capsys):
    model = model_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    error = checked(model, capsys)
    assert says in error and "--template plain" in error
    assert not checked(model, capsys, "--template=plain")


def test_the_row_is_named_for_which_the_chat_template_fails(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = "{% if 'odd' in messages[0].content %}{{ no.way }}{% endif %}" + ASK
    problems = [Problem(str(i), text, "2") for i, text in enumerate(["1+1?", "an odd one?"])]
    with pytest.raises(UsageError, match="fails .UndefinedError.* ends with 'an odd one"):
        rollout.encode_prompts(problems, tokenizer, "auto", 999)


def model_of(folder) -> str:
    """Return a copy of the demo's model."""
    for path in (ROOT / "demo" / "model").iterdir():
        shutil.copy(path, folder)
    return str(folder)


def checked(model: str, capsys, *flags: str) -> str:
    """Return what `a3po.py --check` has against the model: one sentence, or nothing."""
    try:
        a3po.main(["--setting=demo", "--check", f"--model={model}",
                   "--max_prompt_length=150", *flags])
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    "family", ["qwen3", "llama", "gemma", "gpt2", "gpt_neox", "mistral", "olmo2", "glm4", "phi3"])
def test_a_folder_without_tokenizer_files_is_refused(family, tmp_path, capsys):
    """transformers makes an empty tokenizer, for some families."""
    about = dict(model_type=family, max_position_embeddings=256)
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert "tokenizer" in checked(str(tmp_path), capsys)
    with pytest.raises(UsageError, match="tokenizer"):  # evaluation calls this
        rollout.load_tokenizer(str(tmp_path), 0, 0)


def test_a_broken_tokenizer_is_one_sentence(tmp_path, capsys):
    model = model_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert "that loads (" in checked(model, capsys)


def test_a_model_without_a_stop_token_is_refused(tmp_path, capsys):
    model = model_of(tmp_path)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | dict(eos_token=None)))
    assert not checked(model, capsys)  # generation_config.json has one
    (tmp_path / "generation_config.json").unlink()
    error = checked(model, capsys)
    assert "no token ends a response" in error and "eos_token" in error
    (tmp_path / "chat_template.jinja").write_text(ASK.replace("<|end|>", "<pad>"))
    assert not checked(model, capsys)  # its turns end in one


# ---- conversations ------------------------------------------------------------------------------


def conversations(folder) -> str:
    """Write a data set with the problem in the system turn, one row of it twice."""
    user = dict(role="user", content="Solve it.")
    systems = [dict(role="system", content=f"The problem is {i}+1.") for i in (1, 2, 2)]
    rows = [dict(prompt=[system, user], answer="2") for system in systems]
    rows += [dict(prompt=[user], answer="2"), dict(problem="Solve it.", answer="2")]
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_that_differ_before_the_last_turn_are_several(tmp_path, capsys):
    """In training and evaluation; and their samples are told apart by their seeds."""
    data = conversations(tmp_path)
    config = a3po.parse_args(["--setting=demo", f"--data={data}", f"--eval_data={data}",
                              "--max_prompt_length=200"])
    _, sampler, held_out, _ = a3po.load_inputs(config)
    assert "2 of 5 rows repeat a problem" in capsys.readouterr().out
    args = evaluation.parse_args(["--model=m", f"--data={data}"])
    [(name, bench)] = evaluation.check_args(args).items()
    problems = evaluation.load_benchmark(name, bench, args)
    assert [p.turns for p in problems] == [prompt.problem.turns for prompt in sampler.prompts]
    for prompts in (sampler.prompts, held_out):
        assert len(prompts) == len({tuple(prompt.ids) for prompt in prompts}) == 3
        seeds = [evaluation.problem_seed(0, prompt) for prompt in prompts]
        assert len({*seeds}) == 3
        # without turns before it a problem keeps the seed of its text
        assert seeds[-1] == rollout.request_seed("eval", 0, "Solve it.")
