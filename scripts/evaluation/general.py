"""Is general ability kept? A small fixed set of facts that every language model of today knows, by log-likelihood.

Training on one thing can cost another (catastrophic forgetting). The items of general.jsonl, in English and Chinese,
are sentences with one right and three wrong ends. A model is right where the right end is likelier than the others, per
byte (as acc_norm of lm-evaluation-harness); and its log-probability falls before its choices change. No chat template:
it is about what the model knows, and not how it answers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.figures import Measured
from evaluation.score import score

FILE = Path(__file__).with_name("general.jsonl")
LIKELIHOOD = "right end (nats per byte)"


@dataclass(frozen=True)
class Item:
    """The beginning of a sentence, its right end and three wrong ones."""

    language: str
    text: str
    right: str
    wrong: list[str]


def items() -> list[Item]:
    return [Item(**json.loads(line)) for line in FILE.read_text(encoding="utf-8").splitlines()]


def know(model: Any, tokenizer: Any, what: str) -> Measured:
    """How often the right end of a sentence is the likeliest, and how likely it is."""
    facts = items()
    ends = [(item, end) for item in facts for end in (item.right, *item.wrong)]
    scored = score(model, tokenizer, [spans(tokenizer, item.text, end) for item, end in ends], what)
    per_byte = [
        float(one.log_probs.sum()) / len(end.strip().encode()) for one, (_, end) in zip(scored, ends, strict=True)
    ]
    of_item = [per_byte[first : first + 4] for first in range(0, len(per_byte), 4)]
    rows = [
        {"text": item.text, "right": item.right, "chosen": [item.right, *item.wrong][own.index(max(own))]}
        for item, own in zip(facts, of_item, strict=True)
    ]
    values = {"right": [max(own) == own[0] for own in of_item], LIKELIHOOD: [own[0] for own in of_item]}
    return Measured(values, {"general": rows}, [item.language for item in facts])


def spans(tokenizer: Any, text: str, end: str) -> tuple[list[int], list[int]]:
    """The tokens of a text and of its end, as they are when both are read together."""
    whole = tokenizer(text + end)["input_ids"]
    if whole and whole[-1] == tokenizer.eos_token_id:
        whole = whole[:-1]  # of a tokenizer that ends every text
    first = len([token for token in tokenizer(text)["input_ids"] if token != tokenizer.eos_token_id])
    first = min(max(first, 1), len(whole) - 1)
    return whole[:first], whole[first:]
