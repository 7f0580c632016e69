"""The policy's weights as the decoder reads them: q, k and v in one matrix, gate and up in one, the adapter merged.

A merged copy is made of the linear layers only; embedding, norms and head are the training model's own tensors. Each
sum base + adapter is computed in 32 bit from the stored base and rounded once: nothing is merged in place and taken
out again, which drifts in 16 bit.
"""

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from common.lm.cuda_graph import own_stream, record, say_not_recorded
from common.lm.rollout import operations
from common.lm.rollout.architecture import Architecture, Unsupported, read_architecture
from common.lm.rollout.layers import (
    bias_of,
    check_adapter,
    dequantized,
    is_quantized,
    lora_of,
    matrices,
    shape_of,
    size_of,
    sources_of,
    stored,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


FEW_ROWS = 64  # with more, to dequantize a matrix in 4 bit and multiply with it is faster, see docs/results.md


class Merged:
    """Several linear layers as one whose weight (out, in) holds their weights with the adapter merged."""

    def __init__(
        self, layers: Sequence[torch.nn.Module], adapter: str | None, dtype: torch.dtype, allocate: bool = True
    ) -> None:
        self.layers = layers
        self.adapter = adapter
        shapes = [shape_of(layer) for layer in layers]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        self.weight = torch.empty(rows, columns, dtype=dtype, device=stored(layers[0]).device if allocate else "meta")
        self.bias = bias_of(layers, dtype)

    def refresh(self) -> None:
        first = 0
        for layer in self.layers:
            part = self.weight[first : first + shape_of(layer)[0]]
            first += len(part)
            lora = lora_of(layer, self.adapter)
            if lora is None:
                dequantized(layer, out=part)
                continue
            # A base in 4 bit is merged where it is dequantized: its 16-bit matrices need no memory of their own.
            weight = dequantized(layer, out=part) if is_quantized(layer) else stored(layer)
            down, up, scaling = lora
            operations_for(part.device).merge(part, weight, up, down, scaling)

    def __call__(self, x: "Tensor") -> "Tensor":
        return F.linear(x, self.weight, self.bias)


class Dequantized:
    """The same for a base in 4 bit of which no 16-bit copy fits: the adapter is added to the result.

    On a GPU few rows are multiplied with the weights as they are stored (`operations.four_bit_matrix`); for many, such
    as those of prompts, the weight is made anew at every call, in a buffer that all layers share.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], adapter: str | None, dtype: torch.dtype, buffer: "Tensor"
    ) -> None:
        self.layers = layers
        self.adapter = adapter
        self.shapes = [shape_of(layer) for layer in layers]
        self.weight = buffer[: sum(rows for rows, _ in self.shapes) * self.shapes[0][1]].view(-1, self.shapes[0][1])
        self.bias = bias_of(layers, dtype)
        loras = [lora_of(layer, adapter) for layer in layers]
        ranks = sum(lora[0].shape[0] for lora in loras if lora is not None)
        self.down = torch.zeros(ranks, self.weight.shape[1], dtype=dtype, device=buffer.device)
        self.up = torch.zeros(self.weight.shape[0], ranks, dtype=dtype, device=buffer.device)  # block-diagonal
        self.matrix = operations_for(buffer.device).four_bit_matrix(layers)

    def refresh(self) -> None:
        row = rank = 0
        for layer, (rows, _) in zip(self.layers, self.shapes, strict=True):
            if (lora := lora_of(layer, self.adapter)) is not None:
                down, up, scaling = lora
                self.down[rank : rank + len(down)].copy_(down)
                self.up[row : row + rows, rank : rank + len(down)].copy_(up.float() * scaling)
                rank += len(down)
            row += rows

    def __call__(self, x: "Tensor") -> "Tensor":
        if self.matrix is not None and len(x) <= FEW_ROWS:
            return self.matrix.multiply(x, self.bias, F.linear(x, self.down), self.up)
        row = 0
        for layer, (rows, _) in zip(self.layers, self.shapes, strict=True):
            dequantized(layer, out=self.weight[row : row + rows])
            row += rows
        y = F.linear(x, self.weight, self.bias)
        return torch.addmm(y, F.linear(x, self.down), self.up.T) if len(self.down) else y


class Layer:
    """One layer of the transformer: its norms, and its four matrices."""

    def __init__(self, module: Any, architecture: Architecture, linear: Any) -> None:
        self.first_norm = module.input_layernorm.weight
        if architecture.post_norms:
            self.attention_norm = module.post_attention_layernorm.weight
            self.second_norm = module.pre_feedforward_layernorm.weight
            self.mlp_norm = module.post_feedforward_layernorm.weight
        else:
            self.second_norm = module.post_attention_layernorm.weight
        attention = module.self_attn
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None  # Qwen 3, Gemma 3
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None
        self.qkv, self.output, self.gate_up, self.down = map(linear, matrices(module))

    def linears(self) -> list[Merged | Dequantized]:
        return [self.qkv, self.output, self.gate_up, self.down]


class PolicyWeights:
    """A policy ready to decode: `model` with `adapter` merged, or without an adapter where it is None.

    Args:
        model: a causal language model, or that under PEFT. Its base may be in 16, 32 or 4 bit (bitsandbytes).
        adapter: the name of a LoRA adapter of it.
        copy: whether the linear layers are copied; else they are dequantized at every call, for 4 bit only.
        allocate: whether the copy has memory of its own; else the caller sets the `weight` of each `Merged`.

    Raises Unsupported, naming why, when the decoder cannot run the model or merge the adapter.
    """

    def __init__(
        self, model: "PeftModel | PreTrainedModel", adapter: str | None, copy: bool = True, allocate: bool = True
    ) -> None:
        self.config = model.config.get_text_config()
        self.architecture = read_architecture(self.config)
        text, head = _parts(model)
        self.embedding = text.embed_tokens
        self.head = head
        self.norm = text.norm.weight
        self.device = self.norm.device
        self.operations = operations_for(self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None  # that it is recorded on
        self.can_record = True
        self.read: list[int] = []  # the addresses that the graph reads
        # Norms stay in the dtype in which the model computes, also under a base in 4 bit.
        self.dtype = _active(self.embedding).weight.dtype
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise Unsupported(f"its embedding is in {self.dtype}")
        for name, part in (("embedding", self.embedding), ("head", self.head)):
            if (device := _active(part).weight.device) != self.device:  # Unsloth can offload it to save memory
                raise Unsupported(f"its {name} is on {device}, not with its layers on {self.device}")
        # Rounded to the dtype as the model does it, so that it is the same number.
        self.embed_scale = float(torch.tensor(self.architecture.embed_scale, dtype=self.dtype))
        modules = list(text.layers)
        check_adapter([*modules, self.embedding, self.head], adapter)
        if copy:

            def linear(layers: Sequence[torch.nn.Module]) -> Merged | Dequantized:
                return Merged(layers, adapter, self.dtype, allocate)
        else:
            sizes = [sum(map(size_of, matrix)) for matrix in itertools.chain(*map(matrices, modules))]
            buffer = torch.empty(max(sizes), dtype=self.dtype, device=self.device)

            def linear(layers: Sequence[torch.nn.Module]) -> Merged | Dequantized:
                return Dequantized(layers, adapter, self.dtype, buffer)

        self.layers = [Layer(module, self.architecture, linear) for module in modules]

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the adapter as it is now. On a GPU the kernels, of which there are thousands, are recorded the second
        time and then replayed: where the copy is released after each call, there is no second time."""
        read = [tensor.data_ptr() for linear in self._linears() for tensor in sources_of(linear.layers, linear.adapter)]
        if self.device.type != "cuda" or read != self.read:  # the first time, or a weight has moved
            self.graph, self.read = None, read
        elif self.graph is None and self.can_record:
            self._record()
        if self.graph is None:
            self._merge()
        else:
            self.graph.replay()

    def _record(self) -> None:
        try:
            if self.stream is None:
                self.stream = own_stream(self)
            self.graph = record(self._merge, self.stream)
        except RuntimeError as error:  # no memory or no stream is left
            self.can_record = False
            say_not_recorded("Merging the adapter", error)

    def _merge(self) -> None:
        for linear in self._linears():
            linear.refresh()

    def _linears(self) -> "list[Merged | Dequantized]":
        return [linear for layer in self.layers for linear in layer.linears()]

    def embed(self, ids: "Tensor") -> "Tensor":
        """The embeddings (B, h) of `ids` (B,)."""
        x = F.embedding(ids, _active(self.embedding).weight)
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def ends(self) -> "tuple[Tensor, Tensor, Tensor | None]":
        """The weights (V, h) of embedding and head, and the head's bias if it has one."""
        head = _active(self.head)
        return _active(self.embedding).weight, head.weight, head.bias

    def logits(self, hidden: "Tensor") -> "Tensor":
        """The logits (B, V) of normed hidden states (B, h), before a final soft cap."""
        head = _active(self.head)
        return F.linear(hidden, head.weight, head.bias)


def operations_for(device: torch.device) -> ModuleType:
    """The module whose functions a step is made of: Triton kernels on a CUDA GPU, else plain torch."""
    if device.type == "cuda":
        from common.lm.rollout import kernels

        return kernels
    return operations


def in_four_bit(model: "PeftModel | PreTrainedModel") -> bool:
    text, _ = _parts(model)
    return any(is_quantized(layer) for matrix in matrices(text.layers[0]) for layer in matrix)


def merged_bytes(model: "PeftModel | PreTrainedModel") -> int:
    """The size in bytes of the merged copy of the linear layers."""
    text, _ = _parts(model)
    size = sum(size_of(layer) for module in text.layers for matrix in matrices(module) for layer in matrix)
    return size * _active(text.embed_tokens).weight.element_size()


def _active(module: Any) -> Any:
    """The embedding or head in use: PEFT's trained copy of it where it is trained, else itself."""
    copies = getattr(module, "modules_to_save", None)
    if copies is not None and module.active_adapters:
        return copies[module.active_adapters[0]]
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _parts(model: Any) -> tuple[Any, Any]:
    """The text model, which has embedding, layers and norm, and the head."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    text = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    for part in ("language_model", "model"):  # a model with vision holds its text model under one of these names
        while not hasattr(text, "layers") and hasattr(text, part):
            text = getattr(text, part)
    if head is None or not all(hasattr(text, name) for name in ("layers", "embed_tokens", "norm")):
        raise Unsupported(f"{type(causal).__name__} has no embedding, layers, norm and head where they are looked for")
    return text, head
