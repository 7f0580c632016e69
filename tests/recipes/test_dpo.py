"""`recipes/dpo.py` as a user runs it, on the tiny model after SFT. What it gains is shown in test_pipeline.py."""

import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe

pytestmark = pytest.mark.slow
PAIRS = (ROOT / "data_samples" / "preferences-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
FEW = ("--num-train-epochs", 1, "--logging-steps", 1, "--sample-prompts", 0)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    data = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    data.write_text("".join(PAIRS[:24]), encoding="utf-8")
    return data


@pytest.fixture(scope="module")
def whole(merged, few, tmp_path_factory):
    """Three steps of 8 pairs each, a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("dpo") / "run"
    batch = ("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2, "--save-steps", 1)
    flags = ("--model", merged, "--data", few, *batch, "--save-total-limit", 9, *FEW)
    done = run_recipe("dpo", "--output-dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return folder, flags


def steps(folder):
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def test_it_begins_at_ln_2_without_a_margin(whole):
    """Policy and reference are one at the first step, which they are not when the reference is another stage."""
    first = steps(whole[0])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0


def test_losses_and_margins_are_those_of_a_plain_trl_script(whole, merged, few, tmp_path):
    folder, _ = whole
    command = [sys.executable, ROOT / "tests" / "references" / "plain_dpo.py", merged, few, tmp_path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert plain.returncode == 0, plain.stderr
    theirs = json.loads((tmp_path / "losses.json").read_text())
    ours = [[row["loss"], row["rewards/margins"]] for row in steps(folder)]
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert ours[2][1] > 1e-4  # it moves, so that equal is not equal to nothing


@pytest.mark.usefixtures("warm")
def test_a_run_that_a_stop_file_stopped_ends_as_one_left_alone(whole, tmp_path):
    """With a "ref" adapter beside the policy's, transformers would resume with an untrained one: loss ln 2 again."""
    folder, flags = whole
    cut = tmp_path / "cut"
    done = interrupt("STOP", 2, "dpo", "--output-dir", cut, *flags)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Stopped by the file STOP after step 2 of 3; ")
    assert not list(cut.rglob("ref"))
    assert not (cut / "STOP").exists()
    done = run_recipe("dpo", "--output-dir", cut, *flags)
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in steps(cut)] == [row["loss"] for row in steps(folder)]
    assert adapter_bytes(cut) == adapter_bytes(folder)


@pytest.mark.usefixtures("warm")
def test_the_reference_can_be_computed_beforehand(whole, tmp_path):
    folder, flags = whole
    run = tmp_path / "run"
    done = run_recipe("dpo", "--output-dir", run, *flags, "--precompute-ref-log-probs")
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in steps(run)] == pytest.approx([row["loss"] for row in steps(folder)], rel=1e-4)


GOOD = PAIRS[0]
ROW = json.loads(GOOD)
BAD = {
    "equal answers": (GOOD + json.dumps({**ROW, "rejected": ROW["chosen"]}) + "\n", [], ":2: "),
    "no pairs": (json.dumps({"prompt": "a", "completion": "b"}) + "\n", [], ":1: unknown format"),
    "a prompt that fills the length": (GOOD * 3, ["--max-length", 5], "3 of them have no token with loss in those"),
    "weights without losses": (GOOD, ["--loss-weights", 1, 1], "--loss-weights gives 2 weights for 1 loss types"),
    "a loss that needs smoothing": (GOOD, ["--loss-type", "exo_pair"], "exo_pair needs --label-smoothing"),
    "a loss that is not there": (GOOD, ["--loss-type", "sigmoidal"], "sigmoid_norm"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.usefixtures("warm")
def test_bad_input_has_one_clear_message_and_leaves_nothing(tmp_path, fault):
    content, flags, says = BAD[fault]
    (tmp_path / "pairs.jsonl").write_text(content)
    done = run_recipe("dpo", "--data", tmp_path / "pairs.jsonl", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]
