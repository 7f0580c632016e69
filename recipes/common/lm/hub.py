"""Which model a run trains: `find_model` turns a card's name, a directory or a hub id into one place to load from.

`fetch` and `load_tokenizer` may ask a hub; the rest reads this machine alone.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.environment import ROOT
from common.errors import InputError, MachineError, did_you_mean
from common.lm.cards import HUB_ID, Card, card_names, read_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGE_RECORD = "merge.json"  # beside the weights of a merged model: of what base, adapter and card it was made

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Model:
    """Where to load a model from. `source` is an absolute directory when `local`, else a hub id."""

    name: str  # short, fit for a folder's name
    source: str
    revision: str | None
    card: Card | None
    local: bool


def find_model(name: str) -> Model:
    """The model that `name` means: a card before a directory, a directory before a hub id.

    No card's name has a slash, so `./tiny` is always the directory. Raises InputError for a name that is none of the
    three, for a directory that holds no model, and for a card with a mistake in it.
    """
    if name in card_names():
        card = read_card(name)
        if card.path is None:
            return Model(name, card.hub_id, card.revision, card, local=False)
        return Model(name, str(_checkpoint(ROOT / card.path)), None, card, local=True)
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        directory = _checkpoint(directory.resolve())
        return Model(directory.name, str(directory), None, _card_of_merged(directory), local=True)
    if HUB_ID.fullmatch(name):
        return Model(name.rpartition("/")[2], name, None, None, local=False)
    raise InputError(
        f"no model {name!r}: it is no card{did_you_mean(name, card_names())}, no directory and no hub id (org/name). "
        "`make models` lists the cards."
    )


def _card_of_merged(directory: Path) -> Card | None:
    """The card of the model that scripts/merge.py merged an adapter into: what it says of that one still holds."""
    record = directory / MERGE_RECORD
    card = json.loads(record.read_text(encoding="utf-8"))["card"] if record.is_file() else None
    return read_card(card) if card else None


def _checkpoint(directory: Path) -> Path:
    """`directory`, once it is seen to hold a model that can be loaded by itself."""
    if (directory / "config.json").is_file():
        return directory
    adapter = directory / "adapter_config.json"
    if not adapter.is_file():
        raise InputError(f"{directory} holds no model: it has no config.json. Name a folder saved by save_pretrained.")
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path", "a base it does not name")
    raise InputError(
        f"{directory} holds an adapter of {base}, not a model: merge the two (make merge ADAPTER={directory}) and name "
        "the merged folder, or name the base to start over from it."
    )


def resolved_revision(model: Model) -> str | None:
    """The commit whose files a load takes, as the local hub cache has it; None for a directory or before a download."""
    if model.local:
        return None
    # Imported late: huggingface_hub reads HF_* when it is imported, and a recipe may still be setting them.
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return Path(cached).parent.name if isinstance(cached, str) else None  # .../snapshots/<commit>/config.json


def fetch(model: Model) -> Model:
    """`model` itself, or with UNSLOTH_USE_MODELSCOPE=1 its copy on this machine, downloaded from ModelScope.

    Raises MachineError when ModelScope does not give it. The Hugging Face hub is left to the libraries.
    """
    if model.local or os.environ.get("UNSLOTH_USE_MODELSCOPE") != "1":
        return model
    from modelscope import snapshot_download

    try:
        folder = snapshot_download(model.source, revision=model.revision)
    except (OSError, ValueError) as error:  # its network errors are OSErrors, its own of a wrong name ValueErrors
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"{model.source}: ModelScope does not give it (UNSLOTH_USE_MODELSCOPE=1): {reason}"
        ) from None
    return replace(model, source=folder, revision=None, local=True)


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """The tokenizer of `model`, from its directory or by way of the hub.

    Raises InputError when the hub has no such model, MachineError when the hub cannot be reached or refuses it.
    """
    # Imported late, as above; and transformers only after unsloth, which patches it.
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from transformers import AutoTokenizer

    # Without this transformers 5 makes an empty tokenizer of the config's class and says nothing.
    if model.local and not any(Path(model.source, name).exists() for name in TOKENIZER_FILES):
        raise InputError(
            f"{model.source} holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}: save one beside it."
        )
    try:
        return AutoTokenizer.from_pretrained(model.source, revision=model.revision)
    except OSError as error:
        cause = error
        while cause is not None:
            if isinstance(cause, GatedRepoError):
                raise MachineError(
                    f"{model.source} is gated: accept its licence on its page, then set HF_TOKEN to a token of yours."
                ) from None
            if isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
                raise InputError(f"{model.source}: the hub has no such model: {cause}") from None
            cause = cause.__cause__
        if model.local:
            raise InputError(f"{model.source}: its tokenizer cannot be read: {error}") from None
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"{model.source} cannot be loaded: {reason}\nCheck the network, HF_ENDPOINT and HF_HUB_OFFLINE, or name a "
            "local directory."
        ) from None


def base_sha256(path: str | Path) -> str:
    """One sha256 for what a checkpoint directory computes: its weights and its config, wherever it lies.

    It is taken over one line per file, `<name> <sha256 of the file>`, for config.json and every *.safetensors, sorted
    by name. Files are streamed, so any size will do. Raises InputError when either is missing.
    """
    weights = list(_checkpoint(Path(path)).glob("*.safetensors"))
    if not weights:
        raise InputError(f"{path} has no *.safetensors to know it by; save it with safetensors.")
    total = hashlib.sha256()
    for file in sorted([*weights, Path(path) / "config.json"]):
        with file.open("rb") as stream:
            total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def contents(model: Model) -> str:
    """What `model` is, wherever it lies: `base_sha256` of a directory, or the hub id with its revision."""
    return base_sha256(model.source) if model.local else f"{model.source}@{model.revision or 'main'}"
