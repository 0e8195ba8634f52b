"""Several losses as one, in one pass over the hidden states."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..checks import check_keywords, check_number
from .function import WeightedSum
from .head import HEAD_OPTIONS, HeadLoss
from .preference import PreferenceLoss


class MixtureLoss(PreferenceLoss):
    """sum_i w_i loss_i of several losses, in one pass over the hidden states.

    MPO (Wang et al. 2024, arXiv:2411.10442) is `MixtureLoss([DPOLoss(beta=0.1), PreferenceLoss("bco_pair", beta=0.1)],
    weights=[0.8, 0.2], nll_weight=1.0)`. The call takes what any of the losses takes; a datum that two of them name is
    the same for both. `losses` of the result is the weighted sum, the rewards are those of the first loss.

    Args:
        modules: `PreferenceLoss` modules, all paired or all unpaired, whose own `nll_weight` counts w_i times. The
            options of the projection belong to the mixture, not to them.
        weights: w_i, a number for each.
        nll_weight, options: as in `PreferenceLoss`.

    Raises:
        ValueError: for anything else.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, 6]])
        >>> simpo, cpo = alignloss.SimPOLoss(gamma=0.0), alignloss.CPOLoss(nll_weight=0.0)
        >>> alignloss.MixtureLoss([simpo, cpo], weights=[1.0, 2.0])(hidden, weight, labels).loss  # 3 log 2
        tensor(2.0794)
    """

    def __init__(
        self,
        modules: Sequence[PreferenceLoss],
        weights: Sequence[float],
        *,
        nll_weight: float = 0.0,
        couples_batch: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(modules, Iterable) or not isinstance(weights, Iterable):
            raise ValueError(f"a mixture takes a list of losses and one of weights; got {modules!r} and {weights!r}")
        modules, weights = list(modules), list(weights)
        if not modules or len(modules) != len(weights):
            raise ValueError(f"a mixture takes a weight for each loss; got {len(modules)} and {len(weights)}")
        for module, weight in zip(modules, weights, strict=True):
            if not isinstance(module, PreferenceLoss) or module.paired != modules[0].paired:
                raise ValueError(
                    "a mixture takes PreferenceLosses, all paired or all unpaired; "
                    f"got {[type(m).__name__ for m in modules]}. The NLL of the chosen sequences is nll_weight"
                )
            if changed := HeadLoss.extra_repr(module):
                raise ValueError(f"give {changed} to the mixture, not to {type(module).__name__}")
            check_number("a weight", weight)
        check_number("nll_weight", nll_weight)
        nll_weight += sum(weight * module.nll_weight for module, weight in zip(modules, weights, strict=True))
        if not any(weights) and not nll_weight:
            raise ValueError("every weight of the mixture is 0, the NLL's too: nothing is left to train")
        couples_batch = couples_batch or any(module.couples_batch for module in modules)
        known = dict.fromkeys(HEAD_OPTIONS, False)
        check_keywords("its losses have their own options, a mixture takes those of the projection,", known, options)
        HeadLoss.__init__(self, **options)
        self._take(WeightedSum([module.function for module in modules], weights), nll_weight, couples_batch)
        self.mixed = nn.ModuleList(modules)
