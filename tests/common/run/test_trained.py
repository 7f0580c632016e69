"""The sha256 of trained weights, and deterministic algorithms."""

import os

import pytest
import torch
from common.errors import explanation
from common.run import determinism
from common.run.trained import is_hashed, trained_sha256, weights_sha256


def weights() -> dict[str, torch.Tensor]:
    return {"a.lora_A": torch.arange(6.0).view(2, 3), "a.lora_B": torch.ones(3, dtype=torch.bfloat16)}


def test_the_hash_is_of_names_types_shapes_and_every_bit_in_any_order_and_layout():
    expected = weights_sha256(weights().items())
    assert weights_sha256(reversed(weights().items())) == expected
    assert weights_sha256({**weights(), "a.lora_A": torch.arange(6.0).view(2, 3).T.contiguous().T}.items()) == expected
    least = weights()
    least["a.lora_A"][0, 0] = -0.0
    others = [
        least,
        {**weights(), "a.lora_A": torch.arange(6.0)},
        {**weights(), "a.lora_B": torch.ones(3, dtype=torch.float16)},
        {"b.lora_A": weights()["a.lora_A"], "a.lora_B": weights()["a.lora_B"]},
    ]
    assert len({expected, *(weights_sha256(other.items()) for other in others)}) == 5


def test_what_is_frozen_is_not_hashed_and_an_adapter_that_is_not_active_is():
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2), "lora_x": torch.nn.Linear(2, 2)})
    model["base"].requires_grad_(False)
    model["lora_x"].requires_grad_(False)
    before = trained_sha256(model)
    model["base"].weight.data += 1
    assert trained_sha256(model) == before
    model["lora_x"].weight.data += 1
    assert trained_sha256(model) != before


def test_a_long_run_hashes_five_times():
    assert [step for step in range(1, 1001) if is_hashed(step, 1000)] == [1, 5, 20, 100, 1000]
    assert [step for step in range(1, 4) if is_hashed(step, 3)] == [1, 3]


class Given:
    full_determinism = True


def test_variables_are_set_where_it_is_wanted_and_the_users_stay(monkeypatch):
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    determinism.set_variables(object())
    assert len(os.environ) == 1
    determinism.set_variables(Given())
    assert os.environ == {**determinism.VARIABLES, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.slow  # the switch imports Inductor
@pytest.mark.parametrize("value", [True, False])
def test_the_record_of_the_run_decides_for_torch(value):
    try:
        determinism.use_deterministic_algorithms({"arguments": {"full_determinism": {"value": value}}})
        assert torch.are_deterministic_algorithms_enabled() == value
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_kernel_without_a_deterministic_form_is_named():
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError) as caught:
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "the kernel max_unpooling2d_forward_out" in explanation(caught.value)
