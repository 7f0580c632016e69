"""`make benchmark` on a shape for a CPU: the command of the results page runs, and reports what the recipe logged."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def benchmark(flags: str) -> dict:
    flags += " --no-load-in-4bit --no-gradient-checkpointing"
    command = ["make", "benchmark", "MODEL=tiny", f"ARGS={flags}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_the_benchmark_reports_speed_memory_and_versions():
    figures = benchmark("--steps 4 --warmup 1 --max-length 64")
    assert figures["model"] == "tiny"
    assert figures["weights"] == "float32"
    assert 0 < figures["tokens_per_second"]["min"] <= figures["tokens_per_second"]["max"]
    assert figures["memory_gib"] > 0
    assert {"torch", "trl", "unsloth"} <= figures["versions"].keys()


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_of_ppo_it_reports_each_phase():
    batch = "--per-device-train-batch-size 2 --gradient-accumulation-steps 2"
    figures = benchmark(f"--method ppo --steps 2 --warmup 1 --max-length 16 {batch}")
    assert figures["rows"] == "2 x 2 x 16"
    assert figures["seconds"].keys() == {"sample", "reward", "advantages", "update"}
    assert all(seconds > 0 for seconds in figures["seconds"].values())


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_the_score_of_one_completion_is_timed():
    times = benchmark("--method score --max-length 16")["milliseconds"]
    assert 0 < times["min"] <= times["median"] <= times["max"]


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_where_the_recipe_refuses_the_benchmark_does():
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "--model", "tiny", "--steps", "1"]
    command += ["--per-device-train-batch-size", "1", "--max-length", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
