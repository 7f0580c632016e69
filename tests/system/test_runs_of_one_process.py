"""What a run leaves in its process: nothing of its model, so that another run can follow there."""

import subprocess
import sys

import pytest
from conftest import ROOT

ONE_AFTER_THE_OTHER = """
import gc, runpy, sys

frozen = []
gc.callbacks.append(lambda phase, info: frozen.append(gc.get_freeze_count()))
for words in map(str.split, sys.argv[1:]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
    import torch

    print("frozen while it trained:", max(frozen) > 300_000, "and now:", gc.get_freeze_count())
    frozen.clear()
    gc.collect()
    print("left:", [str(tuple(one.shape)) for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)][:3])
"""
BATCH = "--per-device-train-batch-size 8 --gradient-accumulation-steps 1 --sample-prompts 1 --sample-tokens 4"
RUNS = {
    "sft": "--max-steps 4",
    "grpo": "--max-steps 4 --num-generations 4 --max-completion-length 8",
    "ppo": "--max-steps 2 --critic-warmup-steps 1 --rollout-batch-size 8 --max-completion-length 8 --eval-ratio 0",
}


@pytest.mark.slow
def test_no_weight_of_a_model_stays_after_its_run(tmp_path):
    runs = [f"recipes/{name}.py {BATCH} {flags} --output-dir {tmp_path / name}" for name, flags in RUNS.items()]
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, *runs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("left:")] == ["left: []"] * len(RUNS)
    # The recipes with a Trainer keep what they need out of the garbage collections, from their second step to the last.
    of_trainers = [line for line in lines if line.startswith("frozen")][:2]
    assert of_trainers == ["frozen while it trained: True and now: 0"] * 2
