"""nvidia-smi as a program on the PATH: what it lists, what it refuses, and when it fails or hangs."""

import os
import time
from pathlib import Path

import pytest
from common import nvidia
from common.errors import MachineError

ROW = "0, NVIDIA H200, 580.95.05, 143771, 143000"
GPU = dict(zip(nvidia.FIELDS, ROW.split(", "), strict=True))
HEALTH = dict(zip(nvidia.HEALTH_FIELDS, ("Enabled", "0", "0x0000000000000001"), strict=True))


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program nvidia-smi first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def write(script: str) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return program

    return write


def test_every_gpu_is_listed_with_its_health(smi):
    smi(f"echo '{ROW}, Enabled, 0, 0x0000000000000001'; echo '1, Tesla T4, 580.95.05, 15360, 15100, [N/A], [N/A], 0x1'")
    gpus = nvidia.nvidia_smi()
    assert gpus[0] == GPU | HEALTH
    assert [gpu["name"] for gpu in gpus] == ["NVIDIA H200", "Tesla T4"]


def test_an_older_driver_gets_a_query_with_fewer_fields(smi):
    smi(f"case $1 in *clocks_event_reasons*) echo 'Field is not a valid field to query.'; exit 2;; esac; echo '{ROW}'")
    assert nvidia.nvidia_smi() == [GPU]


def test_without_the_program_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.nvidia_smi() == []


def test_its_failure_has_a_reason(smi):
    smi("echo; echo 'Failed to initialize NVML: Driver/library version mismatch'; echo 'version: 580'; exit 18")
    with pytest.raises(MachineError, match=r"^Failed to initialize NVML: Driver/library version mismatch$"):
        nvidia.nvidia_smi()
    smi("exit 9")
    with pytest.raises(MachineError, match=r"^no reason given$"):
        nvidia.nvidia_smi()
    smi("").write_bytes(b"\x7fELF")
    with pytest.raises(MachineError, match="Exec format error"):
        nvidia.nvidia_smi()


def test_one_that_hangs_is_killed_with_its_children(smi, monkeypatch, tmp_path):
    smi(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(nvidia, "SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than 0\.5 s"):
        nvidia.nvidia_smi()
    assert time.monotonic() - started < 60
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    while child.exists() and ") Z " not in child.read_text():
        assert time.monotonic() - started < 60
        time.sleep(0.02)


def test_the_free_memory_is_that_of_the_first_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvidia.free_gib([GPU, GPU | {"memory.free": "1"}]) == pytest.approx(143000 / 1024)
    assert nvidia.free_gib([GPU | {"memory.free": "[N/A]"}]) is None
    assert nvidia.free_gib([]) is None
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert nvidia.free_gib([GPU]) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert nvidia.free_gib([GPU]) is not None
