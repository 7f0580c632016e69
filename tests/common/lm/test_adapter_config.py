"""`common/lm/adapter.py`: which adapters can be merged, which can be used beside their base, and what fits no base."""

import json

import pytest
import torch
from common.errors import InputError
from common.lm.adapter import NOT_MERGEABLE, check_base, check_mergeable, check_plain, load_adapter, read_config
from safetensors.torch import load_file, save_file

A, B = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.lm_head.lora_B.weight"


@pytest.fixture
def folder(tmp_path):
    """A folder with one tensor, into which `write` puts settings."""
    save_file({A: torch.zeros(4, 32)}, tmp_path / "adapter_model.safetensors")
    return write(tmp_path)


def write(folder, **settings):
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused(check, folder) -> str:
    with pytest.raises(InputError) as refusal:
        check(folder)
    message = str(refusal.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_plain_lora_passes_every_check(folder):
    embeddings = {"modules_to_save": ["embed_tokens", "model.embed_tokens", "lm_head"], "ensure_weight_tying": True}
    for settings in (
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0]},
        embeddings,
    ):
        check_mergeable(write(folder, **settings))
        check_plain(folder)


@pytest.mark.parametrize("settings", [{name: [1]} for name in NOT_MERGEABLE], ids=NOT_MERGEABLE)
def test_what_no_merge_can_express_is_refused_by_name(folder, settings):
    for check in (check_mergeable, check_plain):
        assert next(iter(settings)) in refused(check, write(folder, **settings))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_an_adapter_that_took_a_part_of_the_base_is_refused(folder, start):
    write(folder, init_lora_weights=start)
    assert f"started from parts of the base's weights ({start})" in refused(check_mergeable, folder)
    assert f"init_lora_weights={start}" in refused(check_plain, folder)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "XLORA", "POLY", "NEXT_YEARS", None])
def test_other_kinds_are_refused_by_name(folder, kind):
    for check in (check_mergeable, check_plain):
        assert f"of the kind {kind} cannot be" in refused(check, write(folder, peft_type=kind))


PLAIN_ONLY = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["mlp.experts.down_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "score": {"modules_to_save": ["embed_tokens", "score"]},
    "of the kind IA3": {"peft_type": "IA3"},
}


@pytest.mark.parametrize(("name", "settings"), PLAIN_ONLY.items(), ids=PLAIN_ONLY)
def test_what_is_used_beside_its_base_is_plain_lora_and_the_rest_is_to_be_merged(folder, name, settings):
    check_mergeable(write(folder, **settings))
    message = refused(check_plain, folder)
    assert name in message
    assert f"make merge ADAPTER={folder}" in message


def test_lora_on_the_head_is_recognized_by_its_tensors(folder):
    save_file({A: torch.zeros(4, 32), B: torch.zeros(96, 4)}, folder / "adapter_model.safetensors")
    assert "LoRA on the embedding or the head" in refused(check_plain, folder)


def test_an_adapter_of_a_classifier_is_refused(folder):
    assert "an adapter for SEQ_CLS" in refused(check_mergeable, write(folder, task_type="SEQ_CLS"))


def test_a_pickle_is_never_loaded_and_the_way_out_works(folder, tmp_path, monkeypatch):
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused(check_mergeable, folder)
    torch.save({A: torch.ones(4, 32)}, folder / "adapter_model.bin")
    message = refused(check_mergeable, folder)
    assert refused(check_plain, folder) == message
    monkeypatch.chdir(folder)
    exec(message[message.index('-c "') + 4 : -1])
    check_mergeable(folder)
    assert torch.equal(load_file("adapter_model.safetensors")[A], torch.ones(4, 32))


@pytest.mark.parametrize(("text", "fault"), [("{", "is damaged or no JSON"), ("[]", "holds no JSON object")])
def test_a_broken_configuration_is_refused(folder, text, fault):
    (folder / "adapter_config.json").write_text(text)
    assert fault in refused(read_config, folder)


def test_broken_weights_are_refused(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot be read" in refused(check_plain, folder)


@pytest.fixture(scope="module")
def base():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return lambda **other: Qwen2ForCausalLM(Qwen2Config(**{"vocab_size": 96, "num_hidden_layers": 1, **sizes, **other}))


@pytest.fixture
def saved(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    get_peft_model(base(), config).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **tensors):
    """Replace tensors of the adapter; None drops one."""
    file = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in {**load_file(file), **tensors}.items() if value is not None}, file)


def test_every_tensor_of_an_adapter_is_loaded_or_it_is_refused(base, saved):
    loaded = load_adapter(base(), saved)
    values = load_file(saved / "adapter_model.safetensors")
    assert torch.equal(loaded.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight, values[A])
    assert not loaded.training

    def fault(model=None):
        return refused(lambda folder: load_adapter(model or base(), folder), saved)

    assert "size mismatch" in fault(base(hidden_size=64))
    change(saved, **{A.replace("layers.0", "layers.7"): values[A]})
    assert "nothing in it takes base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight" in fault()
    change(saved, **{A.replace("layers.0", "layers.7"): None, A: None})
    assert "lacks" in fault()
    change(saved, **{A: torch.full_like(values[A], torch.inf)})
    assert f"{A} hold values that are not finite" in fault()
    change(saved, **{A: values[A], "base_model.model.model.norm.weight": None})
    assert "does not fit" in fault()


def test_a_setting_that_this_peft_does_not_know_is_refused(base, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "of_next_year": None}))
    load_adapter(base(), saved)
    (saved / "adapter_config.json").write_text(json.dumps({**config, "of_next_year": 3}))
    assert "does not know of_next_year" in refused(lambda folder: load_adapter(base(), folder), saved)


def test_a_base_that_is_an_adapter_itself_is_refused(base, saved):
    check_base(base(), "org/model")
    with pytest.raises(InputError, match="org/adapter is an adapter of"):
        check_base(load_adapter(base(), saved), "org/adapter")
