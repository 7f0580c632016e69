"""The comparison to read: the table, and every prompt with both completions."""

import re
from typing import TYPE_CHECKING, Any

from comparison.figures import both_means
from comparison.rules import DIMENSIONS

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("", "prompts", "A", "B", "B - A", "95 %", "B wins", "95 %")


def as_table(title: str, dimensions: dict[str, dict[str, Any]]) -> "Table":
    """The figures for the terminal."""
    from rich.table import Column, Table

    table = Table(*(Column(heading, no_wrap=bool(heading)) for heading in HEADINGS), title=title, padding=(0, 0, 0, 1))
    for name, row in dimensions.items():
        table.add_row(*cells(name, row))
    return table


def as_markdown(a: str, b: str, figures: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, then every prompt with both completions: those that differ the most first."""

    def lead(row: dict[str, Any]) -> float:
        one, other = both_means(row["A"]["ratings"], row["B"]["ratings"])
        return 0.0 if one is None or other is None else other - one

    lines = [f"# Two models on {figures['prompts']} prompts", "", f"A: `{a}`", "", f"B: `{b}`", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells(name, row)) + " |" for name, row in figures["dimensions"].items()]
    lines += ["", "Ratings are in the order " + ", ".join(DIMENSIONS) + "; - where nothing could tell.", ""]
    for row in sorted(rows, key=lambda row: -abs(lead(row))):
        lines += [f"## {row['place'].rpartition('/')[2]}: B - A {lead(row):+.2f}", ""]
        lines += [quoted("\n\n".join(turn["content"] for turn in row["prompt"])), ""]
        for name in ("A", "B"):
            given = row[name]["ratings"].values()
            ratings = ", ".join("-" if number is None else f"{number:g}" for number in given)
            lines += [f"**{name}** ({ratings})", "", quoted(row[name]["completion"]), ""]
    return "\n".join(lines)


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "A" not in row:
        return [name, "0", *["-"] * 6]
    (low, high), (least, most) = row["difference interval"], row["B wins interval"]
    return [
        *(name, str(row["prompts"]), f"{row['A']:.2f}", f"{row['B']:.2f}"),
        *(f"{row['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}"),
        *(f"{row['B wins']:.0%}", f"{least:.0%} to {most:.0%}"),
    ]


def quoted(text: str) -> str:
    """A text as it is, in a fence longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
