"""Build the image that the recipes run in, from docker/Dockerfile.

    python -m install.image             # make image: VARIANT, BAKE and the like by environment
    python -m install.image pin-base    # make pin-base: write the base image's digest of today into the Dockerfile

Packages come from where `make setup` gets them: pip's index, its certificate and its folders of wheels are handed to
the build, the first two as secrets, which leave no trace in an image. WHEELS names one more folder of wheels, CA_BUNDLE
another certificate, DOCKER another program that builds as docker does, such as podman or a path.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError, MachineError, run_command
from common.run.files import write_bytes

from install import index
from install.installed import ROOT, check_variant, disk_errors, gpu_visible, lock_mark, locked_cpu_torch, say

DOCKERFILE = ROOT / "docker" / "Dockerfile"
WHEELS = ROOT / "docker" / "wheels"  # what the build sees of WHEELS
PYTHON = "cp311"  # Debian 12's, the one of the image
BASE = re.compile(r"^ARG BASE_IMAGE=((\S+?)(?:@sha256:\w+)?)$", re.M)


def main(task: str = "") -> None:
    program = os.environ.get("DOCKER") or ("podman" if os.environ.get("RUNTIME") == "podman" else "docker")
    if not shutil.which(program):
        raise MachineError(f"There is no {program} here: install it, or name another, DOCKER=/path/to/docker.")
    with disk_errors():
        if task == "pin-base":
            pin_base(program)
        else:
            build(program)


def build(program: str) -> None:
    variant = os.environ.get("VARIANT") or ("cuda" if gpu_visible() else "cpu")
    check_variant(variant)
    name = os.environ.get("IMAGE") or f"recipes:{variant}"
    kernels = [option for option in ("FLASH_ATTN", "XFORMERS") if os.environ.get(option)]
    if kernels and variant == "cpu":
        raise InputError(f"{kernels[0]}=1 is for VARIANT=cuda and cuda-vllm.")
    command = [program, "build", "--file", DOCKERFILE, "--target", "baked" if os.environ.get("BAKE") else "mounted"]
    arguments = {"VARIANT": variant, "LOCK": lock_mark(variant), "COMMIT": commit(), **dict.fromkeys(kernels, "1")}
    options = ("BASE_IMAGE", "GPU_ARCHITECTURES", "MAX_JOBS")
    arguments |= {option: os.environ[option] for option in options if option in os.environ}
    for argument, value in arguments.items():
        command += ["--build-arg", f"{argument}={value}"]
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    with tempfile.TemporaryDirectory() as folder, lent_wheels(variant):
        for secret, file in secrets(Path(folder)).items():
            command += ["--secret", f"id={secret},src={file}"]
        say(f"building {name} with {program}", "image")
        status = subprocess.call([*command, "--tag", name, ROOT], env=environment)
    if status:
        raise MachineError(f"{program} could not build {name}: its last lines say why.")
    size = subprocess.check_output([program, "image", "inspect", "--format", "{{.Size}}", name], env=environment)
    say(f"{name} is built, {int(size) / 1e9:.2f} GB; `make sft` and the others use it now", "image")


def commit() -> str:
    """The commit the image is made of, followed by -dirty if not of that alone; "" outside of a repository."""
    command = ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def secrets(folder: Path) -> dict[str, Path]:
    """{id: file} of what the build may read and the image must not hold: an index's password, a certificate."""
    index.use_pip_settings()
    found = {}
    if certificate := os.environ.get("CA_BUNDLE") or os.environ.get("SSL_CERT_FILE"):
        found["ca_bundle"] = Path(certificate).absolute()
        if not found["ca_bundle"].is_file():
            raise InputError(f"{certificate}: no such certificate file.")
    if os.environ.get("UV_DEFAULT_INDEX"):
        found["pip_conf"] = folder / "pip.conf"
        found["pip_conf"].write_text(f"[global]\nindex-url = {index.index_url()}\n")
    return found


@contextlib.contextmanager
def lent_wheels(variant: str) -> Iterator[None]:
    """Copy what WHEELS has, and the CPU torch where a folder of this machine has it, into docker/wheels.

    They are there for the length of the block: the build sees nothing outside of the repository.
    """
    wheels = []
    if folder := os.environ.get("WHEELS", ""):
        if not Path(folder).is_dir():
            raise InputError(f"WHEELS={folder}: no such folder.")
        wheels += sorted(Path(folder).glob("*.whl"))
    if variant == "cpu":
        torch = locked_cpu_torch().split()[0].replace("==", "-")
        given = os.environ.get("TORCH_CPU_LINKS")
        for place in [given] if given else index.pip_setting("find-links").split():
            wheels += Path(place.removeprefix("file://")).expanduser().glob(f"{torch}-{PYTHON}-*.whl")
    copies = []
    try:
        for wheel in wheels:
            copy = WHEELS / wheel.name
            if not copy.exists():
                copies.append(copy)
                shutil.copyfile(wheel, copy)
        yield
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)


def pin_base(program: str) -> None:
    """Write the registry's digest of the base image's tag, which the engine gets when it pulls, into the Dockerfile."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    written, tag = BASE.findall(text)[0]
    tag = os.environ.get("BASE_IMAGE", tag).partition("@")[0]
    if subprocess.call([program, "pull", tag]):
        raise MachineError(f"{program} cannot pull {tag}: connect this machine to a registry that has it.")
    form = "{{range .RepoDigests}}{{println .}}{{end}}"
    digests = subprocess.check_output([program, "image", "inspect", "--format", form, tag], text=True).split()
    if not digests:
        raise MachineError(f"{program} has no digest of {tag}: it was not pulled from a registry.")
    pinned = tag + "@" + digests[0].partition("@")[2]
    write_bytes(DOCKERFILE, text.replace("ARG BASE_IMAGE=" + written, "ARG BASE_IMAGE=" + pinned).encode())
    say(f"docker/Dockerfile: {pinned}" + (", as before" if pinned == written else f", it was {written}"), "image")


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
