"""What `make evaluate RUN=…` found: on the terminal, in RUN/evaluation.json and in the run's report."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import spell
from common.pages.evaluation import NAME as EVALUATION
from common.pages.evaluation import read_evaluation
from common.pages.report import NAME, write_report
from common.run.files import write_json
from rich.console import Console

from evaluation.figures import Line, line_table
from evaluation.subject import Subject

FEW_ROWS = 30


@dataclass
class Section:
    """One table: its title, the lines, notes below it, and what is written down of each row."""

    title: str
    rows: int
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": self.rows,
            "lines": [line.as_json() for line in self.lines],
            "notes": self.notes,
            "details": self.details,
        }


def show(console: Console, section: Section) -> None:
    """Print a table, at most 80 columns wide."""
    console.print(line_table(f"{section.title}, {section.rows} rows", section.lines))
    for note in section.notes:
        console.print(spell(note), soft_wrap=True, highlight=False, markup=False)


def few_rows(rows: int) -> list[str]:
    """A note where intervals are wide because there are few rows."""
    return [f"{rows} rows are few: only large differences show. --data takes more."] if rows < FEW_ROWS else []


def write(
    subject: Subject,
    seed: int,
    sections: Sequence[Section],
    more: dict[str, Any],
) -> Path:
    """Write evaluation.json and the report anew. Sections of an earlier evaluation of the same two models stay."""
    file = subject.folder / EVALUATION
    own = {
        "after": subject.after.identity(),
        "before": subject.before.identity() if subject.before else None,
    }
    known = read_evaluation(subject.folder)
    if {name: known.get(name) for name in own} != own:
        known = {}
    kept = known.get("sections", {}) | {section.title: section.as_json() for section in sections}
    finished = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(file, {**known, **own, **more, "seed": seed, "finished": finished, "sections": kept})
    write_report([subject.folder], subject.folder / NAME)
    return file
