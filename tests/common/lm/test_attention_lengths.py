"""The length of rows under Unsloth's attention: what we set is there to be set, and what its users know still holds."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from common.lm.load import attend_to_rows_as_they_are

VARIABLE = "UNSLOTH_SDPA_CUDNN_BUCKET"


def test_unsloth_reads_a_bucket_of_0_as_rows_as_they_are():
    (folder,) = importlib.util.find_spec("unsloth").submodule_search_locations  # type: ignore[union-attr, misc]
    lines = Path(folder).joinpath("utils", "attention_dispatch.py").read_text(encoding="utf-8")
    assert f'_CUDNN_LENGTH_BUCKET = max(int(os.environ.get("{VARIABLE}", "128")), 0)' in lines
    assert "if not _CUDNN_LENGTH_BUCKET or _CUDNN_CHOICE is None:\n        return False" in lines


@pytest.mark.parametrize(("given", "few", "left"), [(None, True, 0), ("64", True, 64), (None, False, 64)])
def test_rows_of_few_lengths_are_padded_only_where_the_user_says_by_how_much(given, few, left, monkeypatch):
    packages = {"unsloth": ModuleType("unsloth"), "unsloth.utils": ModuleType("unsloth.utils")}
    dispatch = ModuleType("unsloth.utils.attention_dispatch")
    dispatch.__dict__["_CUDNN_LENGTH_BUCKET"] = 64
    packages["unsloth.utils"].__dict__["attention_dispatch"] = dispatch
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != VARIABLE})
    os.environ.update({VARIABLE: given} if given else {})
    attend_to_rows_as_they_are(few)
    assert dispatch.__dict__["_CUDNN_LENGTH_BUCKET"] == left
