"""Take the first steps of a run again, in a process of the run's recipe and a folder of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.environment import ROOT
from common.errors import BUG, STOPPED, MachineError, spell
from common.run.replay import REASON, VARIABLE
from common.run.screen import end_live, wait_for

from verification.record import Recorded, read_recorded

THREADS = "OMP_NUM_THREADS"


class RecipeFailed(Exception):
    """The recipe ended with this exit code. Its own message has been printed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the recipe ended with exit code {exit_code}")
        self.exit_code = exit_code


@contextmanager
def room() -> Iterator[Path]:
    """A folder for replays, which is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        yield Path(folder)


def take_again(run: Recorded, words: list[str], steps: int, folder: Path, what: str) -> Recorded:
    """What the first `steps` steps of `run` leave in the new `folder` when its recipe runs with these `words`.

    Raises RecipeFailed where it ended otherwise than after these steps.
    """
    record = run.record
    command = [str(ROOT / "recipes" / f"{record['recipe']}.py"), *words, "--output-dir", str(folder)]
    if (processes := record.get("ranks", 1)) > 1:
        command = [str(ROOT / "scripts" / "launch" / "processes.py"), str(processes), *command]
    environment = {**os.environ, VARIABLE: f"{steps}:{(run.folder / 'run.json').absolute()}"}
    threads = record.get("machine", {}).get("threads")
    if threads:  # as the run had them, unless the user says otherwise
        environment.setdefault(THREADS, str(threads))
    wait_for(what)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        done = subprocess.run([sys.executable, *command], stdout=output, stderr=subprocess.PIPE, text=True,
                              errors="replace", env=environment, check=False)  # fmt: skip
        end_live()
        output.seek(0)
        printed = output.read()
    if done.returncode not in (0, STOPPED):
        if done.returncode == BUG or done.returncode < 0:
            sys.stderr.write("".join(printed.splitlines(keepends=True)[-20:]))
        sys.stderr.write(spell(done.stderr))
        if done.returncode < 0:
            raise MachineError(f"the recipe was killed by {signal.Signals(-done.returncode).name}")
        raise RecipeFailed(done.returncode)
    again = read_recorded(folder)
    if again.record.get("status") == "stopped" and again.record.get("reason") != REASON:
        raise MachineError(f"stopped by {again.record.get('reason')} after step {again.steps}, before it could compare")
    return again
