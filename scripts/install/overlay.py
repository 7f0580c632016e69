"""Install docker/lm-eval.lock into a folder of its own, for the commands that need it: beside the packages of .venv.

The folder is only appended to the path of the process that asks for it, so that what both have is that of .venv. It is
named by Python and lock, and it is made once; afterwards no network is needed.
"""

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from common.errors import MachineError

from install import index, uv
from install.installed import CACHE, ROOT, disk_errors, say

LOCK = ROOT / "docker" / "lm-eval.lock"
# Packages of the lock without a wheel: pure Python of a few files each, whose setup.py runs, with setuptools of .venv.
SOURCES = ("rouge-score", "sqlitedict", "word2number")
FROM_SOURCE = [word for name in SOURCES for word in ("--no-binary", name)]
MEGABYTES = 150
IN_CONTAINER = Path("/cache")  # where the repository, and its .cache, is read-only


def folder() -> Path:
    """Where the packages of lm-eval.lock belong, for this Python and this lock."""
    writable = os.access(next(place for place in (CACHE, ROOT) if place.is_dir()), os.W_OK)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    return (CACHE if writable else IN_CONTAINER) / f"lm-eval-{python}-{lock}"


def ensure() -> Path:
    """The folder, with the packages in it. Raises MachineError, with the reason, where they cannot be installed."""
    there = folder()
    if not there.is_dir():
        with disk_errors():
            _install(there)
    return there


def _install(there: Path) -> None:
    index.use_pip_settings()
    program = uv.find()
    say(f"installing docker/{LOCK.name}, {MEGABYTES} MB, into {there}", "evaluate")
    start, part = time.monotonic(), there.with_name(f"{there.name}.{os.getpid()}")
    command = ["pip", "install", "--python", sys.executable, "--target", part, "--no-deps", "--require-hashes"]
    command += ["--no-config", "--only-binary", ":all:", *FROM_SOURCE, "--no-build-isolation", "-r", LOCK]
    try:
        uv.run([program, *command], LOCK)
        if not there.is_dir():  # another process may have been faster
            part.rename(there)
    except MachineError as error:
        raise MachineError(f"lm-evaluation-harness cannot be had here: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"done in {time.monotonic() - start:.0f} s", "evaluate")
