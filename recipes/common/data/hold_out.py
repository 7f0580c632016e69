"""Examples that are kept out of training: some of one run's, or the same prompts of every stage of a pipeline."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from common.data.examples import Conversation, Document, Example, Prompt
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS, SFT_FORMATS, detect
from common.data.read import read_examples
from common.data.rows import Faults, find_source, read_rows
from common.errors import InputError
from common.run.files import write_jsonl

T = TypeVar("T")

SHARE, MOST = 0.05, 200  # of the prompts of a data set that are held out: a share, and at most so many


def hold_out(rows: list[T], count: int, order: random.Random) -> tuple[list[T], list[T]]:
    """`count` rows drawn by `order`, and the rest; both keep the order they had."""
    drawn = set(order.sample(range(len(rows)), count))
    taken = [row for index, row in enumerate(rows) if index in drawn]
    return taken, [row for index, row in enumerate(rows) if index not in drawn]


def hold_out_by(key: Callable[[T], Any], rows: list[T], count: int, order: random.Random) -> tuple[list[T], list[T]]:
    """All rows of `count` keys drawn by `order`, and the rest: two completions of a prompt are held out together."""
    drawn = set(hold_out(list(dict.fromkeys(map(key, rows))), count, order)[0])
    return [row for row in rows if key(row) in drawn], [row for row in rows if key(row) not in drawn]


def hold_out_share(rows: list[T], ratio: float, order: random.Random, what: str = "rows") -> tuple[list[T], list[T]]:
    """The share --eval-ratio of the rows drawn by `order`, and the rest. Raises InputError as `eval_count`."""
    return hold_out(rows, eval_count(len(rows), ratio, what), order)


def eval_count(rows: int, ratio: float, what: str = "rows") -> int:
    """How many of the rows --eval-ratio holds out: at least one, unless it is 0.

    Raises InputError when none would be left to train on.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"--eval-ratio {ratio:g}: expected a share of the {what}, at least 0 and less than 1")
    count = max(1, round(rows * ratio)) if ratio else 0
    if count >= rows:
        raise InputError(
            f"--eval-ratio {ratio:g}: {count} of {rows} {what} would be held out, and none is left to train on; give "
            "more data, or --eval-ratio 0"
        )
    return count


@dataclass(frozen=True)
class DataSet:
    """The data of a stage: its source, the example that each row of it is, and names of its columns, to ours."""

    source: str
    examples: list[Any]
    columns: dict[str, str]


def hold_out_prompts(
    data: dict[str, DataSet], files: list[str], folder: Path
) -> tuple[dict[str, DataSet], dict[str, list[Example]]]:
    """The data of every stage without the prompts that are held out; and the held-out examples, by their file.

    Held out are the prompts of `files`. Where there are none it is SHARE of the prompts of every data set, at most
    MOST, chosen by a hash: the same ones whatever the order of the rows. A row without an answer to compare with is
    not chosen. A prompt that is held out of one data set is held out of all. What is chosen is written to
    folder/data, its columns under our names, and so is a data set that loses rows by it, its columns as they were.
    """
    held_out = {file: read_held_out(file) for file in files}
    if not files:
        for name, one in data.items():
            chosen = _choose(one)
            if not chosen:
                print(f"{name}: no row of {one.source} has an answer; nothing is held out of it")
                continue
            file = _copy(one.source, folder / "data" / f"{name}-heldout.jsonl", chosen, one.columns)
            held_out[file] = read_held_out(file)
            print(f"{name}: {len(chosen)} prompts of {one.source} are held out, in {file}")
    keys = {prompt_key(example) for examples in held_out.values() for example in examples}
    return {name: _without(name, one, keys, folder) for name, one in data.items()}, held_out


def prompt_key(example: Example) -> str:
    """A hash of the user's turns in a prompt; of a conversation, of those before the assistant's first turn; of a
    document, of its text."""
    if isinstance(example, Document):
        return hashlib.sha256(example.text.strip().encode()).hexdigest()
    turns = example.messages if isinstance(example, Conversation) else example.prompt
    texts = []
    for turn in turns:
        if turn["role"] == "assistant" and isinstance(example, Conversation):
            break
        if turn["role"] == "user":
            texts.append(str(turn["content"]).strip())
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_held_out(name: str) -> list[Any]:
    """Pairs, feedback, ratings, conversations, documents, or prompts with gold answers, as the first row is."""
    source, faults = find_source(name), Faults()
    first = next(read_rows(source, faults), None)
    faults.stop()
    fields = first.fields if first else {}
    if detect(fields, PAIR_FORMATS):
        formats = PAIR_FORMATS
    elif detect(fields, RATING_FORMATS):
        formats = RATING_FORMATS
    elif detect(fields, FEEDBACK_FORMATS):
        formats = FEEDBACK_FORMATS
    elif detect(fields, PROBLEM_FORMATS) in (None, "prompt", "instruction") and detect(fields, SFT_FORMATS):
        formats = SFT_FORMATS
    else:
        formats = PROBLEM_FORMATS
    return read_examples(source, formats).examples


def _choose(data: DataSet) -> set[int]:
    """The index of one example of each prompt to hold out."""
    by_prompt: dict[str, int] = {}
    for index, example in enumerate(data.examples):
        if not isinstance(example, Prompt) or example.answer is not None:
            by_prompt.setdefault(prompt_key(example), index)
    count = min(MOST, max(1, round(len(by_prompt) * SHARE)))
    return {by_prompt[key] for key in sorted(by_prompt)[:count]}


def _without(name: str, data: DataSet, keys: set[str], folder: Path) -> DataSet:
    """The data without the rows whose prompt is one of `keys`, in a file of its own; itself where there are none."""
    kept = [index for index, example in enumerate(data.examples) if prompt_key(example) not in keys]
    left_out = len(data.examples) - len(kept)
    if not left_out:
        return data
    if not kept:
        raise InputError(f"{data.source}: all its prompts are held-out ones, and nothing is left to train {name} on")
    file = _copy(data.source, folder / "data" / f"{name}-train.jsonl", set(kept), {})
    print(f"{name}: {left_out} rows with held-out prompts are left out, {len(kept)} train, in {file}")
    return replace(data, source=file, examples=[data.examples[index] for index in kept])


def _copy(source: str, file: Path, chosen: set[int], columns: dict[str, str]) -> str:
    """Write the rows at the indices `chosen` to a file, some columns under another name; the name of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [row.fields for index, row in enumerate(read_rows(find_source(source), Faults())) if index in chosen]
    write_jsonl(file, ({columns.get(name, name): value for name, value in fields.items()} for fields in rows))
    return str(file)
