"""Unsloth's check of its packed pass: what we set is what it reads, and only what it found right is trusted."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from common.lm.packed_check import ANY_LENGTH, trust_longer_batches
from transformers import AutoConfig, Gemma3Config, Gemma3TextConfig, GPT2Config, OPTConfig, Phi3Config, Qwen2Config

FOUND = {  # as Unsloth leaves it after a batch of 400 tokens, its longest row of 120, with and without --share-prompts
    **{f"_unsloth_seq_packing_{name}_verified_T": 400 for name in ("grad", "nograd")},
    **{f"_unsloth_seq_packing_{name}_verified_seg": 120 for name in ("grad", "nograd")},
}


def model_of(config, **attributes) -> SimpleNamespace:
    return SimpleNamespace(config=config, **attributes)


@pytest.mark.parametrize("config", [Qwen2Config(), Gemma3TextConfig(), AutoConfig.from_pretrained("data_samples/tiny")])
def test_what_was_found_right_once_holds_for_longer_batches(config):
    shared = {(2, (4, 4)): (300, 120)}
    model = model_of(config, **FOUND, _unsloth_prefix_grouper_grad_verified=shared)
    trust_longer_batches(model)
    assert {getattr(model, name) for name in FOUND} == {ANY_LENGTH}
    assert shared == {(2, (4, 4)): (ANY_LENGTH, ANY_LENGTH)}


def test_what_was_not_looked_at_is_not_trusted():
    model = model_of(Qwen2Config(), _unsloth_seq_packing_grad_ok=True)  # of a batch of one row, which proves nothing
    before = dict(vars(model))
    trust_longer_batches(model)
    assert vars(model) == before


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_turn_with_the_length_are_compared_again(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "original_max_position_embeddings": 4096}
    model = model_of((Phi3Config if kind == "longrope" else Qwen2Config)(rope_parameters=rope), **FOUND)
    trust_longer_batches(model)
    assert {name: getattr(model, name) for name in FOUND} == FOUND


# Without rotary positions, and with a window that Unsloth does not find: it looks in the outer configuration.
@pytest.mark.parametrize("config", [GPT2Config(), OPTConfig(), Gemma3Config()])
def test_models_that_are_not_known_to_be_alike_at_every_length_are_compared_again(config):
    model = model_of(config, **FOUND)
    trust_longer_batches(model)
    assert {name: getattr(model, name) for name in FOUND} == FOUND


def test_unsloth_reads_these_names_and_looks_again_where_a_batch_is_longer():
    def source(package: str, *path: str) -> str:
        (folder,) = importlib.util.find_spec(package).submodule_search_locations  # type: ignore[union-attr, misc]
        return Path(folder).joinpath(*path).read_text(encoding="utf-8")

    learning, without = source("unsloth_zoo", "rl_replacements.py"), source("unsloth", "models", "rl_replacements.py")
    for name, text in (("grad", learning), ("nograd", without)):
        for attribute in ("seq_packing_{}_verified_T", "seq_packing_{}_verified_seg", "prefix_grouper_{}_verified"):
            assert re.search(rf'getattr\(\s*unwrapped_model, "_unsloth_{attribute.format(name)}"', text)
    assert "_pack_ok is True and _pack_T <= _pack_vT and _pack_maxseg <= _pack_vS" in learning
    assert "_pg_T <= _pg_env[0] and _pg_maxseg <= _pg_env[1]" in learning
