"""`scripts/export.py`: what it refuses, and a real export of a run of the tiny model."""

import json
import shutil

import export as command
import pytest
from common.errors import InputError
from conftest import ROOT
from exporting.convert import split_name
from exporting.merged import Trained, find_trained, write_adapter
from in_process import refusal

TINY = ROOT / "data_samples" / "tiny"


def run_of(folder, recipe="sft", model="tiny", **matters):
    """The folder of a run with an adapter that holds nothing."""
    (folder / "adapter").mkdir(parents=True)
    record = {"recipe": recipe, "status": "done", "arguments": {"model": {"value": model}}, "matters": matters}
    (folder / "run.json").write_text(json.dumps(record))
    config = {"peft_type": "LORA", "base_model_name_or_path": "/home/me/secret/tiny", "r": 8}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter" / "README.md").write_text("[More Information Needed]")
    return folder


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    assert "--quant q4_k: unknown (did you mean q4_k_s?); there are f16, bf16, q8_0" in refusal(
        command.main, capsys, "--run", tmp_path, "--quant", "q4_k"
    )
    assert "holds no run, no adapter and no model" in refusal(command.main, capsys, "--run", tmp_path)
    run = run_of(tmp_path / "run")
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    message = refusal(command.main, capsys, "--run", TINY, "--output-dir", full)
    assert "full: holds something else than an export" in message
    assert "holds what is exported" in refusal(command.main, capsys, "--run", TINY, "--output-dir", TINY)
    (full / "letter.txt").rename(full / "config.json")
    assert "config.json: is damaged or no JSON" in refusal(command.main, capsys, "--run", full)
    (run / "adapter").rename(run / "checkpoints")
    assert "has no adapter yet" in refusal(command.main, capsys, "--run", run)


def test_a_reward_model_is_refused_by_name(tmp_path):
    run = run_of(tmp_path / "reward", recipe="reward")
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    (classifier / "config.json").write_text('{"architectures": ["Qwen2ForSequenceClassification"]}')
    (run / "adapter" / "head.json").write_text("{}")
    for folder in (run, run / "adapter", classifier):
        with pytest.raises(
            InputError, match="a reward model gives scores, from a head that GGUF and chat servers have no"
        ):
            find_trained(str(folder))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    run = run_of(tmp_path / "run", model=str(TINY), base="0" * 64)
    with pytest.raises(InputError, match=r"was trained on .* \(0{16}\), and .* is another model or another version"):
        find_trained(str(run))


def test_an_exported_adapter_names_its_base_and_no_path(tmp_path, monkeypatch):
    from common.lm.hub import Model

    run = run_of(tmp_path / "run")
    hub = Model("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", "abc123", None, local=False)
    write_adapter(Trained("run", run, hub, adapter=run / "adapter"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Qwen2.5-0.5B", "abc123")
    local = Model("tiny", str(TINY), None, None, local=True)
    write_adapter(Trained("run", run, local, adapter=run / "adapter"), tmp_path / "local")
    config = json.loads((tmp_path / "local" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny", None)
    assert not (tmp_path / "out" / "README.md").exists()  # PEFT's form


def test_quantizations_may_be_joined_and_come_once():
    assert command.read_quants(("Q4_K_M,q8_0 f16", "q8_0")) == ["q4_k_m", "q8_0", "f16"]


def test_a_tokenizer_of_its_own_is_known_by_how_it_splits_texts(tokenizer):
    text = tokenizer.backend_tokenizer.to_str()
    assert split_name(text) == "qwen2"
    pattern = json.loads(text)
    pattern["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    assert split_name(json.dumps(pattern)) is None
    assert split_name("{}") is None


# --- a real one ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_holds_what_was_trained_and_says_of_what_it_is_made(exported, trained):
    run, _ = trained
    record = json.loads((exported / "export.json").read_text())
    assert {*record["files"]} | {"export.json"} == {
        str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()
    }
    names = {f"{run.name}-{kind}.gguf" for kind in ("f16", "q8_0", "q4_k_m")} | {"Modelfile"}
    assert {file.name for file in (exported / "gguf").iterdir()} == names
    gate = record["gate"]
    assert len(gate["conversations"]) == 7
    assert gate["end"] == "<|im_end|>"
    assert gate["merged"]["kl"] < 1e-3 < 0.1 < gate["adapter"]["kl of the base"]
    assert gate["f16"]["kl"] < 1e-4
    assert gate["q8_0"]["kl"] < gate["q4_k_m"]["kl"] < 0.3
    assert (exported / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    texts = [
        file.read_text() for file in exported.rglob("*") if file.suffix in (".json", ".md") or file.name == "Modelfile"
    ]
    assert not [text for text in texts if str(ROOT) in text or str(run) in text]
    assert "More Information Needed" not in (exported / "README.md").read_text()


@pytest.mark.slow
def test_llama_cpp_answers_as_transformers_does(exported):
    import torch
    from exporting import llama_cpp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    model = AutoModelForCausalLM.from_pretrained(exported / "merged", dtype=torch.float32)
    with llama_cpp.server(next((exported / "gguf").glob("*-f16.gguf"))) as server:
        for question in ("What is 2 + 3?", "Name a colour.", "二加三等于多少？"):
            text = server.render([{"role": "user", "content": question}])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ours = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :].tolist()
            theirs = server.complete(ids, 48)
            assert theirs["tokens"] == ours
            assert theirs["stop_type"] == "eos"


@pytest.mark.slow
def test_an_earlier_export_keeps_its_formats(exported, trained, tmp_path):
    found = find_trained(str(trained[0]))
    assert command.with_earlier(exported, found, "gguf", ["q6_k"]) == ("all", ["q6_k", "f16", "q8_0", "q4_k_m"])
    assert command.with_earlier(exported, found, "merged", ["q2_k"]) == ("all", ["f16", "q8_0", "q4_k_m"])
    shutil.copytree(exported, tmp_path / "export")
    record = json.loads((exported / "export.json").read_text())
    (tmp_path / "export" / "export.json").write_text(json.dumps({**record, "weights": {"adapter": "another"}}))
    assert command.with_earlier(tmp_path / "export", found, "gguf", ["q6_k"]) == ("gguf", ["q6_k"])
