"""Switching adapters gives the model that PEFT's own switches give, and leaves gradients alone."""

import copy
import gc
import weakref

import pytest
import torch
from common.lm.active_adapter import active_adapter, switch_quickly
from conftest import ROOT


@pytest.fixture(scope="module")
def model():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.add_adapter("critic", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_each_adapter_computes_as_under_pefts_own_switches(model):
    policy = logits(model)
    model.set_adapter("critic")
    critic = logits(model)
    model.set_adapter("default")
    with model.disable_adapter():
        reference = logits(model)
    for name, expected in (("default", policy), ("critic", critic), (None, reference)):
        with active_adapter(model, name):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), policy)
    assert not torch.equal(policy, critic)
    assert not torch.equal(policy, reference)


def test_after_an_error_it_is_the_policy_and_no_flag_has_changed(model):
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    policy = logits(model)
    for name in ("critic", None):
        with pytest.raises(ZeroDivisionError), active_adapter(model, name):
            raise ZeroDivisionError
        assert torch.equal(logits(model), policy)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_a_quick_switch_gives_the_reference_policy_and_leaves_gradients_alone(model):
    policy = logits(model)
    with model.disable_adapter():
        reference = logits(model)
    switch_quickly(model)
    try:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        with model.disable_adapter():
            assert torch.equal(logits(model), reference)
            assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert torch.equal(logits(model), policy)
    finally:
        del model.disable_adapter


def test_a_model_that_has_been_switched_ends_with_its_last_user(model):
    other = copy.deepcopy(model)
    with active_adapter(other, None):
        there = weakref.ref(other)
    del other
    gc.collect()
    assert there() is None
