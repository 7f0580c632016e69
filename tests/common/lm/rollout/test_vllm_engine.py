"""What vLLM gets and what is made of its completions, by a stub of it: the engine itself needs a GPU."""

import contextlib
import json
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from common.lm.rollout.architecture import Unsupported
from common.lm.rollout.rows import Request
from common.lm.rollout.vllm_engine import (
    VllmEngine,
    cache_bytes,
    check_class,
    engine_length,
    random_states_kept,
    settings,
    write_config,
)
from transformers import Gemma3Config, Qwen2Config


class Engine:
    """Answers every request with its number, in reverse order, two of them in a step; the log-probabilities with it."""

    def __init__(self):
        self.waiting, self.requested = [], []
        self.reset = True
        self.llm_engine = self

    def enqueue(self, prompts, parameters, use_tqdm):
        for prompt, one in zip(prompts, parameters, strict=True):
            self.waiting.append(str(len(self.requested)))
            self.requested.append((prompt, one))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        outputs = []
        for number in [self.waiting.pop() for _ in range(min(2, len(self.waiting)))]:
            log_probs = SimpleNamespace(logprobs=[-1.0, -float(number)])
            answer = SimpleNamespace(token_ids=(5, int(number)), logprobs=log_probs)
            outputs.append(SimpleNamespace(request_id=number, outputs=[answer], finished=True))
        return [*outputs, SimpleNamespace(finished=False)]

    def reset_prefix_cache(self):
        return self.reset


@pytest.fixture
def engine(monkeypatch):
    stub = ModuleType("vllm")
    stub.SamplingParams = lambda **given: given
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setattr(VllmEngine, "_on_stream", lambda self: contextlib.nullcontext())
    engine = VllmEngine.__new__(VllmEngine)
    engine.length, engine.llm, engine.write = 64, Engine(), lambda: None
    return engine


def test_completions_come_in_the_order_of_the_requests(engine):
    seen = []
    for first in (0, 11):  # vLLM counts on from call to call
        requests = [Request((1, 2, index), index, 9) for index in range(11)]
        decoded = engine.decode(requests, 7, 1.0, seen.append)
        assert [one.tokens for one in decoded] == [[5, first + index] for index in range(11)]
        assert [one.log_probs[1] for one in decoded] == [-float(first + index) for index in range(11)]
    assert sum(seen) == 22
    assert engine.llm.requested[4][0] == {"prompt_token_ids": [1, 2, 4]}


def test_vllm_samples_from_the_policy_itself_and_only_the_end_token_ends(engine):
    engine.decode([Request((1,), -1, 9), Request((1,), 5, 8)], 7, 0.7)
    (_, first), (_, second) = engine.llm.requested
    expected = {"temperature": 0.7, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    expected |= {"ignore_eos": True, "stop_token_ids": [7], "logprobs": 0, "detokenize": False, "max_tokens": 9}
    assert {name: first[name] for name in expected} == expected
    assert first["seed"] != -1  # no seed, to vLLM
    assert (second["seed"], second["max_tokens"]) == (5, 8)
    assert settings(48, 300, 1)["logprobs_mode"] == "processed_logprobs"


def test_what_vllm_would_change_in_silence_is_refused(engine):
    for temperature in (0.001, 2.5):
        with pytest.raises(Unsupported, match=r"at temperatures from 0\.01 to 2"):
            engine.decode([Request((1,), 5, 8)], 7, temperature)
    engine.decode([Request((1,), 5, 8)], 7, 0.0)
    with pytest.raises(Unsupported, match="70 tokens: vLLM's engine was started for 64"):
        engine.decode([Request((1,) * 50, 5, 20), Request((1,), 5, 8)], 7, 1.0)


def test_a_prefix_cache_that_outlives_its_weights_stops_the_run(engine):
    order = []
    engine.write = lambda: order.append("written")
    engine.llm.reset_prefix_cache = lambda: order.append("reset") or True
    engine.refresh()
    assert order == ["written", "reset"]
    engine.llm.reset_prefix_cache = lambda: False
    with pytest.raises(RuntimeError, match="keeps its prefix cache"):
        engine.refresh()


@pytest.mark.parametrize(
    ("rows", "graphs"),
    [(256, [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]), (48, [1, 2, 4, 8, 16, 32, 48]), (1, [1])],
)
def test_the_largest_batch_has_a_graph_too(rows, graphs):
    assert settings(rows, 300, 1)["compilation_config"] == {"cudagraph_capture_sizes": graphs}


def test_the_cache_takes_what_the_rows_need_and_no_more_than_there_is():
    config = Qwen2Config(hidden_size=1536, num_attention_heads=12, num_key_value_heads=2, num_hidden_layers=28)
    token = 2 * 28 * 2 * 128 * 2
    assert cache_bytes(config, 2, 64, 384, 2**40) == pytest.approx(64 * 384 * token, rel=0.1)
    assert cache_bytes(config, 2, 64, 384, 2**29) == 2**29
    with pytest.raises(Unsupported, match=r"need 3\.\d GiB more than it may take here"):
        cache_bytes(config, 2, 64, 384, -3 * 2**30)


def test_an_engine_is_as_long_as_the_model_was_loaded_for():
    model = SimpleNamespace(config=Qwen2Config(max_position_embeddings=512), max_seq_length=300)
    requests = [Request((1,) * 40, 0, 24)]
    assert engine_length(model, requests) == 300
    model.max_seq_length = 4096
    assert engine_length(model, requests) == 512
    del model.max_seq_length
    assert engine_length(model, requests) == 64


def test_vllm_reads_the_text_model_without_quantization(tmp_path):
    config = Qwen2Config(hidden_size=64)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = write_config(config, tmp_path)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in written
    assert (written["architectures"], written["hidden_size"]) == (["Qwen2ForCausalLM"], 64)
    assert config.quantization_config["load_in_4bit"]
    assert write_config(config, tmp_path) == folder  # else vLLM would compile anew in every run
    folder = write_config(Gemma3Config().get_text_config(), tmp_path)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (written["architectures"], written["model_type"]) == (["Gemma3ForCausalLM"], "gemma3_text")


def test_the_random_states_are_those_before_the_engine_also_where_it_does_not_start():
    def draw():
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    @random_states_kept()
    def start():
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        raise ValueError("no engine")

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(ValueError, match="no engine"):
        start()
    assert draw() == expected


@pytest.mark.parametrize(
    ("module", "known"), [("qwen2", True), ("vllm.model_executor.models.transformers", False), (None, False)]
)
def test_a_class_of_transformers_that_vllm_would_patch_under_the_trainer_is_refused(module, known):
    models = {"Some": SimpleNamespace(module_name=module)} if module else {}
    stub = SimpleNamespace(ModelRegistry=SimpleNamespace(models=models))
    with contextlib.nullcontext() if known else pytest.raises(Unsupported, match="no class of its own for Some"):
        check_class(stub, "Some")


def test_too_many_positions_are_refused_before_anything_starts():
    model = SimpleNamespace(config=Qwen2Config(max_position_embeddings=128))
    with pytest.raises(Unsupported, match="200 tokens exceed its 128 positions"):
        VllmEngine(model, None, rows=8, length=200, room=2**40)
