"""Faults in the middle of real runs: bad numbers, no memory, no disk, no network; what they print and leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe

pytestmark = pytest.mark.slow

SMALL = ("--sample-prompts", 1, "--sample-tokens", 4, "--logging-steps", 1)
SUMS = ("--data", ROOT / "data_samples" / "arithmetic.jsonl", "--max-completion-length", 8)
RECIPES = {
    "sft": (*SMALL, "--per-device-train-batch-size", 4),
    "dpo": (*SMALL, "--per-device-train-batch-size", 4),
    "kto": (*SMALL, "--per-device-train-batch-size", 4, "--loss-type", "apo_zero_unpaired"),
    "grpo": (*SMALL, *SUMS, "--per-device-train-batch-size", 8),
    "reward": ("--logging-steps", 1, "--per-device-train-batch-size", 4),
    "ppo": (
        *(*SMALL, *SUMS, "--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 1),
        *("--rollout-batch-size", 8, "--critic-warmup-steps", 0, "--eval-ratio", 0.02, "--num-ppo-epochs", 1),
    ),
}


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gradient_that_is_not_finite_ends_the_run_at_its_step(recipe, tmp_path):
    """Nothing of it is learned or saved; the step, its rows and the settings to lower are named."""
    flags = ("--output-dir", tmp_path / "run", "--max-steps", 4, "--save-steps", 1, *RECIPES[recipe])
    done = interrupt("bad-gradient", 2, recipe, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("Step 3: the gradient is not finite ("))
    places, cure = lines[begin + 1 : begin + 3]
    assert cure.startswith("Lower --learning-rate (")
    assert "The checkpoint of step 2 is whole." in cure
    (bad,) = read_jsonl(tmp_path / "run" / "bad-steps.jsonl")
    assert bad["step"] == 3
    assert 1 <= len(bad["rows"]) <= 16
    assert all(f"{Path(row.rpartition(':')[0]).name}" in str(places) for row in bad["rows"][:3])
    assert not (tmp_path / "run" / "adapter").exists()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert record(tmp_path / "run")["status"] == "failed"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()

    if recipe not in ("sft", "ppo"):
        return
    done = interrupt("bad-gradient", 3, recipe, *flags, "--skip-bad-steps", 1)  # the same run, with a way on
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Step 4 is left out: the " in done.stdout
    assert [bad["step"] for bad in read_jsonl(tmp_path / "run" / "bad-steps.jsonl")] == [4]
    for name, content in adapter_bytes(tmp_path / "run").items():
        if name == "adapter_model.safetensors":
            from safetensors.torch import load

            assert all(weight.isfinite().all() for weight in load(content).values())


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_a_learning_rate_that_destroys_the_weights_is_named(recipe, tmp_path):
    flags = ("--output-dir", tmp_path / "run", "--max-steps", 4, "--save-steps", 1, *RECIPES[recipe])
    if recipe == "grpo":  # with a reward that differs from the first step on
        (tmp_path / "mine.py").write_text("def length(texts):\n    return [float(len(text) % 7) for text in texts]\n")
        flags += ("--rewards", f"{tmp_path}/mine.py:length", "--save-steps", 4)
    done = run_recipe(recipe, *flags, "--learning-rate", 1e30, "--warmup-steps", 0)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "--learning-rate" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_where_the_memory_is_full_half_the_micro_batch_learns_the_same(recipe, tmp_path, warm_server):
    """The process replaces itself by a new one of the same command; for PPO the test starts that one, which is warm."""
    environment = {**warm_server, "RESTART_BY_HAND": "yes"}
    flags = ("--max-steps", 4, "--save-steps", 1 if recipe == "ppo" else 4, *RECIPES[recipe])
    done = interrupt("full-memory", 2, recipe, "--output-dir", tmp_path / "stopped", *flags, **environment)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "The GPU's memory is full." in done.stderr
    assert "Traceback" not in done.stderr
    assert record(tmp_path / "stopped")["status"] == "failed"

    retry = ("--output-dir", tmp_path / "run", *flags, "--oom", "retry")
    if recipe == "sft":
        done = interrupt("full-memory", 2, recipe, *retry, **warm_server)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        done = interrupt("full-memory", 2, recipe, *retry, **environment)
        assert done.returncode == 99, done.stdout + done.stderr
        assert run_recipe(recipe, *retry, **warm_server).returncode == 0
    rows, accumulation = (8, 1) if recipe == "ppo" else (4, 1)
    line = f"--oom=retry: {rows} x {accumulation} rows a step become {rows // 2} x {2 * accumulation}, the same batch"
    assert f"{line}; the run resumes after step 2." in done.stderr
    assert record(tmp_path / "run")["micro_batch"] == {
        "per_device_train_batch_size": rows // 2,
        "gradient_accumulation_steps": 2 * accumulation,
    }
    run_recipe(recipe, "--output-dir", tmp_path / "whole", *flags, **warm_server)
    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("run", "whole")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)


FAULTS = {
    "EROFS": "metrics.jsonl: Read-only file system. See to the disk; ",
    "gone": "The folder was deleted while the run wrote it; ",
    "no-memory": "The memory of the CPU is full: this process had ",
}


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_machine_that_fails_is_named_in_a_line(fault, tmp_path):
    flags = ("--max-steps", 4, "--save-steps", 2, *RECIPES["sft"])
    done = interrupt(fault, 3, "sft", "--output-dir", tmp_path / "run", *flags)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert FAULTS[fault] in done.stderr
    if fault != "gone":
        assert record(tmp_path / "run")["status"] == "failed"
        assert run_recipe("sft", "--output-dir", tmp_path / "run", *flags).returncode == 0


def test_five_recipes_need_no_network(tmp_path):
    """In a network namespace without an interface: not even a connection to this machine itself."""
    script = f"""
import json, os, subprocess, sys
sys.path[:0] = [{str(ROOT / "tests" / "system" / "warm")!r}]
import server
server.preload()
for recipe, flags in json.loads(sys.argv[1]).items():
    if not (child := os.fork()):
        log = os.open(os.path.join(sys.argv[2], recipe + ".log"), os.O_WRONLY | os.O_CREAT)
        words = [f"{ROOT}/recipes/{{recipe}}.py", "--output-dir", os.path.join(sys.argv[2], recipe), *flags]
        server.run({{"words": words, "folder": {str(ROOT)!r}, "environment": dict(os.environ)}},
                   [os.open(os.devnull, 0), log, os.dup(log)])
    print(recipe, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    flags = {recipe: [*map(str, given), "--max-steps", "2"] for recipe, given in RECIPES.items()}
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no network namespace")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WARM"))}
    done = subprocess.run(
        [*unshare, sys.executable, "-c", script, json.dumps(flags), tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=environment,
    )
    logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert [line for line in done.stdout.splitlines() if " 0" in line] == [f"{recipe} 0" for recipe in RECIPES], logs


def test_killed_at_random_runs_end_as_those_left_alone(tmp_path):
    """The soak, short; `python tests/system/soak.py` is the long one."""
    command = [sys.executable, ROOT / "tests" / "system" / "soak.py", "--kills", "3", "--recipes", "sft,ppo"]
    done = subprocess.run([*command, "--keep", tmp_path], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 3" in done.stdout.replace("killed 4", "killed 3")
