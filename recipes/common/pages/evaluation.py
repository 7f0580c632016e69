"""What `make evaluate RUN=…` wrote to a run's folder, as the tables of its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.run.files import read_object

NAME = "evaluation.json"
COLOUR = {"better": "green", "worse": "red"}


@dataclass(frozen=True)
class Row:
    """A figure before and after, each with its interval; the difference, and the verdict with its colour."""

    name: str
    cells: list[tuple[str, str]]  # (figure, its interval)
    verdict: str
    colour: str


@dataclass(frozen=True)
class EvaluationTable:
    title: str
    compared: bool
    rows: list[Row]
    notes: list[str]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The evaluation of a run; {} where there is none, or one that is half written or damaged."""
    try:
        return read_object(folder / NAME)
    except (OSError, InputError):
        return {}


def tables(evaluation: dict[str, Any]) -> list[EvaluationTable]:
    """A table for each set of rows that was measured."""
    return [_table(section) for section in evaluation.get("sections", {}).values()]


def names(evaluation: dict[str, Any]) -> tuple[str, str]:
    """What is called before and after; before is empty where nothing was compared."""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    return str(before.get("name", "")), str(after.get("name", ""))


def shown(name: str, value: float, sign: str = "") -> str:
    """A figure as text: a share in per cent; one with a unit in brackets in its name, such as (nats), as it is."""
    if name == "rows":
        return str(value)
    return f"{value:{sign}.1%}" if "(" not in name else f"{value:{sign},.{2 if abs(value) >= 1 else 3}f}"


def bounds(name: str, interval: Sequence[float], sign: str = "") -> str:
    """An interval as text."""
    return f"{shown(name, interval[0], sign)} to {shown(name, interval[1], sign)}"


def _table(section: dict[str, Any]) -> EvaluationTable:
    lines = section.get("lines", [])
    compared = any(line.get("before") is not None for line in lines)
    return EvaluationTable(
        f"{section.get('title', '')}, {section.get('rows', 0):,} rows",
        compared,
        [_row(line, compared) for line in lines],
        section.get("notes", []),
    )


def _row(line: dict[str, Any], compared: bool) -> Row:
    name, verdict = str(line["name"]), str(line.get("verdict", ""))
    columns = [("before", "before_interval", ""), ("after", "after_interval", ""), ("difference", "interval", "+")]
    cells = [
        (shown(name, line[value], sign), bounds(name, line[interval], sign))
        for value, interval, sign in (columns if compared else columns[1:2])
        if line.get(value) is not None
    ]
    return Row(name, cells, verdict, COLOUR.get(verdict, "dim"))
