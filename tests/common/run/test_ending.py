"""What a run shows at its end, and that the commands it proposes exist."""

import io
import json
import shlex
from pathlib import Path

import pytest
from common import errors
from common.arguments import check
from common.environment import ROOT
from common.run.ending import first_and_last, next_commands, show_ending
from common.run.folder import Run
from launch import variables
from launch.commands import COMMANDS
from rich.console import Console

SAMPLE = str(ROOT / "data_samples" / "sft.jsonl")
RECIPES = [name for name, command in COMMANDS.items() if command.recipe]


@pytest.fixture
def as_make(monkeypatch, tmp_path):
    """A run that make started, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "SPELLING", "make")


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


def test_a_run_ends_with_its_time_first_and_last_loss_and_the_next_commands(as_make):
    folder = Path("outputs/sft-tiny-1a2b3c4d")
    assert shown(finished(folder, "sft"), folder / "adapter") == [
        "Done in 0:02:31, loss 5.467 at the first step, 0.03303 at the last",
        "Adapter in outputs/sft-tiny-1a2b3c4d/adapter",
        "Next:",
        "  make evaluate RUN=outputs/sft-tiny-1a2b3c4d",
        "  make chat RUN=outputs/sft-tiny-1a2b3c4d",
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


def ending(folder: Path, recipe: str, saved: str = "adapter", data: str = SAMPLE, **more: object) -> list[str]:
    run = finished(folder, recipe, data)
    run.record["arguments"] |= {name: {"value": value, "from": "you"} for name, value in more.items()}
    return next_commands(run, folder / saved)


def test_the_sample_data_have_held_out_rows_to_evaluate_on(as_make):
    for recipe in ("sft", "dpo", "grpo"):
        assert ending(Path("run"), recipe) == [
            "make evaluate RUN=run",
            "make chat RUN=run",
            "make merge ADAPTER=run/adapter",
        ]
    assert ending(Path("run"), "sft", "model") == [
        "make evaluate RUN=run",
        "make chat MODEL=run/model",
        "make compare A=tiny B=run/model",
    ]
    assert ending(Path("run"), "reward") == ["make evaluate RUN=run", "make ppo MODEL=tiny REWARD=run"]
    assert ending(Path("run"), "reward", "model") == [
        "make evaluate RUN=run",
        "make ppo MODEL=tiny REWARDS=model:run/model",
    ]


def test_where_nothing_is_held_out_two_models_are_compared(as_make):
    beside = ["make compare A=tiny B=run/adapter", "make chat RUN=run", "make merge ADAPTER=run/adapter"]
    for recipe in ("sft", "dpo", "kto", "grpo", "ppo"):
        assert ending(Path("run"), recipe, data="my data.jsonl") == beside
    for recipe in ("kto", "ppo"):
        assert ending(Path("run"), recipe) == beside
    assert ending(Path("run"), "sft", "model", "my.jsonl") == [
        "make compare A=tiny B=run/model",
        "make chat MODEL=run/model",
    ]


def test_a_run_that_held_out_more_than_a_few_rows_is_evaluated_on_them(as_make):
    for count, first in ((3, "make compare A=tiny B=run/adapter"), (10, "make evaluate RUN=run")):
        run = finished(Path("run"), "dpo", "my.jsonl")
        run.record["data"] = {"held_out": count}
        assert next_commands(run, Path("run/adapter"))[0] == first


def test_a_reward_model_of_own_data_goes_to_ppo_with_that_data_as_it_was_read(as_make):
    more = {"format": "prompt-rating", "columns": ["score=my stars", "prompt=question"]}
    assert ending(Path("run"), "reward", data="my data.jsonl", eval_data="held-out.jsonl", **more) == [
        "make evaluate RUN=run",
        "make ppo MODEL=tiny REWARD=run 'DATA=my data.jsonl' FORMAT=prompt-rating "
        """'COLUMNS='"'"'score=my stars'"'"' prompt=question'""",
    ]
    assert ending(Path("run"), "reward", data="my.jsonl", format="auto", eval_data=None) == [
        "make ppo MODEL=tiny REWARD=run DATA=my.jsonl"
    ]


def test_outside_of_the_repository_commands_are_given_in_full(tmp_path, monkeypatch):
    """There is no Makefile to run: make would find no rule."""
    monkeypatch.chdir(tmp_path)
    (ppo,) = ending(Path("run"), "reward", "model", "my data.jsonl", columns=("score=my stars",))
    assert ppo.startswith(f"{ROOT}/scripts/run ppo --model tiny --rewards model:run/model --data 'my data.jsonl' ")
    assert ppo.endswith(" --columns 'score=my stars'")
    monkeypatch.setattr(errors, "SPELLING", "make")
    assert ending(Path("run"), "ppo")[0] == "make compare A=tiny B=run/adapter"


@pytest.mark.parametrize("by_make", [True, False])
def test_every_ending_is_a_few_commands_that_the_launcher_takes(by_make, tmp_path, monkeypatch):
    """tests/system/test_readme.py runs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "SPELLING", "make" if by_make else "")
    for recipe, saved in [(recipe, "adapter") for recipe in RECIPES] + [("sft", "model"), ("reward", "model")]:
        for data in (SAMPLE, "my data.jsonl"):
            commands = ending(Path("run"), recipe, saved, data, columns=["prompt=my question"])
            assert 1 <= len(commands) <= 3
            for one in commands:
                _, name, *words = shlex.split(one)
                fields = COMMANDS[name].fields()
                if by_make:
                    given = dict(word.split("=", 1) for word in words)
                    words = variables.arguments(name, COMMANDS[name], fields, given)
                check(fields, words, name)


def test_in_a_pipeline_no_command_is_proposed(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_STAGE", "sft: train")
    assert shown(finished(tmp_path, "sft"), tmp_path / "adapter")[-1] == f"Adapter in {tmp_path}/adapter"
