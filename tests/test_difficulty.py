"""Which problems a level takes, by hand-worked numbers."""

import pytest
from common.difficulty import choose, group_means, pass_rates
from common.errors import InputError


def test_a_pass_is_half_of_the_best_score():
    scores = [1.0, 0.0, 0.5, 0.4, None, 1.0, 0.0, 0.0]
    assert pass_rates(scores, 4) == [0.5, 0.25]
    assert pass_rates([0.0] * 4, 2) == [0.0, 0.0]  # the best of nothing is no pass


def test_means_are_taken_group_by_group():
    assert group_means([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]


@pytest.mark.parametrize(
    ("level", "chosen"), [("easy", [4]), ("medium", [2, 3]), ("hard", [1]), ("auto", [1, 2, 3, 4])]
)
def test_pass_rates_by_level(level, chosen):
    """Never and always solved teach nothing, at no level."""
    assert choose([0.0, 0.25, 0.5, 0.625, 0.75, 1.0], level, "pass-rate") == chosen


@pytest.mark.parametrize(
    ("level", "chosen"), [("easy", [1, 3]), ("medium", [0, 5]), ("hard", [2, 4]), ("auto", [0, 2, 4, 5])]
)
def test_entropies_by_level(level, chosen):
    """Thirds by rank, in the order of the data."""
    assert choose([0.3, 0.1, 0.9, 0.2, 0.8, 0.4], level, "entropy") == chosen


def test_a_level_without_problems_is_said():
    with pytest.raises(InputError, match=r"--difficulty hard: by pass-rate no problem is \(0 never solved, 2 always\)"):
        choose([1.0, 1.0], "hard", "pass-rate")
