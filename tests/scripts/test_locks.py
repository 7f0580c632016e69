"""The locks in docker/: whole, hashed, free of this or that machine, and enough for what they install."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from install import overlay
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_install import copy_package

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
LOCKS = ["bootstrap.lock", "cpu.lock", "cuda.lock", "cuda-vllm.lock", "lm-eval.lock"]
# One package: its name, its version, all its hashes.
PACKAGE = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n", re.M)

# What the override files drop or loosen, as the requirements that the locks do not meet. Nothing else may be unmet.
OVERRIDDEN = {"cpu": {"certifi", "xformers", "torchvision"}, "cuda": {"certifi", "xformers"}}
OVERRIDDEN["cuda-vllm"] = OVERRIDDEN["cuda"]


def read(name: str) -> dict[str, tuple[str, str]]:
    return {package: (version, hashes) for package, version, hashes in PACKAGE.findall((DOCKER / name).read_text())}


def versions(name: str) -> dict[str, str]:
    return {package: version for package, (version, _) in read(name).items()}


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_hashed(name: str) -> None:
    text = (DOCKER / name).read_text()
    rest = PACKAGE.sub("", text)
    assert [line for line in rest.splitlines() if not line.lstrip().startswith("#")] == []
    assert len(read(name)) == len(PACKAGE.findall(text)), "a package twice"


def test_how_many() -> None:
    assert len(read("bootstrap.lock")) == 1
    assert 100 < len(read("cpu.lock")) < len(read("cuda.lock")) < len(read("cuda-vllm.lock"))


@pytest.mark.parametrize("name", LOCKS)
def test_no_path_url_or_host(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert re.findall(r".*(?:/|@|\.(?:org|com|io|net)\b).*", text) == []
    assert set(re.findall(r"(?<!\S)(--?[a-z-]+)\b", text)) <= {"-c", "-r", "--hash", "--override"}


@pytest.mark.parametrize("name", ["cpu.lock", "cuda.lock"])
def test_the_only_line_beside_the_superset_is_the_cpu_torch(name: str) -> None:
    lines, superset = (
        {line.rstrip(" \\") for line in (DOCKER / file).read_text().splitlines() if not line.lstrip().startswith("#")}
        for file in (name, "cuda-vllm.lock")
    )
    own = sorted(lines - superset, reverse=True)
    if name == "cuda.lock":
        assert own == []
        return
    pin, *hashes = own
    assert pin == f"torch=={versions('cuda.lock')['torch']}+cpu"
    assert hashes == [line for line in read(name)["torch"][1].replace(" \\", "").splitlines() if line]


def test_what_is_installed_beside_the_packages_of_training_repeats_none_and_contradicts_none() -> None:
    beside = versions("lm-eval.lock")
    assert beside["lm-eval"] in (DOCKER / "lm-eval.in").read_text()
    assert beside.keys() & versions("cuda.lock").keys() == set()
    everything = versions("cuda-vllm.lock")
    shared = beside.keys() & everything.keys()
    assert {name: beside[name] for name in shared} == {name: everything[name] for name in shared}
    for name in overlay.SOURCES:  # without a wheel: its archive and nothing else
        assert read("lm-eval.lock")[name][1].count("--hash") == 1


@pytest.mark.parametrize("name", ["cpu.lock", "cuda.lock", "cuda-vllm.lock"])
def test_the_pins_of_the_in_files(name: str) -> None:
    text = (DOCKER / "train.in").read_text() + ((DOCKER / "vllm.in").read_text() if "vllm" in name else "")
    pins = [Requirement(line) for line in text.splitlines() if line and not line.startswith(("#", "-r"))]
    locked = versions(name)
    assert pins
    for pin in pins:
        version = locked[canonicalize_name(pin.name)].removesuffix("+cpu")
        assert pin.specifier.contains(version), f"{pin} and {version}"
        assert "+cpu" in locked["torch"] if name == "cpu.lock" else "+" not in locked["torch"]


def test_every_direct_pin_is_exact() -> None:
    for name in ("bootstrap.in", "train.in", "lm-eval.in"):
        lines = [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


# --- what is installed --------------------------------------------------------------------------------------------


def running_variant() -> str:
    """The lock that the Python which runs this was installed from, by what is there."""
    installed = {canonicalize_name(distribution.name) for distribution in metadata.distributions()}
    if "vllm" in installed:
        return "cuda-vllm"
    return "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"


def test_installed_is_exactly_the_lock() -> None:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]  # not what setuptools brings in its own
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions(path=folders)}
    assert installed == versions(f"{running_variant()}.lock")


def test_every_requirement_is_met_but_the_overridden() -> None:
    """Walks what the installed packages ask for, extras included, from the .in files down."""
    variant = running_variant()
    locked = versions(f"{variant}.lock")
    seen: set[tuple[str, str]] = set()
    unmet: dict[str, str] = {}
    todo = [(name, "") for name in locked]  # (package, extra)
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            version = locked.get(needed)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                unmet[needed] = f"{name}[{extra}] asks for {text}; the lock has {version}"
            else:
                todo += [(needed, each) for each in requirement.extras]
    assert set(unmet) == OVERRIDDEN[variant], unmet


# --- make lock, make lock-check -----------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    copy_package(tmp_path)
    for name in ("arguments.py", "aliases.py"):
        shutil.copy(ROOT / "recipes" / "common" / name, tmp_path / "recipes" / "common")
    shutil.copytree(DOCKER, tmp_path / "docker", dirs_exist_ok=True)
    cache = ROOT / ".cache"
    if cache.exists():
        (tmp_path / ".cache").symlink_to(cache)
    return tmp_path


def lock(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "install.lock", *flags]
    environment = {**os.environ, "PYTHONPATH": "recipes:scripts"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def edit(file: Path, before: str, after: str) -> int:
    """Returns the number of the line that was changed."""
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))
    return text[: text.index(before)].count("\n") + 1


@pytest.mark.slow
def test_check_finds_an_edited_input(copy: Path) -> None:
    train = copy / "docker" / "train.in"
    train.write_text(re.sub(r"^wandb==.*\n", "", train.read_text(), flags=re.M))
    done = lock(copy, "--check")
    assert done.returncode == 2, done.stderr
    stale = re.findall(r"^docker/(\S+):\d+: not what `make lock` would write", done.stderr, re.M)
    assert {"cuda-vllm.lock", "cuda.lock"} <= set(stale)
    assert "then `make lock`" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_check_finds_an_edited_lock_and_make_lock_fixes_it(copy: Path) -> None:
    first = re.search(r"sha256:(\w{64})", (copy / "docker" / "cuda.lock").read_text())[1]
    line = edit(copy / "docker" / "cuda.lock", first, "0" * 64)
    done = lock(copy, "--check")
    assert done.returncode == 2, done.stderr
    assert re.findall(r"^docker/\S+:\d+:", done.stderr, re.M) == [f"docker/cuda.lock:{line}:"]
    if "docker/cpu.lock is not checked" in done.stderr:
        pytest.skip("`make lock` needs the CPU build of torch, which is not in reach")
    assert lock(copy).returncode == 0
    assert [name for name in LOCKS if (copy / "docker" / name).read_bytes() != (DOCKER / name).read_bytes()] == []
