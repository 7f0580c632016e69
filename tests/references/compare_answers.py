"""Print the table of docs/results.md for the scorer of answers: its verdicts beside those of people and of math-verify.

    .venv/bin/python tests/references/compare_answers.py
    .venv/bin/python tests/references/compare_answers.py --gsm8k train.jsonl \\
        --model-solutions example_model_solutions.jsonl --math math_cot_100.jsonl

Without arguments on the pairs of tests/common/rewards/answers.jsonl, each judged by hand. The public data:

- gsm8k: train.jsonl of openai/grade-school-math (MIT licence): every gold answer against itself in seven forms and ± 1.
- model-solutions: example_model_solutions.jsonl of the same repository: four models' solutions with `is_correct`.
- math: evaluation/data/eval_rm_maj_example/math_cot_100.jsonl of QwenLM/Qwen2.5-Math (MIT licence): eight completions
  each for 100 problems of MATH, with `score`.

Times are of the processor, ours and that of the process with math-verify, in which the pair is new.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from common.rewards import algebra  # noqa: E402
from common.rewards.answers import final_answer, gold, same  # noqa: E402

PAIRS = ROOT / "tests" / "common" / "rewards" / "answers.jsonl"


def pairs(path: Path = PAIRS) -> list[dict]:
    """The pairs judged by hand: gold, answer, verdict and form."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ours(right: str, answer: str | None) -> bool:
    """Our verdict; False for a gold answer that is refused."""
    try:
        return same(gold(right), answer)
    except ValueError:
        return False


def math_verify(right: str, answer: str) -> bool:
    """The verdict of math-verify alone, as its documentation uses it, with each side in a box."""
    from math_verify import parse, verify

    return verify(parse(f"\\boxed{{{right}}}"), parse(f"\\boxed{{{answer}}}"))


def processor_seconds() -> float:
    """What this process and the one with math-verify have used so far."""
    process = algebra._process
    return time.process_time() + (time.clock_gettime((~process.pid << 3) | 2) if process else 0.0)


def model_solutions(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        right = row["ground_truth"].rpartition("A:")[2].strip()
        for solution in row.values():
            if isinstance(solution, dict):
                yield right, final_answer(solution["solution"].rpartition("A:")[2]), solution["is_correct"]


def math_completions(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for response, score in zip(row["response"], row["score"], strict=True):
            yield row["gt"], final_answer(response), score


def gsm8k(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)["answer"]
        value = int(row.rpartition("####")[2].replace(",", ""))
        forms = (
            f"{value:,}", f"\\boxed{{{value}}}", f"${value}", f"{value}个", f"{value} apples", f"x = {value}",
            f"{value}.00",
        )  # fmt: skip
        yield from ((row, final_answer(f"<answer>{form}</answer>"), True) for form in forms)
        yield from ((row, str(value + off), False) for off in (-1, 1))


def _row(name: str, judged: list[tuple[bool, bool]]) -> str:
    right = sum(verdict for verdict, _ in judged)
    wrongly = sum(found and not verdict for verdict, found in judged)
    missed = sum(verdict and not found for verdict, found in judged)
    return f"| {name} | {len(judged):,} | {right:,} | {len(judged) - wrongly - missed:,} | {wrongly} | {missed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gsm8k", "model-solutions", "math"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()

    algebra.equal("1", "2", 5.0)  # start the other process
    math_verify("1", "2")  # import it
    judged, forms, spent, spent_alone = [], {}, [], []
    for pair in pairs():
        started = processor_seconds()
        found = ours(pair["gold"], pair["answer"])
        spent.append(1000 * (processor_seconds() - started))
        judged.append((pair["verdict"], found))
        started = time.process_time()
        alone = math_verify(pair["gold"], pair["answer"])
        spent_alone.append(1000 * (time.process_time() - started))
        forms.setdefault(pair["form"], []).append((pair["verdict"], found, alone))
    print(
        "| pairs | number | right | same verdict | wrong answers rewarded | right answers missed |\n|---|---|---"
        "|---|---|---|"
    )
    print(_row("judged by hand", judged))
    beside = [verdicts for form in forms.values() for verdicts in form]
    print(_row("the same, by math-verify alone", [(verdict, alone) for verdict, _, alone in beside]))
    for name, read in (("gsm8k", gsm8k), ("model_solutions", model_solutions), ("math", math_completions)):
        if path := getattr(args, name):
            print(_row(path.name, [(bool(verdict), ours(right, answer)) for right, answer, verdict in read(path)]))

    agree = sum(found == alone for _, found, alone in beside)
    print(f"\nThe scorer and math-verify agree on {agree} of {len(beside)} pairs judged by hand.")
    print("\n| form | pairs | the scorer | math-verify |\n|---|---|---|---|")
    for name, form in forms.items():
        print(f"| {name} | {len(form)} | {sum(v == o for v, o, _ in form)} | {sum(v == m for v, _, m in form)} |")
    print()
    for name, times in (("Processor time of a new pair", spent), ("By math-verify alone", spent_alone)):
        times.sort()
        p50, p95 = (times[int(share * len(times))] for share in (0.5, 0.95))
        print(f"{name}: median {p50:.1f} ms, 95th percentile {p95:.1f} ms, longest {times[-1]:.0f} ms")


if __name__ == "__main__":
    main()
