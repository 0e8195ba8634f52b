"""Preference losses as plain functions of sequence log-probabilities.

Positional parameters are data, keyword-only parameters are options. Every log-probability is a sum in nats over the
labelled tokens of a sequence; a loss that normalises by length divides by `lengths` itself. A paired loss returns
`(losses, chosen_rewards, rejected_rewards)`, an unpaired one `(losses, rewards)`, each (B,), unreduced, in the order of
the batch, the rewards detached. The implied reward is r = beta log(pi / pi_ref) (Rafailov et al. 2023, eq. 5).

A function of this kind, a user's own included, becomes a module by `alignloss.PreferenceLoss(function, **options)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cpo_loss", "dpo_loss", "ipo_loss", "ipo_sum_loss", "kto_loss"]


def dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization: -log sigmoid(m), with m = r_chosen - r_rejected.

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. `label_smoothing` = e in [0, 0.5) is the probability that a pair is
    labelled the wrong way round, and gives -(1 - e) log sigmoid(m) - e log sigmoid(-m) (cDPO, Mitchell 2023, eq. 3).
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    if label_smoothing:  # not 0 * inf, where the rejected sequence is impossible
        losses = losses - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity preference optimization on sums, as printed: (h - 1 / (2 beta))^2, in nats^2.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, with tau = beta and h the difference of the summed log-ratios.
    """
    one = torch.ones_like(chosen_logps)
    return ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, one, one, beta=beta)


def kto_loss(
    logps: Tensor,  # (B,)
    ref_logps: Tensor,  # (B,)
    desirable: Tensor,  # (B,) or 0-d, bool or 0 and 1
    kl: Tensor,  # 0-d or (B,)
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Kahneman-Tversky optimization: w (1 - sigmoid(s (r - beta kl))), with s = +1 for desirable sequences, else -1.

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, whose lambda_y is w: `desirable_weight` where s = +1, otherwise
    `undesirable_weight`. `kl` estimates KL(policy || reference) in nats; it is detached, clamped at 0. 1 - sigmoid(x)
    is taken as sigmoid(-x), exact if saturated. Where `desirable` is neither 0 nor 1 the loss is NaN.
    """
    rewards = beta * (logps - ref_logps)
    baseline = beta * kl.detach().clamp(min=0)
    undesirable = torch.where(desirable == 0, undesirable_weight * torch.sigmoid(rewards - baseline), torch.nan)
    losses = torch.where(desirable == 1, desirable_weight * torch.sigmoid(baseline - rewards), undesirable)
    return losses, rewards.detach()


def cpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive preference optimization, its preference term: -log sigmoid(beta (log pi_chosen - log pi_rejected)).

    Xu et al. 2024 (arXiv:2401.08417), L_prefer of eq. 5; its NLL term is `nll_weight` of the module. It is DPO with a
    uniform reference, `label_smoothing` included; rewards are beta log pi.
    """
    zero = torch.zeros_like(chosen_logps)
    return dpo_loss(chosen_logps, rejected_logps, zero, zero, beta=beta, label_smoothing=label_smoothing)
