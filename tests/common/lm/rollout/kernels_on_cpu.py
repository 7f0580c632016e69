"""Compares every Triton kernel with the same operation in plain torch, in Triton's interpreter: run by test_kernels.py.

It must be a process of its own: Triton decides at import whether it interprets. In 32 bit only: the interpreter has no
16-bit matrix product. tests/system/test_gpu.py compares them in 16 bit on a GPU, by the same functions.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ARCHITECTURE = {
    "heads": 6, "kv_heads": 2, "head_dim": 24, "eps": 1e-6, "one_plus": False, "post_norms": False,
    "activation": "silu", "embed_scale": 1.0, "scale": 24**-0.5, "softcap": None, "final_softcap": None, "windows": (),
    "rotary_tables": (), "longest": 99,
}  # fmt: skip


def four_bit_layer(rows: int, columns: int, nested: bool, device: str, dtype: torch.dtype) -> SimpleNamespace:
    """A layer whose weight is in nf4, as bitsandbytes stores it, with scales in 8 bit or not."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        torch.randn(rows, columns, device=device, dtype=dtype), compress_statistics=nested, quant_type="nf4"
    )
    packed.quant_state = state
    return SimpleNamespace(weight=packed, out_features=rows, in_features=columns)


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Raise AssertionError where a kernel's result differs from the operation's by more than the share `tolerance`."""
    from common.lm import log_prob_kernels, log_probs
    from common.lm.rollout import attention_kernels, four_bit_kernels, kernels, operations, sampling_kernels
    from common.lm.rollout.architecture import Architecture
    from common.lm.rollout.layers import dequantized

    def architecture(**changes):
        return Architecture(**{**ARCHITECTURE, **changes})

    def random(*shape, kind=dtype):
        return torch.randn(*shape, dtype=kind, device=device)

    def equal(ours, reference):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)

    torch.manual_seed(0)
    for one_plus in (False, True):
        a = architecture(one_plus=one_plus)
        x, weight, residual = random(3, 40), random(40), random(3, 40)
        equal(kernels.norm(x, weight, a), operations.norm(x, weight, a))
        ours, reference = residual.clone(), residual.clone()
        equal(kernels.norm(x, weight, a, ours), operations.norm(x, weight, a, reference))
        equal(ours, reference)
        for rotated in (24, 12):
            layer = SimpleNamespace(q_norm=random(24) if one_plus else None, k_norm=random(24))
            tables = random(16, rotated // 2, kind=torch.float32), random(16, rotated // 2, kind=torch.float32)
            rows, positions = torch.tensor([2, 0, 1], device=device), torch.tensor([3, 15, 0], device=device)
            qkv = random(3, 10 * 24)
            caches = torch.zeros(2, 2, 4, 16, 2, 24, dtype=dtype, device=device)
            given = layer, a, tables, rows, positions
            equal(
                kernels.rotate_and_store(qkv, *given, *caches[0]), operations.rotate_and_store(qkv, *given, *caches[1])
            )
            equal(caches[0], caches[1])
    for rank in (8, 24):
        weight, up, down = random(70, 130), random(70, rank), random(rank, 130)
        ours, reference = torch.empty_like(weight), torch.empty_like(weight)
        kernels.merge(ours, weight, up, down, 0.5)
        operations.merge(reference, weight, up, down, 0.5)
        equal(ours, reference)
    for nested, columns in ((True, 320), (False, 256)):
        layers = [four_bit_layer(rows, columns, nested, device, dtype) for rows in (70, 64, 24)]
        whole = torch.cat([dequantized(layer) for layer in layers])
        x, bias, small, up = random(5, columns), random(158), random(5, 8), random(158, 8)
        for programs in (1, 99):
            four_bit_kernels.PROGRAMS = programs  # with few the columns are not split
            matrix = kernels.four_bit_matrix(layers)
            equal(matrix.multiply(x) / columns**0.5, F.linear(x, whole) / columns**0.5)
            equal(
                matrix.multiply(x, bias, small, up) / columns**0.5,
                (F.linear(x, whole, bias) + small @ up.T) / columns**0.5,
            )
    four_bit_kernels.PROGRAMS = 1056
    assert kernels.four_bit_matrix([four_bit_layer(8, 96, True, device, dtype)]) is None  # groups span two rows
    positions = torch.tensor([0, 60, 150], device=device)
    for softcap, window, programs in ((None, None, 128), (None, 7, 1), (5.0, None, 1), (5.0, 70, 128)):
        a = architecture(softcap=softcap)
        attention_kernels.PROGRAMS = programs
        q, keys, values = random(3, 6, 24), random(4, 160, 2, 24), random(4, 160, 2, 24)
        equal(
            kernels.attend(q, keys, values, positions, a, window),
            operations.attend(q, keys, values, positions, a, window),
        )
        k, v = random(12, 2, 24), random(12, 2, 24)
        q = random(12, 6, 24)
        given = operations.Packed.of([7, 5], q.device), a, 3 if window else None
        equal(kernels.attend_prompts(q, k, v, *given), operations.attend_prompts(q, k, v, *given))
    attention_kernels.PROGRAMS = 128
    for activation in ("silu", "gelu_tanh"):
        x = 3 * random(3, 200)
        equal(
            kernels.gate(x, architecture(activation=activation)),
            operations.gate(x, architecture(activation=activation)),
        )
    sampling_kernels.VOCABULARY_BLOCK = 64
    for softcap, temperature, greedy in ((None, 1.0, 0.0), (30.0, 0.7, 0.0), (None, 1.0, 1.0)):
        logits = 4 * random(5, 300)
        end = logits[3].argmax()

        def state():
            def row(*values):
                return torch.tensor(values, device=device)

            return operations.State(
                ids=row(0, 0, 0, 0, 0),
                positions=row(0, 1, 2, 3, 4),
                counts=row(0, 1, 2, 3, 2),
                limits=row(9, 2, 9, 9, 9),
                done=row(False, False, True, False, False),
                seeds=row(5, -7, 2**40 + 3, 9, 2**62),
                tokens=torch.zeros(5, 8, dtype=torch.int64, device=device),
                log_probs=torch.zeros(5, 8, device=device),
            )

        ours, reference = state(), state()
        numbers = torch.tensor(temperature, device=device), torch.tensor(greedy, device=device)
        kernels.choose(logits, ours, *numbers, end, architecture(final_softcap=softcap))
        operations.choose(logits, reference, *numbers, end, architecture(final_softcap=softcap))
        assert reference.counts.tolist() == [1, 2, 2, 4, 3]
        for one, other in zip(ours, reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    sampling_kernels.VOCABULARY_BLOCK = 4096
    log_prob_kernels.BLOCK, log_prob_kernels.CHUNK = 64, 3
    for softcap, temperature in ((None, 1.0), (None, 0.7), (5.0, 0.7)):
        states, weight, weights = random(7, 40).requires_grad_(), random(300, 40) / 6, random(7, kind=torch.float32)
        tokens = torch.arange(7, device=device) * 40
        ours = log_prob_kernels.TokenLogProbs.apply(states, weight, None, tokens, temperature, softcap)
        (gradient,) = torch.autograd.grad((ours[0] * weights).sum(), states)
        logits = F.linear(states, weight).float()
        logits = (logits / softcap).tanh() * softcap if softcap else logits
        reference = log_probs.token_log_probs(logits, tokens, temperature)
        (expected,) = torch.autograd.grad((reference[0] * weights).sum(), states)
        for one, other in zip((*ours, gradient), (*reference, expected), strict=True):
            equal(one, other)
        assert not ours[1].requires_grad
    log_prob_kernels.BLOCK, log_prob_kernels.CHUNK = 4096, 512


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    sys.path.insert(0, str(Path(__file__).parents[4] / "recipes"))
    compare("cpu", torch.float32, 1e-5)
    print("kernels agree")
