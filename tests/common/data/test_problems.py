"""Problems in the words of benchmarks and of other trainers: their tests and gold answers reach the rewards."""

import json

import pytest
from common.data.formats import PROBLEM_FORMATS
from common.data.read import as_examples, read_examples
from common.data.rows import Faults, Row, find_source
from common.rewards.sandbox import run_tests
from conftest import ROOT


def read(row):
    faults = Faults()
    return list(as_examples([Row("f:1", row)], faults, PROBLEM_FORMATS)), faults.shown


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp-text"])
def test_the_benchmarks_own_solution_passes_its_tests_and_another_program_fails(name):
    examples = read_examples(find_source(str(ROOT / "data_samples" / "formats" / f"{name}.jsonl")), PROBLEM_FORMATS)
    for example in examples.examples:
        tests = example.fields["tests"]
        assert run_tests(example.answer, tests).share == 1, example
        assert run_tests(f"{example.answer}\n\ndef {function_of(example.answer)}(*_): return 'no'", tests).share == 0


def function_of(program: str) -> str:
    return program.partition("def ")[2].partition("(")[0]


def test_the_benchmarks_columns_reach_the_reward_functions_too():
    (example,), _ = read({"task_id": 1, "prompt": "def f():\n", "test": "def check(f): ...", "entry_point": "f"})
    assert example.fields.keys() == {"tests", "task_id", "test", "entry_point"}
    assert example.answer is None
    (example,), _ = read(
        {"prompt": "a", "test_list": ["assert f() == 1"], "test_setup_code": "x = 1", "tests": ["own"]}
    )
    assert example.fields["tests"] == ["own"]


def test_mbpps_tests_as_json_text_are_read():
    tests = ["assert f() == 1", "assert g() == 2"]
    (example,), _ = read({"text": "a", "test_list": json.dumps(tests), "test_imports": None})
    assert example.fields["tests"] == tests
    assert read({"text": "a", "test_list": "assert f() == 1"})[1][0].startswith(
        "f:1: test_list: a list as text must be"
    )


@pytest.mark.parametrize(
    ("truth", "answer"), [("72", "72"), (72, "72"), (0.5, "0.5"), ({"inputs": []}, None), ("", None)]
)
def test_the_gold_answer_of_verl_is_its_ground_truth(truth, answer):
    row = {"prompt": [{"role": "user", "content": "a"}], "data_source": "gsm8k", "extra_info": {"index": 1}}
    (example,), shown = read({**row, "reward_model": {"style": "rule", "ground_truth": truth}})
    assert shown == []
    assert (example.prompt, example.answer) == (row["prompt"], answer)
    assert example.fields.keys() == {"data_source", "extra_info", "reward_model"}
