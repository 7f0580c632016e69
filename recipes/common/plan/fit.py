"""`--fit auto`, and what to change where the GPU's memory is full: the planner for a run on this machine's GPU."""

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import PLAN_ADVICE, InputError, MachineError, spell
from common.plan.devices import DEVICES, Device, by_driver_name
from common.plan.host import check_host, host_peak
from common.plan.memory import CUDA_CONTEXT, GIB
from common.plan.search import BATCH, Plan, advice, device_with, fit, measure, plan
from common.plan.shape import sizes_of
from common.plan.words import arguments, setting_words
from common.plan.workload import COUNTED, workload
from common.run.ranks import batch_of_rank, local_world_size, of_first, world_size
from common.run.screen import console

if TYPE_CHECKING:
    from common.lm.hub import Model
    from common.run.folder import Run

Args = TypeVar("Args")

KEPT_LAYERS = "UNSLOTH_GC_KEEP_LAYERS"  # Unsloth's variable for --checkpoint-skip-layers
BY_MICRO_BATCH = {"bco_pair", "aot", "aot_unpaired", "bnpo", "sft"}  # losses over the rows of a micro-batch


def check_fit(args: Any) -> None:
    """Raise InputError for a --fit or --checkpoint-skip-layers that the other arguments of a recipe rule out."""
    skipped = getattr(args, "checkpoint_skip_layers", 0)
    if skipped < 0:
        raise InputError(f"--checkpoint-skip-layers={skipped}: give 0 or more")
    if skipped and not args.gradient_checkpointing:
        raise InputError("--checkpoint-skip-layers: with --no-gradient-checkpointing every layer keeps its activations")
    if getattr(args, "sharded", False):
        check_sharded(args)
    if getattr(args, "fit", "off") == "off":
        return
    if (own := os.environ.get(KEPT_LAYERS, "0")) not in ("", "0"):
        raise InputError(f"--fit=auto chooses what is recomputed, and {KEPT_LAYERS}={own} does; unset the variable")
    if not getattr(args, "use_peft", True):
        raise InputError(
            "--fit=auto plans a LoRA adapter, and --no-use-peft trains every weight; leave one of the two out"
        )
    if getattr(args, "rollouts", "") == "vllm":
        raise InputError("--fit=auto does not count the memory of --rollouts=vllm; leave one of the two out")


def check_sharded(args: Any) -> None:
    """Raise InputError for --sharded in one process, or with what cannot be divided."""
    if world_size() == 1:
        raise InputError("--sharded divides the model among several GPUs: give GPUS=2 or more, or leave it out")
    for name in ("load_in_fp8", "train_embeddings"):
        if getattr(args, name, False):
            raise InputError(
                f"--sharded does not divide what --{name.replace('_', '-')} makes; leave one of the two out"
            )


def fit_to_gpu(mode: str, args: Args, method: str, base: "Model", origins: Mapping[str, str], run: "Run") -> Args:
    """`args` with the precision, recomputation and micro-batch that are the fastest on this GPU; as they are with off.

    What is learned stays the same but for the precision of the base: the batch of a step, lengths and learning rates
    stay, and so does every argument from the command line. The choice is in run.json, and a resumed run keeps it.
    A micro-batch that --oom=retry made smaller is in it too. Raises MachineError where no settings fit.

    Of several ranks each gets its share of the batch. Raises InputError where the batch does not divide among them.
    """
    smaller = run.record.get("micro_batch", {})
    run.record["ranks"] = world_size()
    values: Any = args
    check_main_memory(base, method, values)
    args = of_rank(replace(values, **smaller), method)
    if mode == "off":
        return args
    import torch

    if not torch.cuda.is_available():
        say("--fit=auto does nothing without a GPU: the settings stay as they are.")
        return args
    chosen = run.record.get("fit")
    if chosen is None:
        sizes = sizes_of(base)
        if sizes is None:
            say(f"--fit=auto does nothing for {base.name}: its sizes are not known before it is loaded.")
            return args
        given = {name: getattr(values, name) for name in COUNTED if hasattr(values, name)}
        fixed = {name for name, origin in origins.items() if origin == "command line"} | of_the_batch(method, values)
        device = this_gpu()
        found = choose(sizes, method, given, fixed, device, **ranks_of(values))
        say(why(sizes, method, given, found, device, **ranks_of(values)))
        chosen = of_first(found.changed)
        run.update(fit=chosen)
    fitted = replace(values, **{**chosen, **smaller})
    PLAN_ADVICE[:] = [functools.partial(where_it_fits, base, method, fitted)]
    return of_rank(fitted, method)


def check_main_memory(base: "Model", method: str, args: Any) -> None:
    """Print a warning where the main memory may be too small for the model. Raises MachineError where it is."""
    import torch

    if (sizes := sizes_of(base)) is None:
        return
    # With the program and the data, before the model; without pages of mapped files, as of a dataset on disk, which the
    # system takes back.
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    given = {name: getattr(args, name) for name in COUNTED if hasattr(args, name)}
    needs = host_peak(
        sizes,
        workload(sizes, method, given, **ranks_of(args)),
        torch.cuda.is_available(),
        program=(resident - of_files) * os.sysconf("SC_PAGE_SIZE"),
        use_peft=getattr(args, "use_peft", True),
        weight=2 if getattr(args, "dtype", "auto") in ("bfloat16", "float16") else 4,
    )
    if warning := check_host(needs, local_world_size()):
        say(warning)


def ranks_of(args: Any) -> dict[str, Any]:
    """How many GPUs this run has and whether they share the weights, as fields of Workload."""
    return {"gpus": world_size(), "sharded": getattr(args, "sharded", False)}


def of_rank(args: Any, method: str) -> Any:
    """`args` with the share that each rank has of a step's batch, which stays what one process would take.

    PPO divides each of its minibatches itself. Raises InputError where the batch does not divide among the ranks.
    """
    if world_size() == 1 or method == "ppo":
        return args
    keep_rows = bool({*BY_MICRO_BATCH, "kto"} & losses_of(args))
    rows, accumulation = (getattr(args, name) for name in BATCH)
    shares = batch_of_rank(rows, accumulation, world_size(), keep_rows)
    return replace(args, **dict(zip(BATCH, shares, strict=True)))


def losses_of(args: Any) -> set[str]:
    """The names that --loss-type gives."""
    losses = getattr(args, "loss_type", ())
    return set(losses if isinstance(losses, list | tuple) else (losses,))


def of_the_batch(method: str, args: Any) -> set[str]:
    """The arguments of the batch, where another micro-batch would learn something else; else nothing."""
    # share_prompts needs the completions of a group side by side
    return set(BATCH) if BY_MICRO_BATCH & losses_of(args) or (method == "grpo" and args.share_prompts) else set()


def say(text: str) -> None:
    console().print(spell(text), highlight=False, markup=False, soft_wrap=True)


def choose(sizes: Any, method: str, given: dict[str, Any], fixed: set[str], device: Device, **more: Any) -> Plan:
    """The fastest settings for `given` on `device` that leave the arguments `fixed` alone; `more` are of Workload.

    Raises MachineError.
    """
    found = fit(sizes, method, device, given, fixed=fixed, **more)
    if found is None:
        smallest = plan(sizes, method, device, given, fixed=fixed, **more)
        if smallest.fits:
            cure = f"{arguments(smallest.changed)} would need {smallest.total:.1f}"
        else:
            cure = f"the least is {smallest.total:.1f}; take a larger GPU or a smaller model"
            if method == "sft" and more.get("gpus", 1) > 1 and not more.get("sharded"):
                cure += ", or divide the model among the GPUs with --sharded"
        raise MachineError(f"--fit=auto: nothing that learns the same fits into {device.gib:.1f} GiB: {cure}.")
    return found


def why(sizes: Any, method: str, given: dict[str, Any], found: Plan, device: Device, **more: Any) -> str:
    """The choice and its reason, in one line."""
    before = measure(sizes, workload(sizes, method, given, **more), device)
    text = f"--fit=auto: {setting_words(found.work)}: {found.total:.1f} of {device.gib:.1f} GiB"
    if not found.changed:
        return f"{text}, as it was: the fastest that fits."
    gain = found.time.tokens_per_second / before.time.tokens_per_second
    if not before.fits:
        return f"{text}; as it was, {setting_words(before.work)}, it takes {before.total:.1f} GiB."
    return f"{text}, about {gain:.2f} times as fast as {setting_words(before.work)} ({before.total:.1f} GiB)."


def this_gpu() -> Device:
    """The current GPU with the memory that this process can have of it now; torch is imported already."""
    import torch

    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    limit = properties.total_memory * torch.cuda.get_per_process_memory_fraction()
    free, _ = torch.cuda.mem_get_info()
    mine = torch.cuda.memory_reserved()
    # Of several processes each must choose the same: the whole card counts, not what is free at this moment. What is
    # free is without the CUDA context of this process, which a plan counts.
    usable = limit if world_size() > 1 else min(limit, free + mine + CUDA_CONTEXT)
    known = by_driver_name(properties.name)
    return device_with(usable / GIB, known or DEVICES["a100"])


def where_it_fits(base: "Model", method: str, args: Any) -> str:
    """What to change where the GPU's memory is full: settings that would have fit, with what each needs."""
    sizes = sizes_of(base)
    if sizes is None or not getattr(args, "use_peft", True) or getattr(args, "rollouts", "") == "vllm":
        return ""  # not planned
    given = {name: value for name, value in asdict(args).items() if name in COUNTED}
    device = this_gpu()
    more = ranks_of(args)
    now = measure(sizes, workload(sizes, method, given, **more), device)
    lines = [f"The plan for these settings: {now.total:.1f} GiB, of {device.gib:.1f} that this run could have."]
    if now.fits:  # then the plan is wrong, or another program took memory
        lines = [f"{lines[0]} Another program may have taken memory since; nvidia-smi shows it."]
        device = replace(device, gib=0.9 * now.total)
    if found := advice(sizes, method, given, device, of_the_batch(method, args), **more):
        lines.append("These would have fit:")
        lines += [f"  {arguments(one.changed)}  ({one.total:.1f} GiB)" for one in found]
    else:
        lines.append("No settings for this model and method fit; take a larger GPU or a smaller model.")
    return "\n".join(lines)
