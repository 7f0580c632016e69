"""scripts/run COMMAND ARGUMENTS, which every target of the Makefile is: see scripts/run."""

import os
import signal
import sys

from common import errors
from common.arguments import Field, check, name_arguments
from common.environment import ROOT
from common.errors import ARGUMENTS, InputError, MachineError, did_you_mean, run_command
from install import environment as installed

from launch import engines, jobs, usage, variables
from launch.commands import COMMANDS, Where
from launch.gpus import chosen_gpus
from launch.mounts import Mounts, check_paths
from launch.repeat import repeat
from launch.where import choose

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
    fields = COMMANDS[name].fields()
    if by_make and fields is not None:
        os.environ["RECIPES_SPELLING"] = errors.SPELLING = "make"  # how messages name arguments
    own_help = fields is not None  # else ARGS=--help asks the program, and only the first word is for us
    if any(word in HELP for word in [*words, *(given or {}).get("ARGS", "").split()][: None if own_help else 1]):
        print(usage.help_of(name, fields or [], by_make))
        return
    try:
        start(name, read(name, fields, words, given or {}))
    except OSError as error:  # a full or read-only disk, a folder of somebody else's
        raise


def read(name: str, fields: list[Field] | None, words: list[str], given: dict[str, str]) -> list[str]:
    """The words of a command, checked, from those of scripts/run and the variables of make."""
    command = COMMANDS[name]
    name_arguments(fields or [])
    ARGUMENTS["--from"] = "FROM"
    if name == "slurm":
        what = jobs.submitted(fields, words, given)
        name_arguments(what.fields)
        words = [*variables.arguments(name, command, [*fields, *what.fields], given), *words]
        words = jobs.arrange(fields, what, words)
        check([*fields, *what.fields], [word for word in words if word != "--"], name)
    else:
        words = [*variables.arguments(name, command, fields or [], given), *words]
        if command.recipe:
            words = repeat(name, fields, words)
        if fields is not None:
            check(fields, words, name)
        check_paths(words)  # those of a job may be on its nodes only
    return words


def start(name: str, words: list[str]) -> None:
    """Replace this process by a command, where it runs."""
    command = COMMANDS[name]
    words = [*command.words, *words]
    if words[0].endswith(".py"):
        words[0] = str(command.file)
    if command.where is Where.HERE:
        execute(sys.executable, words)
    if command.where is Where.VENV:
        installed.ensure(os.environ.get("VARIANT", ""))
        os.chdir(ROOT)
        if "TEST_DOCKER" in command.variables:
            os.environ.setdefault("TEST_DOCKER", "cpu")
        execute(VENV_PYTHON, words)

    if os.environ.get("GPUS"):
        gpus = chosen_gpus()
        if len(gpus) > 1 and not command.several:
            raise InputError(f"GPUS={len(gpus)}: {name} runs on one GPU; sft can use several.")
        if len(gpus) > 1 and command.recipe:
            words = [str(ROOT / "scripts" / "launch" / "processes.py"), str(len(gpus)), *words]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    runtime, image, note = choose()
    if note:
        print(note, file=sys.stderr)
    if image is None:
        python = VENV_PYTHON
        if name != "check":
            installed.ensure(os.environ.get("VARIANT", ""))
        elif not os.path.exists(python):  # it is to tell what stands in the way of one
            python = sys.executable
        execute(python, words)
    mounts = Mounts()
    words = mounts.take(words)
    passed = engines.environment(mounts, image)
    mounts.add_aliases()
    gpus = engines.visible_gpus(image)
    digest = f" ({image.digest[:19]})" if image.digest else ""
    print(f"In {runtime}: {image.name}{digest}" + (f", GPUs {','.join(gpus)}" if gpus else ""), file=sys.stderr)
    words = python_words("python", words)
    if runtime == "apptainer":
        for name, value in passed.items():  # what apptainer hands on; its --env would show the values
            os.environ["APPTAINERENV_" + name] = os.environ[name] if value is None else value
        command = engines.apptainer(image, mounts, words)
    else:
        command = engines.docker(runtime, image, mounts, passed, words)
    os.execvp(command[0], command)


def python_words(python: str, words: list[str]) -> list[str]:
    return [python, *words] if words[0] == "-m" or words[0].endswith(".py") else words


def execute(python: str, words: list[str]) -> None:
    """Replace this process by a Python file or module, or by a program of the repository's or of PATH."""
    words = python_words(python, words)
    if python == VENV_PYTHON:
        scripts = str(ROOT / "scripts")  # what is there is no library; `import evaluate` is another one
        path = [folder for folder in os.environ["PYTHONPATH"].split(os.pathsep) if folder != scripts]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        os.environ["PATH"] = os.path.dirname(python) + os.pathsep + os.environ["PATH"]
    os.execvp(words[0], words)


if __name__ == "__main__":
    run_command(main)
