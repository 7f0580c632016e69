"""The sizes of a model that has no card, from its config.json. Standard library only."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.plan.memory import linear_weights
from common.run.files import read_object


def sizes_of(base: Any) -> Any | None:
    """What the planner reads of a model: its card, else its config.json where that is on this machine, else None.

    Raises InputError where config.json is damaged.
    """
    if base.card is not None:
        return base.card
    file = Path(base.source, "config.json")
    return sizes_in(read_object(file)) if base.local and file.is_file() else None


def sizes_in(config: dict[str, Any]) -> Any | None:
    """The sizes in a config.json of transformers; None where it has not the numbers of a plain decoder."""
    text = config.get("text_config") or config
    try:
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        shape = SimpleNamespace(
            hidden_size=hidden,
            intermediate_size=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            vocab_size=text["vocab_size"],
            tied_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)),
        )
    except (KeyError, TypeError, ZeroDivisionError):  # not there, null, or 0
        return None
    vocabulary = shape.vocab_size * hidden * (1 if shape.tied_embeddings else 2)
    return SimpleNamespace(parameters=linear_weights(shape) + vocabulary, architecture=shape)
