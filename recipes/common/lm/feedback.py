"""Feedback as tokens: prompt, completion and label."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.data.examples import Conversation, Feedback
from common.data.rows import Faults
from common.lm.chat import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenFeedback:
    """A tokenized row of feedback. The prompt is context; the completion carries loss, end token included."""

    place: str
    prompt_ids: list[int]  # (P,)
    completion_ids: list[int]  # (C,)
    label: bool
    full_length: int  # P + C before truncation
    lost: tuple[str, ...] = ()  # what the chat template drops of the row

    @property
    def teaches(self) -> bool:
        """Is a token of the completion left after truncation?"""
        return bool(self.completion_ids)


def tokenize_feedback(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Feedback], max_length: int, faults: Faults
) -> Iterator[TokenFeedback]:
    """Render and tokenize feedback, truncated to the first `max_length` tokens.

    A row is a fault when the template refuses it. One whose prompt fills `max_length` has an empty completion:
    `trainable` counts it.
    """
    conversations = [
        Conversation(row.place, [*row.prompt, *row.completion], row.tools, frozenset(range(len(row.prompt))))
        for row in rows
    ]
    labels = {row.place: row.label for row in rows}
    for example in tokenize(tokenizer, conversations, sys.maxsize, faults):
        marked = np.flatnonzero(example.completion_mask)
        start, stop = int(marked[0]), int(marked[-1]) + 1
        prompt, completion = example.input_ids[:start].tolist(), example.input_ids[start : min(stop, max_length)]
        yield TokenFeedback(example.place, prompt, completion.tolist(), labels[example.place], stop, example.lost)
