"""A scalar head on a language model's hidden states: what turns a causal model into a reward model or a critic.

The head is a linear map in 32 bit, kept outside the model, so that one frozen base can carry several: each with an
adapter of its own, switched on before the hidden states are taken. Beside its adapter a head is two files:
head.safetensors (weight and bias) and head.json (the facts about it).
"""

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from .errors import InputError
from .record import write_json

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, FACTS = "head.safetensors", "head.json"
RECORDED_TOKENS = 1024  # a larger batch keeps a GPU busy for longer than its kernels take to start


def new_head(hidden_size: int, device: torch.device | str) -> torch.nn.Linear:
    """A head whose every output is 0: weight (1, h) and bias (1,) are zeros in float32, on `device`.

    From zero the first Bradley-Terry loss is ln 2, the first value is 0, and no random number is drawn; weight and
    adapter still learn, for the gradient of the weight is the hidden state itself.
    """
    head = torch.nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def last_hidden(model: "PeftModel", input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The hidden states (B, T, h) after the final norm, with the adapter that is active; no logits are computed.

    `input_ids` and `attention_mask` are (B, T), padded on the right: Unsloth's GPU path drops the mask in train mode,
    and on the right no token can see the padding. The states at padding mean nothing.
    """
    causal = model.get_base_model()
    # The backbone is asked by itself, past the forward that accelerate wraps in autocast. Without autocast LoRA layers,
    # whose weights are 32 bit, compute in 32 bit on a GPU.
    with torch.autocast(input_ids.device.type, dtype=causal.dtype, enabled=input_ids.is_cuda):
        return causal.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


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


def apply_head(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The head's outputs (...) for hidden states (..., h), in float32 whatever autocast says around it."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())[..., 0]


def pad_right(
    rows: list[list[int]], pad_token_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as `input_ids` and `attention_mask`, both (B, T) int64."""
    longest = max(map(len, rows))
    padded = [row + [pad_token_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def at_last_token(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Of `values` (B, T, ...), padded on the right, those at each row's last token: (B, ...)."""
    last = attention_mask.sum(1) - 1  # (B,)
    return values[torch.arange(len(values), device=values.device), last]


@torch.no_grad()
def score_last(
    model: "PeftModel",
    head: torch.nn.Linear,
    rows: list[tuple[list[int], list[int]]],
    pad_token_id: int,
    batch_size: int = 8,
    backbone: RecordedPass | None = None,
) -> list[float]:
    """The head's output at the last token of each row, a row being (prompt_ids, completion_ids).

    The adapter of the head must be the active one, and dropout off if it has any. `backbone` is worth its while where
    the same model scores again and again.
    """
    hidden_of = backbone or partial(last_hidden, model)
    scores: list[float] = []
    for first in range(0, len(rows), batch_size):
        texts = [prompt + completion for prompt, completion in rows[first : first + batch_size]]
        input_ids, mask = pad_right(texts, pad_token_id, head.weight.device)  # (B, T)
        hidden = at_last_token(hidden_of(input_ids, mask), mask)  # (B, h)
        scores += apply_head(head, hidden).tolist()
    return scores


def save_head(head: torch.nn.Linear, folder: Path, facts: dict[str, Any]) -> None:
    """Write a head and the facts about it to `folder`.

    Of a reward model the facts are: `kind` (regression or bradley-terry), `base` (what its base is by its contents, as
    models.contents has it), and `mean` and `std`: mean + std * output is a score in the units of the training data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, folder / WEIGHTS)
    write_json(folder / FACTS, facts)


def load_head(folder: Path, device: torch.device | str) -> tuple[torch.nn.Linear, dict[str, Any]]:
    """The head that `save_head` wrote, and its facts. Raises InputError when there is none."""
    for name in (WEIGHTS, FACTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name} there; give the adapter folder of a run of `make reward`")
    weights = load_file(folder / WEIGHTS)
    head = new_head(weights["weight"].shape[1], device)
    head.load_state_dict(weights)
    return head, json.loads((folder / FACTS).read_text(encoding="utf-8"))
