"""Which stages there are, in what order they may come, and what each gets: its arguments and its data."""

import re
from dataclasses import dataclass, replace
from typing import Any

from common.arguments import read_fields, read_words, shell_words, values
from common.data.feedback import LABELLED_OR_RATED, as_feedback
from common.data.formats import PAIR_FORMATS, PROBLEM_FORMATS, PROMPT_FORMATS, RATING_FORMATS, SFT_FORMATS, Formats
from common.data.hold_out import DataSet
from common.data.prompts import as_prompt
from common.data.read import column_map, read_examples
from common.data.rows import find_source
from common.environment import ROOT
from common.errors import InputError, did_you_mean

SAMPLES = ROOT / "data_samples"


@dataclass(frozen=True)
class Stage:
    """The row formats that a stage reads, the arguments that may name its data, its sample data, and what is set here.

    Of several arguments the first that is given counts.
    """

    formats: Formats
    data: tuple[str, ...]
    sample: str
    ours: tuple[str, ...] = ()  # arguments of the recipe that the pipeline itself gives or needs as they are


STAGES = {
    "sft": Stage(SFT_FORMATS, ("sft_data",), "sft.jsonl", ("use_peft",)),
    "dpo": Stage(PAIR_FORMATS, ("dpo_data",), "preferences-train.jsonl"),
    "kto": Stage(LABELLED_OR_RATED, ("kto_data",), "feedback-train.jsonl"),
    "grpo": Stage(PROBLEM_FORMATS, ("math_data",), "arithmetic-train.jsonl"),
    "reward": Stage({**PAIR_FORMATS, **RATING_FORMATS}, ("reward_data",), "scores.jsonl", ("stand_alone",)),
    "ppo": Stage(PROMPT_FORMATS, ("ppo_data", "math_data"), "arithmetic-train.jsonl"),
}
AFTER_REWARD = replace(STAGES["ppo"], data=("ppo_data", "reward_data"), sample="scores.jsonl", ours=("reward_model",))
OURS = ("model", "data", "output_dir")


def stage_names(text: str) -> list[str]:
    """The stages that `text` names, in order. Raises InputError for an unknown one and for an order without a sense."""
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if name not in STAGES:
            near = did_you_mean(name, STAGES)
            raise InputError(f"--stages {text}: unknown stage {name!r}{near}. There are {', '.join(STAGES)}.")
    if not names or len(set(names)) < len(names):
        raise InputError(f"--stages {text}: expected one or more of {', '.join(STAGES)}, each once.")
    if "sft" in names[1:]:
        raise InputError(f"--stages {text}: sft after {names[0]} would undo it; put sft first.")
    following = names[names.index("reward") + 1 :] if "reward" in names else []
    if following and following[0] != "ppo":
        raise InputError(
            f"--stages {text}: {following[0]} does not use a reward model, and would change the base that it belongs "
            "to; put reward last, or directly before ppo."
        )
    return names


def stage_of(name: str, names: list[str]) -> Stage:
    """What the stage `name` gets in a chain of `names`: after reward, ppo has its reward model and its prompts."""
    return AFTER_REWARD if name == "ppo" and "reward" in names else STAGES[name]


def stage_words(name: str, stage: Stage, text: str) -> tuple[list[str], dict[str, list[Any]]]:
    """A stage's own arguments as words, and the values of each. Raises InputError where its recipe would refuse them.

    The recipe's file says which arguments it has; nothing is imported.
    """
    flag = f"--{name}-args"
    words = shell_words(flag, text)
    try:
        given = {
            one.field.name: values(one) for one in read_words(read_fields(ROOT / "recipes" / f"{name}.py") or [], words)
        }
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    if taken := [argument for argument in (*OURS, *stage.ours) if argument in given]:
        flags = ", ".join(f"--{argument.replace('_', '-')}" for argument in taken)
        raise InputError(f"{flag}: the pipeline itself sets {flags}; leave it out.")
    return words, given


def stage_data(name: str, stage: Stage, given: dict[str, list[Any]], sources: dict[str, str | None]) -> DataSet:
    """The data of a stage, all of it read and checked.

    Args:
        given: the stage's own arguments, of which --format and --columns say how to read.
        sources: what the pipeline's arguments for data name; where all are None, each stage has its sample data.
    """
    source = next((sources[argument] for argument in stage.data if sources[argument]), None)
    if source is None and any(sources.values()):
        flags = " or ".join(f"--{argument.replace('_', '-')}" for argument in stage.data)
        raise InputError(
            f"stage {name} needs {flags}: where one stage has data of yours, the sample data of the tiny model would "
            "not fit the others."
        )
    source = source or str(SAMPLES / stage.sample)
    columns = given.get("columns", [])
    row_format = given.get("format", ["auto"])[0]
    examples = read_examples(find_source(source), stage.formats, row_format, columns).examples
    if name == "kto":
        examples = as_feedback(examples, next(iter(given.get("threshold", [])), None))
    elif name == "ppo":  # its completions are its own, whatever the data has
        examples = [as_prompt(example) for example in examples]
    return DataSet(source, examples, column_map(columns))
