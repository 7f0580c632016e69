"""Every command of the README is run: as it stands if that takes seconds, else on the tiny model, for two steps."""

import json
import os
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

# What CI runs by itself, or another test with a hub of its own (test_models.py): here only what make would do is seen.
SEEN_ELSEWHERE = {"make test", "make lint", "make lock-check", "make pin MODEL=qwen2.5-7b"}


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [" ".join(map(shlex.quote, shlex.split(line, comments=True))).replace("'", "") for line in lines if line]


def words(command: str) -> list[str]:
    """`make sft DATA=x ARGS=--a b` as make gets it: everything after ARGS= is its value."""
    before, args, value = command.partition(" ARGS=")
    return [*before.split(), *([f"ARGS={value}"] if args else [])]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files the README speaks of: the user's own, and GSM8K as it is published."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "my.jsonl").write_text(json.dumps({"instruction": "Say a.", "output": "a"}) + "\n")
    (folder / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}) + "\n")
    return folder


def make(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300
    )


def test_both_languages_give_the_same_commands():
    assert commands("README.md") == commands("README.zh-CN.md")


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("README.md"))
def test_the_command_runs(command, data, tmp_path, request):
    given = words(command)
    if command in SEEN_ELSEWHERE:
        done = make([given[0], "-n", *given[1:]])
    elif given[1] == "evaluate":
        adapter = request.getfixturevalue("trained")[0] / "adapter"
        heldout = (ROOT / "data_samples" / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "few.jsonl").write_text("".join(heldout[:4]), encoding="utf-8")
        done = make(["make", "evaluate", f"ADAPTER={adapter}", f"DATA={tmp_path / 'few.jsonl'}"])
    elif given[1] == "sft" and "ARGS=--help" not in given:
        given = [re.sub(r"^MODEL=qwen.*", "MODEL=tiny", word) for word in given]
        given = [re.sub(r"^DATA=", f"DATA={data}/", word) for word in given]
        given = [word for word in given if not word.startswith("ARGS=")] + [
            next((word for word in given if word.startswith("ARGS=")), "ARGS=") + " --max-steps 2 --sample-prompts 0"
        ]
        done = make([*given, f"OUT={tmp_path / 'run'}"], WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
        assert (tmp_path / "run" / "run.json").exists(), done.stdout + done.stderr
    else:
        done = make(given)
    assert done.returncode == 0, done.stdout + done.stderr
