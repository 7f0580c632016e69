"""What an example is made of: its prompt, its completions, its whole text, and what it is graded and read with.

An example is known by its fields, so that a new kind of example, or a new field, is part of its identity by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from itertools import takewhile
from operator import attrgetter
from typing import Any

from common.data.examples import Conversation, Document

from check_data.tasks import Example

TEXTS = ("prompt", "messages", "chosen", "rejected", "response", "completion", "text")  # fields that hold turns or text
COMPLETIONS = ("messages", "chosen", "completion", "response")
COLUMNS = "fields"  # of a prompt: the row's other columns, which a reward function may read


def prompt_of(example: Example) -> list[dict[str, Any]]:
    """The turns before a completion; of a conversation, those before the assistant's first.

    A document is looked at like a prompt, which has no completion.
    """
    if isinstance(example, Document):
        return [{"role": "user", "content": example.text}]
    if isinstance(example, Conversation):
        return [*takewhile(lambda turn: turn["role"] != "assistant", example.messages)]
    return getattr(example, "prompt", [])


def completions_of(example: Example) -> list[str]:
    """The completions that an example teaches; of a pair the chosen one. A prompt teaches none by itself."""
    turns = _completion(type(example))(example)
    return [turn["content"] for turn in turns if turn["role"] == "assistant" and turn["content"]]


def turns_of(example: Example) -> list[dict[str, Any]]:
    """The turns of an example from the first to the last; of a pair with the chosen completion. A document has none."""
    if isinstance(example, Document):
        return []
    if isinstance(example, Conversation):
        return example.messages
    return prompt_of(example) + _completion(type(example))(example)


def text_of(turns: list[dict[str, Any]]) -> str:
    """The text of the turns, without a system prompt, which all rows may share."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def identity(example: Example) -> str:
    """All that is trained, graded or read of an example, as one text: every field but its place."""
    return repr([sorted(value) if isinstance(value, frozenset) else value for value in _fields(type(example))(example)])


@cache
def _completion(kind: type) -> Callable[[Example], list[dict[str, Any]]]:
    """What gives the turns that examples of a kind teach, or of a prompt none."""
    names = {field.name for field in fields(kind)}
    return next((attrgetter(name) for name in COMPLETIONS if name in names), lambda _: [])


@cache
def _fields(kind: type) -> Any:
    names = [field.name for field in fields(kind) if field.name != "place"]
    return attrgetter(*names) if len(names) > 1 else lambda example: (getattr(example, names[0]),)


def whole_text(example: Example) -> str:
    """All text of an example from its first word to its last, thoughts and calls included."""
    values = [getattr(example, name) for name in TEXTS if hasattr(example, name)]
    return "\n".join(leaf for value in values for leaf in leaves(_without_system(value)))


def other_parts(example: Example) -> dict[str, int]:
    """The hash of each part of an example besides its text, by name: two examples may differ in that part alone."""
    system = [turn["content"] for turn in turns_of(example) if turn["role"] == "system"]
    others = {field.name: getattr(example, field.name) for field in fields(example) if field.name not in TEXTS}
    columns = others.pop(COLUMNS, {})
    del others["place"]
    named = {"system prompt": system, **others, **{f"column {name}": value for name, value in columns.items()}}
    return {name: hash(repr(sorted(part) if isinstance(part, frozenset) else part)) for name, part in named.items()}


def leaves(value: Any) -> Iterator[str]:
    """Every text in a value, at any depth; the roles of turns are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name != "role":
                yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif value is not None:
        yield str(value)


def _without_system(value: Any) -> Any:
    return [turn for turn in value if turn.get("role") != "system"] if isinstance(value, list) else value
