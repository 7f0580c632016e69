"""Every command: its name, what runs, where it runs, and the variables that it takes besides its arguments."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from common.arguments import Field, read_fields
from common.environment import ROOT


class Where(Enum):
    MODEL = "in a container of our image, or in .venv"
    VENV = "in .venv"
    HERE = "with any Python of 3.11 or newer"


# Settings that are no argument of a command. They come by environment, or as variables of make.
VARIABLES = {
    "RUNTIME": "where it runs: docker, podman, apptainer or local (.venv); else docker if our image is here",
    "IMAGE": "the image; else recipes:VARIANT; for apptainer a .sif file",
    "GPUS": "how many GPUs it gets; else all. Which ones: CUDA_VISIBLE_DEVICES=0,2",
    "VARIANT": "what is installed: cpu, cuda or cuda-vllm; else as before, or what suits this machine",
    "DOCKER": "the program for images and containers; else docker or podman",
    "DOCKER_ARGS": 'more for `docker run`: DOCKER_ARGS="--network none"',
    "DOCKER_LIMITS": "ulimits of a container, DOCKER_LIMITS= for none; else those that NVIDIA recommends",
    "PYTHON": "Python 3.11 or newer, to make .venv with; else python3",
    "TORCH_CPU_LINKS": "folder or URL of PyTorch's CPU build; else pip's find-links or PyTorch's own page",
    "BAKE": "1: an image with the recipes in it, for clusters and registries",
    "BASE_IMAGE": "what an image starts from; else the one of docker/Dockerfile, by digest",
    "WHEELS": "a folder of wheels for an image, besides those of the index",
    "CA_BUNDLE": "certificates to trust while an image is built; else SSL_CERT_FILE",
    "FLASH_ATTN": "1: compile flash-attn 2 into an image, which takes hours",
    "XFORMERS": "1: compile xformers into an image",
    "GPU_ARCHITECTURES": 'the GPUs to compile these for: GPU_ARCHITECTURES="9.0"; else 8.0 to 12.0',
    "MAX_JOBS": "compilers at once, each with 8 GB of memory; else 8",
    "TEST_DOCKER": "the variant of the image to test; else cpu",
    "FROM": "a run.json: the arguments of that run, except those given besides",
    "ARGS": 'more, as flags: ARGS="--max-steps 50"',
}
INSTALL = ("VARIANT", "PYTHON", "TORCH_CPU_LINKS")
CONTAINER = ("RUNTIME", "IMAGE", "GPUS", "DOCKER", "DOCKER_ARGS", "DOCKER_LIMITS")
BUILD = ("RUNTIME", "IMAGE", "DOCKER", "BAKE", "BASE_IMAGE", "WHEELS", "CA_BUNDLE", "FLASH_ATTN", "XFORMERS")
BUILD += ("GPU_ARCHITECTURES", "MAX_JOBS")


@dataclass(frozen=True)
class Command:
    """A command: `words`, from the repository's root, are a Python file, a module (-m) or a program, with arguments.

    A `recipe` writes a run.json, which FROM can repeat. `several` says that it can use more than one GPU: a recipe in a
    process for each.
    """

    summary: str
    words: tuple[str, ...]
    where: Where
    variables: tuple[str, ...] = INSTALL
    recipe: bool = False
    several: bool = False

    @property
    def file(self) -> Path | None:
        """Its Python file, None for a program or a module that is not ours."""
        first, second, *_ = (*self.words, "", "")
        module = f"scripts/{second.replace('.', '/')}"
        files = [first] if first.endswith(".py") else [f"{module}.py", f"{module}/__main__.py"] if first == "-m" else []
        return next((ROOT / file for file in files if (ROOT / file).is_file()), None)

    @property
    def checked(self) -> bool:
        """Are its arguments known? Those of pytest are its own."""
        return self.file is not None and read_fields(self.file) is not None

    def fields(self) -> list[Field]:
        """Its arguments, those that are known."""
        return (read_fields(self.file) if self.file else None) or []


def recipe(summary: str, name: str) -> Command:
    words, variables = (f"recipes/{name}.py",), (*CONTAINER, *INSTALL, "FROM")
    return Command(summary, words, Where.MODEL, variables, recipe=True, several=True)


def script(summary: str, *words: str, several: bool = False) -> Command:
    return Command(summary, words, Where.MODEL, (*CONTAINER, *INSTALL), several=several)


def tool(summary: str, *words: str) -> Command:
    return Command(summary, words, Where.VENV)


def plain(summary: str, *words: str, variables: tuple[str, ...] = ("PYTHON",)) -> Command:
    return Command(summary, words, Where.HERE, variables)


PYTEST = ("-m", "pytest")
GROUPS: dict[str, dict[str, Command]] = {
    "Train": {
        "sft": recipe("supervised fine-tuning: imitate examples of good completions", "sft"),
        "dpo": recipe("preference optimization: prefer chosen completions over rejected", "dpo"),
        "kto": recipe("learn from completions that are marked good or bad", "kto"),
        "grpo": recipe("reinforce what reward functions can check, such as mathematics", "grpo"),
        "reward": recipe("train a reward model, from scores or pairs", "reward"),
        "ppo": recipe("reinforce what a reward model scores high", "ppo"),
        "merge": script("merge an adapter into its base, for the next stage", "scripts/merge.py"),
        "pipeline": script("train stage after stage: STAGES=sft,dpo,grpo", "scripts/pipeline.py"),
    },
    "Data": {
        "choose": script("which stages suit your data, model and GPU", "scripts/choose.py"),
        "plan": tool("peak memory, hours and price of a run, on every card", "scripts/plan.py"),
        "check-data": script("what is in a data file, and what is wrong with it", "scripts/check-data.py"),
        "test-rewards": script("check reward functions on your data before a run", "scripts/test-rewards.py"),
        "distill": script("accepted completions of a model, as data for SFT", "scripts/distill.py"),
        "preferences": script("pairs for DPO from completions, scores or choices", "scripts/preferences.py"),
    },
    "Results": {
        "chat": script("talk to the model of a run, beside its base if you like", "scripts/chat.py"),
        "serve": tool("an OpenAI-compatible endpoint of a run, on this machine", "scripts/serve.py"),
        "report": script("a run as a page: curves, samples, figures, how to repeat", "scripts/report.py"),
        "watch": tool("that page in a browser, live while the run trains", "scripts/watch.py"),
        "evaluate": script("a run before and after, or any model, on held-out data", "scripts/evaluate.py"),
        "compare": script("two models complete the same prompts, rated blind", "scripts/compare.py"),
        "verify": script("a run's first steps again: equal bit for bit, or what differs", "scripts/verify.py"),
        "repro": script("an archive of a run, from which others take its steps again", "scripts/repro.py"),
        "export": script("merged weights or GGUF, Modelfile, card; proved equal", "scripts/export.py"),
        "push": tool("an export to the hub, private unless told otherwise", "scripts/push.py"),
        "benchmark": script("speed and memory of a recipe on a model's true shape", "scripts/benchmark.py"),
    },
    "Machine": {
        "check": script("what this machine can run, what is broken, how to fix it", "env-check.py", several=True),
        "models": script("list the model cards", "scripts/models.py"),
        "shell": script("a shell where the recipes run", "bash", several=True),
        "slurm": plain(
            "submit a recipe or a chain of stages to a Slurm cluster",
            "scripts/slurm/submit.py",
            variables=("PYTHON", "FROM"),
        ),
        "slurm-status": plain("the states of the submitted jobs", "scripts/slurm/status.py"),
        "image": plain("build the container image", "-m", "install.image", variables=(*INSTALL, *BUILD)),
        "setup": plain("make .venv; the other commands do so by themselves", "-m", "install", variables=INSTALL),
    },
    "This repository": {
        "test": tool("the tests, except the slow ones", *PYTEST, "-m", "not slow"),
        "test-all": tool("all tests", *PYTEST),
        "test-docker": Command(
            "build the image and test it in an engine of its own; needs root",
            (*PYTEST, "-n", "0", "tests/system/test_docker.py"),
            Where.VENV,
            (*INSTALL, "TEST_DOCKER"),
        ),
        "test-slurm": tool(
            "the tests on a Slurm cluster of this machine's own",
            *(*PYTEST, "-n", "0", "tests/system/test_slurm.py", "tests/system/test_slurm_nodes.py"),
        ),
        "lint": tool("check Python, types, shell files, Dockerfile and words", "scripts/lint"),
        "pin": tool("write a repository's newest commit into a model card", "scripts/pin.py"),
        "lock": plain("resolve docker/*.in into docker/*.lock", "-m", "install.lock", variables=INSTALL[1:]),
        "lock-check": plain(
            "compare each lock with its .in file and the index", "-m", "install.lock", "--check", variables=INSTALL
        ),
        "pin-base": plain(
            "write the base image's newest digest into docker/Dockerfile",
            *("-m", "install.image", "pin-base"),
            variables=BUILD,
        ),
        "audit": tool("licences, SBOM and known advisories of the locks", "scripts/audit.py"),
        "tiny": tool("train the embedded model again", "scripts/tiny/pretrain.py"),
        "samples": tool("write data_samples/ again", "scripts/tiny/samples.py"),
        "clean": plain("remove .venv and .cache; outputs/ stays", "rm", "-rf", f"{ROOT}/.venv", f"{ROOT}/.cache"),
    },
}
BRIEF = {
    "repro",
    "benchmark",
    "models",
    "shell",
    "slurm-status",
    "image",
    "setup",
    *GROUPS["This repository"],
}  # in the list by their names alone
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
# Any program where the recipes run, for job scripts; the paths that its flags name are mounted as those of a recipe.
COMMANDS["exec"] = script("run a program where the recipes run", several=True)
