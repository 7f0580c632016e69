"""What the methods learn from: four kinds of example, all made of chat messages.

A Conversation to imitate, a Pair of completions to prefer between, a Prompt whose completions are scored, a Rating of a
completion. Messages have the field's usual shape ({"role", "content"}, with "tool_calls" where an assistant calls
tools), because the model's own chat template renders them in the end; so one file serves every model.
"""

from dataclasses import dataclass, field
from typing import Any

from common.data.turns import Turns


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example: its place in the data, chat messages, and the tools offered to the model, if any."""

    place: str
    messages: Turns
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two ways to go on, of which `chosen` is the better. Each answer ends in a turn of the assistant."""

    place: str
    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt whose answers are scored. `answer` is the gold one as text; `fields` are the row's other columns."""

    place: str
    prompt: Turns
    answer: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """A prompt, an answer to it, and the finite number somebody gave that answer."""

    place: str
    prompt: Turns
    response: Turns
    score: float
    tools: Turns | None = None
