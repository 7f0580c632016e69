"""What fp8.py does between the products, as Triton kernels: rows to e4m3 in one pass, and bytes transposed.

They are operators that torch.compile leaves whole. What it makes of the same lines reads a row twice, and moves bytes
at about half the rate on an H200. Of equal calls, which q, k and v make with the same x, it keeps one.
"""

import torch
import triton
import triton.language as tl

WIDE = 8192  # columns, from which fewer threads a row are faster


@triton.jit
def _quantize(x_ptr, factors_ptr, codes_ptr, scale_ptr, smallest, K, BLOCK: tl.constexpr, FACTORS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < K
    x = tl.load(x_ptr + row * K + c, mask=inside, other=0.0).to(tl.float32)
    if FACTORS:
        x *= tl.load(factors_ptr + c, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x)), smallest) / 448.0
    tl.store(codes_ptr + row * K + c, (x / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scale_ptr + row, scale)


@torch.library.custom_op("recipes::fp8_rows", mutates_args=(), device_types="cuda")
def fp8_rows(x: torch.Tensor, factors: torch.Tensor | None, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fp8.quantize_rows`."""
    rows, columns = x.shape
    codes, scale = _empty_rows(x, factors, smallest)
    _quantize[(rows,)](
        x.contiguous(), factors, codes, scale, smallest, columns, triton.next_power_of_2(columns), factors is not None,
        num_warps=4 if columns >= WIDE else 8,
    )  # fmt: skip
    return codes, scale


@fp8_rows.register_fake
def _empty_rows(x: torch.Tensor, factors: torch.Tensor | None, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device),
    )


@triton.jit
def _transpose(x_ptr, y_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * N + n[None, :], mask=inside)
    tl.store(y_ptr + n.to(tl.int64)[:, None] * M + m[None, :], tl.trans(x), mask=tl.trans(inside))


@torch.library.custom_op("recipes::transposed_bytes", mutates_args=(), device_types="cuda")
def transposed_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes `x` (M, N) as (N, M), contiguous."""
    rows, columns = x.shape
    y = _empty_transposed(x)
    _transpose[(triton.cdiv(rows, 64), triton.cdiv(columns, 256))](x, y, rows, columns, 64, 256, num_warps=8)
    return y


@transposed_bytes.register_fake
def _empty_transposed(x: torch.Tensor) -> torch.Tensor:
    return torch.empty((x.shape[1], x.shape[0]), dtype=x.dtype, device=x.device)
