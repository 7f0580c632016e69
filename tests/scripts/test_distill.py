"""`scripts/distill.py`: what is accepted and kept, by hand and on the tiny model."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import distill as module
import pytest
from common.data.formats import FORMATS
from common.data.read import as_examples
from common.data.rows import Faults, find_source, read_rows
from common.lm.generate import Completion
from common.rewards.builtin import format_reward, math_reward
from conftest import ROOT, read_jsonl
from in_process import refusal

ARITHMETIC = ROOT / "data_samples" / "arithmetic-train.jsonl"


def run(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "distill.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def completion(text: str, tokens: int = 3, ended: bool = True) -> Completion:
    return Completion(text, ended, [1], [5] * tokens)


def test_a_completion_is_accepted_that_ended_and_reaches_the_threshold_and_is_new():
    completions = [completion("a"), completion("b"), completion(" a\n"), completion("c", ended=False), completion("d")]
    accepted, counts = module.accept(completions, [1.2, 1.0, 1.2, 1.2, 0.4 + 0.8 - 1e-12], 1.2)
    assert [one.text for one in accepted] == ["a", "d"]
    assert counts == Counter({"accepted": 2, "below the threshold": 1, "duplicates": 1, "truncated": 1})


def test_the_shortest_are_those_of_the_fewest_tokens():
    completions = [completion("x", 9), completion("a long text", 2), completion("y", 4), completion("z", 2)]
    assert [one.text for one in module.shortest(completions, 3)] == ["a long text", "z", "y"]
    assert module.shortest([], 3) == []


def test_the_diverse_share_the_fewest_trigrams_with_those_kept():
    # Of abcdef: abcdeg shares abc, bcd, cde of five in all (distance 2/5), abcxyz only abc of seven (6/7).
    completions = [completion("abcdeg", 5), completion("abcdef", 2), completion("abcxyz", 9)]
    assert [one.text for one in module.diverse(completions, 2)] == ["abcdef", "abcxyz"]
    assert [one.text for one in module.diverse(completions, 9)] == ["abcdef", "abcxyz", "abcdeg"]
    assert module.diverse([], 2) == []


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_what_the_model_gets_right_becomes_data_for_sft(trained, tmp_path):
    lines = ARITHMETIC.read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(lines + lines[:1]), encoding="utf-8")  # one of them twice
    output = tmp_path / "out" / "distilled.jsonl"
    words = ("--adapter", trained[0] / "adapter", "--data", problems, "--output", output, "--max-completion-length", 64)
    done = run(*words, "-k", 2, "--num-generations", 6)
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
    assert (counts["prompts"], counts["completions"]) == (40, 240)
    assert sum(counts[fate] for fate in module.FATES) == 240
    assert counts["solved prompts"] == len(a_prompt)
    assert counts["kept"] == len(rows) > 10
    assert f"make sft MODEL=tiny DATA={output}" in done.stdout
    faults = Faults()
    assert len(list(as_examples(read_rows(find_source(str(output)), faults), faults, FORMATS))) == len(rows)
    assert faults.count == 0
    # It is there: nothing is written over it.
    again = run(*words)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_nothing_accepted_writes_nothing(tmp_path):
    """The untrained base gets nothing right in the form: what it writes must not become data."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "What is 2 + 3?", "answer": "5"}) + "\n", encoding="utf-8")
    words = ["--data", problems, "--output", tmp_path / "out.jsonl", "--max-completion-length", 16]
    done = run(*words, "--num-generations", 2)
    assert done.returncode == 2
    assert "no completion was accepted" in done.stderr
    assert "needs 1.2" in done.stderr
    assert sorted(tmp_path.iterdir()) == [problems]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rewards", "math=-1"], "sign"),
        (["--rewards", "maths"], "did you mean math?"),
        (["--num-generations", "0"], "must be at least 1"),
        (["--data", "data_samples/sft.jsonl"], "unknown format"),
        (["--adapter", "data_samples"], "no adapter_config.json there"),
        (["--rewards", "model:no-such-model"], "no model 'no-such-model'"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in refusal(module.main, capsys, *words, "--output", tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_reward_of_the_wrong_sign_is_caught(tmp_path, capsys):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "from common.rewards.builtin import math_reward\n"
        "def turned(completions, answer, **columns):\n"
        "    return [-score for score in math_reward(completions, answer)]\n",
        encoding="utf-8",
    )
    message = refusal(module.main, capsys, "--rewards", f"{reward}:turned", "--output", tmp_path / "out.jsonl")
    assert "the sign is the wrong way round" in message


@pytest.mark.slow
def test_a_reward_model_is_loaded_after_unsloth(tmp_path):
    """unsloth patches what is imported after it; a contract that loads transformers first undoes that."""
    script = (
        "import runpy, sys, types\n"
        "class Unsloth:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'unsloth':\n"
        "            print('transformers' in sys.modules)\n"
        "            raise SystemExit\n"
        "sys.meta_path.insert(0, Unsloth())\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for name in ("distill", "preferences"):
        words = [ROOT / "scripts" / f"{name}.py", "--rewards", "model:tiny", "--output", tmp_path / "out.jsonl"]
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.stdout.splitlines()[-1:] == ["False"], done.stdout + done.stderr
