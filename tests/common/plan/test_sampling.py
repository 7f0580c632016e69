"""What sampling holds: the rules are those of common/lm/rollout."""

import ast

import pytest
from common.lm.cards import read_card
from common.plan import sampling as rules
from common.plan.memory import CUDA_CONTEXT, GIB, base_bytes
from common.plan.workload import workload
from conftest import ROOT

ROLLOUT = ROOT / "recipes" / "common" / "lm" / "rollout"


def constants(file: str) -> dict[str, object]:
    """The numbers that a module names, read without importing torch."""
    found = {}
    for node in ast.parse((ROLLOUT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            code = compile(ast.Expression(node.value), file, "eval")
            if not any(isinstance(part, ast.Name | ast.Call | ast.Subscript) for part in ast.walk(node.value)):
                found[node.targets[0].id] = eval(code)
    return found


def test_the_numbers_are_those_of_the_decoder():
    of_rollouts, of_decoder = constants("rollouts.py"), constants("decoder.py")
    assert of_rollouts["RESERVE"] == rules.RESERVE
    assert of_rollouts["FEWEST_ROWS"] == rules.FEWEST_ROWS
    assert of_rollouts["LENGTH_STEP"] == rules.LENGTH_STEP
    assert of_rollouts["GENERATED"] == rules.GENERATED
    assert of_decoder["SIZES"] == rules.SIZES
    assert of_decoder["PREFILL"] == rules.PREFILL


def held(gib: float, load_in_4bit: bool = True, **given) -> rules.Sampling:
    card = read_card("qwen2.5-7b")
    work = workload(card, "grpo", {"load_in_4bit": load_in_4bit, "max_prompt_length": 256, **given})
    weights, linear = base_bytes(card, work)
    return rules.sampling(card.architecture, work, weights + CUDA_CONTEXT, gib * GIB, linear)


def test_the_copy_stays_on_a_large_card_goes_after_sampling_on_a_small_one_and_is_not_made_on_a_smaller():
    """As measured on a 7B in nf4: kept with 141 GB, released with 24, dequantized in each step with 16."""
    large, small, smaller = (held(gib) for gib in (137, 23.2, 15.4))
    assert large.copy == small.copy == 2 * 6_525_288_448
    assert large.kept == large.copy + large.cache
    assert small.kept == 0
    assert smaller.copy == 0
    assert 0 < smaller.rows <= 16


def test_a_cache_is_of_the_rows_that_are_sampled_at_once():
    one, more = held(137), held(137, per_device_train_batch_size=16, gradient_accumulation_steps=64)
    assert (one.rows, more.rows) == (16, rules.MAX_ROWS)
    assert one.cache == pytest.approx(16 * 768 * (4 * 28 * 4 * 128 + 12))
    assert more.cache == pytest.approx(16 * one.cache)
    assert held(137, rollouts="generate").copy == 0
