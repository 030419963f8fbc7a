#!/usr/bin/env bash
# What demo/README.md shows of SmolLM2: A3PO and DAPO, three seeds of each, all evaluated before and
# after. Three hours on one CPU core, 6 GB of disk. Killed? Start it again: what is finished is not
# repeated; a training that was cut short starts over.
#
#   bash demo/smollm2/study.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=runs/smollm2

for preset in a3po dapo; do
  for seed in 0 1 2; do
    run=$OUT/$preset-seed$seed
    [ -e "$run/summary.md" ] && continue
    rm -rf "$run"
    bash run.sh smollm2 --preset "$preset" --seed "$seed" --output_dir "$run"
    rm -r "$run"/checkpoints/step_*/resume   # 1.6 GB that only a resumed run would need
  done
done

evaluate() {  # model, folder for the results
  "$PYTHON" eval.py --model "$1" --data $OUT/probe.jsonl --n 2 --temperature 1 --top_p 1 \
    --max_response_length 40 --template "$(<demo/smollm2/template.txt)"$'\n' --out "$2"
}
evaluate $OUT/model $OUT/eval-base
for run in $OUT/a3po-seed? $OUT/dapo-seed?; do
  evaluate "$run/checkpoints/step_20" "$run/eval"
done
"$PYTHON" demo/smollm2/results.py $OUT
