"""Tell a row's format from its columns, and turn the row into one list of chat messages.

Five formats are known: alpaca, sharegpt, messages, prompt-completion and chatml-text. All become `messages` in the
field's usual shape ({"role", "content"}, with "tool_calls" where an assistant calls tools), because the model's own
chat template renders them in the end; so one file serves every model.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .errors import InputError
from .rows import Faults, Row
from .schemas import Alpaca, ChatMLText, Form, Messages, PromptCompletion, ShareGPT, parse_json

FORMATS: dict[str, type[Form]] = {
    "messages": Messages,
    "sharegpt": ShareGPT,
    "prompt-completion": PromptCompletion,
    "alpaca": Alpaca,
    "chatml-text": ChatMLText,
}
# The columns that tell a format. The first that fits wins: a row with `messages` and a stray `text` is messages.
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "chatml-text": ("text",),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example: its place in the data, chat messages, and the tools offered to the model, if any."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def column_map(pairs: Iterable[str]) -> dict[str, str]:
    """`["prompt=question"]` as {"question": "prompt"}: which column of the file stands for which of the format."""
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--columns {pair}: expected OURS=THEIRS, for example prompt=question completion=answer")
        columns[theirs] = ours
    return columns


def conversations(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Conversation]:
    """Turn rows into conversations. A row that does not fit is added to `faults` and passed over.

    With form "auto" the first row decides the format for all; a row of another format is a fault that names both lines.
    `columns` maps a file's own column names to ours. Raises InputError when the first row fits no known format.
    """
    decided_at = "--format"
    for row in rows:
        fields = {(columns or {}).get(name, name): value for name, value in row.fields.items()}
        own = detect(fields)
        if form == "auto":
            if own is None:
                raise InputError(f"{row.place}: {_unknown_columns(fields)}")
            form, decided_at = own, row.place
        elif own not in (None, form):
            faults.add(row.place, f"this row is {own}, but {decided_at} is {form}; a source holds one format")
            continue
        conversation = _conversation(row.place, FORMATS[form], fields, faults)
        if conversation:
            yield conversation


def detect(fields: dict[str, Any]) -> str | None:
    """The name of the format whose columns `fields` has, or None."""
    return next((name for name, columns in COLUMNS.items() if all(column in fields for column in columns)), None)


def _conversation(place: str, form: type[Form], fields: dict[str, Any], faults: Faults) -> Conversation | None:
    try:
        example = form.model_validate(fields)
        messages = example.messages()
        tools = _tools(getattr(example, "tools", None))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            faults.add(place, _plain(detail))
        return None
    except ValueError as error:
        faults.add(place, str(error))
        return None
    if not any(message["role"] == "assistant" for message in messages):
        faults.add(place, "no turn of the assistant; there is nothing to learn from this row")
        return None
    return Conversation(place, messages, tools)


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = parse_json("tools", tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools: expected a list of tool descriptions, or that list as JSON text")
    return tools or None


def _plain(detail: Any) -> str:
    """A pydantic error in the words of this project: the field, what is wrong, what is expected."""
    field = ".".join(str(part) for part in detail["loc"] if part not in ("as text", "as list"))
    if detail["type"] == "missing":
        return f"{field}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"].endswith("_type") or detail["type"] == "literal_error":
        return f"{field}: {message}, found {json.dumps(detail['input'], default=str, ensure_ascii=False)[:60]}"
    return f"{field}: {message}" if field else message


def _unknown_columns(fields: dict[str, Any]) -> str:
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    hint = ""
    for needed in {column for columns in COLUMNS.values() for column in columns} - set(fields):
        if near := difflib.get_close_matches(needed, [name for name in fields if name], 1, cutoff=0.75):
            hint = f" (did you mean {needed!r} by {near[0]!r}?)"
    found = ", ".join(str(name) for name in fields)
    return (
        f"unknown format: the columns are {found}{hint}. Known: {known}.\n"
        "  Map columns with --columns, for example --columns prompt=question completion=answer"
    )
