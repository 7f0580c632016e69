"""Run a command of this repository where it can run: in a container of our image, or in .venv.

    python3 scripts/launch.py recipes/sft.py --data my.jsonl     # what `make sft DATA=my.jsonl` calls
    python3 scripts/launch.py bash                               # make shell

RUNTIME says where: docker, podman, apptainer or local. Without it a container, if Docker and the image are here, else
.venv, which scripts/install makes. One line says which.

In the container everything lies where it lies outside, so that a path means the same in both and what a run records
stays true. The repository is read-only, outputs/ is not. What the command line names outside of the repository is
mounted read-only; the folder of an output, and a run, which a merge writes into, writable. The folder of --data is
/data as well and that of the outputs /outputs, as in a `docker run` without this script. Caches are folders of this
machine: the hub's own, and .cache/container. No secret is on a command line.

Standard library only.
"""

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "recipes"))

from common.errors import InputError, MachineError, run_command
from install import environment as installed

ROOT = str(installed.ROOT)
OUTPUTS = os.path.realpath(os.path.join(ROOT, "outputs"))
RUNTIMES = ("docker", "podman", "apptainer", "local")

# Flags whose value is a place that is read. One that looks like a path and is not there is an error now, not in a
# container that sees another disk.
READ = ("--model", "--data", "--adapter", "--reward-model", "--base", "--a", "--b", "--prompts", "--eval-data")
READ += ("--sft-data", "--dpo-data", "--math-data", "--chat-template-path")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
WRITTEN = ("--output-dir", "--output", "--fix", "--json", "--html")
# Flags of the pipeline whose value is a command line of its own.
STAGE_ARGS = ("--sft-args", "--dpo-args", "--grpo-args", "--eval-args")
# A reward on the command line: "model:" before a run, ":function" behind a file, "=weight" behind either.
REWARD = re.compile(r"^(?P<before>(model:)?)(?P<path>.+?)(?P<after>(:\w+)?(=[-+.\deE]+)?)$")

# The user's settings that hold inside, too. They go by name, so that their values stand on no command line.
PASSED = re.compile(
    r"(HF|HUGGING_FACE|HUGGINGFACE|UNSLOTH|MODELSCOPE|TRANSFORMERS|WANDB|TRACKIO|VLLM|NCCL|SLURM|OMP|MKL)_\w+"
    r"|TORCH_(LOGS|COMPILE_DISABLE)|CUBLAS_WORKSPACE_CONFIG|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING"
    r"|https?_proxy|HTTPS?_PROXY|no_proxy|NO_PROXY|TERM|NO_COLOR|COLUMNS|TZ"
)
# Those of them that are places. A writable one is made if it is not there, as the libraries would.
WRITABLE_PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE", "WANDB_DIR", "TRACKIO_DIR")
READABLE_PLACES = ("HF_TOKEN_PATH", "MODELSCOPE_CREDENTIALS_PATH")
# And those that the image sets itself.
IMAGE_PLACES = ("UNSLOTH_COMPILE_LOCATION", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "HF_MODULES_CACHE")
CACHES = os.path.join(ROOT, ".cache", "container")  # /cache inside; `make clean` removes it
# What the image needs, and a folder of this machine in its place would hide.
IMAGE_FOLDERS = ("/", "/bin", "/cache", "/dev", "/dev/shm", "/etc", "/lib", "/lib64", "/opt", "/proc", "/recipes")
IMAGE_FOLDERS += ("/run", "/sbin", "/sys", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/var")


def main(words):
    runtime, image = choose()
    if runtime == "local":
        run_locally(words)
    mounts = Mounts()
    words = mounts.take(words)
    passed = environment(mounts, image)
    mounts.name()
    gpus = ["GPUs " + wanted_gpus(image)] if wanted_gpus(image) else []
    say(", ".join([f"in {runtime}", image.name + f" ({image.digest[:19]})" * bool(image.digest), *gpus]))
    if words[0].endswith(".py"):
        words = ["python", *words]
    if runtime == "apptainer":
        command = apptainer(image, mounts, words)
        for name, value in passed.items():  # what apptainer hands on; its --env would show the values
            os.environ["APPTAINERENV_" + name] = os.environ[name] if value is None else value
    else:
        command = container(runtime, image, mounts, passed, words)
    os.execvp(command[0], command)


# --- where? -------------------------------------------------------------------------------------------------------


class Image:
    """The image to run: its `name`, its `digest`, and the `variant` of the lock in it ("" if it is not said)."""

    def __init__(self, name, digest="", variant=""):
        self.name, self.digest, self.variant = name, digest, variant


def choose():
    """Returns the runtime and, for a container, its Image. Without a container it says so; else main does."""
    asked = os.environ.get("RUNTIME", "")
    if asked and asked not in RUNTIMES:
        near = difflib.get_close_matches(asked, RUNTIMES, 1) or [", ".join(RUNTIMES)]
        raise InputError(f"RUNTIME={asked} is none; there is {near[0]}")
    if asked == "apptainer":
        return asked, apptainer_image()
    why = ""
    if asked != "local" and (asked or shutil.which(engine("docker"))):
        runtime = asked or "docker"
        try:
            return runtime, find_image(runtime)
        except NoImage as missing:
            if asked:
                raise
            why = f": {missing}"
    say("in .venv" + why)
    return "local", None


class NoImage(MachineError):
    """There is no container to run in; the message says what is missing."""


def engine(runtime):
    """The program that runs containers: DOCKER, or what the runtime is called."""
    return os.environ.get("DOCKER") or runtime


def image_name(variant):
    return os.environ.get("IMAGE") or "recipes:" + variant


def wanted_variant():
    asked = os.environ.get("VARIANT", "")
    installed.check_variant(asked)
    return asked or ("cuda" if installed.gpu_visible() else "cpu")


def find_image(runtime):
    """The Image on this machine. Raises NoImage, and Refusal when it was built from another lock than the one here."""
    program, variant = engine(runtime), wanted_variant()
    name = image_name(variant)
    if not shutil.which(program):
        raise NoImage(f"there is no {program} here")
    form = '{{.Id}} {{index .Config.Labels "recipes.lock"}}'
    asked = [program, "image", "inspect", "--format", form, name]
    pipe = subprocess.PIPE
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        if "no such" in said[-1].lower() or "not known" in said[-1]:
            raise NoImage(f"{program} has no image {name}; `make image VARIANT={variant}` builds it")
        raise NoImage(f"{program} does not answer: {said[-1]}")
    digest, _, lock = done.stdout.decode().strip().partition(" ")
    digest = digest if ":" in digest else "sha256:" + digest  # podman leaves it out
    made_from = re.search(r"docker/(.+)\.lock$", lock)
    if made_from is None:
        return Image(name, digest)
    variant = made_from.group(1)
    if lock != installed.lock_mark(variant):
        raise MachineError(
            f"{name} was built from another docker/{variant}.lock than the one here: "
            f"`make image VARIANT={variant}` builds it again, RUNTIME=local does without"
        )
    return Image(name, digest, variant)


def apptainer_image():
    name = os.environ.get("IMAGE", "")
    if not name:
        raise InputError("RUNTIME=apptainer needs IMAGE=, a .sif file or docker://REGISTRY/NAME")
    if not re.match(r"\w+://", name):
        if not os.path.exists(name):
            raise InputError(f"IMAGE={name}: no such file")
        name = os.path.realpath(name)
    if not shutil.which("apptainer"):
        raise MachineError("RUNTIME=apptainer: there is no apptainer here")
    return Image(name)


def run_locally(words):
    python = os.path.join(installed.VENV, "bin", "python")
    if words[0] != "env-check.py":  # which is to say what stands in setup's way
        installed.ensure(os.environ.get("VARIANT", ""))
    elif not os.path.exists(python):
        python = sys.executable
    if words[0].endswith(".py"):
        os.execv(python, [python, *words])
    os.environ["PATH"] = os.path.dirname(python) + os.pathsep + os.environ["PATH"]
    os.execvp(words[0], words)


# --- what it sees -------------------------------------------------------------------------------------------------


class Word:
    """A word of the command: the `flag` it is a value of, and the `path` in it, "" where it names none."""

    def __init__(self, flag, before, value):
        self.flag, self.before, self.path, self.after = flag, before, value, ""
        if flag in WRITTEN or os.path.exists(os.path.expanduser(value)):
            return
        reward = REWARD.match(value)
        if reward and os.path.exists(os.path.expanduser(reward.group("path"))):
            self.before, self.path, self.after = before + reward.group("before"), *reward.group("path", "after")
            return
        like_a_path = value.startswith(("/", ".", "~")) or value.endswith(DATA_SUFFIXES)
        if flag in READ and like_a_path:
            raise InputError(f"{flag} {value}: no such file or folder (from {os.getcwd()})")
        self.before, self.path = before + value, ""


def parse(words):
    parsed, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            parsed.append(Word(flag, flag + equals, value) if equals else Word("", "", word))
        else:
            parsed.append(Word(flag, "", word))
    return parsed


class Mounts:
    """What of this machine is in the container. `list` has (outside, inside, writable), each inside once."""

    def __init__(self):
        self.list = []
        self.data, self.outputs = "", OUTPUTS  # folders, of --data and of what is written
        make_folder(OUTPUTS)
        make_folder(os.path.join(CACHES, "home"))
        self.add(ROOT)
        self.add(OUTPUTS, writable=True)
        self.add(CACHES, "/cache", writable=True)

    def add(self, outside, inside=None, writable=False):
        """Mount a file or a folder, at its own place unless another is given, in place of what was mounted there."""
        outside = os.path.realpath(outside)
        inside = inside or outside
        if inside == outside and inside in IMAGE_FOLDERS:
            raise InputError(
                f"{outside}: the image has a folder of that name, which this one would hide; "
                f"use one in it, such as {os.path.join(outside, 'mine')}"
            )
        self.list = [known for known in self.list if known[1] != inside] + [(outside, inside, writable)]

    def name(self):
        """Let /data and /outputs be there, too, unless the machine has such a folder itself, with something in use."""
        for folder, inside, writable in ((self.data, "/data", False), (self.outputs, "/outputs", True)):
            in_use = any(within(known, inside) for _, known, _ in self.list)
            if folder and folder not in IMAGE_FOLDERS and not in_use:
                self.add(folder, inside, writable)

    def shows(self, path):
        """Is `path`, a real one, there in the container under the same name?"""
        return any(outside == inside and within(path, inside) for outside, inside, _ in self.list)

    def take(self, words):
        """Mount what the words of a command name. Returns the words as they have to be inside."""
        parsed = parse(words)
        for word in parsed:
            if word.flag in STAGE_ARGS:
                flag, equals, inner = word.before.partition("=")
                word.before = flag + equals + " ".join(map(shlex.quote, self.take(split(inner))))
            elif word.path and word.flag in WRITTEN:
                word.path = self.write(word.flag, word.path)
            elif word.path:
                word.path = self.read(word.flag, word.path)
        return [word.before + word.path + word.after for word in parsed]

    def read(self, flag, path):
        """Mount a file or a folder that is there. Returns its path inside."""
        full = os.path.abspath(os.path.expanduser(path))
        real = os.path.realpath(full)
        folder = real if os.path.isdir(real) else os.path.dirname(real)
        if flag == "--data":
            self.data = folder
        if self.shows(real):
            return path if within(full, ROOT) else real
        if folder == real:
            if os.path.exists(os.path.join(real, "..", "run.json")):
                folder = os.path.dirname(real)  # an adapter: what it was trained on stands beside it
            self.add(folder, writable=os.path.exists(os.path.join(folder, "run.json")))
            self.follow_links(real)
            return real
        # A file goes in with its folder, for code imports what is beside it. But not with one that would hide the
        # image's own; and a link to a file of another name, as in the hub's cache, keeps its name.
        if folder in (*IMAGE_FOLDERS, "/tmp") or os.path.basename(full) != os.path.basename(real):
            self.add(real, full)
            return full
        self.add(folder)
        return real

    def follow_links(self, folder):
        """Mount what the links in a folder point at outside of it, where they will look for it inside."""
        for entry in sorted(os.listdir(folder)):
            link = os.path.join(folder, entry)
            real = os.path.realpath(link)
            if os.path.islink(link) and os.path.exists(real) and not within(real, folder):
                self.add(real, os.path.normpath(os.path.join(folder, os.readlink(link))))

    def write(self, flag, path):
        """Mount the folder of an output, which is written aside and renamed. Returns the output's path inside."""
        full = os.path.realpath(os.path.expanduser(path))
        if within(full, OUTPUTS):
            return path if within(os.path.abspath(path), ROOT) else full
        if flag == "--html":  # it is written in place, so it alone will do, even in the repository
            with open(full, "a"):
                self.add(full, writable=True)
            return full
        if within(full, ROOT):
            raise InputError(
                f"{flag} {path}: the container sees the repository read-only; name a place in outputs/, or outside"
            )
        self.outputs = os.path.dirname(full)
        if self.outputs in IMAGE_FOLDERS:
            raise InputError(f"{flag} {path}: name a place in that folder, such as {full}/run")
        make_folder(self.outputs)
        self.add(self.outputs, writable=True)
        return full


def environment(mounts, image):
    """{name: value} of the variables that hold inside, None for one that goes by its name; mounts what they name."""
    places = {name: os.environ[name] for name in WRITABLE_PLACES + READABLE_PLACES if os.environ.get(name)}
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    places.setdefault("HF_HOME", os.path.join(cache, "huggingface"))  # shared with what runs outside
    passed = {name: None for name in sorted(os.environ) if PASSED.fullmatch(name) and name not in IMAGE_PLACES}
    if "GPUS" in os.environ:
        passed.pop("CUDA_VISIBLE_DEVICES", None)  # it counts all GPUs; inside are some, counted from 0
    for name, place in places.items():
        place = os.path.realpath(os.path.expanduser(place))
        if name in WRITABLE_PLACES:
            make_folder(place)
        elif not os.path.exists(place):
            raise InputError(f"{name}={place}: no such file")
        mounts.add(place, writable=name in WRITABLE_PLACES)
        passed[name] = place
    passed["PYTHONPATH"] = os.path.join(ROOT, "recipes")  # the image's own link leads to the recipes baked into it
    if image.digest:
        passed["IMAGE_DIGEST"] = image.digest
    return passed


def within(path, folder):
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def make_folder(path):
    os.makedirs(path, exist_ok=True)


# --- the command --------------------------------------------------------------------------------------------------


def container(runtime, image, mounts, passed, words):
    """The words of `docker run` or `podman run`."""
    command = [engine(runtime), "run", "--rm"]
    if in_foreground() or not os.isatty(0):
        command += ["--interactive"]
    if in_foreground() and os.isatty(1):
        command += ["--tty"]
    command += caller(runtime)
    # Nothing is writable but what is mounted so; and time for a checkpoint between SIGTERM and SIGKILL.
    command += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    if not mounts.shows("/tmp"):
        command += ["--tmpfs", "/tmp:exec"]
    command += ["--security-opt", "label=disable"]  # else SELinux hides what is mounted
    command += ["--shm-size", "8g", "--stop-timeout", "120", "--workdir", ROOT]
    command += ["--hostname", os.uname().nodename[:63]]  # for the record of the run
    command += mount_words(mounts, "target")
    for name, value in passed.items():
        command += ["--env", name if value is None else f"{name}={value}"]
    gpus = wanted_gpus(image)
    if gpus:
        command += gpu_words(runtime, gpus)
    limits = os.environ.get("DOCKER_LIMITS")
    if limits is None and gpus:
        limits = "--ulimit memlock=-1 --ulimit stack=67108864"  # as NVIDIA asks for
    return [*command, *split(limits), *split(os.environ.get("DOCKER_ARGS")), image.name, *words]


def apptainer(image, mounts, words):
    """The words of `apptainer exec`."""
    command = ["apptainer", "exec", "--containall", "--no-home", "--cleanenv", "--pwd", ROOT]
    command += mount_words(mounts, "destination")
    if wanted_gpus(image):
        command += ["--nv"]
    return [*command, *split(os.environ.get("DOCKER_ARGS")), image.name, *words]


def caller(runtime):
    """Words that make what is written inside belong to the caller."""
    user = f"{os.getuid()}:{os.getgid()}"
    if runtime == "podman":
        return ["--user", user] + (["--userns", "keep-id"] if os.getuid() else [])
    if os.getuid():
        asked = [engine(runtime), "info", "--format", "{{.SecurityOptions}}"]
        if "rootless" in subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode():
            user = "0:0"  # which is the caller, outside
    return ["--user", user]


def in_foreground():
    """Is there a terminal, and is it ours to read? What reads it from the background is stopped."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal
        return False


def mount_words(mounts, to):
    """A --mount for each, a folder before what lies in it; a line of CSV, so that a name may hold anything."""
    words = []
    for outside, inside, writable in sorted(mounts.list, key=lambda mount: mount[1]):
        fields = ["type=bind", "source=" + outside, f"{to}={inside}"] + ([] if writable else ["readonly"])
        fields = ['"{}"'.format(field.replace('"', '""')) if set(field) & set('",\n') else field for field in fields]
        words += ["--mount", ",".join(fields)]
    return words


def wanted_gpus(image):
    """GPUS, such as "0,2"; without it all, unless there are none or the image could not use them."""
    there = "all" if installed.gpu_visible() and image.variant != "cpu" else ""
    return os.environ.get("GPUS", there)


def gpu_words(runtime, gpus):
    if runtime == "podman":
        return [word for gpu in gpus.split(",") for word in ("--device", "nvidia.com/gpu=" + gpu)]
    return ["--gpus", "all" if gpus == "all" else f'"device={gpus}"']


def split(words):
    try:
        return shlex.split(words or "")
    except ValueError as error:
        raise InputError(f"{words}: {error}") from None


def say(line):
    print("launch: " + line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
