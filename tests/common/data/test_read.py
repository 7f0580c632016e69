"""A whole source as every recipe reads it: its examples, its row format, and what it is by its contents."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from common.data.examples import Pair, Prompt, Rating
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, PROMPT_FORMATS, RATING_FORMATS
from common.data.read import read_examples
from common.data.rows import find_source
from common.errors import InputError
from fake_hub import FIRST, SECOND, serve

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
RATING = {"prompt": "2 + 2?", "response": "4", "score": 1}


def write(folder, *rows):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return find_source(str(file))


def test_examples_row_format_and_identity(tmp_path):
    source = write(tmp_path, {"question": "2 + 2?", "answer": "4"}, {"question": "1 + 1?", "answer": "2"})
    data = read_examples(source, PROBLEM_FORMATS)
    assert [example.answer for example in data.examples] == ["4", "2"]
    assert data.row_format == "question-answer"
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(source[0].read_bytes())
    assert read_examples([copy], PROBLEM_FORMATS).identity == data.identity
    copy.write_bytes(source[0].read_bytes().replace(b"4", b"5"))
    assert read_examples([copy], PROBLEM_FORMATS).identity != data.identity


@pytest.mark.parametrize(
    ("row", "formats", "kind", "row_format"),
    [
        (PAIR, {**PAIR_FORMATS, **RATING_FORMATS}, Pair, "preference"),
        (RATING, {**PAIR_FORMATS, **RATING_FORMATS}, Rating, "prompt-rating"),
        ({"prompt": "2 + 2?"}, PROMPT_FORMATS, Prompt, "prompt"),
    ],
)
def test_the_first_row_decides_among_the_formats_that_are_accepted(tmp_path, row, formats, kind, row_format):
    data = read_examples(write(tmp_path, row), formats)
    assert [type(example) for example in data.examples] == [kind]
    assert data.row_format == row_format


def test_one_kind_of_example_a_source(tmp_path):
    with pytest.raises(InputError, match=r":2: this row is prompt-rating, but .*:1 is preference"):
        read_examples(write(tmp_path, PAIR, RATING), {**PAIR_FORMATS, **RATING_FORMATS})


def test_columns_are_renamed_and_the_format_can_be_given(tmp_path):
    source = write(tmp_path, {"q": "2 + 2?", "a": "4"})
    data = read_examples(source, FORMATS, "prompt-completion", ["prompt=q", "completion=a"])
    assert data.examples[0].messages[0]["content"] == "2 + 2?"
    assert data.row_format == "prompt-completion"


def test_all_faults_come_at_once(tmp_path):
    source = write(tmp_path, {**PAIR, "chosen": 1}, PAIR, {**PAIR, "rejected": ""})
    with source[0].open("a") as stream:
        stream.write("{\n")
    with pytest.raises(InputError) as refused:
        read_examples(source, PAIR_FORMATS)
    assert [line.partition(": ")[0].rpartition(":")[2] for line in str(refused.value).splitlines()] == ["1", "3", "4"]


def test_the_format_that_is_given_wins_where_a_row_fits_two(tmp_path):
    source = write(tmp_path, {"problem": "2 + 2?", "answer": "4", "solution": "It is 4."})
    data = read_examples(source, PROBLEM_FORMATS, "problem-solution")
    assert (data.examples[0].answer, data.row_format) == ("It is 4.", "problem-solution")
    assert read_examples(source, PROBLEM_FORMATS, "problem-answer").examples[0].answer == "4"
    assert read_examples(source, PROBLEM_FORMATS).row_format == "problem-answer"


def test_a_file_with_the_rows_inside_an_object_gets_one_message(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"prompt": "a", "completion": "b"}]}, indent=1))
    with pytest.raises(InputError, match=r"a\.json:1: unknown format: .*the rows are the list in 'data': save that"):
        read_examples(find_source(str(tmp_path)), FORMATS)


def test_columns_that_are_not_read_are_noted(tmp_path):
    row = {"prompt": "a", "completion": "b", "source": "web"}
    data = read_examples(write(tmp_path, row, {**row, "score": 0, "empty": None}), FORMATS)
    assert data.notes == [
        f"the column 'source' is not read (in 2 rows, the first is {tmp_path / 'data.jsonl'}:1)",
        f"the column 'score' is not read (in 1 row, the first is {tmp_path / 'data.jsonl'}:2)",
    ]
    assert read_examples(write(tmp_path, {"prompt": "a", "level": 1}), PROBLEM_FORMATS).notes == []  # for the rewards


def test_no_column_replaces_another(tmp_path):
    source = write(tmp_path, {"prompt": "a", "question": "b", "completion": "c"})
    with pytest.raises(InputError, match="--columns makes prompt of a column, and the rows have another one"):
        read_examples(source, FORMATS, columns=["prompt=question"])
    data = read_examples(source, FORMATS, columns=["prompt=question", "unread=prompt"])
    assert data.examples[0].messages[0]["content"] == "b"
    with pytest.raises(InputError, match="--columns completion=question: question is named prompt already"):
        read_examples(source, FORMATS, columns=["prompt=question", "completion=question"])


def test_a_parquet_file_whose_first_row_is_null_is_of_its_format(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b"], "output": [None, "c"]}), file)
    with pytest.raises(InputError, match=r"a\.parquet:1: output: should be a valid string, found null$"):
        read_examples([file], FORMATS)
    pq.write_table(pa.table({"instruction": ["a", "b"], "system": [None, "s"], "output": ["c", "c"]}), file)
    assert [len(example.messages) for example in read_examples([file], FORMATS).examples] == [2, 3]


def test_a_source_without_rows_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"data\.jsonl: holds no rows"):
        read_examples(find_source(str(tmp_path)), FORMATS)


# A dataset on the hub.

READ = """
import sys
from common.data.formats import FORMATS
from common.data.read import read_examples
from common.errors import run_command
def main():
    data = read_examples(sys.argv[1], FORMATS)
    print(len(data.examples), data.identity)
    print(*data.notes, file=sys.stderr)
run_command(main)
"""


def read_from(environment, name):
    command = [sys.executable, "-c", READ, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_identity_of_a_hub_dataset_is_the_commit_that_was_read(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    with serve({"org/rows": [{"prompt": "a", "completion": "b"}] * 3, "org/turns": [{"messages": turns}]}) as hub:
        environment = hub.environment(tmp_path)
        assert read_from(environment, "org/rows").stdout == f"3 org/rows@{FIRST}\n"
        hub.commit = SECOND
        assert read_from(environment, "org/rows").stdout == f"3 org/rows@{SECOND}\n"
        assert read_from(environment, f"org/rows@{FIRST}").stdout == f"3 org/rows@{FIRST}\n"
        done = read_from(environment, "org/turns")  # turns with different keys, which datasets keeps as they are
        assert done.stdout == f"1 org/turns@{SECOND}\n"
        done = read_from(environment, "org/nothing")
        assert done.returncode == 3
        assert done.stderr.startswith("org/nothing: no file or folder of this name, and the hub gave no dataset: ")
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert read_from(offline, "org/rows").stdout == f"3 org/rows@{SECOND}\n"  # the newest copy here
    done = read_from(offline, f"org/rows@{FIRST}")
    assert done.returncode == 3
    assert f"the newest copy on this machine is of commit {SECOND}" in done.stderr
