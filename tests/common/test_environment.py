"""The environment of a command: the hub is out of reach unless something comes from there."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import environment
from common.environment import compiled_code, set_variables
from common.lm.hub import find_model
from conftest import ROOT
from fake_hub import serve

LOCAL, ON_HUB = find_model("tiny"), find_model("qwen2.5-7b")
FILES, DATASET = [Path("a.jsonl")], "org/name"


@pytest.mark.parametrize(
    ("models", "sources", "offline"),
    [
        ([], [], "1"),
        ([LOCAL], [FILES], "1"),
        ([LOCAL, LOCAL], [FILES, FILES], "1"),
        ([ON_HUB], [FILES], None),
        ([LOCAL, ON_HUB], [FILES], None),
        ([LOCAL], [FILES, DATASET], None),
    ],
)
def test_requests_are_forbidden_where_everything_is_here(models, sources, offline, monkeypatch):
    with serve({}) as hub:
        monkeypatch.setattr(os, "environ", {"HF_ENDPOINT": hub.url})
        set_variables(models=models, sources=sources)
        assert os.environ.get("HF_HUB_OFFLINE") == offline
        assert len(hub.requests) == (offline is None)  # whether it can be reached: see lm/network.py


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HF_HUB_OFFLINE": "0", "GOMP_SPINCOUNT": "1"})
    set_variables(models=[LOCAL])
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert os.environ["GOMP_SPINCOUNT"] == "1"


@pytest.mark.parametrize(("given", "kept"), [({}, "1"), ({"TORCHINDUCTOR_EMULATE_PRECISION_CASTS": "0"}, "0")])
def test_a_policy_rounds_as_its_reference_policy_does(given, kept, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    set_variables(models=[LOCAL])
    assert os.environ.get("TORCHINDUCTOR_EMULATE_PRECISION_CASTS") == (kept if given else None)
    set_variables(models=[LOCAL], reference=True)
    assert os.environ["TORCHINDUCTOR_EMULATE_PRECISION_CASTS"] == kept


@pytest.mark.slow
def test_torch_reads_whether_to_round_alike():
    command = [sys.executable, "-c", "from torch._inductor import config; print(config.emulate_precision_casts)"]
    environment = {**os.environ, "TORCHINDUCTOR_EMULATE_PRECISION_CASTS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"


COMPILERS = ("UNSLOTH_COMPILE_LOCATION", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def test_compiled_code_is_kept_where_the_image_or_the_user_says(monkeypatch, tmp_path):
    own = str(tmp_path / "own")
    monkeypatch.setattr(os, "environ", {"COMPILED_CODE": str(tmp_path), "TRITON_CACHE_DIR": own})
    set_variables(models=[LOCAL])
    assert os.environ["TRITON_CACHE_DIR"] == own
    folders = [Path(os.environ[name]) for name in COMPILERS if name != "TRITON_CACHE_DIR"]
    assert {folder.parent for folder in folders} == {compiled_code()}
    assert compiled_code().parent == tmp_path


def test_the_image_keeps_compiled_code_in_its_volume():
    words = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").split()
    assert "COMPILED_CODE=/cache/compiled" in words  # the launcher mounts /cache: see test_launcher.py
    assert not [word for word in words if word.startswith(COMPILERS)]  # which would hold for every version and GPU


def test_other_versions_and_other_gpus_have_other_compiled_code(monkeypatch, tmp_path):
    gpus = tmp_path / "0000:01:00.0"
    gpus.mkdir()
    monkeypatch.setattr(environment, "GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folders = [compiled_code()]
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        (gpus / "information").write_text(f"Model: \t\t {gpu}\nIRQ: 12\n")
        folders.append(compiled_code())
        assert folders[-1].name.endswith(gpu.replace(" ", "-"))
    for package in ("torch", "triton", "unsloth", "unsloth_zoo", "trl"):
        with monkeypatch.context() as other:
            real = environment._version
            other.setattr(environment, "_version", lambda name, p=package, r=real: "9.9" if name == p else r(name))
            folders.append(compiled_code())
    assert len({*folders}) == len(folders)
    assert compiled_code() == folders[2]  # and the same have the same
    assert all(re.fullmatch(r"[\w.+-]+", folder.name) for folder in folders)


def test_a_fork_tokenizes_a_batch_after_this_process_has(tokenizer, monkeypatch):
    """Without threads, of which a fork has none: else it would wait for them forever."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    set_variables()
    rows = ["What is two and two?"] * 64

    tokenizer(rows)
    fork = multiprocessing.get_context("fork").Process(target=tokenizer, args=(rows,))
    fork.start()
    fork.join(20)
    ended = fork.exitcode
    fork.kill()
    assert ended == 0
