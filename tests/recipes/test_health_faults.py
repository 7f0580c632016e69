"""Faults planted in real runs: the recipes find them while they train, and --stop-on-fault ends the run."""

import json

import pytest
from conftest import ROOT, read_jsonl, run_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]
FEW = ("--per-device-train-batch-size", 4, "--logging-steps", 1, "--sample-prompts", 0)


def test_a_finding_stops_the_run_with_a_checkpoint_and_resumes_without_the_flag(tmp_path):
    """Nothing can be trained where dropout drops all of the adapter's input."""
    run = tmp_path / "run"
    flags = ("--output-dir", run, "--lora-dropout", 1.0, "--max-steps", 9, *FEW)
    done = run_recipe("sft", *flags, "--stop-on-fault")
    assert done.returncode == 2, done.stderr
    assert "Health: nothing trainable, steps 1 to 5: the norm of the gradient is 0 in every logged step." in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Stopped by --stop-on-fault (nothing trainable) after step 6 of 9; change what")
    assert (run / "checkpoints" / "checkpoint-6").is_dir()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["reason"]) == ("stopped", "--stop-on-fault (nothing trainable)")

    again = run_recipe("sft", *flags, "--stop-on-fault")
    assert again.returncode == 2
    assert "(nothing trainable) before training began; " in again.stderr

    resumed = run_recipe("sft", *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "Health: nothing trainable; the report has the figures" in resumed.stdout
    assert "steps 1 to 5" not in resumed.stdout  # a finding comes once
    assert [finding["name"] for finding in read_jsonl(run / "health.jsonl")] == ["nothing trainable"]
    assert "norm of the gradient is 0" in (run / "report.html").read_text(encoding="utf-8")


def test_pairs_without_a_difference_stop_dpo_before_it_trains(tmp_path):
    rows = read_jsonl(ROOT / "data_samples" / "preferences-train.jsonl")[:24]
    text = "".join(json.dumps({**row, "rejected": row["chosen"] + " "}, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    flags = ("--data", tmp_path / "pairs.jsonl", "--output-dir", tmp_path / "run", *FEW)
    done = run_recipe("dpo", *flags, "--stop-on-fault", RECIPES_SPELLING="make")
    assert done.returncode == 2, done.stderr
    assert "chosen equals rejected, in the data: in 24 of 24 pairs they differ by spaces only." in done.stdout
    assert "Remove these pairs from DATA" in done.stdout
    assert "Stopped by STOP_ON_FAULT (chosen equals rejected) before training began" in done.stderr


def test_truncated_completions_are_found_by_grpo_which_ends_as_usual(tmp_path):
    flags = (
        "--num-generations",
        4,
        "--max-completion-length",
        4,
        "--max-steps",
        10,
        "--per-device-train-batch-size",
        8,
    )
    done = run_recipe("grpo", *flags, "--sample-prompts", 0, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (finding,) = (
        one for one in read_jsonl(tmp_path / "run" / "health.jsonl") if one["name"] == "truncated completions"
    )
    assert finding["evidence"] == "100% end at --max-completion-length"
    assert "Health: truncated completions, steps 1 to 10: " in done.stdout
