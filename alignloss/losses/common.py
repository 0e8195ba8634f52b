"""What several losses are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MAX_EXPONENT", "Paired", "Unpaired", "bounded_exp", "deformed_log", "log_odds", "logistic"]

Paired = tuple[Tensor, Tensor, Tensor]  # losses, chosen_rewards, rejected_rewards
Unpaired = tuple[Tensor, Tensor]  # losses, rewards

MAX_EXPONENT = 80.0  # e^80 and its gradient times a few powers of ten stay within float32


def logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m)."""
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    if label_smoothing:  # not 0 * inf, where the rejected sequence is impossible
        losses = losses - label_smoothing * F.logsigmoid(-margins)
    return losses


def bounded_exp(exponents: Tensor) -> Tensor:
    """exp(x), constant beyond `MAX_EXPONENT`."""
    return exponents.clamp(max=MAX_EXPONENT).exp()


def deformed_log(logs: Tensor, alpha: float) -> Tensor:
    """(1 - u^-alpha) / alpha from log u, and its limit log u at alpha = 0; constant where -alpha log u is beyond 80."""
    if alpha == 0:
        return logs
    return -torch.expm1((-alpha * logs).clamp(max=MAX_EXPONENT)) / alpha


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, of full relative precision at both ends; finite, and constant, at p = 1."""
    x = torch.where(logps < 0, logps, -torch.finfo(torch.float32).tiny)
    near_one, nearer = x > -math.log(2), x > -1e-3
    # log(1 - p) by log1p, expm1 or its series, which is exact there and does not lean on expm1, whose compiled form
    # loses small arguments; each branch sees only its own x
    far = torch.log1p(-torch.where(near_one, -1.0, x).exp())
    near = (-torch.expm1(torch.where(near_one & ~nearer, x, -0.5))).log()
    series = (-x).log() + x / 2 + x**2 / 24
    return x - torch.where(nearer, series, torch.where(near_one, near, far))
