"""A model that Unsloth has divided among the ranks (FSDP2): its weights, whole again."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module


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
