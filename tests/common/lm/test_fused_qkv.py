"""Queries, keys and values by one product are those of PEFT's three layers, with their gradients."""

from contextlib import nullcontext

import pytest
import torch
from common.lm.fp8 import quantize_base
from common.lm.fused_qkv import NAMES, fuse_qkv
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 100}


def three(self, x):
    return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def adapted(fp8: bool = False, **more: object):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=80, **SHAPE)).bfloat16()
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.bias)
    if fp8:
        quantize_base(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES), **more))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.apply_qkv = three  # where Unsloth has its own
    return model, attention


def outputs_and_gradients(model, attention, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    parts = attention.apply_qkv(attention, x)
    torch.stack([(part.float() * torch.arange(part.shape[-1]).cos()).sum() for part in parts]).sum().backward()
    return [*parts, x.grad, *(p.grad for p in attention.parameters() if p.grad is not None)]


@pytest.mark.parametrize("layout", [{}, {"rank_pattern": {"k_proj": 2}}])
def test_outputs_and_gradients_are_those_of_the_three_layers(layout):
    model, attention = adapted(**layout)
    x = torch.randn(2, 9, 64).bfloat16()
    before = outputs_and_gradients(model, attention, x)
    stored = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert fuse_qkv(model) == 1
    after = outputs_and_gradients(model, attention, x)
    assert len(after) == len(before) == 10
    for ours, theirs in zip(after, before, strict=True):
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.01
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in stored.items())


def test_without_its_adapter_the_base_is_left():
    model, attention = adapted()
    x = torch.randn(2, 9, 64).bfloat16()
    fuse_qkv(model)
    with torch.no_grad(), model.disable_adapter():
        alone = attention.apply_qkv(attention, x)
        layers = [getattr(attention, name).base_layer(x) for name in NAMES]
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(alone, layers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_compiled_it_learns_the_same(fp8):
    model, attention = adapted(fp8=fp8)
    x = torch.randn(2, 9, 64).bfloat16()
    fuse_qkv(model)
    expected = outputs_and_gradients(model, attention, x)
    torch._dynamo.reset()
    attention.apply_qkv = torch.compile(attention.apply_qkv, backend="aot_eager", fullgraph=True)
    found = outputs_and_gradients(model, attention, x)
    assert len(found) == len(expected) == 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("adapter", [True, False])
def test_compiled_without_gradients_it_is_the_same(adapter, fp8):
    """As KTO runs the policy on mismatched completions, and DPO the reference policy."""
    model, attention = adapted(fp8=fp8)
    x = torch.randn(2, 9, 64).bfloat16()
    fuse_qkv(model)
    called = []

    def record(graph, inputs):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attention.apply_qkv, backend=record, fullgraph=True)
    with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
        expected, found = attention.apply_qkv(attention, x), compiled(attention, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # In fp8 the sum with the bias is rounded before anything is fused with it, with and without the adapter alike.
    assert fp8 == any("add_bias" in str(target) for target in called)


def test_one_weight_is_held_once():
    model, attention = adapted()
    fuse_qkv(model)
    begin = attention.qkv_weight.untyped_storage().data_ptr()
    assert {getattr(attention, name).weight.untyped_storage().data_ptr() for name in NAMES} == {begin}
    sent = {name for name, _ in model.named_buffers()} - set(model._ddp_params_and_buffers_to_ignore)
    assert not any("qkv" in name for name in sent)
    assert len(model._ddp_params_and_buffers_to_ignore) == 2  # weight and bias
    model, attention = adapted(fp8=True)
    fuse_qkv(model)
    begin = attention.qkv_qweight.untyped_storage().data_ptr()
    assert {getattr(attention, name).base_layer.qweight.untyped_storage().data_ptr() for name in NAMES} == {begin}


def test_other_adapters_stay_with_peft():
    assert fuse_qkv(adapted(lora_dropout=0.1)[0]) == 0
    assert fuse_qkv(adapted(use_dora=True)[0]) == 0
