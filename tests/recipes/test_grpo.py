"""`recipes/grpo.py` as a user runs it, on the tiny model after SFT. What it gains is shown in test_pipeline.py."""

import json
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import grpo
import pytest
from common.errors import InputError
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe
from fake_hub import serve

pytestmark = pytest.mark.slow
PROBLEMS = (ROOT / "data_samples" / "arithmetic-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
SMALL = ("--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 2, "--num-generations", 4)
FEW = (*SMALL, "--max-steps", 4, "--sample-prompts", 0, "--rewards", "math")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    data = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    data.write_text("".join(PROBLEMS[:32]), encoding="utf-8")
    return data


@pytest.fixture(scope="module")
def whole(merged, few, tmp_path_factory):
    """Four steps of 4 prompts x 4 completions, a checkpoint after each, and the completions that were sampled."""
    folder = tmp_path_factory.mktemp("grpo")
    flags = ("--model", merged, "--data", few, "--save-steps", 1, "--save-total-limit", 9, *FEW)
    recipe = (ROOT / "tests" / "system" / "record_answers.py", folder / "answers.jsonl", ROOT / "recipes" / "grpo.py")
    command = [sys.executable, *recipe, "--output-dir", folder / "run", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "answers.jsonl", flags


def steps(folder):
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def test_loss_gradient_and_reward_are_those_of_a_plain_trl_script(whole, merged, few, tmp_path):
    """On the same completions, step for step; the plain script has its own reward."""
    folder, answers, _ = whole
    command = [sys.executable, ROOT / "tests" / "references" / "plain_grpo.py", merged, few, answers, tmp_path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert plain.returncode == 0, plain.stderr
    theirs = json.loads((tmp_path / "steps.json").read_text())
    ours = [[row["loss"], row["grad_norm"], row["reward"]] for row in steps(folder)]
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-6)
    assert max(gradient for _, gradient, _ in ours) > 1e-3  # so that equal is not equal to nothing (see abs above)


def test_the_log_has_what_the_live_line_shows(whole):
    for row in steps(whole[0]):
        assert {"reward", "rewards/math/mean", "rewards/math/std", "flat", "kl", "entropy"} <= row.keys()
        assert {"completions/mean_length", "completions/clipped_ratio"} <= row.keys()
        assert 0 <= row["flat"] <= 1
        assert row["tokens_per_second"] > 0
    assert steps(whole[0])[0]["kl"] == 0  # the policy begins as the reference
    assert steps(whole[0])[-1]["kl"] > 0


def test_the_kl_that_is_logged_is_the_measured_one_whatever_the_number_of_micro_batches():
    """Without a KL term in the loss, Unsloth on a GPU adds a 0 for each micro-batch to the metric of that name."""

    class Trl:
        def log(self, logs):
            logs.update({name: sum(values) / len(values) for name, values in self._metrics["train"].items()})

    class Trainer(grpo.GroupSampling, Trl):
        def __init__(self, beta, **metrics):
            self.beta, self._metrics = beta, {"train": metrics}

    for beta, metrics, expected in (
        (0.0, {"kl": [0.0, 0.0], "measured_kl": [0.25]}, {"kl": 0.25}),
        (0.0, {"measured_kl": [0.25, 0.75]}, {"kl": 0.5}),
        (0.0, {"kl": [0.0], "reward": [1.0]}, {"reward": 1.0}),  # a second step on the same completions
        (0.05, {"kl": [0.5, 0.25]}, {"kl": 0.375}),
    ):
        logs = {}
        Trainer(beta, **metrics).log(logs)
        assert logs == expected


def test_metrics_of_all_ranks_are_means_of_each_micro_batch_but_for_the_least_and_the_most():
    nan = float("nan")
    ranks = [
        {"kl": [0.25, 0.5], "clip_ratio/low_min": [0.0, nan], "clip_ratio/high_max": [0.5, 0.0], "entropy": [nan, nan]},
        {"kl": [0.75, 0.0], "clip_ratio/low_min": [0.25, 1.0], "clip_ratio/high_max": [0.25, 0.5], "entropy": [nan, 1]},
    ]
    together = grpo.of_all_ranks(ranks)
    assert together["kl"] == [0.5, 0.25]
    assert together["clip_ratio/low_min"] == [0.0, 1.0]
    assert together["clip_ratio/high_max"] == [0.5, 0.5]
    assert together["entropy"] == pytest.approx([nan, 1.0], nan_ok=True)
    assert grpo.of_all_ranks([{"kl": [0.1, 0.7]}]) == {"kl": [0.1, 0.7]}  # of one rank as they are
    assert grpo.of_all_ranks([{}]) == {}


@pytest.mark.usefixtures("warm")
def test_a_run_that_slurm_signalled_ends_as_one_left_alone(whole, tmp_path):
    folder, _, flags = whole
    cut = tmp_path / "cut"
    done = interrupt("SIGUSR1", 2, "grpo", "--output-dir", cut, *flags)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Stopped by SIGUSR1 after step 2 of 4; ")
    done = run_recipe("grpo", "--output-dir", cut, *flags)
    assert done.returncode == 0, done.stderr
    assert [row["reward"] for row in steps(cut)] == [row["reward"] for row in steps(folder)]
    assert adapter_bytes(cut) == adapter_bytes(folder)


@pytest.mark.usefixtures("warm")
def test_difficulty_refill_a_penalty_and_a_reward_of_ones_own(merged, few, tmp_path):
    (tmp_path / "mine.py").write_text("def shorter(texts):\n    return [-len(text) / 100 for text in texts]\n")
    flags = ("--rewards", "math", f"{tmp_path / 'mine.py'}:shorter=0.1", "--difficulty", "auto", "--refill", 2)
    flags += ("--difficulty-prompts", 16, "--beta", 0.05, "--max-steps", 2, "--sample-prompts", 2)
    run = tmp_path / "run"
    done = run_recipe("grpo", "--model", merged, "--data", few, "--output-dir", run, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert " of 16 prompts are auto by pass-rate" in done.stdout
    samples = read_jsonl(run / "samples.jsonl")
    assert len(samples) == 4
    for sample in samples:
        assert sample["rewards"].keys() == {"math", "shorter"}
        assert sample["rewards"]["shorter"] == pytest.approx(-len(sample["completion"]) / 100)
        assert sample["reward"] == pytest.approx(sample["rewards"]["math"] + 0.1 * sample["rewards"]["shorter"])
    assert all(row["flat"] == 0 for row in steps(run))  # with the length in it no group is flat
    assert not list(run.rglob("ref"))


@pytest.mark.usefixtures("warm")
def test_a_group_is_scored_once_and_what_replaces_it_too(merged, few, tmp_path):
    """16 completions a step, and of the flat groups, which become fewer, those in their place."""
    counts = tmp_path / "counts.txt"
    (tmp_path / "mine.py").write_text(
        "def counted(completions):\n"
        f"    with open({str(counts)!r}, 'a') as stream:\n"
        "        print(len(completions), file=stream)\n"
        "    return [float('I do not know' in str(completion)) for completion in completions]\n"
    )
    flags = ("--rewards", "math", f"{tmp_path / 'mine.py'}:counted=0", "--refill", 2, "--max-steps", 3)
    run = tmp_path / "run"
    done = run_recipe("grpo", "--model", merged, "--data", few, "--output-dir", run, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    calls = [int(line) for line in counts.read_text().splitlines()]
    calls = calls[calls.index(16) :]  # those before are the contract's, of 64 completions
    steps_of_calls = [[]]
    for count in calls:
        if count == 16 and steps_of_calls[-1]:
            steps_of_calls.append([])
        steps_of_calls[-1].append(count)
    assert len(steps_of_calls) == 3
    for first, *others in steps_of_calls:
        assert first == 16
        assert len(others) <= 2
        assert others == sorted(others, reverse=True)
        assert all(count % 4 == 0 for count in others)
    assert any(len(one) > 1 for one in steps_of_calls)  # there was something to replace


@pytest.mark.usefixtures("warm")
def test_a_killed_run_leaves_each_step_once_in_samples_jsonl(merged, few, tmp_path):
    """Killed in step 3 with the checkpoint of step 2: step 2, counted from 0, is done twice."""
    flags = ("--model", merged, "--data", few, "--output-dir", tmp_path / "run", "--save-steps", 2)
    flags += (*SMALL, "--max-steps", 4, "--sample-prompts", 2, "--rewards", "math")
    assert interrupt("SIGKILL", 3, "grpo", *flags).returncode == -9
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")] == [0, 0, 1, 1, 2, 2]
    done = run_recipe("grpo", *flags)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tools_are_part_of_the_prompt(merged, few, tmp_path, tokenizer):
    tools = [{"name": "calculate", "description": "Adds numbers."}]
    data = tmp_path / "problems.jsonl"
    rows = [{**json.loads(line), "tools": tools} for line in PROBLEMS[:16]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = (ROOT / "tests" / "system" / "record_answers.py", tmp_path / "answers.jsonl", ROOT / "recipes" / "grpo.py")
    flags = ("--model", merged, "--data", data, "--output-dir", tmp_path / "run", *SMALL, "--max-steps", 1)
    flags += ("--sample-prompts", 1, "--difficulty", "auto", "--difficulty-by", "entropy")
    command = [*map(str, [sys.executable, *recipe, *flags])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    sampled = [prompt for batch in read_jsonl(tmp_path / "answers.jsonl") for prompt, _ in batch]
    assert len(sampled) == 1 + 15 * 4 + 16 + 1  # held-out, difficulty, the step, held-out
    for prompt in sampled:
        assert "Adds numbers." in tokenizer.decode(prompt)
    assert [row["tools"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")] == [tools]


def test_a_reward_model_on_the_hub_is_fetched_though_base_and_data_are_here(few, tmp_path):
    with serve({}) as hub:
        environment = {**hub.environment(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, ROOT / "recipes" / "grpo.py", "--data", few, "--rewards", "model:org/judge"]
        command += ["--output-dir", tmp_path / "run"]
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 2
        assert "org/judge: the hub has no such model" in done.stderr
        assert any("org/judge" in path for path in hub.requests)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_loaded_after_unsloth(merged, few, classifier, unsloth_first, tmp_path):
    flags = ("--model", merged, "--data", few, "--output-dir", tmp_path / "run", *SMALL, "--max-steps", 1)
    flags += ("--rewards", "math", f"model:{classifier}=0.1", "--sample-prompts", 0)
    done = run_recipe("grpo", *flags, **unsloth_first)
    assert done.returncode == 0, done.stderr
    assert {"rewards/math/mean", "rewards/model/mean"} <= steps(tmp_path / "run")[0].keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["matters"]["reward_files"]) == 1  # what the reward model is


ROW = json.loads(PROBLEMS[0])
MINE = {
    "the first row's answer for all": (
        "def graded(completions, answer, **columns):\n"
        "    return [float(f'<answer>{answer[0]}</answer>' in c[-1]['content']) for c in completions]\n"
    ),
    "the wrong sign": (
        "def graded(completions, answer, **columns):\n"
        "    return [-float(f'<answer>{a}</answer>' in c[-1]['content']) for c, a in zip(completions, answer)]\n"
    ),
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", get_args(get_type_hints(grpo.Args)["loss_type"]))
@pytest.mark.parametrize("correction", ["off", "token"])
def test_a_ratio_of_whole_completions_goes_only_with_a_loss_of_whole_completions(level, loss, correction):
    args = grpo.Args(importance_sampling_level=level, loss_type=loss, rollout_correction=correction)
    if level == "token" or (loss == "grpo" and correction != "token"):
        grpo.check_loss(args)
        return
    with pytest.raises(InputError, match="--importance-sampling-level=sequence"):
        grpo.check_loss(args)


BAD = {
    "a gold answer that is none": (json.dumps({**ROW, "answer": "..."}) + "\n", [], ":1: answer: "),
    "no gold answer": (json.dumps({"prompt": "a"}) + "\n", [], "math: needs the column answer, which no row has"),
    "groups that do not fit": (PROBLEMS[0], ["--num-generations", 7], "must be a multiple of --num-generations 7"),
    "an unknown reward": (PROBLEMS[0], ["--rewards", "maths"], "did you mean math?"),
    **{fault: ("".join(PROBLEMS[:16]), ["--rewards", "mine.py:graded"], "mine.py:1: graded") for fault in MINE},
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.usefixtures("warm")
def test_bad_input_has_one_clear_message_and_leaves_nothing(tmp_path, fault):
    content, flags, says = BAD[fault]
    (tmp_path / "problems.jsonl").write_text(content, encoding="utf-8")
    (tmp_path / "mine.py").write_text(MINE.get(fault, ""))
    done = run_recipe("grpo", "--data", "problems.jsonl", *flags, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.py", "problems.jsonl"]
