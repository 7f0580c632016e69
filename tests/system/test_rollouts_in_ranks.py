"""GRPO and PPO in two ranks on the CPU, by gloo, on the tiny model: they sample and train what one process does.

Each run changes its number of ranks on the way, because one was killed or got a signal.
"""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
DATA = ("--data", ROOT / "data_samples" / "arithmetic-train.jsonl", "--max-completion-length", 24)
KEPT = ("--max-steps", 4, "--save-steps", 1, "--save-total-limit", 9, "--sample-tokens", 4, "--learning-rate", 1e-3)
FLAGS = {
    # All 16 completions of a step are in samples.jsonl. Groups are replaced: the tiny model solves few problems.
    "grpo": (
        *("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 4, "--num-generations", 4),
        *("--refill", 1, "--sample-prompts", 16, "--beta", 0.05),
    ),
    "ppo": (
        *("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2, "--rollout-batch-size", 16),
        *("--critic-warmup-steps", 1, "--num-ppo-epochs", 2, "--sample-prompts", 16, "--eval-ratio", 0.003),
    ),
}
LEARNED = {
    "grpo": ("loss", "grad_norm"),
    "ppo": ("loss/policy_avg", "loss/value_avg", "objective/kl", "policy/entropy", "value/grad_norm"),
}
SAME = {
    "grpo": ("reward", "flat", "completions/mean_length", "lr", "learning_rate"),
    "ppo": ("score/mean", "objective/scores", "completions/mean_length", "lr", "episode"),
}


def train(recipe: str, folder: Path, ranks: int, way: str = "", step: int = 0) -> subprocess.CompletedProcess:
    """Run a recipe in so many ranks; `way` happens to the last one in its step `step`, see interrupt.py."""
    command = [ROOT / "recipes" / f"{recipe}.py", *DATA, *KEPT, *FLAGS[recipe], "--output-dir", folder]
    if way:
        command = [ROOT / "tests" / "system" / "interrupt.py", way, step, *command]
    if ranks > 1:
        command = [ROOT / "scripts" / "launch" / "processes.py", ranks, *command]
    environment = {**os.environ, "INTERRUPT_RANK": str(ranks - 1)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def exchanges(folder: Path, *flags: object) -> list[list[str]]:
    """What each micro-batch of GRPO exchanges between two ranks: the names of torch's functions."""
    command = [ROOT / "scripts" / "launch" / "processes.py", 2, ROOT / "tests" / "system" / "collectives.py"]
    command += [folder / "calls.json", ROOT / "recipes" / "grpo.py", *DATA, *flags, "--output-dir", folder / "run"]
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "calls.json").read_text(encoding="utf-8"))


def logged(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def assert_same(recipe: str, ours: Path, theirs: Path) -> None:
    """Completions, rewards and samples.jsonl are equal; what floats are added up for, but for the order."""
    assert read_jsonl(ours / "samples.jsonl") == read_jsonl(theirs / "samples.jsonl")
    assert [row["step"] for row in read_jsonl(ours / "samples.jsonl")] == [step for step in range(4) for _ in range(16)]
    rows, expected = logged(ours), logged(theirs)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in SAME[recipe]:
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name
    for name in LEARNED[recipe]:
        values = [row.get(name, 0.0) for row in expected]
        assert [row.get(name, 0.0) for row in rows] == pytest.approx(values, rel=1e-4, abs=2e-6), name
        assert any(values)
    mine, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    assert all(mine[name].allclose(other[name], rtol=1e-3, atol=1e-4) for name in mine)  # Adam enlarges differences


def saved(folder: Path) -> int:
    return json.loads((folder / "run.json").read_text())["step"]


@pytest.mark.usefixtures("warm")
def test_grpo_in_two_ranks_of_which_one_is_killed_and_then_in_one_is_grpo_in_one(tmp_path):
    done = train("grpo", tmp_path / "whole", 1)
    assert done.returncode == 0, done.stderr
    begun = time.monotonic()
    done = train("grpo", tmp_path / "cut", 2, "SIGKILL", 3)
    assert done.returncode == 137, done.stderr
    assert "Rank 1 of 2 was ended by SIGKILL" in done.stderr
    assert "find_unused_parameters" not in done.stderr  # DDP's warning that it looks for what there is not
    assert time.monotonic() - begun < 120
    assert saved(tmp_path / "cut") == 2
    done = train("grpo", tmp_path / "cut", 1)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 2" in done.stdout
    assert_same("grpo", tmp_path / "cut", tmp_path / "whole")


@pytest.mark.usefixtures("warm")
def test_the_ranks_of_grpo_gather_nothing_in_a_micro_batch_once_its_completions_are_there(tmp_path):
    """To wait for the slower rank in each micro-batch takes longer than once a step.

    What is added up is by the loss of the CPU, TRL's: see the next test.
    """
    small = ("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 6, "--num-generations", 4)
    small += ("--max-steps", 2, "--beta", 0.05, "--sample-prompts", 0, "--sample-tokens", 4)
    of_batches = exchanges(tmp_path, *small)
    assert len(of_batches) == 6  # two steps of three
    assert all("all_gather" in of_batches[first] for first in (0, 3))  # they sample, and score
    assert {name for later in (1, 2, 4, 5) for name in of_batches[later]} == {"all_reduce"}


def test_the_loss_of_a_gpu_exchanges_only_what_grpo_has_it_gather():
    """Unsloth's, which does not run here, by its source; `GroupSampling.compute_loss` replaces the `gather` in it."""
    source = Path(str(distribution("unsloth").locate_file("unsloth/models/rl_replacements.py"))).read_text()
    start = source.index("def grpo_trainer_compute_loss(")
    loss = source[start : source.index("\ndef ", start)]
    assert "self.accelerator.gather(low_clip)" in loss
    assert set(re.findall(r"accelerator\.(\w+)", loss)) == {"gather", "num_processes"}
    assert not re.search("all_reduce|all_gather|barrier", loss)


@pytest.mark.usefixtures("warm")
def test_ppo_in_one_then_in_two_ranks_of_which_one_got_a_signal_and_then_in_one_is_ppo_in_one(tmp_path):
    done = train("ppo", tmp_path / "whole", 1)
    assert done.returncode == 0, done.stderr
    for ranks, step in ((1, 1), (2, 3)):
        done = train("ppo", tmp_path / "cut", ranks, "SIGTERM", step)
        assert done.returncode == 75, done.stderr
        assert saved(tmp_path / "cut") == step
    done = train("ppo", tmp_path / "cut", 1)
    assert done.returncode == 0, done.stderr
    assert_same("ppo", tmp_path / "cut", tmp_path / "whole")
    ours, theirs = (json.loads((tmp_path / name / "run.json").read_text())["held_out"] for name in ("cut", "whole"))
    assert ours["before"]["score"] == theirs["before"]["score"]
    assert ours["after"] == pytest.approx(theirs["after"], rel=1e-3, abs=1e-6)
