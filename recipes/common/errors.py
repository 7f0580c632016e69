"""The two ways a command may refuse, the one it may stop in, and the exit codes every command here shares.

0 done; 2 the user's input is wrong; 3 this machine cannot do it; 75 stopped on a signal with a checkpoint (run the same
command again to go on); 1 is a bug and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Callable, Iterable

DONE, BUG, BAD_INPUT, CANNOT, STOPPED = 0, 1, 2, 3, 75


class InputError(Exception):
    """The user's input is wrong. The message says where, what, and how to mend it."""

    exit_code = BAD_INPUT


class MachineError(Exception):
    """This machine cannot do what was asked. The message says what is missing and what could."""

    exit_code = CANNOT


class Stopped(BaseException):
    """The run stopped, because of `reason` ("SIGTERM") and `when` ("after step 7 of 50").

    Not an Exception, as KeyboardInterrupt is not: a library that catches every Exception would continue the run.
    """

    def __init__(self, reason: str, when: str) -> None:
        super().__init__(f"Stopped by {reason} {when}; the same command resumes from there.")
        self.reason = reason


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and leave with its exit code; a refusal is printed without a traceback."""
    try:
        sys.exit(main() or DONE)
    except (InputError, MachineError) as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(refusal.exit_code)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported just to name it
            raise
        print(
            f"{error}\nThe GPU's memory is full. Halve --per-device-train-batch-size and double "
            "--gradient-accumulation-steps (the same result, slower), shorten --max-length, or keep "
            "--load-in-4bit and --gradient-checkpointing on.",
            file=sys.stderr,
        )
        sys.exit(CANNOT)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of the `known` names that is most like `word`, at least `cutoff` (0 to 1); None when none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The words to put behind a message about an unknown name: " (did you mean NAME?)", or none."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""
