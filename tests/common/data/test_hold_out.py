"""`common/data/hold_out.py`: which prompts are held out, that no stage trains on them, and what a held-out file is."""

import json
import random
from pathlib import Path

import pytest
from common.data.examples import Conversation, Document, Feedback, Pair, Prompt, Rating
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS, SFT_FORMATS, Formats
from common.data.hold_out import (
    DataSet,
    eval_count,
    hold_out,
    hold_out_by,
    hold_out_prompts,
    prompt_key,
    read_held_out,
)
from common.data.read import column_map, read_examples
from common.data.rows import find_source
from common.errors import InputError
from conftest import ROOT, read_jsonl

SAMPLES = ROOT / "data_samples"


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_set(source: str, formats: Formats, *columns: str) -> DataSet:
    """A file as a stage reads it; `columns` as for --columns."""
    return DataSet(source, read_examples(find_source(source), formats, columns=columns).examples, column_map(columns))


def test_a_count_of_rows_is_drawn_and_the_order_stays():
    taken, rest = hold_out(list("abcdefgh"), 3, random.Random(1))
    assert (len(taken), sorted(taken + rest)) == (3, list("abcdefgh"))
    assert (taken, rest) == (sorted(taken), sorted(rest))


def test_rows_of_one_prompt_are_held_out_together():
    rows = [(letter, number) for number in range(3) for letter in "abcdef"]
    taken, rest = hold_out_by(lambda row: row[0], rows, 2, random.Random(1))
    held = {letter for letter, _ in taken}
    assert (len(held), len(taken)) == (2, 6)
    assert not held & {letter for letter, _ in rest}
    assert sorted(taken + rest) == sorted(rows)


@pytest.mark.parametrize(
    ("rows", "ratio", "count"), [(3, 0.1, 1), (3, 0.0, 0), (100, 0.1, 10), (2, 0.5, 1), (7, 0.3, 2)]
)
def test_a_share_of_the_rows_is_at_least_one(rows, ratio, count):
    assert eval_count(rows, ratio) == count


@pytest.mark.parametrize(
    ("rows", "ratio", "says"),
    [(1, 0.1, "1 of 1 rows"), (3, 0.9, "3 of 3 rows"), (9, 1.0, "less than 1"), (9, -0.1, "at least 0")],
)
def test_a_share_that_leaves_nothing_to_train_on_is_refused_with_the_count(rows, ratio, says):
    with pytest.raises(InputError, match=rf"^--eval-ratio {ratio:g}.*{says}"):
        eval_count(rows, ratio)


def test_a_twentieth_of_the_prompts_is_held_out_of_all_stages(tmp_path, capsys):
    answers = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(100)]
    # The same questions as examples, every one twice, and some more.
    examples = [{"question": row["question"], "answer": "a"} for row in answers * 2]
    examples += [{"question": f"Say {n}.", "answer": "b"} for n in range(60)]
    columns = ("prompt=question", "completion=answer")
    data = {
        "sft": data_set(write(tmp_path / "examples.jsonl", examples), FORMATS, *columns),
        "grpo": data_set(write(tmp_path / "answers.jsonl", answers), PROBLEM_FORMATS),
    }
    kept, held_out = hold_out_prompts(data, [], tmp_path / "p")
    assert [Path(file).name for file in held_out] == ["sft-heldout.jsonl", "grpo-heldout.jsonl"]
    rows = [read_jsonl(Path(file)) for file in held_out]
    assert [len(held) for held in rows] == [8, 5]  # of 160 and of 100 prompts
    assert set(rows[0][0]) == {"prompt", "completion"}  # by our names, for no --columns goes with the file
    assert set(rows[1][0]) == {"question", "answer"}
    held = {row["prompt"] for row in rows[0]} | {row["question"] for row in rows[1]}
    trained = [read_jsonl(Path(kept[name].source)) for name in ("sft", "grpo")]
    assert set(trained[0][0]) == {"question", "answer"}  # by its own, for the recipe gets --columns
    assert not held & {row["question"] for row in [*trained[0], *trained[1]]}
    assert len(trained[1]) == 100 - len(held & {row["question"] for row in answers})
    assert "8 prompts" in capsys.readouterr().out

    # The same rows in another order: the same are held out.
    data = {"grpo": data_set(write(tmp_path / "answers.jsonl", answers[::-1]), PROBLEM_FORMATS)}
    _, again = hold_out_prompts(data, [], tmp_path / "q")
    assert {row["question"] for file in again for row in read_jsonl(Path(file))} == {r["question"] for r in rows[1]}


def test_at_least_one_and_at_most_two_hundred_are_held_out(tmp_path):
    for count, held in ((3, 1), (5000, 200)):
        rows = [{"prompt": f"{n}?", "answer": str(n)} for n in range(count)]
        data = {"grpo": data_set(write(tmp_path / "rows.jsonl", rows), PROBLEM_FORMATS)}
        _, held_out = hold_out_prompts(data, [], tmp_path / "p")
        assert [len(examples) for examples in held_out.values()] == [held]


def test_rows_with_a_held_out_prompt_are_left_out(tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(10)]
    data = {"dpo": data_set(write(tmp_path / "rows.jsonl", rows), PAIR_FORMATS)}
    questions = write(tmp_path / "questions.jsonl", [{"prompt": " 3? ", "answer": "3"}])
    kept, held_out = hold_out_prompts(data, [questions], tmp_path)
    assert list(held_out) == [questions]
    assert [row["prompt"] for row in read_jsonl(Path(kept["dpo"].source))] == [f"{n}?" for n in range(10) if n != 3]
    other = write(tmp_path / "other.jsonl", [{"prompt": "else?", "answer": "3"}])
    assert hold_out_prompts(data, [other], tmp_path)[0] == data  # as it is
    all_of_them = write(tmp_path / "all.jsonl", rows)
    with pytest.raises(InputError, match="nothing is left to train dpo on"):
        hold_out_prompts(data, [all_of_them], tmp_path)


def test_every_answer_to_a_held_out_prompt_is_left_out(tmp_path):
    """Of ratings a prompt may have several; one row of it is the held-out one, and none of them trains."""
    rows = [{"prompt": f"{n % 20}?", "response": str(n), "score": n} for n in range(60)]
    data = {"reward": data_set(write(tmp_path / "rows.jsonl", rows), RATING_FORMATS)}
    kept, held_out = hold_out_prompts(data, [], tmp_path)
    ((example,),) = held_out.values()
    assert isinstance(example, Rating)
    assert len(kept["reward"].examples) == 57
    assert prompt_key(example) not in map(prompt_key, kept["reward"].examples)


def test_of_raw_text_whole_documents_are_held_out(tmp_path):
    rows = [{"text": f"Page {n % 30}.", "id": n} for n in range(40)]
    data = {"sft": data_set(write(tmp_path / "rows.jsonl", rows), SFT_FORMATS)}
    kept, held_out = hold_out_prompts(data, [], tmp_path)
    ((one, two),) = held_out.values()
    assert {one.text, two.text}.isdisjoint(example.text for example in kept["sft"].examples)
    assert len(kept["sft"].examples) < 39


def test_rows_without_an_answer_are_not_held_out(tmp_path, capsys):
    rows = [{"prompt": f"{n}?", "tests": "assert True"} for n in range(40)]
    data = {"grpo": data_set(write(tmp_path / "rows.jsonl", rows), PROBLEM_FORMATS)}
    assert hold_out_prompts(data, [], tmp_path) == (data, {})
    assert "nothing is held out" in capsys.readouterr().out
    two = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in "ppq"]
    data["dpo"] = data_set(write(tmp_path / "pairs.jsonl", two), PAIR_FORMATS)
    kept, held_out = hold_out_prompts(data, [], tmp_path)
    assert [Path(file).name for file in held_out] == ["dpo-heldout.jsonl"]
    assert len(kept["grpo"].examples) == 40


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("preferences.jsonl", Pair),
        ("scores-heldout.jsonl", Rating),
        ("sft.jsonl", Conversation),
        ("feedback-train.jsonl", Feedback),
        ("formats/sharegpt-kto-tag.jsonl", Feedback),
        ("heldout.jsonl", Prompt),
        ("formats/alpaca.jsonl", Conversation),
        ("formats/text.jsonl", Document),
        ("formats/prompt-completion.jsonl", Conversation),
        ("formats/instruction-rating.jsonl", Rating),
        ("formats/question-answer.jsonl", Prompt),
    ],
)
def test_the_columns_decide_what_a_held_out_file_is(name, kind):
    assert {type(example) for example in read_held_out(str(SAMPLES / name))} == {kind}
