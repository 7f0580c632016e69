"""Read a data source into examples, with every error named by line and field."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.data.documents import DocumentText
from common.data.examples import Conversation, Document, Pair, Prompt, Rating
from common.data.formats import (
    PAIR_FORMATS,
    PROBLEM_FORMATS,
    PROMPT_FORMATS,
    RATING_FORMATS,
    SFT_FORMATS,
    ConversationFormat,
    Formats,
    PairFormat,
    PromptFormat,
    RatingFormat,
    detect,
)
from common.data.prompts import as_prompt
from common.data.rows import Faults, Row, Source, read_rows, source_identity, source_name
from common.data.turns import RowFormat, Turns, parse_json
from common.errors import InputError, nearest

SHOWN_COLUMNS = 20

MOST_TURNS = 500  # chat templates render a conversation once per answer: a row of 5,000 turns took half a minute


@dataclass(frozen=True, slots=True)
class Data:
    """What a source holds: its examples, the name of their row format, and the source's identity.

    The identity is a sha256 of the files, or the hub's id@commit.
    """

    examples: list[Any]
    row_format: str
    identity: str


def read_examples(source: Source, formats: Formats, row_format: str = "auto", columns: Iterable[str] = ()) -> Data:
    """Read and check a whole source. The examples are of one kind of examples.py, as `formats` are.

    Args:
        source: as `find_source` found it.
        formats: the row formats to accept, by name; see formats.py.
        row_format: one of their names, or auto: the first whose columns the first row has.
        columns: columns of the source under another name, OURS=THEIRS.

    Raises InputError with every fault of every row, and when the source holds no rows.
    """
    faults, renamed = Faults(), column_map(columns)
    rows = read_rows(source, faults)
    first = next(rows, None)
    if first is None:
        faults.stop()
        raise InputError(f"{source_name(source)}: holds no rows")
    found = detect(_renamed(first, renamed), formats) if row_format == "auto" else row_format
    if found is None:
        raise InputError(f"{first.place}: {unknown_columns(_renamed(first, renamed), formats)}")
    examples = list(_examples(itertools.chain([first], rows), faults, row_format, renamed, formats))
    faults.stop()
    return Data(examples, found, source_identity(source))


def column_map(pairs: Iterable[str]) -> dict[str, str]:
    """`["prompt=question"]` as {"question": "prompt"}: for columns of a source, the name they have in a row format."""
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--columns {pair}: expected OURS=THEIRS, for example prompt=question completion=answer")
        columns[theirs] = ours
    return columns


def conversations(
    rows: Iterable[Row], faults: Faults, row_format: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Conversation | Document]:
    """The rows as conversations or documents. A row that does not fit its format is added to `faults` and skipped.

    With "auto" the first row decides the format of all; a row of another format is a fault that names both lines.
    `columns` maps the source's names of columns to ours. Raises InputError when the first row has no known format.
    """
    return _examples(rows, faults, row_format, columns, SFT_FORMATS)


def pairs(
    rows: Iterable[Row], faults: Faults, row_format: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Pair]:
    """The rows as preference pairs; otherwise as `conversations`."""
    return _examples(rows, faults, row_format, columns, PAIR_FORMATS)


def problems(
    rows: Iterable[Row], faults: Faults, row_format: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Prompt]:
    """The rows as prompts with or without a gold answer; otherwise as `conversations`."""
    return _examples(rows, faults, row_format, columns, PROBLEM_FORMATS)


def ratings(
    rows: Iterable[Row], faults: Faults, row_format: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Rating]:
    """The rows as rated completions; otherwise as `conversations`."""
    return _examples(rows, faults, row_format, columns, RATING_FORMATS)


def prompts(
    rows: Iterable[Row], faults: Faults, row_format: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Prompt]:
    """The prompts of rows of any format but SFT's; otherwise as `conversations`."""
    return map(as_prompt, _examples(rows, faults, row_format, columns, PROMPT_FORMATS))


def _examples(
    rows: Iterable[Row], faults: Faults, row_format: str, columns: dict[str, str] | None, formats: Formats
) -> Iterator[Any]:
    decided_at = "--format"
    if row_format not in ("auto", *formats):
        raise InputError(f"--format {row_format}: unknown here; expected auto or one of {', '.join(formats)}")
    for row in rows:
        fields = _renamed(row, columns)
        found = detect(fields, formats)
        if row_format == "auto":
            if found is None:
                raise InputError(f"{row.place}: {unknown_columns(fields, formats)}")
            row_format, decided_at = found, row.place
        elif found not in (None, row_format):
            faults.add(row.place, f"this row is {found}, but {decided_at} is {row_format}; a source holds one format")
            continue
        try:
            example = _example(row.place, formats[row_format], fields)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False):
                faults.add(row.place, _plain(detail))
        except ValueError as error:
            faults.add(row.place, str(error))
        else:
            yield example


def _renamed(row: Row, columns: dict[str, str] | None) -> dict[str, Any]:
    return {columns.get(name, name): value for name, value in row.fields.items()} if columns else row.fields


def _example(
    place: str, row_format: type[RowFormat], fields: dict[str, Any]
) -> Conversation | Document | Pair | Prompt | Rating:
    row = row_format.model_validate(fields)
    if isinstance(row, DocumentText):
        return Document(place, row.text)
    tools = _tools(getattr(row, "tools", None))
    if isinstance(row, PairFormat):
        prompt, chosen, rejected = row.pair()
        _check_count(prompt, chosen, rejected)
        return Pair(place, prompt, chosen, rejected, tools)
    if isinstance(row, PromptFormat):
        prompt = row.prompt_turns()
        _check_count(prompt)
        return Prompt(place, prompt, getattr(row, "answer", None), row.other_fields(fields), tools)
    if isinstance(row, RatingFormat):
        prompt, response = row.prompt_turns(), row.response_turns()
        _check_count(prompt, response)
        return Rating(place, prompt, response, row.score, tools)
    if not isinstance(row, ConversationFormat):
        raise TypeError(f"{row_format.__name__} is not a row format of examples")
    messages = row.messages()
    _check_count(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn of the assistant; there is nothing to learn from this row")
    return Conversation(place, messages, tools)


def _check_count(*parts: Turns) -> None:
    count = sum(map(len, parts))
    if count > MOST_TURNS:
        raise ValueError(f"{count:,} turns, more than {MOST_TURNS}; split the row into several")


def _tools(tools: Any) -> Turns | None:
    if isinstance(tools, str):
        tools = parse_json("tools", tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools: expected a list of tool descriptions, or that list as JSON text")
    return tools or None


def _plain(detail: Any) -> str:
    """A pydantic error in this project's words: the field, what is wrong, what is expected."""
    field = ".".join(str(part) for part in detail["loc"] if part not in ("as text", "as list", "as turn"))
    if detail["type"] == "missing":
        return f"{field}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"] in ("model_type", "model_attributes_type"):
        message = "should be a turn, a JSON object with role and content"
    if detail["type"].endswith("_type") or detail["type"] in ("literal_error", "finite_number"):
        return f"{field}: {message}, found {_shown(detail['input'])}"
    return f"{field}: {message}" if field else message


def _shown(value: Any) -> str:
    """A value, shortened; of a list or an object, which may be deep and large, only what it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:4])) or 'nothing in it'}"[:60]
    return json.dumps(value[:60] if isinstance(value, str) else value, default=str, ensure_ascii=False)[:60]


def unknown_columns(fields: dict[str, Any], formats: Formats) -> str:
    """The error message for a row that has the columns of none of the `formats`."""
    known = "; ".join(f"{name}: {', '.join(row_format.columns)}" for name, row_format in formats.items())
    names = [name for name in list(fields)[:SHOWN_COLUMNS] if name and len(name) < 100]
    hint = ""
    for needed in sorted({column for row_format in formats.values() for column in row_format.columns} - set(fields)):
        if near := nearest(needed, names, cutoff=0.75):
            hint = f" (did you mean {needed!r} by {near!r}?)"
    found = ", ".join(names) + (", ..." if len(names) < len(fields) else "") if fields else "none"
    return (
        f"unknown format: the columns are {found}{hint}. Known: {known}.\n"
        "  Map columns with --columns, for example --columns prompt=question completion=answer"
    )
