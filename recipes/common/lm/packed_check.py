"""How often Unsloth compares its packed pass of GRPO with passes of single rows.

In training it puts the completions of a batch into one row, and its log-probabilities must be those that each row has
alone: else the attention did not keep the rows apart (`grpo_accumulated_loss` of unsloth_zoo 2026.10.9). It looks the
first time, and again whenever a batch has more tokens, or a longer row, than any before. 64 rows of a 1.5B take 5 s of
a step of 1 s, and of several ranks all wait.

This module imports no torch, so that a recipe can import it before it imports unsloth.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig

ANY_LENGTH = 1 << 62  # tokens
PASSES = ("grad", "nograd")  # that of the policy, and those of the reference policy and of the policy before


def trust_longer_batches(model: "PeftModel") -> None:
    """Have a packing that was found right for this model count as right for longer rows and larger batches.

    What Unsloth looks at in every batch stays: a window of the attention, and the memory. `model` is the one that the
    trainer holds, not wrapped for several ranks.
    """
    packed = [name for name in PASSES if getattr(model, f"_unsloth_seq_packing_{name}_verified_T", 0)]
    # Of --share-prompts: by the number of groups and their sizes, tokens and the longest row.
    shared = [getattr(model, f"_unsloth_prefix_grouper_{name}_verified", None) or {} for name in PASSES]
    if not (packed or any(shared)) or not _alike_at_every_length(model.config):
        return
    for name in packed:
        setattr(model, f"_unsloth_seq_packing_{name}_verified_T", ANY_LENGTH)
        setattr(model, f"_unsloth_seq_packing_{name}_verified_seg", ANY_LENGTH)
    for found in shared:
        found.update(dict.fromkeys(found, (ANY_LENGTH, ANY_LENGTH)))


def _alike_at_every_length(config: "PreTrainedConfig") -> bool:
    """Whether a longer row is computed as those before; False for a model that is not known."""
    from common.lm.rollout.architecture import FAMILIES, OF_EVERY_LENGTH, rotations

    text = config.get_text_config()
    if text.model_type not in FAMILIES or not rotations(text) <= OF_EVERY_LENGTH:
        return False
    window = getattr(text, "sliding_window", None)  # Unsloth looks for it in the outer configuration
    return window is None or getattr(config, "sliding_window", None) == window
