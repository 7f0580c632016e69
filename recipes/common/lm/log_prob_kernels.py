"""Log-probabilities of tokens from their logits, and how they change with the logits, as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program looks at at once


@triton.jit
def _scaled(x, temperature, softcap, CAP: tl.constexpr):
    """The logit that softmax sees, and its slope in the one that is stored."""
    x = x.to(tl.float32)
    slope = 1 / temperature
    if CAP:
        tanh = 1 - 2 / (tl.exp(2 * x / softcap) + 1)
        x = softcap * tanh
        slope = slope * (1 - tanh * tanh)
    return x / temperature, slope


@triton.jit
def _token_log_probs(logits_ptr, tokens_ptr, log_probs_ptr, entropies_ptr, temperature, softcap, V,
                     BLOCK: tl.constexpr, CAP: tl.constexpr, SLOPES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    token = tl.load(tokens_ptr + row)
    largest = -float("inf")
    total = 0.0  # of exp(x - largest), and of x exp(x - largest)
    weighted = 0.0
    for first in range(0, V, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < V
        x, _ = _scaled(tl.load(logits_ptr + c, mask=inside, other=0.0), temperature, softcap, CAP)
        x = tl.where(inside, x, -float("inf"))
        new = tl.maximum(largest, tl.max(x, 0))
        shrunk = tl.exp(largest - new)
        e = tl.exp(x - new)
        total = total * shrunk + tl.sum(e, 0)
        weighted = weighted * shrunk + tl.sum(tl.where(inside, x, 0.0) * e, 0)
        largest = new
    normalizer = largest + tl.log(total)
    chosen, _ = _scaled(tl.load(logits_ptr + token), temperature, softcap, CAP)
    tl.store(log_probs_ptr + row, chosen - normalizer)
    tl.store(entropies_ptr + row, normalizer - weighted / total)
    if SLOPES:
        for first in range(0, V, BLOCK):
            c = first + tl.arange(0, BLOCK)
            inside = c < V
            x, slope = _scaled(tl.load(logits_ptr + c, mask=inside, other=0.0), temperature, softcap, CAP)
            slopes = (tl.where(c == token, 1.0, 0.0) - tl.exp(x - normalizer)) * slope
            tl.store(logits_ptr + c, slopes.to(logits_ptr.dtype.element_ty), mask=inside)


def token_log_probs(
    logits: Tensor, tokens: Tensor, temperature: float, softcap: float | None, slopes: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token (N,) under softmax(logits / temperature), and that distribution's entropy (N,).

    `logits` (N, V) are contiguous, as the head gives them; `softcap` is Gemma 2's. With `slopes` they are overwritten
    by the derivatives of each token's log-probability.
    """
    count, vocabulary = logits.shape
    log_probs, entropies = logits.new_empty(2, count, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    _token_log_probs[(count,)](
        logits, tokens, log_probs, entropies, temperature, softcap or 0.0, vocabulary, BLOCK=block,
        CAP=softcap is not None, SLOPES=slopes, num_warps=8,
    )  # fmt: skip
    return log_probs, entropies
