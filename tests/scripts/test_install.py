"""scripts/install as `make` runs it: real uv, real Python, a lock of one tiny wheel and an index of our own."""

import ast
import base64
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
LOGIN = ("me", "s@cret")


# --- an index, and a checkout with a small lock -------------------------------------------------------------------


class Index(ThreadingHTTPServer):
    """A package index over a folder. /private/… is the same, for LOGIN only; `slow` holds answers back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Pages, directory=str(folder)))
        self.folder = folder
        self.asked: list[str] = []
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
        self.server.asked.append(self.path)
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
    assert all(line.startswith("setup: ") for line in lines), done.stderr
    assert all(line.startswith(("setup: installing ", "setup: fetching ")) for line in lines[:-1]), done.stderr
    return lines[-1]


@pytest.fixture(scope="session")
def uv() -> Path:
    """The pinned uv, from .cache or the real index."""
    code = "from install import environment; environment.settle_network(); print(environment.fetch_uv())"
    return Path(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT / "scripts", text=True).strip())


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    return {version: make_wheel(folder, "tinypkg", version) for version in ("1.0", "2.0")}


@pytest.fixture
def index(tmp_path: Path, wheels: dict[str, Path]) -> Iterator[Index]:
    server = Index(tmp_path / "index")
    for wheel in wheels.values():
        server.add(wheel)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.slow.clear()
    server.shutdown()
    server.server_close()


def make_checkout(path: Path, index: Index, uv: Path, wheels: dict[str, Path], home: Path) -> Checkout:
    (path / "docker").mkdir(parents=True)
    home.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "scripts" / "install", path / "scripts" / "install")
    shutil.copy(ROOT / "docker" / "bootstrap.lock", path / "docker")
    cached = path / ".cache" / uv.parent.name
    cached.mkdir(parents=True)
    (cached / "uv").symlink_to(uv)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(path / "scripts"),
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
    said = ok(checkout.setup())
    assert "installing docker/cuda.lock, 1 packages, 6.5 GB on disk, into " + str(checkout.venv) in said
    assert checkout.installed() == "1.0"
    subprocess.run(["sha256sum", "--check", "--status", checkout.mark], cwd=checkout.path, check=True)

    before = [(file, file.lstat().st_mtime_ns) for file in sorted(checkout.venv.rglob("*"))]
    checkout.index.asked.clear()
    start = time.monotonic()
    assert ok(checkout.setup()) == ""
    assert time.monotonic() - start < 1  # a loaded machine; alone it takes 0.02 s
    assert [(file, file.lstat().st_mtime_ns) for file in sorted(checkout.venv.rglob("*"))] == before
    assert checkout.index.asked == []


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
    wait_for(lambda: any("otherpkg" in path and path.endswith(".whl") for path in checkout.index.asked))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not checkout.mark.exists()
    checkout.index.slow.clear()
    ok(checkout.setup())
    assert checkout.installed("otherpkg") == "1.0"


def test_two_at_once_take_turns(checkout: Checkout) -> None:
    checkout.index.slow.set()
    first = checkout.start()
    wait_for(lambda: any(path.endswith(".whl") for path in checkout.index.asked))
    second = checkout.start()
    assert second.stderr is not None
    assert second.stderr.readline() == "setup: another set-up is at work in this checkout; waiting for it\n"
    checkout.index.slow.clear()
    assert first.wait(60) == 0
    assert second.communicate(timeout=60)[1] == ""  # nothing was left to do
    assert second.returncode == 0
    assert sum(path.endswith(".whl") for path in checkout.index.asked) == 1


def test_uv_left_alone_still_holds_the_lock(checkout: Checkout) -> None:
    checkout.index.slow.set()
    first = checkout.start()
    wait_for(lambda: any(path.endswith(".whl") for path in checkout.index.asked))
    first.kill()  # python only; its uv goes on installing
    second = checkout.start()
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    checkout.index.slow.clear()
    assert second.communicate(timeout=60)[1].endswith("setup: done\n")
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
    return wheel


def test_python_without_pip_and_a_private_index(checkout: Checkout, uv: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    checkout.python = str(tmp_path / "bare" / "bin" / "python")
    fetches_uv_itself(checkout, uv)
    url = checkout.index.url.replace("//", "//me:s%40cret@").replace("/simple", "/private/simple")
    said = ok(checkout.setup(PIP_INDEX_URL=url))
    assert "s%40cret" not in said
    assert checkout.installed() == "1.0"
    asked = [path for path in checkout.index.asked if "/uv" in path]
    checkout.mark.unlink()
    ok(checkout.setup(PIP_INDEX_URL=url))  # uv is kept
    assert [path for path in checkout.index.asked if "/uv" in path] == asked


def test_refuses_a_uv_that_is_not_in_the_lock(checkout: Checkout, uv: Path) -> None:
    fetches_uv_itself(checkout, uv)
    shutil.copy(ROOT / "docker" / "bootstrap.lock", checkout.path / "docker")  # the public one; ours has another hash
    assert "which docker/bootstrap.lock does not list" in refused(checkout.setup())
    assert not list((checkout.path / ".cache").glob("uv-*/uv"))


def test_no_network_for_uv(checkout: Checkout) -> None:
    shutil.rmtree(checkout.path / ".cache")
    line = refused(checkout.setup(PIP_INDEX_URL="http://me:secret@127.0.0.1:9/simple"))
    assert line.startswith("setup: no answer from http://127.0.0.1:9/simple/uv/ ([Errno 111] Connection refused)")
    assert "set PIP_INDEX_URL" in line


# --- refusals -----------------------------------------------------------------------------------------------------


def test_no_network_for_packages(checkout: Checkout) -> None:
    line = refused(checkout.setup(PIP_INDEX_URL="http://me:secret@127.0.0.1:9/simple"))
    assert "no answer from http://127.0.0.1:9/" in line
    assert "secret" not in line
    assert not checkout.mark.exists()


def test_hash_mismatch(checkout: Checkout, wheels: dict[str, Path]) -> None:
    lock = checkout.path / "docker" / "cuda.lock"
    lock.write_text(lock.read_text().replace(sha256(wheels["1.0"]), "0" * 64))
    line = refused(checkout.setup())
    assert "tinypkg==1.0" in line
    assert "docker/cuda.lock" in line
    assert "sha256 differs" in line
    assert not checkout.mark.exists()


def test_package_that_the_index_lacks(checkout: Checkout) -> None:
    (checkout.path / "docker" / "cuda.lock").write_text(f"tinypkg==3.0 \\\n    --hash=sha256:{'0' * 64}\n")
    line = refused(checkout.setup())
    assert line.startswith(f"setup: {checkout.index.url} has no tinypkg==3.0, which docker/cuda.lock lists: ")


def test_package_without_a_wheel_for_this_python(checkout: Checkout) -> None:
    wheel = make_wheel(checkout.path.parent / "more wheels", "oldpkg", "1.0", "cp36-cp36m-manylinux1_x86_64")
    checkout.index.add(wheel)
    checkout.lock("cuda", wheel)
    assert "setup: oldpkg==1.0 of docker/cuda.lock has no wheel for Python 3." in refused(checkout.setup())


def test_lock_without_hashes(checkout: Checkout) -> None:
    (checkout.path / "docker" / "cuda.lock").write_text("tinypkg==1.0\n")
    assert "hash" in refused(checkout.setup())


def test_wrong_variant(checkout: Checkout) -> None:
    line = refused(checkout.setup(VARIANT="tpu"), status=2)
    assert line == "setup: VARIANT=tpu is none of cpu, cuda, cuda-vllm"


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
    yield from tmpfs(tmp_path / "filling", "size=20g,nr_inodes=30")  # room to look at, and none for files


def test_too_little_room(small_disk: Path, index: Index, uv: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    checkout = make_checkout(small_disk / "checkout", index, uv, wheels, tmp_path / "home")
    line = refused(checkout.setup())
    assert line.startswith(f"setup: {checkout.path} has 1.1 GB free and the cuda packages need 6.5 GB: ")


def test_full_disk(disk_that_fills: Path, index: Index, uv: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    checkout = make_checkout(disk_that_fills / "checkout", index, uv, wheels, tmp_path / "home")
    line = refused(checkout.setup())
    assert line.startswith(f"setup: the disk of {checkout.venv} or of uv's cache is full")
    assert not checkout.mark.exists()


def test_old_python(checkout: Checkout) -> None:
    names = [f"python3.{minor}" for minor in range(6, 11)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(name) for name in names] + [str(path) for path in pyenv.glob("3.*/bin/python3")]
    code = "import sys; sys.exit(not (3, 6) <= sys.version_info < (3, 11))"
    works = partial(subprocess.run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    old = [python for python in candidates if python and works([python, "-c", code]).returncode == 0]
    if not old:
        pytest.skip("no Python from 3.6 to 3.10 on this machine")
    for python in old:
        checkout.python = python
        line = refused(checkout.setup())
        assert re.match(r"setup: python3 here is 3\.\d+\.\d+; the recipes need 3\.11 or newer: ", line), python


def test_parses_on_python_3_6() -> None:
    ast.parse((ROOT / "scripts" / "install" / "environment.py").read_text(), feature_version=(3, 6))


# --- on a terminal ------------------------------------------------------------------------------------------------


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
        # As at a prompt; tests that run in the background of a script ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal ends
        while block := os.read(master, 4096):
            shown += block
            if press and b"Preparing packages" in shown:
                os.write(master, press)
                press = b""
    os.close(master)
    return process.wait(60), shown.decode().replace("\r\n", "\n")


def test_progress_shows_on_a_terminal(checkout: Checkout) -> None:
    status, shown = on_a_terminal(checkout)
    assert status == 0, shown
    assert "Preparing packages" in shown
    assert shown.endswith("setup: done\n")


def test_refusal_on_a_terminal(checkout: Checkout, wheels: dict[str, Path]) -> None:
    lock = checkout.path / "docker" / "cuda.lock"
    lock.write_text(lock.read_text().replace(sha256(wheels["1.0"]), "0" * 64))
    status, shown = on_a_terminal(checkout)
    assert status == 3
    assert shown.splitlines()[-1].startswith("setup: tinypkg==1.0 as it is served here is not the file")


def test_interrupt_on_a_terminal(checkout: Checkout) -> None:
    checkout.index.slow.set()
    status, shown = on_a_terminal(checkout, press=b"\x03")
    assert status == 130, shown
    assert "setup: uv could not" not in shown
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


@pytest.mark.parametrize("fault", ["another hash", "another Python", "empty"])
def test_links_without_the_wheel(fault: str, checkout: Checkout, cpu_torch: Path) -> None:
    if fault == "another hash":
        cpu_torch.write_bytes(cpu_torch.read_bytes() + b"\n")
    elif fault == "another Python":
        cpu_torch.rename(cpu_torch.with_name(cpu_torch.name.replace(TAG, "cp310")))
    else:
        cpu_torch.unlink()
    line = refused(checkout.setup(TORCH_CPU_LINKS=str(cpu_torch.parent)), status=2)
    assert line == (
        f"setup: TORCH_CPU_LINKS={cpu_torch.parent} holds no torch 9.9+cpu for {TAG} that docker/cpu.lock knows"
    )


def test_cpu_torch_out_of_reach(checkout: Checkout, cpu_torch: Path) -> None:
    line = refused(checkout.setup())
    assert "the CPU build of torch is not in reach" in line
    assert "VARIANT=cuda" in line
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return  # there, cuda is the first choice, and nothing is to be said
    said = ok(checkout.setup(VARIANT=""))
    assert "installing the CUDA build, which also runs on the CPU; 6.5 GB\n" in said
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
