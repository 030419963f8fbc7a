"""The README's pictures.

    python demo/make_figure.py              figure.png: which tokens A3PO amplifies in a correct and
                                            an incorrect response of the demo model, rho's decay
    python demo/make_figure.py runs/demo-*  methods.png: curves of those runs, a band over seeds
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import a3po  # noqa: E402
import eval as evaluation  # noqa: E402
import rollout  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PROBLEM = "Compute 3+4*5+2."
RESPONSES = (
    ("correct", True, "First 4*5=20, so 3+20=23; 2+23=25. So \\boxed{25}"),
    ("incorrect", False, "We get 3+4=7; 7*5=35, so 35+2=37. So \\boxed{37}"),
)


def token_probabilities(text: str) -> tuple[list[str], torch.Tensor]:
    tokenizer, _ = rollout.load_tokenizer(str(HERE / "model"), 64, 64)
    config = a3po.parse_args(["--setting=demo"])
    policy = a3po.Policy(a3po.load_model(config, config.model, "cpu"), config)
    prompt = tokenizer(rollout.format_prompt(PROBLEM, tokenizer)).input_ids
    ids = np.array(tokenizer(text).input_ids + [tokenizer.eos_token_id])
    batch = a3po.collate([a3po.Row(prompt, ids, np.zeros(len(ids)), True, 1.0, 1.0)], "cpu")
    with torch.no_grad():
        logprobs, _, _ = a3po.run_policy(policy, batch, config)
    return [tokenizer.decode([i]).strip() or "␣" for i in ids], logprobs


def draw_response(axis, title: str, correct: bool, text: str) -> None:
    tokens, logprobs = token_probabilities(text)
    advantage = torch.full_like(logprobs, 1.0 if correct else -1.0)
    shaped = a3po.shape_advantages(
        advantage, torch.tensor([correct]), logprobs, torch.ones_like(logprobs),
        rho_positive=2.0, rho_negative=2.0,
    )
    colour = "tab:green" if correct else "tab:red"
    chosen = (shaped / advantage)[0] > 1
    axis.bar(range(len(tokens)), logprobs[0].exp(), width=0.85,
             color=[colour if c else "lightgrey" for c in chosen])
    axis.set_xticks(range(len(tokens)), tokens, fontsize=9, family="monospace", rotation=35)
    for label, c in zip(axis.get_xticklabels(), chosen, strict=True):
        label.set_color(colour if c else "dimgrey")
        label.set_fontweight("bold" if c else "normal")
    kind = "lowest" if correct else "highest"
    axis.set_title(f"{title} response: A × ρ on the 20 % {kind}-probability tokens (coloured), A "
                   "on the others", fontsize=10, loc="left")
    axis.set(ylabel="probability", ylim=(0, 1.05), xlim=(-0.6, len(tokens) - 0.4))


def draw_figure() -> None:
    figure, axes = pyplot.subplot_mosaic([["a", "c"], ["b", "c"]], figsize=(12, 5),
                                         width_ratios=(3, 1), layout="constrained")
    for axis, response in zip((axes["a"], axes["b"]), RESPONSES, strict=True):
        draw_response(axis, *response)
    steps = range(300)
    axes["c"].plot(steps, [a3po.decayed_rho(2.0, step, 0.005) for step in steps])
    axes["c"].set(title="the weight decays to 1", xlabel="training step", ylabel="ρ(step)")
    axes["c"].grid(alpha=0.3)
    save(figure, "figure.png")


def draw_methods(folders: list[Path]) -> None:
    titles = dict(eval_accuracy="held-out accuracy", entropy="entropy, nats a token",
                  response_length="response length, tokens")
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for label, runs in evaluation.group_runs(folders).items():
        for axis, name in zip(axes, titles, strict=True):
            evaluation.draw_series(axis, runs, name, label)
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set(title=title, xlabel="training step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, "methods.png")


def save(figure, name: str) -> None:
    """As a PNG of 64 colours: a third of the size."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(HERE / name, optimize=True)


if __name__ == "__main__":
    if folders := list(map(Path, sys.argv[1:])):
        draw_methods(folders)
    else:
        draw_figure()
