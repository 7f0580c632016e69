"""Test reward functions on a few rows of the data: do right answers score highest, each by its own row?

    make test-rewards                                           math, format and tags on the sample data
    make test-rewards REWARDS="math my_rewards.py:shorter" DATA=gsm8k.jsonl
    make test-rewards REWARDS=code DATA=programs.jsonl ANSWER_TEMPLATE=$'```python\\n{answer}\\n```'

A reward is the name of a built-in, your own function (FILE.py:FUNCTION) or a reward model (model:CHECKPOINT), with a
weight if you like (math=1.0). A row of the data is a prompt with its gold answer and the columns that the rewards read.
Every gold answer is checked, and a few rows are tried. A run does the same before it begins.

Left out: whether a reward measures what you want.
"""

import time
from dataclasses import dataclass
from typing import Literal

from common import environment
from common.cli import parse_arguments
from common.data.formats import PROBLEM_FORMATS
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import BAD_INPUT, DONE, InputError, printable, run_command
from common.rewards.contract import contract
from common.rewards.specification import check_prompts, load, reward_models


@dataclass(frozen=True)
class Args:
    rewards: tuple[str, ...] = ("math", "format", "tags")
    """The rewards to test."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """Prompts with gold answers: a file, a folder of files or a hub dataset."""
    format: Literal[
        "auto", "prompt-answer", "question-answer", "problem-answer", "problem-solution", "prompt", "instruction",
        "humaneval", "mbpp", "mbpp-text", "verl",
    ] = "auto"  # fmt: skip
    """The format of the rows; auto takes it from the columns of the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question answer=solution."""
    answer_template: str | None = None
    """A completion with {answer} in the place of the answer, if it is not the recipes' <think>...</think><answer>..."""
    max_completion_length: int = 512
    """Tokens of a completion, for the rewards of length."""
    seconds: float = 60.0
    """The longest that a batch may take."""
    seed: int = 42
    """Which rows are tried."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""


def main() -> int:
    args = parse_arguments(Args, __doc__)
    if args.answer_template is not None and "{answer}" not in args.answer_template:
        raise InputError(f"--answer-template {args.answer_template}: expected {{answer}} in it, where the answer goes")
    source = find_source(args.data)
    environment.set_variables(models=reward_models(args.rewards), sources=[source])
    rows = read_examples(source, PROBLEM_FORMATS, args.format, args.columns).examples
    rewards = load(args.rewards, args.max_completion_length)
    faults = Faults()
    check_prompts(rewards, rows, faults)
    faults.stop()
    if any(reward.is_model for reward in rewards):
        environment.quiet_loggers()
        import unsloth  # noqa: F401  before transformers, as in a run: it changes what is imported after it

    wrong = 0
    for reward in rewards:
        started = time.monotonic()
        found = contract(reward, rows, args.seed, args.answer_template, args.seconds)
        wrong += len(found)
        print(f"{reward.name}: {'passes' if not found else 'fails'}, {time.monotonic() - started:.1f} s")
        for fault in found:
            print(f"  {printable(fault)}")
    print(f"{len(rewards)} rewards on {len(rows)} rows of {args.data}: {wrong or 'nothing'} wrong")
    return BAD_INPUT if wrong else DONE


if __name__ == "__main__":
    run_command(main)
