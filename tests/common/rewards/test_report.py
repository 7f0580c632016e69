"""`common/rewards/report.py`: the figures of a reward model, worked out by hand."""

import math

import numpy as np
import pytest
from common.rewards.report import calibration_error, pair_report, pearson, pearson_interval, score_report, spearman


def test_correlations():
    assert pearson([1, 2, 3], [2, 4, 6]) == 1
    assert pearson([1, 2, 3], [3, 2, 1]) == -1
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([1, 1], [1, 2]) is None
    assert pearson([1], [1]) is None


def test_equal_values_share_the_mean_of_their_ranks():
    """Ranks 2, 5, 3.5, 3.5, 1 against 1 to 5: by hand Pearson's correlation of them is -3.5 / sqrt(9.5 * 10)."""
    assert spearman([10, 30, 20, 20, 5], [1, 2, 3, 4, 5]) == pytest.approx(-3.5 / math.sqrt(9.5 * 10), abs=1e-6)
    assert spearman([1, 2, 3], [10, 20, 900]) == 1
    assert spearman([7, 7, 7], [1, 2, 3]) is None


def test_the_interval_of_a_correlation_is_fishers():
    """atanh(0.8) plus and minus 1.96 / sqrt(N - 3)."""
    one, other = [1, 2, 3, 4] * 10, [1, 3, 2, 4] * 10
    low, high = pearson_interval(one, other)
    assert math.atanh(low) == pytest.approx(math.atanh(0.8) - 1.96 / math.sqrt(37), abs=1e-3)
    assert math.atanh(high) == pytest.approx(math.atanh(0.8) + 1.96 / math.sqrt(37), abs=1e-3)
    assert pearson_interval([1, 2, 3], [1, 2, 4]) is None


def test_the_calibration_error():
    """Probabilities of 3/4, three times right and once wrong, are as they should be; always right is 1/4 too modest."""
    ln3 = math.log(3)
    assert calibration_error(np.array([ln3, ln3, ln3, -ln3])) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.array([ln3, ln3])) == pytest.approx(0.25)
    assert calibration_error(np.array([-50.0, -50.0])) == pytest.approx(1)
    assert calibration_error(np.array([0.0, 0.0])) == 0  # half and half of what it cannot tell
    # One bin of two at 3/4, both right, one of two at 9/10, one right: (2 * 0.25 + 2 * 0.4) / 4.
    ln9 = math.log(9)
    assert calibration_error(np.array([ln3, ln3, ln9, -ln9])) == pytest.approx(0.325)


def test_the_report_on_pairs():
    """Four pairs: right and longer, right and shorter, wrong and shorter, a tie of equal lengths."""
    report = pair_report([2, 3, 0, 1], [1, 1, 2, 1], [9, 3, 2, 4], [5, 8, 6, 4])
    assert report["pairs"] == 4
    assert report["accuracy"] == 2.5 / 4
    assert report["accuracy, 95 %"] == [0.25, 1]  # of resampled means of 1, 1, 0 and 0.5
    assert report["margin"] == (1 + 2 - 2 + 0) / 4
    assert report["chosen is longer"] == pytest.approx(1 / 3, abs=1e-6)
    assert report["longer scores higher"] == pytest.approx(2 / 3, abs=1e-6)  # the first and the third
    assert report["accuracy, chosen shorter"] == 0.5
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 2, -2, 0)]
    assert report["loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)
    longer_is_better = pair_report([5, 9], [2, 1], [50, 90], [20, 10])
    assert longer_is_better["correlation with length"] == 1
    assert longer_is_better["accuracy, chosen shorter"] is None


def test_the_report_on_scores():
    """Predictions of half the spread, one too high in the mean: the slope is 2, the bias 1."""
    report = score_report([3, 4, 5], [1, 3, 5], [10, 20, 90])
    assert report["rated completions"] == 3
    assert (report["pearson"], report["spearman"]) == (1, 1)
    assert report["calibration slope"] == 2
    assert report["bias"] == 1
    assert report["error"] == pytest.approx(math.sqrt((4 + 1 + 0) / 3), abs=1e-6)
    assert report["scores with length"] == report["predictions with length"] == pytest.approx(0.917663, abs=1e-6)
    flat = score_report([3, 3], [1, 2], [5, 5])
    assert (
        flat["pearson"] is flat["pearson, 95 %"] is flat["calibration slope"] is flat["predictions with length"] is None
    )
