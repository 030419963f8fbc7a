"""The study on a real language model: SmolLM2-135M on word problems that it does not soon solve.

    bash run.sh smollm2 --steps 0              gets the model into runs/smollm2/model
    python study/smollm2.py                    train what is missing of nine runs, half an hour each
    python study/study.py --judge              then results/summary.md says what they show

The demo's word problems on one operation are solved after a few steps: most groups are dead, and
the methods do not differ. Here sums and differences have numbers of two digits. The prompt shows
the demo's two worked examples; the split is by pairs of numbers, as in demo/make_word_problems.py.
"""

import dataclasses
import itertools
import json
import random
import sys
from pathlib import Path

import study

sys.path.insert(0, str(study.HERE.parent / "demo"))
import make_word_problems as words  # noqa: E402

WORK = Path("runs/smollm2")
NUMBERS, HELD_OUT = range(13, 60), 32  # of 1,128 pairs
KINDS = {name: words.KINDS[name] for name in ("gets", "gives")}
TEMPLATE = study.HERE.parent / "demo" / "smollm2" / "template.txt"
FLAGS = (f"--model {WORK}/model --data {WORK}/hard_train.jsonl --eval_data {WORK}/hard_test.jsonl "
         "--max_prompt_length 256 --max_response_length 40 --prompts_per_step 8 --mini_batches 2 "
         "--steps 20 --lr 1e-5 --decay_rate 0.05 --eval_every 5 --eval_n 2")

# Written down before the first run.
ABOUT = """SmolLM2-135M on sums and differences of two-digit numbers, 20 steps
(`study/smollm2.py`)."""
PLANNED = {"smollm2": ("smollm2", ("a3po", "dapo", "random"), range(200, 203))}
CLAIMS = [study.Claim("smollm2", text, source, "smollm2", "a3po", b, metric, effect)
          for metric, effect, text in (
              (study.ENTROPY, 0.02, "A3PO keeps more entropy than {} (SmolLM2)"),
              (study.END, 0.03, "A3PO ends more accurate than {} (SmolLM2)"))
          for text, b, source in ((text.format("DAPO"), "dapo", "paper, claim 5"),
                                  (text.format("random tokens"), "random", study.READ))]


@dataclasses.dataclass(frozen=True)
class Run(study.Run):
    @property
    def flags(self) -> list[str]:
        template = TEMPLATE.read_text()  # ends with the line's end that the chat format needs
        return ["--setting=demo", "--save_every=0", *FLAGS.split(), f"--template={template}",
                *study.METHODS[self.method].split(), f"--seed={self.seed}"]


def make_problems(out: Path) -> None:
    """Write hard_train.jsonl and hard_test.jsonl, whose pairs of numbers differ."""
    pairs = list(itertools.combinations(NUMBERS, 2))
    random.Random(0).shuffle(pairs)
    rng = random.Random(1)
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("hard_test", pairs[:HELD_OUT]), ("hard_train", pairs[HELD_OUT:])):
        rows = [words.write_problem(kind, form, *order, rng) for a, b in chosen
                for kind, form in KINDS.items() for order in ((a, b), (b, a))]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines)


def train_one(run: Run, out: Path) -> None:
    import a3po

    if run.method == "random":
        study.choose_at_random(run.seed)
    a3po.main([*run.flags, f"--output_dir={out}"])


def main() -> None:
    if len(sys.argv) > 1:  # a process of study.do
        *run, out = json.loads(sys.argv[1].removeprefix("--one="))
        return train_one(Run(*run), Path(out))
    if not (WORK / "model" / "config.json").exists():
        sys.exit(f"error: {WORK}/model is missing: bash run.sh smollm2 --steps 0 gets it")
    make_problems(WORK)
    runs = [Run(run.place, run.method, run.seed) for run in study.planned([*PLANNED.values()])]
    good = study.train_all(runs, 1, WORK / "hard", study.HERE / "results" / "smollm2.jsonl",
                           __file__)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
