"""Try reward functions on a few rows of the data: do right answers score the most, is each graded by its own row?

    make test-rewards                                           math, format and tags on the sample data
    make test-rewards REWARDS="math my_rewards.py:shorter" DATA=gsm8k.jsonl
    make test-rewards REWARDS=code DATA=programs.jsonl ARGS="--form $'```python\\n{answer}\\n```'"

A reward is a built-in's name, a function of your own (FILE.py:FUNCTION) or a reward model (model:CHECKPOINT), with a
weight if you like (math=1.0). Each row of the data is a prompt with its gold answer, and whatever else the rewards
read. Every gold answer is checked, and a few rows are tried. A run does the same before it begins.

Left out: whether a reward says what you mean by it.
"""

import time
from dataclasses import dataclass
from typing import Literal

import tyro
from common import environment
from common.data.read import column_map, problems
from common.data.rows import Faults, find_source, read_rows
from common.errors import BAD_INPUT, DONE, InputError, run_command
from common.rewards.contract import contract
from common.rewards.specification import check_prompts, load


@dataclass(frozen=True)
class Args:
    rewards: tuple[str, ...] = ("math", "format", "tags")
    """The rewards to try."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """Prompts with gold answers: a file, a folder of files or a hub dataset."""
    format: Literal[
        "auto", "prompt-answer", "question-answer", "problem-answer", "problem-solution", "prompt", "instruction"
    ] = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question answer=solution."""
    form: str | None = None
    """A completion with {answer} in the place of the answer, if it is not the recipes' <think>...</think><answer>..."""
    max_completion_length: int = 512
    """Tokens of a completion, for the rewards of length."""
    seconds: float = 60.0
    """What a batch may take."""
    seed: int = 42
    """Which rows are tried."""


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if args.form is not None and "{answer}" not in args.form:
        raise InputError(f"--form {args.form}: expected {{answer}} in it, where the answer goes")
    rewards = load(args.rewards, args.max_completion_length)
    source = find_source(args.data)
    environment.set_variables(offline=not isinstance(source, str) and all(reward.local for reward in rewards))
    faults = Faults()
    rows = list(problems(read_rows(source, faults), faults, args.format, column_map(args.columns)))
    check_prompts(rewards, rows, faults)
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")

    wrong = 0
    for reward in rewards:
        started = time.monotonic()
        found = contract(reward, rows, args.seed, args.form, args.seconds)
        wrong += len(found)
        print(f"{reward.name}: {'passes' if not found else 'fails'}, {time.monotonic() - started:.1f} s")
        for fault in found:
            print(f"  {fault}")
    print(f"{len(rewards)} rewards on {len(rows)} rows of {args.data}: {wrong or 'nothing'} wrong")
    return BAD_INPUT if wrong else DONE


if __name__ == "__main__":
    run_command(main)
