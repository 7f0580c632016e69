"""The least time that a workload can take on a machine, from the arithmetic and memory traffic that it cannot avoid.

    N      parameters of the linear layers       h      hidden size          V   vocabulary
    q, kv  widths of queries and keys            L      layers               S   tokens of a row
    P      parameters of the LoRA adapter, rank 16

FLOPs of a token: forward 2N + 2Vh + 2SqL + 2P (causal attention: a token sees S/2 others on average; two products).
Its gradients: 2N + 2Vh for the inputs alone, as the base is frozen, 5SqL for attention, 4P. Recomputation: 2N + 2SqL +
2P once more. Bytes of one decoding step: 2N + 2Vh in 16 bit (nf4: 0.516N + 2Vh), and for each row 4·kv·L for each token
before it. A share of the ceiling is that least time over the measured time.

Reward models and critics have no 2Vh. Left out: what dequantizing nf4, norms and the optimizer take; that the prompts
of a group are the same.
"""

from dataclasses import dataclass

from common.lm.cards import Architecture
from common.plan.memory import NF4_BYTES, adapter_weights, linear_weights

from benchmarks.workloads import AT_ONCE, RANK, Workload

PPO_EPOCHS = 4


@dataclass(frozen=True)
class Need:
    """What a step needs: FLOPs, and bytes to be moved while tokens are decoded one by one."""

    flops: float
    bytes: float = 0.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return self.flops / flops_per_second + self.bytes / bytes_per_second


def forward(shape: Architecture, length: int, head: bool = True) -> float:
    """FLOPs of a token in a forward pass over rows of `length` tokens; `head`: up to the logits."""
    logits = 2 * shape.vocab_size * shape.hidden_size if head else 0
    return 2 * linear_weights(shape) + logits + attention(shape, length) + 2 * adapter_weights(shape, RANK)


def training(shape: Architecture, length: int, recomputation: bool, head: bool = True) -> float:
    """FLOPs of a token in a forward and a backward pass."""
    logits = 2 * shape.vocab_size * shape.hidden_size if head else 0
    backward = 2 * linear_weights(shape) + logits + 2.5 * attention(shape, length) + 4 * adapter_weights(shape, RANK)
    recomputed = forward(shape, length, head=False) if recomputation else 0.0
    return forward(shape, length, head) + backward + recomputed


def attention(shape: Architecture, length: int) -> float:
    """FLOPs of a token in the two products of causal attention, forward."""
    return 2.0 * length * shape.heads * shape.head_dim * shape.layers


def decoding(shape: Architecture, work: Workload, rows: int, tokens: float) -> Need:
    """To decode `tokens` tokens, `rows` at once, behind the workload's prompts."""
    weights = linear_weights(shape) * (NF4_BYTES if work.load_in_4bit and work.method != "rollout" else 2)
    weights += 2 * shape.vocab_size * shape.hidden_size
    context = work.prompt_length + work.length / 2
    cache = 4 * shape.kv_heads * shape.head_dim * shape.layers * context
    return Need(0.0, tokens / rows * weights + tokens * cache)


def need(shape: Architecture, work: Workload, tokens: float) -> Need:
    """What `tokens` useful tokens of a workload need.

    `tokens` are those that the contestants count: of GRPO and PPO with their prompts, of a rollout without.
    """
    head = work.method not in ("reward", "score")  # theirs is one number wide
    train = training(shape, work.length, work.gradient_checkpointing, head)
    once = forward(shape, work.length, head)
    if work.method in ("sft", "reward"):
        return Need(tokens * train)
    if work.method == "dpo":  # and the reference policy
        return Need(tokens * (train + once))
    if work.method == "kto":  # the reference policy, and both of the mismatched completions
        return Need(tokens * (train + 3 * once))
    if work.method == "score":
        return Need(tokens * once)
    if work.method == "rollout":
        return decoding(shape, work, min(work.batch, AT_ONCE), tokens)
    whole, recomputation = work.prompt_length + work.length, work.gradient_checkpointing
    sampled = decoding(shape, work, work.batch * work.accumulation, tokens * work.length / whole)
    if work.method == "grpo":
        return Need(tokens * training(shape, whole, recomputation), sampled.bytes)
    # PPO: policy and reference policy, critic and reward model once each; then policy and critic in every epoch.
    scored = 2 * forward(shape, whole) + 2 * forward(shape, whole, head=False)
    epoch = training(shape, whole, recomputation) + training(shape, whole, recomputation, head=False)
    return Need(tokens * (scored + PPO_EPOCHS * epoch), sampled.bytes)
