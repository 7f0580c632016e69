"""`make benchmark` on a shape that a CPU can do: the command of RESULTS.md runs, and reports what the recipe logged."""

import json
import subprocess

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_benchmark_reports_speed_memory_and_versions():
    flags = "--steps 4 --warmup 1 --max-length 64 --no-load-in-4bit --no-gradient-checkpointing"
    command = ["make", "benchmark", "MODEL=tiny", f"ARGS={flags}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["model"] == "tiny"
    assert figures["weights"] == "float32"
    assert 0 < figures["tokens_per_second"]["min"] <= figures["tokens_per_second"]["max"]
    assert figures["memory_gib"] > 0
    assert {"torch", "trl", "unsloth"} <= figures["versions"].keys()
