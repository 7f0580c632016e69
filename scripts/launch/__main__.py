"""scripts/run COMMAND ARGUMENTS, which every target of the Makefile is: see scripts/run."""

import os
import signal
import sys
from typing import NoReturn

from common import errors
from common.arguments import check, name_arguments
from common.environment import ROOT
from common.errors import ARGUMENTS, InputError, MachineError, did_you_mean, run_command
from install import environment, installed

from launch import engines, jobs, usage, variables
from launch.commands import COMMANDS, Where
from launch.gpus import chosen_gpus
from launch.mounts import Mounts, check_paths
from launch.repeat import repeat
from launch.where import Image, choose

VENV_PYTHON = str(installed.VENV / "bin" / "python")
HELP = ("help", "-h", "--help")


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as a program that prints: `make help-sft | head`
    given = variables.take_given()
    by_make = given is not None
    name, *words = sys.argv[1:] or ["help"]
    if name in HELP:
        print(usage.overview(by_make))
        return
    if name not in COMMANDS:
        run = "make" if by_make else "scripts/run"
        raise InputError(f"there is no command {name}{did_you_mean(name, COMMANDS)}. `{run}` lists them.")
    command = COMMANDS[name]
    if by_make and command.checked:
        os.environ["RECIPES_SPELLING"] = errors.SPELLING = "make"  # how messages name arguments
    more = (given or {}).get("ARGS", "").split()
    if any(word in HELP for word in ([*words, *more] if command.checked else words[:1])):
        print(usage.help_of(name, by_make))
        return
    try:
        start(name, read(name, words, given or {}))
    except OSError as error:  # a full or read-only disk, a folder of somebody else's
        raise MachineError(f"{error.filename or ROOT}: {error.strerror or error}") from None


def read(name: str, words: list[str], given: dict[str, str]) -> list[str]:
    """The words of a command, checked, from those of scripts/run and the variables of make."""
    command, fields = COMMANDS[name], COMMANDS[name].fields()
    name_arguments(fields)
    ARGUMENTS["--from"] = "FROM"
    if name == "slurm":
        what = jobs.submitted(fields, words, given)
        name_arguments(what.fields)
        words = [*variables.arguments(name, command, [*fields, *what.fields], given), *words]
        words = jobs.arrange(fields, what, words)
        check([*fields, *what.fields], [word for word in words if word != "--"], name)
        return words  # the paths may be on the nodes of the cluster only
    words = [*variables.arguments(name, command, fields, given), *words]
    if command.recipe:
        words = repeat(name, fields, words)
    if command.checked:
        check(fields, words, name)
    check_paths(words)
    return words


def start(name: str, words: list[str]) -> NoReturn:
    """Replace this process by a command, where it runs."""
    command = COMMANDS[name]
    words = [*command.words, *words]
    if words[0].endswith(".py"):
        words[0] = str(command.file)
    if command.where is Where.HERE:
        words = python_words(sys.executable, words)
        os.execvp(words[0], words)
    if command.where is Where.VENV:
        environment.ensure(os.environ.get("VARIANT", ""))
        if not command.checked:  # one of pytest's or lint's; paths in the arguments of ours are from here
            os.chdir(ROOT)
        if "TEST_DOCKER" in command.variables:
            os.environ.setdefault("TEST_DOCKER", "cpu")
        in_venv(words)
    if os.environ.get("GPUS"):
        gpus = chosen_gpus() or []
        if len(gpus) > 1 and not command.several:
            several = ", ".join(one for one, other in COMMANDS.items() if other.recipe and other.several)
            raise InputError(f"GPUS={len(gpus)}: {name} runs on one GPU; several are for {several}.")
        if len(gpus) > 1 and command.recipe:
            words = [str(ROOT / "scripts" / "launch" / "processes.py"), str(len(gpus)), *words]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    runtime, image, note = choose()
    if note:
        print(note, file=sys.stderr)
    if image is not None:
        contain(runtime, image, words)
    if name != "check":  # which is to tell what stands in the way of .venv
        environment.ensure(os.environ.get("VARIANT", ""))
    in_venv(words)


def contain(runtime: str, image: Image, words: list[str]) -> NoReturn:
    """Replace this process by a container in which the command runs."""
    mounts = Mounts()
    words = python_words("python", mounts.take(words))
    passed = engines.environment(mounts, image)
    mounts.add_aliases()
    gpus = engines.visible_gpus(image)
    digest = f" ({image.digest[:19]})" if image.digest else ""
    print(f"In {runtime}: {image.name}{digest}" + (f", GPUs {','.join(gpus)}" if gpus else ""), file=sys.stderr)
    if runtime == "apptainer":
        for name, value in passed.items():  # what apptainer hands on; its --env would show the values
            os.environ["APPTAINERENV_" + name] = os.environ[name] if value is None else value
        command = engines.apptainer(image, mounts, words)
    else:
        command = engines.docker(runtime, image, mounts, passed, words)
    os.execvp(command[0], command)


def in_venv(words: list[str]) -> NoReturn:
    """Replace this process by the command in .venv, or where there is none, with this Python.

    In UTF-8 whatever the locale is: libraries open texts, such as a template with an é, in the letters of the locale.
    """
    os.environ.setdefault("PYTHONUTF8", "1")
    python = VENV_PYTHON if os.path.exists(VENV_PYTHON) else sys.executable
    scripts = str(ROOT / "scripts")  # what is there is no library; `import evaluate` is another one
    path = [folder for folder in os.environ["PYTHONPATH"].split(os.pathsep) if folder != scripts]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.environ["PATH"] = os.path.dirname(VENV_PYTHON) + os.pathsep + os.environ["PATH"]
    words = python_words(python, words)
    os.execvp(words[0], words)


def python_words(python: str, words: list[str]) -> list[str]:
    return [python, *words] if words[0] == "-m" or words[0].endswith(".py") else words


if __name__ == "__main__":
    run_command(main)
