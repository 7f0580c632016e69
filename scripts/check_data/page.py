"""The figures of a survey as one HTML page with plots, which needs no network to be opened."""

import itertools
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from .report import COLOURS, lines

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
td { vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
td:first-child { min-width: 12rem; }
.green { color: #17803d; } .yellow { color: #9a6700; } .red { color: #c02626; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1rem; }
.plots > div { min-width: 0; }
details { margin: .4rem 0; } summary { cursor: pointer; } li { overflow-wrap: anywhere; }
"""
COLOUR = "#3b6ea5"
CONFIG = {"displayModeBar": False, "responsive": True}


def write(file: Path, report: dict[str, Any]) -> None:
    """Write the page to `file`; what is in the data is text in it and never markup."""
    rules = "".join(
        f'<tr><td>{escape(rule["rule"])}</td><td class="{COLOURS[rule["verdict"]]}"><b>{rule["verdict"]}</b></td>'
        f"<td>{escape(rule['says'])}</td></tr>"
        for rule in report["rules"]
    )
    found = "".join(
        f"<details><summary>rows: {count['rows']:,} <b>{kind}</b>, {escape(count['what'])}</summary><ul>"
        + "".join(f"<li><b>{escape(one['place'])}</b>: {escape(one['message'])}</li>" for one in count["listed"])
        + (f"<li>the first {len(count['listed'])}</li>" if len(count["listed"]) < count["rows"] else "")
        + "</ul></details>"
        for kind, count in report["findings"].items()
    )
    table = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in lines(report))
    plots = "".join(
        f"<div>{plot.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)}</div>" for plot in _plots(report)
    )
    title = f"{report['data']}: {report['rows']:,} rows, {report['task']}, format {report['format']}"
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>"
        f"<table>{rules}</table><h2>Findings</h2>{found or '<p>None.</p>'}"
        f'<h2>Figures</h2><table>{table}</table><h2>Plots</h2><div class="plots">{plots}</div></body></html>\n'
    )
    file.write_text(page, encoding="utf-8", errors="replace")


def _plots(report: dict[str, Any]) -> list[go.Figure]:
    plots = []
    if length := report["length"]:
        plot = _histogram(f"Length in {length['unit']}", length["histogram"])
        if cut := report.get("truncated"):
            plot.add_vline(cut["max_length"], line_dash="dash", annotation_text="max length")
        plots.append(plot)
    if scores := report.get("scores"):
        plots.append(_histogram("Scores", scores["histogram"]))
    counted = {
        "Languages": report["languages"],
        "Turns of user and assistant in a row": report["turns"],
        "Forms of the answers": report["answer_forms"],
        "Findings": {kind: found["rows"] for kind, found in report["findings"].items()},
    }
    if pairs := report.get("pairs"):
        sides = {side: pairs[f"{side} longer"] * report["usable"] for side in ("chosen", "rejected")}
        counted["The longer answer"] = {side: round(count) for side, count in sides.items()}
    return plots + [_bars(title, counts) for title, counts in counted.items() if len(counts) > 1]


def _histogram(title: str, histogram: dict[str, list[float]]) -> go.Figure:
    edges, counts = histogram["edges"], histogram["counts"]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    widths = [high - low for low, high in itertools.pairwise(edges)]
    return _styled(title, go.Bar(x=middles, y=counts, width=widths, marker_color=COLOUR))


def _bars(title: str, counts: dict[Any, int]) -> go.Figure:
    names = [escape(str(name)) for name in counts]
    return _styled(title, go.Bar(x=names, y=list(counts.values()), marker_color=COLOUR)).update_xaxes(type="category")


def _styled(title: str, bars: go.Bar) -> go.Figure:
    layout = {"template": "simple_white", "height": 320, "margin": {"l": 50, "r": 20, "t": 50, "b": 40}}
    return go.Figure(bars, layout={**layout, "title": {"text": title, "font": {"size": 15}}}).update_yaxes(title="rows")
