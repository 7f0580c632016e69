"""The kinds of example that the methods learn from, all but one made of chat messages.

A Conversation to imitate, a Pair of completions with a preference, Feedback on a completion, a Prompt whose completions
are scored, a Rating of a completion. Messages have the usual shape ({"role", "content"}, and "tool_calls" where an
assistant calls tools, their arguments as objects). The model's own chat template renders them at the end, so one file
serves every model. A Document is raw text instead.
"""

from dataclasses import dataclass, field
from typing import Any

from common.data.turns import Turns


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages to imitate, and the tools offered to the model, if any. `place` is file:line, in every example.

    `untrained` are the indices of the assistant's turns that carry no loss: the row marks them so, or they are context.
    """

    place: str
    messages: Turns
    tools: Turns | None = None
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two completions, of which `chosen` is the better one. Each ends with a turn of the assistant."""

    place: str
    prompt: Turns
    chosen: Turns
    rejected: Turns
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt, a completion of it (one turn of the assistant), and whether the completion is good."""

    place: str
    prompt: Turns
    completion: Turns
    label: bool
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt whose completions are scored. `answer` is the gold answer; `fields` are the row's other columns."""

    place: str
    prompt: Turns
    answer: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """A prompt, a completion of it (`response`), and its score, a finite number."""

    place: str
    prompt: Turns
    response: Turns
    score: float
    tools: Turns | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text to continue pre-training on; no chat template touches it."""

    place: str
    text: str


Example = Conversation | Document | Pair | Feedback | Prompt | Rating
