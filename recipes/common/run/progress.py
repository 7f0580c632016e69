"""A progress bar that fits its terminal: how far the work is, the time left, and below it the numbers.

    step 37/160 ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  0:01:23 left  1.2 GiB  1,291 tok/s
    reward 0.421  math 0.312±0.471  format 0.544±0.498  flat 0.25  length 12.3

In a log file it is one line of text each time there is something to say.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.text import Text

from common.run.screen import console, end_live, show_live

T = TypeVar("T")
RECENT = 50  # steps whose mean duration counts: enough to hold a checkpoint or an evaluation, few enough to follow
LOG_LINES = 10  # that `bar` writes to a log file, and as many for 40 prompts as for 40,000


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one after the other, with a progress bar named `what`; an item is done when the next one is taken."""
    with bar(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar named `what` over `total` pieces of work. Call its value with the number of pieces just done.

        with bar("Sampling completions", len(prompts)) as advance:
            for batch in batches:
                ...
                advance(len(batch))

    In a log file it is at most ten lines.
    """
    shown = LiveBar(what, total)
    shown.start()
    tenth = 0

    def advance(count: int) -> None:
        nonlocal tenth
        shown.update(shown.done + count)
        if not console().is_terminal and shown.done * LOG_LINES // max(total, 1) > tenth:
            tenth = shown.done * LOG_LINES // max(total, 1)
            console().print(shown.line([]), highlight=False, soft_wrap=True)

    try:
        yield advance
    finally:
        end_live()


class LiveBar:
    """What is done of some work, and the numbers that belong to it.

    Args:
        what: the name before the count, as "step".
        total: the pieces of work in all.
        done: how many of them were done before this process began.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what = what
        self.total = total
        self.done = done
        self.facts: list[str] = []  # behind the time left; where the line is too short, the last ones are left out
        self.values: list[str] = []  # on lines of their own
        self.started = time.monotonic()
        self.marks: deque[tuple[float, int]] = deque(maxlen=RECENT + 1)  # (time, pieces done)

    def start(self) -> None:
        """Show it, on a terminal, until `end_live`; its last state stays."""
        show_live(self, keep=True)

    def update(self, done: int, facts: Sequence[str] = ()) -> None:
        """Record that `done` pieces are done by now, and the `facts` for the first line."""
        self.done = done
        self.facts = list(facts)
        self.marks.append((time.monotonic(), done))

    def seconds_left(self) -> float | None:
        """The seconds left by the mean of the last steps; None until two steps of this process are done.

        The first one does not count: it compiles and allocates, which no other step does.
        """
        if len(self.marks) < 2 or self.marks[0][1] == self.marks[-1][1]:
            return None
        (first, before), (last, done) = self.marks[0], self.marks[-1]
        at_last = (last - first) / (done - before) * (self.total - done)
        return max(at_last - (time.monotonic() - last), 0.0)

    def line(self, values: Iterable[str]) -> str:
        """All of it on one line, for a log file."""
        return "  ".join([f"{self.what} {self.done}/{self.total}", *values, *self.facts, self._time()])

    def _time(self) -> str:
        if self.done >= self.total:
            return f"took {duration(self.marks[-1][0] - self.started if self.marks else 0)}"
        seconds = self.seconds_left()
        return f"{'-:--:--' if seconds is None else duration(seconds)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        count = f"{self.what} {self.done:>{len(str(self.total))}}/{self.total} "
        facts = [self._time(), *self.facts]
        while len(facts) > 1 and len(count) + sum(len(fact) + 2 for fact in facts) + 10 > width:
            facts.pop()
        end = "".join(f"  {fact}" for fact in facts)
        yield Text(count, style="bold", end="")
        yield ProgressBar(self.total, self.done, width=max(width - len(count) - len(end), 1))
        yield Text(end, no_wrap=True)
        for line in wrapped(self.values, width):
            yield Text(line, no_wrap=True)


def wrapped(values: Sequence[str], width: int) -> list[str]:
    """The values on as few lines of `width` characters as hold them, none of them broken."""
    lines: list[str] = []
    for value in values:
        if lines and len(lines[-1]) + 2 + len(value) <= width:
            lines[-1] += f"  {value}"
        else:
            lines.append(value)
    return lines


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as --time-limit takes them: 0:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
