"""What .venv and its llama.cpp converter are, and what the locks in docker/ say that they have to be."""

import contextlib
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, MachineError

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
# What sha256sum prints for the lock that .venv was made from. Written last: an interrupted set-up leaves none.
MARK = VENV / "lock.sha256"
CONVERTER = VENV / "share" / "llama.cpp"
# What is kept of the source of llama-cpp-python: the converter brings its own gguf, newer than the one on the index.
KEPT = re.compile(r"[^/]+/vendor/llama\.cpp/(LICENSE|convert_\w+_to_gguf\.py|conversion/\w+\.py|gguf-py/gguf/\w+\.py)")

# GB that uv writes, measured; the files in .venv are hard links to those in its cache.
VARIANTS = {"cpu": 2.7, "cuda": 5.8, "cuda-vllm": 9.2}


def check_variant(variant: str) -> None:
    if variant not in ("", *VARIANTS):
        raise InputError(f"VARIANT={variant} is none of {', '.join(VARIANTS)}.")


def gpu_visible() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def lock_file(variant: str) -> Path:
    return ROOT / "docker" / f"{variant}.lock"


def lock_mark(variant: str) -> str:
    """What `sha256sum docker/VARIANT.lock` prints: the name of a set of packages, in .venv and on an image."""
    return f"{hashlib.sha256(lock_file(variant).read_bytes()).hexdigest()}  docker/{variant}.lock"


def up_to_date(variant: str) -> bool:
    """Is .venv whole, of this variant ("" for any), and made from its lock as that is now?"""
    made = made_variant()
    if not made or variant not in ("", made) or not (VENV / "bin" / "python").exists():
        return False
    if MARK.read_text().strip() != lock_mark(made):
        return False
    if made == "cpu" and not variant and gpu_visible():
        say("this machine has an NVIDIA GPU and .venv holds the CPU build; `make setup VARIANT=cuda` changes that")
    return True


def has_converter() -> bool:
    """Does .venv hold the llama.cpp converter that docker/sources.txt pins, and what is to be kept of it?"""
    mark = CONVERTER / "source.sha256"
    return mark.is_file() and mark.read_text() == converter_mark()


def converter_mark() -> str:
    """What made the converter: the sha256 of the source that is pinned, and of the pattern of what is kept."""
    pins = (ROOT / "docker" / "sources.txt").read_text()
    source = re.findall(r"^llama-cpp-python==\S+ --hash=sha256:(\w+)$", pins, re.M)[0]
    return f"{source} {hashlib.sha256(KEPT.pattern.encode()).hexdigest()}\n"


def made_variant() -> str:
    """The variant .venv was made for, "" when there is no whole .venv."""
    try:
        found = re.search(r"docker/(.+)\.lock", MARK.read_text())
    except FileNotFoundError:
        return ""
    return found[1] if found and found[1] in VARIANTS else ""


def locked_cpu_torch() -> str:
    """The CPU build of torch as docker/cpu.lock has it: name, version and hashes."""
    return re.findall(r"^torch==.*(?:\n +--hash=.*)+", lock_file("cpu").read_text(), re.M)[0]


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError of the block (a full or read-only disk, a folder of someone else) into a MachineError."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{error.filename or ROOT}: {error.strerror or error}") from error


def say(line: str, command: str = "setup") -> None:
    print(f"{command}: {line}", file=sys.stderr, flush=True)
