"""The peak of main memory (RAM) of a run, part by part, from a model's sizes; and whether this machine has so much.

On a CPU the weights are in main memory, in 32 bit unless --dtype says 16, and so is all that is computed. With a GPU
the main memory holds the program, the data, and what Unsloth offloads of the activations; the pages of the weights'
files, which pass through it, are the system's to take back and are not counted. tests/common/plan/test_host.py compares
the plan with measured runs on CPUs, in 32 bit; with a GPU it was not measured.

Standard library only, as memory.py.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from common.errors import MachineError
from common.memory_limits import free_memory, memory_limit, swap
from common.plan.memory import GIB, OFFLOADED_FROM, activation_bytes, trained_bytes
from common.plan.workload import Workload

PROGRAM, PROGRAM_GPU = 0.8 * GIB, 3.0 * GIB  # Python, torch and what else is imported; the second is assumed
DATA_TOKEN = 100  # bytes for a token of the data, while the lists of its numbers become the trainer's dataset; measured
# A CPU has none of the fused kernels that the plan for a GPU counts on, so more is kept for the backward pass.
NOT_FUSED = 1.4
LOGITS = 3  # tensors of all logits at once, in 32 bit


@dataclass(frozen=True)
class HostMemory:
    """The peak of the main memory of one process, part by part, in GiB."""

    program: float
    weights: float  # of the base
    training: float  # weights of the adapter or of the model that are trained, their gradients, Adam's two moments
    activations: float  # with the logits; with a GPU those that are offloaded
    data: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def host_peak(
    card: Any,
    work: Workload,
    on_gpu: bool,
    tokens: int = 0,
    program: float | None = None,
    use_peft: bool = True,
    weight: int = 4,
) -> HostMemory:
    """The peak of a process of `work`. `tokens` are those of the data; `program`, in bytes, is what it has already,
    with the data; without it what recipes take. On a CPU each weight of the base takes `weight` bytes."""
    shape = card.architecture
    adapter, gradients, optimizer = trained_bytes(shape, work)
    if on_gpu:
        offloaded = work.gradient_checkpointing and work.length >= OFFLOADED_FROM and not work.train_embeddings
        parts = (
            0.0,
            adapter if use_peft else card.parameters * 2.0,  # copied to be saved
            (shape.layers - work.kept_layers) * work.tokens * shape.hidden_size * 2.0 if offloaded else 0.0,
        )
    else:
        reward = work.method == "reward"  # on a CPU it keeps every layer; measured
        kept, backward = activation_bytes(shape, replace(work, gradient_checkpointing=False) if reward else work)
        logits = 0 if reward else LOGITS * 4 * work.tokens * shape.vocab_size
        whole = 3.0 * weight * card.parameters  # gradients and two moments, of the weights' type
        parts = (
            1.0 * weight * card.parameters,
            adapter + gradients + 4 * optimizer if use_peft else whole,
            2 * NOT_FUSED * (kept + backward) + logits,
        )
    start = program if program is not None else PROGRAM_GPU if on_gpu else PROGRAM
    data = 0 if program is not None else DATA_TOKEN * tokens
    return HostMemory(*(part / GIB for part in (start, *parts, data)))


def check_host(needs: HostMemory, processes: int = 1) -> str:
    """A line of warning where this machine has less than is needed whatever the rows are, "" where all is well.

    `needs` is of a process that has its program already; `processes` are those of this machine, of which with a GPU
    (no weights here) one saves. Raises MachineError where it is over the limit of the machine with its swap, the
    container or the job, which would end the run without a word.
    """
    trained = processes if needs.weights else 1
    least = (needs.program + needs.weights) * processes + needs.training * trained
    each = f"for each of {processes} processes " if processes > 1 else ""
    plan = (
        f"The plan for the main memory: at least {least:.1f} GiB ({each}program {needs.program:.1f}, weights "
        f"{needs.weights:.1f}, training {needs.training:.1f}; activations come on top)"
    )
    limit, free = memory_limit(), free_memory()
    if limit and least * GIB > limit[0] + swap():
        raise MachineError(
            f"{plan}, and the limit is {limit[0] / GIB:.1f}: {limit[1]}. Raise it, or take a smaller model."
        )
    if free and (least - needs.program * processes) * GIB > free[0]:
        return (
            f"{plan}, where {free[0] / GIB:.1f} more can be had: {free[1]}. If it is full, the system may end the run "
            "without a word."
        )
    return ""
