"""Peak memory, time and price of a run before it starts, from the model's sizes alone.

    make plan MODEL=qwen2.5-7b METHOD=sft                                what fits on cards of 8 to 141 GB
    make plan MODEL=qwen2.5-7b METHOD=grpo CARD=24GB                     the settings for one card, part by part
    make plan MODEL=qwen2.5-7b METHOD=sft CARD=h100 DATA=data_samples/sft.jsonl PRICE=2.5          hours and money
    make plan MODEL=qwen2.5-7b METHOD=dpo CARD=rtx4090 MAX_LENGTH=8192 LORA_R=64 LOAD_IN_4BIT=yes
    make plan MODEL=qwen2.5-72b METHOD=sft CARD=h100 GPUS=8 SHARDED=yes

Any argument of the recipe that changes memory or time may be given; it stays as it is, and the rest is chosen: the
fastest settings that fit and learn the same. `--fit auto` chooses likewise when a run starts. The card is one of those
that the planner knows, such as h100 or rtx4090, or its memory.

Times are an estimate: measured on an H200 and an H100, for other cards scaled by their data sheets. What GPUs exchange
is counted by the data sheets of their links.

Left out: full-parameter training, vLLM, images, a reward model with a base of its own.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from common.aliases import ELSEWHERE
from common.arguments import parse
from common.errors import InputError, run_command
from common.lm.hub import find_model
from common.memory_limits import memory_limit
from common.plan.devices import SIZES, Device, find_device, of_size
from common.plan.host import host_peak
from common.plan.memory import GIB
from common.plan.search import Plan, advice, least, measure, plan
from common.plan.shape import sizes_of
from common.plan.words import as_flag, unit, variables
from common.plan.workload import COUNTED, SAMPLING, recipe_defaults, settings
from common.run.screen import obey_no_text
from planning.alternatives import cell, larger_card, smaller_models
from planning.rows import Rows, count
from planning.scaling import scaling_words
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80
AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "max_prompt_length")
AT_LEAST_ONE += ("max_completion_length", "num_generations", "rollout_batch_size", "num_ppo_epochs", "lora_r")


@dataclass(frozen=True)
class Args:
    # What is planned.
    model: str = "qwen2.5-7b"
    """A model card's name (`make models`), or a local directory."""
    method: Literal["sft", "dpo", "kto", "grpo", "ppo", "reward"] = "sft"
    card: str | None = None
    """One card: its name, as h100 or rtx4090, or its memory, as 24GB. Without it all sizes."""
    gpus: int = 1
    """GPUs of one host, which divide the batch of a step."""
    sharded: bool = False
    """Divide weights, gradients and optimizer among the GPUs (FSDP2)."""
    data: str | None = None
    """A data file of the method: then hours."""
    price: float | None = None
    """Of one GPU for an hour: then money."""
    json: bool = False
    """Print the answer as JSON."""

    # Arguments of the recipe; those that are given stay.
    load_in_4bit: bool | None = None
    load_in_fp8: bool | None = None
    gradient_checkpointing: bool | None = None
    checkpoint_skip_layers: int | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    num_generations: int | None = None
    rollout_batch_size: int | None = None
    num_ppo_epochs: int | None = None
    num_iterations: int | None = None
    rollouts: Literal["auto", "graph", "vllm", "generate"] | None = None
    beta: float | None = None
    reward_model: str | None = None
    lora_r: int | None = None
    lora_target_modules: tuple[str, ...] | None = None
    packing: bool | None = None
    train_embeddings: bool | None = None
    precompute_ref_log_probs: bool | None = None
    eval_ratio: float | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None


@dataclass(frozen=True)
class Run:
    """How long a whole run takes."""

    rows: int
    tokens: int  # of the data, in one epoch
    counted: bool
    steps: int
    hours: float


def main() -> None:
    args = parse(Args, sys.argv[1:], "plan")
    base = find_model(args.model)
    sizes = sizes_of(base)
    if sizes is None:
        raise InputError(
            f"--model {args.model}: its sizes are not known here: there is no card of it and no config.json on this "
            "machine. `make models` lists the cards"
        )
    given = given_arguments(args)
    check(args, given)
    more = {"gpus": args.gpus, "sharded": args.sharded}
    rows = count(args.data, args.method, base) if args.data else None
    if rows and args.method == "reward":
        more["pairs"] = rows.pairs  # rated completions are one sequence a row
    devices = [find_device(args.card)] if args.card else [of_size(size) for size in SIZES]
    if args.card and args.load_in_fp8 and not devices[0].fp8:
        raise InputError(f"--load-in-fp8: {devices[0].name} has no fp8; Ada, Hopper and Blackwell have it")
    plans = [plan(sizes, args.method, device, given, **more) for device in devices]
    runs = [whole(one, rows, args, sizes, given) if rows else None for one in plans]
    if args.json:
        answer = [as_json(*one, args.price) for one in zip(plans, runs, strict=True)]
        for one in answer:
            one["main_memory_gib"] = {name: round(gib, 2) for name, gib in main_memory(plans[0], sizes, rows).items()}
        print(json.dumps({"model": base.name, "method": args.method, "plans": answer}, indent=2))
        return
    obey_no_text()
    console = Console(width=WIDTH, highlight=False, markup=False)
    console.print(Text.assemble((f"{args.method} of {base.name}", "bold"), several(args)))
    if args.card:
        one_card(console, plans[0], sizes, args, given)
    else:
        all_cards(console, plans, runs, sizes, args, given)
    if rows:
        about_data(console, plans, runs, rows, args)
    about_main_memory(console, main_memory(plans[0], sizes, rows))
    console.print("\nTimes are estimates, measured on an H200 and an H100, scaled by data sheets.")


def given_arguments(args: Args) -> dict[str, Any]:
    """The recipe's arguments that were given. Raises InputError for one that the recipe has not."""
    known = recipe_defaults(args.method)
    given = {name: value for name in COUNTED if (value := getattr(args, name, None)) is not None}
    for name in given:
        if name not in known:
            raise InputError(f"{as_flag(name, given[name])[0]}: `make {args.method}` has no such argument")
        if name in AT_LEAST_ONE and given[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {given[name]}: expected 1 or more")
    return given


def check(args: Args, given: dict[str, Any]) -> None:
    """Raise InputError for arguments that do not go together, as the recipe does."""
    if args.gpus < 1:
        raise InputError(f"--gpus {args.gpus}: expected 1 or more")
    if args.sharded and args.gpus == 1:
        raise InputError("--sharded divides the weights among GPUs: give --gpus 2 or more")
    if args.price is not None and args.price <= 0:
        raise InputError(f"--price {args.price:g}: expected more than 0")
    if args.price is not None and not args.data:
        raise InputError("--price is of hours, and those are of a data file: give --data")
    if args.num_train_epochs is not None and args.num_train_epochs <= 0:
        raise InputError(f"--num-train-epochs {args.num_train_epochs:g}: expected more than 0")
    if args.rollouts == "vllm":
        raise InputError("--rollouts=vllm is not planned, since vLLM takes its own share of the memory; plan with auto")
    if args.checkpoint_skip_layers is not None and args.checkpoint_skip_layers < 0:
        raise InputError(f"--checkpoint-skip-layers {args.checkpoint_skip_layers}: expected 0 or more")
    if args.load_in_fp8 and args.load_in_4bit:
        raise InputError("--load-in-4bit and --load-in-fp8 are two ways to store the base; give one of the two")
    if args.method == "grpo":
        values = recipe_defaults("grpo") | given
        completions = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
        if completions % values["num_generations"]:
            raise InputError(
                f"{completions} completions a step do not divide into groups of {values['num_generations']}: change "
                "--num-generations, --per-device-train-batch-size or --gradient-accumulation-steps"
            )


def several(args: Args) -> str:
    if args.gpus == 1:
        return ""
    text = f" on {args.gpus} GPUs, {'sharded (FSDP2)' if args.sharded else 'a copy of the model on each (DDP)'}"
    return text if runs_here(args) else f"{text}.\n`make {args.method}` cannot: {ELSEWHERE['sharded']}"


def runs_here(args: Args) -> bool:
    """Whether a recipe can use the GPUs so."""
    return args.method == "sft" or not args.sharded


def all_cards(
    console: Console, plans: list[Plan], runs: list[Run | None], sizes: Any, args: Args, given: dict[str, Any]
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    head = f"settings, {unit(plans[0].work)} x accumulation"
    for name, side in (("card", "right"), (head, "left"), ("peak", "right"), ("tokens/s", "right")):
        table.add_column(name, justify=side, no_wrap=name != head)
    if any(runs):
        table.add_column("time", justify="right", no_wrap=True)
        if args.price:
            table.add_column("price", justify="right", no_wrap=True)
    for size, one, run in zip(SIZES, plans, runs, strict=True):
        if not one.fits:
            table.add_row(f"{size} GB", "does not fit", f"{one.total:.1f} GiB", "", *([""] * len(table.columns[4:])))
            continue
        cells = [
            f"{size} GB",
            cell(one).replace(f" {unit(one.work)}", "", 1),
            f"{one.total:.1f} GiB",
            f"{one.time.tokens_per_second:,.0f}",
        ]
        if run:
            cells.append(duration(run.hours))
            cells += [f"{run.hours * args.gpus * args.price:,.2f}"] if args.price else []
        table.add_row(*cells)
    console.print(table)
    fitting = next((size for size, one in zip(SIZES, plans, strict=True) if one.fits), None)
    if fitting is None:
        for line in ("No card is enough. On the largest:", *others(sizes, args, plans[-1].device, given)):
            console.print(line, soft_wrap=True)
        return
    console.print(f"CARD={fitting}GB shows one card part by part, with its command.")
    console.print(f"make {args.method} FIT=auto chooses such settings for the GPU that it starts on.")


def one_card(console: Console, one: Plan, sizes: Any, args: Args, given: dict[str, Any]) -> None:
    device = one.device
    console.print(f"{device.name}: {device.gib:.1f} GiB to use, {device.tflops:g} TFLOP/s, {device.bandwidth:g} GB/s\n")
    shown = one
    if not one.fits:
        smallest = measure(sizes, least(one.work, given), device)
        console.print(f"Nothing fits: the smallest settings tried need {smallest.total:.1f} GiB, part by part:")
        shown = smallest
    parts = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    parts.add_column(justify="left")
    parts.add_column(justify="right")
    for part, gib in asdict(shown.memory).items():
        if gib >= 0.005:
            parts.add_row(part.replace("_", " "), f"{gib:.2f} GiB")
    parts.add_row("peak", f"{shown.total:.2f} GiB", style="bold")
    console.print(parts)
    if one.fits:
        seconds = f"{one.time.seconds:.2f} s a step"
        if one.time.sampling:
            seconds += f", {one.time.sampling:.2f} s of it sampling"
        console.print(f"\n{cell(one)} of {one.work.length} tokens")
        console.print(f"{seconds}, {one.time.tokens_per_second:,.0f} tokens/s")
        for line in scaling_words(one, sizes):
            console.print(line, soft_wrap=True)
        if runs_here(args):
            whole_command = {
                "model": args.model,
                "data": args.data,
                **given,
                **one.changed,
                "gpus": args.gpus if args.gpus > 1 else None,
                "sharded": args.sharded or None,
                "reward_model": args.reward_model or ("outputs/reward" if args.method == "ppo" else None),
            }
            words = variables({name: value for name, value in whole_command.items() if value is not None})
            console.print(f"\nmake {args.method} {words}", soft_wrap=True)
        return
    lines = [
        f"{variables(other.changed)}: {other.total:.1f} GiB"
        for other in advice(sizes, args.method, given, device, gpus=args.gpus, sharded=args.sharded)
    ]
    lines += others(sizes, args, device, given)
    console.print("\nThese would fit:" if lines else "\nNo card and no smaller model that is known here would do.")
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)


def others(sizes: Any, args: Args, device: Device, given: dict[str, Any]) -> list[str]:
    """Cards and models with which the run would fit, as variables of make."""
    more = {"gpus": args.gpus, "sharded": args.sharded}
    name = find_model(args.model).name
    models = smaller_models(name, sizes.parameters, args.method, device, given, **more)
    return [*larger_card(sizes, args.method, device, given, **more), *models]


def whole(one: Plan, rows: Rows, args: Args, sizes: Any, given: dict[str, Any]) -> Run:
    """The whole run of `one` on these rows: steps as the trainer counts them, of rows as long as the data's are."""
    values = settings(sizes, args.method, {**given, **one.changed})
    work = one.work
    cut = rows.cut(work.length - work.completion)  # GRPO and PPO: prompts
    trained = rows.count * (1 - values.get("eval_ratio", 0))  # rows of an epoch
    if args.method in SAMPLING:
        used = replace(work, length=round(sum(cut) / len(cut)) + work.completion)
        epoch = trained / max(1, work.generated * args.gpus // work.group)  # steps, the last one in part
    elif args.method == "sft" and values["packing"]:
        used, epoch = work, trained / rows.count * sum(cut) / (work.length * work.step_rows)
    else:
        padded = sum(cut) / rows.padded_share(work.length, work.sequences) / len(cut)
        used, epoch = replace(work, length=max(1, round(padded))), trained / work.step_rows
    seconds = measure(sizes, used, one.device).time.seconds
    if values["max_steps"] > 0:
        return Run(rows.count, sum(cut), rows.counted, values["max_steps"], values["max_steps"] * seconds / 3600)
    epochs = values["num_train_epochs"] * values.get("num_iterations", 1)
    counted = epoch if args.method == "ppo" else max(1, int(epoch)) if args.method == "grpo" else math.ceil(epoch)
    hours = epochs * (counted if args.method == "grpo" else epoch) * seconds / 3600  # GRPO leaves the rest out
    return Run(rows.count, sum(cut), rows.counted, max(1, math.ceil(epochs * counted)), hours)


def about_data(console: Console, plans: list[Plan], runs: list[Run | None], rows: Rows, args: Args) -> None:
    """What the times are of."""
    how = "by the model's tokenizer" if rows.counted else "estimated: its tokenizer is not here"
    total = sum(rows.lengths)
    console.print(f"\n{args.data}: {rows.count:,} rows, {total:,} tokens ({how})", soft_wrap=True)
    if args.card and runs[0] and plans[0].fits:
        run = runs[0]
        money = f", {run.hours * args.gpus * args.price:,.2f} at {args.price:g} a GPU hour" if args.price else ""
        time = duration(run.hours)
        console.print(f"{run.steps:,} steps, {time}{money}; loading and saving come on top.", soft_wrap=True)


def main_memory(one: Plan, sizes: Any, rows: Rows | None) -> dict[str, float]:
    """GiB of main memory that all processes of the run need together: with GPUs, and on the CPU alone."""
    tokens = sum(rows.lengths) if rows else 0
    beside = host_peak(sizes, one.work, True, tokens).total * one.work.gpus
    return {"with a GPU": beside, "on the CPU": host_peak(sizes, one.work, False, tokens).total}


def about_main_memory(console: Console, gib: dict[str, float]) -> None:
    """The main memory of the run, and what this machine has where that is less."""
    limit = memory_limit()
    words = f"Main memory: up to {gib['with a GPU']:.1f} GiB with a GPU, {gib['on the CPU']:.1f} on the CPU alone"
    if limit and limit[0] / GIB < gib["with a GPU"]:
        words += f"; this machine allows {limit[0] / GIB:.1f}: {limit[1]}"
    console.print(f"\n{words}.", soft_wrap=True)


def duration(hours: float) -> str:
    """Such as 40 s, 12 min or 3.4 h."""
    seconds = 3600 * hours
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{hours:,.1f} h"


def as_json(one: Plan, run: Run | None, price: float | None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "card": asdict(one.device),
        "fits": one.fits,
        "settings": {**asdict(one.work), "unit": unit(one.work)},
        "changed": one.changed,
        "peak_gib": round(one.total, 2),
        "parts_gib": {name: round(gib, 3) for name, gib in asdict(one.memory).items()},
        "seconds_a_step": round(one.time.seconds, 3),
        "sampling_seconds": round(one.time.sampling, 3),
        "exchange_seconds": round(one.time.exchange, 5),
        "tokens_per_second": round(one.time.tokens_per_second),
    }
    if run:
        answer["run"] = asdict(run) | ({"price": round(run.hours * one.work.gpus * price, 2)} if price else {})
    return answer


if __name__ == "__main__":
    run_command(main)
