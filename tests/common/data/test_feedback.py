"""Thumbs up and down: every way to write them is the same feedback, and what is unclear is refused by line."""

import pytest
from common.data.examples import Feedback, Rating
from common.data.feedback import FEEDBACK_FORMATS, as_feedback, check_both
from common.data.formats import detect
from common.data.read import as_examples, read_examples
from common.data.rows import Faults, Row, find_source
from common.errors import InputError
from conftest import ROOT

ASK = {"role": "user", "content": "2 + 2?"}
SAY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"name": "add"}]


def convert(*rows, **options):
    faults = Faults()
    places = (Row(f"f:{number}", fields) for number, fields in enumerate(rows, start=1))
    return list(as_examples(places, faults, FEEDBACK_FORMATS, **options)), faults.shown


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": [SYSTEM, ASK, SAY, ASK, SAY]}, [SYSTEM, ASK, SAY, ASK]),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, [ASK]),
        ({"prompt": "2 + 2?", "completion": "4"}, [ASK]),
        ({"prompt": [SYSTEM, ASK], "completion": [SAY]}, [SYSTEM, ASK]),
        ({"instruction": "2 + 2?", "output": "4", "system": "Be brief."}, [SYSTEM, ASK]),
    ],
)
def test_every_way_to_write_it_is_the_same_feedback(row, prompt, label):
    assert convert({**row, label: True}, {**row, label: False}) == (
        [Feedback("f:1", prompt, [SAY], True), Feedback("f:2", prompt, [SAY], False)],
        [],
    )


def test_tools_come_along():
    found, _ = convert({"messages": [ASK, SAY], "tools": TOOLS, "label": 1})
    assert found == [Feedback("f:1", [ASK], [SAY], True, TOOLS)]


GOOD = [True, 1, 1.0, "true", "True", "1", "1.0", " yes ", "good", "desirable", "up"]
BAD = [False, 0, 0.0, "false", "FALSE", "0", "0.0", "no", "bad", "undesirable", "down"]


@pytest.mark.parametrize(("label", "good"), [*((one, True) for one in GOOD), *((one, False) for one in BAD)])
def test_labels_are_read_as_files_have_them(label, good):
    (found,), shown = convert({"prompt": "a", "completion": "b", "label": label})
    assert (found.label, shown) == (good, [])


@pytest.mark.parametrize("label", [None, "", "maybe", 2, -1, 0.5, "0.5", float("nan"), [True], {"good": 1}])
def test_what_is_neither_good_nor_bad_is_refused(label):
    found, (shown,) = convert({"prompt": "a", "completion": "b", "label": label})
    assert not found
    assert shown.startswith("f:1: label: expected true or false (or 1 or 0), found ")
    number = label in (2, -1, 0.5, "0.5") or label != label
    assert ("--threshold" in shown) == number


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [ASK, SAY, ASK], "label": True}, "the conversation ends in a turn of the user"),
        ({"messages": [], "label": True}, "the conversation holds no turns"),
        ({"messages": [SAY], "label": True}, "prompt: is empty"),
        ({"messages": [ASK, SAY, SAY], "label": True}, "prompt: ends in a turn of the assistant"),
        ({"prompt": "a", "completion": [SAY, ASK, SAY], "label": True}, "completion: holds a turn of the user"),
        ({"prompt": "a", "completion": [SAY, SAY], "label": True}, "completion: holds 2 turns, of which only the last"),
        ({"prompt": "a", "completion": "b"}, "label: missing"),
        ({"prompt": "a", "completion": "b", "kto_tag": True}, "this row is prompt-kto-tag, but f:1 is prompt-label"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row, says):
    first = {"prompt": "a", "completion": "b", "label": True}
    format_of_it = detect(row, FEEDBACK_FORMATS)
    rows = [row] if format_of_it not in (None, "prompt-label", "prompt-kto-tag") else [first, row]
    _, (shown,) = convert(*rows)
    assert shown.startswith(f"f:{len(rows)}: {says}")


@pytest.mark.parametrize("name", FEEDBACK_FORMATS)
def test_there_is_a_sample_of_every_format(name):
    data = read_examples(find_source(str(ROOT / "data_samples" / "formats" / f"{name}.jsonl")), FEEDBACK_FORMATS)
    assert data.row_format == name
    check_both(example.label for example in data.examples)
    assert all(example.completion[-1]["role"] == "assistant" for example in data.examples)


@pytest.mark.parametrize(("label", "tag", "good"), [(True, False, None), (0, "good", None), (1, "true", True)])
def test_two_labels_of_a_row_must_say_the_same(label, tag, good):
    found, shown = convert({"prompt": "2 + 2?", "completion": "4", "label": label, "kto_tag": tag})
    assert [row.label for row in found] == ([] if good is None else [good])
    assert shown == (["f:1: label and kto_tag contradict each other; remove one"] if good is None else [])


def test_a_column_that_is_no_label_contradicts_none():
    assert [row.label for row in convert({"messages": [ASK, SAY], "label": "sports", "kto_tag": True},
                                         row_format="messages-kto-tag")[0]] == [True]  # fmt: skip


def rating(score: float, line: int = 1, turns: int = 1) -> Rating:
    return Rating(f"f:{line}", [ASK], [SAY] * turns, score)


def test_a_rating_is_good_from_the_threshold_on():
    found = as_feedback([rating(score, line) for line, score in enumerate((1, 3.9, 4, 5), start=1)], 4)
    assert [(row.place, row.label) for row in found] == [("f:1", False), ("f:2", False), ("f:3", True), ("f:4", True)]
    assert found[0] == Feedback("f:1", [ASK], [SAY], False)
    assert [row.label for row in as_feedback([rating(-1), rating(0)], 0)] == [False, True]


@pytest.mark.parametrize(
    ("examples", "threshold", "says"),
    [
        ([rating(1), rating(5)], None, "these rows have scores, from 1 to 5; give the score .* with --threshold"),
        ([rating(1), rating(5)], 6, "every completion is bad by --threshold 6"),
        ([rating(1), rating(5, 7, turns=2)], 4, "f:7: response: holds 2 turns"),
        ([Feedback("f:1", [ASK], [SAY], True)], 4, "--threshold 4: these rows have labels"),
        ([Feedback("f:1", [ASK], [SAY], True)], None, "every completion is good; .* data for make sft"),
        ([Feedback("f:1", [ASK], [SAY], False)], None, "every completion is bad; .* add good ones"),
    ],
)
def test_feedback_that_teaches_nothing_is_refused(examples, threshold, says):
    with pytest.raises(InputError, match=says):
        as_feedback(examples, threshold)
