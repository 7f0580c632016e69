"""What a run records of its data: how many rows, how long, which are held out, and the first ones with their loss mask.

`make evaluate RUN=…` finds the held-out rows by it, and the report shows the rest.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.examples import Prompt
from common.data.read import Data
from common.lm.chat import Example, TokenPair
from common.lm.feedback import TokenFeedback
from common.lm.mask import Segment, segments
from common.lm.render import prompt_ids
from common.run.health.data import distinct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 3
SHOWN_CHARACTERS = 4_000  # of a segment
MEASURED_PROMPTS = 1_000  # prompts are rendered once more to be counted: so many of them
COMPARED_ROWS = 200_000  # rows among which duplicates are counted: a second or two

Masked = tuple[str, Sequence[int], Sequence[int]]  # a label, token ids and their loss mask, (T,) both


def summary(
    data: Data, tokenizer: "PreTrainedTokenizerBase", training: Sequence[Any], *held_out: Sequence[Any]
) -> dict[str, Any]:
    """The facts of a run's data, for run.json.

    Args:
        data: as it was read.
        training: what the run trains on: rows in tokens, or prompts.
        held_out: what it does not train on, of any kind that has a `place`.
    """
    places = {row.place for rows in held_out for row in rows}
    known = [index for index, example in enumerate(data.examples) if example.place in places]
    rows = len(data.examples)
    return {
        "rows": rows,
        "format": data.row_format,
        "notes": data.notes,
        "trained": len(training),
        "held_out": len(known),
        "held_out_rows": as_ranges(known),
        "duplicates": duplicates(data.examples) if rows <= COMPARED_ROWS else None,
        "tokens": lengths(tokenizer, training),
        "truncated": sum(row.full_length > max(map(len, _ids(row))) for row in training if hasattr(row, "full_length")),
        "examples": [
            {"place": row.place, "label": label, "segments": _clipped(segments(tokenizer, ids, mask))}
            for row in training[:SHOWN_ROWS]
            for label, ids, mask in masked(row)
        ],
    }


def lengths(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Any]) -> dict[str, Any] | None:
    """Tokens of a row, the longer completion of two; of many prompts those of a part. None without rows."""
    if not rows:
        return None
    if isinstance(rows[0], Prompt):
        rows = rows[:: -(-len(rows) // MEASURED_PROMPTS)]
        counts = [len(ids) for ids in prompt_ids(tokenizer, rows)]
    else:
        counts = [max(map(len, _ids(row))) for row in rows]
    median, high = np.percentile(counts, (50, 95))
    return {
        "of": "prompt" if isinstance(rows[0], Prompt) else "row",
        "measured": len(counts),
        "mean": round(float(np.mean(counts)), 1),
        "median": round(float(median)),
        "95th percentile": round(float(high)),
        "longest": max(counts),
    }


def duplicates(examples: Sequence[Any]) -> int:
    """How many examples are an earlier one once more, whatever their place."""
    return len(examples) - distinct(examples)


def masked(row: Any) -> Iterator[Masked]:
    """A row in tokens with its loss mask, one for each completion; nothing of a prompt, which carries none."""
    match row:
        case Example():
            yield "", row.input_ids.tolist(), row.completion_mask.tolist()
        case TokenPair():
            for label, ids in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
                yield label, [*row.prompt_ids, *ids], [0] * len(row.prompt_ids) + [1] * len(ids)
        case TokenFeedback():
            mask = [0] * len(row.prompt_ids) + [1] * len(row.completion_ids)
            yield "good" if row.label else "bad", [*row.prompt_ids, *row.completion_ids], mask
        case Prompt():
            return
        case _:  # of a reward model, which reads its score at the last token of each completion
            for ids in row.answers:
                yield "", ids, [0] * (len(ids) - 1) + [1]


def as_ranges(numbers: Iterable[int]) -> str:
    """Rising numbers as text, such as 0 3-5 9."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return " ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def from_ranges(text: str) -> list[int]:
    """The numbers that `as_ranges` wrote."""
    return [
        number
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", text)
        for number in range(int(first), int(last or first) + 1)
    ]


def _ids(row: Any) -> list[Sequence[int]]:
    return [ids for _, ids, _ in masked(row)]


def _clipped(found: list[Segment]) -> list[Segment]:
    return [
        (text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …", count, loss)
        for text, count, loss in found
    ]
