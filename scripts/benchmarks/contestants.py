"""Who is measured on a workload, each in a process of its own, and what of its figures is kept."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.arguments import shell_words
from common.environment import ROOT
from common.errors import MachineError
from common.plan.workload import METHODS
from common.run.files import read_object

from benchmarks.workloads import Job, Workload

# ours: the recipe, or the class that it samples or scores with. trl: stock TRL and PEFT; of a rollout, transformers'
# generate. unsloth: Unsloth as it comes. Those of -vllm sample by vLLM.
OF_METHOD = {
    "grpo": ("ours", "trl", "unsloth", "trl-vllm", "unsloth-vllm"),
    "rollout": ("ours", "trl", "unsloth", "vllm"),
}
TIMED_OUT = 124  # as of the command `timeout`
PROFILED = 2  # steps, behind those that are measured and one more, in which the profiler starts
PEERS = {"trl": "benchmarks.stock_trl", "unsloth": "benchmarks.plain_unsloth"}


TELLING = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b|out of memory")  # of a log's lines


class Failed(Exception):
    """A process has ended with an error: the line of its `log` that tells why, else the last, and its exit `code`."""

    def __init__(self, log: Path, code: int, why: str = "") -> None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        telling = [line.strip() for line in lines if TELLING.search(line.strip())]
        super().__init__(why or (telling or lines or [f"exit code {code}"])[-1])
        self.log, self.code = log, code


def contestants(method: str) -> Sequence[str]:
    """Those that there are for a method."""
    return OF_METHOD.get(method, ("ours", "trl", "unsloth"))


def reason_to_skip(contestant: str, method: str) -> str | None:
    """Why this contestant cannot be measured here, or at all; None where it can."""
    if contestant == "ours":
        return None
    if method == "ppo":
        return "no PPO in TRL since 1.13, and none in Unsloth"
    if method == "score":
        return "TRL and Unsloth have no command that scores"
    if method == "reward" and contestant == "unsloth":
        return "Unsloth's model has no classifier's head"
    if contestant.endswith("vllm") and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (VARIANT=cuda-vllm)"
    return None


def measure(contestant: str, job: Job, recipe_args: str, profile: bool, minutes: float) -> dict[str, Any]:
    """The figures of one contestant: its seconds and tokens of each measured step, memory, and what else it has.

    Its output is in CONTESTANT.log in the job's folder. Raises Failed where it ends with an error or takes longer than
    `minutes`.
    """
    name, log = job.folder / contestant, job.folder / f"{contestant}.log"
    job.write(job.folder / "job.json")
    method, words = job.workload.method, [job.folder / "job.json", f"{name}.json"]
    if contestant == "ours" and method in METHODS:
        return run_recipe(job, log, recipe_args, profile, minutes)
    if contestant == "ours" and method == "score":
        reward = train_reward(job, log)
        run(["-m", "benchmarks.scoring", *words, reward], log, minutes)
    elif method == "rollout":
        run(["-m", "benchmarks.rollouts", contestant, *words], log, minutes)
    else:
        library, _, sampler = contestant.partition("-")
        variables = {} if job.on_gpu or library != "trl" else {"TRITON_INTERPRET": "1"}  # TRL's kernels are Triton's
        run(["-m", PEERS[library], *words, *([sampler] if sampler else [])], log, minutes, **variables)
    return read_object(Path(f"{name}.json"))


def run(words: Sequence[object], log: Path, minutes: float = 60.0, **variables: str) -> None:
    """Run Python with these words and environment variables, its output appended to `log`. Raises Failed."""
    paths = [str(ROOT / "recipes"), str(ROOT / "scripts"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    command = [sys.executable, *map(str, words)]
    with log.open("a", encoding="utf-8") as stream:
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False, timeout=60 * minutes
            ).returncode
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
    if code:
        raise Failed(log, code, f"ended after {minutes:g} minutes" if code == TIMED_OUT else "")


def run_recipe(job: Job, log: Path, recipe_args: str, profile: bool, minutes: float) -> dict[str, Any]:
    """Our recipe as a user runs it; its metrics.jsonl has the figures."""
    work, output = job.workload, job.folder / "run"
    last = job.steps + (1 + PROFILED if profile else 0)
    flags: dict[str, Any] = {
        "model": job.checkpoint,
        "data": job.folder / "rows.jsonl",
        "output-dir": output,
        "per-device-train-batch-size": work.batch,
        "gradient-accumulation-steps": work.accumulation,
        "max-steps": last,
        "logging-steps": job.logging,
        "save-steps": 1_000_000,
        "sample-prompts": 0,
    }
    if work.method == "grpo":
        flags |= {"max-completion-length": work.length, "rewards": "math", "num-generations": work.num_generations}
    elif work.method == "ppo":
        flags |= {"max-completion-length": work.length, "reward-model": train_reward(job, log)}
        flags |= {"rollout-batch-size": work.batch * work.accumulation, "critic-warmup-steps": 1, "eval-ratio": 0}
    else:
        flags |= {"max-length": work.length, "max-truncated": 1}
    if work.method == "reward":
        del flags["sample-prompts"]
        flags["eval-ratio"] = 0
    own = shell_words("--recipe-args", recipe_args)
    given = switches(work)
    if "--fit" in own or "--fit=auto" in own:  # what the command line gives, it would leave as it is
        given = []
        del flags["per-device-train-batch-size"], flags["gradient-accumulation-steps"]
    words = [ROOT / "recipes" / f"{work.method}.py", *given, *words_of(flags), *own]
    variables = {"PROFILE_STEPS": f"{job.steps + 2}-{last}"} if profile else {}
    started = time.time()
    run(words, log, minutes, **variables)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return figures([row for row in rows if "loss" in row and row["step"] <= job.steps], job.warmup, started) | {
        **({"recipe_args": recipe_args} if recipe_args else {}),
        "dtype": read_object(output / "run.json")["dtype"].removeprefix("torch."),
    }


def figures(rows: list[dict[str, Any]], warmup: int, started: float) -> dict[str, Any]:
    """From rows of metrics.jsonl what the peers measure of themselves, and the phases of a step.

    Where a row is of several steps, each of them has their mean.

    `started` is when the process was started, as time.time() has it. Raises MachineError where no step is left.
    """
    measured = [(before, row) for before, row in itertools.pairwise(rows) if before["step"] >= warmup]
    if not measured:
        raise MachineError(f"the run has logged {len(rows)} losses, and those of {warmup} steps do not count")
    phases = [name for name in measured[0][1] if name.startswith(("time/", "rollout/"))]
    return {
        "seconds": [mean for pair in measured for mean in of_each_step("timestamp", *pair)],
        "tokens": [mean for pair in measured for mean in of_each_step("tokens", *pair)],
        "reserved_gib": max(row["memory_gib"] for _, row in measured),
        "allocated_gib": max((row["allocated_gib"] for _, row in measured if "allocated_gib" in row), default=None),
        "cold_start_seconds": rows[0]["timestamp"] - started,
        "phases": {name: [row[name] for _, row in measured if name in row] for name in phases},
    }


def of_each_step(name: str, before: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """By how much a value grew in each step from one row to the next."""
    steps = row["step"] - before["step"]
    return [(row[name] - before[name]) / steps] * steps


def train_reward(job: Job, log: Path) -> Path:
    """A reward model as an adapter and a head on the checkpoint, after one step on two scores: for its size alone."""
    folder = job.folder / "reward"
    if not (folder / "adapter").exists():
        data = job.folder / "scores.jsonl"
        rows = [{"prompt": f"What is {n}?", "response": str(n), "score": n} for n in range(4)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flags: dict[str, Any] = {"model": job.checkpoint, "data": data, "output-dir": folder}
        flags |= {"max-steps": 1, "eval-ratio": 0}
        flags |= {"per-device-train-batch-size": 1, "gradient-accumulation-steps": 1}
        run([ROOT / "recipes" / "reward.py", *switches(job.workload), *words_of(flags)], log)
    return folder


def switches(work: Workload) -> list[str]:
    """What is off; on is the recipe's default."""
    on = {"load-in-4bit": work.load_in_4bit, "gradient-checkpointing": work.gradient_checkpointing}
    return [f"--no-{name}" for name, given in on.items() if not given]


def words_of(flags: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
