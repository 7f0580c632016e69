"""The kernels of the MLP under LoRA in Triton's interpreter, beside plain lines in float64.

    TRITON_INTERPRET=1 PYTHONPATH=recipes python tests/references/mlp_kernels.py

Prints, for each shape, the largest relative difference of an output. The interpreter has no bfloat16 products, so the
shapes are in float32; tests/system/test_gpu.py compares bfloat16.
"""

import torch
from common.lm.fused_mlp_kernels import swiglu, swiglu_gradients

SHAPES = ((70, 200, 4), (33, 130, 16), (64, 128, 20), (1, 16, 1))  # rows, width, rank: off the tiles on both sides


def plain(gate, up, dh, xa, dyb, gate_b, up_b, down_a):
    """The same by the formulas, with autograd for the gradients."""
    leaves = gate, up, gate_b, up_b, down_a = [t.double().requires_grad_() for t in (gate, up, gate_b, up_b, down_a)]
    e, u = gate + xa[:, 0].double() @ gate_b.t(), up + xa[:, 1].double() @ up_b.t()
    h = e / (1 + torch.exp(-e)) * u
    below = dyb.double()  # the adapter below: (h Ad^T) Bd^T, whose gradient with respect to h Ad^T is dyb
    total = (h * dh.double()).sum() + ((h @ down_a.t()) * below).sum()
    dgate, dup, dgate_b, dup_b, ddown_a = torch.autograd.grad(total, leaves)
    return h.detach(), dgate, dup, torch.stack([dgate_b.t(), dup_b.t(), ddown_a])


def worst(rows: int, width: int, rank: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest relative difference of an output."""
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(rows, width).to(device, dtype) for _ in range(3))
    xa, dyb, down_a = (torch.randn(shape).to(device, dtype) for shape in ((rows, 2, rank), (rows, rank), (rank, width)))
    gate_b, up_b = (torch.randn(width, rank).to(device, dtype) for _ in range(2))
    h = swiglu(gate, up, xa, gate_b, up_b)
    ours = (h, *swiglu_gradients(dh, gate, up, xa, dyb, gate_b, up_b, down_a))
    theirs = plain(gate, up, dh, xa, dyb, gate_b, up_b, down_a)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    for shape in SHAPES:
        rows, width, rank = shape
        print(f"{rows} x {width}, rank {rank}: {worst(*shape, dtype=torch.float32):.2e}")


if __name__ == "__main__":
    main()
