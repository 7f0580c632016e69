"""scripts/launch.py: where a command runs, and the words that it becomes for each engine. No engine is needed here:
its place is taken by a program that prints what it is given; tests/system/test_docker.py runs the real one."""

import csv
import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_install import copy_package

sys.path.insert(0, str(ROOT / "scripts"))

import launch

ENGINE = """#!{python}
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
    names = ("APPTAINERENV_", "HF_")
    print(json.dumps({{"words": words, "environment": {{k: v for k, v in os.environ.items() if k.startswith(names)}}}}))
"""
DIGEST = "sha256:" + "d" * 64


class Checkout:
    """A copy of what the launcher needs, with an engine beside it that says what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout, mine"
        copy_package(self.root)
        for name in ("Makefile", "scripts/launch.py", "docker/cpu.lock", "docker/cuda.lock"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "recipes" / "sft.py").write_text("import sys; print('local', sys.executable, sys.argv[1:])\n")
        self.bin = folder / "bin"
        self.home = folder / "home"
        for place in (self.bin, self.home):
            place.mkdir()
        lock = (ROOT / "docker" / "cpu.lock").read_bytes()
        self.label = f"{hashlib.sha256(lock).hexdigest()}  docker/cpu.lock"
        self.engine("docker")

    def engine(self, name: str, answer: str | None = None, security: str = "[name=seccomp]") -> None:
        answer = f"{DIGEST} {self.label}" if answer is None else answer
        program = self.bin / name
        program.write_text(ENGINE.format(python=sys.executable, answer=answer, security=security))
        program.chmod(0o755)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, self.root / "scripts" / "launch.py", *map(str, words)]
        base = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)}
        return subprocess.run(
            command, cwd=self.root, env={**base, **environment}, capture_output=True, text=True, check=False, timeout=60
        )

    def words(self, *words: str, **environment: str) -> "Given":
        done = self.run(*words, **{"RUNTIME": "docker", **environment})
        assert done.returncode == 0, done.stderr
        return Given(done)


class Given:
    """What the engine was given: the flags of `run`, the image, and the command inside."""

    def __init__(self, done: subprocess.CompletedProcess) -> None:
        said = json.loads(done.stdout)
        self.all, self.environment, self.stderr = said["words"], said["environment"], done.stderr
        image = next(n for n, word in enumerate(self.all) if re.match(r"recipes:|mine:|.*\.sif$|docker://", word))
        self.flags, self.image, self.command = self.all[:image], self.all[image], self.all[image + 1 :]

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


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "my data, all of it" / 'a "b".jsonl'
    file.parent.mkdir()
    file.write_text("{}\n")
    return file


# --- where --------------------------------------------------------------------------------------------------------


def local_venv(checkout: Checkout) -> None:
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    (checkout.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout.root / ".venv" / "lock.sha256").write_text(checkout.label + "\n")


def test_without_docker_it_is_the_venv_and_one_line_says_so(checkout):
    local_venv(checkout)
    (checkout.bin / "docker").unlink()
    done = checkout.run("recipes/sft.py", "--data", "x y", PATH="/nowhere")
    assert done.stdout == f"local {checkout.root}/.venv/bin/python ['--data', 'x y']\n"
    assert done.stderr == "launch: in .venv\n"


def test_with_docker_and_the_image_it_is_the_container_and_no_venv_is_made(checkout):
    given = checkout.words("recipes/sft.py", "--model", "tiny", RUNTIME="")
    assert given.command == ["python", "recipes/sft.py", "--model", "tiny"]
    assert given.image == "recipes:cpu"
    assert given.stderr == f"launch: in docker, recipes:cpu ({DIGEST[:19]})\n"
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("Error: No such image: recipes:cpu", "no image recipes:cpu; `make image VARIANT=cpu` builds it"),
        ("Cannot connect to the Docker daemon", "docker does not answer: Cannot connect to the Docker daemon"),
    ],
)
def test_docker_without_the_image_or_an_answer(answer, why, checkout):
    local_venv(checkout)
    checkout.engine("docker", answer)
    done = checkout.run("recipes/sft.py")
    assert done.returncode == 0
    assert done.stderr.startswith("launch: in .venv: ")
    assert why in done.stderr
    done = checkout.run("recipes/sft.py", RUNTIME="docker")
    assert done.returncode == 3
    assert why in done.stderr
    assert done.stdout == ""


def test_local_is_local_though_the_image_is_there(checkout):
    local_venv(checkout)
    assert checkout.run("recipes/sft.py", RUNTIME="local").stdout.startswith("local")


def test_an_image_of_another_lock_is_refused(checkout):
    with (checkout.root / "docker" / "cpu.lock").open("a") as lock:
        lock.write("# moved\n")
    for runtime in ("", "docker"):
        done = checkout.run("recipes/sft.py", RUNTIME=runtime)
        assert done.returncode == 3
        assert "another docker/cpu.lock" in done.stderr
        assert "make image VARIANT=cpu" in done.stderr


@pytest.mark.parametrize(
    ("runtime", "code", "words"),
    [
        ("dokcer", 2, "RUNTIME=dokcer is none; there is docker"),
        ("podman", 3, "there is no podman here"),
        ("apptainer", 2, "needs IMAGE="),
    ],
)
def test_a_runtime_that_is_not_there(runtime, code, words, checkout):
    done = checkout.run("recipes/sft.py", RUNTIME=runtime, PATH=str(checkout.bin))
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_make_hands_its_variables_on(checkout, data):
    done = subprocess.run(
        ["make", "sft", "RUNTIME=docker", f"DOCKER={checkout.bin}/docker", f"DATA={data}", "DOCKER_LIMITS=", "GPUS=1"],
        cwd=checkout.root, env={"PATH": os.environ["PATH"], "HOME": str(checkout.home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    given = Given(done)
    assert given.command == ["python", "recipes/sft.py", "--data", str(data)]
    assert "--ulimit" not in given.flags
    assert given.values("--gpus") == ['"device=1"']


# --- paths --------------------------------------------------------------------------------------------------------


def test_the_repository_is_read_only_and_outputs_and_caches_are_not(checkout):
    root = str(checkout.root)
    given = checkout.words("recipes/sft.py")
    assert given.mounts == {
        root: (root, False),
        f"{root}/outputs": (f"{root}/outputs", True),
        "/outputs": (f"{root}/outputs", True),
        "/cache": (f"{root}/.cache/container", True),
        f"{checkout.home}/.cache/huggingface": (f"{checkout.home}/.cache/huggingface", True),
    }
    assert given.values("--workdir") == [root]
    assert given.values("--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert {"--read-only", "--rm"} <= set(given.flags)
    assert given.values("--cap-drop") == ["ALL"]
    assert f"IMAGE_DIGEST={DIGEST}" in given.values("--env")


def test_data_and_outputs_keep_their_places_and_have_a_name_besides(checkout, data, tmp_path):
    """What a run records of its data, its base and itself is so true outside, too: a pipeline's stages build on it."""
    out = tmp_path / "big disk" / "runs" / "try 1"
    given = checkout.words("recipes/sft.py", "--data", data, f"--output-dir={out}")
    assert given.command[2:] == ["--data", str(data), f"--output-dir={out}"]
    for inside in (str(data.parent), "/data"):
        assert given.mounts[inside] == (str(data.parent), False)
    for inside in (str(out.parent), "/outputs"):
        assert given.mounts[inside] == (str(out.parent), True)
    assert out.parent.is_dir()  # made by the caller, not by the engine as root
    assert not out.exists()


def test_data_beside_the_output_is_writable_there(checkout, data):
    words = [["--output-dir", data.parent / "run"], ["--data", data]]
    for first, second in (words, words[::-1]):
        given = checkout.words("recipes/sft.py", *first, *second)
        assert given.mounts[str(data.parent)] == (str(data.parent), True)
        assert given.mounts["/data"] == (str(data.parent), False)


def test_a_folder_of_data_is_data_itself(checkout, data):
    given = checkout.words("recipes/sft.py", "--data", data.parent)
    assert given.command[2:] == ["--data", str(data.parent)]
    assert given.mounts["/data"] == (str(data.parent), False)


def test_the_arguments_of_a_stage_are_a_command_line_too(checkout, data, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "my rules.py").write_text("")
    words = f"--rewards math '{tmp_path}/t/my rules.py:shorter=0.1'"
    given = checkout.words("scripts/pipeline.py", f"--grpo-args={words}", f"--sft-data={data}")
    assert given.command[2:] == [f"--grpo-args={words}", f"--sft-data={data}"]
    assert given.mounts[str(tmp_path / "t")] == (str(tmp_path / "t"), False)
    done = checkout.run("scripts/pipeline.py", "--sft-args=--rewards 'my", RUNTIME="docker")
    assert done.returncode == 2
    assert "No closing quotation" in done.stderr


def test_what_is_in_the_repository_is_there_already(checkout):
    (checkout.root / "my.jsonl").write_text("{}\n")
    (checkout.root / "outputs" / "merged").mkdir(parents=True)
    words = ["--data", "my.jsonl", "--model", "outputs/merged", "--output-dir", "outputs/try"]
    given = checkout.words("recipes/sft.py", *words)
    assert given.command[2:] == words
    assert set(given.mounts) - set(checkout.words("recipes/sft.py").mounts) == {"/data"}
    absolute = checkout.words("recipes/sft.py", "--data", checkout.root / "my.jsonl")
    assert absolute.command[2:] == ["--data", str(checkout.root / "my.jsonl")]


def test_relative_paths_outside(checkout, data):
    given = checkout.words("recipes/sft.py", "--data", os.path.relpath(data, checkout.root), "--output-dir", "../run")
    assert given.command[2:] == ["--data", str(data), "--output-dir", str(checkout.root.parent / "run")]
    assert given.mounts[str(checkout.root.parent)] == (str(checkout.root.parent), True)


def test_other_places_keep_their_names(checkout, tmp_path):
    for name in ("rewards/mine.py", "sets/a.jsonl", "sets/b.csv", "model/config.json", "t/chat.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    words = [
        "--model", f"{tmp_path}/model", "--rewards", "math", f"{tmp_path}/rewards/mine.py:shorter=0.1", "format=0.2",
        f"model:{tmp_path}/model=-1.5", "--eval-data", f"{tmp_path}/sets/a.jsonl", f"{tmp_path}/sets/b.csv",
        f"--chat-template-path={tmp_path}/t/chat.jinja", "--columns", "prompt=question",
    ]  # fmt: skip
    given = checkout.words("recipes/grpo.py", *words)
    assert given.command[2:] == words
    for name in ("rewards", "sets", "model", "t"):
        assert given.mounts[str(tmp_path / name)] == (str(tmp_path / name), False)
    assert len(given.mounts) == len(checkout.words("recipes/grpo.py").mounts) + 4


def test_an_adapter_comes_with_its_run_into_which_it_may_be_merged(checkout, tmp_path):
    run = tmp_path / "runs" / "one"
    (run / "adapter").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    given = checkout.words("scripts/merge.py", "--adapter", run / "adapter")
    assert given.command[2:] == ["--adapter", str(run / "adapter")]
    assert given.mounts[str(run)] == (str(run), True)
    given = checkout.words("recipes/ppo.py", "--reward-model", run)
    assert given.mounts[str(run)] == (str(run), True)


def test_links(checkout, data, tmp_path):
    """A link in the repository, one to a file of another name, and a folder of links as the hub's cache has them."""
    (checkout.root / "my.jsonl").symlink_to(data)
    given = checkout.words("recipes/sft.py", "--data", "my.jsonl")
    link = str(checkout.root / "my.jsonl")
    assert given.command[2:] == ["--data", link]
    assert given.mounts[link] == (str(data), False)

    hub = tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "abc").write_text("{}")
    snapshot = hub / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    given = checkout.words("recipes/sft.py", "--model", snapshot)
    assert given.mounts[str(snapshot)] == (str(snapshot), False)
    assert given.mounts[str(hub / "blobs" / "abc")] == (str(hub / "blobs" / "abc"), False)

    (tmp_path / "short").symlink_to(snapshot)
    assert checkout.words("recipes/sft.py", "--model", tmp_path / "short").command[2:] == ["--model", str(snapshot)]


def test_outputs_may_be_a_link_to_a_bigger_disk(checkout, tmp_path):
    big = tmp_path / "big"
    (big / "merged").mkdir(parents=True)
    (checkout.root / "outputs").symlink_to(big)
    given = checkout.words("recipes/sft.py", "--model", "outputs/merged", "--output-dir", "outputs/try")
    assert given.command[2:] == ["--model", "outputs/merged", "--output-dir", "outputs/try"]
    assert given.mounts[str(big)] == (str(big), True)


def test_a_machine_with_a_data_folder_of_its_own(checkout, monkeypatch):
    """/data inside would hide /data/models."""
    monkeypatch.setattr(os.path, "exists", lambda path: path.startswith(("/data", "/home")))
    monkeypatch.setattr(launch, "make_folder", lambda path: None)
    words = ["recipes/sft.py", "--data", "/home/me/my.jsonl", "--model", "/data/models/m.bin", "--output-dir", "/o/x"]
    mounts = launch.Mounts()
    assert mounts.take(words) == words
    mounts.name()
    named = {inside: outside for outside, inside, _ in mounts.list}
    assert named["/data/models"] == "/data/models"
    assert "/data" not in named
    assert named["/outputs"] == "/o"


def test_a_folder_that_the_image_needs_is_not_hidden(checkout, monkeypatch):
    """A file in /opt goes in by itself, as does one in /tmp, where the container has its own; an output cannot."""
    monkeypatch.setattr(os.path, "exists", lambda path: path.endswith(("mine.py", "my.jsonl", "/opt")))
    monkeypatch.setattr(launch, "make_folder", lambda path: None)
    mounts = launch.Mounts()
    words = ["recipes/grpo.py", "--data", "/tmp/my.jsonl", "--rewards", "/opt/mine.py:shorter"]
    assert mounts.take(words) == words
    assert {("/tmp/my.jsonl", "/tmp/my.jsonl", False), ("/opt/mine.py", "/opt/mine.py", False)} <= set(mounts.list)
    assert not {"/tmp", "/opt"} & {inside for _, inside, _ in mounts.list}
    for words in (["--output-dir", "/opt/run"], ["--model", "/opt"]):
        with pytest.raises(launch.InputError, match="/opt"):
            launch.Mounts().take(words)
    monkeypatch.setattr(launch, "ROOT", "/recipes")
    with pytest.raises(launch.InputError, match="/recipes: the image has a folder of that name"):
        launch.Mounts()


def test_an_output_in_tmp(checkout):
    place = f"/tmp/{checkout.root.parent.name}-run"
    given = checkout.words("recipes/sft.py", "--output-dir", place)
    assert given.command[2:] == ["--output-dir", place]
    assert given.mounts["/tmp"] == ("/tmp", True)
    assert given.values("--tmpfs") == []  # the same place twice would be refused
    assert checkout.words("recipes/sft.py").values("--tmpfs") == ["/tmp:exec"]


@pytest.mark.parametrize("missing", ["no/such.jsonl", "/no/such/folder", "~/nothing.csv", "./gone"])
def test_a_missing_file_is_said_before_the_container_starts(missing, checkout):
    for flag in ("--data", "--sft-data", "--adapter"):
        done = checkout.run("recipes/sft.py", flag, missing, RUNTIME="docker")
        assert done.returncode == 2
        assert done.stderr == f"{flag} {missing}: no such file or folder (from {checkout.root})\n"
        assert done.stdout == ""


def test_what_is_no_path_is_left_alone(checkout):
    words = [
        "--data",
        "org/set",
        "--model",
        "qwen2.5-7b",
        "--system-prompt",
        "/think, then answer",
        "--n",
        "-1",
        "--x=",
    ]
    assert checkout.words("recipes/sft.py", *words).command[2:] == words


def test_an_output_in_the_repository_but_not_in_outputs_is_refused(checkout):
    done = checkout.run("scripts/distill.py", "--output", "mine.jsonl", RUNTIME="docker")
    assert done.returncode == 2
    assert "name a place in outputs/, or outside" in done.stderr
    done = checkout.run("recipes/sft.py", "--output-dir", "/run", RUNTIME="docker")
    assert done.returncode == 2
    assert "such as /run/run" in done.stderr


def test_a_report_is_written_where_it_is_asked_for(checkout):
    given = checkout.words("scripts/check-data.py", "--html", "report.html")
    report = str(checkout.root / "report.html")
    assert given.mounts[report] == (report, True)


# --- settings -----------------------------------------------------------------------------------------------------


def test_a_secret_goes_by_name_and_never_by_value(checkout, tmp_path):
    secrets = {"HF_TOKEN": "hf_51x", "WANDB_API_KEY": "51x2", "HTTPS_PROXY": "http://me:51x3@proxy"}
    given = checkout.words("recipes/sft.py", **secrets)
    assert set(secrets) <= set(given.values("--env"))
    assert "51x" not in " ".join(given.all) + given.stderr
    assert given.environment["HF_TOKEN"] == "hf_51x"  # where the engine takes it from
    (tmp_path / "token").write_text("hf_51x")
    given = checkout.words("recipes/sft.py", HF_TOKEN_PATH=str(tmp_path / "token"))
    assert given.mounts[str(tmp_path / "token")] == (str(tmp_path / "token"), False)
    assert f"HF_TOKEN_PATH={tmp_path}/token" in given.values("--env")
    done = checkout.run("recipes/sft.py", RUNTIME="docker", HF_TOKEN_PATH="/no/token")
    assert done.returncode == 2
    assert "HF_TOKEN_PATH=/no/token: no such file" in done.stderr


def test_settings_go_in_and_the_rest_stays_out(checkout, tmp_path):
    inside = {
        "HF_ENDPOINT": "https://mirror",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_USE_MODELSCOPE": "1",
        "SLURM_JOB_ID": "7",
    }
    outside = {"UNSLOTH_COMPILE_LOCATION": "/x", "PYTHONPATH": "/x", "LD_PRELOAD": "", "AWS_SECRET_ACCESS_KEY": "x"}
    given = checkout.words("recipes/sft.py", **inside, **outside, HF_HOME=str(tmp_path / "hub"))
    assert set(inside) <= set(given.values("--env"))
    assert not {name for value in given.values("--env") for name in [value.partition("=")[0]]} & (
        set(outside) - {"PYTHONPATH"}
    )
    assert f"PYTHONPATH={checkout.root}/recipes" in given.values("--env")
    assert f"HF_HOME={tmp_path}/hub" in given.values("--env")
    assert given.mounts[f"{tmp_path}/hub"] == (f"{tmp_path}/hub", True)


def test_gpus_and_limits(checkout):
    given = checkout.words("recipes/sft.py")
    assert not {"--gpus", "--ulimit"} & set(given.flags)  # there is no GPU, and this image could not use one
    given = checkout.words("recipes/sft.py", GPUS="all")
    assert given.values("--gpus") == ["all"]
    assert given.values("--ulimit") == ["memlock=-1", "stack=67108864"]
    assert given.values("--shm-size") == ["8g"]
    given = checkout.words("recipes/sft.py", GPUS="0,2", DOCKER_LIMITS="", CUDA_VISIBLE_DEVICES="2")
    assert given.values("--gpus") == ['"device=0,2"']  # Docker's own quotes, for it reads the comma otherwise
    assert "--ulimit" not in given.flags
    assert "CUDA_VISIBLE_DEVICES" not in given.values("--env")
    given = checkout.words("recipes/sft.py", CUDA_VISIBLE_DEVICES="2", DOCKER_ARGS="--network none --cpus '2'")
    assert "CUDA_VISIBLE_DEVICES" in given.values("--env")
    assert given.flags[-4:] == ["--network", "none", "--cpus", "2"]


def test_on_a_machine_with_gpus_all_go_in_unless_the_image_cannot_use_them(monkeypatch):
    monkeypatch.delenv("GPUS", raising=False)
    monkeypatch.delenv("VARIANT", raising=False)
    monkeypatch.setattr(launch.installed, "gpu_visible", lambda: True)
    assert launch.wanted_variant() == "cuda"
    assert launch.wanted_gpus(launch.Image("x", variant="cuda")) == "all"
    assert launch.wanted_gpus(launch.Image("of others")) == "all"
    assert launch.wanted_gpus(launch.Image("x", variant="cpu")) == ""


def test_podman(checkout):
    checkout.engine("podman")
    given = checkout.words("recipes/sft.py", RUNTIME="podman", GPUS="0,1")
    assert given.values("--device") == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    assert given.values("--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert ("--userns" in given.flags) == (os.getuid() != 0)
    assert "in podman" in given.stderr


def test_podman_leaves_the_kind_of_digest_out(checkout):
    checkout.engine("podman", f"{'d' * 64} {checkout.label}")
    assert f"IMAGE_DIGEST={DIGEST}" in checkout.words("recipes/sft.py", RUNTIME="podman").values("--env")


def test_a_rootless_engine_maps_its_root_to_the_caller(checkout, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 1234)
    monkeypatch.setenv("DOCKER", str(checkout.bin / "docker"))
    assert launch.caller("docker") == ["--user", "1234:1234"]
    checkout.engine("docker", security="[name=seccomp,profile=builtin name=rootless]")
    assert launch.caller("docker") == ["--user", "0:0"]
    assert launch.caller("podman") == ["--user", "1234:1234", "--userns", "keep-id"]


def test_apptainer(checkout, data, tmp_path):
    """Only the words: no apptainer has run them."""
    checkout.engine("apptainer")
    image = tmp_path / "recipes.sif"
    image.write_text("")
    given = checkout.words(
        "recipes/sft.py", "--data", data, RUNTIME="apptainer", IMAGE=str(image), HF_TOKEN="hf_51x", GPUS="all"
    )
    assert given.flags[:2] == ["exec", "--containall"]
    assert "--nv" in given.flags
    assert given.values("--pwd") == [str(checkout.root)]
    assert given.command == ["python", "recipes/sft.py", "--data", str(data)]
    assert given.mounts["/data"] == (str(data.parent), False)
    assert "hf_51x" not in " ".join(given.all)
    assert given.environment["APPTAINERENV_HF_TOKEN"] == "hf_51x"
    done = checkout.run("recipes/sft.py", RUNTIME="apptainer", IMAGE="no.sif")
    assert done.returncode == 2
    assert "IMAGE=no.sif: no such file" in done.stderr


def on_a_terminal(*words: str, **environment: str) -> str:
    said = []

    def listen(terminal: int) -> bytes:
        said.append(os.read(terminal, 4096))
        return said[-1]

    before = dict(os.environ)
    try:
        os.environ.update(environment)
        pty.spawn(words, listen)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return b"".join(said).decode()


def test_a_terminal_is_handed_on_but_not_to_the_background(checkout):
    """There, an engine that reads from it or sets it up is stopped, and the run with it."""
    assert "--tty" not in checkout.words("recipes/sft.py").flags
    assert "--interactive" in checkout.words("recipes/sft.py").flags  # answers may come by a pipe
    settings = {"PATH": f"{checkout.bin}:/usr/bin:/bin", "HOME": str(checkout.home), "RUNTIME": "docker"}
    command = f"'{sys.executable}' '{checkout.root}/scripts/launch.py' recipes/sft.py"
    said = on_a_terminal("sh", "-c", command, **settings)
    assert '"--interactive", "--tty"' in said
    said = on_a_terminal("bash", "-c", f"set -m; {command} & wait", **settings)
    assert '"run", "--rm", "--user"' in said


def test_a_shell(checkout):
    assert checkout.words("bash", "-c", "echo 1").command == ["bash", "-c", "echo 1"]
    local_venv(checkout)
    done = checkout.run("bash", "-c", "command -v python", RUNTIME="local")
    assert done.stdout == f"{checkout.root}/.venv/bin/python\n"
