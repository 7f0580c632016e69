"""Log-probabilities of tokens under a frozen head, and their gradients, on a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program looks at at once
CHUNK = 512  # tokens whose logits are in memory at once: 156 MB in 16 bit for a vocabulary of 152,000


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
def _score(logits_ptr, tokens_ptr, log_probs_ptr, entropies_ptr, temperature, softcap, V,
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


class TokenLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies (N,) of `tokens` (N,), from the states (N, h) before a frozen head.

    They are those of softmax(logits / temperature), after the soft cap that Gemma 2 has; entropies have no gradient. A
    token's log-probability depends on its own state alone, so its gradient in that state, (h,), is computed with it,
    while the logits are there: the backward pass only weighs it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        learns = ctx.needs_input_grad[0]
        slopes = torch.empty_like(states) if learns else None
        scored = []
        for first in range(0, len(states), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = torch.nn.functional.linear(states[rows], weight, bias)  # (n, V)
            scored.append(score(logits, tokens[rows], temperature, softcap, learns))
            if slopes is not None:
                torch.mm(logits, weight, out=slopes[rows])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        log_probs, entropies = (torch.cat(parts) for parts in zip(*scored, strict=True))
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0][:, None]).to(slopes.dtype), None, None, None, None, None


def score(
    logits: Tensor, tokens: Tensor, temperature: float, softcap: float | None, slopes: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token (N,) under softmax(logits / temperature), and that distribution's entropy (N,).

    `logits` (N, V) are contiguous, as the head gives them; `softcap` is Gemma 2's. With `slopes` they are overwritten
    by the derivatives of each token's log-probability.
    """
    count, vocabulary = logits.shape
    log_probs, entropies = logits.new_empty(2, count, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    _score[(count,)](
        logits, tokens, log_probs, entropies, temperature, softcap or 0.0, vocabulary, BLOCK=block,
        CAP=softcap is not None, SLOPES=slopes, num_warps=8,
    )  # fmt: skip
    return log_probs, entropies
