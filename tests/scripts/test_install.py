"""scripts/install as `make` runs it: real uv, real Python, a lock of one tiny wheel and an index of our own."""

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from install.installed import converter_mark

ROOT = Path(__file__).parents[2]
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
LOGIN = ("me", "s@cret")
CONNECT = "Connect this machine, or set PIP_INDEX_URL to an index in reach."


# --- an index, and a checkout with a small lock -------------------------------------------------------------------


class Index(ThreadingHTTPServer):
    """A package index over a folder. /private/… is the same, for LOGIN only; `slow` holds answers back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Pages, directory=str(folder)))
        self.folder = folder
        self.requests: list[str] = []
        self.logins: list[str] = []
        self.slow = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/simple"

    def add(self, wheel: Path) -> None:
        name = wheel.name.split("-")[0]
        (self.folder / "files").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, self.folder / "files" / wheel.name)
        page = self.folder / "simple" / name / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as links:
            links.write(f'<a href="../../files/{wheel.name}#sha256={sha256(wheel)}">{wheel.name}</a>\n')


class Pages(SimpleHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.logins += self.headers.get_all("Authorization", [])
        while self.server.slow.is_set() and self.path.endswith(".whl"):
            time.sleep(0.05)
        if self.path.startswith("/private/"):
            self.path = self.path.removeprefix("/private")
            login = base64.b64encode(":".join(LOGIN).encode()).decode()
            if self.headers["Authorization"] != f"Basic {login}":
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic")
                self.end_headers()
                return
        with contextlib.suppress(ConnectionError):
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", files: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    files = files or {f"{name}.py": f"version = {version!r}\n"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in archive.namelist()))
    return wheel


def pin(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version} \\\n    --hash=sha256:{sha256(wheel)}\n"


@dataclass
class Checkout:
    path: Path
    index: Index
    environment: dict[str, str]
    python: str = sys.executable
    settings: dict[str, str] = field(default_factory=lambda: {"VARIANT": "cuda"})

    @property
    def venv(self) -> Path:
        return self.path / ".venv"

    @property
    def mark(self) -> Path:
        return self.venv / "lock.sha256"

    def lock(self, variant: str, *wheels: Path) -> None:
        (self.path / "docker" / f"{variant}.lock").write_text("".join(map(pin, wheels)))

    def start(self, **settings: str) -> subprocess.Popen:
        environment = {**self.environment, **self.settings, **settings}
        command = [self.python, "-m", "install"]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.path, env=environment, text=True, start_new_session=True, **pipes)

    def setup(self, **settings: str) -> subprocess.CompletedProcess:
        process = self.start(**settings)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def installed(self, name: str = "tinypkg") -> str:
        code = f"import {name}; print({name}.version)"
        return subprocess.check_output([self.venv / "bin" / "python", "-c", code], text=True).strip()


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stderr


def refused(done: subprocess.CompletedProcess, status: int = 3) -> str:
    """The one line that says why, after lines that only say what is being done."""
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith(("setup: installing ", "setup: fetching ")) for line in lines[:-1]), done.stderr
    return lines[-1]


@pytest.fixture(scope="session")
def uv() -> Path:
    """The pinned uv, from .cache or the real index."""
    code = "from install import index, uv; index.use_pip_settings(); print(uv.find())"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/recipes:{ROOT}/scripts"}
    return Path(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip())


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    return {version: make_wheel(folder, "tinypkg", version) for version in ("1.0", "2.0")}


@pytest.fixture
def index(tmp_path: Path, wheels: dict[str, Path]) -> Iterator[Index]:
    with serve(tmp_path / "index") as server:
        for wheel in wheels.values():
            server.add(wheel)
        yield server


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Index]:
    server = Index(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.slow.clear()
    server.shutdown()
    server.server_close()


def copy_package(path: Path) -> None:
    """Install, what it needs, and a docker/ for its locks."""
    (path / "docker").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts" / "install", path / "scripts" / "install", ignore=lambda *_: ["__pycache__"])
    for name in ("__init__.py", "errors.py", "run/__init__.py", "run/files.py"):  # as in docker/Dockerfile
        file = path / "recipes" / "common" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "recipes" / "common" / name, file)


def keep_converter(path: Path) -> Path:
    """Put what stands for llama.cpp's converter where it is kept once it was fetched; returns that folder."""
    pins = (ROOT / "docker" / "sources.txt").read_text()
    (version,) = re.findall(r"^llama-cpp-python==(\S+) --hash", pins, re.M)
    folder = path / ".cache" / f"llama.cpp-{version}-{hashlib.sha256(converter_mark().encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True)
    (folder / "source.sha256").write_text(converter_mark())
    return folder


def make_checkout(path: Path, index: Index, uv: Path, wheels: dict[str, Path], home: Path) -> Checkout:
    copy_package(path)
    home.mkdir(exist_ok=True)
    shutil.copy(ROOT / "docker" / "bootstrap.lock", path / "docker")
    cached = path / ".cache" / uv.parent.name
    cached.mkdir(parents=True)
    (cached / "uv").symlink_to(uv)
    shutil.copy(ROOT / "docker" / "sources.txt", path / "docker")
    keep_converter(path)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": f"{path}/recipes:{path}/scripts",
        "UV_CACHE_DIR": str(home / "uv"),
        "UV_HTTP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,  # not this machine's
        "PIP_INDEX_URL": index.url,
    }
    checkout = Checkout(path, index, environment)
    checkout.lock("cuda", wheels["1.0"])
    return checkout


@pytest.fixture
def checkout(tmp_path: Path, index: Index, uv: Path, wheels: dict[str, Path]) -> Checkout:
    return make_checkout(tmp_path / "a checkout, with spaces", index, uv, wheels, tmp_path / "home")


# --- what it makes ------------------------------------------------------------------------------------------------


def test_makes_venv_once(checkout: Checkout) -> None:
    lines = ok(checkout.setup()).splitlines()
    assert lines[0] == f"setup: installing docker/cuda.lock, 1 packages, 5.8 GB, into {checkout.venv}"
    assert re.fullmatch(r"setup: done in \d+ s", lines[1])
    assert len(lines) == 2
    assert checkout.installed() == "1.0"
    subprocess.run(["sha256sum", "--check", "--status", checkout.mark], cwd=checkout.path, check=True)

    before = [(file, file.lstat().st_mtime_ns) for file in sorted(checkout.venv.rglob("*"))]
    checkout.index.requests.clear()
    assert ok(checkout.setup()) == ""
    assert [(file, file.lstat().st_mtime_ns) for file in sorted(checkout.venv.rglob("*"))] == before
    assert checkout.index.requests == []


def test_rebuilds_when_the_lock_changes_and_keeps_the_variant(checkout: Checkout, wheels: dict[str, Path]) -> None:
    ok(checkout.setup())
    (checkout.venv / "stray").touch()
    os.utime(checkout.path / "docker" / "cuda.lock")
    assert ok(checkout.setup()) == ""  # another time, the same content
    checkout.lock("cuda", wheels["2.0"])
    ok(checkout.setup(VARIANT=""))
    assert checkout.installed() == "2.0"
    assert not (checkout.venv / "stray").exists()


def test_rebuilds_for_another_variant(checkout: Checkout, wheels: dict[str, Path]) -> None:
    ok(checkout.setup())
    checkout.lock("cuda-vllm", wheels["2.0"])
    ok(checkout.setup(VARIANT="cuda-vllm"))
    assert checkout.installed() == "2.0"


def test_rebuilds_when_its_python_is_gone(checkout: Checkout) -> None:
    ok(checkout.setup())
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/nonexistent/python3.11")
    ok(checkout.setup())
    assert checkout.installed() == "1.0"


def test_keeps_a_link_to_another_disk(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    checkout.venv.symlink_to(tmp_path / "big disk")
    ok(checkout.setup())
    assert checkout.venv.is_symlink()
    assert checkout.installed() == "1.0"


def test_rebuilds_after_being_killed(checkout: Checkout) -> None:
    ok(checkout.setup())
    checkout.lock("cuda", make_and_add(checkout, "otherpkg"))
    checkout.index.slow.set()
    process = checkout.start()
    wait_for(lambda: any("otherpkg" in path and path.endswith(".whl") for path in checkout.index.requests))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not checkout.mark.exists()
    checkout.index.slow.clear()
    ok(checkout.setup())
    assert checkout.installed("otherpkg") == "1.0"


def test_the_converter_comes_along_and_is_kept(checkout: Checkout) -> None:
    ok(checkout.setup())
    mark = checkout.venv / "share" / "llama.cpp" / "source.sha256"
    assert mark.exists()
    mark.write_text("of another version\n")
    assert ok(checkout.setup()) == ""
    assert mark.read_text() == converter_mark()


def test_only_setup_fails_without_the_converter(checkout: Checkout) -> None:
    """An index of wheels alone has no sources: what needs no converter runs, and a line says what is missing."""
    shutil.rmtree(next((checkout.path / ".cache").glob("llama.cpp-*")))
    code = "from install.environment import ensure; ensure('cuda')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=checkout.path, env=checkout.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Without it there is no llama.cpp converter, which `make export` needs" in done.stderr
    assert checkout.installed() == "1.0"
    assert "/llama-cpp-python/" in refused(checkout.setup())


def test_two_at_once_take_turns(checkout: Checkout) -> None:
    checkout.index.slow.set()
    first = checkout.start()
    wait_for(lambda: any(path.endswith(".whl") for path in checkout.index.requests))
    second = checkout.start()
    assert second.stderr is not None
    assert second.stderr.readline() == "setup: another set-up is at work in this checkout; waiting for it\n"
    checkout.index.slow.clear()
    assert first.wait(60) == 0, first.stderr.read()
    assert second.communicate(timeout=60)[1] == ""  # nothing was left to do
    assert second.returncode == 0
    assert sum(path.endswith(".whl") for path in checkout.index.requests) == 1


def test_uv_left_alone_still_holds_the_lock(checkout: Checkout) -> None:
    checkout.index.slow.set()
    first = checkout.start()
    wait_for(lambda: any(path.endswith(".whl") for path in checkout.index.requests))
    first.kill()  # python only; its uv continues to install
    second = checkout.start()
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    checkout.index.slow.clear()
    assert "setup: done" in second.communicate(timeout=60)[1]
    first.communicate()
    assert checkout.installed() == "1.0"


# --- where uv comes from ------------------------------------------------------------------------------------------


def fetches_uv_itself(checkout: Checkout, uv: Path) -> Path:
    """Gives the checkout's index a wheel of uv, and takes the fetched one away."""
    version = uv.parent.name.removeprefix("uv-")
    tag = "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64"
    files = {f"uv-{version}.data/scripts/uv": uv.read_bytes()}
    wheel = make_wheel(checkout.path.parent / "uv wheel", "uv", version, tag, files)
    checkout.index.add(wheel)
    (checkout.path / "docker" / "bootstrap.lock").write_text(pin(wheel))
    shutil.rmtree(checkout.path / ".cache")
    keep_converter(checkout.path)
    return wheel


def test_python_without_pip_and_a_private_index(checkout: Checkout, uv: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    checkout.python = str(tmp_path / "bare" / "bin" / "python")
    fetches_uv_itself(checkout, uv)
    url = checkout.index.url.replace("//", "//me:s%40cret@").replace("/simple", "/private/simple")
    printed = ok(checkout.setup(PIP_INDEX_URL=url))
    assert "s%40cret" not in printed
    assert checkout.installed() == "1.0"
    requests = [path for path in checkout.index.requests if "/uv" in path]
    checkout.mark.unlink()
    ok(checkout.setup(PIP_INDEX_URL=url))  # uv is kept
    assert [path for path in checkout.index.requests if "/uv" in path] == requests


def test_a_login_is_for_its_own_index(checkout: Checkout, uv: Path, tmp_path: Path) -> None:
    """The page is behind a login, and its link leads to another host."""
    with serve(tmp_path / "other index") as other:
        wheel = fetches_uv_itself(checkout, uv)
        page = checkout.index.folder / "simple" / "uv" / "index.html"
        page.write_text(f'<a href="{other.url}/../files/{wheel.name}">{wheel.name}</a>')
        (other.folder / "files").mkdir(parents=True)
        (checkout.index.folder / "files" / wheel.name).rename(other.folder / "files" / wheel.name)
        url = checkout.index.url.replace("//", "//me:s%40cret@").replace("/simple", "/private/simple")
        ok(checkout.setup(PIP_INDEX_URL=url))
        assert any(path.endswith(wheel.name) for path in other.requests)
        assert checkout.index.logins
        assert other.logins == []


@pytest.mark.slow
@pytest.mark.parametrize("version", ["as pinned", "0.1.0"])
def test_a_uv_on_the_path(version: str, checkout: Checkout, uv: Path, tmp_path: Path) -> None:
    """It serves if it is the pinned version; another one is left alone."""
    fetches_uv_itself(checkout, uv)
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "uv"
    if version == "as pinned":
        own.symlink_to(uv)
    else:
        own.write_text(f"#!/bin/sh\necho uv {version} | tee {tmp_path}/used\n")
        own.chmod(0o755)
    printed = ok(checkout.setup(PATH=f"{own.parent}:{os.environ['PATH']}"))
    assert ("fetching uv" in printed) == (version != "as pinned")
    assert list(checkout.path.glob(".cache/uv-*/uv")) == [] if version == "as pinned" else (tmp_path / "used").exists()


def test_a_broken_pip_conf(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "own.conf").write_text("index-url = x\n")
    line = refused(checkout.setup(PIP_CONFIG_FILE=str(tmp_path / "own.conf"), PIP_INDEX_URL=""))
    assert f"no section headers. file: '{tmp_path}/own.conf'" in line


def test_refuses_a_uv_that_is_not_in_the_lock(checkout: Checkout, uv: Path) -> None:
    fetches_uv_itself(checkout, uv)
    shutil.copy(ROOT / "docker" / "bootstrap.lock", checkout.path / "docker")  # the public one; ours has another hash
    assert "which docker/ does not list: do not use that index" in refused(checkout.setup())
    assert not list((checkout.path / ".cache").glob("uv-*/uv"))


def test_no_network_for_uv(checkout: Checkout) -> None:
    shutil.rmtree(checkout.path / ".cache")
    line = refused(checkout.setup(PIP_INDEX_URL="http://me:secret@127.0.0.1:9/simple"))
    assert line.startswith(
        "No answer from http://127.0.0.1:9/simple/uv/ ([Errno 111] Connection refused). Connect this"
    )
    assert "set PIP_INDEX_URL" in line


# --- refusals -----------------------------------------------------------------------------------------------------


def test_no_network_for_packages(checkout: Checkout) -> None:
    line = refused(checkout.setup(PIP_INDEX_URL="http://me:secret@127.0.0.1:9/simple"))
    assert line.startswith("uv could not install docker/cuda.lock: Failed to fetch: http://127.0.0.1:9/")
    assert line.endswith(f"Connection refused (os error 111). {CONNECT}")
    assert "secret" not in line
    assert not checkout.mark.exists()


def test_hash_mismatch(checkout: Checkout, wheels: dict[str, Path]) -> None:
    lock = checkout.path / "docker" / "cuda.lock"
    lock.write_text(lock.read_text().replace(sha256(wheels["1.0"]), "0" * 64))
    line = refused(checkout.setup())
    assert line == (
        "uv could not install docker/cuda.lock: Failed to download `tinypkg==1.0`: Hash mismatch for `tinypkg==1.0`. "
        "It is another file than the one that the lock was made with: do not use it before you know why."
    )
    assert not checkout.mark.exists()


def test_package_that_the_index_lacks(checkout: Checkout) -> None:
    (checkout.path / "docker" / "cuda.lock").write_text(f"tinypkg==3.0 \\\n    --hash=sha256:{'0' * 64}\n")
    line = refused(checkout.setup())
    assert "no version of tinypkg==3.0" in line
    assert line.endswith(" Set PIP_INDEX_URL to an index that has it.")


def test_package_without_a_wheel_for_this_python(checkout: Checkout) -> None:
    wheel = make_wheel(checkout.path.parent / "more wheels", "oldpkg", "1.0", "cp36-cp36m-manylinux1_x86_64")
    checkout.index.add(wheel)
    checkout.lock("cuda", wheel)
    line = refused(checkout.setup())
    assert "oldpkg==1.0 has no wheels with a matching Python" in line
    assert line.endswith(" Use another one: make PYTHON=python3.11.")


def test_lock_without_hashes(checkout: Checkout) -> None:
    (checkout.path / "docker" / "cuda.lock").write_text("tinypkg==1.0\n")
    assert "hash" in refused(checkout.setup())


def test_wrong_variant(checkout: Checkout) -> None:
    line = refused(checkout.setup(VARIANT="tpu"), status=2)
    assert line == "VARIANT=tpu is none of cpu, cuda, cuda-vllm."


def test_folder_of_someone_else(checkout: Checkout) -> None:
    checkout.venv.write_text("a file where the folder should be")
    assert str(checkout.venv) in refused(checkout.setup())


def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from tmpfs(tmp_path / "small", "size=1g")


@pytest.fixture
def disk_that_fills(tmp_path: Path) -> Iterator[Path]:
    yield from tmpfs(tmp_path / "filling", "size=20g,nr_inodes=60")  # room to look at, and none for files


def test_too_little_room(small_disk: Path, index: Index, uv: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    checkout = make_checkout(small_disk / "checkout", index, uv, wheels, tmp_path / "home")
    line = refused(checkout.setup())
    assert line.startswith(f"{checkout.path} has 1.1 GB free and the cuda packages need 6.4 GB: ")


def test_full_disk(disk_that_fills: Path, index: Index, uv: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    checkout = make_checkout(disk_that_fills / "checkout", index, uv, wheels, tmp_path / "home")
    line = refused(checkout.setup())
    assert f"The disk of {checkout.venv} or of uv's cache is full" in line
    assert not checkout.mark.exists()


# --- on a terminal ------------------------------------------------------------------------------------------------


def at_a_prompt() -> None:
    """The terminal's Ctrl-C reaches this process; those that run in the background of a script ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_a_terminal(checkout: Checkout, press: bytes = b"") -> tuple[int, str]:
    """Returns the exit status and all that was shown; `press` is typed once the download is under way."""
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [checkout.python, "-m", "install"],
        cwd=checkout.path,
        env={**checkout.environment, **checkout.settings, "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=at_a_prompt,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal ends
        while block := os.read(master, 4096):
            shown += block
            if press and b" of 5.8 GB" in shown:
                os.write(master, press)
                press = b""
    os.close(master)
    return process.wait(60), shown.decode().replace("\r\n", "\n")


def test_progress_is_one_line_on_a_terminal(checkout: Checkout) -> None:
    status, shown = on_a_terminal(checkout)
    assert status == 0, shown
    assert "tinypkg" not in shown
    assert shown.count("\n") == 2
    assert "setup: 0.0 of 5.8 GB" in shown
    assert re.search(r"\r {78}\rsetup: done in \d+ s\n$", shown)


def test_refusal_on_a_terminal(checkout: Checkout, wheels: dict[str, Path]) -> None:
    lock = checkout.path / "docker" / "cuda.lock"
    lock.write_text(lock.read_text().replace(sha256(wheels["1.0"]), "0" * 64))
    status, shown = on_a_terminal(checkout)
    assert status == 3
    assert re.search(r"\r {78}\ruv could not install docker/cuda.lock: [^\r\n]+\n$", shown)


def test_interrupt_on_a_terminal(checkout: Checkout) -> None:
    checkout.index.slow.set()
    status, shown = on_a_terminal(checkout, press=b"\x03")
    assert status == 130, shown
    assert "uv could not" not in shown
    assert "Traceback" not in shown
    assert not checkout.mark.exists()


# --- which variant, and where the CPU torch comes from ------------------------------------------------------------


@pytest.fixture
def cpu_torch(checkout: Checkout, tmp_path: Path) -> Path:
    """A wheelhouse with a torch that is not on the index, and a cpu.lock of it."""
    tag = f"{TAG}-{TAG}-manylinux_2_28_x86_64"
    wheel = make_wheel(tmp_path / "wheel house", "torch", "9.9+cpu", tag, {"torch.py": "version = '9.9+cpu'\n"})
    checkout.lock("cpu", wheel)
    checkout.settings = {"VARIANT": "cpu"}
    return wheel


@pytest.mark.slow
@pytest.mark.parametrize("place", ["TORCH_CPU_LINKS", "relative", "PIP_CONFIG_FILE", "pip.conf", "page"])
def test_finds_the_cpu_torch(place: str, checkout: Checkout, cpu_torch: Path, tmp_path: Path) -> None:
    folder = cpu_torch.parent
    if place != "TORCH_CPU_LINKS":  # pip splits find-links at spaces
        folder = folder.rename(tmp_path / "wheelhouse")
    settings = {}
    if place == "TORCH_CPU_LINKS":
        settings = {"TORCH_CPU_LINKS": str(folder)}
    elif place == "relative":
        settings = {"TORCH_CPU_LINKS": os.path.relpath(folder, checkout.path)}
    elif place == "page":
        folder.rename(checkout.index.folder / "wheelhouse")  # a plain listing: the name is there, quoted, and no hash
        settings = {"TORCH_CPU_LINKS": checkout.index.url.replace("/simple", "/wheelhouse/")}
    elif place == "PIP_CONFIG_FILE":
        (tmp_path / "own.conf").write_text(f"[global]\nfind_links =\n    /nowhere\n    {folder}\n")
        settings = {"PIP_CONFIG_FILE": str(tmp_path / "own.conf")}
    else:
        conf = tmp_path / "home" / ".config" / "pip" / "pip.conf"
        conf.parent.mkdir(parents=True)
        conf.write_text(f"[install]\nfind-links = file://{folder}\n")
        settings = {"PIP_CONFIG_FILE": ""}
    ok(checkout.setup(**settings))
    assert checkout.installed("torch") == "9.9+cpu"
    assert ok(checkout.setup(VARIANT="")) == ""  # the same from now on, wherever the wheel is


@pytest.mark.parametrize("fault", ["another Python", "empty", "no folder"])
def test_links_without_the_wheel(fault: str, checkout: Checkout, cpu_torch: Path) -> None:
    if fault == "no folder":
        cpu_torch.parent.rename(cpu_torch.parent.with_name("elsewhere"))
    elif fault == "another Python":
        cpu_torch.rename(cpu_torch.with_name(cpu_torch.name.replace(TAG, "cp310")))
    else:
        cpu_torch.unlink()
    line = refused(checkout.setup(TORCH_CPU_LINKS=str(cpu_torch.parent)), status=2)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert line == f"TORCH_CPU_LINKS={cpu_torch.parent} holds no torch==9.9+cpu for Python {python}."


def test_links_with_another_wheel(checkout: Checkout, cpu_torch: Path) -> None:
    make_wheel(
        cpu_torch.parent, "torch", "9.9+cpu", cpu_torch.stem.split("cpu-")[1], {"torch.py": "of somebody else\n"}
    )
    assert "Hash mismatch for `torch==9.9+cpu`" in refused(checkout.setup(TORCH_CPU_LINKS=str(cpu_torch.parent)))


def test_cpu_torch_out_of_reach(checkout: Checkout, cpu_torch: Path) -> None:
    line = refused(checkout.setup())
    assert line.startswith("No torch==9.9+cpu on the index, in pip's find-links or at https://download.pytorch.org/")
    assert line.endswith("set TORCH_CPU_LINKS to a folder or URL, or VARIANT=cuda.")
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return  # there, cuda is the first choice, and nothing is printed
    printed = ok(checkout.setup(VARIANT=""))
    assert "/whl/cpu/torch/: installing the CUDA build, which also runs on the CPU\n" in printed
    assert checkout.mark.read_text().endswith("  docker/cuda.lock\n")


# --- small things -------------------------------------------------------------------------------------------------


def make_and_add(checkout: Checkout, name: str) -> Path:
    wheel = make_wheel(checkout.path.parent / "more wheels", name, "1.0")
    checkout.index.add(wheel)
    return wheel


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
