"""A model that Unsloth divides among the ranks (FSDP2): the type that it is gathered in, and its weights as a whole."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module


def gather_as_computed(model: "Module") -> None:
    """Have the weights of `model`, which is to be divided, gathered in 32 bit where it computes in 32 bit.

    Unsloth takes the type from the base's configuration, or from its nf4 weights, which name that of a GPU.
    """
    import torch

    if model.get_input_embeddings().weight.dtype == torch.float32:  # pyrefly: ignore[not-callable]  torch has Tensor | Module
        os.environ.setdefault("UNSLOTH_FSDP2_PARAM_DTYPE", "storage")


def whole_weights(model: "Module") -> dict[str, Any] | None:
    """The trained weights of a sharded model on rank 0, for `save_pretrained`; None for a model that is not sharded.

    Every rank has to call it; the others get an empty dictionary.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    from unsloth.models.fsdp2_save import fsdp2_gathered

    with fsdp2_gathered(model, trainable_only=True) as writes:
        trained = model.named_parameters() if writes else ()
        return {name: weight.detach().cpu().clone() for name, weight in trained if weight.requires_grad}
