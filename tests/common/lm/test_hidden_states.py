"""Hidden states: computed under the active adapter, padded on the right, picked at the right positions."""

import pytest
import torch
from common.lm.hidden_states import at_last_token, last_hidden, pad_right, states_before
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


def test_rows_are_padded_on_the_right_and_read_at_their_last_token():
    ids, mask = pad_right([[1, 2, 3], [4]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    values = torch.arange(12).view(2, 3, 2)
    assert at_last_token(values, mask).tolist() == [[4, 5], [6, 7]]


def test_the_hidden_states_are_those_under_the_output_layer_with_the_adapter_on(model):
    ids, mask = pad_right([prompt + completion for prompt, completion in ROWS], PAD, "cpu")
    hidden = last_hidden(model, ids, mask)
    assert hidden.shape == (3, 6, 256)
    whole = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert torch.allclose(hidden, whole.hidden_states[-1], atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(hidden, last_hidden(model, ids, mask), atol=1e-2)


def test_states_are_taken_one_column_before_the_token():
    hidden = torch.arange(2 * 6).reshape(2, 6, 1).float()
    states = states_before(hidden, torch.tensor([3, 5]), 3)[..., 0]
    assert states[0].tolist() == [2, 3, 4]  # the completion is columns 3, 4, 5
    assert states[1, 0] == 6 + 4  # the completion is column 5; the others are padding
