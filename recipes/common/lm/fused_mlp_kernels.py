"""What fused_mlp.py does between the products, as Triton kernels that read and write each large matrix once.

They are operators that torch.compile leaves whole. R, the rank, is at most 64; other dimensions are free.
"""

import torch
import triton
import triton.language as tl

FORWARD = 32, 128, 4  # rows and columns of a tile, warps: the fastest of those tried on an H200
BACKWARD = 32, 64, 4, 2  # and stages
SPLITS = 16  # of the rows, over which gradients of the adapters are added up apart: more programs than processors


@triton.jit
def _adapter(ptr, at, R: tl.constexpr, RANK: tl.constexpr, inside):
    """A tile (…, RANK) of rows of R values, zero behind them and where not `inside`."""
    r = tl.arange(0, RANK)
    return tl.load(ptr + at[:, None] * R + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def _sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp(-x))  # one instruction, where a division takes ten
    return root * root


@triton.jit(do_not_specialize=["M"])
def _forward(
    gate_ptr, up_ptr, xa_ptr, gate_b_ptr, up_b_ptr, h_ptr, M, N,
    R: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    at, inside = m.to(tl.int64)[:, None] * N + n[None, :], in_m[:, None] & in_n[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate += tl.dot(_adapter(xa_ptr, m * 2, R, RANK, in_m), tl.trans(_adapter(gate_b_ptr, n, R, RANK, in_n)))
    up += tl.dot(_adapter(xa_ptr, m * 2 + 1, R, RANK, in_m), tl.trans(_adapter(up_b_ptr, n, R, RANK, in_n)))
    h = gate * _sigmoid(gate) * up
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _backward(
    dh_ptr, gate_ptr, up_ptr, xa_ptr, dyb_ptr, gate_b_ptr, up_b_ptr, down_a_ptr, dgate_ptr, dup_ptr, parts_ptr, M, N,
    R: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # Tiles are transposed, (BN, BM): a sum over the rows is then a product whose left side is where it was computed.
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    in_n = n < N
    split, splits = tl.program_id(1), tl.num_programs(1)
    r = tl.arange(0, RANK)
    of_b = in_n[:, None] & (r < R)[None, :]
    gate_b = tl.load(gate_b_ptr + n[:, None] * R + r[None, :], mask=of_b, other=0.0)  # (BN, RANK)
    up_b = tl.load(up_b_ptr + n[:, None] * R + r[None, :], mask=of_b, other=0.0)
    down_a = tl.load(down_a_ptr + r[None, :] * N + n[:, None], mask=of_b, other=0.0)
    sum_gate = tl.zeros((BN, RANK), tl.float32)
    sum_up = tl.zeros((BN, RANK), tl.float32)
    sum_down = tl.zeros((BN, RANK), tl.float32)
    blocks = tl.cdiv(M, BM)
    for block in tl.range(split, blocks, splits, num_stages=2):  # the next tiles are read while these are computed
        m = block * BM + tl.arange(0, BM)
        in_m = m < M
        first = (tl.full((), 0, tl.int64) + block * BM) * N
        at = tl.arange(0, BM)[None, :] * N + n[:, None]
        of_a = in_m[:, None] & (r < R)[None, :]
        dyb = tl.load(dyb_ptr + m[:, None] * R + r[None, :], mask=of_a, other=0.0)  # (BM, RANK)
        xa_gate = tl.load(xa_ptr + m[:, None] * (2 * R) + r[None, :], mask=of_a, other=0.0)
        xa_up = tl.load(xa_ptr + m[:, None] * (2 * R) + R + r[None, :], mask=of_a, other=0.0)
        if EVEN:
            dh = tl.load(dh_ptr + first + at).to(tl.float32)
            gate = tl.load(gate_ptr + first + at).to(tl.float32)
            up = tl.load(up_ptr + first + at).to(tl.float32)
        else:
            inside = in_m[None, :] & in_n[:, None]
            dh = tl.load(dh_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.dot(gate_b, tl.trans(xa_gate), gate)
        up = tl.dot(up_b, tl.trans(xa_up), up)
        dh = tl.dot(down_a, tl.trans(dyb), dh)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        dup = (dh * silu).to(dup_ptr.dtype.element_ty)
        dgate = (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dup_ptr.dtype.element_ty)
        h = (silu * up).to(dup_ptr.dtype.element_ty)
        if EVEN:
            tl.store(dgate_ptr + first + at, dgate)
            tl.store(dup_ptr + first + at, dup)
        else:
            inside = in_m[None, :] & in_n[:, None]
            tl.store(dgate_ptr + first + at, dgate, mask=inside)
            tl.store(dup_ptr + first + at, dup, mask=inside)
        sum_gate = tl.dot(dgate, xa_gate, sum_gate)
        sum_up = tl.dot(dup, xa_up, sum_up)
        sum_down = tl.dot(h, dyb, sum_down)
    out = (split * 3 * R + r[None, :]) * N + n[:, None]
    tl.store(parts_ptr + out, sum_gate, mask=of_b)
    tl.store(parts_ptr + out + R * N, sum_up, mask=of_b)
    tl.store(parts_ptr + out + 2 * R * N, sum_down, mask=of_b)


def _rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))  # the least that tl.dot takes


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous


@torch.library.custom_op("recipes::swiglu", mutates_args=())
def swiglu(
    gate: torch.Tensor, up: torch.Tensor, xa: torch.Tensor, gate_b: torch.Tensor, up_b: torch.Tensor
) -> torch.Tensor:
    """As `fused_mlp.swiglu`."""
    h = _like(gate)
    (M, N), R = gate.shape, gate_b.shape[1]
    rows, columns, warps = FORWARD
    _forward[(triton.cdiv(N, columns), triton.cdiv(M, rows))](
        gate.contiguous(), up.contiguous(), xa.contiguous(), gate_b.contiguous(), up_b.contiguous(), h,
        M, N, R, _rank(R), rows, columns, num_warps=warps,
    )  # fmt: skip
    return h


@swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, xa: torch.Tensor, gate_b: torch.Tensor, up_b: torch.Tensor) -> torch.Tensor:
    return _like(gate)


@torch.library.custom_op("recipes::swiglu_gradients", mutates_args=())
def swiglu_gradients(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, xa: torch.Tensor, dyb: torch.Tensor,
    gate_b: torch.Tensor, up_b: torch.Tensor, down_a: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `fused_mlp.swiglu_gradients`."""
    (M, N), R = gate.shape, gate_b.shape[1]
    dgate, dup = _like(gate), _like(gate)
    parts = torch.empty((SPLITS, 3, R, N), dtype=torch.float32, device=gate.device)
    rows, columns, warps, stages = BACKWARD
    _backward[(triton.cdiv(N, columns), SPLITS)](
        dh.contiguous(), gate.contiguous(), up.contiguous(), xa.contiguous(), dyb.contiguous(), gate_b.contiguous(),
        up_b.contiguous(), down_a.contiguous(), dgate, dup, parts,
        M, N, R, _rank(R), rows, columns, M % rows == 0 and N % columns == 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dgate, dup, parts.sum(0)


@swiglu_gradients.register_fake
def _(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, xa: torch.Tensor, dyb: torch.Tensor,
    gate_b: torch.Tensor, up_b: torch.Tensor, down_a: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    sums = torch.empty((3, gate_b.shape[1], gate.shape[1]), dtype=torch.float32, device=gate.device)
    return _like(gate), _like(gate), sums
