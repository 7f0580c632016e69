"""Where a command runs: in which container, if RUNTIME asks for one or Docker has our image, else in .venv."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from common.errors import InputError, MachineError, did_you_mean
from install import installed

RUNTIMES = ("docker", "podman", "apptainer", "local")
# Settings that are of no use in .venv: whoever gives one wants a container.
FOR_CONTAINERS = ("IMAGE", "DOCKER_ARGS", "DOCKER_LIMITS", "DOCKER")


@dataclass(frozen=True)
class Image:
    """The image to run: its `name`, its `digest`, and the `variant` of the lock in it, "" where no label says."""

    name: str
    digest: str = ""
    variant: str = ""


class NoImage(MachineError):
    """No container can be started; the message says what is missing, and `short` does so in a few words."""

    def __init__(self, message: str, short: str) -> None:
        super().__init__(message)
        self.short = short


class NoEngine(NoImage):
    """The program that runs containers is there and does not answer."""


def choose() -> tuple[str, Image | None, str]:
    """Returns the runtime, the Image of a container, and what the user should know of the choice ("" for nothing)."""
    wanted = os.environ.get("RUNTIME", "")
    if wanted and wanted not in RUNTIMES:
        raise InputError(f"RUNTIME={wanted}: unknown{did_you_mean(wanted, RUNTIMES)}. There are {', '.join(RUNTIMES)}.")
    if wanted == "apptainer":
        return wanted, apptainer_image(), ""
    if wanted == "local":
        return wanted, None, ""
    runtime = wanted or "docker"
    try:
        return runtime, find_image(runtime), ""
    except NoImage as missing:
        if wanted:
            raise
        return "local", None, fallback_note(missing)


def fallback_note(missing: NoImage) -> str:
    """What the user should know of a run in .venv in place of a container: nothing, unless it changes what they get."""
    if setting := next((name for name in FOR_CONTAINERS if os.environ.get(name)), ""):
        return f"In .venv, without {setting}: {missing.short}; RUNTIME=docker would stop here."
    if isinstance(missing, NoEngine) and not installed.made_variant():
        return f"In .venv, still to be made: {missing.short}; RUNTIME=docker says why."
    return ""


def program(runtime: str) -> str:
    """The program that runs containers and builds images: DOCKER, or what the runtime is called."""
    return os.environ.get("DOCKER") or runtime


def image_name(variant: str) -> str:
    return os.environ.get("IMAGE") or "recipes:" + variant


def wanted_variant() -> str:
    """VARIANT, or what suits this machine."""
    wanted = os.environ.get("VARIANT", "")
    installed.check_variant(wanted)
    return wanted or ("cuda" if installed.gpu_visible() else "cpu")


def find_image(runtime: str) -> Image:
    """The Image on this machine. Raises NoImage, and MachineError where it was built from another lock than ours."""
    engine, variant = program(runtime), wanted_variant()
    name = image_name(variant)
    if not shutil.which(engine):
        raise NoImage(f"there is no {engine} here.", f"there is no {engine}")
    labels = '{{.Id}} {{index .Config.Labels "recipes.lock"}}'
    command = [engine, "image", "inspect", "--format", labels, name]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if "no such" in reason.lower() or "not known" in reason:
            message = f"{engine} has no image {name}"
            raise NoImage(f"{message}; `make image VARIANT={variant}` builds it.", message)
        raise NoEngine(f"{engine} does not answer: {reason}", f"{engine} does not answer")
    digest, _, lock = done.stdout.strip().partition(" ")
    digest = digest if ":" in digest else "sha256:" + digest  # podman leaves it out
    made_from = re.search(r"docker/(.+)\.lock$", lock)
    if made_from is None:
        return Image(name, digest)
    variant = made_from.group(1)
    if lock != installed.lock_mark(variant):
        raise MachineError(
            f"{name} was built from another docker/{variant}.lock than the one here. `make image VARIANT={variant}` "
            "builds it again; RUNTIME=local runs without it."
        )
    return Image(name, digest, variant)


def apptainer_image() -> Image:
    name = os.environ.get("IMAGE", "")
    if not name:
        raise InputError("RUNTIME=apptainer needs IMAGE=..., a .sif file or docker://REGISTRY/NAME")
    if not re.match(r"\w+://", name):
        if not os.path.exists(name):
            raise InputError(f"IMAGE={name}: no such file")
        name = os.path.realpath(name)
    if not shutil.which("apptainer"):
        raise MachineError("RUNTIME=apptainer: there is no apptainer here.")
    return Image(name)
