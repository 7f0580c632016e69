"""A model that Unsloth has divided among the ranks (FSDP2): its weights, whole again."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module


def whole_weights(model: "Module") -> dict[str, Any] | None:
    """The trained weights of a sharded model, on rank 0, for `save_pretrained`; None for a model that is not sharded.

    Every rank has to call it.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return None
    from unsloth.models.fsdp2_native import native_full_state_dict

    return native_full_state_dict(model, trainable_only=True)
