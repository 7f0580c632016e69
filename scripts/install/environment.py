"""Make .venv from a hash-locked file in docker/, and again when that file changes. Every command calls `ensure` first.

    python -m install        # make setup; VARIANT, TORCH_CPU_LINKS and pip's own settings come by environment

Is .venv what its lock says? Then nothing is done, in a few hundredths of a second. Else: choose the variant, let uv
install exactly the lock (nothing is resolved on this machine), and write the mark that says so.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
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
BYTECODE = 1.1  # and what the first runs add to it


def ensure(variant: str = "", whole: bool = False) -> None:
    """Make .venv of this variant if it is not there; "" keeps the one that is there, or takes what suits this machine.

    A new one gets llama.cpp's converter, too. Where that cannot be had, a line says so, and the commands that do
    without it run; with `whole` it is needed. Raises InputError when there is no such variant, MachineError when it
    cannot be made on this machine.
    """
    check_variant(variant)
    with disk_errors():
        if not up_to_date(variant) or (whole and not has_converter()):
            from install import converter  # only here: most of the time there is nothing to do

            with one_at_a_time():
                if not up_to_date(variant):  # the one we waited for may have done it
                    install(variant)
                link_recipes()
                converter.ensure(needed=whole)
        else:
            link_recipes()


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


def install(wanted: str) -> None:
    """Install the lock of a variant into an emptied .venv."""
    from common.run.files import write_bytes  # only here, as above

    from install import index, uv

    machine = os.uname()
    if (machine.sysname, machine.machine) != ("Linux", "x86_64"):
        raise MachineError(
            f"This is {machine.sysname} on {machine.machine}; the locks are for Linux on x86_64: use such a machine."
        )
    index.use_pip_settings()
    program = uv.find()
    variant, links = choose(wanted, program)
    check_space(variant, Path(uv.output(program, "cache", "dir")))
    lock, mark = lock_file(variant), lock_mark(variant)  # now: if it is edited meanwhile, the next `make` rebuilds
    packages = len(re.findall(r"^\w\S*==", lock.read_text(), re.M))
    say(f"installing docker/{lock.name}, {packages} packages, {VARIANTS[variant]} GB, into {VENV}")

    start = time.monotonic()
    MARK.unlink(missing_ok=True)
    # uv empties the folder and keeps it: it may be a link to a bigger disk.
    command = ["venv", "--clear", "--force", "--no-project", "--no-python-downloads", "--python", uv.PYTHON, VENV]
    uv.run([program, *command], lock)
    command = ["pip", "sync", "--python", VENV, "--require-hashes", "--only-binary", ":all:", lock]
    uv.run([program, *command, *(["--find-links", links] if links else [])], lock, VARIANTS[variant])
    write_bytes(MARK, f"{mark}\n".encode())
    say(f"done in {time.monotonic() - start:.0f} s")


def choose(wanted: str, program: str) -> tuple[str, str]:
    """The variant to install (wanted, as before, or what suits this machine), and for cpu where its torch is."""
    from install import uv

    variant = wanted or made_variant()
    if variant in ("cuda", "cuda-vllm") or (not variant and gpu_visible()):
        return variant or "cuda", ""
    torch = locked_cpu_torch()
    links = uv.find_torch(program, torch, f"{sys.version_info[0]}.{sys.version_info[1]}")
    if links is not None:
        return "cpu", links
    if variant == "cpu":
        raise MachineError(
            f"No {torch.split()[0]} {uv.TORCH_PLACES}: set TORCH_CPU_LINKS to a folder or URL, or VARIANT=cuda."
        )
    say(f"no {torch.split()[0]} {uv.TORCH_PLACES}: installing the CUDA build, which also runs on the CPU")
    return "cuda", ""


def locked_cpu_torch() -> str:
    """The CPU build of torch as docker/cpu.lock has it: name, version and hashes."""
    return re.findall(r"^torch==.*(?:\n +--hash=.*)+", lock_file("cpu").read_text(), re.M)[0]


def check_space(variant: str, cache: Path) -> None:
    need = BYTECODE * VARIANTS[variant]
    for place in (VENV, cache):  # one disk in most cases, and then the files are there once
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free / 1e9
        if free < need:
            raise MachineError(
                f"{there} has {free:.1f} GB free and the {variant} packages need {need:.1f} GB: free some, "
                "or move the checkout (or uv's cache, UV_CACHE_DIR) to a bigger disk."
            )


def link_recipes() -> None:
    """Let .venv import `common` from recipes/, by a line relative to site-packages, so that a checkout may move."""
    for packages in VENV.glob("lib/python3*/site-packages"):
        link = packages / "recipes.pth"
        if not link.exists():
            from common.run.files import write_bytes

            write_bytes(link, os.path.relpath(ROOT / "recipes", packages).encode() + b"\n")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two set-ups in one checkout would overwrite each other; the second waits for the first."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "setup.lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)  # uv holds it too, should this process be killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work in this checkout; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError of the block (a full or read-only disk, a folder of someone else) into a MachineError."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{error.filename or ROOT}: {error.strerror or error}") from error


def say(line: str, command: str = "setup") -> None:
    print(f"{command}: {line}", file=sys.stderr, flush=True)
