"""Files that we quantize are those of llama-quantize, to the byte.

The hashes are of the files that llama-quantize wrote of these models: that of the llama.cpp in llama-cpp-python 0.3.36,
the source of the converter (docker/sources.txt), compiled with cmake for any x86-64.
"""

import hashlib
from pathlib import Path

import pytest
from common.errors import InputError
from exporting.quantize import FILE_TYPES, Shape, fit, quantize, tensor_types
from references.small_gguf import MODELS, write

NAMES = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
THEIRS = {  # the first 16 digits of the sha256 of each file, in the order of NAMES
    "few layers": (
        "dff67ffcf8a763a2 37f4f2248dab445c f2df1f6ad7a2c502 08876c1adc8ff1ca 757f125335771908 "
        "e4827fd9c575b1d0 277b11480a2a4c6e 0a72ecb5c9a56c7d 9af3020220cf3f5b 66b953a51c0fd5ac"
    ),
    "few values": (
        "6c096e4be82331f1 4bb84814844d0268 991beb027029c537 de77106c40759052 ad882b522b26779e "
        "6a0b188deb3c90cd 88c856578e10f887 c2529af219d876b4 ca3c065324f3a638 6212b48e708193e0"
    ),
    "no 256": (
        "c679447327667c67 3853d87d08f27ff3 7821581451207667 a73ab6967f3f9592 2af66b616973c0ca "
        "696d81de3ac9c89e e4573ba345d1a94a 892ea7af7b56fd83 4da0b6f084f5d633 5808aa859fadec27"
    ),
    "no 32": (
        "1c42a41479ff9607 375e06160c3e5707 f0c67ccf55174fdd aa87233dd9cb493c dd39877464b43a8f "
        "622972e88c448f8d 025a1c5bbdcbddfa 30d9205b2ac05f51 d85b647509fd4a52 d9867852ab99941f"
    ),
    "one matrix": (
        "4d5ed9cd3b219310 d40cfda7fae4a212 4c20b825f98fe8c8 3718ae566d1f57f6 9e623d91b8e182da "
        "0cfea45ca0101a51 cc0b09cf925aa09f b3aee8a6b89c193f db0892a6ada39d75 c4c1d7a5c4aae73c"
    ),
}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def hashes(model: str, folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    write(folder / "wide.gguf", **MODELS[model])
    found = {}
    for name in names:
        quantize(folder / "wide.gguf", folder / "ours.gguf", name)
        found[name] = sha256(folder / "ours.gguf")
    return found


def theirs(model: str, names: tuple[str, ...]) -> dict[str, str]:
    return {name: known for name, known in zip(NAMES, THEIRS[model].split(), strict=True) if name in names}


@pytest.mark.parametrize("model", ["few layers", "no 256", "no 32"])
def test_a_file_is_that_of_llama_quantize(model, tmp_path):
    names = ("q4_k_m",) if model == "few layers" else NAMES
    assert hashes(model, tmp_path, names) == theirs(model, names)


@pytest.mark.slow
def test_every_file_type_of_every_model_is_that_of_llama_quantize(tmp_path):
    assert tuple(FILE_TYPES) == NAMES
    for model in MODELS:
        assert hashes(model, tmp_path, NAMES) == theirs(model, NAMES), model


def test_what_falls_back_is_named(tmp_path):
    write(tmp_path / "wide.gguf", **MODELS["no 256"])
    fallen = quantize(tmp_path / "wide.gguf", tmp_path / "ours.gguf", "q4_k_m")
    assert "blk.0.attn_k.weight is Q5_0: its rows of 192 weights are no multiple of 256" in fallen


def test_rows_that_do_not_divide_take_the_next_type():
    assert [fit("Q4_K", columns) for columns in (512, 320, 72)] == ["Q4_K", "Q5_0", "F16"]
    assert fit("Q8_0", 72) == "F16"


def names_of(layers: int, *kinds: str) -> dict[str, tuple[int, ...]]:
    return {f"blk.{layer}.{kind}.weight": (256, 256) for layer in range(layers) for kind in kinds}


def test_the_first_the_last_and_every_third_layer_get_more_bits():
    shapes = names_of(16, "attn_v", "ffn_down", "ffn_up") | {
        "token_embd.weight": (256, 64),
        "output_norm.weight": (256,),
    }
    types = tensor_types("q4_k_m", shapes, Shape("qwen2", 16, 4, 2))
    more = [layer for layer in range(16) if types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert [layer for layer in range(16) if types[f"blk.{layer}.attn_v.weight"] == "Q6_K"] == more
    assert {types[f"blk.{layer}.ffn_up.weight"] for layer in range(16)} == {"Q4_K"}
    assert types["token_embd.weight"] == "Q6_K"  # it is the output, too
    assert types["output_norm.weight"] is None
    untied = tensor_types("q4_k_m", {**shapes, "output.weight": (256, 64)}, Shape("qwen2", 16, 4, 2))
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_K", "Q6_K")


def test_layers_are_in_the_order_of_their_numbers():
    names = list(tensor_types("q8_0", names_of(12, "attn_v"), Shape("qwen2", 12, 4, 2)))
    assert names == [f"blk.{layer}.attn_v.weight" for layer in range(12)]


def test_a_70b_gets_more_bits_for_its_few_values():
    shapes = names_of(80, "attn_v")
    kinds = {name: tensor_types("q4_k_m", shapes, Shape(name, 80, 64, 8)) for name in ("llama", "qwen2", "qwen3")}
    assert [kinds[name]["blk.11.attn_v.weight"] for name in kinds] == ["Q5_K", "Q5_K", "Q4_K"]


def test_models_with_other_rules_are_refused_by_name():
    with pytest.raises(
        InputError, match=r"--quant q4_k_m: llama\.cpp has rules of its own for the architecture falcon"
    ):
        tensor_types("q4_k_m", {}, Shape("falcon", 2, 4, 1))
    with pytest.raises(InputError, match="for a model with 8 experts"):
        tensor_types("q4_k_m", {}, Shape("llama", 2, 4, 1, experts=8))
