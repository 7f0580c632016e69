"""Without a network a command says so in seconds, or runs from the cache. The hubs here are real sockets."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from common.errors import MachineError
from common.lm import network
from common.lm.hub import Model
from common.lm.network import cache, check_hub, in_cache, why_unreachable
from conftest import ROOT, run_recipe
from fake_hub import serve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def empty_machine(monkeypatch, tmp_path):
    """A user who has set nothing, with an empty cache; what `check_hub` sets is taken back."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    for name in ("TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE", "UNSLOTH_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(network, "WAIT", 0.0)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has nothing; the paths of the requests to it."""
    with serve({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub.requests


def model(revision: str | None = None) -> Model:
    return Model("tiny", "org/tiny", revision, None, local=False)


def put_into_cache(revision: str = "main") -> Path:
    """The tiny model, as huggingface_hub stores it."""
    folder = cache() / "models--org--tiny"
    files = folder / "snapshots" / COMMIT
    shutil.copytree(ROOT / "data_samples" / "tiny", files)
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text(COMMIT)
    return files


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE") == "1"


def test_a_model_that_is_not_here_and_a_hub_that_is_not_reached_are_named_with_what_helps(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    with pytest.raises(MachineError) as caught:
        check_hub([model()], [])
    message = str(caught.value)
    assert message.startswith(f"org/tiny: not in the cache ({cache()}), and {CLOSED} cannot be reached: ")
    assert "refused" in message
    for cure in ("HF_ENDPOINT to a mirror", "a local directory", "HF_HUB_OFFLINE=1"):
        assert cure in message


def test_a_hub_that_never_answers_is_given_up_after_seconds(monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        assert why_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") is not None
        assert time.monotonic() - start < 60


def test_an_address_that_is_never_found_is_given_up_after_seconds(monkeypatch):
    """The search for the address of a host has no timeout: it may hang for half a minute."""
    over = threading.Event()

    def search(*_, **__):
        over.wait(600)
        raise OSError("no such host")

    monkeypatch.setattr(network, "TIMEOUT", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", search)
    start = time.monotonic()
    try:
        assert why_unreachable("https://huggingface.co") == "no answer in 0 seconds"
        assert time.monotonic() - start < 60
    finally:
        over.set()


def test_any_answer_means_that_the_libraries_may_try(hub):
    check_hub([model()], ["org/data"])
    assert len(hub) == 1
    assert not is_offline()
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ  # a download shows its bars


def test_what_is_in_the_cache_at_a_commit_needs_no_hub(hub):
    put_into_cache()
    check_hub([model(COMMIT)], [])
    assert hub == []
    assert is_offline()


def test_what_is_in_the_cache_at_a_branch_may_have_changed_on_the_hub(hub):
    put_into_cache()
    check_hub([model()], [])
    assert len(hub) == 1
    assert not is_offline()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_without_a_hub_the_cache_is_used_and_a_line_says_so(monkeypatch, capsys):
    put_into_cache()
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    check_hub([model()], ["org/data"])
    assert is_offline()
    line = capsys.readouterr().err
    assert line.startswith(f"{CLOSED} cannot be reached (")
    assert line.endswith("): using the files in the cache.\n")


@pytest.mark.parametrize("variable", network.OFFLINE)
def test_a_user_who_is_offline_on_purpose_waits_for_nothing(monkeypatch, hub, variable):
    monkeypatch.setenv(variable, "1")
    check_hub([model()], ["org/data"])
    assert hub == []


def test_local_models_need_no_hub(hub):
    check_hub([Model("tiny", "/somewhere/tiny", None, None, local=True)], [])
    assert hub == []
    assert is_offline()


def test_a_model_is_in_the_cache_when_all_of_it_is():
    assert not in_cache(model())
    files = put_into_cache()
    assert in_cache(model())
    assert in_cache(model(COMMIT))
    assert not in_cache(model("f" * 40))
    weights = files / "model.safetensors"
    weights.rename(files / "model-00001-of-00002.safetensors")
    (files / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    assert not in_cache(model())
    (files / "model-00002-of-00002.safetensors").touch()
    assert in_cache(model())
    (files / "config.json").unlink()
    assert not in_cache(model())


def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, tmp_path):
    """By the library itself, in a process for each setting, for it reads them when it is imported."""
    script = "from common.lm.network import cache; from huggingface_hub.constants import HF_HUB_CACHE as theirs; "
    script += "print(str(cache()) == theirs)"
    settings = (
        {"HF_HOME": None},
        {"HF_HOME": "/x/$USER"},
        {"HF_HUB_CACHE": "/y"},
        {"HF_HOME": None, "XDG_CACHE_HOME": "/z"},
    )
    for changes in settings:
        environment = {**os.environ, "USER": "me", **{name: value for name, value in changes.items() if value}}
        for name in [name for name, value in changes.items() if value is None]:
            environment.pop(name, None)
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "True\n", (changes, done.stderr)


def run_without_network(*flags: str) -> tuple[int, str, float]:
    """`make sft` with the hub at a closed port, as a user has it: exit code, errors and seconds."""
    start = time.monotonic()
    done = run_recipe("sft", *flags, HF_HUB_OFFLINE="0", HF_ENDPOINT=CLOSED)
    return done.returncode, done.stderr, time.monotonic() - start


def test_a_recipe_refuses_in_seconds_and_writes_nothing(tmp_path):
    code, errors, seconds = run_without_network("--model", "qwen2.5-7b", "--output-dir", str(tmp_path / "run"))
    assert code == 3, errors
    assert "cannot be reached" in errors
    assert len(errors.splitlines()) == 2
    assert seconds < 60  # on an idle machine 4
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_refused_in_seconds_too(tmp_path):
    code, errors, seconds = run_without_network("--data", "org/data", "--output-dir", str(tmp_path / "run"))
    assert code == 3, errors
    assert errors.startswith(f"{CLOSED} cannot be reached (")
    assert "org/data: no file or folder of this name, and the hub gave no dataset" in errors
    assert "Traceback" not in errors
    assert seconds < 60


@pytest.mark.slow
def test_a_recipe_runs_from_the_cache_without_a_network(tmp_path):
    put_into_cache()
    flags = ("--model", "org/tiny", "--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--sample-prompts", "0")
    code, errors, seconds = run_without_network(*flags)
    assert code == 0, errors
    assert "using the files in the cache." in errors
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert seconds < 240  # on an idle machine 20
