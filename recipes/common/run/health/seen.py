"""What a run has logged so far, and the few statistics that findings rest on."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

KEPT = 40  # values at either end of a curve, and completions: a window is no longer, however long the run is
DEVIATION = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations
OF_MEDIAN = 1.2533  # the standard error of a median, in that of a mean


@dataclass(frozen=True)
class Finding:
    """What is wrong with a run: a name, the steps that show it, the figures, and what to change."""

    name: str
    first: int
    last: int
    evidence: str
    advice: str  # names arguments as flags
    rule: str = ""  # the function that found it
    found: int = 0  # after which step

    def lines(self) -> list[str]:
        """The finding as it is printed: what and where, then what to change."""
        return [f"Health: {self.name}, {self.steps}: {self.evidence}.", f"  {self.advice}."]

    @property
    def steps(self) -> str:
        return f"steps {self.first} to {self.last}" if self.last else "in the data"


@dataclass(frozen=True)
class Change:
    """The medians of a window at the beginning of a curve and of one at its end, and the standard error of their
    difference."""

    before: float
    after: float
    error: float
    first: int  # step
    last: int

    @property
    def rise(self) -> float:
        return self.after - self.before

    @property
    def rises(self) -> bool:
        """By more than chance: two standard errors, as in a 95 % interval."""
        return self.rise > 2 * self.error

    @property
    def falls(self) -> bool:
        return -self.rise > 2 * self.error


@dataclass
class Curve:
    """The values under a key of metrics.jsonl: the first and the latest with their steps, and the lowest."""

    count: int = 0
    first: list[tuple[int, float]] = field(default_factory=list)
    latest: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    lowest: tuple[int, float] = (0, math.inf)

    def add(self, step: int, value: float) -> None:
        self.count += 1
        if len(self.first) < KEPT:
            self.first.append((step, value))
        self.latest.append((step, value))
        if value < self.lowest[1]:
            self.lowest = step, value

    def last(self, count: int) -> list[float]:
        return [value for _, value in self.latest][-count:]

    def begin(self, count: int) -> list[float]:
        return [value for _, value in self.first[:count]]

    def steps(self, count: int) -> tuple[int, int]:
        """The steps of the first and the last of the latest `count` values."""
        return self.latest[-min(count, len(self.latest))][0], self.latest[-1][0]

    def change(self, least: int) -> Change | None:
        """From a window at the beginning to one at the end, each a third of the curve and at least `least` values.

        None where they would overlap, and where a value is not finite.
        """
        window = min(max(self.count // 3, least), KEPT)
        before, after = self.begin(window), self.last(window)
        if self.count < 2 * window or not all(map(math.isfinite, [*before, *after])):
            return None
        error = OF_MEDIAN * math.hypot(spread(before), spread(after)) / math.sqrt(window)
        middle = statistics.median
        return Change(middle(before), middle(after), error, self.first[0][0], self.latest[-1][0])


EMPTY = Curve()


@dataclass
class Seen:
    """All that the rules read. Metrics and completions are added as they come; the rest is known at one time."""

    recipe: str
    arguments: dict[str, Any]
    data: dict[str, Any]  # what `measure` found in the rows
    steps: int | None = None  # that the run is to take
    record: dict[str, Any] = field(default_factory=dict)  # run.json of a run that has ended
    samples: list[dict[str, Any]] = field(default_factory=list)  # its samples.json
    ended: bool = False
    step: int = 0
    curves: dict[str, Curve] = field(default_factory=dict)
    early: list[dict[str, Any]] = field(default_factory=list)  # lines of samples.jsonl
    late: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))  # the latest that are not early

    def add(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        self.step = int(row.get("step", self.step))
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.curves.setdefault(key, Curve()).add(self.step, float(value))

    def add_completion(self, entry: dict[str, Any]) -> None:
        """A line of samples.jsonl."""
        (self.early if len(self.early) < KEPT else self.late).append(entry)

    def curve(self, key: str) -> Curve:
        return self.curves.get(key, EMPTY)

    def change(self, key: str, least: int) -> Change | None:
        return self.curve(key).change(least)

    def reached(self, share: float) -> bool:
        """Whether this share of the run is done; where its length is not known, whether it has ended."""
        return self.ended or (self.steps is not None and self.step >= share * self.steps)


def spread(values: Sequence[float]) -> float:
    """The standard deviation by the median difference of neighbours, which a trend and outliers change little.

    Of independent normal values a difference has the square root of 2 times their deviation.
    """
    differences = [abs(b - a) for a, b in itertools.pairwise(values)]
    return DEVIATION * statistics.median(differences) / math.sqrt(2) if differences else 0.0


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's; 0 where it is not defined."""
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return statistics.correlation(one, other)
