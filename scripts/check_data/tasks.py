"""What each training method reads: which formats, and by which reader of recipes/common."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from common.data.examples import Conversation, Document, Pair, Prompt, Rating
from common.data.formats import (
    PAIR_FORMATS,
    PROBLEM_FORMATS,
    PROMPT_FORMATS,
    RATING_FORMATS,
    SFT_FORMATS,
    Formats,
    detect,
)
from common.data.read import conversations, pairs, problems, prompts, ratings, unknown_columns
from common.data.rows import Row
from common.errors import InputError

TaskName = Literal["sft", "dpo", "grpo", "ppo", "reward"]
Example = Conversation | Document | Pair | Prompt | Rating


@dataclass(frozen=True)
class Task:
    """A training method: its name, the formats it takes, and what turns rows of them into its examples."""

    name: TaskName
    formats: Formats
    read: Callable[..., Iterator[Any]]

    def format_of(self, first: Row, row_format: str, columns: dict[str, str]) -> str | None:
        """The name of the format that the reader will take the rows for."""
        return detect(_mapped(first, columns), self.formats) if row_format == "auto" else row_format


# In this order a task is found for data whose task is not named: those whose formats ask for the most columns first. A
# reward model learns from ratings or from pairs.
TASKS = (
    Task("reward", RATING_FORMATS, ratings),
    Task("dpo", PAIR_FORMATS, pairs),
    Task("reward", PAIR_FORMATS, pairs),
    Task("sft", SFT_FORMATS, conversations),
    Task("grpo", PROBLEM_FORMATS, problems),
    Task("ppo", PROMPT_FORMATS, prompts),
)


def find_task(name: TaskName | None, first: Row, row_format: str, columns: dict[str, str]) -> Task:
    """The task of that name, or without one the first task whose format the first row has.

    Raises InputError when the row fits none, or other tasks than the named one, and says which.
    """
    fitting = [task for task in TASKS if task.format_of(first, row_format, columns) in task.formats]
    named = [task for task in fitting if name in (None, task.name)]
    if named:
        return named[0]
    candidates = [task for task in TASKS if name in (None, task.name)]
    known = {name: columns for task in candidates for name, columns in task.formats.items()}
    if row_format not in ("auto", *known):
        raise InputError(f"--format {row_format}: unknown here; expected auto or one of {', '.join(known)}")
    hint = f"\n  It would do for TASK={' or '.join(dict.fromkeys(task.name for task in fitting))}" if fitting else ""
    raise InputError(f"{first.place}: {unknown_columns(_mapped(first, columns), known)}{hint}")


def _mapped(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    return {columns.get(column, column): value for column, value in row.fields.items()}
