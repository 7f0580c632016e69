"""`common/rewards/tokens.py`: what a reward model reads of an answer, and where the answer is in it."""

import numpy as np
import pytest
from common.data.examples import Pair, Rating
from common.errors import InputError
from common.lm.chat import Example
from common.rewards.tokens import answer_span, as_tokens


def test_the_answer_is_the_last_run_of_marked_tokens():
    mask = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=np.int8)
    assert answer_span(Example("a", np.arange(10), mask, 10)) == (6, 9)
    assert answer_span(Example("a", np.arange(4), np.array([0, 1, 1, 1], dtype=np.int8), 4)) == (1, 4)


def test_it_reads_up_to_the_end_token_and_a_classifier_the_whole_rendering(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = [{"role": "assistant", "content": "dd"}]
    whole = tokenizer.apply_chat_template([*turns, *answer], tokenize=False)
    rows = [Rating("f:1", turns, answer, 4.0), Rating("f:2", turns[:1], answer, 2.0)]
    adapter, _ = as_tokens(tokenizer, rows, 512, 0, whole=False)
    assert tokenizer.decode(adapter[0].answers[0]) == whole.removesuffix("\n")
    assert [row.score for row in adapter] == [4.0, 2.0]
    assert adapter[0].lengths == adapter[1].lengths == [len(tokenizer("dd<|im_end|>")["input_ids"])]
    classifier, _ = as_tokens(tokenizer, rows, 512, 0, whole=True)
    assert tokenizer.decode(classifier[0].answers[0]) == whole
    pair = Pair("f:3", turns, answer, [{"role": "assistant", "content": "e e e"}])
    ((both,), _) = as_tokens(tokenizer, [pair], 512, 0, whole=False)
    assert [tokenizer.decode(ids).rpartition("assistant\n")[2] for ids in both.answers] == [
        "dd<|im_end|>",
        "e e e<|im_end|>",
    ]
    assert both.lengths[1] > both.lengths[0]


def test_answers_that_are_truncated_to_the_same_teach_nothing(tokenizer):
    pair = Pair(
        "f:7", [{"role": "user", "content": "a"}], *([{"role": "assistant", "content": "1" * n}] for n in (60, 61))
    )
    with pytest.raises(InputError, match="f:7: chosen and rejected are the same in the first 60 tokens"):
        as_tokens(tokenizer, [pair], 60, 1, whole=False)
