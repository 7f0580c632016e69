"""What a run shows of its model: held-out prompts before and after training, and samples.jsonl of every step."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from common.data.examples import Conversation, Document, Prompt
from common.run.files import keep_rows, read_objects, write_json
from common.run.ranks import is_first

BEGINNING, CONTINUATION = 400, 2000  # characters of a document in a sample, at most


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt, or the beginning of a held-out document, and how the data continues it."""

    prompt: Conversation | Document
    reference: str


def as_samples(rows: Sequence[Conversation | Document]) -> list[Sample]:
    """The prompt of each conversation, all before the assistant's first turn; rows without a turn of the user go.

    Of a document its first half, a few hundred characters at most, up to a space.
    """
    samples = []
    for row in rows:
        if isinstance(row, Document):
            half = row.text[: min(len(row.text) // 2, BEGINNING)]
            begin = half.rsplit(maxsplit=1)[0] if len(half.split()) > 1 else half
            samples.append(Sample(Document(row.place, begin), row.text[len(begin) :][:CONTINUATION]))
            continue
        first = [*itertools.takewhile(lambda message: message["role"] != "assistant", row.messages)]
        if any(message["role"] == "user" for message in first):
            reference = row.messages[len(first)]["content"]
            samples.append(Sample(Conversation(row.place, first, row.tools), reference))
    return samples


def as_sample(prompt: Prompt) -> Sample:
    """A prompt as a sample; the data continues it by the gold answer, where there is one."""
    return Sample(Conversation(prompt.place, prompt.prompt, prompt.tools), prompt.answer or "")


def show(console: Console, file: Path, samples: list[Sample], before: list[str], after: list[str]) -> None:
    """Print the completions before and after training side by side, and write them to `file` as JSON."""
    headings = ("prompt", "before", "after", "in the data")
    columns = [Column(heading, overflow="fold") for heading in headings]  # a long word is folded and not clipped
    documents = any(isinstance(sample.prompt, Document) for sample in samples)
    table = Table(*columns, title="Held-out documents" if documents else "Held-out prompts", show_lines=True)
    entries: list[dict[str, Any]] = []
    for sample, old, new in zip(samples, before, after, strict=True):
        prompt = sample.prompt.text if isinstance(sample.prompt, Document) else sample.prompt.messages
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        table.add_row(*(_clipped(text) for text in (question, old, new, sample.reference)))
        entries.append({"prompt": prompt, "before": old, "after": new, "reference": sample.reference})
    write_json(file, entries)
    if samples:
        console.print(table, markup=False)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """samples.json of the run in `folder`: the held-out prompts, completed before and after; [] before its end."""
    file = folder / "samples.json"
    return read_objects(file) if file.exists() else []


def append(file: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Append completions of a step to samples.jsonl, an entry a line; `step` of an entry is the steps done before."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def forget_after(file: Path, step: int) -> None:
    """Drop the entries that a run resumed after `step` steps writes again, and a line that a killed run left half.

    Of several ranks the first one does, as it writes them.
    """
    if is_first():
        keep_rows(file, lambda entry: entry.get("step", 0) < step)


def _clipped(text: str, characters: int = 240) -> str:
    """A cell of the table: one line of a few hundred characters at most."""
    text = text.strip().replace("\n", " / ")
    return text if len(text) <= characters else text[:characters] + " ..."
