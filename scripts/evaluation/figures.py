"""From what was measured row by row to figures: means by task, and the difference of two models with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from common.run.intervals import interval

if TYPE_CHECKING:
    from rich.table import Table

Figures = dict[str, dict[str, Any]]  # by task, by what is measured
ALL = "all"


@dataclass(frozen=True)
class Measured:
    """What one model does on the rows of one file.

    Args:
        values: by what is measured, a number for each row.
        rows: what is written down of each row, under a name for all of them: {"completions": [{...}, ...]}.
        tasks: of each row, where the rows are of several kinds.
        weights: how much each row counts, where that is not once: in a mean by token, its tokens. Then a value is the
            row's mean.
    """

    values: Mapping[str, Sequence[float]]
    rows: dict[str, list[dict[str, Any]]]
    tasks: list[str] | None = None
    weights: Sequence[float] | None = None

    def of_task(self, task: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values and the weights, both (N,), of the rows of a task."""
        values, weights = np.array(self.values[name], dtype=float), np.array(self.weights or [1.0] * len(self))
        if task == ALL:
            return values, weights
        chosen = [index for index, own in enumerate(self.tasks or []) if own == task]
        return values[chosen], weights[chosen]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def task_names(self) -> list[str]:
        """All, and then the tasks by name."""
        return [ALL, *sorted(set(self.tasks or []) - {ALL})]


def figures(measured: Measured) -> Figures:
    """The means, by task and over all rows."""
    found: Figures = {}
    for task in measured.task_names():
        columns = {name: measured.of_task(task, name) for name in measured.values}
        count = len(next(iter(columns.values()))[0])
        found[task] = {"rows": count, **{name: mean(*column) for name, column in columns.items()}}
    return found


def differences(tuned: Measured, base: Measured, seed: int) -> Figures:
    """By task and figure: what `tuned` has more than `base` on the same rows, and the paired 95 % interval of that."""
    found: Figures = {}
    for task in tuned.task_names():
        found[task] = {}
        for name in tuned.values:
            (after, weights), (before, _) = tuned.of_task(task, name), base.of_task(task, name)
            found[task][name] = {
                "difference": mean(after - before, weights),
                "interval": list(interval((after - before) * weights, weights, seed)),
            }
    return found


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())


def table(title: str, model: Figures, base: Figures | None = None) -> "Table":
    """The figures by task; with `base` as its own -> the model's."""
    from rich.table import Table

    rows = Table("task", *model[ALL], title=title)
    for task, own in model.items():
        cells = {name: shown(name, value) for name, value in own.items()}
        if base:
            cells |= {name: f"{shown(name, base[task][name])} -> {cells[name]}" for name in own if name != "rows"}
        rows.add_row(task, *cells.values())
    return rows


def comparison_table(title: str, base: Figures, tuned: Figures, change: Figures, task: str = ALL) -> "Table":
    """Of the rows of a task, the figures of base and adapter, and their difference."""
    from rich.table import Column, Table

    headings = ("", "base", "adapter", "difference", "95 % interval")
    rows = Table(*(Column(heading, no_wrap=bool(heading)) for heading in headings), title=title)
    for name, found in change[task].items():
        low, high = found["interval"]
        rows.add_row(
            name,
            shown(name, base[task][name]),
            shown(name, tuned[task][name]),
            "no difference" if low <= 0 <= high else shown(name, found["difference"], "+"),
            f"{shown(name, low, '+')} to {shown(name, high, '+')}",
        )
    return rows


def shown(name: str, value: float, sign: str = "") -> str:
    """A figure as text: counts and nats as they are, shares in per cent."""
    if name == "rows":
        return str(value)
    return f"{value:{sign}.2f}" if "nats" in name else f"{value:{sign}.1%}"
