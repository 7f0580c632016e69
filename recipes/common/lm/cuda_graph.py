"""A model's forward pass recorded as a CUDA graph, for short batches whose kernels take longer to start than to run."""

import copy
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.lm.hidden_states import last_hidden

if TYPE_CHECKING:
    from peft import PeftModel

RECORDED_TOKENS = 1024  # a larger batch keeps a GPU busy for longer than its kernels take to start


class Recording(NamedTuple):
    """One shape's pass as a CUDA graph, and the memory that it works in."""

    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor  # (B, T), what a replay reads
    hidden: torch.Tensor  # (B, T, h), what it writes
    held: list[Any]  # what the model's modules held, such as a rotary cache, lest they free it for a larger one


class RecordedPass:
    """`last_hidden` for scoring on a GPU: each shape's kernels are recorded once, as a CUDA graph, then replayed.

    A pass starts some 2,000 kernels, and for a short text starting them takes longer than running them (RESULTS.md has
    the times). A recording is of the adapter that was active when a shape was first seen, and reads the weights where
    they lie: they may change in place, but not move. A batch of more than RECORDED_TOKENS, and any on a CPU, is passed
    on to `last_hidden`; so is all from the first that cannot be recorded, with a warning.
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
        recording.input_ids[:, :columns] = input_ids  # what stands to the right of it no token sees: no mask is needed
        recording.graph.replay()
        return recording.hidden[:, :columns]

    def record(self, shape: tuple[int, int], device: torch.device) -> Recording:
        """The pass over ids of this shape (B, T). Raises RuntimeError when it does what a CUDA graph cannot."""
        input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        was_training = self.model.training
        self.model.eval()  # nothing is compiled then
        here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        generator = torch.cuda.default_generators[device.index]
        random_state = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        pool = next((first.graph.pool() for first in self.recordings.values()), None)  # they never run side by side
        try:
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(3):  # as torch's notes on CUDA graphs ask: libraries allocate and choose in these
                    last_hidden(self.model, input_ids, None)
            here.wait_stream(aside)
            with torch.cuda.stream(here), torch.cuda.graph(graph, pool):  # the first is for a failure to come back to
                hidden = last_hidden(self.model, input_ids, None)
        except RuntimeError:
            generator.graphsafe_set_state(random_state)  # the old one still waits for the recording's end
            raise
        finally:
            self.model.train(was_training)
        values = [value for module in self.model.modules() for value in vars(module).values()]
        held = [copy.copy(value) if isinstance(value, list | dict) else value for value in values]
        return Recording(graph, input_ids, hidden, held)
