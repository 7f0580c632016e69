"""What is printed of ranks that fail: by processes that do nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RANK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run that ends its step first
if os.environ["RANK"] == "0":
    time.sleep(0.5)
print("--epsilon: too small", file=sys.stderr)
sys.exit(int(sys.argv[1 + int(os.environ["RANK"])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("codes", "printed"), [(("2", "2"), False), (("3", "3"), True), (("3", "2"), True)])
def test_wrong_input_is_printed_once_and_another_failure_under_its_rank(tmp_path: Path, codes, printed):
    """Rank 1 fails first."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, ROOT / "scripts" / "launch" / "processes.py", "2", script, *codes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == int(codes[1])
    assert done.stderr.count("--epsilon: too small") == 1 + printed
    assert ("Rank 1 of 2 failed" in done.stderr) == printed
