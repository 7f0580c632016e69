"""`make plan`: what it prints, for every method and card."""

import json
import math
import re
import sys
from collections.abc import Callable

import plan as command
import pytest
from common.arguments import check, read_fields
from common.errors import InputError
from common.lm.cards import card_names
from common.lm.hub import find_model
from common.plan.workload import METHODS
from conftest import ROOT
from in_process import refusal
from planning.rows import count

SAMPLES = ROOT / "data_samples"


@pytest.fixture
def planned(monkeypatch, capsys) -> Callable[..., str]:
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["plan", *map(str, words)])
        command.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_size_of_card_is_answered_in_80_columns(planned, method):
    shown = planned("--model", "qwen2.5-7b", "--method", method)
    assert all(f"{size} GB" in shown for size in (8, 12, 16, 24, 40, 48, 80, 141))
    assert max(map(len, shown.splitlines())) <= 80
    cards, _, main_memory = shown.partition("Main memory: up to ")
    peaks = [float(line.split(" GiB")[0].split()[-1]) for line in cards.splitlines() if " GiB" in line]
    assert len(peaks) == 8
    assert re.match(r"\d+\.\d GiB with a GPU, \d+\.\d on the CPU alone", main_memory)


def test_a_card_is_shown_part_by_part_with_the_command(planned):
    shown = planned("--method", "grpo", "--card", "24GB")
    parts = [float(line.split()[-2]) for line in shown.splitlines() if line.endswith("GiB")]
    *each, peak = parts
    assert sum(each) == pytest.approx(peak, abs=0.05)
    assert "make grpo MODEL=qwen2.5-7b" in shown
    assert "of it sampling" in shown


def test_what_does_not_fit_says_so_and_what_would(planned):
    shown = planned("--model", "qwen2.5-72b", "--card", "24GB")
    assert "Nothing fits" in shown
    assert "  CARD=80GB: " in shown
    assert "  MODEL=qwen2.5-32b: " in shown
    shown = planned("--card", "24GB", "--max-length", "100000", "--load-in-4bit")
    assert "Nothing fits" in shown
    assert "MAX_LENGTH=25000" in shown
    shown = planned("--model", "qwen2.5-72b", "--max-length", "1000000", "--no-load-in-4bit")
    assert "No card is enough" in shown


def test_arguments_of_the_recipe_count_and_stay(planned):
    plain, longer, fp8 = (
        json.loads(planned("--card", "h200", "--method", "sft", "--json", *more))["plans"][0]
        for more in ((), ("--max-length", "4096", "--load-in-4bit", "--lora-r", "64"), ())
    )
    assert plain["settings"]["precision"] == "16 bit"
    assert (longer["settings"]["length"], longer["settings"]["precision"]) == (4096, "nf4")
    assert longer["parts_gib"]["adapter"] == pytest.approx(4 * plain["parts_gib"]["adapter"], rel=1e-3)
    assert fp8 == plain


def test_more_gpus_divide_the_time_and_sharding_the_weights(planned):
    given = ("--gradient-accumulation-steps", "64", "--no-load-in-4bit")
    one, four, sharded = (
        json.loads(planned("--card", "h100", "--json", *given, *more))["plans"][0]
        for more in ((), ("--gpus", "4"), ("--gpus", "4", "--sharded"))
    )
    assert four["tokens_per_second"] == pytest.approx(4 * one["tokens_per_second"], rel=0.01)
    assert four["peak_gib"] - one["peak_gib"] == pytest.approx(0.4, abs=0.02)  # NCCL; gradients are in DDP's buckets
    assert sharded["parts_gib"]["weights"] == pytest.approx(one["parts_gib"]["weights"] / 4, rel=0.01)


@pytest.mark.parametrize("method", ["dpo", "kto", "reward", "grpo", "ppo"])
def test_what_only_sft_can_divide_among_gpus_is_refused_with_the_reason(planned, method):
    with pytest.raises(InputError, match=r"there is no --sharded here: SFT alone divides the model among GPUs\. DPO"):
        check(read_fields(ROOT / "recipes" / f"{method}.py"), ["--sharded"], method)
    shown = planned("--model", "qwen2.5-72b", "--method", method, "--card", "h200", "--gpus", "4", "--sharded")
    assert f"`make {method}` cannot: SFT alone divides" in " ".join(shown.split())
    assert f"\nmake {method} " not in shown


def test_hours_and_money_are_of_the_data(planned):
    words = ("--model", "tiny", "--method", "sft", "--data", SAMPLES / "sft.jsonl", "--card", "h100", "--json")
    run = json.loads(planned(*words, "--price", "2"))["plans"][0]["run"]
    assert run["rows"] == 1280
    assert run["price"] == pytest.approx(2 * run["hours"], abs=0.01)
    twice = json.loads(planned(*words, "--num-train-epochs", "4"))["plans"][0]["run"]  # tiny's own are 2
    assert twice["steps"] == pytest.approx(2 * run["steps"], abs=1)
    assert "  time" in planned("--model", "tiny", "--method", "grpo", "--data", SAMPLES / "arithmetic.jsonl")


def test_steps_are_counted_as_the_trainers_count_them(planned):
    """The last step of an epoch has what is left of the rows; GRPO leaves them out."""
    words = ("--model", "qwen2.5-0.5b", "--card", "h100", "--json", "--num-train-epochs", "1.5")
    rows = SAMPLES / "preferences.jsonl"
    batch = ("--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "7")
    run = json.loads(planned(*words, *batch, "--method", "dpo", "--data", rows, "--eval-ratio", "0"))["plans"][0]["run"]
    assert run["rows"] % 56 != 0
    assert run["steps"] == math.ceil(1.5 * math.ceil(run["rows"] / 56))
    groups = ("--num-generations", "8", "--method", "grpo", "--data", SAMPLES / "arithmetic.jsonl")
    run = json.loads(planned(*words, *batch, *groups))["plans"][0]["run"]
    assert run["rows"] % 7 != 0
    assert run["steps"] == math.ceil(1.5 * (run["rows"] // 7))


def test_rated_completions_are_one_sequence_a_row_and_pairs_two(planned):
    given = ("--method", "reward", "--card", "24GB", "--json", "--load-in-4bit", "--gradient-checkpointing")
    given += (
        "--per-device-train-batch-size",
        "4",
        "--gradient-accumulation-steps",
        "4",
        "--checkpoint-skip-layers",
        "0",
    )
    rated, pairs = (
        json.loads(planned(*given, "--data", SAMPLES / name))["plans"][0]["parts_gib"]["activations"]
        for name in ("scores.jsonl", "preferences.jsonl")
    )
    assert pairs == pytest.approx(2 * rated, rel=0.01)


def test_tokens_are_counted_by_the_models_tokenizer():
    rows = count(str(SAMPLES / "sft.jsonl"), "sft", find_model("tiny"))
    assert rows.counted
    guessed = count(str(SAMPLES / "sft.jsonl"), "sft", find_model("qwen2.5-72b"))
    assert not guessed.counted
    assert len(guessed.lengths) == len(rows.lengths) == guessed.count
    pairs = count(str(SAMPLES / "preferences.jsonl"), "dpo", find_model("tiny"))
    assert len(pairs.lengths) == 2 * pairs.count
    assert 0 < pairs.padded_share(512, 8) <= 1
    assert pairs.padded_share(1, 8) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "org/name"), "its sizes are not known here"),
        (("--method", "sft", "--num-generations", "8"), "--num-generations: `make sft` has no such argument"),
        (("--max-length", "0"), "--max-length 0: expected 1 or more"),
        (("--gpus", "0"), "--gpus 0"),
        (("--card", "h10"), "no such card (did you mean h100?)"),
        (("--method", "orpo"), "--method=orpo: unknown"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--price", "2"), "give --data"),
        (("--price", "-1"), "expected more than 0"),
        (("--sharded",), "give --gpus 2 or more"),
        (("--load-in-fp8", "--load-in-4bit"), "give one of the two"),
        (("--load-in-fp8", "--card", "a100"), "a100 has no fp8"),
        (("--method", "grpo", "--num-generations", "5"), "do not divide into groups of 5"),
        (("--method", "grpo", "--rollouts", "vllm"), "is not planned"),
        (("--checkpoint-skip-layers", "-1"), "expected 0 or more"),
        (("--num-train-epochs", "0"), "expected more than 0"),
    ],
)
def test_bad_input_is_refused_with_the_place(words, says, capsys):
    assert says in refusal(command.main, capsys, *words)


def test_every_card_can_be_planned(planned):
    for name in card_names():
        answer = json.loads(planned("--model", name, "--json"))
        assert [one["fits"] for one in answer["plans"]] == sorted(one["fits"] for one in answer["plans"])
