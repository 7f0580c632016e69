"""The sha256 of trained weights, and deterministic algorithms."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from common.errors import explanation
from common.run import determinism, trained
from common.run.checkpoints import CheckpointCallback
from common.run.folder import Run
from common.run.steps import CheckedSteps
from common.run.stopping import Stop
from common.run.trained import hash_beside, is_hashed, trained_sha256, weights_sha256
from transformers import Trainer
from transformers.trainer_callback import TrainerControl, TrainerState


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


@pytest.fixture
def slow_hash(monkeypatch):
    """Hashing that takes until the event is set."""
    let = threading.Event()
    monkeypatch.setattr(trained, "weights_sha256", lambda named: let.wait(30) and weights_sha256(named))
    return let


def arguments(folder, best=False):
    return SimpleNamespace(output_dir=str(folder / "part"), load_best_model_at_end=best)


@pytest.mark.parametrize(
    ("step", "where"),
    [(5, "on_pre_optimizer_step"), (5, "on_save"), (5, "on_train_end"), (9, "on_save"), (9, "on_train_end")],
)
def test_a_hash_beside_what_follows_is_of_the_weights_before_it(step, where, slow_hash, tmp_path):
    model = torch.nn.ModuleDict({"lora_x": torch.nn.Linear(2, 2)})
    before = weights_sha256(model.named_parameters())
    callback = CheckpointCallback(Run(tmp_path, {}), Stop(), 2)
    callback.hashes_beside = True
    state, args = TrainerState(global_step=step, max_steps=9), arguments(tmp_path)
    callback.on_step_end(args, state, TrainerControl(), model=model)
    assert "weights_sha256" not in callback.run.record  # and the step is over
    threading.Timer(0.2, slow_hash.set).start()
    callback._complete = lambda *_: None  # it looks for files of the trainer's
    getattr(callback, where)(args, state, TrainerControl())
    assert slow_hash.is_set()
    assert callback.run.record["weights_sha256"] == {str(step): before}


def test_the_hash_of_the_last_step_is_there_before_other_weights_are_loaded(slow_hash, tmp_path):
    model = torch.nn.ModuleDict({"lora_x": torch.nn.Linear(2, 2)})
    callback = CheckpointCallback(Run(tmp_path, {}), Stop(), 2)
    callback.hashes_beside = True
    slow_hash.set()
    last = TrainerState(global_step=9, max_steps=9)
    callback.on_step_end(arguments(tmp_path, best=True), last, TrainerControl(), model=model)
    assert callback.run.record["weights_sha256"] == {"9": weights_sha256(model.named_parameters())}


def test_a_hash_is_recorded_where_the_next_step_fails(slow_hash, tmp_path, monkeypatch):
    model = torch.nn.ModuleDict({"lora_x": torch.nn.Linear(2, 2)})
    callback = CheckpointCallback(Run(tmp_path, {}), Stop(), 2)
    callback.hashes_beside = True
    slow_hash.set()

    def fail(self, *args, **kwargs):
        fifth = TrainerState(global_step=5, max_steps=9)
        callback.on_step_end(arguments(tmp_path), fifth, TrainerControl(), model=model)
        raise ValueError("of step 6")

    monkeypatch.setattr(Trainer, "_run_epoch", fail)
    trainer = object.__new__(CheckedSteps)
    trainer.checkpoints, trainer.state = callback, TrainerState(global_step=0, max_steps=9)
    with pytest.raises(ValueError, match="of step 6"):
        trainer._run_epoch(resume_from_checkpoint=None)
    assert callback.run.record["weights_sha256"] == {"5": weights_sha256(model.named_parameters())}


def test_a_rank_that_hashes_nothing_starts_no_thread(monkeypatch):
    monkeypatch.setattr(trained, "is_first", lambda: False)
    monkeypatch.setattr(trained, "ThreadPoolExecutor", None)
    assert hash_beside(torch.nn.ModuleDict({"lora_x": torch.nn.Linear(2, 2)})).done()


def test_a_hash_that_fails_ends_the_run(monkeypatch):
    def fail(named):
        raise RuntimeError("no memory")

    monkeypatch.setattr(trained, "weights_sha256", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        hash_beside(torch.nn.ModuleDict({"lora_x": torch.nn.Linear(2, 2)})).result()


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
