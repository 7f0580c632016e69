"""Submit a run to a Slurm cluster: one job, an array of them for a sweep, or a chain for a pipeline.

    make slurm RECIPE=sft MODEL=qwen2.5-7b DATA=my.jsonl TIME=4:00:00 GPUS=1
    make slurm RECIPE=sft TIME=1:00:00 SWEEP="learning_rate=1e-4,2e-4 seed=1,2,3"     six runs, side by side
    make slurm PIPELINE=sft,dpo,grpo TIME=4:00:00 GPUS=1                              three jobs, one after the other
    make slurm RECIPE=sft TIME=4:00:00 NODES=2 GPUS=8                                 16 processes by torchrun
    make slurm RECIPE=sft TIME=1:00:00 DRY=1                                          shows the script, submits nothing

The script is written to OUT/slurm, the settings above what scripts/slurm/job.sh holds, checked by bash, shellcheck and
Slurm itself, and submitted; logs and states come to lie beside it. Before its time is up a job stops with a checkpoint
and is queued again, until it is done. `make slurm-status` says how they all do.

A job gets none of the submitter's environment but the variables in PASSED, which stand in the script, so no token comes
to lie in Slurm's files. One is read on the node: from the file that HF_TOKEN_PATH names, or `hf auth login` wrote.

Left out: heterogeneous jobs, several GPUs for anything but SFT, building images.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from common.environment import ROOT
from common.errors import InputError, MachineError, run_command
from common.run.files import write_json
from common.run.stopping import seconds

RECIPES = ("sft", "dpo", "grpo", "ppo", "reward")
STAGES = ("sft", "dpo", "grpo")
RUNTIMES = ("local", "docker", "apptainer", "pyxis")
# Slurm's client programs, where the hub's files are, and how libraries behave; nothing that says who the user is.
PASSED = ("PATH", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")
PASSED += ("UNSLOTH_USE_MODELSCOPE", "MODELSCOPE_CACHE", "WANDB_MODE", "WANDB_PROJECT", "OMP_NUM_THREADS")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY")
WARNING_SECONDS = 300  # before the time is up: for a step and a checkpoint of a large model


def main() -> None:
    args = parse()
    runs = [("", [])] if not args.sweep else sweep(args.sweep)
    name = args.recipe or "pipeline"
    folder = Path(args.output_dir or default_folder(name, args.words)).expanduser().absolute()
    for place in (folder, Path.cwd()):
        if re.search(r'["%\\\n]', str(place)):
            raise InputError(f"{place}: Slurm takes no quotes, backslashes or per cent signs in the name of a folder")
    check_runtime(args)
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    record = folder / "slurm" / "jobs.json"
    jobs = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    scripts = [write_script(stage, folder, runs, args) for stage in args.pipeline or [args.recipe]]
    if args.dry:
        print("\n".join(script.read_text(encoding="utf-8") for script in scripts))
        return

    if shutil.which("sbatch") is None:
        raise MachineError("there is no sbatch here: submit from a login node of the cluster; DRY=1 shows the scripts")
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", choices=RECIPES)
    what.add_argument("--pipeline", type=lambda words: words.split(","), help="stages, each a job: sft,dpo,grpo")
    parser.add_argument("--time", required=True, help="of one job, until it is queued again: hours:minutes:seconds")
    parser.add_argument("--gpus", default="0", help="on each node: 1, or h200:8")
    parser.add_argument("--nodes", type=int, default=1)
    for option in ("partition", "account", "qos", "constraint"):
        parser.add_argument(f"--{option}", help="as sbatch has it")
    parser.add_argument("--sbatch", default="", help="more for sbatch, as one word: --sbatch='--mem=64G --exclusive'")
    parser.add_argument("--runtime", choices=RUNTIMES, default="local")
    parser.add_argument("--image", help="of the container")
    parser.add_argument("--sweep", help="arguments with their values: 'learning_rate=1e-4,2e-4 seed=1,2'")
    parser.add_argument("--output-dir", help="the folder of the run, the sweep or the pipeline")
    parser.add_argument("--dry", action="store_true", help="write and show the scripts, and submit nothing")
    parser.add_argument("words", nargs="*", help="after --, the arguments of the recipe or the pipeline")
    args = parser.parse_args()

    try:
        args.seconds = seconds(args.time)
    except InputError:
        raise InputError(f"TIME={args.time}: expected hours:minutes:seconds, as 4:00:00") from None
    if not re.fullmatch(r"(\w+:)?\d+", args.gpus):
        raise InputError(f"GPUS={args.gpus}: expected how many of each node, as 1 or h200:8")
    args.per_node = max(1, int(args.gpus.rpartition(":")[2]))
    if args.nodes * args.per_node > 1 and args.recipe != "sft":
        raise InputError("only RECIPE=sft trains in several processes; for the others GPUS=1 NODES=1")
    for stage in args.pipeline or []:
        if stage not in STAGES:
            raise InputError(f"PIPELINE: there is no stage {stage!r}; there are {', '.join(STAGES)}")
    if args.pipeline and args.sweep:
        raise InputError("SWEEP is for a RECIPE; sweep each stage by itself, then run the PIPELINE with the best")
    return args


def sweep(text: str) -> list[tuple[str, list[str]]]:
    """The runs of a sweep: the folder of each, and the arguments that it has beyond the others."""
    axes = []
    for word in shlex.split(text):
        name, _, values = word.partition("=")
        if not re.fullmatch(r"\w+", name) or not all(values.split(",")):
            raise InputError(f"SWEEP: {word}: expected an argument and its values, as learning_rate=1e-4,2e-4")
        axes.append([(name, value) for value in values.split(",")])
    return [
        (
            ",".join(f"{name}={value.replace('/', '-')}" for name, value in run),
            [word for name, value in run for word in (f"--{name.replace('_', '-')}", value)],
        )
        for run in itertools.product(*axes)
    ]


def default_folder(name: str, words: list[str]) -> str:
    """The same folder for the same words, so that what is submitted again goes on."""
    model = Path(words[words.index("--model") + 1]).name if "--model" in words else "tiny"
    return f"outputs/slurm-{name}-{model}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"


def check_runtime(args: argparse.Namespace) -> None:
    if args.runtime != "local":
        if not args.image:
            raise InputError(f"RUNTIME={args.runtime}: needs IMAGE=, the image of docker/Dockerfile as that takes it")
        if args.runtime == "docker" and args.nodes > 1:
            raise InputError("RUNTIME=docker: its containers do not see other nodes; use apptainer or pyxis")
        return
    lock = ROOT / ".venv" / "lock.sha256"
    if not lock.exists():
        raise MachineError(f"{ROOT}/.venv is not there: make setup VARIANT={'cuda' if args.gpus != '0' else 'cpu'}")
    if args.gpus != "0" and "cpu.lock" in lock.read_text():
        print("Note: .venv is the one without CUDA, so GPUs will lie idle: make setup VARIANT=cuda", file=sys.stderr)


def write_script(stage: str, folder: Path, runs: list[tuple[str, list[str]]], args: argparse.Namespace) -> Path:
    """Write the script of one job, or of one array, and check it. Raises InputError for what must not be in it."""
    script = folder / "slurm" / f"{stage}.sh"
    text = "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options(stage, folder, runs, args)),
            "",
            *(f"export {name}={shlex.quote(os.environ[name])}" for name in PASSED if name in os.environ),
            "",
            *settings(stage, folder, runs, args),
            "",
            (Path(__file__).parent / "job.sh").read_text(encoding="utf-8").partition("\n")[2],
        ]
    )
    for name, value in os.environ.items():
        if SECRET.search(name) and not name.endswith(("_PATH", "_FILE")) and len(value) > 7 and value in text:
            raise InputError(f"the value of {name} would stand in {script}; leave it out, the job reads it from a file")
    script.write_text(text, encoding="utf-8")
    path = f"{os.environ.get('PATH', '')}:{ROOT}/.venv/bin"
    for name, flag in (("bash", "-n"), ("shellcheck", "--severity=warning")):
        if linter := shutil.which(name, path=path):
            done = subprocess.run([linter, flag, script], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{script} is no sound script:\n{done.stdout}{done.stderr}")
    return script


def options(stage: str, folder: Path, runs: list[tuple[str, list[str]]], args: argparse.Namespace) -> list[str]:
    # Slurm sends the signal up to a minute early. A short job, for a trial, must still get to train.
    warning = min(WARNING_SECONDS, args.seconds // 3)
    return [
        f'--job-name="{stage}-{folder.name}"',
        f"--time={args.time}",
        f"--nodes={args.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={args.gpus}"] if args.gpus != "0" else []),
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


def settings(stage: str, folder: Path, runs: list[tuple[str, list[str]]], args: argparse.Namespace) -> list[str]:
    """What job.sh is told, as lines of bash."""
    if args.pipeline:
        words = ["scripts/pipeline.py", "--stages", ",".join(args.pipeline), "--until", stage, *args.words]
    else:
        words = [f"recipes/{stage}.py", *args.words]
    lines = [
        f"root={shlex.quote(str(ROOT))}",
        f"folder={shlex.quote(str(folder))}",
        "out=$folder",
        f"runtime={args.runtime}",
        f"image={shlex.quote(args.image or '')}",
        f"mounts={shlex.quote(mounts(folder, args.words) if args.runtime == 'pyxis' else '')}",
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
    """Words for an array of bash; shellcheck takes a bare comma for a slip."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def mounts(folder: Path, words: list[str]) -> str:
    """The places that a container sees, under their own names, for pyxis: those of the words, and of the hub."""
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
        raise InputError(f"{folder}: job {', '.join(sorted(known))} is at it; wait, scancel it, or give another OUT")


def sbatch(*words: str) -> str:
    """What sbatch prints. Raises InputError with its reason when it refuses."""
    # Here as in the script, whose word would not hold against an SBATCH_EXPORT of the environment.
    done = subprocess.run(["sbatch", "--export=NONE", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = "\n".join(line for line in done.stderr.splitlines() if "error" in line) or done.stderr
        raise InputError(f"Slurm refuses {words[-1]}:\n{reason}")
    return done.stdout.strip()


if __name__ == "__main__":
    run_command(main)
