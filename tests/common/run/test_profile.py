"""PROFILE_STEPS: the named steps are profiled, and no other."""

import gzip
import json

import pytest
from common.errors import InputError
from common.run.profile import Profile


def steps(folder, count: int) -> Profile:
    """As a trainer goes through its steps, each with one product more than the one before."""
    import torch

    profile, matrix = Profile(folder), torch.ones(64, 64)
    profile.before(1)
    for step in range(1, count + 1):
        for _ in range(step):
            matrix @ matrix
        profile.after(step)
        profile.before(step + 1)
    profile.finish(count)
    return profile


def test_the_named_steps_are_in_the_trace_and_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE_STEPS", "3-4")
    steps(tmp_path / "profile", 6)
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as stream:
        events = json.load(stream)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3 + 4
    table = (tmp_path / "profile" / "kernels.md").read_text(encoding="utf-8")
    assert table.startswith("Steps 3 to 4.\n")
    (row,) = [line for line in table.splitlines() if "`aten::mm`" in line]
    assert row.endswith("| 7 |")


@pytest.mark.parametrize("words", ["", "9"])
def test_without_a_step_that_comes_nothing_is_written(words, tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE_STEPS", words)
    steps(tmp_path / "profile", 2)
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_or_begins_among_the_steps_writes_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE_STEPS", "3-9")
    steps(tmp_path / "ended", 4)
    assert (tmp_path / "ended" / "kernels.md").read_text(encoding="utf-8").startswith("Steps 3 to 4.\n")
    profile = Profile(tmp_path / "resumed")
    profile.before(9)
    profile.after(9)
    assert (tmp_path / "resumed" / "kernels.md").read_text(encoding="utf-8").startswith("Step 9.\n")


@pytest.mark.parametrize("words", ["all", "4-3", "0", "-2"])
def test_other_words_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILE_STEPS", words)
    with pytest.raises(InputError, match=f"PROFILE_STEPS={words}: expected a step"):
        Profile(tmp_path)
