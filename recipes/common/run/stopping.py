"""Stop a run after the step it is in, with a checkpoint from which the same command resumes.

What stops a run: SIGTERM (docker stop, scancel, a spot machine taken back), SIGINT (Ctrl-C), SIGUSR1 (Slurm's
--signal), a file STOP in the run's folder, or --time-limit. Before the first step there is nothing to save, and a
signal ends the run at once; after the last step the run finishes what is left. A second Ctrl-C ends it at once.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from common.errors import InputError, Stopped
from common.run import screen
from common.run.ranks import is_first

end_at_once = os._exit  # under its own name: while a reward file of the user's runs, os._exit is refused to it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# When this process began, without the second that Python itself takes; of one that restarted itself, the first time.
STARTED = float(os.environ.pop("RECIPES_STARTED", "") or time.time())


class Stop:
    """Whether a run has to stop, and why. Create it early: signals before that end the process as usual.

    The signal handlers only record the signal and announce the first one, except in the two cases that cannot wait:
    before the first step, and at the second Ctrl-C.
    """

    def __init__(self, time_limit: str | None = None) -> None:
        self.requested: str | None = None  # by what: a signal's name, "the file STOP" or "--time-limit 3:55:00"
        self.phase: Literal["before the steps", "steps", "after the steps", "of a child"] = "before the steps"
        self.time_limit = time_limit
        self.deadline = time.monotonic() - (time.time() - STARTED) + seconds(time_limit) if time_limit else None
        self.interrupted = False
        self.process = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if os.getpid() != self.process:  # a fork of this process has no run of its own and ends as usual
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self.interrupted:
            self._announce("Ended at once; the same command resumes from the last checkpoint.", last=True)
            end_at_once(128 + number)
        self.interrupted |= number == signal.SIGINT
        if self.requested:  # the first signal is announced and stops the run; those after it change nothing
            return
        self.requested = signal.Signals(number).name
        if self.phase == "before the steps":
            raise Stopped(self.requested, "before training began")
        then = "when this is done" if self.phase == "after the steps" else "after this step, with a checkpoint"
        press = "Ctrl-C again" if self.interrupted else "Ctrl-C twice"
        self._announce(f"{self.requested}: the run stops {then}. {press} ends it at once.")

    def _announce(self, line: str, last: bool = False) -> None:
        """Show a line, if this is the process to do so: the first one of torchrun, the child of a pipeline."""
        if is_first() and self.phase != "of a child":
            screen.write_above(line, last)

    def request(self, reason: str) -> None:
        """Stop the run after its step for `reason`, unless it stops for another one already."""
        self.requested = self.requested or reason

    def reason(self, folder: Path) -> str | None:
        """Why the run in `folder` has to stop after this step, or None. Deletes a STOP file that it finds."""
        if self.requested is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.requested = f"--time-limit {self.time_limit}"
        if is_first() and _take_stop_file(folder):  # it tells the others; a file of many nodes is looked for once
            self.requested = self.requested or "the file STOP"
        return self.requested

    def begin_steps(self, folder: Path, agree: Callable[[str | None], str | None] = lambda reason: reason) -> None:
        """From here on a signal waits for the end of the step. Raises Stopped if an earlier one was swallowed.

        Some libraries catch every exception around their imports. Of several processes perhaps only one got the signal;
        `agree` gives its reason to all of them.
        """
        self.phase = "steps"
        if reason := agree(self.reason(folder)):
            raise Stopped(reason, "before training began")

    @contextmanager
    def noted_only(self) -> Iterator[None]:
        """Within the block a signal only gets recorded: a child process does the work, and announces that it stops."""
        phase, self.phase = self.phase, "of a child"
        yield
        self.phase = phase

    def wait(self, process: subprocess.Popen, folder: Path) -> int:
        """The exit code of a child process, once it ends; when the run in `folder` has to stop, it gets SIGTERM."""
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
    """A process started within the block does not receive the signals that stop a run: its work is part of a step.

    Ctrl-C goes to every process of a terminal, scancel to every process of a job. A new process inherits blocked
    signals, so it is protected from its first instruction on; a handler of its own would come too late.
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
    """Was a file STOP created in `folder` since this process started? It is deleted in any case.

    An older one was meant for the run before this one, whose batch script created it twice. How old it is says the
    clock that dates the files of this folder, of another machine perhaps: the file is dated again before it goes.
    """
    file = folder / "STOP"
    try:
        put = file.stat().st_mtime
        file.touch()
        age = file.stat().st_mtime - put
    except FileNotFoundError:
        return False
    file.unlink(missing_ok=True)
    return age <= time.time() - STARTED
