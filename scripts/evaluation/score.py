"""Log-probabilities of rows, with a progress bar."""

from typing import Any

from common.run.progress import bar

READ = 4  # rows whose tokens are scored at once


def score(model: Any, tokenizer: Any, rows: list[tuple[list[int], list[int]]], what: str) -> list[Any]:
    """`score_tokens` of all rows, with a progress bar."""
    from common.lm.log_probs import score_tokens

    scored = []
    with bar(what, len(rows)) as advance:
        for first in range(0, len(rows), READ):
            scored += score_tokens(model, rows[first : first + READ], tokenizer.pad_token_id, READ)
            advance(len(rows[first : first + READ]))
    return scored
