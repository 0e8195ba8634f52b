"""Several losses as one, in one pass over the hidden states."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .losses.common import weighted
from .modules import PreferenceLoss
from .planning import check_number

__all__ = ["MixtureLoss"]


class MixtureLoss(PreferenceLoss):
    """sum_i w_i loss_i of several losses, in one pass over the hidden states.

    MPO (Wang et al. 2024, arXiv:2411.10442) is `MixtureLoss([DPOLoss(beta=0.1), PreferenceLoss("bco_pair", beta=0.1)],
    weights=[0.8, 0.2], nll_weight=1.0)`. The call takes what any of the losses takes; a datum that two of them name is
    the same for both. `losses` of the result is the weighted sum, the rewards are those of the first loss.

    Args:
        modules: `PreferenceLoss`es, all paired or all unpaired, whose own `nll_weight` counts w_i times. The options of
            the projection belong to the mixture, not to them.
        weights: w_i, a number for each.
        nll_weight, options: as in `PreferenceLoss`.

    Raises:
        ValueError: for anything else.
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
            if module.projection_repr():
                raise ValueError(f"give {module.projection_repr()} to the mixture, not to {type(module).__name__}")
            check_number("a weight", weight)
        check_number("nll_weight", nll_weight)
        nll_weight += sum(weight * module.nll_weight for module, weight in zip(modules, weights, strict=True))
        if not any(weights) and not nll_weight:
            raise ValueError("every weight of the mixture is 0, the NLL's too: nothing is left to train")
        couples_batch = couples_batch or any(module.couples_batch for module in modules)
        super().__init__(_Mixture(modules, weights), nll_weight=nll_weight, couples_batch=couples_batch, **options)
        self.mixed, self.weights = nn.ModuleList(modules), weights

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}"


class _Mixture:
    """The weighted sum of losses as one loss function, whose data are those of all of them."""

    def __init__(self, modules: list[PreferenceLoss], weights: list[float]) -> None:
        self.modules, self.weights = modules, weights
        self.__name__ = "mixture of " + ", ".join(module.fn_name for module in modules)
        required = {name for module in modules for name in module.names if name not in module.defaults}
        names = dict.fromkeys(name for module in modules for name in module.names)
        self.names = sorted(names, key=lambda name: name not in required)
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind, default=empty if name in required else None) for name in self.names]
        )

    def __call__(self, *values: Any) -> tuple[Tensor, ...]:
        given, results = dict(zip(self.names, values, strict=True)), []
        count = len(given["chosen_logps" if self.modules[0].paired else "logps"])
        for module in self.modules:
            arguments = [module.defaults.get(n) if given[n] is None else given[n] for n in module.names]
            results.append(module.evaluated(arguments, count))
        terms = [weighted(weight, result[0]) for weight, result in zip(self.weights, results, strict=True)]
        return sum(terms[1:], terms[0]), *results[0][1:]
