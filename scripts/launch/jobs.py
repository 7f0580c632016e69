"""`slurm` takes the arguments of what it submits beside its own: these functions tell the two apart."""

from dataclasses import dataclass

from common.aliases import ours
from common.arguments import Field, read_words
from common.errors import InputError, did_you_mean

from launch.commands import COMMANDS
from launch.repeat import repeat, take_from


@dataclass(frozen=True)
class Submitted:
    """What the jobs run: a recipe, or the pipeline, and its `fields` without those that `slurm` has itself."""

    name: str
    fields: list[Field]


def submitted(own: list[Field], words: list[str], given: dict[str, str]) -> Submitted:
    """What a command line of `slurm` submits. Raises InputError where it names no recipe and no stages."""
    recipes = [name for name, command in COMMANDS.items() if command.recipe]
    if given.get("STAGES") or value_of("--stages", words):
        name = "pipeline"
    elif name := given.get("RECIPE") or value_of("--recipe", words):
        if name not in recipes:
            raise InputError(f"--recipe={name}: unknown{did_you_mean(name, recipes)}. There are {', '.join(recipes)}.")
    else:
        for variable in given:
            if near := ours(variable, ("recipe", "stages")):
                raise InputError(f"{variable} is {near.upper()} here")
        raise InputError("slurm needs --recipe=..., for example --recipe=sft, or --stages=sft,dpo,grpo")
    known = {field.name for field in own}
    return Submitted(name, [field for field in COMMANDS[name].fields() if field.name not in known])


def value_of(flag: str, words: list[str]) -> str:
    """The value of a flag in a command line, "" where it is not there."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == flag:
            return following
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return ""


def arrange(own: list[Field], what: Submitted, words: list[str]) -> list[str]:
    """`words` with the arguments of `slurm` first, and those of what it submits after a --."""
    file, words = take_from([word for word in words if word != "--"])
    mine, others = [], []
    for one in read_words([*own, *what.fields], words):
        dashed = one.values and (one.values[0].startswith("-") or not one.values[0])
        group = [f"{one.flag}={one.values[0]}", *one.values[1:]] if dashed else [one.flag, *one.values]
        (mine if one.field in own else others).extend(group)
    if file and not COMMANDS[what.name].recipe:
        raise InputError(f"--from={file}: only a recipe's run can be repeated, not a chain of stages")
    if file:
        others = repeat(what.name, what.fields, [f"--from={file}", *others])
    return [*mine, "--", *others]
