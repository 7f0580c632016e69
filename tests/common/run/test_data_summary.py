"""`common/run/data_summary.py` and `common/lm/mask.py`: what a run keeps of its data."""

import pytest
from common.data.examples import Conversation, Prompt
from common.data.read import Data
from common.data.rows import Faults
from common.lm.chat import tokenize
from common.lm.generate import Completion
from common.lm.mask import completion_segments, segments
from common.run.data_summary import as_ranges, duplicates, from_ranges, summary


def turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([0], "0"), ([3, 4, 5], "3-5"), ([0, 2, 3, 9, 10], "0 2-3 9-10")]
)
def test_numbers_survive_as_ranges(numbers, text):
    assert as_ranges(numbers) == text
    assert from_ranges(text) == numbers


def test_a_duplicate_is_the_same_row_at_another_place():
    rows = [Conversation(f"a:{n}", turns("hi", answer)) for n, answer in enumerate("xyxx")]
    assert duplicates(rows) == 2
    assert duplicates(rows[:2]) == 0


def test_segments_are_the_text_with_and_without_loss(tokenizer):
    (example,) = tokenize(tokenizer, [Conversation("a:1", turns("2 + 2?", "四 4"))], 512, Faults())
    found = segments(tokenizer, example.input_ids.tolist(), example.completion_mask.tolist())
    assert [loss for *_, loss in found][:2] == [False, True]
    assert found[1][0] == "四 4<|im_end|>"
    assert sum(count for _, count, _ in found) == len(example.input_ids)
    assert sum(count for _, count, loss in found if loss) == int(example.completion_mask.sum())
    assert "".join(text for text, *_ in found) == tokenizer.decode(example.input_ids)


def test_of_a_sampled_completion_only_its_own_tokens_carry_loss_unless_it_is_left_out(tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in ("How much?", " 4<|im_end|>")]
    completion = Completion(" 4", True, *ids)
    expected = [("How much?", len(ids[0])), (" 4<|im_end|>", len(ids[1]))]
    assert completion_segments(tokenizer, completion) == [
        (*part, loss) for part, loss in zip(expected, (False, True), strict=True)
    ]
    assert [loss for *_, loss in completion_segments(tokenizer, completion, carries_loss=False)] == [False, False]


def test_a_summary_counts_what_is_there_and_finds_what_is_held_out(tokenizer):
    rows = [Conversation(f"my.jsonl:{n}", turns("hi" * n, "yes")) for n in range(1, 8)]
    examples = list(tokenize(tokenizer, rows, 12, Faults()))
    found = summary(Data(rows, "messages", "sha", ["a note"]), tokenizer, examples[:4], rows[4:6], examples[6:])
    assert (found["rows"], found["trained"], found["held_out"], found["held_out_rows"]) == (7, 4, 3, "4-6")
    assert (found["format"], found["notes"], found["duplicates"]) == ("messages", ["a note"], 0)
    lengths = [len(example.input_ids) for example in examples[:4]]
    assert found["tokens"]["longest"] == max(lengths)
    assert found["tokens"]["mean"] == round(sum(lengths) / 4, 1)
    assert found["truncated"] == sum(example.full_length > 12 for example in examples[:4]) > 0
    assert [example["place"] for example in found["examples"]] == ["my.jsonl:1", "my.jsonl:2", "my.jsonl:3"]


def test_prompts_carry_no_loss_and_are_counted_in_tokens(tokenizer):
    prompts = [Prompt(f"a:{n}", [{"role": "user", "content": "hi"}]) for n in range(3)]
    found = summary(Data(prompts, "prompt", "sha", []), tokenizer, prompts[1:], prompts[:1])
    assert found["examples"] == []
    assert (found["tokens"]["of"], found["tokens"]["measured"], found["held_out_rows"]) == ("prompt", 2, "0")
    assert found["tokens"]["median"] > 3
