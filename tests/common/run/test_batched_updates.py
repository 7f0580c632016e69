"""Updates of many matrices at a time against those of bitsandbytes, one by one; both by its own kernels."""

import copy

import bitsandbytes
import pytest
import torch
from common.run import batched_updates
from common.run.batched_updates import BatchedUpdates, batch_updates

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
SHAPES = [(16, 320), (64, 128), (5120,), (16, 512), (16, 8), (4099,), (32, 256), (512, 16), (8, 640), (33, 128)]


def weights(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES]


def optimizer_of(parameters, kind=bitsandbytes.optim.AdamW8bit, batched=True):
    groups = [{"params": parameters[:6], "weight_decay": 0.1}, {"params": parameters[6:], "lr": 3e-3}]
    optimizer = kind(groups, lr=1e-2)
    if batched:
        batch_updates(optimizer)
        assert isinstance(optimizer, BatchedUpdates)
    return optimizer


def take(parameters, optimizer, steps, without=()):
    for step in steps:
        torch.manual_seed(100 + step)
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape).to(parameter)
            parameter.grad = None if (step, index) in without else gradient
        optimizer.step()


def both_ways(steps, make=weights, without=(), **kind):
    """Weights and optimizer after these steps, updated together and one by one."""
    for batched in (True, False):
        parameters = make()
        optimizer = optimizer_of(parameters, batched=batched, **kind)
        take(parameters, optimizer, steps, without)
        yield parameters, optimizer


def states(optimizer):
    return [{k: v for k, v in state.items() if k[:4] != "qmap"} for state in optimizer.state.values()]


def assert_equal(ours, reference):
    for one, other in zip(ours[0], reference[0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(states(ours[1]), states(reference[1]), strict=True):
        assert one.keys() == other.keys()
        assert one["step"] == other["step"]
        assert all(torch.equal(one[name], other[name]) for name in one.keys() - {"step"})  # their shapes too


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("together", [2**22, 14_000])
def test_weights_and_states_are_to_the_bit_those_of_updates_one_by_one(device, dtype, together, monkeypatch):
    monkeypatch.setattr(batched_updates, "TOGETHER", together)
    without = {(2, 1), (2, 7), (4, 0)}  # then the steps of the matrices differ
    assert_equal(*both_ways(range(6), lambda: weights(dtype, device), without))


@pytest.mark.parametrize("name", ["AdEMAMix8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit"])
def test_other_8_bit_optimizers_compute_what_they_did(name):
    assert_equal(*both_ways(range(4), without={(2, 1)}, kind=getattr(bitsandbytes.optim, name)))


def test_a_matrix_that_is_not_contiguous_is_updated_as_before():
    def transposed():
        return [*weights()[:6], torch.nn.Parameter(weights()[6].detach().T), *weights()[7:]]

    assert_equal(*both_ways(range(3), transposed))


def test_hooks_run_once_a_step_and_see_the_update():
    parameters = weights()
    optimizer = optimizer_of(parameters)
    batch_updates(optimizer)  # a second time changes nothing
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    before, seen = parameters[0].detach().clone(), []
    optimizer.register_step_post_hook(lambda *_: seen.append(not torch.equal(parameters[0], before)))
    take(parameters, optimizer, [0])
    assert seen == [True]


def test_an_update_is_a_few_kernels(monkeypatch):
    kernel, calls = bitsandbytes.functional.optimizer_update_8bit_blockwise, []

    def counted(name, gradient, *args, **kwargs):
        calls.append(gradient.numel())
        return kernel(name, gradient, *args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", counted)
    parameters = weights()
    optimizer = optimizer_of(parameters)
    take(parameters, optimizer, [0])
    # 16 x 8 is too small for a state in 8 bit, 4,099 and 33 x 128 end within a block of 256; two groups have two rates
    assert sorted(calls) == sorted(
        [4099, 33 * 128, 16 * 320 + 64 * 128 + 5120 + 16 * 512, 32 * 256 + 512 * 16 + 8 * 640]
    )
    calls.clear()
    monkeypatch.setattr(batched_updates, "TOGETHER", 14_000)
    take(parameters, optimizer, [1])
    assert sorted(calls) == sorted([4099, 33 * 128, 16 * 320 + 64 * 128, 5120 + 16 * 512, 32 * 256, 512 * 16 + 8 * 640])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("saved_by", ["batched", "one by one"])
def test_a_checkpoint_is_resumed_and_has_the_states_of_each_matrix(device, saved_by, tmp_path):
    parameters = weights(device=device)
    before = optimizer_of(parameters, batched=saved_by == "batched")
    take(parameters, before, range(3))
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    held = sum(p.numel() * (2 if p.numel() >= 4096 else 8) for p in parameters)
    assert (tmp_path / "optimizer.pt").stat().st_size < 1.5 * held
    resumed = copy.deepcopy(parameters)
    after = optimizer_of(resumed)
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    take(resumed, after, range(3, 6))
    take(parameters, before, range(3, 6))
    assert_equal((resumed, after), (parameters, before))


def test_states_of_a_checkpoint_take_the_place_of_those_before_it():
    parameters = weights()
    optimizer = optimizer_of(parameters)
    take(parameters, optimizer, range(2))
    kept, state = copy.deepcopy(parameters), copy.deepcopy(optimizer.state_dict())
    take(parameters, optimizer, [2])
    expected = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)
    optimizer.load_state_dict(state)
    take(parameters, optimizer, [2])
    assert all(torch.equal(one, other) for one, other in zip(parameters, expected, strict=True))


def test_a_matrix_with_settings_of_its_own_is_updated_by_them():
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()

    def with_settings():
        manager.initialize()
        parameters = weights()
        manager.override_config(parameters[0], "lr", 0.5)
        manager.override_config(parameters[1], "optim_bits", 32)
        return parameters

    try:
        together, one_by_one = both_ways(range(2), with_settings)
        assert_equal(together, one_by_one)
        parameters, optimizer = together
        assert optimizer.state[parameters[1]]["state1"].dtype == torch.float32
    finally:
        manager.initialize()


def test_paged_states_and_other_optimizers_are_left_as_they_are():
    for optimizer in (
        bitsandbytes.optim.AdamW8bit(weights(), is_paged=True),
        torch.optim.AdamW(weights()),
    ):
        kind = type(optimizer)
        batch_updates(optimizer)
        assert type(optimizer) is kind
