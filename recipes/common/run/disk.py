"""The disk of a run: whether it has room for what the run will write, and what is wrong with it when a write fails."""

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from common.errors import DISK, FULL, MachineError, show_thread_error
from common.run.files import PART

GIB = 2**30


def disk_fault(error: BaseException, folder: Path) -> tuple[int, str] | None:
    """The system's error number behind `error`, where the disk below `folder` is its cause, and the place; else None.

    safetensors raises an error of its own with the system's message, torch.save one without it: then writing a file to
    `folder` shows whether it can be written at all.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            place = Path(os.fsdecode(cause.filename or folder)).absolute()
            if cause.errno in FULL or (cause.errno in DISK and place.is_relative_to(folder.absolute())):
                return cause.errno, str(cause.filename or folder)
        else:
            for number in DISK:
                if os.strerror(number) in str(cause):
                    return number, str(folder)
        cause = cause.__cause__ or cause.__context__
    probe = folder / f"probe.{PART}"
    try:
        probe.write_bytes(bytes(2**20))
    except OSError as failure:
        return failure.errno or 0, str(folder)
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def on_thread_error(error: threading.ExceptHookArgs) -> None:
    """For threading.excepthook: a thread that writes beside the run, as TensorBoard's, fails with the disk in silence.

    The run writes to the same disk, and its message is the one to read.
    """
    if not isinstance(error.exc_value, OSError):
        show_thread_error(error)


def in_words(number: int) -> str:
    """The fault, as "the disk is full" or "Read-only file system"."""
    return "the disk is full" if number in FULL else os.strerror(number)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise MachineError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: {what} {needed / GIB:.2f} GiB, and its disk has {free / GIB:.2f} GiB free. Make room, give an "
            "--output-dir on another disk, or keep fewer checkpoints with --save-total-limit; the same command resumes."
        )


def size_of(folder: Path) -> int:
    """The bytes of all files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
