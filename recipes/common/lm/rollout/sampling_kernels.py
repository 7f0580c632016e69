"""The draw of a decode step as Triton kernels."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from common.lm.rollout import operations
from common.lm.rollout.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_BLOCK = 4096  # logits that one program looks at


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _exponential(share):
    """-log(1 - share), which is exponentially distributed. Triton's own log has branches, and took ten times as long.

    The polynomial is that of logf in Cephes (netlib.org/cephes), for numbers between the roots of 1/2 and 2.
    """
    bits = (1 - tl.minimum(share, 0.99999994)).to(tl.int32, bitcast=True) - 0x3F3504F3
    z = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1
    y = 7.0376836292e-2 * z - 1.1514610310e-1
    y = y * z + 1.1676998740e-1
    y = y * z - 1.2420140846e-1
    y = y * z + 1.4249322787e-1
    y = y * z - 1.6668057665e-1
    y = y * z + 2.0000714765e-1
    y = y * z - 2.4999993993e-1
    y = y * z + 3.3333331174e-1
    log = z - 0.5 * z * z + y * z * z * z + (bits >> 23).to(tl.float32) * 0.69314718
    return tl.where(share < 1e-3, share * (1 + 0.5 * share), -log)


@triton.jit
def _score(x, temperature, softcap, CAP: tl.constexpr):
    x = x.to(tl.float32)
    if CAP:
        x = softcap * (1 - 2 / (tl.exp(2 * x / softcap) + 1))
    return x / temperature


@triton.jit
def _scan(logits_ptr, temperature_ptr, greedy_ptr, seeds_ptr, counts_ptr, max_ptr, sum_ptr, best_ptr, token_ptr,
          V, softcap, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    block = tl.program_id(1)
    c = block * BLOCK + tl.arange(0, BLOCK)
    inside = c < V
    x = tl.load(logits_ptr + b.to(tl.int64) * V + c, mask=inside, other=0.0)
    x = tl.where(inside, _score(x, tl.load(temperature_ptr), softcap, CAP), -float("inf"))
    largest = tl.max(x)
    weight = tl.exp(x - largest)
    seed = tl.load(seeds_ptr + b)
    key = _mix(seed.to(tl.uint32) ^ _mix((tl.load(counts_ptr + b) + 0x9E3779B9).to(tl.uint32)))
    key = _mix(key ^ (seed >> 32).to(tl.uint32))
    bits = _mix(_mix(c.to(tl.uint32) ^ key) + key)
    rate = _exponential((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    # The largest of x + Gumbel noise is the largest of weight / rate: one logarithm less for each token.
    greedy = tl.load(greedy_ptr) > 0
    race = tl.where(greedy, x, weight / rate)
    best, token = tl.max(race, 0, return_indices=True)  # of equal ones the first
    best = tl.where(greedy, best, tl.log(tl.maximum(best, 1e-37)) + largest)
    at = b * BLOCKS + block
    tl.store(max_ptr + at, largest)
    tl.store(sum_ptr + at, tl.sum(weight))
    tl.store(best_ptr + at, best)
    tl.store(token_ptr + at, token + block * BLOCK)


@triton.jit
def _append(logits_ptr, temperature_ptr, max_ptr, sum_ptr, best_ptr, token_ptr, end_ptr, ids_ptr, positions_ptr,
            counts_ptr, limits_ptr, done_ptr, tokens_ptr, log_probs_ptr, V, N, softcap, BLOCKS: tl.constexpr,
            PADDED: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    b = tl.program_id(0)
    c = tl.arange(0, PADDED)
    inside = c < BLOCKS
    at = b * BLOCKS + c
    best = tl.argmax(tl.load(best_ptr + at, mask=inside, other=-float("inf")), 0)
    largest = tl.load(max_ptr + at, mask=inside, other=-float("inf"))
    top = tl.max(largest)
    total = tl.sum(tl.load(sum_ptr + at, mask=inside, other=0.0) * tl.exp(largest - top))
    token = tl.load(token_ptr + b * BLOCKS + best).to(tl.int64)
    score = _score(tl.load(logits_ptr + b.to(tl.int64) * V + token), tl.load(temperature_ptr), softcap, CAP)
    if tl.load(done_ptr + b) == 0:
        count = tl.load(counts_ptr + b)
        tl.store(tokens_ptr + b * N + count, token)
        tl.store(log_probs_ptr + b * N + count, score - top - tl.log(total))
        tl.store(counts_ptr + b, count + 1)
        if (token == tl.load(end_ptr)) | (count + 1 >= tl.load(limits_ptr + b)):
            tl.store(done_ptr + b, 1)
        else:
            tl.store(positions_ptr + b, tl.load(positions_ptr + b) + 1)
            tl.store(ids_ptr + b, token)


def choose(
    logits: "Tensor",
    state: operations.State,
    temperature: "Tensor",
    greedy: "Tensor",
    end: "Tensor",
    architecture: Architecture,
) -> None:
    """As `operations.choose`, with the same noise; the logits are read once."""
    rows, size = logits.shape
    blocks = triton.cdiv(size, VOCABULARY_BLOCK)
    parts: list[Any] = [
        torch.empty(rows, blocks, dtype=kind, device=logits.device)
        for kind in (torch.float32, torch.float32, torch.float32, torch.int32)
    ]
    softcap = architecture.final_softcap
    _scan[(rows, blocks)](
        logits, temperature, greedy, state.seeds, state.counts, *parts, size, softcap or 0.0, VOCABULARY_BLOCK, blocks,
        softcap is not None, num_warps=8,
    )  # fmt: skip
    _append[(rows,)](
        logits, temperature, *parts, end, state.ids, state.positions, state.counts, state.limits,
        state.done.view(torch.int8), state.tokens, state.log_probs, size, state.tokens.shape[1], softcap or 0.0, blocks,
        triton.next_power_of_2(blocks), softcap is not None, num_warps=1,
    )  # fmt: skip
