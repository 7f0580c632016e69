"""Turn the rows of a source into examples, with every fault by line and field."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from common.data.examples import Conversation, Pair, Prompt, Rating
from common.data.formats import (
    FORMATS,
    PAIR_FORMATS,
    PROBLEM_FORMATS,
    PROMPT_FORMATS,
    RATING_FORMATS,
    Formats,
    PairFormat,
    PromptFormat,
    RatingFormat,
    detect,
)
from common.data.rows import Faults, Row
from common.data.turns import RowFormat, Turns, parse_json
from common.errors import InputError, nearest

SHOWN_COLUMNS = 20

MOST_TURNS = 500  # chat templates render a conversation once per answer: a row of 5,000 turns took half a minute


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
    return _examples(rows, faults, form, columns, FORMATS)


def pairs(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Pair]:
    """Turn rows into pairs of answers, as `conversations` does into conversations."""
    return _examples(rows, faults, form, columns, PAIR_FORMATS)


def problems(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Prompt]:
    """Turn rows into problems, as `conversations` does into conversations."""
    return _examples(rows, faults, form, columns, PROBLEM_FORMATS)


def ratings(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Rating]:
    """Turn rows into rated answers, as `conversations` does into conversations."""
    return _examples(rows, faults, form, columns, RATING_FORMATS)


def prompts(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Prompt]:
    """The prompts of pairs, ratings or problems, each as a problem; those of pairs and ratings have no gold answer."""
    for example in _examples(rows, faults, form, columns, PROMPT_FORMATS):
        if isinstance(example, Prompt):
            yield example
        else:
            yield Prompt(example.place, example.prompt, tools=example.tools)


def _examples(
    rows: Iterable[Row], faults: Faults, form: str, columns: dict[str, str] | None, known: Formats
) -> Iterator[Any]:
    decided_at = "--format"
    if form not in ("auto", *known):
        raise InputError(f"--format {form}: unknown here; expected auto or one of {', '.join(known)}")
    for row in rows:
        fields = {columns.get(name, name): value for name, value in row.fields.items()} if columns else row.fields
        own = detect(fields, known)
        if form == "auto":
            if own is None:
                raise InputError(f"{row.place}: {unknown_columns(fields, known)}")
            form, decided_at = own, row.place
        elif own not in (None, form):
            faults.add(row.place, f"this row is {own}, but {decided_at} is {form}; a source holds one format")
            continue
        try:
            example = _example(row.place, known[form], fields)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False):
                faults.add(row.place, _plain(detail))
        except ValueError as error:
            faults.add(row.place, str(error))
        else:
            yield example


def _example(place: str, form: type[RowFormat], fields: dict[str, Any]) -> Conversation | Pair | Prompt | Rating:
    row = form.model_validate(fields)
    tools = _tools(getattr(row, "tools", None))
    if isinstance(row, PairFormat):
        prompt, chosen, rejected = row.pair()
        _check_count(prompt, chosen, rejected)
        return Pair(place, prompt, chosen, rejected, tools)
    if isinstance(row, PromptFormat):
        prompt = row.asked()
        _check_count(prompt)
        return Prompt(place, prompt, getattr(row, "answer", None), row.other_fields(fields), tools)
    if isinstance(row, RatingFormat):
        prompt, response = row.asked(), row.answered()
        _check_count(prompt, response)
        return Rating(place, prompt, response, row.score, tools)
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
    """A pydantic error in the words of this project: the field, what is wrong, what is expected."""
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
    """A value, briefly: of a list or an object, which may be deep and large, only what it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:4])) or 'nothing in it'}"[:60]
    return json.dumps(value[:60] if isinstance(value, str) else value, default=str, ensure_ascii=False)[:60]


def unknown_columns(fields: dict[str, Any], known: Formats) -> str:
    """What to say of a row whose columns are of none of the `known` formats."""
    forms = "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in known.items())
    names = [name for name in list(fields)[:SHOWN_COLUMNS] if name and len(name) < 100]
    hint = ""
    for needed in sorted({column for form in known.values() for column in form.columns} - set(fields)):
        if near := nearest(needed, names, cutoff=0.75):
            hint = f" (did you mean {needed!r} by {near!r}?)"
    found = ", ".join(names) + (", ..." if len(names) < len(fields) else "") if fields else "none"
    return (
        f"unknown format: the columns are {found}{hint}. Known: {forms}.\n"
        "  Map columns with --columns, for example --columns prompt=question completion=answer"
    )
