"""Work on a CUDA GPU recorded once as a CUDA graph and replayed, where kernels take longer to start than to run."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from common.run.ranks import is_first, rank
from common.run.screen import console

if TYPE_CHECKING:
    from peft import PeftModel

WARM_UP = 2  # runs before a recording: kernels are compiled and libraries allocate, which a recording may not

# Bytes that only recordings can use, of the memory that each pool has.
HELD: "weakref.WeakKeyDictionary[torch.cuda.MemPool, int]" = weakref.WeakKeyDictionary()

STREAMS = 32  # that torch makes for a GPU; torch.cuda.Stream() gives one after the other, again and again
IN_USE: set[int] = set()  # of these the ones that graphs are recorded on
OF_POOL: "weakref.WeakKeyDictionary[torch.cuda.MemPool, torch.cuda.Stream]" = weakref.WeakKeyDictionary()
# Recordings that could not be made in a pool.
FAILED: "weakref.WeakKeyDictionary[torch.cuda.MemPool, list[torch.cuda.CUDAGraph]]" = weakref.WeakKeyDictionary()


def record(
    work: Callable[[], object],
    stream: torch.cuda.Stream,
    pool: Any = None,
    changed: Sequence[Tensor] = (),
    most: int | None = None,
) -> torch.cuda.CUDAGraph:
    """What `work` does on the GPU, as a CUDA graph, recorded on `stream`, which is one of `own_stream`.

    `pool` is memory shared with graphs that never run beside it. `work` runs WARM_UP times and is then recorded, which
    does not run it; the tensors `changed` are then put back. Raises RuntimeError where it waits for the GPU, there is
    no memory left, or the process has taken more than `most` bytes of it; streams and random numbers are then as they
    were.
    """
    here = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    kept = [tensor.clone() for tensor in changed]
    graph = torch.cuda.CUDAGraph()
    try:
        with beside(stream, pool):
            for _ in range(WARM_UP):
                work()
        if most is not None and (taken := torch.cuda.max_memory_reserved()) > most:
            raise RuntimeError(f"the process holds {taken / 2**30:.1f} GiB, more than {most / 2**30:.1f}")
        which: Any = pool.id if isinstance(pool, torch.cuda.MemPool) else pool
        with torch.cuda.stream(here), torch.cuda.graph(graph, which, stream):  # the first: to restore it
            work()
    except RuntimeError:
        generator.graphsafe_set_state(random_state)  # the old state still waits for the end of the recording
        if isinstance(pool, torch.cuda.MemPool):  # its end would free the workspace of the others, see `own_stream`
            FAILED.setdefault(pool, []).append(graph)
        raise
    finally:
        for tensor, old in zip(changed, kept, strict=True):
            tensor.copy_(old)
    return graph


@contextmanager
def beside(stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Work as a recording does: on the stream that records, and where it is a MemPool in the memory `pool`.

    What such a pool has had for a pass is then there for the recording, in place of a second time.
    """
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    within = torch.cuda.use_mem_pool(pool) if isinstance(pool, torch.cuda.MemPool) else nullcontext()
    with torch.cuda.stream(stream), within:
        yield
    here.wait_stream(stream)


def own_stream(owner: object) -> torch.cuda.Stream:
    """A stream to record the graphs of `owner` on, which nothing else records on while it lives.

    The graphs of a stream share a workspace of cuBLAS, and torch 2.13 frees it as soon as one of them ends: a replay of
    the others would then work in memory that may be gone (pytorch issue 193402). So graphs that do not end together
    need streams of their own. Raises RuntimeError where there are more owners than streams.
    """
    for number in range(2 * STREAMS):
        if number == STREAMS:
            gc.collect()  # owners that nothing holds any more, but each other
        stream = torch.cuda.Stream()
        if stream.cuda_stream not in IN_USE:
            IN_USE.add(stream.cuda_stream)
            weakref.finalize(owner, IN_USE.discard, stream.cuda_stream)
            return stream
    raise RuntimeError(f"{len(IN_USE)} owners of CUDA graphs have taken every stream of this GPU")


def stream_of(pool: torch.cuda.MemPool) -> torch.cuda.Stream:
    """The stream of all recordings in `pool`: memory that one stream has had there is no other's."""
    if pool not in OF_POOL:
        OF_POOL[pool] = own_stream(pool)
    return OF_POOL[pool]


def say_not_recorded(name: str, error: RuntimeError) -> None:
    """Print that the work `name` runs without a graph from now on, and why; a rank but the first one on stderr."""
    reason = str(error.__context__ or error).partition("\n")[0]
    line = f"{name} cannot be recorded, so it is slower: {reason}"
    if is_first():
        console().print(line, soft_wrap=True)
    else:  # all ranks wait for it
        print(f"Rank {rank()}: {line}", file=sys.stderr)


class Recording(NamedTuple):
    """Work over inputs of some shapes as a CUDA graph, and the memory that it works in."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # what a replay reads
    outputs: list[Tensor]  # what it writes
    held: list[Any]  # what the model's modules held, such as a rotary cache, so that it is not freed


class Recorded:
    """`work`, which maps tensors to tensors by `model`: recorded once for each shape of its inputs, then replayed.

    The first work of a shape runs as it is, the second is recorded. A recording uses the adapter that was active then,
    and reads the weights from their addresses: they may change in place, but not move. After the first work that cannot
    be recorded nothing more is, which is printed.

    Args:
        name: of the work, for that line.
        changed: the tensors that `work` changes besides, such as gradients, which it adds to in place.
        pool: memory shared with recordings that never run beside these; by default of its own.
        most: bytes that the process may have taken, so that the rest is left to what is not recorded.
    """

    def __init__(
        self,
        model: "PeftModel",
        work: Callable[..., Sequence[Tensor]],
        name: str,
        changed: Sequence[Tensor] = (),
        pool: torch.cuda.MemPool | None = None,
        most: int | None = None,
    ) -> None:
        self.model = model
        self.work = work
        self.name = name
        self.changed = changed
        self.pool = pool
        self.most = most
        self.seen: set[tuple[torch.Size, ...]] = set()
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}
        self.can_record = True

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The outputs; the next call overwrites them, also one of recordings in the same pool."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if self.can_record and shapes not in self.recordings:
            try:
                self._prepare(shapes, inputs)
            except RuntimeError as error:  # some operation waits for the GPU, or no memory or no stream is left
                self.can_record = False
                say_not_recorded(self.name, error)
        if shapes in self.recordings:
            recording = self.recordings[shapes]
            for static, tensor in zip(recording.inputs, inputs, strict=True):
                static.copy_(tensor)
            recording.graph.replay()
            return recording.outputs
        if self.pool is None or not self.can_record:
            return self.work(*inputs)
        self.seen.add(shapes)
        with beside(stream_of(self.pool), self.pool):
            return self.work(*inputs)

    def _prepare(self, shapes: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> None:
        """Record these shapes if they have been seen before; else see to it that there is a stream to do so later."""
        if self.pool is None:
            self.pool = torch.cuda.MemPool()
        stream_of(self.pool)
        if shapes in self.seen:
            self.recordings[shapes] = self.record(inputs)

    def record(self, inputs: Sequence[Tensor]) -> Recording:
        """The work over inputs of these shapes. Raises RuntimeError when a CUDA graph cannot hold it."""
        static = [tensor.clone() for tensor in inputs]
        outputs: list[Tensor] = []

        def work() -> None:
            results = self.work(*static)
            if not outputs:
                outputs.extend(torch.empty_like(result) for result in results)
            for output, result in zip(outputs, results, strict=True):
                output.copy_(result)

        assert self.pool is not None
        graph = record(work, stream_of(self.pool), self.pool, self.changed, self.most)
        HELD[self.pool] = sum(one["total_size"] - one["allocated_size"] for one in self.pool.snapshot(False))
        values = [value for module in self.model.modules() for value in vars(module).values()]
        held = [copy.copy(value) if isinstance(value, list | dict) else value for value in values]
        return Recording(graph, static, outputs, held)
