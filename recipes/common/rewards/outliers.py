"""Scores far outside the others, which leave a reward model nothing to tell apart.

A reward model learns standardised scores: one of 1e30 among scores from 0 to 4 makes all others the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.examples import Rating
from common.errors import InputError

FAR = 20.0  # standard deviations from the median; the largest of a million normal scores is 5 away, exponential ones 14
NORMAL = 1.4826  # the standard deviation of normal scores in median absolute deviations
GROUP = 1 / 3  # of the scores
APART = 0.1  # the least share of all scores' standard deviation that the others must have
COMMONEST = 500  # of so many rows, at most one besides those of the commonest score: nothing to learn
NOTHING = "nothing distinguishes good from bad"
FIX = "Correct or remove these rows; of scores over many magnitudes, train on the logarithm."
FEWEST = 20  # rows from which "all but one are the same" says something


@dataclass(frozen=True, slots=True)
class Outliers:
    """The indices of the scores far outside the others; and why the scores teach nothing, if they do not."""

    indices: list[int]
    reason: str | None


def find_outliers(scores: Sequence[float]) -> Outliers:
    """The scores more than 20 robust standard deviations from the median, the furthest first, unless they are many.

    The robust deviation is 1.4826 times the median absolute deviation (Hampel 1974,
    doi:10.1080/01621459.1974.10482962). Where more than half of the scores are the same it is 0, and that of the
    distinct scores is taken. More than a third of the scores are no outliers but a second group.
    """
    values = np.asarray(scores, dtype=np.float64)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        return Outliers([], f"every score is {distinct[0]:g}")
    median = np.median(values)
    deviation = np.median(np.abs(values - median))
    if deviation == 0:
        deviation = np.median(np.abs(distinct - np.median(distinct)))
    distances = np.abs(values - median)
    indices = np.flatnonzero(distances > FAR * NORMAL * deviation)
    if len(indices) > GROUP * len(values):
        indices = indices[:0]
    indices = indices[np.argsort(-distances[indices], kind="stable")]
    others = np.delete(values, indices)
    if len(indices) and others.std() < APART * values.std():
        between = f"{others.min():g}" + (f" to {others.max():g}" if others.min() < others.max() else "")
        number, beside = (f"{len(indices)} scores are", "them") if len(indices) > 1 else ("one score is", "it")
        reason = f"{number} so far outside the others, {between}, that those are all alike beside {beside}"
        return Outliers(indices.tolist(), reason)
    commonest = int(counts.argmax())
    rare = len(values) - int(counts[commonest])
    if len(values) >= FEWEST and rare <= max(1, len(values) // COMMONEST):
        indices = np.flatnonzero(values != distinct[commonest])
        which = "all but one of the scores are" if rare == 1 else f"all but {rare} of {len(values)} scores are"
        return Outliers(indices.tolist(), f"{which} {distinct[commonest]:g}")
    return Outliers(indices.tolist(), None)


def check_scores(data: str, ratings: Sequence[Rating]) -> str | None:
    """A line that counts and names the scores far outside the others; None without one, and without `ratings`.

    Raises InputError, with the places, where the scores leave a reward model nothing to tell apart.
    """
    if not ratings:
        return None
    found = find_outliers([rating.score for rating in ratings])
    named = ", ".join(f"{ratings[index].place} ({ratings[index].score:g})" for index in found.indices[:5])
    named += ", ..." if len(found.indices) > 5 else ""
    if found.reason:
        raise InputError(f"{data}: {found.reason}; {NOTHING}" + (f": {named}\n  {FIX}" if named else ""))
    if not found.indices:
        return None
    return f"{len(found.indices)} of {len(ratings)} scores are far outside the others: {named}"
