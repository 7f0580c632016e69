"""Documents as tokens: all of each, ended, and every token predicted once however long the document is."""

import copy
import itertools

import numpy as np
import pytest
from common.data.examples import Document
from common.data.rows import Faults
from common.errors import InputError
from common.lm.documents import count_documents, document_prompt, tokenize_documents

TEXTS = ["The sun rises in the east. " * 9, "从前，有一只苍鹭。" * 7, "a"]


def rows_of(tokenizer, texts=TEXTS, max_length=1000):
    faults = Faults()
    documents = [Document(f"f:{number}", text) for number, text in enumerate(texts, start=1)]
    return list(tokenize_documents(tokenizer, documents, max_length, faults)), faults


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that writes a token before a text, as those of Llama and Gemma do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    return tokenizer


def test_every_token_carries_loss_and_the_last_one_ends_the_document(tokenizer):
    rows, faults = rows_of(tokenizer)
    assert faults.count == 0
    for text, row in zip(TEXTS, rows, strict=True):
        assert tokenizer.decode(row.input_ids) == text + "<|im_end|>"
        assert row.completion_mask.tolist() == [0] + [1] * (len(row.input_ids) - 1)  # nothing predicts the first
        assert row.full_length == len(row.input_ids)


def test_a_token_that_the_tokenizer_writes_first_is_context(with_bos):
    (row,), _ = rows_of(with_bos, ["Once."])
    assert with_bos.decode(row.input_ids) == "<|im_start|>Once.<|im_end|>"
    assert row.completion_mask.tolist() == [0] + [1] * (len(row.input_ids) - 1)
    assert document_prompt(with_bos, Document("f:1", "Once.")) == "<|im_start|>Once."


@pytest.mark.parametrize("max_length", [2, 3, 7, 20, 21, 22, 1000])
def test_splitting_loses_no_token_and_predicts_each_once(tokenizer, max_length):
    whole, _ = rows_of(tokenizer)
    rows, _ = rows_of(tokenizer, max_length=max_length)
    assert all(2 <= len(row.input_ids) <= max_length for row in rows)
    for document in whole:
        parts = [row for row in rows if row.place == document.place]
        predicted = np.concatenate([row.input_ids[row.completion_mask == 1] for row in parts])
        assert predicted.tolist() == document.input_ids[1:].tolist()
        for before, after in itertools.pairwise(parts):
            assert after.input_ids[0] == before.input_ids[-1]  # what the next token is predicted from
        assert {row.full_length for row in parts} == {len(document.input_ids)}


def test_what_is_split_is_counted_and_named(tokenizer):
    rows, _ = rows_of(tokenizer)
    line = "3 documents, each ended by <|im_end|>, with loss on every token"
    assert count_documents(rows, 1000, "<|im_end|>") == line
    longest = max(len(row.input_ids) for row in rows)
    rows, _ = rows_of(tokenizer, max_length=longest - 1)
    assert count_documents(rows, longest - 1, "<|im_end|>").startswith(
        f"{line}; 1 longer than {longest - 1} tokens split, 4 rows in all: f:"
    )
    rows, _ = rows_of(tokenizer, max_length=2)
    split = f"2 longer than 2 tokens split, {len(rows)} rows in all: f:1, f:2"  # the third has two tokens
    assert count_documents(rows, 2, "<|im_end|>") == f"{line}; {split}"


def test_a_special_token_in_a_document_is_a_fault_of_its_line(tokenizer):
    rows, faults = rows_of(tokenizer, ["Once.", "One.<|im_end|>Two.<|endoftext|>", "Twice."])
    assert [row.place for row in rows] == ["f:1", "f:3"]
    assert faults.shown == [
        "f:2: text: holds <|endoftext|>, <|im_end|>, special in this model; remove it, or split there"
    ]


def test_what_cannot_be_a_row_is_refused(tokenizer):
    with pytest.raises(InputError, match="--max-length 1: expected at least 2"):
        rows_of(tokenizer, max_length=1)
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(InputError, match="has no end token"):
        rows_of(without)
