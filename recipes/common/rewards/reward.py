"""A reward of a run: a function with a weight, called with what it takes, its scores checked."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.rewards.builtin import Scores, TextOrMessages, text_of
from common.rewards.classifier import RewardModel
from common.rewards.user_file import contained, describe, is_ours, line_of


@dataclass(frozen=True)
class Reward:
    """A reward of this run. Calling it calls the function and checks the scores; for TRL it is a function.

    `needs` are the columns that the function requires, each with its check or None. `file` is the user's file with the
    function; `takes` are the arguments that it names, None if it takes any. `answer_template` and `slow` as in BuiltIn.
    """

    name: str
    weight: float
    function: Callable[..., Scores]
    needs: Mapping[str, Callable[[Any], object] | None] = field(default_factory=dict)
    file: Path | None = None
    takes: frozenset[str] | None = None
    answer_template: str | None = None
    slow: bool = False

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def is_model(self) -> bool:
        """Whether it is a reward model, which imports transformers and so comes after `import unsloth`."""
        return isinstance(self.function, RewardModel)

    def prepare(self) -> None:
        """Load the model of a reward model, which takes a while; nothing for a function. Raises InputError."""
        if isinstance(self.function, RewardModel):
            self.function.prepare()

    @property
    def place(self) -> str:
        """The function in an error message: file:line and name of a user's, the name of a built-in."""
        if self.file is None:
            return self.name
        return f"{self.file}:{inspect.unwrap(self.function).__code__.co_firstlineno}: {self.name}"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[TextOrMessages], **columns: Any) -> Scores:
        """One score for each completion, None where the reward does not apply.

        Raises InputError, with the line, when a user's function raises or returns anything else.
        """
        count = len(completions)
        given = {"prompts": prompts, "completions": completions, **columns}
        if self.file is not None:
            given["texts"] = [text_of(completion) for completion in completions]
        if missing := [column for column in self.needs if column not in given]:
            raise InputError(f"{self.place}: needs the column {', '.join(missing)}, which the data does not have")
        if self.takes is not None:
            given = {name: value for name, value in given.items() if name in self.takes}
        try:
            if self.file is None:
                scores = self.function(**given)
            else:
                with contained():
                    scores = self.function(**given)
        except BaseException as error:
            if self.file is None or is_ours(error):
                raise
            raise InputError(f"{line_of(error, self.file)}: {self.name} raised {describe(error)}") from error
        return self._checked(scores, count)

    def _checked(self, scores: Any, count: int) -> Scores:
        if isinstance(scores, str) or not hasattr(scores, "__len__"):
            raise InputError(f"{self.place}: returned {_shown(scores)}; expected a list, a number for each completion")
        if len(scores) != count:
            raise InputError(f"{self.place}: returned {len(scores)} scores for {count} completions; expected one each")
        for number, score in enumerate(scores):
            if score is not None and not (_is_number(score) and math.isfinite(score)):
                raise InputError(
                    f"{self.place}: score {number} is {_shown(score)}; expected a finite number, or None where the "
                    "reward does not apply"
                )
        return [None if score is None else float(score) for score in scores]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str | bytes)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
