"""The Makefile as a user types it, in a copy whose .venv is whole and whose recipes only print what they are given."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_install import copy_package

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.M)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "a copy"
    copy_package(folder)
    for name in ("Makefile", "scripts/launch.py"):
        shutil.copy(ROOT / name, folder / name)
    lock = b"# nothing\n"
    (folder / "docker" / "cpu.lock").write_bytes(lock)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (folder / ".venv" / "lock.sha256").write_text(f"{hashlib.sha256(lock).hexdigest()}  docker/cpu.lock\n")
    for name in ("recipes/sft.py", "scripts/evaluate.py", "scripts/models.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("import json, sys\nprint('given', json.dumps(sys.argv[1:]))\n")
    return folder


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *words], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def given(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("given ")[2])


def test_make_alone_lists_every_target(copy: Path) -> None:
    done = make(copy)
    assert done.returncode == 0
    listed = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", done.stdout, re.M))
    assert list(listed) == TARGETS
    assert sorted(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M)[1].split()) == sorted(TARGETS)
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_every_variable_is_listed(copy: Path) -> None:
    listed = set(re.findall(r"^  ([A-Z_]+)=\S", make(copy).stdout, re.M))
    internal = {"DEFAULT_GOAL", "UPGRADE", "PYTHONPATH", "CURDIR"}  # UPGRADE is in the help of `lock`
    assert set(re.findall(r"\$\(([A-Z_]+)\)", MAKEFILE)) - internal <= listed
    assert listed >= {"MODEL", "DATA", "OUT", "ARGS", "VARIANT", "PYTHON", "TORCH_CPU_LINKS"}


def test_what_it_runs_exists() -> None:
    files = re.findall(r"(?:recipes|scripts)/[\w./-]+", MAKEFILE)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_nothing_given_leaves_the_defaults_to_the_recipe(copy: Path) -> None:
    assert given(make(copy, "sft")) == []
    assert given(make(copy, "evaluate")) == []


def test_words_arrive_as_they_were_typed(copy: Path) -> None:
    data = """it's "my" data; $HOME, (1).jsonl"""
    typed = ["MODEL=a/b c", f"DATA={data.replace('$', '$$')}", "OUT=out puts/é"]
    wanted = ["--model", "a/b c", "--data", data, "--output-dir", "out puts/é"]
    assert given(make(copy, "sft", *typed, """ARGS=--seed 3 --columns 'prompt=the question' "b c" """)) == [
        *wanted, "--seed", "3", "--columns", "prompt=the question", "b c",
    ]  # fmt: skip
    assert given(make(copy, "evaluate", "MODEL=tiny", "ADAPTER=an adapter", "DATA=x", "ARGS=--n 2")) == [
        "--model", "tiny", "--adapter", "an adapter", "--data", "x", "--n", "2",
    ]  # fmt: skip
    assert given(make(copy, "models")) == []
    assert given(make(copy, "pin", "MODEL=qwen2.5-7b")) == ["pin", "qwen2.5-7b"]


@pytest.mark.parametrize("script", re.findall(r"^\t\$\(run\) (\S+\.py) \$\(call flag", MAKEFILE, re.M))
def test_the_flags_it_passes_are_the_scripts_own(script: str) -> None:
    recipe = re.search(rf"^\t\$\(run\) {script} (.*(?:\\\n.*)*)", MAKEFILE, re.M)[1]
    flags = re.findall(r"(?<![\w-])--[a-z-]+", recipe)
    help_text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert flags
    assert [flag for flag in flags if not re.search(rf"{flag}\b", help_text.stdout)] == []


def test_exit_code_of_the_command_is_shown(copy: Path) -> None:
    (copy / "recipes" / "sft.py").write_text("raise SystemExit(75)\n")
    done = make(copy, "sft")
    assert done.returncode == 2  # make's own, whatever the command's
    assert done.stderr.rstrip().endswith("Error 75")


@pytest.mark.parametrize("target", ["sft", "test", "setup", "lock", "lock-check"])
def test_no_python(target: str, copy: Path) -> None:
    shutil.rmtree(copy / ".venv")
    done = make(copy, target, "PYTHON=no-python3 here")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("make: there is no no-python3 here here: install Python 3.11 or newer")
    assert lines[1].endswith("Error 3")
    assert len(lines) == 2


@pytest.mark.parametrize("target", ["sft", "test", "setup", "lock", "image"])
def test_old_python(target: str, copy: Path) -> None:
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    old = [
        *versions.glob("3.[6-9].*/bin/python3"),
        *versions.glob("3.10.*/bin/python3"),
        *versions.glob("2.*/bin/python"),
    ]
    if not old:
        pytest.skip("no Python older than 3.11 on this machine")
    shutil.rmtree(copy / ".venv")
    for python in old:
        lines = make(copy, target, f"PYTHON={python}").stderr.splitlines()
        assert lines[0] == f"make: {python} is older than Python 3.11: make PYTHON=/path/to/python3.12"
        assert lines[1].endswith("Error 3")
        assert len(lines) == 2


@pytest.mark.parametrize("target", ["slurm", "slurm-status"])
@pytest.mark.parametrize("python", ["old", "no"])
def test_a_login_node_without_a_modern_python(target: str, python: str, copy: Path) -> None:
    old = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"
    (copy / "old").write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c \'{old}\' "$2"\n')
    (copy / "old").chmod(0o755)
    shutil.rmtree(copy / ".venv")
    lines = make(copy, target, f"PYTHON={copy / python}").stderr.splitlines()
    assert lines[0] == "make: this needs Python 3.11 or newer: make setup, or make PYTHON=/path/to/python3.12"
    assert lines[1].endswith("Error 3")
    assert len(lines) == 2


def test_help_needs_nothing(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("make", "awk", "sh"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.rmtree(copy / ".venv")
    assert "make sft" in make(copy, PATH=str(tmp_path / "bin")).stdout
    assert not (copy / ".venv").exists()


def test_clean_leaves_outputs(copy: Path) -> None:
    (copy / "outputs").mkdir()
    (copy / ".cache").mkdir()
    assert make(copy, "clean").returncode == 0
    assert not (copy / ".venv").exists()
    assert not (copy / ".cache").exists()
    assert (copy / "outputs").exists()


@pytest.mark.parametrize("shebang", ["#!/bin/bash", "#!/bin/sh", "#!/usr/bin/env bash"])
def test_lint_finds_shell_files_by_their_first_line(shebang: str, copy: Path) -> None:
    (copy / "a job").write_text(f"{shebang}\nrm $1\n")
    (copy / "notes.md").write_text("Not one, though it speaks of\n#!/bin/bash\nrm $1\n")
    shutil.rmtree(copy / ".venv")
    (copy / ".venv").symlink_to(sys.prefix)  # where ruff and shellcheck are
    (copy / ".gitignore").write_text(".venv\n")
    for file in [*copy.glob("scripts/**/*.py"), *copy.glob("recipes/**/*.py")]:
        file.write_text("")  # install too: nothing to set up, and only the shell file is at fault
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)
    done = make(copy, "lint")
    assert done.returncode == 2
    assert "a job" in done.stdout
    assert "SC2086" in done.stdout
    assert "notes.md" not in done.stdout
