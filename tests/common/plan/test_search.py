"""What the planner proposes."""

import itertools

import pytest
from common.lm.cards import read_card
from common.plan.devices import DEVICES, of_size
from common.plan.search import BATCH, LEAST_ROWS, MARGIN, advice, device_with, fit, least, measure, plan
from common.plan.workload import METHODS, settings, workload


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["tiny", "qwen2.5-7b", "gemma-3-4b", "qwen2.5-72b"])
def test_a_plan_fits_and_keeps_the_step(model, method):
    card = read_card(model)
    if method not in card.methods:
        pytest.skip(f"{model} is not offered for {method}")
    own = workload(card, method)
    for gib in (4, 8, 24, 80):
        found = plan(card, method, device_with(gib))
        assert found.fits == (found.total <= MARGIN * gib)
        # The arguments that it changes make exactly the run that it counted.
        assert measure(card, workload(card, method, found.changed), device_with(gib)).total == pytest.approx(
            found.total
        )
        assert found.work.rows >= LEAST_ROWS.get(method, 1)
        assert found.work.step_rows == own.step_rows or not found.fits
        assert found.work.precision != "fp8"
        if found.fits and found.work.length < own.length:  # data is cut only where nothing else is enough
            assert fit(card, method, device_with(gib)) is None


def test_it_takes_the_fastest_that_fits():
    card, device = read_card("qwen2.5-7b"), DEVICES["h200"]
    best = fit(card, "sft", device)
    for load_in_4bit, checkpointing in itertools.product((True, False), repeat=2):
        given = {"load_in_4bit": load_in_4bit, "gradient_checkpointing": checkpointing}
        assert measure(card, workload(card, "sft", given), device).time.seconds >= best.time.seconds / 1.02
    assert best.work.precision == "16 bit"
    assert not best.work.gradient_checkpointing


def test_what_is_given_stays():
    card = read_card("qwen2.5-7b")
    given = {"load_in_4bit": True, "per_device_train_batch_size": 2, "max_length": 1024}
    found = fit(card, "sft", DEVICES["h200"], given)
    assert not found.changed.keys() & given.keys()
    assert (found.work.precision, found.work.rows, found.work.length) == ("nf4", 2, 1024)
    assert plan(card, "sft", device_with(5), given).fits is False
    loose = fit(card, "sft", of_size(8), settings(card, "sft"), fixed=("gradient_checkpointing",))
    assert loose.work.rows < 4
    assert fit(card, "sft", of_size(8), fixed=BATCH) is None


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_larger_micro_batches_of_the_same_step_are_tried_for_rollouts(method):
    card = read_card("qwen2-1.5b")
    own, found = workload(card, method), fit(card, method, DEVICES["h200"])
    assert (found.work.rows, found.work.accumulation) == (own.step_rows, 1)
    assert not fit(card, method, DEVICES["h200"], fixed=BATCH).changed.keys() & set(BATCH)


def test_kto_keeps_its_micro_batch():
    """Its reference point is estimated from one."""
    card = read_card("qwen2.5-7b")
    assert all(
        found.work.rows == 4 for gib in (9, 12, 24, 80) if (found := fit(card, "kto", device_with(gib))) is not None
    )


@pytest.mark.parametrize("method", METHODS)
def test_advice_names_changes_that_fit(method):
    card = read_card("qwen2.5-7b")
    given = settings(card, method, {"load_in_4bit": False, "gradient_checkpointing": False})
    for gib in (8, 16, 24, 40):
        device = device_with(gib)
        found = advice(card, method, given, device)
        assert len(found) <= 3
        for one in found:
            assert one.changed
            assert measure(card, workload(card, method, {**given, **one.changed}), device).total <= gib
    assert len(advice(card, method, given, device_with(20))) >= 1


def test_the_least_is_nf4_with_everything_recomputed():
    work = least(workload(read_card("qwen2.5-7b"), "sft", {"load_in_4bit": False, "gradient_checkpointing": False}))
    assert (work.precision, work.gradient_checkpointing) == ("nf4", True)
    assert least(work, {"load_in_4bit"}).precision == work.precision
