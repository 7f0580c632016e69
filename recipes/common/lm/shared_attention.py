"""Attention of packed rows with shared prompts, as one operator that torch.compile leaves whole.

torch's varlen attention computes it, of keys and values that a segment of the packed row has for itself: those of a
shared prompt are copied for each of its rows, and the gradients of the copies are added up, in 32 bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.attention.varlen  # it registers the operators

UNDERWAY = "shared_prompts"  # the name of a packing between a layer and its attention


def compile_packed(layers: Iterable[Any], packing: type) -> None:
    """Have Unsloth compile these decoder layers also where they are given a `packing`.

    It compiles none with `prefix_seg_info` or `packed_seq_lengths`: those of its own are numbers, and each batch would
    be another graph. A packing of ours is tensors. It passes the layer under another name, and has its own again where
    the attention looks for it.
    """

    def hide(_: Any, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not isinstance(named.get("prefix_seg_info"), packing):
            return args, named
        rest = {name: one for name, one in named.items() if name not in ("prefix_seg_info", "packed_seq_lengths")}
        return args, {**rest, UNDERWAY: named["prefix_seg_info"]}

    def show(_: Any, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if UNDERWAY not in named:
            return args, named
        rest = {name: one for name, one in named.items() if name != UNDERWAY}
        return args, {**rest, "prefix_seg_info": named[UNDERWAY]}

    for layer in layers:
        layer.register_forward_pre_hook(hide, with_kwargs=True)
        layer.self_attn.register_forward_pre_hook(show, with_kwargs=True)


@torch.library.custom_op("recipes::shared_attention", mutates_args=())
def shared_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    of: torch.Tensor, first: torch.Tensor, other: torch.Tensor, other_of: torch.Tensor,
    query_ends: torch.Tensor, key_ends: torch.Tensor, longest_query: int, longest_key: int, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The attention (N, heads, d) of packed rows, and the logarithms of its sums (heads, N).

    `query` is (N, heads, d), `key` and `value` (N, fewer heads, d); the rest is what `SharedPrompts` has.
    """
    copies = key.index_select(0, of), value.index_select(0, of)
    ends = query_ends, key_ends, longest_query, longest_key
    # The causal mask ends at the last key: the rest of a row sees all of its prompt.
    attended, sums, _ = torch.ops.torch_attn._varlen_attn(query, *copies, *ends, True, scale, [-1, 0], True)
    return attended, sums


@shared_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("recipes::shared_attention_backward", mutates_args=())
def shared_attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attended: torch.Tensor, sums: torch.Tensor,
    of: torch.Tensor, first: torch.Tensor, other: torch.Tensor, other_of: torch.Tensor,
    query_ends: torch.Tensor, key_ends: torch.Tensor, longest_query: int, longest_key: int, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    copies = key.index_select(0, of), value.index_select(0, of)
    ends = query_ends, key_ends, longest_query, longest_key
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    of_query, *of_copies = torch.ops.torch_attn._varlen_attn_backward(
        gradient.contiguous(), query, *copies, attended, sums, *ends, True, no_dropout, scale, [-1, 0]
    )
    of_key, of_value = (sum_of_copies(one, first, other, other_of) for one in of_copies)
    return of_query, of_key, of_value


@shared_attention_backward.register_fake
def _(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def sum_of_copies(
    copies: torch.Tensor, first: torch.Tensor, other: torch.Tensor, other_of: torch.Tensor
) -> torch.Tensor:
    """What each row has in all of its copies, added up in 32 bit: the fields are those of `Copies`."""
    total = copies.index_select(0, first).float()
    total.index_add_(0, other_of, copies.index_select(0, other).float())
    return total.to(copies.dtype)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.longest_query, ctx.longest_key, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None) -> tuple:
    rest = ctx.longest_query, ctx.longest_key, ctx.scale
    return (*torch.ops.recipes.shared_attention_backward(gradient, *ctx.saved_tensors, *rest), *(None,) * 9)


shared_attention.register_autograd(_backward, setup_context=_keep)
