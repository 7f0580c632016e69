"""The least time that a workload can take on a machine, from the arithmetic and memory traffic that it cannot avoid.

    N      parameters of the linear layers       h      hidden size          V   vocabulary
    q, kv  widths of queries and keys            L      layers               S   tokens of a row
    P      parameters of the LoRA adapter, rank 16

FLOPs of a token: forward 2N + 2Vh + 2SqL + 2P (causal attention: a token sees S/2 others on average; two products).
Its gradients: 2N + 2Vh for the inputs alone, as the base is frozen, 5SqL for attention, 4P. Recomputation: 2N + 2SqL +
2P once more. Bytes of one decoding step: 2N + 2Vh in 16 bit (nf4: 0.516N + 2Vh), and for each row 4·kv·L for each token
before it. A share of the ceiling is that least time over the measured time.

Left out: what dequantizing nf4, norms and the optimizer take; that the prompts of a group are the same.
"""

from dataclasses import dataclass

from common.lm.cards import Architecture
from common.lm.memory import NF4_BYTES

from benchmarks.workloads import Workload

RANK = 16
PPO_EPOCHS = 4


@dataclass(frozen=True)
class Need:
    """What a step needs: FLOPs, and bytes to be moved while tokens are decoded one by one."""

    flops: float
    bytes: float = 0.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return self.flops / flops_per_second + self.bytes / bytes_per_second


def linear_parameters(shape: Architecture) -> int:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden_size * (queries + keys) + 3 * shape.hidden_size * shape.intermediate_size
    return shape.layers * layer


def lora_parameters(shape: Architecture) -> int:
    h, i, q, kv = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    return RANK * shape.layers * (2 * (h + q) + 2 * (h + kv) + 3 * (h + i))


def forward(shape: Architecture, length: int) -> float:
    """FLOPs of a token in a forward pass over rows of `length` tokens."""
    attention = 2 * length * shape.heads * shape.head_dim * shape.layers
    head = 2 * shape.vocab_size * shape.hidden_size
    return 2 * linear_parameters(shape) + head + attention + 2 * lora_parameters(shape)


def training(shape: Architecture, length: int, recomputation: bool) -> float:
    """FLOPs of a token in a forward and a backward pass."""
    attention = 2 * length * shape.heads * shape.head_dim * shape.layers
    backward = 2 * linear_parameters(shape) + 2 * shape.vocab_size * shape.hidden_size + 2.5 * attention
    recomputed = 2 * linear_parameters(shape) + attention + 2 * lora_parameters(shape) if recomputation else 0.0
    return forward(shape, length) + backward + 4 * lora_parameters(shape) + recomputed


def decoding(shape: Architecture, work: Workload, rows: int, tokens: float) -> Need:
    """To decode `tokens` tokens, `rows` at once, behind the workload's prompts."""
    weights = linear_parameters(shape) * (NF4_BYTES if work.load_in_4bit and work.method != "rollout" else 2)
    weights += 2 * shape.vocab_size * shape.hidden_size
    context = work.prompt_length + work.length / 2
    cache = 4 * shape.kv_heads * shape.head_dim * shape.layers * context
    return Need(0.0, tokens / rows * weights + tokens * cache)


def need(shape: Architecture, work: Workload, tokens: float) -> Need | None:
    """What `tokens` useful tokens of a workload need; None where there is no formula.

    `tokens` are those that the contestants count: of GRPO and PPO with their prompts, of a rollout without.
    """
    train = training(shape, work.length, work.gradient_checkpointing)
    if work.method in ("sft", "reward"):
        return Need(tokens * train)
    if work.method == "dpo":  # and the reference policy
        return Need(tokens * (train + forward(shape, work.length)))
    if work.method == "kto":  # the reference policy, and both of the mismatched completions
        return Need(tokens * (train + 3 * forward(shape, work.length)))
    if work.method == "score":
        return Need(tokens * forward(shape, work.length))
    if work.method == "rollout":
        return decoding(shape, work, min(work.batch, 256), tokens)
    whole = work.prompt_length + work.length
    sampled = decoding(shape, work, work.batch * work.accumulation, tokens * work.length / whole)
    train, once = training(shape, whole, work.gradient_checkpointing), forward(shape, whole)
    if work.method == "grpo":
        return Need(tokens * train, sampled.bytes)
    # PPO: policy, reference, critic and reward model each once, then policy and critic in every epoch.
    return Need(tokens * (4 * once + 2 * PPO_EPOCHS * train), sampled.bytes)
