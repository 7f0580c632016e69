"""Which model a run trains: `find_model` turns a card's name, a directory or a hub id into one place to load from.

A card is a file of facts, `models/<name>.toml`; nothing here knows what is in any of them. `fetch` and
`load_tokenizer` may ask a hub; the rest reads this machine alone.
"""

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from .environment import ROOT
from .errors import InputError, MachineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARDS = Path(__file__).parents[1] / "models"
MERGE_RECORD = "merge.json"  # beside the weights of a merged model: of what base, adapter and card it was made
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Method = Literal["sft", "dpo", "grpo", "ppo", "reward"]
Settings = dict[str, object]  # what type each one has, the recipe's own arguments say


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Architecture(Facts):
    """The sizes of the decoder, as its config.json has them; what a memory plan is worked out from."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt  # rows of the embedding, padding included
    tied_embeddings: bool  # the output layer is the embedding


class Card(Facts):
    """What is known of one model. `name` is the file's name; everything else stands in the file."""

    name: str
    hub_id: str | None = Field(default=None, pattern=f"^{HUB_ID.pattern}$")
    path: str | None = None  # relative to the repository, instead of a hub id
    revision: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")
    licence: str
    gated: bool
    parameters: PositiveInt
    context: PositiveInt  # tokens; the config's max_position_embeddings
    chat_format: Literal["chatml", "llama3", "gemma", "phi3", "phi4", "deepseek-r1"]
    end_token: str  # ends an assistant's turn
    pad_token: str
    methods: tuple[Method, ...] = Field(strict=False)  # TOML has lists, no tuples
    architecture: Architecture
    sft: Settings = {}
    dpo: Settings = {}
    grpo: Settings = {}
    ppo: Settings = {}
    reward: Settings = {}

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if (self.hub_id is None) == (self.path is None):
            raise ValueError("give hub_id or path, one of the two")
        if self.end_token == self.pad_token:  # the loss skips padding: such a model never learns to stop
            raise ValueError("pad_token must differ from end_token")
        return self


@dataclass(frozen=True)
class Model:
    """Where to load a model from. `source` is an absolute directory when `local`, else a hub id."""

    name: str  # short, fit for a folder's name
    source: str
    revision: str | None
    card: Card | None
    local: bool


def card_names() -> list[str]:
    return sorted(file.stem for file in CARDS.glob("*.toml"))


def read_card(name: str) -> Card:
    """The card `models/<name>.toml`. Raises InputError when there is none or a line of it is wrong."""
    if name not in card_names():
        raise InputError(f"no model card is named {name!r}{_nearest(name, card_names())}. `make models` lists them.")
    file = CARDS / f"{name}.toml"
    try:
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
        if "name" in facts:
            raise InputError(f"{file}: name: a card is named by its file; take the line out.")
        return Card(name=name, **facts)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: not TOML: {error}.") from None
    except ValidationError as error:
        # A misspelt key is also a missing one; the misspelling says more.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = Architecture.model_fields if key.startswith("architecture.") else Card.model_fields
            raise InputError(f"{file}: {key}: unknown key{_nearest(str(problem['loc'][-1]), known)}.") from None
        raise InputError(
            f"{file}: {key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}."
        ) from None


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
        f"no model {name!r}: it is no card{_nearest(name, card_names())}, no directory and no hub id (org/name). "
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


def method_settings(card: Card | None, method: str, known: Iterable[str]) -> Settings:
    """What the card sets differently for `method`; nothing where there is no card.

    `known` are the names of the recipe's arguments. Raises InputError for a setting that is none of them, and for a
    method that the card is not offered for.
    """
    if card is None:
        return {}
    known, file = list(known), CARDS / f"{card.name}.toml"
    if method not in card.methods:
        raise InputError(f"{file}: {card.name} is not offered for {method}, only for {', '.join(card.methods)}.")
    for key in (settings := getattr(card, method)):
        if key not in known:
            raise InputError(f"{file}: {method}.{key}: the recipe has no such argument{_nearest(key, known)}.")
    return dict(settings)


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


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
