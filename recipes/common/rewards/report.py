"""What a reward model says of held-out answers, and whether their length alone says it."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import Console

BINS = 10  # of predicted probability, for the calibration error

Report = dict[str, float | int | None]  # None where it is not defined, as a correlation of equal numbers


def pair_report(
    chosen: list[float], rejected: list[float], chosen_lengths: list[int], rejected_lengths: list[int]
) -> Report:
    """Of pairs: outputs of the model and tokens of the answers, in the same order."""
    margins = np.array(chosen) - np.array(rejected)  # (N,)
    longer = np.array(chosen_lengths) - np.array(rejected_lengths)  # (N,) tokens
    right = (margins > 0) + 0.5 * (margins == 0)
    return {
        "pairs": len(margins),
        "accuracy": _number(right.mean()),
        "loss": _number(np.logaddexp(0, -margins).mean()),
        "margin": _number(margins.mean()),
        "calibration error": calibration_error(margins),
        "chosen is longer": _mean(longer[longer != 0] > 0),
        "longer scores higher": _mean((margins * np.sign(longer))[longer != 0] > 0),
        "accuracy, chosen shorter": _mean(right[longer < 0]),
        "correlation with length": pearson([*chosen, *rejected], [*chosen_lengths, *rejected_lengths]),
    }


def score_report(predictions: list[float], scores: list[float], lengths: list[int]) -> Report:
    """Of rated answers: predictions in the units of the scores, the scores, and tokens of the answers."""
    errors = np.array(predictions) - np.array(scores)
    variance = np.var(predictions)
    covariance = np.mean((np.array(predictions) - np.mean(predictions)) * (np.array(scores) - np.mean(scores)))
    return {
        "rated answers": len(scores),
        "pearson": pearson(predictions, scores),
        "spearman": pearson(ranks(predictions), ranks(scores)),
        "error": _number(np.sqrt(np.mean(errors**2))),
        "calibration slope": _number(covariance / variance) if variance else None,
        "bias": _number(errors.mean()),
        "scores with length": pearson(scores, lengths),
        "predictions with length": pearson(predictions, lengths),
    }


def pearson(one: Any, other: Any) -> float | None:
    """Pearson's correlation; of ranks it is Spearman's."""
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return _number(np.corrcoef(one, other)[0, 1])


def ranks(values: list[float]) -> np.ndarray:
    """The ranks of the values, from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of the probability that the preferred answer is the better (arXiv:1706.04599).

    The model prefers the answer with the higher output, with probability sigmoid(|margin|), between 1/2 and 1. In each
    of BINS equal bins that probability's mean is held against how often the preference was right.
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
    "accuracy": "how often the chosen answer scores higher",
    "loss": "0.693 is a guess",
    "margin": "chosen less rejected; e to this power are the odds",
    "calibration error": "of the probability that the preferred answer is the better",
    "chosen is longer": "in the data; where far from 0.5, length alone is a good guess",
    "longer scores higher": "by the model; further from 0.5 than the line above is a bias",
    "accuracy, chosen shorter": "what is left where length misleads",
    "correlation with length": "of the scores given, with the tokens of the answer",
    "pearson": "correlation of predicted and given scores",
    "spearman": "the same of their ranks",
    "error": "root of the mean squared error, in the scores' units",
    "calibration slope": "given over predicted differences; below 1 it exaggerates",
    "bias": "mean of predicted less given",
    "scores with length": "correlation in the data, with the tokens of the answer",
    "predictions with length": "the same by the model; further from 0 is a bias",
}


def show(console: "Console", report: Report) -> None:
    from rich.table import Table

    table = Table("held out", "", "", title="The reward model on answers it has not seen")
    for name, value in report.items():
        shown = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
        table.add_row(name, shown, MEANS.get(name, ""))
    console.print(table)
    if report["accuracy"] < 0.5 if "accuracy" in report else (report["pearson"] or 0) < 0:
        console.print("Worse than a guess: are chosen and rejected, or high and low scores, the wrong way round?")
