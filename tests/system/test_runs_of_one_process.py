"""What a run leaves in its process: nothing of its model, so that another run can follow there."""

import subprocess
import sys

import pytest
from conftest import ROOT

ONE_AFTER_THE_OTHER = """
import gc, runpy, sys

for words in map(str.split, sys.argv[1:]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
    import torch

    gc.collect()
    print("left:", [str(tuple(one.shape)) for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)][:3])
"""
BATCH = "--per-device-train-batch-size 8 --gradient-accumulation-steps 1 --sample-prompts 1 --sample-tokens 4"
RUNS = {
    "sft": "--max-steps 1",
    "grpo": "--max-steps 1 --num-generations 4 --max-completion-length 8",
    "ppo": "--max-steps 2 --critic-warmup-steps 1 --rollout-batch-size 8 --max-completion-length 8 --eval-ratio 0",
}


@pytest.mark.slow
def test_no_weight_of_a_model_stays_after_its_run(tmp_path):
    runs = [f"recipes/{name}.py {BATCH} {flags} --output-dir {tmp_path / name}" for name, flags in RUNS.items()]
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, *runs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("left:")] == ["left: []"] * len(RUNS)
