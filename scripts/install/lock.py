"""Resolve docker/*.in into the hash-locked docker/*.lock.

    python -m install.lock              # make lock: what the .in files and overrides ask for, else as it was
    python -m install.lock --upgrade    # make lock UPGRADE=1: the newest that they allow
    python -m install.lock --check      # make lock-check: exit 2 when a lock is not what `make lock` would write

The versions of a lock that is there are kept, unless --upgrade; the hashes are read from the index again. So the check
fails when an .in file, an override or a lock was edited alone, or when a lock has a hash that the index does not, and
does not fail because the index has something newer today.

A new uv moves in two steps: `make lock` after editing bootstrap.in, and again, with that uv, for the others.
"""

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.arguments import parse
from common.errors import InputError, MachineError, run_command
from common.run.files import write_bytes

from install import index, overlay, uv
from install.installed import ROOT, disk_errors, say

DOCKER = ROOT / "docker"
# The oldest Python the recipes run on. The packages are the same on 3.12 to 3.14; the hashes are those of every wheel.
PYTHON = "3.11"
# Wheels only: nothing is compiled, and no code of a package runs, at install time, but for SOURCES of lm-eval. glibc
# 2.31 (Debian 11, Ubuntu 20.04) is as old as it gets: llguidance, which vLLM needs, has no older wheel, and uv would
# walk back to an old vLLM.
COMPILE = f"""
    pip compile --quiet --no-config --generate-hashes --only-binary :all: --python-version {PYTHON}
    --python-platform x86_64-manylinux_2_31 --no-emit-index-url --no-emit-find-links
""".split()
# In this order: each after the first is held to the versions of the superset, so that they differ in nothing else. The
# other way round has no solution, because vLLM caps versions that the others would take newer.
LOCKS = {
    "bootstrap.lock": "bootstrap.in",
    "cuda-vllm.lock": "--override overrides-cuda.txt vllm.in",
    "cuda.lock": "--override overrides-cuda.txt -c cuda-vllm.lock train.in",
    "cpu.lock": "--override overrides-cpu.txt -c cuda-vllm.lock train.in",
    "lm-eval.lock": f"--override overrides-cuda.txt -c cuda-vllm.lock {' '.join(overlay.FROM_SOURCE)} lm-eval.in",
}
BESIDE = {"lm-eval.lock": "cuda.lock"}  # a lock of packages that are installed beside those of another one


@dataclass(frozen=True)
class Args:
    upgrade: bool = False
    """Take the newest versions that the .in files allow."""
    check: bool = False
    """Write nothing; exit with 2 where a lock is not what this would write."""


def main() -> None:
    args = parse(Args, sys.argv[1:], "lock")
    index.use_pip_settings()
    program = uv.find()
    torch = re.findall(r"^torch==\S+", (DOCKER / "overrides-cpu.txt").read_text(), re.M)[0]
    links = uv.find_torch(program, torch, PYTHON)
    if links is None and not args.check:
        raise MachineError(
            f"No {torch} {uv.TORCH_PLACES}, for docker/cpu.lock: set TORCH_CPU_LINKS to a folder or URL."
        )
    # uv writes the paths it is given into its comments, so it runs in a copy where all of them are bare names.
    with disk_errors(), tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary, "docker")
        shutil.copytree(DOCKER, work)
        for name, inputs in LOCKS.items():
            if name == "cpu.lock" and links is None:
                say(f"docker/cpu.lock is not checked: no {torch} {uv.TORCH_PLACES}", "lock")
                continue
            places = ["--find-links", links] if name == "cpu.lock" and links else []
            resolve(program, work, name, [*inputs.split(), *left_out(work, name), *places], upgrade=args.upgrade)
        if args.check:
            compare(work)
        else:
            for name in LOCKS:
                write_bytes(DOCKER / name, (work / name).read_bytes())


def left_out(work: Path, name: str) -> list[str]:
    """The words with which uv leaves the packages of another lock out of this one, where it is installed beside it."""
    beside = (work / BESIDE[name]).read_text() if name in BESIDE else ""
    return [word for package in re.findall(r"^([\w.-]+)==", beside, re.M) for word in ("--no-emit-package", package)]


def resolve(program: str, work: Path, name: str, inputs: list[str], upgrade: bool) -> None:
    """Let uv write work/NAME from `inputs`, the words of its command line."""
    lock = work / name
    lock.write_text("" if upgrade or not lock.exists() else preferences(lock.read_text()))
    command = [program, *COMPILE, "--custom-compile-command", "make lock", *inputs, "-o", name]
    # What this machine is configured to prefer must not reach the lock: only where the index is, and how to get there.
    kept = re.compile("UV_(DEFAULT_INDEX|INDEX_URL|CACHE_DIR|SYSTEM_CERTS|HTTP_.*|KEYRING_PROVIDER)")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UV_") or kept.fullmatch(key)}
    done = subprocess.run(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"docker/{name} cannot be resolved:\n{done.stderr.strip()}")
    lock.write_text(lock.read_text().partition("\n# The following packages were excluded")[0])


def preferences(lock: str) -> str:
    """What uv keeps of a lock that is there: the versions. It would keep the hashes too, and never look whether they
    are right; only those of the CPU torch stay, because a folder may have it for one Python and PyTorch's page for all.
    """
    pins = re.findall(r"^(\S+==\S+)((?: \\\n +--hash=\S+)+)", lock, re.M)
    return "\n".join(pin + (hashes if "+cpu" in pin else "") for pin, hashes in pins)


def compare(work: Path) -> None:
    """Print what differs between docker/ and `work`; raises InputError when anything does."""
    stale = False
    for name in LOCKS:
        is_now, would_be = (re.split(r" \\\n|\n", (folder / name).read_text()) for folder in (DOCKER, work))
        # A wheel that was added to a release later, for a newer Python say, is no fault of the lock.
        would_be = [line for line in would_be if "--hash" not in line or line in is_now]
        changes = list(difflib.unified_diff(is_now, would_be, n=0, lineterm=""))[2:]
        if changes:
            stale = True
            line = re.findall(r"\d+", changes[0])[0]
            print(f"docker/{name}:{line}: not what `make lock` would write (- is now, + would be)", file=sys.stderr)
            print("\n".join(changes[:20]), file=sys.stderr)
    if stale:
        raise InputError("Edit the .in files or the overrides, then `make lock`, and commit what it changes.")


if __name__ == "__main__":
    run_command(main)
