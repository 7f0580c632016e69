"""The rewards of a run: found by name or in a user's file, and their scores added up by weight.

A user's file holds functions. A function gets what its arguments name: `texts` (the completions as plain text), TRL's
`prompts`, `completions` and `completion_ids`, and columns of the data. It imports nothing from here:

    def shorter(texts):                              # my_rewards.py, as --rewards my_rewards.py:shorter=0.5
        return [-len(text) / 1000 for text in texts]
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.data.examples import Prompt
from common.data.rows import Faults, source_identity
from common.errors import InputError, did_you_mean
from common.lm.hub import Model, contents, find_model
from common.rewards import builtin as built_in
from common.rewards.answers import gold
from common.rewards.builtin import Scores, TextOrMessages
from common.rewards.classifier import RewardModel
from common.rewards.reward import Reward
from common.rewards.sandbox import parse_tests
from common.rewards.user_file import find_function, imported_beside
from common.run.ranks import gather_objects, rank, share, world_size

if TYPE_CHECKING:
    from common.lm.generate import Completion

# A completion of the format that the sample data teaches; {answer} is where the answer goes.
ANSWER_TEMPLATE = "<think>Let me think.</think><answer>{answer}</answer>"

MODEL = "model:"  # before a reward model's name

# The arguments of a reward function that are not columns of the data: ours, and TRL's.
GIVEN = (
    "texts",
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)


@dataclass(frozen=True)
class BuiltIn:
    """A built-in reward: its function, and a check for each column it reads, which raises for a wrong value.

    `constants` are arguments of the recipe that the function takes. `answer_template`, for a function that grades
    answers, is a completion that must score highest with the gold answer in it. `slow`: seconds for a batch.
    """

    function: Callable[..., Scores]
    columns: Mapping[str, Callable[[Any], object]] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    answer_template: str | None = None
    slow: bool = False


REWARDS: dict[str, BuiltIn] = {
    "math": BuiltIn(built_in.math_reward, {"answer": gold}, answer_template=ANSWER_TEMPLATE),
    "format": BuiltIn(built_in.format_reward),
    "tags": BuiltIn(built_in.tags_reward),
    "length": BuiltIn(built_in.length_reward, constants=("max_completion_length",)),
    "overlong": BuiltIn(built_in.overlong_reward, constants=("max_completion_length",)),
    "repetition": BuiltIn(built_in.repetition_reward),
    "language": BuiltIn(built_in.language_reward),
    "json": BuiltIn(built_in.json_reward),
    "json_schema": BuiltIn(built_in.json_schema_reward, {"schema": built_in.schema_validator}),
    "xml": BuiltIn(built_in.xml_reward),
    "code": BuiltIn(
        built_in.code_reward, {"tests": parse_tests}, answer_template="```python\n{answer}\n```", slow=True
    ),
}


def load(spec: Sequence[str], max_completion_length: int) -> list[Reward]:
    """The rewards that `spec` names, each NAME, FILE.py:FUNCTION or model:CHECKPOINT, with =WEIGHT or 1.

    `max_completion_length` is in tokens, for the rewards of length. Imports the user's files; a reward model is loaded
    later, by `prepare`. Raises InputError for a name, file or function that does not exist, a file that cannot be
    imported, a weight that is not a number, and the same name twice.
    """
    rewards: list[Reward] = []
    for source, weight in _entries(spec):
        if source.startswith(MODEL):
            reward = Reward("model", weight, RewardModel(source.removeprefix(MODEL)), slow=True)
        elif ":" in source or source.endswith(".py"):
            reward = _from_file(source, weight)
        else:
            reward = _built_in(source, weight, {"max_completion_length": max_completion_length})
        if reward.name in [other.name for other in rewards]:
            raise InputError(f"--rewards {source}: there is another reward of the name {reward.name}; rename one")
        rewards.append(reward)
    if not rewards:
        raise InputError(f"no reward is named; give one or more of {', '.join(REWARDS)}, or FILE.py:FUNCTION")
    return rewards


def reward_models(spec: Sequence[str]) -> list[Model]:
    """The models among the rewards that `spec` names, without loading anything. Raises InputError as `load` does."""
    names = [source.removeprefix(MODEL) for source, _ in _entries(spec) if source.startswith(MODEL)]
    return [find_model(name) for name in names]


def weights(spec: Sequence[str]) -> dict[str, float]:
    """The weight of each reward that `spec` names, by the name in the metrics, without importing a user's file.

    Raises InputError for a weight that is not a number.
    """
    return {
        "model" if source.startswith(MODEL) else source.rpartition(":")[2]: weight for source, weight in _entries(spec)
    }


def identities(rewards: Iterable[Reward]) -> list[str]:
    """What the rewards from outside this repository are by their contents: users' files and reward models."""
    found = []
    for reward in rewards:
        if reward.file is not None:
            found.append(source_identity([reward.file, *imported_beside(reward.file)]))
        elif isinstance(reward.function, RewardModel):
            found.append(contents(reward.function.model))
    return found


def score(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[TextOrMessages], **columns: Any
) -> tuple[list[float], dict[str, Scores]]:
    """The weighted sum of each completion's scores, and the scores by name of the reward, before weighting.

    A reward that does not apply to a row, None, adds nothing to its sum. Raises InputError as the rewards do.
    """
    parts = {reward.name: reward(prompts, completions, **columns) for reward in rewards}
    totals = [
        math.fsum(reward.weight * value for reward in rewards if (value := parts[reward.name][index]) is not None)
        for index in range(len(completions))
    ]
    return totals, parts


def score_completions(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence["Completion"]
) -> tuple[list[float], dict[str, Scores]]:
    """`score` for completions of our `generate`, one for each of `prompts`.

    These may be a few of a run's prompts, so a column that none of them has is there all the same, with None.
    """
    columns = {name: [None] * len(prompts) for reward in rewards for name in reward.needs} | columns_of(prompts)
    return score(
        rewards,
        [prompt.prompt for prompt in prompts],
        [[{"role": "assistant", "content": completion.text}] for completion in completions],
        completion_ids=[completion.completion_ids for completion in completions],
        **columns,
    )


def score_over_ranks(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence["Completion"]
) -> tuple[list[float], dict[str, Scores]]:
    """`score_completions` of which each rank scores a contiguous share; the scores of all, on every rank."""
    mine = share(range(len(prompts)), rank(), world_size())
    own: tuple[list[float], dict[str, Scores]] = [], {reward.name: [] for reward in rewards}
    if mine:
        own = score_completions(rewards, [prompts[index] for index in mine], [completions[index] for index in mine])
    parts = gather_objects(own)
    scores = {reward.name: [one for _, scores in parts for one in scores[reward.name]] for reward in rewards}
    return [total for totals, _ in parts for total in totals], scores


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns that reward functions get: a list by name, with None where a row has no value.

    `answer` is there if any prompt has a gold answer, and `tools` if any has tools.
    """
    rows = [
        prompt.fields
        | ({} if prompt.answer is None else {"answer": prompt.answer})
        | ({"tools": prompt.tools} if prompt.tools else {})
        for prompt in prompts
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def check_prompts(rewards: Sequence[Reward], prompts: Iterable[Prompt], faults: Faults) -> None:
    """Add to `faults` why completions cannot be scored: a wrong value in a prompt's row, or no column that is needed.

    A prompt may lack what one reward needs if it has what another does, so one file may hold mathematics and code.
    Raises InputError for a column that no prompt has.
    """
    prompts = list(prompts)
    columns = columns_of(prompts)
    needed = [reward for reward in rewards if reward.needs]
    for reward in needed:
        if missing := [column for column in reward.needs if column not in columns]:
            raise InputError(
                f"{reward.place}: needs the column {', '.join(missing)}, which no row has; besides the prompt it "
                f"has {', '.join(columns) or 'none'}. Map columns with --columns, for example --columns answer=solution"
            )
    wrong: dict[str, list[str]] = {}  # the places, by what is wrong there
    for prompt in prompts:
        values = {name: column[0] for name, column in columns_of([prompt]).items()}
        usable = [reward for reward in needed if all(values.get(column) is not None for column in reward.needs)]
        if needed and not usable:
            wants = "; ".join(f"{reward.name} needs {' and '.join(reward.needs)}" for reward in needed)
            wrong.setdefault(f"no column to score a completion by: {wants}", []).append(prompt.place)
        for column, check in {column: check for reward in usable for column, check in reward.needs.items()}.items():
            try:
                if check:
                    check(values[column])
            except (ValueError, TypeError, InputError) as error:
                wrong.setdefault(f"{column}: {error}", []).append(prompt.place)
    for message, places in wrong.items():
        more = f" (and in {len(places) - 1:,} more rows)" if len(places) > 1 else ""
        faults.add(places[0], message + more)


def describe_words(rewards: Sequence[Reward], prompts: Iterable[Prompt]) -> str:
    """A line about the gold answers in words, which `math` compares by their wording; empty where there are none.

    Call it after check_prompts, which finds the gold answers that nothing can be compared with.
    """
    if not any(reward.needs.get("answer") is gold for reward in rewards):
        return ""
    answered = [prompt for prompt in prompts if prompt.answer is not None]
    worded = [prompt for prompt in answered if gold(str(prompt.answer)).words]
    if not worded:
        return ""
    return (
        f"{len(worded)} of {len(answered)} gold answers are words: math compares their wording. The first is "
        f"{gold(str(worded[0].answer)).text!r}, {worded[0].place}"
    )


def _entries(spec: Sequence[str]) -> list[tuple[str, float]]:
    """The rewards in `spec`, several in a word where there are commas, each with its weight."""
    return [_weight(entry.strip()) for words in spec for entry in words.split(",") if entry.strip()]


def _weight(entry: str) -> tuple[str, float]:
    source, equals, number = entry.rpartition("=")
    if not equals:
        return entry, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (source and math.isfinite(weight)):
        raise InputError(f"--rewards {entry}: {number!r} is not a weight; expected a number, as in math=1.0")
    return source, weight


def _built_in(name: str, weight: float, constants: dict[str, Any]) -> Reward:
    if name not in REWARDS:
        raise InputError(
            f"--rewards {name}: unknown reward{did_you_mean(name, REWARDS)}. There are {', '.join(REWARDS)}, "
            "model:CHECKPOINT and your own functions, FILE.py:FUNCTION."
        )
    reward = REWARDS[name]
    function = functools.partial(reward.function, **{constant: constants[constant] for constant in reward.constants})
    return Reward(name, weight, function, reward.columns, answer_template=reward.answer_template, slow=reward.slow)


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
