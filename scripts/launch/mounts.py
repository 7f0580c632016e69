"""What of this machine a container sees: the folders and files that a command's arguments and settings name.

In the container everything has its path from outside, so that a path means the same in both and what a run records
stays true. The repository is read-only, outputs/ is not. What is read is mounted read-only, as is the folder of a file;
the folder of an output, and a run, into which merge writes, are writable. The folder of --data is also /data, and that
of the outputs /outputs, as in a `docker run` without the launcher. Caches are folders of this machine: the hub's own,
and .cache/container.
"""

import json
import os
import re
import shlex

from common.arguments import shell_words
from common.environment import ROOT as ROOT_PATH
from common.errors import InputError

ROOT = str(ROOT_PATH)
CACHES = os.path.join(ROOT, ".cache", "container")  # /cache inside; `make clean` removes it
# Folders that the image needs; one of this machine mounted there would hide them.
IMAGE_FOLDERS = ("/", "/bin", "/cache", "/dev", "/dev/shm", "/etc", "/lib", "/lib64", "/opt", "/proc", "/recipes")
IMAGE_FOLDERS += ("/run", "/sbin", "/sys", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/var")

# --- which arguments are paths? Every text argument of every command is in one of these; a test looks. --------------

READ = {"model", "data", "adapter", "reward_model", "base", "a", "b", "judge", "strong", "weak"}
READ |= {"prompts", "eval_data", "sft_data", "dpo_data", "kto_data", "math_data", "reward_data", "ppo_data"}
READ |= {"trust_remote_code", "chat_template_path", "run", "questions", "tasks", "repro", "advisories"}
WRITTEN = {"output_dir", "output", "fix", "json"}
WRITTEN_IN_PLACE = {"html"}
READ_OR_MADE = {"checkpoint"}  # read where it exists, else written
PATHS = READ | WRITTEN | WRITTEN_IN_PLACE | READ_OR_MADE
REWARDS = {"rewards"}  # names, and paths as in model:PATH=0.5 and FILE.py:FUNCTION=0.5
COMMAND_LINES = {"sft_args", "dpo_args", "kto_args", "grpo_args", "reward_args", "ppo_args", "eval_args"}
COMMAND_LINES |= {"recipe_args"}  # of another command
NO_PATH = {
    "prompt",
    "format",
    "columns",
    "pad_token",
    "system_prompt",
    "lr_scheduler_type",
    "optim",
    "time_limit",
    "report_to",
}
NO_PATH |= {
    "lora_target_modules",
    "stages",
    "until",
    "answer_pattern",
    "answer_template",
    "recipe",
    "judge_url",
    "judge_model",
    "judge_key",
    "card",
    "workload",
    "quant",
    "host",
    "name",
    "repo",
    "message",
}
NO_PATH |= {"lock", "accept"}  # of audit
NO_PATH |= {"time", "sweep", "gpus", "partition", "account", "qos", "constraint", "sbatch", "image"}  # of slurm

REWARD = re.compile(r"^(?P<before>(model:)?)(?P<path>.+?)(?P<after>(:\w+)?(=[-+.\deE]+)?)$")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")

# --- which settings are? --------------------------------------------------------------------------------------------

WRITABLE_SETTINGS = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE", "WANDB_DIR", "TRACKIO_DIR")
READABLE_SETTINGS = ("HF_TOKEN_PATH", "MODELSCOPE_CREDENTIALS_PATH")


def name_of(word: str) -> str:
    """The argument that a flag names: output_dir for --output-dir=x."""
    return word.partition("=")[0].lstrip("-").replace("-", "_") if word.startswith("--") else ""


def check_paths(words: list[str]) -> None:
    """Raise InputError where a path that is to be read is not there, or is empty."""
    for name, value in values(words):
        flag = "--" + name.replace("_", "-")
        if name in PATHS and not value:
            raise InputError(f"{flag} is empty; leave it out for its default.")
        if name in PATHS and set(value) & set("\r\n"):
            raise InputError(f"{flag}={value!r}: the name has the end of a line in it; rename it.")
        if name in READ and looks_like_path(value) and not os.path.exists(os.path.expanduser(value)):
            raise InputError(f"{flag}={value}: no such file or folder (from {os.getcwd()})")
        if name in COMMAND_LINES:
            check_paths(shell_words(flag, value))


def looks_like_path(value: str) -> bool:
    return value.startswith(("/", ".", "~")) or value.endswith(DATA_SUFFIXES)


def values(words: list[str]):
    """(argument, value) for each word that is a value."""
    name = ""
    for word in words:
        if word.startswith("--"):
            name = name_of(word)
            if "=" in word:
                yield name, word.partition("=")[2]
        else:
            yield name, word


class Mounts:
    """What of this machine is in the container: `list` has (outside, inside, writable), each inside once."""

    def __init__(self) -> None:
        self.list: list[tuple[str, str, bool]] = []
        self.results = os.path.realpath("outputs")  # where results go by default
        self.data, self.outputs = "", self.results  # folders of --data and of what is written
        make_folder(self.results)
        make_folder(os.path.join(CACHES, "home"))
        self.add(ROOT)
        self.add(self.results, writable=True)
        self.add(CACHES, "/cache", writable=True)

    def add(self, outside: str, inside: str | None = None, writable: bool = False) -> None:
        """Mount a file or folder, at its own path unless another is given, in place of what was mounted there."""
        outside = os.path.realpath(outside)
        inside = inside or outside
        if inside == outside and inside in IMAGE_FOLDERS:
            raise InputError(
                f"{outside}: the image has a folder of that name, which this one would hide; "
                f"use one in it, such as {os.path.join(outside, 'mine')}"
            )
        self.list = [known for known in self.list if known[1] != inside] + [(outside, inside, writable)]

    def add_aliases(self) -> None:
        """Mount the data and the outputs as /data and /outputs too, unless something is mounted there or below."""
        for folder, inside, writable in ((self.data, "/data", False), (self.outputs, "/outputs", True)):
            in_use = any(within(known, inside) for _, known, _ in self.list)
            if folder and folder not in IMAGE_FOLDERS and not in_use:
                self.add(folder, inside, writable)

    def shows(self, path: str) -> bool:
        """Is `path`, a real one, in the container under the same name?"""
        return any(outside == inside and within(path, inside) for outside, inside, _ in self.list)

    def take(self, words: list[str]) -> list[str]:
        """Mount what the words of a command name. Returns the words as they have to be inside."""
        inside, name = [], ""
        for word in words:
            before, value = "", word
            if word.startswith("--"):
                name = name_of(word)
                flag, equals, value = word.partition("=")
                before = flag + equals
                if not equals:
                    inside.append(word)
                    continue
            inside.append(before + self._inside(name, value))
        return inside

    def _inside(self, name: str, value: str) -> str:
        """What a value has to be inside, after what it names is mounted."""
        path = os.path.expanduser(value)
        if name in COMMAND_LINES:
            return shlex.join(self.take(shell_words(name, value)))
        if name in WRITTEN | WRITTEN_IN_PLACE or (name in READ_OR_MADE and not os.path.exists(path)):
            return self.write(name, value)
        if name in REWARDS and not os.path.exists(path):
            reward = REWARD.match(value)
            if reward and os.path.exists(os.path.expanduser(reward["path"])):
                return reward["before"] + self.read(name, reward["path"]) + reward["after"]
        if name in READ | READ_OR_MADE | REWARDS and os.path.exists(path):
            return self.read(name, value)
        return value

    def read(self, name: str, path: str) -> str:
        """Mount a file or a folder that is there. Returns its path inside."""
        full = os.path.abspath(os.path.expanduser(path))
        real = os.path.realpath(full)
        folder = real if os.path.isdir(real) else os.path.dirname(real)
        if name == "data":
            self.data = folder
        if name == "run":
            self.read_inputs(real)
        if self.shows(real):
            return path if within(full, ROOT) and not path.startswith("~") else real
        if folder == real:
            if os.path.exists(os.path.join(real, "..", "run.json")):
                folder = os.path.dirname(real)  # an adapter: the run.json beside it names its base
            self.add(folder, writable=os.path.exists(os.path.join(folder, "run.json")))
            self.follow_links(real)
            return real
        # A file is mounted with its folder, since code imports what is beside it. But not with one that would hide the
        # image's own; and a link to a file of another name, as in the hub's cache, keeps its name.
        if folder in (*IMAGE_FOLDERS, "/tmp") or os.path.basename(full) != os.path.basename(real):
            self.add(real, full)
            return full
        self.add(folder)
        return real

    def read_inputs(self, run: str) -> None:
        """Mount what a run read, for the commands that read it again; what is gone they miss themselves."""
        try:
            with open(os.path.join(run, "run.json"), encoding="utf-8") as stream:
                arguments = json.load(stream)["arguments"]
            given = {name: argument["value"] for name, argument in arguments.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        for name in sorted((READ | REWARDS) & given.keys()):
            for value in given[name] if isinstance(given[name], list) else [given[name]]:
                if isinstance(value, str):
                    self._inside(name, value)

    def follow_links(self, folder: str) -> None:
        """Mount what the links in a folder point at outside of it, where they will look for it inside."""
        for entry in sorted(os.listdir(folder)):
            link = os.path.join(folder, entry)
            real = os.path.realpath(link)
            if os.path.islink(link) and os.path.exists(real) and not within(real, folder):
                self.add(real, os.path.normpath(os.path.join(folder, os.readlink(link))))

    def write(self, name: str, path: str) -> str:
        """Mount the folder of an output, which is written aside and renamed. Returns the output's path inside."""
        full = os.path.realpath(os.path.expanduser(path))
        flag = "--" + name.replace("_", "-")
        if within(full, self.results):
            return path if within(os.path.abspath(path), ROOT) else full
        if name in WRITTEN_IN_PLACE:
            with open(full, "a"):
                self.add(full, writable=True)
            return full
        if within(full, ROOT):
            raise InputError(
                f"{flag}={path}: the container sees the repository read-only; name a place in outputs/, or outside"
            )
        self.outputs = os.path.dirname(full)
        if self.outputs in IMAGE_FOLDERS:
            raise InputError(f"{flag}={path}: name a place in that folder, such as {full}/run")
        make_folder(self.outputs)
        self.add(self.outputs, writable=True)
        return full

    def settings(self, environment: dict[str, str]) -> dict[str, str]:
        """Mount what the settings of the environment name. Returns the settings as they have to be inside."""
        places = {name: environment[name] for name in WRITABLE_SETTINGS + READABLE_SETTINGS if environment.get(name)}
        cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
        places.setdefault("HF_HOME", os.path.join(cache, "huggingface"))  # shared with what runs outside
        for name, place in places.items():
            places[name] = os.path.realpath(os.path.expanduser(place))
            if name in WRITABLE_SETTINGS:
                make_folder(places[name])
            elif not os.path.exists(places[name]):
                raise InputError(f"{name}={places[name]}: no such file")
            self.add(places[name], writable=name in WRITABLE_SETTINGS)
        return places


def within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def make_folder(path: str) -> None:
    os.makedirs(path, exist_ok=True)
