"""Build the image that the recipes run in, from docker/Dockerfile.

    python3 -m install.image             # make image: VARIANT, BAKE and the like by environment
    python3 -m install.image pin-base    # make pin-base: write the base image's digest of today into the Dockerfile

Packages come from where `make setup` gets them: pip's index, its certificate and its folders of wheels are handed to
the build, the first two as secrets, which leave no trace in an image. WHEELS names one more folder of wheels, CA_BUNDLE
another certificate, DOCKER another program that builds as docker does, such as podman or a path.

Standard library only, and nothing that Python 3.6 cannot parse.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile

import launch

from install import environment as setup

DOCKERFILE = os.path.join(setup.ROOT, "docker", "Dockerfile")
WHEELS = os.path.join(setup.ROOT, "docker", "wheels")  # what the build sees of WHEELS
BASE = re.compile(r"^ARG BASE_IMAGE=((\S+?)(?:@sha256:\w+)?)$", re.M)


def main(task=""):
    program = launch.engine("podman" if os.environ.get("RUNTIME") == "podman" else "docker")
    if not shutil.which(program):
        raise setup.Refusal(f"there is no {program} here: install it, or name another, DOCKER=/path/to/docker")
    if task == "pin-base":
        pin_base(program)
    else:
        build(program)


def build(program):
    variant = launch.wanted_variant()
    name = launch.image_name(variant)
    kernels = [option for option in ("FLASH_ATTN", "XFORMERS") if os.environ.get(option)]
    if kernels and variant == "cpu":
        raise setup.WrongInput(f"{kernels[0]}=1 is for VARIANT=cuda and cuda-vllm")
    command = [program, "build", "--file", DOCKERFILE, "--target", "baked" if os.environ.get("BAKE") else "mounted"]
    arguments = {
        "VARIANT": variant,
        "LOCK": setup.mark_text(variant).strip(),
        "COMMIT": commit(),
        **dict.fromkeys(kernels, "1"),
        **{
            option: os.environ[option]
            for option in ("BASE_IMAGE", "GPU_ARCHITECTURES", "MAX_JOBS")
            if option in os.environ
        },
    }
    for argument, value in arguments.items():
        command += ["--build-arg", f"{argument}={value}"]
    with tempfile.TemporaryDirectory() as folder:
        for secret, file in secrets(folder).items():
            command += ["--secret", f"id={secret},src={file}"]
        environment = dict(os.environ, DOCKER_BUILDKIT="1")
        with lent_wheels(variant):
            say(f"building {name} with {program}")
            status = subprocess.call([*command, "--tag", name, setup.ROOT], env=environment)
    if status:
        raise setup.Refusal(f"{program} could not build {name}: its last lines say why")
    size = subprocess.check_output([program, "image", "inspect", "--format", "{{.Size}}", name], env=environment)
    say(f"{name} is built, {int(size) / 1e9:.2f} GB; `make sft` and the others use it now")


def commit():
    """The commit that the image is of, with -dirty behind it if it is not that alone; "" outside of a repository."""
    command = ["git", "-C", setup.ROOT, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()
    except OSError:
        return ""


def secrets(folder):
    """{id: file} of what the build may read and the image must not hold: an index's password, a certificate."""
    setup.settle_network()
    found = {}
    certificate = os.environ.get("CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    if certificate:
        if not os.path.isfile(certificate):
            raise setup.WrongInput(f"{certificate}: no such certificate file")
        found["ca_bundle"] = os.path.abspath(certificate)
    if setup.pip_settings("index-url") or os.environ.get("UV_DEFAULT_INDEX"):
        found["pip_conf"] = os.path.join(folder, "pip.conf")
        with open(found["pip_conf"], "w") as file:
            file.write(f"[global]\nindex-url = {setup.index_url()}\n")
    return found


@contextlib.contextmanager
def lent_wheels(variant):
    """Copies in docker/wheels of what WHEELS has, and of the CPU torch where a folder of this machine has it.

    They are there for the length of the block: the build sees nothing outside of the repository.
    """
    wheels, folder = [], os.environ.get("WHEELS", "")
    if folder:
        if not os.path.isdir(folder):
            raise setup.WrongInput(f"WHEELS={folder}: no such folder")
        wheels += [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".whl")]
    if variant == "cpu":
        version, hashes = setup.locked_cpu_torch()
        links, _ = setup.torch_cpu_links(version, hashes, "cp311")  # Debian 12's Python, the one of the image
        if os.path.isdir(links):
            wheels += [
                os.path.join(links, name) for name in os.listdir(links) if name.startswith(f"torch-{version}-cp311-")
            ]
    copies = []
    try:
        for wheel in wheels:
            copy = os.path.join(WHEELS, os.path.basename(wheel))
            if not os.path.exists(copy):
                copies.append(copy)
                shutil.copyfile(wheel, copy)
        yield
    finally:
        for copy in filter(os.path.exists, copies):
            os.remove(copy)


def pin_base(program):
    """The registry's digest of the base image's tag, which the engine asks for when it pulls."""
    with open(DOCKERFILE, encoding="utf-8") as file:
        text = file.read()
    written, tag = BASE.search(text).groups()
    tag = os.environ.get("BASE_IMAGE", tag).partition("@")[0]
    if subprocess.call([program, "pull", tag]):
        raise setup.Refusal(f"{program} cannot pull {tag}: connect this machine to a registry that has it")
    form = "{{range .RepoDigests}}{{println .}}{{end}}"
    digests = subprocess.check_output([program, "image", "inspect", "--format", form, tag]).decode().split()
    if not digests:
        raise setup.Refusal(f"{program} has no digest of {tag}: it was not pulled from a registry")
    pinned = tag + "@" + digests[0].partition("@")[2]
    setup.write_whole(DOCKERFILE, text.replace("ARG BASE_IMAGE=" + written, "ARG BASE_IMAGE=" + pinned).encode())
    say(f"docker/Dockerfile: {pinned}" + (", as before" if pinned == written else f", it was {written}"))


def say(line):
    print("image: " + line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    setup.run_command("image", main, *sys.argv[1:])
