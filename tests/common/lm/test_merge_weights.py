"""`common/lm/merge.py`: a merged model computes what base and adapter do, for every kind of adapter that it takes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from common.errors import InputError, MachineError
from common.lm.adapter import MERGEABLE, check_mergeable
from common.lm.hub import find_model
from common.lm.merge import merge_weights, put_on, save_classifier
from conftest import ROOT

TINY = ROOT / "data_samples" / "tiny"
LAYER = "model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "down_proj"]
VOCABULARY = 96
IDS = torch.tensor([[5, 6, 7, 90, 1, 3]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two small models of random weights: one whose head is its embedding, one whose head is its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folders = {}
    for tied in (True, False):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
        folders["tied" if tied else "untied"] = folder = tmp_path_factory.mktemp("base")
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folders


@dataclass
class Trained:
    folder: Path
    log_probs: torch.Tensor


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def log_probs(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.log_softmax(-1)


def train(base, folder, config, rows=VOCABULARY) -> Trained:
    """An adapter of random weights as PEFT saves it, and what its model computes."""
    from peft import get_peft_model

    model = load(base)
    if rows != VOCABULARY:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += torch.randn_like(parameter) * 0.05
    before = log_probs(model)
    with model.disable_adapter():
        assert (log_probs(model) - before).abs().max() > 1e-3, "the adapter changes nothing"
    model.save_pretrained(folder)
    return Trained(folder, before)


def lora(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **settings})


def check(base, trained, tokens=VOCABULARY):
    check_mergeable(trained.folder)
    merged, error = merge_weights(put_on(load(base), trained.folder, tokens))
    torch.testing.assert_close(log_probs(merged), trained.log_probs, rtol=1e-5, atol=1e-4)
    assert error < 1e-4
    return merged


SETTINGS = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.down_proj": 32}},
    "some layers": {"layers_to_transform": [1]},
    "biases": {"bias": "all"},
    "its own biases": {"lora_bias": True, "target_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [5, 90]},
    "a norm": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_lora_is_merged_with_each_of_its_settings(bases, tmp_path, settings):
    merged = check(bases["tied"], train(bases["tied"], tmp_path, lora(**settings)))
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # as before


EMBEDDINGS = {
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one and the other": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize(("kind", "name"), [*(("tied", name) for name in EMBEDDINGS), ("untied", "one and the other")])
def test_a_changed_embedding_or_head_does_not_change_the_other(bases, tmp_path, kind, name):
    merged = check(bases[kind], train(bases[kind], tmp_path / "adapter", lora(**EMBEDDINGS[name])))
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(load(tmp_path / "merged")), log_probs(merged))


@pytest.mark.parametrize("which", ["target_modules", "modules_to_save"])
def test_what_was_trained_as_one_matrix_stays_one(bases, tmp_path, which):
    settings = {"ensure_weight_tying": True, "target_modules": ["q_proj"]}
    settings[which] = [*settings.get(which, []), "embed_tokens"]
    merged = check(bases["tied"], train(bases["tied"], tmp_path, lora(**settings)))
    # PEFT adds to the head and to the embedding apart, so LoRA's sums may differ in the last bit.
    if which == "modules_to_save":
        assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


ADDED = {
    "LoRA elsewhere": {},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize(("kind", "name"), [*(("tied", name) for name in ADDED), ("untied", "LoRA on both")])
def test_tokens_that_were_added_are_merged_too(bases, tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(f"{__name__}.IDS", torch.tensor([[5, VOCABULARY, 7, VOCABULARY + 1]]))
    more = VOCABULARY + 2
    merged = check(bases[kind], train(bases[kind], tmp_path, lora(**ADDED[name]), more), more)
    assert merged.config.vocab_size == more


@pytest.mark.parametrize(("tokens", "rows"), [(VOCABULARY + 2, VOCABULARY), (VOCABULARY, VOCABULARY + 2)])
def test_tokens_whose_embeddings_are_nowhere_are_refused(bases, tmp_path, tokens, rows):
    """A tokenizer with more tokens than rows; and a head with new rows of which only the adapter's part is saved."""
    settings = {} if rows == VOCABULARY else {"target_modules": ["lm_head"]}
    trained = train(bases["untied"], tmp_path, lora(**settings), rows)
    with pytest.raises(InputError, match=r"after tokens were added \(98, 96 in the base\), and does not hold their"):
        put_on(load(bases["untied"]), trained.folder, tokens)


def test_added_tokens_without_their_tokenizer_are_refused(bases, tmp_path):
    train(bases["tied"], tmp_path, lora(), VOCABULARY + 2)
    with pytest.raises(InputError, match="after tokens were added; copy the tokenizer that has them to it"):
        put_on(load(bases["tied"]), tmp_path, None)


KINDS = {
    "ADALORA": {"total_step": 10},
    "FOURIERFT": {"n_frequency": 100},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm", "q_proj"]},
    "LORA": {"use_rslora": True},
    "MISS": {"r": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 90]},
}


@pytest.mark.parametrize("kind", sorted(MERGEABLE))
def test_other_kinds_of_adapters_are_merged_as_peft_does(bases, tmp_path, kind):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{"target_modules": TARGETS, **KINDS.get(kind, {})})
    check(bases["tied"], train(bases["tied"], tmp_path, config))


def test_experts_and_layers_stored_the_other_way_round_are_merged(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    moe = Qwen3MoeConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **heads, **sizes)
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    experts = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    other_way = {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True, "use_dora": True}
    for name, model, settings in (
        ("experts", Qwen3MoeForCausalLM(moe), experts),
        ("gpt2", GPT2LMHeadModel(gpt2), other_way),
    ):
        model.save_pretrained(tmp_path / name)
        check(tmp_path / name, train(tmp_path / name, tmp_path / f"{name}-adapter", lora(**settings)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["scale", "magnitude"])
def test_two_percent_of_a_scale_or_of_a_magnitude_are_seen(bases, tmp_path, monkeypatch, fault, dtype):
    from peft.tuners.lora import Linear

    trained = train(bases["untied"], tmp_path, lora(use_dora=fault == "magnitude"))
    model = put_on(load(bases["untied"]).to(dtype), trained.folder, VOCABULARY)
    right = Linear.merge

    def wrong(layer, **options):
        if fault == "scale":
            layer.scaling["default"] *= 0.98
        else:
            layer.lora_magnitude_vector["default"].weight.data *= 0.98
        right(layer, **options)

    monkeypatch.setattr(Linear, "merge", wrong)
    with pytest.raises(MachineError, match=r"the outputs of model\.layers\.0\.self_attn\.q_proj differ by \d+\.\d% of"):
        merge_weights(model)


@pytest.fixture
def model():
    """The tiny model in bfloat16 under an adapter of random numbers, with r=4 and alpha=6."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    return get_peft_model(base, lora(lora_alpha=6)).eval()


def by_hand(model):
    layer = model.get_base_model().get_submodule(LAYER)
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    return (layer.base_layer.weight.float() + 1.5 * product).to(torch.bfloat16)


def test_the_sum_is_in_32_bit_and_rounded_once(model):
    expected = by_hand(model)
    untouched = model.get_base_model().get_submodule("model.layers.0.self_attn.k_proj").weight.clone()
    merged, _ = merge_weights(model)
    assert torch.equal(merged.get_submodule(LAYER).weight, expected)
    assert torch.equal(merged.get_submodule("model.layers.0.self_attn.k_proj").weight, untouched)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_weight_that_float16_cannot_hold_is_refused(model):
    layer = model.half().get_base_model().get_submodule(LAYER)
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(6e4)
    with pytest.raises(MachineError, match=rf"{LAYER}.weight is too large for torch.float16"):
        merge_weights(model)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_classifier_has_the_same_weights_and_the_head(tmp_path, use_dora):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    model = get_peft_model(base, lora(use_dora=use_dora)).eval()
    if use_dora:
        model.get_base_model().get_submodule(LAYER).lora_magnitude_vector["default"].weight.data *= 1.5
    head = torch.nn.Linear(model.config.hidden_size, 1)
    save_classifier(model, head, find_model("tiny"), tmp_path, 3, {"kind": "regression"})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    merged, _ = merge_weights(model)
    for name in (LAYER, "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(loaded.get_submodule(name).weight, merged.get_submodule(name).weight), name
    assert torch.equal(loaded.score.weight, head.weight.to(torch.bfloat16))
    assert loaded.config.pad_token_id == 3
    assert json.loads((tmp_path / "head.json").read_text())["kind"] == "regression"
