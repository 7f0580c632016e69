"""`recipes/reward.py`: its losses and its report by hand, and what it learns on the tiny model, as a user runs it."""

import json
import math

import numpy as np
import pytest
import reward
import torch
from common.data.formats import PAIR_FORMATS, RATING_FORMATS
from common.data.read import read_examples
from common.data.rows import find_source
from common.rewards.tokens import as_tokens
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe
from in_process import refusal

DATA = ROOT / "data_samples"
PAIRS = DATA / "preferences-train.jsonl"
SCORES = DATA / "scores.jsonl"


# Losses and figures, worked out by hand.


def test_the_bradley_terry_loss():
    """sigmoid(ln 3) is 3/4: the loss is ln(4/3) one way round and ln 4 the other."""
    ln3 = math.log(3)
    chosen, rejected = torch.tensor([1.0 + ln3, 5.0]), torch.tensor([1.0, 5.0 + ln3])
    assert reward.bradley_terry_loss(chosen[:1], rejected[:1]).item() == pytest.approx(math.log(4 / 3))
    assert reward.bradley_terry_loss(chosen, rejected).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert reward.bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2))
    assert reward.bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200  # no overflow


def test_the_regression_loss():
    assert reward.regression_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == 2.5
    scores = torch.tensor([1.0, -1.0])  # standardised
    assert reward.regression_loss(torch.zeros(2), scores).item() == 1


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
    folder, report, output = scored
    assert report["rated completions"] == 100
    assert report["pearson"] > 0.8
    assert report["spearman"] > 0.7
    assert 0.7 < report["calibration slope"] < 1.3
    assert report["error"] < 1  # of a spread of 1.4
    assert "pearson" in output
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_its_outputs_are_those_of_base_adapter_and_head_loaded_again(scored, tokenizer):
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
    rows = read_examples(find_source(str(DATA / "scores-heldout.jsonl")), RATING_FORMATS).examples
    read = [(row.answers[0], []) for row in as_tokens(tokenizer, rows, 512, 0, whole=False)[0]]
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
    assert json.loads((whole[0] / "run.json").read_text())["report"]["rated completions"] == 4


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
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
@pytest.mark.usefixtures("warm")
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
def test_a_stand_alone_model_scores_as_it_was_trained_to(paired):
    """`--rewards model:PATH` of GRPO reads it: the same outputs, as far as 16 bit tells them apart."""
    from common.rewards.classifier import RewardModel

    folder, _, _ = paired
    kept = read_jsonl(folder / "held-out.jsonl")[:20]
    rows = read_examples(find_source(str(DATA / "preferences.jsonl")), PAIR_FORMATS).examples[:20]
    prompts = [row.prompt for row in rows for _ in range(2)]
    outputs = RewardModel(str(folder / "model"))(
        prompts, [answer for row in rows for answer in (row.chosen, row.rejected)]
    )
    trained = [output for row in kept for output in row["outputs"]]
    assert np.corrcoef(outputs, trained)[0, 1] > 0.999
    assert np.abs(np.subtract(outputs, trained)).max() < 0.05 * np.ptp(trained)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_pairs_the_wrong_way_round_are_seen(tmp_path):
    rows = read_jsonl(PAIRS)[:100]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped), encoding="utf-8")
    flags = ("--data", tmp_path / "swapped.jsonl", "--eval-data", DATA / "preferences.jsonl", "--num-train-epochs", 1)
    report, output = run(tmp_path / "run", *flags)
    assert report["accuracy"] < 0.05
    assert "the wrong way round?" in " ".join(output.split())


ROW = json.dumps({"instruction": "a", "response": "b", "score": 1}) + "\n"
PAIR = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
BAD = {
    "neither scores nor pairs": (json.dumps({"prompt": "a", "answer": "b"}) + "\n", [], ":1: unknown format"),
    "nothing": ("", [], "the file is empty"),
    "both": (ROW + PAIR, [], ":2: "),
    "a score that is none": (ROW + ROW.replace("1}", '"good"}'), [], ":2: score: "),
    "one score for all": (ROW * 3, ["--eval-ratio", 0], "every score is 1; nothing distinguishes good from bad"),
    "pairs to be held to scores": (
        PAIR,
        ["--eval-data", SCORES],
        "one of the two sources holds pairs, the other scores",
    ),
    "a setting that is not there": (PAIR, ["--learnin-rate", 1], "--learning-rate"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_has_one_clear_message_and_leaves_nothing(fault, capsys, tmp_path, monkeypatch):
    content, flags, says = BAD[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(content)
    assert says in refusal(reward.main, capsys, "--data", tmp_path / "rows.jsonl", *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
