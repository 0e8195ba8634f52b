"""What several losses are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Paired = tuple[Tensor, Tensor, Tensor]  # losses, chosen_rewards, rejected_rewards
Unpaired = tuple[Tensor, Tensor]  # losses, rewards

MAX_EXPONENT = 60.0  # e^60 = 1e26 leaves its gradient 12 powers of ten below the range of float32, for loss scales


def weighted(weight: float, term: Tensor) -> Tensor:
    """weight * term; a weight of 0 leaves the term out, where it is not finite too."""
    return weight * term if weight else torch.zeros_like(term)


def logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m)."""
    return -(1 - label_smoothing) * F.logsigmoid(margins) - weighted(label_smoothing, F.logsigmoid(-margins))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), whose slope keeps its relative precision at both ends: autograd's s (1 - s) is 0 as s -> 1."""
    return F.logsigmoid(x).exp()


def bounded_exp(exponents: Tensor) -> Tensor:
    """exp(x), constant beyond `MAX_EXPONENT`."""
    return exponents.clamp(max=MAX_EXPONENT).exp()


def deformed_log(logs: Tensor, alpha: float) -> Tensor:
    """(1 - u^-alpha) / alpha from log u, and its limit log u at alpha = 0; constant where -alpha log u is beyond 60."""
    if alpha == 0:
        return logs
    return -torch.expm1((-alpha * logs).clamp(max=MAX_EXPONENT)) / alpha


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, of full relative precision at both ends; finite, and constant, at p = 1."""
    # its slope is 1 / |x|: room in the range for what comes to it
    least = torch.finfo(logps.dtype).tiny / torch.finfo(logps.dtype).eps
    x = torch.where(logps > -least, -least, logps)
    near_one, nearer = x > -math.log(2), x > -1e-3
    # log(1 - p) by log1p, expm1 or its series, which is exact there and does not lean on expm1, whose compiled form
    # loses small arguments; each branch sees only its own x
    far = torch.log1p(-torch.where(near_one, -1.0, x).exp())
    near = (-torch.expm1(torch.where(near_one & ~nearer, x, -0.5))).log()
    small = torch.where(nearer, x, -5e-4)
    series = (-small).log() + small / 2 + small**2 / 24
    return x - torch.where(nearer, series, torch.where(near_one, near, far))
