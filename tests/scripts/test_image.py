"""install.image: what `make image` and `make pin-base` ask of the engine, for which a program stands in here."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT
from test_install import Index, copy_package, sha256

DOCKER = """#!{python}
import json, os, sys
words = sys.argv[1:]
if words[0] == "build":
    secrets = [word.partition("src=")[2] for word in words if word.startswith("id=")]
    build = {{"words": words, "buildkit": os.environ["DOCKER_BUILDKIT"]}}
    build["secrets"] = {{file: open(file).read() for file in secrets}}
    build["wheels"] = sorted(os.listdir("docker/wheels"))
    json.dump(build, open({record!r}, "w"))
    sys.exit({status})
if words[0] == "pull":
    sys.exit({status})
print({answer!r})
"""
PINNED = re.compile(r"^ARG BASE_IMAGE=(.*)$", re.M)


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root, self.record = folder / "a checkout", folder / "record"
        copy_package(self.root)
        for name in ("cpu.lock", "cuda.lock", "Dockerfile"):
            shutil.copy(ROOT / "docker" / name, self.root / "docker")
        (self.root / "docker" / "wheels").mkdir()
        self.docker = folder / "docker"
        self.answer("1234567890")

    def answer(self, answer: str, status: int = 0) -> None:
        text = DOCKER.format(python=sys.executable, record=str(self.record), answer=answer, status=status)
        self.docker.write_text(text)
        self.docker.chmod(0o755)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """With no setting of this machine's pip, unless it is given."""
        kept = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "PIP_CONFIG_FILE": os.devnull,
            "PYTHONPATH": "recipes:scripts",
        }
        command = [sys.executable, "-m", "install.image", *words]
        environment = {**kept, "DOCKER": str(self.docker), "VARIANT": "cuda", **environment}
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    def build(self, **environment: str) -> dict:
        done = self.run(**environment)
        assert done.returncode == 0, done.stderr
        return json.loads(self.record.read_text())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def arguments(build: dict) -> dict[str, str]:
    return dict(value.partition("=")[::2] for word, value in pairwise(build["words"]) if word == "--build-arg")


def test_what_is_built(checkout):
    build = checkout.build()
    words = build["words"]
    assert words[words.index("--target") + 1] == "mounted"
    assert words[-3:] == ["--tag", "recipes:cuda", str(checkout.root)]
    assert build["buildkit"] == "1"
    sha256 = subprocess.run(
        ["sha256sum", checkout.root / "docker" / "cuda.lock"], capture_output=True, text=True
    ).stdout
    assert arguments(build) == {"VARIANT": "cuda", "LOCK": f"{sha256[:64]}  docker/cuda.lock", "COMMIT": ""}
    assert build["secrets"] == {}


def test_options(checkout):
    given = {"BASE_IMAGE": "mine", "FLASH_ATTN": "1", "GPU_ARCHITECTURES": "9.0", "BAKE": "1", "IMAGE": "hub/me:1"}
    build = checkout.build(**given)
    assert arguments(build).items() >= {"BASE_IMAGE": "mine", "FLASH_ATTN": "1", "GPU_ARCHITECTURES": "9.0"}.items()
    assert "XFORMERS" not in arguments(build)
    assert build["words"][build["words"].index("--target") + 1] == "baked"
    assert build["words"][-2] == "hub/me:1"


def test_the_index_and_its_certificate_go_in_as_secrets(checkout, tmp_path):
    (tmp_path / "ca.pem").write_text("CERTIFICATE")
    build = checkout.build(PIP_INDEX_URL="https://me:51x@index/simple", CA_BUNDLE=str(tmp_path / "ca.pem"))
    assert list(build["secrets"].values()) == ["CERTIFICATE", "[global]\nindex-url = https://me:51x@index/simple\n"]
    assert "51x" not in " ".join(build["words"])
    assert not any(Path(file).exists() for file in build["secrets"] if file != str(tmp_path / "ca.pem"))


def test_wheels_are_lent_and_taken_back(checkout, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a-1-py3-none-any.whl").write_text("")
    (wheels / "notes.txt").write_text("")
    (checkout.root / "docker" / "wheels" / "own.whl").write_text("")
    assert checkout.build(WHEELS=str(wheels))["wheels"] == ["a-1-py3-none-any.whl", "own.whl"]
    assert os.listdir(checkout.root / "docker" / "wheels") == ["own.whl"]
    checkout.answer("", status=1)
    assert checkout.run(WHEELS=str(wheels)).returncode == 3
    assert os.listdir(checkout.root / "docker" / "wheels") == ["own.whl"]


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"VARIANT": "gpu"}, 2, "VARIANT=gpu is none of cpu, cuda, cuda-vllm"),
        ({"VARIANT": "cpu", "XFORMERS": "1"}, 2, "XFORMERS=1 is for VARIANT=cuda"),
        ({"WHEELS": "/no/wheels"}, 2, "WHEELS=/no/wheels: no such folder"),
        ({"CA_BUNDLE": "/no/ca.pem"}, 2, "/no/ca.pem: no such certificate"),
        ({"DOCKER": "no-docker"}, 3, "There is no no-docker here"),
    ],
)
def test_what_cannot_be_built_is_refused(given, code, words, checkout):
    done = checkout.run(**given)
    assert done.returncode == code
    assert words in done.stderr
    assert not checkout.record.exists()


@pytest.mark.parametrize("words", [(), ("pin-base",)])
def test_a_full_disk_is_reported_and_leaves_all_as_it_was(words, checkout, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-1-py3-none-any.whl").write_bytes(bytes(9_000))
    checkout.answer("debian@sha256:" + "a" * 64)
    before = (checkout.root / "docker" / "Dockerfile").read_bytes()
    command = f"ulimit -f 1; exec {sys.executable} -B -m install.image {' '.join(words)}"  # no file beyond 1 KiB
    environment = {
        **os.environ,
        "PYTHONPATH": "recipes:scripts",
        "DOCKER": str(checkout.docker),
        "VARIANT": "cuda",
        "WHEELS": str(tmp_path / "wheels"),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=checkout.root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert (checkout.root / "docker" / "Dockerfile").read_bytes() == before
    assert os.listdir(checkout.root / "docker" / "wheels") == []


def test_pin_base_writes_the_digest_of_the_registry(checkout):
    digest = "sha256:" + "a" * 64
    checkout.answer(f"debian@{digest}")
    done = checkout.run("pin-base")
    assert done.returncode == 0, done.stderr
    before, now = ((place / "docker" / "Dockerfile").read_text() for place in (ROOT, checkout.root))
    assert PINNED.search(now)[1] == f"debian:bookworm-slim@{digest}"
    assert PINNED.sub("", before) == PINNED.sub("", now)
    assert "it was debian:bookworm-slim@sha256:3783" in done.stderr
    assert "as before" in checkout.run("pin-base").stderr


def test_pin_base_without_a_registry_changes_nothing(checkout):
    checkout.answer("", status=1)
    done = checkout.run("pin-base")
    assert done.returncode == 3
    assert "cannot pull debian:bookworm-slim" in done.stderr
    assert (checkout.root / "docker" / "Dockerfile").read_bytes() == (ROOT / "docker" / "Dockerfile").read_bytes()


# --- install.sources ----------------------------------------------------------------------------------------------


@pytest.fixture
def source(checkout, tmp_path):
    """A checkout that pins a source of one file, and an index that has it."""
    shutil.copy(ROOT / "docker" / "sources.txt", checkout.root / "docker")
    (tmp_path / "mine-1.0").mkdir()
    (tmp_path / "mine-1.0" / "setup.py").write_text("print('never run')\n")
    archive = tmp_path / "my_tool-1.0.tar.gz"
    subprocess.run(["tar", "-C", tmp_path, "-czf", archive, "mine-1.0"], check=True)
    index = Index(tmp_path / "index")
    (index.folder / "files").mkdir(parents=True)
    shutil.copy(archive, index.folder / "files")
    page = index.folder / "simple" / "my-tool" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../files/{archive.name}#sha256=0">{archive.name}</a>')
    with (checkout.root / "docker" / "sources.txt").open("a") as sources:
        sources.write(f"my-tool==1.0 --hash=sha256:{sha256(archive)}\n")
    threading.Thread(target=index.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield checkout, index
    index.shutdown()
    index.server_close()


def fetch(checkout, index, folder) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "install.sources", "my-tool", folder]
    environment = {
        "PATH": os.environ["PATH"],
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": index.url,
        "PYTHONPATH": "recipes:scripts",
    }
    return subprocess.run(command, cwd=checkout.root, env=environment, capture_output=True, text=True, timeout=60)


def test_a_source_is_unpacked_and_not_run(source, tmp_path):
    done = fetch(*source, tmp_path / "unpacked")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "unpacked" / "mine-1.0" / "setup.py").exists()


def test_a_source_with_another_hash_is_refused(source, tmp_path):
    checkout, index = source
    with (index.folder / "files" / "my_tool-1.0.tar.gz").open("ab") as archive:
        archive.write(b"more")
    done = fetch(checkout, index, tmp_path / "unpacked")
    assert done.returncode == 3
    assert re.search(
        "/my-tool/ has a source of my-tool 1.0 with sha256 [0-9a-f]{64}, which docker/ does not list", done.stderr
    )
    assert not (tmp_path / "unpacked").exists()


def test_every_source_is_pinned_by_hash():
    lines = (ROOT / "docker" / "sources.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line)] == []
    assert {line.partition("==")[0] for line in pins} == {"llama-cpp-python", "flash-attn", "xformers"}


def test_nvcc_is_of_the_cuda_that_torch_is_of():
    pins = dict(re.findall(r"^([\w-]+)==(\S+) \\$", (ROOT / "docker" / "nvcc.txt").read_text(), re.M))
    runtime = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)\.", (ROOT / "docker" / "cuda.lock").read_text(), re.M)[1]
    assert {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl"} <= set(pins)
    assert {version.rpartition(".")[0] for name, version in pins.items() if name.startswith("nvidia-")} == {runtime}
