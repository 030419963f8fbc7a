#!/usr/bin/env bash
# Your own model, data, prompt and reward. The script writes small files into a temporary folder and
# trains on them for a few steps, so it runs on a laptop as it stands, in about a minute. Replace
# the four parts by yours, one at a time: each works without the others.
#
#   bash recipes/own_model_data_reward.sh
#   WORK=runs/mine bash recipes/own_model_data_reward.sh     # in a new folder of your choice
#
# Run as it stands, on two shared AMD EPYC cores. Not run: any other model than the demo's.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODEL=${MODEL:-demo/model}
STEPS=${STEPS:-10}
WORK=${WORK:-$(mktemp -d)}
export OMP_NUM_THREADS=1
[ -x "$PYTHON" ] || bash run.sh install
mkdir -p "$WORK"
echo "== everything is in $WORK"

# -----------------------------------------------------------------------------
# 1. The model: a hub name, or a folder that save_pretrained wrote: config.json, weights, tokenizer.
#    Families that work: see "Model" in the README; what does not is refused before anything loads.
#    What it has to be able to do: solve some of your problems some of the time. Step 5 shows it.

# -----------------------------------------------------------------------------
# 2. The data: one JSON object a line. "problem" (or "question", or "prompt", also as chat messages)
#    and "answer"; "id" if you want to find rows again. Parquet files and hub data sets with these
#    columns do too. Rows with the same text are dropped, with a message. Keep the held-out rows
#    apart yourself: nothing here can know that two texts are the same problem.
#    A row is math unless it says otherwise, and kinds may be mixed in one file: "kind": "choice"
#    with "choices" (the answer a letter, an index from 0 or a text of them), or "kind": "code" with
#    "tests", a list of {"input", "output"} on which programs run in the sandbox. --kind and
#    --eval_kind say it for a whole file.
#    Here: three operands, which the demo model has never been trained on.
"$PYTHON" - "$WORK" <<'EOF'
import itertools, json, random, sys

digits = range(1, 10)
problems = [f"{a}+{b}*{c}" for a, b, c in itertools.product(digits, repeat=3)]
random.Random(0).shuffle(problems)
for name, part in (("train", problems[:256]), ("test", problems[256:320])):
    with open(f"{sys.argv[1]}/{name}.jsonl", "w") as file:
        for text in part:
            row = {"id": text, "problem": f"Compute {text}.", "answer": str(eval(text))}
            file.write(json.dumps(row) + "\n")
EOF
head -2 "$WORK/train.jsonl"

# -----------------------------------------------------------------------------
# 3. The prompt: auto (the tokenizer's chat template where there is one, else plain), chat, plain,
#    or a text with {problem}. A text of your own gets nothing added: write the instruction, and the
#    chat markers if the model wants them. It has to ask for what the grader looks for: the last
#    \boxed{...} or "Answer: ..." line. This one also writes the first word of the answer.
#    ($(cat file) drops newlines at the end of the file. Where yours matter, use --template $'...'.)
printf '%s\n%s\n%s' '{problem}' \
    'Please reason step by step, and put your final answer within \boxed{}.' 'First ' \
    >"$WORK/template.txt"

# -----------------------------------------------------------------------------
# 4. The reward: function(response, problem) -> a number, (number, correct) or (number, correct,
#    {"form": 0.1}), of which each part becomes a metric, reward_form. problem.text and
#    problem.reference are the row's problem and answer. `correct` decides which tokens A3PO
#    amplifies and what counts as accuracy; without it the sign of the advantage does.
#    It is called on every response by the rank that sampled it, in 16 threads of the training
#    process. If it raises, gives no finite number or takes over --grade_timeout, that is counted
#    (reward_errors), said once, kept in rollouts.jsonl ("detail"), and the response gets the lowest
#    reward of its group. At start it is called once with an empty response and has to give a reward.
#    Do not run a program there that the model wrote (shelf/sandbox.py can).
#    Here: 1 for the right answer and 0.1 for any answer in a box, so that the form is learnt first.
cat >"$WORK/my_reward.py" <<'EOF'
from verify import extract_answer


def score(response, problem):
    answer = extract_answer(response)          # the last box or "Answer:" line, or None
    right = answer == problem.reference        # verify.grade(...) for more than whole numbers
    return right + 0.1 * (answer is not None), right
EOF
#    Try it on paper before it trains anything: one right, one wrong, one without an answer.
PYTHONPATH="$WORK:." "$PYTHON" - <<'EOF'
from my_reward import score
from rollout import Problem

problem = Problem(id="1", text="Compute 1+2*3.", reference="7")
for response in ("2*3=6; 1+6=7. So \\boxed{7}", "1+2=3; 3*3=9. So \\boxed{9}", "no idea"):
    print(score(response, problem), response)
EOF

# -----------------------------------------------------------------------------
# 5. The base model on the held-out rows, with the same prompt. Look at: no_answer (the prompt does
#    not ask for what the grader finds), truncated (it never stops, or the limit is too short), and
#    pass@8 (near 0: too hard, near 100 % like the accuracy: nothing to learn).
"$PYTHON" eval.py --model "$MODEL" --data "$WORK/test.jsonl" --kind math --n 8 --temperature 1 \
    --top_p 1 --max_response_length 64 --template "$(cat "$WORK/template.txt")" --out "$WORK/before"

# -----------------------------------------------------------------------------
# 6. Train. --setting demo gives the small batch and the learning rate of a tiny model (1.5e-4), and
#    64 tokens for a prompt and for an answer, here written out: with your own model or data a line
#    at start names the demo's values that you have not changed. A real model wants
#    `--setting paper --lr 1e-6` and the lengths of its answers: then look at recipes/one_gpu.sh; on
#    a CPU, at `bash run.sh smollm2`, whose command is such a run.
#    PYTHONPATH is for --reward; a module in the folder where you stand is found without it.
#    --eval_data is scored by the built-in graders, not by your reward: it says whether answers are
#    right. Give --eval_data "" if there is nothing to compare with.
#    Look at: the example printed first; reward and accuracy in metrics.jsonl, which differ now;
#    rollouts.jsonl, where a reward that can be cheated shows long before the curves do.
PYTHONPATH="$WORK" "$PYTHON" a3po.py --setting demo --model "$MODEL" --data "$WORK/train.jsonl" \
    --eval_data "$WORK/test.jsonl" --template "$(cat "$WORK/template.txt")" \
    --reward my_reward:score --max_prompt_length 64 --max_response_length 64 --lr 1.5e-4 \
    --steps "$STEPS" --eval_every 5 --output_dir "$WORK/run"

# -----------------------------------------------------------------------------
# 7. After it, on the same rows, and the difference with its 95 % interval.
"$PYTHON" eval.py --model "$WORK/run/checkpoints/step_$STEPS" --data "$WORK/test.jsonl" \
    --kind math --n 8 --temperature 1 --top_p 1 --max_response_length 64 \
    --template "$(cat "$WORK/template.txt")" --out "$WORK/after"
"$PYTHON" eval.py compare "$WORK/before" "$WORK/after"

# Here, once: 16.4 before, 67.8 after 10 steps, a difference of 51 +- 7 points.

# -----------------------------------------------------------------------------
# 8. The graders without a model: your own responses, from whatever wrote them. One verdict a line.
cat >"$WORK/responses.jsonl" <<'EOF'
{"id": "fraction", "kind": "math", "response": "It is \\boxed{\\frac{1}{2}}.", "answer": "0.5"}
{"id": "unboxed", "kind": "math", "response": "It is 7.", "answer": "7"}
{"id": "letter", "kind": "choice", "response": "Answer: B", "answer": "B"}
EOF
"$PYTHON" verify.py "$WORK/responses.jsonl" --workers 1 --timeout 5
