"""How fast the graders are: checks/s and tests/s of wall time, and milliseconds of CPU each.

    python tests/tools/bench_verify.py [--workers N] [--n N]

Floors on two idle cores: 1,000 checks/s for integer answers, 200 code tests/s.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import verify  # noqa: E402

ADD = "a, b = map(int, input().split())\nprint(a + b)"
FUNCTION = "class Solution:\n    def add(self, a: List[int], b):\n        return sum(a) + b"
THINKING = "Let us see. If $x^{2} = 4$ then \\frac{x}{2} is one. " * 200  # about 10,000 characters


def math_items(n: int, gold: str, answer: str) -> list[tuple]:
    return [("math", f"{THINKING}\\boxed{{{answer.format(i)}}}", gold.format(i)) for i in range(n)]


def code_items(n: int, code: str, test: dict, metadata: dict) -> list[tuple]:
    """n programs with ten tests each."""
    question = {"public_test_cases": json.dumps([test] * 10), "metadata": json.dumps(metadata)}
    return [("code", f"```python\n{code}\n```", question)] * n


def cpu_seconds() -> float:
    """Of this process and of all its dead descendants."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measure(name: str, items: list[tuple], each: int, workers: int | None) -> None:
    """Print one line; each: checks in an item. The CPU time includes the workers' start."""
    before = cpu_seconds()
    with verify.Graders(workers) as graders:
        # Warm up: a worker, and for code its sandbox, in every thread.
        graders.grade([*items[: 2 * graders.workers]] * 2)
        started = time.perf_counter()
        grades = graders.grade(items)
        wall = time.perf_counter() - started
        while worker := graders._take_idle():
            worker.close(patience=5)  # a killed worker takes the CPU time of its children with it
    assert all(grade.correct for grade in grades)
    checks = len(items) * each
    cpu = 1000 * (cpu_seconds() - before) / checks
    print(f"{name:34} {checks:6} in {wall:6.2f} s  {checks / wall:8.0f} /s  {cpu:6.2f} ms CPU each")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--n", type=int, default=2000, help="integer checks; the others in scale")
    args = parser.parse_args()
    n, workers = args.n, args.workers
    print(verify.protections())
    measure("math, integers", math_items(n, "{}", "{}"), 1, workers)
    measure("math, through sympy", math_items(n // 4, "x^2+{}", "{}+x^2"), 1, workers)
    stdin = {"input": "3 4\n", "output": "7\n", "testtype": "stdin"}
    measure("code, standard input", code_items(n // 20, ADD, stdin, {}), 10, workers)
    function = {"input": "[1, 2]\n4", "output": "7", "testtype": "functional"}
    items = code_items(n // 20, FUNCTION, function, {"func_name": "add"})
    measure("code, functions", items, 10, workers)


if __name__ == "__main__":
    main()
