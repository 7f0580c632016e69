"""The attention of a decode step as Triton kernels, and that of prompts by torch's flash attention."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from common.lm.rollout import operations
from common.lm.rollout.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

PROGRAMS = 128  # about as many as an H100 has multiprocessors; with fewer, attention splits each row's positions


@triton.jit
def _attend(q_ptr, k_ptr, v_ptr, positions_ptr, part_ptr, sums_ptr, y_ptr, S, scale, softcap, window,
            G: tl.constexpr, GP: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            SPLITS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(positions_ptr + b).to(tl.int32) + 1
    start = tl.maximum(end - window, 0) if WINDOW else 0
    share = tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK) * BLOCK
    low = start + split * share
    high = tl.minimum(low + share, end)
    g = tl.arange(0, GP)[:, None]
    d = tl.arange(0, DP)
    j = tl.arange(0, BLOCK)
    kind = k_ptr.dtype.element_ty
    q = tl.load(q_ptr + ((b * HK + head) * G + g) * D + d[None, :], mask=(g < G) & (d[None, :] < D), other=0.0)
    largest = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    y = tl.zeros([GP, DP], tl.float32)
    row = b.to(tl.int64) * S * HK + head
    for t in range(low, high, BLOCK):
        there = (t + j) < high
        inside = there[:, None] & (d[None, :] < D)
        offset = (row + (t + j).to(tl.int64) * HK)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + offset, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAP:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(there[None, :], scores, -1e30)
        now = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp(scores - now[:, None])
        fade = tl.exp(largest - now)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        y = y * fade[:, None] + tl.dot(p.to(kind), v, input_precision=PRECISION)
        total = total * fade + tl.sum(p, 1)
        largest = now
    y = y / tl.maximum(total, 1e-20)[:, None]
    if SPLITS == 1:
        target = y_ptr + ((b * HK + head) * G + g) * D + d[None, :]
        tl.store(target, y.to(kind), mask=(g < G) & (d[None, :] < D))
    else:
        base = ((b * HK + head) * SPLITS + split) * G
        tl.store(part_ptr + (base + g) * D + d[None, :], y, mask=(g < G) & (d[None, :] < D))
        index = tl.arange(0, GP)
        logs = tl.where(total > 0, largest + tl.log(tl.maximum(total, 1e-20)), -1e30)
        tl.store(sums_ptr + base + index, logs, mask=index < G)


@triton.jit
def _combine(part_ptr, sums_ptr, y_ptr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    i = tl.program_id(0)
    g = i % G
    group = i // G
    d = tl.arange(0, DP)
    s = tl.arange(0, SPLITS)
    logs = tl.load(sums_ptr + (group * SPLITS + s) * G + g)
    weights = tl.exp(logs - tl.max(logs))
    weights = weights / tl.sum(weights)
    source = part_ptr + ((group * SPLITS + s[:, None]) * G + g) * D + d[None, :]
    part = tl.load(source, mask=d[None, :] < D, other=0.0)
    tl.store(y_ptr + i * D + d, tl.sum(part * weights[:, None], 0).to(y_ptr.dtype.element_ty), mask=d < D)


def attend(
    q: "Tensor", keys: "Tensor", values: "Tensor", positions: "Tensor", architecture: Architecture, window: int | None
) -> "Tensor":
    """As `operations.attend`: flash decoding (pytorch.org/blog/flash-decoding), over the filled part of a row only."""
    a = architecture
    rows, groups = len(q), a.heads // a.kv_heads
    splits = min(16, triton.next_power_of_2(triton.cdiv(PROGRAMS, rows * a.kv_heads)))
    padded = triton.next_power_of_2(a.head_dim)
    # Measured on an H200: large blocks where a multiprocessor has one program, so that enough loads are in flight.
    block = 32 if padded > 128 else 128 if rows * a.kv_heads < 2 * PROGRAMS else 64
    y = q.new_empty(rows, a.heads * a.head_dim)
    part = q.new_empty(rows * a.heads * splits if splits > 1 else 1, a.head_dim, dtype=torch.float32)
    sums = q.new_empty(rows * a.heads * splits, dtype=torch.float32)
    _attend[(rows, a.kv_heads, splits)](
        q, keys, values, positions, part, sums, y, keys.shape[1], a.scale, a.softcap or 0.0, window or 0,
        groups, max(16, triton.next_power_of_2(groups)), a.kv_heads, a.head_dim, padded, splits,
        block, a.softcap is not None, window is not None,
        "ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3 if padded <= 128 else 2,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * a.heads,)](part, sums, y, groups, a.head_dim, padded, splits, num_warps=1)
    return y


def attend_prompts(
    q: "Tensor",
    k: "Tensor",
    v: "Tensor",
    packed: operations.Packed,
    architecture: Architecture,
    window: int | None,
) -> "Tensor":
    """As `operations.attend_prompts`, by torch's variable-length flash attention where it can."""
    a = architecture
    if a.softcap is not None or q.dtype == torch.float32:  # it has neither
        return operations.attend_prompts(q, k, v, packed, a, window)
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = packed.ends, max(packed.lengths)
    back = -1 if window is None else window - 1
    attended: Any = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=a.scale, window_size=(back, 0),
        enable_gqa=a.heads != a.kv_heads,
    )  # fmt: skip
    return attended.flatten(1)
