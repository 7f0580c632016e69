"""What the rows of a run show before it trains: copies, and pairs without a difference or with one of length only."""

from collections.abc import Sequence
from typing import Any

from common.data.examples import Example, Pair, Prompt


def measure(rows: Sequence[Example]) -> dict[str, Any]:
    """Counts for run.json: rows, distinct rows and, of pairs, those alike and those whose chosen completion is longer.

    Prompts are counted no further: GRPO and PPO may draw one as often as they like.
    """
    found: dict[str, Any] = {"rows": len(rows)}
    if isinstance(rows[0], Prompt):
        return found
    found["distinct"] = len({hash(content(row)) for row in rows})
    pairs = [(text(row.chosen), text(row.rejected)) for row in rows if isinstance(row, Pair)]
    if pairs:
        found["alike"] = sum(plain(chosen) == plain(rejected) for chosen, rejected in pairs)
        found["chosen longer"] = sum(len(chosen) > len(rejected) for chosen, rejected in pairs)
        found["characters of chosen"] = round(sum(len(chosen) for chosen, _ in pairs) / len(pairs), 1)
        found["characters of rejected"] = round(sum(len(rejected) for _, rejected in pairs) / len(pairs), 1)
    return found


def content(row: Example) -> str:
    """A row without its place in the file."""
    return repr([getattr(row, name) for name in row.__slots__ if name != "place"])


def text(turns: Any) -> str:
    return "".join(str(turn.get("content") or "") for turn in turns)


def plain(written: str) -> str:
    """A text without its spaces. Punctuation stays: 3.5 is not 35."""
    return "".join(written.split())
