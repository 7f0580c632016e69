"""One reader of turns for every format: calls as objects, marks honoured, and no key dropped without a word."""

import json

import pytest
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS
from common.data.read import as_examples
from common.data.rows import Faults, Row

ASK = {"role": "user", "content": "Is it warm?"}
SAY = {"role": "assistant", "content": "Yes."}
RESULT = {"role": "tool", "content": "25"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": [1, {"a": None}]}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def read(*rows, formats=FORMATS):
    faults = Faults()
    places = [Row(f"f:{number}", row) for number, row in enumerate(rows, start=1)]
    return list(as_examples(places, faults, formats)), faults


def one(*turns, **columns):
    """The conversation of a row of messages, and its notes."""
    (example,), faults = read({"messages": list(turns), **columns})
    return example, faults.notes()


def refusal(*turns, **columns):
    found, faults = read({"messages": list(turns), **columns})
    assert found == []
    assert len(faults.shown) == 1
    return faults.shown[0]


def with_text_arguments(turn: dict) -> dict:
    call = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    return {**turn, "tool_calls": [call]}


SHAREGPT_CALL = {"from": "function_call", "value": json.dumps(with_text_arguments(CALLED)["tool_calls"][0]["function"])}
OLD_CALL = {"role": "assistant", "function_call": with_text_arguments(CALLED)["tool_calls"][0]["function"]}


@pytest.mark.parametrize("turn", [CALLED, with_text_arguments(CALLED), SHAREGPT_CALL, OLD_CALL,
                                  {**CALLED, "tool_calls": json.dumps([CALL])},
                                  {"role": "tool_call", "content": json.dumps([CALL["function"]])}])  # fmt: skip
def test_arguments_are_an_object_in_every_format_however_the_row_writes_the_call(turn):
    """As JSON text, which the OpenAI API returns, a chat template would encode them twice."""
    turns = [ASK, turn, RESULT, SAY]
    wanted = [ASK, CALLED, RESULT, SAY]
    assert one(*turns)[0].messages == wanted
    (example,), _ = read({"conversations": turns})
    assert example.messages == wanted
    (example,), _ = read({"prompt": "Is it warm?", "completion": turns[1:]})
    assert example.messages == wanted
    (example,), _ = read({"prompt": turns[:3], "chosen": "Yes.", "rejected": "No."}, formats=PAIR_FORMATS)
    assert example.prompt == wanted[:3]
    (example,), _ = read({"prompt": [ASK], "chosen": [turn], "rejected": "No."}, formats=PAIR_FORMATS)
    assert example.chosen == [CALLED]
    (example,), _ = read({"conversations": turns[:3], "chosen": SAY, "rejected": "No."}, formats=PAIR_FORMATS)
    assert example.prompt == wanted[:3]
    (example,), _ = read({"chosen": turns, "rejected": [ASK, {**SAY, "content": "No."}]}, formats=PAIR_FORMATS)
    assert example.chosen == wanted[1:]
    (example,), _ = read({"prompt": turns[:3], "answer": "Yes."}, formats=PROBLEM_FORMATS)
    assert example.prompt == wanted[:3]
    (example,), _ = read({"prompt": [ASK], "response": [turn], "score": 1}, formats=RATING_FORMATS)
    assert example.response == [CALLED]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"city": ', "the arguments of a function call must be JSON: expecting value"),
        ("", "the arguments of a function call must be JSON"),
        ("[1]", "a function call must hold a name and arguments"),
        ("7", "a function call must hold a name and arguments"),
        (None, "a function call must hold a name and arguments"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ('{"a": NaN}', "NaN or an infinite number"),
        ('{"a": 1e999}', "NaN or an infinite number"),
        ({"a": float("inf")}, "NaN or an infinite number"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ({"a": b"x"}, "bytes is not JSON serializable"),  # of a Parquet file
    ],
)
def test_arguments_that_are_no_json_object_are_a_fault(arguments, says):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    assert says in refusal(ASK, {"role": "assistant", "tool_calls": [call]}, RESULT, SAY)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False},
                                  {"loss": False}, {"loss_scale": 0}, {"weight": 0, "loss": False}])  # fmt: skip
def test_a_turn_that_is_marked_carries_no_loss(mark):
    assert one(ASK, {**SAY, **mark}, ASK, SAY)[0].untrained == {1}
    assert one(ASK, {**SAY, **mark}, ASK, SAY)[0].messages == [ASK, SAY, ASK, SAY]
    turns = [{"from": "human", "value": "Is it warm?"}, {"from": "gpt", "value": "Yes.", **mark}]
    (example,), faults = read({"conversations": [*turns, ASK, SAY], "system": "Be brief."})
    assert example.untrained == {2}  # the system prompt comes first
    assert faults.notes() == []


def test_a_mark_to_train_changes_nothing_and_a_user_may_be_marked_not_to():
    for mark in ({"weight": 1}, {"train": True}, {"loss": None}):
        assert one(ASK, {**SAY, **mark})[0].untrained == frozenset()
    assert one({**ASK, "weight": 0}, SAY)[0].untrained == frozenset()


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([ASK, {**SAY, "weight": 0.5}, ASK, SAY], "weight is '0.5'; expected 0 or 1"),
        ([ASK, {**SAY, "train": "no"}, ASK, SAY], "train is 'no'; expected 0 or 1"),
        ([ASK, {**SAY, "weight": 0, "train": True}], "weight and train contradict each other"),
        ([ASK, {**SAY, "weight": 0}], "no turn of the assistant carries loss"),
        ([{**ASK, "train": True}, SAY], "the turn of the user is marked to carry loss"),
        ([ASK, {**SAY, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}], "train_detail is not"),
        ([ASK, {**SAY, "mask": [0, 1]}], "mask is not supported"),
        ([ASK, {**SAY, "reasoning": "a", "reasoning_content": "b"}], "reasoning and reasoning_content contradict"),
        ([{**ASK, "from": "gpt"}, SAY], "role and from contradict each other"),
        ([ASK, {**SAY, "value": "No."}], "content and value contradict each other"),
        ([ASK, {**SAY, "tool_calls": [CALL], "function_call": {"name": "b", "arguments": "{}"}}], "contradict each"),
        ([{**ASK, "tool_calls": [CALL]}, SAY], "the turn of the user calls functions"),
        ([{**ASK, "reasoning": "Hm."}, SAY], "the turn of the user holds reasoning"),
        ([ASK, {**SAY, "tool_calls": [{**CALL, "type": "custom"}]}], "a call of type 'custom'"),
        ([{**ASK, "images": ["a.png"]}, SAY], "holds images; only text is trained"),
        ([{**ASK, "content": [{"type": "image_url", "image_url": "x"}]}, SAY], "a part of type 'image_url'; only text"),
        ([{**ASK, "content": [{"type": "text"}]}, SAY], "a part of type 'text' without its text"),
        ([{**ASK, "content": ["Is it warm?"]}, SAY], "a part that is no object"),
        ([{"role": "bot", "content": "a"}, SAY], "messages.0.role: unknown role 'bot'; expected one of system, "),
        ([{"role": "function_call", "content": ""}, SAY], "a function call must hold a name and arguments"),
    ],
)
def test_what_cannot_be_trained_as_the_turn_says_is_refused(turns, says):
    assert says in refusal(*turns)


def test_a_mark_is_refused_where_it_cannot_be_honoured():
    """A pair's completions carry loss as a whole."""
    row = {"prompt": [ASK], "chosen": [{**SAY, "weight": 0}], "rejected": [{**SAY, "content": "No."}]}
    found, faults = read(row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}, formats=PAIR_FORMATS)
    assert found == []
    assert [shown.partition(": a turn is marked")[0] for shown in faults.shown] == ["f:1: chosen", "f:2: rejected"]
    (example,), _ = read({"prompt": [ASK, {**SAY, "weight": 0}, ASK], "answer": "4"}, formats=PROBLEM_FORMATS)
    assert example.prompt == [ASK, SAY, ASK]  # of a prompt, nothing carries loss


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key):
    assert one(ASK, {**SAY, key: "Warm is 25."})[0].messages[1] == {**SAY, "reasoning_content": "Warm is 25."}


@pytest.mark.parametrize(
    ("role", "ours"),
    [
        ("developer", "system"),
        ("human", "user"),
        ("model", "assistant"),
        ("function", "tool"),
        ("tool_response", "tool"),
    ],
)
def test_roles_of_other_tools_have_our_names(role, ours):
    turns = [{"role": "system", "content": "a"}, ASK, CALLED, RESULT, SAY]
    turns = [{**turn, "role": role} if turn["role"] == ours and turn is not CALLED else turn for turn in turns]
    assert [turn["role"] for turn in one(*turns)[0].messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_an_unknown_key_of_a_turn_is_noted_and_an_empty_one_is_not():
    turn = {**SAY, "id": 7, "refusal": None, "annotations": [], "tool_calls": [{**CALL, "index": 0}]}
    example, notes = one(
        {**ASK, "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}, turn, turn
    )
    assert example.messages[1] == {**SAY, "tool_calls": [CALL]}
    assert notes == [
        "the key 'cache_control' of a part of a turn is not read (in 1 row, the first is f:1)",
        "the key 'id' of a turn is not read (in 1 row, the first is f:1)",
        "the key 'index' of a function call is not read (in 1 row, the first is f:1)",
    ]


def test_an_opening_turn_of_the_assistant_carries_no_loss_and_is_noted():
    example, notes = one(SAY, ASK, SAY)
    assert example.untrained == {0}
    assert notes == ["the opening turn is the assistant's and answers no prompt: it carries no loss"
                     " (in 1 row, the first is f:1)"]  # fmt: skip
    assert "no turn of the assistant carries loss" in refusal(SAY, ASK)


def test_a_last_turn_that_teaches_nothing_is_noted():
    assert one(ASK, SAY, ASK)[1] == [
        "the last turn is not the assistant's: nothing after the assistant's last one is learned "
        "(in 1 row, the first is f:1)"
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, SAY]},
        {"conversations": [ASK, SAY]},
        {"prompt": "Is it warm?", "completion": "Yes."},
        {"instruction": "Is it warm?", "output": "Yes."},
    ],
)
def test_system_and_tools_are_columns_of_every_format(row):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    system = {"role": "system", "content": "Be brief."}
    (example,), _ = read({**row, "system": "Be brief.", "tools": json.dumps(tools)})
    assert (example.messages, example.tools) == ([system, ASK, SAY], tools)
    (example,), _ = read({**row, "system": " ", "functions": [{"name": "weather"}]})
    assert (example.messages, example.tools) == ([ASK, SAY], tools)
    found, faults = read({**row, "functions": [{"name": "a"}], "tools": tools})
    assert (found, faults.shown) == ([], ["f:1: functions: there are tools too; remove one"])


def test_a_system_column_beside_another_system_turn_is_refused():
    turn = {"role": "system", "content": "Be brief."}
    assert "two different system prompts" in refusal(turn, ASK, SAY, system="Be long.")
    assert one(turn, ASK, SAY, system="Be brief.")[0].messages == [turn, ASK, SAY]


@pytest.mark.parametrize(
    ("tools", "says"),
    [("[", "tools must be JSON"), ({"name": "a"}, "tools: expected a list"),
     ([{"a": float("nan")}], "tools must be JSON"), ('[{"name": "a", "name": "b"}]', "the key 'name' is there twice")],
)  # fmt: skip
def test_tools_that_are_no_json_are_a_fault(tools, says):
    assert says in refusal(ASK, SAY, tools=tools)


def test_messages_as_json_text_are_read():
    """As CSV files have them."""
    text = json.dumps([ASK, SAY])
    for column in ("messages", "conversations"):
        (example,), faults = read({column: text})
        assert example.messages == [ASK, SAY]
        assert faults.notes() == []
    assert "messages: a list as text must be JSON" in read({"messages": "[{'role': 'user'}]"})[1].shown[0]


def test_a_prompt_that_is_messages_as_json_text_is_read_as_such_and_noted():
    row = {"prompt": json.dumps([ASK]), "completion": json.dumps([SAY])}
    (example,), faults = read(row)
    assert example.messages == [ASK, SAY]
    assert [note.partition(" (")[0] for note in faults.notes()] == [
        "completion: JSON text is read as the messages that it holds",
        "prompt: JSON text is read as the messages that it holds",
    ]
    _, faults = read({**row, "prompt": str([ASK])})
    assert faults.shown == [
        "f:1: prompt: is a list of messages as Python writes it; write the list, or that list as JSON text"
    ]


@pytest.mark.parametrize("text", ['[{"role": "admin", "name": "Bo"}]', '[{"role": "user"', "[[1]]", '[{"a": 1}]', "[]"])
def test_text_that_only_looks_like_messages_stays_text(text):
    (example,), faults = read({"prompt": "Write JSON.", "completion": text})
    assert example.messages[1]["content"] == text
    assert faults.notes() == []
