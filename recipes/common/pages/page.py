"""An HTML page in one file, which needs no network: the shared template, its style, its plots and what protects it.

Text from data is text in a page and never markup: every template escapes what it is given, and data reaches scripts as
JSON only. Besides, the page names the hashes of its own scripts, and a browser runs no other script and sends nothing.
"""

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent
# What would end a <script> or a line in one. In JSON these characters are in strings only.
UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
# Legible on white and on black, and told apart by most colour-blind readers.
COLOURS = ("#4c8dd6", "#d9822b", "#3f9e6b", "#d0545c", "#9a6fd0", "#8c7b5a", "#2a9fb0", "#d067a8")


def render(template: Path, embedded: bool = True, **values: Any) -> str:
    """The page of a template, which extends base.html.jinja.

    Args:
        template: its file; templates beside it can be included.
        embedded: whether the plotting library is in the page, so that it works as a file; else it is at /plotly.js, for
            a page that a server serves.
        values: what the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as_json"] = as_json
    drawing = (HERE / "plots.js").read_text(encoding="utf-8")
    scripts = [drawing, plotly()] if embedded else [drawing]
    return environment.get_template(template.name).render(
        plotly=Markup(plotly()) if embedded else None,
        drawing=Markup(drawing),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        policy=policy(scripts, served=not embedded),
        **values,
    )


def as_json(value: Any) -> Markup:
    """A value as JSON that is safe inside a <script> element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)
    return Markup(text.translate(UNSAFE))


def policy(scripts: list[str], served: bool) -> str:
    """The Content-Security-Policy of a page: these scripts and no other, and no request but to its own server."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = [*(f"'sha256-{one}'" for one in hashes), *(["'self'"] if served else [])]
    parts = [
        "default-src 'none'",
        f"script-src {' '.join(allowed)}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
    ]
    return "; ".join([*parts, *(["connect-src 'self'"] if served else []), "base-uri 'none'", "form-action 'none'"])


@functools.cache
def plotly() -> str:
    """The plotting library, a script of 4.8 MB."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
