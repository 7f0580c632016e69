"""The peak GPU memory of a run, part by part, from a model's sizes, before anything is loaded.

The estimate is for what the recipes do: a frozen base in 16 bit, nf4 or fp8, LoRA adapters, 8-bit Adam, Unsloth's
kernels, a loss in chunks. Every part is a sum of named tensors that a reader can check. The parts are those of the
phase in which a run needs the most: training, sampling (GRPO and PPO), or scoring of completions (GRPO).
tests/common/plan/test_memory.py compares the total with measured runs and states the error.

Standard library only: env-check.py reads this from a bare Python. `card` is any object with the `parameters` and the
`architecture` of a model card.

Left out: training every weight, vLLM beside the trainer, images, a reward model with a base of its own.
"""

from dataclasses import dataclass, fields
from typing import Any

from common.plan.sampling import sampling
from common.plan.workload import SAMPLING, Workload

GIB = 2**30
# nf4: half a byte a weight; per 64 weights a one-byte scale; per 256 such scales a float32 (double quantization).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
CUDA_CONTEXT = 0.5 * GIB  # the driver, cuBLAS and the kernels; no allocator of torch's counts it
# The loss sees the vocabulary for so many tokens at a time: an eighth of them, at least 512, at most as many as make 2
# GiB at 8 bytes a logit (unsloth_zoo, fused_losses/chunked_logprob.py). PPO's own loss: 128 (lm/log_probs.py).
LOSS_ROWS, LOSS_CHUNK, PPO_ROWS = 512, 2 * GIB, 128
LOGIT_BYTES = {"sft": 4, "dpo": 4, "kto": 4, "grpo": 7, "ppo": 20, "reward": 0}  # measured
OFFLOADED_FROM = 512  # tokens; for shorter rows Unsloth keeps checkpoints on the GPU (unsloth, models/_utils.py)
MLP_PART = 4096  # tokens (lm/fused_mlp.py)
MEASURED_ROWS = 4  # completions of a step whose log-probabilities GRPO computes with all their logits (grpo.py)
NCCL = 0.4 * GIB  # its buffers, which no allocator of torch's counts either; assumed, not measured
GATHERED = 2.75  # of a divided model, in multiples of embedding and output layer; measured with a 72B on 2 and 4 GPUs
WORKSPACE = 0.05 * GIB  # cuBLAS and small tensors
GRAPHS = 0.1 * GIB  # what the recorded steps of sampling keep
# What torch's allocator reserves and has in no tensor: a little, and a share of what comes and goes; measured.
SLACK, SLACK_SHARE, SAMPLING_SLACK = 0.08 * GIB, {True: 0.07, False: 0.03}, 0.15 * GIB
REFERENCE_SHARE = 0.05  # likewise, where activations are recomputed and the reference policy is computed before


@dataclass(frozen=True)
class Memory:
    """The peak of a run, part by part, in GiB."""

    weights: float  # the frozen base
    adapter: float  # LoRA weights and their gradients
    optimizer: float  # Adam's two moments
    activations: float  # kept for, and made in, the backward pass; or made for a prompt when sampling
    logits: float  # what the loss makes at once beyond that
    sampling: float  # the merged copy of the weights and the cache, while they are held
    overhead: float  # what no tensor of ours accounts for

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def peak(card: Any, work: Workload, gib: float = 80) -> Memory:
    """The peak memory of `work` on one of its GPUs, which has `gib` GiB: how much is sampled at once depends on it."""
    shape = card.architecture
    weights, linear = base_bytes(card, work)
    adapter, gradients, optimizer = trained_bytes(shape, work)
    share = work.gpus if work.sharded else 1
    static = weights / share, adapter / share, optimizer / share
    overhead = CUDA_CONTEXT + WORKSPACE + SLACK
    if work.precision == "fp8":  # a matrix transposed, and the rows of an activation and a gradient
        overhead += shape.hidden_size * shape.intermediate_size + work.tokens * shape.intermediate_size
    if work.method != "reward" and not work.attention_only:  # the fused MLP expands its three matrices, not one
        matrix = {"nf4": 2, "fp8": 1, "16 bit": 0}[work.precision] * shape.hidden_size * shape.intermediate_size
        overhead += 2 * matrix
    if work.reward_model:  # its pass is recorded as a CUDA graph, with the matrices that it expands
        largest = shape.hidden_size * max(shape.intermediate_size, shape.heads * shape.head_dim)
        overhead += GRAPHS + (2 * 2 * largest if work.precision == "nf4" else 0)
    if work.sharded:
        # FSDP2 gathers embedding and output layer for the whole step, and a layer and the next one while it computes;
        # all come in a buffer of their size, and what one stream has freed is not free for another one.
        unquantized = (card.parameters - linear) * 2
        overhead += GATHERED * unquantized + 2 * 2 * (weights - unquantized) / shape.layers
    elif work.gpus > 1 and work.method in SAMPLING:  # the gradients are copied into buckets that the GPUs add up
        overhead += gradients
    if work.gpus > 1:
        overhead += NCCL
    kept, backward = activation_bytes(shape, work)
    # What the loss makes is freed before a layer's backward pass; with several iterations it is not; measured.
    loss = max(0, _logits(shape, work) - (backward if work.method == "ppo" or work.passes == 1 else 0))
    slack = SLACK_SHARE[work.gradient_checkpointing]
    if work.gradient_checkpointing and work.method in ("dpo", "kto"):
        slack += REFERENCE_SHARE
    activations = kept + backward
    loose = overhead + slack * activations
    phases: list[tuple[float, ...]]
    held = sampling(shape, work, sum(static) + CUDA_CONTEXT, gib * GIB, linear) if work.method in SAMPLING else None
    if held is None:
        phases = [(*static, gradients / share, activations, loss, 0, loose)]
    else:
        graphs = 0 if work.rollouts == "generate" else GRAPHS
        stays = held.kept + graphs * (held.kept > 0)
        loose += SAMPLING_SLACK
        scoring = _scoring(shape, work)
        phases = [
            (*static, gradients / share, activations, loss, stays, loose),
            (*static, 0, held.working, 0, held.copy + held.cache + graphs, overhead + SAMPLING_SLACK),
            (*static, 0, 0, scoring, stays, overhead + SAMPLING_SLACK + SLACK_SHARE[True] * scoring),
        ]
    if work.precision == "fp8":  # it is loaded in 16 bit, and quantized layer by layer
        phases.append((card.parameters * 2.0, adapter, 0, 0, 0, 0, 0, overhead + 2 * linear / shape.layers))
    if work.sharded:  # each GPU loads all of the base, and then keeps its part; the embedding is copied meanwhile
        embedding = 2 * shape.vocab_size * shape.hidden_size
        phases.append((weights, adapter, 0, 0, 0, 0, 0, CUDA_CONTEXT + NCCL + embedding))
    base, lora, moments, grown, active, logits, sampled, rest = max(phases, key=sum)
    return Memory(*(part / GIB for part in (base, lora + grown, moments, active, logits, sampled, rest)))


def base_bytes(card: Any, work: Workload) -> tuple[float, int]:
    """Bytes of the frozen base, and how many weights its linear layers have.

    Only those are quantized: embedding, output layer, norms and a vision tower stay in 16 bit.
    """
    linear = linear_weights(card.architecture)
    each = {"nf4": NF4_BYTES, "fp8": 1.0, "16 bit": 2.0}[work.precision]
    return linear * each + (card.parameters - linear) * 2, linear


def linear_weights(shape: Any) -> int:
    """How many weights the linear layers have."""
    h, i = shape.hidden_size, shape.intermediate_size
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim  # widths of the queries, of the keys
    return shape.layers * (2 * h * a + 2 * h * kv + 3 * h * i)


def adapter_weights(shape: Any, lora_r: int, attention_only: bool = False) -> int:
    """How many weights one LoRA adapter has: r x (in + out) a projection."""
    h, i = shape.hidden_size, shape.intermediate_size
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * (h + a) + 2 * (h + kv) + (0 if attention_only else 3 * (h + i))
    return lora_r * shape.layers * projections


def trained_bytes(shape: Any, work: Workload) -> tuple[float, float, float]:
    """Bytes of what is trained: weights and their gradients in float32, and Adam's two moments in 8 bit.

    A critic and a reward model also have a head, one number wide. PPO trains two adapters, policy and critic, one after
    the other; with a reward model it has a third that is frozen.
    """
    h, ppo = shape.hidden_size, work.method == "ppo"
    one = adapter_weights(shape, work.lora_r, work.attention_only)
    trained = one * (2 if ppo else 1) + (h if work.method in ("ppo", "reward") else 0)
    weights, optimizer = trained * 4 + ((one + h) * 4 if work.reward_model else 0), trained * 2
    gradients = trained * 4
    if work.train_embeddings:  # a float32 copy and its gradient; transformers keeps Adam of an embedding in 32 bit
        embedding = shape.vocab_size * h
        head = 0 if shape.tied_embeddings else embedding
        weights += (embedding + head) * 4
        gradients += (embedding + head) * 4
        optimizer += embedding * 8 + head * 2
    return weights, gradients, optimizer


def _logits(shape: Any, work: Workload) -> float:
    """Bytes of the logits, and of their gradients, that the loss has at once."""
    rows = min(work.tokens, max(LOSS_ROWS, work.tokens / 8), LOSS_CHUNK / (8 * shape.vocab_size))
    if work.method == "ppo":
        rows = min(rows, PPO_ROWS)
    return rows * shape.vocab_size * LOGIT_BYTES[work.method]


def _scoring(shape: Any, work: Workload) -> float:
    """Bytes of GRPO's measuring: logits of whole completions in 16 bit, and four tensors of one's logits in 32 bit."""
    if work.method != "grpo":
        return 0
    rows = min(MEASURED_ROWS, work.generated)
    return shape.vocab_size * (rows * work.length * 2 + work.completion * 4 * 4)


def activation_bytes(shape: Any, work: Workload) -> tuple[float, float]:
    """Bytes of a micro-batch's activations: what stays until the loss, and what the backward pass of a layer adds."""
    packings = (False, True) if work.packing is None else (work.packing,)
    kept, backward = max((_a_token(shape, work, packing) for packing in packings), key=sum)
    return work.tokens * kept, work.tokens * backward


def _a_token(shape: Any, work: Workload, packing: bool) -> tuple[float, float]:
    """The same for each token; every tensor is in 16 bit."""
    h, i, layers = shape.hidden_size, shape.intermediate_size, shape.layers
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # What a block keeps for its backward pass: gate and up (2 x 2i), the input of both norms and what comes out of them
    # (4 x 2h), queries before and after RoPE and the output of attention (3 x 2a), keys and values likewise (4 x 2kv).
    # SwiGLU's product is made again; flash attention keeps next to nothing.
    block = 4 * i + 8 * h + 6 * a + 8 * kv
    # Its backward pass makes besides: the gradient of SwiGLU's product (2i), of the block's input and output (2 x 2h).
    backward = 2 * i + 4 * h
    # The gradients of gate and up are not written over their values. Blocks of packed rows are not compiled: these and
    # that of the product are made for MLP_PART tokens at once; measured.
    backward += 4 * i
    if packing:
        backward -= 6 * i * (1 - min(work.tokens, MLP_PART) / work.tokens)
    if work.precision == "fp8":  # PEFT's own forward keeps SwiGLU's product too, and the fused MLP does not; measured
        block += (2.2 if work.method == "reward" else 0.2) * i
    last = 4 * h  # the last hidden state and its gradient, on both sides of the loss
    if not work.gradient_checkpointing:
        return layers * block + last, backward
    # One block at a time is computed again from its input: offloaded to the computer's memory, with two buffers of it
    # on the GPU, or for short rows left on the GPU for every layer. SFT with embeddings has plain checkpointing.
    offloaded = work.length >= OFFLOADED_FROM and not work.train_embeddings
    kept = min(work.kept_layers, layers)
    inputs = 4 * h if offloaded else (layers - kept) * 2 * h
    again = (block + (0 if packing else 6 * h)) if kept < layers else 0  # three more states, measured
    # Of the layers that keep theirs one is the last, and is freed before a block is computed again.
    return kept * block + inputs + last, backward + (max(0, again - block) if kept else again)
