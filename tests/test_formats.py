"""Every format becomes the same messages, and every row that fits none says what is missing."""

import json

import pytest
from common.errors import InputError
from common.formats import FORMATS, column_map, conversations
from common.rows import Faults, Row

ASK = {"role": "user", "content": "2 + 2?"}
SAY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def convert(*rows, **options):
    faults = Faults()
    places = (Row(f"f:{number}", fields) for number, fields in enumerate(rows, start=1))
    return [item.messages for item in conversations(places, faults, **options)], faults.shown


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "2 + 2?", "output": "4"}, [ASK, SAY]),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, [{**ASK, "content": "Add.\n\n2 + 2"}, SAY]),
        ({"instruction": "2 + 2?", "input": "", "output": "4", "system": "Be brief.", "id": 7}, [SYSTEM, ASK, SAY]),
        ({"messages": [SYSTEM, ASK, SAY, ASK, SAY]}, [SYSTEM, ASK, SAY, ASK, SAY]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, SAY]}, [ASK, SAY]),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, [ASK, SAY]),
        ({"conversations": [ASK, SAY], "system": "Be brief."}, [SYSTEM, ASK, SAY]),
        ({"prompt": "2 + 2?", "completion": "4"}, [ASK, SAY]),
        ({"prompt": [SYSTEM, ASK], "completion": [SAY]}, [SYSTEM, ASK, SAY]),
        ({"prompt": [SYSTEM, ASK], "completion": "4"}, [SYSTEM, ASK, SAY]),
        (
            {"text": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
                     "<|im_start|>assistant\n4<|im_end|>\n"},
            [SYSTEM, ASK, SAY],
        ),
    ],
)  # fmt: skip
def test_every_format_becomes_messages(row, messages):
    assert convert(row) == ([messages], [])


def test_a_sharegpt_tool_call_becomes_the_call_and_its_result():
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    turns = [("human", "2 + 2?"), ("function_call", json.dumps(call)), ("observation", "4"), ("gpt", "It is 4.")]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": '[{"name": "add"}]'}
    faults = Faults()
    (conversation,) = conversations([Row("f:1", row)], faults)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert conversation.tools == [{"name": "add"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "a"}, "output: missing"),
        ({"instruction": "a", "output": 5}, "output: should be a valid string, found 5"),
        ({"instruction": "a", "output": " \n"}, "output: is empty; expected text"),
        ({"instruction": "", "output": "b"}, "instruction: is empty; expected text"),
        ({"prompt": "a", "completion": "b"}, "this row is prompt-completion, but f:1 is alpaca"),
    ],
)
def test_a_row_that_does_not_fit_names_its_field(row, says):
    good = {"instruction": "a", "output": "b"}
    messages, shown = convert(good, row, good)
    assert len(messages) == 2
    assert len(shown) == 1
    assert shown[0].startswith(f"f:2: {says}")


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([ASK], "no turn of the assistant"),
        ([ASK, {"role": "bot", "content": "4"}], "messages.1.role: should be 'system', 'user', 'assistant' or 'tool'"),
        ([ASK, {"role": "assistant", "content": ""}], "messages.1: the turn of the assistant is empty"),
        ([ASK, {"role": "assistant", "content": 4}], "messages.1.content: should be a valid string, found 4"),
        ([ASK, {"role": "assistant"}], "messages.1: the turn of the assistant is empty"),
        ("2 + 2?", "messages: should be a valid list"),
    ],
)
def test_a_turn_that_does_not_fit_names_its_place(turns, says):
    _, shown = convert({"messages": turns})
    assert len(shown) == 1
    assert shown[0].startswith(f"f:1: {says}")


def test_text_that_is_not_chatml_is_refused():
    _, shown = convert({"text": "Once upon a time"})
    assert "not ChatML from end to end: 'Once upon a time'" in shown[0]


def test_an_unknown_first_row_names_the_columns_and_the_mend():
    with pytest.raises(InputError) as error:
        convert({"question": "2 + 2?", "answer": "4"})
    assert "f:1: unknown format: the columns are question, answer" in str(error.value)
    assert "--columns prompt=question completion=answer" in str(error.value)


def test_columns_are_mapped():
    row = {"question": "2 + 2?", "answer": "4"}
    assert convert(row, columns=column_map(["prompt=question", "completion=answer"])) == ([[ASK, SAY]], [])
    with pytest.raises(InputError, match="expected OURS=THEIRS"):
        column_map(["prompt"])


def test_a_forced_format_refuses_another():
    _, shown = convert({"messages": [ASK, SAY]}, form="alpaca")
    assert shown == ["f:1: this row is messages, but --format is alpaca; a source holds one format"]


def test_every_format_has_its_columns():
    from common.formats import COLUMNS

    assert COLUMNS.keys() == FORMATS.keys()
