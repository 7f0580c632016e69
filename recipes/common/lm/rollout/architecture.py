"""What the decoder must know about a model's architecture, read from its configuration."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3", "gemma3_text", "phi3")
OF_EVERY_LENGTH = {"default", "linear", "llama3", "yarn"}  # kinds of rotary positions by which a position turns alike


class Unsupported(Exception):
    """The decoder cannot run this model; the message says why."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes and the variants of a decoder-only transformer with rotary positions and gated layers."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of the norms
    one_plus: bool  # norms multiply by 1 + weight, in 32 bit (Gemma)
    post_norms: bool  # attention and MLP outputs are normed before they are added (Gemma)
    activation: str  # silu or gelu_tanh
    embed_scale: float
    scale: float  # of q . k
    softcap: float | None  # of q . k: x becomes softcap * tanh(x / softcap)
    final_softcap: float | None  # the same, of the logits
    windows: tuple[int | None, ...]  # of each layer: how many positions it attends to, its own among them
    rotary_tables: tuple[str, ...]  # of each layer: the key of its table in `rotary_tables`
    longest: int  # positions for which the tables hold


def rotations(config: "PreTrainedConfig") -> set[str]:
    """The kinds of rotary positions of a text model's layers, by transformers' names."""
    of_types = config.rope_parameters.values() if _by_type(config) else [config.rope_parameters]
    return {rope["rope_type"] for rope in of_types if rope}


def _by_type(config: "PreTrainedConfig") -> bool:
    """Whether layers with and without a window have rotary positions of their own."""
    return isinstance(config.rope_parameters.get("full_attention"), dict)


def read_architecture(config: "PreTrainedConfig") -> Architecture:
    """The architecture that `config`, of a text model, describes. Raises Unsupported for one that is not known."""
    if config.model_type not in FAMILIES:
        raise Unsupported(f"{config.model_type} models are not known to it (those are: {', '.join(FAMILIES)})")
    gemma = config.model_type.startswith("gemma")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise Unsupported(f"its activation is {activation}")
    if getattr(config, "use_bidirectional_attention", False):
        raise Unsupported("its attention is not causal")
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * count
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"it has layers of {', '.join(sorted(unknown))}")
    kinds = rotations(config)
    if unknown := kinds - OF_EVERY_LENGTH - {"longrope"}:
        raise Unsupported(f"its rotary positions are of kind {', '.join(sorted(unknown))}")
    longest = config.max_position_embeddings
    if "longrope" in kinds:  # beyond it every position, also the earlier ones, is rotated by another table
        rope = config.rope_parameters
        longest = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = config.query_pre_attn_scalar if gemma else head_dim
    return Architecture(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        one_plus=gemma,
        post_norms=gemma,
        activation="silu" if activation == "silu" else "gelu_tanh",
        embed_scale=config.hidden_size**0.5 if gemma else 1.0,
        scale=scale**-0.5,
        softcap=getattr(config, "attn_logit_softcapping", None),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        rotary_tables=tuple(kind if _by_type(config) else "all" for kind in types),
        longest=longest,
    )


def rotary_tables(
    config: "PreTrainedConfig", architecture: Architecture, length: int, device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines (length, R / 2) in 32 bit, of each kind of layer; R of a head's dimensions are rotated."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    tables = {}
    for key in sorted(set(architecture.rotary_tables)):
        frequencies, factor = _frequencies(config, None if key == "all" else key, architecture.head_dim, length)
        angles = torch.outer(positions, frequencies.to(device))
        tables[key] = (angles.cos() * factor, angles.sin() * factor)
    return tables


def _frequencies(config: Any, layer_type: str | None, head_dim: int, length: int) -> tuple[torch.Tensor, float]:
    """The inverse frequencies of rotary positions and the factor of their tables."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if rope["rope_type"] == "default":  # arXiv:2104.09864
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated), 1.0
    given: dict[str, Any] = {"layer_type": layer_type} if layer_type else {}
    if rope["rope_type"] == "longrope":
        given["seq_len"] = length
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), **given)
