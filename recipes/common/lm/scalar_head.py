"""A scalar head on a language model's hidden states: what turns a causal model into a reward model or a critic.

The head is a linear map in 32 bit, kept outside the model, so that one frozen base can carry several: each with an
adapter of its own, switched on before the hidden states are taken. Beside its adapter a head is two files:
head.safetensors (weight and bias) and head.json (the facts about it).
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from common.lm.cuda_graph import RecordedPass
from common.lm.hidden_states import at_last_token, last_hidden, pad_right
from common.run.files import write_json

if TYPE_CHECKING:
    from peft import PeftModel


WEIGHTS, FACTS = "head.safetensors", "head.json"


def new_head(hidden_size: int, device: torch.device | str) -> torch.nn.Linear:
    """A head whose every output is 0: weight (1, h) and bias (1,) are zeros in float32, on `device`.

    From zero the first Bradley-Terry loss is ln 2, the first value is 0, and no random number is drawn; weight and
    adapter still learn, for the gradient of the weight is the hidden state itself.
    """
    head = torch.nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def apply_head(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The head's outputs (...) for hidden states (..., h), in float32 whatever autocast says around it."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())[..., 0]


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
