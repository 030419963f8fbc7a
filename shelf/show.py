"""One page that shows a run: its curves, its flags, and its responses token by token.

    python eval.py show runs/X [--out page.html] [--step N]

Of a training run the page has the responses in tokens.jsonl (--log_tokens), else those in
rollouts.jsonl as text; of an evaluation those in samples.jsonl. It is one file without network or
build step. What the model wrote is untrusted: it is data in the page, shown as text only.
"""

import argparse
import json
from pathlib import Path

from rollout import Sample
from shelf.config import defaults, parse_args
from shelf.folder import replace_file
from shelf.metrics import describe
from shelf.ranks import UsageError, say
from shelf.report import before_after, metric_rows
from verify import read_json, read_jsonl

PAGE = Path(__file__).with_name("page.html")  # the data takes the place of /*DATA*/
CURVES = (("reward", "eval_accuracy"), ("entropy_positive", "entropy_negative", "entropy"),
          ("response_length_positive", "response_length_negative", "response_length"),
          ("ratio_max", "grad_norm"), ("clip_low", "clip_high"), ("mismatch_mean",))


def show_example(sample: Sample, tokenizer) -> None:
    """Print one response with its mask, to see the template and where the loss applies."""
    ids, grade, reference = sample.ids.tolist(), sample.grade, sample.prompt.problem.reference
    verdict = {True: "correct", False: "incorrect", None: "no verdict"}[grade.correct]
    say(f"--- one example: {len(sample.prompt.ids)} prompt tokens (mask 0), {len(ids)} response "
        f"tokens (mask 1), finish reason {sample.finish_reason}\n"
        f"[0] {tokenizer.decode(sample.prompt.ids)!r}\n[1] {tokenizer.decode(ids)!r}\n"
        f"    extracted {grade.extracted!r}, reference {str(reference)[:200]!r}: "
        f"{verdict} ({grade.status})\n---")


def read(path: Path) -> list[dict]:
    return [record for _, record in read_jsonl(path)] if path.exists() else []


def changed(settings: dict) -> dict:
    """Return what a run's config.json has that its setting and preset have not; not its folder."""
    usual = vars(defaults(settings["setting"], settings["preset"]))
    return {name: value for name, value in settings.items() if value != usual.get(name, value)
            and name not in ("output_dir", "resume", "resume_changed", "config", "check")}


def with_config(argv: list[str]) -> list[str]:
    """Return the flags and before them the values in --config FILE, if that is given. Of a run's
    own file these are what differs from its preset, which may then be another."""
    path = parse_args(argv).config
    settings = read_json(path) if path else {}
    if "environment" in settings:
        settings = {key: settings[key] for key in ("setting", "preset")} | changed(settings)
    flags = [f"--{'' if value else 'no-'}{name}" if type(value) is bool else f"--{name}={value}"
             for name, value in settings.items()]
    return flags + argv


def of_training(folder: Path) -> dict:
    """Return what the page shows of a training run."""
    settings = read_json(folder / "config.json")
    usual = vars(defaults(settings["setting"], settings["preset"]))
    other = [["not the default", "value", "default"]]
    other += [[name, str(value), str(usual[name])] for name, value in changed(settings).items()]
    metrics = read(folder / "metrics.jsonl")
    curves = [[dict(label=", ".join(describe(name)[:2]), meaning=describe(name)[2], points=[
        [x["step"], x[name]] for x in metrics if x.get(name) is not None]) for name in names]
        for names in CURVES]
    responses = read(folder / "tokens.jsonl") or read(folder / "rollouts.jsonl")
    about = {k: v for k, v in settings.items() if k in usual} | settings.get("environment", {})
    return dict(title=f"{settings['preset']} on {Path(settings['data']).name}", unit="step",
                table=before_after(folder / "metrics.jsonl"), changed=other, about=about,
                curves=curves, responses=responses,
                clip=[settings["clip_low"], settings["clip_high"]])


def of_evaluation(folder: Path) -> dict:
    """Return what the page shows of an evaluation."""
    results = read_json(folder / "results.json")
    about = results["settings"] | results["environment"]
    responses = [dict(problem=f"{x['id']} (its question is not kept)") | x
                 for x in read(folder / "samples.jsonl")]
    return dict(title=f"evaluation of {results['settings']['model']}", unit="benchmark",
                table=metric_rows("benchmark", results["benchmarks"]), changed=[], about=about,
                curves=[], responses=responses)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("eval.py show", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a training run, or eval.py's --out")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/page.html)")
    parser.add_argument("--step", type=int, help="responses of this step alone")
    args = parser.parse_args(argv)
    if (args.run / "metrics.jsonl").exists() and (args.run / "config.json").exists():
        data = of_training(args.run)
    elif (args.run / "results.json").exists():
        data = of_evaluation(args.run)
    else:
        raise UsageError(f"{args.run} holds neither a training run (config.json, metrics.jsonl) "
                         "nor an evaluation (results.json)")
    if args.step is not None:
        data["responses"] = [x for x in data["responses"] if x.get("step") == args.step]
        if not data["responses"]:
            raise UsageError(f"--step {args.step}: no response of that step was kept")
    out = args.out or args.run / "page.html"
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # it ends no script
    replace_file(out, PAGE.read_text("utf-8").replace("/*DATA*/", packed))
    print(f"{out}: {len(data['responses'])} responses, {out.stat().st_size / 1e6:.1f} MB")
