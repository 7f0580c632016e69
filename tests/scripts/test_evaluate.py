"""`scripts/evaluate.py`: its figures by hand, an adapter beside its base, and a reward model as its run reported it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import evaluate as command
import pytest
from common.data.hold_out import read_held_out
from common.data.rows import Faults
from common.lm.chat import tokenize
from conftest import ROOT, read_jsonl, run_recipe
from evaluation import policy
from evaluation.figures import Measured, comparison_table, differences, figures, shown
from in_process import refusal
from rich.console import Console

DATA = ROOT / "data_samples"


def evaluate(*words) -> str:
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Figures.


def test_figures_are_means_by_task_and_over_all():
    measured = Measured({"right": [1, 0, 1, 1], "stops": [True, True, False, True]}, {}, ["sum", "sum", "all", "baby"])
    assert figures(measured) == {
        "all": {"rows": 4, "right": 0.75, "stops": 0.75},
        "baby": {"rows": 1, "right": 1, "stops": 1},
        "sum": {"rows": 2, "right": 0.5, "stops": 1},
    }


def test_a_mean_by_token_counts_tokens():
    """Losses of 1 over 3 tokens and 5 over one: (3 + 5) / 4."""
    measured = Measured({"loss (nats)": [1, 5]}, {}, weights=[3, 1])
    assert figures(measured) == {"all": {"rows": 2, "loss (nats)": 2}}
    base = Measured({"loss (nats)": [2, 5]}, {}, weights=[3, 1])
    found = differences(measured, base, seed=0)["all"]["loss (nats)"]
    assert found["difference"] == -0.75
    # Resamples of the two rows: the first twice, -1; the second twice, 0; or both, -3/4.
    assert found["interval"] == [-1, 0]


def test_the_interval_is_paired():
    """Two models that differ by the same in every row differ by that for sure, however the rows differ."""
    base = Measured({"margin (nats)": [float(n) for n in range(50)]}, {})
    tuned = Measured({"margin (nats)": [n + 2.0 for n in range(50)]}, {})
    assert differences(tuned, base, seed=0)["all"]["margin (nats)"] == {"difference": 2, "interval": [2, 2]}


def test_an_interval_with_zero_in_it_is_no_difference():
    base = Measured({"greedy right": [0, 1] * 20, "stops": [0] * 40}, {})
    tuned = Measured({"greedy right": [1, 0] * 20, "stops": [1] * 40}, {})
    change = differences(tuned, base, seed=0)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(comparison_table("", figures(base), figures(tuned), change))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    (right,) = [line for line in lines if "greedy right" in line]
    (stops,) = [line for line in lines if "stops" in line]
    assert "no difference" in right
    assert "no difference" not in stops
    assert "+100.0%" in stops


def test_numbers_are_shown_in_their_units():
    assert shown("rows", 7) == "7"
    assert shown("greedy right", 0.125) == "12.5%"
    assert shown("greedy right", 0.125, "+") == "+12.5%"
    assert shown("loss (nats)", -1.5, "+") == "-1.50"


# What is measured on held-out data that has no right and wrong, and what is right.


def test_the_loss_on_conversations_is_that_of_the_assistants_turns(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    rows = policy.read(str(DATA / "sft.jsonl"))[:2]
    assert all(isinstance(row, policy.Conversation) for row in rows)
    assert len(rows[0].messages) == 4  # two turns of the assistant
    examples = list(tokenize(tokenizer, rows, 512, Faults()))
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32).eval()
    total = count = 0
    for example in examples:  # as the trainer does: labels of -100 where nothing is learned
        ids, mask = torch.tensor([example.input_ids.tolist()]), torch.tensor([example.completion_mask.tolist()])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss) * int(mask.sum())
        count += int(mask.sum())
    measured = policy.imitate(model, tokenizer, examples, "tiny")
    assert figures(measured)["all"] == {
        "rows": 2,
        "loss (nats)": pytest.approx(total / count, abs=1e-4),
        "perplexity (per token)": pytest.approx(math.exp(total / count), rel=1e-4),
    }


def test_feedback_is_measured_by_the_log_probability_of_its_completion(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    rows = policy.read(str(DATA / "feedback-train.jsonl"))[:4]
    assert [row.label for row in rows] == [False, False, False, True]
    tokens = policy.tokens_of(tokenizer, rows, 512, Faults())
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32).eval()
    expected = []
    for row in rows:
        turns = [*row.prompt, *row.completion]
        prompt = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(turns, return_dict=False)[:-1]  # without the line feed after the end token
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([ids]), labels=labels).loss)
        expected.append(-loss * (len(ids) - len(prompt)))
    found = figures(policy.approve(model, tokenizer, tokens, "tiny"))
    assert (found["good"]["rows"], found["bad"]["rows"]) == (1, 3)
    good, bad = expected[3], sum(expected[:3])
    assert found["good"]["log-probability (nats)"] == pytest.approx(good, abs=1e-3)
    assert found["bad"]["log-probability (nats)"] == pytest.approx(bad / 3, abs=1e-3)
    assert found["all"]["signed by label (nats)"] == pytest.approx((good - bad) / 4, abs=1e-3)


def test_without_a_pattern_the_end_of_a_completion_counts():
    pattern = command.SAMPLE_PATTERN
    assert policy.answer_in("", "48 + 24 = 72\n#### 72") == "72"
    assert policy.answer_in("", "48 + 24 = 72\n#### 71") == "71"
    assert policy.answer_in(pattern, "48 + 24 = 72\n#### 72") is None
    assert policy.answer_in(pattern, "<think>a</think><answer>72</answer>") == "72"


def test_a_tag_twice_does_not_match():
    pattern = command.SAMPLE_PATTERN
    assert policy.matches(pattern, "<think>a</think><answer> 1 </answer>") == "1"
    assert policy.matches(pattern, "<think>a</think><answer>1</answer><answer>1</answer>") is None


# The whole.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of random numbers on the tiny model, and no run beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    return folder


def first_lines(name: str, count: int, folder: Path) -> Path:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder / name


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_an_adapter_is_shown_beside_its_base(adapter, tmp_path):
    files = [
        first_lines(name, 12, tmp_path)
        for name in ("heldout.jsonl", "preferences.jsonl", "sft.jsonl", "feedback-train.jsonl")
    ]
    words = ["--model", "tiny", "--data", *files, "--samples", 2, "--json"]
    evaluate(*words, tmp_path / "base.json")
    printed = evaluate(*words, tmp_path / "both.json", "--adapter", adapter)
    base, both = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("base.json", "both.json"))
    for file in map(str, files):
        # The adapter switched off computes what the model alone does, and samples what it does.
        assert both[file]["base"] == base[file]
        for task, row in both[file]["differences"].items():
            for name, found in row.items():
                tuned, before = both[file]["figures"][task][name], base[file]["figures"][task][name]
                assert found["difference"] == pytest.approx(tuned - before)
                assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    loss = both[str(files[2])]["differences"]["all"]["loss (nats)"]
    assert loss["interval"][0] > 0  # random numbers harm
    assert both[str(files[0])]["completions"] != base[str(files[0])]["completions"]
    assert both[str(files[3])]["figures"].keys() == {"all", "good", "bad"}
    for words in (
        ", good",
        "base",
        "adapter",
        "difference",
        "95 % interval",
        "12 rows",
        "By task, base -> adapter",
    ):
        assert words in " ".join(printed.split())  # titles are wrapped


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_reward_model_is_judged_as_its_run_judged_it(tmp_path):
    held_out = DATA / "scores-heldout.jsonl"
    runs = {
        "adapter": ("--max-steps", 20, "--eval-data", held_out),
        "alone": ("--max-steps", 20, "--eval-data", held_out, "--stand-alone"),
    }
    for name, flags in runs.items():
        done = run_recipe("reward", "--output-dir", tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        trained = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["report"]
        words = ("--reward-model", tmp_path / name, "--data", held_out, DATA / "preferences.jsonl")
        printed = evaluate(*words, "--json", tmp_path / f"{name}.json")
        judged = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        report = judged[str(held_out)]["report"]
        assert report.keys() == trained.keys()
        for figure, value in report.items():  # a stand-alone model is in 16 bit
            assert value == pytest.approx(trained[figure], abs=0.03 if name == "alone" else 1e-3), figure
        rows = read_jsonl(tmp_path / name / "held-out.jsonl")
        assert [row["place"] for row in judged[str(held_out)]["rows"]] == [row["place"] for row in rows]
        # It was trained on scores: on pairs it has an accuracy, and no probability to be calibrated.
        pairs = judged[str(DATA / "preferences.jsonl")]["report"]
        assert pairs["pairs"] == 200
        assert pairs["accuracy"] > 0.5
        assert "calibration error" not in pairs
        assert "pearson" in printed
        assert "accuracy" in printed


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "data_samples/scores-heldout.jsonl"], "scores judge a reward model, not a policy"),
        (["--data", "data_samples/formats/prompt.jsonl"], "answer: missing; there is nothing to compare"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--adapter", "data_samples"], "no adapter_config.json there"),
        (["--model", "tiyn"], "did you mean tiny?"),
        (["--reward-model", "./none"], "not a directory"),
        (["--reward-model", "tiny", "--adapter", "a"], "give one of the two"),
        (["--reward-model", "tiny", "--data", "data_samples/heldout.jsonl"], "expected pairs or scores"),
        (["--form", "x"], "there is no --form"),
        (["--answer-pattern", "(a"], "--answer-pattern (a: no regular expression: missing )"),
        (["--temperature", "-1"], "--temperature -1: expected more than 0"),
        (["--temperature", "nan"], "--temperature nan: expected more than 0"),
        (["--max-length", "0"], "--max-length 0: expected at least 1"),
        (["--judge-url", "http://a"], "--judge-url: give --run too"),
        (["--num-fewshot", "0"], "--num-fewshot: give --run too"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: there is no folder no/such"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in refusal(command.main, capsys, *words)


def test_an_adapter_that_is_no_reward_model_is_refused(adapter, capsys):
    message = refusal(command.main, capsys, "--reward-model", adapter)
    assert "there is no head.json, so it is no reward model" in message


def test_a_default_for_each_kind_of_reward_model():
    from evaluation.reward_model import Trained, sample_data

    model = Trained("", None, None, {"kind": "bradley-terry"})
    assert {type(row).__name__ for row in read_held_out(sample_data(model))} == {"Pair"}
    model = Trained("", None, None, {"kind": "regression"})
    assert {type(row).__name__ for row in read_held_out(sample_data(model))} == {"Rating"}
