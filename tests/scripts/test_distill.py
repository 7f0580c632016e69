"""`scripts/distill.py`: what is accepted and kept, by hand and on the tiny model."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from common.data.read import conversations
from common.data.rows import Faults, find_source, read_rows
from common.lm.generate import Completion
from common.rewards.builtin import format_reward, math_reward
from conftest import ROOT, read_jsonl

ARITHMETIC = ROOT / "data_samples" / "arithmetic-train.jsonl"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("distill", ROOT / "scripts" / "distill.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill"] = module
    spec.loader.exec_module(module)
    return module


def distill(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "distill.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def answer(text: str, tokens: int = 3, ended: bool = True) -> Completion:
    return Completion(text, ended, [1], [5] * tokens)


def test_an_answer_is_accepted_that_ended_and_reaches_the_bar_and_is_new(module):
    answers = [answer("a"), answer("b"), answer(" a\n"), answer("c", ended=False), answer("d")]
    accepted, counts = module.accept(answers, [1.2, 1.0, 1.2, 1.2, 0.4 + 0.8 - 1e-12], 1.2)
    assert [one.text for one in accepted] == ["a", "d"]
    assert counts == Counter({"accepted": 2, "below the bar": 1, "the same text again": 1, "cut off": 1})


def test_the_shortest_are_those_of_the_fewest_tokens(module):
    answers = [answer("x", 9), answer("a long text", 2), answer("y", 4), answer("z", 2)]
    assert [one.text for one in module.shortest(answers, 3)] == ["a long text", "z", "y"]
    assert module.shortest([], 3) == []


def test_the_diverse_share_the_fewest_trigrams_with_those_kept(module):
    # Of abcdef: abcdeg shares abc, bcd, cde of five in all (distance 2/5), abcxyz only abc of seven (6/7).
    answers = [answer("abcdeg", 5), answer("abcdef", 2), answer("abcxyz", 9)]
    assert [one.text for one in module.diverse(answers, 2)] == ["abcdef", "abcxyz"]
    assert [one.text for one in module.diverse(answers, 9)] == ["abcdef", "abcxyz", "abcdeg"]
    assert module.diverse([], 2) == []


@pytest.mark.slow
def test_what_the_model_gets_right_becomes_data_for_sft(trained, tmp_path):
    lines = ARITHMETIC.read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(lines + lines[:1]), encoding="utf-8")  # one of them twice
    output = tmp_path / "out" / "distilled.jsonl"
    words = ("--adapter", trained[0] / "adapter", "--data", problems, "--output", output, "--max-completion-length", 64)
    done = distill(*words, "-k", 2, "--num-generations", 6)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(output)
    gold = {row["prompt"]: row["answer"] for row in read_jsonl(problems)}
    for row in rows:
        (user, assistant), text = row["messages"], [row["messages"][1]["content"]]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert math_reward(text, [gold[user["content"]]]) == format_reward(text) == [1.0]
    a_prompt = Counter(row["messages"][0]["content"] for row in rows)
    assert max(a_prompt.values()) == 2
    assert len({json.dumps(row) for row in rows}) == len(rows)
    counts = json.loads(Path(f"{output}.counts.json").read_text(encoding="utf-8"))
    assert (counts["problems"], counts["answers"]) == (40, 240)
    fates = ("cut off", "below the bar", "the same text again", "accepted")
    assert sum(counts[fate] for fate in fates) == 240
    assert counts["solved problems"] == len(a_prompt)
    assert counts["kept"] == len(rows) > 10
    assert f"make sft MODEL=tiny DATA={output}" in done.stdout
    faults = Faults()
    assert len(list(conversations(read_rows(find_source(str(output)), faults), faults))) == len(rows)
    assert faults.count == 0
    # It is there: nothing is written over it.
    again = distill(*words)
    assert again.returncode == 2
    assert "is there already" in again.stderr


@pytest.mark.slow
def test_nothing_accepted_writes_nothing(tmp_path):
    """The untrained base gets nothing right in the form: what it says must not become data."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "What is 2 + 3?", "answer": "5"}) + "\n", encoding="utf-8")
    words = ["--data", problems, "--output", tmp_path / "out.jsonl", "--max-completion-length", 16]
    done = distill(*words, "--num-generations", 2)
    assert done.returncode == 2
    assert "no answer was accepted" in done.stderr
    assert "asks for 1.2" in done.stderr
    assert sorted(tmp_path.iterdir()) == [problems]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rewards", "math=-1"], "sign"),
        (["--rewards", "maths"], "did you mean math?"),
        (["--num-generations", "0"], "must be at least 1"),
        (["--data", "data_samples/sft.jsonl"], "unknown format"),
        (["--adapter", "data_samples"], "no adapter_config.json there"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(words, said, tmp_path):
    done = distill(*words, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Unsloth" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_reward_of_the_wrong_sign_is_caught(tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "from common.rewards.builtin import math_reward\n"
        "def turned(completions, answer, **columns):\n"
        "    return [-score for score in math_reward(completions, answer)]\n",
        encoding="utf-8",
    )
    done = distill("--rewards", f"{reward}:turned", "--output", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert "the sign is the wrong way round" in done.stderr
