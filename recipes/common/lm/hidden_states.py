"""Hidden states of a causal model: computed without logits, picked at the positions that matter."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel


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
