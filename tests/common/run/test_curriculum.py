"""Which prompts a level takes and how often they are drawn, by numbers worked out by hand."""

import pytest
from common.data.examples import Prompt
from common.errors import InputError
from common.run.curriculum import PromptSampler, group_means, pass_rates, select


def test_a_pass_is_half_of_the_best_score():
    scores = [1.0, 0.0, 0.5, 0.4, None, 1.0, 0.0, 0.0]
    assert pass_rates(scores, 4) == [0.5, 0.25]
    assert pass_rates([0.0] * 4, 2) == [0.0, 0.0]  # the best of nothing is no pass


def test_means_are_taken_group_by_group():
    assert group_means([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]


@pytest.mark.parametrize(
    ("level", "selected"), [("easy", [4]), ("medium", [2, 3]), ("hard", [1]), ("auto", [1, 2, 3, 4])]
)
def test_pass_rates_by_level(level, selected):
    """Never and always solved teach nothing, at no level."""
    assert select([0.0, 0.25, 0.5, 0.625, 0.75, 1.0], level, "pass-rate") == selected


@pytest.mark.parametrize(
    ("level", "selected"), [("easy", [1, 3]), ("medium", [0, 5]), ("hard", [2, 4]), ("auto", [0, 2, 4, 5])]
)
def test_entropies_by_level(level, selected):
    """Thirds by rank, in the order of the data."""
    assert select([0.3, 0.1, 0.9, 0.2, 0.8, 0.4], level, "entropy") == selected


def test_a_level_without_prompts_is_refused():
    with pytest.raises(
        InputError, match=r"--difficulty hard: by pass-rate no prompt is of this level \(0 never solved, 2 always\)"
    ):
        select([1.0, 1.0], "hard", "pass-rate")


PROMPTS = [Prompt(str(index), [{"role": "user", "content": str(index)}]) for index in range(9)]


def numbers(prompts):
    return [int(prompt.place) for prompt in prompts]


def test_without_difficulty_every_prompt_comes_once_an_epoch():
    sampler = PromptSampler(PROMPTS, "off", "entropy", seed=0)
    drawn = [index for _ in range(6) for index in numbers(sampler.draw(3))]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))
    assert drawn[:9] != drawn[9:]


@pytest.mark.parametrize(
    ("level", "by", "expected"),
    [
        ("easy", "entropy", {0, 1, 2}),
        ("medium", "entropy", {3, 4, 5}),
        ("hard", "entropy", {6, 7, 8}),
        ("hard", "reward-spread", {0, 1, 2}),  # where scores vary most, there is most to learn
        ("easy", "reward-spread", {6, 7, 8}),
        ("easy", "pass-rate", {6, 7}),  # 3 of 4; 8 is always solved
        ("medium", "pass-rate", {3, 4, 5}),
        ("hard", "pass-rate", {0, 1, 2}),
    ],
)
def test_the_wanted_level_is_drawn_ten_times_as_often(level, by, expected):
    sampler = PromptSampler(PROMPTS, level, by, seed=0)
    passes = [1, 1, 1, 2, 2, 2, 3, 3, 4]  # of 4 completions of each prompt
    for attempt in range(4):
        sampler.drawn = list(range(9))
        size = [9 - i for i in range(9)] if by == "reward-spread" else [1] * 9
        sign = [s * (1 if attempt % 2 else -1) for s in size]
        solved = [float(attempt < p) for p in passes]
        sampler.learn([0.1 * i for i in range(9)], sign if by == "reward-spread" else solved)
    weights = sampler.weights()
    assert {index for index, weight in enumerate(weights) if weight == 1.0} == expected
    assert {weight for index, weight in enumerate(weights) if index not in expected} == {0.1}
    first = [index for _ in range(300) for index in numbers(sampler.draw(1))]
    share = sum(index in expected for index in first) / 300
    assert share == pytest.approx(len(expected) / (len(expected) + 0.1 * (9 - len(expected))), abs=0.08)


def test_prompts_never_drawn_count_as_the_wanted_level_and_none_comes_twice_at_once():
    sampler = PromptSampler(PROMPTS, "hard", "entropy", seed=0)
    assert set(sampler.weights()) == {1.0}
    assert sorted(numbers(sampler.draw(9))) == list(range(9))
    assert len(sampler.draw(20)) == 20  # more than there are


def test_a_restored_sampler_draws_the_same():
    sampler = PromptSampler(PROMPTS, "medium", "entropy", seed=0)
    sampler.draw(4)
    sampler.learn([1.0, 2.0, 3.0, 4.0], [0.0] * 4)
    other = PromptSampler(PROMPTS, "medium", "entropy", seed=5)
    other.restore(sampler.state())
    assert [numbers(other.draw(3)) for _ in range(5)] == [numbers(sampler.draw(3)) for _ in range(5)]
