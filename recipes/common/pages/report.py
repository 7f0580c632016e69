"""The report of a run, or of several: what was trained on what, how it went, and how to repeat it, on one page."""

from pathlib import Path
from typing import Any

from common.pages import curves, data, evaluation, facts
from common.pages.page import render
from common.pages.reading import read_run, reward_of
from common.run.files import write_bytes

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NAME = "report.html"
REFRESH = 3  # seconds between two looks at a run that is watched
SHOWN_SAMPLES = 12  # of a run
SHOWN_CHARACTERS = 2_000  # of a text


def write_report(folders: list[Path], file: Path) -> None:
    """Write the report of the runs in `folders`. Raises InputError where there is no run, OSError on a full disk."""
    write_bytes(file, page(folders).encode("utf-8", errors="replace"))


def page(folders: list[Path], live: bool = False) -> str:
    """The report as HTML. A `live` one is for a server: it fetches itself anew, and the plotting library once."""
    runs = [read_run(folder) for folder in folders]
    main, others = curves.charts(runs)
    return render(
        TEMPLATE,
        embedded=not live,
        live=REFRESH if live else None,
        title=facts.title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        names=curves.names(runs),
        facts=facts,
        data=data,
        evaluation=evaluation,
        charts=main,
        others=others,
        differing=facts.differing(runs) if len(runs) > 1 else [],
        colour=curves.colour,
        turns=turns,
        clipped=clipped,
        reward_of=reward_of,
        shown_samples=SHOWN_SAMPLES,
    )


def turns(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as [(role, text)]: of the turns of a conversation, or of the beginning of a document."""
    if isinstance(prompt, list):
        return [(str(turn.get("role", "")), clipped(turn.get("content"))) for turn in prompt if isinstance(turn, dict)]
    return [("document", clipped(prompt))]


def clipped(text: Any) -> str:
    """A text of a sample, at most SHOWN_CHARACTERS of it."""
    text = "" if text is None else str(text)
    more = len(text) - SHOWN_CHARACTERS
    return text if more <= 0 else f"{text[:SHOWN_CHARACTERS]} … and {more:,} more characters"
