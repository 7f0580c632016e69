"""Real images and containers: an engine, a base image made by debootstrap, and what a user does with them.

They run in CI and by `make test-docker`, as root, with Debian's docker.io, debootstrap, buildah and docker-compose; in
CI one that is missing is a failure, elsewhere the tests are skipped. `TEST_DOCKER=cuda make test-docker` builds that
image and looks at what can be seen of it without a GPU. Nothing is left of them but the bridge that dockerd makes.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, adapter_bytes, read_jsonl, run_recipe

sys.path.insert(0, str(ROOT / "scripts"))

from install.installed import lock_mark

VARIANT = os.environ.get("TEST_DOCKER", "")
USER = 1234  # has no entry in any passwd
AS_USER = {"user": USER, "group": USER, "extra_groups": []}
STEPS = "--max-steps 3 --sample-prompts 0"
MORE_STEPS = "--max-steps 12 --logging-steps 1 --sample-prompts 0"
LOCKED_DOWN = "--network none --read-only --cap-drop ALL"
CPU_GB = 3.2

pytestmark = [
    pytest.mark.skipif(not VARIANT, reason="`make test-docker` runs these, and CI"),
    pytest.mark.timeout(1800),
]
on_cpu = pytest.mark.skipif(VARIANT not in ("", "cpu"), reason="the image of VARIANT=cpu trains")


def need(condition: object, what: str) -> None:
    if not condition:
        (pytest.fail if "CI" in os.environ else pytest.skip)(what)


def run(*words: object, seconds: int = 300, **more: object) -> subprocess.CompletedProcess:
    more = {"stdin": subprocess.DEVNULL, "timeout": seconds, **more}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **more)


def output(*words: object, **more: object) -> str:
    done = run(*words, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- an engine, a base, an image ----------------------------------------------------------------------------------


@dataclass
class Engine:
    docker: str
    environment: dict[str, str]
    disk: Path

    def __call__(self, *words: object, **more: object) -> str:
        return output(self.docker, *words, env=self.environment, **more)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine of our own, with a socket of its own, so that it sees no image of this machine's and leaves none.

    Its disk is a file, which goes away in one step; an engine makes hundreds of thousands of files, and removing those
    takes minutes on a busy machine. And nothing of it has to survive a power cut.
    """
    need(os.getuid() == 0, "an engine is started by root")
    need(shutil.which("dockerd"), "there is no dockerd: apt-get install docker.io")
    need(shutil.which("mkfs.ext4"), "there is no mkfs.ext4: apt-get install e2fsprogs")
    places = [os.path.join(folder, "docker") for folder in os.environ["PATH"].split(os.pathsep)]
    builds = {"env": {**os.environ, "DOCKER_BUILDKIT": "1"}}
    able = [
        place
        for place in places
        if os.access(place, os.X_OK) and "--secret" in run(place, "build", "--help", **builds).stdout
    ]
    need(able, "no docker on PATH builds with BuildKit")
    with ExitStack() as at_the_end:
        folder = Path(tempfile.mkdtemp(prefix="engine-"))
        at_the_end.callback(shutil.rmtree, folder)
        folder.chmod(0o755)
        socket, log, disk = folder / "docker.sock", folder / "log", folder / "disk"
        disk.mkdir()
        with (folder / "disk.ext4").open("w") as file:
            file.truncate(64 << 30)
        output("mkfs.ext4", "-q", "-O", "^has_journal", file.name)
        mounted = run("mount", "-o", "loop,nobarrier", file.name, disk)
        need(mounted.returncode == 0, "no file can be mounted: " + mounted.stderr)
        at_the_end.callback(output, "umount", disk)
        own = ["--data-root", disk / "docker", "--exec-root", folder / "exec", "--pidfile", folder / "pid"]
        with log.open("w") as messages:
            daemon = subprocess.Popen(["dockerd", "--host", f"unix://{socket}", *own], stdout=messages, stderr=messages)
        at_the_end.callback(daemon.wait, 60)
        at_the_end.callback(daemon.terminate)
        started = Engine(able[0], {**os.environ, "DOCKER_HOST": f"unix://{socket}", "DOCKER": able[0]}, disk)
        for _ in range(60):
            if run(started.docker, "info", env=started.environment).returncode == 0:
                break
            need(daemon.poll() is None, "dockerd does not start: " + log.read_text()[-600:])
            time.sleep(0.5)
        else:
            need(False, "dockerd does not answer: " + log.read_text()[-600:])
        socket.chmod(0o666)  # for a plain user
        yield started


@pytest.fixture(scope="module")
def base(engine) -> str:
    """Debian 12 as debootstrap makes it, in place of debian:bookworm-slim."""
    need(shutil.which("debootstrap"), "there is no debootstrap: apt-get install debootstrap")
    folder = engine.disk / "base"
    output("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", folder, seconds=600)
    for package in (folder / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    archive = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
    command = [engine.docker, "import", "-", "debian:bookworm-slim"]
    subprocess.run(command, stdin=archive.stdout, env=engine.environment, check=True, capture_output=True)
    assert archive.wait() == 0
    return "debian:bookworm-slim"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """The plain user's home. Not in pytest's own folder, which is for its user alone."""
    folder = Path(tempfile.mkdtemp(prefix="recipes-"))
    os.chown(folder, USER, USER)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkout(home) -> Path:
    """The repository as a plain user has cloned it, with no .venv."""
    folder = home / "the recipes"
    output("git", "clone", "--quiet", "--no-checkout", ROOT, folder)
    output("git", "-C", folder, "reset", "--quiet")
    names = output("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    output("chown", "-R", f"{USER}:{USER}", folder)
    return folder


@dataclass
class Image:
    name: str
    seconds: float
    engine: Engine
    checkout: Path

    def make(self, *words: object, seconds: int = 300, **environment: str) -> subprocess.CompletedProcess:
        """make, in the plain user's clone."""
        environment = {**self.environment, **environment}
        return run("make", *words, "RUNTIME=docker", seconds=seconds, cwd=self.checkout, env=environment, **AS_USER)

    @property
    def environment(self) -> dict[str, str]:
        home = {"HOME": str(self.checkout.parent), "IMAGE": self.name, "DOCKER_LIMITS": ""}
        # Bit for bit only with as many threads as the local run has.
        return {**self.engine.environment, **home, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def image(engine, base, checkout) -> Image:
    """What `make image` builds from an empty cache."""
    built = Image(f"recipes:{VARIANT}", 0, engine, checkout)
    start = time.monotonic()
    environment = {**engine.environment, "BASE_IMAGE": base, "VARIANT": VARIANT}
    done = run("make", "image", cwd=ROOT, env=environment, seconds=1700)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    built.seconds = time.monotonic() - start
    return built


@pytest.fixture
def place(home, request) -> Path:
    """A folder of the plain user's, with data of its own."""
    folder = home / request.node.name
    data = folder / "my data"
    data.mkdir(parents=True)
    rows = (ROOT / "data_samples" / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "my.jsonl").write_text("".join(rows[:24]), encoding="utf-8")
    output("chown", "-R", f"{USER}:{USER}", folder)
    return folder


# --- the image ----------------------------------------------------------------------------------------------------


def test_it_is_small(image):
    size = int(image.engine("image", "inspect", "--format", "{{.Size}}", image.name)) / 1e9
    print(f"{image.name}: {size:.2f} GB, built in {image.seconds:.0f} s")  # of a busy machine that time says nothing
    if VARIANT == "cpu":
        assert size <= CPU_GB


def test_it_says_what_it_is_of(image):
    labels = json.loads(image.engine("image", "inspect", "--format", "{{json .Config.Labels}}", image.name))
    assert labels["recipes.lock"] == lock_mark(VARIANT)
    commit = output("git", "-C", ROOT, "rev-parse", "HEAD").strip()
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == commit


def test_nothing_of_ours_and_no_secret_is_in_it(image):
    """No recipe; the base's certificates and not the builder's, which were a secret; not the installer."""
    script = "ls -A /recipes; cat /etc/ssl/certs/ca-certificates.crt | sha256sum; ls /run/secrets /recipes/.cache /uv"
    printed = run(
        image.engine.docker, "run", "--rm", image.name, "sh", "-c", script, env=image.engine.environment
    ).stdout
    assert printed.splitlines()[0] == ".venv"
    bundle = image.engine("run", "--rm", "debian:bookworm-slim", "sha256sum", "/etc/ssl/certs/ca-certificates.crt")
    assert printed.splitlines()[1:] == [f"{bundle.split()[0]}  -"]
    history = image.engine("history", "--no-trunc", image.name)
    assert str(os.environ.get("SSL_CERT_FILE", "no certificate")) not in history.replace("target=/etc/ssl", "")


def test_whoever_runs_it_can_write_where_it_is_to_be_written(image):
    script = "id -u; whoami 2>/dev/null; touch $HOME/x $HF_HOME.x /outputs/x"
    script += "; python -c 'import getpass; print(getpass.getuser())'"
    words = ["run", "--rm", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/outputs:mode=1777"]
    assert image.engine(*words, image.name, "sh", "-c", script).split() == ["1000", "trainer", "trainer"]
    assert image.engine(*words, "--user", "4321:4321", image.name, "sh", "-c", script).split() == ["4321", "trainer"]


def test_the_converter_for_gguf_is_in_it(image):
    converter = "/recipes/.venv/share/llama.cpp/convert_hf_to_gguf.py"
    script = f"python {converter} --print-supported-models 2>&1 | grep Qwen2ForCausalLM"
    assert "Qwen2ForCausalLM" in image.engine("run", "--rm", "--network", "none", image.name, "sh", "-c", script)


# --- make in it ---------------------------------------------------------------------------------------------------


@on_cpu
def test_sft_gives_what_the_local_run_gives_bit_for_bit(image, place):
    data, out = place / "my data" / "my.jsonl", place / "big outputs"
    done = image.make("sft", f"DATA={data}", f"OUT={out / 'run'}", f"ARGS={STEPS}", f"DOCKER_ARGS={LOCKED_DOWN}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"In docker: {image.name} (sha256:" in done.stderr

    local = run_recipe("sft", "--data", data, "--output-dir", place / "local", *STEPS.split(), OMP_NUM_THREADS="1")
    assert local.returncode == 0, local.stderr
    assert adapter_bytes(out / "run") == adapter_bytes(place / "local")

    made = [out, *out.rglob("*")]
    assert len(made) > 10
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(USER, USER)}
    record, here = (json.loads((run / "run.json").read_text()) for run in (out / "run", place / "local"))
    assert record["identity"] == here["identity"]
    assert record["arguments"]["data"]["value"] == str(data)  # what it says is true outside, too
    assert record["code"]["image"] == image.engine("image", "inspect", "--format", "{{.Id}}", image.name).strip()
    assert record["code"]["git"]["commit"] == here["code"]["git"]["commit"]
    assert record["machine"]["host"] == here["machine"]["host"]
    assert not (image.checkout / ".venv").exists()

    again = run_recipe("sft", "--data", data, "--output-dir", out / "run", *STEPS.split())
    assert "finished already" in again.stdout, again.stdout + again.stderr


def stopped_in_its_steps(
    image: Image, metrics: Callable[[], list[Path]], name: str, *words: object, **more: object
) -> str:
    """Start a run in a container called `name`, `docker stop` it in one of its first steps; what it printed."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(list(map(str, words)), **pipes, **more)
    for _ in range(600):
        if any(path.stat().st_size for path in metrics()) or process.poll() is not None:
            break
        time.sleep(0.1)
    image.engine("stop", "--time", 60, name)
    printed = process.communicate(timeout=60)[0]
    assert "SIGTERM: the run stops after this step, with a checkpoint" in printed, printed
    return printed


def steps(metrics: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(metrics) if "loss" in row]


@on_cpu
def test_a_run_in_outputs_is_stopped_resumed_and_merged(image, place):
    """Without OUT, and the data a link in the repository. That is as it was, and merge finds the run by its name."""
    (image.checkout / "link.jsonl").symlink_to(place / "my data" / "my.jsonl")
    status = ["git", "-C", image.checkout, "-c", "safe.directory=*", "status", "--porcelain", "--ignored"]
    before = output(*status).splitlines()
    outputs = image.checkout / "outputs"
    words = ["make", "sft", "RUNTIME=docker", "DATA=link.jsonl", "DOCKER_ARGS=--name stopped", f"ARGS={MORE_STEPS}"]
    of_user = {"cwd": image.checkout, "env": image.environment, **AS_USER}
    printed = stopped_in_its_steps(image, lambda: [*outputs.glob("*/metrics.jsonl")], "stopped", *words, **of_user)
    assert "Error 75" in printed
    (folder,) = outputs.iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    done = run(*words, **of_user)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(folder / "metrics.jsonl") == list(range(1, 13))

    done = image.make("merge", f"ADAPTER=outputs/{folder.name}/adapter")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "merged" / "model.safetensors").exists()
    assert {*output(*status).splitlines()} - {*before} <= {"!! .cache/", "!! outputs/"}


def test_check_says_where_it_is_and_what_is_missing(image):
    done = image.make("check", "ARGS=--json")
    printed = json.loads(done.stdout)
    lines = {line["name"]: line for line in printed["checks"]}
    assert "in Docker" in lines["system"]["found"]
    assert lines["image"]["found"] == image.engine("image", "inspect", "--format", "{{.Id}}", image.name).strip()
    assert lines["lock"]["found"].startswith(f"docker/{VARIANT}.lock")
    assert "Python.h" in lines["compiler"]["found"]
    assert not lines["compiler"]["found"].endswith("not needed without a GPU")
    assert lines["gpu"]["status"] == "warning"
    assert [line for line in lines.values() if line["status"] == "failure"] == []
    assert printed["ready"]


def test_a_missing_file_and_a_missing_image_are_reported_first(image):
    done = image.make("sft", "DATA=/no/such.jsonl")
    assert "DATA=/no/such.jsonl: no such file or folder" in done.stderr
    assert "Error 2" in done.stderr
    done = image.make("sft", IMAGE="recipes:none")
    assert "has no image recipes:none; `make image" in done.stderr
    assert "Error 3" in done.stderr


@pytest.mark.parametrize("way", ["ctrl-c", "make", "docker stop"])
def test_signals_reach_the_command(way, image):
    """A command that ends by itself, and prints so, when a signal tells it to."""
    script = "trap 'echo told; exit 7' INT TERM; echo started; sleep 60 & wait"
    process = subprocess.Popen(
        ["make", "shell", "RUNTIME=docker", "DOCKER_ARGS=--name told", f"ARGS=-c {shlex.quote(script)}"],
        cwd=image.checkout, env=image.environment, start_new_session=True, **AS_USER,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("started") for line in lines)
    if way == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    elif way == "make":
        process.terminate()
    else:
        image.engine("stop", "told")
    printed = list(lines)
    assert "told\n" in printed
    process.wait(30)
    if way != "make":  # which is ended itself, too
        assert "Error 7" in printed[-1]
    assert "told" not in image.engine("ps", "--all", "--format", "{{.Names}}")


# --- the image with the recipes in it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baked(image, base) -> str:
    name = f"recipes:{VARIANT}-baked"
    environment = {**image.engine.environment, "BASE_IMAGE": base, "VARIANT": VARIANT, "IMAGE": name, "BAKE": "1"}
    done = run("make", "image", cwd=ROOT, env=environment, seconds=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    return name


@on_cpu
def test_docker_run_needs_nothing_but_the_image(baked, image, place):
    data, out = place / "my data", place / "out"
    out.mkdir()
    os.chown(out, USER, USER)
    limits = [*LOCKED_DOWN.split(), "--tmpfs", "/tmp:exec", "--env", "OMP_NUM_THREADS=1"]
    words = [
        "run", "--rm", "--name", "baked", *limits, "--user", f"{USER}:{USER}", "-v", f"{data}:/data",
        "-v", f"{out}:/outputs", baked, "make", "sft", "DATA=/data/my.jsonl", f"ARGS={MORE_STEPS}",
    ]  # fmt: skip
    of_engine = {"env": image.engine.environment}
    stopped_in_its_steps(
        image, lambda: [*out.glob("*/metrics.jsonl")], "baked", image.engine.docker, *words, **of_engine
    )
    printed = image.engine(*words)
    (folder,) = out.iterdir()
    assert (folder / "adapter" / "adapter_model.safetensors").exists(), printed
    assert steps(folder / "metrics.jsonl") == list(range(1, 13))
    assert folder.stat().st_uid == USER
    record = json.loads((folder / "run.json").read_text())
    commit = output("git", "-C", ROOT, "rev-parse", "HEAD").strip()
    assert record["code"]["git"]["commit"].removesuffix("-dirty") == commit


def test_a_ctrl_c_reaches_what_make_runs_in_the_container(baked, image):
    """make leaves it to the terminal to tell its command, and `docker run` without one tells make alone."""
    script = "trap 'echo told; exit 7' INT; echo started; sleep 60 & wait"
    command = ["run", "--rm", "--name", "inside", baked, "make", "shell", f"ARGS=-c {shlex.quote(script)}"]
    process = subprocess.Popen(
        [image.engine.docker, *command], env=image.engine.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("started") for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert "told\n" in list(lines)


@on_cpu
def test_compose(baked, image, place):
    need(shutil.which("docker-compose"), "there is no docker-compose: apt-get install docker-compose")
    folder = place / "compose"
    folder.mkdir()
    shutil.copy(ROOT / "compose.yaml", folder)
    (folder / "outputs").mkdir()
    os.chown(folder / "outputs", USER, USER)
    environment = {**image.environment, "IMAGE": baked, "DATA": str(place / "my data"), "OWNER": f"{USER}:{USER}"}
    compose = {"cwd": folder, "env": environment}
    try:
        services = yaml.safe_load(output("docker-compose", "--profile", "cpu", "config", **compose))["services"]
        assert {"train", "tensorboard", "serve"} <= set(services)
        gpus = services["train"].pop("deploy")["resources"]["reservations"]["devices"]
        assert gpus == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
        assert services["train-cpu"].pop("profiles") == ["cpu"]
        assert services["train-cpu"] == services["train"]
        command = ["make", "sft", "MODEL=tiny", "DATA=/data/my.jsonl", f"ARGS={STEPS}"]
        output("docker-compose", "run", "--rm", "train-cpu", *command, **compose)
        (made,) = (folder / "outputs").glob("*/adapter/adapter_model.safetensors")
        assert made.stat().st_uid == USER
        output("docker-compose", "up", "--detach", "tensorboard", **compose)
        ask = ["docker-compose", "exec", "-T", "tensorboard", "python", "-c"]
        ask += ["import urllib.request as u; print(u.urlopen('http://127.0.0.1:6006/data/logdir').read().decode())"]
        for _ in range(40):
            answer = run(*ask, **compose)
            if answer.returncode == 0:
                break
            time.sleep(1)
        assert "/outputs" in answer.stdout, answer.stderr
    finally:
        run("docker-compose", "down", "--volumes", "--timeout", "1", **compose)


# --- the files ----------------------------------------------------------------------------------------------------


def test_hadolint():
    done = run(ROOT / ".venv" / "bin" / "hadolint", ROOT / "docker" / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_nothing_that_the_buildkit_of_2020_cannot_do():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.findall(r"^# *syntax|^[^#].*(?:<<|--link|--checksum|--parents|--network)|^HEALTHCHECK", text, re.M) == []
    assert re.search(r"^ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}$", text, re.M)


def test_what_the_build_sees_is_an_allow_list(checkout):
    """Of files that a user may have beside ours, no builder is sent one."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == {
        "LICENSE", "Makefile", "data_samples", "docker", "env-check.py", "recipes", "scripts",
    }  # fmt: skip


@on_cpu
def test_buildah_builds_the_same_file(engine, base):
    """As far as `converter`: every instruction is parsed, and a stage with packages, files and secrets is made."""
    need(shutil.which("buildah"), "there is no buildah: apt-get install buildah")
    folder = engine.disk / "buildah"
    folder.mkdir()
    image = folder / "base.tar"
    engine("save", "--output", image, base)
    store = ["--root", folder / "store", "--runroot", folder / "run", "--storage-driver", "overlay"]
    secrets = ["--secret", f"id=ca_bundle,src={os.environ['SSL_CERT_FILE']}"] if "SSL_CERT_FILE" in os.environ else []
    try:
        name = output("buildah", *store, "pull", f"docker-archive:{image}").strip()
        command = ["bud", "--isolation=chroot", *secrets, "--build-arg", f"BASE_IMAGE={name}", "--target", "converter"]
        done = run("buildah", *store, *command, "-f", ROOT / "docker" / "Dockerfile", ROOT, seconds=600)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    finally:
        run("buildah", *store, "rmi", "--all", "--force")  # and with them what it has mounted
