"""Unpaired losses: one value for each sequence, with rewards r = beta log(pi / pi_ref) where there is a reference."""

import torch
from torch import Tensor

from .common import Unpaired, logistic, sigmoid


def _by_label(desirable: Tensor, if_desirable: Tensor, otherwise: Tensor) -> Tensor:
    """Where `desirable` is neither 0 nor 1 the loss is NaN."""
    return torch.where(desirable == 1, if_desirable, torch.where(desirable == 0, otherwise, torch.nan))


def kto_loss(
    logps: Tensor,  # (B,)
    ref_logps: Tensor,  # (B,)
    desirable: Tensor,  # (B,) or 0-d, bool or 0 and 1
    kl: Tensor,  # 0-d or (B,)
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Unpaired:
    """Kahneman-Tversky optimization: w (1 - sigmoid(s (r - beta kl))), with s = +1 for desirable sequences, else -1.

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, whose lambda_y is w: `desirable_weight` where s = +1, otherwise
    `undesirable_weight`. `kl` estimates KL(policy || reference) in nats; it is detached, clamped at 0. 1 - sigmoid(x)
    is taken as sigmoid(-x), exact if saturated. Where `desirable` is neither 0 nor 1 the loss is NaN.
    """
    rewards = beta * (logps - ref_logps)
    gains = rewards - beta * kl.detach().clamp(min=0)
    weights = _by_label(desirable, gains.new_full((), desirable_weight), gains.new_full((), undesirable_weight))
    left_out = weights == 0  # where a gain need not be finite; a gradient of 0 through the sigmoid would not be either
    x = torch.where(left_out, 0, _by_label(desirable, -gains, gains))
    return torch.where(left_out, 0, weights * sigmoid(x)), rewards.detach()


def apo_zero_unpaired_loss(
    logps: Tensor,  # (B,)
    ref_logps: Tensor,  # (B,)
    desirable: Tensor,  # (B,) or 0-d, bool or 0 and 1
    *,
    beta: float,
) -> Unpaired:
    """Anchored preference optimization, zero, unpaired: 1 - sigmoid(r) if desirable, else sigmoid(r).

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, a term for each sequence: KTO with kl = 0.
    """
    rewards = beta * (logps - ref_logps)
    return _by_label(desirable, sigmoid(-rewards), sigmoid(rewards)), rewards.detach()


def bco_loss(
    logps: Tensor,  # (B,)
    ref_logps: Tensor,  # (B,)
    desirable: Tensor,  # (B,) or 0-d, bool or 0 and 1
    delta: Tensor,  # 0-d or (B,)
    *,
    beta: float,
) -> Unpaired:
    """Binary classifier optimization: -log sigmoid(r - delta) if desirable, else -log sigmoid(delta - r).

    Jung et al. 2024 (arXiv:2404.04656). The shift `delta`, detached here, is the mean reward of both kinds of
    sequences, averaged over steps by `alignloss.RunningShift`.
    """
    rewards = beta * (logps - ref_logps)
    margins = rewards - delta.detach()
    return _by_label(desirable, logistic(margins), logistic(-margins)), rewards.detach()


def npo_loss(
    logps: Tensor,  # (B,)
    ref_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Unpaired:
    """Negative preference optimization, for sequences to unlearn: (2 / beta) log(1 + (pi / pi_ref)^beta).

    Zhang et al. 2024 (arXiv:2404.05868), eq. 3. As beta -> 0 it is gradient ascent on the NLL.
    """
    rewards = beta * (logps - ref_logps)
    return 2 / beta * logistic(-rewards), rewards.detach()


def sft_loss(
    logps: Tensor,  # (B,)
) -> Unpaired:
    """Negative log-likelihood of each sequence, -log pi, a sum in nats. NLL implies no reward: rewards are 0.

    `SFTLoss` divides the sum over the batch by its tokens; `PreferenceLoss("sft")` by its sequences.
    """
    return -logps, torch.zeros_like(logps)
