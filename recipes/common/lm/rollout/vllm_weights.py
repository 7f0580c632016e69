"""The policy's weights in vLLM's parameters: which goes where, and a proof that none was forgotten.

vLLM's classes of the families that our decoder knows have its fused layout: q, k and v in the rows of one matrix, gate
and up in those of another. So the adapter is merged straight into vLLM's memory, and there is no second copy. Weights
of another architecture go, merged one by one, through vLLM's own loader of checkpoints.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from common.lm.rollout.architecture import FAMILIES, Unsupported
from common.lm.rollout.layers import check_adapter, dequantized, lora_of
from common.lm.rollout.weights import Merged, PolicyWeights, operations_for

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_PADDING = 64  # vLLM's embedding and head have a multiple of so many rows


def named_matrices(weights: PolicyWeights) -> dict[str, Merged]:
    """The merged matrices, each under the name of the module that has it in vLLM."""
    named = {}
    for number, layer in enumerate(weights.layers):
        names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        named |= {f"model.layers.{number}.{name}": linear for name, linear in zip(names, layer.linears(), strict=True)}
    return named


def named_tensors(weights: PolicyWeights) -> "dict[str, Tensor]":
    """Everything but the merged matrices, each tensor under the name of vLLM's parameter: biases, norms, ends.

    A head that is tied to the embedding is no parameter of its own. Raises Unsupported where it should be tied and is
    not, such as after training the embedding alone.
    """
    embedding, head, head_bias = weights.ends()
    named = {"model.embed_tokens.weight": embedding, "model.norm.weight": weights.norm}
    if not weights.config.tie_word_embeddings:
        named["lm_head.weight"] = head
    elif head.data_ptr() != embedding.data_ptr():
        raise Unsupported("its head is tied to the embedding, but their weights differ")
    if head_bias is not None:
        named["lm_head.bias"] = head_bias
    for name, linear in named_matrices(weights).items():
        if linear.bias is not None:
            named[f"{name}.bias"] = linear.bias
    for number, layer in enumerate(weights.layers):
        norms = {
            "input_layernorm": layer.first_norm,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
        }
        if weights.architecture.post_norms:
            norms["post_attention_layernorm"] = layer.attention_norm
            norms["pre_feedforward_layernorm"] = layer.second_norm
            norms["post_feedforward_layernorm"] = layer.mlp_norm
        else:
            norms["post_attention_layernorm"] = layer.second_norm
        named |= {f"model.layers.{number}.{name}.weight": norm for name, norm in norms.items() if norm is not None}
    return named


def checkpoint_tensors(model: Any, adapter: str | None) -> "Iterator[tuple[str, Tensor]]":
    """Each weight under its name in a checkpoint, with the adapter merged: computed in 32 bit and rounded once."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = base.get_input_embeddings().weight.dtype
    for name, parameter in base.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        path, _, kind = name.rpartition(".")
        plain = f"{path.removesuffix('.base_layer').removesuffix(f'.modules_to_save.{adapter}')}.{kind}"
        if kind != "weight" or parameter.ndim < 2 or ".modules_to_save." in name:
            yield plain, parameter.data
            continue
        layer = base.get_submodule(path.removesuffix(".base_layer"))
        lora = lora_of(layer, adapter)
        weight = dequantized(layer)
        if lora is not None:
            down, up, scaling = lora
            merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            operations_for(merged.device).merge(merged, weight, up, down, scaling)
            weight = merged
        yield plain, weight


def connect(model: Any, adapter: str | None, engine_model: torch.nn.Module) -> Callable[[], None]:
    """A function that writes the policy's weights, as they are now, into the parameters of vLLM's model.

    Raises Unsupported for an adapter that cannot be merged, and RuntimeError, naming them, where parameters have other
    shapes than the weights or would not be written.
    """
    if model.config.get_text_config().model_type not in FAMILIES:
        return _through_loader(model, adapter, engine_model)
    weights = PolicyWeights(model, adapter, allocate=False)
    parameters = dict(engine_model.named_parameters())
    matrices, tensors = named_matrices(weights), named_tensors(weights)
    check_written(parameters, {*(f"{name}.weight" for name in matrices), *tensors})
    for name, linear in matrices.items():
        linear.weight = _same(f"{name}.weight", parameters[f"{name}.weight"].data, linear.weight.shape)
        if linear.weight.dtype != weights.dtype:
            raise RuntimeError(f"vLLM's {name}.weight is in {linear.weight.dtype}, and the model in {weights.dtype}")
    pairs = []
    for name, tensor in tensors.items():
        target = parameters[name].data
        padded = name.startswith(("model.embed_tokens", "lm_head"))
        if padded and 0 <= len(target) - len(tensor) < VOCABULARY_PADDING:
            target[len(tensor) :] = 0
            target = target[: len(tensor)]
        pairs.append((_same(name, target, tensor.shape), tensor))

    @torch.no_grad()
    def write() -> None:
        weights.refresh()
        for target, tensor in pairs:
            target.copy_(tensor)

    return write


def check_written(parameters: "dict[str, Any]", written: set[str]) -> None:
    """Raise RuntimeError unless the names written are those of vLLM's parameters."""
    if missing := sorted(set(parameters) - written):
        raise RuntimeError(f"vLLM has parameters that no weight of the model is for: {_few(missing)}")
    if unknown := sorted(written - set(parameters)):
        raise RuntimeError(f"vLLM has no parameters for these weights of the model: {_few(unknown)}")


def _through_loader(model: Any, adapter: str | None, engine_model: Any) -> Callable[[], None]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_adapter([base, base.get_input_embeddings(), base.get_output_embeddings()], adapter)
    needed = {name for name, _ in engine_model.named_parameters()}

    @torch.no_grad()
    def write() -> None:
        try:
            loaded = engine_model.load_weights(checkpoint_tensors(model, adapter))
        except (KeyError, ValueError, AttributeError, AssertionError) as error:
            raise Unsupported(f"vLLM cannot take its weights: {error!r}") from error
        if missing := sorted(needed - set(loaded or ())):
            raise Unsupported(f"vLLM's loader leaves parameters unwritten: {_few(missing)}")

    return write


def weight_bytes(model: Any, size: int) -> int:
    """Bytes of the model's weights at `size` bytes each, without adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = 0
    for name, parameter in base.named_parameters():
        if "lora_" not in name and ".original_module." not in name:
            state = getattr(parameter, "quant_state", None)
            count += parameter.numel() if state is None else state.shape.numel()
    return count * size


def _same(name: str, target: "Tensor", shape: torch.Size) -> "Tensor":
    if target.shape != shape:
        raise RuntimeError(f"vLLM's {name} is {tuple(target.shape)}, and the model's weight {tuple(shape)}")
    return target


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
