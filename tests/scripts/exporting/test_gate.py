"""The gate refuses every planted fault, and shows the first difference."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from exporting import gate, gate_tokens
from exporting.convert import convert
from exporting.gate import Exported
from exporting.gate_tokens import Difference
from exporting.merged import find_trained

TINY = ROOT / "data_samples" / "tiny"


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log_softmax(-1)


def test_divergence_is_the_mean_kl_and_the_share_of_equal_likeliest_tokens():
    one, other = log_probs([math.log(3), 0.0], [0.0, 2.0]), log_probs([0.0, 0.0], [0.0, 2.0])
    found = gate.divergence([one], [other])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found["kl"] == pytest.approx(kl / 2, abs=1e-6)
    assert found["largest kl"] == pytest.approx(kl, abs=1e-6)
    turned = gate.divergence([log_probs([1.0, 0.0], [1.0, 0.0])], [log_probs([0.0, 1.0], [1.0, 0.0])])
    assert turned["top1"] == 0.5
    assert gate.divergence([log_probs([0.05, 0.0])], [log_probs([0.0, 0.05])])["top1"] == 1.0  # decided by nothing


def test_what_is_not_a_number_is_refused():
    found = gate.divergence([log_probs([1.0, 0.0])], [torch.full((1, 2), torch.nan)])
    with pytest.raises(Difference, match="is not what was trained"):
        gate._judge("file", found, gate.BOUNDS["q2"], "f16")


def test_an_adapter_that_changes_little_has_a_bound_of_its_own():
    """What a base alone differs by must never be within the bound."""
    with pytest.raises(
        Difference, match=r"0\.005 nats \(KL\) from those of the adapter.*the base alone is 0\.005 nats"
    ):
        gate._judge("merged", {"kl": 0.005, "top1": 1.0}, gate.MERGED, "the adapter on its base", 0.005)


# --- planted faults -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def found(trained):
    return find_trained(str(trained[0]))


@pytest.fixture(scope="session")
def texts(found):
    return gate_tokens.read_conversations(gate.trained_tokenizer(found))


@pytest.fixture(scope="session")
def measured(found):
    """What the trained model and its base compute, which no fault changes: computed once."""
    return gate._of_trained(found)


@pytest.fixture
def weights(found, measured, monkeypatch):
    monkeypatch.setattr(gate, "_of_trained", lambda _: measured)
    return lambda merged, **files: gate.check_weights(found, Exported(merged, files), print)


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of a file or a folder of the export, to be damaged."""

    def make(name: str):
        (source,) = exported.glob(name)
        target = tmp_path / source.name
        return shutil.copytree(source, target) if source.is_dir() else Path(shutil.copy(source, target))

    return make


def replace(file, before: bytes, after: bytes) -> None:
    content = file.read_bytes()
    assert before in content
    assert len(before) == len(after)  # the rest of the file stays where it is
    file.write_bytes(content.replace(before, after))


def damage(file, tensor: str) -> None:
    """Turn the rows of one tensor around."""
    import gguf

    reader = gguf.GGUFReader(file, "r+")
    data = next(found.data for found in reader.tensors if found.name == tensor)
    data[:] = data[::-1].copy()


@pytest.mark.slow
def test_a_right_export_passes(exported, texts, weights):
    gate_tokens.check_folder(exported / "merged", texts)
    modelfile = (exported / "gguf" / "Modelfile").read_text()
    for file in (exported / "gguf").glob("*.gguf"):
        gate_tokens.check_file(file, texts, modelfile)
    weights(exported / "merged", f16=next((exported / "gguf").glob("*-f16.gguf")))


@pytest.mark.slow
def test_a_wrong_template_in_the_file_is_refused(copy, texts):
    file = copy("gguf/*-q4_k_m.gguf")
    replace(file, b"<|im_start|>assistant\\n' }}\n{%- endif", b"<|im_start|>assistent\\n' }}\n{%- endif")
    with pytest.raises(Difference, match=r"'one turn' is another prompt than in training.*assistent.*there.*assistant"):
        gate_tokens.check_file(file, texts)


@pytest.mark.slow
def test_a_wrong_modelfile_is_refused(exported, texts):
    modelfile = (exported / "gguf" / "Modelfile").read_text()
    wrong = modelfile.replace("<|im_start|>user\n", "<|im_start|>user ")
    assert wrong != modelfile
    with pytest.raises(Difference, match="the Modelfile, read as Ollama does: the conversation 'one turn' is another"):
        gate_tokens.check_file(next((exported / "gguf").glob("*-q4_k_m.gguf")), texts, wrong)


@pytest.mark.slow
def test_a_file_that_does_not_stop_is_refused(copy, tmp_path, tokenizer):
    """An end token of one's own, whose name llama.cpp does not know: the converter marks it, or nothing stops."""
    folder, file = copy("merged"), tmp_path / "own.gguf"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text(encoding="utf-8").replace("<|im_end|>", "<|over|>")
        if name == "tokenizer_config.json":
            text = text.replace('"eos_token": "<|over|>"', '"eos_token": "<|endoftext|>"')
        (folder / name).write_text(text, encoding="utf-8")
    own = gate_tokens.read_conversations(gate_tokens.load_tokenizer(gate_tokens.find_model(str(folder))))
    assert own.end == "<|over|>"
    gate_tokens.check_folder(folder, own)
    convert(folder, file, "f16", "own", own.end)
    gate_tokens.check_file(file, own)
    key, end = b"tokenizer.ggml.eot_token_id" + (4).to_bytes(4, "little"), (2047).to_bytes(4, "little")
    replace(file, key + end, key + (2045).to_bytes(4, "little"))
    with pytest.raises(Difference, match=r"own\.gguf: llama\.cpp does not stop at <\|over\|> \(2047\)"):
        gate_tokens.check_file(file, own)


@pytest.mark.slow
def test_an_end_token_that_is_not_in_the_generation_config_is_refused(copy, texts):
    folder = copy("merged")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2045}')
    with pytest.raises(Difference, match=r"eos_token_id is 2045, and training ended answers with <\|im_end\|>, 2047"):
        gate_tokens.check_folder(folder, texts)


@pytest.mark.slow
def test_an_added_token_that_is_lost_is_refused(exported, tmp_path):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(TINY)
    own.add_tokens(["<one>"], special_tokens=True)
    wanted = gate_tokens.read_conversations(own)
    with pytest.raises(Difference, match="merged: its tokenizer has lost the token <one>, of id 2048 in training"):
        gate_tokens.check_folder(exported / "merged", wanted)
    with pytest.raises(Difference, match=r"reads the token <one> as \[.*\], and training as \[2048\]"):
        gate_tokens.check_file(next((exported / "gguf").glob("*-f16.gguf")), wanted)


@pytest.mark.slow
def test_a_base_in_place_of_the_merged_model_is_refused(weights):
    with pytest.raises(Difference, match="computes what the base computes: the base was exported"):
        weights(TINY)


@pytest.mark.slow
def test_a_merge_into_another_base_is_refused(copy, weights):
    from safetensors.torch import load_file, save_file

    folder = copy("merged")
    state = load_file(folder / "model.safetensors")
    base = load_file(TINY / "model.safetensors")
    for name in state:
        state[name] += 0.1 * base[name].float().std() * torch.randn(state[name].shape, dtype=state[name].dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Difference, match=r"merged is not what was trained: .* from those of the adapter on its base"):
        weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tensor"), [("f16", "blk.2.attn_q.weight"), ("q4_k_m", "blk.1.ffn_down.weight")])
def test_a_file_with_a_broken_tensor_is_refused(kind, tensor, exported, copy, weights):
    broken = copy(f"gguf/*-{kind}.gguf")
    damage(broken, tensor)
    wide = next((exported / "gguf").glob("*-f16.gguf"))
    files = {kind: broken} if kind == "f16" else {"f16": wide, kind: broken}
    shown = (
        r"-f16\.gguf is not what was trained" if kind == "f16" else r"q4_k_m\.gguf: blk\.1\.ffn_down\.weight, of type Q"
    )
    with pytest.raises(Difference, match=shown):
        weights(exported / "merged", **files)
