"""From a problem to graded responses: Problem, Prompt, Sample. Read from the top: prompts, the vLLM
engine, sampling and grading. Training and evaluation share all of it; shelf/data.py reads problems.
"""

import hashlib
import importlib
import logging
import math
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from shelf.ranks import UsageError, brief, explain, rank, say, timed, world_size
from verify import KINDS, Grade, Graders

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_TEMPLATE = "{problem}\n" + INSTRUCTION + "\n"  # for models without a chat template
INSTRUCTIONS = {  # what follows a problem of each kind, in the words that its grader looks for
    "math": INSTRUCTION,
    "choice": "Please reason step by step, and put the letter of your answer within \\boxed{}.",
    "code": "Please reason step by step, and put your final program in a ```python code block.",
}


# ---- prompts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One row of a data set. `reference` is what the grader of this `kind` compares with: an
    answer, a letter, or the TEST_FIELDS of a LiveCodeBench row."""

    id: str
    text: str
    reference: Any
    kind: str = "math"
    options: dict = field(default_factory=dict)  # for the grader: n_choices, time_limit
    turns: list[dict] = field(default_factory=list)  # chat messages before it, a system one too


@dataclass(frozen=True)
class Prompt:
    """A problem and its token ids under the template. opening: "<think>" if the template ends
    inside one, for the graders, which do not see the prompt; else ""."""

    problem: Problem
    ids: list[int]
    opening: str = ""


def load_tokenizer(model: str, max_prompt_length: int, max_response_length: int,
                   template: str = "auto"):
    """Return (tokenizer, model config), refusing before any weights load a model that does not
    exist, cannot be asked in this form, or has too short a context (a length of 0: what fits)."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of many kinds: that of a broken tokenizer.json is Exception
        raise UsageError(f"model {model!r}: neither a save_pretrained folder nor a hub model that "
                         f"loads ({' '.join(str(error).split())[:160]})") from None
    context = getattr(config, "max_position_embeddings", None)
    wanted = (max_prompt_length or 1) + max_response_length
    for wrong, what in (
        (context is None, "no max_position_embeddings in config.json: only attention is supported"),
        (wanted > (context or wanted), f"a prompt and a response, {wanted} tokens together, exceed "
         f"the context, {context}: lower --max_response_length, in training also "
         "--max_prompt_length, or extend the context in config.json (RoPE scaling)"),
        (len(tokenizer) <= len({*tokenizer.all_special_ids}), "no tokenizer is there: copy "
         "tokenizer.json and tokenizer_config.json into the folder"),
        (template not in ("auto", "chat", "plain") and "{problem}" not in template,
         f"--template {template!r}: give auto, chat, plain or a text with {{problem}}"),
        (not stop_token_ids(tokenizer, model, template), "no token ends a response: name one as "
         "eos_token in tokenizer_config.json, or as eos_token_id in generation_config.json"),
    ):
        if wrong:
            raise UsageError(f"model {model!r}: {what}")
    return tokenizer, config


def uses_chat(tokenizer, template: str) -> bool:
    """Return whether prompts are chats; "auto": where the tokenizer has a chat template."""
    return template == "chat" or (template == "auto" and bool(tokenizer.chat_template))


def format_prompt(problem: str, tokenizer, template: str = "auto", kind: str = "math",
                  turns: Iterable = ()) -> str:
    """Return the text the model sees. template: "auto" (chat where the tokenizer has a template,
    else plain), "chat", "plain", or a text with {problem}, in which a typed \\n ends a line. turns:
    chat messages before the problem, in a text their contents."""
    if uses_chat(tokenizer, template):
        asked = dict(role="user", content=f"{problem}\n{INSTRUCTIONS[kind]}")
        return chat_text(tokenizer, [*turns, asked])
    if template in ("auto", "plain"):
        template = PLAIN_TEMPLATE.replace(INSTRUCTION, INSTRUCTIONS[kind])
    before = "".join(f"{turn['content']}\n\n" for turn in turns)
    return before + template.replace("\\n", "\n").replace("{problem}", problem)


def chat_text(tokenizer, messages: list[dict]) -> str:
    """Return what the chat template makes of the messages; UsageError where it fails or leaves the
    last out. A system turn that it refuses, or leaves out, joins the user's, as in plain."""
    first, *rest = messages
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=messages[-1]["role"] == "user")
        why = "what is asked is not in its text: it may want other content than a text"
    except Exception as error:  # whatever the code in the template raises
        text, why = "", f"{type(error).__name__}: {error}"
    if all(turn["content"].strip() in text for turn in (first, messages[-1])):
        return text
    if first["role"] == "system" and rest[0]["role"] == "user":
        joined = f"{first['content']}\n\n{rest[0]['content']}"
        return chat_text(tokenizer, [rest[0] | dict(content=joined), *rest[1:]])
    raise UsageError(f"the chat template fails ({why[:200]}) for a chat that ends with "
                     f"{messages[-1]['content'][:60]!r}: mend it, or give --template plain")


def encode_prompts(problems: list[Problem], tokenizer, template: str,
                   max_prompt_length: int) -> list[Prompt]:
    """Tokenise the problems; drop those longer than max_prompt_length tokens, and say how many."""
    start = []  # a chat template writes its own BOS
    if not uses_chat(tokenizer, template):  # what the tokenizer puts before a text, none of its EOS
        text = [problems[0].text]
        marked, bare = (tokenizer(text, add_special_tokens=x).input_ids[0] for x in (True, False))
        places = [i for i in range(len(marked)) if marked[i : i + len(bare)] == bare]
        start = marked[: min(places, default=0)]
    template = template.removeprefix("".join(tokenizer.convert_ids_to_tokens(start)))
    texts = [format_prompt(p.text, tokenizer, template, p.kind, p.turns) for p in problems]
    ids = [start + rest for rest in tokenizer(texts, add_special_tokens=False).input_ids]
    after = [text.rpartition(p.text)[2] for p, text in zip(problems, texts, strict=True)]
    openings = ["<think>" * ("<think>" in x.rpartition("</think>")[2]) for x in after]
    prompts = [Prompt(*prompt) for prompt in zip(problems, ids, openings, strict=True)]
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_prompt_length]
    if len(kept) < len(prompts):
        say(f"{len(prompts) - len(kept)} of {len(prompts)} prompts over {max_prompt_length} tokens "
            "were dropped")
    if not kept:
        raise UsageError(f"all prompts are longer: raise --max_prompt_length {max_prompt_length}")
    return kept


class PromptSampler:
    """Endless shuffled epochs. All state is `cursor`, the number of prompts used so far, for the
    order of epoch e is a permutation seeded by (seed, e); and `dead_share`, the share of prompts
    from whose answers nothing can be learned, as seen in the past steps."""

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts, self.seed = prompts, seed
        self.cursor: int = 0
        self.dead_share: float | None = None
        self._epoch, self._order = -1, np.empty(0, int)

    def state(self) -> dict:
        return dict(cursor=self.cursor, dead_share=self.dead_share)

    def restore(self, state: dict) -> None:
        self.cursor, self.dead_share = state.get("cursor", 0), state.get("dead_share")

    def note_dead(self, share: float) -> None:
        """Take in a step's share of dead prompts; slowly, for one step's is noisy."""
        before = share if self.dead_share is None else self.dead_share
        self.dead_share = 0.8 * before + 0.2 * share

    def rewind(self, draw: int) -> None:
        """Let `draw` be the next one, again: those from it on were not used."""
        self.cursor = draw

    def next(self, n: int) -> list[tuple[int, Prompt]]:
        """Return the next n prompts, each with its draw index, unique over the whole run."""
        drawn = []
        for draw in range(self.cursor, self.cursor + n):
            epoch, position = divmod(draw, len(self.prompts))
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._epoch, self._order = epoch, rng.permutation(len(self.prompts))
            drawn.append((draw, self.prompts[self._order[position]]))
        self.cursor += n
        return drawn


def request_seed(*key: object) -> int:
    """Return a sampling seed of e.g. (run seed, draw index), far from all other keys': response
    i of a prompt uses seed + i, and one seed for all prompts would correlate their samples."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


# ---- engine -------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One response: token ids (the stop token included) and the log-probability with which vLLM
    sampled each, both (T,); finish_reason is "stop" or "length" (truncated). `sample` adds text,
    grade and reward; training the advantage, and the prompt where all ranks' responses are (each
    has it, and the tests of a program can be megabytes)."""

    prompt: Prompt | None
    ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    text: str = ""
    grade: Grade | None = None
    reward: float = 0.0
    advantage: float = 0.0

    @property
    def correct(self) -> bool:
        """Return the polarity: the grade's flag, or where it has none the advantage's sign."""
        return self.advantage > 0 if self.grade.correct is None else self.grade.correct


def stop_token_ids(tokenizer, model: str, template: str = "auto") -> list[int]:
    """Return all ids that end a response: the tokenizer's EOS, the generation config's, and with a
    chat template the token that ends a turn: a base model's EOS is often not that one."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the file is optional
        ids = None
    ids = ids if isinstance(ids, list) else [ids]
    if uses_chat(tokenizer, template):
        turns = [dict(role="user", content="?"), dict(role="assistant", content="ANSWER")]
        text = chat_text(tokenizer, turns).rpartition("ANSWER")[2].strip()
        after = tokenizer(text, add_special_tokens=False).input_ids
        ids += [i for i in after[:1] if i in tokenizer.added_tokens_decoder]
    return sorted({i for i in [tokenizer.eos_token_id, *ids] if i is not None})


def of_vllm(doing: str):
    """Turn whatever vLLM raises in the block into a UsageError, after its traceback."""
    def advice(why: BaseException) -> str:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            traceback.print_exception(why)
        lacking = re.search("(?<!illegal )(?<!shared )memory", str(why), re.IGNORECASE)
        return "lower --max_num_seqs or change --gpu_memory" if lacking else "see its traceback"
    return explain(f"vLLM failed {doing}", advice)


class Engine:
    """vLLM in this process, one engine per rank (data parallel replicas); with tensor_parallel T,
    one per T ranks in a row, which then must all make the same calls. torch.distributed must be
    initialised, and no context be longer than the model's: vLLM would truncate silently."""

    @of_vllm("to start")
    def __init__(self, model: str, tokenizer, *, max_model_len: int, max_num_seqs: int = 256,
                 gpu_memory: float = 0.6, seed: int = 0, tensor_parallel: int = 1, dtype=None,
                 template: str = "auto", sleeps: bool = True, **options: Any):
        import torch
        from transformers import AutoConfig

        self.cpu = not torch.cuda.is_available()
        config = AutoConfig.from_pretrained(model)
        # Read when vLLM is imported. The engine core lives in this process: external_launcher
        # needs that, and weights then reach it without a copy through another process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # while it is imported
        warnings.filterwarnings("ignore", module="vllm|torch.distributed", category=FutureWarning)
        if self.cpu:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else 15 s of compilation at the first call
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # runs may share cores
        from vllm import LLM

        if self.cpu:
            room = 64 * max_model_len * cache_bytes(config, 4)  # for 64 whole sequences
            options = dict(kv_cache_memory_bytes=int(np.clip(room, 256 << 20, 4 << 30))) | options
        else:
            # watermark: blocks kept free, else running sequences throw each other out
            options = dict(gpu_memory_utilization=gpu_memory, enable_sleep_mode=sleeps,
                           watermark=0.05) | options
        self.llm = LLM(
            model=model, seed=seed, dtype=dtype or (torch.float32 if self.cpu else torch.bfloat16),
            hf_overrides=dict(head_dtype="float32"),  # logits rounded to bf16 would be 0.1 off
            distributed_executor_backend="external_launcher", tensor_parallel_size=tensor_parallel,
            max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            # A prompt split over two batches draws a token that is thrown away, and vLLM cannot
            # take that back from a CPU generator: "CPU Generator does not use offset".
            enable_chunked_prefill=not self.cpu,
            max_num_batched_tokens=max(4096, max_num_seqs, max_model_len if self.cpu else 0),
            enforce_eager=self.cpu,
            logprobs_mode="processed_logprobs",  # "raw" would ignore the temperature
            generation_config="vllm",  # nothing but our own sampling parameters
            disable_log_stats=False, use_tqdm_on_load=False, **options,
        )  # fmt: skip
        self.max_model_len = max_model_len
        self.stop_ids = stop_token_ids(tokenizer, model, template)
        self.tensor_parallel, self.tied = tensor_parallel, config.tie_word_embeddings
        self.asleep = False

    def generate(
        self, prompts: list[Prompt], n: int, seeds: list[int], *, max_tokens: int,
        temperature: float = 1.0, top_p: float = 1.0,
    ) -> Iterator[tuple[int, Sample]]:
        """Yield n responses to each prompt, each as it ends, while others are running: response j
        to prompt i with the index i * n + j. Its seed is seeds[i] + j, and it depends on nothing
        else in the batch (on a GPU up to rounding: kernels depend on the batch's shape)."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if self.asleep:
            raise RuntimeError("the engine sleeps and its weights are gone: sync first")
        common = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens, logprobs=0)
        common.update(stop_token_ids=self.stop_ids, flat_logprobs=True, detokenize=False)
        common.update(output_kind=RequestOutputKind.FINAL_ONLY)
        engine = self.llm.llm_engine  # stepped here, to see each response as it ends
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            for j in range(n):
                params = SamplingParams(seed=seed + j, **common)
                engine.add_request(str(i * n + j), {"prompt_token_ids": prompt.ids}, params)
        while engine.has_unfinished_requests():
            with of_vllm("while sampling"):
                outputs = engine.step()
            for output in outputs:
                if output.finished:
                    i, response = int(output.request_id), output.outputs[0]
                    ids = np.array(response.token_ids, np.int32)
                    logprobs = np.array(response.logprobs.logprobs, np.float32)
                    yield i, Sample(None, ids, logprobs, response.finish_reason)

    @of_vllm("to take the new weights")
    def sync(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace the weights by the trainer's (see model.full_weights), given in layer order under
        their Hugging Face names; wake up if asleep. All ranks must call this."""
        if self.asleep:
            import torch

            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if self.cpu and self.tied:
            # vLLM's CPU backend keeps a packed copy of the head; with tied embeddings
            # reload_weights leaves that copy stale, without a word.
            self.llm.apply_model(
                lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        self.llm.reset_prefix_cache()  # its keys and values came from the old weights
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False

    def sleep(self) -> None:
        """Give weights and cache memory back to the trainer (GPU; on CPU nothing is shared)."""
        if not self.cpu:
            self.llm.sleep(level=2)
            self.asleep = True


def cache_bytes(config, itemsize: int) -> int:
    """Return what keys and values of one token take, of so many bytes each."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * itemsize * config.num_hidden_layers * heads * head_dim


# ---- sampling and grading -----------------------------------------------------------------------

Judge = Callable[[Problem, str], Future]  # (problem, text of a response) -> future of a Grade


def judge_by_rules(graders: Graders) -> Judge:
    """Return the judge that asks verify.py's graders."""
    return lambda problem, text: graders.submit(problem.kind, text, problem.reference,
                                                **problem.options)


def judge_by_function(name: str, timeout: float = 10.0) -> Judge:
    """Return the judge that asks function(response, problem) of --reward module:function. It gets
    the text and a Problem, for what it returns see `to_grade`; the module is found from the working
    directory. Raises UsageError where there is no such function. Calls run in 16 threads; one that
    raises, returns no reward or takes over `timeout` seconds has the reward nan."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    with explain(f"--reward {name!r} does not load", "expected module:function"):
        reward_function = getattr(importlib.import_module(module), function)

    def call(text: str, problem: Problem, grades: list[Grade]) -> None:
        try:
            grades.append(to_grade(reward_function(text, problem)))
        except BaseException as why:  # SystemExit too, which would end the thread without a word
            grades.append(Grade(None, None, "error", brief(why), math.nan))

    def judge(problem: Problem, text: str) -> Grade:
        grades: list[Grade] = []
        thread = threading.Thread(target=call, args=(text, problem, grades), daemon=True)
        thread.start()  # of its own, for a call that hangs cannot be ended
        thread.join(timeout)
        late = Grade(None, None, "timeout", f"over --grade_timeout, {timeout:g} s", math.nan)
        return grades[0] if grades else late

    pool = ThreadPoolExecutor(16, "reward")
    return lambda problem, text: pool.submit(judge, problem, text)


def to_grade(result: Any) -> Grade:
    """Return the grade of a reward function's result: a number, (number, correct) or (number,
    correct, {part: number}). Raises for another one, and for what float32 cannot hold."""
    given = result if isinstance(result, tuple) else (result,)
    reward, correct, parts = (*given, None, None)[: max(3, len(given))]
    numbers = dict(parts or {}) | dict(reward=reward)
    for name, value in numbers.items():
        if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
            raise ValueError(f"{name} is {value!r}")
        numbers[name] = float(value)
    if correct not in (None, False, True) or not numbers.keys().isdisjoint(("errors", *KINDS)):
        raise ValueError(f"correct is {correct!r}, not True or False, or a part is named as a kind")
    correct = None if correct is None else bool(correct)
    return Grade(correct, None, reward=numbers.pop("reward"), parts=numbers)


def sample(
    engine: Engine, tokenizer, judge: Judge, prompts: list[Prompt], n: int, seeds: list[int], *,
    seconds: dict[str, float], progress: str = "", **sampling: Any,
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (index of the prompt, its n graded samples) for this rank's share of the prompts, each
    as soon as it is graded; the caller gathers. All ranks together yield the same for any number of
    them; of those that share an engine the first yields. Grading runs in the judge's processes
    while the engine generates; `seconds` gets the time of that, and of waiting for grades then."""
    mine = range(rank() // engine.tensor_parallel, len(prompts),
                 world_size() // engine.tensor_parallel)
    parts: dict[int, list] = {p: [] for p in mine}  # of each prompt: see `graded`
    complete: list[int] = []  # prompts with n responses, whose grades may be missing
    responses = engine.generate([prompts[p] for p in mine], n, [seeds[p] for p in mine], **sampling)
    hidden = not progress or rank() != 0 or None  # None: shown on a terminal only
    # Other special tokens are read by the graders: in some models <think> is one
    unread = {*engine.stop_ids, tokenizer.pad_token_id, tokenizer.bos_token_id}
    with timed(seconds, "generate"):
        for i, response in tqdm(responses, progress, len(mine) * n, leave=False, disable=hidden,
                                delay=2):
            if rank() % engine.tensor_parallel:
                continue
            p = mine[i // n]
            text = tokenizer.decode([i for i in response.ids.tolist() if i not in unread])
            response.text = prompts[p].opening + text
            parts[p].append((i % n, response, judge(prompts[p].problem, response.text)))
            if len(parts[p]) == n:
                complete.append(p)
            for p in list(complete):
                if all(grade.done() for _, _, grade in parts[p]):
                    complete.remove(p)
                    yield p, graded(parts.pop(p))
    with timed(seconds, "grade"):
        for p in complete:
            yield p, graded(parts.pop(p))


def graded(parts: list[tuple[int, Sample, Future]]) -> list[Sample]:
    """Return a prompt's samples, given as (index, sample, its future grade), in order and with
    grades and rewards. Where the reward function failed, the reward is the lowest of the others."""
    samples = []
    for _, one, future in sorted(parts, key=lambda part: part[0]):
        one.grade = future.result()
        one.reward = float(one.grade.correct if one.grade.reward is None else one.grade.reward)
        samples.append(one)
    worst = min((s.reward for s in samples if not math.isnan(s.reward)), default=0.0)
    for one in samples:
        if math.isnan(one.reward):
            one.reward = worst
    return samples


def is_live(group: list[Sample]) -> bool:
    """Return whether the group's rewards differ: else its advantages are all 0."""
    return len({sample.reward for sample in group}) > 1


def reward_failed(grade: Grade) -> bool:
    """Return whether --reward raised, was late or gave no number: `rollout` marks that with nan."""
    return grade.reward is not None and math.isnan(grade.reward)


def empty_sample() -> Sample:
    """Return a response without tokens, for a rank that has none left."""
    return Sample(Prompt(None, [0]), np.empty(0, np.int32), np.empty(0, np.float32), "stop",
                  grade=Grade(False, None))
