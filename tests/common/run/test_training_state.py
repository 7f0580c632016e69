import copy
import gc
import weakref
from contextlib import suppress

import pytest
import torch
from common.errors import Stopped
from common.run.folder import plan_run
from common.run.training_state import one_tensor


def step(model, trained, x):
    """Two backward passes, clipping and a step of Adam over the tensors `trained` that the weights of `model` are."""
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        model(x).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return float(norm)


def test_parameters_in_one_tensor_take_the_same_step_and_share_its_memory():
    torch.manual_seed(0)
    apart = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    together = copy.deepcopy(apart)
    parameters = [*together.parameters()]
    whole = one_tensor(parameters)
    assert whole.shape == (sum(parameter.numel() for parameter in parameters),)
    for _ in range(3):
        x = torch.randn(4, 5)
        assert step(together, [whole], x) == pytest.approx(step(apart, [*apart.parameters()], x), rel=1e-6)
    for one, other in zip(parameters, apart.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)
        assert not one.grad.any()
    together.load_state_dict({name: torch.zeros_like(value) for name, value in together.state_dict().items()})
    assert not whole.any()  # what is loaded reaches the optimizer


def test_an_adapter_in_one_tensor_is_saved_and_loaded_as_before(tmp_path):
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    parameters = [weight for name, weight in model.named_parameters() if "lora_" in name]
    kept = [weight.detach().clone() for weight in parameters]
    whole = one_tensor(parameters)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * whole.numel() * 4
    whole.data.zero_()
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path), device="cpu"))
    assert all(torch.equal(weight, old) for weight, old in zip(parameters, kept, strict=True))
    assert whole.norm() > 0


def test_bitsandbytes_forgets_the_modules_of_a_run_when_it_ends(tmp_path):
    """Trainers register embeddings for an optimizer state of 32 bit; the next optimizer would take that for its own."""
    import bitsandbytes

    manager, module = bitsandbytes.optim.GlobalOptimManager.get_instance(), torch.nn.Embedding(4, 2)
    there = weakref.ref(module)
    with suppress(Stopped), plan_run("sft", "tiny", str(tmp_path), {}, {}, {}):
        manager.register_module_override(module, "weight", {"optim_bits": 32})
        manager.index2config[0, 0] = {"optim_bits": 32}
        del module
        assert there() is not None
        raise Stopped("SIGTERM", "after step 7 of 9")
    gc.collect()
    assert there() is None
    assert manager.index2config == {}
