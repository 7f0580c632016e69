"""Embeddings beside an adapter: their own rate, tied as in the model, and proof that the saved file has them."""

import pytest
import torch
from common.errors import MachineError
from common.lm.adapter import check_plain
from common.lm.embeddings import EmbeddingRate, check_saved, embedding_modules, train_in_float32
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

IDS = torch.tensor([[5, 6, 7, 8]])


def base(tied, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "data_samples" / "tiny", tie_word_embeddings=tied, num_hidden_layers=1)
    config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def with_adapter(tied, dtype=torch.float32):
    model = base(tied, dtype)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **embedding_modules(model)))
    train_in_float32(model)
    return model


def trained(model, folder):
    """One step of a trainer at two rates; the size of the step that Adam takes is the rate."""
    trainer = EmbeddingRate(model, TrainingArguments(output_dir=folder, learning_rate=1e-2, report_to=[]))
    trainer.embedding_learning_rate = 1e-3
    optimizer = trainer.create_optimizer()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_trained_is_saved_and_tied_as_it_was(tmp_path, tied, dtype):
    model = with_adapter(tied, dtype)
    optimizer = trained(model, tmp_path)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert rates.pop(id(weight)) == (1e-3 if "modules_to_save" in name else 1e-2)
            assert weight.dtype == torch.float32  # steps of 1e-3 are rounded away in bfloat16
    assert not rates
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    step = (ends[0].weight.detach() - ends[0].original_module.weight).abs().max()
    assert float(step) == pytest.approx(1e-3, rel=0.1 if dtype == torch.bfloat16 else 0.01)

    model.save_pretrained(tmp_path)
    moved = check_saved(tmp_path, model)
    check_plain(tmp_path)  # evaluate and the like put it on its base as it is
    assert moved["lm_head"] == 2048
    assert moved["embed_tokens"] == (2048 if tied else 3)  # of tokens that another token follows
    again = PeftModel.from_pretrained(base(tied, dtype), tmp_path)
    ends = again.get_input_embeddings(), again.get_output_embeddings()
    assert (ends[0].weight is ends[1].weight) == tied
    if dtype == torch.float32:
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
        merged = again.merge_and_unload()
        assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
        assert torch.allclose(merged(IDS).logits, model(IDS).logits, atol=1e-5)


def without(*leaves):
    return lambda weights, _: {name: weight for name, weight in weights.items() if name.split(".")[-2] not in leaves}


def as_in_base(weights, model):
    return weights | {
        name: model.get_output_embeddings().original_module.weight.detach() for name in weights if "lm_head" in name
    }


def no_longer_tied(weights, _):
    return weights | {name: weight + 1 for name, weight in weights.items() if "lm_head" in name}


@pytest.mark.parametrize(("tied", "damage", "says"), [
    (True, without("embed_tokens", "lm_head"), "embed_tokens is not in the saved adapter"),
    (True, without("embed_tokens"), "embed_tokens is not in the saved adapter"),
    (True, as_in_base, "lm_head is saved as it was in the base"),
    (True, no_longer_tied, "are tied in the base and differ in the saved adapter"),
    (False, without("lm_head"), "lm_head is not in the saved adapter"),
    (False, without("embed_tokens"), "embed_tokens is not in the saved adapter"),
    (False, as_in_base, "lm_head is saved as it was in the base"),
])  # fmt: skip
def test_an_adapter_that_lost_them_is_refused(tmp_path, tied, damage, says):
    model = with_adapter(tied)
    trained(model, tmp_path)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: weight.clone() for name, weight in damage(load_file(file), model).items()}, file)
    with pytest.raises(MachineError, match=says):
        check_saved(tmp_path, model)


def test_a_model_without_trained_embeddings_has_one_rate(tmp_path):
    model = base(True)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    train_in_float32(model)
    assert {group["lr"] for group in trained(model, tmp_path).param_groups} == {1e-2}
