"""DPO, and losses that are DPO on another margin: a logistic function of one margin for each pair.

Everywhere m = r_chosen - r_rejected with the implied reward r = beta log(pi / pi_ref), and "down" or "up" is where a
step of gradient descent moves the log-probability of the chosen sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Paired, bounded_exp, logistic, sigmoid, weighted
from .divergences import Divergence

__all__ = [
    "aot_loss", "aot_unpaired_loss", "chi_po_loss", "discopop_loss", "dpo_loss", "dpo_shift_loss", "dpop_loss",
    "f_dpo_loss", "irpo_loss", "length_normalized_dpo_loss", "odpo_loss", "r_dpo_loss", "robust_dpo_loss",
    "tdpo1_loss", "tdpo2_loss",
]  # fmt: skip


def dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Paired:
    """Direct preference optimization: -log sigmoid(m), with m = r_chosen - r_rejected.

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. `label_smoothing` = e in [0, 0.5) is the probability that a pair is
    labelled the wrong way round, and gives -(1 - e) log sigmoid(m) - e log sigmoid(-m) (cDPO, Mitchell 2023, eq. 3),
    which is least at m = log((1 - e) / e).
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards - rejected_rewards, label_smoothing)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def robust_dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float,
) -> Paired:
    """Robust DPO: (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e), e = `label_smoothing` in [0, 0.5).

    Chowdhury et al. 2024 (arXiv:2403.00409). Where labels are flipped with probability e, its mean is that of DPO on
    the true ones, which cDPO's is not. Since log sigmoid(-m) = log sigmoid(m) - m it is -log sigmoid(m) - e m / (1 -
    2e), computed so: no difference of large numbers. It falls without bound in m, and is negative for large ones.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = logistic(margins) - weighted(label_smoothing / (1 - 2 * label_smoothing), margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def length_normalized_dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """DPO on rewards per token: -log sigmoid(r_chosen / |y_chosen| - r_rejected / |y_rejected|).

    Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), eq. 6. The rewards returned are those per token; TRL's
    `sigmoid_norm`, which is this loss, logs sums.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps) / chosen_lengths
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps) / rejected_lengths
    losses = logistic(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def r_dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    *,
    beta: float,
    length_weight: float,
) -> Paired:
    """DPO with a price on length: -log sigmoid(m + w (|y_chosen| - |y_rejected|)), w = `length_weight` per token.

    Park et al. 2024 (arXiv:2403.19159). A reward less w |y| has the optimal policy pi ~ pi_ref exp((r - w |y|) / beta),
    so r = beta log(pi / pi_ref) + w |y|: a longer chosen sequence has part of its margin already.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards + weighted(length_weight, chosen_lengths - rejected_lengths)
    losses = logistic(margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def irpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    *,
    beta: float,
    nll_weight: float = 1.0,
) -> Paired:
    """Iterative reasoning preference optimization: DPO + w NLL(chosen) / |y_chosen|, w = `nll_weight`.

    Pang et al. 2024 (arXiv:2404.19733), eq. 1. The NLL is the mean over the tokens of each sequence; RPO, whose NLL is
    per token of the batch, is `dpo_loss` in a module with `nll_weight`.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards - rejected_rewards) - weighted(nll_weight, chosen_logps / chosen_lengths)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def dpop_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    penalty_weight: float,
) -> Paired:
    """DPO-Positive: -log sigmoid(m - beta w max(0, log(pi_ref / pi)(chosen))), w = `penalty_weight`.

    Pal et al. 2024 (Smaug, arXiv:2402.13228), eq. 3, whose lambda is w. The penalty keeps the chosen log-probability
    from falling below the reference's.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards - rejected_rewards - weighted(penalty_weight, F.relu(-chosen_rewards)))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def odpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_scores: Tensor,  # (B,)
    rejected_scores: Tensor,  # (B,)
    *,
    beta: float,
    offset_weight: float,
) -> Paired:
    """DPO with an offset: -log sigmoid(m - w log(score_chosen - score_rejected)), w = `offset_weight`.

    Amini et al. 2024 (arXiv:2402.10571). Scores are those of a reward model or of people. A difference of 0 is an
    offset of -inf, so a loss of 0; a negative one, a pair in the wrong order, gives NaN.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    offsets = offset_weight * (chosen_scores - rejected_scores).detach().log()
    losses = logistic(chosen_rewards - rejected_rewards - offsets)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def dpo_shift_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    rejected_scale: float,
) -> Paired:
    """DPO-Shift: -log sigmoid(r_chosen - s r_rejected), s = `rejected_scale` in (0, 1]; 1 is DPO.

    Yang et al. 2025 (arXiv:2502.07599), eq. 3, whose f(lambda) is s: less of the rejected reward keeps the chosen one
    up.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards - rejected_scale * rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def f_dpo_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    divergence: Divergence,
) -> Paired:
    """DPO under another divergence: -log sigmoid(beta f'(u_chosen) - beta f'(u_rejected)), u = pi / pi_ref.

    Wang et al. 2023 (arXiv:2309.16240). `divergence` maps log u, (B,), to f'(u) up to a constant: `reverse_kl` (DPO),
    `forward_kl`, `js_divergence`, `partial(alpha_divergence, divergence_alpha=0.5)`, or your own. The rewards returned
    are beta f'(u).
    """
    chosen_rewards = beta * divergence(chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * divergence(rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def chi_po_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    reward_bound: float | None = None,
) -> Paired:
    """Chi-squared preference optimization: DPO with r = beta (u + log u), u = pi / pi_ref.

    Huang et al. 2024 (arXiv:2407.13399). With `reward_bound` = R the margin is clipped to [-2R, 2R], beyond which there
    is no gradient. log u in u is clamped at 60, where the value would overflow; the gradient of u beyond is 0.
    """
    chosen_logratios, rejected_logratios = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    chosen_rewards = beta * (bounded_exp(chosen_logratios) + chosen_logratios)
    rejected_rewards = beta * (bounded_exp(rejected_logratios) + rejected_logratios)
    margins = chosen_rewards - rejected_rewards
    losses = logistic(margins if reward_bound is None else margins.clamp(-2 * reward_bound, 2 * reward_bound))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def discopop_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    tau: float = 0.05,
) -> Paired:
    """DiscoPOP, the log-ratio modulated loss: (1 - s) (-log sigmoid(m)) + s exp(-m), with s = sigmoid(m / tau).

    Lu et al. 2024 (arXiv:2406.08414), eq. 5. s exp(-m) is taken as exp(-m + log sigmoid(m / tau)), which cannot
    overflow for tau in (0, 1]. At tau = 0.05 the loss rises from m = -0.12 to 0.07, where a step pushes the chosen
    sequence down; from tau = 0.12 on it rises nowhere.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    # log s - m, of m < 0 by log s = m / tau + log sigmoid(-m / tau): no difference of infinities
    low, high = torch.where(margins < 0, margins, 0), torch.where(margins < 0, 0, margins)
    below = weighted(1 / tau - 1, low) + F.logsigmoid(-low / tau)
    exponents = torch.where(margins < 0, below, F.logsigmoid(high / tau) - high)
    losses = sigmoid(-margins / tau) * logistic(margins) + exponents.exp()
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def aot_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Paired:
    """Alignment by optimal transport, paired: DPO between the sorted margins of policy and reference.

    Melnyk et al. 2024 (arXiv:2406.05882). The pair whose log pi(chosen) - log pi(rejected) has rank k is compared with
    the k-th of the reference's. It couples the batch: the loss of a pair depends on all of them.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    margins, order = (chosen_logps - rejected_logps).sort(stable=True)
    ref_margins = (ref_chosen_logps - ref_rejected_logps).sort().values
    losses = logistic(beta * (margins - ref_margins), label_smoothing)[order.argsort()]
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def aot_unpaired_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Paired:
    """Alignment by optimal transport, unpaired: DPO between the sorted rewards of all chosen and all rejected ones.

    Melnyk et al. 2024 (arXiv:2406.05882). The loss stands at the chosen sequence of its rank. It couples the batch: the
    loss of a pair depends on all of them.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    sorted_chosen, order = chosen_rewards.sort(stable=True)
    losses = logistic(sorted_chosen - rejected_rewards.sort().values, label_smoothing)[order.argsort()]
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def tdpo1_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_seq_kl: Tensor,  # (B,)
    rejected_seq_kl: Tensor,  # (B,)
    *,
    beta: float,
) -> Paired:
    """Token-level DPO, first form: -log sigmoid(m - beta (KL_rejected - KL_chosen)).

    Zeng et al. 2024 (arXiv:2404.11999). KL is the sum of KL(pi_ref || pi) over the labelled positions of a sequence, in
    nats, from `linear_kl`; it is differentiated.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = logistic(chosen_rewards - rejected_rewards - beta * (rejected_seq_kl - chosen_seq_kl))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def tdpo2_loss(
    chosen_logps: Tensor,  # (B,)
    rejected_logps: Tensor,  # (B,)
    ref_chosen_logps: Tensor,  # (B,)
    ref_rejected_logps: Tensor,  # (B,)
    chosen_seq_kl: Tensor,  # (B,)
    rejected_seq_kl: Tensor,  # (B,)
    *,
    beta: float,
    kl_weight: float = 0.5,
) -> Paired:
    """Token-level DPO, second form: -log sigmoid(m - w beta (KL_rejected - KL_chosen)), w = `kl_weight`.

    Zeng et al. 2024 (arXiv:2404.11999), whose alpha is w. As `tdpo1_loss`, but without a gradient through KL_chosen.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    differences = beta * (rejected_seq_kl - chosen_seq_kl.detach())
    losses = logistic(chosen_rewards - rejected_rewards - weighted(kl_weight, differences))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
