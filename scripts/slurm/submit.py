"""Submit a run to a Slurm cluster: one job, an array of jobs for a sweep, or a chain of jobs for several stages.

    make slurm RECIPE=sft MODEL=qwen2.5-7b DATA=my.jsonl TIME=4:00:00 GPUS=1
    make slurm RECIPE=sft TIME=1:00:00 SWEEP="learning_rate=1e-4,2e-4 seed=1,2,3"     six runs, side by side
    make slurm STAGES=sft,dpo,grpo TIME=4:00:00 GPUS=1                                three jobs, one after the other
    make slurm RECIPE=sft TIME=4:00:00 NODES=2 GPUS=8                                 16 processes, one for each GPU
    make slurm RECIPE=sft TIME=1:00:00 DRY=1                                          show the script, submit nothing

All other arguments are those of the recipe, or with STAGES those of the pipeline. The script is written to OUT/slurm,
with its settings above the text of scripts/slurm/job.sh, and checked by bash, shellcheck and Slurm before it is
submitted; logs and states are written beside it. Before its time is up a job stops with a checkpoint and is requeued,
until the run is done. `make slurm-status` shows the states.

A job gets no variable of your environment except those in PASSED and FAMILIES, which are in the script, so no token
ends up in a file of Slurm's. The job reads a token from the file that HF_TOKEN_PATH names, or that `hf auth login`
wrote.

Left out: heterogeneous jobs, several GPUs for the stages of a pipeline, building images.
"""

import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.arguments import parse, shell_words
from common.environment import ROOT
from common.errors import (
    CREDENTIALS,
    SPELLING,
    InputError,
    MachineError,
    did_you_mean,
    printable,
    run_command,
    secret_values,
)
from common.run.files import read_objects, write_json
from common.run.stopping import seconds

RECIPES = ("sft", "dpo", "kto", "grpo", "reward", "ppo")
# Slurm's client programs, where the hub's files are, and how libraries behave; nothing that says who the user is.
PASSED = ("PATH", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")
PASSED += ("UNSLOTH_USE_MODELSCOPE", "MODELSCOPE_CACHE", "WANDB_MODE", "WANDB_PROJECT", "OMP_NUM_THREADS")
PASSED += ("COMPILED_CODE", "RANKS_TIMEOUT", "UNSLOTH_FSDP2_LAYOUT")
FAMILIES = re.compile(r"(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+")  # how ranks reach each other; passed, too
GPU_OPTION = re.compile(r"--gpus|--gres[= ]\S*gpu|(^| )-G")  # of sbatch, in one of its spellings
WARNING_SECONDS = 300  # before the time is up: for a step and a checkpoint of a large model


@dataclass(frozen=True)
class Args:
    time: str
    """The time limit of one job, hours:minutes:seconds; it stops before and is requeued until the run is done."""
    recipe: Literal["sft", "dpo", "kto", "grpo", "reward", "ppo"] | None = None
    """The recipe to submit; or give --stages."""
    stages: str | None = None
    """Stages of the pipeline, each a job that waits for the one before: sft,dpo,grpo."""
    sweep: str | None = None
    """Submit RECIPE with every choice of these arguments, as an array of jobs: "seed=1,2 lora_r=8,16"."""
    output_dir: str | None = None
    """The folder of the run, the sweep or the pipeline; by default outputs/slurm-NAME-MODEL-HASH."""
    dry: bool = False
    """Write and show the scripts, and submit nothing."""

    # The job.
    gpus: str = "0"
    """How many GPUs on each node: 1, or h200:8 for a kind of them. Where --sbatch has --gres, that asks for them."""
    nodes: int = 1
    partition: str | None = None
    """As sbatch has it, and so the next three."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: str = ""
    """More options for sbatch: "--mem=64G --exclusive"."""
    runtime: Literal["local", "docker", "apptainer", "pyxis"] = "local"
    """Where the job's command runs: in .venv, or in a container."""
    image: str | None = None
    """The image of the container, as its runtime takes it."""

    @property
    def chain(self) -> list[str]:
        """The stages, [] where a recipe is submitted."""
        return [name for name in re.split(r"[,\s]+", self.stages or "") if name]

    @property
    def seconds(self) -> int:
        return seconds(self.time)

    @property
    def per_node(self) -> int:
        """Processes on each node: one for each GPU."""
        return max(1, int(self.gpus.rpartition(":")[2]))


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, words = parse(Args, words[:end], "slurm"), words[end + 1 :]  # of the recipe or the pipeline
    check(args)
    runs = [("", [])] if not args.sweep else sweep(args.sweep)
    folder = Path(args.output_dir or default_folder(args.recipe or "pipeline", words)).expanduser().absolute()
    for place in (folder, Path.cwd()):
        if re.search(r'["%\\\n]', str(place)):
            raise InputError(f"{place}: Slurm takes no quotes, backslashes or per cent signs in the name of a folder.")
    check_runtime(args)
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    record = folder / "slurm" / "jobs.json"
    jobs = read_objects(record) if record.exists() else []
    scripts = [
        write_script(stage, folder, runs, args, words) for stage in ([args.recipe] if args.recipe else args.chain)
    ]
    if args.dry:
        text = "\n".join(script.read_text(encoding="utf-8") for script in scripts)
        print(printable(text) if sys.stdout.isatty() else text)  # into a file it is the script
        return

    if shutil.which("sbatch") is None:
        raise MachineError("There is no sbatch here. Submit from a login node of the cluster; --dry shows the scripts.")
    refuse_twice(jobs, folder)
    for script in scripts:
        sbatch("--test-only", str(script))
    before = None
    for script in scripts:
        dependency = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        before = sbatch("--parsable", *dependency, str(script)).partition(";")[0]  # JOB or JOB;CLUSTER
        outs = {f"{before}_{index}": run for index, (run, _) in enumerate(runs)} if args.sweep else {before: ""}
        jobs += [{"job": job, "name": script.stem, "run": run} for job, run in outs.items()]
        write_json(record, jobs)
        print(f"{script.stem}: job {before}, by {script}")
    print(f"Follow it:  make slurm-status OUT={shlex.quote(str(folder))}")
    print(f"            tail -F {shlex.quote(str(folder / 'slurm'))}/{jobs[-1]['job'] if args.sweep else before}.log")


def check(args: Args) -> None:
    """Raise InputError for what cannot be submitted."""
    if bool(args.recipe) == bool(args.chain):
        raise InputError("Give --recipe or --stages, one of them: --recipe=sft, or --stages=sft,dpo,grpo")
    try:
        seconds(args.time)
    except InputError:
        raise InputError(f"--time={args.time}: expected hours:minutes:seconds, such as 4:00:00.") from None
    if not re.fullmatch(r"(\w+:)?\d+", args.gpus):
        raise InputError(f"--gpus={args.gpus}: expected how many of each node, such as 1 or h200:8.")
    if args.gpus == "0" and GPU_OPTION.search(args.sbatch):
        raise InputError(
            f"--sbatch={args.sbatch}: this asks Slurm for GPUs; give --gpus too, how many of each node, "
            "so that each gets a process."
        )
    shell_words("--sbatch", args.sbatch)  # before anything is written
    if args.nodes < 1:
        raise InputError(f"--nodes={args.nodes}: expected 1 or more.")
    if args.nodes * args.per_node > 1 and args.chain:
        raise InputError("Stages train in one process each: give --gpus=1 and --nodes=1, or one --recipe at a time.")
    for stage in args.chain:
        if stage not in RECIPES:
            raise InputError(
                f"--stages={args.stages}: unknown stage {stage!r}{did_you_mean(stage, RECIPES)}. There are "
                f"{', '.join(RECIPES)}."
            )
    if args.chain and args.sweep:
        raise InputError("--sweep is for a --recipe. Sweep each stage alone, then submit --stages with the best.")


def sweep(text: str) -> list[tuple[str, list[str]]]:
    """The runs of a sweep: the folder of each, and the arguments that it has beyond the others."""
    axes = []
    for word in shell_words("--sweep", text):
        name, _, values = word.partition("=")
        if not re.fullmatch(r"\w+", name) or not all(values.split(",")):
            raise InputError(f"--sweep: {word}: expected an argument and its values, such as learning_rate=1e-4,2e-4.")
        axes.append([(name, value) for value in values.split(",")])
    return [
        (
            ",".join(f"{name}={value.replace('/', '-')}" for name, value in run),
            [word for name, value in run for word in (f"--{name.replace('_', '-')}", value)],
        )
        for run in itertools.product(*axes)
    ]


def default_folder(name: str, words: list[str]) -> str:
    """The same folder for the same words, so that what is submitted again resumes."""
    model = Path(words[words.index("--model") + 1]).name if "--model" in words else "tiny"
    return f"outputs/slurm-{name}-{model}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"


def check_runtime(args: Args) -> None:
    if args.runtime != "local":
        if not args.image:
            raise InputError(f"--runtime={args.runtime}: needs --image=..., the image that `make image` built.")
        if args.runtime == "docker" and args.nodes > 1:
            raise InputError("--runtime=docker: its containers do not see other nodes; use apptainer or pyxis.")
        return
    lock = ROOT / ".venv" / "lock.sha256"
    if not lock.exists():
        variant = "cuda" if args.gpus != "0" else "cpu"
        raise MachineError(f"There is no {ROOT}/.venv for the job to run in; make setup VARIANT={variant}")
    if args.gpus != "0" and "cpu.lock" in lock.read_text():
        print("Note: .venv has no CUDA, so the job will not use its GPUs; make setup VARIANT=cuda", file=sys.stderr)


def write_script(stage: str, folder: Path, runs: list[tuple[str, list[str]]], args: Args, words: list[str]) -> Path:
    """Write the script of one job, or of one array, and check it. Raises InputError for what must not be in it."""
    script = folder / "slurm" / f"{stage}.sh"
    text = "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options(stage, folder, runs, args)),
            "",
            *(f"export {name}={shlex.quote(os.environ[name])}" for name in passed()),
            *([f"export RECIPES_SPELLING={SPELLING}"] if SPELLING else []),
            "",
            *settings(stage, folder, runs, args, words),
            "",
            (Path(__file__).parent / "job.sh").read_text(encoding="utf-8").partition("\n")[2],
        ]
    )
    if found := [one for one in CREDENTIALS.findall(text) if ":" in one]:
        where = re.split(r"[\s'\"]", text.partition(found[0])[2])[0]
        raise InputError(
            f"A user and a password, of a URL ***{where}, would be in {script}. Leave them out of the URL and put them "
            "into ~/.netrc, which the job reads."
        )
    for name, value in secret_values().items():
        if value in text:
            raise InputError(f"The value of {name} would be in {script}. Leave it out; the job reads it from a file.")
    script.write_text(text, encoding="utf-8")
    path = f"{os.environ.get('PATH', '')}:{ROOT}/.venv/bin"
    for name, flag in (("bash", "-n"), ("shellcheck", "--severity=warning")):
        if linter := shutil.which(name, path=path):
            done = subprocess.run([linter, flag, script], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{script} has an error:\n{done.stdout}{done.stderr}")
    return script


def passed() -> list[str]:
    """The names of the variables of this environment that a job gets."""
    return [name for name in PASSED if name in os.environ] + sorted(filter(FAMILIES.fullmatch, os.environ))


def options(stage: str, folder: Path, runs: list[tuple[str, list[str]]], args: Args) -> list[str]:
    # Slurm sends the signal up to a minute early. A short job, for a trial, must still get to train.
    warning = min(WARNING_SECONDS, args.seconds // 3)
    return [
        f'--job-name="{stage}-{folder.name}"',
        f"--time={args.time}",
        f"--nodes={args.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={args.gpus}"] if args.gpus != "0" and not GPU_OPTION.search(args.sbatch) else []),
        *([f"--array=0-{len(runs) - 1}"] if args.sweep else []),
        f'--chdir="{os.getcwd()}"',
        f'--output="{folder}/slurm/{"%A_%a" if args.sweep else "%j"}.log"',
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{warning}",
        "--export=NONE",
        *(
            f"--{name}={shlex.quote(value)}"
            for name in ("partition", "account", "qos", "constraint")
            if (value := getattr(args, name))
        ),
        *map(shlex.quote, shlex.split(args.sbatch)),
    ]


def settings(stage: str, folder: Path, runs: list[tuple[str, list[str]]], args: Args, words: list[str]) -> list[str]:
    """The settings of job.sh, as lines of bash."""
    mounted = mounts(folder, words) if args.runtime == "pyxis" else ""
    if args.chain:
        words = ["scripts/pipeline.py", "--stages", ",".join(args.chain), "--until", stage, *words]
    else:
        words = [f"recipes/{stage}.py", *words]
    lines = [
        f"root={shlex.quote(str(ROOT))}",
        f"folder={shlex.quote(str(folder))}",
        "out=$folder",
        f"runtime={args.runtime}",
        f"image={shlex.quote(args.image or '')}",
        f"mounts={shlex.quote(mounted)}",
        f"nodes={args.nodes}",
        f"per_node={args.per_node}",
        f"command=({quoted([str(ROOT / words[0]), *words[1:]])})",
    ]
    if args.sweep:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for index, (run, more) in enumerate(runs):
            lines.append(f"{index}) out=$folder/{shlex.quote(run)} command+=({quoted(more)}) ;;")
        lines.append("esac")
    return [*lines, 'command+=(--output-dir "$out")']


def quoted(words: list[str]) -> str:
    """Words for an array of bash; shellcheck takes a bare comma for a mistake."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def mounts(folder: Path, words: list[str]) -> str:
    """The paths that a container sees, under their own names, for pyxis: those of the words, and of the hub."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser().absolute()
    others = [os.environ.get(name, "") for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "MODELSCOPE_CACHE")]
    named = [os.path.expanduser(piece) for word in [*words, *others] for piece in re.split("[=:]", word)]
    places = {ROOT, Path.cwd(), folder, hub, *(Path(path).absolute() for path in named if os.path.exists(path))}
    return ",".join(f"{path}:{path}" for path in sorted(places))


def refuse_twice(jobs: list[dict[str, str]], folder: Path) -> None:
    """Raise InputError if a job of this folder is queued or running: two would write into the same run."""
    queued = subprocess.run(["squeue", "--me", "-h", "-o", "%A %F"], capture_output=True, text=True, check=True).stdout
    known = {job["job"].partition("_")[0] for job in jobs} & set(queued.split())
    if known:
        raise InputError(
            f"{folder}: job {', '.join(sorted(known))} writes into it. Wait, scancel it, or give another --output-dir."
        )


def sbatch(*words: str) -> str:
    """What sbatch prints. Raises InputError with its reason when it refuses."""
    # Here as in the script, whose option would lose against an SBATCH_EXPORT of the environment.
    done = subprocess.run(["sbatch", "--export=NONE", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = "\n".join(line for line in done.stderr.splitlines() if "error" in line) or done.stderr
        raise InputError(f"Slurm refuses {words[-1]}:\n{reason}")
    return done.stdout.strip()


if __name__ == "__main__":
    run_command(main)
