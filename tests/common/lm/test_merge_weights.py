"""`common/lm/merge.py`: the merged weights, computed by hand from the adapter's matrices, in both kinds of model."""

import json

import pytest
import torch
from common.lm.hub import find_model
from common.lm.merge import merge_weights, save_classifier
from conftest import ROOT

TINY = ROOT / "data_samples" / "tiny"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model():
    """The tiny model in bfloat16 under an adapter of random numbers, with r=4 and alpha=6."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    return get_peft_model(
        base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )


def by_hand(model):
    layer = model.get_base_model().get_submodule(LAYER)
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    return (layer.base_layer.weight.float() + 1.5 * product).to(torch.bfloat16)


def test_the_sum_is_in_32_bit_and_rounded_once(model):
    expected = by_hand(model)
    untouched = model.get_base_model().get_submodule("model.layers.0.self_attn.k_proj").weight.clone()
    merged = merge_weights(model)
    assert torch.equal(merged.get_submodule(LAYER).weight, expected)
    assert torch.equal(merged.get_submodule("model.layers.0.self_attn.k_proj").weight, untouched)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_classifier_has_the_same_weights_and_the_head(model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    head = torch.nn.Linear(model.config.hidden_size, 1)
    save_classifier(model, head, find_model("tiny"), tmp_path, 3, {"kind": "regression"})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    merged = merge_weights(model)
    for name in (LAYER, "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(loaded.get_submodule(name).weight, merged.get_submodule(name).weight), name
    assert torch.equal(loaded.score.weight, head.weight.to(torch.bfloat16))
    assert loaded.config.pad_token_id == 3
    assert json.loads((tmp_path / "head.json").read_text())["kind"] == "regression"
