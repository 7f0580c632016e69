"""Commands that may hang, and files that may not be there."""

import contextlib
import os
import re
import signal
import subprocess

COMMAND_SECONDS = 20  # for nvidia-smi or the compiler


def command(*line, stdin=b""):
    """The exit status and what was printed; the status is None when it is not there or gave no answer in time."""
    try:
        process = subprocess.Popen(line, start_new_session=True, **pipes(subprocess.STDOUT, subprocess.PIPE))
    except OSError as error:
        return None, f"{error.strerror}"
    try:
        said, _ = process.communicate(stdin, COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        end(process)
        return None, f"no answer in {COMMAND_SECONDS} s"
    return process.returncode, said.decode("utf-8", "replace")


def pipes(stderr, stdin=subprocess.DEVNULL):
    return {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr}


def end(process):
    """Kill a process and return what it had printed. One that is stuck in the driver stays behind."""
    kill(process)
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        return b"", b""


def kill(process):
    """Kill a process and what it started."""
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGKILL)


def existing(path):
    """`path`, or the nearest folder above it that exists."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def read(path):
    """The text of a file, "" where there is none to be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def hidden():
    """Does the user hide every GPU?"""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def first_line(said):
    """What an error says first; compilers and drivers go on with advice."""
    return next((line.strip()[:200] for line in str(said).splitlines() if line.strip()), "no reason given")


def numbers(version):
    """ "580.65.06" as (580, 65, 6), to be compared."""
    return tuple(map(int, re.findall(r"\d+", version)))
