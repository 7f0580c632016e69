"""What the planner reads of recipes and cards."""

from types import SimpleNamespace

import pytest
from common.arguments import read_fields
from common.lm.cards import read_card
from common.plan.workload import COUNTED, METHODS, recipe_defaults, settings, workload
from conftest import ROOT


def test_every_argument_that_counts_is_one_of_a_recipe():
    known = {field.name for method in METHODS for field in read_fields(ROOT / "recipes" / f"{method}.py") or []}
    assert set(COUNTED) - {"load_in_fp8"} <= known


def test_defaults_are_the_recipes_own():
    assert recipe_defaults("sft")["max_length"] == 2048
    assert len(recipe_defaults("sft")["lora_target_modules"]) == 7
    assert recipe_defaults("ppo")["lora_target_modules"] == ()
    with pytest.raises(ValueError, match="no method 'orpo'"):
        recipe_defaults("orpo")


def test_what_a_card_sets_is_planned_for_and_what_is_given_wins():
    tiny = read_card("tiny")
    assert settings(tiny, "sft")["max_length"] == 512
    assert settings(tiny, "sft", {"max_length": 64})["max_length"] == 64
    work = workload(tiny, "grpo")
    # A prompt of the recipe's 1024 tokens and the card's completion of 64; one micro-batch of 128 completions.
    assert (work.length, work.completion, work.rows, work.generated, work.group) == (1088, 64, 128, 128, 8)
    unknown = SimpleNamespace(parameters=tiny.parameters, architecture=tiny.architecture)
    assert workload(unknown, "sft").length == 2048


def test_ppo_adapts_the_attention_or_what_its_reward_model_does():
    card = read_card("qwen2.5-7b")
    assert workload(card, "ppo").attention_only
    with_model = workload(card, "ppo", {"reward_model": "outputs/reward"})
    assert with_model.reward_model
    assert not with_model.attention_only


def test_a_step_keeps_its_rows_in_other_micro_batches():
    work = workload(read_card("qwen2.5-7b"), "sft")
    assert (work.rows, work.accumulation) == (4, 4)
    assert work.with_rows(1).step_rows == work.step_rows == 16
