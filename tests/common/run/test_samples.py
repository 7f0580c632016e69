"""samples.jsonl of a run: what a resumed run writes again is not there twice."""

import json

from common.run.samples import append, forget_after


def entry(step, text="a"):
    return {"step": step, "completion": text}


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_entries_are_appended_and_those_of_repeated_steps_dropped(tmp_path):
    file = tmp_path / "samples.jsonl"
    forget_after(file, 0)  # there is none yet
    for step in range(4):
        append(file, [entry(step), entry(step, "答案\u2028 in two lines")])
    forget_after(file, 2)  # two steps are done: 0 and 1
    assert [row["step"] for row in read_lines(file)] == [0, 0, 1, 1]
    append(file, [entry(2)])
    assert [row["step"] for row in read_lines(file)] == [0, 0, 1, 1, 2]
    assert read_lines(file)[1]["completion"] == "答案\u2028 in two lines"


def test_a_line_that_a_killed_run_left_half_is_dropped(tmp_path):
    file = tmp_path / "samples.jsonl"
    append(file, [entry(0), entry(1, "答案")])
    file.write_bytes(file.read_bytes()[:-5])  # within a character
    forget_after(file, 9)
    assert read_lines(file) == [entry(0)]
