"""What each training method reads: which formats, and of which kind its examples are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from common.data.examples import Example as Example
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import (
    GRADED_FORMATS,
    PAIR_FORMATS,
    PROBLEM_FORMATS,
    PROMPT_FORMATS,
    RATING_FORMATS,
    SFT_FORMATS,
    Formats,
    detect,
)
from common.data.prompts import as_prompt
from common.data.read import as_examples, unknown_columns
from common.data.rows import Faults, Row
from common.errors import InputError

TaskName = Literal["sft", "dpo", "kto", "grpo", "ppo", "reward"]


@dataclass(frozen=True)
class Task:
    """A training method: its name, and the formats it takes."""

    name: TaskName
    formats: Formats

    def read(
        self, rows: Iterable[Row], faults: Faults, row_format: str = "auto", columns: dict[str, str] | None = None
    ) -> Iterator[Any]:
        """The rows as examples of the method, as `as_examples` reads them; of PPO, the prompts."""
        examples = as_examples(rows, faults, self.formats, row_format, columns)
        return map(as_prompt, examples) if self.name == "ppo" else examples

    def format_of(self, first: Row, row_format: str, columns: dict[str, str]) -> str | None:
        """The name of the format that the reader will take the rows for."""
        return detect(_mapped(first, columns), self.formats) if row_format == "auto" else row_format

    def other_formats(self, first: Row, chosen: str | None, columns: dict[str, str]) -> list[str]:
        """The other formats whose columns the first row has, if they read a column that the chosen one does not."""
        fields = _mapped(first, columns)
        read = set(self.formats[chosen].columns) if chosen in self.formats else set()
        return [
            name
            for name, row_format in self.formats.items()
            if row_format.fits(fields) and not set(row_format.columns) <= read
        ]


# In this order a task is found for data whose task is not named: those whose formats ask for the most columns first. A
# reward model learns from ratings or from pairs, and KTO from labels or from ratings.
TASKS = (
    Task("reward", RATING_FORMATS),
    Task("dpo", PAIR_FORMATS),
    Task("reward", PAIR_FORMATS),
    Task("kto", FEEDBACK_FORMATS),
    Task("kto", RATING_FORMATS),
    Task("grpo", GRADED_FORMATS),
    Task("sft", SFT_FORMATS),
    Task("grpo", PROBLEM_FORMATS),
    Task("ppo", PROMPT_FORMATS),
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
