"""Tell a row's format from its columns, and turn the row into what its method learns from.

Four kinds of example are known, each in several formats: a Conversation to imitate, a Pair of answers to prefer
between, a Problem to solve, a Rating of an answer. All hold chat messages in the field's usual shape ({"role",
"content"}, with "tool_calls" where an assistant calls tools), because the model's own chat template renders them in
the end; so one file serves every model.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from .errors import InputError
from .rows import Faults, Row
from .schemas import Alpaca, ChatMLText, Form, Messages, PromptCompletion, ShareGPT, parse_json
from .schemas_feedback import (
    DialoguePair,
    InstructionOnly,
    InstructionRating,
    PairForm,
    ProblemAnswer,
    ProblemForm,
    ProblemSolution,
    PromptAnswer,
    PromptOnly,
    PromptPair,
    PromptRating,
    QuestionAnswer,
    RatingForm,
    ShareGPTPair,
)

Turns = list[dict[str, Any]]
Formats = dict[str, type[Form]]
SHOWN_COLUMNS = 20
MOST_TURNS = 500  # chat templates render a conversation once per answer: a row of 5,000 turns took half a minute

# The first whose columns a row has wins: a row with `messages` and a stray `text` is messages.
FORMATS: Formats = {
    "messages": Messages,
    "sharegpt": ShareGPT,
    "prompt-completion": PromptCompletion,
    "alpaca": Alpaca,
    "chatml-text": ChatMLText,
}
PAIR_FORMATS: Formats = {
    "preference": PromptPair,
    "sharegpt-preference": ShareGPTPair,
    "dialogue-preference": DialoguePair,
}
RATING_FORMATS: Formats = {
    "prompt-rating": PromptRating,
    "instruction-rating": InstructionRating,
}
PROBLEM_FORMATS: Formats = {
    "prompt-answer": PromptAnswer,
    "question-answer": QuestionAnswer,
    "problem-answer": ProblemAnswer,
    "problem-solution": ProblemSolution,
    "prompt": PromptOnly,
    "instruction": InstructionOnly,
}
PROMPT_FORMATS: Formats = {**PAIR_FORMATS, **RATING_FORMATS, **PROBLEM_FORMATS}


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
class Problem:
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
) -> Iterator[Problem]:
    """Turn rows into problems, as `conversations` does into conversations."""
    return _examples(rows, faults, form, columns, PROBLEM_FORMATS)


def ratings(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Rating]:
    """Turn rows into rated answers, as `conversations` does into conversations."""
    return _examples(rows, faults, form, columns, RATING_FORMATS)


def prompts(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Problem]:
    """The prompts of pairs, ratings or problems, each as a problem; those of pairs and ratings have no gold answer."""
    for example in _examples(rows, faults, form, columns, PROMPT_FORMATS):
        if isinstance(example, Problem):
            yield example
        else:
            yield Problem(example.place, example.prompt, tools=example.tools)


def detect(fields: dict[str, Any], known: Formats = FORMATS) -> str | None:
    """The name of the first of the `known` formats whose columns `fields` has, or None."""
    return next((name for name, form in known.items() if all(column in fields for column in form.columns)), None)


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


def _example(place: str, form: type[Form], fields: dict[str, Any]) -> Conversation | Pair | Problem | Rating:
    row = form.model_validate(fields)
    tools = _tools(getattr(row, "tools", None))
    if isinstance(row, PairForm):
        prompt, chosen, rejected = row.pair()
        _check_count(prompt, chosen, rejected)
        return Pair(place, prompt, chosen, rejected, tools)
    if isinstance(row, ProblemForm):
        prompt = row.asked()
        _check_count(prompt)
        return Problem(place, prompt, getattr(row, "answer", None), row.other_fields(fields), tools)
    if isinstance(row, RatingForm):
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
        if near := difflib.get_close_matches(needed, names, 1, cutoff=0.75):
            hint = f" (did you mean {needed!r} by {near[0]!r}?)"
    found = ", ".join(names) + (", ..." if len(names) < len(fields) else "") if fields else "none"
    return (
        f"unknown format: the columns are {found}{hint}. Known: {forms}.\n"
        "  Map columns with --columns, for example --columns prompt=question completion=answer"
    )
