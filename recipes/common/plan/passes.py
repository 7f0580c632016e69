"""Seconds of a pass through a model: what the GPU computes and moves, and what the processor needs to start it.

The two run side by side, so a step takes the longer of the two sums. Of the GPU, each kind of kernel has a share of the
card's data sheet, the same on every card. Of the processor, a layer takes so long whatever the size of the batch: that
is what short batches and small models wait for. Standard library only; docs/plan.md says where the constants are from.
"""

from dataclasses import dataclass
from typing import Any

from common.plan.devices import Device
from common.plan.memory import NF4_BYTES, adapter_weights, linear_weights
from common.plan.workload import Workload

# Shares of the peak in 16 bit: products with the base and the output layer, attention forward and backward.
PRODUCTS, ATTENTION, ATTENTION_BACK = 0.72, 0.45, 0.34
FP8_GAIN = 1.5  # of the products with the base in fp8, rounding included
BANDWIDTH_SHARE = 0.8
DEQUANTIZE = 0.7  # of the bandwidth, of what makes 16 bit of nf4
# Bytes that the kernels between the products move, adapters included, in multiples of what a block keeps: a third of
# them in a forward pass.
TRAFFIC = 7.0
# Seconds that the processor needs for a layer, forward and backward. Compiled blocks are those of SFT, DPO, KTO and
# reward where rows are not packed.
COMPILED, EAGER = (1.1e-3, 2.8e-3), (1.4e-3, 3.5e-3)
STORED = {"16 bit": 0.0, "nf4": 0.95e-3, "fp8": 1.5e-3}  # a layer and pass besides: its matrices are made ready
PLAIN = 0.5e-3  # the same for a reward model, whose projections are PEFT's
RECORDED = 0.15e-3  # a layer and pass that is replayed as a part of a CUDA graph
# A micro-batch, apart from its layers: the rows, the loss, what is logged, and the GPU that waits for the first kernel.
# Learning from it, and a pass without gradient; each of PPO's.
MICRO_BATCH, NO_GRADIENT, PPO_PASS = 31e-3, 24e-3, 40e-3


@dataclass(frozen=True)
class Pass:
    """Seconds of the GPU, and of the processor that starts its kernels; passes add up, and count several times."""

    gpu: float
    processor: float

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.gpu + other.gpu, self.processor + other.processor)

    def __mul__(self, times: float) -> "Pass":
        return Pass(self.gpu * times, self.processor * times)

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.processor)


def forward(shape: Any, work: Workload, device: Device, head: bool = True) -> Pass:
    """A micro-batch without gradient, up to the log-probabilities of its tokens where it has a `head`."""
    logits = 2 * _scored(work) * shape.vocab_size * shape.hidden_size if head else 0.0
    gpu = _layers(shape, work, device) + logits / _rate(device)
    return Pass(gpu, shape.layers * _start(work, 0) + _apart(work, NO_GRADIENT))


def training(shape: Any, work: Workload, device: Device, head: bool = True) -> Pass:
    """Forward and backward of a micro-batch, with what is computed a second time."""
    again = recomputed(shape, work)
    # The loss: logits, and the gradient of their input; where that is not made at once, logits a second time.
    logits = (4 if work.method == "sft" else 6) * _scored(work) * shape.vocab_size * shape.hidden_size if head else 0.0
    gpu = _layers(shape, work, device) * (1 + again) + _layers_back(shape, work, device) + logits / _rate(device)
    layers = shape.layers
    layers_again = layers - min(work.kept_layers, layers) if work.gradient_checkpointing else 0
    processor = (layers + layers_again) * _start(work, 0) + layers * _start(work, 1)
    return Pass(gpu, processor + _apart(work, MICRO_BATCH))


def recomputed(shape: Any, work: Workload) -> float:
    """The share of the layers' products that is computed a second time for the backward pass."""
    if not work.gradient_checkpointing:
        return 0.0
    again = 1 - min(work.kept_layers, shape.layers) / shape.layers
    if work.method != "reward" and not work.attention_only and not work.sharded:
        # The fused MLP leaves out the down projection then; a divided model has Unsloth's own kernels.
        again *= 1 - shape.layers * shape.hidden_size * shape.intermediate_size / linear_weights(shape)
    return again


def compiled(work: Workload) -> bool:
    """Whether Unsloth compiles whole blocks: not where their shapes change from batch to batch."""
    return work.method in ("sft", "dpo", "kto", "reward") and not work.packing


def recorded(work: Workload) -> bool:
    """Whether passes are replayed as CUDA graphs."""
    return work.method == "ppo" and not work.gradient_checkpointing


def _scored(work: Workload) -> float:
    """Tokens of a micro-batch that reach the output layer."""
    return work.tokens * (work.completion / work.length if work.completion else 1.0)


def _rate(device: Device) -> float:
    return device.tflops * 1e12 * PRODUCTS


def _layers(shape: Any, work: Workload, device: Device) -> float:
    """Seconds of the GPU for all layers, forward."""
    return (
        _products(shape, work, device)
        + _attention(shape, work) / (device.tflops * 1e12 * ATTENTION)
        + _moved(shape, work, device, TRAFFIC / 3)
    )


def _layers_back(shape: Any, work: Workload, device: Device) -> float:
    """Backward: the gradients of the inputs, since the base is frozen, and of the adapters, which move bytes only."""
    attention = 2.5 * _attention(shape, work) / (device.tflops * 1e12 * ATTENTION_BACK)
    return _products(shape, work, device) + attention + _moved(shape, work, device, TRAFFIC * 2 / 3)


def _products(shape: Any, work: Workload, device: Device) -> float:
    linear = linear_weights(shape)
    adapter = adapter_weights(shape, work.lora_r, work.attention_only)
    gain = FP8_GAIN if work.precision == "fp8" else 1.0
    seconds = 2 * work.tokens * (linear / gain + adapter) / _rate(device)
    if work.precision == "nf4":
        seconds += linear * (NF4_BYTES + 2) / (device.bandwidth * 1e9 * DEQUANTIZE)
    return seconds


def _attention(shape: Any, work: Workload) -> float:
    """FLOPs forward: causal, so a token sees half of its row; two products."""
    return 2.0 * work.length * shape.heads * shape.head_dim * shape.layers * work.tokens


def _moved(shape: Any, work: Workload, device: Device, times: float) -> float:
    h, i = shape.hidden_size, shape.intermediate_size
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = 4 * i + 8 * h + 6 * a + 8 * kv  # bytes of a token, as in memory.py
    return times * block * shape.layers * work.tokens / (device.bandwidth * 1e9 * BANDWIDTH_SHARE)


def _start(work: Workload, back: int) -> float:
    """Seconds of the processor for a layer, forward (0) or backward (1)."""
    if recorded(work):
        return RECORDED
    besides = STORED[work.precision] + (PLAIN if work.method == "reward" else 0.0)
    return (COMPILED if compiled(work) else EAGER)[back] + besides


def _apart(work: Workload, seconds: float) -> float:
    """Seconds of the processor for a pass apart from its layers: `seconds` where a trainer of the library takes it."""
    if work.method != "ppo":
        return seconds
    return 0.0 if recorded(work) else PPO_PASS
