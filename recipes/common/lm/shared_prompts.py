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
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # dense, every layer with full attention, logits without a cap
COMPILED = ("qwen2",)  # of these a GPU has compiled packed layers; what fails behind a first step would end the run
WORTH = 1.1  # share where a batch has so many times as many places as packed tokens: packing costs time, too


@dataclass(frozen=True)
class Copies:
    """How M copies are made of N rows, and how their gradients are added up: in 32 bit, without sorting.

    A place that is neither in `first` nor in `other` is padding: what is there means nothing and gets no gradient.
    """

    of: "Tensor"  # (M,) the row that each place has a copy of
    first: "Tensor"  # (N,) the place of the first copy of each row
    other: "Tensor"  # (E,) the places of the other copies
    other_of: "Tensor"  # (E,) the rows that those are of

    def make(self, rows: "Tensor") -> "Tensor":
        """The copies (M, ...) of rows (N, ...)."""
        return _copying().apply(rows, self.of, self.first, self.other, self.other_of)


@functools.cache
def _copying() -> Any:
    import torch

    from common.lm.shared_attention import sum_of_copies

    class Copying(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: "Tensor", of: "Tensor", *places: "Tensor") -> "Tensor":
            ctx.save_for_backward(*places)
            return rows.index_select(0, of)

        @staticmethod
        def backward(ctx: Any, *gradients: "Tensor") -> tuple:
            (gradient,), (first, other, other_of) = gradients, ctx.saved_tensors
            return sum_of_copies(gradient, first, other, other_of), None, None, None, None

    return Copying


@dataclass(frozen=True)
class SharedPrompts:
    """How a batch of B rows, padded on the right to T tokens, is packed into one row of N tokens.

    The packed row is made of S segments: the beginning of each group of rows, then the rest of each of its rows.
    """

    states: Copies  # of the packed tokens' hidden states, for the B * T places of the batch
    keys: Copies  # of the packed tokens' keys, for the segments, one after another
    positions: "Tensor"  # (N,) the position of each packed token in its row
    query_ends: "Tensor"  # (S + 1,) int32, where the segments begin and end in the packed row
    key_ends: "Tensor"  # (S + 1,) int32, where their keys begin and end among `keys`
    lengths: "Tensor"  # (S,) int32, tokens of the segments; always on the CPU
    longest_query: int
    longest_key: int
    width: int  # T

    @property
    def tokens(self) -> int:
        return len(self.positions)

    def to(self, device: "torch.device | str", non_blocking: bool = False) -> "SharedPrompts":
        """A copy on a device; what moves batches calls this."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SharedPrompts":
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, move: "Callable[[Tensor], Tensor]") -> "SharedPrompts":
        states, keys = (Copies(*map(move, vars(copies).values())) for copies in (self.states, self.keys))
        ends = {name: move(getattr(self, name)) for name in ("positions", "query_ends", "key_ends")}
        return replace(self, states=states, keys=keys, **ends)

    def attention(self, query: "Tensor", key: "Tensor", value: "Tensor", scale: float | None = None) -> "Tensor":
        """Attention of the packed row, (1, N, heads, d), on a GPU in 16 bit; keys may have fewer heads."""
        from common.lm.shared_attention import shared_attention

        states = (one.squeeze(0) for one in (query, key, value))
        copies = self.keys.of, self.keys.first, self.keys.other, self.keys.other_of
        ends = self.query_ends, self.key_ends, self.longest_query, self.longest_key
        return shared_attention(*states, *copies, *ends, scale)[0].unsqueeze(0)

    def mask(self) -> "Tensor":
        """What each packed token attends to, (1, 1, N, N) bool."""
        import torch

        segment = torch.repeat_interleave(self.lengths.to(self.positions.device).long())  # (N,)
        of_key = torch.repeat_interleave(self.key_ends.diff().long())  # (K,)
        seen = self.positions.new_zeros(len(self.lengths), self.tokens, dtype=torch.bool)  # (S, N)
        seen[of_key, self.keys.of] = True
        return (seen[segment] & (self.positions <= self.positions[:, None]))[None, None]


def pack(rows: list[list[int]], groups: list[list[int]], width: int) -> SharedPrompts:
    """The packing of rows of token ids, padded to `width`; the rows of a group share what all of them begin with."""
    import torch

    positions, lengths, key_lengths = [], [], []
    of_place = torch.zeros(len(rows) * width, dtype=torch.long)
    places, other_places, of_other_place = [], [], []  # of hidden states
    keys, own_keys, other_keys, of_other_key = [], [], [], []
    packed = keyed = 0
    for group in groups:
        shared = common_beginning([rows[row] for row in group])
        beginning = torch.arange(packed, packed + shared)
        for row, first, last in [(group[0], 0, shared), *((row, shared, len(rows[row])) for row in group)]:
            if first == last:
                continue
            own = torch.arange(packed, packed + last - first)
            at = torch.arange(row * width + first, row * width + last)
            of_place[at] = own
            places.append(at)
            positions.append(torch.arange(first, last))
            keys += [beginning[:first], own]
            other_keys.append(torch.arange(keyed, keyed + first))
            of_other_key.append(beginning[:first])
            own_keys.append(torch.arange(keyed + first, keyed + last))
            lengths.append(last - first)
            key_lengths.append(last)
            packed, keyed = packed + last - first, keyed + last
        for row in group[1:]:
            at = torch.arange(row * width, row * width + shared)
            of_place[at] = beginning
            other_places.append(at)
            of_other_place.append(beginning)
    empty = [torch.arange(0)]
    return SharedPrompts(
        states=Copies(of_place, torch.cat(places), torch.cat(other_places + empty), torch.cat(of_other_place + empty)),
        keys=Copies(torch.cat(keys), torch.cat(own_keys), torch.cat(other_keys), torch.cat(of_other_key)),
        positions=torch.cat(positions),
        query_ends=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        key_ends=torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        longest_query=max(lengths),
        longest_key=max(key_lengths),
        width=width,
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
        if ids.numel() >= WORTH * shared.tokens:
            batch["shared_prompts"] = shared
        return batch


def share_prompts(model: "PeftModel", max_length: int) -> str | None:
    """Have the layers of `model` take a batch with `shared_prompts` packed. Returns why they cannot, or None.

    `max_length` is the number of tokens of the longest row.
    """
    causal, on_gpu = model.get_base_model(), model.device.type == "cuda"
    if reason := _other_attention(causal.config.get_text_config(), max_length):
        return reason
    if on_gpu and (reason := _no_varlen(causal)):
        return reason
    backbone, unpacked = causal.model, causal.model.forward

    def forward(*args: Any, shared_prompts: SharedPrompts | None = None, **named: Any) -> Any:
        if shared_prompts is None:
            return unpacked(*args, **named)
        named |= {
            "input_ids": named["input_ids"].flatten()[shared_prompts.states.first][None],  # (1, N)
            "position_ids": shared_prompts.positions[None],
            "use_cache": False,
            **_attending(shared_prompts, backbone),
        }
        output = unpacked(**named)
        states = shared_prompts.states.make(output.last_hidden_state.squeeze(0))  # (B * T, h)
        output.last_hidden_state = states.unflatten(0, (-1, shared_prompts.width))
        return output

    backbone.forward = forward
    if on_gpu and not _lets_prefixes_in(causal):
        backbone.forward = unpacked
        return "its attention lets no shared prefix in"
    if on_gpu and causal.config.get_text_config().model_type in COMPILED:
        from common.lm.shared_attention import compile_packed

        compile_packed(backbone.layers, SharedPrompts)
    return None


def _other_attention(config: Any, max_length: int) -> str | None:
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not of the {', '.join(FAMILIES)} families"
    window = getattr(config, "sliding_window", None)
    if window and window < max_length:
        return f"its layers attend to the last {window} tokens only, and --max-length is {max_length}"
    return None


def _no_varlen(causal: Any) -> str | None:
    import torch

    if torch.cuda.get_device_capability(causal.device) < (8, 0):
        return "varlen attention needs a GPU of compute capability 8.0 or later"
    if causal.dtype not in (torch.bfloat16, torch.float16):
        return "varlen attention needs 16-bit states"
    return None


def _attending(shared: SharedPrompts, backbone: Any) -> dict[str, Any]:
    """The arguments of a forward that make it attend as packed."""
    import torch

    if shared.positions.is_cuda:  # lengths on the CPU spare Unsloth looking for them in the positions
        ours = {"prefix_seg_info": shared, "packed_seq_lengths": shared.lengths}
        return {"attention_mask": None, "causal_mask": None, **ours}
    mask, dtype = shared.mask(), backbone.dtype
    return {"attention_mask": torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)}


def _lets_prefixes_in(causal: Any) -> bool:
    """Whether the attention of every layer comes to ours, tried on two rows of three tokens."""
    import torch

    reached = []

    class Probe(SharedPrompts):
        def attention(self, query: "Tensor", key: "Tensor", value: "Tensor", scale: float | None = None) -> "Tensor":
            reached.append(self)
            return super().attention(query, key, value, scale)

    _extend_unsloth()
    probe = Probe(**vars(pack([[0, 1, 2], [0, 1, 3]], [[0, 1]], 3).to(causal.device)))
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=causal.device)
    with torch.no_grad(), torch.autocast("cuda", dtype=causal.dtype):
        causal.model(input_ids=ids, shared_prompts=probe)
    return len(reached) == causal.config.get_text_config().num_hidden_layers


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
