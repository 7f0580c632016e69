"""health.jsonl, the findings of a run, a line each; and what a run has logged, read again from its files."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.run.files import read_jsonl, write_jsonl
from common.run.health.health import Health
from common.run.health.seen import Finding
from common.run.samples import read_samples

FILE = "health.jsonl"


def read_findings(folder: Path) -> list[Finding]:
    """The findings of the run in a folder; none where none was written."""
    return [Finding(**entry) for entry in read_jsonl(folder / FILE)]


def write_findings(folder: Path, findings: list[Finding]) -> None:
    write_jsonl(folder / FILE, map(asdict, findings))


def recall(folder: Path, record: dict[str, Any], step: int) -> Health:
    """The health of the run in `folder` as it was after `step` steps. Later findings come again when they do."""
    health = Health(record)
    health.findings = [finding for finding in read_findings(folder) if finding.found <= step]
    for row, entries in steps_of(folder, step):
        for entry in entries:
            health.seen.add_completion(entry)
        health.seen.add(row)
    return health


def judge_again(folder: Path, record: dict[str, Any]) -> Health:
    """The health of a run by what it logged, as if no health.jsonl were there."""
    health = Health(record)
    health.judge()
    for row, entries in steps_of(folder):
        for entry in entries:
            health.seen.add_completion(entry)
        health.seen.add(row)
        health.judge()
    if record.get("status") == "done":
        health.end(record, read_samples(folder))
    return health


class NewLines:
    """The lines of a JSON Lines file that were added since the last look, without one that is half written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offset = 0

    def read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self.offset += len(whole + newline)
        return [json.loads(line) for line in whole.split(b"\n") if line]


def steps_of(folder: Path, last: int | None = None) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The rows of metrics.jsonl up to step `last`, each with the completions that were sampled up to it."""
    completions = read_jsonl(folder / "samples.jsonl")
    entry = next(completions, None)
    for row in read_jsonl(folder / "metrics.jsonl"):
        if not isinstance(row.get("step"), int):
            continue
        if last is not None and row["step"] > last:
            return
        entries = []
        while entry is not None and entry.get("step", 0) < row["step"]:
            entries.append(entry)
            entry = next(completions, None)
        yield row, entries
