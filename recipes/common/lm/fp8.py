"""A frozen base in fp8: its layers' weights in 8 bits, and their products by the fp8 tensor cores.

The weights are e4m3 with one scale an output channel, the activations e4m3 with one scale a token ("row-wise", as in
torchao's float8 recipes and in FP8-LM, arXiv 2310.18313). Both products of a training step are then fp8:

    forward          y  = x W^T     x by token, W by output channel
    input gradient   dx = dy W      W's scales are multiplied into dy first, which is then rounded by token

so the gradient is that of the very weights that the forward pass used, and one copy of them is enough. The tensor cores
want both operands with the summed dimension last; for the gradient W is transposed, layer by layer, when it is needed.
Embeddings, head, norms, attention and the LoRA adapter stay as they are.

Why not Unsloth's own `load_in_fp8`: its backward pass makes the weights 16 bit again and multiplies in 16 bit, so half
of the gain is lost, and it needs compute capability 9.0.

Unsloth's fused LoRA kernels read `weight` of a base layer. A layer without one, as those of GPTQ and AWQ, it leaves to
PEFT: so the codes are called `qweight` here, and are bytes, because PEFT gives an adapter the dtype of a float weight.
torch.compile then fuses what PEFT leaves apart: Unsloth compiles whole decoder layers where rows are not packed, and
where they are, the projections of a layer are compiled here.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import ScalingType, scaled_mm

from common.errors import InputError, MachineError

if torch.cuda.is_available():
    import common.lm.fp8_kernels  # noqa: F401  it registers the operators

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 1e-30  # a row's largest value is taken to be at least this, so that a row of zeros has a scale
MULTIPLE = 16  # of both dimensions of a weight, for the tensor cores
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0, Blackwell 10 and 12


def check_fp8_device() -> None:
    """Raise MachineError where the GPU has no fp8 tensor cores, or where there is none."""
    if not torch.cuda.is_available():
        raise MachineError("--load-in-fp8 needs a GPU of Ada, Hopper or Blackwell, and this machine has none")
    if (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        raise MachineError(
            f"--load-in-fp8 needs a GPU of Ada, Hopper or Blackwell (compute capability 8.9 or more); "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}. Use --load-in-4bit or 16 bit"
        )


def quantize_rows(x: "Tensor", factors: "Tensor | None" = None) -> tuple["Tensor", "Tensor"]:
    """`x` (M, K), its columns multiplied by `factors` (K,) if given, as e4m3 codes (M, K) and scales (M, 1) in float32.

    A row's scale is its largest absolute value / 448. Codes times scale is the row again, each value within a
    sixteenth of itself, or for values below 2^-6 / 448 of the largest within 2^-10 / 448 of the largest.
    """
    if x.is_cuda:
        return torch.ops.recipes.fp8_rows(x, factors, SMALLEST)
    x = x.float() if factors is None else x.float() * factors
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (x / scale).to(E4M3), scale


def transposed(codes: "Tensor") -> "Tensor":
    """`codes` (M, N), bytes, as (N, M), contiguous."""
    return torch.ops.recipes.transposed_bytes(codes) if codes.is_cuda else codes.t().contiguous()


def product(a: "Tensor", b: "Tensor", a_scale: "Tensor", b_scale: "Tensor") -> "Tensor":
    """a b^T as (M, N) in bfloat16, of e4m3 codes a (M, K) and b (N, K) with scales (M, 1) and (N, 1)."""
    by_row = ScalingType.RowWise
    return scaled_mm(a, b.t(), a_scale, by_row, b_scale.t(), by_row, output_dtype=torch.bfloat16, use_fast_accum=True)


def input_gradient(dy: "Tensor", codes: "Tensor", scale: "Tensor") -> "Tensor":
    """dy W as (M, K) in bfloat16, of dy (M, N), the codes of W^T (K, N), bytes, and W's scales (N,)."""
    rows, row_scale = quantize_rows(dy, scale)
    ones = torch.ones(len(codes), 1, dtype=torch.float32, device=dy.device)
    return product(rows, codes.view(E4M3), row_scale, ones)


class _Fp8Product(torch.autograd.Function):
    """x W^T and its gradient with respect to x. W is frozen and has none."""

    @staticmethod
    def forward(
        ctx: Any, x: "Tensor", rows: "Tensor", row_scale: "Tensor", codes: "Tensor", scale: "Tensor"
    ) -> "Tensor":
        """`rows` and `row_scale` are x in fp8; x itself is here for autograd alone."""
        ctx.save_for_backward(codes, scale)
        ctx.dtype = x.dtype
        y = product(rows, codes.view(E4M3), row_scale, scale[:, None]).to(x.dtype)
        return y.view(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: "Tensor") -> tuple["Tensor | None", ...]:
        (dy,) = grad_outputs
        codes, scale = ctx.saved_tensors
        dx = input_gradient(dy.reshape(-1, codes.shape[0]), transposed(codes), scale).to(ctx.dtype)
        return dx.view(*dy.shape[:-1], codes.shape[1]), None, None, None, None


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer whose weight (out, in) is `qweight`, e4m3 codes as bytes, times `scale` (out,)."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)  # not Linear's, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = quantize_rows(linear.weight.detach())
        self.register_parameter("weight", None)
        self.qweight = torch.nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.scale = torch.nn.Parameter(scale[:, 0].contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: "Tensor") -> "Tensor":
        rows, row_scale = quantize_rows(input.detach().reshape(-1, self.in_features))
        y = _Fp8Product.apply(input, rows, row_scale, self.qweight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _base_layers(model: "PreTrainedModel") -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers of the decoder layers by name: not the head, which is no part of them."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and ".layers." in f".{name}":
            yield name, module


def quantize_base(model: "PreTrainedModel") -> None:
    """Put the linear layers of a model's decoder layers in fp8, before an adapter is put on it.

    One layer at a time, and each 16-bit weight is freed: the peak is that of the 16-bit weights and one layer. Raises
    InputError where a dimension is no multiple of 16, and where no layer is in 16 bit, as in a base stored in few bits.
    """
    layers = dict(_base_layers(model))
    if not layers:
        raise InputError("--load-in-fp8: the base has no linear layers in 16 bit; it is stored in few bits already")
    for name, linear in layers.items():
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise InputError(
                f"--load-in-fp8: {name} is {linear.out_features} x {linear.in_features}, and the tensor cores need "
                f"multiples of {MULTIPLE}; use --load-in-4bit or 16 bit"
            )
    while layers:
        name, linear = layers.popitem()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Fp8Linear(linear))
        del linear
    for module in model.modules():
        if hasattr(module, "apply_qkv") and hasattr(module, "apply_o"):  # where Unsloth puts its own kernels
            module.apply_qkv, module.apply_o = _compiled(_qkv), _compiled(_o)
        if isinstance(getattr(module, "down_proj", None), Fp8Linear):
            module.forward = types.MethodType(_compiled(type(module).forward), module)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # else the 16-bit weights' memory stays reserved


def _qkv(attention: Any, x: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def _o(attention: Any, x: "Tensor") -> "Tensor":
    return attention.o_proj(x)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """`function` compiled for training; inside a layer that Unsloth compiles, and without gradients, as it is."""
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def choose(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return function(*args)
        return compiled(*args)

    return choose
