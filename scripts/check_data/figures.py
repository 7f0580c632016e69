"""The figures of a survey as one dictionary: the JSON report, from which the terminal and the page are made."""

import math
from array import array
from typing import Any

import numpy as np

from check_data.findings import KINDS, Findings
from check_data.lengths import Lengths
from check_data.limits import Limits
from check_data.rules import rules
from check_data.survey import NGRAM_ROWS, Survey

BINS = 40
LONGEST_SHOWN = 2  # times the 99th percentile: else one very long row makes a histogram of one bar


def figures(
    survey: Survey, findings: Findings, lengths: Lengths | None, limits: Limits, facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything in the report, ready for JSON. `facts` are the command's: data, task, format, time."""
    refused = survey.refused + (lengths.refused if lengths else 0)  # rows that are read, and refused nonetheless
    usable = survey.rows - refused
    read = usable + findings.rows["fault"]
    unit, counts = ("tokens", lengths.tokens) if lengths else ("characters", survey.characters)
    report = {
        **facts,
        "rows": read,
        "usable": usable,
        "rules": rules(survey, findings, read),
        "findings": {
            kind: {
                "rows": findings.rows[kind],
                "what": KINDS[kind][1],
                "listed": [{"place": place, "message": message} for place, message in findings.listed[kind]],
            }
            for kind in KINDS
            if findings.rows[kind]
        },
        "turns": dict(sorted(survey.turns.items())),
        "languages": dict(survey.languages.most_common()),
        "layouts": dict(survey.layouts.most_common(10)),
        "with_system_prompt": survey.systems,
        "length": {"unit": unit, **_distribution(counts, LONGEST_SHOWN)} if counts else None,
        "diversity": {"distinct prompts": survey.distinct_prompts(), **survey.diversity},
        "sampled": len(survey.sample),
        "ngram_rows": min(len(survey.sample), NGRAM_ROWS),
    }
    rows = limits.rows
    if lengths:
        report["truncated"] = {"max_length": rows.limit, **rows.as_dict()}
    else:
        report["truncated_estimate"] = {"max_length": rows.limit, **rows.as_dict()}
    report["long_prompts"] = {"limit": limits.prompts.limit, **limits.prompts.as_dict(), "estimated": not lengths}
    if pairs := sum(survey.longer.values()):
        report["pairs"] = {
            **{f"{side} longer": count / pairs for side, count in survey.longer.items() if side != "same"},
            "chosen mean characters": survey.pair_characters[0] / pairs,
            "rejected mean characters": survey.pair_characters[1] / pairs,
        }
    if survey.scores:
        report["scores"] = {**_distribution(survey.scores), "constant": min(survey.scores) == max(survey.scores)}
    if survey.labels:
        report["labels"] = {"good": survey.labels[True], "bad": survey.labels[False]}
    if survey.gold_answers:
        report["gold_answers"] = survey.gold_answers
        report["gold_words"] = survey.gold_words
    return report


def _distribution(values: array, longest_shown: float = math.inf) -> dict[str, Any]:
    """Mean, percentiles and histogram; values above `longest_shown` times the 99th percentile are only counted."""
    numbers = np.array(values, dtype=float)
    shown = numbers[numbers <= longest_shown * np.percentile(numbers, 99)]
    counts, edges = np.histogram(shown, bins=_edges(shown))
    share = {f"p{q}": float(np.percentile(numbers, q)) for q in (5, 50, 95, 99)}
    return {
        "mean": float(numbers.mean()),
        "deviation": float(numbers.std()),
        "min": float(numbers.min()),
        **share,
        "max": float(numbers.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist(), "beyond": len(numbers) - len(shown)},
    }


def _edges(numbers: np.ndarray) -> np.ndarray:
    """The edges of at most BINS bins. Those of whole numbers are all equally many of them wide."""
    low, high = numbers.min(), numbers.max()
    if high - low < 2**53 and np.all(numbers == np.round(numbers)):
        width = np.ceil((high - low + 1) / BINS)
        return np.arange(low - 0.5, high + width, width)
    return np.histogram_bin_edges(numbers, bins=BINS if high > low else 1)
