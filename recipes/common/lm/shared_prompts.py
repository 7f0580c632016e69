"""Compute the tokens that several rows of a batch begin with once, for all of them.

A pair of DPO is prompt and chosen, prompt and rejected: two rows that begin alike, up to the first token that
differs. They are packed into one row as prompt, rest, rest, with the positions of the unpacked rows, and a rest
attends to the prompt and to itself only. The hidden states are those of the unpacked rows, and are put back at their
places, so that nothing after the layers changes. Padding is not computed either. The idea is Prefix Grouper's
(arXiv:2506.05433), which Unsloth has for GRPO.

On a GPU the attention is torch's varlen attention, where Unsloth's attention lets a shared prefix in. On the CPU it
is transformers' own, with a mask.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # dense, every layer with full attention, logits without a cap
WORTH = 1.1  # share where a batch has so many times as many places as packed tokens: packed layers are not compiled


@dataclass(frozen=True)
class SharedPrompts:
    """How a batch of B rows, padded on the right to T tokens, is packed into one row of N tokens.

    The packed row is made of S segments: the beginning of each group of rows, then the rest of each of its rows.
    """

    taken: "Tensor"  # (N,) the place of each packed token among the B * T places
    positions: "Tensor"  # (N,) its position in its row
    states: "Tensor"  # (B, T) the packed token whose hidden state belongs to a place; at padding any
    keys: "Tensor"  # (K,) the packed tokens that the segments attend to, segment by segment
    query_ends: "Tensor"  # (S + 1,) int32, where the segments begin and end in the packed row
    key_ends: "Tensor"  # (S + 1,) int32, where their keys begin and end in `keys`
    lengths: "Tensor"  # (S,) int32, tokens of the segments; always on the CPU
    longest_key: int

    def to(self, device: "torch.device | str", non_blocking: bool = False) -> "SharedPrompts":
        """A copy on a device; what moves batches calls this."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SharedPrompts":
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, move: "Callable[[Tensor], Tensor]") -> "SharedPrompts":
        moved = [field.name for field in fields(self) if field.name not in ("lengths", "longest_key")]
        return replace(self, **{name: move(getattr(self, name)) for name in moved})

    def attention(self, query: "Tensor", key: "Tensor", value: "Tensor", scale: float | None = None) -> "Tensor":
        """Attention of the packed row, (1, N, heads, d), on a GPU in 16 bit; keys may have fewer heads.

        The causal mask of varlen attention ends at the last key: a rest sees all of its prompt.
        """
        from torch.nn.attention.varlen import varlen_attn

        attended: Any = varlen_attn(
            query.squeeze(0),
            key.squeeze(0)[self.keys],
            value.squeeze(0)[self.keys],
            self.query_ends,
            self.key_ends,
            int(self.lengths.max()),
            self.longest_key,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.unsqueeze(0)

    def mask(self) -> "Tensor":
        """What each packed token attends to, (1, 1, N, N) bool."""
        import torch

        segment = torch.repeat_interleave(self.lengths.to(self.keys.device).long())  # (N,)
        of_key = torch.repeat_interleave(self.key_ends.diff().long())  # (K,)
        seen = self.keys.new_zeros(len(self.lengths), len(segment), dtype=torch.bool)  # (S, N)
        seen[of_key, self.keys] = True
        return (seen[segment] & (self.positions <= self.positions[:, None]))[None, None]


def pack(rows: list[list[int]], groups: list[list[int]], width: int) -> SharedPrompts:
    """The packing of rows of token ids, padded to `width`; the rows of a group share what all of them begin with."""
    import torch

    taken, positions, keys, lengths, key_lengths = [], [], [], [], []
    states = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
    packed = 0
    for group in groups:
        shared = common_beginning([rows[row] for row in group])
        beginning = torch.arange(packed, packed + shared)
        for row, first, last in [(group[0], 0, shared), *((row, shared, len(rows[row])) for row in group)]:
            if first == last:
                continue
            own = torch.arange(packed, packed + last - first)
            taken.append(torch.arange(row * width + first, row * width + last))
            positions.append(torch.arange(first, last))
            keys += [beginning, own] if first else [own]
            lengths.append(last - first)
            key_lengths.append(last)
            states[row, first:last] = own
            packed += last - first
        states[group, :shared] = beginning
    return SharedPrompts(
        taken=torch.cat(taken),
        positions=torch.cat(positions),
        states=states,
        keys=torch.cat(keys),
        query_ends=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        key_ends=torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        longest_key=max(key_lengths),
    )


def common_beginning(rows: list[list[int]]) -> int:
    """The number of tokens that all rows begin with."""
    equal = (len(set(tokens)) == 1 for tokens in zip(*rows, strict=False))
    return next((index for index, same in enumerate(equal) if not same), min(map(len, rows)))


class PairCollator:
    """A collator of preference pairs that adds `shared_prompts` to a batch of `collate` where that is worth it.

    `collate` makes `input_ids` and `attention_mask`, (2 * pairs, T), padded on the right: the chosen rows, then the
    rejected ones, as TRL's DataCollatorForPreference.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collate(examples)
        ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        pairs = [[index, index + len(examples)] for index in range(len(examples))]
        shared = pack(rows, pairs, ids.shape[1])
        if ids.numel() >= WORTH * len(shared.taken):
            batch["shared_prompts"] = shared
        return batch


def why_not(model: "PeftModel", max_length: int) -> str | None:
    """Why this model cannot compute shared prompts once, in rows of at most `max_length` tokens; None if it can."""
    import torch

    config = model.get_base_model().config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not of the {', '.join(FAMILIES)} families"
    window = getattr(config, "sliding_window", None)
    if window and window < max_length:
        return f"its layers attend to the last {window} tokens only, and --max-length is {max_length}"
    if model.device.type == "cuda":
        from unsloth.models.llama import LlamaModel_fast_forward

        if type(model.get_base_model().model).forward is not LlamaModel_fast_forward:
            return "its layers are not run by Unsloth's own forward"
        if torch.cuda.get_device_capability(model.device) < (8, 0):
            return "varlen attention needs a GPU of compute capability 8.0 or later"
        if model.get_base_model().dtype not in (torch.bfloat16, torch.float16):
            return "varlen attention needs 16-bit states"
    return None


def share_prompts(model: "PeftModel") -> None:
    """Have the layers of `model` take a batch with `shared_prompts` packed; `why_not` says which models can."""
    backbone = model.get_base_model().model
    unpacked = backbone.forward

    def forward(*args: Any, shared_prompts: SharedPrompts | None = None, **named: Any) -> Any:
        if shared_prompts is None:
            return unpacked(*args, **named)
        named |= {
            "input_ids": named["input_ids"].flatten()[shared_prompts.taken][None],  # (1, N)
            "position_ids": shared_prompts.positions[None],
            **_attending(shared_prompts, backbone),
        }
        output = unpacked(**named)
        output.last_hidden_state = output.last_hidden_state.squeeze(0)[shared_prompts.states]  # (B, T, h)
        return output

    backbone.forward = forward
    if model.device.type == "cuda":
        _extend_unsloth()


def _attending(shared: SharedPrompts, backbone: Any) -> dict[str, Any]:
    """The arguments of a forward that make it attend as packed."""
    import torch

    if shared.keys.is_cuda:  # lengths on the CPU spare Unsloth looking for them in the positions
        ours = {"prefix_seg_info": shared, "packed_seq_lengths": shared.lengths}
        return {"attention_mask": None, "causal_mask": None, **ours}
    mask, dtype = shared.mask(), backbone.dtype
    return {"attention_mask": torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)}


@functools.cache
def _extend_unsloth() -> None:
    """Have Unsloth's attention, which knows the shared prefixes of its own GRPO, take ours to varlen attention."""
    from unsloth.utils import attention_dispatch

    theirs = attention_dispatch._flex_shared_prefix_attention

    def attention(query: "Tensor", key: "Tensor", value: "Tensor", shared: Any, scale: float | None = None) -> "Tensor":
        if isinstance(shared, SharedPrompts):
            return shared.attention(query, key, value, scale)
        return theirs(query, key, value, shared, scale=scale)

    attention_dispatch._flex_shared_prefix_attention = attention
