"""Model cards: one TOML file of facts per model, `models/<name>.toml`.

Nothing here depends on a particular card, and nothing sends requests to a hub.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from common.errors import InputError, did_you_mean

CARDS = Path(__file__).parents[2] / "models"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Method = Literal["sft", "dpo", "kto", "grpo", "ppo", "reward"]

Settings = dict[str, object]  # each has the type of the recipe's argument of that name


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Architecture(Facts):
    """The sizes of the decoder, as its config.json has them; the memory plan is computed from them."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt  # rows of the embedding, padding included
    tied_embeddings: bool  # the output layer is the embedding


class Card(Facts):
    """The facts about one model. `name` is the name of the file; everything else is in the file."""

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
    kto: Settings = {}
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


def card_names() -> list[str]:
    return sorted(file.stem for file in CARDS.glob("*.toml"))


def read_card(name: str) -> Card:
    """The card `models/<name>.toml`. Raises InputError when there is none or a line of it is wrong."""
    if name not in card_names():
        raise InputError(
            f"no model card is named {name!r}{did_you_mean(name, card_names())}. `make models` lists them."
        )
    file = CARDS / f"{name}.toml"
    try:
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
        if "name" in facts:
            raise InputError(f"{file}: name: a card is named by its file; take the line out.")
        return Card(name=name, **facts)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: not TOML: {error}.") from None
    except ValidationError as error:
        # A misspelt key is a missing key too; the message about the misspelling is more useful.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = Architecture.model_fields if key.startswith("architecture.") else Card.model_fields
            hint = did_you_mean(str(problem["loc"][-1]), known)
            raise InputError(f"{file}: {key}: unknown key{hint}.") from None
        raise InputError(
            f"{file}: {key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}."
        ) from None


def method_settings(card: Card | None, method: str, known: Iterable[str]) -> Settings:
    """The values that the card sets for `method`; none without a card.

    `known` are the names of the recipe's arguments. Raises InputError for a setting that is not one of them, and for a
    method that the card does not list.
    """
    if card is None:
        return {}
    known, file = list(known), CARDS / f"{card.name}.toml"
    if method not in card.methods:
        raise InputError(f"{file}: {card.name} is not offered for {method}, only for {', '.join(card.methods)}.")
    for key in (settings := getattr(card, method)):
        if key not in known:
            raise InputError(f"{file}: {method}.{key}: the recipe has no such argument{did_you_mean(key, known)}.")
    return dict(settings)
