"""A frozen base in fp8: products and gradients are those of an independent reference, its adapter an ordinary one."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common.arguments import check, read_fields
from common.errors import InputError, MachineError
from common.lm import fp8
from common.lm.load import check_precision, in_4bit
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(ROOT / "tests" / "references"))
import plain_fp8

BFLOAT16 = 2.0**-8  # of its value, the most that rounding to bfloat16 and adding in another order change
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
cosine = torch.nn.functional.cosine_similarity


def layer(rows, columns, bias=False):
    torch.manual_seed(rows)
    linear = torch.nn.Linear(columns, rows, bias=bias, dtype=torch.bfloat16)
    return linear, fp8.Fp8Linear(linear)


def array(tensor):
    return tensor.detach().double().numpy()


def near(ours, reference):
    assert np.abs(array(ours) - reference).max() <= BFLOAT16 * np.abs(reference).max()


def model(dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "data_samples" / "tiny", num_hidden_layers=2)
    config.layer_types = config.layer_types[:2]
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(base):
    return get_peft_model(base, LoraConfig(r=4, target_modules=PROJECTIONS))


def test_codes_are_the_nearest_values_of_e4m3():
    codes = torch.arange(127, dtype=torch.uint8).view(fp8.E4M3)
    assert np.array_equal(array(codes), plain_fp8.values())
    x = torch.randn(64, 48) * torch.exp2(torch.arange(-40.0, 24)[:, None])  # rows of very different size
    x[3] = 0
    x[5, 7] = 1e4  # an outlier takes the precision of its own row alone
    ours, scale = fp8.quantize_rows(x)
    values, scales = plain_fp8.quantized(np.delete(array(x), 3, 0))
    assert np.array_equal(np.delete(array(ours), 3, 0), values)
    assert np.allclose(np.delete(array(scale), 3, 0), scales, rtol=1e-7)
    assert not array(ours)[3].any()


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(33, 96, 64), (1, 16, 256), (20, 256, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_and_input_gradient_are_the_references(tokens, rows, columns, dtype):
    linear, ours = layer(rows, columns)
    weight = array(linear.weight)
    x = (torch.randn(2, tokens, columns) * torch.rand(2, tokens, 1)).to(dtype).requires_grad_()
    dy = (torch.randn(2, tokens, rows) * 1e-6).to(dtype)  # as small as the gradient of a mean over a batch
    y = ours(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    near(y.reshape(-1, rows), plain_fp8.forward(array(x).reshape(-1, columns), weight))
    near(x.grad.reshape(-1, columns), plain_fp8.backward(array(dy).reshape(-1, rows), weight))


def test_a_token_does_not_depend_on_its_batch():
    _, ours = layer(64, 32, bias=True)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert torch.equal(torch.cat([ours(row[None]) for row in x]), ours(x))


def test_one_byte_a_weight_and_no_gradient():
    _, ours = layer(64, 32, bias=True)
    stored = {name: weight.numel() * weight.element_size() for name, weight in ours.named_parameters()}
    assert stored == {"qweight": 64 * 32, "scale": 4 * 64, "bias": 2 * 64}
    assert not list(ours.buffers())
    ours(torch.randn(3, 32, requires_grad=True)).sum().backward()
    assert ours.qweight.grad is ours.scale.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_learns_nearly_what_it_learns_on_the_16_bit_base(dtype):
    ids = torch.randint(0, 2048, (2, 40))
    gradients = []
    for quantize in (lambda _: None, fp8.quantize_base):
        base = model(dtype)
        quantize(base)
        tuned = adapted(base)
        torch.manual_seed(1)
        trained = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
        for weight in trained.values():
            torch.nn.init.normal_(weight, std=0.05)
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            tuned(input_ids=ids, labels=ids).loss.backward()
        assert {weight.dtype for weight in trained.values()} == {torch.float32}
        gradients.append({name: weight.grad for name, weight in trained.items()})
    sixteen, eight = gradients
    assert sixteen.keys() == eight.keys()  # so the adapter's file fits the 16-bit base
    assert min(cosine(sixteen[name].flatten(), eight[name].flatten(), 0) for name in sixteen) > 0.95


def test_its_adapter_is_one_of_the_16_bit_base(tmp_path):
    base = model()
    fp8.quantize_base(base)
    tuned = adapted(base)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), str(tmp_path))
    ids = torch.randint(0, 2048, (1, 30))
    with torch.no_grad():
        eight, sixteen, without = tuned(ids).logits, loaded(ids).logits, model()(ids).logits
    assert cosine(eight.flatten(), sixteen.flatten(), 0) > 0.99 > cosine(eight.flatten(), without.flatten(), 0)


def test_head_embedding_and_norms_stay_as_they_were():
    base, before = model(torch.bfloat16), model(torch.bfloat16)
    fp8.quantize_base(base)
    changed = {name for name, module in base.named_modules() if isinstance(module, fp8.Fp8Linear)}
    assert {name.rpartition(".")[2] for name in changed} == set(PROJECTIONS)
    assert len(changed) == 2 * len(PROJECTIONS)
    old = dict(before.named_parameters())
    for name, weight in base.named_parameters():
        if name.rpartition(".")[0] not in changed:
            assert torch.equal(weight, old[name])


def test_training_compiles_it_whole_and_computes_the_same():
    """What Unsloth compiles by layer, and `quantize_base` by projection; and one graph serves all layers."""
    _, gate = layer(64, 32)
    _, up = layer(64, 32)
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    results = []
    for function in (
        lambda x: gate(x) * up(x),
        torch.compile(lambda x: gate(x) * up(x), backend="aot_eager", fullgraph=True),
    ):
        own = x.clone().requires_grad_()
        y = function(own)
        y.sum().backward()
        results.append((y, own.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_base_that_the_tensor_cores_cannot_multiply_is_refused_whole():
    base = model()
    base.model.layers[1].mlp.up_proj = torch.nn.Linear(256, 500)
    with pytest.raises(InputError, match=r"--load-in-fp8: model.layers.1.mlp.up_proj is 500 x 256.*multiples of 16"):
        fp8.quantize_base(base)
    assert not any(isinstance(module, fp8.Fp8Linear) for module in base.modules())
    base = model()
    fp8.quantize_base(base)
    with pytest.raises(InputError, match="stored in few bits already"):
        fp8.quantize_base(base)


FP8 = SimpleNamespace(load_in_fp8=True, load_in_4bit=True, dtype="auto")


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_older_gpus_are_refused_by_name(monkeypatch, capability, works):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    if works:
        check_precision(FP8, {"load_in_4bit": "recipe"})
        assert not in_4bit(load_in_4bit=True, load_in_fp8=True)  # the default, nf4, is off
    else:
        with pytest.raises(MachineError, match=rf"NVIDIA A100 has {capability[0]}.{capability[1]}") as refused:
            check_precision(FP8, {"load_in_4bit": "recipe"})
        assert refused.value.exit_code == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(MachineError, match="needs a GPU of Ada, Hopper or Blackwell"):
        check_precision(FP8, {"load_in_4bit": "recipe"})


@pytest.mark.parametrize(
    ("four_bit", "origin", "dtype", "message"),
    [
        (True, "command line", "auto", "--load-in-4bit and --load-in-fp8 are two ways"),
        (True, "recipe", "float16", "leave out --dtype float16"),
        (True, "recipe", "auto", None),
        (True, "card tiny", "bfloat16", None),
        (False, "command line", "auto", None),
    ],
)
def test_it_replaces_4_bit_unless_both_are_given(monkeypatch, four_bit, origin, dtype, message):
    monkeypatch.setattr(fp8, "check_fp8_device", lambda: None)
    args = SimpleNamespace(load_in_fp8=True, load_in_4bit=four_bit, dtype=dtype)
    if message is None:
        check_precision(args, {"load_in_4bit": origin})
    else:
        with pytest.raises(InputError, match=message):
            check_precision(args, {"load_in_4bit": origin})


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_recipes_that_sample_refuse_it_with_the_reason(recipe):
    fields = read_fields(ROOT / "recipes" / f"{recipe}.py")
    with pytest.raises(InputError, match=r"there is no --load-in-fp8 here: .*the policy that samples"):
        check(fields, ["--load-in-fp8"], recipe)
