"""One page that shows a run: its curves, its flags, and its responses token by token.

    python eval.py show runs/X [--out page.html] [--step N]

Of a training run the page has the responses in tokens.jsonl (--log_tokens), else those in
rollouts.jsonl as text; of an evaluation those in samples.jsonl. It is one file without network or
build step. What the model wrote is untrusted: it is data in the page, shown as text only.
"""

import argparse
import json
from pathlib import Path

from shelf.config import defaults, parse_args
from shelf.folder import replace_file
from shelf.metrics import describe
from shelf.ranks import UsageError
from verify import read_json, read_jsonl

PAGE = Path(__file__).with_name("page.html")  # the data takes the place of /*DATA*/
CURVES = (("reward", "eval_accuracy"), ("entropy_positive", "entropy_negative", "entropy"),
          ("response_length_positive", "response_length_negative", "response_length"),
          ("ratio_max", "grad_norm"), ("clip_low", "clip_high"), ("mismatch_mean",))
TABLE = ("accuracy", "accuracy_stderr", "entropy", "length", "truncated", "no_answer", "pass@2",
         "pass@4", "pass@8", "pass@16", "pass@32", "problems", "n")


def read(path: Path) -> list[dict]:
    return [record for _, record in read_jsonl(path)] if path.exists() else []


def table(rows: dict[str, dict]) -> list[list[str]]:
    """Return heading and rows of the metrics that any of them has."""
    names = [name for name in TABLE if any(name in row for row in rows.values())]
    cells = [[who, *(f"{row[name]:.4g}" if row.get(name) is not None else "-" for name in names)]
             for who, row in rows.items()]
    return [["", *names], *cells]


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
    other = [[name, str(value), str(usual[name])] for name, value in changed(settings).items()]
    metrics = read(folder / "metrics.jsonl")
    curves = [[dict(label=", ".join(describe(name)[:2]), meaning=describe(name)[2], points=[
        [x["step"], x[name]] for x in metrics if x.get(name) is not None]) for name in names]
        for names in CURVES]
    evals = [{k[5:]: v for k, v in x.items() if k.startswith("eval_")} | dict(step=x["step"])
             for x in metrics if "eval_accuracy" in x]
    rows = {f"held out, step {x['step']}": x for x in (evals[:1] + evals[1:][-1:])}
    responses = read(folder / "tokens.jsonl") or [
        x | dict(text=x["response"], reference=x["answer"]) for x in read(folder / "rollouts.jsonl")
    ]
    about = {k: v for k, v in settings.items() if k in usual} | settings.get("environment", {})
    return dict(title=f"{settings['preset']} on {Path(settings['data']).name}", changed=other,
                about=[[k, str(v)] for k, v in about.items()], curves=curves, table=table(rows),
                responses=responses, clip=[settings["clip_low"], settings["clip_high"]])


def of_evaluation(folder: Path) -> dict:
    """Return what the page shows of an evaluation."""
    results = read_json(folder / "results.json")
    about = results["settings"] | results["environment"]
    responses = [x | dict(text=x["response"], problem=f"{x['benchmark']}: {x['id']}",
                          reference=x.get("answer")) for x in read(folder / "samples.jsonl")]
    return dict(title=f"evaluation of {results['settings']['model']}", changed=[],
                about=[[k, str(v)] for k, v in about.items()], curves=[],
                table=table(results["benchmarks"]), responses=responses, clip=[0, 0])


def page(data: dict) -> str:
    """Return the page. In a script element only "<" could end the data."""
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text("utf-8").replace("/*DATA*/", packed)


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
    replace_file(out, page(data))
    print(f"{out}: {len(data['responses'])} responses, {out.stat().st_size / 1e6:.1f} MB")
