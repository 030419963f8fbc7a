#!/usr/bin/env bash
# The paper's setting: Qwen3-8B-Base on DAPO-Math-17k, 300 steps of 512 prompts x 8 responses, 16
# updates a step, lr 1e-6, on eight 80 GB GPUs; then the paper's five benchmarks for the base and
# for the trained model, and the comparison. The defaults of a3po.py are this setting, so the
# commands are short.
#
#   bash recipes/eight_gpus.sh
#   METHOD=dapo bash recipes/eight_gpus.sh                                   # a baseline
#   MODEL=Qwen/Qwen2.5-Math-7B RESPONSE=3072 OUT=runs/math7b bash recipes/eight_gpus.sh
#
# Qwen2.5-Math-7B has a context of 4,096 tokens: 1,024 of prompt and 3,072 of response. A longer
# response is refused at start, never cut in silence. Its KV cache takes 57 kB a token, not 147.
#
# NOTHING BELOW HAS EVER BEEN RUN: this project has had no GPU. Never run either: any 7-8B model,
# the hub data sets, more than two ranks. That the commands parse is tested, and two ranks on a CPU
# do what one does. Figures marked "calculated" are sums on paper; the paper's numbers are not
# reproduced here, and its samples per problem, lengths and LiveCodeBench window are not public.
#
# What it needs: 8 x 80 GB (or more), 400 GB of disk for checkpoints (calculated: 12 with 16 GB of
# weights, and 98 GB for resuming, twice for a moment), 16 GB for the model.
# How long, calculated for 8 x H100, 3,000 tokens a response, 40 % dead groups: 820 s a step (510
# generating, 55 scoring, 250 updating, 3 syncing), so 300 steps are 2.8 days. Tonight?
# STEPS=40 DECAY_RATE=0.04 is 9 hours and the same shape of schedule.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
TORCHRUN=${TORCHRUN:-.venv/bin/torchrun}
GPUS=${GPUS:-8}                    # must divide 512
MODEL=${MODEL:-Qwen/Qwen3-8B-Base}
METHOD=${METHOD:-a3po}
SEED=${SEED:-0}
STEPS=${STEPS:-300}
DECAY_RATE=${DECAY_RATE:-0.005}    # rho goes from 2 to 1 in 1 / DECAY_RATE steps: 200 of the 300
RESPONSE=${RESPONSE:-8192}         # the authors' scripts; one of them has 16384
# vLLM gets of each GPU what the trainer's states leave: 0.76 of 80 GB, room for 310,000 tokens,
# where 256 answers of ordinary length want about 350,000 (calculated). What has to be interrupted
# and computed again is counted: `preemptions` in metrics.jsonl. --kv_cache_dtype fp8 doubles the
# room, at the price of a larger mismatch.
OUT=${OUT:-runs/eight_gpus}        # with two machines: on a file system that both see
BENCHMARKS=${BENCHMARKS:-aime24,aime25,math500,gpqa,livecodebench}
[ -x "$TORCHRUN" ] || bash run.sh install
nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv   # all there, and all empty?
# Hub: model, data and benchmarks are downloaded at first use. GPQA is gated: accept its terms on
# its page and log in (`hf auth login`), or leave it out: BENCHMARKS=aime24,aime25,math500. Without
# a hub, MODEL is a folder, --data and --eval_data are files, and eval.py takes --data-dir.

# -----------------------------------------------------------------------------
# 1. A trial: two steps with an eighth of the prompts, at the real lengths and memory. Look at:
#    - the printed example: prompt, where the answer ends, the verdict.
#    - truncated: a base model under a chat template may not stop after its answer, since the token
#      that ends a turn need not be one that ends its texts. Above 0.5? Try --template plain,
#      in all commands below and in evaluation too.
#    - ratio_max_deviation: 0 or nearly, at every step.
#    - mismatch_mean: 1e-2 is usual in bfloat16. Above 0.1, or ten times more at step 1 than at step
#      0: the new weights did not arrive in vLLM. Stop, and do not trust anything after it.
#    - nvidia-smi in another terminal: the most memory used in each phase.
#    Out of memory while generating or waking: --gpu_memory 0.6. In the update: add
#    --micro_batch_tokens 8192, then --head_chunk 512; training peaks at 32 GB + context, NCCL and
#    the sleeping vLLM, 5 to 7 GB (calculated), so there should be room.
if [ ! -e "$OUT/trial/summary.md" ]; then    # once: not again when this script is started again
  rm -rf "$OUT/trial"
  "$TORCHRUN" --standalone --nproc_per_node "$GPUS" a3po.py --setting paper --preset "$METHOD" \
      --model "$MODEL" --steps 2 --prompts_per_step 64 --mini_batches 2 \
      --max_response_length "$RESPONSE" --eval_limit 16 --eval_n 1 \
      --save_every 0 --output_dir "$OUT/trial"
  rm -rf "$OUT/trial/checkpoints"            # 114 GB, calculated
fi

# -----------------------------------------------------------------------------
# 2. The base model on the five benchmarks: 8 samples a problem, T 0.6, top_p 0.95 (the authors'
#    validation, and the defaults). --samples is --n: torchrun takes --n for itself.
#    Each GPU has a copy of the model and its share of the problems. Killed? The same command goes
#    on; finished problems are not repeated, on any number of GPUs. The result is a table,
#    results.json (versions, prompts, sampling, commit) and samples.jsonl (every response).
#    Code is run in a sandbox: read its line at start. "MISSING" is what this machine does not give.
#    LiveCodeBench's window changes its numbers: --lcb_from 2024-08-01 --lcb_to 2025-01-31, say.
"$TORCHRUN" --standalone --nproc_per_node "$GPUS" eval.py --model "$MODEL" \
    --benchmarks "$BENCHMARKS" --samples 8 --max_response_length "$RESPONSE" --out "$OUT/eval-base"

# -----------------------------------------------------------------------------
# 3. Training. What is not said is the paper's or its authors' (a3po.py --help gives each source).
#    --resume auto     killed, or the machine taken? The same command goes on from the newest
#                      checkpoint: weights, Adam, position in the data. It may have another number
#                      of GPUs. Without a checkpoint it starts from 0.
#    --save_every 25   a checkpoint every 6 hours or so (calculated): what a lost machine costs.
#    --mini_batches    not given: 16 updates of 256 responses. With 1 a step is exactly on-policy.
#    Look at, after 20 steps: eval_accuracy (AIME 24 + 25, 60 problems x 8: its standard error is
#    several points, so one evaluation says little); entropy_positive and entropy_negative;
#    clip_high and clip_low; dead_groups (their prompts are generated for nothing: above 0.6 the
#    data no longer fits the model); mismatch_mean (must not drift); skipped_updates (0);
#    seconds_generate against seconds_update. `eval.py glossary` explains every name.
#    While it runs:  python eval.py plot runs/eight_gpus/a3po
"$TORCHRUN" --standalone --nproc_per_node "$GPUS" a3po.py --setting paper --preset "$METHOD" \
    --model "$MODEL" --seed "$SEED" --steps "$STEPS" --decay_rate "$DECAY_RATE" \
    --max_response_length "$RESPONSE" --save_every 25 \
    --output_dir "$OUT/$METHOD-$SEED" --resume auto
# Two machines of eight: recipes/slurm_2x8.sh.

# -----------------------------------------------------------------------------
# 4. The trained model, sampled as the base was. The last checkpoint: picking the best one on AIME
#    would be choosing on the test. Earlier ones are there too, to see how it went.
"$TORCHRUN" --standalone --nproc_per_node "$GPUS" eval.py \
    --model "$OUT/$METHOD-$SEED/checkpoints/step_$STEPS" --benchmarks "$BENCHMARKS" --samples 8 \
    --max_response_length "$RESPONSE" --out "$OUT/eval-$METHOD-$SEED-$STEPS"

# -----------------------------------------------------------------------------
# 5. The difference from the base, per benchmark and on average, with 95 % intervals over problems.
#    Give the folders of several methods at once to see them side by side; the first is the one
#    that they are compared with. The paper has 48.7 for A3PO and 44.1 for DAPO on this model,
#    averages of the five; without its protocol, look at the difference rather than the level.
"$PYTHON" eval.py compare "$OUT/eval-base" "$OUT/eval-$METHOD-$SEED-$STEPS"
"$PYTHON" eval.py plot "$OUT/$METHOD-$SEED" --out "$OUT/$METHOD-$SEED.png"
