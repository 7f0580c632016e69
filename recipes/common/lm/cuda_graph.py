"""Work on a CUDA GPU recorded once as a CUDA graph and replayed, where kernels take longer to start than to run."""

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.lm.hidden_states import last_hidden

if TYPE_CHECKING:
    from peft import PeftModel

RECORDED_TOKENS = 1024  # a larger batch keeps a GPU busy for longer than its kernels take to start
WARM_UP = 2  # runs before a recording: kernels are compiled and libraries allocate, which a recording may not


def record(work: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """What `work` does on the GPU, as a CUDA graph; `pool` is memory shared with graphs that never run beside it.

    `work` runs WARM_UP times and is then recorded, which does not run it. Raises RuntimeError where it waits for the
    GPU, or there is no memory left; streams and random numbers are then as they were.
    """
    here = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        for _ in range(WARM_UP):
            work()
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool):  # the first: to restore it on failure
            work()
    except RuntimeError:
        generator.graphsafe_set_state(random_state)  # the old state still waits for the end of the recording
        raise
    return graph


class Recording(NamedTuple):
    """A forward pass of one shape as a CUDA graph, and the memory that it works in."""

    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor  # (B, T), what a replay reads
    hidden: torch.Tensor  # (B, T, h), what it writes
    held: list[Any]  # what the model's modules held, such as a rotary cache, so that it is not freed


class RecordedPass:
    """`last_hidden` for scoring on a GPU: the kernels of each shape are recorded once, as a CUDA graph, then replayed.

    A pass starts some 2,000 kernels, and for a short text starting them takes longer than running them, see
    docs/results.md. A recording uses the adapter that was active when its shape was first seen, and reads the weights
    from their addresses: they may change in place, but not move. Batches of more than RECORDED_TOKENS, and all batches
    on a CPU, go to `last_hidden`; so does everything after the first pass that cannot be recorded, with a warning.
    """

    def __init__(self, model: "PeftModel") -> None:
        self.model = model
        self.recordings: dict[tuple[int, int], Recording] = {}
        self.can_record = True

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The hidden states (B, T, h) for `input_ids` (B, T); the next call overwrites them."""
        rows, columns = input_ids.shape
        shape = rows, columns + -columns % 64  # the fewer shapes, the fewer recordings
        short = input_ids.is_cuda and rows * shape[1] <= RECORDED_TOKENS
        if short and self.can_record and shape not in self.recordings:
            try:
                self.recordings[shape] = self.record(shape, input_ids.device)
            except RuntimeError as error:  # some operation waits for the GPU, or there is no memory left
                self.can_record = False
                reason = str(error.__context__ or error).splitlines()[0]
                warnings.warn(f"this model's pass cannot be recorded, so it is slower: {reason}", stacklevel=2)
        if shape not in self.recordings:
            return last_hidden(self.model, input_ids, attention_mask)
        recording = self.recordings[shape]
        recording.input_ids[:, :columns] = input_ids  # no token attends to what is right of it: no mask is needed
        recording.graph.replay()
        return recording.hidden[:, :columns]

    def record(self, shape: tuple[int, int], device: torch.device) -> Recording:
        """The pass over ids of this shape (B, T). Raises RuntimeError when a CUDA graph cannot hold it."""
        input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        hidden = input_ids  # until the pass has run

        def work() -> None:
            nonlocal hidden
            hidden = last_hidden(self.model, input_ids, None)

        was_training = self.model.training
        self.model.eval()  # nothing is compiled then
        pool = next((first.graph.pool() for first in self.recordings.values()), None)  # they never run side by side
        try:
            graph = record(work, pool)
        finally:
            self.model.train(was_training)
        values = [value for module in self.model.modules() for value in vars(module).values()]
        held = [copy.copy(value) if isinstance(value, list | dict) else value for value in values]
        return Recording(graph, input_ids, hidden, held)
