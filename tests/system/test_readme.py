"""Every command of the README is run: as it stands if that takes seconds, else on the tiny model, for two steps."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, run_recipe

# What CI runs by itself, or another test with a hub of its own (test_models.py): here only what make would do is seen.
SEEN_ELSEWHERE = {
    *("make test", "make lint", "make lock-check", "make pin MODEL=qwen2.5-7b"),
    # test_pipeline.py runs both, with the sample data and with a user's own.
    "make pipeline STAGES=sft,dpo,grpo",
    "make pipeline MODEL=qwen2.5-7b SFT_DATA=my.jsonl DPO_DATA=pairs.jsonl MATH_DATA=gsm8k.jsonl",
    # test_docker.py runs these, with the tiny model and without a GPU.
    *("make image", "make image BAKE=1 IMAGE=recipes:baked", "make shell", "make check RUNTIME=docker"),
    *("make test-docker", "make test-slurm", "make sft MODEL=qwen2.5-7b DATA=/somewhere/my.jsonl OUT=/big/outputs/run"),
    "docker run --rm --gpus all --user $(id -u):$(id -g) -v $PWD/data:/data -v $PWD/outputs:/outputs recipes:baked "
    "make sft MODEL=qwen2.5-7b DATA=/data/my.jsonl",
    "docker compose run --rm train make sft MODEL=qwen2.5-7b DATA=/data/my.jsonl",
}
RECIPES = ("sft", "dpo", "grpo", "reward", "ppo")
# What makes two steps of each quick, besides --max-steps 2.
QUICK = {
    "sft": "--sample-prompts 0",
    "dpo": "--sample-prompts 0",
    "grpo": "--sample-prompts 0 --num-generations 4 --per-device-train-batch-size 8",
    "reward": "",
    "ppo": "--sample-prompts 0 --rollout-batch-size 8 --per-device-train-batch-size 8 --critic-warmup-steps 1",
}


GPU = shutil.which("nvidia-smi") is not None


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [" ".join(map(shlex.quote, shlex.split(line, comments=True))).replace("'", "") for line in lines if line]


def words(command: str) -> list[str]:
    """`make sft DATA=x ARGS=--a b` as make gets it: what follows ARGS= is its value, up to the next variable."""
    target, *variables = re.split(r" (?=[A-Z_]+=)", command)
    return [*target.split(), *variables]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files the README speaks of: the user's own, some problems as GSM8K has them, and the rewards it shows."""
    folder = tmp_path_factory.mktemp("data")
    samples = ROOT / "data_samples"
    (folder / "my.jsonl").write_text(json.dumps({"instruction": "Say a.", "output": "a"}) + "\n")
    problems = [json.loads(line) for line in (samples / "arithmetic.jsonl").read_text().splitlines()[:8]]
    rows = [{"question": row["prompt"], "answer": f"It is so.\n#### {row['answer']}"} for row in problems]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = (samples / "preferences.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(pairs[:16]), encoding="utf-8")
    asked = (samples / "compare.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(asked[:4]), encoding="utf-8")
    scores = (samples / "scores.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "scores.jsonl").write_text("".join(scores[:40]), encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL):
        (name,) = re.findall(r"# (my_\w+\.py)", code)
        (folder / name).write_text(code)
    return folder


@pytest.fixture(scope="module")
def reward_model(merged, data, tmp_path_factory):
    """The run of `make reward` that outputs/reward stands for."""
    folder = tmp_path_factory.mktemp("reward") / "reward"
    done = run_recipe(
        "reward", "--model", merged, "--data", data / "scores.jsonl", "--output-dir", folder, "--max-steps", 2
    )
    assert done.returncode == 0, done.stderr
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
    if command in SEEN_ELSEWHERE or command.startswith("make slurm"):  # those on a cluster, by test_slurm.py
        if given[0] == "make":
            done = make([given[0], "-n", *given[1:]])
            assert done.returncode == 0, done.stdout + done.stderr
        return
    target = given[1]
    if "outputs/merged" in command and target != "merge":
        given = [word.replace("MODEL=outputs/merged", f"MODEL={request.getfixturevalue('merged')}") for word in given]
    if "REWARD=outputs/reward" in given:
        given = [word.replace("outputs/reward", str(request.getfixturevalue("reward_model"))) for word in given]
    if "outputs/try" in command:
        trained, _ = request.getfixturevalue("trained")
        given = [word.replace("outputs/try", str(trained)) for word in given]
    if target in (*RECIPES, "check-data"):
        given = [re.sub(r"^MODEL=qwen.*", "MODEL=tiny", word) for word in given]
    trains = target in RECIPES and "ARGS=--help" not in given
    if trains:
        args = next((word for word in given if word.startswith("ARGS=")), "ARGS=") + f" --max-steps 2 {QUICK[target]}"
        given = [*(word for word in given if not word.startswith(("ARGS=", "OUT="))), args, f"OUT={tmp_path / 'run'}"]
    given = [re.sub(r"^DATA=", f"DATA={data}/", word) for word in given]
    given = [re.sub(r"^OUT=outputs", f"OUT={tmp_path}", word) for word in given]
    given = [re.sub(r"\bmy_(rewards|rules).py", rf"{data}/my_\1.py", word) for word in given]
    given = [word.replace("report.html", f"{tmp_path}/report.html") for word in given]
    if target == "compare":
        given += [f"PROMPTS={data / 'prompts.jsonl'}", f"OUT={tmp_path / 'compared'}"]
    done = make(given, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    if target == "check" and "qwen2.5-7b" in command and not GPU:
        assert "Error 3" in done.stderr, done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
    if trains:
        assert (tmp_path / "run" / "run.json").exists()
    if "report.html" in command:
        assert (tmp_path / "report.html").exists()
    for word in given:
        if word.startswith("OUT="):
            assert (tmp_path / word.removeprefix("OUT=")).exists()
