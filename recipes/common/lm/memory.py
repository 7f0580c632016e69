"""Estimate the GPU memory of a run from a model's sizes, and plan settings that fit, before anything is loaded.

The estimate is for what the recipes do: a frozen base in 16 bit or nf4, LoRA adapters on the seven projections, 8-bit
Adam, Unsloth's kernels, a loss in chunks, one GPU. Every part is a sum of named tensors that a reader can check.
tests/common/lm/test_memory.py compares the total with measured runs and states the error. One run took more than the
estimate: PPO on a 14B model in 4 bit, by an eighth.

Standard library only: env-check.py reads this from a bare Python. `card` is any object with the `parameters` and the
`architecture` of a model card, and for a plan its numbers for the method (`card.sft`).

PPO is counted with a reward model that is one more adapter on the same base.

Left out: training every weight, several GPUs, vLLM beside the trainer, images, a reward model with a base of its own.
"""

from dataclasses import dataclass, fields
from typing import Any

GIB = 2**30
METHODS = ("sft", "dpo", "kto", "grpo", "ppo", "reward")
# nf4: half a byte a weight; per 64 weights a one-byte scale; per 256 such scales a float32 (double quantization).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
CUDA_CONTEXT = 0.5 * GIB  # the driver, cuBLAS and the kernels; no allocator of torch's counts it
# The loss sees the vocabulary for this many tokens at a time, at 8 bytes a logit (unsloth_zoo, chunked_logprob.py).
LOSS_ROWS, LOGIT_BYTES = 512, 8
OFFLOADED_FROM = 512  # tokens; for shorter rows Unsloth keeps checkpoints on the GPU (unsloth, models/_utils.py)
SEQUENCES = {"dpo": 2, "reward": 2}  # a pair is two rows; the reference of DPO is the adapter switched off, no model
# The recipes' own defaults, in tokens; for GRPO and PPO prompt and completion together.
MAX_LENGTH = {"sft": 2048, "dpo": 2048, "kto": 2048, "grpo": 1536, "ppo": 1152, "reward": 2048}
COMPLETION_LENGTH = {"grpo": 512, "ppo": 128}
# Likewise rows (DPO and reward: pairs, GRPO and PPO: completions) of a micro-batch, and micro-batches of a step.
BATCHES = {"sft": (4, 4), "dpo": (2, 4), "kto": (4, 4), "grpo": (4, 4), "ppo": (8, 4), "reward": (4, 4)}
LEAST_ROWS = {"kto": 2}  # of a micro-batch: with one, KTO has no mismatched completion
GENERATED = {"grpo": 16, "ppo": 32}  # likewise completions that are generated at once
SHORTEST = 512  # tokens; a plan does not cut rows below that


@dataclass(frozen=True)
class Memory:
    """The peak of a run, part by part, in GiB."""

    weights: float  # the frozen base
    adapter: float  # LoRA weights and their gradients
    optimizer: float  # Adam's two moments
    activations: float  # kept for, and made in, the backward pass
    logits: float  # the chunk of the loss
    kv_cache: float  # of the completions that are generated at once
    overhead: float  # what no tensor of ours accounts for

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Fit:
    """Settings under which a run fits, and what it then needs in GiB."""

    load_in_4bit: bool
    gradient_checkpointing: bool
    memory: Memory

    @property
    def total(self) -> float:
        return self.memory.total


@dataclass(frozen=True)
class Plan:
    """Settings for a card and a method on a GPU. `changed` are the arguments that differ from the method's own."""

    fits: bool
    load_in_4bit: bool
    gradient_checkpointing: bool
    per_device_train_batch_size: int
    max_length: int  # tokens; for GRPO and PPO prompt and completion together
    memory: Memory
    changed: dict[str, int]


def estimate(
    card: Any,
    method: str,
    *,
    load_in_4bit: bool,
    gradient_checkpointing: bool,
    max_length: int,
    per_device_train_batch_size: int,
    lora_r: int = 16,
    generation_batch_size: int | None = None,
    packing: bool | None = None,
    train_embeddings: bool = False,
) -> Memory:
    """The peak memory of `method`, one of METHODS, on one GPU.

    `max_length` is in tokens, prompt and completion together. `per_device_train_batch_size` counts rows; for DPO and
    reward pairs, for GRPO and PPO completions. `generation_batch_size` completions are generated at once (GRPO, PPO);
    None takes the recipe's default. `packing` matters to SFT alone, whose recipe packs short documents and leaves full
    rows as they are; None, where the data is not known, takes the larger of the two. `train_embeddings` trains a copy
    of embedding and head, as SFT's argument does. Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    shape = card.architecture
    h, i, layers = shape.hidden_size, shape.intermediate_size, shape.layers
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim  # widths of the queries, of the keys
    tokens = max_length * per_device_train_batch_size * SEQUENCES.get(method, 1)  # of one micro-batch

    # The base. Only the linear layers are quantized: embedding, output layer, norms and a vision tower stay in 16 bit.
    linear = layers * (2 * h * a + 2 * h * kv + 3 * h * i)
    weights = linear * (NF4_BYTES if load_in_4bit else 2) + (card.parameters - linear) * 2

    # LoRA: r x (in + out) a projection, weights and gradients in float32; Adam's two moments in 8 bit. A critic and a
    # reward model also have a head, one number wide. PPO trains two adapters, policy and critic, one after the other,
    # and has a third that is frozen, the reward model's.
    projections = 2 * (h + a) + 2 * (h + kv) + 3 * (h + i)
    weights_of_one = lora_r * layers * projections
    trained = weights_of_one * (2 if method == "ppo" else 1) + (h if method in ("ppo", "reward") else 0)
    adapter = trained * (4 + 4) + ((weights_of_one + h) * 4 if method == "ppo" else 0)
    optimizer = trained * 2
    if train_embeddings:  # a float32 copy and its gradient; transformers keeps Adam of an embedding in 32 bit
        embedding = shape.vocab_size * h
        head = 0 if shape.tied_embeddings else embedding
        adapter += (embedding + head) * (4 + 4)
        optimizer += embedding * 8 + head * 2

    packings = (False,) if method != "sft" else (True, False) if packing is None else (packing,)
    offloaded = max_length >= OFFLOADED_FROM and not train_embeddings  # SFT has plain checkpointing there
    activations = tokens * max(_bytes_a_token(shape, gradient_checkpointing, offloaded, p) for p in packings)

    logits = 0 if method == "reward" else min(tokens, LOSS_ROWS) * shape.vocab_size * LOGIT_BYTES
    generated = 0 if method not in GENERATED else generation_batch_size or GENERATED[method]
    kv_cache = generated * max_length * layers * 2 * kv * 2  # keys and values, 16 bit
    # nf4 weights are expanded to 16 bit one matrix at a time, in one buffer as large as the largest.
    overhead = CUDA_CONTEXT + (2 * h * max(i, a) if load_in_4bit else 0)
    parts = (weights, adapter, optimizer, activations, logits, kv_cache, overhead)
    return Memory(*(part / GIB for part in parts))


def _bytes_a_token(shape: Any, gradient_checkpointing: bool, offloaded: bool, packing: bool) -> int:
    """Bytes of activations at the peak, for each token of a micro-batch; every tensor is in 16 bit."""
    h, i, layers = shape.hidden_size, shape.intermediate_size, shape.layers
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # What a block keeps for its backward pass: gate and up (2 x 2i), the input of both norms and what comes out of them
    # (4 x 2h), queries before and after RoPE and the output of attention (3 x 2a), keys and values likewise (4 x 2kv).
    # SwiGLU's product is made again; flash attention keeps next to nothing.
    block = 4 * i + 8 * h + 6 * a + 8 * kv
    # Its backward pass makes besides: the gradient of SwiGLU's product (2i), of the block's input and output (2 x 2h).
    backward = 2 * i + 4 * h
    # Measured apart: a packed block keeps copies around RoPE; an unpacked one is compiled, and then the gradients of
    # gate and up are not written over their values.
    if packing:
        block += 4 * a + 4 * kv
    else:
        backward += 4 * i
    last = 4 * h  # the last hidden state and its gradient, on both sides of the loss
    if not gradient_checkpointing:
        return layers * block + backward + last
    # One block at a time is computed again from its input: offloaded to the computer's memory, with two buffers of it
    # on the GPU, or for short rows left on the GPU for every layer.
    return block + (4 * h if offloaded else layers * 2 * h) + backward + last


def fit(
    card: Any,
    method: str,
    gib: float,
    *,
    max_length: int | None = None,
    per_device_train_batch_size: int | None = None,
) -> Fit | None:
    """The fastest settings under which `method` fits into `gib` GiB of free memory; None when none does.

    Fastest first: 16 bit without gradient checkpointing, 16 bit with it, 4 bit with it. Sizes that are not given are
    those of `settings`.
    """
    own = settings(card, method)
    for load_in_4bit, gradient_checkpointing in ((False, False), (False, True), (True, True)):
        memory = estimate(
            card,
            method,
            load_in_4bit=load_in_4bit,
            gradient_checkpointing=gradient_checkpointing,
            max_length=max_length or own["max_length"],
            per_device_train_batch_size=per_device_train_batch_size or own["per_device_train_batch_size"],
        )
        if memory.total <= gib:
            return Fit(load_in_4bit, gradient_checkpointing, memory)
    return None


def plan(card: Any, method: str, gib: float) -> Plan:
    """Settings under which `method` fits into `gib` GiB, with as little changed as possible, and then the fastest.

    First fewer rows at once and more micro-batches, which costs speed alone; then shorter rows, which cuts data. Where
    nothing fits, the smallest settings that were tried, with `fits` False.
    """
    own = getattr(card, method, {})
    batch = settings(card, method)["per_device_train_batch_size"]
    step = batch * own.get("gradient_accumulation_steps", BATCHES[method][1])
    lengths = _longest_first(method, own)
    smaller = [rows for rows in (batch, batch // 2, batch // 4) if rows >= LEAST_ROWS.get(method, 1)]
    tries = [(rows, *lengths[0]) for rows in smaller] + [(smaller[-1], *shorter) for shorter in lengths[1:]]
    for rows, max_length, changed in tries:
        if rows != batch:
            changed = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": step // rows} | changed
        if found := fit(card, method, gib, max_length=max_length, per_device_train_batch_size=rows):
            return Plan(True, found.load_in_4bit, found.gradient_checkpointing, rows, max_length, found.memory, changed)
    smallest = least(card, method, max_length=max_length, per_device_train_batch_size=rows)
    return Plan(False, True, True, rows, max_length, smallest, changed)


def settings(card: Any, method: str) -> dict[str, int]:
    """The `max_length` and `per_device_train_batch_size` that `method` has on this card when nothing else is given."""
    own = getattr(card, method, {})
    batch = own.get("per_device_train_batch_size", BATCHES[method][0])
    return {"max_length": _longest_first(method, own)[0][0], "per_device_train_batch_size": batch}


def least(card: Any, method: str, *, max_length: int, per_device_train_batch_size: int) -> Memory:
    """The least that such a micro-batch needs: in 4 bit, with gradient checkpointing."""
    return estimate(
        card,
        method,
        load_in_4bit=True,
        gradient_checkpointing=True,
        max_length=max_length,
        per_device_train_batch_size=per_device_train_batch_size,
    )


def _longest_first(method: str, own: dict[str, Any]) -> list[tuple[int, dict[str, int]]]:
    """Tokens of a row, the method's own number and some below it, each with the arguments that change it."""
    if method in COMPLETION_LENGTH:
        completion = own.get("max_completion_length", COMPLETION_LENGTH[method])
        prompt = own.get("max_prompt_length", MAX_LENGTH[method] - COMPLETION_LENGTH[method])
        length = prompt + completion
        shorter = [{"max_prompt_length": prompt // 2}]
        shorter += [{"max_prompt_length": prompt // n, "max_completion_length": completion // 2} for n in (2, 4)]
        lengths = [(sum({"max_completion_length": completion, **changed}.values()), changed) for changed in shorter]
    else:
        length = own.get("max_length", MAX_LENGTH[method])
        lengths = [(length // n, {"max_length": length // n}) for n in (2, 4)]
    return [(length, {}), *((tokens, changed) for tokens, changed in lengths if tokens >= SHORTEST)]
