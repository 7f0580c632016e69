"""What is exported of a run as folders for transformers and vLLM: its adapter, and the model in 16 bit."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.lm.adapter import CONFIG, WEIGHTS
from common.lm.hub import Model, find_model, load_tokenizer, resolved_revision
from common.lm.load import base_of
from common.run.files import read_object, write_json
from common.run.folder import parent_of
from common.run.record import adapter_of
from merge import identify, load_tokenizers, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What PEFT and the tokenizer write beside an adapter, of use to whoever loads it. Not README.md, a form to fill in.
ADAPTER_FILES = (CONFIG, WEIGHTS, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
ADAPTER_FILES += ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Trained:
    """What a run trained: an `adapter` on its `base`, or a `whole` model; in a folder that is no run, that alone."""

    name: str
    folder: Path
    base: Model | None
    adapter: Path | None = None
    whole: Model | None = None

    @property
    def models(self) -> list[Model]:
        return [model for model in (self.base, self.whole) if model]


def find_trained(run: str, base: str | None = None) -> Trained:
    """What is in a run's folder, an adapter's, or a model's, such as one that `make merge` wrote.

    Raises InputError where it is none of them, for a reward model, and as `base_of`.
    """
    folder = Path(run).expanduser()
    if (folder / "head.json").is_file() or (folder / "adapter" / "head.json").is_file() or _scores(folder):
        raise InputError(
            f"{folder}: a reward model gives scores, from a head that GGUF and chat servers have no place for; "
            "`make ppo` and `make evaluate` use it as it is, and `make reward` with --stand-alone writes it as a "
            "sequence classifier of transformers"
        )
    name = folder.resolve().name
    if (folder / "run.json").is_file() and (folder / "model" / "config.json").is_file():
        parent = parent_of(folder / "model")
        before = base or (parent.model if parent else None)
        found = find_model(before) if before else None
        return Trained(name, folder, found, whole=find_model(str(folder / "model")))
    if (folder / "run.json").is_file() or (folder / CONFIG).is_file():
        adapter = adapter_of(folder) if (folder / "run.json").is_file() else folder
        name = name if adapter != folder or name != "adapter" else folder.resolve().parent.name
        return Trained(name, folder, base_of(base, str(adapter), to_merge=True), adapter=adapter)
    if (folder / "config.json").is_file():
        return Trained(name, folder, None, whole=find_model(str(folder.resolve())))
    raise InputError(f"{folder}: holds no run, no adapter and no model; give the folder of a run, which has a run.json")


def _scores(folder: Path) -> bool:
    """Is the model in a folder, or in a run's, one that gives scores?"""
    for file in (folder / "config.json", folder / "model" / "config.json"):
        if file.is_file():
            names = read_object(file).get("architectures") or []
            return any("ForSequenceClassification" in name for name in names)
    return False


def trained_tokenizer(trained: Trained) -> "PreTrainedTokenizerBase":
    """The tokenizer that the run trained with."""
    if trained.adapter and trained.base:
        return load_tokenizers(trained.base, trained.adapter)[0]
    assert trained.whole
    return load_tokenizer(trained.whole)


def write_adapter(trained: Trained, folder: Path) -> None:
    """Copy the adapter to `folder`. Its configuration names the base by id and commit, never by a path."""
    assert trained.adapter
    assert trained.base
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if (trained.adapter / name).is_file():
            shutil.copyfile(trained.adapter / name, folder / name)
    config = read_object(folder / CONFIG)
    base = trained.base
    config["base_model_name_or_path"] = base.name if base.local else base.source
    config["revision"] = None if base.local else resolved_revision(base) or base.revision
    write_json(folder / CONFIG, config)


def write_merged(trained: Trained, folder: Path) -> dict[str, Any]:
    """Write the trained model to `folder` in 16 bit; returns what the check of the merge measured.

    Raises InputError and MachineError as `merge`.
    """
    if trained.adapter and trained.base:
        return merge(trained.base, trained.adapter, folder, identify(trained.base, trained.adapter))
    assert trained.whole
    import torch
    from common.lm.merge import check_finite, stop_at
    from merge import cast
    from transformers import AutoModelForCausalLM

    tokenizer = trained_tokenizer(trained)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        trained.whole.source, dtype="auto", trust_remote_code=False
    )
    if getattr(model.config, "quantization_config", None):
        raise InputError(f"{trained.whole.source} is stored in few bits; only 16-bit models are exported")
    cast(model, torch.bfloat16 if model.dtype == torch.float32 else model.dtype)
    model.config.dtype = model.dtype
    check_finite(model)
    stop_at(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}
