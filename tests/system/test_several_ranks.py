"""Two ranks on the CPU, by gloo, on the tiny model: they train what one process trains, stop, fail and resume."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from common.errors import InputError
from common.run.bad_numbers import check_alike, check_weights
from common.run.ranks import batch_of_rank
from common.run.shared_steps import RankBatches
from conftest import ROOT, in_two_ranks, read_jsonl
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

ROWS = 19  # of training: in micro-batches of 2 and steps of 8 an epoch ends with half a micro-batch on one rank
FLAGS = ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "4", "--num-train-epochs", "2"]
FLAGS += ["--logging-steps", "1", "--save-steps", "2", "--learning-rate", "1e-3"]
DATA = {"sft": "sft.jsonl", "dpo": "preferences.jsonl", "kto": "feedback-train.jsonl", "reward": "scores.jsonl"}
OF = {
    "sft": ["--sample-prompts", "0"],
    "dpo": ["--sample-prompts", "0", "--no-gradient-checkpointing"],  # with it Unsloth tells DDP that all is used
    "kto": ["--sample-prompts", "0", "--loss-type", "apo_zero_unpaired"],
    "reward": ["--eval-ratio", "0"],
}


def train(
    recipe: str, folder: Path, ranks: int, way: str = "", step: int = 0, flags: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    """Run a recipe in so many ranks; `way` happens in its step `step`, see interrupt.py."""
    rows = folder.parent / f"{recipe}.jsonl"
    if not rows.exists():
        sample = (ROOT / "data_samples" / DATA[recipe]).read_text(encoding="utf-8")
        rows.write_text("".join(sample.splitlines(keepends=True)[:ROWS]), encoding="utf-8")
    command = [ROOT / "recipes" / f"{recipe}.py", "--data", rows, "--output-dir", folder, *FLAGS, *OF[recipe], *flags]
    if way:
        command = [ROOT / "tests" / "system" / "interrupt.py", way, step, *command]
    if ranks > 1:
        command = [ROOT / "scripts" / "launch" / "processes.py", ranks, *command]
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip


def logged(folder: Path) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def assert_same(ours: Path, theirs: Path, bfloat16: bool = False) -> None:
    """Losses, gradients and weights of two runs are equal but for the order in which floats are added.

    With `bfloat16` the adapter is kept and its gradients are added in that type, as over an nf4 base on processors.
    """
    for name, near in (("loss", 1e-4), ("grad_norm", 1e-2 if bfloat16 else 1e-4), ("learning_rate", 1e-4)):
        assert [row[name] for row in logged(ours)] == pytest.approx([row[name] for row in logged(theirs)], rel=near)
    mine, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    rtol, atol = (1e-2, 1e-3) if bfloat16 else (1e-3, 2e-5)
    assert all(mine[name].allclose(other[name], rtol=rtol, atol=atol) for name in mine)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, warm_server):
    """SFT in one process."""
    folder = tmp_path_factory.mktemp("ranks") / "alone"
    done = train("sft", folder, 1, **warm_server)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(warm, alone):
    folder = alone.parent / "two"
    done = train("sft", folder, 2)
    assert done.returncode == 0, done.stderr
    assert_same(folder, alone)
    assert [row["step"] for row in logged(folder)] == list(range(1, 7))
    assert done.stdout.count("step 6/6") == 1
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["ranks"], record["machine"]["nodes"]) == ("done", 2, 1)
    assert len(record["machine"]["devices"]) == 2
    names = sorted(file.name for file in (folder / "checkpoints" / "checkpoint-6").iterdir())
    assert [name for name in names if name.startswith("rng")] == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["--no-load-in-4bit", "--load-in-4bit"])
def test_a_sharded_model_learns_what_a_whole_one_does_and_saves_the_same_file(weights, alone):
    """FSDP2: each rank holds half of the weights. Without the warm server: unsloth decides so when it is imported."""
    folder = alone.parent / f"sharded{weights}"
    done = train("sft", folder, 2, flags=("--sharded", weights))
    assert done.returncode == 0, done.stderr
    assert "FSDP2 sharded 4 blocks" in done.stdout + done.stderr
    assert ("28 4-bit weights" in done.stdout + done.stderr) == (weights == "--load-in-4bit")
    whole = alone
    if weights == "--load-in-4bit":
        whole = alone.parent / "whole"
        done = train("sft", whole, 1, flags=(weights,))
        assert done.returncode == 0, done.stderr
    assert_same(folder, whole, bfloat16=weights == "--load-in-4bit")


def test_one_process_has_nobody_to_share_a_model_with(tmp_path):
    done = train("sft", tmp_path / "one", 1, flags=("--sharded",))
    assert done.returncode == 2
    assert "--sharded divides the model among several GPUs" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "kto", "reward"])
def test_two_ranks_of_a_recipe_learn_what_one_learns(warm, recipe, tmp_path):
    for ranks in (1, 2):
        done = train(recipe, tmp_path / str(ranks), ranks)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "2", tmp_path / "1")
    assert "find_unused_parameters" not in done.stderr
    if recipe == "reward":  # measured over the rows of all ranks
        shown = [[row["spread"] for row in logged(tmp_path / ranks)] for ranks in "12"]
        assert shown[0] == pytest.approx(shown[1], rel=1e-3)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(warm, alone):
    """One of two ranks gets a signal and both stop; one process resumes, and is stopped; two resume and end."""
    folder = alone.parent / "resumed"
    for ranks, step in ((2, 3), (1, 5)):
        done = train("sft", folder, ranks, "SIGTERM", step, INTERRUPT_RANK=str(ranks - 1))
        assert done.returncode == 75, done.stderr
        assert json.loads((folder / "run.json").read_text())["step"] == step
    done = train("sft", folder, 2)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 5" in done.stdout
    assert_same(folder, alone)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_number(warm, tmp_path):
    begun = time.monotonic()
    done = train("sft", tmp_path / "killed", 2, "SIGKILL", 3, INTERRUPT_RANK="1")
    assert done.returncode == 137
    assert "Rank 1 of 2 was ended by SIGKILL" in done.stderr
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "whole", "accumulation"), [(24, 2, 12), (19, 2, 12), (25, 4, 12), (3, 2, 12)])
def test_the_ranks_weigh_each_row_as_one_process_does(ranks, rows, whole, accumulation):
    """By a reference that takes the rows one after the other: mean of micro-batches of mean of rows."""
    size, _ = batch_of_rank(whole, accumulation, ranks)
    parts = [RankBatches(range(rows), size, whole, accumulation, rank, ranks) for rank in range(ranks)]
    ours: dict[tuple[int, int], float] = {}
    for part in parts:
        batches = list(part)
        assert len(batches) == len(part)
        for index, batch in enumerate(batches):
            step = index // part.steps
            own = len(batches[step * part.steps : (step + 1) * part.steps])
            for row in batch:
                share = part.weight(index) / len(batch) / own / ranks  # each rank averages, and DDP over the ranks
                ours[step, row] = ours.get((step, row), 0) + share
    theirs = {}
    for step in range(-(-rows // (whole * accumulation))):
        held = range(step * whole * accumulation, min(rows, (step + 1) * whole * accumulation))
        micro = [held[start : start + whole] for start in range(0, len(held), whole)]
        theirs |= {(step, row): 1 / len(micro) / len(batch) for batch in micro for row in batch}
    assert {key: value for key, value in ours.items() if value} == pytest.approx(theirs)


def differ(rank: int, folder: Path) -> None:
    same, other = torch.ones(3), torch.full((3,), 1.0 + rank * 1e-7)
    check_alike([same], "after step 1")
    with pytest.raises(RuntimeError, match="The weights of rank 1 are not those of rank 0, seen after step 2"):
        check_alike([same, other], "after step 2")
    parts = DTensor.from_local(torch.tensor([1.0, [1.0, math.inf][rank]]), init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(InputError, match="no longer finite, seen after step 3") if rank else nullcontext():
        check_weights([same, parts], "after step 3")  # the other rank does not wait for this one


def test_ranks_with_other_weights_end_the_run(tmp_path):
    in_two_ranks(differ, tmp_path)
