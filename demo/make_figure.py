"""The README's pictures.

    python demo/make_figure.py --out F.png               which tokens A3PO amplifies in a correct
                                                         and an incorrect response; rho's decay
    python demo/make_figure.py --out F.png runs/demo-*   curves of those runs, a band over seeds
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import a3po  # noqa: E402
import rollout  # noqa: E402
from model import collate  # noqa: E402
from rollout import Prompt, Sample  # noqa: E402
from shelf import report  # noqa: E402
from verify import Grade  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PROBLEM = "Compute 3+4*5+2."
RESPONSES = (
    ("correct", True, "First 4*5=20, so 3+20=23; 2+23=25. So \\boxed{25}"),
    ("incorrect", False, "We get 3+4=7; 7*5=35, so 35+2=37. So \\boxed{37}"),
)


def token_probabilities(text: str) -> tuple[list[str], torch.Tensor]:
    tokenizer, _ = rollout.load_tokenizer(str(HERE / "model"), 64, 64)
    policy = a3po.build(a3po.parse_args(["--setting=demo"]), "cpu", "grids", None)[0]
    prompt = Prompt(None, tokenizer(rollout.format_prompt(PROBLEM, tokenizer)).input_ids)
    ids = np.array(tokenizer(text).input_ids + [tokenizer.eos_token_id])
    sample = Sample(prompt, ids, np.zeros(len(ids)), "stop", grade=Grade(True, None))
    with torch.no_grad():
        logprobs, _, _ = policy(collate([sample], "cpu", "grids"))
    return [tokenizer.decode([i]).strip() or "␣" for i in ids], logprobs


def draw_response(axis, title: str, correct: bool, text: str) -> None:
    tokens, logprobs = token_probabilities(text)
    advantage = torch.full_like(logprobs, 1.0 if correct else -1.0)
    shaped = a3po.shape_advantages(
        advantage, torch.tensor([correct]), logprobs, torch.ones_like(logprobs),
        rho_positive=2.0, rho_negative=2.0,
    )
    colour = "#009E73" if correct else "#D55E00"
    chosen = (shaped / advantage)[0] > 1
    axis.bar(range(len(tokens)), logprobs[0].exp(), width=0.85,
             color=[colour if c else "lightgrey" for c in chosen])
    axis.set_xticks(range(len(tokens)), tokens, fontsize=10, family="monospace", rotation=35)
    for label, c in zip(axis.get_xticklabels(), chosen, strict=True):
        label.set_color(colour if c else "dimgrey")
        label.set_fontweight("bold" if c else "normal")
    kind = "least likely" if correct else "most likely"
    axis.set_title(f"{title} response, A {'>' if correct else '<'} 0. Coloured: the 20 % {kind} "
                   "tokens, whose A is multiplied by ρ", fontsize=11, loc="left")
    axis.set(ylabel="p(token)", ylim=(0, 1.05), xlim=(-0.6, len(tokens) - 0.4))


def draw_figure(out: Path) -> None:
    figure, axes = pyplot.subplot_mosaic([["a", "c"], ["b", "c"]], figsize=(12, 5),
                                         width_ratios=(3, 1), layout="constrained")
    for axis, response in zip((axes["a"], axes["b"]), RESPONSES, strict=True):
        draw_response(axis, *response)
    steps = range(300)
    axes["c"].plot(steps, [a3po.decayed_rho(2.0, step, 0.005) for step in steps])
    axes["c"].set_title("ρ, for both, decays to 1:\nthen A3PO is DAPO", fontsize=11)
    axes["c"].set(xlabel="training step", ylabel="ρ")
    axes["c"].grid(alpha=0.3)
    save(figure, out)


def draw_methods(folders: list[Path], out: Path) -> None:
    titles = dict(eval_accuracy="held-out accuracy", entropy="entropy, nats a token",
                  response_length="response length, tokens")
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    groups = report.group_runs(folders)
    colours = report.colours_of(groups)
    for label, runs in groups.items():
        for axis, name in zip(axes, titles, strict=True):
            report.draw_series(axis, runs, name, label, colours[label])
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set(title=title, xlabel="training step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, out)


def save(figure, out: Path) -> None:
    """Write a PNG of 64 colours: a third of the size."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs; none: the first form")
    parser.add_argument("--out", required=True, type=Path, help="the picture to write")
    args = parser.parse_args()
    if args.runs:
        draw_methods(args.runs, args.out)
    else:
        draw_figure(args.out)
