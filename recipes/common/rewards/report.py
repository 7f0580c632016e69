"""How well a reward model scores held-out completions, and how far it only counts their words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.rewards.tokens import Tokens
from common.run.intervals import interval

if TYPE_CHECKING:
    from rich.console import Console

FEWEST = 8  # completions for a correlation in training
BINS = 10  # of predicted probability, for the calibration error

# A number, None where it is not defined, as a correlation of equal numbers, or the two bounds of an interval.
Report = dict[str, Any]


# Figures that mean something only of a model that was trained on the kind of rows it is judged on.
OF_ITS_KIND = {
    "bradley-terry": ("loss", "margin", "calibration error"),
    "regression": ("error", "calibration slope", "bias"),
}


def report_on(rows: Sequence[Tokens], outputs: Sequence[float], facts: dict[str, Any]) -> Report:
    """The report on held-out pairs or ratings, all of one kind.

    Args:
        outputs: of the model, one for each completion of each row.
        facts: about its head, as `save_head` writes them: `kind`, and `mean` and `std`, with which an output is a score
            in the units of the training data. None are known of a classifier that was not trained here.
    """
    lengths = [length for row in rows for length in row.lengths]
    if rows[0].score is None:
        kind = "bradley-terry"
        report = pair_report(outputs[0::2], outputs[1::2], lengths[0::2], lengths[1::2])
    else:
        kind = "regression"
        predictions = [facts.get("mean", 0.0) + facts.get("std", 1.0) * output for output in outputs]
        report = score_report(predictions, [row.score for row in rows if row.score is not None], lengths)
    other_kind = facts.get("kind") != kind
    return {name: value for name, value in report.items() if not (other_kind and name in OF_ITS_KIND[kind])}


def held_out_rows(rows: Sequence[Tokens], outputs: Sequence[float]) -> list[dict[str, Any]]:
    """What the report is computed from, row by row."""
    following = iter(outputs)
    return [
        {
            "place": row.place,
            "outputs": [next(following) for _ in row.answers],
            "lengths": row.lengths,
            "score": row.score,
        }
        for row in rows
    ]


def pair_report(
    chosen: Sequence[float], rejected: Sequence[float], chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]
) -> Report:
    """Of pairs: outputs of the model and tokens of the completions, in the same order."""
    margins = np.array(chosen) - np.array(rejected)  # (N,)
    longer = np.array(chosen_lengths) - np.array(rejected_lengths)  # (N,) tokens
    right = (margins > 0) + 0.5 * (margins == 0)
    return {
        "pairs": len(margins),
        "accuracy": _number(right.mean()),
        "accuracy, 95 %": [_number(bound) for bound in interval(right)],
        "loss": _number(np.logaddexp(0, -margins).mean()),
        "margin": _number(margins.mean()),
        "calibration error": calibration_error(margins),
        "chosen is longer": _mean(longer[longer != 0] > 0),
        "longer scores higher": _mean((margins * np.sign(longer))[longer != 0] > 0),
        "accuracy, chosen shorter": _mean(right[longer < 0]),
        "correlation with length": pearson([*chosen, *rejected], [*chosen_lengths, *rejected_lengths]),
    }


def score_report(predictions: Sequence[float], scores: Sequence[float], lengths: Sequence[int]) -> Report:
    """Of rated completions: predictions in the units of the scores, the scores, and tokens of the completions."""
    from scipy.stats import linregress

    errors = np.array(predictions) - np.array(scores)
    return {
        "rated completions": len(scores),
        "pearson": pearson(predictions, scores),
        "pearson, 95 %": pearson_interval(predictions, scores),
        "spearman": spearman(predictions, scores),
        "error": _number(np.sqrt(np.mean(errors**2))),
        "calibration slope": _number(linregress(predictions, scores).slope) if _vary(predictions) else None,
        "bias": _number(errors.mean()),
        "scores with length": pearson(scores, lengths),
        "predictions with length": pearson(predictions, lengths),
    }


def figures_in_training(
    outputs: Sequence[float], lengths: Sequence[float], scores: Sequence[float] | None
) -> dict[str, float]:
    """What a reward model shows while it learns, for metrics.jsonl; of fewer than FEWEST completions no correlations.

    Args:
        outputs: of the completions since the last log; without `scores` chosen and rejected in turn.
        lengths: their tokens, with the prompt's.
        scores: standardised, of rated completions.
    """
    if scores is None:
        margins = np.array(outputs[0::2]) - np.array(outputs[1::2])  # (N,)
        figures: dict[str, float | None] = {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}
    else:
        figures = {"spread": float(np.std(outputs)), "correlation": pearson(outputs, scores)}
    figures["length_correlation"] = pearson(outputs, lengths)
    return {
        name: value
        for name, value in figures.items()
        if value is not None and (len(outputs) >= FEWEST or not name.endswith("correlation"))
    }


def pearson(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation; None where it is not defined: of a single row, or of equal numbers."""
    from scipy.stats import pearsonr

    return _number(pearsonr(one, other).statistic) if _vary(one, other) else None


def pearson_interval(one: Sequence[float], other: Sequence[float]) -> list[float] | None:
    """The 95 % confidence interval of `pearson`, by Fisher's transformation; None below four rows."""
    from scipy.stats import pearsonr

    if len(one) < 4 or not _vary(one, other):
        return None
    return [_number(bound) for bound in pearsonr(one, other).confidence_interval(0.95)]


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's correlation, that of the ranks; None where it is not defined."""
    from scipy.stats import spearmanr

    return _number(spearmanr(one, other).statistic) if _vary(one, other) else None


def _vary(*columns: Sequence[float]) -> bool:
    return all(len(values) > 1 and np.ptp(values) > 0 for values in columns)


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of the probability that the preferred completion is the better (arXiv:1706.04599).

    The model prefers the completion with the higher output, with probability sigmoid(|margin|), between 1/2 and 1. In
    each of BINS equal bins the mean of that probability is compared with how often the preference was right.
    """
    confidences = 1 / (1 + np.exp(-np.abs(margins)))  # (N,)
    right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum(((confidences - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(np.sum(confidences[bins == one] - right[bins == one])) for one in range(BINS)]
    return _number(sum(gaps) / len(margins))


def _mean(values: np.ndarray) -> float | None:
    return _number(values.mean()) if len(values) else None


def _number(value: Any) -> float:
    return round(float(value), 6)


MEANS = {
    "accuracy": "how often the chosen completion scores higher",
    "accuracy, 95 %": "its confidence interval over the pairs",
    "loss": "0.693 is a guess",
    "margin": "chosen less rejected; e to this power are the odds",
    "calibration error": "of the probability that the preferred completion is the better",
    "chosen is longer": "in the data; where far from 0.5, length alone is a good guess",
    "longer scores higher": "by the model; further from 0.5 than the line above is a bias",
    "accuracy, chosen shorter": "what is left where length misleads",
    "correlation with length": "of the scores given, with the tokens of the completion",
    "pearson": "correlation of predicted and given scores",
    "pearson, 95 %": "its confidence interval over the completions",
    "spearman": "the same of their ranks",
    "error": "root of the mean squared error, in the scores' units",
    "calibration slope": "given over predicted differences; below 1 it exaggerates",
    "bias": "mean of predicted less given",
    "scores with length": "correlation in the data, with the tokens of the completion",
    "predictions with length": "the same by the model; further from 0 is a bias",
}


def shown(value: float | int | list[float] | None) -> str:
    """A figure as text."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def show(console: "Console", report: Report, title: str = "The reward model on held-out completions") -> None:
    """Print the report as a table."""
    from rich.table import Table

    table = Table("held out", "", "", title=title)
    for name, value in report.items():
        table.add_row(name, shown(value), MEANS.get(name, ""))
    console.print(table)
    if report["accuracy"] < 0.5 if "accuracy" in report else (report["pearson"] or 0) < 0:
        console.print("Worse than a guess: are chosen and rejected, or high and low scores, the wrong way round?")
