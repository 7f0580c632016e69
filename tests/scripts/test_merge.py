"""`scripts/merge.py`: the check of a merge, and what it refuses. tests/common/lm/test_merge_weights.py has the rest."""

import json

import merge as command
import pytest
import torch
from common.errors import InputError, MachineError
from conftest import ROOT
from in_process import as_it_was, refusal
from safetensors.torch import save_file

TINY = ROOT / "data_samples" / "tiny"


def path(*logits: list[float]) -> torch.Tensor:
    return torch.tensor(logits).log_softmax(-1)


def test_a_merge_that_does_not_change_what_the_adapter_changes_is_refused():
    frozen, trained = [path([0.0, 0], [0, 2])], [path([0.0, 1], [3, 0])]
    assert command.compare(frozen, trained, trained, "float32") == 0
    near = command.compare(frozen, trained, [trained[0] + 1e-4], "float32")
    assert 0 < near < 1e-3
    for wrong in (frozen[0], trained[0] * 1.02, trained[0] * torch.nan):
        with pytest.raises(MachineError, match=r"differ by \S+ nats from those with the adapter, which itself changes"):
            command.compare(frozen, trained, [wrong], "float32")
    assert command.compare(frozen, frozen, frozen, "float32") == 0  # an adapter that changes nothing


def adapter(folder, **files: dict):
    folder.mkdir()
    for name, content in {"adapter_config": {"peft_type": "LORA"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    assert "needs --adapter" in refusal(command.main, capsys)
    assert "no adapter_config.json there" in refusal(command.main, capsys, "--adapter", tmp_path)
    mine = adapter(tmp_path / "mine")
    assert "give the base with --model" in refusal(command.main, capsys, "--adapter", mine)
    reward = adapter(tmp_path / "reward", head={"kind": "regression"})
    assert "is a reward model, which PPO takes as it is" in refusal(
        command.main, capsys, "--adapter", reward, "--model", "tiny"
    )
    (tmp_path / "merged").mkdir()
    message = refusal(command.main, capsys, "--adapter", mine, "--model", "tiny")
    assert "merged: holds something else; give another folder with --output-dir" in message


def test_an_adapter_that_cannot_be_merged_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    mine = adapter(tmp_path / "mine", adapter_config={"peft_type": "LORA", "alora_invocation_tokens": [1]})
    message = refusal(command.main, capsys, "--adapter", mine, "--model", "tiny")
    assert "LORA with alora_invocation_tokens cannot be merged" in message
    (mine / "adapter_model.safetensors").rename(mine / "adapter_model.bin")
    (mine / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "its weights are a pickle" in refusal(command.main, capsys, "--adapter", mine, "--model", "tiny")


@pytest.fixture
def dora(tmp_path):
    """A DoRA adapter of tiny after two added tokens, with its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<one>", "<two>"])
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.02
    model.save_pretrained(tmp_path / "dora")
    tokenizer.save_pretrained(tmp_path / "dora")
    return tmp_path / "dora"


@pytest.mark.slow
def test_the_written_model_is_checked_and_has_the_adapters_tokens(dora, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["merge", "--adapter", str(dora), "--model", "tiny", "--output-dir", str(tmp_path / "merged")]
    monkeypatch.setattr("sys.argv", words)
    with as_it_was():
        command.main()
    assert "The merged model changes the log-probabilities as the adapter does" in capsys.readouterr().out
    check = json.loads((tmp_path / "merged" / "merge.json").read_text())["check"]
    assert check["dtype"] == "float32"
    assert check["error"] < 1e-3 > check["layer_error"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<two>") == 2049
    assert merged.get_input_embeddings().weight.shape[0] == 2050


def test_a_magnitude_that_is_two_percent_off_leaves_no_folder(dora, tmp_path, monkeypatch):
    """In every layer, by a merge that the check of layers does not see."""
    from common.lm import merge as weights

    right = weights.merge_weights

    def wrong(model):
        names = [name for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")]
        merged, error = right(model)
        for name in names:
            merged.get_submodule(name).weight.data *= 0.98
        return merged, error

    monkeypatch.setattr(weights, "merge_weights", wrong)
    monkeypatch.setattr(
        "sys.argv", ["merge", "--adapter", str(dora), "--model", "tiny", "--output-dir", str(tmp_path / "merged")]
    )
    with as_it_was(), pytest.raises(MachineError, match="is not the trained one: its log-probabilities differ by"):
        command.main()
    assert not (tmp_path / "merged").exists()


def test_an_adapter_whose_tokenizer_has_more_tokens_is_not_used_beside_its_base(dora):
    from common.lm.hub import find_model
    from common.lm.load import check_vocabulary

    with pytest.raises(InputError, match=r"with tokens that its base has not \(<one>, <two>\); merge it"):
        check_vocabulary(find_model("tiny"), dora)


def test_generation_stops_where_an_answer_ends_in_training(tokenizer):
    """A base may stop at the end of a document only, as Qwen's does, and be trained on chats."""
    from common.lm.merge import stop_at
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    for before, after in ((2045, [2047, 2045]), ([2045, 2047], [2045, 2047]), (None, [2047])):
        model.generation_config.eos_token_id = before
        stop_at(model, tokenizer)
        assert model.generation_config.eos_token_id == after


def test_a_file_that_does_not_hold_the_weights_is_refused(tmp_path):
    from common.lm.merge import check_written
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    model.save_pretrained(tmp_path)
    check_written(model, tmp_path)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] += 1
    with pytest.raises(MachineError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is not as it was merged"):
        check_written(model, tmp_path)
