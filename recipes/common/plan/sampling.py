"""What sampling holds on the GPU: a merged copy of the weights and the cache, by the rules of common/lm/rollout.

Standard library only; tests/common/plan/test_sampling.py compares the rules with those of `Rollouts`.
"""

from dataclasses import dataclass
from typing import Any

from common.plan.workload import Workload

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # rows of a step
MAX_ROWS, LENGTH_STEP, RESERVE, FEWEST_ROWS, PREFILL = 256, 128, 2**30, 32, 16384
GENERATED = 128  # completions that transformers' generate makes at once


@dataclass(frozen=True)
class Sampling:
    """Bytes that sampling needs. `copy` is 0 where the base is dequantized in each step, or generate samples."""

    rows: int  # completions at once
    copy: float
    cache: float
    working: float  # made for a prompt and in a step
    kept: float  # what stays while the policy is trained


def sampling(shape: Any, work: Workload, used: float, limit: float, linear: int) -> Sampling:
    """What sampling holds on a card of `limit` bytes of which `used` are taken; the base has `linear` weights."""
    kv = shape.kv_heads * shape.head_dim
    a = shape.heads * shape.head_dim
    each = 2 * shape.layers * kv * 2  # keys and values of a token
    if work.rollouts == "generate":
        rows = min(work.generated, GENERATED)
        return Sampling(rows, 0, rows * work.length * each, rows * shape.vocab_size * 6, 0)
    length = work.length + -work.length % LENGTH_STEP
    row = length * (each + 12)
    free = limit - used - RESERVE
    copy = 2.0 * linear if free >= 2 * linear + FEWEST_ROWS * work.length * (each + 12) else 0.0
    wanted = next((size for size in SIZES if size >= min(MAX_ROWS, max(work.generated, 1))), SIZES[-1])
    within = max((size for size in SIZES if size <= (free - copy) / row), default=1)
    rows = min(wanted, within)
    cache = rows * row
    # Prompts are computed up to 16,384 tokens at once: gate and up and their product, queries, keys and values, the
    # residual and its norm. A step holds the logits of its rows in 16 and 32 bit.
    prompts = min(PREFILL, -(-rows // work.group) * (work.length - work.completion))
    block = 5 * shape.intermediate_size + 4 * (a + 2 * kv) + 8 * shape.hidden_size
    working = max(prompts * block, rows * shape.vocab_size * 6)
    if not copy:  # the matrices of a layer, one after another in one buffer
        working += 2 * shape.hidden_size * 2 * shape.intermediate_size
    kept = copy + cache if limit - used - copy - cache >= limit / 2 else 0.0
    return Sampling(rows, copy, cache, working, kept)
