"""What no method here trains, or another one does, is refused and not learned as something else."""

import pytest
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS
from common.data.read import as_examples, column_map
from common.data.rows import Faults, Row
from common.errors import InputError

ASK = {"role": "user", "content": "a"}
SAY = {"role": "assistant", "content": "b"}
DEMONSTRATIONS = [
    {"messages": [ASK, SAY]},
    {"conversations": [ASK, SAY]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "output": "b"},
    {"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"},
]


def read(formats, row, *columns):
    faults = Faults()
    found = list(as_examples([Row("f:1", row)], faults, formats, columns=column_map(columns)))
    return found, faults


@pytest.mark.parametrize("row", DEMONSTRATIONS)
@pytest.mark.parametrize(
    "label", [{"label": False}, {"label": True}, {"label": 0}, {"label": "True"}, {"label": "1"}, {"kto_tag": False}]
)
def test_completions_with_a_label_are_no_demonstrations(row, label):
    """The bad ones would be imitated."""
    found, faults = read(FORMATS, row | label)
    assert found == []
    (column,) = label
    assert faults.shown[0].startswith(f"f:1: {column}: the rows are completions with a label, good or bad, which are")
    assert "make kto" in faults.shown[0]
    assert len(read(FORMATS, row | label, f"unread={column}")[0]) == 1  # the way out that the message names


@pytest.mark.parametrize("label", ["sports", 7, None, ""])
def test_a_label_of_another_kind_is_a_column_that_is_not_read(label):
    found, faults = read(FORMATS, {**DEMONSTRATIONS[0], "label": label})
    assert len(found) == 1
    assert [note.partition(" (")[0] for note in faults.notes()] == (["the column 'label' is not read"] if label else [])


@pytest.mark.parametrize("formats", [PAIR_FORMATS, RATING_FORMATS])
def test_another_method_names_the_one_that_reads_such_rows(formats):
    for row, method in (
        ({"prompt": "a", "completion": "b", "label": True}, "data for make kto"),
        ({"messages": [ASK, SAY]}, "data for make sft"),
        ({"problem": "a", "solution": "4"}, "data for make grpo"),
    ):
        with pytest.raises(InputError, match=method):
            read(formats, row)
    with pytest.raises(InputError, match="data for make dpo"):
        read(FORMATS, {"prompt": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize("column", ["image", "images", "audio", "audios", "video", "videos"])
def test_rows_with_media_are_refused_by_every_format(column):
    rows = [(FORMATS, row) for row in DEMONSTRATIONS]
    rows += [(PAIR_FORMATS, {"prompt": "a", "chosen": "b", "rejected": "c"}), (PROBLEM_FORMATS, {"prompt": "a"})]
    rows += [(RATING_FORMATS, {"prompt": "a", "response": "b", "score": 1})]
    for formats, row in rows:
        for value in (["a.png"], "a.png", {"bytes": b"x", "path": None}):
            found, faults = read(formats, {**row, column: value})
            assert found == []
            assert faults.shown[0].startswith(f"f:1: {column}: only text is trained")
        for value in ([], None, ""):
            assert len(read(formats, {**row, column: value})[0]) == 1
        assert len(read(formats, {**row, column: "a.png"}, f"unread={column}")[0]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat is it?",
        "What is it?\n<image>",
        "What is it? <image>",
        "<audio>",
        "a\n <video>\nb",
        "<|image_1|>\nb",
    ],
)
def test_the_place_of_an_image_is_not_learned_as_text(text):
    for formats, row in (
        (FORMATS, {"messages": [{"role": "user", "content": text}, SAY]}),
        (FORMATS, {"instruction": text, "output": "b"}),
        (PAIR_FORMATS, {"prompt": text, "chosen": "b", "rejected": "c"}),
        (PROBLEM_FORMATS, {"prompt": text, "answer": "4"}),
        (RATING_FORMATS, {"prompt": text, "response": "b", "score": 1}),
    ):
        found, faults = read(formats, row)
        assert found == []
        assert "has the place of a medium, <" in faults.shown[0]


@pytest.mark.parametrize("text", ["What does <image> mean in SVG?", "<video>\n<source src='a'>\n</video>", "a < b"])
def test_a_tag_that_is_written_about_is_text(text):
    assert len(read(FORMATS, {"instruction": text, "output": "b"})[0]) == 1


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": "0"}, {"loss_scale": 0.0}])
def test_a_row_that_is_marked_as_a_whole_is_not_learned(mark):
    for row in DEMONSTRATIONS:
        found, faults = read(FORMATS, row | mark)
        assert found == []
        assert "the row is marked as one not to learn from" in faults.shown[0]
        assert len(read(FORMATS, row | mark, f"unread={next(iter(mark))}")[0]) == 1
    (note,) = read(FORMATS, DEMONSTRATIONS[0] | {"weight": 0.5})[1].notes()
    assert note.startswith("the column 'weight' is not read")


def test_pairs_of_sharegpt_are_no_demonstrations():
    """The conversation of such a row lacks its last answer."""
    row = {"conversations": [ASK, SAY, ASK], "chosen": SAY, "rejected": {**SAY, "content": "c"}}
    found, faults = read(FORMATS, row)
    assert found == []
    assert "data for make dpo" in faults.shown[0]
    assert len(read(PAIR_FORMATS, row)[0]) == len(read(FORMATS, row, "unread=chosen")[0]) == 1


def test_arguments_of_the_template_are_refused():
    _, faults = read(FORMATS, {"messages": [ASK, SAY], "chat_template_kwargs": {"enable_thinking": False}})
    assert faults.shown[0].startswith("f:1: chat_template_kwargs: not supported")
