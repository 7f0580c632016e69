"""The operations of a decode step as Triton kernels: the same functions as operations.py, for a CUDA GPU."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from common.lm.rollout.architecture import Architecture
from common.lm.rollout.attention_kernels import attend, attend_prompts
from common.lm.rollout.four_bit_kernels import four_bit_matrix
from common.lm.rollout.sampling_kernels import choose

if TYPE_CHECKING:
    from torch import Tensor

    from common.lm.rollout.weights import Layer

__all__ = ["attend", "attend_prompts", "choose", "four_bit_matrix", "gate", "merge", "norm", "rotate_and_store"]


@triton.jit
def _merge(weight_ptr, up_ptr, down_ptr, out_ptr, scaling, rows, columns, RANK: tl.constexpr, PADDED: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.arange(0, PADDED)
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    total = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + m[:, None] * RANK + r[None, :], mask=(m < rows)[:, None] & (r < RANK)[None, :], other=0.0)
    mask = (r < RANK)[:, None] & (n < columns)[None, :]
    down = tl.load(down_ptr + r[:, None] * columns + n[None, :], mask=mask, other=0.0)
    total += tl.dot(up.to(tl.float32), down.to(tl.float32), input_precision="ieee") * scaling
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def merge(out: "Tensor", weight: "Tensor", up: "Tensor", down: "Tensor", scaling: float) -> None:
    """As `operations.merge`."""
    rows, columns = weight.shape
    rank = len(down)
    padded = max(16, triton.next_power_of_2(rank))
    height = 64 if padded <= 64 else 32
    _merge[(triton.cdiv(rows, height), triton.cdiv(columns, 64))](
        weight, up, down, out, scaling, rows, columns, rank, padded, height, 64, num_warps=4
    )


@triton.jit
def _norm(x_ptr, residual_ptr, weight_ptr, y_ptr, eps, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
          ONE_PLUS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * H
    c = tl.arange(0, BLOCK)
    inside = c < H
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row + c, x.to(kind), mask=inside)
        x = x.to(kind).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / H + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    y = y * (1.0 + weight) if ONE_PLUS else y.to(kind).to(tl.float32) * weight
    tl.store(y_ptr + row + c, y.to(kind), mask=inside)


def norm(x: "Tensor", weight: "Tensor", architecture: Architecture, residual: "Tensor | None" = None) -> "Tensor":
    """As `operations.norm`."""
    y = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _norm[(len(x),)](
        x, x if residual is None else residual, weight, y, architecture.eps, size, block, residual is not None,
        architecture.one_plus, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return y


@triton.jit
def _load_rotated(x_ptr, norm_ptr, cos, sin, eps, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
                  NORM: tl.constexpr, ONE_PLUS: tl.constexpr):  # fmt: skip
    c = tl.arange(0, BLOCK)
    inside = c < D
    half: tl.constexpr = R // 2
    partner = tl.where(c < half, c + half, tl.where(c < R, c - half, c))
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + c, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x) / D + eps)
        w = tl.load(norm_ptr + c, mask=inside, other=0.0).to(tl.float32)
        w_other = tl.load(norm_ptr + partner, mask=inside, other=0.0).to(tl.float32)
        if ONE_PLUS:
            x = (x * scale * (1.0 + w)).to(kind).to(tl.float32)
            other = (other * scale * (1.0 + w_other)).to(kind).to(tl.float32)
        else:
            x = ((x * scale).to(kind).to(tl.float32) * w).to(kind).to(tl.float32)
            other = ((other * scale).to(kind).to(tl.float32) * w_other).to(kind).to(tl.float32)
    rotated = x * cos + tl.where(c < half, -other, other) * sin
    return tl.where(c < R, rotated, x).to(kind)


@triton.jit
def _rotate_and_store(qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, rows_ptr, positions_ptr, q_norm_ptr, k_norm_ptr,
                      eps, S, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
                      BLOCK: tl.constexpr, NORM: tl.constexpr, ONE_PLUS: tl.constexpr):  # fmt: skip
    t = tl.program_id(0)
    h = tl.program_id(1)
    c = tl.arange(0, BLOCK)
    inside = c < D
    position = tl.load(positions_ptr + t)
    source = qkv_ptr + (t.to(tl.int64) * (HQ + 2 * HK) + h) * D
    angle = position * (R // 2) + tl.where(c < R // 2, c, c - R // 2)
    cos = tl.load(cos_ptr + angle, mask=c < R, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=c < R, other=0.0)
    if h < HQ:
        q = _load_rotated(source, q_norm_ptr, cos, sin, eps, D, R, BLOCK, NORM, ONE_PLUS)
        tl.store(q_ptr + (t.to(tl.int64) * HQ + h) * D + c, q, mask=inside)
    else:
        slot = (tl.load(rows_ptr + t).to(tl.int64) * S + position) * HK
        if h < HQ + HK:
            k = _load_rotated(source, k_norm_ptr, cos, sin, eps, D, R, BLOCK, NORM, ONE_PLUS)
            tl.store(k_ptr + (slot + h - HQ) * D + c, k, mask=inside)
        else:
            tl.store(v_ptr + (slot + h - HQ - HK) * D + c, tl.load(source + c, mask=inside), mask=inside)


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
    """As `operations.rotate_and_store`."""
    a = architecture
    q = qkv.new_empty(len(qkv), a.heads, a.head_dim)
    cos, sin = tables
    normed = layer.q_norm is not None
    _rotate_and_store[(len(qkv), a.heads + 2 * a.kv_heads)](
        qkv, q, keys, values, cos, sin, rows, positions, layer.q_norm if normed else cos,
        layer.k_norm if normed else cos, a.eps, keys.shape[1], a.heads, a.kv_heads, a.head_dim, 2 * cos.shape[1],
        triton.next_power_of_2(a.head_dim), normed, a.one_plus, num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _gate(x_ptr, y_ptr, size, BLOCK: tl.constexpr, SILU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < size
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * 2 * size + c, mask=inside).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * size + size + c, mask=inside).to(tl.float32)
    if SILU:
        x = x / (1 + tl.exp(-x))
    else:  # 1 + tanh(z) is 2 - 2 / (exp(2 z) + 1)
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1 - 1 / (tl.exp(2 * z) + 1))
    tl.store(y_ptr + row * size + c, (x.to(kind).to(tl.float32) * up).to(kind), mask=inside)


def gate(x: "Tensor", architecture: Architecture) -> "Tensor":
    """As `operations.gate`."""
    size = x.shape[1] // 2
    y = x.new_empty(len(x), size)
    _gate[(len(x), triton.cdiv(size, 1024))](x, y, size, 1024, architecture.activation == "silu", num_warps=4)
    return y
