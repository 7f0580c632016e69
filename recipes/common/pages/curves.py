"""The curves of one run or several, as figures for plotly: which metrics belong together, and few enough points.

Thinned curves keep their extremes.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from common.pages.page import COLOURS
from common.pages.reading import RunFiles

POINTS = 30_000  # of all curves of a page together, about 0.5 MB
MOST, FEWEST = 1_000, 100  # points of one curve
DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot")
HELD_OUT = "eval_"  # before the name of a metric: the same on held-out data


@dataclass(frozen=True)
class Group:
    """A chart: its title, the unit of its axis, and {name of a curve: key in metrics.jsonl}."""

    title: str
    unit: str
    lines: dict[str, str]
    from_zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it."""

    title: str
    figure: dict[str, Any]
    note: str


GROUPS = (
    Group("Loss", "loss", {"loss": "loss"}),
    Group("Reward", "reward", {"mean": "reward", "standard deviation": "reward_std"}),
    Group("Score", "score", {"mean": "score/mean", "standard deviation": "score/std"}),
    Group("Reward by function", "mean reward", {}),  # rewards/NAME/mean
    Group("Truncated completions", "share", {"truncated": "completions/clipped_ratio"}, from_zero=True),
    Group("Groups with equal rewards", "share", {"flat": "flat"}, from_zero=True),
    Group("KL from the reference policy", "nats", {"kl": "kl", "KL of a completion": "objective/kl"}),
    Group(
        "Length of the completions",
        "tokens",
        {"mean": "completions/mean_length", "longest": "completions/max_length", "shortest": "completions/min_length"},
        from_zero=True,
    ),
    Group("Entropy of the policy", "nats per token", {"entropy": "entropy", "policy": "policy/entropy"}),
    Group("Implicit rewards", "reward", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}),
    Group("Margin of the chosen completions", "reward", {"margin": "rewards/margins"}),
    Group("Pairs ranked right", "share", {"accuracy": "rewards/accuracies"}),
    Group("Log-probabilities", "nats", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
    Group("Tokens predicted right", "share", {"accuracy": "mean_token_accuracy"}),
    Group("Losses of PPO", "loss", {"policy": "loss/policy_avg", "critic": "loss/value_avg"}),
    Group("KL of the update", "nats per token", {"approximate KL": "policy/approx_kl"}),
    Group(
        "Share of clipped tokens",
        "share",
        {"policy": "policy/clipfrac_avg", "critic": "val/clipfrac_avg"},
        from_zero=True,
    ),
    Group("Explained variance of the critic", "share", {"explained variance": "value/explained_variance"}),
    Group("KL coefficient", "coefficient", {"KL coefficient": "objective/kl_coef"}),
    Group("Learning rate", "learning rate", {"learning rate": "learning_rate", "policy": "lr", "critic": "critic_lr"}),
    Group(
        "Norm of the gradient",
        "norm",
        {"gradient": "grad_norm", "policy": "policy/grad_norm", "critic": "value/grad_norm"},
    ),
    Group("Speed, of useful tokens", "tokens/s", {"tokens/s": "tokens_per_second"}, from_zero=True),
    Group("Peak memory", "GiB", {"memory": "memory_gib"}, from_zero=True),
)
BY_FUNCTION = re.compile(r"rewards/(?P<name>.+)/mean")
# What is no curve: counters, the clock, and the trainer's summary of a whole run.
NO_CURVE = re.compile(
    r"step|epoch|tokens|num_tokens|episode|timestamp|total_flos|train_\w+|eval_(runtime|num_tokens|\w+_per_second)"
)


def title_of(key: str) -> str:
    """A metric in words, as the titles of the charts have it; one that no chart shows by its key."""
    for group in GROUPS:
        for name, its_key in group.lines.items():
            if its_key == key:
                return group.title if len(group.lines) == 1 else f"{group.title}: {name}"
    return key


def charts(runs: list[RunFiles]) -> tuple[list[Chart], list[Chart]]:
    """The charts of what every reader looks for, and those of every other metric that was logged."""
    logged = {key: None for run in runs for row in run.metrics for key in row if not NO_CURVE.fullmatch(key)}
    groups, used = [], set()
    for group in GROUPS:
        lines = group.lines or {found["name"]: key for key in logged if (found := BY_FUNCTION.fullmatch(key))}
        twins = {f"{name}, held out": HELD_OUT + key for name, key in lines.items()}
        if lines := {name: key for name, key in (lines | twins).items() if key in logged}:
            groups.append(replace(group, lines=lines))
            used |= set(lines.values())
    others = [Group(key, key, {key: key}) for key in logged if key not in used]
    count = sum(len(group.lines) for group in [*groups, *others]) * len(runs)
    most = max(FEWEST, min(MOST, POINTS // max(count, 1)))

    def made(some: list[Group]) -> list[Chart]:
        return [chart for group in some if (chart := _chart(group, runs, most))]

    return made(groups), made(others)


def colour(index: int) -> str:
    """The colour of a run, or in a page of one run that of a curve."""
    return COLOURS[index % len(COLOURS)]


def values(metrics: Iterable[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(step, value) of what was logged under a key as a number, the infinite and the undefined ones too."""
    for row in metrics:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:  # a whole number of hundreds of digits
                number = math.inf
            yield row["step"], number


def thinned(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most about `most` of the points, in their order: of each stretch the first, the last, lowest and highest."""
    if len(points) <= most:
        return points
    size = math.ceil(4 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        low = min(stretch, key=lambda index: points[index][1])
        high = max(stretch, key=lambda index: points[index][1])
        kept += [points[index] for index in sorted({stretch[0], stretch[-1], low, high})]
    return kept


def names(runs: list[RunFiles]) -> list[str]:
    """A name of each run: that of its folder, where two have the same with the folder above."""
    own = [run.name for run in runs]
    return own if len(set(own)) == len(own) else [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]


def _chart(group: Group, runs: list[RunFiles], most: int) -> Chart | None:
    traces, undefined, of = [], 0, names(runs)
    for number, run in enumerate(runs):
        for index, (name, key) in enumerate(group.lines.items()):
            found = list(values(run.metrics, key))
            finite = [point for point in found if math.isfinite(point[1])]
            undefined += len(found) - len(finite)
            if finite:
                label = name if len(runs) == 1 else of[number] if len(group.lines) == 1 else f"{of[number]}: {name}"
                held_out = key.startswith(HELD_OUT)
                line = {"color": colour(index if len(runs) == 1 else number), "width": 1.5}
                line["dash"] = DASHES[index % len(DASHES)] if len(runs) > 1 else "dot" if held_out else "solid"
                traces.append(_trace(label, thinned(finite, most), line))
    if not traces and not undefined:
        return None
    note = f"{undefined:,} of the logged values are not finite (NaN or infinite) and not drawn." if undefined else ""
    return Chart(group.title, {"data": traces, "layout": _layout(group, len(traces)), "zoomable": True}, note)


def _trace(label: str, points: list[tuple[int, float]], line: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": escape(label),  # plotly reads tags in it
        "x": [step for step, _ in points],
        "y": [float(f"{value:.5g}") for _, value in points],
        "mode": "lines+markers" if len(points) <= 20 else "lines",
        "line": line,
        "marker": {"size": 5},
        "hovertemplate": "%{y:.4~g}",
    }


def _layout(group: Group, count: int) -> dict[str, Any]:
    steps = {"title": {"text": "step", "standoff": 6}, "rangemode": "tozero", "showgrid": False, "tickformat": ",~d"}
    unit = {"title": {"text": escape(group.unit), "standoff": 8}, "zeroline": False, "nticks": 6}
    return {
        "height": 240,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "font": {"size": 12},
        "hovermode": "x unified",
        "xaxis": steps,
        "yaxis": {**unit, "exponentformat": "power", "rangemode": "tozero" if group.from_zero else "normal"},
        "showlegend": count > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }
