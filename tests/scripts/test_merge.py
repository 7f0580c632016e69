"""`scripts/merge.py`: the check of a merge, and what it refuses. The arithmetic is in tests/common/lm/test_merge.py."""

import json

import merge as command
import pytest
import torch
from common.errors import MachineError
from conftest import ROOT
from in_process import refusal

TINY = ROOT / "data_samples" / "tiny"


def path(*logits: list[float]) -> torch.Tensor:
    return torch.tensor(logits).log_softmax(-1)


class Tokenizer:
    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def test_a_merge_that_leaves_the_adapters_path_is_refused():
    """Two prompt tokens, then token 1 and token 0 by the adapter."""
    old = path([0.0, 0], [0, 2], [3, 0])
    tokens = [0, 0, 1, 0]
    same = command.compare([(tokens, 2, old)], [old], Tokenizer())
    assert same == {"tokens": 2, "mean_difference": 0, "max_difference": 0}
    near = path([9.0, 0], [0, 2.01], [3, 0])  # the first position is the prompt's
    assert 0 < command.compare([(tokens, 2, old)], [near], Tokenizer())["max_difference"] < 0.01
    with pytest.raises(MachineError, match="after '0 0' the next token is '1' with the adapter and '0' merged"):
        command.compare([(tokens, 2, old)], [path([0.0, 0], [2, 0], [3, 0])], Tokenizer())
    with pytest.raises(MachineError, match=r"log-probabilities differ by 0\.\d+ nats in the mean"):
        command.compare([(tokens, 2, old)], [path([0.0, 0], [0, 1], [2, 0])], Tokenizer())


def adapter(folder, **files: dict):
    folder.mkdir()
    for name, content in {"adapter_config": {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "adapter_model.safetensors").write_bytes(b"")
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
