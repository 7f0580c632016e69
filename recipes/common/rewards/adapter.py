"""Where PPO finds a reward model that is an adapter with a scalar head, as `make reward` leaves it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError
from common.lm.scalar_head import load_head

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def find_reward_adapter(name: str, base: str) -> Path:
    """The adapter of a run of `make reward`, named by its run or its own folder, on the base of these contents."""
    folder = Path(name).expanduser()
    folder = folder if (folder / "adapter_config.json").is_file() else folder / "adapter"
    if not (folder / "head.json").is_file():
        raise InputError(
            f"--reward-model {name}: no adapter with a head.json there; give the folder of a run of `make reward`. A "
            f"sequence classifier, any model with one output, is a rule: --rewards model:{name}"
        )
    facts = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    if facts["base"] != base:
        raise InputError(
            f"--reward-model {name} was trained on another base ({facts['base'][:16]}) than --model is ({base[:16]}); "
            "train it on this one: make reward MODEL=..., or name its base with --model"
        )
    return folder


def load_reward_adapter(model: "PeftModel", folder: Path, name: str, is_trainable: bool = False) -> "torch.nn.Linear":
    """Add the adapter in `folder` to `model` under this name, and return its scalar head.

    The dropout that it may have been trained with is switched off: a score is the same each time, and so is a value.
    """
    model.load_adapter(str(folder), adapter_name=name, is_trainable=is_trainable)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        if name in dropouts and hasattr(dropouts[name], "p"):
            dropouts[name].p = 0.0
    head, _ = load_head(folder, model.device)
    return head
