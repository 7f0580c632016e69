"""Adapters: what their configuration asks for, which of them can be used where, and loading one whole.

PEFT knows some forty kinds of adapter and loads them leniently: tensors that fit nothing are dropped, unknown settings
are ignored, some kinds change the base while they are loaded. So the configuration is read first. What can be done with
an adapter is then done as PEFT would do it, and the rest is refused by name.

This module imports peft only where a function needs it, so that a recipe can import it before it imports unsloth.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.run.files import read_object

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of the names of an adapter's tensors; after it comes the name in the base

# Kinds whose merge by PEFT 0.21.2 gives the adapter's outputs: tests/common/lm/test_merge_weights.py tries them.
MERGEABLE = {
    *("LORA", "ADALORA", "BOFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA"),
    *("LOKR", "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VERA"),
}
# Settings of LoRA with which it is no change of weights, or with which its folder does not hold all of the change.
NOT_MERGEABLE = {
    "alora_invocation_tokens": "it works from its invocation tokens on only, which no weights can express",
    "arrow_config": "it chooses between adapters for each token, which no weights can express",
    "kasa_config": "it replaces the weights of the base, and the folder does not hold the new ones",
    "layer_replication": "it repeats layers of the base, which then share their weights",
    "megatron_config": "it is for Megatron's layers",
    "monteclora_config": "its weights are drawn at random",
    "use_bdlora": "its matrices are stored in blocks",
    "use_qalora": "it is for weights that GPTQ has quantized",
    "velora_config": "its backward pass is another one, and its merge is not tested here",
}
# Initializations that take a part of the base into the adapter. The folder has only the adapter's part.
FROM_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# What an adapter may have where it is used unmerged: Unsloth's kernels read A, B and the scale, and nothing else.
NOT_PLAIN = {
    "bias": ("none",),
    "lora_bias": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_dora": (),
}


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json in `folder` says. Raises InputError where there is none, or none that can be read."""
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"{folder}: no {CONFIG} there; give the adapter folder of a run")
    return read_object(file)


def check_mergeable(folder: Path) -> None:
    """Raise InputError where the adapter in `folder` is none that a merge can express, or is not stored whole."""
    config = read_config(folder)
    _check_weights(folder)
    kind = config.get("peft_type")
    if kind not in MERGEABLE:
        raise InputError(
            f"{folder}: an adapter of the kind {kind} cannot be merged; merged are {', '.join(sorted(MERGEABLE))}"
        )
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise InputError(f"{folder}: an adapter for {task}; only those of language models (CAUSAL_LM) are merged")
    for name, reason in NOT_MERGEABLE.items():
        if config.get(name):
            raise InputError(f"{folder}: {kind} with {name} cannot be merged: {reason}")
    initial = config.get("init_lora_weights", config.get("init_weights"))
    if isinstance(initial, str) and initial.startswith(FROM_THE_BASE):
        raise InputError(
            f"{folder}: started from parts of the base's weights ({initial}), and does not hold what was left of them. "
            "Save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def check_plain(folder: Path) -> None:
    """Raise InputError where the adapter in `folder` is none that can be put on its base as it is.

    That is LoRA on linear layers, with or without a trained embedding and head. The rest has to be merged first.
    """
    config = read_config(folder)
    _check_weights(folder)
    kind = config.get("peft_type")
    used = [name for name, plain in NOT_PLAIN.items() if config.get(name) and config[name] not in plain]
    if kind == "LORA":
        used += [name for name in NOT_MERGEABLE if config.get(name)]
        if isinstance(initial := config.get("init_lora_weights"), str) and initial.startswith(FROM_THE_BASE):
            used.append(f"init_lora_weights={initial}")
        used += sorted(saved_whole(config) - {"embed_tokens", "lm_head"})
        if any("lora_embedding_" in name or name.startswith(f"{PREFIX}lm_head.lora_") for name in shapes(folder)):
            used.append("LoRA on the embedding or the head")
    if kind != "LORA" or used:
        what = f"LoRA with {', '.join(used)}" if kind == "LORA" else f"of the kind {kind}"
        raise InputError(
            f"{folder}: an adapter {what} cannot be used beside its base; merge it (make merge ADAPTER={folder}) and "
            "give the merged model"
        )


def saved_whole(config: dict[str, Any]) -> set[str]:
    """The last names of modules that an adapter holds whole: PEFT adds model.embed_tokens where the head is tied."""
    return {name.rpartition(".")[2] for name in config.get("modules_to_save") or ()}


def _check_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).is_file():
        raise InputError(
            f"{folder}: its weights are a pickle, {PICKLE}, which can run code when it is loaded. If you trust it, "
            'convert it there: python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in '
            f"torch.load('{PICKLE}', weights_only=True).items()}}, '{WEIGHTS}', {{'format': 'pt'}})\""
        )
    raise InputError(f"{folder}: has no {WEIGHTS}; give the adapter folder of a run that is finished")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by name, from the header of its file. Raises InputError where it is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dictionary: it has keys alone
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error}") from None


def load_adapter(model: "PreTrainedModel", folder: Path) -> "PeftModel":
    """`model` under the adapter in `folder`, frozen and without dropout.

    Raises InputError where PEFT does not know a setting, where a tensor of the file fits nothing in the model, where
    the model needs one that the file has not, and where one is not finite.
    """
    import torch
    from peft import get_peft_model
    from safetensors.torch import load_file

    config = _peft_config(folder)
    broken = [name for name, value in load_file(folder / WEIGHTS).items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"{folder}: {_some(broken)} hold values that are not finite; the run that made it has failed")
    misfit = f"{folder} does not fit {model.config.name_or_path}; an adapter fits its own base only"
    try:
        adapted = get_peft_model(model, config)
        result = adapted.load_adapter(str(folder), "default")
    except RuntimeError as error:
        if "loading state_dict" not in (reason := str(error)):
            raise
        raise InputError(f"{misfit}: {reason.splitlines()[1].strip()}") from None
    except (KeyError, ValueError) as error:  # a module to save that is not in the file, target modules that are nowhere
        raise InputError(f"{misfit}: {str(error).splitlines()[0]}") from None
    # With a resized vocabulary PEFT writes a module that is saved whole twice, here under a name that it does not read.
    if unused := [name for name in result.unexpected_keys if not name.endswith(".modules_to_save.weight")]:
        raise InputError(f"{misfit}: nothing in it takes {_some(unused)}")
    if result.missing_keys:
        raise InputError(f"{misfit}: the adapter's file lacks {_some(result.missing_keys)}")
    return adapted.eval()


def check_base(model: "PreTrainedModel", name: str) -> None:
    """Raise InputError where loading `name` gave a base with an adapter on it, as transformers does with a hub id."""
    if config := getattr(model, "peft_config", None):
        base = next(iter(config.values())).base_model_name_or_path
        raise InputError(
            f"{name} is an adapter of {base}, not a model; download it, merge it with make merge, give that"
        )


def _peft_config(folder: Path) -> "PeftConfig":
    """The adapter's settings as PEFT's. Raises InputError for one that this PEFT does not know, and would ignore."""
    import dataclasses

    import peft
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = read_config(folder)
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]])}
    unknown = [name for name, value in settings.items() if value and name not in known]
    if unknown:
        raise InputError(f"{folder / CONFIG}: PEFT {peft.__version__} does not know {_some(unknown)}")
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.base_model_name_or_path = None  # else PEFT warns where the base has another path here
    return config


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
