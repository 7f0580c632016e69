"""A reward model that is an adapter with a scalar head on the policy's base, as `make reward` writes it."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError
from common.lm.adapter import CONFIG, WEIGHTS, check_plain
from common.lm.scalar_head import load_head
from common.run.files import read_object

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

REWARD_FILES = (WEIGHTS, "head.safetensors", CONFIG)  # what it scores: its weights, its head, its scale


def find_reward_adapter(name: str, base: str) -> Path:
    """The adapter folder of a reward model. `name` is its run's folder or its own, `base` its base's `hub.contents`.

    Raises InputError when there is none, when it is not plain LoRA, and when it was trained on another base.
    """
    folder = Path(name).expanduser()
    folder = folder if (folder / CONFIG).is_file() else folder / "adapter"
    if not (folder / "head.json").is_file():
        raise InputError(
            f"--reward-model {name}: has no adapter with a head.json; give the folder of a run of `make reward`. A "
            f"sequence classifier, which is any model with one output, is a reward function: --rewards model:{name}"
        )
    check_plain(folder)
    facts = read_object(folder / "head.json")
    if facts["base"] != base:
        raise InputError(
            f"--reward-model {name}: was trained on another base ({facts['base'][:16]}) than --model ({base[:16]}); "
            "train one on this base with make reward, or give its base with --model"
        )
    return folder


def load_reward_adapter(model: "PeftModel", folder: Path, name: str, is_trainable: bool = False) -> "torch.nn.Linear":
    """Add the adapter in `folder` to `model` under this name, and return its scalar head.

    The dropout that it was trained with is switched off, so that a score, or a value, is the same each time.
    """
    model.load_adapter(str(folder), adapter_name=name, is_trainable=is_trainable)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        if name in dropouts and hasattr(dropouts[name], "p"):  # without dropout it is an identity
            dropouts[name].p = 0.0
    head, _ = load_head(folder, model.device)
    return head
