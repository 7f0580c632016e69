"""From what was measured row by row to figures: means by task, and the difference of two models with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from common.pages.evaluation import bounds, shown
from common.run.intervals import interval_of

if TYPE_CHECKING:
    from rich.table import Table

Figures = dict[str, dict[str, Any]]  # by task, by what is measured
ALL = "all"
LOSS, PERPLEXITY = "loss (nats)", "perplexity (per token)"
EXPONENTIAL = {PERPLEXITY}  # e to the power of a mean: of a row it is the loss that is kept
LESS_IS_BETTER = ("loss", "perplexity")
NEITHER = ("log-probability",)  # of good and of bad completions: it is not known which way is better


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


@dataclass(frozen=True)
class Line:
    """One figure of two models on the same rows. Intervals are of 95 %, by the paired bootstrap over the rows.

    `before` and what follows from it is None where there is nothing to compare with.
    """

    name: str
    rows: int
    after: float
    after_interval: tuple[float, float]
    before: float | None = None
    before_interval: tuple[float, float] | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None  # of the difference
    less_is_better: bool | None = None  # None: its name tells

    @property
    def verdict(self) -> str:
        """better, worse or no difference; higher or lower where neither is better; empty without a comparison."""
        if self.interval is None or self.difference is None:
            return ""
        if self.interval[0] <= 0 <= self.interval[1]:
            return "no difference"
        higher = self.difference > 0
        if self.name.startswith(NEITHER):
            return "higher" if higher else "lower"
        less = self.name.startswith(LESS_IS_BETTER) if self.less_is_better is None else self.less_is_better
        return "better" if higher != less else "worse"

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "verdict": self.verdict}


def lines(after: Measured, before: Measured | None, seed: int, task: str = ALL) -> list[Line]:
    """A line for each figure of the rows of a task."""
    found = []
    for name in after.values:
        values, weights = after.of_task(task, name)
        own = statistic(name)
        line = Line(name, len(values), own(values, weights), interval_of(own, (values, weights), seed))
        if before is not None:
            others, _ = before.of_task(task, name)
            line = Line(
                *(line.name, line.rows, line.after, line.after_interval),
                *(own(others, weights), interval_of(own, (others, weights), seed)),
                *difference(name, values, others, weights, seed),
            )
        found.append(line)
    return found


def figures(measured: Measured) -> Figures:
    """The means, by task and over all rows."""
    found: Figures = {}
    for task in measured.task_names():
        columns = {name: measured.of_task(task, name) for name in measured.values}
        count = len(next(iter(columns.values()))[0])
        found[task] = {"rows": count, **{name: float(statistic(name)(*column)) for name, column in columns.items()}}
    return found


def differences(tuned: Measured, base: Measured, seed: int) -> Figures:
    """By task and figure: what `tuned` has more than `base` on the same rows, and the paired 95 % interval of that."""
    found: Figures = {}
    for task in tuned.task_names():
        found[task] = {}
        for name in tuned.values:
            (after, weights), (before, _) = tuned.of_task(task, name), base.of_task(task, name)
            change, bounds = difference(name, after, before, weights, seed)
            found[task][name] = {"difference": change, "interval": list(bounds)}
    return found


def difference(
    name: str, after: np.ndarray, before: np.ndarray, weights: np.ndarray, seed: int
) -> tuple[float, tuple[float, float]]:
    """What a figure is more after than before, and the paired interval of that."""
    own = statistic(name)

    def change(after: np.ndarray, before: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
        return own(after, weights, axis) - own(before, weights, axis)

    return float(change(after, before, weights)), interval_of(change, (after, before, weights), seed)


def statistic(name: str) -> Any:
    """The figure of that name from values and weights, along an axis: their mean, or e to its power."""

    def mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
        return (values * weights).sum(axis) / weights.sum(axis)

    def power(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(mean(values, weights, axis))

    return power if name in EXPONENTIAL else mean


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


def line_table(title: str, lines: Sequence[Line]) -> "Table":
    """Figures before and after, with the difference and its interval; without a comparison the figure and its own."""
    from rich.table import Column, Table

    compared = any(line.before is not None for line in lines)
    headings = ["", "before", "after", "difference", "95 % interval"] if compared else ["", "", "95 % interval"]
    rows = Table(*(Column(heading, no_wrap=bool(heading)) for heading in headings), title=title, padding=(0, 0, 0, 1))
    for line in lines:
        rows.add_row(line.name, *cells(line))
    return rows


def cells(line: Line) -> list[str]:
    """A line of the table, without its name."""
    name = line.name
    if line.before is None or line.difference is None or line.interval is None:
        return [shown(name, line.after), bounds(name, line.after_interval)]
    change = line.verdict if line.verdict == "no difference" else shown(name, line.difference, "+")
    return [shown(name, line.before), shown(name, line.after), change, bounds(name, line.interval, "+")]


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
            bounds(name, (low, high), "+"),
        )
    return rows
