"""Paired losses without a reference. Rewards are what the loss compares: beta log pi, per token where it says so."""

import torch.nn.functional as F
from torch import Tensor

from .common import Paired, deformed_log, log_odds, logistic

__all__ = [
    "alphapo_loss", "cpo_hinge_loss", "cpo_ipo_loss", "cpo_loss", "orpo_loss", "simper_loss", "simpo_loss", "slic_loss",
]  # fmt: skip


def cpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Paired:
    """Contrastive preference optimization, its preference term: -log sigmoid(beta (log pi_chosen - log pi_rejected)).

    Xu et al. 2024 (arXiv:2401.08417), L_prefer of eq. 5; its NLL term is `nll_weight` of the module. It is DPO with a
    uniform reference, `label_smoothing` included; rewards are beta log pi.
    """
    chosen_rewards, rejected_rewards = beta * chosen_logps, beta * rejected_logps
    losses = logistic(chosen_rewards - rejected_rewards, label_smoothing)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cpo_hinge_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Hinge loss on log-probabilities: max(0, 1 - beta (log pi_chosen - log pi_rejected)).

    `hinge_loss` with a uniform reference; TRL's CPO with `loss_type="hinge"`. It is beta times `slic_loss` at
    delta = 1 / beta.
    """
    chosen_rewards, rejected_rewards = beta * chosen_logps, beta * rejected_logps
    losses = F.relu(1 - (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cpo_ipo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Squared loss on log-probabilities per token: (h - 1 / (2 beta))^2, h their difference, in nats^2.

    `ipo_loss` with a uniform reference; TRL's CPO with `loss_type="ipo"`.
    """
    chosen_rewards = beta * chosen_logps / chosen_lengths
    rejected_rewards = beta * rejected_logps / rejected_lengths
    losses = ((chosen_rewards - rejected_rewards) / beta - 1 / (2 * beta)) ** 2
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def simpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Paired:
    """Simple preference optimization: -log sigmoid(r_chosen - r_rejected - gamma), r = beta log pi / |y|.

    Meng et al. 2024 (arXiv:2405.14734), eq. 6. `gamma` is the target margin itself, not its ratio to beta.
    `label_smoothing` as in `dpo_loss`. CPO-SimPO adds `nll_weight` of the module.
    """
    chosen_rewards = beta * chosen_logps / chosen_lengths
    rejected_rewards = beta * rejected_logps / rejected_lengths
    losses = logistic(chosen_rewards - rejected_rewards - gamma, label_smoothing)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def alphapo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
    gamma: float,
    alpha: float,
) -> Paired:
    """AlphaPO: SimPO with r = beta (1 - p^-alpha) / alpha, p = exp(log pi / |y|), the probability per token.

    Gupta et al. 2025 (arXiv:2501.03884). `alpha` = 0 is the limit, SimPO. For `alpha` > 0 and p -> 0 the reward
    overflows: -alpha log p is clamped at 60, and there is no gradient beyond.
    """
    chosen_rewards = beta * deformed_log(chosen_logps / chosen_lengths, alpha)
    rejected_rewards = beta * deformed_log(rejected_logps / rejected_lengths, alpha)
    losses = logistic(chosen_rewards - rejected_rewards - gamma)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Odds ratio preference optimization, its ratio term: -beta log sigmoid(log odds(chosen) - log odds(rejected)).

    Hong et al. 2024 (arXiv:2403.07691), eqs. 6 and 7, with lambda = beta; its NLL term is `nll_weight` of the module.
    odds = p / (1 - p) with p = exp(log pi / |y|), computed exactly as p -> 1. A sequence without labels has p = 1,
    taken as log odds of 672 (71 in float32). Rewards are beta log pi / |y|.
    """
    chosen_rewards = beta * chosen_logps / chosen_lengths
    rejected_rewards = beta * rejected_logps / rejected_lengths
    log_odds_ratios = log_odds(chosen_logps / chosen_lengths) - log_odds(rejected_logps / rejected_lengths)
    losses = beta * logistic(log_odds_ratios)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def slic_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    *,
    delta: float,
) -> Paired:
    """SLiC-HF, its calibration term: max(0, delta - log pi_chosen + log pi_rejected), in nats.

    Zhao et al. 2023 (arXiv:2305.10425). Its regularisation, an NLL, is `nll_weight` of the module. Rewards are log pi.
    """
    losses = F.relu(delta - (chosen_logps - rejected_logps))
    return losses, chosen_logps.detach(), rejected_logps.detach()


def simper_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
) -> Paired:
    """SimPER: exp(log pi_rejected / |y|) - exp(log pi_chosen / |y|), a difference of inverse perplexities.

    Xiao et al. 2025 (arXiv:2502.00883). It has no hyperparameter. Rewards are the inverse perplexities, in [0, 1].
    """
    chosen_rewards = (chosen_logps / chosen_lengths).exp()
    rejected_rewards = (rejected_logps / rejected_lengths).exp()
    return rejected_rewards - chosen_rewards, chosen_rewards.detach(), rejected_rewards.detach()
