"""What the Slurm commands read of a submission's folder: a damaged file is one message, a state of any bytes a line."""

import json

import pytest
from in_process import command, ended, refusal

JOB = {"job": "123", "name": "sft", "run": ""}
DAMAGED = {"": "is damaged or no JSON", '[{"job": "1': "is damaged or no JSON", "{}": "holds no list of JSON objects"}


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """OUT/slurm of a submission, and a Slurm that knows no job."""
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps([JOB]))
    return folder


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_list_of_jobs_is_one_message(logs, capsys, content):
    (logs / "jobs.json").write_text(content)
    out = f"--output-dir={logs.parent}"
    told = refusal(command("scripts/slurm/status.py").main, capsys, out)
    assert f"{logs}/jobs.json: {DAMAGED[content]}" in told
    words = ("--recipe=sft", "--time=1:00:00", "--runtime=pyxis", "--image=recipes.sqsh", out)
    assert told == refusal(command("scripts/slurm/submit.py").main, capsys, *words)
    assert [file.name for file in logs.iterdir()] == ["jobs.json"]


def test_a_damaged_record_of_a_run_is_one_message(logs, capsys):
    (logs.parent / "run.json").write_text('{"step": 1')
    told = refusal(command("scripts/slurm/status.py").main, capsys, f"--output-dir={logs.parent}")
    assert f"{logs.parent}/run.json: is damaged or no JSON" in told


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (b"", "never ran: cancelled in the queue"),
        (b"2026-01-02T03:04:05 running\n2026-01-02T03:05:05 failed: \xff\xe2\x80\xa8 a\x0cb\n", "failed: "),
    ],
)
def test_the_last_line_of_a_job_may_be_missing_or_hold_any_bytes(logs, capsys, state, line):
    (logs / "123.state").write_bytes(state)
    code, printed, _ = ended(command("scripts/slurm/status.py").main, capsys, f"--output-dir={logs.parent}")
    assert code == 0
    assert f"  123  sft  {line}" in printed
    assert not state or printed.endswith("  2026-01-02T03:05:05\n")
