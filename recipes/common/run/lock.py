"""One process at a time may write the folder of a run: a lock that names its holder and ends with it.

It is a POSIX lock on the file run.lock: the kernel, or the server of a network disk, takes it back when its holder
dies, however that happens. So what the file says is only for the message; it decides nothing.
"""

import errno
import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from common.errors import InputError

NAME = "run.lock"
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a network disk that was mounted without


class Lock:
    """The lock of the run in `folder`, to be taken once. The file must be opened nowhere else: closing it unlocks."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.stream: IO[str] | None = None

    def take(self) -> None:
        """Take it. Raises InputError where another process has it; prints a line where this disk has no locks."""
        while True:
            stream = self.file.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    raise InputError(_held(self.file, stream)) from None
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"{self.file.parent}: its disk has no locks; a second process in this folder would not be noticed"
                )
            if self._is_there(stream):
                break
            stream.close()  # its last holder ended meanwhile, and deleted it
        stream.truncate(0)
        stream.write(json.dumps(_this_process()))
        stream.flush()
        self.stream = stream

    def give_back(self) -> None:
        """Give it back, if it was taken; the file goes first, so that nobody waits for one that is gone."""
        if self.stream is None:
            return
        with suppress(OSError):  # of a disk that has failed: the message about that is what counts
            self.file.unlink(missing_ok=True)
        self.stream.close()
        self.stream = None

    def _is_there(self, stream: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self.file.stat())
        except FileNotFoundError:
            return False


def refuse_where_held(folder: Path) -> None:
    """Raise InputError where a process writes the run in `folder`: at once, before anything slow is loaded."""
    try:
        stream = (folder / NAME).open("r+", encoding="utf-8")
    except OSError:
        return
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise InputError(_held(folder / NAME, stream)) from None


def _held(file: Path, stream: IO[str]) -> str:
    stream.seek(0)
    try:
        holder: dict[str, Any] = json.loads(stream.read())
        job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
        who = f"process {holder['pid']} on {holder['host']}{job}, since {holder['started']},"
    except (ValueError, KeyError, TypeError):  # it is being written
        who = "another process"
    return (
        f"{file.parent}: {who} is training in this folder. Wait for it, stop it with `touch {file.parent}/STOP`, or "
        "give another --output-dir."
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
