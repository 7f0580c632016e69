"""The environment of a command: the hub is out of reach unless something comes from there."""

import os
from pathlib import Path

import pytest
from common.environment import set_variables
from common.lm.hub import find_model
from fake_hub import serve

LOCAL, ON_HUB = find_model("tiny"), find_model("qwen2.5-7b")
FILES, DATASET = [Path("a.jsonl")], "org/name"


@pytest.mark.parametrize(
    ("models", "sources", "offline"),
    [
        ([], [], "1"),
        ([LOCAL], [FILES], "1"),
        ([LOCAL, LOCAL], [FILES, FILES], "1"),
        ([ON_HUB], [FILES], None),
        ([LOCAL, ON_HUB], [FILES], None),
        ([LOCAL], [FILES, DATASET], None),
    ],
)
def test_requests_are_forbidden_where_everything_is_here(models, sources, offline, monkeypatch):
    with serve({}) as hub:
        monkeypatch.setattr(os, "environ", {"HF_ENDPOINT": hub.url})
        set_variables(models=models, sources=sources)
        assert os.environ.get("HF_HUB_OFFLINE") == offline
        assert len(hub.requests) == (offline is None)  # whether it can be reached: see lm/network.py


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HF_HUB_OFFLINE": "0", "GOMP_SPINCOUNT": "1"})
    set_variables(models=[LOCAL])
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert os.environ["GOMP_SPINCOUNT"] == "1"
