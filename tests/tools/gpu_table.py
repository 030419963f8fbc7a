"""Which Qwen3 trains on how many GPUs, by the plan: the table of tests/README.md. It takes an hour.

    python tests/tools/gpu_table.py [--models 8B] [--ranks 8]

A model is its config.json alone, written here. Where the paper's setting does not fit, the first
of TRIES that does is named. Seconds are calculated: see SPEEDS in shelf/report.py.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from shelf import plan, report  # noqa: E402

MODELS = {  # hidden, intermediate, layers, heads, tied: from the hub's config.json
    "1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False), "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}  # fmt: skip
TRIES = ("", "--micro_batch_tokens 9216", "--offload", "--offload --micro_batch_tokens 9216")
CARDS = (80, 141)
MEAN = 3000  # tokens of a response


def write_model(name: str, folder: Path) -> Path:
    hidden, intermediate, layers, heads, tied = MODELS[name]
    path = folder / f"Qwen3-{name}"
    path.mkdir()
    config = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=hidden, head_dim=128,
        intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, tie_word_embeddings=tied, vocab_size=151936,
        max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu",
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def cell(measured, ranks: int, card: int) -> str:
    """Return the first flags that fit, the peak with them and a step's seconds; or why the last of
    them do not."""
    for flags in TRIES:
        x = measured(ranks, flags)
        why = plan.problem(x, card * plan.NOMINAL_GB)
        if not why:
            costs = report.step_costs(x, ranks, MEAN).values()
            seconds = " + ".join(f"{seconds:.0f}" for _, seconds in costs)
            need = f"`{flags}`: " if flags else ""
            return f"{need}{x['peak'] / plan.GIB:.1f} GiB, {seconds} s"
    return f"no: {why}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            path = write_model(name, Path(folder))

            @functools.cache
            def measured(ranks: int, flags: str, path=path) -> dict:
                flags = ["--setting=paper", f"--model={path}", *flags.split()]
                return plan.in_process(ranks, flags)

            for card in CARDS:
                print(f"| {name}, {card} GB", end="", flush=True)
                for ranks in args.ranks:
                    print(f" | {cell(measured, ranks, card)}", end="", flush=True)
                print(" |", flush=True)


if __name__ == "__main__":
    main()
