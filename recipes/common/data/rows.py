"""Read a data source row by row, with the place of every row.

A source is a file (JSON Lines, a JSON array, CSV, Parquet, text), a folder of such files, or a dataset on the hub. Rows
are streamed. A place is `file:line`; every error about a row begins with it. What a row must hold is decided in
formats.py.
"""

import csv
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError, MachineError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

Source = list[Path] | str  # files, or a dataset on the hub: its id, or id@revision

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SUFFIXES = (*ROWS, ".txt")  # a .txt file is one row, a document
SHOWN_FAULTS = 20
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape for half of a character, such as one of the two of an emoji
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data source: `fields` as read, and the `place` (file:line) it was read from."""

    place: str
    fields: dict[str, Any]


class Faults:
    """The errors of a data source, row by row: the first 20 in words, the rest as a number."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, place: str, message: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(f"{place}: {message}")

    def stop(self) -> None:
        """Raise InputError with all faults so far, if there are any."""
        if self.count > len(self.shown):
            self.shown.append(f"... and {self.count - len(self.shown)} more, {self.count} in all")
        if self.count:
            raise InputError("\n".join(self.shown))


def find_source(data: str) -> Source:
    """The files that `data` names, sorted, or `data` itself when it is a hub id (org/name or org/name@revision).

    Raises InputError when it looks like a path and nothing is there, and when a folder holds no data file.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        # Beside files of rows, a text file is a licence or a note.
        files = [file for file in files if file.suffix.lower() in ROWS] or files
        if not files:
            raise InputError(f"{data}: this folder holds no data file; expected one of {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{data}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
        return [path]
    looks_like_a_path = data.startswith((".", "/", "~")) or path.suffix.lower() in SUFFIXES or data.count("/") != 1
    if looks_like_a_path:
        raise InputError(f"{data}: no such file or folder (from {Path.cwd()}); give a file, a folder or a hub id")
    return data


def source_name(source: Source) -> str:
    """The source in an error message."""
    return source if isinstance(source, str) else ", ".join(map(str, source))


def read_rows(source: Source, faults: Faults) -> Iterator[Row]:
    """Every row of a source in order. A line that is not a row is added to `faults` and skipped.

    Raises InputError when a file is not of the kind that its suffix says.
    """
    if isinstance(source, str):
        yield from _hub_rows(source)
        return
    for file in source:
        if file.stat().st_size == 0:
            faults.add(str(file), "the file is empty")
            continue
        match file.suffix.lower():
            case ".csv":
                yield from _csv_rows(file, faults)
            case ".parquet":
                yield from _parquet_rows(file)
            case ".txt":
                if (text := _decode(str(file), file.read_bytes(), faults)) is not None:
                    yield Row(f"{file}:1", {"text": text})
            case ".json" if _starts_with_bracket(file):
                yield from _json_array_rows(file, faults)
            case _:
                yield from _json_lines_rows(file, faults)


def source_identity(source: Source) -> str:
    """What a source is by its contents: one sha256 over the bytes of its files in order, or the hub's id@commit.

    Raises InputError or MachineError, as reading does, when the hub does not give the dataset.
    """
    if isinstance(source, str):
        return f"{source.partition('@')[0]}@{_hub_dataset(source).hash}"
    return source_sha256(source)


def source_sha256(files: Iterable[Path]) -> str:
    """One sha256 over the bytes of all files in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _starts_with_bracket(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _decode(place: str, line: bytes, faults: Faults) -> str | None:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        faults.add(place, f"byte {error.start + 1} is {byte:#04x}, which is not UTF-8; save the file as UTF-8")
        return None


def _json_lines_rows(file: Path, faults: Faults) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{file}:{number}"
            text = _decode(place, line, faults)
            if text is None or not text.strip():
                continue
            try:
                value = json.loads(text.rstrip())
            except (ValueError, RecursionError) as error:
                faults.add(place, f"broken JSON: {_json_reason(error)}; every line must be one JSON object")
                continue
            yield from _object_row(place, value, text, faults)


def _json_array_rows(file: Path, faults: Faults) -> Iterator[Row]:
    text = _decode(str(file), file.read_bytes(), faults)
    if text is None:
        return
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0  # characters whose newlines are in `line`
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        place = f"{file}:{line}"
        if text[position : position + 1] == "]":
            return
        try:
            start = position
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            where = f"{file}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else place
            faults.add(where, f"broken JSON: {_json_reason(error)}; the rest of the array cannot be read")
            return
        yield from _object_row(place, value, text[start:position], faults)


def _object_row(place: str, value: object, text: str, faults: Faults) -> Iterator[Row]:
    if not isinstance(value, dict):
        faults.add(place, f"{_json_type(value)}, expected a JSON object like {{...}}")
    elif SURROGATE.search(text) and not _is_text(value):
        faults.add(
            place, "half of a surrogate pair, such as \\ud83d alone, is not a character; write both halves or neither"
        )
    else:
        yield Row(place, value)


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # writing a value may need more stack than reading it
        return False
    return True


def _csv_rows(file: Path, faults: Faults) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with file.open("rb") as stream:
        lines = (_decode(f"{file}:{number}", line, faults) or "\n" for number, line in enumerate(stream, start=1))
        reader = csv.DictReader(lines, strict=True)
        first = 2  # the line on which the row begins, not its number: a quoted field may hold newlines
        try:
            for fields in reader:
                place = f"{file}:{first}"
                first = reader.line_num + 1
                if None in fields:
                    faults.add(place, f"more cells than the {len(reader.fieldnames or ())} columns of the header")
                elif None in fields.values():
                    missing = next(name for name, value in fields.items() if value is None)
                    faults.add(place, f"{missing}: missing; the row has fewer cells than the header")
                else:
                    yield Row(place, fields)
        except csv.Error as error:
            faults.add(f"{file}:{first}", f"broken CSV: {error}; the rest of the file cannot be read")


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{file}:{number}", {name: value for name, value in fields.items() if value is not None})
    except (pa.ArrowException, OSError, ValueError) as error:  # OSError: a damaged page; ValueError: text not in UTF-8
        raise InputError(f"{file}: not a readable Parquet file: {error}") from None


def _hub_rows(name: str) -> Iterator[Row]:
    builder = _hub_dataset(name)
    try:
        builder.download_and_prepare()
        dataset: Any = builder.as_dataset(split="train")
    except (OSError, ValueError) as error:
        raise _hub_refusal(name, error) from None
    for number, fields in enumerate(dataset, start=1):
        yield Row(f"{name}:{number}", {key: value for key, value in fields.items() if value is not None})


@functools.cache  # so that the rows and the commit in a run's identity are of the same request
def _hub_dataset(name: str) -> "DatasetBuilder":
    """The dataset of the hub that `name`, id or id@revision, means; its `hash` is the commit.

    Without a network it is the newest copy in the local cache. Raises MachineError when that is of another commit.
    """
    from datasets import load_dataset_builder

    dataset, _, revision = name.partition("@")
    try:
        builder = load_dataset_builder(dataset, revision=revision or None)
    except (OSError, ValueError) as error:
        raise _hub_refusal(name, error) from None
    if COMMIT.fullmatch(revision) and builder.hash != revision:
        raise MachineError(
            f"{name}: the hub cannot be reached, and the newest copy on this machine is of commit {builder.hash}"
        )
    return builder


def _hub_refusal(name: str, error: Exception) -> InputError | MachineError:
    # datasets raises ValueError for a missing split or an unknown builder; everything of the network is an OSError.
    if isinstance(error, ValueError):
        return InputError(f"{name}: the hub has no such dataset with a train split: {error}")
    return MachineError(
        f"{name}: no file or folder of this name, and the hub gave no dataset: {str(error).splitlines()[0]}\n"
        "For a file, give its path; for a dataset, check the name, the network, HF_TOKEN and HF_ENDPOINT."
    )


def _json_reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "an integer of thousands of digits"
    return f"{error.msg.lower()} at column {error.colno}"


def _json_type(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
