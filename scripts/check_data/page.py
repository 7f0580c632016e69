"""The figures of a survey as one HTML page with plots, which needs no network to be opened."""

import itertools
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from common.data.rows import Faults
from common.errors import spell
from common.pages.page import COLOURS as PALETTE
from common.pages.page import render
from common.run.files import write_bytes

from check_data.lengths import Lengths
from check_data.mask import Token, masked_rows
from check_data.report import COLOURS, lines, rows
from check_data.tasks import Example

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SHOWN_TOKENS = 1_000  # of a row
COLOUR = PALETTE[0]
GREY = "#808080"  # legible on white and on black


def write(file: Path, report: dict[str, Any], lengths: Lengths | None, examples: list[Example]) -> None:
    """Write the page to `file`; what is in the data is text in it and never markup.

    Shows `examples` in the tokens of `lengths`; without a model it says how to see them.
    """
    shown = list(masked_rows(lengths, examples, Faults())) if lengths else []  # their faults are in the report
    page = render(
        TEMPLATE,
        report=report,
        colours=COLOURS,
        figures=lines(report),
        provenance=_provenance(report),
        plots=_plots(report),
        shown=shown,
        pieces=_pieces,
        spell=spell,
        rows=rows,
        shown_tokens=SHOWN_TOKENS,
    )
    write_bytes(file, page.encode("utf-8", errors="replace"))


def _pieces(tokens: list[Token]) -> Iterator[tuple[str, list[int], bool]]:
    """Text, token ids and whether the loss is on it: a token each, or all those of one character."""
    ids: list[int] = []
    for token in tokens:
        ids.append(token.id)
        if token.text or token is tokens[-1]:
            yield token.text, ids, token.has_loss
            ids = []


def _provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was checked, with what: enough to check it again."""
    code = report["code"]
    commit = (code["git"]["commit"] or "unknown")[:12] + (", with changes" if code["git"]["dirty"] else "")
    used = ("transformers", "tokenizers") if report["model"] else ("datasets",)
    packages = [f"{name} {code['packages'][name]}" for name in used if name in code["packages"]]
    lock = [f"{code['lock']['file']} {code['lock']['sha256'][:12]}"] if code["lock"] else []
    known = {
        "data": report["data"],
        "data identity": report["identity"],
        "evaluation data": report["eval_data"],
        "model": report["model"],
        "chat template": report["chat_template"],
        "checked on": report["date"],
        "versions": ", ".join([f"recipes {commit}", *lock, f"Python {code['python']}", *packages]),
    }
    return [(name, value) for name, value in known.items() if value]


def _plots(report: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The data and the layout of each plot, and a note below it."""
    plots = []
    if length := report["length"]:
        plots.append(_lengths(length, report.get("truncated")))
    if scores := report.get("scores"):
        plots.append((_histogram("Scores", scores["histogram"]), ""))
    counted = {
        "Languages": report["languages"],
        "Turns of user and assistant in a row": report["turns"],
        "Layouts of the completions": report["layouts"],
    }
    if pairs := report.get("pairs"):
        sides = {side: pairs[f"{side} longer"] * report["usable"] for side in ("chosen", "rejected")}
        counted["The longer completion"] = {side: round(count) for side, count in sides.items()}
    plots += [(_bars(title, counts), "") for title, counts in counted.items() if len(counts) > 1]
    return [(json.loads(plot.to_json()), note) for plot, note in plots]


def _lengths(length: dict[str, Any], truncated: dict[str, Any] | None) -> tuple[go.Figure, str]:
    """The histogram of lengths. Its axis ends where the data do, or before a few rows that are much longer."""
    histogram, notes = length["histogram"], []
    plot = _histogram(f"Length in {length['unit']}", histogram)
    if beyond := histogram["beyond"]:
        notes.append(f"Beyond the right edge: {rows(beyond)}, up to {length['max']:,.0f} {length['unit']}.")
    if truncated:
        limit = truncated["max_length"]
        if limit <= histogram["edges"][-1]:
            plot.add_vline(limit, line_dash="dash", line_color=GREY, annotation_text=f"max length {limit:,}")
        longer = rows(truncated["rows"]) if truncated["rows"] else "no row"
        notes.append(f"Longer than the max length of {limit:,} tokens: {longer}.")
    return plot, " ".join(notes)


def _histogram(title: str, histogram: dict[str, Any]) -> go.Figure:
    edges, counts = histogram["edges"], histogram["counts"]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    widths = [high - low for low, high in itertools.pairwise(edges)]
    plot = _styled(title, go.Bar(x=middles, y=counts, width=widths, marker_color=COLOUR))
    return plot.update_xaxes(range=[edges[0], edges[-1]])


def _bars(title: str, counts: dict[Any, int]) -> go.Figure:
    names = [escape(str(name)) for name in counts]  # plotly reads tags in its labels
    bars = go.Bar(x=names, y=list(counts.values()), marker_color=COLOUR, width=0.5)
    return _styled(title, bars).update_xaxes(type="category", range=[-0.75, len(names) - 0.25])


def _styled(title: str, bars: go.Bar) -> go.Figure:
    layout = {
        "template": "none",
        "height": 300,
        "margin": {"l": 50, "r": 20, "t": 50, "b": 40},
        "title": {"text": title, "font": {"size": 15}, "x": 0, "xref": "container"},
    }
    plot = go.Figure(bars, layout=layout)
    plot.update_xaxes(showgrid=False, zeroline=False, ticks="outside")
    plot.update_yaxes(title="rows", zeroline=False, rangemode="tozero")
    return plot.update_yaxes(dtick=1) if max(bars.y) < 5 else plot  # no half rows
