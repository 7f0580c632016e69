"""What a run shows at its end, and that the commands it proposes exist."""

import io
import json
import shlex
from pathlib import Path

import pytest
from common.environment import ROOT
from common.run.ending import first_and_last, next_commands, show_ending
from common.run.folder import Run
from launch.commands import COMMANDS
from rich.console import Console

SAMPLE = str(ROOT / "data_samples" / "sft.jsonl")


def finished(folder: Path, recipe: str, data: str = SAMPLE, model: str = "tiny", key: str = "loss") -> Run:
    """A run that has logged three values under `key`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": 1, key: 5.46712},
        {"step": 2, "eval_loss": 1.0},
        {"step": 10, key: 1.0},
        {"step": 13, key: 0.03303},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {name: {"value": value, "from": "recipe"} for name, value in (("model", model), ("data", data))}
    run = Run(folder, {"recipe": recipe, "arguments": arguments})
    run.started -= 150.7
    return run


def shown(run: Run, saved: Path) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show_ending(console, run, saved)
    return console.file.getvalue().splitlines()


def test_a_run_ends_with_its_time_first_and_last_loss_and_the_next_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/sft-tiny-1a2b3c4d")
    assert shown(finished(folder, "sft"), folder / "adapter") == [
        "Done in 0:02:31, loss 5.467 at the first step, 0.03303 at the last",
        "Adapter in outputs/sft-tiny-1a2b3c4d/adapter",
        "Next:",
        "  make evaluate ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter",
        "  make merge ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter",
    ]
    record = json.loads((folder / "run.json").read_text())
    assert record["loss"] == {"first": 5.46712, "last": 0.03303}
    assert record["seconds"] == pytest.approx(150.7, abs=1)


@pytest.mark.parametrize(("recipe", "name", "key"), [("grpo", "reward", "reward"), ("ppo", "score", "score/mean")])
def test_where_rewards_count_they_are_what_a_run_ends_with(tmp_path, recipe, name, key):
    run = finished(tmp_path, recipe, key=key)
    assert shown(run, tmp_path / "adapter")[0].endswith(f", {name} 5.467 at the first step, 0.03303 at the last")
    assert run.record[name] == {"first": 5.46712, "last": 0.03303}


def test_a_run_without_a_logged_value_ends_with_its_time(tmp_path):
    run = finished(tmp_path, "sft", key="other")
    assert shown(run, tmp_path / "adapter")[0] == "Done in 0:02:31"
    assert first_and_last(tmp_path / "none.jsonl", "loss") is None


def test_a_long_folder_is_on_one_line_whatever_the_width(tmp_path):
    saved = tmp_path / ("long-" * 30) / "adapter"
    assert f"Adapter in {saved}" in shown(finished(tmp_path, "sft"), saved)


def all_endings(folder: Path) -> dict[str, list[str]]:
    ends = {}
    for recipe in ("sft", "dpo", "kto", "grpo", "ppo", "reward"):
        for saved in ("adapter", *(["model"] if recipe in ("sft", "reward") else [])):
            for data in (SAMPLE, "my data.jsonl"):
                ends[recipe, saved, data] = next_commands(finished(folder, recipe, data), folder / saved)
    return ends


def test_every_ending_has_one_or_two_commands_that_exist_with_variables_that_exist(tmp_path):
    """By the launcher's commands, and by the arguments of the recipe or script behind each."""
    other_names = {"reward": "reward_model"}
    for commands in all_endings(tmp_path).values():
        assert 1 <= len(commands) <= 2
        for command in commands:
            make, target, *variables = shlex.split(command)
            assert make == "make"
            known = {field.name for field in COMMANDS[target].fields()}
            for variable in variables:
                name = variable.partition("=")[0].lower()
                assert other_names.get(name, name) in known, command


def test_a_reward_model_goes_to_ppo_with_its_model_and_its_data(tmp_path):
    ends = all_endings(tmp_path)
    assert ends["reward", "adapter", SAMPLE] == [f"make ppo MODEL=tiny REWARD={tmp_path}"]
    assert ends["reward", "adapter", "my data.jsonl"] == [f"make ppo MODEL=tiny REWARD={tmp_path} 'DATA=my data.jsonl'"]
    assert ends["reward", "model", SAMPLE] == [f"make test-rewards REWARDS=model:{tmp_path}/model"]


def test_with_data_of_ones_own_evaluate_needs_held_out_data_of_ones_own(tmp_path):
    ends = all_endings(tmp_path)
    evaluate = f"make evaluate ADAPTER={tmp_path}/adapter"
    assert ends["grpo", "adapter", SAMPLE][0] == evaluate
    assert ends["grpo", "adapter", "my data.jsonl"][0] == f"{evaluate} DATA=your-held-out.jsonl"


def test_in_a_pipeline_no_command_is_proposed(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_STAGE", "sft: train")
    assert shown(finished(tmp_path, "sft"), tmp_path / "adapter")[-1] == f"Adapter in {tmp_path}/adapter"
