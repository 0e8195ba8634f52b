"""Each plain loss on a case that a reader can compute by eye."""

from math import exp, log

import pytest
import torch

from alignloss import losses


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_dpo():
    # log-ratios: chosen -10 - -12 = 2, rejected -11 - -10 = -1; margin 0.5 (2 + 1) = 1.5
    values, chosen, rejected = losses.dpo_loss(t(-10), t(-11), t(-12), t(-10), beta=0.5)
    assert values.item() == pytest.approx(-log(sigmoid(1.5)))
    assert (chosen.item(), rejected.item()) == (1.0, -0.5)
    smoothed, *_ = losses.dpo_loss(t(-10), t(-11), t(-12), t(-10), beta=0.5, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(-0.9 * log(sigmoid(1.5)) - 0.1 * log(sigmoid(-1.5)))


def test_dpo_at_the_reference_is_log_2():
    assert losses.dpo_loss(t(-3), t(-4), t(-3), t(-4), beta=0.1)[0].item() == pytest.approx(log(2))


def test_ipo():
    # log-ratios per token: chosen 2 / 4 = 0.5, rejected -1 / 2 = -0.5; target 1 / (2 * 0.25) = 2
    values, chosen, rejected = losses.ipo_loss(t(-10), t(-11), t(-12), t(-10), t(4), t(2), beta=0.25)
    assert values.item() == pytest.approx((1.0 - 2.0) ** 2)
    assert (chosen.item(), rejected.item()) == (0.5, -0.25)
    at_reference, *_ = losses.ipo_loss(t(-3), t(-4), t(-3), t(-4), t(5), t(6), beta=0.1)
    assert at_reference.item() == pytest.approx(1 / (4 * 0.1**2))


def test_ipo_sum():
    # h = 2 - (-1) = 3; target 2
    assert losses.ipo_sum_loss(t(-10), t(-11), t(-12), t(-10), beta=0.25)[0].item() == pytest.approx(1.0)


def test_kto():
    # rewards: 0.5 * 2 = 1 and 0.5 * -1 = -0.5; baseline 0.5 * 0.8 = 0.4
    values, rewards = losses.kto_loss(
        t(-10, -11), t(-12, -10), torch.tensor([True, False]), t(0.8)[0], beta=0.5, desirable_weight=2.0
    )
    assert values.tolist() == pytest.approx([2 * (1 - sigmoid(1 - 0.4)), 1 - sigmoid(-(-0.5 - 0.4))])
    assert rewards.tolist() == [1.0, -0.5]


def test_kto_clamps_and_detaches_its_kl():
    kl = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    logps = t(-3).requires_grad_()
    values, _ = losses.kto_loss(logps, t(-3), torch.tensor([True]), kl, beta=0.1)
    values.sum().backward()
    assert values.item() == pytest.approx(0.5)
    assert kl.grad is None


def test_cpo():
    values, chosen, rejected = losses.cpo_loss(t(-10), t(-13), beta=0.5)
    assert values.item() == pytest.approx(-log(sigmoid(1.5)))
    assert (chosen.item(), rejected.item()) == (-5.0, -6.5)


@pytest.mark.parametrize(
    "fn", [losses.dpo_loss, losses.ipo_loss, losses.ipo_sum_loss, losses.kto_loss, losses.cpo_loss]
)
def test_values_are_unreduced_and_rewards_detached(fn):
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    data = [t(-3, -4).requires_grad_() if n in ("logps", "chosen_logps", "rejected_logps") else t(1, 2) for n in names]
    values, *rewards = fn(*data, beta=0.1)
    assert values.shape == (2,)
    assert values.requires_grad
    assert all(r.shape == (2,) and not r.requires_grad for r in rewards)
