"""Rollouts on the tiny model: what it samples is what the model gives, and nothing is stale."""

import copy

import pytest
import torch
from common.data.examples import Conversation, Prompt
from common.errors import MachineError
from common.lm.generate import generate
from common.lm.log_probs import Scored, score_tokens
from common.lm.render import end_token
from common.lm.rollout import rollouts as module
from common.lm.rollout import vllm_engine, weights
from common.lm.rollout.correction import correction, rollout_mismatch
from common.lm.rollout.decoder import Decoded
from common.lm.rollout.rollouts import Rollouts, sample_completions
from conftest import ROOT


def questions(*texts):
    return [Prompt(f"file:{line}", [{"role": "user", "content": text}]) for line, text in enumerate(texts, start=1)]


PROMPTS = questions("12 + 30 = ?", "Work out 47 + 57.", "Which is larger, 3 or 5?", "9 - 4 = ?")


@pytest.fixture(scope="module")
def tiny():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def model(tiny):
    return copy.deepcopy(tiny)


def rollouts_of(model, tokenizer, **more):
    tokenizer.pad_token = tokenizer.pad_token or "<|pad|>"
    return Rollouts(model, tokenizer, end_token(tokenizer), seed=1, **more)


def test_greedy_completions_are_those_of_generate(model, tokenizer):
    ours = rollouts_of(model, tokenizer).sample(PROMPTS, 24, 0.0)
    conversations = [Conversation(prompt.place, prompt.prompt) for prompt in PROMPTS]
    theirs = generate(model, tokenizer, conversations, end_token(tokenizer), 24)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.text, one.ended, one.prompt_ids) == (other.text, other.ended, other.prompt_ids)
        assert one.completion_ids == other.completion_ids


def test_log_probabilities_are_those_of_training_at_the_temperature(model, tokenizer):
    completions = rollouts_of(model, tokenizer).sample(PROMPTS * 3, 24, 0.7, "step 1")
    spans = [(one.prompt_ids, one.completion_ids) for one in completions]
    scored = score_tokens(model, spans, tokenizer.pad_token_id, temperature=0.7)
    found = rollout_mismatch(completions, [one.log_probs for one in scored])
    assert abs(found["rollout/log_prob_diff_mean"]) < 1e-4
    assert found["rollout/log_prob_diff_std"] < 1e-4
    assert found["rollout/ratio_outside"] == 0


def test_the_same_key_gives_the_same_completions_and_another_key_others(model, tokenizer):
    sampler = rollouts_of(model, tokenizer)
    one = sampler.sample(PROMPTS * 4, 16, 1.0, "step 1")
    torch.manual_seed(99)  # no generator of torch has a part in it
    assert sampler.sample(PROMPTS * 4, 16, 1.0, "step 1") == one
    few = rollouts_of(model, tokenizer, max_rows=3).sample(PROMPTS * 4, 16, 1.0, "step 1")
    assert [completion.completion_ids for completion in few] == [completion.completion_ids for completion in one]
    assert sampler.sample(PROMPTS * 4, 16, 1.0, "step 2") != one
    assert len({completion.text for completion in one}) > 8


def test_a_changed_weight_is_seen_by_the_next_call(model, tokenizer):
    sampler = rollouts_of(model, tokenizer)
    before = sampler.sample(PROMPTS, 12, 0.0)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.lora_B["default"].weight.data[3] += 1.0  # .data: no version counter of torch tells of it
    after = sampler.sample(PROMPTS, 12, 0.0)
    assert [one.log_probs for one in after] != [one.log_probs for one in before]
    assert after == rollouts_of(model, tokenizer).sample(PROMPTS, 12, 0.0)


def test_without_an_adapter_it_is_the_base(model, tokenizer):
    base = rollouts_of(model, tokenizer, adapter=None).sample(PROMPTS, 12, 0.0)
    with model.disable_adapter():
        conversations = [Conversation(prompt.place, prompt.prompt) for prompt in PROMPTS]
        theirs = generate(model, tokenizer, conversations, end_token(tokenizer), 12)
    assert [one.completion_ids for one in base] == [one.completion_ids for one in theirs]


def test_auto_names_why_it_takes_generate_and_graph_refuses(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(model.config, "model_type", "unknown")
    sampler = rollouts_of(model, tokenizer)
    monkeypatch.setattr(Rollouts, "_generate", lambda *_: [])
    assert sampler.sample(PROMPTS, 4, 0.0) == sampler.sample(PROMPTS, 4, 0.0) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Sampling with transformers' generate, which is slower: unknown models")
    with pytest.raises(MachineError, match="--rollouts=graph cannot sample from this model: unknown models"):
        rollouts_of(model, tokenizer, backend="graph").sample(PROMPTS, 4, 0.0)


class Engine:
    """In place of vLLM's: completions of one token, with its log-probability by the model, or by another one."""

    shift = 0.0

    def __init__(self, model, adapter, **settings):
        self.model, self.settings, self.refreshed = model, settings, 0

    def refresh(self):
        self.refreshed += 1

    def decode(self, requests, end, temperature, advance):
        scored = score_tokens(self.model, [(list(request.prompt), [5]) for request in requests], 0)
        return [Decoded([5], [float(one.log_probs[0]) + index * self.shift]) for index, one in enumerate(scored)]


@pytest.fixture
def installed(monkeypatch):
    """As if there were vLLM and a GPU."""
    monkeypatch.setattr(vllm_engine, "VllmEngine", Engine)
    monkeypatch.setattr(module, "has_vllm", lambda: True)
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(module, "memory_limit", lambda: 80 * 2**30)
    monkeypatch.setattr(module, "free_bytes", lambda: 70 * 2**30)


def test_auto_takes_vllm_for_a_model_that_the_decoder_does_not_know(model, tokenizer, monkeypatch, capsys, installed):
    monkeypatch.setattr(model.config, "model_type", "unknown")
    sampler = rollouts_of(model, tokenizer)
    for _ in range(2):
        assert [one.completion_ids for one in sampler.sample(PROMPTS, 4, 1.0)] == [[5]] * len(PROMPTS)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Sampling with vLLM, whose start takes a minute: unknown models")
    assert sampler.backend == "vllm"
    assert sampler.engine.refreshed == 2
    assert sampler.engine.settings["room"] == 30 * 2**30  # half of the memory is left to training
    assert sampler.figures["rollout/tokens_per_second"] > 0


def test_what_vllm_cannot_run_either_generate_does(model, tokenizer, monkeypatch, capsys, installed):
    def refuse(*_, **__):
        raise module.Unsupported("vLLM's engine does not start: no such class")

    monkeypatch.setattr(vllm_engine, "VllmEngine", refuse)
    monkeypatch.setattr(Rollouts, "_generate", lambda *_: ["generated"])
    with pytest.raises(MachineError, match="--rollouts=vllm cannot sample from this model: vLLM's engine does not"):
        rollouts_of(model, tokenizer, backend="vllm").sample(PROMPTS, 4, 1.0)
    monkeypatch.setattr(model.config, "model_type", "unknown")
    assert rollouts_of(model, tokenizer).sample(PROMPTS, 4, 1.0) == ["generated"]
    starting, first, second = capsys.readouterr().out.splitlines()
    assert starting == "Starting vLLM's engine, which takes a minute."
    assert "vLLM, whose start" in first
    assert second.endswith("which is slower: vLLM's engine does not start: no such class.")


def test_log_probabilities_of_another_model_stop_the_run(model, tokenizer, monkeypatch, installed):
    monkeypatch.setattr(Engine, "shift", 0.1)
    rollouts_of(model, tokenizer, backend="vllm").sample(PROMPTS, 4, 1.0)
    monkeypatch.setattr(Engine, "shift", 1.0)
    with pytest.raises(MachineError, match=r"vLLM's log-probabilities differ from the model's by 1\.12 nats"):
        rollouts_of(model, tokenizer, backend="vllm").sample(PROMPTS, 4, 1.0)


def test_vllm_without_a_gpu_is_refused(model, tokenizer):
    with pytest.raises(MachineError, match="--rollouts=vllm cannot sample from this model: vLLM needs an NVIDIA GPU"):
        rollouts_of(model, tokenizer, backend="vllm").sample(PROMPTS, 4, 1.0)


def test_the_cache_grows_with_longer_prompts_and_more_of_them(model, tokenizer):
    sampler = rollouts_of(model, tokenizer, max_rows=8)
    for prompts, limit in ((PROMPTS[:1], 4), (PROMPTS * 4, 4), (PROMPTS[:2], 200), (PROMPTS * 4, 9)):
        assert len(sampler.sample(prompts, limit, 0.0)) == len(prompts)
    assert (sampler.decoder.size, sampler.decoder.length) == (8, 256)
    sampler.release()
    assert sampler.decoder is sampler.weights is None


def test_where_no_second_copy_of_the_weights_fits_generate_samples(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(module, "free_bytes", lambda: module.RESERVE + 2**20)
    monkeypatch.setattr(Rollouts, "_generate", lambda *_: ["generated"])
    assert rollouts_of(model, tokenizer).sample(PROMPTS, 4, 0.0) == ["generated"]
    assert "a merged copy of its weights, 0.0 GiB, does not fit beside it" in capsys.readouterr().out


def test_a_base_in_4_bit_that_is_read_at_each_step_says_so_once(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(module, "free_bytes", lambda: module.RESERVE + 2**20)
    monkeypatch.setattr(weights, "in_four_bit", lambda model: True)
    sampler = rollouts_of(model, tokenizer)
    assert [sampler._copies(64) for _ in range(2)] == [False, False]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "Sampling reads the base in 4 bit at each step, which is slower: a merged copy of its weights"
    )


def test_auto_gives_the_decoder_up_only_where_its_first_call_fails(model, tokenizer, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no room\nand more")

    monkeypatch.setattr(Rollouts, "_generate", lambda *_: ["generated"])
    worked = rollouts_of(model, tokenizer)
    assert len(worked.sample(PROMPTS[:1], 2, 0.0)) == 1
    monkeypatch.setattr(module, "prompt_ids", fail)
    assert rollouts_of(model, tokenizer).sample(PROMPTS, 4, 0.0) == ["generated"]
    assert "which is slower: no room." in capsys.readouterr().out
    for sampler in (worked, rollouts_of(model, tokenizer, backend="graph")):
        with pytest.raises(RuntimeError, match="no room"):
            sampler.sample(PROMPTS, 4, 0.0)


@pytest.mark.parametrize(("free", "kept"), [(60, True), (40, False)])
def test_the_copy_stays_only_where_it_leaves_half_of_the_memory(model, tokenizer, monkeypatch, free, kept):
    sampler = rollouts_of(model, tokenizer)
    monkeypatch.setattr(module, "memory_limit", lambda: 100 * 2**30)
    monkeypatch.setattr(module, "free_bytes", lambda: free * 2**30)
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    assert len(sampler.sample(PROMPTS, 4, 0.0)) == len(PROMPTS)
    assert (sampler.decoder is not None) == kept


@pytest.mark.parametrize("backend", ["graph", "generate"])
def test_no_prompts_have_no_completions(model, tokenizer, backend):
    assert rollouts_of(model, tokenizer, backend=backend).sample([], 4, 1.0) == []


def test_several_completions_of_a_prompt_are_a_group(model, tokenizer):
    groups = sample_completions(rollouts_of(model, tokenizer), PROMPTS[:2], 3, 8, 1.0)
    assert [len(group) for group in groups] == [3, 3]
    assert groups[0][0].prompt_ids == groups[0][2].prompt_ids != groups[1][0].prompt_ids


def test_a_planted_shift_of_the_log_probabilities_is_measured_and_corrected(model, tokenizer):
    """Rollout probabilities e^0.1 too large get weights e^-0.1; those far too small get no more than 2."""
    completions = rollouts_of(model, tokenizer).sample(PROMPTS[:2], 6, 1.0)
    spans = [(one.prompt_ids, one.completion_ids) for one in completions]
    trained = [one.log_probs for one in score_tokens(model, spans, tokenizer.pad_token_id)]
    shifted = [copy.replace(one) if hasattr(copy, "replace") else copy.copy(one) for one in completions]
    for one, shift in zip(shifted, (0.1, -3.0), strict=True):
        object.__setattr__(one, "log_probs", [value + shift for value in one.log_probs])
    found = rollout_mismatch(shifted, trained)
    first, second = (len(one.completion_ids) for one in completions)
    assert found["rollout/log_prob_diff_mean"] == pytest.approx((3 * second - 0.1 * first) / (first + second), abs=1e-3)
    assert found["rollout/ratio_outside"] == pytest.approx(second / (first + second))
    weights = correction(shifted, trained, 9)
    assert weights.shape == (2, 9)
    assert torch.allclose(weights[0, :first], torch.full((first,), 0.904837), atol=1e-3)
    assert torch.equal(weights[1, :second], torch.full((second,), 2.0))
    assert (weights[0, first:] == 1).all()
    assert isinstance(score_tokens(model, spans[:1], tokenizer.pad_token_id)[0], Scored)
