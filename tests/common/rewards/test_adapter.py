"""A reward model as `make reward` writes it: found for its base alone, and loaded as the reward model or the critic."""

import copy

import pytest
import torch
from common.errors import InputError
from common.lm.scalar_head import new_head, save_head, score_last
from common.rewards.adapter import find_reward_adapter, load_reward_adapter
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

CONFIG = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run, with an adapter that was trained with dropout."""
    folder = tmp_path_factory.mktemp("reward")
    get_peft_model(copy.deepcopy(base), CONFIG).save_pretrained(folder / "adapter")
    head = new_head(base.config.hidden_size, "cpu")
    torch.nn.init.normal_(head.weight)
    save_head(head, folder / "adapter", {"kind": "regression", "base": "abc", "mean": 0.0, "std": 1.0})
    return folder


def test_it_is_found_by_its_run_and_by_its_own_folder(run):
    assert find_reward_adapter(str(run), "abc") == find_reward_adapter(str(run / "adapter"), "abc") == run / "adapter"


def test_it_is_refused_on_another_base_and_where_there_is_none(run, tmp_path):
    with pytest.raises(InputError, match=r"was trained on another base \(abc\) than --model \(xyz\)"):
        find_reward_adapter(str(run), "xyz")
    with pytest.raises(InputError, match=f"--rewards model:{tmp_path}"):
        find_reward_adapter(str(tmp_path), "abc")


def test_scores_and_values_are_the_same_each_time_although_it_was_trained_with_dropout(base, run):
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    heads = {
        "reward": load_reward_adapter(model, run / "adapter", "reward"),
        "critic": load_reward_adapter(model, run / "adapter", "critic", is_trainable=True),
    }
    model.train()
    rows = [([5, 6, 7], [8, 9]), ([11], [12, 13])]
    scores = {}
    for name, head in heads.items():
        model.set_adapter(name)
        scores[name] = score_last(model, head, rows, 0)
        assert score_last(model, head, rows, 0) == scores[name]
    assert scores["critic"] == scores["reward"]
    assert scores["reward"][0] != pytest.approx(scores["reward"][1], abs=1e-3)
    loss = heads["critic"](model.get_base_model().model(torch.tensor([[5, 6]])).last_hidden_state).sum()
    loss.backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if ".critic." in name)
    assert all(weight.grad is None for name, weight in model.named_parameters() if ".reward." in name)
