"""`recipes/kto.py`: its weights and mismatched completions by hand, and runs on the tiny model after SFT."""

import json
import os
import random
import subprocess
import sys

import kto
import pytest
from common.lm.feedback import TokenFeedback
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe
from in_process import refusal

ROWS = [json.loads(line) for line in (ROOT / "data_samples" / "feedback-train.jsonl").read_text("utf-8").splitlines()]
SEED = 42


# By hand.


@pytest.mark.parametrize(
    ("goods", "bads", "given", "weights"),
    [
        (10, 10, (None, None), (1, 1)),
        (12, 10, (None, None), (1, 1)),  # 1.2 is between 1 and 4/3
        (10, 40, (None, None), (4, 1)),  # 4 x 10 is as much as 40
        (40, 10, (None, None), (1, 3)),  # 40 is 4/3 of 3 x 10
        (10, 40, (None, 0.5), (2, 0.5)),
        (10, 40, (8.0, None), (8, 1.5)),  # 80 is 4/3 of 1.5 x 40
        (10, 10, (0.5, None), (0.5, 0.5)),
        (10, 10, (3.0, 1.0), (3, 1)),
    ],
)
def test_the_weights_keep_the_ratio_that_the_paper_gives(goods, bads, given, weights):
    found = kto.class_weights([True] * goods + [False] * bads, *given)
    assert (found.good, found.bad) == pytest.approx(weights)
    ratio = found.good * goods / (found.bad * bads)
    advised = 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9
    assert advised or None not in given
    assert ("the paper advises" in found.in_words()) == (not advised)


def rows_of(prompts: str) -> list[TokenFeedback]:
    """A row for each letter, its prompt; its completion is its index."""
    return [TokenFeedback(f"f:{n}", [ord(letter)], [n], n % 2 == 0, 2) for n, letter in enumerate(prompts)]


@pytest.mark.parametrize(
    ("prompts", "batch", "expected"),
    [
        ("abcdef", 3, [2, 0, 1, 5, 3, 4]),  # as TRL: the row before, the first one the last of its batch
        ("abcd", 2, [1, 0, 3, 2]),
        ("abcdefg", 3, [2, 0, 1, 5, 3, 4, 5]),  # a batch of one row takes that of the batch before
        ("aabc", 4, [3, 3, 1, 2]),  # never a completion of the same prompt
        ("aabb", 2, [3, 3, 1, 1]),
        ("baa", 2, [1, 0, 0]),
        ("aaab", 2, [3, 3, 3, 2]),
        ("aa", 2, [0, 1]),  # no other prompt at all
    ],
)
def test_the_kl_term_has_completions_of_other_prompts(prompts, batch, expected):
    assert kto.mismatched(rows_of(prompts), batch) == [[index] for index in expected]


def test_the_report_counts_how_often_a_good_completion_is_above_a_bad_one():
    report = kto.report_on([True, True, False, False], [2.0, 0.0, 0.0, -1.0])
    assert report == {"good": 2, "bad": 2, "reward of good": 1.0, "reward of bad": -0.5, "good above bad": 3.5 / 4}
    assert "87.5%" in kto.report_in_words(report)
    assert kto.report_on([True], [1.0])["good above bad"] is None
    assert "nothing to tell apart" in kto.report_in_words(kto.report_on([True], [1.0]))


# Input that is refused.

ROW = json.dumps(ROWS[0])
RATED = {"prompt": "a", "response": "b", "score": 3}
BAD = {
    "no labels": ([{"prompt": "a", "completion": "b"}], [], ":1: unknown format"),
    "only good ones": ([{**ROWS[0], "label": True}] * 3, [], "every completion is good; KTO learns what sets"),
    "only bad ones": ([{**ROWS[0], "label": 0}] * 3, [], "every completion is bad; KTO learns what sets"),
    "a label of another kind": ([ROWS[0], {**ROWS[1], "label": "meh"}], [], ":2: label: expected true or false"),
    "scores without a threshold": ([RATED], [], "these rows have scores, from 3 to 3; give"),
    "a threshold below all scores": ([RATED], ["--threshold", 1], "every completion is good by --threshold 1"),
    "a threshold for labels": (ROWS[:9], ["--threshold", 1], "--threshold 1: these rows have labels"),
    "one row at once": (ROWS[:9], ["--per-device-train-batch-size", 1], "completions of other rows in the batch"),
    "a weight of nothing": (ROWS[:9], ["--desirable-weight", 0], "--desirable-weight 0: expected a number above 0"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_has_one_clear_message_and_leaves_nothing(tmp_path, monkeypatch, capsys, fault):
    rows, flags, says = BAD[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert says in refusal(kto.main, capsys, "--data", tmp_path / "rows.jsonl", *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


# Runs.


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Sixteen good completions and eight bad ones, all good ones first."""
    data = tmp_path_factory.mktemp("feedback") / "rows.jsonl"
    rows = [*[row for row in ROWS if row["label"]][:16], *[row for row in ROWS if not row["label"]][:8]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Three steps of 8 rows each, a checkpoint after every one.

    From the base, which has not learned the form of the completions, good or bad: so the KL term is above 0.
    """
    folder = tmp_path_factory.mktemp("kto") / "run"
    batch = ("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2, "--save-steps", 1)
    flags = ("--data", few, *batch, "--save-total-limit", 9, "--learning-rate", 3e-3, "--warmup-steps", 0)
    flags += ("--logging-steps", 1, "--sample-prompts", 0)
    done = run_recipe("kto", "--output-dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    assert "16 good completions of weight 1, 8 bad ones of weight 1.5: the good ones weigh 1.33 times" in done.stdout
    return folder, flags


def steps(folder):
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
def test_losses_margins_and_kl_are_those_of_a_plain_trl_script_and_faults_would_show(whole, few, tmp_path):
    folder, _ = whole
    rows = few.read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(SEED).shuffle(rows)
    (tmp_path / "ordered.jsonl").write_text("".join(rows), encoding="utf-8")
    script = ROOT / "tests" / "references" / "plain_kto.py"
    command = [sys.executable, script, ROOT / "data_samples" / "tiny", tmp_path / "ordered.jsonl", tmp_path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert plain.returncode == 0, plain.stderr
    found = json.loads((tmp_path / "losses.json").read_text())
    ours = [[row["loss"], row["rewards/margins"], row["kl"]] for row in steps(folder)]
    for theirs in (found.pop("plain"), found.pop("plain log-probabilities")):
        assert len(ours) == len(theirs) == 3
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert ours[2][1] > 1e-2  # it moves, so that equal is not equal to nothing
    assert ours[2][2] > 1e-2
    for fault, other in found.items():
        distances = [abs(a - b) for one, two in zip(ours, other, strict=True) for a, b in zip(one, two, strict=True)]
        assert max(distances) > 1e-2, fault


@pytest.mark.slow
def test_a_run_that_a_stop_file_stopped_ends_as_one_left_alone(whole, tmp_path):
    folder, flags = whole
    cut = tmp_path / "cut"
    done = interrupt("STOP", 2, "kto", "--output-dir", cut, *flags)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Stopped by the file STOP after step 2 of 3; ")
    assert not list(cut.rglob("ref"))
    done = run_recipe("kto", "--output-dir", cut, *flags)
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in steps(cut)] == [row["loss"] for row in steps(folder)]
    assert adapter_bytes(cut) == adapter_bytes(folder)


@pytest.mark.slow
def test_the_reference_can_be_computed_beforehand(whole, tmp_path):
    """And held-out rows get a report."""
    folder, flags = whole
    run = tmp_path / "run"
    done = run_recipe("kto", "--output-dir", run, *flags, "--precompute-ref-log-probs")
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in steps(run)] == pytest.approx([row["loss"] for row in steps(folder)], rel=1e-4)
