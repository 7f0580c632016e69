"""The JSON in data files and in their text fields, read so that nothing of it is dropped.

A file is JSON Lines, an array of rows, or several arrays or objects one after another, as `cat a.json b.json` makes.
Python's own reader keeps the last of two equal keys; here they are a problem.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape for half of a character, such as one of the two of an emoji
HALF = "half of a surrogate pair, such as \\ud83d alone, is not a character; write both halves or neither"
BETWEEN = " \t\r\n,\ufeff"  # what stands between values; a byte order mark where a file was appended to another


class JsonValue(NamedTuple):
    """A value of a file and the line that it begins on; or the `problem` that there is instead."""

    line: int
    value: Any = None
    problem: str | None = None


def json_values(file: Path) -> Iterator[JsonValue]:
    """The rows of a JSON file in order. A line of JSON Lines that is broken is a problem of that line alone."""
    first = _first_line(file)
    if not first.startswith(b"[") and (_is_a_value(first) or not _holds_long_values(file)):
        yield from _of_lines(file)
    else:
        yield from _one_after_another(file)


def parse_json(what: str, text: str) -> Any:
    """The value of JSON in a text field.

    Raises ValueError that names `what` it should be, and where it breaks, for what is not JSON to the letter: NaN, a
    key that is there twice, half of a character.
    """
    value, problem = _decode(text.strip())
    if not problem:
        problem = json_problem(value)
    if problem:
        raise ValueError(f"{what} must be JSON: {problem}")
    return value


def json_problem(value: Any) -> str | None:
    """Why a value cannot be written as JSON, or None: a NaN, a date of a Parquet file, half of a character."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return HALF
    except ValueError:
        return "it holds NaN or an infinite number"
    except TypeError as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return None


def as_text(data: bytes) -> str:
    """UTF-8 as text, without a byte order mark. Raises ValueError that names the byte which is none."""
    try:
        return data.decode().removeprefix("\ufeff")  # the codec utf-8-sig is much slower
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"byte {error.start + 1} is {byte:#04x}, which is not UTF-8; save the file as UTF-8") from None


class _Decoder(json.JSONDecoder):
    """Remembers a key that an object has twice, until `problem` reports it."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    def problem(self, text: str, value: Any) -> str | None:
        """What is wrong with a value that was read from `text`, or None."""
        if self.twice is not None:
            twice, self.twice = self.twice, None
            return f"the key {twice[:60]!r} is there twice in one object; remove one"
        if "\\" in text and SURROGATE.search(text) and not _is_text(value):
            return HALF
        return None


def _decode(text: str) -> tuple[Any, str | None]:
    """The value of a JSON text, or a problem."""
    decoder = _Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        return None, _reason(error)
    return value, decoder.problem(text, value)


def _of_lines(file: Path) -> Iterator[JsonValue]:
    decoder = _Decoder()  # one for all lines: to make it takes as long as to read a short line
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = as_text(line).strip()
            except ValueError as error:
                yield JsonValue(number, problem=str(error))
                continue
            if not text:
                continue
            try:
                value = decoder.decode(text)
            except (ValueError, RecursionError) as error:
                decoder.twice = None
                problem = f"broken JSON: {_reason(error)}; every line must be one JSON object"
                yield JsonValue(number, problem=problem)
                continue
            yield JsonValue(number, value, decoder.problem(text, value))


def _one_after_another(file: Path) -> Iterator[JsonValue]:
    """The elements of arrays, and the values outside of them."""
    data = file.read_bytes()
    try:
        text = as_text(data)
    except ValueError:
        yield from _not_utf8(data)
        return
    position, line, counted, in_array = 0, 1, 0, False  # `counted`: characters whose newlines are in `line`
    while True:
        while position < len(text) and text[position] in BETWEEN:
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if position == len(text) and not in_array:
            return
        if text[position : position + 1] == ("]" if in_array else "["):
            in_array = not in_array
            position += 1
            continue
        decoder, start = _Decoder(), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            rest = "array" if in_array else "file"
            yield JsonValue(where, problem=f"broken JSON: {_reason(error)}; the rest of the {rest} cannot be read")
            return
        yield JsonValue(line, value, decoder.problem(text[start:position], value))


def _not_utf8(data: bytes) -> Iterator[JsonValue]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            as_text(line)
        except ValueError as error:
            yield JsonValue(number, problem=str(error))


def _first_line(file: Path) -> bytes:
    """The first line that is not blank, without a byte order mark."""
    with file.open("rb") as stream:
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in stream)
        return next((line for line in lines if line), b"")


def _is_a_value(line: bytes) -> bool:
    try:
        _Decoder().decode(as_text(line))
    except (ValueError, RecursionError):
        return False
    return True


def _holds_long_values(file: Path) -> bool:
    """Whether a file whose first line is no value begins with one over several lines; of a .json file it is assumed."""
    if file.suffix.lower() == ".json":
        return True
    try:
        text = as_text(file.read_bytes()).lstrip()
        _, end = _Decoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # writing a value may need more stack than reading it
        return False
    return True


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "an integer of thousands of digits"
    return f"{error.msg.lower()} at column {error.colno}"


def json_type(value: object) -> str:
    """What a JSON value is, in words."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    names[type(None)] = "null"
    return names.get(type(value), "a number")
