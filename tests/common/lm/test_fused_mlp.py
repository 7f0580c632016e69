"""The MLP under LoRA in few passes computes what PEFT computes, values and gradients."""

import pytest
import torch
from common.lm import fused_mlp
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(rank: int = 4, **more: object):
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=48, intermediate_size=80, **SHAPE)
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], **more
    )
    model = get_peft_model(Qwen2ForCausalLM(config), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.bfloat16()


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.arange(60).view(3, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def worst(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-9)) for n in theirs)


def test_loss_and_gradients_are_those_of_peft():
    model = adapted()
    _, gradients = loss_and_gradients(model)
    exact_loss, exact = loss_and_gradients(model.float())
    model.bfloat16()
    assert fused_mlp.fuse_mlps(model) == 2
    fused_loss, fused = loss_and_gradients(model)
    assert fused_loss == pytest.approx(exact_loss, abs=2e-3)
    assert worst(fused, exact) < 1.5 * worst(gradients, exact) < 0.1
