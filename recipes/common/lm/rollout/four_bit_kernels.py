"""The product with a matrix in 4 bit as Triton kernels: its numbers are dequantized in registers, never in memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from common.lm.rollout.layers import is_quantized, shape_of, stored

if TYPE_CHECKING:
    from torch import Tensor

HEIGHT = 64  # rows of the weight that one program multiplies
COLUMNS = 128  # columns of it that are in registers at once
PROGRAMS = 1056  # eight for each multiprocessor of an H100; with fewer, the columns are split among several


@triton.jit
def _multiply(x_ptr, tiles_ptr, table_ptr, scales_ptr, out_ptr, M, N, K: tl.constexpr, SHARE: tl.constexpr,
              GROUP: tl.constexpr, NESTED: tl.constexpr, PADDED: tl.constexpr, HEIGHT: tl.constexpr,
              COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 7
    split = tl.program_id(1)
    weight_ptr = tl.multiple_of(tl.load(tile).to(tl.pointer_type(tl.uint8)), 16)
    row = tl.multiple_of(tl.load(tile + 4).to(tl.int32), HEIGHT) + tl.arange(0, HEIGHT)  # in its layer
    there = row < tl.load(tile + 5)
    n = tl.load(tile + 6) + tl.arange(0, HEIGHT)  # in the result
    m = tl.arange(0, PADDED)
    byte = tl.arange(0, COLUMNS // 2)  # of two columns each
    g = tl.arange(0, COLUMNS // GROUP)
    kind = x_ptr.dtype.element_ty
    total = tl.zeros([HEIGHT, PADDED], tl.float32)
    for start in range(split * (SHARE // 2), min((split + 1) * (SHARE // 2), K // 2), COLUMNS // 2):
        at = row[:, None] * (K // 2) + (start + byte)[None, :]
        packed = tl.load(weight_ptr + at, mask=there[:, None], other=0).to(tl.int32)
        numbers = tl.join(tl.load(table_ptr + (packed >> 4)), tl.load(table_ptr + (packed & 15)))
        group = row[:, None] * (K // GROUP) + (2 * start // GROUP + g)[None, :]
        scale_ptr = tl.load(tile + 1)
        if NESTED:
            quantized = tl.load(scale_ptr.to(tl.pointer_type(tl.uint8)) + group, mask=there[:, None], other=0)
            largest_ptr = tl.load(tile + 2).to(tl.pointer_type(tl.float32))
            largest = tl.load(largest_ptr + group // 256, mask=there[:, None], other=0.0)
            offset = tl.load(tl.load(tile + 3).to(tl.pointer_type(tl.float32)))
            scale = tl.load(scales_ptr + quantized.to(tl.int32)) * largest + offset
        else:
            scale = tl.load(scale_ptr.to(tl.pointer_type(tl.float32)) + group, mask=there[:, None], other=0.0)
        numbers = tl.reshape(numbers, (HEIGHT, COLUMNS // GROUP, GROUP)) * scale[:, :, None]
        weight = tl.reshape(numbers, (HEIGHT, COLUMNS)).to(kind)
        k = 2 * start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :], other=0.0)
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    at = (split * M + m[None, :]) * N + n[:, None]
    tl.store(out_ptr + at, total, mask=there[:, None] & (m < M)[None, :])


@triton.jit
def _finish(parts_ptr, bias_ptr, small_ptr, up_ptr, y_ptr, M, N, R: tl.constexpr, PARTS: tl.constexpr,
            BIAS: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * M * N + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if R > 0:
        r = tl.arange(0, RANK)
        small = tl.load(small_ptr + m[:, None] * R + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        up = tl.load(up_ptr + n[None, :] * R + r[:, None], mask=(n < N)[None, :] & (r < R)[:, None], other=0.0)
        total = tl.dot(small, up, total, input_precision=PRECISION)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


class FourBitMatrix:
    """The weights (out, in) of several layers in 4 bit, one below the other, read where bitsandbytes stores them.

    The numbers are those of its dequantize_4bit: table[code] * scale, rounded once; a scale may itself be in 8 bit.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        states = states_of(layers)
        self.rows, self.columns = sum(shape_of(layer)[0] for layer in layers), shape_of(layers[0])[1]
        self.group, self.nested = states[0].blocksize, states[0].nested
        self.table = states[0].code.float()
        self.scales = states[0].state2.code if self.nested else self.table
        tiles, below = [], 0
        for layer, state in zip(layers, states, strict=True):
            nested = [state.state2.absmax.data_ptr(), state.offset.data_ptr()] if self.nested else [0, 0]
            pointers = [stored(layer).data_ptr(), state.absmax.data_ptr(), *nested]
            rows = shape_of(layer)[0]
            tiles += [[*pointers, row, rows, below + row] for row in range(0, rows, HEIGHT)]
            below += rows
        self.tiles = torch.tensor(tiles, device=stored(layers[0]).device)  # (tiles, 7)
        self.held = states  # so that what the addresses point at stays

    def multiply(
        self, x: "Tensor", bias: "Tensor | None" = None, small: "Tensor | None" = None, up: "Tensor | None" = None
    ) -> "Tensor":
        """x (M, in) times the transposed matrix, plus `bias` (out,), plus small (M, R) times up (out, R) transposed."""
        rows, tiles = len(x), len(self.tiles)
        width = COLUMNS if self.columns % COLUMNS == 0 else self.group
        blocks = self.columns // width
        splits = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(blocks, 4))
        share = triton.cdiv(blocks, splits) * width
        splits = triton.cdiv(self.columns, share)
        precision = "ieee" if x.dtype == torch.float32 else "tf32"
        parts = torch.empty(splits, rows, self.rows, dtype=torch.float32, device=x.device)
        _multiply[(tiles, splits)](
            x, self.tiles, self.table, self.scales, parts, rows, self.rows, self.columns, share, self.group,
            self.nested, max(16, triton.next_power_of_2(rows)), HEIGHT, width, precision, num_warps=4, num_stages=3,
        )  # fmt: skip
        y = x.new_empty(rows, self.rows)
        rank = 0 if small is None else small.shape[1]
        _finish[(triton.cdiv(rows, 16), triton.cdiv(self.rows, 128))](
            parts, bias, small, up, y, rows, self.rows, rank, splits, bias is not None,
            max(16, triton.next_power_of_2(rank)), 16, 128, precision, num_warps=4,
        )  # fmt: skip
        return y


def four_bit_matrix(layers: Sequence[Any]) -> FourBitMatrix | None:
    """As `operations.four_bit_matrix`: for layers of one format, in which no group of numbers spans two rows."""
    if not all(map(is_quantized, layers)):
        return None
    states = states_of(layers)
    formats = {(state.blocksize, state.nested and state.state2.blocksize) for state in states}
    (size, outer), *others = formats
    known = not others and size >= 64 and shape_of(layers[0])[1] % size == 0 and outer in (False, 256)
    return FourBitMatrix(layers) if known else None


def states_of(layers: Sequence[Any]) -> list[Any]:
    """What bitsandbytes knows of the layers' weights besides their codes: the scales, their groups, the table."""
    weights: list[Any] = [stored(layer) for layer in layers]
    return [weight.quant_state for weight in weights]
