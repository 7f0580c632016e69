"""The Triton kernels compute what the operations in plain torch do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow  # Triton's interpreter: half a minute
def test_every_kernel_agrees_with_its_operation():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kernels_on_cpu.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "kernels agree", done.stderr
