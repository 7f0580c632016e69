"""`recipes/reward.py`: its losses and its report by hand, and what it learns on the tiny model, as a user runs it."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
from common.data.examples import Pair, Rating
from common.lm.chat import Example
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe
from rich.console import Console

DATA = ROOT / "data_samples"
PAIRS = DATA / "preferences-train.jsonl"
SCORES = DATA / "scores.jsonl"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("reward", ROOT / "recipes" / "reward.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward"] = module
    spec.loader.exec_module(module)
    return module


# Losses and figures, worked out by hand.


def test_the_bradley_terry_loss(module):
    """sigmoid(ln 3) is 3/4: the loss is ln(4/3) one way round and ln 4 the other."""
    ln3 = math.log(3)
    chosen, rejected = torch.tensor([1.0 + ln3, 5.0]), torch.tensor([1.0, 5.0 + ln3])
    assert module.bradley_terry_loss(chosen[:1], rejected[:1]).item() == pytest.approx(math.log(4 / 3))
    assert module.bradley_terry_loss(chosen, rejected).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert module.bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2))
    assert module.bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200  # no overflow


def test_the_regression_loss(module):
    assert module.regression_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == 2.5
    scores = torch.tensor([1.0, -1.0])  # standardised
    assert module.regression_loss(torch.zeros(2), scores).item() == 1


def test_correlations(module):
    assert module.pearson([1, 2, 3], [2, 4, 6]) == 1
    assert module.pearson([1, 2, 3], [3, 2, 1]) == -1
    assert module.pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert module.pearson([1, 1], [1, 2]) is None
    assert module.pearson([1], [1]) is None
    assert module.ranks([10, 30, 20, 20, 5]).tolist() == [2, 5, 3.5, 3.5, 1]
    assert module.ranks([7, 7, 7]).tolist() == [2, 2, 2]


def test_the_calibration_error(module):
    """Probabilities of 3/4, three times right and once wrong, are as they should be; always right is 1/4 too modest."""
    ln3 = math.log(3)
    assert module.calibration_error(np.array([ln3, ln3, ln3, -ln3])) == pytest.approx(0, abs=1e-6)
    assert module.calibration_error(np.array([ln3, ln3])) == pytest.approx(0.25)
    assert module.calibration_error(np.array([-50.0, -50.0])) == pytest.approx(1)
    assert module.calibration_error(np.array([0.0, 0.0])) == 0  # half and half of what it cannot tell
    # One bin of two at 3/4, both right, one of two at 9/10, one right: (2 * 0.25 + 2 * 0.4) / 4.
    ln9 = math.log(9)
    assert module.calibration_error(np.array([ln3, ln3, ln9, -ln9])) == pytest.approx(0.325)


def test_the_report_on_pairs(module):
    """Four pairs: right and longer, right and shorter, wrong and shorter, a tie of equal lengths."""
    report = module.pair_report([2, 3, 0, 1], [1, 1, 2, 1], [9, 3, 2, 4], [5, 8, 6, 4])
    assert report["pairs"] == 4
    assert report["accuracy"] == 2.5 / 4
    assert report["margin"] == (1 + 2 - 2 + 0) / 4
    assert report["chosen is longer"] == pytest.approx(1 / 3, abs=1e-6)
    assert report["longer scores higher"] == pytest.approx(2 / 3, abs=1e-6)  # the first and the third
    assert report["accuracy, chosen shorter"] == 0.5
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 2, -2, 0)]
    assert report["loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)
    longer_is_better = module.pair_report([5, 9], [2, 1], [50, 90], [20, 10])
    assert longer_is_better["correlation with length"] == 1
    assert longer_is_better["accuracy, chosen shorter"] is None


def test_the_report_on_scores(module):
    """Predictions of half the spread, one too high in the mean: the slope is 2, the bias 1."""
    report = module.score_report([3, 4, 5], [1, 3, 5], [10, 20, 90])
    assert report["rated answers"] == 3
    assert (report["pearson"], report["spearman"]) == (1, 1)
    assert report["calibration slope"] == 2
    assert report["bias"] == 1
    assert report["error"] == pytest.approx(math.sqrt((4 + 1 + 0) / 3), abs=1e-6)
    assert report["scores with length"] == report["predictions with length"] == pytest.approx(0.917663, abs=1e-6)
    flat = module.score_report([3, 3], [1, 2], [5, 5])
    assert flat["pearson"] is flat["calibration slope"] is flat["predictions with length"] is None


# What the model reads.


def test_the_answer_is_the_last_run_of_marked_tokens(module):
    mask = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=np.int8)
    assert module.answer_span(Example("a", np.arange(10), mask, 10)) == (6, 9)
    assert module.answer_span(Example("a", np.arange(4), np.array([0, 1, 1, 1], dtype=np.int8), 4)) == (1, 4)


def test_it_reads_up_to_the_end_token_and_a_classifier_the_whole_rendering(module, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = [{"role": "assistant", "content": "dd"}]
    whole = tokenizer.apply_chat_template([*turns, *answer], tokenize=False)
    rows = [Rating("f:1", turns, answer, 4.0), Rating("f:2", turns[:1], answer, 2.0)]
    adapter = module.as_tokens(tokenizer, rows, module.Args(), None)
    assert tokenizer.decode(adapter[0].answers[0]) == whole.removesuffix("\n")
    assert [row.score for row in adapter] == [4.0, 2.0]
    assert adapter[0].lengths == adapter[1].lengths == [len(tokenizer("dd<|im_end|>")["input_ids"])]
    classifier = module.as_tokens(tokenizer, rows, module.Args(stand_alone=True), None)
    assert tokenizer.decode(classifier[0].answers[0]) == whole
    pair = Pair("f:3", turns, answer, [{"role": "assistant", "content": "e e e"}])
    (both,) = module.as_tokens(tokenizer, [pair], module.Args(), None)
    assert [tokenizer.decode(ids).rpartition("assistant\n")[2] for ids in both.answers] == [
        "dd<|im_end|>",
        "e e e<|im_end|>",
    ]
    assert both.lengths[1] > both.lengths[0]


# Runs.


def run(folder, *flags, **environment):
    done = run_recipe("reward", "--output-dir", folder, *flags, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["report"], done.stdout


def losses(folder):
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The run that a newcomer's `make reward` is, held to 100 scores of held-out questions."""
    folder = tmp_path_factory.mktemp("reward") / "scores"
    return folder, *run(folder, "--eval-data", DATA / "scores-heldout.jsonl")


@pytest.mark.slow
def test_300_scores_teach_it_to_score_held_out_answers(scored):
    folder, report, said = scored
    assert report["rated answers"] == 100
    assert report["pearson"] > 0.8
    assert report["spearman"] > 0.7
    assert 0.7 < report["calibration slope"] < 1.3
    assert report["error"] < 1  # of a spread of 1.4
    assert "pearson" in said
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_its_outputs_are_those_of_base_adapter_and_head_loaded_again(scored, module, tokenizer):
    """As PPO loads them; in the units of the data they are near the scores that were given."""
    from common.lm.hub import base_sha256
    from common.lm.scalar_head import load_head, score_last
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, report, _ = scored
    base = AutoModelForCausalLM.from_pretrained(DATA / "tiny", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    head, facts = load_head(folder / "adapter", "cpu")
    assert (facts["kind"], facts["base"]) == ("regression", base_sha256(DATA / "tiny"))
    scores = [row["score"] for row in read_jsonl(SCORES)]
    assert (facts["mean"], facts["std"]) == pytest.approx((np.mean(scores), np.std(scores)))
    kept = read_jsonl(folder / "held-out.jsonl")
    rows = module.read(str(DATA / "scores-heldout.jsonl"), module.Args())
    read = [(row.answers[0], []) for row in module.as_tokens(tokenizer, rows, module.Args(), None)]
    outputs = score_last(model, head, read, tokenizer.pad_token_id)
    assert outputs == pytest.approx([row["outputs"][0] for row in kept], abs=1e-3)
    errors = [facts["mean"] + facts["std"] * out - row["score"] for out, row in zip(outputs, kept, strict=True)]
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(report["error"], abs=1e-3)


FEW = ("--num-train-epochs", 1, "--logging-steps", 1, "--per-device-train-batch-size", 4, "--save-total-limit", 9)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """24 rows; every prompt is there twice, so that one held out takes two rows with it."""
    data = tmp_path_factory.mktemp("few") / "scores.jsonl"
    rows = [json.loads(line) for line in SCORES.read_text(encoding="utf-8").splitlines()[:24]]
    for index, row in enumerate(rows):
        row["instruction"] = f"Question {index % 12}?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Five steps with dropout, a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    flags = ("--data", few, "--eval-ratio", 0.2, "--save-steps", 1, "--lora-dropout", 0.1, *FEW)
    run(folder, *flags)
    return folder, flags


@pytest.mark.slow
def test_a_prompt_is_held_out_with_all_its_answers(whole, few):
    rows = {f"{few}:{number}": row for number, row in enumerate(read_jsonl(few), start=1)}
    held = [rows[row["place"]]["instruction"] for row in read_jsonl(whole[0] / "held-out.jsonl")]
    assert len(held) == 4
    assert len(set(held)) == 2
    assert json.loads((whole[0] / "run.json").read_text())["report"]["rated answers"] == 4


@pytest.mark.slow
def test_a_run_whose_time_was_over_ends_as_one_left_alone(whole, tmp_path):
    """Adapter, head, optimizer and random numbers: without any of them the weights would differ."""
    folder, flags = whole
    cut = tmp_path / "cut"
    done = interrupt("clock", 2, "reward", "--output-dir", cut, *flags, "--time-limit", "1:00:00")
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Stopped by --time-limit 1:00:00 after step 2 of 5; ")
    run(cut, *flags, "--time-limit", "1:00:00")
    assert losses(cut) == losses(folder)
    assert len(losses(cut)) == 5
    assert adapter_bytes(cut) == adapter_bytes(folder)
    heads = [(run / "adapter" / "head.safetensors").read_bytes() for run in (cut, folder)]
    assert heads[0] == heads[1]
    held_out = [read_jsonl(run / "held-out.jsonl") for run in (cut, folder)]
    assert held_out[0] == held_out[1]


@pytest.mark.slow
def test_checkpointing_changes_nothing(whole, tmp_path):
    folder, flags = whole
    run(tmp_path / "run", *flags, "--gradient-checkpointing")
    assert losses(tmp_path / "run") == pytest.approx(losses(folder), rel=1e-5)


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """The sample pairs, as a model of its own."""
    folder = tmp_path_factory.mktemp("reward") / "pairs"
    flags = ("--data", PAIRS, "--eval-data", DATA / "preferences.jsonl", "--max-steps", 80, "--stand-alone")
    return folder, *run(folder, *flags)


@pytest.mark.slow
def test_pairs_teach_it_to_prefer(paired):
    folder, report, _ = paired
    assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-4)  # a new head tells nothing apart
    assert report["pairs"] == 200
    assert report["accuracy"] > 0.95
    assert report["loss"] < 0.1
    assert report["chosen is longer"] == report["longer scores higher"] == 0
    assert json.loads((folder / "model" / "head.json").read_text())["kind"] == "bradley-terry"


@pytest.mark.slow
def test_a_stand_alone_model_scores_as_it_was_trained_to(paired, module):
    """`--rewards model:PATH` of GRPO reads it: the same outputs, as far as 16 bit tells them apart."""
    from common.rewards.classifier import RewardModel

    folder, _, _ = paired
    kept = read_jsonl(folder / "held-out.jsonl")[:20]
    rows = module.read(str(DATA / "preferences.jsonl"), module.Args())[:20]
    asked = [row.prompt for row in rows for _ in range(2)]
    outputs = RewardModel(str(folder / "model"))(
        asked, [answer for row in rows for answer in (row.chosen, row.rejected)]
    )
    trained = [output for row in kept for output in row["outputs"]]
    assert np.corrcoef(outputs, trained)[0, 1] > 0.999
    assert np.abs(np.subtract(outputs, trained)).max() < 0.05 * np.ptp(trained)


@pytest.mark.slow
def test_pairs_the_wrong_way_round_are_seen(tmp_path):
    rows = read_jsonl(PAIRS)[:100]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped), encoding="utf-8")
    flags = ("--data", tmp_path / "swapped.jsonl", "--eval-data", DATA / "preferences.jsonl", "--num-train-epochs", 1)
    report, said = run(tmp_path / "run", *flags)
    assert report["accuracy"] < 0.05
    assert "the wrong way round?" in " ".join(said.split())


ROW = json.dumps({"instruction": "a", "response": "b", "score": 1}) + "\n"
PAIR = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
BAD = {
    "neither scores nor pairs": (json.dumps({"prompt": "a", "answer": "b"}) + "\n", [], ":1: unknown format"),
    "nothing": ("", [], "the file is empty"),
    "both": (ROW + PAIR, [], ":2: "),
    "a score that is none": (ROW + ROW.replace("1}", '"good"}'), [], ":2: score: "),
    "one score for all": (ROW * 3, ["--eval-ratio", 0], "every score is 1; there is nothing to tell good from bad by"),
    "pairs to be held to scores": (PAIR, ["--eval-data", SCORES], "one of the two files holds pairs, the other scores"),
    "a setting that is not there": (PAIR, ["--learnin-rate", 1], "--learning-rate"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_has_one_clear_message_and_leaves_nothing(tmp_path, fault):
    content, flags, says = BAD[fault]
    (tmp_path / "rows.jsonl").write_text(content)
    done = run_recipe("reward", "--data", tmp_path / "rows.jsonl", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_answers_that_are_cut_to_the_same_teach_nothing(module, tokenizer):
    pair = Pair(
        "f:7", [{"role": "user", "content": "a"}], *([{"role": "assistant", "content": "1" * n}] for n in (60, 61))
    )
    with pytest.raises(module.InputError, match="f:7: chosen and rejected are the same in the first 60 tokens"):
        module.as_tokens(tokenizer, [pair], module.Args(max_length=60, max_truncated=1), Console())
