"""The command lines of `docker run`, `podman run` and `apptainer exec`, and the settings of every container of ours."""

import os
import re
import subprocess

from common.arguments import shell_words
from install import installed

from launch.gpus import chosen_gpus
from launch.mounts import ROOT, Mounts
from launch.where import Image, program

# Settings of every container. compose.yaml and scripts/slurm/job.sh have them too, and a test compares.
SHM_SIZE = "8g"  # for the workers that load data
STOP_SECONDS = 120  # between SIGTERM and SIGKILL: for a step and a checkpoint
LIMITS = "--ulimit memlock=-1 --ulimit stack=67108864"  # as NVIDIA recommends for its GPUs
# The user's settings that hold inside, too. They are passed by name, so that no value is on a command line.
PASSED = re.compile(
    r"(HF|HUGGING_FACE|HUGGINGFACE|UNSLOTH|MODELSCOPE|TRANSFORMERS|WANDB|TRACKIO|VLLM|NCCL|TORCH_NCCL|GLOO|UCX|FI|SLURM|OMP|MKL)_\w+"
    r"|RANKS_TIMEOUT|PROFILE_STEPS|TORCH_(LOGS|COMPILE_DISABLE)|CUBLAS_WORKSPACE_CONFIG|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING"
    r"|https?_proxy|HTTPS?_PROXY|no_proxy|NO_PROXY|TERM|NO_COLOR|COLUMNS|TZ|RECIPES_SPELLING"
)
# Of those, what the image sets itself.
SET_BY_IMAGE = ("UNSLOTH_COMPILE_LOCATION", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "HF_MODULES_CACHE")


def environment(mounts: Mounts, image: Image) -> dict[str, str | None]:
    """{name: value} of the variables that hold inside, None for one that is passed by name; mounts what they name."""
    passed: dict[str, str | None] = {
        name: None for name in sorted(os.environ) if PASSED.fullmatch(name) and name not in SET_BY_IMAGE
    }
    passed |= mounts.settings(dict(os.environ))
    passed["PYTHONPATH"] = os.path.join(ROOT, "recipes")  # the image's own link leads to the recipes baked into it
    if image.digest:
        passed["IMAGE_DIGEST"] = image.digest
    return passed


def docker(runtime: str, image: Image, mounts: Mounts, passed: dict[str, str | None], words: list[str]) -> list[str]:
    """The words of `docker run` or `podman run`."""
    command = [program(runtime), "run", "--rm"]
    if in_foreground() or not os.isatty(0):
        command += ["--interactive"]
    if in_foreground() and os.isatty(1):
        command += ["--tty"]
    command += caller(runtime)
    command += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    if not mounts.shows("/tmp"):
        command += ["--tmpfs", "/tmp:exec"]
    command += ["--security-opt", "label=disable"]  # else SELinux hides what is mounted
    command += ["--shm-size", SHM_SIZE, "--stop-timeout", str(STOP_SECONDS), "--workdir", os.path.realpath(".")]
    command += ["--hostname", os.uname().nodename[:63]]  # for the record of the run
    command += mount_words(mounts, "target")
    gpus = visible_gpus(image)
    if gpus and gpus != ["all"]:
        passed.pop("CUDA_VISIBLE_DEVICES", None)  # it counts all GPUs; inside are some, counted from 0
    for name, value in passed.items():
        command += ["--env", name if value is None else f"{name}={value}"]
    command += gpu_words(runtime, gpus)
    limits = os.environ.get("DOCKER_LIMITS", LIMITS if gpus else "")
    more = shell_words("DOCKER_LIMITS", limits) + shell_words("DOCKER_ARGS", os.environ.get("DOCKER_ARGS", ""))
    return [*command, *more, image.name, *words]


def apptainer(image: Image, mounts: Mounts, words: list[str]) -> list[str]:
    """The words of `apptainer exec`."""
    command = ["apptainer", "exec", "--containall", "--no-home", "--cleanenv", "--pwd", os.path.realpath(".")]
    command += mount_words(mounts, "destination")
    if visible_gpus(image):
        command += ["--nv"]
    return [*command, *shell_words("DOCKER_ARGS", os.environ.get("DOCKER_ARGS", "")), image.name, *words]


def caller(runtime: str) -> list[str]:
    """Words that make what is written inside belong to the caller."""
    user = f"{os.getuid()}:{os.getgid()}"
    if runtime == "podman":
        return ["--user", user] + (["--userns", "keep-id"] if os.getuid() else [])
    if os.getuid():
        command = [program(runtime), "info", "--format", "{{.SecurityOptions}}"]
        if "rootless" in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
            user = "0:0"  # which is the caller, outside
    return ["--user", user]


def in_foreground() -> bool:
    """Is there a terminal, and is it ours to read? What reads it from the background is stopped."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal
        return False


def mount_words(mounts: Mounts, to: str) -> list[str]:
    """A --mount for each, a folder before what lies in it; a line of CSV, so that a name may hold anything."""
    words = []
    for outside, inside, writable in sorted(mounts.list, key=lambda mount: mount[1]):
        fields = ["type=bind", "source=" + outside, f"{to}={inside}"] + ([] if writable else ["readonly"])
        fields = ['"{}"'.format(field.replace('"', '""')) if set(field) & set('",\n') else field for field in fields]
        words += ["--mount", ",".join(fields)]
    return words


def visible_gpus(image: Image) -> list[str]:
    """The GPUs that the container gets, ["all"] for all; unless GPUS says so, none that the image could not use."""
    if not os.environ.get("GPUS") and (not installed.gpu_visible() or image.variant == "cpu"):
        return []
    chosen = chosen_gpus()
    return ["all"] if chosen is None else chosen


def gpu_words(runtime: str, gpus: list[str]) -> list[str]:
    if not gpus:
        return []
    if runtime == "podman":
        return [word for gpu in gpus for word in ("--device", "nvidia.com/gpu=" + gpu)]
    return ["--gpus", "all" if gpus == ["all"] else f'"device={",".join(gpus)}"']  # Docker's quotes, for its commas
