"""Exceptions and exit codes that all commands share, and how their messages reach the terminal.

0 done; 2 the input is wrong; 3 this machine cannot do it; 75 stopped with a checkpoint, the same command resumes; 1 is
a bug and keeps its traceback. As a shell counts signals: 130 Ctrl-C; 141 nobody reads the output, as after `| head`.
"""

import difflib
import errno
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType

DONE, BUG, BAD_INPUT, CANNOT, STOPPED = 0, 1, 2, 3, 75
UNREAD = 128 + signal.SIGPIPE
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
# What a disk or a mount may answer that no setting of a run can change, besides that it is full.
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK = (*FULL, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ESTALE)
# The name of a variable whose value nobody should see: HF_TOKEN, WANDB_API_KEY, DB_PASSWORD; not TOKENIZER, KEYRING.
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSW[A-Z]*|PASSPHRASE|CREDENTIALS?|[A-Z]*KEY)(_|$)", re.IGNORECASE)
TOKENS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pos]_[A-Za-z0-9]{30,})")
WORD = re.compile(r"[A-Za-z_-]{1,15}|<\|.*\|>")  # SORT_KEY=completion, PAD_TOKEN=<|endoftext|>: a name, and no secret
SHORTEST_SECRET = 8  # characters; shorter ones are no secrets, and would take every "1" and "true" out of a text
# What a terminal would obey, or show as other text than it is: control characters but tab and newline, marks that turn
# the direction of writing, and bytes of a name that are no UTF-8.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")  # in torch's words
CREDENTIALS = re.compile(r"(?<=://)[^/\s@\"'?#]+(?=@)")  # of a URL: user:password
LONGEST = 300  # characters of somebody else's error in a message of ours


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


class Restart(BaseException):
    """The run begins again from its newest checkpoint, in this process: the same command, with settings of run.json.

    No Exception, for the reason that Stopped is none. `started` is when the first process of the command was, from
    which its --time-limit counts.
    """

    def __init__(self, message: str, started: float) -> None:
        super().__init__(message)
        self.started = started

    def begin(self) -> None:
        """Replace this process by a new one of the same command. Memory that is lost in this one is free then."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ |= {"RECIPES_SPELLING": SPELLING, "RECIPES_STARTED": str(self.started)}
        os.execv(sys.executable, [sys.executable, *sys.argv])


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; an InputError or a MachineError is printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # no file. A letter that a terminal lacks is no reason to fail.
            stream.reconfigure(errors="replace")  # pyrefly: ignore[missing-attribute]  of TextIOWrapper
    sys.excepthook, threading.excepthook = _show_bug, show_thread_error
    code, message = DONE, ""
    try:
        code = main() or DONE
    except (InputError, MachineError, Stopped) as end:
        code, message = end.exit_code, str(end)
    except Restart as restart:
        print(spell(str(restart)), file=sys.stderr)
        restart.begin()
    except KeyboardInterrupt:
        code = 130  # as a shell counts it; a traceback would tell the user nothing
    except (Exception, SystemExit) as error:
        if is_unread(error):
            code = UNREAD
        elif explained := explanation(error):
            code, message = CANNOT, explained
        else:
            raise
    finally:
        fault = _write_out()
    if isinstance(fault, BrokenPipeError):
        code = code or UNREAD
    elif fault and code == DONE:
        code, message = CANNOT, explanation(fault) or one_line(fault)
    if message:
        with suppress(OSError):
            print(printable(without_secrets(spell(message))), file=sys.stderr)
        _write_out()
    sys.exit(code)


def is_unread(error: BaseException) -> bool:
    """Whether the error is that nobody reads what this command prints: what reads a pipe is gone, as `head` soon is."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)  # rich's
    pipes = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, it is no file, or closed
            pipes.register(stream.fileno(), 0)  # errors alone
    return isinstance(error, BrokenPipeError) and bool(pipes.poll(0))


def _write_out() -> OSError | None:
    """Write what the streams hold, or drop it, since Python would fail by it when it ends. Returns the last error."""
    fault = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            fault = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass
    return fault


def show_thread_error(error: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, as `_show_bug`."""
    if error.exc_value is not None and not isinstance(error.exc_value, SystemExit):
        _show_bug(error.exc_type, error.exc_value, error.exc_traceback)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, without the secrets that the text of an error may hold."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(printable(without_secrets(text)), end="", file=sys.stderr)


def explanation(error: BaseException) -> str | None:
    """What to print about an error that this machine causes, of memory, disk or a kernel; None about any other."""
    if is_out_of_memory(error):
        return _on_the_gpu(error) if _is_the_gpus(error) else _on_the_cpu(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'a file'}: {os.strerror(error.errno)}"
    if found := NOT_DETERMINISTIC.search(str(error)):
        return (
            f"--full-determinism: the kernel {found[1]} has no deterministic form in this version of PyTorch, and "
            "these settings need it. Change the setting that needs it, or leave --full-determinism out."
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Is it the memory, of the GPU or the CPU, that was not enough?"""
    if _is_the_gpus(error) or isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch's words on the CPU


def _is_the_gpus(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's; torch is not imported just to name it


def _on_the_gpu(error: BaseException) -> str:
    try:
        help = "".join(f"\n{planned}" for advise in PLAN_ADVICE if (planned := advise()))
    except Exception as failure:  # noqa: BLE001  the memory is full, and that is to be read, whatever the plan needs
        help = f" (There is no plan: {one_line(failure)})"
    return f"{error}\nThe GPU's memory is full.{help or _to_use_less()}"


def _on_the_cpu(error: BaseException) -> str:
    import resource

    from common.memory_limits import memory_limit  # late: the installer takes this file along, and not that one

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    limit = memory_limit()
    of = f" The least limit is {limit[0] / 2**30:.1f} GiB: {limit[1]}." if limit else ""
    reason = f"{one_line(error)}\n" if str(error) else ""
    return f"{reason}The memory of the CPU is full: this process had {used:.1f} GiB.{of}{_to_use_less()}"


def _to_use_less() -> str:
    advice = [advice.format(flag) for flag, advice in MEMORY_ADVICE.items() if flag in ARGUMENTS]
    return f" To use less: {'; '.join(advice)}." if advice else ""


def one_line(error: BaseException) -> str:
    """An error of somebody else's code in a message: its text on one line, cut to a length that one can read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def without_credentials(text: str) -> str:
    """`text` without user and password in the URLs that it holds."""
    return CREDENTIALS.sub("***", text)


def without_secrets(text: str) -> str:
    """`text` without credentials in URLs, the values of variables that are secret by their name, and known tokens."""
    for name, value in secret_values().items():
        text = text.replace(value, f"${name}")
    return TOKENS.sub("***", without_credentials(text))


def secret_values() -> dict[str, str]:
    """{name: value} of the environment's variables that are secret by their name, the longest value first."""
    found = {
        name: value
        for name, value in os.environ.items()
        if SECRET.search(name)
        and len(value) >= SHORTEST_SECRET
        and not (WORD.fullmatch(value) or _is_place(name, value))
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _is_place(name: str, value: str) -> bool:
    """Does a variable say where a secret is, a file or another variable, and not the secret? HF_TOKEN_PATH does."""
    is_file = value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))
    return is_file or value in os.environ or name.endswith(("_PATH", "_FILE", "_DIR"))


def printable(text: str) -> str:
    """`text` with what a terminal would obey written as Python writes it: ESC is \\x1b, a lone surrogate \\udcff."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


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
