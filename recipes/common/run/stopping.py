"""End a run when it is told to: after the step it is in, with a checkpoint from which the same command goes on.

Told by SIGTERM (docker stop, scancel, a spot machine taken back), SIGINT (Ctrl-C), SIGUSR1 (Slurm's --signal), a file
STOP in the run's folder, or --time-limit. Before the first step there is nothing to save and a signal ends the run at
once; after the last one the little that is left is finished. A second Ctrl-C leaves at once, whatever there is to lose.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from common.errors import InputError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ANNOUNCED = "STOP_IS_ANNOUNCED"  # in the environment of a process whose parent announces a signal for both
STARTED = time.time()  # of this process, less the second that Python itself takes


class Stop:
    """Whether a run is to end, and why. Made early, for what comes before it is not heard.

    The handlers of signals only note them, but for the two cases that cannot wait: before the first step, and the
    second Ctrl-C.
    """

    def __init__(self, time_limit: str | None = None) -> None:
        self.told: str | None = None
        self.phase: Literal["before the steps", "steps", "after the steps"] = "before the steps"
        self.time_limit = time_limit
        self.deadline = time.monotonic() - (time.time() - STARTED) + seconds(time_limit) if time_limit else None
        self.interrupted = False
        self.process = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if os.getpid() != self.process:  # a fork of ours, which is no run and ends as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self.interrupted:
            _say("Left at once; the same command again goes on from the last checkpoint.")
            os._exit(128 + number)
        self.interrupted |= number == signal.SIGINT
        told_before, self.told = self.told, self.told or signal.Signals(number).name
        if self.phase == "before the steps" and not told_before:  # else the first is ending the run
            raise Stopped(self.told, "before training began")
        then = "after this step, with a checkpoint" if self.phase == "steps" else "when this is done"
        _say(f"{signal.Signals(number).name}: the run ends {then}; a second Ctrl-C leaves at once.")

    def reason(self, folder: Path) -> str | None:
        """Why the run in `folder` is to end after this step, or None. A STOP file is taken away when it is seen."""
        if self.told is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.told = f"--time-limit {self.time_limit}"
        if _take_stop_file(folder):
            self.told = self.told or "the file STOP"
        return self.told

    def begin_steps(self, folder: Path, agree: Callable[[str | None], str | None] = lambda reason: reason) -> None:
        """From here on a signal waits for the end of the step. Raises Stopped if one came before and got lost.

        It does where a library catches everything, as some do around their imports. Of several processes one alone may
        have been told; `agree` gives all of them its reason.
        """
        self.phase = "steps"
        if reason := agree(self.reason(folder)):
            raise Stopped(reason, "before training began")

    @contextmanager
    def noted_only(self) -> Iterator[None]:
        """Within the block a signal ends nothing by itself, as during the steps."""
        phase, self.phase = self.phase, "steps"
        yield
        self.phase = phase

    def wait(self, process: subprocess.Popen, folder: Path) -> int:
        """Wait for a process of ours, its exit code; when the run in `folder` is told to stop, so is it, by SIGTERM."""
        passed_on = False
        while process.poll() is None:
            if not passed_on and self.reason(folder):
                process.terminate()
                passed_on = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        return process.returncode


@contextmanager
def shielded() -> Iterator[None]:
    """A process started within gets no signal to stop, for its work is a part of our step: we end it ourselves.

    Ctrl-C goes to every process of a terminal, scancel to every process of a job. Blocked is what a new process is from
    its first instruction on; a handler of its own would come too late.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def seconds(time_limit: str) -> int:
    """`3:55:00` in seconds. Raises InputError for anything else."""
    if not (found := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", time_limit)):
        raise InputError(f"--time-limit {time_limit}: expected hours:minutes:seconds, as 3:55:00")
    hours, minutes, rest = map(int, found.groups())
    return 3600 * hours + 60 * minutes + rest


def _take_stop_file(folder: Path) -> bool:
    """Was a file STOP put into `folder` since this process started? Either way there is none any more.

    An older one is what a batch script left that told the run before this one twice; it must not end this one too.
    """
    file = folder / "STOP"
    try:
        put = file.stat().st_mtime
    except FileNotFoundError:
        return False
    file.unlink(missing_ok=True)
    return put >= STARTED


def _say(line: str) -> None:
    """A line from a handler, past Python's buffers: they may be in use. On a terminal in place of the live bar's."""
    if ANNOUNCED in os.environ:
        return
    clear, cursor = ("\r\x1b[2K", "\x1b[?25h") if sys.stderr.isatty() else ("", "")
    os.write(2, f"{clear}{line}{cursor}\n".encode())
