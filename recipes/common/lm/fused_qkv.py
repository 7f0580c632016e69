"""Queries, keys and values under LoRA by one product of the base and two small ones of the adapters.

The three adapters A of a layer are rows of one matrix, which has the scale in it, and the adapters B blocks of one:

    [q k v] = x W^T + b + (x A^T) B^T

PEFT, which Unsloth leaves projections with a bias to, makes nine products of that, and adds each adapter's part in a
pass of its own. A base in 16 bit or fp8 is stored as the one W too, and the weights of the modules become views of it,
so that they stay where checkpoints look for them; one in nf4 is made dense for the product.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from common.lm.fp8 import Fp8Linear
from common.lm.fused_mlp import (
    DTYPES,
    dense,
    frozen,
    input_gradient_of,
    is_plain_layer,
    plus_product,
    prepared,
    products,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

NAMES = ("q_proj", "k_proj", "v_proj")


class _Qkv(torch.autograd.Function):
    """Rows of queries, keys and values (M, N) of rows x (M, K), and the gradients of x and the adapters."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> "Tensor":
        """Of x, a (3R, K), b (N, 3R), the bias or None, and one or three weights, each with what makes it dense.

        As named parameters, torch.compile would leave out `ctx` of a call without gradients: it takes a call that has
        as many inputs as `forward` has parameters for one without a context (torch 2.13, AutogradFunctionVariable).
        """
        x, a, b, bias, *frozen = inputs
        xa = x @ a.t()  # (M, 3R)
        y = _base(x, bias, tuple(frozen))
        ctx.save_for_backward(x, a, b, xa)
        ctx.frozen = tuple(frozen)
        return plus_product(y, xa, b.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: "Tensor") -> tuple["Tensor | None", ...]:
        (dy,) = grad_outputs
        x, a, b, xa = ctx.saved_tensors
        dya = dy @ b  # (M, 3R)
        dx = plus_product(input_gradient_of(dy, prepared(*_whole(ctx.frozen, x.dtype), x.dtype)), dya, a)
        return (dx, dya.t() @ x, dy.t() @ xa, None, *(None for _ in ctx.frozen))


def _base(x: "Tensor", bias: "Tensor | None", frozen: tuple) -> "Tensor":
    """x W^T + b.

    In fp8 the sum is rounded to 16 bit before anything else: torch.compile would add the bias in 32 bit to what comes
    next where no adapter's part does, and the reference policy would differ from a new policy by nats a completion.
    """
    weight, state = _whole(frozen, x.dtype)
    if state is None:
        return torch.nn.functional.linear(x, weight, bias)
    (y,) = products(x, (weight, state))
    if bias is not None and torch.compiler.is_compiling():
        torch.ops.recipes.add_bias(y, bias)
        return y
    return y if bias is None else y.add_(bias)


@torch.library.custom_op("recipes::add_bias", mutates_args=("y",))
def add_bias(y: torch.Tensor, bias: torch.Tensor) -> None:
    """Add `bias` (N,) to the rows of `y` (M, N), in place."""
    y.add_(bias)


@add_bias.register_fake
def _(y: torch.Tensor, bias: torch.Tensor) -> None:
    return None


def _whole(frozen: tuple, dtype: torch.dtype) -> tuple["Tensor", Any]:
    """The one weight of queries, keys and values; of nf4 made dense."""
    if len(frozen) == 2:
        return frozen[0], frozen[1]
    return torch.cat([dense(w, q, dtype) for w, q in zip(frozen[::2], frozen[1::2], strict=True)]), None


def fuse_qkv(model: "PeftModel") -> int:
    """Have the attention of `model` that Unsloth runs computed as above; returns of how many layers.

    Where an adapter is merged, or none and gradients are computed, the projections from before run.
    """
    found = 0
    for module in list(model.modules()):
        layers = [getattr(module, name, None) for name in NAMES]
        if hasattr(module, "apply_qkv") and all(map(is_plain_layer, layers)) and _alike(layers):
            _stack(module, layers)
            module.apply_qkv = _forward_of(module.apply_qkv)
            found += 1
    ours = [name for name, _ in model.named_buffers() if name.rpartition(".")[2].startswith("qkv_")]
    # Of several processes each has the same frozen weights: none is sent to the others before every step.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ours)
    return found


def _alike(layers: list[Any]) -> bool:
    return len({(type(layer.base_layer), layer.base_layer.bias is None) for layer in layers}) == 1


def _stack(module: Any, layers: list[Any]) -> None:
    """Make the weights, and their scales in fp8, views of one tensor each; the biases stay, and have a copy."""
    bases = [layer.base_layer for layer in layers]
    module.register_buffer("qkv_bias", None, persistent=False)
    if bases[0].bias is not None:
        module.qkv_bias = torch.cat([base.bias.data for base in bases])
    names = ("qweight", "scale") if isinstance(bases[0], Fp8Linear) else ("weight",)
    module.qkv_stacked = frozen(layers[0])[1] is None or len(names) == 2
    for name in names if module.qkv_stacked else ():
        tensors = [getattr(base, name) for base in bases]
        whole = torch.cat([tensor.data for tensor in tensors])
        for tensor, rows in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = rows
        module.register_buffer(f"qkv_{name}", whole, persistent=False)
    if module.qkv_stacked and layers[0].weight.is_cuda:
        # The holes that the three leave are too small for the next layer's one: of a 14B 1.5 GiB would stay reserved.
        torch.cuda.empty_cache()


def _frozen_of(module: Any, layers: list[Any]) -> tuple:
    if not module.qkv_stacked:
        return tuple(part for layer in layers for part in frozen(layer))
    if isinstance(layers[0].base_layer, Fp8Linear):
        return module.qkv_qweight, module.qkv_scale
    return module.qkv_weight, None


def _forward_of(before: Callable) -> Callable:
    def qkv(self: Any, x: "Tensor") -> tuple["Tensor", ...]:
        layers = [self.q_proj, self.k_proj, self.v_proj]
        name = layers[0].active_adapters[0]
        idle = any(layer.disable_adapters or layer.merged or name not in layer.lora_A for layer in layers)
        if x.dtype not in DTYPES or (idle and torch.is_grad_enabled()):
            return before(self, x)
        rows, weights = x.flatten(0, -2), _frozen_of(self, layers)
        if idle:
            y = _base(rows, self.qkv_bias, weights)
        else:
            a = torch.cat([layer.lora_A[name].weight * layer.scaling[name] for layer in layers]).to(x.dtype)
            b = torch.block_diag(*(layer.lora_B[name].weight for layer in layers)).to(x.dtype)
            y = _Qkv.apply(rows, a, b, self.qkv_bias, *weights)
        return y.unflatten(0, x.shape[:-1]).split([layer.out_features for layer in layers], -1)

    return qkv
