"""Merge a LoRA adapter into the weights under it: each sum is computed in 32 bit and rounded once."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.lm.hub import Model
from common.run.files import write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel


def merge_weights(model: "PeftModel") -> "PreTrainedModel":
    """The base of `model` with its active adapter merged into every layer, in place, in the base's own dtype."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _add_delta(layer.get_base_layer().weight, layer)
    return model.unload()


def save_classifier(
    model: "PeftModel", head: torch.nn.Linear, base: Model, folder: Path, pad_token_id: int, facts: dict[str, Any]
) -> None:
    """Write base, adapter and head as one AutoModelForSequenceClassification with one output, in 16 bit.

    The adapter is merged into the stored base, not into the 4-bit copy in which `model` may have it.
    """
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that the base has no head; ours is put in below
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base.source, revision=base.revision, num_labels=1, dtype="auto"
    )
    if classifier.dtype == torch.float32:
        classifier = classifier.to(torch.bfloat16)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            _add_delta(classifier.get_submodule(name).weight, layer)
    classifier.score.weight.data.copy_(head.weight)
    classifier.config.pad_token_id = pad_token_id  # by it the last token of a row is found
    classifier.save_pretrained(folder)
    write_json(folder / "head.json", facts)


def _add_delta(weight: torch.nn.Parameter, layer: "LoraLayer") -> None:
    """Add the layer's B @ A * alpha / r (its active adapter's) to `weight`, which may be on another device."""
    delta = layer.get_delta_weight(layer.active_adapters[0])
    weight.data = (weight.data.float() + delta.float().to(weight.device)).to(weight.dtype)
