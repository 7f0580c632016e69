"""env-check.py on machines that lack something: bare Pythons, broken packages, full disks, old drivers.

What can be real is: interpreters, metadata, libraries without their native half, full file systems, a hub of our own, a
program named nvidia-smi. The rest is simulated where the value is read.
"""

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

SCRIPT = ROOT / "env-check.py"
GIB = 2**30
H200 = {"name": "NVIDIA H200", "capability": [9, 0], "free": 139 * GIB, "total": 140 * GIB}
T4 = {"name": "Tesla T4", "capability": [7, 5], "free": 14.5 * GIB, "total": 15 * GIB}
CARD = {
    "index": "0",
    "name": "NVIDIA H200",
    "driver_version": "580.95.05",
    "memory.total": "143771",
    "memory.free": "143000",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "clocks_event_reasons.active": "0x0000000000000001",  # idle
}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def env_check():
    return load(SCRIPT)


def torch_facts(env_check, *gpus: dict, cards: tuple = (), cuda: str | None = "13.0", **answers: str):
    """Facts of a machine whose torch sees `gpus`; `answers` are errors of probes."""
    about = {"version": "2.13.0", "cuda": cuda, "cudnn": 91900, "threads": 2, "gpus": list(gpus), "why": "no reason"}
    found = {"torch": env_check.Answer(about)}
    found.update({probe.replace("_", " "): env_check.Answer(error=error) for probe, error in answers.items()})
    return env_check.Facts(list(cards), "", found, False)


def one(checks, name: str):
    """The one check of that name, which says how it is mended unless it is ok."""
    checks = list(checks)
    assert all(check.mend for check in checks if check.status != "ok"), checks
    (found,) = [check for check in checks if check.name == name]
    return found


def run(*flags: str, python: str | Path = sys.executable, cwd: Path = ROOT, **environment: str):
    line = [python, SCRIPT, *flags]
    environment = {**os.environ, **environment}
    return subprocess.run(
        line,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )


def evaluate(expression: str, **environment: str):
    """What `expression` over the module `m` gives in a new process, with another PYTHONPATH for example."""
    code = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('env_check', {str(SCRIPT)!r})\n"
        "m = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        f"print(json.dumps({expression}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def packages(**environment: str) -> dict[str, dict]:
    lines = evaluate("[c._asdict() for c in m.check_packages(m.Facts([], '', {}, False))]", **environment)
    return {line["name"]: line for line in lines}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """One run as a user's: this environment, everything imported, in an empty folder with an empty home."""
    home, cwd = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cwd")
    gone = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json"],
        cwd=cwd, env={**environment, "HOME": str(home)}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    return SimpleNamespace(done=done, home=home, cwd=cwd, said=json.loads(done.stdout))


# --- which Python -------------------------------------------------------------------------------------------------


def test_an_old_python_can_read_it():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.10"])
def test_an_old_python_gets_a_sentence(version):
    python = shutil.which(f"python{version}")
    found = python and subprocess.run([python, "-V"], capture_output=True, check=False).returncode == 0
    if not found:  # a version manager has a name for each, but runs only some
        pythons = list(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        if not pythons:
            pytest.skip(f"there is no Python {version} on this machine")
        python = pythons[0]
    done = run(python=python)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "failure  python" in done.stdout
    assert "make setup PYTHON=/path/to/python3.12" in done.stdout
    assert "Not ready: python" in done.stdout


def test_a_bare_python_is_told_to_make_setup(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = run(python=tmp_path / "bare" / "bin" / "python", PYTHONPATH="")
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "none of torch, transformers, trl, unsloth" in done.stdout
    assert "-> make " in done.stdout.partition("none of torch")[2].splitlines()[1]
    assert "Not ready: packages" in done.stdout


# --- this environment, as it is -----------------------------------------------------------------------------------


def test_this_environment_is_looked_at_whole(whole):
    lines = {line["name"]: line for line in whole.said["checks"]}
    faults = [line for line in lines.values() if line["status"] == "failure"]
    assert faults == []
    assert whole.done.returncode == 0
    assert whole.said["ready"] is True
    assert lines["transformers"]["wanted"] == ">=4.56.2,<=5.17.0; locked 5.17.0"  # the strongest of three packages'
    assert lines["trl"]["found"] == "1.15.0"
    assert lines["lock"]["found"].startswith("docker/")
    assert lines["4 bit"]["found"].startswith("forward and backward on the ")
    assert lines["unsloth import"]["status"] == "ok"
    assert "SDPA" in lines["attention"]["found"]
    assert {"torch call", "compiler", "shared memory", "disk", "hub", "system", "memory"} <= set(lines)
    assert all(line["mend"] for line in lines.values() if line["status"] != "ok")
    assert {line["model"] for line in whole.said["runs"]["sft"]} >= {"tiny", "qwen2.5-72b"}


def test_nothing_is_left_behind(whole):
    assert list(whole.cwd.rglob("*")) == []
    assert list(whole.home.rglob("*")) == []


def test_the_screen_is_a_screen(whole, env_check, capsys):
    checks = [env_check.Check(**line) for line in whole.said["checks"]]
    env_check.show(checks, whole.said["runs"], torch_facts(env_check, cuda=None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 140
    assert "\033" not in "".join(lines)
    for check in checks:
        (shown,) = [line for line in lines if line[9:].startswith(check.name + "  ")]
        assert shown.startswith(check.status)
        assert check.found in shown
        assert check.wanted in shown
        assert not check.mend or f"-> {check.mend}" in lines[lines.index(shown) + 1]
    assert "Unsloth 2026.10.9" in lines[0]
    assert lines[-2].startswith("Ready; ")


# --- packages -----------------------------------------------------------------------------------------------------


def moved(folder: Path, package: str, version: str) -> str:
    """The metadata of an installed package, copied and given another version; a PYTHONPATH that puts it first."""
    real = Path(next(path for path in sys.path if list(Path(path).glob(f"{package}-*.dist-info"))))
    (metadata,) = real.glob(f"{package}-*.dist-info/METADATA")
    copy = folder / f"{package}-{version}.dist-info" / "METADATA"
    copy.parent.mkdir(parents=True)
    lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
    copy.write_text("".join(f"Version: {version}\n" if line.startswith("Version:") else line for line in lines))
    return str(folder)


def test_a_package_out_of_its_window_is_named_with_who_refuses_it(tmp_path):
    lines = packages(PYTHONPATH=moved(tmp_path, "trl", "1.16.0"))
    assert lines["trl"]["status"] == "failure"
    assert lines["trl"]["found"] == "1.16.0, against unsloth and unsloth_zoo"
    assert lines["trl"]["wanted"] == ">=0.18.2,<=1.15.0; locked 1.15.0"
    assert "make setup" in lines["trl"]["mend"]
    assert [name for name, line in lines.items() if line["status"] == "failure"] == ["trl"]


def test_a_version_that_a_window_leaves_out_in_its_middle_is_out_of_it(tmp_path):
    line = packages(PYTHONPATH=moved(tmp_path, "bitsandbytes", "0.48.0"))["bitsandbytes"]  # unsloth: !=0.48.0
    assert line["status"] == "failure"
    assert line["found"] == "0.48.0, against unsloth"


def test_a_package_in_its_window_but_not_as_locked_is_a_warning(tmp_path):
    line = packages(PYTHONPATH=moved(tmp_path, "peft", "0.20.0"))["peft"]
    assert line["status"] == "warning"
    assert line["found"] == "0.20.0, not as locked"
    assert line["wanted"] == ">=0.18.0; locked 0.21.2"


def test_a_smaller_package_that_moved_is_one_warning(tmp_path):
    lines = packages(PYTHONPATH=moved(tmp_path, "rich", "14.0.0"))
    assert lines["other packages"]["status"] == "warning"
    assert "rich 14.0.0 (locked 15.0.0)" in lines["other packages"]["found"]


def test_what_the_overrides_drop_is_not_missed_and_nothing_else_is_forgiven(env_check, monkeypatch):
    facts = env_check.Facts([], "", {}, False)
    if env_check.installed("xformers"):
        pytest.skip("xformers is installed here")
    assert not [line for line in env_check.check_packages(facts) if line.status == "failure"]
    monkeypatch.setattr(env_check, "overridden", set)
    line = one(env_check.check_packages(facts), "xformers")
    assert line.status == "failure"
    assert line.found == "missing, against unsloth"


def test_a_lock_that_changed_since_is_said(env_check, monkeypatch, tmp_path):
    (tmp_path / "lock.sha256").write_text("0" * 64 + "  docker/cpu.lock\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    line = one(env_check.check_packages(env_check.Facts([], "", {}, False)), "lock")
    assert line.status == "warning"
    assert line.found == "docker/cpu.lock, sha256 000000000000"
    assert line.mend.startswith("make setup")
    (tmp_path / "lock.sha256").unlink()
    line = one(env_check.check_packages(env_check.Facts([], "", {}, False)), "lock")
    assert line.status == "warning"
    assert line.found.startswith("none")


# --- libraries in children ----------------------------------------------------------------------------------------


def ask(*names: str, seconds: int = 60, **environment: str) -> dict[str, list]:
    expression = (
        f"[setattr(m, 'CHILD_SECONDS', {seconds}), setattr(m, 'PROBES', {names!r}), "
        f"setattr(m, 'has_library', lambda probe: True), m.ask_children()][-1]"
    )
    return evaluate(expression, **environment)


def fake(folder: Path, **modules: str) -> str:
    for name, source in modules.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return str(folder)


TORCH = "__version__ = '2.13.0'\nclass version: cuda = None\nclass cuda: is_available = lambda: False\n"
TORCH += "get_num_threads = lambda: 2\n"


def test_one_that_crashes_hangs_or_ends_the_process_is_a_line_each(tmp_path):
    modules = fake(
        tmp_path,
        torch=TORCH,
        torchao="import os, sys; print('on the rocks', file=sys.stderr, flush=True); os.abort()",
        torchvision="import time; time.sleep(60)",
        bitsandbytes="import os; os._exit(0)",
        xformers="raise SystemExit('no more')",
        unsloth="print('noise on stdout'); import os; os.write(1, b'more of it'); __version__ = '9'",
    )
    answers = ask(
        *("torch", "torchao", "torchvision", "bitsandbytes", "xformers", "varlen", "unsloth"),
        seconds=3,
        PYTHONPATH=modules,
    )
    assert answers["torch"][0]["version"] == "2.13.0"
    assert answers["torchao"] == [None, "crashed with SIGABRT: on the rocks"]
    assert answers["torchvision"] == [None, "no answer in 3 s"]
    assert answers["bitsandbytes"] == [None, "ended with status 0"]
    assert answers["xformers"] == [None, "SystemExit: no more"]
    assert answers["varlen"] == [None, ""]  # asked after all of these
    assert answers["unsloth"] == ["9", ""]


def test_a_torch_that_does_not_load_ends_its_group_and_is_a_failure(tmp_path, env_check):
    answers = ask("torch", "torchao", PYTHONPATH=fake(tmp_path, torch="raise OSError('libcudart.so.13 is gone')"))
    assert answers == {"torch": [None, "OSError: libcudart.so.13 is gone"]}
    facts = env_check.Facts([CARD], "", {"torch": env_check.Answer(*answers["torch"])}, False)
    line = one(env_check.check_torch(facts), "torch call")
    assert (line.status, line.found) == ("failure", "OSError: libcudart.so.13 is gone")
    assert one(env_check.check_gpu(facts), "gpu").mend == "see torch"


def test_bitsandbytes_without_its_native_library(tmp_path, env_check):
    real = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    shutil.copytree(real, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    answers = ask("torch", "bitsandbytes", PYTHONPATH=str(tmp_path))
    assert answers["bitsandbytes"] == [None, "RuntimeError: its native library is missing or does not load"]
    facts = env_check.Facts([], "", {"bitsandbytes": env_check.Answer(*answers["bitsandbytes"])}, False)
    line = one(env_check.check_libraries(facts), "4 bit")
    assert line.status == "failure"
    assert "native library" in line.found
    assert "make setup" in line.mend
    assert "--no-load-in-4bit" in line.mend


def test_attention_that_computes_something_else_is_not_attention():
    torch = pytest.importorskip("torch")
    probes = load(ROOT / "scripts" / "probes.py")
    assert probes.sdpa() == "forward and backward"

    def sees_the_future(*heads):
        swapped = (tensor.transpose(1, 2) for tensor in heads)
        return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=False).transpose(1, 2)

    with pytest.raises(RuntimeError, match="off by"):
        probes.try_attention(sees_the_future)


def test_the_kernel_of_the_triton_probe_compiles_for_hopper(monkeypatch, tmp_path):
    """As far as it goes without a GPU: to machine code."""
    triton = pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Launched(Exception):
        pass

    class Kernel:
        def __class_getitem__(cls, grid):
            raise Launched

    kernels, jit, arange = [], triton.jit, torch.arange
    monkeypatch.setattr(triton, "jit", lambda function: kernels.append(jit(function)) or Kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "arange", lambda count, device, dtype: arange(count, dtype=dtype))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(Launched):
        load(ROOT / "scripts" / "probes.py").triton()
    signature = {"source": "*fp32", "target": "*fp32", "length": "i32", "block": "constexpr"}
    compiled = triton.compile(ASTSource(kernels[0], signature, {(3,): 128}), target=GPUTarget("cuda", 90, 32))
    assert "st.global" in compiled.asm["ptx"]


def test_every_probe_is_known_to_both_files(env_check):
    probes = load(ROOT / "scripts" / "probes.py")
    assert list(env_check.PROBES) == list(probes.PROBES)
    assert set(env_check.ALONE) < set(env_check.PROBES)


@pytest.mark.parametrize(
    ("works", "gpu", "packed", "dense"),
    [
        ("varlen", H200, "torch's varlen", "torch's SDPA"),
        ("", H200, "torch's SDPA", "torch's SDPA"),  # torch 2.11
        ("varlen,xformers", H200, "torch's varlen", "xformers"),
        ("varlen,flash-attn 2,xformers", H200, "flash-attn 2", "flash-attn 2"),
        ("varlen,flash-attn 3,flash-attn 4", H200, "flash-attn 3 in torch's varlen", "torch's SDPA"),
        ("xformers", T4, "xformers", "xformers"),
        ("flash-attn 2", T4, "torch's SDPA", "torch's SDPA"),  # needs 8.0
    ],
)
def test_the_attention_is_the_one_that_unsloth_will_choose(works, gpu, packed, dense, env_check):
    facts = torch_facts(env_check, gpu)
    facts.answers.update({name: env_check.Answer("forward and backward") for name in works.split(",") if name})
    assert one(env_check.check_attention(facts), "attention").found == f"{packed} for packed rows, {dense} for others"


def test_an_attention_library_that_is_broken_is_a_warning_and_not_used(env_check):
    facts = torch_facts(env_check, H200, xformers="NotImplementedError: no operator")
    lines = list(env_check.check_attention(facts))
    assert one(lines, "xformers").status == "warning"
    assert one(lines, "xformers").mend.startswith(f"{sys.executable} -m pip uninstall xformers")
    assert one(lines, "attention").found == "torch's SDPA for packed rows, torch's SDPA for others"


# --- driver and GPU -----------------------------------------------------------------------------------------------


def driver(env_check, folder: Path, version: str) -> None:
    file = folder / "version"
    file.write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (dvs-builder@U22)\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    env_check.DRIVER_FILE = str(file)


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [
        ("535.183.01", "13.0", "failure"),
        ("580.65.05", "13.0", "failure"),
        ("580.65.06", "13.0", "ok"),
        ("580.159.03", "13.2", "ok"),
        ("535.183.01", "12.8", "ok"),
        ("470.256.02", "12.1", "failure"),
        ("535.183.01", None, "ok"),  # a CPU build needs none
    ],
)
def test_the_driver_is_held_against_the_cuda_of_torch(version, cuda, status, env_check, tmp_path):
    driver(env_check, tmp_path, version)
    line = one(env_check.check_driver(torch_facts(env_check, cards=[CARD], cuda=cuda)), "driver")
    assert (line.status, line.found) == (status, version)
    if status == "failure":
        assert f"for CUDA {cuda}" in line.wanted
        assert line.mend.startswith("update the NVIDIA driver")


def test_an_old_driver_under_a_torch_that_works_is_a_warning(env_check, tmp_path):
    driver(env_check, tmp_path, "535.183.01")
    assert one(env_check.check_driver(torch_facts(env_check, H200)), "driver").status == "warning"


def test_before_anything_is_installed_the_driver_is_held_against_the_lock(env_check, tmp_path):
    driver(env_check, tmp_path, "535.183.01")
    line = one(env_check.check_driver(env_check.Facts([CARD], "", {}, False)), "driver")
    assert line.status == "failure"
    assert line.wanted.startswith(">= 580.65.06 for CUDA 13.0")


def test_a_card_without_a_driver_is_seen_on_the_bus(env_check, tmp_path):
    env_check.DRIVER_FILE, env_check.PCI_DEVICES = str(tmp_path / "none"), str(tmp_path / "pci")
    for place, vendor, kind in (("0000:01:00.0", "0x8086", "0x030000"), ("0000:02:00.0", "0x10de", "0x0c0330")):
        device = tmp_path / "pci" / place
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    facts = env_check.Facts([], "", {}, False)
    assert list(env_check.check_driver(facts)) == []  # an Intel display, and a USB controller of NVIDIA's
    (device / "class").write_text("0x030200\n")
    line = one(env_check.check_driver(facts), "driver")
    assert line.status == "warning"
    assert "install the NVIDIA driver" in line.mend


SMI = """#!/bin/sh
case "$1" in *{unknown}*) echo 'Field "{unknown}" is not a valid field to query.'; exit 2;; esac
{then}
"""


def smi(folder: Path, monkeypatch, then: str, unknown: str = "nothing") -> None:
    """A program nvidia-smi, first on the PATH."""
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(unknown=unknown, then=then))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


ROW = "0, NVIDIA H200, 580.95.05, 143771, 143000"


def test_nvidia_smi_is_read(env_check, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, f"echo '{ROW}, Enabled, 0, 0x0000000000000001'")
    assert env_check.nvidia_smi() == ([CARD], "")
    assert env_check.driver_version([CARD]) == "580.95.05"


def test_an_nvidia_smi_that_lacks_a_field_is_asked_for_less(env_check, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, f"echo '{ROW}'", unknown="clocks_event_reasons")
    cards, error = env_check.nvidia_smi()
    assert error == ""
    assert cards[0]["memory.free"] == "143000"
    assert one(env_check.check_health(env_check.Facts(cards, "", {}, False)), "gpu health").status == "ok"


def test_an_nvidia_smi_that_fails_says_why(env_check, tmp_path, monkeypatch):
    said = "Failed to initialize NVML: Driver/library version mismatch"
    smi(tmp_path, monkeypatch, f"echo '{said}'; echo 'NVML library version: 580.95'; exit 18")
    assert env_check.nvidia_smi() == ([], said)
    line = one(env_check.check_driver(env_check.Facts([], said, {}, False)), "driver")
    assert line.status == "failure"
    assert said in line.found
    assert line.mend.startswith("reboot")


def test_an_nvidia_smi_that_hangs_is_a_line(env_check, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "sleep 60")
    env_check.COMMAND_SECONDS = 0.5
    assert env_check.nvidia_smi() == ([], "no answer in 0.5 s")


def test_nvidia_smi_sees_a_gpu_and_torch_does_not(env_check, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = one(env_check.check_gpu(torch_facts(env_check, cards=[CARD], cuda=None)), "gpu")
    assert line.status == "failure"
    assert "nvidia-smi sees NVIDIA H200" in line.found
    assert "CPU build" in line.found
    assert line.mend == "make setup VARIANT=cuda"

    line = one(env_check.check_gpu(torch_facts(env_check, cards=[CARD])), "gpu")
    assert line.status == "failure"
    assert line.found.endswith("torch does not: no reason")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = one(env_check.check_gpu(torch_facts(env_check, cards=[CARD])), "gpu")
    assert line.status == "warning"  # as the user asked
    assert line.mend == "unset CUDA_VISIBLE_DEVICES"
    assert torch_facts(env_check, cards=[CARD]).free_gib is None


@pytest.mark.parametrize(
    ("gpu", "status", "said"),
    [
        (H200, "ok", "NVIDIA H200, 139.0 of 140.0 GiB free, capability 9.0, bfloat16"),
        ({**H200, "free": 40 * GIB}, "warning", "40.0 of 140.0 GiB free"),
        (T4, "warning", "capability 7.5"),
        ({**T4, "name": "Tesla P100", "capability": [6, 0]}, "failure", "capability 6.0"),
    ],
)
def test_each_gpu_is_a_line(gpu, status, said, env_check):
    line = one(env_check.check_gpu(torch_facts(env_check, gpu, H200)), "gpu 0")
    assert line.status == status
    assert said in line.found


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("ecc.errors.uncorrected.volatile.total", "3", "3 uncorrected memory errors"),
        ("clocks_event_reasons.active", "0x0000000000000060", "slowed down: too hot"),
        ("clocks_event_reasons.active", "0x0000000000000088", "slowed down: hardware slowdown, power brake"),
    ],
)
def test_a_card_that_errs_or_is_slowed_down_is_a_warning(field, value, said, env_check):
    cards = [CARD, {**CARD, "index": "1", field: value}]
    lines = list(env_check.check_health(env_check.Facts(cards, "", {}, False)))
    assert one(lines, "gpu health 1").status == "warning"
    assert said in one(lines, "gpu health 1").found
    assert one(lines, "gpu health").status == "ok"  # the other card
    power_cap = {**CARD, "clocks_event_reasons.active": "0x0000000000000005", "ecc.mode.current": "[N/A]"}
    assert len(list(env_check.check_health(env_check.Facts([power_cap], "", {}, False)))) == 1


def test_no_compiler_matters_on_a_gpu_only(env_check, monkeypatch):
    monkeypatch.setenv("CC", "no-such-cc")
    line = one(env_check.check_compiler(torch_facts(env_check, H200)), "compiler")
    assert line.status == "failure"
    assert "no-such-cc: No such file" in line.found
    assert one(env_check.check_compiler(torch_facts(env_check)), "compiler").status == "ok"


def test_no_python_headers_is_no_compiler(env_check, monkeypatch, tmp_path):
    monkeypatch.setattr(env_check.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    line = one(env_check.check_compiler(torch_facts(env_check, H200)), "compiler")
    assert line.status == "failure"
    assert "Python.h" in line.found
    assert "python3-dev" in line.mend


# --- disk, shared memory, hub -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(env_check, small_disk, monkeypatch):
    facts = env_check.Facts([], "", {}, False)
    monkeypatch.setenv("HF_HOME", str(small_disk / "not" / "yet"))
    line = one(env_check.check_disk(facts), "hub cache")
    assert line.status == "failure"
    assert "No space left on device" in line.found
    assert str(small_disk) in line.found
    assert "export HF_HOME=" in line.mend
    monkeypatch.chdir(small_disk)
    assert "OUT=" in one(env_check.check_disk(facts), "outputs").mend
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(("free", "status"), [(0.4, "failure"), (6, "warning"), (11, None)])
def test_a_disk_that_is_nearly_full(free, status, env_check, monkeypatch):
    monkeypatch.setattr(env_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GIB))
    lines = {line.name: line for line in env_check.check_disk(env_check.Facts([], "", {}, False))}
    assert ("outputs" in lines) == (status is not None)
    assert status is None or lines["outputs"].status == status
    assert ("outputs 11 GiB" in lines["disk"].found) if status is None else lines["outputs"].mend


def test_a_folder_that_cannot_be_written_to(env_check, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/proc/here")  # where nobody can write, root included
    line = one(env_check.check_disk(env_check.Facts([], "", {}, False)), "hub cache")
    assert line.status == "failure"
    assert line.found.startswith("/proc/here: ")


def test_no_shared_memory(env_check, monkeypatch, tmp_path):
    facts = env_check.Facts([], "", {}, False)
    env_check.SHARED_MEMORY = str(tmp_path / "shm")
    line = one(env_check.check_shared_memory(facts), "shared memory")
    assert line.status == "failure"
    assert "No such file or directory" in line.found
    assert "--shm-size" in line.mend
    (tmp_path / "shm").mkdir()
    docker = SimpleNamespace(f_bavail=2**14, f_frsize=2**12)  # 64 MiB
    monkeypatch.setattr(env_check.os, "statvfs", lambda path: docker)
    line = one(env_check.check_shared_memory(facts), "shared memory")
    assert (line.status, line.found) == ("warning", "0.06 GiB free")


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.status, server.body = [], 200, b"[]"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_only_when_told_to(env_check, hub):
    line = one(env_check.check_hub(env_check.Facts([], "", {}, False)), "hub")
    assert line.status == "ok"
    assert "no token" in line.found
    assert hub.asked == []
    line = one(env_check.check_hub(env_check.Facts([], "", {}, True)), "hub")
    assert line.status == "ok"
    assert line.found.endswith("it answers")
    assert hub.asked == [("/api/models?limit=1", None)]


def test_a_token_is_tried_and_never_shown(env_check, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.status = 401
    line = one(env_check.check_hub(env_check.Facts([], "", {}, True)), "hub")
    assert line.status == "failure"
    assert "a token is set" in line.found
    assert "401" in line.found
    assert "HF_TOKEN" in line.mend
    assert "secret" not in repr(line)
    assert hub.asked == [("/api/whoami-v2", "Bearer hf_secret")]


def test_the_token_of_huggingface_hub_is_found_where_it_keeps_it(env_check, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_secret\n")
    assert env_check.hub_token() == "hf_secret"


def test_a_hub_that_is_not_there(env_check, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    line = one(env_check.check_hub(env_check.Facts([], "", {}, True)), "hub")
    assert line.status == "failure"
    assert line.found.startswith("http://127.0.0.1:9, ")
    hub.body = b"<html>a login page</html>"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    assert one(env_check.check_hub(env_check.Facts([], "", {}, True)), "hub").status == "failure"


def test_image_and_slurm_job_are_said(env_check, monkeypatch):
    monkeypatch.setenv("IMAGE_DIGEST", "sha256:abc")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    lines = list(env_check.check_system(env_check.Facts([], "", {}, False)))
    assert one(lines, "image").found == "sha256:abc"
    assert one(lines, "Slurm job").found == "42, GPUs 0,1"


def test_little_memory_is_the_containers_limit(env_check, tmp_path):
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    env_check.MEMORY_LIMITS = (str(tmp_path / "memory.max"), str(tmp_path / "none"))
    line = one(env_check.check_system(env_check.Facts([], "", {}, False)), "memory")
    assert (line.status, line.found) == ("warning", "2.0 GiB available")
    (tmp_path / "memory.max").write_text("max\n")
    assert one(env_check.check_system(env_check.Facts([], "", {}, False)), "memory").found != "2.0 GiB available"


# --- what runs here -----------------------------------------------------------------------------------------------


def job(env_check, recipe: str, model: str, facts):
    cards = env_check.read_cards()
    lines = env_check.what_runs(recipe, cards, facts)
    return list(env_check.check_job(recipe, model, cards[model], lines, facts))


def test_without_a_gpu_only_the_tiny_model_runs(env_check):
    facts = torch_facts(env_check, cuda=None)
    lines = env_check.what_runs("sft", env_check.read_cards(), facts)
    assert [line["model"] for line in lines if line["fits"]] == ["tiny"]
    assert job(env_check, "sft", "tiny", facts)[0].status == "ok"
    line = one(job(env_check, "sft", "qwen2.5-7b", facts), "sft qwen2.5-7b")
    assert line.status == "failure"
    assert "days" in line.found
    assert "MODEL=tiny" in line.mend


def test_what_fits_is_what_the_memory_plan_says(env_check, monkeypatch, tmp_path):
    from common.lm import memory

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(env_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * GIB))
    cards = env_check.read_cards()
    for gib in (8, 24, 139):
        facts = torch_facts(env_check, {**H200, "free": gib * GIB})
        lines = {line["model"]: line for line in env_check.what_runs("sft", cards, facts)}
        for name, card in cards.items():
            if name != "tiny":  # whose card has sizes of its own
                fit = memory.fit(card, "sft", gib)
                assert lines[name]["fits"] == (fit is not None)
                assert fit is None or lines[name]["load_in_4bit"] == fit.load_in_4bit
        assert not all(line["fits"] for line in lines.values()) or gib == 139
    line = one(job(env_check, "sft", "qwen2.5-7b", torch_facts(env_check, H200)), "sft qwen2.5-7b")
    assert line.status == "ok"
    assert "--no-load-in-4bit" in line.found
    small = torch_facts(env_check, {**H200, "free": 8 * GIB})
    line = one(job(env_check, "sft", "qwen2.5-72b", small), "sft qwen2.5-72b")
    assert line.status == "failure"
    assert float(line.found.split()[0]) > 36  # half a byte a parameter, and more
    assert line.mend.startswith("make sft MODEL=")


def test_before_torch_is_installed_nvidia_smi_gives_the_memory(env_check, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = env_check.Facts([CARD], "", {}, False)
    assert facts.free_gib == pytest.approx(143000 / 1024)
    assert env_check.Facts([{**CARD, "memory.free": "[N/A]"}], "", {}, False).free_gib is None


def test_weights_need_room_and_leave(env_check, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(env_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * GIB))
    facts = torch_facts(env_check, H200)
    name = "sft llama-3.1-8b"
    mends = [line.mend for line in job(env_check, "sft", "llama-3.1-8b", facts) if line.status == "failure"]
    assert len(mends) == 2
    assert "HF_HOME" in mends[0]
    assert "accept the licence" in mends[1]
    hub_id = env_check.read_cards()["llama-3.1-8b"].hub_id
    (tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
    assert one(job(env_check, "sft", "llama-3.1-8b", facts), name).status == "ok"


def test_the_last_lines_say_what_runs(env_check):
    facts = torch_facts(env_check, {**H200, "free": 24 * GIB})
    text = env_check.in_words(env_check.what_runs("sft", env_check.read_cards(), facts), facts)
    assert "in 16 bit" in text
    assert "in 4 bit" in text
    assert "qwen2.5-72b" in text.partition("too large ")[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "qwen2.5-7c"], "there is qwen2.5-7b"),
        (["--recipe", "sfd"], "there is sft"),
        (["--recipe", "ppo", "--model", "qwen2.5-72b"], "ppo"),
        (["--modle", "tiny"], "--modle"),
    ],
)
def test_a_wrong_argument(flags, said):
    done = run(*flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_one_job_that_cannot_run_here_exits_3_with_the_reason(env_check, monkeypatch, capsys):
    facts = torch_facts(env_check, cuda=None)
    monkeypatch.setattr(env_check, "ask_children", lambda: facts.answers)
    monkeypatch.setattr(env_check, "nvidia_smi", lambda: ([], ""))
    monkeypatch.setattr(sys, "argv", ["env-check.py", "--recipe", "sft", "--model", "qwen2.5-7b"])
    assert env_check.main() == 3
    said = capsys.readouterr().out
    assert "failure  sft qwen2.5-7b" in said
    assert "Not ready: sft qwen2.5-7b" in said
    monkeypatch.setattr(sys, "argv", ["env-check.py", "--recipe", "sft", "--model", "tiny", "--json"])
    assert env_check.main() == 0
    assert list(json.loads(capsys.readouterr().out)["runs"]) == ["sft"]


def test_ctrl_c_ends_it_and_its_children(tmp_path):
    torch = "import os, pathlib, time; pathlib.Path(PLACE).write_text(str(os.getpid())); time.sleep(60)"
    modules = fake(tmp_path, torch=torch.replace("PLACE", repr(str(tmp_path / "child"))))
    environment = {**os.environ, "PYTHONPATH": modules, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child = tmp_path / "child"
    while not (child.exists() and child.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == b""
    state = Path(f"/proc/{child.read_text()}/stat")
    while state.exists() and ") Z " not in state.read_text():  # killed: gone, or waiting for its parent to notice
        time.sleep(0.05)
        assert time.time() < child.stat().st_mtime + 30
    assert list(tmp_path.glob("env-check-*")) == []


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_is_looked_at_whole(whole):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    lines = {line["name"]: line for line in whole.said["checks"]}
    assert lines["gpu 0"]["found"].startswith(torch.cuda.get_device_name(0))
    assert lines["triton kernel"]["found"] == "compiled and ran"
    assert lines["4 bit"]["found"] == "forward and backward on the GPU"
    assert lines["attention"]["status"] == "ok"
    assert lines["driver"]["status"] == "ok"
    assert [line for line in lines.values() if line["status"] == "failure"] == []
