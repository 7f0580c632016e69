"""Documents as tokens: each ends with the tokenizer's end token, and a long one becomes several rows.

Every token but a document's first is predicted exactly once, from what stands before it in its row. So a row after the
first of its document begins with the last token of the row before it, as context without loss.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.data.examples import Document
from common.data.rows import Faults
from common.errors import InputError
from common.lm.chat import BATCH, Example, IdCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def document_end(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The token that ends a document: the tokenizer's end token. Raises InputError when it has none."""
    if tokenizer.eos_token is None:
        raise InputError("the model's tokenizer has no end token (eos_token), so nothing would separate documents")
    return str(tokenizer.eos_token)


def document_begin(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer writes before a text, such as <bos>; none for many models."""
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]


def document_prompt(tokenizer: "PreTrainedTokenizerBase", document: Document) -> str:
    """The text that the model continues: what the tokenizer writes before a text, and the document."""
    return "".join(tokenizer.convert_ids_to_tokens(document_begin(tokenizer))) + document.text


def document_ids(
    tokenizer: "PreTrainedTokenizerBase", documents: Iterable[Document], faults: Faults
) -> Iterator[tuple[str, np.ndarray]]:
    """The place of each document and all its token ids, (T,) int32, the end token included.

    A document that holds a special token of the model is a fault. Raises InputError without an end token.
    """
    end, begin = document_end(tokenizer), document_begin(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    documents, check = iter(documents), IdCheck(tokenizer)
    while batch := list(itertools.islice(documents, BATCH)):
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            if found := special.keys() & set(ids):
                tokens = ", ".join(sorted(special[id] for id in found))
                faults.add(document.place, f"text: holds {tokens}, special in this model; remove it, or split there")
            elif check.passes(document.place, [*ids, end_id], faults):
                yield document.place, np.array([*begin, *ids, end_id], dtype=np.int32)


def tokenize_documents(
    tokenizer: "PreTrainedTokenizerBase", documents: Iterable[Document], max_length: int, faults: Faults
) -> Iterator[Example]:
    """Rows of at most `max_length` tokens. `full_length` of each is the length of its whole document.

    Faults and errors are those of `document_ids`; and InputError for a `max_length` below 2, which predicts nothing.
    """
    if max_length < 2:
        raise InputError(f"--max-length {max_length}: expected at least 2; a token is predicted from those before it")
    for place, ids in document_ids(tokenizer, documents, faults):
        yield from _rows(place, ids, max_length)


def _rows(place: str, ids: np.ndarray, max_length: int) -> Iterator[Example]:
    for start in range(0, len(ids) - 1, max_length - 1):
        row = ids[start : start + max_length]
        mask = np.ones(len(row), dtype=np.int8)
        mask[0] = 0  # nothing stands before it, or it is the last token of the row before
        yield Example(place, row, mask, len(ids))


def count_documents(rows: Sequence[Example], max_length: int, end: str) -> str:
    """A line that counts the documents of `rows`, in order as `tokenize_documents` gave them, and those split."""
    documents, split, index = 0, [], 0
    while index < len(rows):
        parts = -(-(rows[index].full_length - 1) // (max_length - 1))
        documents += 1
        split += [rows[index]] if parts > 1 else []
        index += parts
    line = f"{documents} documents, each ended by {end}, with loss on every token"
    if split:
        places = ", ".join(row.place for row in split[:5]) + (", ..." if len(split) > 5 else "")
        line += f"; {len(split)} longer than {max_length} tokens split, {len(rows)} rows in all: {places}"
    return line
