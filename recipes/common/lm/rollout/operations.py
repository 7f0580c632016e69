"""The operations of a decode step in plain torch: what runs on a CPU, and the reference of kernels.py.

B rows are decoded at once, one token each; T is the number of prompt tokens of a prefill. Caches are (B, S, K, D): row,
position, key-value head, dimension.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from common.lm.rollout.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from common.lm.rollout.weights import Layer

MASK = 0xFFFFFFFF
MERGED_AT_ONCE = 1 << 24  # numbers of a matrix, so that their copy in 32 bit stays small


class State(NamedTuple):
    """The rows that are decoded: the tensors that a step reads and writes, each with one entry a row."""

    ids: "Tensor"  # (B,) int64, the token that the next step reads
    positions: "Tensor"  # (B,) int64, its position
    counts: "Tensor"  # (B,) int64, tokens of the completion so far
    limits: "Tensor"  # (B,) int64, where a completion is truncated
    done: "Tensor"  # (B,) bool
    seeds: "Tensor"  # (B,) int64
    tokens: "Tensor"  # (B, N) int64, the completions
    log_probs: "Tensor"  # (B, N) float32, of their tokens

    def first(self, rows: int) -> "State":
        return State(*(tensor[:rows] for tensor in self))


class Packed(NamedTuple):
    """Prompts that stand one after another in tensors of T tokens."""

    lengths: list[int]
    ends: "Tensor"  # (N + 1,) int32, 0 and where each ends

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Packed":
        return cls(lengths, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device))


def merge(out: "Tensor", weight: "Tensor", up: "Tensor", down: "Tensor", scaling: float) -> None:
    """out = weight + scaling * up @ down, for weight (out, in), up (out, r), down (r, in); summed in 32 bit."""
    step = max(1, MERGED_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        out[rows].copy_(torch.addmm(weight[rows].float(), up[rows].float(), down.float(), alpha=scaling))


def four_bit_matrix(layers: Sequence[Any]) -> Any:
    """Their weights in 4 bit as one matrix that is multiplied with as it is stored; None where none can be."""
    return None


def norm(x: "Tensor", weight: "Tensor", architecture: Architecture, residual: "Tensor | None" = None) -> "Tensor":
    """RMSNorm (arXiv:1910.07467) of x (B, h); with a `residual`, x is added to it, in place, and the sum is normed."""
    if residual is not None:
        x = residual.add_(x)
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + architecture.eps)
    if architecture.one_plus:
        return (y * (1.0 + weight.float())).to(x.dtype)
    return y.to(x.dtype) * weight


def rotate_and_store(
    qkv: "Tensor",
    layer: "Layer",
    architecture: Architecture,
    tables: "tuple[Tensor, Tensor]",
    rows: "Tensor",
    positions: "Tensor",
    keys: "Tensor",
    values: "Tensor",
) -> "Tensor":
    """The rotated queries (T, H, D) of qkv (T, (H + 2K) D); rotated keys and the values go to the caches at
    (rows[t], positions[t])."""
    a = architecture
    q, k, v = qkv.view(len(qkv), -1, a.head_dim).split((a.heads, a.kv_heads, a.kv_heads), 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = norm(q, layer.q_norm, a), norm(k, layer.k_norm, a)
    cos, sin = (table[positions][:, None] for table in tables)  # (T, 1, R / 2)
    keys[rows, positions] = _rotate(k, cos, sin)
    values[rows, positions] = v
    return _rotate(q, cos, sin)


def _rotate(x: "Tensor", cos: "Tensor", sin: "Tensor") -> "Tensor":
    half = cos.shape[-1]
    one, two, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((one * cos - two * sin).to(x.dtype), (two * cos + one * sin).to(x.dtype), rest), -1)


def attend(
    q: "Tensor", keys: "Tensor", values: "Tensor", positions: "Tensor", architecture: Architecture, window: int | None
) -> "Tensor":
    """The attention (B, H D) of one query a row, q (B, H, D), to its row's positions up to its own."""
    index = torch.arange(int(positions.max()) + 1, device=q.device)
    seen = index <= positions[:, None]  # (B, S)
    if window:
        seen &= index > positions[:, None] - window
    k, v = keys[: len(q), : len(index)], values[: len(q), : len(index)]
    return _attention(q[:, None], k, v, seen[:, None], architecture)[:, 0].flatten(1)


def attend_prompts(
    q: "Tensor",
    k: "Tensor",
    v: "Tensor",
    packed: Packed,
    architecture: Architecture,
    window: int | None,
) -> "Tensor":
    """The causal attention (T, H D) within each of several prompts, in q, k, v (T, ., D)."""
    parts = []
    for q1, k1, v1 in zip(*(x.split(packed.lengths) for x in (q, k, v)), strict=True):
        index = torch.arange(len(q1), device=q.device)
        seen = index <= index[:, None]
        if window:
            seen &= index > index[:, None] - window
        parts.append(_attention(q1[None], k1[None], v1[None], seen[None], architecture)[0])
    return torch.cat(parts).flatten(1)


def _attention(q: "Tensor", k: "Tensor", v: "Tensor", seen: "Tensor", architecture: Architecture) -> "Tensor":
    """q (B, Q, H, D), k and v (B, S, K, D), seen (B, Q, S): the attention (B, Q, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if architecture.softcap is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=architecture.scale, enable_gqa=True)
        return y.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * architecture.scale
    scores = torch.tanh(scores / architecture.softcap) * architecture.softcap
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def gate(x: "Tensor", architecture: Architecture) -> "Tensor":
    """The activated gate times up, (B, I), of x (B, 2 I), in which gate comes first."""
    gated, up = x.chunk(2, -1)
    return (F.silu(gated) if architecture.activation == "silu" else F.gelu(gated, approximate="tanh")) * up


def choose(
    logits: "Tensor", state: State, temperature: "Tensor", greedy: "Tensor", end: "Tensor", architecture: Architecture
) -> None:
    """Draw a token of each row from its logits (B, V), append it to the row, and make the row done where it ends.

    A draw is the largest of scores + Gumbel noise; the noise depends on the row's seed, the index of the token in its
    completion and the token, and on nothing else. With `greedy` (1 or 0) there is none.
    """
    scores = logits.float()
    if architecture.final_softcap is not None:
        scores = torch.tanh(scores / architecture.final_softcap) * architecture.final_softcap
    scores = scores / temperature
    chosen = (scores + gumbel(state.seeds, state.counts, scores.shape[1]) * (1 - greedy)).argmax(-1)
    log_probs = scores.gather(-1, chosen[:, None])[:, 0] - scores.logsumexp(-1)
    live = ~state.done
    row, column = torch.arange(len(chosen), device=chosen.device)[live], state.counts[live]
    state.tokens[row, column] = chosen[live]
    state.log_probs[row, column] = log_probs[live]
    state.counts.add_(live)
    state.done.logical_or_(live & ((chosen == end) | (state.counts >= state.limits)))
    live = ~state.done
    state.positions.add_(live)
    state.ids.copy_(torch.where(live, chosen, state.ids))


def gumbel(seeds: "Tensor", index: "Tensor", size: int) -> "Tensor":
    """Gumbel noise (B, V): a hash of seed (B,), index (B,) and token, as a uniform number, then -log(-log(u))."""
    key = _mix((seeds & MASK) ^ _mix(index + 0x9E3779B9 & MASK))
    key = _mix(key ^ (seeds >> 32 & MASK))
    bits = _mix(_mix(torch.arange(size, device=seeds.device) ^ key[:, None]) + key[:, None] & MASK)
    share = (bits.float() + 0.5) * 2.0**-32  # 1 - u; in 32 bit it is exact where it is small, so where noise is large
    rate = torch.where(share < 1e-3, share * (1 + 0.5 * share), -torch.log(1 - share.clamp(max=1 - 2.0**-24)))
    return -torch.log(rate)


def _mix(x: "Tensor") -> "Tensor":
    """A hash of 32-bit integers, one to one ("lowbias32", Wellons, nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)
