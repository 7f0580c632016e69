"""A scalar head on the hidden states of the tiny model: what it reads, what it computes, what a file keeps of it."""

import json

import pytest
import torch
from common.errors import InputError
from common.lm.scalar_head import apply_head, load_head, new_head, save_head, score_last
from conftest import ROOT

ROWS = [([5, 6, 7], [8, 9]), ([11], [12, 13, 14, 15, 16]), ([3, 4], [5])]
PAD = 0


@pytest.fixture(scope="module")
def model():
    """The tiny model under an adapter that changes what it computes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
    return model


@pytest.fixture
def head():
    head = new_head(256, "cpu")
    generator = torch.Generator().manual_seed(1)
    head.load_state_dict({"weight": torch.randn(1, 256, generator=generator), "bias": torch.tensor([0.5])})
    return head


def test_a_new_head_gives_0_and_its_weight_learns():
    head = new_head(8, "cpu")
    hidden = torch.randn(2, 3, 8)
    outputs = apply_head(head, hidden)
    assert outputs.shape == (2, 3)
    assert outputs.dtype == head.weight.dtype == head.bias.dtype == torch.float32
    assert not outputs.any()
    outputs.sum().backward()
    assert torch.allclose(head.weight.grad[0], hidden.sum((0, 1)))


def test_a_head_computes_in_32_bit_whatever_autocast_says():
    head = new_head(2, "cpu")
    head.load_state_dict({"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.zeros(1)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert apply_head(head, torch.tensor([[1.0, 2**-12]])).item() == 1 + 2**-12
        assert apply_head(head, torch.tensor([[1.0, 2**-12]], dtype=torch.bfloat16)).item() == 1 + 2**-12


def test_a_score_is_the_heads_output_at_the_last_token_of_the_row_alone(model, head):
    scores = score_last(model, head, ROWS, PAD, batch_size=2)
    for (prompt, completion), score in zip(ROWS, scores, strict=True):
        with torch.no_grad():
            hidden = model.get_base_model().model(torch.tensor([prompt + completion])).last_hidden_state[0, -1]  # (h,)
            assert score == pytest.approx(float(hidden @ head.weight[0] + 0.5), abs=1e-3)
    assert score_last(model, head, ROWS, PAD, batch_size=3) == pytest.approx(scores, abs=1e-3)
    assert len({round(score, 2) for score in scores}) == 3
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_head_is_kept_with_its_facts(head, tmp_path):
    facts = {"kind": "regression", "mean": 3.5, "std": 1.25, "base": "abc"}
    save_head(head, tmp_path / "new" / "folder", facts)
    again, loaded = load_head(tmp_path / "new" / "folder", "cpu")
    assert loaded == facts == json.loads((tmp_path / "new" / "folder" / "head.json").read_text())
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("lost", ["head.safetensors", "head.json"])
def test_a_folder_without_a_head_is_refused(head, tmp_path, lost):
    save_head(head, tmp_path, {})
    (tmp_path / lost).unlink()
    with pytest.raises(InputError, match=rf"has no {lost}; give the adapter folder of a run of `make reward`"):
        load_head(tmp_path, "cpu")
