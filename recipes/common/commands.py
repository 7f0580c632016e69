"""A command that a message proposes, as its reader types it: by make, or by scripts/run from another folder."""

import shlex
from pathlib import Path
from typing import Any

from common import errors
from common.arguments import variable
from common.environment import ROOT


def command(name: str, **arguments: Any) -> str:
    """A command with those of the arguments that have a value, quoted for a shell: by make in its folder, else in full.

    An argument of several values is a list or a tuple.
    """
    given = {argument: value for argument, value in arguments.items() if value}
    if errors.SPELLING == "make" or Path.cwd() == ROOT:
        return make(name, **{variable(argument): value for argument, value in given.items()})
    words = [str(ROOT / "scripts" / "run"), name]
    for argument, value in given.items():
        words += ["--" + argument.replace("_", "-"), *(value if isinstance(value, list | tuple) else [str(value)])]
    return shlex.join(words)


def make(target: str, **variables: Any) -> str:
    """A make command that gives those variables which are not None, quoted for a shell."""
    values = {
        name: shlex.join(value) if isinstance(value, list | tuple) else value
        for name, value in variables.items()
        if value is not None
    }
    return shlex.join(["make", target, *(f"{name}={value}" for name, value in values.items())])
