"""env-check.py on machines that lack something: bare Pythons, broken packages, full disks, old drivers, no time.

What can be real is real: interpreters, metadata, libraries without their native half, full file systems, a hub of our
own. The rest is simulated where the value is read.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import in_process
import numpy as np
import pytest
from common import arguments, errors
from common.errors import MachineError
from common.rewards.sandbox import confinement
from conftest import ROOT
from env_check import children, fit, gpus, libraries, machine, packages, probes, screen
from env_check.checks import Check, Facts, Result

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


@pytest.fixture(scope="module")
def command():
    return in_process.command("env-check.py")


def torch_facts(*gpus: dict, cards: tuple = (), cuda: str | None = "13.0", **errors: str | Result):
    """Facts of a machine whose torch sees `gpus`; `errors` are those of probes, or their results."""
    about = {"version": "2.13.0", "cuda": cuda, "cudnn": 91900, "threads": 2, "gpus": list(gpus), "why": "no reason"}
    results = {"torch": Result(about)}
    for probe, error in errors.items():
        results[probe.replace("_", " ")] = error if isinstance(error, Result) else Result(error=error)
    return Facts(Result(list(cards)), results)


def one(checks, name: str):
    """The one check of that name, which says how to fix it unless it is ok."""
    checks = list(checks)
    assert all(check.fix for check in checks if check.status != "ok"), checks
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
        timeout=500,
        stdin=subprocess.DEVNULL,
    )


def evaluate(module: str, expression: str, **environment: str):
    """What `expression` over `m`, a module of env_check, gives in a new process, with another PYTHONPATH say."""
    code = f"import json; from env_check import {module} as m; from env_check.checks import Facts\n"
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT / "scripts")]))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(json.dumps({expression}))"],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def package_lines(**environment: str) -> dict[str, dict]:
    lines = evaluate("packages", "[c._asdict() for c in m.check_packages(Facts())]", **environment)
    return {line["name"]: line for line in lines}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """One run as a user's: this environment, everything imported, in an empty folder with an empty home."""
    home, cwd = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cwd")
    gone = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json"],
        cwd=cwd, env={**environment, "HOME": str(home)}, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    return SimpleNamespace(done=done, home=home, cwd=cwd, report=json.loads(done.stdout))


# --- which Python -------------------------------------------------------------------------------------------------


def test_an_old_python_can_read_it():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.10"])
def test_an_old_python_gets_one_line(version):
    python = shutil.which(f"python{version}")
    found = python and subprocess.run([python, "-V"], capture_output=True, check=False).returncode == 0
    if not found:  # a version manager has a name for each, but runs only some
        pythons = list(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        if not pythons:
            pytest.skip(f"there is no Python {version} on this machine")
        python = pythons[0]
    done = run(python=python)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer, and " in done.stderr
    assert f" is {version}." in done.stderr
    assert "make check PYTHON=" in done.stderr


def test_a_bare_python_gets_the_advice_to_make_setup(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = run(python=tmp_path / "bare" / "bin" / "python", PYTHONPATH="")
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "none of torch, transformers, trl, unsloth" in done.stdout
    assert "-> make " in done.stdout.partition("none of torch")[2].splitlines()[1]
    assert "Not ready: packages" in done.stdout


# --- this environment, as it is -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_this_environment_is_looked_at_whole(whole):
    lines = {line["name"]: line for line in whole.report["checks"]}
    faults = [line for line in lines.values() if line["status"] == "failure"]
    assert faults == []
    assert whole.done.returncode == 0
    assert whole.report["ready"] is True
    assert lines["transformers"]["wanted"] == ">=4.56.2,<=5.17.0; locked 5.17.0"  # the strongest of three packages'
    assert lines["trl"]["found"] == "1.15.0"
    assert lines["lock"]["found"].startswith("docker/")
    assert lines["4 bit"]["found"].startswith("forward and backward on the ")
    assert lines["unsloth import"]["status"] == "ok"
    assert lines["code sandbox"]["found"] == confinement()
    assert "SDPA" in lines["attention"]["found"]
    assert {"torch call", "compiler", "shared memory", "disk", "hub", "system", "memory"} <= set(lines)
    assert all(line["fix"] for line in lines.values() if line["status"] != "ok")
    assert {line["model"] for line in whole.report["runs"]["sft"]} >= {"tiny", "qwen2.5-72b"}


@pytest.mark.slow
def test_nothing_is_left_behind(whole):
    assert list(whole.cwd.rglob("*")) == []
    assert list(whole.home.rglob("*")) == []


def test_a_terminal_of_80_columns_gets_no_line_that_it_would_break(monkeypatch, capsys):
    checks = [
        Check("datasets", "ok", "4.8.5", ">=4.7.0,<5.0.0,!=4.0.*,!=4.1.0; locked 4.8.5"),
        Check(
            "torch", "failure", "2.12.0", ">=2.13.0,<2.14.0 as docker/cuda.lock has it", "make setup VARIANT=cuda " * 4
        ),
        Check("disk", "ok", "free for " + "outputs 54 GiB, " * 6, ""),
    ]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    screen.show(checks, {}, torch_facts())
    lines = [re.sub("\033\\[[0-9]*m", "", line) for line in capsys.readouterr().out.splitlines()[6:]]
    assert max(map(len, lines)) <= 80
    assert "2.12.0; wanted: >=2.13.0,<2.14.0" in " ".join(lines)
    assert "!=4.1.0" not in " ".join(lines)  # it is as wanted


@pytest.mark.slow
def test_the_screen_is_a_screen(whole, capsys):
    checks = [Check(**line) for line in whole.report["checks"]]
    screen.show(checks, whole.report["runs"], torch_facts(cuda=None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 140
    assert "\033" not in "".join(lines)
    for check in checks:
        (shown,) = [line for line in lines if line[9:].startswith(check.name + "  ")]
        assert shown.startswith(check.status)
        assert check.found in shown
        assert check.wanted in shown
        assert not check.fix or f"-> {check.fix}" in lines[lines.index(shown) + 1]
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
    lines = package_lines(PYTHONPATH=moved(tmp_path, "trl", "1.16.0"))
    assert lines["trl"]["status"] == "failure"
    assert lines["trl"]["found"] == "1.16.0, refused by unsloth and unsloth_zoo"
    assert lines["trl"]["wanted"] == ">=0.18.2,<=1.15.0; locked 1.15.0"
    assert "make setup" in lines["trl"]["fix"]
    assert [name for name, line in lines.items() if line["status"] == "failure"] == ["trl"]


def test_a_version_that_a_window_leaves_out_in_its_middle_is_out_of_it(tmp_path):
    line = package_lines(PYTHONPATH=moved(tmp_path, "bitsandbytes", "0.48.0"))["bitsandbytes"]  # unsloth: !=0.48.0
    assert line["status"] == "failure"
    assert line["found"] == "0.48.0, refused by unsloth"


def test_a_package_in_its_window_but_not_as_locked_is_a_warning(tmp_path):
    line = package_lines(PYTHONPATH=moved(tmp_path, "peft", "0.20.0"))["peft"]
    assert line["status"] == "warning"
    assert line["found"] == "0.20.0, not as locked"
    assert line["wanted"] == ">=0.18.0; locked 0.21.2"


def test_a_smaller_package_that_moved_is_one_warning(tmp_path):
    lines = package_lines(PYTHONPATH=moved(tmp_path, "rich", "14.0.0"))
    assert lines["other packages"]["status"] == "warning"
    assert "rich 14.0.0 (locked 15.0.0)" in lines["other packages"]["found"]


def test_a_package_that_the_overrides_drop_may_be_missing_and_no_other(monkeypatch):
    facts = Facts()
    if packages.installed("xformers"):
        pytest.skip("xformers is installed here")
    assert not [line for line in packages.check_packages(facts) if line.status == "failure"]
    monkeypatch.setattr(packages, "overridden", set)
    line = one(packages.check_packages(facts), "xformers")
    assert line.status == "failure"
    assert line.found == "missing, refused by unsloth"


def test_a_lock_that_has_changed_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "lock.sha256").write_text("0" * 64 + "  docker/cpu.lock\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    line = one(packages.check_packages(Facts()), "lock")
    assert line.status == "warning"
    assert line.found == "docker/cpu.lock, sha256 000000000000"
    assert line.fix.startswith("make setup")
    (tmp_path / "lock.sha256").unlink()
    line = one(packages.check_packages(Facts()), "lock")
    assert line.status == "warning"
    assert line.found.startswith("none")


# --- libraries in children ----------------------------------------------------------------------------------------


def run_probes(*names: str, seconds: float = 60, patient: float = 60, **environment: str) -> dict[str, list]:
    expression = (
        f"[setattr(m, 'SECONDS', {seconds}), setattr(m, 'PATIENT_SECONDS', {patient}), setattr(m, 'PROBES', {names!r}),"
        " setattr(m, 'has_library', lambda probe: True), m.run_probes()][-1]"
    )
    return evaluate("children", expression, **environment)


def fake(folder: Path, **modules: str) -> str:
    for name, source in modules.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return str(folder)


TORCH = "__version__ = '2.13.0'\nclass version: cuda = None\nclass cuda: is_available = lambda: False\n"
TORCH += "get_num_threads = lambda: 2\n"


def test_one_that_crashes_or_ends_the_process_is_a_line_each(tmp_path):
    modules = fake(
        tmp_path,
        torch=TORCH,
        torchao="import os, sys; print('on the rocks', file=sys.stderr, flush=True); os.abort()",
        bitsandbytes="import os; os._exit(0)",
        xformers="raise SystemExit('no more')",
        unsloth="print('noise on stdout'); import os; os.write(1, b'more of it'); __version__ = '9'",
    )
    names = ("torch", "torchao", "bitsandbytes", "xformers", "varlen", "unsloth")
    results = run_probes(*names, PYTHONPATH=modules)
    assert results["torch"][0]["version"] == "2.13.0"
    assert results["torchao"] == [None, "crashed with SIGABRT: on the rocks", ""]
    assert results["bitsandbytes"] == [None, "ended with status 0", ""]
    assert results["xformers"] == [None, "SystemExit: no more", ""]
    assert results["varlen"] == [None, "", ""]  # run after all of these
    assert results["unsloth"] == ["9", "", ""]


@pytest.mark.slow
def test_an_import_that_is_only_slow_is_fine(tmp_path):
    """Each gets a second try with more time, and with it those that waited for a torch that was slow."""
    once = "import os, time\nif not os.path.exists({0!r}): open({0!r}, 'w').close(); time.sleep(60)\n"
    modules = fake(
        tmp_path,
        torch=once.format(str(tmp_path / "torch.once")) + TORCH,
        torchao="__version__ = '8'",
        unsloth="import time; time.sleep(2.5); __version__ = '9'",
    )
    results = run_probes("torch", "torchao", "unsloth", seconds=2, PYTHONPATH=modules)
    assert results["torch"][0]["version"] == "2.13.0"
    assert results["torchao"] == ["8", "", ""]
    assert results["unsloth"] == ["9", "", ""]


@pytest.mark.slow
def test_one_that_hangs_is_slow_and_the_others_run(tmp_path):
    modules = fake(tmp_path, torch=TORCH, torchvision="import time; time.sleep(60)", torchao="__version__ = '8'")
    results = run_probes("torch", "torchvision", "torchao", seconds=2, patient=2.5, PYTHONPATH=modules)
    assert results["torchvision"] == [None, "", "slow: took more than 2.5 s here"]
    assert results["torchao"] == ["8", "", ""]


def test_one_that_is_killed_from_outside_is_not_broken(tmp_path):
    """The out-of-memory killer of a busy machine says nothing of a library."""
    modules = fake(tmp_path, torch=TORCH, torchao="import os; os.kill(os.getpid(), 9)")
    results = run_probes("torch", "torchao", PYTHONPATH=modules)
    assert results["torchao"] == [None, "", "killed from outside, as when memory runs out"]


LIBRARY_CHECKS = (libraries.check_torch, libraries.check_libraries, libraries.check_attention)


@pytest.mark.slow
@pytest.mark.parametrize("probe", children.PROBES)
def test_a_slow_library_is_a_warning_and_never_to_be_installed_again(probe, command, monkeypatch, capsys):
    facts = torch_facts(H200) if probe != "torch" else Facts()
    results = facts.results | {probe: Result(slow="slow: took more than 240 s here")}
    monkeypatch.setattr(command, "CHECKS", (gpus.check_gpu, *LIBRARY_CHECKS))
    monkeypatch.setattr(command, "run_probes", lambda: results)
    monkeypatch.setattr(command, "query_driver", Result)
    monkeypatch.setattr(sys, "argv", ["env-check.py"])
    assert command.main() == 0
    output = capsys.readouterr().out
    line, fix = re.search(r"(.*slow: took more than 240 s here.*)\n(.*)", output).groups()
    assert line.startswith("warning ")
    assert "-> try again when the machine is idle" in fix
    assert "Ready; warnings: " in output
    assert "make setup" not in output
    assert "pip" not in output


def test_gpus_whose_direct_copies_hang_or_arrive_wrong_get_nccls_setting_and_with_it_are_fine(monkeypatch):
    class Tensor(np.ndarray):
        copy_ = cpu = lambda self, *source: self  # the copy is lost

    def make(maker):
        return lambda *values, device, **more: maker(*values, **more).view(Tensor)

    nccl = SimpleNamespace(all_reduce=lambda shares: [share.fill(3) for share in shares], version=lambda: (2, 28, 9))
    cuda = SimpleNamespace(device_count=lambda: 2, synchronize=lambda index: None, nccl=nccl)
    makers = {name: make(getattr(np, name)) for name in ("arange", "full", "full_like")}
    two = SimpleNamespace(cuda=cuda, float32=np.float32, equal=np.array_equal, **makers)
    monkeypatch.setitem(sys.modules, "torch", two)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    with pytest.raises(RuntimeError, match="a copy from GPU 0 to GPU 1 arrives wrong") as wrong:
        probes.nccl()
    for result in (Result(error=str(wrong.value)), Result(slow="slow: took more than 240 s here")):
        line = one(libraries.check_libraries(torch_facts(H200, H200, nccl=result)), "several GPUs")
        assert (line.status, line.found) == ("warning", result.error or result.slow)
        assert "export NCCL_P2P_DISABLE=1" in line.fix
        assert line.fix.startswith("try again when the machine is idle; ") == bool(result.slow)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert probes.nccl() == "NCCL 2.28.9, all-reduce over 2 GPUs, no peer access (NCCL_P2P_DISABLE=1)"


def test_a_torch_that_does_not_load_ends_its_group_and_is_a_failure(tmp_path):
    results = run_probes(
        "torch", "torchao", PYTHONPATH=fake(tmp_path, torch="raise OSError('libcudart.so.13 is gone')")
    )
    assert results == {"torch": [None, "OSError: libcudart.so.13 is gone", ""]}
    facts = Facts(Result([CARD]), {"torch": Result(*results["torch"])})
    line = one(libraries.check_torch(facts), "torch call")
    assert (line.status, line.found) == ("failure", "OSError: libcudart.so.13 is gone")
    assert one(gpus.check_gpu(facts), "gpu").fix == "see torch call"


@pytest.mark.slow
def test_bitsandbytes_without_its_native_library(tmp_path):
    real = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    shutil.copytree(real, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    results = run_probes("torch", "bitsandbytes", PYTHONPATH=str(tmp_path))
    assert results["bitsandbytes"] == [None, "RuntimeError: its native library is missing or does not load", ""]
    facts = Facts(Result(), {"bitsandbytes": Result(*results["bitsandbytes"])})
    line = one(libraries.check_libraries(facts), "4 bit")
    assert line.status == "failure"
    assert "native library" in line.found
    assert "make setup" in line.fix
    assert "--no-load-in-4bit" in line.fix


def test_attention_that_computes_something_else_is_not_attention():
    torch = pytest.importorskip("torch")
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
        probes.triton()
    signature = {"source": "*fp32", "target": "*fp32", "length": "i32", "block": "constexpr"}
    compiled = triton.compile(ASTSource(kernels[0], signature, {(3,): 128}), target=GPUTarget("cuda", 90, 32))
    assert "st.global" in compiled.asm["ptx"]


def test_every_probe_is_known_to_both_files():
    assert list(children.PROBES) == list(probes.PROBES)
    assert set(children.ALONE) < set(children.PROBES)


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
def test_the_attention_is_the_one_that_unsloth_will_choose(works, gpu, packed, dense):
    facts = torch_facts(gpu)
    facts.results.update({name: Result("forward and backward") for name in works.split(",") if name})
    assert one(libraries.check_attention(facts), "attention").found == f"{packed} for packed rows, {dense} for others"


def test_an_attention_library_that_is_broken_is_a_warning_and_not_used():
    facts = torch_facts(H200, xformers="NotImplementedError: no operator")
    lines = list(libraries.check_attention(facts))
    assert one(lines, "xformers").status == "warning"
    assert one(lines, "xformers").fix.startswith(f"{sys.executable} -m pip uninstall xformers")
    assert one(lines, "attention").found == "torch's SDPA for packed rows, torch's SDPA for others"


# --- driver and GPU -----------------------------------------------------------------------------------------------


def driver(monkeypatch, folder: Path, version: str) -> None:
    file = folder / "version"
    file.write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (dvs-builder@U22)\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    monkeypatch.setattr(gpus, "DRIVER_FILE", str(file))


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
def test_the_driver_is_held_against_the_cuda_of_torch(version, cuda, status, tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path, version)
    line = one(gpus.check_driver(torch_facts(cards=[CARD], cuda=cuda)), "driver")
    assert (line.status, line.found) == (status, version)
    if status == "failure":
        assert f"for CUDA {cuda}" in line.wanted
        assert line.fix.startswith("update the NVIDIA driver")


def test_an_old_driver_under_a_torch_that_works_is_a_warning(tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path, "535.183.01")
    assert one(gpus.check_driver(torch_facts(H200)), "driver").status == "warning"


def test_before_anything_is_installed_the_driver_is_held_against_the_lock(tmp_path, monkeypatch):
    driver(monkeypatch, tmp_path, "535.183.01")
    line = one(gpus.check_driver(Facts(Result([CARD]))), "driver")
    assert line.status == "failure"
    assert line.wanted.startswith(">= 580.65.06 for CUDA 13.0")


def test_a_card_without_a_driver_is_seen_on_the_bus(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "DRIVER_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(gpus, "PCI_DEVICES", str(tmp_path / "pci"))
    for place, vendor, kind in (("0000:01:00.0", "0x8086", "0x030000"), ("0000:02:00.0", "0x10de", "0x0c0330")):
        device = tmp_path / "pci" / place
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    facts = Facts()
    assert list(gpus.check_driver(facts)) == []  # an Intel display, and a USB controller of NVIDIA's
    (device / "class").write_text("0x030200\n")
    line = one(gpus.check_driver(facts), "driver")
    assert line.status == "warning"
    assert "install the NVIDIA driver" in line.fix


def test_a_broken_driver_is_a_failure_with_its_reason(monkeypatch):
    def fail():
        raise MachineError("Failed to initialize NVML: Driver/library version mismatch")

    monkeypatch.setattr(gpus, "nvidia_smi", fail)
    line = one(gpus.check_driver(Facts(gpus.query_driver())), "driver")
    assert line.status == "failure"
    assert "Failed to initialize NVML" in line.found
    assert line.fix.startswith("reboot")


def test_a_slow_driver_is_a_warning(monkeypatch):
    def hang():
        raise TimeoutError("took more than 60 s")

    monkeypatch.setattr(gpus, "nvidia_smi", hang)
    line = one(gpus.check_driver(Facts(gpus.query_driver())), "driver")
    assert line.status == "warning"
    assert line.found == "slow: nvidia-smi took more than 60 s here"
    assert line.fix.startswith("try again when the machine is idle")


def test_nothing_is_concluded_about_a_gpu_that_a_slow_driver_does_not_list():
    facts = Facts(Result(slow="slow: nvidia-smi took more than 60 s here"))
    assert one(gpus.check_gpu(facts), "gpu").found == "not known: nvidia-smi is slow"
    line = one(job("sft", "qwen2.5-7b", facts), "sft qwen2.5-7b")
    assert (line.status, line.fix) == ("warning", "try again when the machine is idle")


def test_a_slow_compiler_is_a_warning(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(machine, "COMPILER_SECONDS", 0.5)
    line = one(machine.check_compiler(torch_facts(H200)), "compiler")
    assert (line.status, line.found) == ("warning", "slow: took more than 0.5 s here")
    assert line.fix == "try again when the machine is idle"


def test_nvidia_smi_sees_a_gpu_and_torch_does_not(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = one(gpus.check_gpu(torch_facts(cards=[CARD], cuda=None)), "gpu")
    assert line.status == "failure"
    assert "nvidia-smi sees NVIDIA H200" in line.found
    assert "CPU build" in line.found
    assert line.fix == "make setup VARIANT=cuda"

    line = one(gpus.check_gpu(torch_facts(cards=[CARD])), "gpu")
    assert line.status == "failure"
    assert line.found.endswith("torch does not: no reason")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = one(gpus.check_gpu(torch_facts(cards=[CARD])), "gpu")
    assert line.status == "warning"  # the user wanted that
    assert line.fix == "unset CUDA_VISIBLE_DEVICES"
    assert torch_facts(cards=[CARD]).free_gib is None


@pytest.mark.parametrize(
    ("gpu", "status", "expected"),
    [
        (H200, "ok", "NVIDIA H200, 139.0 of 140.0 GiB free, capability 9.0, bfloat16"),
        ({**H200, "free": 40 * GIB}, "warning", "40.0 of 140.0 GiB free"),
        (T4, "warning", "capability 7.5"),
        ({**T4, "name": "Tesla P100", "capability": [6, 0]}, "failure", "capability 6.0"),
    ],
)
def test_each_gpu_is_a_line(gpu, status, expected):
    line = one(gpus.check_gpu(torch_facts(gpu, H200)), "gpu 0")
    assert line.status == status
    assert expected in line.found


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("ecc.errors.uncorrected.volatile.total", "3", "3 uncorrected memory errors"),
        ("clocks_event_reasons.active", "0x0000000000000060", "slowed down: too hot"),
        ("clocks_event_reasons.active", "0x0000000000000088", "slowed down: hardware slowdown, power brake"),
    ],
)
def test_a_card_that_errs_or_is_slowed_down_is_a_warning(field, value, expected):
    cards = [CARD, {**CARD, "index": "1", field: value}]
    lines = list(gpus.check_health(Facts(Result(cards))))
    assert one(lines, "gpu health 1").status == "warning"
    assert expected in one(lines, "gpu health 1").found
    assert one(lines, "gpu health").status == "ok"  # the other card
    power_cap = {**CARD, "clocks_event_reasons.active": "0x0000000000000005", "ecc.mode.current": "[N/A]"}
    assert len(list(gpus.check_health(Facts(Result([power_cap]))))) == 1


def test_no_compiler_matters_on_a_gpu_only(monkeypatch):
    monkeypatch.setenv("CC", "no-such-cc")
    line = one(machine.check_compiler(torch_facts(H200)), "compiler")
    assert line.status == "failure"
    assert "no-such-cc: No such file" in line.found
    assert one(machine.check_compiler(torch_facts()), "compiler").status == "ok"


def test_no_python_headers_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    line = one(machine.check_compiler(torch_facts(H200)), "compiler")
    assert line.status == "failure"
    assert "Python.h" in line.found
    assert "python3-dev" in line.fix


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


def test_a_full_disk(small_disk, monkeypatch):
    facts = Facts()
    monkeypatch.setenv("HF_HOME", str(small_disk / "not" / "yet"))
    line = one(machine.check_disk(facts), "hub cache")
    assert line.status == "failure"
    assert "No space left on device" in line.found
    assert str(small_disk) in line.found
    assert "export HF_HOME=" in line.fix
    monkeypatch.chdir(small_disk)
    assert "--output-dir" in one(machine.check_disk(facts), "outputs").fix
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(("free", "status"), [(0.4, "failure"), (6, "warning"), (11, None)])
def test_a_disk_that_is_nearly_full(free, status, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GIB))
    lines = {line.name: line for line in machine.check_disk(Facts())}
    assert ("outputs" in lines) == (status is not None)
    assert status is None or lines["outputs"].status == status
    assert ("outputs 11 GiB" in lines["disk"].found) if status is None else lines["outputs"].fix


def test_a_folder_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/proc/here")  # where nobody can write, root included
    line = one(machine.check_disk(Facts()), "hub cache")
    assert line.status == "failure"
    assert line.found.startswith("/proc/here: ")


def test_no_shared_memory(monkeypatch, tmp_path):
    facts = Facts()
    monkeypatch.setattr(machine, "SHARED_MEMORY", str(tmp_path / "shm"))
    line = one(machine.check_shared_memory(facts), "shared memory")
    assert line.status == "failure"
    assert "No such file or directory" in line.found
    assert "--shm-size" in line.fix
    (tmp_path / "shm").mkdir()
    docker = SimpleNamespace(f_bavail=2**14, f_frsize=2**12)  # 64 MiB
    monkeypatch.setattr(machine.os, "statvfs", lambda path: docker)
    line = one(machine.check_shared_memory(facts), "shared memory")
    assert (line.status, line.found) == ("warning", "0.06 GiB free")


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Authorization"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.status, server.body = [], 200, b"[]"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_is_contacted_only_with_online(hub):
    line = one(machine.check_hub(Facts()), "hub")
    assert line.status == "ok"
    assert "no token" in line.found
    assert hub.requests == []
    line = one(machine.check_hub(Facts(online=True)), "hub")
    assert line.status == "ok"
    assert line.found.endswith("reachable")
    assert hub.requests == [("/api/models?limit=1", None)]


def test_a_token_is_tried_and_never_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.status = 401
    line = one(machine.check_hub(Facts(online=True)), "hub")
    assert line.status == "failure"
    assert "a token is set" in line.found
    assert "401" in line.found
    assert "HF_TOKEN" in line.fix
    assert "secret" not in repr(line)
    assert hub.requests == [("/api/whoami-v2", "Bearer hf_secret")]


def test_the_token_of_huggingface_hub_is_found_where_it_keeps_it(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_secret\n")
    assert machine.hub_token() == "hf_secret"


def test_a_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    line = one(machine.check_hub(Facts(online=True)), "hub")
    assert line.status == "failure"
    assert line.found.startswith("http://127.0.0.1:9, ")
    hub.body = b"<html>a login page</html>"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    assert one(machine.check_hub(Facts(online=True)), "hub").status == "failure"


def test_image_and_slurm_job_are_shown(monkeypatch):
    monkeypatch.setenv("IMAGE_DIGEST", "sha256:abc")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    lines = list(machine.check_system(Facts()))
    assert one(lines, "image").found == "sha256:abc"
    assert one(lines, "Slurm job").found == "42, GPUs 0,1"


def test_little_memory_is_the_lowest_limit_and_its_name(monkeypatch):
    """That of a Slurm job here; tests/common/test_errors.py has those of control groups."""
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    line = one(machine.check_system(Facts()), "memory")
    assert (line.status, line.found) == ("warning", "2.0 GiB: Slurm's --mem")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert "Slurm" not in one(machine.check_system(Facts()), "memory").found


# --- what runs here -----------------------------------------------------------------------------------------------


def job(recipe: str, model: str, facts):
    cards = fit.read_cards()
    lines = fit.what_runs(recipe, cards, facts)
    return list(fit.check_job(recipe, model, cards[model], lines, facts))


def test_without_a_gpu_only_the_tiny_model_runs():
    facts = torch_facts(cuda=None)
    lines = fit.what_runs("sft", fit.read_cards(), facts)
    assert [line["model"] for line in lines if line["fits"]] == ["tiny"]
    assert job("sft", "tiny", facts)[0].status == "ok"
    line = one(job("sft", "qwen2.5-7b", facts), "sft qwen2.5-7b")
    assert line.status == "failure"
    assert "days" in line.found
    assert "MODEL=tiny" in line.fix


def test_what_fits_is_what_the_memory_plan_says(monkeypatch, tmp_path):
    from common.plan.search import BATCH, device_with
    from common.plan.search import fit as planned_fit

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * GIB))
    cards = fit.read_cards()
    for gib in (8, 24, 139):
        facts = torch_facts({**H200, "free": gib * GIB})
        lines = {line["model"]: line for line in fit.what_runs("sft", cards, facts)}
        for name, card in cards.items():
            planned = planned_fit(card, "sft", device_with(gib), fixed=BATCH)
            assert lines[name]["fits"] == (planned is not None)
            assert planned is None or lines[name]["load_in_4bit"] == (planned.work.precision == "nf4")
        assert not all(line["fits"] for line in lines.values()) or gib == 139
    line = one(job("sft", "qwen2.5-7b", torch_facts(H200)), "sft qwen2.5-7b")
    assert line.status == "ok"
    assert "GiB with LOAD_IN_4BIT=no GRADIENT_CHECKPOINTING=" in line.found
    small = torch_facts({**H200, "free": 8 * GIB})
    line = one(job("sft", "qwen2.5-72b", small), "sft qwen2.5-72b")
    assert line.status == "failure"
    assert float(line.found.split()[2]) > 36  # half a byte a parameter, and more
    assert line.fix.startswith("make sft MODEL=")


def test_a_smaller_batch_that_fits_is_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * GIB))
    line = one(job("sft", "qwen2.5-7b", torch_facts({**H200, "free": 8 * GIB})), "sft qwen2.5-7b")
    assert line.status == "failure"
    assert line.fix == "make sft MODEL=qwen2.5-7b PER_DEVICE_TRAIN_BATCH_SIZE=1 GRADIENT_ACCUMULATION_STEPS=16"


def test_before_torch_is_installed_nvidia_smi_gives_the_memory(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = Facts(Result([CARD]))
    assert facts.free_gib == pytest.approx(143000 / 1024)
    assert Facts(Result([{**CARD, "memory.free": "[N/A]"}])).free_gib is None


def test_weights_need_room_and_leave(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * GIB))
    facts = torch_facts(H200)
    name = "sft llama-3.1-8b"
    fixes = [line.fix for line in job("sft", "llama-3.1-8b", facts) if line.status == "failure"]
    assert len(fixes) == 2
    assert "HF_HOME" in fixes[0]
    assert "accept the licence" in fixes[1]
    hub_id = fit.read_cards()["llama-3.1-8b"].hub_id
    (tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
    assert one(job("sft", "llama-3.1-8b", facts), name).status == "ok"


def test_the_last_lines_say_what_runs():
    facts = torch_facts({**H200, "free": 24 * GIB})
    text = screen.in_words(fit.what_runs("sft", fit.read_cards(), facts), facts)
    assert "in 16 bit" in text
    assert "in 4 bit" in text
    assert "qwen2.5-72b" in text.partition("too large ")[2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model", "qwen2.5-7c"], "did you mean qwen2.5-7b?"),
        (["--recipe", "sfd"], "did you mean sft?"),
        (["--recipe", "ppo", "--model", "qwen2.5-72b"], "ppo"),
        (["--modle", "tiny"], "did you mean --model?"),
    ],
)
def test_a_wrong_argument(flags, expected):
    done = run(*flags)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_nothing_but_python(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = run("--help", python=tmp_path / "bare" / "bin" / "python", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in ("--recipe", "--model", "--online", "--json"))


@pytest.mark.slow
def test_one_job_that_cannot_run_here_exits_3_with_the_reason(command, monkeypatch, capsys):
    facts = torch_facts(cuda=None)
    monkeypatch.setattr(command, "run_probes", lambda: facts.results)
    monkeypatch.setattr(command, "query_driver", Result)
    monkeypatch.setattr(sys, "argv", ["env-check.py", "--recipe", "sft", "--model", "qwen2.5-7b"])
    assert command.main() == 3
    output = capsys.readouterr().out
    assert "failure  sft qwen2.5-7b" in output
    assert "Not ready: sft qwen2.5-7b" in output
    monkeypatch.setattr(sys, "argv", ["env-check.py", "--recipe", "sft", "--model", "tiny", "--json"])
    assert command.main() == 0
    assert list(json.loads(capsys.readouterr().out)["runs"]) == ["sft"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["make", ""])
def test_a_fix_names_arguments_of_recipes_as_the_user_does(way, command, monkeypatch, capsys):
    facts, known = torch_facts(H200, bitsandbytes="RuntimeError: its native library is missing"), {}
    monkeypatch.setattr(errors, "SPELLING", way)
    for module in (arguments, errors):
        monkeypatch.setattr(module, "ARGUMENTS", known)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(command, "run_probes", lambda: facts.results)
    monkeypatch.setattr(command, "query_driver", Result)
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["env-check.py", *words])
        assert command.main() == 3
        output = capsys.readouterr().out
        for flags, variables in (("--no-load-in-4bit", "LOAD_IN_4BIT=no"), ("--output-dir=/ano", "OUT=/ano")):
            assert (variables if way else flags) in output
            assert (flags if way else variables) not in output


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
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == b""
    state = Path(f"/proc/{child.read_text()}/stat")
    while state.exists() and ") Z " not in state.read_text():  # killed: gone, or waiting for its parent to notice
        time.sleep(0.05)
        assert time.time() < child.stat().st_mtime + 30
    assert list(tmp_path.glob("env-check-*")) == []


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_is_looked_at_whole(whole):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    lines = {line["name"]: line for line in whole.report["checks"]}
    assert lines["gpu 0"]["found"].startswith(torch.cuda.get_device_name(0))
    assert lines["triton kernel"]["found"] == "compiled and ran"
    assert lines["4 bit"]["found"] == "forward and backward on the GPU"
    assert lines["attention"]["status"] == "ok"
    assert lines["driver"]["status"] == "ok"
    assert [line for line in lines.values() if line["status"] == "failure"] == []
