"""The decoder against transformers' generate and PEFT, on small random models of every family that it knows."""

import math

import pytest
import torch
from common.lm.rollout import decoder as decoder_module
from common.lm.rollout import operations
from common.lm.rollout.architecture import Unsupported
from common.lm.rollout.decoder import Decoder, size_for, size_within
from common.lm.rollout.layers import dequantized
from common.lm.rollout.rows import Request
from common.lm.rollout.weights import PolicyWeights

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
FAMILIES = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "llama": ("LlamaConfig", {}),
    "llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA_3}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "gemma2": ("Gemma2Config", {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "eos_token_id": 1, "sliding_window": 5}),
    "phi3 mini": (
        "Phi3Config",
        {"pad_token_id": 0, "eos_token_id": 1, "rope_parameters": LONG, "original_max_position_embeddings": 64},
    ),
    "phi4 mini": ("Phi3Config", {"pad_token_id": 0, "eos_token_id": 1, "partial_rotary_factor": 0.5}),
}
PROMPTS = [(5, 6, 7), (9, 10, 11, 12, 13, 14), (3, 1, 4, 1, 5), (2,), (9, 10, 11, 12, 13, 14), (8, 8)]


def random_model(family="qwen2", **more):
    import transformers

    name, given = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **given, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def with_lora(model, rank=4, **more):
    from peft import LoraConfig, get_peft_model

    fused = any("qkv_proj" in name for name, _ in model.named_modules())
    targets = (
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if fused else ["q_proj", "v_proj", "up_proj", "o_proj"]
    )
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules=targets, **more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def decoder_of(model, adapter=None, rows=4, length=64):
    weights = PolicyWeights(model, adapter)
    weights.refresh()
    return Decoder(weights, rows, length)


def expected(model, prompt, count):
    """The greedy completion by transformers' generate."""
    ids = torch.tensor([prompt])
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip


@torch.no_grad()
def log_probs_of(model, prompt, tokens, temperature=1.0):
    """Their log-probabilities by one forward pass over prompt and completion."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_generate(family, monkeypatch):
    """Six prompts in four rows of ragged lengths: rows are refilled and compacted on the way."""
    monkeypatch.setattr(decoder_module, "STEPS", 3)
    model = random_model(family)
    requests = [Request(prompt, index, 20 - 3 * index) for index, prompt in enumerate(PROMPTS)]
    for request, decoded in zip(requests, decoder_of(model).decode(requests, -1, 0.0), strict=True):
        assert decoded.tokens == expected(model, request.prompt, request.limit)
        theirs = log_probs_of(model, request.prompt, decoded.tokens)
        assert torch.allclose(torch.tensor(decoded.log_probs), theirs, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_an_adapter_is_merged_as_peft_applies_it(family):
    model = with_lora(random_model(family))
    decoded = decoder_of(model, "default").decode([Request(PROMPTS[1], 3, 12)], -1, 0.7)[0]
    theirs = log_probs_of(model, PROMPTS[1], decoded.tokens, 0.7)
    assert torch.allclose(torch.tensor(decoded.log_probs), theirs, atol=1e-4)
    without = decoder_of(model, None).decode([Request(PROMPTS[1], 3, 12)], -1, 0.7)[0]
    with model.disable_adapter():
        theirs = log_probs_of(model, PROMPTS[1], without.tokens, 0.7)
    assert torch.allclose(torch.tensor(without.log_probs), theirs, atol=1e-4)
    assert without.log_probs != decoded.log_probs


def test_merging_leaves_the_model_as_it_is():
    model = with_lora(random_model())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    decoder_of(model, "default")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_merging_that_cannot_be_recorded_is_done_all_the_same_and_says_so_once(capsys):
    model = with_lora(random_model())
    weights = PolicyWeights(model, "default")
    weights.device = torch.device("cuda")  # which is not there: nothing can be recorded
    merged = weights.layers[0].output.weight
    for _ in range(4):
        before = merged.clone()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)
        weights.refresh()
        assert not torch.allclose(merged, before, atol=1e-3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Merging the adapter cannot be recorded, so it is slower: ")
    assert weights.graph is None


def test_a_base_in_four_bit_is_merged_as_dequantized_and_can_be_decoded_without_a_copy():
    from bitsandbytes.nn import Linear4bit

    model = random_model()
    for layer in model.model.layers:
        for parent, names in ((layer.self_attn, ("q_proj", "v_proj")), (layer.mlp, ("gate_proj", "down_proj"))):
            for name in names:
                old = getattr(parent, name)
                new = Linear4bit(
                    old.in_features, old.out_features, old.bias is not None, torch.float32, quant_type="nf4"
                )
                new.load_state_dict(old.state_dict())
                setattr(parent, name, new.to("cpu"))
    model(input_ids=torch.tensor([[1, 2]]))  # the first pass quantizes
    assert model.model.layers[0].mlp.down_proj.weight.quant_state is not None
    model = with_lora(model)
    request = Request(PROMPTS[1], 3, 12)
    copied = decoder_of(model, "default").decode([request], -1, 1.0)[0]
    weights = PolicyWeights(model, "default", copy=False)
    weights.refresh()
    direct = Decoder(weights, 4, 64).decode([request], -1, 1.0)[0]
    assert direct.tokens == copied.tokens
    assert torch.allclose(torch.tensor(direct.log_probs), torch.tensor(copied.log_probs), atol=1e-4)
    for layer in model.get_base_model().model.layers:  # and transformers sees the same weights, dequantized
        for module in layer.modules():
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if isinstance(base, Linear4bit):
                base.weight = torch.nn.Parameter(dequantized(base).clone(), requires_grad=False)
                base.forward = lambda x, linear=base: torch.nn.functional.linear(x, linear.weight, linear.bias)
    theirs = log_probs_of(model, request.prompt, copied.tokens)
    assert torch.allclose(torch.tensor(copied.log_probs), theirs, atol=1e-4)


def test_a_completion_does_not_depend_on_its_batch():
    """The same seed and prompt in another row, order and number of rows: the same tokens. Another seed: others."""
    model = random_model()
    requests = [Request(PROMPTS[index % 3], 100 + index, 16) for index in range(9)]
    together = decoder_of(model, rows=16).decode(requests, -1, 1.0)
    in_turn = decoder_of(model, rows=2).decode(requests[::-1], -1, 1.0)[::-1]
    alone = [decoder_of(model, rows=1).decode([request], -1, 1.0)[0] for request in requests]
    assert [one.tokens for one in together] == [one.tokens for one in in_turn] == [one.tokens for one in alone]
    assert len({tuple(one.tokens) for one in together}) == 9


def test_a_prompt_is_computed_once_for_all_rows_that_have_it(monkeypatch):
    computed = []
    batch = Decoder._prefill_batch
    monkeypatch.setattr(Decoder, "_prefill_batch", lambda self, part: (computed.extend(part), batch(self, part))[1])
    requests = [Request(PROMPTS[index // 6], index, 4 + index % 3) for index in range(12)]
    decoder_of(random_model(), rows=4).decode(requests, -1, 1.0)
    assert len(computed) == 2


def test_long_prompts_are_computed_in_several_batches(monkeypatch):
    monkeypatch.setattr(decoder_module, "PREFILL", 7)
    model = random_model()
    for prompt, decoded in zip(
        PROMPTS, decoder_of(model, rows=8).decode([Request(one, 0, 5) for one in PROMPTS], -1, 0.0), strict=True
    ):
        assert decoded.tokens == expected(model, prompt, 5)


def test_a_completion_ends_at_the_end_token_or_at_its_limit():
    model = random_model()
    tokens = expected(model, PROMPTS[0], 12)
    for place in (0, 4, 11):
        end = tokens[place]
        want = tokens[: tokens.index(end) + 1]
        assert decoder_of(model).decode([Request(PROMPTS[0], 0, 12)], end, 0.0)[0].tokens == want
    assert decoder_of(model).decode([Request(PROMPTS[0], 0, 12)], 299, 0.0)[0].tokens == tokens
    assert decoder_of(model).decode([Request(PROMPTS[0], 0, 1)], 299, 0.0)[0].tokens == tokens[:1]


def test_draws_have_the_probabilities_of_the_softmax():
    """60,000 draws of eight tokens at temperature 0.7: Pearson's chi-square within its 99.9 % quantile, 24.3."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, -0.5])
    count = 60_000
    zeros = torch.zeros(count, dtype=torch.int64)
    state = operations.State(
        ids=zeros.clone(),
        positions=zeros.clone(),
        counts=torch.arange(count) % 50,
        limits=zeros + 60,
        done=zeros.bool(),
        seeds=torch.arange(count) // 50,
        tokens=zeros[:, None].repeat(1, 60),
        log_probs=torch.zeros(count, 60),
    )
    index = state.counts.clone()
    model = random_model(vocab_size=8)
    greedy, end = torch.zeros(()), torch.tensor(-1)
    architecture = PolicyWeights(model, None).architecture
    operations.choose(logits.repeat(count, 1), state, torch.tensor(0.7), greedy, end, architecture)
    chosen = state.tokens[torch.arange(count), index]
    probabilities = (logits / 0.7).softmax(0)
    seen = torch.bincount(chosen, minlength=8)
    assert float(((seen - count * probabilities) ** 2 / (count * probabilities)).sum()) < 24.3
    drawn = state.log_probs[torch.arange(count), index]
    assert torch.allclose(drawn, probabilities.log()[chosen], atol=1e-5)
    # Draws that follow each other in a completion, and those of seeds that follow each other, are independent.
    for one, two in ((chosen[:-1], chosen[1:]), (chosen[:-50], chosen[50:])):
        both = torch.bincount(one * 8 + two, minlength=64).view(8, 8).float()
        likely = len(one) * probabilities[:, None] * probabilities[None]
        used = likely > 5
        excess = float((((both - likely) ** 2 / likely)[used]).sum()) - int(used.sum())
        assert excess < 5 * math.sqrt(2 * int(used.sum()))


def test_noise_is_that_of_a_gumbel_distribution():
    noise = operations.gumbel(torch.arange(200) * 977, torch.arange(200) % 7, 2000).double().flatten()
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    for quantile in (0.001, 0.5, 0.999, 0.9999):
        limit = -math.log(-math.log(quantile))
        spread = math.sqrt(quantile * (1 - quantile) / len(noise))
        assert float((noise < limit).double().mean()) == pytest.approx(quantile, abs=5 * spread)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "biases"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the embedding or the head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the embedding or the head"),
    ],
)
def test_an_adapter_that_cannot_be_merged_so_is_refused(change, reason):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(random_model(), LoraConfig(**{"target_modules": ["q_proj"], **change}))
    with pytest.raises(Unsupported, match=reason):
        PolicyWeights(model, "default")


def test_a_model_that_is_not_known_is_refused():
    from transformers import AutoModelForCausalLM, GPT2Config

    with pytest.raises(Unsupported, match="gpt2"):
        PolicyWeights(AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)), None)


@pytest.mark.parametrize(("part", "reason"), [("model.embed_tokens", "its embedding is on meta"), ("lm_head", "head")])
def test_an_embedding_or_head_on_another_device_is_refused(part, reason):
    model = random_model(tie_word_embeddings=False)
    model.get_submodule(part).to("meta")
    with pytest.raises(Unsupported, match=reason):
        PolicyWeights(model, None)


def test_positions_beyond_the_models_are_refused():
    with pytest.raises(Unsupported, match="positions"):
        decoder_of(random_model("phi3 mini"), length=128)


def test_a_trained_copy_of_embedding_and_head_is_used():
    model = with_lora(random_model(tie_word_embeddings=False), modules_to_save=["embed_tokens", "lm_head"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    decoded = decoder_of(model, "default").decode([Request(PROMPTS[0], 3, 12)], -1, 1.0)[0]
    theirs = log_probs_of(model, PROMPTS[0], decoded.tokens)
    assert torch.allclose(torch.tensor(decoded.log_probs), theirs, atol=1e-4)


def test_sizes_hold_the_rows():
    assert [size_for(rows) for rows in (1, 3, 64, 65, 512, 9999)] == [1, 4, 64, 96, 512, 512]
    assert [size_within(rows) for rows in (0, 1, 3, 95, 9999)] == [1, 1, 2, 64, 512]
