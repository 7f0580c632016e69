"""Runs on two nodes of a real Slurm of this machine's own: a rank on each, by gloo, on the tiny model.

Every recipe runs left alone; then again, is preempted by a job of a higher partition and queued again. The nodes have
two fake GPUs each, so that the next recipe can begin meanwhile; what is preempted gets no GPU until all is free.
"""

import os
import time
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
FLAGS = {
    "sft": f"{SHOWN} --max-steps 40 --per-device-train-batch-size 2 --lora-dropout 0.1",
    "dpo": f"{SHOWN} --max-steps 20 --per-device-train-batch-size 2",
    "kto": f"{SHOWN} --max-steps 20 --per-device-train-batch-size 2",
    "reward": f"{LOGGED} --max-steps 40 --per-device-train-batch-size 2",
    "grpo": f"{SUMS} --max-steps 20 --num-generations 4 --per-device-train-batch-size 4 "
    "--gradient-accumulation-steps 2",
    "ppo": f"{SUMS} --max-steps 12 --rollout-batch-size 8 --per-device-train-batch-size 4 "
    "--gradient-accumulation-steps 2 --num-ppo-epochs 2 --critic-warmup-steps 1 --eval-ratio 0.02",
}


@pytest.fixture(scope="module")
def nodes(cluster, warm_server) -> Cluster:  # noqa: F811
    """The cluster. Each rank is a child of a process that has imported unsloth; not with COLD=1 in the environment."""
    if "COLD" not in os.environ:
        path = f"{warm_server['PYTHONPATH']}:{ROOT}/recipes"
        cluster.use({"WARM_SERVER": warm_server["WARM_SERVER"], "PYTHONPATH": path})
    return cluster


def on_two_nodes(nodes: Cluster, recipe: str, folder: Path, **changes: str) -> Jobs:
    given = {"MODEL": "tiny", "DATA": None, "GPUS": "1", "TIME": "0:20:00", "ARGS": FLAGS[recipe], **changes}
    return Jobs(nodes, folder, TWO_NODES, RECIPE=recipe, **given)


def take_both(nodes: Cluster, output: Path) -> None:
    """Preempt what runs, for a job of a partition with a higher priority."""
    flags = ["--partition=urgent", "--nodes=2", "--gpus-per-node=2", f"--output={output}", "--parsable"]
    nodes("sbatch", *flags, "--wrap=true")


def ends(folder: Path) -> dict[str, object]:
    """What a run leaves: the bytes of the adapter and of the samples, and the metrics but for times."""
    rows = [
        {name: value for name, value in row.items() if not any(time in name for time in TIMES)}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]
    samples = {file.name: file.read_bytes() for file in folder.glob("samples.json*")}
    return {"adapter": adapter_bytes(folder), "metrics": rows, "samples": samples}


def assert_equal(ours: Path, theirs: Path) -> None:
    mine, other = ends(ours), ends(theirs)
    assert mine["metrics"] == other["metrics"]
    assert mine["samples"] == other["samples"]
    assert mine["adapter"] == other["adapter"]


def test_every_recipe_on_two_nodes_is_preempted_and_ends_as_if_left_alone(nodes, tmp_path):
    recipes = os.environ.get("RECIPES", ",".join(FLAGS)).split(",")
    alone = {recipes[0]: on_two_nodes(nodes, recipes[0], tmp_path / f"{recipes[0]}-alone")}
    for recipe, following in zip(recipes, [*recipes[1:], None], strict=True):
        begun = time.monotonic()
        alone[recipe].wait_until("done")
        ended = time.monotonic()
        jobs = on_two_nodes(nodes, recipe, tmp_path / recipe)
        jobs.wait_for_step(2)
        take_both(nodes, tmp_path / "urgent.log")
        jobs.wait_until("stopped with a checkpoint, as Slurm ended the job")
        stopped = record(jobs.folder)
        assert (stopped["status"], stopped["ranks"]) == ("stopped", 2)
        if following:
            alone[following] = on_two_nodes(nodes, following, tmp_path / f"{following}-alone")
        jobs.wait_until("running on n[1-2], restart 1")
        jobs.wait_until("done")
        assert f"Resuming after step {stopped['step']}" in jobs.log()
        assert record(jobs.folder)["machine"]["nodes"] == 2
        assert_equal(jobs.folder, alone[recipe].folder)
        print(
            f"{recipe}: {ended - begun:.0f} s alone, {time.monotonic() - ended:.0f} s preempted after {stopped['step']}"
        )
