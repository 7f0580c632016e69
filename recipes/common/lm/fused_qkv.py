"""Unsloth's fused kernel for q, k and v where they have biases, as those of Qwen 2: it leaves them to PEFT's layers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


def fuse_qkv(model: "PeftModel") -> None:
    """Let the attention of `model`, loaded by Unsloth, compute q, k and v under an adapter by one autograd function.

    Nothing changes on a CPU, for other models, and where the kernel is in use already. The bias is added after the
    adapter's part and not before it: in 16 bit results differ by rounding.
    """
    from peft.tuners.lora import LoraLayer
    from unsloth.kernels.fast_lora import LoRA_QKV, _is_plain_lora
    from unsloth.kernels.utils import get_lora_parameters
    from unsloth.models.llama import original_apply_qkv

    def apply_qkv(self: Any, x: "Tensor") -> "tuple[Tensor, ...]":
        projections = self.q_proj, self.k_proj, self.v_proj
        if not all(map(_is_plain_lora, projections)):  # such as the reference policy, without an adapter
            return original_apply_qkv(self, x)
        parameters = [part for projection in projections for part in get_lora_parameters(projection)]
        fused = LoRA_QKV.apply(x, *parameters)
        return tuple(y + projection.base_layer.bias for y, projection in zip(fused, projections, strict=True))

    for module in model.modules():
        projections = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if all(isinstance(one, LoraLayer) and _has_bias_on_gpu(one.get_base_layer()) for one in projections):
            module.apply_qkv = apply_qkv


def _has_bias_on_gpu(layer: Any) -> bool:
    return layer.bias is not None and layer.weight.is_cuda
