"""f-divergences for `f_dpo_loss`: functions from log u to f'(u) up to a constant, with u = pi / pi_ref.

Wang et al. 2023 (arXiv:2309.16240), table 1. Constants cancel between the two sequences of a pair.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .common import bounded_exp, deformed_log

Divergence = Callable[[Tensor], Tensor]  # (B,) -> (B,)


def reverse_kl(logratios: Tensor) -> Tensor:
    """f(u) = u log u, f'(u) = log u (+ 1): DPO."""
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """f(u) = -log u, f'(u) = -1 / u. -log u in 1 / u is clamped at 60, and there is no gradient beyond."""
    return -bounded_exp(-logratios)


def js_divergence(logratios: Tensor) -> Tensor:
    """Jensen-Shannon: f'(u) = log(2u / (1 + u)) = log sigmoid(log u) (+ log 2)."""
    return F.logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, *, divergence_alpha: float) -> Tensor:
    """f'(u) = (1 - u^-a) / a with a = `divergence_alpha`: 0 is the limit, reverse KL, and 1 forward KL.

    As in the paper. TRL 1.16's `f_alpha_divergence_coef` is 1 - a; in older versions it was a. The exponent -a log u is
    clamped at 60, and there is no gradient beyond.
    """
    return deformed_log(logratios, divergence_alpha)
