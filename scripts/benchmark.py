"""Measure a recipe's speed and memory on the shape of a real model, beside TRL, Unsloth and vLLM in the same run.

    make benchmark WORKLOAD=sft-7b-bf16                     ours, TRL + PEFT, and Unsloth as it comes
    make benchmark WORKLOAD="rollout-1.5b grpo-1.5b"        vLLM too where it is installed
    make benchmark WORKLOAD=sft-7b-bf16 CONTESTANTS=ours RECIPE_ARGS="--lora-r 64"
    make benchmark WORKLOAD=grpo-1.5b CONTESTANTS=ours PROFILE=yes     a trace and a table of kernels, too
    make benchmark MODEL=qwen2.5-7b METHOD=dpo MAX_LENGTH=4096         a workload of your own numbers

The checkpoint is made from the card's architecture, so nothing is downloaded: weights decide neither speed nor memory.
All contestants have the same checkpoint, rows and batches; each is a process of its own, one after the other. Rows (for
DPO a prompt with each of its completions, for GRPO and PPO a completion) are `--max-length` tokens, none padded, so
every token counted is a useful one. Our recipe runs as it does for a user, and its own metrics.jsonl gives the figures;
steps before `--warmup` are left out. A share of the ceiling is of what this machine does in a plain matrix product and
a plain copy, measured in the same run.

The folder gets benchmark.md, benchmark.json with every step, and a log of each contestant. PPO has all four models:
first a reward model is trained for one step, as one more adapter.

Left out: models that are not Qwen2, whose classes need more than the card's numbers; several GPUs.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.checkpoint import make_checkpoint  # noqa: F401  other commands make one, too
from benchmarks.contestants import Failed, contestants, measure, reason_to_skip, run
from benchmarks.table import page, summary
from benchmarks.workloads import WORKLOADS, Job, Workload
from common import environment
from common.cli import parse_arguments
from common.errors import BAD_INPUT, InputError, MachineError, did_you_mean, run_command
from common.lm.cards import read_card
from common.run.files import read_object, write_bytes, write_json


@dataclass(frozen=True)
class Args:
    # What is measured.
    workload: tuple[str, ...] = ()
    """Named workloads, such as sft-7b-bf16; the arguments of the next group change their numbers. A wrong name lists
    them."""
    contestants: tuple[Literal["ours", "trl", "unsloth", "trl-vllm", "unsloth-vllm", "vllm"], ...] = (
        *("ours", "trl", "unsloth"),
        *("trl-vllm", "unsloth-vllm", "vllm"),
    )
    """Who is measured, in this order, of those that there are for the method."""
    recipe_args: str = ""
    """More arguments of our recipe, as one text: RECIPE_ARGS="--lora-r 64 --optim adamw_torch_fused"."""
    profile: bool = False
    """Also profile two steps of our recipe, behind those that are measured and one more."""

    # The workload's numbers.
    model: str = "qwen2.5-7b"
    method: Literal["sft", "dpo", "kto", "reward", "grpo", "ppo", "score", "rollout"] = "sft"
    load_in_4bit: bool = True
    """Of rollouts the base is in 16 bit."""
    gradient_checkpointing: bool = True
    per_device_train_batch_size: int | None = None
    """By default the recipe's: 4 rows, 2 pairs, 4 completions (GRPO), 8 (PPO), 64 (rollout)."""
    gradient_accumulation_steps: int | None = None
    """By default the recipe's, 4; of a named workload 1."""
    max_length: int | None = None
    """By default the recipe's: 2048, of a completion 512 (GRPO), 128 (PPO) or 256 (rollout)."""
    num_generations: int = 4
    """Completions of each prompt (GRPO, rollout)."""
    prompt_length: int = 100
    """Tokens of a prompt (GRPO, PPO, rollout), about."""
    ragged: bool = False
    """SFT: documents of log-normal length, median 245 tokens, packed into the rows, in place of one a row. Rollout:
    completions of log-normal length."""

    # How.
    steps: int = 25
    warmup: int = 5
    """Steps left out of the figures: compilation and the allocator's growth."""
    logging_steps: int | None = None
    """Steps from one logged loss to the next, as one that is logged waits for the GPU; each step gets their mean. By
    default the most that divide steps and warm-up and leave four means, 5 of 25 and 5; of GRPO and PPO 1."""
    checkpoint: str | None = None
    """A folder to make the checkpoint in, or to take it from when it is there; by default one in the output folder."""
    output: str | None = None
    """The folder of the results; by default outputs/benchmark-TIME."""
    minutes: float = 30.0
    """Of each contestant: one that takes longer is ended and reported as failed, and the next one follows."""


def main() -> int:
    try:
        return benchmark(parse_arguments(Args, __doc__))
    except Failed as failure:  # our recipe refuses what it was given, or the machine cannot be measured
        print(f"{failure}\nAll that it wrote is in {failure.log}", file=sys.stderr)
        return failure.code


def benchmark(args: Args) -> int:
    """Measure every contestant of every workload, write the results so far after each, and print them."""
    workloads = named_workloads(args)
    if args.warmup < 1 or args.steps <= args.warmup:
        raise InputError(
            f"--warmup={args.warmup} of --steps={args.steps}: at least one step has to be left out, and one left"
        )
    most = math.gcd(args.steps, args.warmup)
    if args.logging_steps is not None and (args.logging_steps < 1 or most % args.logging_steps):
        raise InputError(
            f"--logging-steps={args.logging_steps}: a loss has to be logged where the warm-up ends, and at the end; "
            f"for --warmup={args.warmup} of --steps={args.steps} that is 1, {most} or what divides {most}"
        )
    environment.set_variables()
    folder = Path(args.output or f"outputs/benchmark-{time.strftime('%Y%m%d-%H%M%S')}").expanduser().resolve()
    if (folder / "benchmark.json").exists():
        raise InputError(f"{folder}: holds a benchmark already; give another --output")
    folder.mkdir(parents=True, exist_ok=True)

    run(["-m", "benchmarks.machine", folder / "machine.json"], folder / "machine.log")
    machine = read_object(folder / "machine.json")
    raw: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, workload in workloads.items():
        job = Job(
            workload=workload,
            checkpoint=Path(args.checkpoint or folder / "checkpoints" / workload.model).expanduser().resolve(),
            folder=folder / name,
            steps=args.steps,
            warmup=args.warmup,
            logging=args.logging_steps or default_logging(workload.method, args.steps, args.warmup),
            on_gpu="gpu" in machine,
        )
        job.folder.mkdir(exist_ok=True)
        raw[name], results[name] = {}, {}
        unprepared = prepare(job)
        for contestant in args.contestants:
            if contestant in contestants(workload.method):
                figures = unprepared or figures_of(contestant, job, args)
                raw[name][contestant], results[name][contestant] = figures, summary(figures, workload, machine)
                save(folder, machine, workloads, raw, results)
                print(f"{name}  {contestant}  {one_line(results[name][contestant])}", file=sys.stderr, flush=True)
    print(page(machine, results, described(workloads)))
    print(json.dumps({"folder": str(folder), "results": results}))
    return 1 if any("failed" in found.get("ours", {}) for found in results.values()) else 0


def default_logging(method: str, steps: int, warmup: int) -> int:
    """Steps from one logged loss to the next. Where completions are sampled, every step waits for the GPU anyway."""
    most = 1 if method in ("grpo", "ppo") else max((steps - warmup) // 4, 1)
    return max(number for number in range(1, most + 1) if math.gcd(steps, warmup) % number == 0)


def prepare(job: Job) -> dict[str, Any]:
    """Make the checkpoint and the rows of a workload; why it failed, else nothing."""
    job.write(job.folder / "job.json")
    try:
        run(["-m", "benchmarks.prepare", job.folder / "job.json"], job.folder / "prepare.log")
    except Failed as failure:
        return {"failed": f"the checkpoint and the rows could not be made: {failure}", "log": str(failure.log)}
    return {}


def named_workloads(args: Args) -> dict[str, Workload]:
    """The workloads to measure, by name. Numbers that the command line gives are theirs in place of the named ones.

    Raises InputError for an unknown name.
    """
    numbers = [field.name for field in fields(Workload)]
    if not args.workload:
        return {f"{args.method}-{args.model}": Workload(**{name: getattr(args, name) for name in numbers})}
    for name in args.workload:
        if name not in WORKLOADS:
            raise InputError(
                f"--workload={name}: unknown{did_you_mean(name, WORKLOADS)}. There are {', '.join(WORKLOADS)}."
            )
    named = {}
    for name in args.workload:
        own: dict[str, Any] = asdict(WORKLOADS[name])
        given = parse_arguments(Args, __doc__, replace(args, **own))
        named[name] = Workload(**{number: getattr(given, number) for number in numbers})
    return named


def figures_of(contestant: str, job: Job, args: Args) -> dict[str, Any]:
    """The figures of a contestant, or why there are none. Raises Failed where our recipe refuses its arguments: then so
    does this command."""
    if reason := reason_to_skip(contestant, job.workload.method):
        return {"skipped": reason}
    try:
        return measure(contestant, job, args.recipe_args, args.profile, args.minutes)
    except Failed as failure:
        if contestant == "ours" and failure.code == BAD_INPUT:
            raise
        return {"failed": str(failure), "log": str(failure.log)}
    except (MachineError, OSError, KeyError, ValueError) as error:  # it ended well, and its figures are not whole
        return {"failed": f"{type(error).__name__}: {error}", "log": str(job.folder / f"{contestant}.log")}


def save(folder: Path, machine: dict[str, Any], workloads: dict[str, Workload], raw: dict, results: dict) -> None:
    """Write what is measured so far."""
    facts = {name: {"workload": asdict(workloads[name]), "results": results[name], "steps": raw[name]} for name in raw}
    write_json(folder / "benchmark.json", {"command": sys.argv, "machine": machine, "workloads": facts})
    write_bytes(folder / "benchmark.md", page(machine, results, described(workloads)).encode())


def described(workloads: dict[str, Workload]) -> dict[str, str]:
    return {name: workload.described(read_card(workload.model)) for name, workload in workloads.items()}


def one_line(figures: dict[str, Any]) -> str:
    if "tokens_per_second" not in figures:
        kind = "skipped" if "skipped" in figures else "failed"
        return f"{kind}: {figures[kind]}"
    speed, memory = figures["tokens_per_second"]["median"], figures["memory_gib"]["reserved"]
    return f"{speed:,.0f} tokens/s, {memory:.2f} GiB, {figures['share_of_ceiling']:.0%} of the ceiling"


if __name__ == "__main__":
    run_command(main)
