"""Which weight goes into which of vLLM's parameters, without vLLM: against PEFT's merge and vLLM's rule of stacking."""

import pytest
import torch
from common.lm.rollout.architecture import Unsupported
from common.lm.rollout.vllm_weights import connect, weight_bytes
from test_decoder import FAMILIES, SIZES, random_model, with_lora

KINDS = [family for family in FAMILIES if family not in ("llama 3.1", "phi3 mini", "phi4 mini")]  # other positions only

# orig_to_new_stacked of Qwen2Model, LlamaModel, Gemma2Model and Gemma3Model in vllm 0.31.0, vllm/model_executor/models;
# Qwen3, Mistral and Phi3 inherit it. A shard's number is its place among the rows.
STACKED = {
    ".q_proj": (".qkv_proj", 0),
    ".k_proj": (".qkv_proj", 1),
    ".v_proj": (".qkv_proj", 2),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


def stacked(checkpoint):
    """The tensors of a checkpoint as vLLM's loader puts them into its parameters."""
    shards = {}
    for name, tensor in checkpoint.items():
        place = 0
        for old, (new, number) in STACKED.items():
            if old in name:
                name, place = name.replace(old, new), number
        shards.setdefault(name, {})[place] = tensor
    return {name: torch.cat([parts[place] for place in sorted(parts)]) for name, parts in shards.items()}


def merged_checkpoint(model):
    """The state of the model with the adapter merged by PEFT; a tied head is not part of it."""
    state = model.merge_and_unload().state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


class Engine(torch.nn.Module):
    """Parameters with the names and shapes of vLLM's model, filled with garbage as load_format="dummy" does."""

    def __init__(self, expected, padding=64):
        super().__init__()
        self.loaded = []
        for name, tensor in expected.items():
            shape = list(tensor.shape)
            if name.startswith(("model.embed_tokens", "lm_head")):
                shape[0] += -shape[0] % padding
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(last, torch.nn.Parameter(torch.full(shape, 7.0), requires_grad=False))

    def load_weights(self, tensors):
        """As vLLM's AutoWeightsLoader: shards in their rows, and the names of what was loaded."""
        given = stacked(dict(tensors))
        for name, parameter in self.named_parameters():
            if name in given:
                parameter.data[: len(given[name])] = given[name]
        return set(given)


@pytest.mark.parametrize(("family", "tied"), [*((family, family == "qwen3") for family in KINDS), ("gemma2", True)])
def test_every_parameter_gets_the_weight_that_vllms_loader_would_give_it(family, tied):
    model = with_lora(random_model(family, tie_word_embeddings=tied))
    twin = with_lora(random_model(family, tie_word_embeddings=tied))
    twin.load_state_dict(model.state_dict())
    expected = stacked(merged_checkpoint(twin))
    engine = Engine(expected)
    addresses = [parameter.data_ptr() for parameter in engine.parameters()]
    write = connect(model, "default", engine)
    write()
    for name, parameter in engine.named_parameters():
        assert torch.allclose(parameter[: len(expected[name])], expected[name], atol=1e-5), name
        assert not parameter[len(expected[name]) :].any()
    assert [parameter.data_ptr() for parameter in engine.parameters()] == addresses  # graphs were recorded over them


def test_a_change_of_the_adapter_reaches_the_engine():
    model = with_lora(random_model())
    engine = Engine(stacked(merged_checkpoint(with_lora(random_model()))))
    write = connect(model, "default", engine)
    write()
    before = engine.get_parameter("model.layers.1.self_attn.o_proj.weight").clone()
    model.get_base_model().model.layers[1].self_attn.o_proj.lora_B["default"].weight.data += 1
    write()
    assert not torch.equal(engine.get_parameter("model.layers.1.self_attn.o_proj.weight"), before)
    assert torch.equal(engine.get_parameter("model.norm.weight"), model.get_base_model().model.norm.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda names: names | {"model.layers.0.sink": torch.ones(3)},
            "no weight of the model is for: model.layers.0.",
        ),
        (lambda names: {k: v for k, v in names.items() if "layers.2.mlp" not in k}, "no parameters for these weights"),
        (lambda names: names | {"model.norm.weight": torch.ones(65)}, r"model.norm.weight is \(65,\), and .* \(64,\)"),
        (
            lambda names: names | {"model.layers.3.mlp.down_proj.weight": torch.ones(96, 64)},
            r"down_proj.weight is \(96, 64\), and the model's weight \(64, 96\)",
        ),
    ],
)
def test_a_parameter_that_would_keep_its_garbage_stops_the_run(change, message):
    model = random_model()
    engine = Engine(change(stacked(model.state_dict())))
    with pytest.raises(RuntimeError, match=message):
        connect(model, None, engine)


def test_another_architecture_goes_through_vllms_loader():
    from transformers import AutoModelForCausalLM, Olmo2Config

    torch.manual_seed(0)
    model = with_lora(AutoModelForCausalLM.from_config(Olmo2Config(**SIZES, pad_token_id=0)).eval())
    twin = with_lora(AutoModelForCausalLM.from_config(model.config))
    twin.load_state_dict(model.state_dict())
    expected = stacked(merged_checkpoint(twin))
    engine = Engine(expected)
    connect(model, "default", engine)()
    for name, parameter in engine.named_parameters():
        assert torch.allclose(parameter[: len(expected[name])], expected[name], atol=1e-5), name
    engine = Engine(expected | {"model.layers.0.sink": torch.ones(3)})
    with pytest.raises(Unsupported, match=r"leaves parameters unwritten: model.layers.0.sink"):
        connect(model, "default", engine)()


def test_a_trained_embedding_counts_and_an_untied_twin_of_it_is_refused():
    model = with_lora(random_model(tie_word_embeddings=False), modules_to_save=["embed_tokens"])
    trained = model.get_base_model().model.embed_tokens.modules_to_save["default"].weight
    trained.data += 1
    expected = stacked(random_model(tie_word_embeddings=False).state_dict())
    engine = Engine(expected)
    connect(model, "default", engine)()
    assert torch.equal(engine.get_parameter("model.embed_tokens.weight")[:300], trained)
    model.config.tie_word_embeddings = True
    with pytest.raises(Unsupported, match="tied to the embedding, but their weights differ"):
        connect(model, "default", engine)


def test_the_size_of_the_weights_is_that_of_the_base():
    model = random_model()
    assert weight_bytes(with_lora(model), 2) == 2 * sum(
        p.numel() for n, p in model.named_parameters() if "lora" not in n
    )
