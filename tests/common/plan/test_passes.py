"""The seconds of a pass, against sums that were worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from common.plan import passes
from common.plan.devices import Device
from common.plan.memory import NF4_BYTES
from common.plan.passes import forward, training
from common.plan.time import of_method
from common.plan.workload import Workload

ROUND = Device("round", gib=80, tflops=1, bandwidth=1)  # 1e12 operations and 1e9 bytes a second
# Two layers: a = 8 wide, kv = 4. Linear weights 2 x (8*8*2 + 8*4*2 + 3*8*64) = 3456, of LoRA of rank 2 2 x 544.
LITTLE = SimpleNamespace(
    hidden_size=8, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=4, vocab_size=100, tied_embeddings=True
)
PRODUCTS = 2 * 1024 * (3456 + 1088) / (1e12 * passes.PRODUCTS)
ATTENTION = 2 * 1024 * 8 * 2 * 1024 / 1e12  # two products of 1024 x 1024 / 2 x 8 in each layer, 2 operations each
BLOCK = 4 * 64 + 8 * 8 + 6 * 8 + 8 * 4  # bytes of a token that a layer keeps
MOVED = BLOCK * 2 * 1024 * passes.TRAFFIC / (1e9 * passes.BANDWIDTH_SHARE)  # forward and backward
LOGITS = 2 * 1024 * 100 * 8 / (1e12 * passes.PRODUCTS)


def of(method: str, **more) -> Workload:
    """1024 tokens in one row, in 16 bit, LoRA of rank 2, nothing recomputed."""
    values = {"precision": "16 bit", "gradient_checkpointing": False, "rows": 1, "accumulation": 1, "length": 1024}
    return Workload(method, **{**values, "completion": 0, "lora_r": 2, "packing": False, **more})


def test_a_forward_pass_is_products_attention_and_bytes():
    found = forward(LITTLE, of("sft"), ROUND).gpu
    assert found == pytest.approx(PRODUCTS + ATTENTION / passes.ATTENTION + MOVED / 3 + LOGITS)
    assert forward(LITTLE, of("sft"), ROUND, head=False).gpu == pytest.approx(found - LOGITS)


def test_a_backward_pass_has_the_products_once_more_and_attention_two_and_a_half_times():
    once = forward(LITTLE, of("sft"), ROUND).gpu
    back = PRODUCTS + 2.5 * ATTENTION / passes.ATTENTION_BACK + 2 / 3 * MOVED + LOGITS  # no gradient of the base
    assert training(LITTLE, of("sft"), ROUND).gpu == pytest.approx(once + back)


def test_what_is_recomputed_is_the_layers_without_the_down_projection():
    kept, again, half = (
        training(LITTLE, of("sft", gradient_checkpointing=on, kept_layers=layers), ROUND)
        for on, layers in ((False, 0), (True, 0), (True, 1))
    )
    layers = forward(LITTLE, of("sft"), ROUND, head=False).gpu
    assert again.gpu - kept.gpu == pytest.approx(layers * (1 - 2 * 8 * 64 / 3456))
    assert half.gpu - kept.gpu == pytest.approx((again.gpu - kept.gpu) / 2)
    assert again.processor - kept.processor == pytest.approx(2 * passes.COMPILED[0])  # but started they are whole


def test_nf4_is_expanded_in_every_pass_and_fp8_multiplies_faster():
    plain, nf4, fp8 = (forward(LITTLE, of("sft", precision=one), ROUND) for one in ("16 bit", "nf4", "fp8"))
    assert nf4.gpu - plain.gpu == pytest.approx(3456 * (NF4_BYTES + 2) / (1e9 * passes.DEQUANTIZE))
    base = 2 * 1024 * 3456 / (1e12 * passes.PRODUCTS)
    assert plain.gpu - fp8.gpu == pytest.approx(base * (1 - 1 / passes.FP8_GAIN))


def test_the_longer_of_gpu_and_processor_decides():
    slow = Device("slow", gib=80, tflops=1e-3, bandwidth=1e-3)
    fast = Device("fast", gib=80, tflops=1e6, bandwidth=1e6)
    here, there = (training(LITTLE, of("sft"), device) for device in (slow, fast))
    assert here.seconds == here.gpu > here.processor == there.processor
    assert there.seconds == there.processor == pytest.approx(2 * sum(passes.COMPILED) + passes.MICRO_BATCH)


def test_a_method_has_the_passes_of_its_algorithm():
    def seconds(method: str, **more) -> float:
        return of_method(LITTLE, of(method, **more), ROUND).gpu

    trained, states, once = (
        training(LITTLE, of("dpo"), ROUND).gpu,
        forward(LITTLE, of("dpo"), ROUND, head=False).gpu,
        forward(LITTLE, of("dpo"), ROUND).gpu,
    )
    assert seconds("dpo") == pytest.approx(trained + once)  # the reference policy
    assert seconds("dpo", reference=False) == pytest.approx(trained)
    assert seconds("dpo", accumulation=3) == pytest.approx(3 * (trained + once))
    # KTO: the reference policy, and of the mismatched completions both policies.
    trained, once = training(LITTLE, of("kto"), ROUND).gpu, forward(LITTLE, of("kto"), ROUND).gpu
    assert seconds("kto") == pytest.approx(trained + 3 * once)
    trained, headless = (training(LITTLE, of("ppo", rows=4), ROUND, head=head).gpu for head in (True, False))
    once, states = (forward(LITTLE, of("ppo", rows=4), ROUND, head=head).gpu for head in (True, False))
    # PPO, 8 completions in passes of 4: policy, reference policy and critic, then policy and critic in each epoch.
    rollout = {"rows": 4, "accumulation": 1, "generated": 8}
    assert seconds("ppo", **rollout, passes=3) == pytest.approx(2 * (2 * once + states + 3 * (trained + headless)))
    more = seconds("ppo", **rollout, reward_model=True) - seconds("ppo", **rollout)
    assert more == pytest.approx(2 * states)


def test_iterations_share_what_is_computed_once_for_a_rollout():
    work = of("grpo", rows=4, accumulation=2, generated=8, completion=512, reference=False)
    four = replace(work, rows=4, completion=0)  # the completions that are measured, by the policy and the base
    one, two = (of_method(LITTLE, replace(work, passes=passes), ROUND).gpu for passes in (1, 2))
    trained, measured = 2 * training(LITTLE, work, ROUND).gpu, 2 * forward(LITTLE, four, ROUND).gpu
    assert one == pytest.approx(trained + measured)
    assert two == pytest.approx(trained + (measured + 2 * forward(LITTLE, work, ROUND).gpu) / 2)
