"""Shared prompts: packed rows have the states, the losses and the gradients of rows that are computed one by one."""

import sys

import pytest
import torch
import torch.nn.functional as F
from common.lm.shared_prompts import PairCollator, common_beginning, pack, share_prompts
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(ROOT / "tests" / "references"))
from pair_loss import dpo_loss

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LENGTH = 12
PAIRS = [  # prompt, chosen, rejected
    ([5, 6, 7, 8, 9], [10, 11, 12], [13, 14]),
    ([21], [22, 23, 24, 25], [22, 23, 30]),  # the completions begin alike
    ([31, 32, 33, 34], [*range(10, 20)], [20, *range(5, 25)]),  # both truncated
    ([40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 3], [7, 8], [7, 9]),  # equal where they are truncated
    ([4, 5], [6, 7, 8], [6, 7]),  # the rejected one is the beginning of the chosen one
]


def adapted(family: str, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **HEADS, **settings}))
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(base, lora)


def padded(pairs: list[dict]) -> dict:
    """A batch as TRL's DataCollatorForPreference makes it."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0, max_length=LENGTH)(pairs)


def named(pairs):
    return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]


def batch_loss(model, batch: dict) -> torch.Tensor:
    """The DPO loss of a batch, from the hidden states of the model's layers, as TRL's trainer computes it."""
    causal, ids = model.get_base_model(), batch["input_ids"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "shared_prompts") if name in batch}

    def log_probs():
        every = causal.lm_head(causal.model(**inputs).last_hidden_state[:, :-1]).log_softmax(-1)
        return (every.gather(-1, ids[:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]).sum(1)

    policy = log_probs()
    with torch.no_grad(), model.disable_adapter():
        reference = log_probs()
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_losses_and_gradients_are_those_of_rows_computed_alone(family, checkpointing):
    model = adapted(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    expected = dpo_loss(model, PAIRS, LENGTH, 0.1)
    wanted = gradients(model, expected)
    assert share_prompts(model, LENGTH) is None
    batch = PairCollator(padded)(named(PAIRS))
    assert batch["shared_prompts"].tokens < 0.6 * batch["input_ids"].numel()
    loss = batch_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-4  # else equal would be equal to nothing


def test_without_sharing_the_model_computes_as_before():
    model, batch = adapted("qwen2"), padded(named(PAIRS))
    before = batch_loss(model, batch)
    share_prompts(model, LENGTH)
    assert torch.equal(batch_loss(model, batch), before)


def test_segments_attend_to_their_beginning_and_to_themselves():
    """The keys of each segment, whose last one is the last query's, are what varlen attention on a GPU gets."""
    rows = [[1, 2, 3, 4], [9, 8], [1, 2, 5], [7, 8, 9]]
    packed = pack(rows, [[0, 2], [1, 3]], 4)
    of_row = packed.states.first.div(4, rounding_mode="floor")
    for place, (query, first) in enumerate(zip(packed.query_ends[1:], packed.key_ends[:-1], strict=True)):
        keys = packed.keys.of[first : packed.key_ends[place + 1]]
        assert keys[-1] == query - 1
        assert packed.positions[keys].tolist() == [*range(len(keys))]
        tokens = [rows[of_row[key]][packed.positions[key]] for key in keys]
        assert tokens == rows[of_row[query - 1]][: len(keys)]
    assert packed.longest_key == 4
    visible = [packed.positions[row].tolist() for row in packed.mask()[0, 0]]
    assert [len(seen) for seen in visible] == (packed.positions + 1).tolist()
    states = packed.states.first[packed.states.of].view(4, 4)
    assert states[0].tolist() == [0, 1, 2, 3]
    assert states[2, :3].tolist() == [0, 1, 10]  # its first two are those of row 0
    assert states[3, :3].tolist() == [12, 13, 14]


def test_the_gradient_of_a_row_is_the_sum_of_its_copies_gradients():
    packed = pack([[1, 2, 3, 4], [1, 2, 5], [1, 2]], [[0, 1, 2]], 4)
    for copies in (packed.states, packed.keys):
        rows = torch.randn(packed.tokens, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.zeros(len(copies.of), 3, dtype=torch.float64)
        for place in (copies.first, copies.other):  # not padding
            weights[place] = torch.randn(len(place), 3, dtype=torch.float64)
        wanted = torch.autograd.grad((rows[copies.of] * weights).sum(), rows)[0]
        found = torch.autograd.grad((copies.make(rows) * weights).sum(), rows)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_common_beginnings():
    assert common_beginning([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_beginning([[1, 2], [1, 2, 3], [1, 2]]) == 2
    assert common_beginning([[1], [2]]) == common_beginning([[], [2]]) == 0


def test_a_batch_that_gains_little_is_left_as_it_is():
    one, other = [*range(1, 12)], [*range(20, 31)]
    assert "shared_prompts" not in PairCollator(padded)(named([([3], one, other)] * 2))
    assert "shared_prompts" in PairCollator(padded)(named([([3] * 6, one, other)] * 2))


def test_models_that_cannot_share_are_named():
    reason = share_prompts(adapted("mistral", sliding_window=8), 12)
    assert reason == "its layers attend to the last 8 tokens only, and --max-length is 12"
    assert share_prompts(adapted("mistral", sliding_window=12), 12) is None
    assert "gemma2 is not of the llama, mistral, qwen2, qwen3 families" in share_prompts(adapted("gemma2"), 12)
