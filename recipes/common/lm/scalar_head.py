"""A scalar head on a language model's hidden states, which makes a causal model a reward model or a critic.

The head is a linear map in 32 bit, kept outside the model, so one frozen base can carry several: each belongs to an
adapter, which must be active when the hidden states are computed. Beside its adapter a head is two files:
head.safetensors (weight and bias) and head.json (facts about it).

This module imports torch only where a function needs it, so that a recipe can import it before it imports unsloth.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.lm.hidden_states import at_last_token, last_hidden, pad_right, states_before
from common.run.files import read_object, write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor


WEIGHTS, FACTS = "head.safetensors", "head.json"


def new_head(hidden_size: int, device: "torch.device | str") -> "torch.nn.Linear":
    """A head whose every output is 0: weight (1, h) and bias (1,) are zeros in float32, on `device`.

    From zero the first Bradley-Terry loss is ln 2, the first value is 0, and no random number is drawn; weight and
    adapter still learn, because the gradient of the weight is the hidden state itself.
    """
    import torch

    head = torch.nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def apply_head(head: "torch.nn.Linear", hidden: "Tensor") -> "Tensor":
    """The head's outputs (...) for hidden states (..., h), in float32 also under autocast."""
    import torch

    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float())[..., 0]


def completion_values(
    model: "PeftModel",
    head: "torch.nn.Linear",
    input_ids: "Tensor",
    attention_mask: "Tensor",
    start: "Tensor",
    mask: "Tensor",
) -> "Tensor":
    """The values (B, C) that a critic predicts before each completion token; 0 at padding.

    The critic's adapter must be active. The tensors are those of `log_probs.completion_log_probs`.
    """
    hidden = last_hidden(model, input_ids, attention_mask)  # (B, T, h)
    return apply_head(head, states_before(hidden, start, mask.shape[1])) * mask


def score_last(
    model: "PeftModel",
    head: "torch.nn.Linear",
    rows: list[tuple[list[int], list[int]]],
    pad_token_id: int,
    batch_size: int = 8,
) -> list[float]:
    """The head's output at the last token of each row (prompt_ids, completion_ids), without gradient.

    The head's adapter must be active, and its dropout, if it has any, switched off.
    """
    import torch

    scores: list[float] = []
    for first in range(0, len(rows), batch_size):
        texts = [prompt + completion for prompt, completion in rows[first : first + batch_size]]
        input_ids, mask = pad_right(texts, pad_token_id, head.weight.device)  # (B, T)
        with torch.no_grad():
            hidden = at_last_token(last_hidden(model, input_ids, mask), mask)  # (B, h)
            scores += apply_head(head, hidden).tolist()
    return scores


def save_head(head: "torch.nn.Linear", folder: Path, facts: dict[str, Any]) -> None:
    """Write a head and facts about it to `folder`.

    The facts about a reward model are: `kind` (regression or bradley-terry), `base` (the contents of its base, as
    hub.contents identifies them), and `mean` and `std`: mean + std * output is a score in the units of the training
    data.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, folder / WEIGHTS)
    write_json(folder / FACTS, facts)


def load_head(folder: Path, device: "torch.device | str") -> "tuple[torch.nn.Linear, dict[str, Any]]":
    """The head that `save_head` wrote, and its facts. Raises InputError without one that can be read."""
    from safetensors.torch import load_file

    for name in (WEIGHTS, FACTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; give the adapter folder of a run of `make reward`")
    weights = load_file(folder / WEIGHTS)
    head = new_head(weights["weight"].shape[1], device)
    head.load_state_dict(weights)
    return head, read_object(folder / FACTS)
