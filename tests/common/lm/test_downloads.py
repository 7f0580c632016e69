"""Downloads over a bad network, from a hub on this machine: they end with the right bytes, or with a message.

The hub drops connections, refuses for a time, falls silent, and sends damaged files. Each download is a process of its
own, because huggingface_hub reads its settings when it is imported.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common.errors import MachineError
from common.lm import network
from common.lm.network import tried
from conftest import ROOT, run_recipe
from fake_hub import FakeHub, Repository, serve

MEGABYTE = 2**20
SCRIPT = """
import sys
from common.errors import run_command
from common.lm import network
from common.lm.hub import Model
from common.lm.model_files import download
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2**16  # 10 MB are more than there is here
network.FIRST_WAIT = 0.05
run_command(lambda: download(Model("x", "org/x", None, None, local=False)))
"""
ROWS = [{"prompt": f"What is {number} + 1?", "completion": f"It is {number + 1}."} for number in range(40)]


@pytest.fixture
def hub():
    """A hub with a model whose weights are 3 MB, and a dataset."""
    with serve({"org/rows": ROWS}) as hub:
        hub.models["org/x"] = Repository(private=False)
        hub.models["org/x"].files = {
            "config.json": b'{"model_type": "qwen2"}',
            "model.safetensors": random.Random(0).randbytes(3 * MEGABYTE),
        }
        yield hub


def start(hub: FakeHub, home: Path, **more: str) -> subprocess.Popen:
    environment = {**hub.environment(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1", **more}
    environment["PYTHONPATH"] = str(ROOT / "recipes")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=pipe, stderr=pipe, text=True)


def download(hub: FakeHub, home: Path, **more: str) -> tuple[int, str]:
    process = start(hub, home, **more)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def assert_whole(hub: FakeHub, home: Path) -> None:
    """The snapshot has every byte, and no part is left."""
    folder = home / "hub" / "models--org--x"
    for name, content in hub.models["org/x"].files.items():
        assert (folder / "snapshots" / hub.commit / name).read_bytes() == content, name
    assert list(folder.rglob("*.part")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "lines"),
    [
        ([("drop", MEGABYTE), ("drop", MEGABYTE), ("stall", 3)], []),
        ([(503, 0), ("drop", MEGABYTE), (500, 0)], ["org/x: HfHubHTTPError: ", "; again in 0.05 s"]),
        ([(503, 1), ("drop", 5)], ["; again in 1 s"]),
        ([(429, 1)], []),
        ([("damage", 0)], ["arrived with sha256", "; again in 0.05 s"]),
    ],
    ids=["dropped and silent", "server errors", "retry after", "rate limit", "damaged"],
)
def test_a_download_over_a_bad_network_ends_with_the_right_bytes(hub, tmp_path, faults, lines):
    hub.faults["model.safetensors"] = list(faults)
    code, errors = download(hub, tmp_path)
    assert code == 0, errors
    assert "Traceback" not in errors
    for line in lines:
        assert line in errors
    assert hub.faults["model.safetensors"] == []
    assert_whole(hub, tmp_path)
    if "damage" not in dict(faults):  # no byte was sent twice, but for those of a stalled half that was not read
        assert hub.sent <= 5 * MEGABYTE


@pytest.mark.slow
def test_a_download_whose_process_was_killed_continues_where_it_ended(hub, tmp_path):
    hub.faults["model.safetensors"] = [("stall", 5)]
    process = start(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="30")
    blobs = tmp_path / "hub" / "models--org--x" / "blobs"
    end = time.monotonic() + 60
    while time.monotonic() < end and sum(file.stat().st_size for file in blobs.glob("*.part")) < MEGABYTE:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = blobs.glob("*.part")
    have = part.stat().st_size
    hub.sent = 0
    code, errors = download(hub, tmp_path)
    assert code == 0, errors
    rest = sum(map(len, hub.models["org/x"].files.values())) - have
    assert hub.sent <= rest
    assert_whole(hub, tmp_path)


@pytest.mark.slow
def test_a_hub_that_keeps_failing_is_given_up_after_the_documented_tries(hub, tmp_path):
    hub.faults["model.safetensors"] = [(503, 0)] * 99
    code, errors = download(hub, tmp_path)
    assert code == 3
    assert f"org/x: the download failed {network.DOWNLOADS} times: HfHubHTTPError" in errors
    assert "The same command continues it. Check the network and HF_ENDPOINT" in errors
    assert errors.count("; again in ") == network.DOWNLOADS - 1
    assert "Traceback" not in errors
    hub.faults.clear()
    assert download(hub, tmp_path)[0] == 0
    assert_whole(hub, tmp_path)
    hub.faults["org/x"] = [(429, 0)] * 99
    code, errors = download(hub, tmp_path)  # it is in the cache
    assert (code, errors.count("; again in ")) == (0, 0), errors


READ = """
import sys
from common.errors import run_command
from common.data import rows
from common.lm import network
network.FIRST_WAIT = 0.05
faults = rows.Faults()
run_command(lambda: print(len(list(rows.read_rows("org/rows", faults)))))
"""


@pytest.mark.slow
def test_a_dataset_over_a_bad_network_is_read_whole_and_then_without_a_network(hub, tmp_path):
    hub.faults["train.jsonl"] = [("drop", 100), (503, 0), ("drop", 200), (500, 0)]
    environment = {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT / "recipes")}
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run(
            [sys.executable, "-c", READ], env={**environment, **more}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, f"{len(ROWS)}\n"), done.stderr
        assert "Traceback" not in done.stderr
    assert hub.faults["train.jsonl"] == []


class Refused(Exception):
    """As httpx has it: with the hub's answer."""

    def __init__(self, seconds: str) -> None:
        self.response = type("Answer", (), {"headers": {"Retry-After": seconds}})


def test_waits_grow_and_are_as_long_as_the_hub_wants(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    waits, errors = [], [OSError("a"), Refused("7"), Refused("Wed, 21 Oct"), Refused("99999")]
    monkeypatch.setattr(network.time, "sleep", waits.append)

    def attempt(number: int) -> int:
        if number < len(errors):
            raise OSError("wrapped") from errors[number]
        return number

    assert tried("org/x", attempt, hopeless=lambda _: False) == 4
    assert waits == [2.0, 7.0, 8.0, network.LONGEST_WAIT]
    assert capsys.readouterr().err.count("org/x: OSError: wrapped; again in ") == 4


def test_what_is_hopeless_and_what_is_offline_is_tried_once(monkeypatch):
    tries = []

    def attempt(number: int) -> None:
        tries.append(number)
        raise MachineError("no")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(MachineError):
        tried("x", attempt, hopeless=lambda error: isinstance(error, MachineError))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError):
        tried("x", attempt, hopeless=lambda _: False)
    assert tries == [0, 0]


@pytest.mark.slow
def test_what_is_cached_works_offline_for_training_evaluation_chat_and_export(hub, tmp_path):
    """Model and data of the hub, once fetched: then every command works with the hub gone."""
    tiny = ROOT / "data_samples" / "tiny"
    hub.models["org/x"].files = {file.name: file.read_bytes() for file in tiny.iterdir() if file.is_file()}
    online = {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT / "recipes")}
    for script in (SCRIPT, READ):
        subprocess.run([sys.executable, "-c", script], env=online, check=True)
    offline = {**online, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = tmp_path / "run"
    flags = ("--model", "org/x", "--data", "org/rows", "--sample-prompts", "0", "--eval-ratio", "0.1")
    done = run_recipe("sft", *flags, "--max-steps", "4", "--learning-rate", "5e-3", "--output-dir", str(run), **offline)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert hub.commit in json.dumps(record["matters"])
    for script, *words in (
        ("evaluate", "--run", run, "--no-general"),
        ("chat", "--run", run, "--prompt", "What is 1 + 1?", "--max-new-tokens", "4"),
        ("export", "--run", run, "--format", "merged"),
    ):
        command = [sys.executable, ROOT / "scripts" / f"{script}.py", *map(str, words)]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (script, done.stdout, done.stderr)
    assert (run / "export" / "merged" / "model.safetensors").is_file()
