"""Runs on two nodes of a real Slurm of this machine's own: a rank on each, by gloo, on the tiny model.

Every recipe runs left alone; then again, is preempted by a job of a higher partition and queued again. Two recipes run
at a time, each with one of the two fake GPUs of a node. COLD=1 in the environment: each rank imports unsloth itself, as
a user's does, which takes ten times as long; RECIPES=ppo,dpo: those alone.
"""

import itertools
import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, adapter_bytes, read_jsonl
from slurm_cluster import Cluster
from soak import TIMES
from test_slurm import TWO_NODES, Jobs, cluster, record, wait_for  # noqa: F401  the fixture, for a cluster of this file

pytestmark = pytest.mark.slow

LOGGED = "--logging-steps 1 --save-steps 4 --save-total-limit 2"
SHOWN = f"{LOGGED} --sample-prompts 2 --sample-tokens 4"
SUMS = f"{SHOWN} --data {ROOT}/data_samples/arithmetic.jsonl --max-completion-length 12"
SMALL = "--per-device-train-batch-size 2"
FLAGS = {
    "sft": f"{SHOWN} {SMALL} --max-steps 60 --lora-dropout 0.1",
    "reward": f"{LOGGED} {SMALL} --max-steps 80",
    "dpo": f"{SHOWN} {SMALL} --max-steps 24",
    "kto": f"{SHOWN} {SMALL} --max-steps 24 --gradient-accumulation-steps 2",
    "grpo": f"{SUMS} {SMALL} --max-steps 16 --num-generations 4 --gradient-accumulation-steps 4",
    "ppo": f"{SUMS} {SMALL} --max-steps 12 --rollout-batch-size 8 --gradient-accumulation-steps 4 "
    "--num-ppo-epochs 2 --critic-warmup-steps 1 --eval-ratio 0.02",
}
RECIPES = os.environ.get("RECIPES", ",".join(FLAGS)).split(",")


@pytest.fixture(scope="module")
def nodes(cluster, warm_server) -> Cluster:  # noqa: F811
    """The cluster, on which each rank is a child of a process that has imported unsloth."""
    if "COLD" not in os.environ:
        path = f"{warm_server['PYTHONPATH']}:{ROOT}/recipes"
        cluster.use({"WARM_SERVER": warm_server["WARM_SERVER"], "PYTHONPATH": path})
    return cluster


def on_two_nodes(nodes: Cluster, recipe: str, folder: Path, **changes: str) -> Jobs:
    given = {"MODEL": "tiny", "DATA": None, "GPUS": "1", "TIME": "0:20:00", "ARGS": FLAGS[recipe], **changes}
    return Jobs(nodes, folder, TWO_NODES, RECIPE=recipe, **given)


def take_both(nodes: Cluster) -> None:
    """Preempt what runs, for a job of a partition with a higher priority."""
    nodes("sbatch", "--partition=urgent", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null", "--wrap=true")


def ends(folder: Path) -> dict[str, object]:
    """What a run leaves: the bytes of the adapter and of the samples, and the metrics but for times."""
    rows = [
        {name: value for name, value in row.items() if not any(time in name for time in TIMES)}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    samples = {file.name: file.read_bytes() for file in folder.glob("samples.json*")}
    return {"metrics": rows, "samples": samples, "adapter": adapter_bytes(folder)}


def assert_equal(ours: Path, theirs: Path) -> None:
    mine, other = ends(ours), ends(theirs)
    for part, value in other.items():
        assert mine[part] == value, f"{part} of {ours} and {theirs}"


@pytest.fixture(scope="module")
def sft_alone(nodes, tmp_path_factory) -> Jobs:
    return on_two_nodes(nodes, "sft", tmp_path_factory.mktemp("alone") / "sft")


def test_every_recipe_on_two_nodes_is_preempted_and_ends_as_if_left_alone(nodes, sft_alone, tmp_path):
    """The second two have a minute to save: Slurm signals their ranks alone, and they queue themselves again."""
    alone = {"sft": sft_alone}
    pairs = list(itertools.zip_longest(RECIPES[::2], RECIPES[1::2]))

    def begin(recipes: Iterable[str | None]) -> None:
        for recipe in filter(None, recipes):
            alone[recipe] = alone.get(recipe) or on_two_nodes(nodes, recipe, tmp_path / f"{recipe}-alone")

    begin(pairs[0])
    for number, (pair, following) in enumerate(zip(pairs, [*pairs[1:], ()], strict=True)):
        begun = time.monotonic()
        recipes = [recipe for recipe in pair if recipe]
        for recipe in recipes:
            alone[recipe].wait_until("done")
        patient = {"PARTITION": "patient"} if number == 1 else {}
        jobs = {recipe: on_two_nodes(nodes, recipe, tmp_path / recipe, **patient) for recipe in recipes}
        for run in jobs.values():
            run.wait_for_step(2)
        take_both(nodes)
        stopped = {}
        for recipe, run in jobs.items():
            run.wait_until("requeued" if patient else "stopped with a checkpoint, as Slurm ended the job")
            stopped[recipe] = record(run.folder)
            assert (stopped[recipe]["status"], stopped[recipe]["ranks"]) == ("stopped", 2)
        begin(following)
        for recipe, run in jobs.items():
            run.wait_until("running on n[1-2], restart 1")
            run.wait_until("done")
            assert f"Resuming after step {stopped[recipe]['step']}" in run.log()
            assert record(run.folder)["machine"]["nodes"] == 2
            assert_equal(run.folder, alone[recipe].folder)
        after = ", ".join(f"{recipe} after step {stopped[recipe]['step']}" for recipe in recipes)
        print(f"{time.monotonic() - begun:.0f} s: preempted {after}; equal")


def process_of(rank: int, job: str) -> int:
    """The process of a rank of a job: a recipe."""
    ours = {f"SLURM_JOB_ID={job}", f"RANK={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = (process / "cmdline").read_text().split("\0")
            environment = (process / "environ").read_text(errors="replace")
            if ours <= set(environment.split("\0")):
                assert words[1].endswith("sft.py")
                assert "ROCR_VISIBLE_DEVICES" not in environment  # srun sets it, and unsloth takes the GPU for AMD's
                return int(process.name)
    raise AssertionError(f"no rank {rank}")


def test_a_dead_rank_ends_the_job_with_its_name_and_a_dead_node_queues_it_again(nodes, sft_alone, tmp_path):
    sft_alone.wait_until("done")
    folder = tmp_path / "run"
    first = on_two_nodes(nodes, "sft", folder)
    first.wait_for_step(6)
    os.kill(process_of(1, first.ids[0]), signal.SIGKILL)
    begun = time.monotonic()
    assert first.wait_until("failed") == "failed with exit code 137: Rank 1 of 2, on n2, was ended by SIGKILL"
    wait_for("the end", lambda: nodes.job(first.ids[0])["JobState"] == "FAILED")
    assert time.monotonic() - begun < 60
    assert nodes.job(first.ids[0])["Restarts"] == "0"
    assert re.search("another rank ended|waited at .* for rank 1: it ended", record(folder)["error"])
    assert "Rank 1 of 2, on n2, was ended by SIGKILL" in first.status()

    again = on_two_nodes(nodes, "sft", folder)
    again.wait_for_step(record(folder)["step"] + 6)
    nodes.kill_node("n2")
    try:
        # Slurm and the job's script learn of it at the same moment.
        again.wait_until(("ended by a node failure on n2", "requeued, to resume from its checkpoint, since it lost"))
    finally:
        nodes.start_node("n2")
    again.wait_until("running on n[1-2], restart 1")
    again.wait_until("done")
    assert again.log().count("Resuming after step") == 2
    assert_equal(folder, sft_alone.folder)
