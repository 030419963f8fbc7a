#!/usr/bin/env bash
# A3PO on one 80 GB GPU: Qwen3-1.7B-Base on DAPO-Math-17k. The paper's method and learning rate, a
# smaller model, a smaller batch and shorter answers, so that a night gives a curve.
#
#   bash recipes/one_gpu.sh                     # trial, base evaluation, training, evaluation
#   METHOD=dapo bash recipes/one_gpu.sh         # the method to compare with: same data, same seed
#   bash recipes/one_gpu.sh 2>&1 | tee one_gpu.log
#
# NOTHING BELOW HAS EVER BEEN RUN: this project has had no GPU. That the commands parse is tested;
# the same code on the demo is run on a CPU (recipes/laptop.sh). Figures marked "calculated" come
# from the sizes of the model, not from a measurement.
#
# Why not 8B? Training keeps 16 bytes a parameter: weights, gradients and Adam's two averages in
# float32 (in bfloat16, updates of 1e-6 would be lost). 8.2 billion parameters are 131 GB. That is
# eight GPUs' work (recipes/eight_gpus.sh). By the same sum, on one 80 GB card about 4 billion
# parameters are the most; on 24 GB, Qwen3-0.6B-Base (calculated). With --offload weights, gradients
# and Adam stay in the host's memory, and 8B trains on one card of 80 GB with 131 GB beside it; each
# update then moves 33 GB each way and runs Adam on the CPU: tens of seconds (on paper).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-Qwen/Qwen3-1.7B-Base}
DATA=${DATA:-BytedTsinghua-SIA/DAPO-Math-17k}  # easier, with short answers: openai/gsm8k:main
METHOD=${METHOD:-a3po}
STEPS=${STEPS:-100}
DECAY_RATE=${DECAY_RATE:-0.015}                # change it together with STEPS, see 3
RESPONSE=${RESPONSE:-4096}                     # tokens; 1024 is enough for GSM8K
OUT=${OUT:-runs/one_gpu}
[ -x "$PYTHON" ] || bash run.sh install        # with a GPU driver: vllm and CUDA torch, 4 GB
# Model and data come from the Hugging Face hub. Without it, download elsewhere and set MODEL to the
# folder and DATA to a .jsonl or .parquet file.

# -----------------------------------------------------------------------------
# 1. A trial: two steps at the real lengths, with few prompts. It takes the memory that the long run
#    takes, so it fails where that would. Look at:
#    - the printed example: is the prompt what you expect, does the answer end where it should? A
#      base model that is given a chat template may write on after its answer up to the limit.
#      If `truncated` in metrics.jsonl is above 0.5, try --template plain, here and in all below.
#    - ratio_max_deviation: 0 or nearly. The first update of a step has not changed anything yet.
#    - mismatch_mean, vLLM's log-probs against the trainer's: 1e-2 is usual in bfloat16. If it is
#      above 0.1, or grows from step 0 to step 1, weights do not arrive: stop here.
#    - the reward: near 0 means the data is too hard for the model, near 1 too easy. Dynamic
#      sampling draws up to three times more prompts to fill the batch (dead_groups).
#    Memory, calculated, of 85 GB (a card sold as 80): weights and Adam 20.6, about 5 of CUDA
#    context and buffers, and vLLM has the rest, less 3 %. Training: states 27.5, then activations
#    and logits.
#    Out of memory? While generating: lower --gpu_memory. In the update: --micro_batch_tokens 8192,
#    then --head_chunk 512. Neither changes results.
if [ ! -e "$OUT/trial/summary.md" ]; then    # once: not again when this script is started again
  rm -rf "$OUT/trial"
  "$PYTHON" a3po.py --setting paper --preset "$METHOD" --model "$MODEL" --data "$DATA" --steps 2 \
      --prompts_per_step 32 --mini_batches 2 --max_response_length "$RESPONSE" \
      --eval_data "" --save_every 0 --output_dir "$OUT/trial"
fi

# -----------------------------------------------------------------------------
# 2. The base model on MATH-500 and AIME 2024, 4 samples a problem at the authors' temperature 0.6
#    and top_p 0.95 (defaults). --max_response_length as in training: a longer limit would measure
#    something that training never asked for. Started again, finished problems are not repeated.
"$PYTHON" eval.py --model "$MODEL" --benchmarks aime24,math500 --n 4 \
    --max_response_length "$RESPONSE" --out "$OUT/eval-base"

# -----------------------------------------------------------------------------
# 3. The run.
#    --setting paper           said aloud; it is the default on a GPU.
#    --prompts_per_step 128    x 8 responses = 1,024 a step, a quarter of the paper's 4,096.
#    --mini_batches 8          8 updates a step of 128 responses; the paper has 16 of 256. Fewer
#                              updates a step keep the data nearer to on-policy.
#    --decay_rate 0.015        rho falls from 2 to 1 in 67 steps: two thirds of the run, as the
#                              paper's 0.005 does in 200 of 300. Change it together with STEPS.
#    --lr                      1e-6, the paper's for 7-8B. Small models bear more; not tried.
#    --eval_every 20           MATH-500's first 128 problems, 4 samples each.
#    --save_every 20           3.4 GB of bfloat16 weights each, and 21 GB (calculated) that resuming
#                              needs, kept for the newest alone.
#    --resume auto             killed? The same command goes on from the newest checkpoint.
#    How long: not known. The console prints seconds a step; generation is most of it. Times STEPS.
#    Look at, every hour: eval_accuracy; entropy (a fall to near 0 in 20 steps is a collapse);
#    truncated and response_length (answers that grow into the limit are cut off and count as
#    wrong: raise RESPONSE); grad_norm; skipped_updates (should be 0).
"$PYTHON" a3po.py --setting paper --preset "$METHOD" --model "$MODEL" --data "$DATA" \
    --steps "$STEPS" --prompts_per_step 128 --mini_batches 8 --max_response_length "$RESPONSE" \
    --decay_rate "$DECAY_RATE" --eval_data HuggingFaceH4/MATH-500 --eval_limit 128 --eval_n 4 \
    --eval_every 20 --save_every 20 --output_dir "$OUT/$METHOD" --resume auto

# -----------------------------------------------------------------------------
# 4. After it. The last checkpoint, not the best one on the held-out data: choosing it there would
#    be training on the test.
"$PYTHON" eval.py --model "$OUT/$METHOD/checkpoints/step_$STEPS" --benchmarks aime24,math500 \
    --n 4 --max_response_length "$RESPONSE" --out "$OUT/eval-$METHOD-$STEPS"
"$PYTHON" eval.py compare "$OUT/eval-base" "$OUT/eval-$METHOD-$STEPS"
"$PYTHON" eval.py plot "$OUT/$METHOD" --out "$OUT/curves.png"
# AIME's 30 problems give a standard error of several points: read MATH-500 for differences.
