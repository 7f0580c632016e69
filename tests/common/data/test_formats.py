"""Every format becomes the same messages, and every row that fits none says what is missing."""

import json

import pytest
from common.data.examples import Pair, Prompt, Rating
from common.data.formats import (
    FORMATS,
    PAIR_FORMATS,
    PROBLEM_FORMATS,
    PROMPT_FORMATS,
    RATING_FORMATS,
    SFT_FORMATS,
    detect,
)
from common.data.prompts import as_prompt
from common.data.read import as_examples, column_map
from common.data.rows import Faults, Row, find_source, read_rows
from common.errors import InputError
from conftest import ROOT

ASK = {"role": "user", "content": "2 + 2?"}
SAY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def convert(*rows, **options):
    faults = Faults()
    places = (Row(f"f:{number}", fields) for number, fields in enumerate(rows, start=1))
    return [item.messages for item in as_examples(places, faults, FORMATS, **options)], faults.shown


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
        ({"prompt": "2 + 2?", "completion": [ASK, SAY]}, [ASK, SAY]),  # the prompt again
        (
            {"text": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
                     "<|im_start|>assistant\n4<|im_end|>\n"},
            [SYSTEM, ASK, SAY],
        ),
    ],
)  # fmt: skip
def test_every_format_becomes_messages(row, messages):
    assert convert(row) == ([messages], [])


def test_history_comes_before_the_instruction_and_carries_loss():
    """As LLaMA-Factory defines it: answers in the history are learned too."""
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "Be brief."}
    before = [{**ASK, "content": "a"}, {**SAY, "content": "b"}]
    turns = [SYSTEM, *before, {**ASK, "content": "Add.\n\n2 + 2"}, SAY]
    for history in ([["a", "b"]], '[["a", "b"]]'):
        (example,), shown = read(FORMATS, {**row, "history": history})
        assert (example.messages, example.untrained, shown) == (turns, frozenset(), [])
    for nothing in (None, [], "", "[]"):
        assert len(read(FORMATS, {**row, "history": nothing})[0][0].messages) == 3
    (example,), _ = read(PROBLEM_FORMATS, {"instruction": "c", "history": [["a", "b"]]})
    assert example.prompt == [*before, {**ASK, "content": "c"}]
    for wrong in ([["a"]], [["a", "b", "c"]]):
        assert read(FORMATS, {**row, "history": wrong})[1] == ["f:1: history: expected pairs of a prompt and an answer"]
    assert read(FORMATS, {**row, "history": [["a", " "]]})[1] == ["f:1: history.0.1: is empty; expected text"]


def test_the_assistants_turns_in_a_prompt_are_context():
    row = {"prompt": [ASK, SAY, ASK], "completion": [SAY]}
    (example,), _ = read(FORMATS, row)
    assert (example.messages, example.untrained) == ([ASK, SAY, ASK, SAY], {1})
    (example,), _ = read(FORMATS, {**row, "prompt": [ASK, {**SAY, "weight": 1}, ASK]})
    assert (example.messages, example.untrained) == ([ASK, SAY, ASK, SAY], frozenset())


def test_a_sharegpt_tool_call_becomes_the_call_and_its_result():
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    turns = [("human", "2 + 2?"), ("function_call", json.dumps(call)), ("observation", "4"), ("gpt", "It is 4.")]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": '[{"name": "add"}]'}
    faults = Faults()
    (conversation,) = as_examples([Row("f:1", row)], faults, FORMATS)
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
        ([ASK, {"role": "bot", "content": "4"}], "messages.1.role: unknown role 'bot'; expected one of system"),
        ([ASK, {"role": "assistant", "content": ""}], "messages.1: the turn of the assistant is empty"),
        ([ASK, {"role": "assistant", "content": 4}], "messages.1.content: should be a valid string, found 4"),
        ([ASK, {"role": "assistant"}], "messages.1: the turn of the assistant is empty"),
        ("2 + 2?", "messages: a list as text must be JSON"),
    ],
)
def test_a_turn_that_does_not_fit_names_its_place(turns, says):
    _, shown = convert({"messages": turns})
    assert len(shown) == 1
    assert shown[0].startswith(f"f:1: {says}")


def test_text_around_the_turns_of_chatml_is_refused():
    _, shown = convert({"text": "Once upon a time\n<|im_start|>user\n2 + 2?<|im_end|>\n"})
    assert "not ChatML from end to end: 'Once upon a time'" in shown[0]


def test_an_unknown_first_row_names_the_columns_and_the_fix():
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
    _, shown = convert({"messages": [ASK, SAY]}, row_format="alpaca")
    assert shown == ["f:1: this row is messages, but --format is alpaca; a source holds one format"]


@pytest.mark.parametrize("known", [SFT_FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS])
def test_no_format_hides_another(known):
    """A row with exactly the columns of a format is of that format, whatever others stand before it."""
    for name, form in known.items():
        text = "<|im_start|>" if name == "chatml-text" else "x"  # which text is, what it holds tells
        assert detect(dict.fromkeys(form.columns, text), known) == name


def read(formats, *rows, **options):
    faults = Faults()
    places = (Row(f"f:{number}", fields) for number, fields in enumerate(rows, start=1))
    return list(as_examples(places, faults, formats, **options)), faults.shown


WRONG = {"role": "assistant", "content": "5"}
CALLED = {"role": "tool", "content": "5"}
HUMAN, GPT = {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, [ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [SAY], "rejected": [WRONG]}, [SYSTEM, ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": "4", "rejected": [WRONG]}, [SYSTEM, ASK]),
        # UltraFeedback's way: the prompt as text, and again as the first turn of both answers.
        ({"prompt": "2 + 2?", "chosen": [ASK, SAY], "rejected": [ASK, WRONG]}, [ASK]),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "5"}}, [ASK]),
        ({"conversations": [HUMAN], "system": "Be brief.", "chosen": "4", "rejected": WRONG}, [SYSTEM, ASK]),
        ({"instruction": "2 + 2?", "chosen": "4", "rejected": "5"}, [ASK]),
        ({"instruction": "Add.", "input": "2 + 2", "system": "Be brief.", "chosen": [SAY], "rejected": [WRONG]},
         [SYSTEM, {**ASK, "content": "Add.\n\n2 + 2"}]),
        ({"instruction": "2 + 2?", "history": [["a", "5"]], "chosen": "4", "rejected": "5"},
         [{**ASK, "content": "a"}, WRONG, ASK]),
        ({"chosen": [ASK, SAY], "rejected": [ASK, WRONG]}, [ASK]),
        ({"chosen": [ASK, WRONG, ASK, SAY], "rejected": [ASK, WRONG, ASK, WRONG]}, [ASK, WRONG, ASK]),
        # Marks, on one side only: of what is shared, nothing carries loss.
        ({"chosen": [{**ASK, "weight": 0}, {**SAY, "weight": 1}], "rejected": [ASK, WRONG]}, [ASK]),
        ({"prompt": [{**ASK, "weight": 0}], "chosen": [ASK, SAY], "rejected": [WRONG]}, [ASK]),
        ({"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}, [ASK]),
    ],
)  # fmt: skip
def test_every_pair_format_becomes_prompt_chosen_and_rejected(row, prompt):
    assert read(PAIR_FORMATS, row) == ([Pair("f:1", prompt, [SAY], [WRONG])], [])


def test_the_text_of_hh_keeps_what_only_looks_like_a_turn():
    text = "\n\nHuman: Who says\nHuman: hi?\n\nAssistant: A person.\n\nHuman: And?\n\nAssistant: "
    (pair,), shown = read(PAIR_FORMATS, {"chosen": text + "4", "rejected": text + "5"})
    assert shown == []
    assert pair.prompt == [
        {"role": "user", "content": "Who says\nHuman: hi?"},
        {"role": "assistant", "content": "A person."},
        {"role": "user", "content": "And?"},
    ]
    assert pair.chosen == [SAY]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected: is empty; expected text"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "chosen: is empty; expected an answer"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt: is empty; expected text"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "prompt: is empty; expected it to end in a turn of the user"),
        ({"prompt": [ASK, SAY], "chosen": "b", "rejected": "c"}, "prompt: ends in a turn of the assistant; expected"),
        ({"prompt": [SYSTEM], "chosen": "b", "rejected": "c"}, "prompt: ends in a turn of the system; expected"),
        ({"prompt": "a", "chosen": [ASK, SAY], "rejected": "c"}, "chosen: holds a turn of the user; expected only"),
        ({"prompt": "a", "chosen": "c", "rejected": [ASK, SAY]}, "rejected: holds a turn of the user; expected only"),
        ({"prompt": "a", "chosen": "c", "rejected": [SAY, CALLED]}, "rejected: ends in a turn of the tool"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "rejected.0: should be a turn, a JSON object with role"),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, "chosen: should be a valid string, found 5"),
        ({"prompt": "a", "chosen": "b", "rejected": {"c": 1}}, "rejected: should be a valid string, found an object"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected: should be a valid string, found null"),
        ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": "5"}, "prompt: ends in a turn of the assistant"),
        ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT}, "chosen: holds a turn of the user"),
        ({"conversations": [HUMAN], "chosen": 4, "rejected": GPT}, "chosen: should be a turn, a JSON object"),
        ({"chosen": [ASK, SAY], "rejected": [SYSTEM, ASK, WRONG]}, "chosen and rejected share no prompt"),
        ({"chosen": [ASK, SAY], "rejected": [ASK]}, "rejected: is empty; expected an answer"),
        ({"chosen": [ASK, SAY], "rejected": [ASK, SAY, ASK, WRONG]}, "prompt: ends in a turn of the assistant"),
        ({"chosen": "4", "rejected": "5"}, "chosen: expected a whole dialogue"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
         "rejected: the turn of the assistant is empty"),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit_says_why(row, says):
    found, shown = read(PAIR_FORMATS, row)
    assert found == []
    assert len(shown) == 1
    assert shown[0].startswith(f"f:1: {says}")


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "fields"),
    [
        ({"prompt": "2 + 2?", "answer": "4", "task": "sum"}, [ASK], "4", {"task": "sum"}),
        ({"prompt": [SYSTEM, ASK], "answer": 4}, [SYSTEM, ASK], "4", {}),
        ({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}, [ASK], "2 + 2 = 4\n#### 4", {}),
        ({"problem": "2 + 2?", "solution": "It is 4."}, [ASK], "It is 4.", {}),
        ({"problem": "2 + 2?", "solution": "It is 4.", "answer": 4.5}, [ASK], "4.5", {"solution": "It is 4."}),
        ({"prompt": "2 + 2?", "tests": ["f(2)"], "level": 1}, [ASK], None, {"tests": ["f(2)"], "level": 1}),
        ({"instruction": "2 + 2?", "id": 7}, [ASK], None, {"id": 7}),
        ({"instruction": "Add.", "input": "2 + 2"}, [{**ASK, "content": "Add.\n\n2 + 2"}], None, {}),
    ],
)  # fmt: skip
def test_every_problem_format_becomes_prompt_answer_and_fields(row, prompt, answer, fields):
    assert read(PROBLEM_FORMATS, row) == ([Prompt("f:1", prompt, answer, fields)], [])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "answer": float("nan")}, "answer: should be text or a finite number, found nan"),
        ({"prompt": "a", "answer": True}, "answer: should be a valid string, found true"),
        ({"prompt": "a", "answer": [4]}, "answer: should be a valid string, found a list of 1"),
        ({"prompt": "a", "answer": None}, "answer: should be a valid string, found null"),
        ({"question": "a", "answer": " "}, "answer: is empty"),
        ({"question": 1, "answer": "b"}, "question: should be a valid string, found 1"),
        ({"problem": "", "solution": "b"}, "problem: is empty"),
        ({"prompt": [ASK, SAY], "answer": "b"}, "prompt: ends in a turn of the assistant"),
    ],
)
def test_a_problem_that_does_not_fit_names_its_field(row, says):
    found, shown = read(PROBLEM_FORMATS, row)
    assert found == []
    assert len(shown) == 1
    assert shown[0].startswith(f"f:1: {says}")


def test_a_problem_without_the_answer_that_the_first_has_is_a_fault():
    _, shown = read(PROBLEM_FORMATS, {"prompt": "a", "answer": "b"}, {"prompt": "a"})
    assert shown == ["f:2: this row is prompt, but f:1 is prompt-answer; a source holds one format"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2 + 2?", "response": "4", "score": 0.5}, [ASK]),
        ({"prompt": [SYSTEM, ASK], "response": [SAY], "score": 0.5}, [SYSTEM, ASK]),
        ({"prompt": "2 + 2?", "response": "4", "score": "0.5"}, [ASK]),  # as a CSV file has it
        ({"instruction": "2 + 2?", "response": "4", "score": 0.5}, [ASK]),
        ({"instruction": "Add.", "input": "2", "response": [SAY], "score": 0.5}, [{**ASK, "content": "Add.\n\n2"}]),
    ],
)
def test_every_rating_format_becomes_prompt_response_and_score(row, prompt):
    assert read(RATING_FORMATS, row) == ([Rating("f:1", prompt, [SAY], 0.5)], [])


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (float("nan"), "score: should be a finite number"),
        ("inf", "score: should be a finite number"),
        (1e300, "score: should be less than or equal to 3"),
        (10**400, "score: should be a valid number"),
        (True, "score: should be a valid number, found true"),
        ("good", 'score: should be a valid number, found "good"'),
        ([1], "score: should be a valid number, found a list of 1"),
        (None, "score: should be a valid number, found null"),
    ],
)
def test_a_score_is_a_finite_number(score, says):
    found, shown = read(RATING_FORMATS, {"prompt": "a", "response": "b", "score": score})
    assert found == []
    assert len(shown) == 1
    assert shown[0].startswith(f"f:1: {says}")


def test_a_rated_answer_is_an_answer():
    _, shown = read(RATING_FORMATS, {"prompt": "a", "response": [ASK], "score": 1})
    assert shown == ["f:1: response: holds a turn of the user; expected only what the assistant answers"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"chosen": [ASK, SAY], "rejected": [ASK, WRONG]},
        {"instruction": "2 + 2?", "response": "4", "score": 1},
    ],
)
def test_the_prompts_of_pairs_and_ratings_are_problems_without_an_answer(row):
    (example,), shown = read(PROMPT_FORMATS, row)
    assert as_prompt(example) == Prompt("f:1", [ASK])
    assert shown == []


def test_the_prompts_of_problems_keep_answer_and_fields():
    row = {"question": "2 + 2?", "answer": "4", "task": "sum"}
    assert read(PROMPT_FORMATS, row) == read(PROBLEM_FORMATS, row) == ([Prompt("f:1", [ASK], "4", {"task": "sum"})], [])


def test_tools_come_along_with_every_kind():
    tools = [{"name": "add"}]
    for formats, row in (
        (PAIR_FORMATS, {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (PROBLEM_FORMATS, {"prompt": "a"}),
        (RATING_FORMATS, {"prompt": "a", "response": "b", "score": 1}),
        (PROMPT_FORMATS, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ):
        (example,), _ = read(formats, {**row, "tools": json.dumps(tools)})
        assert example.tools == tools


def test_columns_are_mapped_for_every_kind():
    (pair,), _ = read(PAIR_FORMATS, {"q": "2 + 2?", "chosen": "4", "rejected": "5"}, columns={"q": "prompt"})
    assert pair.prompt == [ASK]


def test_an_unknown_format_by_name_or_by_columns_says_what_is_known():
    with pytest.raises(InputError, match="--format alpaca: unknown here; expected auto or one of preference, "):
        read(PAIR_FORMATS, {}, row_format="alpaca")
    with pytest.raises(
        InputError, match=r"the columns are promt, chosn .did you mean 'prompt' by 'promt'.*Known: pref"
    ):
        read(PAIR_FORMATS, {"promt": "a", "chosn": "b"})


@pytest.mark.parametrize(
    "call", ['{"name": "add"}', '{"arguments": {}}', "[4]", '"add"', '{"name": "add", "arguments": [1]}', "[" * 100_000]
)
def test_a_function_call_without_its_parts_is_a_fault(call):
    """The chat template would fail on it, or write a call that no tool takes."""
    turns = [HUMAN, {"from": "function_call", "value": call}, {"from": "observation", "value": "4"}, GPT]
    found, shown = convert({"conversations": turns})
    assert found == []
    assert shown[0].startswith("f:1: conversations.1.tool_calls: a function call must")


def test_a_deep_value_where_text_is_expected_is_named_by_what_it_is():
    value = []
    for _ in range(5000):
        value = [value]
    _, shown = convert({"instruction": "a", "output": value})
    assert shown == ["f:1: output: should be a valid string, found a list of 1"]


FEEDBACK = {**PAIR_FORMATS, **RATING_FORMATS, **PROBLEM_FORMATS}
SAMPLES = {file.stem: file for file in sorted((ROOT / "data_samples" / "formats").glob("*.jsonl"))}


@pytest.mark.parametrize("form", FEEDBACK)
def test_there_is_a_sample_of_every_feedback_format_and_it_reads(form):
    for name in (form, f"{form}-messages", f"{form}-hh"):
        if name != form and name not in SAMPLES:
            continue
        faults = Faults()
        rows = list(read_rows(find_source(str(SAMPLES[name])), faults))
        assert detect(rows[0].fields, FEEDBACK) == form
        assert len(list(as_examples(rows, faults, FEEDBACK))) == len(rows) >= 4
        assert faults.shown == []


def test_a_conversation_without_end_is_refused():
    _, shown = convert({"messages": [ASK, SAY] * 251})
    assert shown == ["f:1: 502 turns, more than 500; split the row into several"]
    assert convert({"messages": [ASK, SAY] * 250})[1] == []
