"""Scores far outside the others are found by a robust measure, and refused where nothing else is left to learn."""

import random

import pytest
from common.data.examples import Rating
from common.errors import InputError
from common.rewards.outliers import check_scores, find_outliers

ORDER = random.Random(0)
SCALE = [0, 1, 2, 3, 4] * 40


def ratings(scores):
    return [Rating(f"f:{line}", [], [], score) for line, score in enumerate(scores, start=1)]


@pytest.mark.parametrize(
    "scores",
    [
        [ORDER.gauss(0, 1) for _ in range(20_000)],
        [ORDER.expovariate(1) for _ in range(20_000)],
        SCALE,
        [1] * 190 + [0] * 10,  # more than half are the same
        [5] * 190 + [4] * 6 + [1] * 4,
        [0, 1],
        [1, 2, 3, 4, 10],
        [ORDER.gauss(0, 1) for _ in range(60)] + [ORDER.gauss(1000, 1) for _ in range(40)],  # a second group
    ],
)
def test_no_score_of_a_plain_distribution_is_an_outlier(scores):
    assert find_outliers(scores).indices == []
    assert check_scores("f", ratings(scores)) is None


@pytest.mark.parametrize(
    ("others", "far"), [(SCALE, [1e30]), (SCALE, [-1e6]), ([4] * 200 + [3, 5], [1e30, 1e31]), (SCALE, [1e38, -1e38])]
)
def test_a_score_beside_which_the_others_are_alike_is_refused_at_its_line(others, far):
    with pytest.raises(InputError, match="nothing distinguishes good from bad") as refused:
        check_scores("f", ratings([*others, *far]))
    assert all(f"f:{len(others) + 1 + index}" in str(refused.value) for index in range(len(far)))


def test_a_score_that_stands_out_is_named_and_no_more():
    line = check_scores("f", ratings([*SCALE, 80]))
    assert line == "1 of 201 scores are far outside the others: f:201 (80)"


@pytest.mark.parametrize("scores", [[3] * 5, [4] * 30 + [5], [4] * 998 + [1e30, -1e30]])
def test_scores_that_are_all_the_same_but_for_one_in_five_hundred_teach_nothing(scores):
    with pytest.raises(InputError, match="nothing distinguishes"):
        check_scores("f", ratings(scores))
