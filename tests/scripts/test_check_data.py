"""check-data: every planted fault is found at its line, none is invented on clean files, and no file of the user is
changed."""

import csv
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from html.parser import HTMLParser

import in_process
import pytest
from check_data import survey as survey_module
from check_data import texts
from check_data.duplicates import NearDuplicates, Shingles, distinct
from check_data.findings import KINDS, Findings
from check_data.limits import Limits, estimated_tokens
from check_data.survey import Survey
from common.data.examples import Conversation, Pair
from common.data.formats import FORMATS
from common.data.read import as_examples
from common.data.rows import Faults, find_source, read_rows, source_identity
from common.errors import InputError
from common.lm import pieces
from conftest import ROOT, read_jsonl
from in_process import ended, refusal
from references.chat_families import FAMILIES

SCRIPT = ROOT / "scripts" / "check-data.py"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
SAMPLES = {
    "alpaca.csv": "sft",
    "alpaca.json": "sft",
    "alpaca.jsonl": "sft",
    "alpaca.parquet": "sft",
    "chatml-text.jsonl": "sft",
    "messages.jsonl": "sft",
    "text.jsonl": "sft",
    "prompt-completion-messages.jsonl": "sft",
    "prompt-completion.jsonl": "sft",
    "sharegpt-tools.jsonl": "sft",
    "sharegpt.jsonl": "sft",
    "dialogue-preference-hh.jsonl": "dpo",
    "dialogue-preference.jsonl": "dpo",
    "instruction-preference.jsonl": "dpo",
    "preference-messages.jsonl": "dpo",
    "preference.jsonl": "dpo",
    "sharegpt-preference.jsonl": "dpo",
    "humaneval.jsonl": "grpo",
    "instruction.jsonl": "grpo",
    "mbpp-text.jsonl": "grpo",
    "mbpp.jsonl": "grpo",
    "problem-answer.jsonl": "grpo",
    "problem-solution.jsonl": "grpo",
    "prompt-answer.jsonl": "grpo",
    "prompt.jsonl": "grpo",
    "question-answer.jsonl": "grpo",
    **{
        f"{rows}-{label}.jsonl": "kto"
        for rows in ("messages", "sharegpt", "prompt", "alpaca")
        for label in ("label", "kto-tag")
    },
    "verl.jsonl": "grpo",
    "instruction-rating.jsonl": "reward",
    "prompt-rating.jsonl": "reward",
}


@pytest.fixture(scope="module")
def command():
    return in_process.command("scripts/check-data.py")


@pytest.fixture
def check(command, monkeypatch, tmp_path, capsys):
    """Run the command; its report as JSON, unless it shows masks, what it printed, and why it refused, if it did."""

    def run(data, *flags):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        to = [] if "--show-mask" in flags else ["--json", str(report)]
        monkeypatch.setattr(sys, "argv", ["check-data", "--data", str(data), *to, *map(str, flags)])
        monkeypatch.setenv("COLUMNS", "2000")  # no line is broken
        refusal = None
        try:
            command.main()
        except InputError as error:
            refusal = str(error)
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        return found, capsys.readouterr().out, refusal

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(report):
    """{kind: [line, ...]} of all that was found."""
    return {
        kind: [int(one["place"].rpartition(":")[2]) for one in found["listed"]]
        for kind, found in report["findings"].items()
    }


# 1. Clean data: nothing is invented.


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "data_samples" / "formats").iterdir()))
def test_nothing_is_found_in_the_samples_and_their_task_is_known(name, check):
    report, _, refusal = check(ROOT / "data_samples" / "formats" / name)
    assert refusal is None
    assert report["task"] == SAMPLES[name]
    assert report["findings"] == {}
    assert report["usable"] == report["rows"] >= 4
    assert {rule["verdict"] for rule in report["rules"][1:]} == {"good"}


@pytest.mark.slow
def test_nothing_but_one_true_near_duplicate_is_found_in_gsm8k(check):
    if not GSM8K.exists():
        pytest.skip("needs ../shared/data/gsm8k/train.jsonl")
    report, _, refusal = check(GSM8K)
    assert refusal is None
    assert (report["rows"], report["usable"], report["gold_answers"]) == (7473, 7473, 7473)
    assert lines(report) == {"near-duplicate": [6692]}
    assert report["findings"]["near-duplicate"]["listed"][0]["message"].endswith(":2484")
    rows = read_jsonl(GSM8K)
    words = [set(rows[line - 1]["question"].split()) for line in (2484, 6692)]
    assert len(words[0] & words[1]) / len(words[0] | words[1]) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "preferences-train", "feedback-train", "arithmetic-train"])
def test_only_near_duplicates_are_found_in_the_data_of_the_tiny_model(name, check):
    report, _, refusal = check(ROOT / "data_samples" / f"{name}.jsonl")
    assert refusal is None
    assert set(report["findings"]) <= {"near-duplicate"}  # its questions are made by rule


# 2. Planted faults: each is found, at its line, and nothing else is.

QUESTIONS = [
    "Why is the sky blue on a clear day?", "How do bees find their way home?", "What makes bread rise in the oven?",
    "When did people first draw maps?", "Where does the salt in the sea come from?", "Who invented the paper clip?",
    "Which metal melts in a warm hand?", "How long does light take from the sun to us?",
    "What is the use of a keel on a boat?", "Why do cats purr when they are held?",
]  # fmt: skip
ANSWERS = [
    "Air scatters blue light more than red.", "They read the sun and remember landmarks.", "Yeast gives off gas.",
    "Some are older than writing.", "Rivers wash it out of rocks.", "Nobody knows for certain.", "Gallium does.",
    "A little more than eight minutes.", "It keeps her upright and on course.", "It seems to calm them.",
]  # fmt: skip
QWEN_TOKENS = {
    "en": (
        "The keel is the long beam along the bottom of a boat. It keeps the boat upright when the wind blows from the "
        "side, and it stops the boat from sliding sideways. In 1876, about 30% of all ships lost their keels in "
        "storms; since then builders have used iron (and later steel) instead of oak.",
        73,
    ),
    "zh": (
        "龙骨是船底部的一根长梁。当风从侧面吹来时，它使船保持直立，并防止船横向滑动。1876年，大约百分之三十的船在暴风雨中失去了龙骨；"
        "从那以后，造船者改用铁，后来又改用钢来代替橡木。",
        70,
    ),
}
SHIP = (
    "What is the use of the long keel under a sailing boat, and what would happen to the boat without it when a strong "
    "wind blows from the side and the waves are high?"
)


def alpaca(index):
    return {"instruction": QUESTIONS[index], "output": ANSWERS[index]}


def test_every_planted_finding_of_sft_data_is_at_its_line(check, tmp_path):
    rows = [
        alpaca(0),
        alpaca(1),
        {"instruction": QUESTIONS[2], "output": "<think></think>Yeast."},
        {"instruction": QUESTIONS[3], "output": "<think>Long ago, I think. Before writing."},
        {"instruction": QUESTIONS[4], "output": "I'm sorry, but I can't help with that."},
        {"instruction": QUESTIONS[5], "output": f"{QUESTIONS[5]} Nobody knows."},
        alpaca(0),
        {"instruction": QUESTIONS[6], "output": 5},
        {"instruction": QUESTIONS[7]},
        {"instruction": "用一句话解释什么是彩虹。", "output": "抱歉，我无法回答这个问题。"},
        {"instruction": f"{SHIP} Tell a child of five years.", "output": ANSWERS[8]},
        {"instruction": f"{SHIP} Tell a child of six years.", "output": ANSWERS[8]},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    with path.open("a") as stream:
        stream.write('{"instruction": "a", \n')
    report, out, refusal = check(path)
    assert lines(report) == {
        "fault": [8, 9, 13],
        "empty-thought": [3],
        "unbalanced-tags": [4],
        "refusal": [5, 10],
        "repeats-prompt": [6],
        "duplicate": [7],
        "near-duplicate": [12],
    }
    assert report["findings"]["duplicate"]["listed"][0]["message"] == f"the same as {path}:1"
    assert (report["rows"], report["usable"]) == (13, 10)
    assert refusal.splitlines()[0] == f"{path}:8: output: should be a valid string, found 5"
    assert len(refusal.splitlines()) == 3
    rules = {rule["rule"]: rule["verdict"] for rule in report["rules"]}
    assert rules["Quality of the outputs"] == "bad"
    assert rules["One format"] == "bad"
    # The four rules head what is printed.
    assert [line[:10] for line in out.splitlines()[1:5]] == ["Quality of", "Diversity ", "One format", "No duplica"]


def test_turns_that_do_not_alternate_are_named_and_tool_calls_are_not(check, tmp_path):
    user, assistant = {"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": ANSWERS[0]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "sky", "arguments": {}}}]}
    rows = [
        {"messages": [user, assistant]},
        {"messages": [{**user, "content": QUESTIONS[1]}, user, assistant]},
        {"messages": [assistant, user, assistant]},
        {"messages": [{**user, "content": QUESTIONS[2]}, call, {"role": "tool", "content": "blue"}, assistant]},
        {"messages": [{**user, "content": QUESTIONS[3]}, {"role": "system", "content": "Be brief."}, assistant]},
    ]
    report, _, refusal = check(write(tmp_path / "data.jsonl", rows))
    assert refusal is None
    assert lines(report) == {"turn-order": [2, 3, 5]}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_order_of_turns_is_looked_at_on_both_sides_of_a_pair(side, check, tmp_path):
    rows = [
        {"prompt": f"question {n}", "chosen": turns("", "", f"good {n}").messages[1:], "rejected": f"bad {n}"}
        for n in range(3)
    ]
    rows[1][side] = [{"role": "assistant", "content": text} for text in ("one", "and another")]
    report, _, refusal = check(write(tmp_path / "pairs.jsonl", rows))
    assert refusal is None
    assert lines(report)["turn-order"] == [2]
    assert report["findings"]["turn-order"]["rows"] == 1


def test_what_the_chat_template_drops_is_counted_in_the_words_of_the_recipes(check, tmp_path, tokenizer):
    template = tmp_path / "template.jinja"
    template.write_text(FAMILIES["qwen2.5"].chat_template(), encoding="utf-8")
    thought = [turns("", f"question {n}", f"answer {n}").messages for n in range(3)]
    for messages in thought[1:]:
        messages[1]["reasoning_content"] = "Two and two."
    prompts = [{"prompt": [{"role": "system", "content": "Be brief."}, *thought[0][:1]], "answer": "1"}]
    flags = ("--model", "tiny", "--chat-template-path", template)
    report, printed, _ = check(write(tmp_path / "data.jsonl", ({"messages": one} for one in thought)), *flags)
    note = f"the chat template drops {pieces.THOUGHTS} (in 2 rows, the first is {tmp_path / 'data.jsonl'}:2)"
    assert report["notes"] == [note]
    assert note in printed
    without_system = FAMILIES["qwen2"].chat_template().replace("in messages %}", "in messages[1:] %}")
    template.write_text(without_system, encoding="utf-8")
    report, _, _ = check(write(tmp_path / "prompts.jsonl", prompts), *flags)
    assert report["notes"] == [
        f"the chat template drops {pieces.SYSTEM} (in 1 row, the first is {tmp_path / 'prompts.jsonl'}:1)"
    ]


def test_every_planted_finding_of_pairs_is_at_its_line(check, tmp_path):
    long = "Rivers wash it out of the rocks on land and carry it to the sea, where it stays when water rises as vapour."
    rows = [
        {"prompt": QUESTIONS[0], "chosen": ANSWERS[0], "rejected": "Nobody can say."},
        {"prompt": QUESTIONS[1], "chosen": ANSWERS[1], "rejected": ANSWERS[1]},
        {"prompt": QUESTIONS[2], "chosen": long, "rejected": long.replace("land", "sand")},
        {"prompt": QUESTIONS[3], "chosen": ANSWERS[3], "rejected": "I'm sorry, but I can't help with that."},
        {"prompt": QUESTIONS[4], "chosen": "<answer>It stays.", "rejected": "</answer>"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    report, _, refusal = check(path)
    assert report["task"] == "dpo"
    assert lines(report) == {"fault": [2], "near-identical": [3], "unbalanced-tags": [5]}
    assert "chosen and rejected are the same" in refusal
    # Of four pairs chosen is longer in rows 1 and 5, rejected in row 4; in row 3 both are of one length.
    assert report["pairs"]["chosen longer"] == 0.5
    assert report["pairs"]["rejected longer"] == 0.25


@pytest.mark.parametrize(
    ("counts", "verdict"), [([20, 0], "good"), ([20, 1], "good"), ([9, 1], "look"), ([3, 1], "bad")]
)
def test_completions_of_several_layouts_are_not_one_format(counts, verdict, check, tmp_path):
    """5 % of another layout are good, 20 % a reason to look."""
    answers = ["Because."] * counts[0] + ["<answer>Because.</answer>"] * counts[1]
    rows = [{"instruction": f"Question {n}?", "output": answer} for n, answer in enumerate(answers)]
    report, _, _ = check(write(tmp_path / "data.jsonl", rows))
    assert report["rules"][2]["verdict"] == verdict
    assert report["layouts"]["plain text"] == counts[0]


@pytest.mark.parametrize(("distinct", "verdict"), [(5, "good"), (4, "good"), (3, "look"), (2, "bad")])
def test_prompts_that_repeat_are_no_diversity(distinct, verdict, check, tmp_path):
    rows = [{"instruction": f"Question {n % distinct}?", "output": ANSWERS[n]} for n in range(5)]
    report, _, _ = check(write(tmp_path / "data.jsonl", rows))
    assert report["diversity"]["distinct prompts"] == distinct / 5
    assert report["rules"][1]["verdict"] == verdict


def test_a_bias_of_length_is_a_reason_to_look(check, tmp_path):
    rows = [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    report, _, _ = check(write(tmp_path / "data.jsonl", rows))
    assert "chosen is the longer completion in 100%" in report["rules"][0]["reason"]
    assert report["rules"][0]["verdict"] == "look"


def test_gold_answers_that_cannot_be_parsed_are_at_their_lines(check, tmp_path):
    answers = ["42", "\\frac{1}{", "1,080", "#### 3", "!!!", "x + 1"]
    rows = [{"prompt": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=False)]
    report, _, refusal = check(write(tmp_path / "data.jsonl", rows))
    assert refusal is None
    assert (report["task"], report["gold_answers"]) == ("grpo", 6)
    assert lines(report) == {"gold-answer": [2, 5]}


def test_feedback_is_counted_and_what_contradicts_itself_is_at_its_line(check, tmp_path):
    rows = [{"prompt": question, "completion": f"{question} I do not know.", "label": 0} for question in QUESTIONS[:4]]
    rows += [{"prompt": QUESTIONS[0], "completion": "Light of short waves is scattered most.", "label": True}]
    refusal_of_a_bad_one = {"prompt": QUESTIONS[5], "completion": "I am sorry, but I cannot help.", "label": False}
    path = write(tmp_path / "thumbs.jsonl", [*rows, {**rows[4], "label": False}, rows[4], refusal_of_a_bad_one])
    report, out, refusal = check(path)
    assert refusal is None
    assert (report["task"], report["format"], report["labels"]) == ("kto", "prompt-label", {"good": 2, "bad": 6})
    assert lines(report) == {"contradiction": [6, 7], "duplicate": [7]}  # what a bad completion says is no finding
    assert report["findings"]["contradiction"]["listed"][0]["message"] == f"the other way round in {path}:5"
    assert re.search(r"labels +good 25.0%, bad 75.0%", out)
    report, _, _ = check(write(tmp_path / "good.jsonl", [rows[4]] * 2))
    assert (report["rules"][0]["verdict"], report["rules"][0]["reason"]) == ("bad", "every completion is good")
    report, _, _ = check(ROOT / "data_samples" / "formats" / "prompt-rating.jsonl", "--task", "kto")
    assert (report["task"], report["rows"]) == ("kto", 4)


def test_scores_have_range_and_distribution_and_constant_ones_are_bad(check, tmp_path):
    def rated(scores):
        rows = [{"prompt": q, "response": a, "score": s} for q, a, s in zip(QUESTIONS, ANSWERS, scores, strict=False)]
        report, _, refusal = check(write(tmp_path / "data.jsonl", rows))
        return report, refusal

    report, refusal = rated([1, 2, 3, 4, 10])
    assert refusal is None
    assert report["task"] == "reward"
    scores = report["scores"]
    assert (scores["min"], scores["p50"], scores["max"], scores["mean"], scores["constant"]) == (1, 3, 10, 4, False)
    assert scores["deviation"] == pytest.approx(10**0.5)  # of 9 + 4 + 1 + 0 + 36 = 50 over 5
    assert sum(scores["histogram"]["counts"]) == 5
    report, _ = rated([3, 3, 3])
    assert report["scores"]["constant"] is True
    assert report["rules"][0]["verdict"] == "bad"
    assert "every score is 3" in report["rules"][0]["reason"]
    _, refusal = rated([1, float("nan"), True])
    assert len(refusal.splitlines()) == 2


def rated_file(path, scores):
    return write(path, [{"prompt": f"{n}: {QUESTIONS[n % 10]}", "response": ANSWERS[n % 10], "score": score}
                        for n, score in enumerate(scores)])  # fmt: skip


def test_a_score_far_outside_the_others_is_named_and_refused_where_nothing_else_is_left(check, tmp_path):
    path = tmp_path / "data.jsonl"
    report, out, refusal = check(rated_file(path, [0, 1, 2, 3, 4] * 4 + [1e30]))
    assert lines(report)["outlier"] == lines(report)["fault"] == [21]
    assert refusal.startswith(f"{path}:21: score 1e+30: one score is so far outside the others, 0 to 4, ")
    assert (report["rows"], report["usable"]) == (21, 20)
    # Without that row the data is good, and --fix writes it so.
    check(path, "--fix", tmp_path / "clean.jsonl")
    assert [row["score"] for row in read_jsonl(tmp_path / "clean.jsonl")] == [0, 1, 2, 3, 4] * 4
    # A score that only stands out is named, and no more.
    report, out, refusal = check(rated_file(path, [1, 2, 3, 4, 5] * 20 + [80]))
    assert refusal is None
    assert lines(report)["outlier"] == [101]
    assert "score 80 is far outside the others" in out


def test_scores_of_which_all_but_one_are_the_same_are_refused(check, tmp_path):
    path = rated_file(tmp_path / "data.jsonl", [*[4] * 30, 5])
    assert f"all but one of the scores are 4; nothing distinguishes good from bad: {path}:31" in check(path)[2]
    assert "every score is 3; nothing distinguishes" in check(rated_file(path, [3] * 5))[2]
    # For KTO or PPO the scores are not learned as numbers.
    assert check(path, "--task", "ppo")[2] is None


def test_prompts_of_the_evaluation_data_are_found_alike_or_nearly(check, tmp_path):
    long = f"{SHIP} Explain it to a child of five years."
    rows = [alpaca(0), {"instruction": f"  {QUESTIONS[1].upper()} ", "output": "By the sun."},
            {"instruction": long, "output": "Dust."}, alpaca(3)]  # fmt: skip
    held = [
        {"instruction": QUESTIONS[1], "output": "x"},
        {"instruction": long.replace("five", "six"), "output": "y"},
        alpaca(5),
    ]
    write(tmp_path / "held.jsonl", held)
    report, _, _ = check(write(tmp_path / "data.jsonl", rows), "--eval-data", tmp_path / "held.jsonl")
    assert lines(report) == {"overlap": [2, 3]}
    messages = [one["message"] for one in report["findings"]["overlap"]["listed"]]
    assert messages[0] == f"the same prompt as {tmp_path}/held.jsonl:1"
    assert messages[1].endswith(f"% the same as {tmp_path}/held.jsonl:2")


# 3. Tasks.


def test_a_named_task_refuses_the_data_of_another_and_names_that(check, tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    report, _, refusal = check(path, "--task", "sft")
    assert report is None
    assert "unknown format: the columns are prompt, chosen, rejected" in refusal
    assert "TASK=dpo or reward or grpo or ppo" in refusal  # GRPO takes any prompt
    assert check(path, "--task", "reward")[0]["task"] == "reward"
    assert check(path, "--task", "ppo")[0]["task"] == "ppo"


def test_columns_are_mapped_as_in_the_recipes(check, tmp_path):
    path = write(tmp_path / "data.jsonl", [{"q": QUESTIONS[0], "a": ANSWERS[0]}])
    report, _, refusal = check(path, "--columns", "instruction=q", "output=a")
    assert refusal is None
    assert (report["task"], report["format"]) == ("sft", "alpaca")
    assert "Known: prompt-rating: prompt, response, score; " in check(path)[2]


def test_a_row_that_fits_several_formats_is_read_by_one_and_the_others_are_named(check, tmp_path):
    rows = [{"problem": q, "answer": "4", "solution": f"It is {n}. #### {n}"} for n, q in enumerate(QUESTIONS)]
    path = write(tmp_path / "data.jsonl", rows)
    report, out, _ = check(path)
    assert (report["format"], report["other_formats"]) == ("problem-answer", ["problem-solution"])
    assert "the first row also has the columns of --format problem-solution" in out
    assert check(write(tmp_path / "data.jsonl", [alpaca(0)]))[0]["other_formats"] == []


def test_a_file_without_rows_is_refused(check, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n\n")
    assert check(tmp_path / "data.jsonl")[2].endswith("holds no rows")


# 4. Tokens of a model.


def test_lengths_are_those_of_the_rendered_rows_and_truncated_ones_are_named(check, tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS[:3], ("Yes.", "Yes. " * 100, "No."), strict=True)
    ]
    counts = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows]
    path = write(tmp_path / "data.jsonl", rows)
    report, _, refusal = check(path, "--model", "tiny", "--max-length", 100)
    assert refusal is None
    assert report["length"]["unit"] == "tokens"
    assert report["length"]["max"] == max(counts) == counts[1] > 100
    assert report["length"]["mean"] == pytest.approx(sum(counts) / 3)
    assert report["truncated"] == {"max_length": 100, "rows": 1, "share": pytest.approx(1 / 3), "places": [f"{path}:2"]}
    report, _, _ = check(path, "--model", "tiny", "--max-length", 10)  # what is left of them carries no loss
    assert (report["rows"], report["truncated"]["rows"]) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), SAMPLES.items())
def test_every_sample_has_a_length_in_tokens(name, task, check):
    report, _, refusal = check(ROOT / "data_samples" / "formats" / name, "--model", "tiny")
    assert refusal is None
    assert report["findings"] == {}
    assert report["truncated"]["rows"] == 0
    assert report["length"]["min"] > 10


def test_a_prompt_above_its_limit_is_counted_and_named_with_a_model_and_by_an_estimate_without(check, tmp_path):
    question = "Add these numbers, and show your work: " + "twelve, " * 400 + "one."
    rows = [{"prompt": q, "answer": "4"} for q in (*QUESTIONS[:5], question)]
    path = write(tmp_path / "data.jsonl", rows)
    for flags, about in (([], "about "), (["--model", "tiny"], "")):
        report, out, refusal = check(path, "--task", "grpo", "--max-prompt-length", 500, *flags)
        assert refusal is None
        assert lines(report)["long-prompt"] == [6]
        (found,) = report["findings"]["long-prompt"]["listed"]
        assert re.fullmatch(
            rf"the prompt has {about}[\d,]+ tokens, more than --max-prompt-length 500", found["message"]
        )
        assert report["long_prompts"] == {
            "limit": 500, "rows": 1, "share": pytest.approx(1 / 6), "places": [f"{path}:6"], "estimated": not flags,
        }  # fmt: skip
        assert f"prompts longer than 500 tokens{'' if flags else ', estimated'}" in out
    assert "long-prompt" not in check(path, "--task", "grpo", "--max-prompt-length", 5000)[0]["findings"]


def test_without_a_model_rows_above_max_length_are_estimated_and_called_so(check, tmp_path):
    rows = [
        alpaca(0),
        {**alpaca(1), "output": "Yes indeed. " * 300},
        {"instruction": "为什么？" * 500, "output": "因为。"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    report, out, _ = check(path, "--max-length", 600)
    assert report["truncated_estimate"]["places"] == [f"{path}:2", f"{path}:3"]
    assert lines(report)["long-prompt"] == [3]
    assert (
        "no room for a completion within --max-length 600" in report["findings"]["long-prompt"]["listed"][0]["message"]
    )
    assert "longer than 600 tokens, estimated" in out


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_estimate_of_tokens_is_near_a_tokenizer_made_for_the_language(language):
    """Qwen's tokens of two texts, counted with its published vocabulary."""
    text, tokens = QWEN_TOKENS[language]
    assert estimated_tokens(text) == pytest.approx(tokens, rel=0.15)


def test_special_tokens_in_a_text_are_found_whoever_wrote_it(check, tmp_path):
    def row(user, assistant, **other):
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant, **other}]
        return {"messages": turns}

    rows = [
        row("What does <|im_start|> mean?", "It begins a turn."),
        row("What does im_start mean?", "It begins a turn, as in <|im_start|>."),
        row("And <b>bold</b>?", "That is HTML."),
    ]
    path = write(tmp_path / "data.jsonl", rows)
    assert lines(check(path, "--model", "tiny")[0]).get("special-token") == [1, 2]
    assert "special-token" not in check(path)[0]["findings"]  # another model has others


def between(marked):
    """What stands between ▶ and ◀, without the ids."""
    return [re.sub(r"·\d+ ", "", part).replace("⏎\n", "\n") for part in re.findall("▶(.*?)◀", marked, re.DOTALL)]


def test_the_mask_shows_what_carries_loss_and_every_id(check, tokenizer):
    formats = ROOT / "data_samples" / "formats"
    _, out, refusal = check(formats / "messages.jsonl", "--model", "tiny", "--show-mask", 2)
    assert refusal is None
    rows = out.split("messages.jsonl:")[1:]
    assert len(rows) == 2
    assert between(rows[0]) == [
        "A word that reads the same backwards, such as level.<|im_end|>", "Radar.<|im_end|>",
    ]  # fmt: skip
    messages = read_jsonl(formats / "messages.jsonl")[0]["messages"]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert [int(token) for token in re.findall(r"·(\d+) ", rows[0])] == ids
    assert between(rows[1]) == ["H₂O。<|im_end|>"]  # of tokens that are parts of characters
    _, out, _ = check(formats / "preference.jsonl", "--model", "tiny", "--show-mask", 1)
    assert [text.partition("<|im_end|>")[0] for text in between(out)[1:]] == [
        "Keep it in a paper bag at room temperature, and freeze what you will not eat within two days.",
        "Just buy less of it.",
    ]
    _, out, _ = check(formats / "messages-label.jsonl", "--model", "tiny", "--show-mask", 1)
    assert between(out)[1:] == ["Radar.<|im_end|>"]  # its last turn
    assert "messages-label.jsonl:1 good" in out
    _, out, _ = check(formats / "prompt-answer.jsonl", "--model", "tiny", "--show-mask", 1)
    assert "0 with loss" in out
    assert len(between(out)) == 1  # that of the heading
    _, out, _ = check(formats / "text.jsonl", "--model", "tiny", "--show-mask", 1, "--max-length", 40)
    document = read_jsonl(formats / "text.jsonl")[0]["text"]  # in several rows, which learn all but its first token
    learned = "".join(between(out)[1:]).replace("⏎", "\n")
    assert learned.endswith("<|im_end|>")
    assert document.endswith(learned.removesuffix("<|im_end|>"))
    assert len(learned) > len(document)


def test_the_mask_is_coloured(tokenizer):
    from check_data.mask import CONTEXT, LOSS, coloured, read_tokens

    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    text = coloured(read_tokens(tokenizer, ids, [0] * (len(ids) - 1) + [1], len(ids)))
    pieces = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert [style for piece, style in pieces if not piece.startswith("·")] == [*[CONTEXT] * (len(ids) - 1), LOSS, LOSS]


def test_the_mask_needs_a_model(check):
    assert "--show-mask needs the model" in check(ROOT / "data_samples" / "sft.jsonl", "--show-mask", 1)[2]


@pytest.mark.parametrize("flag", ["--html", "--json", "--fix"])
def test_the_mask_is_all_that_is_shown(check, tmp_path, flag):
    """And so no file is promised with it."""
    sample = ROOT / "data_samples" / "sft.jsonl"
    _, out, refusal = check(sample, "--model", "tiny", "--show-mask", 1, flag, tmp_path / "out.jsonl")
    assert out == ""
    assert "--show-mask prints rows and nothing else" in refusal
    assert not (tmp_path / "out.jsonl").exists()


# 5. The cleaned file.


def test_fix_writes_the_good_rows_as_they_were_and_the_others_with_their_reasons(check, tmp_path):
    rows = [
        {**alpaca(0), "id": 1, "source": {"a": [1.5, None]}},
        {**alpaca(1), "output": ""},
        {**alpaca(0), "id": 3},
        {**alpaca(2), "output": "<think>Yeast"},
        {**alpaca(3), "output": "I'm sorry, but I can't help with that."},
        {**alpaca(4), "id": "äöü 树"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    with path.open("a") as stream:
        stream.write("{broken\n")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    _, out, refusal = check(path, "--fix", tmp_path / "clean.jsonl")
    assert refusal is None
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert read_jsonl(tmp_path / "clean.jsonl") == [rows[0], rows[4], rows[5]]
    dropped = read_jsonl(tmp_path / "clean.dropped.jsonl")
    assert [(one["place"], one["reasons"][0]["kind"]) for one in dropped] == [
        (f"{path}:2", "fault"), (f"{path}:3", "duplicate"), (f"{path}:4", "unbalanced-tags"), (f"{path}:7", "fault"),
    ]  # fmt: skip
    assert dropped[0]["reasons"][0]["message"] == "output: is empty; expected text"
    assert dropped[1]["row"] == rows[2]
    assert "3 rows in" in out
    assert "4 left out: 2 fault, 1 duplicate, 1 unbalanced-tags" in out
    # What was cleaned is clean, but for what was not to be dropped.
    report, _, refusal = check(tmp_path / "clean.jsonl")
    assert refusal is None
    assert lines(report) == {"refusal": [2]}


def test_what_is_dropped_can_be_chosen(check, tmp_path):
    rows = [alpaca(0), alpaca(0), {**alpaca(3), "output": "I'm sorry, but I can't help with that."}]
    path = write(tmp_path / "data.jsonl", rows)
    check(path, "--fix", tmp_path / "clean.jsonl", "--drop", "refusal")
    assert read_jsonl(tmp_path / "clean.jsonl") == rows[:2]


def test_fix_cleans_a_csv_into_json_lines(check, tmp_path):
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["instruction", "output", "id"])
        writer.writeheader()
        writer.writerows([{**alpaca(0), "id": 1}, {**alpaca(1), "output": "", "id": 2}])
    check(tmp_path / "data.csv", "--fix", tmp_path / "clean.jsonl")
    assert read_jsonl(tmp_path / "clean.jsonl") == [{**alpaca(0), "id": "1"}]


@pytest.mark.parametrize("name", ["data.jsonl", "there.jsonl", "clean.csv", "no/such/folder.jsonl"])
def test_fix_overwrites_nothing(name, check, tmp_path):
    path = write(tmp_path / "data.jsonl", [alpaca(0)])
    (tmp_path / "there.jsonl").write_text("mine")
    report, _, refusal = check(path, "--fix", tmp_path / name)
    assert report is None
    assert refusal.startswith(f"--fix {tmp_path / name}: ")
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert read_jsonl(path) == [alpaca(0)]


def test_fix_does_not_write_into_the_folder_that_is_read(check, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", [alpaca(0)])
    _, _, refusal = check(tmp_path / "data", "--fix", tmp_path / "data" / "clean.jsonl")
    assert "this is the folder that is read" in refusal


def test_a_report_does_not_replace_the_data(check, command, tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", [alpaca(0)])
    for flag in ("--json", "--html"):
        monkeypatch.setattr(sys, "argv", ["check-data", "--data", str(path), flag, str(path)])
        with pytest.raises(InputError, match="this is the data itself"):
            command.main()
    assert read_jsonl(path) == [alpaca(0)]


def test_when_no_row_is_left_the_file_is_refused(check, tmp_path):
    path = write(tmp_path / "data.jsonl", [{**alpaca(0), "output": ""}])
    assert check(path, "--fix", tmp_path / "clean.jsonl")[2].endswith("no row is left")


ASSISTANT = {"role": "assistant", "content": ANSWERS[8]}
BASE_ROWS = {
    "sft": {"messages": [{"role": "user", "content": SHIP}, ASSISTANT]},
    "dpo": {"prompt": SHIP, "chosen": ANSWERS[8], "rejected": ANSWERS[9]},
    "reward": {"prompt": SHIP, "response": ANSWERS[8], "score": 1.0},
    "grpo": {"prompt": SHIP, "answer": "4", "tests": ["assert f(1) == 2"]},
}
OTHER_PARTS = [
    ("sft", "tools", [{"type": "function", "function": {"name": "boat", "parameters": {}}}]),
    ("sft", "messages", [{"role": "system", "content": "Be brief."}, *BASE_ROWS["sft"]["messages"]]),
    (
        "sft",
        "messages",
        [BASE_ROWS["sft"]["messages"][0], {**BASE_ROWS["sft"]["messages"][1], "reasoning_content": "a"}],
    ),
    ("dpo", "tools", [{"type": "function", "function": {"name": "boat", "parameters": {}}}]),
    ("dpo", "rejected", ANSWERS[7]),
    ("reward", "score", 2.0),
    ("reward", "tools", [{"type": "function", "function": {"name": "boat", "parameters": {}}}]),
    ("grpo", "answer", "5"),
    ("grpo", "tests", ["assert f(1) == 3"]),
    ("grpo", "tools", [{"type": "function", "function": {"name": "boat", "parameters": {}}}]),
]


@pytest.mark.parametrize(("task", "part", "other"), OTHER_PARTS)
def test_a_row_that_is_trained_or_graded_otherwise_is_no_duplicate_and_stays(task, part, other, check, tmp_path):
    row = BASE_ROWS[task]
    path = write(tmp_path / "data.jsonl", [row, {**row, part: other}, row])
    clean = tmp_path / "clean.jsonl"
    report, _, refusal = check(path, "--task", task, "--fix", clean, "--drop", "duplicate", "near-duplicate")
    assert refusal is None
    assert lines(report)["duplicate"] == [3]
    texts_differ = part in ("messages", "rejected") and other[0] != {"role": "system", "content": "Be brief."}
    assert texts_differ or read_jsonl(clean) == [row, {**row, part: other}]
    if not texts_differ:
        (near,) = report["findings"]["near-duplicate"]["listed"]
        assert near["place"] == f"{path}:2"
        assert near["message"].startswith("the same text, with another ")
        assert near["message"].endswith(f" as {path}:1")


# 6. The command and its page.


def test_the_exit_code_is_2_for_faults_and_0_for_findings(command, capsys, tmp_path):
    path = write(tmp_path / "data.jsonl", [alpaca(0), alpaca(0)])
    assert ended(command.main, capsys, "--data", path)[0] == 0
    write(path, [alpaca(0), {"instruction": "a", "output": ""}])
    assert refusal(command.main, capsys, "--data", path) == f"{path}:2: output: is empty; expected text\n"


def test_no_model_needs_no_torch():
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(SCRIPT.parent)!r}); runpy.run_path({str(SCRIPT)!r}, run_name='x');"
        "assert not {'torch', 'transformers', 'datasets', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Page(HTMLParser):
    """What a browser makes of a page: its elements, its text, and the tokens of each row with their classes."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.text, self.rows, self.inside = [], "", [], ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.inside = tag
        self.text += " " if tag in ("td", "th") else ""
        if attributes.get("class") == "tokens":
            self.rows.append([])
        if tag == "span" and "title" in attributes:
            self.rows[-1].append([attributes.get("class"), attributes["title"], ""])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "span" and self.rows:
            self.rows[-1][-1][2] += data
        if self.inside not in ("script", "style"):
            self.text += data

    def scripts(self):
        return sum(tag == "script" for tag, _ in self.tags)


@pytest.fixture
def page(check, tmp_path):
    """Check rows, a list or a file, and return what a browser makes of the page."""

    def run(rows, *flags):
        path = write(tmp_path / "data.jsonl", rows) if isinstance(rows, list) else rows
        check(path, "--html", tmp_path / "page.html", *flags)
        return Page(tmp_path / "page.html")

    return run


def test_the_page_needs_no_network_and_shows_text_as_text(page):
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"
    rows = [alpaca(0), {**alpaca(1), "output": "<think>Yes."}, {**alpaca(2), bad: 1}, {**alpaca(3), "output": {bad: 1}}]
    clean = page([alpaca(0), {**alpaca(1), "output": "<think>Yes."}], "--model", "tiny")
    shown = page([*rows, {"instruction": bad, "output": f"{bad} again"}], "--model", "tiny")
    assert "Plotly.react(" in shown.source
    assert not any(tag in ("link", "img", "iframe") for tag, _ in shown.tags)
    names = {name for _, attributes in shown.tags for name in attributes}
    assert not any(name in ("src", "href") or name.startswith("on") for name in names)
    assert shown.scripts() == clean.scripts()  # those of the plots, no more
    assert bad in shown.text  # in the message about row 4
    assert bad in "".join(text for _, _, text in shown.rows[3])  # in the tokens of row 5
    assert "data.jsonl:2: <think> has no counterpart" in shown.text


def test_the_page_shows_the_first_rows_with_their_loss(page, tokenizer):
    messages = ROOT / "data_samples" / "formats" / "messages.jsonl"
    shown = page(messages, "--model", "tiny")
    assert len(shown.rows) == 4
    trained = ["".join(text for kind, _, text in row if kind == "loss") for row in shown.rows]
    assert trained[0] == "A word that reads the same backwards, such as level.<|im_end|>Radar.<|im_end|>"
    assert trained[1] == "H₂O。<|im_end|>"  # of tokens that are parts of characters
    assert all(kind in ("loss", None) and text for row in shown.rows for kind, _, text in row)
    ids = tokenizer.apply_chat_template(read_jsonl(messages)[0]["messages"], return_dict=False)
    assert [int(id) for _, title, _ in shown.rows[0] for id in title.split()] == ids


def test_the_page_shows_both_completions_of_a_pair_and_what_is_truncated(page):
    pair = {"prompt": "Why?", "chosen": "Because. " * 50, "rejected": "No."}
    shown = page([pair], "--model", "tiny", "--max-length", 60)
    assert len(shown.rows) == 2
    assert "data.jsonl:1 chosen: 60 tokens, truncated from " in shown.text
    assert "Longer than the max length of 60 tokens: 1 row." in shown.text
    assert "No.<|im_end|>" in "".join(text for kind, _, text in shown.rows[1] if kind == "loss")


def test_a_prompt_has_no_loss_and_without_a_model_no_tokens(page):
    rows = [{"prompt": "What is 2 + 2?", "answer": "4"}]
    shown = page(rows, "--model", "tiny")
    assert {kind for row in shown.rows for kind, _, _ in row} == {None}
    shown = page(rows)
    assert shown.rows == []
    assert "Give --model to see them in its tokens" in shown.text


def test_the_page_names_what_was_checked_with_what(page, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text((ROOT / "data_samples" / "tiny" / "chat_template.jinja").read_text(encoding="utf-8"))
    shown = page([alpaca(0)], "--model", "tiny", "--chat-template-path", template)
    made = " ".join(shown.text[shown.text.index("How this report was made") :].split())
    identity = source_identity(find_source(str(tmp_path / "data.jsonl")))
    parts = (f"data {tmp_path}/data.jsonl", f"data identity {identity}", "model tiny", "checked on 20", "recipes ")
    assert all(part in made for part in (*parts, f"chat template {template}"))
    assert re.search(r"Python 3\.\d+\.\d+, transformers 5\.\d+", made)
    assert "chat template its own" in " ".join(page([alpaca(0)], "--model", "tiny").text.split())


def test_a_report_that_is_written_is_announced(check, tmp_path):
    name = tmp_path / "[red]report.html"  # markup, were it not a name
    _, out, _ = check(write(tmp_path / "data.jsonl", [alpaca(0)]), "--html", name)
    assert out.splitlines()[-2:] == [f"{tmp_path}/report.json written", f"{name} written"]


def test_the_axis_of_lengths_ends_where_the_data_do(check, tmp_path):
    from check_data.page import _lengths

    def axis(lengths, *flags):
        rows = [{"instruction": "y", "output": "x" * length} for length in lengths]
        report, _, _ = check(write(tmp_path / "data.jsonl", rows), *flags)
        plot, note = _lengths(report["length"], report.get("truncated"))
        histogram = report["length"]["histogram"]
        assert sum(histogram["counts"]) + histogram["beyond"] == len(lengths)
        return plot.layout.xaxis.range, note, plot.layout.shapes

    bounds, note, _ = axis([9, 19, 29])
    assert bounds == (9.5, 30.5)  # one more than the completion, and half a bin
    assert note == ""
    # One row of 200 that is a hundred times as long does not make a histogram of one bar.
    bounds, note, _ = axis([*range(100, 300), 20_000])
    assert bounds[1] < 700
    assert note == "Beyond the right edge: 1 row, up to 20,001 characters."
    # The limit of the length is a line where the axis has it, and does not stretch the axis where it has not.
    bounds, note, shapes = axis([10, 20, 30], "--model", "tiny")
    assert bounds[1] < 200
    assert (note, shapes) == ("Longer than the max length of 2,048 tokens: no row.", ())
    bounds, note, (line,) = axis([10, 20, 30], "--model", "tiny", "--max-length", 60)
    assert bounds[0] < line.x0 == 60 < bounds[1]


def test_above_the_size_of_the_sample_the_report_says_so(check, tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", [alpaca(index) for index in range(10)])
    report, out, _ = check(path)
    assert "near duplicates looked for in all rows" in out
    monkeypatch.setattr(survey_module, "SAMPLE_ROWS", 4)
    report, out, _ = check(path)
    assert report["sampled"] == 4
    assert "near duplicates looked for in 4 rows drawn at random" in out


def test_the_sample_is_drawn_from_all_rows_alike(monkeypatch):
    monkeypatch.setattr(survey_module, "SAMPLE_ROWS", 100)
    survey = Survey(Findings())
    for number in range(1000):
        survey.add(turns(f"f:{number}", f"question {number}", "yes"))
    numbers = [int(row.place[2:]) for row in survey.sample]
    assert len(set(numbers)) == 100
    assert 420 < sum(numbers) / 100 < 580  # 2.9 deviations of the mean of 100 of 1,000


def turns(place, question, answer):
    return Conversation(place, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


# 7. Properties of texts.


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "English"),
        ("法国的首都是哪里？", "Chinese"),
        ("把 hello 翻译成中文。", "Chinese"),
        ("The word 谢谢 means thank you in the Chinese language.", "English"),
        ("これは日本語です。", "other"),
        ("Это не по-английски.", "other"),
        ("Wie heißt die Hauptstadt und wo ist sie? Das weiß ich nicht.", "other"),
        ("¿Cuál es la capital de los Estados Unidos?", "other"),
        ("12 + 30 = 42", "other"),
    ],
)
def test_languages(text, language):
    assert texts.language(text) == language


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, but I cannot assist.", True),
        ("As an AI language model, I have no feelings.", True),
        ("I cannot provide that.", True),
        ("<think>Is it allowed? No.</think>I'm sorry, I can't do that.", True),
        ("对不起，我不能回答这个问题。", True),
        ("作为一个人工智能，我没有感情。", True),
        ("I'm sorry to hear that! Try again tomorrow.", False),
        ("Sorry seems to be the hardest word.", False),
        ("I cannot find the sum without y, so first solve for y.", False),
        ("对不起，我来晚了。", False),
        ("As an airline, they fly.", False),
    ],
)
def test_refusals(text, refuses):
    assert texts.refuses(text) is refuses


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<think>a</think><answer>b</answer>", None),
        ("<think>a<answer>b</answer>", "<think>"),
        ("a</think>b", "</think>"),
        ("<think>a<answer>b</think>c</answer>", "</think>"),
        ("<p>a<br>b", None),
        ("if a <answer> b", "<answer>"),
    ],
)
def test_unbalanced_tags(text, tag):
    assert texts.unbalanced(texts.marks(text)) == tag


def test_the_layout_of_a_completion_is_its_marks():
    assert texts.layout(texts.marks("<think>a</think>b")) == "<think> </think>"
    assert texts.layout(texts.marks("It is \\boxed{4}.")) == "\\boxed{"
    assert texts.layout(texts.marks("2 + 2\n#### 4")) == "####"
    assert texts.layout(texts.marks("4 #### 4")) == "plain text"


@pytest.mark.parametrize(
    ("prompt", "answer", "repeats"),
    [
        ("Say hello", "Say hello", True),
        ("Say hello", "Say hello to all of them.", False),
        ("Why is the sky blue today?", "Why is the sky blue today? Because.", True),
        ("Why is the sky blue today?", "Because. Why is the sky blue today?", False),
    ],
)
def test_answers_that_repeat_the_prompt(prompt, answer, repeats):
    assert texts.repeats(prompt, answer) is repeats


def test_the_difference_of_two_texts_is_what_lies_between_their_ends():
    assert texts.difference("abcXdef", "abcYdef") == 1 / 7
    assert texts.difference("abc", "abc") == 0
    assert texts.difference("abc", "") == 1
    assert texts.difference("aaa", "aaaaa") == 2 / 5  # beginning and end do not count the same letters twice
    assert texts.difference("abcd", "wxyz") == 1


def test_the_similarity_of_near_duplicates_is_that_of_their_shingles():
    texts = NearDuplicates()
    words = [f"w{number}" for number in range(22)]  # 20 shingles of three
    assert texts.find_or_keep("a", " ".join(words)) is None
    # The last word replaced: 19 shingles in common of 21.
    assert texts.find_or_keep("b", " ".join([*words[:-1], "x"])) == ("a", 19 / 21)
    # Five words replaced at the end: 15 in common of 25, which is below 0.8.
    assert texts.find_or_keep("c", " ".join([*words[:-5], *"vwxyz"])) is None
    assert texts.find("1 2") is None


def test_similarity_is_that_of_whole_rows_and_never_100_percent_of_other_text(check, tmp_path):
    beginning = " ".join(f"word{number}" for number in range(3000))
    ends = [" ".join(f"{end}{number}" for number in range(1000)) for end in ("left", "right")]
    rows = [
        {"instruction": QUESTIONS[0], "output": f"{beginning} {ends[0]}"},
        {"instruction": QUESTIONS[0], "output": f"{beginning} {ends[1]}"},  # of 5,000 shingles they share 3,000
        {"instruction": QUESTIONS[0], "output": f"{beginning} {ends[0]} more"},  # 4,000 of 4,001
    ]
    report, _, _ = check(write(tmp_path / "data.jsonl", rows))
    assert lines(report) == {"near-duplicate": [3]}
    message = report["findings"]["near-duplicate"]["listed"][0]["message"]
    assert (
        message == f"{message.split()[0]} {message.split()[1]} the same as {tmp_path}/data.jsonl:1" or "99%" in message
    )
    assert "100% the same" not in message.replace("nearly 100%", "")


def test_the_similarity_of_long_texts_is_estimated_within_three_standard_errors():
    words = [f"w{number}" for number in range(20_000)]
    for changed in (200, 1000, 2500):
        one = Shingles.of(" ".join(words))
        two = Shingles.of(" ".join([*words[:-changed], *(f"x{number}" for number in range(changed))]))
        true = (20_000 - changed - 2) / (20_000 + changed - 2)
        assert one.similarity(two) == pytest.approx(true, abs=0.027)


@pytest.mark.slow
def test_near_duplicates_are_the_same_whatever_the_seed_of_hashes(tmp_path):
    """A cluster of more candidates than are compared, whose order in a set depends on PYTHONHASHSEED."""
    order = random.Random(0)
    words = [f"w{number}" for number in range(40)]
    texts_alike = [
        " ".join(order.choice(words) if order.random() < 0.03 else word for word in words) for _ in range(400)
    ]
    program = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from check_data.duplicates import NearDuplicates\n"
        "kept = NearDuplicates()\n"
        "print([kept.find_or_keep(f'f:{n}', text) for n, text in enumerate(json.load(sys.stdin))])"
    )
    there = subprocess.run(
        [sys.executable, "-c", program, SCRIPT.parent],
        input=json.dumps(texts_alike), env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kept = NearDuplicates()
    assert there == f"{[kept.find_or_keep(f'f:{n}', text) for n, text in enumerate(texts_alike)]}\n"
    assert there.count("f:") > 3


def test_distinct_ngrams():
    assert distinct(["a b a b"], 1) == 2 / 4
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["红红", "红"], 1) == 1 / 3
    assert distinct(["a"], 2) is None


# 8. Size.


@pytest.mark.slow
def test_reading_and_checking_take_a_small_multiple_of_parsing_json(tmp_path):
    """Usual are 5 times the processor time of json.loads to read and validate rows, and 16 with every finding."""
    answer = "Half of {0} is less than {0}.\nAnd {0} more clips were sold in May than in April.\n#### {0}"
    rows = [[f"How many clips were sold, if {n} were sold in May? " * 4, answer.format(n) * 3] for n in range(2000)]
    path = write(tmp_path / "data.jsonl", ({"messages": turns("", *row).messages} for row in rows))

    def seconds(work):
        started = time.process_time()
        assert sum(1 for _ in work()) == len(rows)
        return time.process_time() - started

    def read():
        faults = Faults()
        return as_examples(read_rows(find_source(str(path)), faults), faults, FORMATS)

    def parse():
        return map(json.loads, path.read_text(encoding="utf-8").splitlines())

    def check():
        findings = Findings()
        survey = Survey(findings, estimate=Limits("sft", 2048, 1024, findings))
        return map(survey.add, read())

    rounds = [[seconds(work) for work in (parse, read, check)] for _ in range(5)]
    parsed, was_read, checked = map(min, zip(*rounds, strict=True))
    assert was_read < 10 * parsed
    assert checked < 25 * parsed


@pytest.mark.slow
def test_memory_does_not_grow_with_what_rows_hold(monkeypatch):
    monkeypatch.setattr(survey_module, "SAMPLE_ROWS", 10)
    survey = Survey(Findings())
    tracemalloc.start()
    for number in range(1000):
        survey.add(turns(f"f:{number}", f"question {number}", "yes, " * 2000))  # 10 MB in all
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20


def test_a_pair_counts_the_chosen_answer_only():
    findings = Findings()
    survey = Survey(findings)
    user = [{"role": "user", "content": QUESTIONS[0]}]
    refusal = [{"role": "assistant", "content": "I'm sorry, but I can't help with that."}]
    survey.add(Pair("f:1", user, [{"role": "assistant", "content": ANSWERS[0]}], refusal))
    assert not findings.rows
    survey.add(Pair("f:2", user, refusal, [{"role": "assistant", "content": ANSWERS[0]}]))
    assert set(findings.rows) == {"refusal"}


def test_the_command_can_drop_every_kind_but_faults_which_it_always_drops(command):
    assert {"fault", *command.Droppable.__args__} == set(KINDS)
