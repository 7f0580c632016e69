"""Feedback as tokens: prompt, completion and label."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.data.examples import Conversation, Feedback
from common.data.rows import Faults
from common.lm.chat import tokenize
from common.rewards.tokens import answer_span

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


def tokenize_feedback(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Feedback], max_length: int, faults: Faults
) -> Iterator[TokenFeedback]:
    """Render and tokenize feedback, truncated to the first `max_length` tokens.

    A row is a fault when the template refuses it, and when its prompt fills `max_length`.
    """
    conversations = [Conversation(row.place, [*row.prompt, *row.completion], row.tools) for row in rows]
    labels = {row.place: row.label for row in rows}
    for example in tokenize(tokenizer, conversations, sys.maxsize, faults):
        start, stop = answer_span(example)
        if start >= max_length:
            faults.add(
                example.place,
                f"the prompt alone has {start} tokens, so no completion is within {max_length}: the row would teach "
                "nothing; shorten it or raise --max-length",
            )
            continue
        prompt, completion = example.input_ids[:start].tolist(), example.input_ids[start : min(stop, max_length)]
        yield TokenFeedback(example.place, prompt, completion.tolist(), labels[example.place], stop)
