"""Merge an adapter into the weights under it, as PEFT does: computed in 32 bit, rounded once, each layer checked."""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from common.errors import InputError, MachineError
from common.lm.adapter import PREFIX, load_adapter, read_config, saved_whole, shapes
from common.lm.hub import Model
from common.lm.render import end_token
from common.run.files import write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBES = 16
# Of the change that an adapter makes to a layer's outputs, the part that a merge may lose or add, and of the outputs
# themselves what 32-bit sums differ by. docs/stages.md has what right and wrong merges measure.
CHANGE, NOISE = 2e-3, 5e-6
WHOLE = {"weight", "base_layer.weight", "original_module.weight"}  # an adapter's tensors that are a whole matrix


def merge_weights(model: "PeftModel") -> tuple["PreTrainedModel", float]:
    """The base of `model` with its active adapter merged into it, in place and in the base's dtypes; and the error.

    The error is the largest that a layer has: the norm of what its outputs differ by, over the norm of what the adapter
    changes in them, on random inputs and before rounding. Embedding and head stay tied where they are still equal.
    Raises MachineError where a layer's error is not that of 32-bit sums, and where a merged weight is too large for
    the base's dtype.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    worst = 0.0
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            worst = max(worst, _merge_layer(name, layer))
    tied = model.base_model.model.config.get_text_config().tie_word_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layers are merged already, and that nothing is tied
        # PEFT takes its wrappers off, and puts modules in place that were trained whole.
        merged = cast("PreTrainedModel", model.base_model.merge_and_unload())
    if tied:
        tie_if_equal(merged)
    check_finite(merged)
    return merged, worst


def _merge_layer(name: str, layer: "BaseTunerLayer") -> float:
    """Merge one layer; returns its error, 0 where no random input is known for a layer of its kind."""
    base = layer.get_base_layer()
    dtypes = {key: value.dtype for key, value in base.named_parameters()}
    layer.float()
    inputs = _random_inputs(base)
    with torch.no_grad():
        trained = layer(inputs) if inputs is not None else None
        frozen = base(inputs) if inputs is not None else None
        layer.merge(safe_merge=False)
        base = layer.get_base_layer()  # tuned norms change places with the base's
        merged = base(inputs) if inputs is not None else None
    for key, value in base.named_parameters():
        value.data = value.data.to(dtypes[key])
    if trained is None or frozen is None or merged is None:
        return 0.0
    wrong, change = float((merged - trained).norm()), float((trained - frozen).norm())
    error = wrong / change if change else 0.0
    if not wrong <= CHANGE * change + NOISE * float(trained.norm()):  # also where one is not a number
        raise MachineError(
            f"the merged model is not the trained one: the outputs of {name} differ by {error:.1%} of what the adapter "
            "changes in them"
        )
    return error


def _random_inputs(base: torch.nn.Module) -> torch.Tensor | None:
    """Inputs (PROBES, features), or ids (PROBES,), for a linear layer or an embedding; the same each time."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(base, "weight", None)
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(base.num_embeddings, (PROBES,), generator=generator).to(base.weight.device)
    if isinstance(weight, torch.Tensor) and isinstance(base, torch.nn.Linear | Conv1D):
        features = weight.shape[0] if isinstance(base, Conv1D) else weight.shape[1]
        return torch.randn(PROBES, features, generator=generator).to(weight.device)
    return None


def check_finite(model: "PreTrainedModel") -> None:
    """Raise MachineError where a weight is not finite: float16 ends at 65504."""
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise MachineError(f"the merged model is not the trained one: {name} is too large for {value.dtype}")


def stop_at(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let generation stop at the token that ends an answer: that of a base may stop at the end of a document only."""
    if not tokenizer.chat_template:
        return
    end, before = tokenizer.convert_tokens_to_ids(end_token(tokenizer)), model.generation_config.eos_token_id
    ends = before if isinstance(before, list) else [] if before is None else [before]
    if end not in ends:
        model.generation_config.eos_token_id = [end, *ends]


def check_written(model: "PreTrainedModel", folder: Path) -> None:
    """Raise MachineError where the files in `folder` do not hold the weights of `model`; read one tensor at a time."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    state = model.state_dict()
    stored: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as part:
            stored |= dict.fromkeys(part.keys(), file)
    held = {state[name].data_ptr() for name in stored if name in state}  # tied weights are stored once
    whole = {}
    if any(value.data_ptr() not in held for value in state.values()):  # a family that stores its weights by other names
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).state_dict()
    for name, value in state.items():
        written = whole.get(name)
        if name in stored:
            with safe_open(stored[name], framework="pt") as part:
                written = part.get_tensor(name)
        elif value.data_ptr() in held:
            continue
        if written is None or not torch.equal(value.cpu(), written):
            raise MachineError(f"{folder}: {name} is not as it was merged; is the disk in order?")


def put_on(model: "PreTrainedModel", folder: Path, tokens: int | None) -> "PeftModel":
    """`model` under the adapter in `folder`, ready to merge: with its vocabulary, and with a head of its own.

    An adapter may change the embedding or the head alone, where both are one matrix in the base. `tokens` is as in
    `resize_vocabulary`. Raises InputError as that and `load_adapter` do.
    """
    resize_vocabulary(model, folder, tokens)
    shared = model.get_input_embeddings().weight
    adapted = load_adapter(model, folder)
    for name, layer in adapted.base_model.model.named_modules():
        if any(getattr(layer, "lora_bias", {}).values()) and layer.get_base_layer().bias is None:
            raise InputError(f"{folder}: lora_bias cannot be merged: {name} has no bias in the base to add it to")
    holders = [module for module in adapted.modules() if module._parameters.get("weight") is shared]
    for module in holders[1:]:
        module.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)
    return adapted


def tie_if_equal(model: "PreTrainedModel") -> None:
    """Let the head share the embedding's weights where they are equal; else the config says that it does not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return
    tied = torch.equal(head.weight, embedding.weight)
    if tied:
        head.weight = embedding.weight
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = tied


def resize_vocabulary(model: "PreTrainedModel", folder: Path, tokens: int | None) -> None:
    """Give embedding and head of `model` as many rows as they had when the adapter in `folder` was trained.

    `tokens` is the size of the tokenizer in the folder, 0 where it is the base's, None where there is none. Raises
    InputError where rows are new and the folder does not hold them, or no tokenizer that uses them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    found, saved = shapes(folder), saved_whole(read_config(folder))

    def tensors(module: torch.nn.Module | None) -> dict[str, tuple[int, ...]]:
        start = f"{PREFIX}{names[module]}." if module else "-"
        return {name.removeprefix(start): shape for name, shape in found.items() if name.startswith(start)}

    before = rows = embedding.weight.shape[0]
    for side, index in {**dict.fromkeys(WHOLE, 0), "lora_embedding_A": 1, "lora_B.weight": 0}.items():
        for shape in (tensors(module).get(side) for module in (embedding, head)):
            rows = shape[index] if shape else rows
    if rows > before and tokens is None:
        raise InputError(f"{folder}: was trained after tokens were added; copy the tokenizer that has them to it")
    tokens = tokens or 0
    if rows > before or tokens > rows:
        held = [tensors(module).keys() & WHOLE for module in (embedding, head)]
        # In a module that is saved whole, "weight" is what was trained, and not the base's matrix.
        of_base = [
            sides - ({"weight"} if names.get(module, "").split(".")[-1] in saved else set())
            for sides, module in zip(held, (embedding, head), strict=True)
        ]
        tied = head is not None and head.weight is embedding.weight
        whole = (held[0] or (tied and of_base[1])) and (held[1] or head is None or (tied and of_base[0]))
        if tokens > rows or not whole:
            raise InputError(
                f"{folder}: was trained after tokens were added ({max(tokens, rows)}, {before} in the base), and does "
                "not hold their embeddings; save it with PEFT's save_embedding_layers=True"
            )
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)


def save_classifier(
    model: "PeftModel", head: torch.nn.Linear, base: Model, folder: Path, pad_token_id: int, facts: dict[str, Any]
) -> None:
    """Write base, adapter and head as one AutoModelForSequenceClassification with one output, in 16 bit.

    The adapter is merged into the stored base, not into the 4-bit copy in which `model` may have it.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that the base has no head; ours is put in below
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base.source, revision=base.revision, num_labels=1, dtype="auto", trust_remote_code=base.trusted
    )
    adapted = PeftModel(classifier, copy.deepcopy(model.peft_config["default"]))
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(model))
    merged, _ = merge_weights(adapted.eval())
    if merged.dtype == torch.float32:
        merged = merged.to(torch.bfloat16)
    merged.score.weight.data.copy_(head.weight)
    merged.config.pad_token_id = pad_token_id  # by it the last token of a row is found
    merged.save_pretrained(folder)
    write_json(folder / "head.json", facts)
