"""Make .venv from a hash-locked file in docker/, and again when that file changes. Every command calls `ensure` first.

    python -m install        # make setup; VARIANT, TORCH_CPU_LINKS and pip's own settings come by environment

Is .venv what its lock says? Then nothing is done, in a few hundredths of a second. Else: choose the variant, let uv
install exactly the lock (nothing is resolved on this machine), and write the mark that says so.
"""

import contextlib
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import MachineError

from install.installed import (
    CACHE,
    MARK,
    ROOT,
    VARIANTS,
    VENV,
    check_variant,
    disk_errors,
    gpu_visible,
    has_converter,
    lock_file,
    lock_mark,
    locked_cpu_torch,
    made_variant,
    say,
    up_to_date,
)

BYTECODE = 1.1  # of what uv writes: with the compiled code that the first runs add


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
