"""The rewards of a run: found by name or in a user's file, weighted, called, and their scores added up.

A user's file holds functions in TRL's signature, or with those of its arguments that they need:

    from common.rewards.builtin import text_of     # my_rewards.py, as --rewards my_rewards.py:shorter=0.5

    def shorter(completions):
        return [-len(text_of(completion)) / 1000 for completion in completions]
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.examples import Prompt
from common.data.rows import Faults
from common.errors import InputError, did_you_mean
from common.rewards import builtin as built_in
from common.rewards.answers import gold
from common.rewards.builtin import Scores, TextOrMessages
from common.rewards.classifier import RewardModel
from common.rewards.sandbox import parse_tests
from common.rewards.user_file import find_function, line_of, said

if TYPE_CHECKING:
    from common.lm.generate import Completion

# The form that the recipes ask for.
FORM = "<think>Let me think.</think><answer>{answer}</answer>"

# What TRL gives to every reward function besides the columns of the data.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


@dataclass(frozen=True)
class BuiltIn:
    """A built-in reward: its function, and for each column it reads how to check a value (raises when it is wrong).

    `constants` names arguments of the recipe that the function takes too. `form` is a completion that it must score
    highest once the gold answer is put in, where it grades answers. `slow`: a batch takes it seconds.
    """

    function: Callable[..., Scores]
    columns: Mapping[str, Callable[[Any], object]] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    form: str | None = None
    slow: bool = False


REWARDS: dict[str, BuiltIn] = {
    "math": BuiltIn(built_in.math_reward, {"answer": gold}, form=FORM),
    "format": BuiltIn(built_in.format_reward),
    "tags": BuiltIn(built_in.tags_reward),
    "length": BuiltIn(built_in.length_reward, constants=("max_completion_length",)),
    "overlong": BuiltIn(built_in.overlong_reward, constants=("max_completion_length",)),
    "repetition": BuiltIn(built_in.repetition_reward),
    "language": BuiltIn(built_in.language_reward),
    "json": BuiltIn(built_in.json_reward),
    "json_schema": BuiltIn(built_in.json_schema_reward, {"schema": built_in.schema_validator}),
    "xml": BuiltIn(built_in.xml_reward),
    "code": BuiltIn(built_in.code_reward, {"tests": parse_tests}, form="```python\n{answer}\n```", slow=True),
}


@dataclass(frozen=True)
class Reward:
    """A reward of this run. Calling it calls the function and checks what comes back; TRL takes it as a function.

    `needs` are the columns without which the function cannot be called, each with its check, if it has one. `file` is
    the user's file that the function is from, `takes` the arguments it names, None if it takes any. `form` and `slow`
    are as in BuiltIn.
    """

    name: str
    weight: float
    function: Callable[..., Scores]
    needs: Mapping[str, Callable[[Any], object] | None] = field(default_factory=dict)
    file: Path | None = None
    takes: frozenset[str] | None = None
    form: str | None = None
    slow: bool = False

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def local(self) -> bool:
        """Can it be called without the hub? Only a reward model may not be here."""
        return not isinstance(self.function, RewardModel) or self.function.local

    @property
    def place(self) -> str:
        """Where the function is: file:line and name of a user's, the name of a built-in."""
        if self.file is None:
            return self.name
        return f"{self.file}:{inspect.unwrap(self.function).__code__.co_firstlineno}: {self.name}"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[TextOrMessages], **columns: Any) -> Scores:
        """One score a completion, None where the reward does not apply.

        Raises InputError, with the line, when a user's function raises or returns anything else.
        """
        count = len(completions)
        given = {"prompts": prompts, "completions": completions, **columns}
        if missing := [column for column in self.needs if column not in given]:
            raise InputError(f"{self.place}: needs the column {', '.join(missing)}, which the data does not have")
        if self.takes is not None:
            given = {name: value for name, value in given.items() if name in self.takes}
        try:
            scores = self.function(**given)
        except Exception as error:
            if self.file is None:
                raise
            raise InputError(f"{line_of(error, self.file)}: {self.name} raised {said(error)}") from error
        return self._checked(scores, count)

    def _checked(self, scores: Any, count: int) -> Scores:
        if isinstance(scores, str) or not hasattr(scores, "__len__"):
            raise InputError(f"{self.place}: returned {_shown(scores)}; expected a list of one number a completion")
        if len(scores) != count:
            raise InputError(f"{self.place}: returned {len(scores)} scores for {count} completions; expected one each")
        for number, score in enumerate(scores):
            if score is not None and not (_is_number(score) and math.isfinite(score)):
                raise InputError(
                    f"{self.place}: score {number} is {_shown(score)}; expected a finite number, or None where the "
                    "reward does not apply"
                )
        return [None if score is None else float(score) for score in scores]


def load(spec: Sequence[str], max_completion_length: int) -> list[Reward]:
    """The rewards that `spec` names, each NAME, FILE.py:FUNCTION or model:CHECKPOINT, with =WEIGHT or 1.

    An entry may hold several, with commas between. `max_completion_length` is in tokens, for the rewards of length.
    Raises InputError for a name, file or function that is not there, for a file that cannot be imported, for a weight
    that is no number and for the same name twice.
    """
    entries = [entry.strip() for words in spec for entry in words.split(",") if entry.strip()]
    if not entries:
        raise InputError(f"no reward is named; give one or more of {', '.join(REWARDS)}, or FILE.py:FUNCTION")
    rewards: list[Reward] = []
    for entry in entries:
        source, weight = _weight(entry)
        if source.startswith("model:"):
            reward = Reward("model", weight, RewardModel(source.removeprefix("model:")), slow=True)
        elif ":" in source or source.endswith(".py"):
            reward = _from_file(source, weight)
        else:
            reward = _built_in(source, weight, {"max_completion_length": max_completion_length})
        if reward.name in [other.name for other in rewards]:
            raise InputError(
                f"--rewards {entry}: there is another reward of the name {reward.name}; each needs its own"
            )
        rewards.append(reward)
    return rewards


def score(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[TextOrMessages], **columns: Any
) -> tuple[list[float], dict[str, Scores]]:
    """The weighted sum of each completion's scores, and the scores by reward's name, before weighting.

    A reward that does not apply to a row, None, adds nothing to its sum. Raises InputError as the rewards do.
    """
    parts = {reward.name: reward(prompts, completions, **columns) for reward in rewards}
    totals = [
        math.fsum(reward.weight * value for reward in rewards if (value := parts[reward.name][place]) is not None)
        for place in range(len(completions))
    ]
    return totals, parts


def columns_of(problems: Sequence[Prompt]) -> dict[str, list[Any]]:
    """What reward functions get of the problems besides the prompts: a list by column, None where a row has no value.

    `answer` is there if any problem has one.
    """
    rows = [problem.fields | ({} if problem.answer is None else {"answer": problem.answer}) for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def check_prompts(rewards: Sequence[Reward], problems: Iterable[Prompt], faults: Faults) -> None:
    """Add to `faults` each problem that the rewards cannot score: a value that is wrong, or no column that they need.

    A problem may lack what one reward needs if it has what another does, so one file may hold mathematics and code.
    Raises InputError for a column that no problem has.
    """
    problems = list(problems)
    columns = columns_of(problems)
    needed = [reward for reward in rewards if reward.needs]
    for reward in needed:
        if missing := [column for column in reward.needs if column not in columns]:
            raise InputError(
                f"{reward.place}: needs the column {', '.join(missing)}, which no row has; besides the prompt it "
                f"has {', '.join(columns) or 'none'}. Map columns with --columns, for example --columns answer=solution"
            )
    for problem in problems:
        values = {name: column[0] for name, column in columns_of([problem]).items()}
        usable = [reward for reward in needed if all(values.get(column) is not None for column in reward.needs)]
        if needed and not usable:
            wants = "; ".join(f"{reward.name} needs {' and '.join(reward.needs)}" for reward in needed)
            faults.add(problem.place, f"no column to score an answer by: {wants}")
        for column, check in {column: check for reward in usable for column, check in reward.needs.items()}.items():
            try:
                if check:
                    check(values[column])
            except (ValueError, TypeError, InputError) as error:
                faults.add(problem.place, f"{column}: {error}")


def _weight(entry: str) -> tuple[str, float]:
    source, equals, number = entry.rpartition("=")
    if not equals:
        return entry, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (source and math.isfinite(weight)):
        raise InputError(f"--rewards {entry}: {number!r} is no weight; expected a number, as in math=1.0")
    return source, weight


def _built_in(name: str, weight: float, constants: dict[str, Any]) -> Reward:
    if name not in REWARDS:
        raise InputError(
            f"--rewards {name}: unknown reward{did_you_mean(name, REWARDS)}. There are {', '.join(REWARDS)}, "
            "model:CHECKPOINT and functions of your own, FILE.py:FUNCTION."
        )
    reward = REWARDS[name]
    function = functools.partial(reward.function, **{constant: constants[constant] for constant in reward.constants})
    return Reward(name, weight, function, reward.columns, form=reward.form, slow=reward.slow)


def _from_file(source: str, weight: float) -> Reward:
    function, file = find_function(source)
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        takes = None
    else:
        takes = frozenset(parameter.name for parameter in parameters)
    needs = {
        parameter.name: None
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.default is parameter.empty
        and parameter.name not in GIVEN
    }
    return Reward(function.__name__, weight, function, needs, file, takes)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str | bytes)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def score_completions(
    rewards: Sequence[Reward], problems: Sequence[Prompt], answers: Sequence["Completion"]
) -> tuple[list[float], dict[str, Scores]]:
    """The weighted sum of each answer's rewards, and what every reward gave it. There is a problem for each answer."""
    return score(
        rewards,
        [problem.prompt for problem in problems],
        [[{"role": "assistant", "content": answer.text}] for answer in answers],
        completion_ids=[answer.completion_ids for answer in answers],
        **columns_of(problems),
    )
