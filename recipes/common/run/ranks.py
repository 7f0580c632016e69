"""The processes of a run, one for each GPU, on one machine or several: which one this is, and what they exchange.

The launcher, torchrun or Slurm set RANK, WORLD_SIZE and LOCAL_RANK in each. A run in one process has none of them: then
everything here is immediate, opens no process group and imports no torch.

Objects, and the signs that all have arrived, go by gloo between processors; tensors go by the backend of their device,
NCCL between GPUs. So a rank that is missing is named before NCCL waits for it.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import InputError, MachineError, one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = 1800.0  # seconds for a rank to arrive, as gloo's own: preparing long data or a checkpoint takes minutes
VARIABLE = "RANKS_TIMEOUT"  # seconds, in place of PATIENCE
# What gloo, NCCL and the store write when the other end of a connection is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL error")
LOST += ("Timed out waiting", "Watchdog caught collective operation timeout")


def rank() -> int:
    """The number of this process among all of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the run has, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes the run has on this machine; without torchrun's LOCAL_WORLD_SIZE all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_first() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return rank() == 0


def use_own_gpu() -> None:
    """Have this process use its own GPU as soon as anything uses one; nothing with one process. Imports torch.

    Call it before Unsloth is imported, which computes something then: without this, every rank would open a context on
    the first GPU of its machine, 0.7 GiB.
    """
    if world_size() > 1:
        import torch

        # Not now: Unsloth sets what the allocator reads when it starts.
        torch.cuda._lazy_call(lambda: torch.cuda.set_device(local_rank() % torch.cuda.device_count()))


def join() -> None:
    """Open the process group, with this process on its own GPU; nothing with one process, or when it is open.

    The functions below do it themselves. Call it before something else opens the group, as a trainer does.
    """
    if world_size() > 1:
        _by_gloo()


def barrier(what: str = "a barrier") -> None:
    """Return when every rank has called it.

    Args:
        what: where they meet, for the message.

    Raises MachineError, which names the ranks that did not arrive in RANKS_TIMEOUT seconds, by default 30 minutes.
    """
    if world_size() > 1:
        _meet(what)


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, in the order of the ranks, in all of them. Raises MachineError as `barrier`."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    _meet("an exchange of values")
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_by_gloo())
    return values


def of_first(value: T) -> T:
    """The `value` of rank 0, in all ranks. Raises MachineError as `barrier`."""
    if world_size() == 1:
        return value
    from torch import distributed

    _meet("a value of rank 0")
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_by_gloo())
    return values[0]


def sum_over_ranks(tensor: "Tensor") -> "Tensor":
    """The sum of `tensor` over all ranks, of its shape and dtype, on its device; with one process `tensor` itself."""
    if world_size() == 1:
        return tensor
    from torch import distributed

    join()
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total


def share(items: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The contiguous part of `items` that belongs to `rank`.

    The parts of all ranks one after the other are `items`, so what `gather_objects` returns for them is in the order of
    the items. Their lengths differ by one at most; the first ranks have the longer ones.
    """
    size, longer = divmod(len(items), world_size)
    start = rank * size + min(rank, longer)
    return list(items[start : start + size + (rank < longer)])


def batch_of_rank(rows: int, accumulation: int, ranks: int, keep_rows: bool = False) -> tuple[int, int]:
    """Rows of a micro-batch and accumulation steps of each rank, which together make the batch of one process.

    The accumulation is divided, or where it does not divide, the micro-batch. Raises InputError where neither does;
    with `keep_rows`, for a loss that depends on the rows of a micro-batch, where the accumulation does not.
    """
    if accumulation % ranks == 0:
        return rows, accumulation // ranks
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0 and rows * accumulation % (size * ranks) == 0]
    if sizes and not keep_rows:
        return sizes[0], rows * accumulation // (sizes[0] * ranks)
    why = " (its loss depends on the rows of a micro-batch, which must stay)" if keep_rows and sizes else ""
    raise InputError(
        f"--gradient-accumulation-steps={accumulation} with --per-device-train-batch-size={rows}: the "
        f"{rows * accumulation} rows of a step do not divide among {ranks} GPUs{why}; give "
        f"--gradient-accumulation-steps={-(-accumulation // ranks) * ranks}, a larger batch, or another number of GPUs"
    )


@contextmanager
def first_of_machine_alone() -> Iterator[None]:
    """Within the block the first process of each machine is alone; the others enter when it has left.

    For what is made once and then found: a download, a cache.
    """
    if local_rank() > 0:
        barrier("the first process of a machine")
    yield
    if local_rank() == 0:
        barrier("the first process of a machine")


def reached(step: int) -> None:
    """Record that this rank has done `step`. Where the next one takes long, a thread prints which ranks are behind.

    A rank that waits in NCCL for another one can print nothing itself, and after RANKS_TIMEOUT is ended without a word
    on who was missing.
    """
    if world_size() == 1:
        return
    _by_gloo()
    _watch().reached(step)


class _Watch:
    """How far each rank is, in the store by which they met; a thread that reads it when this one does not get on."""

    def __init__(self) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        # A connection of its own, for the thread.
        self.store = _get_default_store().clone()  # pyrefly: ignore[missing-attribute]  not in torch's stubs
        self.done, self.since, self.shown = -1, time.monotonic(), False
        self.host = socket.gethostname()
        self.reached(0)
        threading.Thread(target=self._look, daemon=True).start()

    def reached(self, step: int) -> None:
        self.store.set(f"reached/{rank()}", f"{step} {self.host}")
        self.done, self.since, self.shown = step, time.monotonic(), False

    def _look(self) -> None:
        patience = _patience().total_seconds()
        while True:
            time.sleep(min(5, patience / 8))
            waited = time.monotonic() - self.since
            if waited > patience / 2 and not self.shown:
                self.shown = True
                os.write(2, f"{self._behind(waited)}\n".encode())

    def _behind(self, waited: float) -> str:
        others = {other: f"reached/{other}" for other in range(world_size()) if other != rank()}
        seen = {other: self.store.get(key).decode() for other, key in others.items() if self.store.check([key])}
        texts = [f"rank {other} on {text.split()[1]} after step {text.split()[0]}" for other, text in seen.items()]
        texts += [f"rank {other} not there" for other in others if other not in seen]
        return (
            f"Rank {rank()} of {world_size()} has been in the step after step {self.done} for {waited:.0f} s, and ends "
            f"after {_patience().total_seconds():.0f} s ({VARIABLE}): {'; '.join(texts)}."
        )


def peer_lost(error: BaseException) -> bool:
    """Is this the error of an exchange with a rank that has ended?"""
    text = str(error)
    return world_size() > 1 and isinstance(error, RuntimeError) and any(words in text for words in LOST)


def _meet(what: str) -> None:
    from torch import distributed

    group = _by_gloo()
    try:
        distributed.monitored_barrier(group, timeout=_patience(), wait_all_ranks=True)
    except RuntimeError as error:
        raise MachineError(
            f"Rank {rank()} of {world_size()}, on {socket.gethostname()}, waited at {what} for {_missing(error)}: it "
            f"ended, or took longer than {_patience().total_seconds():.0f} s. {VARIABLE}=SECONDS gives it longer."
        ) from error


def _missing(error: RuntimeError) -> str:
    """Who did not come, by gloo's words: rank 0 lists the ranks that it waited for, and all others waited for it."""
    text = str(error)
    if rank() == 0 and "Ranks " in text:  # "Ranks 1, 3 failed to pass monitoredBarrier in 1000 ms"
        return f"rank {text.partition('Ranks ')[2].partition(' failed')[0]}"
    return "rank 0" if rank() else f"another rank ({one_line(error)})"


def _patience() -> timedelta:
    return timedelta(seconds=float(os.environ.get(VARIABLE) or PATIENCE))


@cache
def _watch() -> _Watch:
    return _Watch()


@cache
def _by_gloo() -> Any:
    """The group for objects and barriers, of all ranks; the default group, for tensors, is open with it."""
    import torch
    from torch import distributed

    use_own_gpu()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.init()
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_patience())
    return distributed.new_group(backend="gloo", timeout=_patience())
