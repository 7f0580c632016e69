"""`recipes/ppo.py` still computes, bit for bit, what it computed before its phases were rewritten.

The recipe of that commit is taken from the history and run beside today's, on the same machine: sums of floating-point
numbers differ between processors, so bytes that were recorded elsewhere would prove nothing here.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

BEFORE = "f2f7200"
FLAGS_OF_TODAY = (
    "--critic-init",
    "base",
    "--rollouts",
    "generate",
)  # arguments newer than BEFORE, with the value that its code had built in
RENAMED = {  # metrics: the name then, the name today
    "objective/entropy": "policy/entropy",
    "objective/reward": "objective/rlhf_reward",
    "score/model": "score/reward_model",
    "score/rules": "score/reward_functions",
    "score/normalized": "objective/scores",
    "response/length": "completions/mean_length",
    "response/no_end": "completions/clipped_ratio",
    "value/loss": "loss/value_avg",
    "policy/ratio": "val/ratio",
    "learning_rate": "lr",
    "critic/learning_rate": "critic_lr",
}
# Another quantity today, or a time. `loss` was the policy's, which is compared below.
CHANGED = {"loss", "policy/clip_fraction", "value/clip_fraction", "tokens_per_second", "memory_gib"}
CHANGED |= {"time/generate", "time/reward", "time/advantages", "time/step"}

SMALL = ("--rollout-batch-size", 16, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2)
SMALL += ("--max-steps", 4, "--save-steps", 2, "--critic-warmup-steps", 1, "--max-completion-length", 24)
SMALL += ("--data", ROOT / "data_samples" / "arithmetic-train.jsonl", "--sample-tokens", 8, "--eval-ratio", 0.01)
DIFFERENT = """
def different(completions):
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [sum(map(ord, text)) % 17 / 17 for text in texts]
"""


@pytest.fixture(scope="module")
def recipe_before(tmp_path_factory) -> Path:
    archive = subprocess.run(
        ["git", "archive", BEFORE, "recipes", "data_samples", "docker"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip(f"needs the commit {BEFORE}, which this checkout does not have")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder / "recipes" / "ppo.py"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> Path:
    """The adapter folder of a reward model on the tiny base, with random weights."""
    import torch
    from common.lm.hub import contents, find_model
    from common.lm.scalar_head import new_head, save_head
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    get_peft_model(
        base, LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    ).save_pretrained(folder)
    head = new_head(base.config.hidden_size, "cpu")
    torch.nn.init.normal_(head.weight)
    save_head(head, folder, {"kind": "regression", "base": contents(find_model("tiny")), "mean": 0.0, "std": 1.0})
    return folder


def run(recipe: Path, folder: Path, *flags: object) -> Path:
    command = [sys.executable, recipe, *SMALL, *flags, "--output-dir", folder]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def as_before(recipe: Path, flag: object) -> object:
    """A flag for the recipe before: a reward model knows its base by what that recipe identifies a base with."""
    if not isinstance(flag, Path):
        return flag
    code = "from common.lm.hub import contents, find_model; print(contents(find_model('tiny')))"
    environment = {**os.environ, "PYTHONPATH": str(recipe.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = shutil.copytree(flag, flag.with_name("before"), dirs_exist_ok=True)
    facts = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    (folder / "head.json").write_text(json.dumps({**facts, "base": done.stdout.strip()}), encoding="utf-8")
    return folder


def results(folder: Path) -> dict[str, object]:
    """All that a run computes: weights, metrics, samples and held-out figures."""
    found: dict[str, object] = {
        str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))
    }
    found["metrics"] = read_jsonl(folder / "metrics.jsonl")
    samples = read_jsonl(folder / "samples.jsonl")
    found["samples"] = [{key: row[key] for key in row if key != "mask"} for row in samples]  # newer than BEFORE
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    held_out = [
        [*figures.values()] if isinstance(figures, dict) else figures for figures in record["held_out"].values()
    ]
    return {**found, "held out": held_out, "tokens": record["tokens"]}


@pytest.mark.slow
@pytest.mark.parametrize("scored_by", ["reward functions", "a reward model and a reward function"])
def test_results_are_those_of_the_recipe_before_the_rewrite(recipe_before, reward_model, tmp_path, scored_by):
    (tmp_path / "mine.py").write_text(DIFFERENT, encoding="utf-8")
    if scored_by == "reward functions":
        flags = ("--rewards", "mine.py:different", "format=0.2", "--difficulty", "hard", "--kl-estimator", "k3")
        flags += ("--learning-rate", 0.01, "--max-approx-kl", 0.002)  # too far in some steps, so that those stop early
    else:
        flags = ("--rewards", "mine.py:different=0.5", "--reward-model", reward_model, "--gradient-checkpointing")
    then = results(run(recipe_before, tmp_path / "then", *(as_before(recipe_before, flag) for flag in flags)))
    now = results(run(ROOT / "recipes" / "ppo.py", tmp_path / "now", *flags, *FLAGS_OF_TODAY))
    assert all(row["score/std"] > 0 for row in then["metrics"] if "score/std" in row)
    if scored_by == "reward functions":
        assert any(row.get("policy/stopped") for row in then["metrics"])
    for row_then, row_now in zip(then.pop("metrics"), now.pop("metrics"), strict=True):
        for name in row_then.keys() - CHANGED - ({"objective/kl"} if "k3" in flags else set()):
            assert row_then[name] == row_now[RENAMED.get(name, name)], name
        assert row_then["loss"] == row_now.get("loss/policy_avg", 0.0)
    assert then.keys() == now.keys()
    assert [name for name in then if then[name] != now[name]] == []
