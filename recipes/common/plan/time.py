"""The time of a step, from the arithmetic and the memory traffic of a model's shape. Standard library only.

A step is counted as floating-point operations at a share of the card's peak, bytes at a share of its bandwidth, and a
fixed time for starting kernels. The shares were set on one H200 (docs/plan.md); other cards are assumed to reach the
same shares of their data sheets.
"""

from dataclasses import dataclass
from typing import Any

from common.plan.devices import Device
from common.plan.memory import NF4_BYTES, adapter_weights, base_bytes, linear_weights
from common.plan.sampling import Sampling
from common.plan.workload import SAMPLING, Workload

PEAK_SHARE, NARROW = 0.75, 2050  # the share of the peak at a width h: h / (h + NARROW), at most PEAK_SHARE
DECODE_SHARE = 0.75  # likewise, of a step of decoding
DRAW = 50e-12  # seconds a row and word of the vocabulary to draw a token, on an H200
BANDWIDTH_SHARE = 0.8
LINK_SHARE = 0.63  # of a link between two cards; measured on H200 for the gradients of a 7B model, by NCCL's ring
TRAFFIC = 8.0  # bytes that kernels between the matrix products move, in multiples of what a block keeps, forward + back
# Seconds to start the kernels of one layer, forward and backward: short batches wait for it. PPO's are not compiled;
# without recomputation they are recorded as CUDA graphs.
LAYER_START, PPO_LAYER_START, RECORDED_START = 0.35e-3, 4.6e-3, 1.5e-3
FP8_GAIN = 1.5  # of the matrix products in fp8, their scales included
H200_BANDWIDTH = 4800  # GB/s
DECODE_START = 28e-6  # seconds a layer and step of decoding, as a CUDA graph
GENERATE_START = 1.0e-3  # the same for transformers' generate
FIXED = {"grpo": 0.1, "ppo": 0.2}  # seconds of a step besides: rewards, the optimizer, data, logs; else OTHER
OTHER = 0.03


@dataclass(frozen=True)
class Time:
    """Seconds of a step, and the useful tokens of it on all GPUs."""

    seconds: float
    sampling: float  # of which sampling
    tokens: int
    exchange: float = 0.0  # of which the GPUs only exchange gradients or weights

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(card: Any, work: Workload, device: Device, held: Sampling | None = None) -> Time:
    """The time of a step of `work` on each of its GPUs; `held` is what sampling holds, for GRPO and PPO.

    A step is one of the optimizer's, as the trainer counts them; of PPO it is a rollout with all that is learned of it.
    GRPO samples for `work.passes` steps at once, and the time of that is divided among them.
    """
    shape = card.architecture
    micro = _passes(shape, work, device)
    batches = work.accumulation
    sampled, share = 0.0, 1.0
    if work.method == "ppo":
        batches = work.passes * max(1, round(work.generated / work.rows))
        # The policy, the reference policy, the critic and, where there is one, the reward model read the rollout once.
        forward = _forward(shape, work, device) * max(1, round(work.generated / work.rows))
        micro, extra = 2 * micro, forward * (3 + work.reward_model)
    else:
        references = 1 if work.method in ("dpo", "kto") and work.reference else 0
        if work.method == "grpo":
            references = work.reference + (work.passes > 1)  # the log-probabilities before the step
            share = 1 / work.passes
        if work.method == "kto":
            references += 1  # mismatched completions
        extra = references * _forward(shape, work, device) * work.accumulation * share
    if work.method in SAMPLING and held is not None:
        sampled = _sample(card, work, device, held) * share
    tokens = work.generated * work.length if work.method == "ppo" else work.tokens * work.accumulation
    exchange = exchanged(card, work, device)
    computing = batches * micro + extra + sampled + FIXED.get(work.method, OTHER)
    return Time(computing + exchange, sampled, tokens * work.gpus, exchange)


def exchanged(card: Any, work: Workload, device: Device) -> float:
    """Seconds of a step in which the GPUs of one host do nothing but exchange.

    DDP adds up the adapter's gradients once a step, by a ring: each GPU sends 2 (n - 1) / n of their bytes. FSDP2
    gathers the base twice a micro-batch, each time (n - 1) / n of its bytes, and copies all of it to its place. Both
    happen beside the computing, and take it the time that they need: all of it is counted.
    """
    if work.gpus == 1:
        return 0.0
    others = (work.gpus - 1) / work.gpus
    link = device.link * 1e9 * LINK_SHARE
    gradients = adapter_weights(card.architecture, work.lora_r, work.attention_only) * 4
    seconds = 2 * others * gradients / link
    if work.sharded:
        weights, _ = base_bytes(card, work)
        copied = 2 * weights / (device.bandwidth * 1e9 * BANDWIDTH_SHARE)  # read and written
        seconds += 2 * work.accumulation * (others * weights / link + copied)
    return seconds


def _passes(shape: Any, work: Workload, device: Device) -> float:
    """Seconds of the forward and the backward pass of a micro-batch."""
    again = 0.0
    if work.gradient_checkpointing:
        again = 1 - min(work.kept_layers, shape.layers) / shape.layers  # share of the layers computed a second time
        if work.method != "reward" and not work.sharded:  # the fused MLP leaves out the down projection then
            again *= 1 - shape.layers * shape.hidden_size * shape.intermediate_size / linear_weights(shape)
    head = 0 if work.method == "reward" else (4 if work.method == "sft" else 6)
    flops = _flops(shape, work, passes=2 + again, attention=3.5 + again, head=head)
    return _seconds(shape, work, device, flops, passes=2 + again, traffic=1 + again / 3)


def _forward(shape: Any, work: Workload, device: Device) -> float:
    """Seconds of a forward pass alone."""
    flops = _flops(shape, work, passes=1, attention=1, head=0 if work.method == "reward" else 2)
    return _seconds(shape, work, device, flops, passes=1, traffic=1 / 3)


def _flops(shape: Any, work: Workload, passes: float, attention: float, head: float) -> float:
    linear = linear_weights(shape) + adapter_weights(shape, work.lora_r, work.attention_only) * 1.5
    wide = shape.heads * shape.head_dim
    a_token = 2 * linear * passes
    a_token += 2 * work.length * wide * shape.layers * attention  # causal: half of the keys, two products
    scored = work.completion / work.length if work.completion else 1.0  # the share of tokens that reach the head
    a_token += head * shape.vocab_size * shape.hidden_size * scored
    return a_token * work.tokens


def _seconds(shape: Any, work: Workload, device: Device, flops: float, passes: float, traffic: float) -> float:
    h, i = shape.hidden_size, shape.intermediate_size
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = 4 * i + 8 * h + 6 * a + 8 * kv
    moved = TRAFFIC * traffic * block * shape.layers * work.tokens
    if work.precision == "nf4":  # expanded to 16 bit in every pass
        moved += passes * linear_weights(shape) * (NF4_BYTES + 2)
    share = min(PEAK_SHARE, h / (h + NARROW))
    if work.precision == "fp8":
        share *= FP8_GAIN
    computing = flops / (device.tflops * 1e12 * share) + moved / (device.bandwidth * 1e9 * BANDWIDTH_SHARE)
    start = LAYER_START
    if work.method == "ppo":
        start = PPO_LAYER_START if work.gradient_checkpointing else RECORDED_START
    return max(computing, start * shape.layers * passes / 2)


def _sample(card: Any, work: Workload, device: Device, held: Sampling) -> float:
    """Seconds to sample a step's completions, prompts included."""
    shape = card.architecture
    bandwidth = device.bandwidth * 1e9 * BANDWIDTH_SHARE
    linear, head = linear_weights(shape), shape.vocab_size * shape.hidden_size
    waves = -(-work.generated // max(held.rows, 1))
    rows = min(held.rows, work.generated)
    prompt = work.length - work.completion
    cached = rows * (prompt + work.completion / 2) * 4 * shape.kv_heads * shape.head_dim * shape.layers
    read = 2 * linear if held.copy or work.precision == "16 bit" else linear * (NF4_BYTES + 2 + 2)
    reading = (read + 2 * head) / bandwidth
    computing = 2 * rows * (linear + head) / (device.tflops * 1e12 * DECODE_SHARE)
    drawing = rows * shape.vocab_size * DRAW * H200_BANDWIDTH / device.bandwidth
    start = shape.layers * (GENERATE_START if work.rollouts == "generate" else DECODE_START)
    steps = max(reading, computing) + cached / bandwidth + drawing + start
    prompts = 2 * linear * prompt * work.generated / work.group / (device.tflops * 1e12 * 0.5)
    merging = held.copy * 3 / bandwidth
    return waves * work.completion * steps + prompts + merging
