"""Which tokens carry loss, as text in segments: to be shown, and kept without the tokenizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.lm.generate import Completion

Segment = tuple[str, int, bool]  # text with its special tokens, how many tokens, and whether the loss is on them


def segments(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], mask: Sequence[int]) -> list[Segment]:
    """Token ids, (T,), in runs of equal `mask`, (T,); 1 where a token carries loss."""
    found: list[Segment] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            found.append((tokenizer.decode(list(ids[start:end])), end - start, bool(mask[start])))
            start = end
    return found


def completion_segments(
    tokenizer: "PreTrainedTokenizerBase", completion: "Completion", carries_loss: bool = True
) -> list[Segment]:
    """A prompt and its sampled completion, which carries the loss unless it is left out of it."""
    spans = ((completion.prompt_ids, False), (completion.completion_ids, carries_loss))
    return [(tokenizer.decode(list(ids)), len(ids), loss) for ids, loss in spans if ids]
