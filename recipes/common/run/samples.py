"""A few held-out prompts, answered before and after training, side by side."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from common.data.examples import Conversation
from common.run.files import write_json


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt that is kept out of training, and the answer that the data gives to it."""

    prompt: Conversation
    reference: str


def as_samples(rows: list[Conversation]) -> list[Sample]:
    """Ask what stands before the assistant's first turn; a row where nobody has asked anything by then is left out."""
    samples = []
    for row in rows:
        first = [*itertools.takewhile(lambda message: message["role"] != "assistant", row.messages)]
        if any(message["role"] == "user" for message in first):
            reference = row.messages[len(first)]["content"]
            samples.append(Sample(Conversation(row.place, first, row.tools), reference))
    return samples


def show(console: Console, file: Path, samples: list[Sample], before: list[str], after: list[str]) -> None:
    """Print the answers side by side and write them to `file` as JSON."""
    headings = ("prompt", "before", "after", "the data says")
    columns = [Column(heading, overflow="fold") for heading in headings]  # a long word is folded, never cut
    table = Table(*columns, title="Held-out prompts", show_lines=True)
    entries: list[dict[str, Any]] = []
    for sample, old, new in zip(samples, before, after, strict=True):
        question = sample.prompt.messages[-1]["content"]
        table.add_row(*(_clipped(text) for text in (question, old, new, sample.reference)))
        entries.append({"prompt": sample.prompt.messages, "before": old, "after": new, "reference": sample.reference})
    write_json(file, entries)
    if samples:
        console.print(table, markup=False)


def _clipped(text: str, characters: int = 240) -> str:
    """A cell of the table: on one line, and not longer than a few."""
    text = text.strip().replace("\n", " / ")
    return text if len(text) <= characters else text[:characters] + " ..."
