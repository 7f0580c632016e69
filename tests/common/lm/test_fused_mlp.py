"""The MLP under LoRA in few passes computes what PEFT computes, values and gradients."""

import os
import subprocess
import sys

import pytest
import torch
from common.lm import fused_mlp
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch._inductor.utils import run_and_get_code
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


def recomputed(model, reentrant):
    """The same model, whose layers keep no activations."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


@pytest.mark.parametrize(("reentrant", "again"), [(True, [2, 2]), (False, [2, 1, 2, 1])])
def test_a_recomputed_layer_has_the_gradients_without_the_product_that_it_does_not_need(reentrant, again, monkeypatch):
    model, counts = adapted(), []
    fused_mlp.fuse_mlps(model)
    whole = fused_mlp.products
    monkeypatch.setattr(fused_mlp, "products", lambda x, *w: counts.append(len(w)) or whole(x, *w))
    loss, plain = loss_and_gradients(model)
    assert counts == [2, 1, 2, 1]  # gate and up, down; of each layer
    counts.clear()
    second_loss, second = loss_and_gradients(recomputed(model, reentrant))
    assert counts == [2, 1, 2, 1, *again]
    assert second_loss == loss
    assert worst(second, plain) == 0
    assert fused_mlp.RECOMPUTING == [False]


def test_a_recomputed_layer_is_computed_in_parts_of_its_rows_with_the_gradients_of_all(monkeypatch):
    model, widths = recomputed(adapted(), True), []
    fused_mlp.fuse_mlps(model)
    _, whole = loss_and_gradients(model)
    products = fused_mlp.products
    monkeypatch.setattr(fused_mlp, "products", lambda x, *w: widths.append(len(x)) or products(x, *w))
    monkeypatch.setattr(fused_mlp, "PART", 25)
    _, parts = loss_and_gradients(model)
    forward = [25, 25, 25, 25, 10, 10]  # gate and up, down; of a layer
    assert widths == forward * 2 + [25, 25, 10] * 2  # then the two layers from the last to the first
    assert 0 < worst(parts, whole) < 0.02


@pytest.mark.slow
def test_it_can_be_compiled_as_one_graph_in_which_no_adapter_is_added_to_a_copy():
    model = adapted()
    fused_mlp.fuse_mlps(model)
    _, plain = loss_and_gradients(model)
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, fullgraph=True)
    (_, compiled), codes = run_and_get_code(loss_and_gradients, model)
    assert worst(compiled, plain) < 0.02
    code = "".join(codes)
    assert code.count("ops.recipes.add_product.default(") == 3  # of one layer, which is compiled once
    assert "addmm" not in code
    assert "clone" not in code


def test_no_other_mlp_is_fused():
    assert fused_mlp.fuse_mlps(adapted(lora_dropout=0.1)) == 0
    assert fused_mlp.fuse_mlps(adapted(lora_bias=True)) == 0
    assert fused_mlp.fuse_mlps(adapted(use_dora=True)) == 0
    assert fused_mlp.fuse_mlps(adapted(rank_pattern={"up_proj": 8})) == 0


def test_a_disabled_adapter_is_left_out_and_rounding_is_that_of_an_adapter_of_zeros():
    model, ids = adapted(), torch.arange(40).view(2, 20)
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=ids).logits
    fused_mlp.fuse_mlps(model)
    with torch.no_grad():
        adapter = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
        assert torch.equal(model(input_ids=ids).logits, base)  # the first loss of DPO is ln 2
    assert torch.allclose(base, before, atol=0.02)
    assert not torch.allclose(adapter, base, atol=0.02)


@pytest.mark.slow
def test_the_kernels_compute_the_formulas():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "recipes")}
    script = [sys.executable, str(ROOT / "tests" / "references" / "mlp_kernels.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(differences) == 4
    assert max(differences) < 1e-5
