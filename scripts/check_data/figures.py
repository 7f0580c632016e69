"""The figures of a survey as one dictionary: the JSON report, from which the terminal and the page are made."""

from array import array
from typing import Any

import numpy as np

from .findings import KINDS, Findings
from .lengths import Lengths
from .rules import rules
from .survey import NGRAM_ROWS, Survey

BINS = 40


def figures(survey: Survey, findings: Findings, lengths: Lengths | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything the report says, ready for JSON. `facts` are the command's: data, task, format, time."""
    refused = lengths.refused if lengths else 0  # rows that were read well, and that the model could not learn from
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
        "answer_forms": dict(survey.answer_forms.most_common(10)),
        "with_system_prompt": survey.systems,
        "length": {"unit": unit, **_distribution(counts)} if counts else None,
        "diversity": {"distinct prompts": survey.distinct_prompts(), **survey.diversity},
        "sampled": len(survey.sample),
        "ngram_rows": min(len(survey.sample), NGRAM_ROWS),
    }
    if lengths:
        report["truncated"] = {
            "max_length": lengths.max_length,
            "rows": lengths.cut,
            "share": lengths.cut / max(len(lengths.tokens), 1),
            "places": lengths.cut_places,
        }
    if pairs := sum(survey.longer.values()):
        report["pairs"] = {
            **{f"{side} longer": count / pairs for side, count in survey.longer.items() if side != "same"},
            "chosen mean characters": survey.pair_characters[0] / pairs,
            "rejected mean characters": survey.pair_characters[1] / pairs,
        }
    if survey.scores:
        report["scores"] = {**_distribution(survey.scores), "constant": min(survey.scores) == max(survey.scores)}
    if survey.gold_answers:
        report["gold_answers"] = survey.gold_answers
    return report


def _distribution(values: array) -> dict[str, Any]:
    numbers = np.array(values, dtype=float)
    counts, edges = np.histogram(numbers, bins=BINS if np.ptp(numbers) else 1)
    share = {f"p{q}": float(np.percentile(numbers, q)) for q in (5, 50, 95, 99)}
    return {
        "mean": float(numbers.mean()),
        "deviation": float(numbers.std()),
        "min": float(numbers.min()),
        **share,
        "max": float(numbers.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
