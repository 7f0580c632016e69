"""Train the input embedding and the output head in full beside a LoRA adapter, and prove that the adapter has them.

PEFT trains a copy of each and saves it in the adapter (`modules_to_save`). Where the model ties the two, the copies are
one tensor, and stay one after the adapter is loaded or merged.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import Trainer

from common.errors import MachineError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def embedding_modules(model: "PreTrainedModel") -> dict[str, Any]:
    """Arguments of get_peft_model that train the embedding and the head of `model`, tied as they are in it."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name.split(".")[-1] for name, module in model.named_modules() if module in ends]
    return {"modules_to_save": names, "ensure_weight_tying": ends[0].weight is ends[1].weight}


def train_in_float32(model: "PeftModel") -> None:
    """Keep the trained copies in float32: steps of their size are rounded away in 16 bit. Raises no error; the model's
    other parts see the dtype that they saw."""
    for wrapper in _wrappers(model).values():
        dtype = wrapper.original_module.weight.dtype
        for copy in wrapper.modules_to_save.values():
            copy.float()
        if dtype != torch.float32 and isinstance(wrapper.original_module, torch.nn.Embedding):
            wrapper.register_forward_hook(lambda _module, _inputs, output, dtype=dtype: output.to(dtype))
        elif dtype != torch.float32:
            wrapper.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(), *inputs[1:]))


class EmbeddingRate(Trainer):
    """A mixin of a Trainer: what `embedding_modules` added learns at `embedding_learning_rate`, if that is set.

    As UnslothTrainer does it, on top of the trainer that the recipe has.
    """

    embedding_learning_rate: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is not None or self.embedding_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        trained = {id(weight) for wrapper in _wrappers(self.model).values() for weight in wrapper.parameters()}
        for group in list(optimizer.param_groups):
            own = [weight for weight in group["params"] if id(weight) in trained]
            if own:
                group["params"] = [weight for weight in group["params"] if id(weight) not in trained]
                optimizer.add_param_group({**group, "params": own, "lr": self.embedding_learning_rate})
        return optimizer


def check_saved(adapter: Path, model: "PeftModel") -> dict[str, int]:
    """How many rows of each trained embedding differ from the base in the saved adapter, {name: rows}.

    The file is read back: that a weight is trained does not mean that it is saved. Raises MachineError when one is not
    in the file, is no other than the base's, or when tied ones differ.
    """
    wrappers = _wrappers(model)
    tied = model.peft_config["default"].ensure_weight_tying
    moved, saved = {}, {}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name, wrapper in wrappers.items():
            leaf = name.split(".")[-1]
            key = f"{name}.weight"
            if key in names:
                saved[leaf] = file.get_tensor(key)
                base = wrapper.original_module.weight.detach().to("cpu", torch.float32)
                moved[leaf] = int((saved[leaf].float() != base).any(dim=1).sum())
            elif not (tied and isinstance(wrapper.original_module, torch.nn.Linear)):
                raise MachineError(_lost(leaf, "is not in the saved adapter"))
    if not moved:
        raise MachineError(_lost("the embedding", "is not in the saved adapter"))
    for leaf, rows in moved.items():
        if not rows:
            raise MachineError(_lost(leaf, "is saved as it was in the base"))
    if tied and any(not torch.equal(one, other) for one in saved.values() for other in saved.values()):
        raise MachineError(_lost(" and ".join(saved), "are tied in the base and differ in the saved adapter"))
    return moved


def _wrappers(model: "PeftModel") -> dict[str, ModulesToSaveWrapper]:
    """The wrappers around what is trained in full, by name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _lost(what: str, fault: str) -> str:
    return (
        f"--train-embeddings: {what} {fault}, so this training of the embedding is lost; no adapter was written. The "
        "checkpoints are kept. Train without it, or with other versions of Unsloth and PEFT."
    )
