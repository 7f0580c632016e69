"""The MLP of a decoder layer under LoRA, with what lies between the large products in two kernels.

With gate and up of the frozen base W and adapters B A, of which A has the scale in it:

    h  = silu(x Wg^T + (x Ag^T) Bg^T) * (x Wu^T + (x Au^T) Bu^T)
    y  = h Wd^T + (h Ad^T) Bd^T

Unsloth and PEFT add an adapter's part to each product in a pass of its own, and the gradients of the adapters read the
matrices of the intermediate size, the largest there are, again. Here they are read and written once: forward gate and
up are read and h is written; backward the gradients of gate and up are made of gate, up and the gradient of h, and
those of Bg, Bu and Ad are summed up in the same pass. What LoRAFusion (arXiv 2510.00206) does for a layer, for an MLP.

gate and up are saved without the adapters' part, which the backward pass adds again. Where a layer is computed again
for its backward pass, its MLP is not before that pass needs it. There, and where nothing is saved, gate and up are
computed for some rows at a time, unless the layer is compiled.
"""

import functools
import itertools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.activations import SiLUActivation

from common.lm.fp8 import E4M3, Fp8Linear, input_gradient, product, quantize_rows, transposed
from common.lm.shared_prompts import FAMILIES

if torch.cuda.is_available():
    import common.lm.fused_mlp_kernels  # noqa: F401  it registers the operators

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

RANKS = 64  # at most: a tile of more does not fit the shared memory of a GPU for desks
CAPABILITY = (8, 0)  # of the GPU, at least; before Ampere PEFT and Unsloth compute it
PART = 4096  # rows that are computed at a time where memory is short: no matrix of the intermediate size is whole
RECOMPUTING = [False]  # whether the layer that runs is computed a second time, for the backward pass
DTYPES = (torch.bfloat16, torch.float16)


def swiglu(gate: "Tensor", up: "Tensor", xa: "Tensor", gate_b: "Tensor", up_b: "Tensor") -> "Tensor":
    """silu(gate + xa[:, 0] Bg^T) * (up + xa[:, 1] Bu^T), (M, N), of gate and up (M, N), xa (M, 2, R) and B (N, R)."""
    if gate.is_cuda:
        return torch.ops.recipes.swiglu(gate, up, xa, gate_b, up_b)
    gate, up = gate.float() + (xa[:, 0] @ gate_b.t()).float(), up.float() + (xa[:, 1] @ up_b.t()).float()
    return (torch.nn.functional.silu(gate) * up).to(xa.dtype)


def swiglu_gradients(
    dh: "Tensor", gate: "Tensor", up: "Tensor", xa: "Tensor", dyb: "Tensor",
    gate_b: "Tensor", up_b: "Tensor", down_a: "Tensor",
) -> tuple["Tensor", "Tensor", "Tensor"]:  # fmt: skip
    """The gradients of gate and up, (M, N), and of Bg, Bu and Ad as (3, R, N) in float32.

    `dh` (M, N) is the gradient of h without the adapter's part, which is dyb Ad: dyb (M, R), Ad (R, N).
    """
    if gate.is_cuda:
        return torch.ops.recipes.swiglu_gradients(dh, gate, up, xa, dyb, gate_b, up_b, down_a)
    gate, up = gate.float() + (xa[:, 0] @ gate_b.t()).float(), up.float() + (xa[:, 1] @ up_b.t()).float()
    full = dh.float() + (dyb @ down_a).float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dup, dgate = (full * silu).to(dh.dtype), (full * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dh.dtype)
    h = (silu * up).to(dh.dtype)
    sums = torch.stack([(xa[:, 0].t() @ dgate).float(), (xa[:, 1].t() @ dup).float(), (dyb.t() @ h).float()])
    return dgate, dup, sums


class _Mlp(torch.autograd.Function):
    """The MLP of rows x (M, K), and its gradients with respect to x and the adapters. The base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: "Tensor", gate_up_a: "Tensor", gate_b: "Tensor", up_b: "Tensor", down_a: "Tensor",
        down_b: "Tensor", gate_w: "Tensor", gate_q: Any, up_w: "Tensor", up_q: Any, down_w: "Tensor", down_q: Any,
        recomputing: bool,
    ) -> "Tensor":  # fmt: skip
        adapters = gate_up_a, gate_b, up_b, down_a, down_b
        ctx.frozen = (gate_w, gate_q), (up_w, up_q), (down_w, down_q)
        if recomputing:
            ctx.save_for_backward(x, *adapters)
            return torch.zeros_like(x)
        kept = _inner(x, adapters, *ctx.frozen[:2])
        h, ha = kept[0], kept[-1]
        ctx.save_for_backward(x, *adapters, *kept[1:])
        (y,) = products(h, ctx.frozen[2])
        return plus_product(y, ha, down_b.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: "Tensor") -> tuple["Tensor | None", ...]:
        (dy,) = grad_outputs
        x, gate_up_a, gate_b, up_b, down_a, down_b, *kept = ctx.saved_tensors
        gate_w, up_w, down_w = (prepared(w, q, x.dtype) for w, q in ctx.frozen)
        # A layer is computed again where memory is short: then part by part, so that no matrix of the intermediate size
        # is ever whole.
        whole = kept or torch.compiler.is_compiling()
        parts = [slice(None)] if whole else [slice(at, at + PART) for at in range(0, len(x), PART)]
        again = ctx.frozen[:2] if gate_w[1] is not None else (gate_w, up_w)  # nf4 is dense by now
        dx, dxa, ha, sums = [], [], [], dy.new_zeros((), dtype=torch.float32)
        for part in parts:
            adapters = gate_up_a, gate_b, up_b, down_a, down_b
            gate, up, xa, ha_of_part = kept or _inner(x[part], adapters, *again)[1:]
            dh = input_gradient_of(dy[part], down_w)
            dgate, dup, sums_of_part = swiglu_gradients(dh, gate, up, xa, dy[part] @ down_b, gate_b, up_b, down_a)
            del dh, gate, up
            sums = sums + sums_of_part
            ha.append(ha_of_part)
            dxa.append(torch.cat([dgate @ gate_b, dup @ up_b], 1))  # (M, 2R)
            of_part = plus_input_gradient(input_gradient_of(dgate, gate_w), dup, up_w)
            del dgate, dup
            dx.append(plus_product(of_part, dxa[-1], gate_up_a))
        of_x, of_xa, of_h = (together[0] if whole else torch.cat(together) for together in (dx, dxa, ha))
        dgate_b, dup_b, ddown_a = sums.to(x.dtype)
        return (of_x, of_xa.t() @ x, dgate_b.t(), dup_b.t(), ddown_a, dy.t() @ of_h, *(None,) * 7)


def _inner(
    x: "Tensor", adapters: tuple["Tensor", ...], gate_w: Any, up_w: Any
) -> tuple["Tensor", "Tensor", "Tensor", "Tensor", "Tensor"]:
    """h, and what the backward pass needs: gate and up without adapters (M, N), x Agu^T (M, 2, R), h Ad^T (M, R)."""
    gate_up_a, gate_b, up_b, down_a, _ = adapters
    xa = (x @ gate_up_a.t()).unflatten(1, (2, -1))
    gate, up = products(x, gate_w, up_w)
    h = swiglu(gate, up, xa, gate_b, up_b)
    return h, gate, up, xa, h @ down_a.t()


def _in_parts(x: "Tensor", adapters: tuple["Tensor", ...], *frozen: tuple["Tensor", Any]) -> "Tensor":
    """The MLP of rows x (M, K) for which no gradient is needed, part by part."""
    ready = [(w, q) if isinstance(q, torch.Tensor) else (dense(w, q, x.dtype), None) for w, q in frozen]

    def of_part(rows: "Tensor") -> "Tensor":
        h, *_, ha = _inner(rows, adapters, *ready[:2])
        return plus_product(products(h, ready[2])[0], ha, adapters[-1].t())

    return torch.cat([of_part(rows) for rows in x.split(PART)])


def _base_alone(x: "Tensor", gate_w: Any, up_w: Any, down_w: Any) -> "Tensor":
    """The MLP without adapters, rounded as it is with them: a reference policy must not differ by rounding."""
    gate, up = products(x, gate_w, up_w)
    none = x.new_zeros(1, 2, 1).expand(len(x), 2, 1), x.new_zeros(gate.shape[1], 1)
    (y,) = products(swiglu(gate, up, none[0], none[1], none[1]), down_w)
    return y


def products(x: "Tensor", *weights: tuple["Tensor", Any]) -> list["Tensor"]:
    """x W^T of each frozen weight, which is W, nf4 codes with their quantization state, or fp8 codes with scales."""
    if isinstance(weights[0][1], torch.Tensor):
        rows, scale = quantize_rows(x)
        return [product(rows, w.view(E4M3), scale, q[:, None]).to(x.dtype) for w, q in weights]
    return [x @ dense(w, q, x.dtype).t() for w, q in weights]


def prepared(w: "Tensor", q: Any, dtype: torch.dtype) -> tuple["Tensor", Any]:
    """What the input gradient needs of a frozen weight: W and None, or W^T in fp8 codes and W's scales."""
    return (transposed(w), q) if isinstance(q, torch.Tensor) else (dense(w, q, dtype), None)


def input_gradient_of(dy: "Tensor", weight: tuple["Tensor", Any]) -> "Tensor":
    """dy W, of a prepared weight."""
    w, scale = weight
    return dy @ w if scale is None else input_gradient(dy, w, scale).to(dy.dtype)


def plus_input_gradient(dx: "Tensor", dy: "Tensor", weight: tuple["Tensor", Any]) -> "Tensor":
    """dx + dy W, of a prepared weight; `dx` is changed."""
    w, scale = weight
    return plus_product(dx, dy, w) if scale is None else dx.add_(input_gradient_of(dy, weight))


def plus_product(y: "Tensor", a: "Tensor", b: "Tensor") -> "Tensor":
    """y + a b; `y` is changed."""
    if torch.compiler.is_compiling():
        torch.ops.recipes.add_product(y, a, b)  # of addmm torch.compile makes one that copies y first
        return y
    return y.addmm_(a, b)


@torch.library.custom_op("recipes::add_product", mutates_args=("y",))
def add_product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a b to `y`, in place."""
    y.addmm_(a, b)


@add_product.register_fake
def _(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    return None


def dense(w: "Tensor", q: Any, dtype: torch.dtype) -> "Tensor":
    if q is None:
        return w
    from unsloth.kernels.utils import fast_dequantize

    return fast_dequantize(w, q, dtype=dtype)


def frozen(layer: Any) -> tuple["Tensor", Any]:
    """The weight of a LoRA layer's base, and what makes it dense."""
    base = layer.base_layer
    if isinstance(base, Fp8Linear):
        return base.qweight, base.scale
    return base.weight, getattr(base.weight, "quant_state", None)


def fuse_mlps(model: "PeftModel") -> int:
    """Have the MLPs of `model` that are SiLU-gated with a plain LoRA adapter computed as above; returns how many.

    Where an adapter is disabled, merged or none, and for states that are not in 16 bit, the forward from before runs.
    """
    found = 0
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        return found
    # Of these families the MLP is the last of a layer and only added to its input: where a layer is computed a second
    # time, for its activations, the down projection is not needed.
    last = model.get_base_model().config.get_text_config().model_type in FAMILIES
    for layer in list(model.modules()):
        mlp: Any = getattr(layer, "mlp", None)
        if _is_plain(mlp):
            mlp.forward = types.MethodType(_forward_of(mlp.forward), mlp)
            layer.register_forward_pre_hook(functools.partial(_before_layer, last))
            layer.register_forward_hook(_after_layer, always_call=True)
            found += 1
    return found


def _before_layer(last: bool, *_: Any) -> None:
    in_backward = torch._C._current_graph_task_id() != -1
    # A checkpoint that is not reentrant takes what this pass saves, by hooks: it has to be all.
    taken = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    RECOMPUTING[0] = last and in_backward and not taken


def _after_layer(*_: Any) -> None:
    RECOMPUTING[0] = False


def _is_plain(module: Any) -> bool:
    layers: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not isinstance(getattr(module, "act_fn", None), torch.nn.SiLU | SiLUActivation):
        return False
    if not all(map(is_plain_layer, layers)) or any(layer.base_layer.bias is not None for layer in layers):
        return False
    ranks = {rank for layer in layers for rank in layer.r.values()}
    return len(ranks) == 1 and max(ranks) <= RANKS


def is_plain_layer(layer: Any) -> bool:
    """Whether `layer` is a frozen projection in 16 bit, nf4 or fp8 under a plain LoRA adapter."""
    if not isinstance(layer, LoraLayer) or not isinstance(layer, torch.nn.Module):
        return False
    parts: Any = layer
    biased = any(one.bias is not None for one in parts.lora_B.values())
    dropout = any(not isinstance(one, torch.nn.Identity) for one in parts.lora_dropout.values())
    special = bool(layer.lora_variant) or bool(layer.lora_magnitude_vector)
    weight, state = frozen(layer)
    known = state is None or isinstance(state, torch.Tensor) or getattr(state, "quant_type", "") == "nf4"
    dense = state is not None or weight.is_floating_point()
    return not biased and not dropout and not special and known and dense


def _forward_of(before: Callable) -> Callable:
    def forward(self: Any, x: "Tensor") -> "Tensor":
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        name = layers[0].active_adapters[0]
        idle = any(layer.disable_adapters or layer.merged or name not in layer.lora_A for layer in layers)
        if x.dtype not in DTYPES or (idle and torch.is_grad_enabled()):
            return before(x)
        if idle:
            return _base_alone(x.flatten(0, -2), *map(frozen, layers)).unflatten(0, x.shape[:-1])
        a = [(layer.lora_A[name].weight * layer.scaling[name]).to(x.dtype) for layer in layers]
        b = [layer.lora_B[name].weight.to(x.dtype) for layer in layers]
        rows, weights, adapters = x.flatten(0, -2), list(map(frozen, layers)), (torch.cat(a[:2]), *b[:2], a[2], b[2])
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(rows) <= PART:
            again = RECOMPUTING[0] and torch.is_grad_enabled()
            y = _Mlp.apply(rows, *adapters, *itertools.chain(*weights), again)
        else:
            y = _in_parts(rows, adapters, *weights)
        return y.unflatten(0, x.shape[:-1])

    return forward
