"""Rejection sampling takes each response with the probability of its paper; self-play goes where its paper says."""

import pytest
import torch

import alignloss
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


class Toy:
    """A policy of one token after one prompt, over three tokens: softmax of three numbers."""

    prompt, tokens = torch.tensor([9]), torch.tensor([0, 1, 2])

    def __init__(self, probabilities):
        self.weight = torch.tensor(probabilities, dtype=torch.float64).log()[:, None].requires_grad_()

    @property
    def probabilities(self):
        return self.weight.detach()[:, 0].softmax(0)

    def hidden(self, batch):
        return torch.ones(*batch.input_ids.shape, 1, dtype=torch.float64)

    def score(self, batch):
        return alignloss.sequence_logprob(self.hidden(batch), self.weight, batch.labels).logps

    def every_pair(self, data, own):
        """As many of each pair of tokens as their probabilities say: the expectation, without a draw."""
        pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(data[i] * own[j])]
        return [self.tokens[i : i + 1] for i, _ in pairs], [self.tokens[j : j + 1] for _, j in pairs]


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_a_round_of_self_play_ends_where_its_theorem_says(beta):
    """At p (p_data / p)^(1 / beta), normalised."""
    data, own = [5, 2, 1], [1, 1, 2]
    policy = Toy([0.25, 0.25, 0.5])
    chosen, written = policy.every_pair(data, own)
    loss, opponent = alignloss.DPOLoss(beta=beta), policy.probabilities
    rounds = alignloss.self_play_rounds(
        [policy.prompt] * len(chosen), chosen, 1, generate=lambda _: written, score=policy.score, pad_token_id=0
    )
    batch, ref_logps = next(rounds)
    optimizer = torch.optim.LBFGS([policy.weight], max_iter=200, tolerance_change=0.0)

    def closure():
        optimizer.zero_grad()
        out = loss(policy.hidden(batch), policy.weight, batch.labels, ref_logps=ref_logps)
        out.loss.backward()
        return out.loss

    optimizer.step(closure)
    expected = opponent * (torch.tensor(data, dtype=torch.float64) / 8 / opponent) ** (1 / beta)
    assert torch.allclose(policy.probabilities, expected / expected.sum(), atol=1e-7)


def test_self_play_rests_where_the_model_is_the_data():
    policy, data = Toy([0.5, 0.25, 0.25]), [2, 1, 1]
    chosen, written = policy.every_pair(data, data)
    more = {"generate": lambda _: written, "score": policy.score, "pad_token_id": 0}
    batch, ref_logps = next(alignloss.self_play_rounds([policy.prompt] * len(chosen), chosen, 3, **more))
    out = alignloss.DPOLoss(beta=0.7)(policy.hidden(batch), policy.weight, batch.labels, ref_logps=ref_logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    assert policy.weight.grad.abs().max() < 1e-12


def test_a_round_begins_with_the_model_that_the_last_one_left():
    policy, seen = Toy([0.5, 0.25, 0.25]), []

    def generate(prompts):
        assert not torch.is_grad_enabled()
        seen.append(policy.probabilities)
        return [policy.tokens[:1]]

    more = {"generate": generate, "score": policy.score, "pad_token_id": 0}
    for batch, ref_logps in alignloss.self_play_rounds([policy.prompt], [policy.tokens[1:2]], 3, **more):
        assert batch.input_ids.tolist() == [[9, 1], [9, 0]] and not ref_logps.requires_grad
        assert torch.allclose(ref_logps, policy.probabilities[[1, 0]].log())
        with torch.no_grad():
            policy.weight[0] -= 1.0
    assert len(seen) == 3 and seen[0][0] > seen[1][0] > seen[2][0]


@pytest.mark.parametrize(
    ("rounds", "change", "message"),
    [
        (0, {}, "rounds must be at least 1"),
        (1.5, {}, "rounds must be an integer"),
        (1, {"score": lambda batch: torch.zeros(3)}, r"score must return \(2,\)"),
        (1, {"score": lambda batch: torch.tensor([0.0, torch.nan])}, "score must return finite"),
        (1, {"score": lambda batch: 0.0}, "what score returns must be a torch.Tensor"),
        (1, {"generate": lambda prompts: []}, "as many"),
    ],
)
def test_other_rounds(rounds, change, message):
    token = [torch.tensor([1])]
    more = {"generate": lambda prompts: token, "score": lambda batch: torch.zeros(2), "pad_token_id": 0} | change
    with pytest.raises(ValueError, match=message):
        list(alignloss.self_play_rounds(token, token, rounds, **more))
