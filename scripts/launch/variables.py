"""From variables of make to the arguments of a command, and to the settings around it."""

import os
import re

from common.aliases import ELSEWHERE, ours
from common.arguments import NUMBER, Field, shell_words
from common.errors import InputError, did_you_mean

from launch.commands import VARIABLES, Command
from launch.engines import PASSED
from launch.mounts import PATHS

# The Makefile puts the names of the variables of its command line here; their values are in the environment, as typed.
GIVEN = "RECIPES_GIVEN"
# Variables that are programs' own, given on make's command line in place of before it.
SETTINGS = re.compile(rf"{PASSED.pattern}|(UV|PIP|DOCKER|BUILDKIT)_\w+|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|TMPDIR")
YES, NO = ("yes", "true", "1", "on"), ("no", "false", "0", "off")


def take_given() -> dict[str, str] | None:
    """The variables of make's command line, taken out of the environment; None where make did not start this."""
    if GIVEN not in os.environ:
        return None
    names = os.environ.pop(GIVEN).split()
    given = {name: os.environ[name] for name in names if name in os.environ}
    for name in (*names, "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
        if not SETTINGS.fullmatch(name):
            os.environ.pop(name, None)
    return given


def arguments(name: str, command: Command, fields: list[Field], given: dict[str, str]) -> list[str]:
    """The words that the given variables are for a command; its settings are put back into the environment.

    FROM is returned as --from. Raises InputError for a variable that the command does not take.
    """
    by_variable = {variable: field for field in fields for variable in (field.name.upper(), field.variable)}
    words, rest, unknown = [], [], []
    taken: dict[str, str] = {}
    for variable, value in given.items():
        if variable in by_variable:
            field = by_variable[variable]
            if other := taken.get(field.name):
                raise InputError(f"{other} and {variable} are the same argument; give one.")
            taken[field.name] = variable
            words += flag_words(field, variable, value)
        elif variable == "ARGS":
            rest = shell_words(variable, value)
        elif variable == "FROM" and variable in command.variables:
            words += [f"--from={value}"]
        elif variable in command.variables or SETTINGS.fullmatch(variable):
            os.environ[variable] = value
        else:
            unknown.append(explain(variable, name, command, by_variable))
    if unknown:
        raise InputError(f"{'; '.join(unknown)}. See `make help-{name}`.")
    return [*words, *rest]


def flag_words(field: Field, variable: str, value: str) -> list[str]:
    """An argument as the words of a command line: a variable's value is one value, or several of a shell's words."""
    if field.kind == "bool":
        if value.lower() not in YES + NO:
            raise InputError(f"{variable}={value}: expected yes or no.")
        return [field.flag if value.lower() in YES else field.off]
    if field.name in PATHS and not value:
        raise InputError(f"{variable} is empty; leave it out for its default.")
    if not field.many or (field.name in PATHS and os.path.exists(os.path.expanduser(value))):
        return one_value(field, value)
    values = shell_words(variable, value)
    if any(one.startswith("-") and not NUMBER.match(one) for one in values[1:]):
        raise InputError(f"{variable}={value}: only the first of several values can begin with a dash.")
    return [*one_value(field, values[0]), *values[1:]] if values else [field.flag]


def one_value(field: Field, value: str) -> list[str]:
    """A flag and its value, as one word where the value alone would be read as a flag."""
    return [f"{field.flag}={value}"] if value.startswith("-") or not value else [field.flag, value]


def explain(variable: str, name: str, command: Command, by_variable: dict[str, Field]) -> str:
    """What a variable that a command does not take is here."""
    known = {field.name: field.variable for field in by_variable.values()}
    if field := ours(variable, known):
        return f"{variable} is {known[field]} here"
    if variable.upper() in command.variables:
        return f"{variable} is {variable.upper()} here"
    if variable in VARIABLES:
        return f"{name} takes no {variable}"
    if reason := ELSEWHERE.get(variable.lower()):
        return f"{name} takes no {variable}: {reason}"
    near = did_you_mean(variable.upper(), [*known.values(), *command.variables])
    return f"{name} takes no {variable}{near}"
