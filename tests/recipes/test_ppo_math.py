"""The arithmetic of `recipes/ppo.py`, compared with numbers worked out by hand and with slow loops in 64 bit."""

import math
import random
import statistics

import ppo
import pytest
import torch
from common.lm.log_probs import kl_estimate, masked_mean

T, F = True, False


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


# Two completions, of three tokens and of one. What is at padding has to be ignored.
MASK = torch.tensor([[T, T, T], [T, F, F]])


def test_masked_mean_and_whitening_see_the_mask_alone():
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, -100.0]])
    assert float(masked_mean(values, MASK)) == 3.0  # (1 + 2 + 3 + 6) / 4
    white = ppo.masked_whiten(values, MASK)
    std = math.sqrt(3.5)  # ((-2)^2 + (-1)^2 + 0 + 3^2) / 4
    close(white, torch.tensor([[-2, -1, 0], [3, 0, 0]]) / std)
    close(ppo.masked_whiten(torch.full((2, 3), 7.0), MASK), torch.zeros(2, 3))  # all the same: nothing is better


def test_the_score_comes_at_the_last_token_and_the_penalty_at_each():
    penalty = torch.tensor([[0.5, -1.0, 2.0], [3.0, 50.0, 50.0]])
    rewards = ppo.shaped_rewards(torch.tensor([10.0, 20.0]), penalty, 0.1, MASK)
    close(rewards, [[-0.05, 0.1, 10 - 0.2], [20 - 0.3, 0.0, 0.0]])


def test_gae_by_hand():
    """gamma 0.9, lambda 0.5, rewards 0 0 1, values 0.5 0.4 0.2, from the end:

    delta_2 = 1 - 0.2 = 0.8                A_2 = 0.8
    delta_1 = 0.9 x 0.2 - 0.4 = -0.22      A_1 = -0.22 + 0.45 x 0.8 = 0.14
    delta_0 = 0.9 x 0.4 - 0.5 = -0.14      A_0 = -0.14 + 0.45 x 0.14 = -0.077
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 0.4, 0.2], [0.5, 9.0, 9.0]])
    advantages, returns = ppo.gae(rewards, values, MASK, 0.9, 0.5)
    close(advantages, [[-0.077, 0.14, 0.8], [1.5, 0.0, 0.0]])
    close(returns, [[0.423, 0.54, 1.0], [2.0, 0.0, 0.0]])


def test_with_lambda_and_gamma_1_the_return_is_the_sum_of_what_comes():
    rewards = torch.tensor([[-0.1, -0.2, 3.0]])
    _, returns = ppo.gae(rewards, torch.rand(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    close(returns, [[2.7, 2.8, 3.0]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 1.0, -1.2, 0.0),  # far enough up already
        (0.5, 1.0, -0.5, -0.5),  # a good token that has become rare is still reinforced
        (0.5, -1.0, 0.8, 0.0),  # far enough down already
        (1.5, -1.0, 1.5, 1.5),
    ],
)
def test_the_policy_loss_and_its_slope(ratio, advantage, loss, slope):
    """The slope is along the log-probability; below 0 it makes the token likelier, at 0 it is clipped."""
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    old, advantages = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), advantage, requires_grad=True)
    found, clipped = ppo.policy_losses(log_probs, old, advantages, 0.2)
    found.sum().backward()
    assert bool(clipped) == (slope == 0)
    close(found.detach(), [[loss]])
    close(log_probs.grad, [[slope]])
    assert old.grad is None
    assert advantages.grad is None


def test_a_wild_ratio_stays_finite():
    losses, _ = ppo.policy_losses(torch.tensor([[500.0]]), torch.zeros(1, 1), -torch.ones(1, 1), 0.2)
    assert losses.isfinite().all()


@pytest.mark.parametrize(
    ("value", "old", "returned", "loss", "is_clipped"),
    [
        (1.0, 1.0, 3.0, 2.0, False),  # nothing moved: (1 - 3)^2 / 2
        (1.1, 1.0, 3.0, 1.805, False),  # within the range
        (2.0, 1.0, 3.0, 1.62, True),  # as if it had come to 1.2 only: (1.2 - 3)^2 / 2
        (2.0, 1.0, 1.0, 0.5, False),  # moved away: the larger error counts
    ],
)
def test_the_value_loss(value, old, returned, loss, is_clipped):
    values = torch.tensor([[value]], requires_grad=True)
    before, returns = torch.tensor([[old]], requires_grad=True), torch.tensor([[returned]], requires_grad=True)
    found, clipped = ppo.value_losses(values, before, returns, 0.2)
    close(found.detach(), [[loss]])
    assert bool(clipped) == is_clipped
    found.sum().backward()
    assert before.grad is None
    assert returns.grad is None


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0], [6.0, 9.0, 9.0]])
    assert float(ppo.explained_variance(returns, returns, MASK)) == pytest.approx(1.0)
    assert float(ppo.explained_variance(torch.zeros(2, 3), returns, MASK)) == pytest.approx(0.0)
    half = torch.tensor([[2.0, 2.0, 3.0], [6.0, 0.0, 0.0]])  # errors -1 0 0 0: variance 3/16, of the returns 7/2
    assert float(ppo.explained_variance(half, returns, MASK)) == pytest.approx(1 - 3 / 56)


def test_everything_against_a_slow_loop_in_64_bit():
    """From scores, log-probabilities and values to the loss, for random completions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths, width, gamma, lam, kl_coef, clip = [5, 1, 9, 7], 9, 0.97, 0.9, 0.3, 0.2
    old, reference, new, values = (torch.randn(4, width, generator=generator) for _ in range(4))
    scores = torch.randn(4, generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    rewards = ppo.shaped_rewards(scores, kl_estimate(old - reference, "k1"), kl_coef, mask)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    losses, _ = ppo.policy_losses(new, old, ppo.masked_whiten(advantages, mask), clip)

    slow: list[tuple[float, float, int, int]] = []
    for row, length in enumerate(lengths):
        score, v = float(scores[row]), values[row].tolist()
        r = [-kl_coef * (float(old[row, t]) - float(reference[row, t])) for t in range(length)]
        r[-1] += score
        v = [*v[:length], 0.0]
        for t in range(length):
            deltas = [r[s] + gamma * v[s + 1] - v[s] for s in range(t, length)]
            advantage = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
            slow.append((advantage, advantage + v[t], row, t))
    mean = statistics.fmean(a for a, *_ in slow)
    std = statistics.pstdev([a for a, *_ in slow])
    total = 0.0
    for advantage, returned, row, t in slow:
        assert float(advantages[row, t]) == pytest.approx(advantage, abs=1e-5)
        assert float(returns[row, t]) == pytest.approx(returned, abs=1e-5)
        ratio = math.exp(float(new[row, t]) - float(old[row, t]))
        white = (advantage - mean) / std
        total -= min(ratio * white, max(1 - clip, min(1 + clip, ratio)) * white)
    assert float(masked_mean(losses, mask)) == pytest.approx(total / len(slow), rel=1e-4)


def test_running_moments_are_those_of_all_values_so_far():
    drawn, moments = random.Random(0), ppo.RunningMoments()
    batches = [[drawn.gauss(3, 2) for _ in range(size)] for size in (4, 1, 7)]
    for batch in batches:
        moments.update(batch)
    together = [value for batch in batches for value in batch]
    std = statistics.pstdev(together)
    assert moments.normalize(5.0) == pytest.approx((5.0 - statistics.fmean(together)) / std)
    constant = ppo.RunningMoments()
    constant.update([0.1] * 7)
    assert abs(constant.normalize(0.1)) < 1e-3


@pytest.mark.parametrize(
    ("kl", "target", "coef"),
    [
        (6.0, 6.0, 0.1),
        (60.0, 6.0, 0.102),  # a fifth at most
        (0.0, 6.0, 0.098),
        (6.6, 6.0, 0.101),
        (60.0, None, 0.1),
    ],
)
def test_the_weight_of_the_kl_is_steered_towards_its_target(kl, target, coef):
    controller = ppo.KLController(0.1, target, horizon=1000)
    controller.update(kl, 100)
    assert controller.coef == pytest.approx(coef)
