"""The terminal: one console for all of a process, one line while things load, and no noise of the libraries.

Only one thing can move on a terminal, a spinner while things load or a progress bar; both are drawn by `show_live`. The
libraries' own bars stay off but for downloads, and of what they print the lines of NOISE are dropped, nothing else.
"""

import atexit
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import rich.text
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.control import strip_control_codes
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from common.environment import quiet_loggers
from common.errors import printable
from common.run.ranks import is_first, use_own_gpu

# What Unsloth 2026.10.9 and transformers 5.17 print in every run, though nothing is wrong. Whatever else they print is
# shown: a new line of theirs may be a warning.
NOISE = re.compile(
    r"(🦥 )?Unsloth: (Will patch your computer|Will smartly offload gradients|Double buffering enabled)"
    r"|Unsloth: (Padded batches \+ per-block compile|Patched gradient checkpointing)"
    r"|(🦥 )?Unsloth: (Packing |Padding-free |Padding-free auto-)enabled"
    r"|Unsloth [\d.]+: no GPU found, training on CPU"
    r"|Unsloth [\d.]+ patched \d+ layers with [\w ,]+ MLP layers\.$|Not an error, but Unsloth cannot patch "
    r"|Unsloth \(CPU\): \w+ on \d+ CPU threads\."
    r'|==\(\(====\)\)==  Unsloth |   \\\\   /\|  |O\^O/ \\_/ \\  |\\        /  | "-____-"  '  # its logo, with facts
    r"|The tokenizer has new PAD/BOS/EOS tokens that differ from the model config"  # the pad token that we gave it
)
NOISY_LOGGERS = ("transformers.trainer", "transformers.trainer_utils", "transformers.models.llama.modeling_llama")

_live: Live | None = None
_height = 0  # lines that the live display has on the terminal


@cache
def console() -> Console:
    """The console of this process; of several processes only the first one prints.

    Names and texts are somebody else's: [/b] in them is no markup, :100: no emoji, and the terminal obeys no ESC.
    """
    obey_no_text()
    return Console(quiet=not is_first(), emoji=False, markup=False)


def obey_no_text() -> None:
    """Have rich write the control characters of a text that it does not strip, such as ESC, as \\x1b."""
    text: Any = rich.text
    text.strip_control_codes = lambda text: printable(strip_control_codes(text))


def loading(what: str, notes: Iterable[str] = ()) -> Console:
    """Show that `what` is loading, until a bar is shown or the process ends. Returns the console for all other output.

    On a terminal it is a spinner; in a log file, and where the libraries show the progress of a download, one line.
    `notes`, those on the data that a run is to train on, are printed first.
    """
    quiet_loggers()
    use_own_gpu()
    _quiet_libraries()
    for note in notes:
        console().print(note, highlight=False, markup=False, soft_wrap=True)
    if console().is_terminal and "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        wait_for(f"Loading {what}")
    else:
        console().print(f"Loading {what} ...", highlight=False, soft_wrap=True)
    return console()


def announce(model: str, data: str, folder: Path) -> None:
    """Print what is trained on what, and the folder that it goes to."""
    console().print(Text.assemble((model, "bold"), f", {data} -> ", (str(folder), "bold")), soft_wrap=True)


def wait_for(what: str) -> None:
    """On a terminal show a spinner with `what` and the seconds so far, until `end_live` or another live display."""
    show_live(_Waiting(what), keep=False)


def show_live(renderable: RenderableType, keep: bool) -> None:
    """On a terminal draw `renderable` below all other output, ten times a second, until `end_live` or the next call.

    Args:
        renderable: a rich renderable, which may look different each time.
        keep: whether its last state stays on the terminal.
    """
    global _live
    end_live()
    if console().quiet or not console().is_terminal:
        return
    _live = Live(
        _Measured(renderable),
        console=console(),
        refresh_per_second=10,
        transient=not keep,
        redirect_stderr=sys.stderr.isatty(),  # an error that goes to a file does not belong on the terminal
    )
    _live.start(refresh=True)


def end_live() -> None:
    """End the live display, if there is one."""
    global _live, _height
    if _live is not None:
        _live.stop()
    _live, _height = None, 0


atexit.register(end_live)  # else an error leaves the terminal without its cursor


def write_above(line: str, last: bool = False) -> None:
    """Write a line from a signal handler, past Python's buffers, which may be in use.

    It appears above the live display where there is one, else on stderr. After the `last` line nothing is drawn again.
    """
    if not _height:
        os.write(2, f"{line}\n".encode())
        return
    clear = "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (_height - 1)
    rest = "\n\x1b[?25h" if last else "\n" * _height  # the cursor; or as many lines as the next drawing clears
    os.write(1, f"{clear}{line}{rest}".encode())


class _Waiting:
    """A spinner, what is waited for, and for how long."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.start = time.monotonic()
        self.spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        passed = f"{time.monotonic() - self.start:.0f} s"
        self.spinner.update(text=Text.assemble(self.what, ("  " + passed, "dim"), no_wrap=True, overflow="ellipsis"))
        yield self.spinner


class _Measured:
    """What is drawn live, and how many lines that takes."""

    def __init__(self, renderable: RenderableType) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        global _height
        lines = console.render_lines(self.renderable, options, pad=False)
        _height = len(lines)
        for number, line in enumerate(lines):
            yield from line
            if number < len(lines) - 1:
                yield Segment.line()


def _quiet_libraries() -> None:
    """Drop NOISE from what is printed and logged, and switch the bars over data sets and weights off."""
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if datasets := sys.modules.get("datasets"):  # a hub data set was read: the variable comes too late
        datasets.disable_progress_bars()
    if os.environ.get("HF_HUB_OFFLINE") == "1":  # no downloads; the same variable is for the bar over the weights
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_noise)
    if not isinstance(sys.stdout, _Output):
        sys.stdout = _Output(console(), sys.stdout)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not NOISE.match(record.getMessage())


class _Output(FileProxy):
    """sys.stdout without the lines of NOISE. On a terminal all others appear above the live display.

    As a FileProxy it is left in place by rich's Live, which would else put one of its own around it.
    """

    def __init__(self, console: Console, file: TextIO) -> None:
        super().__init__(console, file)
        self.console = console
        self.file = file
        self.rest = ""  # a line that has no end yet

    @property
    def encoding(self) -> str:  # pyrefly: ignore[bad-override]  an attribute to typeshed, which nobody sets
        return self.file.encoding

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._print(line)
        return len(text)

    def flush(self) -> None:
        if self.rest:
            self._print(self.rest)
            self.rest = ""
        self.rich_proxied_file.flush()

    def _print(self, line: str) -> None:
        if NOISE.match(line) or self.console.quiet:
            return
        if self.console.is_terminal:
            self.console.print(Text.from_ansi(line), soft_wrap=True)
        else:
            self.rich_proxied_file.write(line + "\n")
