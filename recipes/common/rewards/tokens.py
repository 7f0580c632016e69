"""Pairs and ratings as the tokens that a reward model reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.data.examples import Conversation, Pair, Rating
from common.data.rows import Faults
from common.data.turns import Turns
from common.lm.chat import Example, tokenize, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row as the model reads it: one completion and its score, or the chosen and the rejected completion."""

    place: str
    answers: list[list[int]]  # 1 or 2 of (T,): prompt and completion, up to the end token
    lengths: list[int]  # tokens of each completion alone
    score: float | None
    full_length: int = 0  # of the longest answer with its prompt, before truncation
    lost: tuple[str, ...] = ()  # what the chat template drops of the row
    teaches: bool = True  # is a token of each completion left after truncation?


def as_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Pair | Rating],
    max_length: int,
    max_truncated: float,
    whole: bool,
) -> tuple[list[Tokens], str | None]:
    """Each row's completions after their prompt, as token ids; and lines about rows that are not whole, or None.

    `whole` is for a sequence classifier: it reads the whole rendering, with what the template writes after the end
    token. A row is left out when truncation leaves nothing of a completion. Raises InputError for a row that teaches
    nothing otherwise, and where `trainable` does.
    """
    faults = Faults()
    conversations = [
        Conversation(row.place, row.prompt + answer, row.tools, frozenset(range(len(row.prompt))))
        for row in rows
        for answer in answers_of(row)
    ]
    following = iter(list(tokenize(tokenizer, conversations, max_length, faults)))
    faults.stop()
    tokens = []
    for row in rows:
        own = [next(following) for _ in answers_of(row)]
        teaches = all(example.teaches for example in own)
        spans = [answer_span(example) if teaches else (0, 0) for example in own]
        ids = [
            example.input_ids[: None if whole else stop].tolist() for example, (_, stop) in zip(own, spans, strict=True)
        ]
        if teaches and len(ids) == 2 and ids[0] == ids[1]:
            faults.add(row.place, f"chosen and rejected are the same in the first {max_length} tokens")
        score = row.score if isinstance(row, Rating) else None
        longest = max(example.full_length for example in own)
        lost = tuple(sorted({kind for example in own for kind in example.lost}))
        lengths = [stop - start for start, stop in spans]
        tokens.append(Tokens(row.place, ids, lengths, score, longest, lost, teaches))
    faults.stop()
    return trainable(tokens, max_length, max_truncated, tokenizer.chat_template)


def answers_of(row: Pair | Rating) -> list[Turns]:
    """The one or two completions of a row."""
    return [row.response] if isinstance(row, Rating) else [row.chosen, row.rejected]


def answer_span(example: Example) -> tuple[int, int]:
    """Where the last run of completion tokens begins and where it stops, the end token included."""
    marked = np.flatnonzero(example.completion_mask)
    breaks = np.flatnonzero(np.diff(marked) > 1)
    return int(marked[breaks[-1] + 1 if len(breaks) else 0]), int(marked[-1]) + 1
