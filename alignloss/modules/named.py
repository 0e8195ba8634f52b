"""The losses that papers are known by, as modules with options of their own."""

from typing import Any

from .. import losses
from .preference import PreferenceLoss


class DPOLoss(PreferenceLoss):
    """`losses.dpo_loss` as a module: -log sigmoid(r_chosen - r_rejected), with r = beta log(pi / pi_ref).

    `label_smoothing` in [0, 0.5) gives cDPO. Other arguments as in `PreferenceLoss`.

    Example:
        Where policy and reference agree, nothing is preferred: -log(1 / 2).

        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, -100]])  # a chosen and a rejected sequence
        >>> ref_logps = alignloss.sequence_logprob(hidden, weight, labels).logps
        >>> out = alignloss.DPOLoss(beta=0.1)(hidden, weight, labels, ref_logps=ref_logps)
        >>> out.loss
        tensor(0.6931)
        >>> out.metrics()["lengths/chosen"]
        tensor(3.)
    """

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(losses.dpo_loss, beta=beta, label_smoothing=label_smoothing, **options)


class IPOLoss(PreferenceLoss):
    """`losses.ipo_loss` as a module: (h - 1 / (2 beta))^2 on log-ratios per token. Arguments as in `PreferenceLoss`.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, 6]])
        >>> ref_logps = alignloss.sequence_logprob(hidden, weight, labels).logps
        >>> alignloss.IPOLoss(beta=0.5)(hidden, weight, labels, ref_logps=ref_logps).loss  # (0 - 1)^2
        tensor(1.)
    """

    def __init__(self, *, beta: float = 0.1, **options: Any) -> None:
        super().__init__(losses.ipo_loss, beta=beta, **options)


class KTOLoss(PreferenceLoss):
    """`losses.kto_loss` as a module: w (1 - sigmoid(s (r - beta kl))), unpaired. Arguments as in `PreferenceLoss`.

    w is `desirable_weight` where s = +1, `undesirable_weight` where s = -1. The call takes `desirable`, bool (B,) or
    0-d, and `kl` in nats, 0-d or (B,), clamped at 0: 0.0 for none, or what `kto_kl` estimates from `mismatched_pairs`.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, 6]])
        >>> ref_logps = alignloss.sequence_logprob(hidden, weight, labels).logps
        >>> loss_fn = alignloss.KTOLoss(undesirable_weight=2.0)
        >>> desirable = torch.tensor([True, False])
        >>> loss_fn(hidden, weight, labels, ref_logps=ref_logps, desirable=desirable, kl=0.0).losses
        tensor([0.5000, 1.0000])
    """

    def __init__(
        self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(
            losses.kto_loss,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            **options,
        )


class CPOLoss(PreferenceLoss):
    """`losses.cpo_loss` with the NLL of the chosen tokens: -log sigmoid(beta (log pi_c - log pi_r)) + nll_weight NLL.

    Xu et al. 2024 (arXiv:2401.08417), eq. 5, with the NLL per token instead of per sequence. Reference-free. Other
    arguments as in `PreferenceLoss`.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, 6]])
        >>> out = alignloss.CPOLoss()(hidden, weight, labels)
        >>> out.losses, out.nll_loss  # log 2, and log 8 per chosen token
        (tensor([0.6931]), tensor(2.0794))
    """

    def __init__(
        self, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(losses.cpo_loss, beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight, **options)


class ORPOLoss(PreferenceLoss):
    """`losses.orpo_loss` with the NLL of the chosen tokens: -beta log sigmoid(log odds ratio) + nll_weight NLL.

    Hong et al. 2024 (arXiv:2403.07691), eq. 6, with lambda = beta. The paper's NLL runs over prompt and response: give
    `nll_labels` for that. Reference-free. Other arguments as in `PreferenceLoss`.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, -100]])
        >>> alignloss.ORPOLoss(beta=0.1)(hidden, weight, labels).losses  # 0.1 log 2: lengths do not count
        tensor([0.0693])
    """

    def __init__(self, *, beta: float = 0.1, nll_weight: float = 1.0, **options: Any) -> None:
        super().__init__(losses.orpo_loss, beta=beta, nll_weight=nll_weight, **options)


class SimPOLoss(PreferenceLoss):
    """`losses.simpo_loss` as a module: -log sigmoid(r_chosen - r_rejected - gamma), r = beta log pi / |y|.

    Reference-free; CPO-SimPO with `nll_weight`. Other arguments as in `PreferenceLoss`.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, -100]])
        >>> alignloss.SimPOLoss(gamma=0.0)(hidden, weight, labels).losses  # log 2: lengths do not count
        tensor([0.6931])
    """

    def __init__(self, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(losses.simpo_loss, beta=beta, gamma=gamma, label_smoothing=label_smoothing, **options)
