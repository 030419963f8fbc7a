#!/usr/bin/env bash
# The paper's setting on two machines of eight GPUs under SLURM (the paper used 16 x H200): the run
# of recipes/eight_gpus.sh at half the time, submitted once, coming up again by itself when its time
# is over or a machine is lost.
#
#   sbatch recipes/slurm_2x8.sh
#   sbatch --export=ALL,METHOD=dapo,OUT=/shared/me/dapo recipes/slurm_2x8.sh
#   REHEARSE=1 bash recipes/slurm_2x8.sh      # two "machines" on this one, the demo: see below
#
# NOTHING BELOW HAS EVER BEEN RUN on a GPU or under SLURM: this project has had neither. Rehearsed,
# on two shared CPU cores: the two torchrun agents, as in REHEARSE=1, whose metrics are those of one
# agent with two ranks. That the commands parse is tested. "Calculated" means a sum on paper.
#
# What it needs: a folder that both machines see (OUT, the repository and .venv in it, the model's
# cache): checkpoints are written by all ranks, and each rank must see the folder. 400 GB of disk.
# The machines must reach each other on PORT, and NCCL on the fast network between them.
#
#SBATCH --job-name=a3po
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=a3po-%j.log
#SBATCH --signal=B:USR1@2400
# --signal: 40 minutes before the end this script (B: the batch shell) gets USR1 and asks the run to
# end after its step (about 15 minutes, calculated) with a checkpoint (two minutes). A SIGTERM to
# torchrun would not do: it kills its ranks half a minute later, in the middle of a step.
# --requeue: the scheduler puts the job back in the queue when a machine is lost.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"   # submit from the repository's folder
TORCHRUN=${TORCHRUN:-.venv/bin/torchrun}
METHOD=${METHOD:-a3po}
SEED=${SEED:-0}
SAVE_EVERY=${SAVE_EVERY:-25}
OUT=${OUT:-runs/slurm/$METHOD-$SEED}
PORT=${PORT:-29500}

# -----------------------------------------------------------------------------
# 0. A rehearsal without SLURM and without a GPU, to see that two agents find each other: each is
#    what one machine starts; they meet at HOST:PORT, and the first to come is rank 0.
if [ "${REHEARSE:-0}" = 1 ]; then
  export OMP_NUM_THREADS=1
  [ -x "$TORCHRUN" ] || bash run.sh install
  for node in 0 1; do
    "$TORCHRUN" --nnodes 2 --node_rank "$node" --nproc_per_node 1 --master_addr 127.0.0.1 \
        --master_port "$PORT" a3po.py --setting demo --steps 3 --output_dir "$OUT" &
  done
  wait -n && wait -n
  exit
fi

# -----------------------------------------------------------------------------
# 1. Where they meet, and what they talk over.
#    NCCL (tensors) and gloo (objects) choose their networks by themselves. If NCCL takes a slow one
#    (NCCL_DEBUG=INFO says which, at the start of the log), or gloo the loopback, so that the start
#    hangs, name the right ones:
#      export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=ib0
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun does not inherit: else all share a core
export TRITON_CACHE_DIR=/tmp/$USER/triton VLLM_CACHE_ROOT=/tmp/$USER/vllm  # on a local disk
export HF_HOME=${HF_HOME:-$PWD/.cache/huggingface}  # one download for both, before the run:
#      .venv/bin/python a3po.py --setting paper --check && hf download Qwen/Qwen3-8B-Base
#    (the check makes of the data set what can be read offline, which hf download does not), and
#    then, so that sixteen ranks do not ask the hub at every start:
#      export HF_HUB_OFFLINE=1

# -----------------------------------------------------------------------------
# 2. The time is over in 40 minutes: end after this step, then queue again.
again() {
  echo "USR1: asking the run to end after its step"
  touch "$OUT/stop"
  wait "$RUN" || true
  scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1

# -----------------------------------------------------------------------------
# 3. Training: one torchrun a machine, eight ranks each, the flags of recipes/eight_gpus.sh.
#    Each GPU has a copy of vLLM and a sixteenth of the prompts (512 / 16 = 32); weights, gradients
#    and Adam are sharded over all sixteen, 8.2 GB a GPU (calculated); vLLM has what they leave.
#    --resume auto       the newest checkpoint, or step 0 where there is none: the same command for
#                        the first start and for every one after it, on any number of ranks.
#    --save_every 25     what a lost machine costs at most. A checkpoint is 16 GB, and the newest
#                        98 GB more to resume from (calculated).
#    --keep_checkpoints  not given: all twelve stay.
#    Look at: as in eight_gpus.sh; and seconds_update and seconds_sync against those of one machine:
#    half and the same, or the network is the limit.
#    An error on the second machine is in this log too, prefixed by its rank.
srun --kill-on-bad-exit=1 "$TORCHRUN" --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \
    --rdzv_endpoint "$HOST:$PORT" --rdzv_id "$SLURM_JOB_ID" a3po.py --setting paper \
    --preset "$METHOD" --seed "$SEED" --save_every "$SAVE_EVERY" \
    --output_dir "$OUT" --resume auto &
RUN=$!
wait "$RUN"

# -----------------------------------------------------------------------------
# 4. Evaluation of the last checkpoint on the first machine, when all steps are done; of the base
#    model, and the comparison: sections 2 and 5 of recipes/eight_gpus.sh.
[ -e "$OUT/summary.md" ] || exit 0             # ended by hand or by USR1: there is more to come
srun --nodes=1 --ntasks=1 "$TORCHRUN" --standalone --nproc_per_node 8 eval.py \
    --model "$OUT/checkpoints/step_300" --out "$OUT/eval" --samples 8 \
    --benchmarks aime24,aime25,math500,gpqa,livecodebench

# To end a run by hand, keeping a checkpoint: touch OUT/stop. What can go wrong: "no such file" on
# one machine only (OUT, the data or .venv is not on the shared file system); a start that hangs
# (PORT is closed between the machines, or two jobs share it); out of memory at the first wake-up
# after an update (lower --gpu_memory).
