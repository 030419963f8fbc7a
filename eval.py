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
question but GPQA's, response and verdict). Without a hub: --data-dir with aime24, aime25, aime26,
hmmt_feb_2025, math500, gsm8k_test, gpqa_diamond (gated), as .jsonl, .parquet or .csv, and
LiveCodeBench's test.jsonl ... test6.jsonl.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

import rollout
import verify
from rollout import Problem, Prompt, Sample
from shelf import ranks
from shelf.config import suggestion
from shelf.data import load_problems, name_apart, read_rows
from shelf.folder import append_records, claim, environment, folder_path, keep_records, replace_file
from shelf.metrics import glossary
from shelf.ranks import UsageError, explain, gather, init_distributed, rank, say, world_size
from shelf.report import KEPT, compare, draw_runs, results_table
from verify import Graders

HERE = Path(__file__).resolve().parent

# ---- benchmarks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Benchmark:
    source: str  # a file, or a data set on the hub, owner/name[:config]
    file: str = ""  # its local copy in --data-dir, without a suffix
    kind: str = "math"
    id: str = "id"  # the column that names a row
    n: int = 8  # samples per problem


BENCHMARKS = {
    "aime24": Benchmark("math-ai/aime24", "aime24"),  # MAA, AIME I and II 2024
    "aime25": Benchmark("math-ai/aime25", "aime25"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "math500", id="unique_id"),  # arXiv 2305.20050
    # Rein et al. 2311.12022. Its authors ask not to publish questions: we print and store none
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

    with explain(f"{bench.source} did not load from the hub",
                 f"give --data-dir FOLDER with {', '.join(parts)}"):
        return [hf_hub_download(bench.source, part, repo_type="dataset") for part in parts]


def gpqa_row(row: dict) -> dict:
    """Return a row of GPQA with its options as choices, in an order that the question fixes."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    seed = rollout.request_seed("gpqa", row["Question"])
    order = np.random.default_rng(seed).permutation(4).tolist()
    return dict(problem=row["Question"], choices=[options[i] for i in order],
                answer="ABCD"[order.index(0)], unpublished=True)


def load_benchmark(name: str, bench: Benchmark, args: argparse.Namespace) -> list[Problem]:
    """Read a benchmark's problems, at most --limit, with distinct ids."""
    rows = []
    try:
        for source in find_sources(name, bench, args):
            for where, row in read_rows(source, "test"):  # or its only split
                day = str(row.get("contest_date", ""))[:10]
                if bench.kind == "code" and not args.lcb_from <= day <= (args.lcb_to or day):
                    continue
                identity = row.get(bench.id, row.get("id", Path(where).name))
                row = gpqa_row(row) if row.keys() >= {"Question", "Correct Answer"} else row
                rows.append((where, row | dict(id=identity)))
        if not rows:
            window = f" with a contest date in {args.lcb_from or '...'} to {args.lcb_to or '...'}"
            raise UsageError("no problems" + window * (bench.kind == "code"))
        problems = load_problems(name, rows=rows, kind=bench.kind)
    except UsageError as error:
        raise UsageError(f"benchmark {name}: {error}") from None
    return name_apart(problems[: args.limit or None])


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


def lacks_module(record: dict) -> bool:
    """Tell whether a program that failed imports what is not in the standard library: under the
    official harness, which has numpy for example, it might be right."""
    if record["correct"] or record.get("kind") != "code":
        return False
    imported = re.findall(r"^[ \t]*(?:from|import)[ \t]+(\w+)", record["extracted"] or "", re.M)
    return not sys.stdlib_module_names.issuperset(imported)


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
        missing_modules=sum(map(lacks_module, records)),
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
    return rollout.request_seed("eval", seed, prompt.problem.text, *prompt.problem.turns)


def make_records(name: str, prompt: Prompt, first: int, samples: list[Sample]) -> list[dict]:
    """Make the lines of samples.jsonl, without GPQA's problems; first: the first sample's seed.
    Those of math and choice can be graded again by verify.py as they are."""
    problem = prompt.problem
    asked = {} if "unpublished" in problem.options else dict(problem=problem.text)
    if problem.kind != "code":
        asked |= dict(answer=problem.reference) | problem.options
    return [
        dict(benchmark=name, id=problem.id, sample=j, seed=first + j, kind=problem.kind, **asked,
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
        groups.update(gather(mine))
    for prompt in todo:
        if prompt.problem.id not in groups:  # it fills the context: wrong, and counted
            lost = Sample(prompt, np.empty(0), np.empty(0), "prompt_too_long",
                          grade=verify.Grade(False, None, "no_answer"))
            group = make_records(name, prompt, problem_seed(seed, prompt), [lost] * n)
            groups[prompt.problem.id] = group
            if rank() == 0:
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


# ---- folders ------------------------------------------------------------------------------------


class OutputFolder:
    """--out: results.json, and samples.jsonl, to which each rank appends a problem's records when
    it is done. A second start with the same settings goes on there. With "" nothing is written."""

    def __init__(self, folder: str, settings: dict):
        self.path, self.active = folder_path("--out", folder), bool(folder)
        self.results = dict(settings=settings, benchmarks={}, scores={})
        if self.active and (self.path / "results.json").exists():
            self.results |= verify.read_json(self.path / "results.json")
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
        if self.active and rank() == 0:
            replace_file(self.path / "results.json", json.dumps(self.results, indent=1) + "\n")

    def keep(self, group: list[dict]) -> None:
        if self.active:
            append_records(self.path / "samples.jsonl", group)

    def finished(self, prompts: dict[str, list[Prompt]], counts: dict[str, int], seed: int) -> dict:
        """Return {benchmark: {problem id: its records}} of the problems that earlier runs finished,
        on all ranks. A record's seed tells its problem, in the words it had then, and sample."""
        left = []
        if self.active and rank() == 0:
            left = keep_records(self.path / "samples.jsonl")
        samples = {(r["benchmark"], r["seed"]): r for r in gather(left)}
        done: dict[str, dict] = {name: {} for name in prompts}
        for name, asked in prompts.items():
            for prompt in asked:
                first = problem_seed(seed, prompt)
                records = [samples.get((name, first + j)) for j in range(counts[name])]
                if all(records):
                    done[name][prompt.problem.id] = records
        return done


# ---- command line -------------------------------------------------------------------------------

FLAGS = (  # names, default, help
    ("--benchmarks", "", f"some of {','.join(BENCHMARKS)} (demo, unless --data is given)"),
    ("--data", "", "files of your own, .jsonl, .parquet or .csv, with commas"),
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


COMMANDS = ("compare", "plot", "show", "glossary")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("--model", required=True, help="hub name or save_pretrained folder")
    for names, default, text in FLAGS:
        flag = dict(action=argparse.BooleanOptionalAction) if default is False else dict(
            type=type(default))
        parser.add_argument(*names.split(), default=default, **flag,
                            help=f"{text} (default: %(default)s)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        helps = {name[2:]: text for names, _, text in FLAGS for name in names.split()}
        refuse(f"{unknown[0]}: no such flag{suggestion(unknown[0], helps)}")
    return args


def refuse(why: str):
    raise UsageError(why)


def fingerprint(model: str) -> str:
    """Return a hash of a local model's weights: of its files' names, sizes and parts; "" for a hub
    model."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(8):  # the first is at the start, the last at the end
                file.seek(max(size - (1 << 16), 0) * part // 7)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16] if Path(model).is_dir() else ""


def check_args(args: argparse.Namespace) -> dict[str, Benchmark]:
    """Return the benchmarks asked for; UsageError for what cannot work."""
    names = [name for name in args.benchmarks.split(",") if name] or ["demo"] * (not args.data)
    if unknown := ",".join(name for name in names if name not in BENCHMARKS):
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
    if args.tensor_parallel < 1 or world_size() % args.tensor_parallel:
        raise UsageError(f"--tensor_parallel {args.tensor_parallel} does not divide the "
                         f"{world_size()} rank(s)")
    benches = {name: BENCHMARKS[name] for name in names}
    if args.data:
        for source in filter(None, map(str.strip, args.data.split(","))):
            benches[Path(source).stem] = Benchmark(source, kind=args.kind)
    return benches


def run(args: argparse.Namespace) -> None:
    """Evaluate every benchmark on one engine; print the tables, write --out."""
    from shelf.checks import check_machine, check_weights  # with torch

    check_machine(False)
    benches = check_args(args)
    tokenizer, config = rollout.load_tokenizer(
        args.model, 0, args.max_response_length, args.template)
    check_weights(args.model, config)
    args.max_response_length = args.max_response_length or 8192
    if config.num_attention_heads % args.tensor_parallel:
        raise UsageError(f"--tensor_parallel {args.tensor_parallel} does not divide the model's "
                         f"{config.num_attention_heads} attention heads")
    prompts = {}
    for name, bench in benches.items():
        problems = load_benchmark(name, bench, args)
        prompts[name] = rollout.encode_prompts(problems, tokenizer, args.template, sys.maxsize)
    counts = {name: args.n or bench.n for name, bench in benches.items()}
    args.weights = fingerprint(args.model)
    out = OutputFolder(args.out, vars(args))
    about = dict(device=init_distributed(), ranks=world_size(), **environment())
    kinds = {prompt.problem.kind for asked in prompts.values() for prompt in asked}
    if "code" in kinds:
        about["sandbox"] = verify.protections(args.unsafe_code)
        say(about["sandbox"])
    texts = {k: rollout.format_prompt("{problem}", tokenizer, args.template, k) for k in kinds}
    if args.out:
        claim("--out", out.path)
    out.write(settings=vars(args), environment=about, prompts=texts)
    finished = out.finished(prompts, counts, args.seed)
    total, old = sum(map(len, prompts.values())), sum(map(len, finished.values()))
    say(f"{args.model}: {total} problems ({old} were finished before), {about['ranks']} rank(s)")
    engine = None
    if old < total:
        longest = max(len(prompt.ids) for asked in prompts.values() for prompt in asked)
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
            from shelf.show import main as show

            return show(argv[1:])
        if command[:1] in ("", "-"):
            return run(parse_args(argv))
        if command not in COMMANDS:
            refuse(f"{command}: no such command{suggestion(command, dict.fromkeys(COMMANDS, ''))}")
        parser = argparse.ArgumentParser(f"eval.py {command}")
        if command == "glossary":
            parser.add_argument("names", nargs="*", help="metrics, all if none is named")
        else:
            parser.add_argument("names", nargs="+", help="folders of --out, or of runs to plot")
        if command == "plot":
            parser.add_argument("--out", default="curves.png", help="the picture")
        args = parser.parse_args(argv[1:])
        if command == "plot":
            draw_runs(list(map(Path, args.names))).savefig(args.out)
            print(args.out)
        else:
            print(compare(args.names) if command == "compare" else glossary(args.names))
    except UsageError as error:
        ranks.give_up(error)


if __name__ == "__main__":
    ranks.launch(main)
