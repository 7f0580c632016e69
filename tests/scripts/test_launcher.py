"""scripts/run: where a command runs, and the words that it becomes for each engine. No engine is needed here: its place
is taken by a program that prints what it is given; tests/system/test_docker.py runs the real one."""

import ast
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from checkout import DIGEST, Checkout, Container, given
from common.errors import InputError, MachineError
from conftest import ROOT
from launch import engines, gpus, mounts, where
from launch.commands import COMMANDS
from launch.mounts import Mounts


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "my data, all of it" / 'a "b".jsonl'
    file.parent.mkdir()
    file.write_text("{}\n")
    return file


# --- where ----------------------------------------------------------------------------------------------------------


def test_without_docker_it_is_the_venv_and_no_line_is_printed(checkout):
    checkout.make_venv()
    (checkout.bin / "docker").unlink()
    done = checkout.run("sft", "--data", "x y")
    assert json.loads(done.stdout.removeprefix("given ")) == [f"{checkout.root}/.venv/bin/python", "--data", "x y"]
    assert done.stderr == ""


def test_the_locale_does_not_decide_how_texts_are_read():
    words = [ROOT / "scripts" / "run", "exec", "python", "-c", "import sys; print(sys.flags.utf8_mode)"]
    done = subprocess.run(words, env={**os.environ, "LC_ALL": "C.UTF-8"}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_with_docker_and_the_image_it_is_the_container_and_no_venv_is_made(checkout):
    inside = checkout.container("sft", "--model", "tiny", RUNTIME="")
    assert inside.command == ["python", f"{checkout.root}/recipes/sft.py", "--model", "tiny"]
    assert inside.image == "recipes:cpu"
    assert inside.stderr == f"In docker: recipes:cpu ({DIGEST[:19]})\n"
    assert not (checkout.root / ".venv").exists()


def test_docker_without_the_image_matters_only_where_docker_is_wanted(checkout):
    checkout.make_venv()
    checkout.engine("docker", "Error: No such image: recipes:cpu")
    done = checkout.run("sft")
    assert (done.returncode, done.stderr) == (0, "")
    done = checkout.run("sft", RUNTIME="docker")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "docker has no image recipes:cpu; `make image VARIANT=cpu` builds it.\n"


NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"


def test_docker_without_a_daemon_is_no_news_unless_a_container_is_wanted(checkout):
    checkout.make_venv()
    checkout.engine("docker", NO_DAEMON)
    for done in (checkout.run("sft"), checkout.make("sft"), checkout.run("sft", RUNTIME="local", IMAGE="mine:1")):
        assert (done.returncode, done.stderr) == (0, "")


def test_docker_without_a_daemon_is_an_error_where_docker_is_wanted(checkout):
    checkout.make_venv()
    checkout.engine("docker", NO_DAEMON)
    done = checkout.run("sft", RUNTIME="docker")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"docker does not answer: {NO_DAEMON}\n"


def test_before_there_is_a_venv_one_line_says_why_one_is_made(checkout):
    checkout.engine("docker", NO_DAEMON)
    done = checkout.run("check")
    assert (done.returncode, done.stderr) == (
        0,
        "In .venv, still to be made: docker does not answer; RUNTIME=docker says why.\n",
    )
    (checkout.bin / "docker").unlink()
    assert checkout.run("check").stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value", "answer", "why"),
    [
        ("IMAGE", "mine:1", NO_DAEMON, "docker does not answer"),
        ("IMAGE", "mine:1", "Error: No such image: mine:1", "docker has no image mine:1"),
        ("IMAGE", "mine:1", None, "there is no docker"),
        ("DOCKER_ARGS", "--network none", NO_DAEMON, "docker does not answer"),
        ("DOCKER", "nerdctl", None, "there is no nerdctl"),
    ],
)
def test_a_setting_of_containers_is_not_ignored_in_silence(setting, value, answer, why, checkout):
    checkout.make_venv()
    checkout.engine("docker", answer)
    if answer is None:
        (checkout.bin / "docker").unlink()
    for done in (checkout.make("sft", f"{setting}={value}"), checkout.run("sft", **{setting: value})):
        assert given(done) == []
        assert done.stderr == f"In .venv, without {setting}: {why}; RUNTIME=docker would stop here.\n"
        assert len(done.stderr) <= 90


def test_local_is_local_though_the_image_is_there(checkout):
    checkout.make_venv()
    assert given(checkout.run("sft", RUNTIME="local")) == []


def test_an_image_of_another_lock_is_refused(checkout):
    with (checkout.root / "docker" / "cpu.lock").open("a") as lock:
        lock.write("# moved\n")
    for runtime in ("", "docker"):
        done = checkout.run("sft", RUNTIME=runtime)
        assert done.returncode == 3
        assert "another docker/cpu.lock" in done.stderr
        assert "make image VARIANT=cpu" in done.stderr


@pytest.mark.parametrize(
    ("runtime", "code", "words"),
    [
        ("dokcer", 2, "RUNTIME=dokcer: unknown (did you mean docker?)"),
        ("podman", 3, "there is no podman here"),
        ("apptainer", 2, "needs IMAGE="),
    ],
)
def test_a_runtime_that_is_not_there(runtime, code, words, checkout):
    done = checkout.run("sft", RUNTIME=runtime)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_settings_of_make_and_of_the_environment_are_the_same(checkout, data):
    settings = {"RUNTIME": "docker", "DOCKER": f"{checkout.bin}/docker", "DOCKER_LIMITS": "", "GPUS": "1"}
    visible = {"CUDA_VISIBLE_DEVICES": "1,0"}
    by_make = checkout.make("sft", f"DATA={data}", *(f"{name}={value}" for name, value in settings.items()), **visible)
    assert by_make.returncode == 0, by_make.stderr
    for inside in (Container(by_make), checkout.container("sft", "--data", data, **settings, **visible)):
        assert inside.arguments == ["--data", str(data)]
        assert "--ulimit" not in inside.flags
        assert inside.values("--gpus") == ['"device=1"']


def test_any_folder_will_do_and_its_own_modules_are_not_ours(checkout, tmp_path):
    checkout.make_venv()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("launch", "common", "json"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    (elsewhere / "my.jsonl").write_text("{}\n")
    assert given(checkout.run("sft", "--data", "my.jsonl", cwd=elsewhere, RUNTIME="local")) == ["--data", "my.jsonl"]
    done = checkout.run("sft", "--data", "my.jsonl", cwd=elsewhere, RUNTIME="docker")
    inside = Container(done)
    assert inside.arguments == ["--data", str(elsewhere / "my.jsonl")]
    assert inside.values("--workdir") == [str(elsewhere)]
    assert inside.mounts[f"{elsewhere}/outputs"] == (f"{elsewhere}/outputs", True)
    (tmp_path / "link").symlink_to(checkout.root / "scripts" / "run")
    done = subprocess.run([tmp_path / "link"], env={"PATH": f"{checkout.bin}:/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == 0, done.stderr


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.fields()])
def test_every_text_argument_of_every_command_is_a_known_path_or_none(name):
    """A path that the launcher takes for a plain word is not mounted, and one that is missing is found too late."""
    kinds = mounts.PATHS | mounts.REWARDS | mounts.COMMAND_LINES | mounts.NO_PATH
    texts = [field.name for field in COMMANDS[name].fields() if field.kind in ("str", "Path") and not field.literal]
    assert [text for text in texts if text not in kinds] == []


def test_every_known_path_is_an_argument_of_some_command():
    known = mounts.PATHS | mounts.REWARDS | mounts.COMMAND_LINES | mounts.NO_PATH
    there = {field.name for command in COMMANDS.values() for field in command.fields()}
    assert known <= there
    sets = (mounts.READ, mounts.WRITTEN, mounts.WRITTEN_IN_PLACE, mounts.READ_OR_MADE, mounts.REWARDS)
    sets += (mounts.COMMAND_LINES, mounts.NO_PATH)
    assert sum(map(len, sets)) == len(set.union(*sets)), "an argument of two kinds"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *(("compare", "--judge"), ("preferences", "--strong"), ("preferences", "--weak"), ("merge", "--adapter")),
        ("sft", "--trust-remote-code"),
    ],
)
def test_a_model_that_is_a_folder_is_mounted_wherever_it_is_named(command, flag, checkout, tmp_path):
    """--judge, --strong and --weak were not."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    more = {"compare": ["--a", "tiny", "--b", "tiny"]}.get(command, [])
    inside = checkout.container(command, *more, flag, tmp_path / "models" / "mine")
    assert inside.mounts[str(tmp_path / "models" / "mine")] == (str(tmp_path / "models" / "mine"), False)
    done = checkout.run(command, *more, flag, "/no/such/model", RUNTIME="docker")
    assert done.returncode == 2
    assert f"{flag}=/no/such/model: no such file or folder" in done.stderr


def test_a_checkpoint_of_a_benchmark_is_made_or_read(checkout, tmp_path):
    inside = checkout.container("benchmark", "--checkpoint", tmp_path / "new" / "shape")
    assert inside.mounts[str(tmp_path / "new")] == (str(tmp_path / "new"), True)
    (tmp_path / "old" / "shape").mkdir(parents=True)
    inside = checkout.container("benchmark", "--checkpoint", tmp_path / "old" / "shape")
    assert inside.mounts[str(tmp_path / "old" / "shape")] == (str(tmp_path / "old" / "shape"), False)


def test_the_repository_is_read_only_and_outputs_and_caches_are_not(checkout):
    root = str(checkout.root)
    inside = checkout.container("sft")
    assert inside.mounts == {
        root: (root, False),
        f"{root}/outputs": (f"{root}/outputs", True),
        "/outputs": (f"{root}/outputs", True),
        "/cache": (f"{root}/.cache/container", True),
        f"{checkout.home}/.cache/huggingface": (f"{checkout.home}/.cache/huggingface", True),
    }
    assert inside.values("--workdir") == [root]
    assert inside.values("--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert {"--read-only", "--rm"} <= set(inside.flags)
    assert inside.values("--cap-drop") == ["ALL"]
    assert f"IMAGE_DIGEST={DIGEST}" in inside.values("--env")


def test_data_and_outputs_keep_their_paths_and_have_a_name_besides(checkout, data, tmp_path):
    """So what a run records of its data, its base and itself is true outside, too: a pipeline's stages build on it."""
    out = tmp_path / "big disk" / "runs" / "try 1"
    inside = checkout.container("sft", "--data", data, f"--output-dir={out}")
    assert inside.arguments == ["--data", str(data), f"--output-dir={out}"]
    for place in (str(data.parent), "/data"):
        assert inside.mounts[place] == (str(data.parent), False)
    for place in (str(out.parent), "/outputs"):
        assert inside.mounts[place] == (str(out.parent), True)
    assert out.parent.is_dir()  # made by the caller, not by the engine as root
    assert not out.exists()


def test_data_beside_the_output_is_writable_there(checkout, data):
    words = [["--output-dir", data.parent / "run"], ["--data", data]]
    for first, second in (words, words[::-1]):
        inside = checkout.container("sft", *first, *second)
        assert inside.mounts[str(data.parent)] == (str(data.parent), True)
        assert inside.mounts["/data"] == (str(data.parent), False)


def test_a_folder_of_data_is_data_itself(checkout, data):
    inside = checkout.container("sft", "--data", data.parent)
    assert inside.arguments == ["--data", str(data.parent)]
    assert inside.mounts["/data"] == (str(data.parent), False)


def test_the_arguments_of_a_stage_are_a_command_line_too(checkout, data, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "my rewards.py").write_text("")
    words = f"--rewards math '{tmp_path}/t/my rewards.py:shorter=0.1'"
    inside = checkout.container("pipeline", f"--grpo-args={words}", f"--sft-data={data}")
    assert inside.arguments == [f"--grpo-args={words}", f"--sft-data={data}"]
    assert inside.mounts[str(tmp_path / "t")] == (str(tmp_path / "t"), False)
    done = checkout.run("pipeline", "--sft-args=--rewards 'my", RUNTIME="docker")
    assert done.returncode == 2
    assert "No closing quotation" in done.stderr


def test_what_is_in_the_repository_is_there_already(checkout):
    (checkout.root / "my.jsonl").write_text("{}\n")
    (checkout.root / "outputs" / "merged").mkdir(parents=True)
    words = ["--data", "my.jsonl", "--model", "outputs/merged", "--output-dir", "outputs/try"]
    inside = checkout.container("sft", *words)
    assert inside.arguments == words
    assert set(inside.mounts) - set(checkout.container("sft").mounts) == {"/data"}
    absolute = checkout.container("sft", "--data", checkout.root / "my.jsonl")
    assert absolute.arguments == ["--data", str(checkout.root / "my.jsonl")]


def test_relative_paths_outside(checkout, data):
    relative = os.path.relpath(data, checkout.root)
    inside = checkout.container("sft", "--data", relative, "--output-dir", "../run")
    assert inside.arguments == ["--data", str(data), "--output-dir", str(checkout.root.parent / "run")]
    assert inside.mounts[str(checkout.root.parent)] == (str(checkout.root.parent), True)


def test_other_places_keep_their_names(checkout, tmp_path):
    for name in ("rewards/mine.py", "sets/a.jsonl", "sets/b.csv", "model/config.json", "t/chat.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    words = [
        "--model", f"{tmp_path}/model", "--rewards", "math", f"{tmp_path}/rewards/mine.py:shorter=0.1", "format=0.2",
        f"model:{tmp_path}/model=-1.5", f"--chat-template-path={tmp_path}/t/chat.jinja", "--columns", "prompt=question",
    ]  # fmt: skip
    inside = checkout.container("grpo", *words)
    assert inside.arguments == words
    for name in ("rewards", "model", "t"):
        assert inside.mounts[str(tmp_path / name)] == (str(tmp_path / name), False)
    assert len(inside.mounts) == len(checkout.container("grpo").mounts) + 3
    inside = checkout.container("pipeline", "--eval-data", f"{tmp_path}/sets/a.jsonl", f"{tmp_path}/sets/b.csv")
    assert inside.mounts[str(tmp_path / "sets")] == (str(tmp_path / "sets"), False)


def test_an_adapter_comes_with_its_run_into_which_it_may_be_merged(checkout, tmp_path):
    run = tmp_path / "runs" / "one"
    (run / "adapter").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    inside = checkout.container("merge", "--adapter", run / "adapter")
    assert inside.arguments == ["--adapter", str(run / "adapter")]
    assert inside.mounts[str(run)] == (str(run), True)
    inside = checkout.container("ppo", "--reward-model", run)
    assert inside.mounts[str(run)] == (str(run), True)


def test_a_run_comes_with_what_it_read(checkout, tmp_path):
    for name in ("sets/a.jsonl", "model/config.json", "rewards/mine.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    read = {"model": f"{tmp_path}/model", "data": f"{tmp_path}/sets/a.jsonl", "eval_data": f"{tmp_path}/gone.jsonl"}
    read |= {"rewards": ["math", f"{tmp_path}/rewards/mine.py:shorter=0.1"], "seed": 1, "system_prompt": None}
    for run in (tmp_path / "runs" / "one", checkout.root / "outputs" / "two"):
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"arguments": {name: {"value": read[name]} for name in read}}))
        inside = checkout.container("verify", "--run", run)
        for name in ("sets", "model", "rewards"):
            assert inside.mounts[str(tmp_path / name)] == (str(tmp_path / name), False)
        assert str(tmp_path) not in inside.mounts


def test_links(checkout, data, tmp_path):
    """A link in the repository, one to a file of another name, and a folder of links as the hub's cache has them."""
    (checkout.root / "my.jsonl").symlink_to(data)
    inside = checkout.container("sft", "--data", "my.jsonl")
    link = str(checkout.root / "my.jsonl")
    assert inside.arguments == ["--data", link]
    assert inside.mounts[link] == (str(data), False)

    hub = tmp_path / "hub"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "abc").write_text("{}")
    snapshot = hub / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    inside = checkout.container("sft", "--model", snapshot)
    assert inside.mounts[str(snapshot)] == (str(snapshot), False)
    assert inside.mounts[str(hub / "blobs" / "abc")] == (str(hub / "blobs" / "abc"), False)

    (tmp_path / "short").symlink_to(snapshot)
    assert checkout.container("sft", "--model", tmp_path / "short").arguments == ["--model", str(snapshot)]


def test_a_home_is_resolved_outside(checkout):
    """The home of the container is another one."""
    for folder in (checkout.home, checkout.root):
        (folder / "my.jsonl").write_text("{}\n")
        inside = checkout.container("sft", "--data", "~/my.jsonl", HOME=str(folder), HF_HOME=str(checkout.home))
        assert inside.arguments == ["--data", f"{folder}/my.jsonl"]


def test_outputs_may_be_a_link_to_a_bigger_disk(checkout, tmp_path):
    big = tmp_path / "big"
    (big / "merged").mkdir(parents=True)
    (checkout.root / "outputs").symlink_to(big)
    inside = checkout.container("sft", "--model", "outputs/merged", "--output-dir", "outputs/try")
    assert inside.arguments == ["--model", "outputs/merged", "--output-dir", "outputs/try"]
    assert inside.mounts[str(big)] == (str(big), True)


def test_a_machine_with_a_data_folder_of_its_own(monkeypatch):
    """/data inside would hide /data/models."""
    monkeypatch.setattr(os.path, "exists", lambda path: path.startswith(("/data", "/home")))
    monkeypatch.setattr(mounts, "make_folder", lambda path: None)
    words = ["--data", "/home/me/my.jsonl", "--model", "/data/models/m.bin", "--output-dir", "/o/x"]
    seen = Mounts()
    assert seen.take(words) == words
    seen.add_aliases()
    named = {inside: outside for outside, inside, _ in seen.list}
    assert named["/data/models"] == "/data/models"
    assert "/data" not in named
    assert named["/outputs"] == "/o"


def test_a_folder_that_the_image_needs_is_not_hidden(monkeypatch):
    """A file in /opt is mounted by itself, as is one in /tmp, where the container has its own; an output cannot be."""
    monkeypatch.setattr(os.path, "exists", lambda path: path.endswith(("mine.py", "my.jsonl", "/opt")))
    monkeypatch.setattr(mounts, "make_folder", lambda path: None)
    seen = Mounts()
    words = ["--data", "/tmp/my.jsonl", "--rewards", "/opt/mine.py:shorter"]
    assert seen.take(words) == words
    assert {("/tmp/my.jsonl", "/tmp/my.jsonl", False), ("/opt/mine.py", "/opt/mine.py", False)} <= set(seen.list)
    assert not {"/tmp", "/opt"} & {inside for _, inside, _ in seen.list}
    for words in (["--output-dir", "/opt/run"], ["--model", "/opt"]):
        with pytest.raises(InputError, match="/opt"):
            Mounts().take(words)
    monkeypatch.setattr(mounts, "ROOT", "/recipes")
    with pytest.raises(InputError, match="/recipes: the image has a folder of that name"):
        Mounts()


def test_an_output_in_tmp(checkout):
    place = f"/tmp/{checkout.root.parent.name}-run"
    inside = checkout.container("sft", "--output-dir", place)
    assert inside.arguments == ["--output-dir", place]
    assert inside.mounts["/tmp"] == ("/tmp", True)
    assert inside.values("--tmpfs") == []  # the same place twice would be refused
    assert checkout.container("sft").values("--tmpfs") == ["/tmp:exec"]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["no/such.jsonl", "/no/such/folder", "~/nothing.csv", "./gone"])
@pytest.mark.parametrize("runtime", ["docker", "local"])
def test_a_missing_file_is_reported_before_anything_starts(missing, runtime, checkout):
    for command, flag in (("sft", "--data"), ("pipeline", "--sft-data"), ("merge", "--adapter")):
        done = checkout.run(command, flag, missing, RUNTIME=runtime)
        assert done.returncode == 2
        assert done.stderr == f"{flag}={missing}: no such file or folder (from {checkout.root})\n"
        assert done.stdout == ""
    assert not (checkout.root / ".venv").exists()


def test_what_is_no_path_is_left_alone(checkout):
    words = ["--data", "org/set", "--model", "qwen2.5-7b", "--system-prompt", "/think, then answer", "--beta", "-1"]
    assert checkout.container("grpo", *words, "--pad-token=").arguments == [*words, "--pad-token="]


def test_an_output_in_the_repository_but_not_in_outputs_is_refused(checkout):
    done = checkout.run("distill", "--output", "mine.jsonl", RUNTIME="docker")
    assert done.returncode == 2
    assert "name a place in outputs/, or outside" in done.stderr
    done = checkout.run("sft", "--output-dir", "/run", RUNTIME="docker")
    assert done.returncode == 2
    assert "such as /run/run" in done.stderr


def test_a_report_is_written_where_it_is_wanted(checkout):
    inside = checkout.container("check-data", "--html", "report.html")
    report = str(checkout.root / "report.html")
    assert inside.mounts[report] == (report, True)


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_secret_is_passed_by_name_and_never_by_value(checkout, tmp_path):
    secrets = {"HF_TOKEN": "hf_51x", "WANDB_API_KEY": "51x2", "HTTPS_PROXY": "http://me:51x3@proxy"}
    inside = checkout.container("sft", **secrets)
    assert set(secrets) <= set(inside.values("--env"))
    assert "51x" not in " ".join(inside.all) + inside.stderr
    assert inside.environment["HF_TOKEN"] == "hf_51x"  # where the engine takes it from
    (tmp_path / "token").write_text("hf_51x")
    inside = checkout.container("sft", HF_TOKEN_PATH=str(tmp_path / "token"))
    assert inside.mounts[str(tmp_path / "token")] == (str(tmp_path / "token"), False)
    assert f"HF_TOKEN_PATH={tmp_path}/token" in inside.values("--env")
    done = checkout.run("sft", RUNTIME="docker", HF_TOKEN_PATH="/no/token")
    assert done.returncode == 2
    assert "HF_TOKEN_PATH=/no/token: no such file" in done.stderr


def test_settings_go_in_and_the_rest_stays_out(checkout, tmp_path):
    wanted = {
        "HF_ENDPOINT": "https://mirror", "HF_HUB_OFFLINE": "1", "UNSLOTH_USE_MODELSCOPE": "1", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    others = {"UNSLOTH_COMPILE_LOCATION": "/x", "PYTHONPATH": "/x", "LD_PRELOAD": "", "AWS_SECRET_ACCESS_KEY": "x"}
    inside = checkout.container("sft", **wanted, **others, HF_HOME=str(tmp_path / "hub"))
    assert set(wanted) <= set(inside.values("--env"))
    assert not {value.partition("=")[0] for value in inside.values("--env")} & (set(others) - {"PYTHONPATH"})
    assert f"PYTHONPATH={checkout.root}/recipes" in inside.values("--env")
    assert f"HF_HOME={tmp_path}/hub" in inside.values("--env")
    assert inside.mounts[f"{tmp_path}/hub"] == (f"{tmp_path}/hub", True)


def test_compose_and_the_batch_script_have_the_settings_of_the_launcher():
    """Shared memory, the time to save a checkpoint, and the variables that hold inside."""
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["x-recipes"]
    assert service["shm_size"] == engines.SHM_SIZE + "b"
    assert service["stop_grace_period"] == f"{engines.STOP_SECONDS // 60}m"
    assert [name for name in service["environment"] if not engines.PASSED.fullmatch(name)] == []
    job = (ROOT / "scripts" / "slurm" / "job.sh").read_text()
    families = re.search(r"grep -E '\^\((.*?)\)_", job)[1].split("|")
    assert [name for name in families if not engines.PASSED.fullmatch(name + "_X")] == []
    submit = ast.parse((ROOT / "scripts" / "slurm" / "submit.py").read_text())
    names = {
        word.value
        for node in submit.body
        if isinstance(node, ast.Assign | ast.AugAssign) and "PASSED" in ast.unparse(node).partition(" ")[0]
        for word in ast.walk(node)
        if isinstance(word, ast.Constant)
    }
    assert len(names) > 10
    assert {name for name in names if not engines.PASSED.fullmatch(name)} == {
        "PATH",
        "LD_LIBRARY_PATH",
        "COMPILED_CODE",
    }


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many GPUs."""

    def of(count: int | None) -> None:
        monkeypatch.setattr(gpus.installed, "gpu_visible", lambda: count != 0)
        monkeypatch.setattr(gpus, "DRIVER", str(tmp_path / "gpus"))
        for index in range(count or 0):
            (tmp_path / "gpus" / str(index)).mkdir(parents=True)
        for name in ("GPUS", "CUDA_VISIBLE_DEVICES", "VARIANT"):
            monkeypatch.delenv(name, raising=False)

    return of


CHOICES = {
    "neither": ({}, None),
    "a number": ({"GPUS": "2"}, ["0", "1"]),
    "none": ({"GPUS": "0"}, []),
    "which": ({"CUDA_VISIBLE_DEVICES": "3,1"}, ["3", "1"]),
    "some of which": ({"GPUS": "1", "CUDA_VISIBLE_DEVICES": "3,1"}, ["3"]),
    "by name": ({"CUDA_VISIBLE_DEVICES": "GPU-1f, GPU-2e"}, ["GPU-1f", "GPU-2e"]),
    "hidden": ({"CUDA_VISIBLE_DEVICES": ""}, []),
    "hidden by number": ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
}


@pytest.mark.parametrize("case", CHOICES)
def test_gpus_is_a_number_and_cuda_visible_devices_which(case, machine, monkeypatch):
    machine(4)
    environment, chosen = CHOICES[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert gpus.chosen_gpus() == chosen


@pytest.mark.parametrize(
    ("there", "environment", "error", "message"),
    [
        (4, {"GPUS": "0,2"}, InputError, "expected how many GPUs; which ones is CUDA_VISIBLE_DEVICES"),
        (4, {"GPUS": "all"}, InputError, "expected how many GPUs"),
        (4, {"GPUS": "8"}, MachineError, "GPUS=8: this machine has 4 NVIDIA GPUs"),
        (1, {"GPUS": "2"}, MachineError, "GPUS=2: this machine has 1 NVIDIA GPU."),
        (0, {"GPUS": "1"}, MachineError, "GPUS=1: this machine has no NVIDIA GPU"),
        (4, {"GPUS": "3", "CUDA_VISIBLE_DEVICES": "3,1"}, InputError, "GPUS=3: CUDA_VISIBLE_DEVICES=3,1 has 2"),
    ],
)
def test_gpus_that_are_not_there(there, environment, error, message, machine, monkeypatch):
    machine(there)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=re.escape(message)):
        gpus.chosen_gpus()


def test_gpus_and_limits_of_a_container(checkout):
    inside = checkout.container("sft")
    assert not {"--gpus", "--ulimit"} & set(inside.flags)  # there is no GPU, and this image could not use one
    assert inside.values("--shm-size") == ["8g"]
    inside = checkout.container("shell", GPUS="2", CUDA_VISIBLE_DEVICES="0,2")
    assert inside.values("--gpus") == ['"device=0,2"']  # Docker's own quotes, for it reads the comma otherwise
    assert inside.values("--ulimit") == ["memlock=-1", "stack=67108864"]
    assert "CUDA_VISIBLE_DEVICES" not in inside.values("--env")  # inside they are counted from 0
    assert inside.stderr.endswith(", GPUs 0,2\n")
    inside = checkout.container("sft", DOCKER_ARGS="--network none --cpus '2'", DOCKER_LIMITS="--ulimit core=0")
    assert inside.flags[-6:] == ["--ulimit", "core=0", "--network", "none", "--cpus", "2"]


def test_on_a_machine_with_gpus_all_go_in_unless_the_image_cannot_use_them(machine, monkeypatch):
    machine(2)
    assert where.wanted_variant() == "cuda"
    assert engines.visible_gpus(where.Image("x", variant="cuda")) == ["all"]
    assert engines.visible_gpus(where.Image("of others")) == ["all"]
    assert engines.visible_gpus(where.Image("x", variant="cpu")) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert engines.visible_gpus(where.Image("x", variant="cuda")) == ["1"]
    assert engines.gpu_words("docker", ["all"]) == ["--gpus", "all"]


def test_several_gpus_are_for_recipes_which_have_a_process_for_each(checkout):
    two = {"GPUS": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    inside = checkout.container("sft", "--model", "tiny", **two)
    root = checkout.root
    assert inside.command == [
        "python", f"{root}/scripts/launch/processes.py", "2", f"{root}/recipes/sft.py", "--model", "tiny",
    ]  # fmt: skip
    done = checkout.run("evaluate", RUNTIME="docker", **two)
    assert done.returncode == 2
    assert done.stderr.startswith("GPUS=2: evaluate runs on one GPU; several are for sft, dpo, kto,")


def test_one_gpu_of_several_for_a_command_in_venv(checkout):
    checkout.make_venv()
    (checkout.root / "recipes" / "dpo.py").write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    done = checkout.run("dpo", RUNTIME="local", GPUS="1", CUDA_VISIBLE_DEVICES="5,6")
    assert done.stdout == "5\n", done.stderr


PROCESSES = ROOT / "scripts" / "launch" / "processes.py"
WORKER = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == str(rank) and int(os.environ["MASTER_PORT"])
print("process", rank, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
{does}
"""


def in_two_processes(folder: Path, does: str) -> list[str]:
    file = folder / "worker.py"
    file.write_text(WORKER.format(does=does))
    return [sys.executable, PROCESSES, "2", file]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "code", "shown"),
    [
        ("", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit(75 if rank else 0)", 75, ""),
        ("sys.exit(2) if rank == 0 else time.sleep(60)", 2, ""),
        ("sys.exit('no GPU') if rank == 1 else time.sleep(60)", 1, "Rank 1 of 2 failed:\nprocess 1\nno GPU\n"),
        (
            "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)",
            137,
            "Rank 1 of 2 was ended by SIGKILL:\nprocess 1\n",
        ),
        ("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(60)", 137, "Rank 0 of 2 was ended by SIGKILL.\n"),
    ],
)
def test_several_processes_end_with_the_code_of_the_first_that_failed(does, code, shown, tmp_path):
    done = subprocess.run(in_two_processes(tmp_path, does), capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout == "process 0\n"
    assert done.stderr == shown


ON_NODE = """
import os, signal, socket, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
print(*(os.environ[name] for name in names), flush=True)
assert os.path.basename(os.path.dirname(os.environ["UNSLOTH_COMPILE_LOCATION"])).startswith("job-7.")
rank = int(os.environ["RANK"])
{does}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "does", "code", "shown"),
    [
        ("0", "sys.exit(75)", 0, ""),  # srun would end the other node
        ("0", "sys.exit(2 if rank == 0 else 0)", 2, "Rank 0 of 4, on n0, failed with exit code 2\n"),
        ("1", "sys.exit('no GPU' if rank == 3 else 0)", 1, "Rank 3 of 4 failed:\n{3}no GPU\n"
         "Rank 3 of 4, on n1, failed with exit code 1: no GPU\n"),
        ("1", "rank == 2 and os.kill(os.getpid(), 9)", 137, "Rank 2 of 4 was ended by SIGKILL:\n{2}"
         "Rank 2 of 4, on n1, was ended by SIGKILL\n"),
        # One that only misses another is not the cause, though it is the first to end.
        ("1", "import time; time.sleep(rank == 3); sys.exit(1 if rank == 3 else 3)", 1, "Rank 3 of 4 failed:\n{3}"
         "Rank 3 of 4, on n1, failed with exit code 1: 3 1 4 2 ::1 20017 lo\n"),
    ],
)  # fmt: skip
def test_on_each_of_several_nodes_its_ranks_are_started_and_the_one_that_failed_is_named(
    node, does, code, shown, tmp_path
):
    (tmp_path / "worker.py").write_text(ON_NODE.format(does=does))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": node, "SLURMD_NODENAME": f"n{node}"}
    command = [sys.executable, PROCESSES, "--master-addr=::1", "--master-port=20017", "2", tmp_path / "worker.py"]
    environment = {**os.environ, **slurm, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = {rank: f"{rank} {rank % 2} 4 2 ::1 20017 lo\n" for rank in range(4)}
    assert (done.returncode, done.stderr) == (code, shown.format(*lines.values()))
    assert done.stdout == (lines[0] if node == "0" else "")
    assert not list(tmp_path.glob("job-*"))


def test_a_signal_reaches_every_process_once(tmp_path):
    does = f"""
def note(number, frame):
    with open(f"{tmp_path}/{{rank}}", "a") as file:
        file.write(signal.Signals(number).name)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
open(f"{tmp_path}/ready{{rank}}", "w")
while not os.path.exists(f"{tmp_path}/end"):
    time.sleep(0.05)
sys.exit(75)
"""
    process = subprocess.Popen(in_two_processes(tmp_path, does), start_new_session=True, stdout=subprocess.DEVNULL)
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.terminate()
    while not all((tmp_path / f"{rank}").exists() and len((tmp_path / f"{rank}").read_text()) > 12 for rank in (0, 1)):
        time.sleep(0.05)
    (tmp_path / "end").touch()
    assert process.wait(30) == 75
    assert sorted((tmp_path / "0").read_text().split("SIG")) == sorted((tmp_path / "1").read_text().split("SIG"))
    assert (tmp_path / "0").read_text().count("SIG") == 2


# --- engines --------------------------------------------------------------------------------------------------------


def test_podman(checkout):
    checkout.engine("podman")
    inside = checkout.container("sft", RUNTIME="podman", GPUS="2", CUDA_VISIBLE_DEVICES="0,1")
    assert inside.values("--device") == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    assert inside.values("--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert ("--userns" in inside.flags) == (os.getuid() != 0)
    assert "In podman" in inside.stderr


def test_podman_leaves_the_kind_of_digest_out(checkout):
    checkout.engine("podman", f"{'d' * 64} {checkout.label}")
    assert f"IMAGE_DIGEST={DIGEST}" in checkout.container("sft", RUNTIME="podman").values("--env")


def test_a_rootless_engine_maps_its_root_to_the_caller(checkout, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 1234)
    monkeypatch.setenv("DOCKER", str(checkout.bin / "docker"))
    assert engines.caller("docker") == ["--user", "1234:1234"]
    checkout.engine("docker", security="[name=seccomp,profile=builtin name=rootless]")
    assert engines.caller("docker") == ["--user", "0:0"]
    assert engines.caller("podman") == ["--user", "1234:1234", "--userns", "keep-id"]


def test_apptainer(checkout, data, tmp_path):
    """Only the words: no apptainer has run them."""
    checkout.engine("apptainer")
    image = tmp_path / "recipes.sif"
    image.write_text("")
    inside = checkout.container(
        "shell", RUNTIME="apptainer", IMAGE=str(image), HF_TOKEN="hf_51x", GPUS="1", CUDA_VISIBLE_DEVICES="3,2"
    )
    assert inside.flags[:2] == ["exec", "--containall"]
    assert "--nv" in inside.flags
    assert inside.environment["APPTAINERENV_CUDA_VISIBLE_DEVICES"] == "3"
    assert inside.values("--pwd") == [str(checkout.root)]
    assert "hf_51x" not in " ".join(inside.all)
    assert inside.environment["APPTAINERENV_HF_TOKEN"] == "hf_51x"
    inside = checkout.container("sft", "--data", data, RUNTIME="apptainer", IMAGE=str(image), CUDA_VISIBLE_DEVICES="")
    assert inside.arguments == ["--data", str(data)]
    assert inside.mounts["/data"] == (str(data.parent), False)
    assert "--nv" not in inside.flags
    done = checkout.run("sft", RUNTIME="apptainer", IMAGE="no.sif")
    assert done.returncode == 2
    assert "IMAGE=no.sif: no such file" in done.stderr


def on_a_terminal(*words: str, **environment: str) -> str:
    heard = []

    def listen(terminal: int) -> bytes:
        heard.append(os.read(terminal, 4096))
        return heard[-1]

    before = dict(os.environ)
    try:
        os.environ.update(environment)
        pty.spawn(words, listen)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return b"".join(heard).decode()


def test_a_terminal_is_handed_on_but_not_to_the_background(checkout):
    """There, an engine that reads from it or sets it up is stopped, and the run with it."""
    assert "--tty" not in checkout.container("sft").flags
    assert "--interactive" in checkout.container("sft").flags  # answers may come by a pipe
    settings = {"PATH": f"{checkout.bin}:/usr/bin:/bin", "HOME": str(checkout.home), "RUNTIME": "docker"}
    here = f"cd '{checkout.root}'"  # where it makes outputs
    assert '"--interactive", "--tty"' in on_a_terminal("sh", "-c", f"{here}; scripts/run sft", **settings)
    in_background = f"{here}; set -m; scripts/run sft & wait"
    assert '"run", "--rm", "--user"' in on_a_terminal("bash", "-c", in_background, **settings)


def test_a_shell(checkout):
    assert checkout.container("shell", "-c", "echo 1").command == ["bash", "-c", "echo 1"]
    checkout.make_venv()
    done = checkout.run("shell", "-c", "command -v python", RUNTIME="local")
    assert done.stdout == f"{checkout.root}/.venv/bin/python\n"


def test_any_program_where_the_recipes_run(checkout, data):
    """As in a job, whose torchrun has a recipe behind it; --help is the program's."""
    words = ["python", "-m", "torch.distributed.run", "--nnodes=1", f"{checkout.root}/recipes/sft.py", "--data", data]
    inside = checkout.container("exec", *words)
    assert inside.command == list(map(str, words))
    assert inside.mounts["/data"] == (str(data.parent), False)
    assert checkout.container("exec", "python", "--help").command == ["python", "--help"]


# --- scripts/run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75])
def test_the_exit_code_is_the_commands_own(code, checkout):
    checkout.make_venv()
    checkout.stub("sft", code)
    assert checkout.run("sft", RUNTIME="local").returncode == code


@pytest.mark.parametrize("python", ["old", "no-python3"])
def test_one_line_without_a_modern_python(python, checkout):
    old = checkout.bin / "old"
    old.write_text("#!/bin/sh\nexit 1\n")  # sys.version_info < (3, 11)
    old.chmod(0o755)
    for command in ("sft", "slurm-status", "setup", "lock"):
        done = checkout.run(command, PYTHON=python)
        assert done.returncode == 3
        assert len(done.stderr.splitlines()) == 1
        assert "Python 3.11 or newer" in done.stderr
        assert "PYTHON=/path/to/python3.12" in done.stderr


def test_the_python_of_venv_is_taken_where_that_is_whole(checkout):
    checkout.make_venv()
    assert checkout.run("sft", RUNTIME="local", PYTHON="no-python3").returncode == 0
    (checkout.root / ".venv" / "lock.sha256").unlink()  # a set-up that was interrupted
    assert checkout.run("sft", RUNTIME="local", PYTHON="no-python3").returncode == 3


def test_check_runs_before_there_is_a_venv_and_in_a_broken_one(checkout):
    """It tells what stands in the way of one."""
    done = checkout.run("check", "--model", "tiny", RUNTIME="local")
    python, *words = json.loads(done.stdout.removeprefix("given "))
    assert os.path.realpath(python) == os.path.realpath(sys._base_executable)
    assert words == ["--model", "tiny"]
    checkout.make_venv()
    (checkout.root / ".venv" / "lock.sha256").unlink()
    done = checkout.run("check", RUNTIME="local")
    assert json.loads(done.stdout.removeprefix("given ")) == [f"{checkout.root}/.venv/bin/python"]


@pytest.mark.slow
def test_what_needs_no_venv_finds_its_modules_with_the_python_of_one(checkout):
    """`python -m install.lock` did not."""
    checkout.make_venv()
    assert checkout.run("setup").returncode == 0
    assert "No module named" not in checkout.run("lock-check").stderr


def test_a_full_disk_is_one_line(checkout):
    (checkout.root / ".cache").write_text("a file where a folder has to be")
    done = checkout.run("sft", RUNTIME="docker")
    assert done.returncode == 3
    assert done.stderr.endswith("Not a directory\n")
    assert len(done.stderr.splitlines()) == 1


def test_the_launcher_needs_nothing_but_python():
    """It runs before there is a .venv, by a Python without a package of ours."""
    ours = {"common", "launch", "install"}
    for file in [*(ROOT / "scripts" / "launch").glob("*.py"), ROOT / "scripts" / "slurm" / "submit.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names | ours] == [], file


def test_shell_files_are_in_order():
    done = subprocess.run(
        [shutil.which("shellcheck", path=f"{ROOT}/.venv/bin"), ROOT / "scripts" / "run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_command_has_its_file():
    for name, command in COMMANDS.items():
        if command.file:
            assert command.file.exists(), name
