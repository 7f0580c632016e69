"""The time of a step: the passes of its method, sampling, and what the step does besides. Standard library only."""

from dataclasses import dataclass, replace
from typing import Any

from common.plan import passes
from common.plan.devices import Device
from common.plan.memory import MEASURED_ROWS, NF4_BYTES, adapter_weights, base_bytes, linear_weights
from common.plan.passes import BANDWIDTH_SHARE, Pass
from common.plan.sampling import Sampling
from common.plan.workload import SAMPLING, Workload

DECODE_SHARE = 0.75  # of the peak, of a step of decoding where it is not the weights that it waits for
DRAW = 50e-12  # seconds a row and word of the vocabulary to draw a token, on an H200
H200_BANDWIDTH = 4800  # GB/s
DECODE_START = 28e-6  # seconds a layer and step of decoding, as a CUDA graph
GENERATE_START = 1.0e-3  # the same for transformers' generate
LINK_SHARE = 0.63  # of a link between two cards; measured on H200, of a sum as large as the gradients of a 7B model
TENSOR = 35e-6  # seconds of the processor for a matrix of the adapter: its gradient's norm and Adam
FIXED = {"grpo": 0.19, "ppo": 0.03}  # seconds of a step besides: what TRL makes of a rollout, logs; else OTHER
OTHER = 0.013
COMPLETION = 0.15e-3  # seconds a completion: its text, and a reward function that is as quick as `math`


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
    sampled = 0.0
    if work.method in SAMPLING and held is not None:
        share = 1 / work.passes if work.method == "grpo" else 1.0
        sampled = _sample(card, work, device, held) * share
    computed = of_method(shape, work, device).seconds
    tokens = work.generated * work.length if work.method == "ppo" else work.tokens * work.accumulation
    exchange = exchanged(card, work, device)
    updates = work.passes * max(1, work.generated // work.step_rows) if work.method == "ppo" else 1
    matrices = 2 * shape.layers * (4 if work.attention_only else 7) * (2 if work.method == "ppo" else 1)
    besides = FIXED.get(work.method, OTHER) + updates * matrices * TENSOR + work.generated * COMPLETION
    return Time(computed + exchange + sampled + besides, sampled, tokens * work.gpus, exchange)


def of_method(shape: Any, work: Workload, device: Device) -> Pass:
    """All passes of a step but for sampling, by the algorithm of its method."""
    once = passes.forward(shape, work, device)
    states = passes.forward(shape, work, device, head=False)
    match work.method:
        case "reward":
            return passes.training(shape, work, device, head=False) * work.accumulation
        case "ppo":  # policy, reference policy, critic and reward model read the rollout; then policy and critic learn
            parts = max(1, round(work.generated / work.rows))
            scoring = once * 2 + states * (1 + work.reward_model)
            learning = passes.training(shape, work, device) + passes.training(shape, work, device, head=False)
            return (scoring + learning * work.passes) * parts
        case "grpo":
            again = once * (work.reference + (work.passes > 1))  # of several iterations, the policy before the first
            measured = passes.forward(shape, _few(work), device) * (2 - work.reference)  # the log's KL and its ratios
            learning = passes.training(shape, work, device) * work.accumulation
            return learning + (again * work.accumulation + measured) * (1 / work.passes)
        case "kto":  # the completions, and the mismatched ones by the policy too
            more = once * (1 + 2 * work.reference)
        case _:
            more = once * (work.method == "dpo" and work.reference)
    return (passes.training(shape, work, device) + more) * work.accumulation


def _few(work: Workload) -> Workload:
    """The completions whose log-probabilities GRPO measures in each step, with the logits of whole rows."""
    return replace(work, rows=min(MEASURED_ROWS, work.generated), completion=0)


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
