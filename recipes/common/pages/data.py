"""What a report tells of a run's data: how much, how long, what was held out, and which tokens carry loss."""

from typing import Any

from common.pages.facts import identity
from common.pages.reading import RunFiles


def data(run: RunFiles) -> list[tuple[str, str]]:
    """What it was trained on."""
    record, given = run.record, run.arguments
    facts = record.get("data") or {}
    weights = record.get("weights") or {}
    known = {
        "data": given.get("data"),
        "identity": identity(record.get("matters", {}).get("data")),
        "rows": f"{facts['rows']:,}" if "rows" in facts else None,
        "trained on": _trained(facts),
        "format": facts.get("format") or given.get("format"),
        "length": _length(facts.get("tokens") or {}),
        "longer than the limit, truncated": f"{facts['truncated']:,} rows" if facts.get("truncated") else None,
        "duplicates": _duplicates(facts),
        "columns under another name": " ".join(given.get("columns") or []),
        "good and bad completions": f"{weights['good_rows']:,} and {weights['bad_rows']:,}" if weights else None,
        "evaluation data": given.get("eval_data"),
        "held out": f"{given['eval_ratio']:.0%} of the rows" if given.get("eval_ratio") else None,
        "notes": "; ".join(facts.get("notes", [])),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def examples(run: RunFiles) -> list[dict[str, Any]]:
    """The first rows that it trains on, in segments that carry loss or not; [] where none were written down."""
    return (run.record.get("data") or {}).get("examples", [])


def mask(segments: list[tuple[str, int, bool]]) -> str:
    """How many tokens there are in segments, and how many carry loss."""
    trained = sum(count for _, count, has_loss in segments if has_loss)
    return f"{sum(count for _, count, _ in segments):,} tokens, {trained:,} with loss"


def _trained(facts: dict[str, Any]) -> str | None:
    if "trained" not in facts:
        return None
    return f"{facts['trained']:,} rows" + (f"; {facts['held_out']:,} are held out" if facts.get("held_out") else "")


def _length(tokens: dict[str, Any]) -> str | None:
    """The lengths of what the model reads in training, in words."""
    if not tokens:
        return None
    of = f"tokens of a {tokens['of']}"
    parts = [f"{name} {tokens[name]:,}" for name in ("median", "mean", "95th percentile", "longest") if name in tokens]
    return f"{of}: {', '.join(parts)} (of {tokens['measured']:,})"


def _duplicates(facts: dict[str, Any]) -> str | None:
    """How many rows are another one once more; None where that was not counted."""
    count = facts.get("duplicates")
    if count is None:
        return None
    return f"{count:,} rows ({count / facts['rows']:.1%})" if count else "none"
