"""Queries, keys and values under LoRA by one product of the base and two small ones of the adapters.

The weights of a layer's three projections become rows of one matrix, and their adapters A rows of one and B blocks of
one, of which A has the scale in it:

    [q k v] = x W^T + b + (x A^T) B^T

PEFT, which Unsloth leaves projections with a bias to, makes nine products of that, and adds each adapter's part in a
pass of its own. The weights stay where modules and checkpoints look for them: they are views of the one matrix.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common.lm.fused_mlp import DTYPES, is_plain_layer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

NAMES = ("q_proj", "k_proj", "v_proj")


def fuse_qkv(model: "PeftModel") -> int:
    """Have the attention of `model` that Unsloth runs computed as above, where its base is in 16 bit; returns how many.

    Where an adapter is disabled with gradients, merged or none, the projections from before run.
    """
    found = 0
    for module in list(model.modules()):
        layers = [getattr(module, name, None) for name in NAMES]
        if hasattr(module, "apply_qkv") and all(map(is_plain_layer, layers)) and _in_16_bit(layers):
            _stack(module, layers)
            module.apply_qkv = _forward_of(module.apply_qkv)
            found += 1
    return found


def _in_16_bit(layers: list[Any]) -> bool:
    return all(type(layer.base_layer) is torch.nn.Linear and layer.weight.dtype in DTYPES for layer in layers)


def _stack(module: Any, layers: list[Any]) -> None:
    weights = [layer.base_layer.weight for layer in layers]
    stacked = torch.cat([weight.data for weight in weights])
    for weight, rows in zip(weights, stacked.split([len(weight) for weight in weights]), strict=True):
        weight.data = rows
    module.register_buffer("qkv_weight", stacked, persistent=False)
    biases = [layer.base_layer.bias for layer in layers]
    some = any(bias is not None for bias in biases)
    pairs = zip(biases, weights, strict=True)
    bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias.data for bias, weight in pairs])
    module.register_buffer("qkv_bias", bias if some else None, persistent=False)


def _forward_of(before: Callable) -> Callable:
    def qkv(self: Any, x: "Tensor") -> tuple["Tensor", ...]:
        layers = [self.q_proj, self.k_proj, self.v_proj]
        name = layers[0].active_adapters[0]
        idle = any(layer.disable_adapters or layer.merged or name not in layer.lora_A for layer in layers)
        if x.dtype not in DTYPES or (idle and torch.is_grad_enabled()):
            return before(self, x)
        y = torch.nn.functional.linear(x, self.qkv_weight, self.qkv_bias)
        if not idle:
            a = torch.cat([layer.lora_A[name].weight * layer.scaling[name] for layer in layers]).to(x.dtype)  # (3R, K)
            b = torch.block_diag(*(layer.lora_B[name].weight for layer in layers)).to(x.dtype)  # (N, 3R)
            y = y + (x @ a.t()) @ b.t()
        return y.split([layer.out_features for layer in layers], -1)

    return qkv
