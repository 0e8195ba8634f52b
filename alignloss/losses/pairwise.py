"""Paired losses with a reference that are no logistic function of one margin: squares, hinges, sigmoids, sums.

Everywhere c and r are log(pi / pi_ref) of the chosen and the rejected sequence, in nats, and r_chosen = beta c,
r_rejected = beta r the implied rewards.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Paired, logistic, sigmoid

__all__ = [
    "apo_down_loss", "apo_zero_loss", "bco_pair_loss", "cal_dpo_loss", "exo_loss", "hinge_loss", "ipo_loss",
    "ipo_sum_loss", "nca_loss", "rebel_loss", "sppo_loss",
]  # fmt: skip


def ipo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Identity preference optimization on log-ratios per token: (h - 1 / (2 beta))^2, in nats^2.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, with tau = beta and h the difference of the log-ratios, each divided by
    its own length: the form that the authors confirmed for language models. `ipo_sum_loss` is the form on sums.
    """
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (margins - 1 / (2 * beta)) ** 2, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def ipo_sum_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Identity preference optimization on sums, as printed: (c - r - 1 / (2 beta))^2, in nats^2.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, with tau = beta and the difference of the summed log-ratios.
    """
    one = torch.ones_like(chosen_logps)
    return ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, one, one, beta=beta)


def hinge_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Hinge loss on the implied rewards (RSO's hinge-norm): max(0, 1 - (r_chosen - r_rejected)).

    Liu et al. 2023 (arXiv:2309.06657), eq. 10, whose gamma is beta.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = F.relu(1 - (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def exo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    epsilon: float,
) -> Paired:
    """Efficient exact optimization on pairs: KL((q, 1 - q) || (1 - e, e)), q = sigmoid(r_chosen - r_rejected).

    Ji et al. 2024 (arXiv:2402.00856), eq. 16. e = `epsilon` in (0, 0.5) smooths the labels, without which the
    divergence is infinite. It is least, 0, at a margin of log((1 - e) / e), beyond which a step pushes the chosen
    sequence down.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins = (chosen_rewards - rejected_rewards).clamp(-1e3, 1e3)  # saturated beyond; not 0 * inf
    chosen_terms = sigmoid(margins) * (F.logsigmoid(margins) - math.log1p(-epsilon))
    losses = chosen_terms + sigmoid(-margins) * (F.logsigmoid(-margins) - math.log(epsilon))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def nca_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Noise contrastive alignment on pairs: -log sigmoid(r_c) - log sigmoid(-r_c) / 2 - log sigmoid(-r_r) / 2.

    Chen et al. 2024 (arXiv:2402.05369). It is stationary in the chosen reward at r_c = log 2, and lowers the rejected
    one without end.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards) + 0.5 * (logistic(-chosen_rewards) + logistic(-rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sppo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Self-play preference optimization, hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, in nats^2.

    Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with eta = 1 / beta and win probabilities 1 and 0: each reward is pulled
    to its own target, 1/2 for the chosen and -1/2 for the rejected sequence.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = ((chosen_rewards - 0.5) ** 2 + (rejected_rewards + 0.5) ** 2) / beta**2
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def apo_zero_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Anchored preference optimization, zero: (1 - sigmoid(r_chosen)) + sigmoid(r_rejected).

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7: chosen up and rejected down, for chosen sequences better than
    what the policy writes. The paper leaves the constant 1 out.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = sigmoid(-chosen_rewards) + sigmoid(rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def apo_down_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Anchored preference optimization, down: sigmoid(r_chosen) + (1 - sigmoid(r_chosen - r_rejected)).

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8: both down, the rejected one further, for chosen sequences worse
    than what the policy writes. It is stationary in the chosen reward where |r_chosen| = |r_chosen - r_rejected|. The
    paper leaves the constant 1 out.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = sigmoid(chosen_rewards) + sigmoid(rejected_rewards - chosen_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def bco_pair_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Binary classifier optimization on pairs, without its shift: -log sigmoid(r_chosen) - log sigmoid(-r_rejected).

    Jung et al. 2024 (arXiv:2404.04656), with delta = 0. An upper bound of DPO's loss; `bco_loss` has the shift.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards) + logistic(-rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cal_dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Calibrated DPO: -log sigmoid(c - r) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, c and r in nats.

    Xiao et al. 2024 (arXiv:2412.14516), eq. 10. The margin has no beta, which stands in the targets of the log-ratios
    alone. It is stationary at c = 1 / (2 beta) + sigmoid(-2c) / 2, r = -c.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    squares = ((chosen_rewards - 0.5) ** 2 + (rejected_rewards + 0.5) ** 2) / beta**2
    losses = logistic((chosen_rewards - rejected_rewards) / beta) + squares
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def rebel_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_scores: Tensor,  # (B,)
    rejected_scores: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """REBEL: (r_chosen - r_rejected - (score_chosen - score_rejected))^2, r = beta log(pi / pi_ref).

    Gao et al. 2024 (arXiv:2404.16767), with beta = 1 / eta: least squares from implied to given rewards. pi_ref is the
    policy of the last iteration. The names chosen and rejected carry no order here.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    score_margins = (chosen_scores - rejected_scores).detach()
    losses = (chosen_rewards - rejected_rewards - score_margins) ** 2
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
