"""One model as several: which of its adapters computes, switched for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from peft import PeftModel

LAYERS: "WeakKeyDictionary[PeftModel, list[Any]]" = WeakKeyDictionary()  # walking through a model takes time


@contextmanager
def active_adapter(model: "PeftModel", name: str | None) -> Iterator[None]:
    """Within the block the model computes with the adapter `name`, without any where it is None; then with "default".

    A block holds a forward pass and its backward pass, or neither: gradient checkpointing computes the activations
    again, with the adapter that is active then. Which weights take gradients does not change.

    PEFT's set_adapter and disable_adapter walk through all modules and parameters, to set requires_grad too: some 50 ms
    a time for a model of 28 layers.
    """
    layers = lora_layers(model)
    for layer in layers:
        layer._disable_adapters = name is None
        layer._active_adapter = name or "default"
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = "default"


def switch_quickly(model: "PeftModel") -> None:
    """Have `model.disable_adapter()`, which TRL's trainers call in every step, switch as `active_adapter` does."""
    model.disable_adapter = lambda: active_adapter(model, None)


def lora_layers(model: "PeftModel") -> list[Any]:
    """The layers of the model that hold its adapters."""
    from peft.tuners.lora import LoraLayer

    if model not in LAYERS:
        LAYERS[model] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return LAYERS[model]
