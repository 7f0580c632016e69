"""The time of a step: what makes it longer, and the order of magnitude of runs that were measured."""

from dataclasses import replace

import pytest
from common.lm.cards import read_card
from common.plan.devices import DEVICES
from common.plan.search import measure
from common.plan.workload import METHODS, workload

H200 = DEVICES["h200"]


def seconds(method: str, model: str = "qwen2.5-7b", card: str = "h200", **given) -> float:
    sizes = read_card(model)
    return measure(sizes, workload(sizes, method, given), DEVICES[card]).time.seconds


@pytest.mark.parametrize("method", METHODS)
def test_more_takes_longer(method):
    length = "max_completion_length" if method in ("grpo", "ppo") else "max_length"
    plain = seconds(method)
    assert seconds(method, **{length: 4096}) > plain
    assert seconds(method, model="qwen2.5-14b") > plain > seconds(method, model="qwen2.5-1.5b")
    assert seconds(method, gradient_checkpointing=False) < plain
    assert seconds(method, card="h100") > plain < seconds(method, card="a100") < seconds(method, card="t4")


def test_the_same_step_in_larger_micro_batches_takes_no_longer():
    sizes = read_card("qwen2.5-7b")
    work = workload(sizes, "sft")
    assert measure(sizes, work, H200).time.seconds <= measure(sizes, work.with_rows(1), H200).time.seconds


def test_each_gpu_has_its_own_tokens():
    sizes = read_card("qwen2.5-7b")
    work = workload(sizes, "sft")
    one, eight = (measure(sizes, replace(work, gpus=gpus), H200).time for gpus in (1, 8))
    assert one.seconds == eight.seconds - eight.exchange
    assert eight.tokens == 8 * one.tokens


def test_gpus_share_a_step_and_exchange_the_adapters_gradients():
    """By hand: 40.4 million weights of 4 bytes, of which each of 4 GPUs sends 2 x 3/4, at 63 % of 450 GB/s."""
    sizes = read_card("qwen2.5-7b")
    one, four = (workload(sizes, "sft", {"gradient_accumulation_steps": 8}, gpus=gpus) for gpus in (1, 4))
    assert (one.accumulation, four.accumulation) == (8, 2)
    assert one.step_rows == four.step_rows
    assert measure(sizes, four, H200).time.exchange == pytest.approx(40.37e6 * 4 * 1.5 / 283.5e9, rel=0.01)
    sharded = measure(sizes, replace(four, sharded=True), replace(H200, link=0.01)).time  # GB/s; in nf4
    assert sharded.exchange == pytest.approx(2 * 2 * 0.75 * (0.5156 * 6.525e9 + 2 * 1.09e9) / 6.3e6, rel=0.02)


def test_steps_of_one_rollout_share_its_time():
    """GRPO samples once for all its iterations, and each iteration is a step of the optimizer, as TRL counts them."""
    sizes = read_card("qwen2.5-7b")
    one, four = (
        measure(sizes, workload(sizes, "grpo", {"num_iterations": iterations}), H200).time for iterations in (1, 4)
    )
    assert four.sampling == pytest.approx(one.sampling / 4)
    assert four.seconds < one.seconds < 4 * four.seconds
    assert one.tokens == four.tokens
