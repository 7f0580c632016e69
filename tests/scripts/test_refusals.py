"""Refusals are distinguished from answers in at least 95 % of texts labelled by hand, English and Chinese.

    make test ARGS="-n 0 -s tests/scripts/test_refusals.py"         prints the precision and recall of docs/data.md

The texts of refusals.jsonl are written after what public data holds. Of those that are no refusals most look like one:
apologies after which the answer follows, "as an AI", refusals in a story, a letter, a quotation or code.
"""

from pathlib import Path

import pytest
from check_data.refusals import OPENING, refuses
from conftest import read_jsonl, slowdown

ROWS = read_jsonl(Path(__file__).with_name("refusals.jsonl"))
HELD_OUT = read_jsonl(Path(__file__).with_name("refusals_held_out.jsonl"))
LANGUAGES = {"en": "English", "zh": "Chinese"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_at_least_95_percent_of_the_labelled_texts_are_judged_right(language):
    rows = [row for row in ROWS if row["language"] == language]
    share, precision, recall = judged(rows)
    print(
        f"{LANGUAGES[language]}: {len(rows)} texts, right {share:.1%}, precision {precision:.1%}, recall {recall:.1%}"
    )
    assert len(rows) >= 100
    assert 0.4 < sum(row["refusal"] for row in rows) / len(rows) < 0.6
    assert min(share, precision, recall) >= 0.95


@pytest.mark.parametrize("language", LANGUAGES)
def test_of_texts_that_no_rule_was_made_for_most_are_judged_right(language):
    """These were labelled before the rules saw them, and no rule may be changed for them; write new ones for that."""
    rows = [row for row in HELD_OUT if row["language"] == language]
    share, precision, recall = judged(rows)
    print(
        f"{LANGUAGES[language]}, held out: {len(rows)} texts, right {share:.1%}, precision {precision:.1%}, "
        f"recall {recall:.1%}"
    )
    assert 0.4 < sum(row["refusal"] for row in rows) / len(rows) < 0.6
    assert share >= 0.8
    assert precision >= 0.9


def judged(rows):
    """The shares of the texts that are judged right, of the found that are refusals, and of the refusals found."""
    found = [refuses(row["text"]) for row in rows]
    right = sum(one == row["refusal"] for one, row in zip(found, rows, strict=True))
    both = sum(one and row["refusal"] for one, row in zip(found, rows, strict=True))
    return right / len(rows), both / sum(found), both / sum(row["refusal"] for row in rows)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("As an AI assistant, I'd be happy to help", False),
        ("作为一名人工智能助手，我会尽力帮您。", False),
        ("I'm sorry, but I can't give the exact number. However, it is about 40.", False),
        ("I'm sorry, but I can't give the exact number.", True),
        ('"I can\'t help you," whispered the fox.', False),
        ("I can't help you.", True),
        ("抱歉，我无法给出准确的数字，但大约是四十。", False),
        ("抱歉，我无法给出准确的数字。", True),
    ],
)
def test_what_follows_or_frames_a_refusal_decides(text, refusal):
    assert refuses(text) is refusal


def test_a_refusal_far_into_a_text_is_part_of_an_answer():
    assert not refuses("The law is old. " * (OPENING // 10) + "I can't help with that.")


@pytest.mark.parametrize(
    "text",
    [
        lambda n: "I can't " * n, lambda n: "i " * n + "not", lambda n: "我" + "不" * n,
        lambda n: "i'm sorry, " * n + "no",
    ],
)  # fmt: skip
def test_no_text_takes_long(text):
    assert slowdown(lambda length: refuses(text(length)), 5_000, 20_000) < 8
