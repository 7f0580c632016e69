"""Read a data source into examples, with every error named by line and field."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.data.documents import DocumentText
from common.data.examples import Conversation, Document, Example, Feedback, Pair, Prompt, Rating
from common.data.feedback import FeedbackFormat
from common.data.formats import (
    PAIR_FORMATS,
    PROBLEM_FORMATS,
    RATING_FORMATS,
    SFT_FORMATS,
    ConversationFormat,
    Formats,
    RatingFormat,
    detect,
)
from common.data.json_values import json_problem, parse_json
from common.data.messages import is_empty
from common.data.pairs import PairFormat
from common.data.problems import PromptFormat
from common.data.refused import label_column, refuse_columns, refuse_placeholders
from common.data.rows import Faults, Row, Source, read_rows, source_identity, source_name
from common.data.turns import RowFormat, Turns, take_marks
from common.errors import InputError, nearest

SHOWN_COLUMNS = 20

METHODS = {"dpo": PAIR_FORMATS, "reward": RATING_FORMATS, "sft": SFT_FORMATS, "grpo": PROBLEM_FORMATS}

MOST_TURNS = 500  # chat templates render a conversation once per answer: a row of 5,000 turns took half a minute


@dataclass(frozen=True, slots=True)
class Data:
    """What a source holds: its examples, the name of their row format, and the source's identity.

    The identity is a sha256 of the files, or the hub's id@commit. `notes` are lines to print before the run: what the
    rows hold that is not trained as it stands, such as a column that is not read.
    """

    examples: list[Any]
    row_format: str
    identity: str
    notes: list[str]


def read_examples(source: Source, formats: Formats, row_format: str = "auto", columns: Iterable[str] = ()) -> Data:
    """Read and check a whole source. The examples are of the kind that `formats` are.

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
        fields = _renamed(first, renamed)
        raise InputError(f"{first.place}: {unknown_columns(fields, formats)}{_other_methods(fields)}")
    examples = list(as_examples(itertools.chain([first], rows), faults, formats, row_format, renamed))
    faults.stop()
    return Data(examples, found, source_identity(source), faults.notes())


def column_map(pairs: Iterable[str]) -> dict[str, str]:
    """`["prompt=question"]` as {"question": "prompt"}: for columns of a source, the name they have in a row format."""
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--columns {pair}: expected OURS=THEIRS, for example prompt=question completion=answer")
        if columns.get(theirs, ours) != ours:
            raise InputError(f"--columns {pair}: {theirs} is named {columns[theirs]} already; a column has one name")
        columns[theirs] = ours
    return columns


def as_examples(
    rows: Iterable[Row],
    faults: Faults,
    formats: Formats,
    row_format: str = "auto",
    columns: dict[str, str] | None = None,
) -> Iterator[Any]:
    """The rows as examples, of the kind that `formats` are. A row that does not fit is added to `faults` and skipped.

    With "auto" the first row decides the format of all; a row of another format is a fault that names both lines. With
    the name of a format, every row that has its columns is of it, whatever other columns it has. `columns` maps the
    source's names of columns to ours. Raises InputError when the first row has no known format, and when two of its
    columns get one name.
    """
    decided_at = "--format"
    if row_format not in ("auto", *formats):
        raise InputError(f"--format {row_format}: unknown here; expected auto or one of {', '.join(formats)}")
    for row in rows:
        fields = _renamed(row, columns)
        found = detect(fields, formats)
        if row_format == "auto":
            if found is None:
                raise InputError(f"{row.place}: {unknown_columns(fields, formats)}{_other_methods(fields)}")
            row_format, decided_at = found, row.place
        chosen = formats[row_format]
        if found not in (None, row_format) and not (decided_at == "--format" and chosen.fits(fields)):
            faults.add(row.place, f"this row is {found}, but {decided_at} is {row_format}; a source holds one format")
            continue
        notes: set[str] = set()
        try:
            example = _example(row.place, chosen, fields, notes)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False):
                faults.add(row.place, _plain(detail))
        except ValueError as error:
            faults.add(row.place, str(error))
        else:
            for what in sorted(notes):
                faults.note(row.place, what)
            yield example


def _renamed(row: Row, columns: dict[str, str] | None) -> dict[str, Any]:
    if not columns:
        return row.fields
    renamed: dict[str, Any] = {}
    for theirs, value in row.fields.items():
        ours = columns.get(theirs, theirs)
        if ours in renamed:
            raise InputError(
                f"{row.place}: --columns makes {ours} of a column, and the rows have another one of this name; give "
                f"that one another name too: --columns unread={ours}"
            )
        renamed[ours] = value
    return renamed


def _example(place: str, row_format: type[RowFormat], fields: dict[str, Any], notes: set[str]) -> Example:
    own = row_format.own_columns()
    refuse_columns(fields, own, demonstrations=issubclass(row_format, ConversationFormat))
    row = row_format.model_validate(fields, context=notes)
    if not isinstance(row, PromptFormat):  # of a prompt, all other columns are for the reward functions
        unread = [name for name, value in fields.items() if name not in own and not is_empty(value)]
        notes |= {f"the column {name[:60]!r} is not read" for name in unread}
    if isinstance(row, DocumentText):
        return Document(place, row.text)
    tools = _tools("tools", row.tools)
    if isinstance(row, PairFormat):
        prompt, chosen, rejected = row.pair()
        _check_turns(prompt, chosen, rejected)
        return Pair(place, prompt, chosen, rejected, tools)
    if isinstance(row, PromptFormat):
        prompt = row.prompt_turns()
        _check_turns(prompt)
        return Prompt(place, prompt, getattr(row, "answer", None), row.other_fields(fields), tools)
    if isinstance(row, RatingFormat):
        prompt, response = row.prompt_turns(), row.response_turns()
        _check_turns(prompt, response)
        return Rating(place, prompt, response, row.score, tools)
    if not isinstance(row, ConversationFormat):
        raise TypeError(f"{row_format.__name__} is not a row format of examples")
    if functions := _tools("functions", row.functions):
        if tools:
            raise ValueError("functions: there are tools too; remove one")
        tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(row, FeedbackFormat):
        prompt, completion = row.feedback()
        _check_turns(prompt, completion)
        return Feedback(place, prompt, completion, row.label, tools)
    return _conversation(place, row.messages(), tools, notes)


def _conversation(place: str, turns: Turns, tools: Turns | None, notes: set[str]) -> Conversation:
    messages, untrained = take_marks(turns)
    _check_turns(messages)
    of_assistant = {index for index, turn in enumerate(messages) if turn["role"] == "assistant"}
    if not of_assistant:
        raise ValueError("no turn of the assistant; there is nothing to learn from this row")
    if 0 in of_assistant - untrained:
        untrained |= {0}
        notes.add("the opening turn is the assistant's and answers no prompt: it carries no loss")
    if of_assistant <= untrained:
        raise ValueError("no turn of the assistant carries loss, by its mark or because it answers no prompt")
    if messages[-1]["role"] != "assistant":
        notes.add("the last turn is not the assistant's: nothing after the assistant's last one is learned")
    return Conversation(place, messages, tools, untrained)


def _check_turns(*parts: Turns) -> None:
    count = sum(map(len, parts))
    if count > MOST_TURNS:
        raise ValueError(f"{count:,} turns, more than {MOST_TURNS}; split the row into several")
    for turns in parts:
        refuse_placeholders(turns)


def _tools(column: str, tools: Any) -> Turns | None:
    if isinstance(tools, str):
        tools = parse_json(column, tools) if tools.strip() else None
    if tools is None:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{column}: expected a list of tool descriptions, or that list as JSON text")
    if problem := json_problem(tools):
        raise ValueError(f"{column} must be JSON: {problem}")
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
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and detect(value[0], formats):
            hint = f" (the rows are the list in {name[:60]!r}: save that list as a file)"
    found = ", ".join(names) + (", ..." if len(names) < len(fields) else "") if fields else "none"
    return (
        f"unknown format: the columns are {found}{hint}. Known: {known}.\n"
        "  Map columns with --columns, for example --columns prompt=question completion=answer"
    )


def _other_methods(fields: dict[str, Any]) -> str:
    """A line that names the methods which read rows of these columns, or nothing."""
    if label_column(fields):
        return "\n  Completions with a label, good or bad, are data for make kto"
    fitting = [f"make {method}" for method, formats in METHODS.items() if detect(fields, formats)]
    return f"\n  Rows with these columns are data for {' or '.join(fitting)}" if fitting else ""
