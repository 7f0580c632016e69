"""A model's linear layers under PEFT: the stored weight, its shape, its bias and its LoRA matrices."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from common.lm.rollout.architecture import Unsupported

if TYPE_CHECKING:
    from torch import Tensor


def dequantized(layer: Any, out: "Tensor | None" = None) -> "Tensor":
    """The stored weight (out, in) of a linear layer, without an adapter, in 16 or 32 bit; written to `out` if given."""
    weight = stored(layer)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.data if out is None else out.copy_(weight.data)
    from bitsandbytes.functional import dequantize_4bit

    if out is None or not out.is_cuda or out.dtype != state.dtype:  # it writes to a given tensor on a GPU only
        made = dequantize_4bit(weight.data, state)
        return made if out is None else out.copy_(made)
    return dequantize_4bit(weight.data, state, out=out)


def is_quantized(layer: Any) -> bool:
    """Whether its weight is stored in 4 bit."""
    return getattr(stored(layer), "quant_state", None) is not None


def stored(layer: Any) -> "Tensor":
    """The weight (out, in) of the base, as it is stored: packed where it is in 4 bit."""
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of its weight."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return base.out_features, base.in_features


def size_of(layer: Any) -> int:
    """How many numbers its weight has."""
    rows, columns = shape_of(layer)
    return rows * columns


def bias_of(layers: Sequence[Any], dtype: torch.dtype) -> "Tensor | None":
    """The biases of the layers, one after another, if they have any."""
    bases = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers]
    biases = [base.bias for base in bases]
    return None if biases[0] is None else torch.cat([bias.detach() for bias in biases]).to(dtype)


def lora_of(layer: Any, adapter: str | None) -> "tuple[Tensor, Tensor, float] | None":
    """A (r, in), B (out, r) and the scaling of the layer's adapter of this name, if it has one."""
    if adapter is None or adapter not in getattr(layer, "lora_A", {}):
        return None
    return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach(), layer.scaling[adapter]


def sources_of(layers: Sequence[Any], adapter: str | None) -> "list[Tensor]":
    """What merging reads: the stored weights, A and B."""
    loras = [lora for layer in layers if (lora := lora_of(layer, adapter)) is not None]
    return [*map(stored, layers), *(tensor for lora in loras for tensor in lora[:2])]


def matrices(module: Any) -> list[list[Any]]:
    """The linear layers of a layer's four matrices: q, k and v; output; gate and up; down."""
    attention, mlp = module.self_attn, module.mlp
    fused = hasattr(attention, "qkv_proj")  # Phi 3
    return [
        [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def check_adapter(modules: Sequence[Any], adapter: str | None) -> None:
    """Raise Unsupported unless the adapter is plain LoRA on the linear layers of `modules`, of which the last two are
    embedding and head."""
    for module in modules:
        for part in module.modules():
            if adapter in getattr(part, "lora_magnitude_vector", ()):
                raise Unsupported("its adapter is DoRA")
            if getattr(part, "lora_bias", {}).get(adapter):
                raise Unsupported("its adapter has biases")
    for module in modules[-2:]:
        if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ()):
            raise Unsupported("its adapter is LoRA on the embedding or the head")
