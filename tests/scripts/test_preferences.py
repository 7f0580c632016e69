"""`scripts/preferences.py`: pairs from scores, from choices, from one model and from two."""

import json
import subprocess
import sys
from pathlib import Path

import preferences as module
import pytest
from common.data.formats import PAIR_FORMATS
from common.data.read import as_examples
from common.data.rows import Faults, find_source, read_rows
from common.rewards.specification import load, score
from conftest import ROOT, read_jsonl
from in_process import as_it_was, refusal


def preferences(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "preferences.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def built(tmp_path: Path, *words) -> tuple[list[tuple[str, str, str]], dict]:
    """The pairs as (prompt, chosen, rejected), read as recipes/dpo.py reads them; and the counts."""
    output = tmp_path / "pairs.jsonl"
    done = preferences(*words, "--output", output)
    assert done.returncode == 0, done.stderr
    return read_pairs(output, done.stdout)


def taken(tmp_path: Path, capsys, *words) -> tuple[list[tuple[str, str, str]], dict]:
    """The same of data that is judged already: no model is loaded, so that it runs in this process."""
    output = tmp_path / "pairs.jsonl"
    output.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch, as_it_was():
        patch.setattr(sys, "argv", ["preferences", *map(str, words), "--output", str(output)])
        module.main()
    return read_pairs(output, capsys.readouterr().out)


def read_pairs(output: Path, printed: str) -> tuple[list[tuple[str, str, str]], dict]:
    faults = Faults()
    read = list(as_examples(read_rows(find_source(str(output)), faults), faults, PAIR_FORMATS))
    assert faults.count == 0
    counts = json.loads(Path(f"{output}.counts.json").read_text(encoding="utf-8"))
    assert counts["pairs"] == len(read)
    assert f"{len(read)} pairs" in printed
    return [tuple(turns[-1]["content"] for turns in (row.prompt, row.chosen, row.rejected)) for row in read], counts


SCORED = [
    *({"prompt": "p", "response": text, "score": score} for text, score in [("mid", 3), ("low", 1), ("high", 5)]),
    *({"prompt": "even", "response": text, "score": 2} for text in ("x", "y")),
    *({"prompt": "same", "response": text, "score": score} for text, score in [("x", 2), (" x ", 4)]),
    *({"prompt": "near", "response": text, "score": score} for text, score in [("x", 2), ("y", 2.5)]),
    {"prompt": "lonely", "response": "x", "score": 1},
]


def test_scores_the_higher_against_the_lower(tmp_path, capsys):
    data = write(tmp_path / "scored.jsonl", SCORED)
    found, counts = taken(tmp_path, capsys, "--data", data, "--margin", 1)
    assert found == [("p", "high", "low")]
    assert counts["dropped"] == {
        "prompts with one answer": 1,
        "prompts whose answers are all the same text": 1,
        "prompts whose answers all score the same": 1,
        "prompts with no difference of the margin": 1,
    }
    found, _ = taken(tmp_path, capsys, "--data", data, "--pairs-per-prompt", 9)
    assert found == [("p", "high", "low"), ("p", "mid", "low"), ("p", "high", "mid"), ("near", "y", "x")]


def test_choices_the_majority_counts(tmp_path, capsys):
    data = tmp_path / "choices.csv"
    rows = [
        ("q1", "yes", "no", "a"),
        ("q2", "yes", "no", "B"),
        ("q3", "yes", "no", "tie"),
        ("q4", "yes", "no", "a"),
        ("q4", "no", "yes", "b"),  # shown the other way round: two for yes
        ("q4", "yes", "no", "b"),
        ("q5", "yes", "no", "a"),
        ("q5", "yes", "no", "b"),
        ("q6", "yes", "yes", "a"),
        ("q7", "yes", "no", ""),
    ]
    data.write_text("prompt,a,b,choice\n" + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    found, counts = taken(tmp_path, capsys, "--data", data)
    assert found == [("q1", "yes", "no"), ("q2", "no", "yes"), ("q4", "yes", "no")]
    assert counts["dropped"] == {"ties": 2, "where people disagree evenly": 1, "same text": 1}
    renamed = tmp_path / "renamed.csv"
    renamed.write_text("q,a,b,winner\nq1,yes,no,b\n", encoding="utf-8")
    found, _ = taken(tmp_path, capsys, "--data", renamed, "--columns", "prompt=q", "choice=winner")
    assert found == [("q1", "no", "yes")]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"prompt": "p", "a": "x", "b": "y", "choice": "c"}], [], "data.jsonl:1: choice: 'c'; expected a, b or tie"),
        ([{"prompt": "p", "a": "", "b": "y", "choice": "a"}], [], "data.jsonl:1: a: is empty"),
        ([{"prompt": "p", "a": "x", "b": "y", "choice": "tie"}], [], "there is no pair in it; dropped: 1 ties"),
        (SCORED, ["--model", "tiny"], "judged already"),
        (SCORED, ["--strong", "tiny"], "--strong and --weak together"),
        (SCORED, ["--margin", "-1"], "must not be negative"),
        ([{"prompt": "p"}], [], "math: needs the column answer"),
        ([{"prompt": "p", "answer": "5"}], ["--rewards", "math=-1"], "the sign is the wrong way round"),
        ([{"text": "p"}], [], "unknown format"),
        ([{"prompt": "p", "answer": "5"}], ["--strong", "tiny", "--weak", "tyni"], "no model 'tyni'"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(rows, words, message, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    data = write(tmp_path / "data.jsonl", rows)
    assert message in refusal(module.main, capsys, "--data", data, "--output", output, *words)
    assert not output.exists()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    lines = (ROOT / "data_samples" / "arithmetic-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    file.write_text("".join(lines[:24]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model of the tiny model's shape, its head drawn at random."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tiny, folder = ROOT / "data_samples" / "tiny", tmp_path_factory.mktemp("judge")
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_one_model_ranked_by_a_judge_and_a_reward(trained, problems, judge, tmp_path):
    rewards = ("math=2", f"model:{judge}")
    words = ["--adapter", trained[0] / "adapter", "--data", problems, "--max-completion-length", 64]
    found, counts = built(tmp_path, *words, "--rewards", *rewards, "--margin", 0.5)
    assert len(found) + sum(counts["dropped"].values()) == 24
    assert len(found) > 5
    gold = {row["prompt"]: row["answer"] for row in read_jsonl(problems)}

    def totals(answers: list[str]) -> list[float]:
        prompts = [[{"role": "user", "content": prompt}] for prompt, _, _ in found]
        completions = [[{"role": "assistant", "content": text}] for text in answers]
        return score(load(rewards, 64), prompts, completions, answer=[gold[prompt] for prompt, _, _ in found])[0]

    chosen, rejected = totals([pair[1] for pair in found]), totals([pair[2] for pair in found])
    # Scores of a model depend a little on what else is in the batch.
    assert all(better - worse > 0.5 - 1e-3 for better, worse in zip(chosen, rejected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_strong_model_against_a_weak_one(trained, problems, tmp_path):
    """The trained model says what the base does not; with a reward, only where it is right and the base is not."""
    strong = tmp_path / "merged"
    merge = [sys.executable, ROOT / "scripts" / "merge.py", "--adapter", trained[0] / "adapter", "--output-dir", strong]
    assert subprocess.run(merge, check=False).returncode == 0
    words = ["--data", problems, "--max-completion-length", 48, "--rewards", "math"]
    found, counts = built(tmp_path, *words, "--strong", strong, "--weak", "tiny")
    gold = {row["prompt"]: row["answer"] for row in read_jsonl(problems)}
    assert len(found) + sum(counts["dropped"].values()) == 24
    assert found
    for prompt, chosen, rejected in found:
        assert f"<answer>{gold[prompt]}</answer>" in chosen
        assert "<answer>" not in rejected
