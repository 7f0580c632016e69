"""Hidden states of a causal model: computed without logits, and picked at the positions that matter.

This module imports torch only where a function needs it, so that a recipe can import it before it imports unsloth.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor


def last_hidden(model: "PeftModel", input_ids: "Tensor", attention_mask: "Tensor | None") -> "Tensor":
    """The hidden states (B, T, h) after the final norm, with the active adapter; no logits are computed.

    `input_ids` and `attention_mask` are (B, T), padded on the right: no token can attend to padding on its right, so on
    a GPU the mask is dropped in train mode, as Unsloth does. The states at padding mean nothing.
    """
    import torch

    causal = model.get_base_model()
    if input_ids.is_cuda and causal.training:
        # Unsloth would look for padding on the left first where the model has generated, and wait for the GPU: no CUDA
        # graph can hold that.
        attention_mask = None
    # This calls the backbone itself, past the forward that accelerate wraps in autocast. Without autocast LoRA layers,
    # whose weights are 32 bit, compute in 32 bit on a GPU.
    with torch.autocast(input_ids.device.type, dtype=causal.dtype, enabled=input_ids.is_cuda):
        return causal.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def pad_right(rows: list[list[int]], pad_token_id: int, device: "torch.device | str") -> "tuple[Tensor, Tensor]":
    """Rows of token ids as `input_ids` and `attention_mask`, both (B, T) int64; on a GPU T is one of few numbers."""
    import torch

    longest = max(map(len, rows))
    if torch.device(device).type == "cuda":
        longest = round_up(longest)
    padded = [row + [pad_token_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def round_up(columns: int) -> int:
    """The next multiple of 8, and above 512 of 32: the fewer shapes, the fewer recordings as a CUDA graph."""
    return columns + -columns % (8 if columns <= 512 else 32)


def at_last_token(values: "Tensor", attention_mask: "Tensor") -> "Tensor":
    """The `values` (B, T, ...) at the last token of each row, padded on the right: (B, ...)."""
    import torch

    last = attention_mask.sum(1) - 1  # (B,)
    return values[torch.arange(len(values), device=values.device), last]


def states_before(hidden: "Tensor", start: "Tensor", columns: int) -> "Tensor":
    """The hidden states (B, C, h) that predict each of `columns` completion tokens: those one position before it.

    `hidden` is (B, T, h); `start` (B,) is the column of each row's first completion token, at least 1. States past the
    end of a completion mean nothing.
    """
    offsets = start.new_ones(columns).cumsum(0) - 2  # -1, 0, 1, ...
    index = (start[:, None] + offsets).clamp(max=hidden.shape[1] - 1)  # (B, C)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
