"""Exceptions and exit codes that all commands share, and how their messages reach the terminal.

0 done; 2 the input is wrong; 3 this machine cannot do it; 75 stopped with a checkpoint, the same command resumes; 1 is
a bug and keeps its traceback.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping

DONE, BUG, BAD_INPUT, CANNOT, STOPPED = 0, 1, 2, 3, 75
ON_FAULT = "--stop-on-fault"  # what the reason of a run begins with that was stopped by a finding about its health

# "make" where make started this command. Taken out of the environment: a command that this one starts, as the pipeline
# does, gets flags from it.
SPELLING = os.environ.pop("RECIPES_SPELLING", "")
# The arguments of this command, {flag: make variable}: --max-length is MAX_LENGTH, --no-packing is PACKING=no.
ARGUMENTS: dict[str, str] = {}
# What to change where the GPU's memory is full, from the plan; set by a command that the planner knows.
PLAN_ADVICE: list[Callable[[], str]] = []
# For other commands: memory that an argument saves, and its price; those that the command has are shown.
MEMORY_ADVICE = {
    "--per-device-train-batch-size": "halve {} and double --gradient-accumulation-steps (same result, slower)",
    "--max-length": "lower {}",
    "--max-completion-length": "lower {}",
    "--load-in-4bit": "keep {} on",
    "--gradient-checkpointing": "keep {} on",
}


class InputError(Exception):
    """The input is wrong. The message says where, what, and how to fix it."""

    exit_code = BAD_INPUT


class MachineError(Exception):
    """This machine cannot do it. The message says what is missing and what could."""

    exit_code = CANNOT


class Stopped(BaseException):
    """A run stopped with a checkpoint: `reason`, such as "SIGTERM", and `when`, such as "after step 7 of 50".

    Like KeyboardInterrupt it is no Exception: libraries catch those and would continue. By --stop-on-fault the run is
    not to be resumed as it is: its input has to change.
    """

    def __init__(self, reason: str, when: str) -> None:
        by_fault = reason.startswith(ON_FAULT)
        then = "the same command resumes from there"
        if by_fault:
            then = "change what the finding names and start anew, or resume as it is with --no-stop-on-fault"
        super().__init__(f"Stopped by {reason} {when}; {then}.")
        self.reason = reason
        self.exit_code = BAD_INPUT if by_fault else STOPPED


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; an InputError or a MachineError is printed without a traceback."""
    try:
        sys.exit(main() or DONE)
    except (InputError, MachineError) as refusal:
        print(spell(str(refusal)), file=sys.stderr)
        sys.exit(refusal.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell counts it; a traceback would tell the user nothing
    except Stopped as stopped:
        print(spell(str(stopped)), file=sys.stderr)
        sys.exit(stopped.exit_code)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported just to name it
            raise
        help = "".join(f"\n{planned}" for advise in PLAN_ADVICE if (planned := advise()))
        advice = [advice.format(flag) for flag, advice in MEMORY_ADVICE.items() if flag in ARGUMENTS]
        if advice and not help:
            help = f" To use less: {'; '.join(advice)}."
        print(spell(f"{error}\nThe GPU's memory is full.{help}"), file=sys.stderr)
        sys.exit(CANNOT)


def spell(message: str) -> str:
    """`message` with this command's arguments as make variables, where make started it; else as it is."""
    return as_variables(message, ARGUMENTS) if SPELLING == "make" else message


def as_variables(message: str, arguments: Mapping[str, str]) -> str:
    """`message` with these arguments, {flag: make variable}, as make variables.

    --max-length is then MAX_LENGTH, --max-length 5 and --max-length=5 are MAX_LENGTH=5, and --no-packing is PACKING=no.
    Commands in backquotes stay as they are.
    """
    if not arguments:
        return message
    flags = "|".join(map(re.escape, sorted(arguments, key=len, reverse=True)))
    pattern = rf"(?<![\w-])({flags})(?![\w-])(=| (?=-?\d|[^\s:]+:(?: |$)))?"

    def variable(found: re.Match[str]) -> str:
        return arguments[found[1]] + ("=" if found[2] else "")

    parts = re.split(r"(`[^`]* [^`]*`)", message)  # a command has a space in it
    return "".join(part if index % 2 else re.sub(pattern, variable, part) for index, part in enumerate(parts))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of the `known` names that is most like `word`, at least `cutoff` (0 to 1); None when none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The words to put behind a message about an unknown name: " (did you mean NAME?)", or none."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""
