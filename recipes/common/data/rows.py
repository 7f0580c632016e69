"""Read a data source row by row, with the place of every row.

A source is a file (JSON Lines, JSON arrays, CSV, Parquet, text), a folder of such files, or a dataset on the hub. Rows
are streamed. A place is `file:line`; every error about a row begins with it. What a row must hold is decided in
formats.py.
"""

import csv
import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.hub_dataset import hub_dataset, hub_refusal, no_such_dataset, of_rows
from common.data.json_values import as_text, json_type, json_values
from common.errors import InputError, one_line, printable
from common.lm.network import tried

Source = list[Path] | str  # files, or a dataset on the hub: its id, or id@revision

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SUFFIXES = (*ROWS, ".txt")  # a .txt file is one row, a document
SHOWN_FAULTS = 20
MOST_NOTES = 20
OTHER_NOTES = "other things that are not read"
NO_FILE = "is a pipe, a socket or a device, which cannot be read twice; give a plain file"
MEDIA = re.compile(r"\b(Image|Audio|Video|Pdf|Nifti)\(")  # the features of datasets that hold files


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data source: `fields` as read, and the `place` (file:line) it was read from."""

    place: str
    fields: dict[str, Any]


class Faults:
    """The errors of a data source, row by row: the first 20 in words, the rest as a number.

    And its notes: what rows hold that is not trained as it stands, counted by what it is.
    """

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0
        self.noted: dict[str, tuple[int, str]] = {}  # the rows, and the place of the first, by what was noted

    def add(self, place: str, message: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(f"{place}: {message}")

    def note(self, place: str, what: str) -> None:
        """Count the row at `place` among those that `what` is true of."""
        if what not in self.noted and len(self.noted) >= MOST_NOTES:
            what = OTHER_NOTES
        rows, first = self.noted.get(what, (0, place))
        self.noted[what] = (rows + 1, first)

    def notes(self) -> list[str]:
        """A line for each thing that was noted, with the number of rows and the first of them."""
        return [
            f"{what} (in {rows:,} row{'' if rows == 1 else 's'}, the first is {first})"
            for what, (rows, first) in self.noted.items()
        ]

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
        for file in files:
            if file.exists() and not file.is_file():
                raise InputError(f"{file}: {NO_FILE}")
            if printable(file.name) != file.name or "\n" in file.name:
                raise InputError(f"{file}: its name has a character that is no text; rename it")
        if not files:
            raise InputError(f"{data}: this folder holds no data file; expected one of {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"{data}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
        return [path]
    if path.exists():
        raise InputError(f"{data}: {NO_FILE}")
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
        yield from _hub_rows(source, faults)
        return
    for file in source:
        if file.stat().st_size == 0:
            faults.add(str(file), "the file is empty")
            continue
        match file.suffix.lower():
            case ".csv":
                yield from _csv_rows(file, faults)
            case ".parquet":
                yield from _parquet_rows(file, faults)
            case ".txt":
                try:
                    yield Row(f"{file}:1", {"text": as_text(file.read_bytes())})
                except ValueError as error:
                    faults.add(str(file), str(error))
            case _:
                yield from _json_rows(file, faults)


def source_identity(source: Source) -> str:
    """What a source is by its contents: one sha256 over the bytes of its files in order, or the hub's id@commit.

    Raises InputError or MachineError, as reading does, when the hub does not give the dataset.
    """
    if isinstance(source, str):
        return f"{source.partition('@')[0]}@{hub_dataset(source).hash}"
    return source_sha256(source)


def source_sha256(files: Iterable[Path]) -> str:
    """One sha256 over the bytes of all files in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _json_rows(file: Path, faults: Faults) -> Iterator[Row]:
    for found in json_values(file):
        place = f"{file}:{found.line}"
        if found.problem:
            faults.add(place, found.problem)
        elif not isinstance(found.value, dict):
            faults.add(place, f"{json_type(found.value)}, expected a JSON object like {{...}}")
        else:
            yield Row(place, found.value)


def _csv_line(place: str, line: bytes, faults: Faults) -> str:
    try:
        return as_text(line)
    except ValueError as error:
        faults.add(place, str(error))
        return "\n"


def _csv_rows(file: Path, faults: Faults) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with file.open("rb") as stream:
        lines = (_csv_line(f"{file}:{number}", line, faults) for number, line in enumerate(stream, start=1))
        reader = csv.DictReader(lines, strict=True)
        first = 2  # the line on which the row begins, not its number: a quoted field may hold newlines
        try:
            if twice := _twice(reader.fieldnames or ()):
                faults.add(f"{file}:1", f"two columns have the name {twice!r}; rename one")
                return
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


def _parquet_rows(file: Path, faults: Faults) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if twice := _twice(table.schema_arrow.names):
            raise InputError(f"{file}: two columns have the name {twice!r}; rename one")
        batches = (batch.to_pylist(maps_as_pydicts="strict") for batch in table.iter_batches(batch_size=1024))
        nothing = {field.name for field in table.schema_arrow if pa.types.is_null(field.type)}
        yield from _arrow_rows(str(file), itertools.chain.from_iterable(batches), nothing, faults)
    except KeyError as error:  # of a map
        raise InputError(f"{file}: {error.args[0]}") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # OSError: a damaged page; ValueError: text not in UTF-8
        raise InputError(f"{file}: not a readable Parquet file: {error}") from None


def _arrow_rows(name: str, rows: Iterable[dict[str, Any]], nothing: set[str], faults: Faults) -> Iterator[Row]:
    """Rows of Arrow, which gives every row all columns and all keys: what a row lacks is null there.

    Nulls inside a column are left out, and noted. A column that is null is kept: it shows which columns there are. The
    columns `nothing`, of Arrow's type null, hold a value in no row; they are none.
    """
    for number, fields in enumerate(rows, start=1):
        place = f"{name}:{number}"
        fields = {column: value for column, value in fields.items() if column not in nothing}
        given = {column: _without_nulls(value) for column, value in fields.items()}
        if given != fields:
            faults.note(place, "nulls inside a column, which Parquet has for keys that a row lacks, are left out")
        yield Row(place, given)


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null, at all depths."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    if isinstance(value, list):
        return [_without_nulls(below) for below in value]
    return value


def _twice(names: Iterable[str]) -> str | None:
    """The first of the names that is there twice, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _hub_rows(name: str, faults: Faults) -> Iterator[Row]:
    builder = hub_dataset(name)
    try:
        tried(name, lambda _: builder.download_and_prepare(), hopeless=no_such_dataset)
        dataset: Any = builder.as_dataset(split="train")
    except (OSError, ValueError) as error:
        raise hub_refusal(name, error) from None
    except Exception as error:
        if not of_rows(error):
            raise
        raise InputError(f"{name}: its rows cannot be read: {one_line(error.__cause__ or error)}") from None
    # Images and sounds are refused where the row is read; they are not decoded before, which needs more libraries.
    media = {column: "not loaded" for column, feature in dataset.features.items() if MEDIA.search(repr(feature))}
    nothing = {column for column, feature in dataset.features.items() if getattr(feature, "dtype", None) == "null"}
    rows = (fields | media for fields in dataset.remove_columns(list(media)))
    yield from _arrow_rows(name, rows, nothing, faults)
