"""What the rows of a run show before it trains: copies, and pairs without a difference or with one of length only."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from common.data.examples import Example, Pair, Prompt
from common.data.turns import Turns


def measure(rows: Sequence[Example]) -> dict[str, Any]:
    """Counts for run.json: rows, distinct rows and, of pairs, those alike and those whose chosen completion is longer.

    Prompts are counted no further: GRPO and PPO may draw one as often as they like.
    """
    found: dict[str, Any] = {"rows": len(rows)}
    if isinstance(rows[0], Prompt):
        return found
    found["distinct"] = distinct(rows)
    pairs = [(written(row.chosen), written(row.rejected)) for row in rows if isinstance(row, Pair)]
    if pairs:
        found["alike"] = sum(plain(chosen) == plain(rejected) for chosen, rejected in pairs)
        found["chosen longer"] = sum(len(chosen) > len(rejected) for chosen, rejected in pairs)
        found["characters of chosen"] = round(sum(len(chosen) for chosen, _ in pairs) / len(pairs), 1)
        found["characters of rejected"] = round(sum(len(rejected) for _, rejected in pairs) / len(pairs), 1)
    return found


def distinct(rows: Iterable[Example]) -> int:
    """How many rows there are, whatever their place in the file, without those that are another one once more."""
    return len({hash(repr([getattr(row, one.name) for one in fields(row) if one.name != "place"])) for row in rows})


def written(turns: Turns) -> str:
    """All that the model would write of a completion: reasoning, text and calls of tools."""
    parts = [turn.get(name) or "" for turn in turns for name in ("reasoning_content", "content", "tool_calls")]
    return "".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)


def plain(text: str) -> str:
    """A text without its spaces. Punctuation stays: 3.5 is not 35."""
    return "".join(text.split())
