"""A run whose machine slept, on a disk without locks: another process has taken it meanwhile."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

HERE = ROOT / "tests" / "system"
RECIPE = ROOT / "recipes" / "sft.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def on(machine: str, *words: object) -> list[str]:
    return [sys.executable, *map(str, (HERE / "without_locks.py", machine, *words))]


@pytest.mark.slow
def test_a_run_that_slept_and_was_replaced_ends_and_leaves_the_other_s_files(tmp_path):
    out = tmp_path / "run"
    flags = ("--max-steps", 3, "--save-steps", 1, "--sample-tokens", 4, "--output-dir", out)
    asleep = subprocess.Popen(
        on("node1", HERE / "interrupt.py", "SIGSTOP", 2, RECIPE, *flags), text=True, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 200
        while Path(f"/proc/{asleep.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert asleep.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        other = subprocess.run(on("node2", RECIPE, *flags), capture_output=True, text=True, check=False)
        assert other.returncode == 0, other.stderr
        assert "watching for up to" in other.stdout
        assert "Resuming after step 1" in other.stdout
        (out / "run.lock").write_text('{"host": "node2", "pid": 7}')  # as it is while that one trains
        before = contents(out)
        os.kill(asleep.pid, signal.SIGCONT)
        _, message = asleep.communicate(timeout=60)
    finally:
        asleep.kill()
    assert asleep.returncode == 3, message
    assert "process 7 on node2 has taken the run. This process ends here and writes nothing more." in message
    assert "Traceback" not in message
    assert contents(out) == before
