"""Rejection sampling takes each response with the probability of its paper, and all of them from pi exp(r / beta)."""

import pytest
import torch

from alignloss import rejection_sample


def shares(chosen, K):
    return torch.bincount(chosen.flatten(), minlength=K).double() / len(chosen)


def test_the_first_that_is_accepted():
    """P(i) = a_i prod_{j < i} (1 - a_j), where a_i = exp((r_i - max r) / beta) is 1 for the best."""
    rewards, beta, n = torch.tensor([0.3, -0.2, 1.0, 0.4]), 0.8, 200_000
    a = ((rewards.double() - 1) / beta).exp()
    expected = a * torch.cat([torch.ones(1), (1 - a).cumprod(0)[:-1]])
    generator = torch.Generator().manual_seed(0)
    got = shares(rejection_sample(rewards.expand(n, 4), 1, beta=beta, generator=generator), 4)
    assert expected.sum() == pytest.approx(1)
    # five standard deviations
    assert ((got - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


def test_those_that_were_not_have_a_maximum_of_their_own():
    """Of 2 from 3, by the passes: the best is in the first; another one may be before or after it, or in a later."""
    rewards, beta, n = torch.tensor([2.0, 0.0, 1.0]), 1.0, 200_000
    a1, a2 = torch.tensor(-2.0).exp().double(), torch.tensor(-1.0).exp().double()
    # 1 is there where it is accepted in the first pass, or where 2 is not and it comes first in the second
    second = torch.tensor(-1.0).exp().double()  # of 1, beside 2
    expected = a1 + (1 - a1) * (1 - a2) * second
    chosen = rejection_sample(rewards.expand(n, 3), 2, beta=beta, generator=torch.Generator().manual_seed(1))
    assert (chosen == 0).any(1).all()
    got = (chosen == 1).any(1).double().mean()
    assert abs(got - expected) < 5 * (expected * (1 - expected) / n).sqrt()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_samples_of_a_policy_become_those_of_the_tilted_one(beta):
    """From many responses of pi: pi(y) exp(r(y) / beta), normalised."""
    policy, rewards, n, K = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.5, 1.0]), 20_000, 64
    generator = torch.Generator().manual_seed(2)
    responses = policy.expand(n, 3).multinomial(K, replacement=True, generator=generator)
    chosen = rejection_sample(rewards[responses], 1, beta=beta, generator=generator)
    got = shares(responses.gather(1, chosen), 3)
    expected = policy.double() * (rewards.double() / beta).exp()
    expected /= expected.sum()
    assert (got - expected).abs().max() < 5 * 0.5 / n**0.5


def test_limits_and_order():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 1e300], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    assert rejection_sample(rewards, 4, beta=1e-300).tolist() == [[3, 1, 2, 0], [0, 1, 2, 3]]
    assert rejection_sample(rewards, 3, beta=1e308).tolist() == [[0, 1, 2], [0, 1, 2]]
    same = [rejection_sample(rewards, 2, beta=1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(3), {}, r"rewards must be \(B, K\)"),
        (torch.zeros(1, 3, dtype=torch.int64), {}, "floating"),
        (torch.tensor([[0.0, torch.nan]]), {}, "finite"),
        (torch.zeros(1, 3), {"count": 4}, r"count must lie in \[1, 3\]"),
        (torch.zeros(1, 3), {"count": 0}, "count must lie"),
        (torch.zeros(1, 3), {"count": 1.5}, "count must be an integer"),
        (torch.zeros(1, 3), {"beta": 0.0}, "beta must be a positive number"),
        ([[0.0]], {}, "rewards must be a torch.Tensor"),
    ],
)
def test_other_data(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        rejection_sample(rewards, **{"count": 1, "beta": 1.0} | options)
