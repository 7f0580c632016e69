"""Write a cleaned copy of a data file, and next to it what was left out and why. The input is only read."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from common.data.rows import Row
from common.errors import InputError

from check_data.findings import Findings


def check_report(flag: str, out: Path, data: list[str]) -> None:
    """Raise InputError unless a report can be written to `out` without changing the data, before an hour of reading."""
    target = out.resolve()
    for name in data:
        read = Path(name).expanduser().resolve()
        if target == read:
            raise InputError(f"{flag} {out}: this is the data itself, which is only read; give another name")
        if target.parent == read:
            raise InputError(f"{flag} {out}: this is the folder that is read; what is there is data")
    if out.is_dir() or not target.parent.is_dir():
        raise InputError(f"{flag} {out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")


def check_target(out: Path, data: list[str]) -> tuple[Path, Path]:
    """The file for the rows that stay and that for the others, OUT.jsonl and OUT.dropped.jsonl.

    Raises InputError as `check_report`, and if either is there already or OUT is no .jsonl.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"--fix {out}: the cleaned data is JSON Lines; give a name that ends in .jsonl")
    check_report("--fix", out, data)
    dropped = out.with_suffix(".dropped.jsonl")
    for file in (out, dropped):
        if file.exists():
            raise InputError(f"--fix {out}: {file} exists and is not overwritten; give another name")
    return out, dropped


def write(
    out: Path, dropped: Path, rows: Iterable[Row], findings: Findings, drop: set[str]
) -> tuple[int, Counter[str]]:
    """Write the rows without a finding of a kind in `drop` as they were read, and the others with the reasons.

    Returns how many rows stay, and how many were dropped, by their first reason. A line that is no row is among those.
    Neither file is there before both are complete.
    """
    left = {
        place: [{"kind": kind, "message": message} for kind, message in found if kind in drop]
        for place, found in (findings.by_place or {}).items()
    }
    left = {place: reasons for place, reasons in left.items() if reasons}
    reasons_counted = Counter(reasons[0]["kind"] for reasons in left.values())
    kept = 0
    parts = [file.with_name(file.name + ".part") for file in (out, dropped)]
    # A lone half of a surrogate pair is no character; it is written as the escape it was read from.
    with (
        parts[0].open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream,
        parts[1].open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as reasons_stream,
    ):
        for row in rows:
            reasons = left.pop(row.place, None)
            if reasons is None:
                stream.write(_line(row.fields))
                kept += 1
            else:
                reasons_stream.write(_line({"place": row.place, "reasons": reasons, "row": row.fields}))
        for place, reasons in left.items():  # lines that are no rows
            reasons_stream.write(_line({"place": place, "reasons": reasons}))
    for part, file in zip(parts, (out, dropped), strict=True):
        part.replace(file)
    return kept, reasons_counted


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"
