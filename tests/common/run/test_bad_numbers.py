"""A step with numbers that are not finite: whether it ends the run, what is written down, and which rows were in it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common.errors import InputError
from common.lm.chat import Example, TokenPair
from common.rewards.tokens import Tokens
from common.run.bad_numbers import BadSteps, check_weights, forget_bad_steps, places_in
from common.run.folder import Run

NAN, INF = float("nan"), float("inf")
ROWS = [SimpleNamespace(place=f"my.jsonl:{line}") for line in (3, 9, 3, 11, 40)]


def bad_steps(folder, **arguments) -> BadSteps:
    given = {"learning_rate": 2e-4, "max_grad_norm": 1.0, **arguments}
    return BadSteps(Run(folder, {"step": 4, "arguments": {name: {"value": value} for name, value in given.items()}}))


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad-steps.jsonl").read_text().splitlines()]


def test_the_step_its_numbers_its_rows_and_what_to_lower_are_named(tmp_path):
    with pytest.raises(InputError) as caught:
        bad_steps(tmp_path).found(7, "the loss", {"loss": NAN, "gradient norm": INF}, [row.place for row in ROWS])
    assert str(caught.value).splitlines() == [
        "Step 7: the loss is not finite (loss nan, gradient norm inf); nothing of it was saved.",
        f"Its rows: my.jsonl:3, my.jsonl:9, my.jsonl:11 and 1 more, all in {tmp_path}/bad-steps.jsonl.",
        "Lower --learning-rate (0.0002) or --max-grad-norm (1) and give another --output-dir. The checkpoint of step 4 "
        "is whole. Or leave out up to 5 such steps with --skip-bad-steps 5.",
    ]
    rows = ["my.jsonl:3", "my.jsonl:9", "my.jsonl:11", "my.jsonl:40"]
    assert written(tmp_path) == [{"step": 7, "what": "the loss", "loss": "nan", "gradient norm": "inf", "rows": rows}]


def test_as_many_steps_as_allowed_are_left_out_and_a_resumed_run_counts_again(tmp_path, capsys):
    for process in range(2):  # the second is resumed after step 2
        steps = bad_steps(tmp_path, skip_bad_steps=2)
        forget_bad_steps(tmp_path, 2 * process)
        for step in (2, 3)[process:]:
            steps.found(step, "the gradient", {"gradient norm": NAN}, [])
            assert f"Step {step} is left out: the gradient is not finite" in capsys.readouterr().out
    with pytest.raises(InputError, match="bad step number 3, and --skip-bad-steps 2 allows 2"):
        steps.found(9, "the gradient", {"gradient norm": NAN}, [])
    assert [entry["step"] for entry in written(tmp_path)] == [2, 3, 9]


@pytest.mark.parametrize("name", ["loss/value_avg", "policy/grad_norm", "loss"])
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_metrics_of_a_loss_or_a_gradient_are_looked_at(tmp_path, name, number):
    steps = bad_steps(tmp_path)
    steps.check(1, {"loss": 0.5, "value/grad_norm": torch.tensor(2.0), "val/ratio": NAN}, ROWS)
    with pytest.raises(InputError, match=r"Step 1: (.|\n)* at the first step no rate has had an effect yet"):
        steps.check(1, {"loss": 0.5, name: number}, ROWS)


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_weights_that_are_not_finite_or_too_large_to_square_are_refused(value):
    weights = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)]
    check_weights(weights, "now")
    weights[1][0] = value
    with pytest.raises(InputError, match=r"no longer finite, seen now\. Lower --learning-rate"):
        check_weights(weights, "now")


def example(place: str, *ids: int) -> Example:
    return Example(place, np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.int8), len(ids))


def test_rows_are_found_in_a_batch_however_it_is_put_together():
    rows = [example("a", 5, 6, 7), example("b", 6, 7, 8, 9), example("c", 8, 9)]
    padded = {"input_ids": torch.tensor([[5, 6, 7, 0], [0, 8, 9, 0]]), "weights": torch.ones(2, 4)}
    assert places_in([padded], rows) == ["a", "c"]
    packed = {"input_ids": torch.tensor([[6, 7, 8, 9, 5, 6, 7]]), "text": ["x"]}
    assert places_in([packed], rows) == ["a", "b", "c"]  # what is in another row too is named with it
    pairs = [TokenPair("p", [1, 2], [3], [4], 3), TokenPair("q", [1, 2], [3], [9], 3)]
    assert places_in([{"ids": torch.tensor([[1, 2, 3], [1, 2, 4]])}], pairs) == ["p"]
    scored = [Tokens("s", [[1, 2, 3], [1, 2, 4]], [1, 1], None), Tokens("t", [[7]], [1], 0.5)]
    assert places_in([{"input_ids": torch.tensor([[1, 2, 3], [1, 2, 4]])}], scored) == ["s"]


def test_a_number_across_the_bytes_of_two_is_none():
    shifted = example("a", 0x01000000)
    assert places_in([{"input_ids": torch.tensor([[0, 1]])}], [shifted]) == []
