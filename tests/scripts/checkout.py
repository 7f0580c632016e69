"""A copy of what the launcher needs, in which commands print what they are given and an engine prints its words."""

import csv
import hashlib
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

from conftest import ROOT
from launch.commands import COMMANDS

ENGINE = """#!{python} -IS
import json, os, sys
words = sys.argv[1:]
if words[:2] == ["image", "inspect"]:
    if "docker/" in {answer!r}:
        print({answer!r})
    else:
        sys.exit({answer!r})
elif words[0] == "info":
    print({security!r})
else:
    names = ("APPTAINERENV_", "HF_", "CUDA_")
    print(json.dumps({{"words": words, "environment": {{k: v for k, v in os.environ.items() if k.startswith(names)}}}}))
"""
DIGEST = "sha256:" + "d" * 64
# In front of a command's own text: its arguments are read from that, and what is executed is this.
STUB = "import json, os, sys; print('given', json.dumps([sys.executable, *sys.argv[1:]])); sys.exit({code})\n"
COMMON = ("__init__", "aliases", "arguments", "environment", "errors", "run/__init__", "run/files")
PACKAGES = ("scripts/launch", "scripts/install")


class Checkout:
    """The copy, at `root`, with a `home` and a folder of programs, `bin`; there is a docker, and no .venv."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout, mine"
        packages = [path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).glob("*.py")]
        common = [f"recipes/common/{name}.py" for name in COMMON]
        for name in (
            "Makefile",
            "scripts/run",
            "docker/cpu.lock",
            "docker/cuda.lock",
            "docker/sources.txt",
            *packages,
            *common,
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)  # with its time, for which the compiled code stays good
            if Path(name).suffix == ".py":
                take_compiled(ROOT / name, self.root / name)
        for name in COMMANDS:
            self.stub(name)
        self.bin = folder / "bin"
        self.home = folder / "home"
        for place in (self.bin, self.home):
            place.mkdir()
        (self.bin / "python3").symlink_to(sys._base_executable)
        for tool in ("make", "sh", "bash", "env", "readlink", "dirname", "rm"):  # and no docker of this machine's
            (self.bin / tool).symlink_to(shutil.which(tool))
        lock = (ROOT / "docker" / "cpu.lock").read_bytes()
        self.label = f"{hashlib.sha256(lock).hexdigest()}  docker/cpu.lock"
        self.engine("docker")

    def stub(self, name: str, code: int = 0) -> None:
        """Have a command print what it is given and end with an exit code."""
        file = COMMANDS[name].file
        if file is None or "install" in file.parts:
            return
        copy = self.root / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(STUB.format(code=code) + file.read_text(encoding="utf-8"), encoding="utf-8")

    def make_venv(self) -> None:
        (self.root / ".venv" / "bin").mkdir(parents=True)
        (self.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
        (self.root / ".venv" / "lock.sha256").write_text(self.label + "\n")

    def engine(self, name: str, answer: str | None = None, security: str = "[name=seccomp]") -> None:
        answer = f"{DIGEST} {self.label}" if answer is None else answer
        program = self.bin / name
        program.write_text(ENGINE.format(python=sys.executable, answer=answer, security=security))
        program.chmod(0o755)

    def run(self, *words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """scripts/run WORDS."""
        return self._execute([self.root / "scripts" / "run", *words], cwd, environment)

    def make(self, *words: object, **environment: str) -> subprocess.CompletedProcess:
        return self._execute(["make", *words], None, environment)

    def _execute(self, command: list, cwd: Path | None, environment: dict) -> subprocess.CompletedProcess:
        base = {"PATH": str(self.bin), "HOME": str(self.home)}
        return subprocess.run(
            list(map(str, command)), cwd=cwd or self.root, env={**base, **environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def container(self, *words: object, **environment: str) -> "Container":
        done = self.run(*words, **{"RUNTIME": "docker", **environment})
        assert done.returncode == 0, done.stderr
        return Container(done)


def take_compiled(file: Path, copy: Path) -> None:
    """Have the compiled code of `file` beside its copy, where a Python without PYTHONPYCACHEPREFIX finds it."""
    compiled = Path(cache_from_source(str(file)))
    if not compiled.exists() or compiled.stat().st_mtime < file.stat().st_mtime:
        py_compile.compile(str(file))
    copy = copy.parent / "__pycache__" / compiled.name
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(compiled, copy)


class Container:
    """What the engine was given: the flags of `run`, the image, and the command inside."""

    def __init__(self, done: subprocess.CompletedProcess) -> None:
        engine = json.loads(done.stdout)
        self.all, self.environment, self.stderr = engine["words"], engine["environment"], done.stderr
        image = next(n for n, word in enumerate(self.all) if re.match(r"recipes:|mine:|.*\.sif$|docker://", word))
        self.flags, self.image, self.command = self.all[:image], self.all[image], self.all[image + 1 :]

    @property
    def arguments(self) -> list[str]:
        """The command without python and the file."""
        return self.command[2:]

    def values(self, flag: str) -> list[str]:
        return [value for word, value in zip(self.flags, self.flags[1:], strict=False) if word == flag]

    @property
    def mounts(self) -> dict[str, tuple[str, bool]]:
        """{inside: (outside, writable)}"""
        found = {}
        for line in csv.reader(self.values("--mount")):
            field = dict(word.partition("=")[::2] for word in line)
            assert field["type"] == "bind"
            inside = field.get("target") or field["destination"]
            assert inside not in found, "the same place twice"
            assert Path(field["source"]).exists(), "Docker would refuse it, or make it as root"
            found[inside] = (field["source"], "readonly" not in field)
        return found


def given(done: subprocess.CompletedProcess) -> list[str]:
    """The arguments that a stub was given."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("given ")[2])[1:]


def clean_environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **more}
