"""Log-probabilities, entropies and KL estimates, compared with numbers worked out by hand."""

import math

import pytest
import torch
from common.lm.log_probs import kl_estimate, token_log_probs


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("temperature", "odds"), [(1.0, 3), (0.5, 9), (2.0, math.sqrt(3))])
def test_token_log_probs_are_those_of_the_tempered_distribution(temperature, odds):
    """Logits 0 and ln 3 are odds of 1 to 3; at temperature 1/2 of 1 to 9."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    log_probs, entropies = token_log_probs(logits, torch.tensor([0, 1]), temperature)
    low, high = 1 / (1 + odds), odds / (1 + odds)
    close(log_probs.exp(), [low, high])
    close(entropies, [-low * math.log(low) - high * math.log(high)] * 2)


def test_the_entropy_has_no_gradient():
    logits = torch.zeros(1, 4, requires_grad=True)
    log_probs, entropies = token_log_probs(logits, torch.tensor([0]), 0.7)
    assert log_probs.requires_grad
    assert not entropies.requires_grad


def test_kl_estimates():
    ratio = torch.tensor([math.log(2.0)])
    assert float(kl_estimate(ratio, "k1")) == pytest.approx(math.log(2))
    assert float(kl_estimate(ratio, "k2")) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(kl_estimate(ratio, "k3")) == pytest.approx(1 / 2 - 1 + math.log(2))
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    exact = 0.25 * math.log(2)  # 0.5 ln 2 + 0.25 ln 1/2
    for unbiased in ("k1", "k3"):  # in expectation under p
        assert float((p * kl_estimate((p / q).log(), unbiased)).sum()) == pytest.approx(exact)
    assert (kl_estimate(torch.linspace(-3, 3, 7), "k3") >= 0).all()
