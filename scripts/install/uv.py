"""uv, which installs: found or fetched, used to look for torch, and run with one line of progress or of error."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

from common.errors import InputError, MachineError
from common.run.files import write_bytes

from install import index
from install.installed import CACHE, ROOT, VENV, say

# The interpreter of .venv, by its own name: sys.executable may be in the .venv that is about to be emptied.
PYTHON = getattr(sys, "_base_executable", "") or sys.executable
# A page of torch wheels alone. As a package index, the folder above it would hide the real one for every other name.
PYTORCH_PAGE = "https://download.pytorch.org/whl/cpu/torch/"
QUICK = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "5", "UV_HTTP_CONNECT_TIMEOUT": "5"}  # seconds
# What to do about an error of uv that has these words.
CURES = {
    "os error 28": f"The disk of {VENV} or of uv's cache is full: free some space and run this again.",
    "Hash mismatch": "It is another file than the one that the lock was made with: do not use it before you know why.",
    "error sending request|Failed to fetch|dns error|timed out": f"{index.CONNECT}.",
    "no wheels with a matching": "Use another one: make PYTHON=python3.11.",
    "there is no version of|was not found in": "Set PIP_INDEX_URL to an index that has it.",
}
TORCH_PLACES = f"on the index, in pip's find-links or at {PYTORCH_PAGE}"


def find() -> str:
    """The uv that docker/bootstrap.lock pins: in .cache, on the PATH, or fetched from the index into .cache."""
    lock = (ROOT / "docker" / "bootstrap.lock").read_text()
    version = re.findall(r"^uv==(\S+)", lock, re.M)[0]
    uv = CACHE / f"uv-{version}" / "uv"
    if uv.exists():
        return str(uv)
    installed = shutil.which("uv")
    if installed and output(installed, "--version").split()[1:2] == [version]:
        return installed
    say(f"fetching uv {version}, 17 MB")
    name = rf"uv-{re.escape(version)}-py3-none-manylinux\S*x86_64\S*\.whl"
    wheel = index.fetch(f"uv {version} for Linux on x86_64", "uv", name, re.findall(r"sha256:(\w+)", lock))
    uv.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(uv, zipfile.ZipFile(wheel).read(f"uv-{version}.data/scripts/uv"), executable=True)
    return str(uv)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def find_torch(uv: str, requirement: str, python: str) -> str | None:
    """Where uv finds the CPU build of torch, as a value of --find-links; None when it does not find it.

    In TORCH_CPU_LINKS if that is given; else by uv's own settings (then ""), where pip is configured to look, or on
    PyTorch's page. `requirement` is a line of a lock, `python` the version it is for ("3.11"). Nothing is downloaded.
    """
    given = os.environ.get("TORCH_CPU_LINKS", "")
    for place in [given] if given else ["", *index.pip_setting("find-links").split(), PYTORCH_PAGE]:
        if place and Path(place).expanduser().is_dir():  # uv does not know ~, and may run in another folder
            place = str(Path(place).expanduser().resolve())
        command = [uv, "pip", "sync", "-", "--python", PYTHON, "--python-version", python, "--only-binary", ":all:"]
        command += ["--dry-run", "--target", CACHE / "none", *(["--no-index", "--find-links", place] if place else [])]
        environment = {**os.environ, **QUICK}
        done = subprocess.run(command, env=environment, input=requirement, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return place
    if given:
        raise InputError(f"TORCH_CPU_LINKS={given} holds no {requirement.split()[0]} for Python {python}.")
    return None


def run(command: list[str | Path], lock: Path, gigabytes: float = 0) -> None:
    """Run uv; on a terminal one line counts the `gigabytes` that it will write. A failure is one line."""
    live = gigabytes and sys.stderr.isatty()
    with tempfile.TemporaryFile() as messages:
        # close_fds: uv inherits the lock of this set-up, which then holds until uv has ended.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, close_fds=False)
        try:
            while process.poll() is None:
                if live:
                    show(f"setup: {min(written(process.pid), gigabytes):.1f} of {gigabytes} GB")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if live:
                show("")
        messages.seek(0)
        if process.returncode:
            raise MachineError(reason(messages.read().decode("utf-8", "replace"), f"docker/{lock.name}"))


def show(line: str) -> None:
    """Write a line over the one before."""
    print(f"\r{line:78}\r{line}", end="", file=sys.stderr, flush=True)


def written(process: int) -> float:
    """The GB that a process has written so far."""
    with suppress(OSError):  # it has just ended
        return int(re.findall(r"^wchar: (\d+)", Path(f"/proc/{process}/io").read_text(), re.M)[0]) / 1e9
    return 0.0


def reason(messages: str, lock: str) -> str:
    """One line out of uv's pages of causes: the first, the last, and the cure."""
    causes = re.findall(r"(?:error|cause): (.*)", messages) or [messages.strip()]
    cure = next((f" {cure}" for pattern, cure in CURES.items() if re.search(pattern, messages)), "")
    return index.bare(f"uv could not install {lock}: {': '.join(dict.fromkeys([causes[0], causes[-1]]))}.{cure}")
