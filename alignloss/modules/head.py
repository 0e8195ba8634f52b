"""What every loss module shares: the options of the projection, and the two ways to evaluate a loss."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..checks import check_keywords, check_number, check_options, check_tensor, is_fake, savable
from ..ops.head import PROJECTION_OPTIONS, Projection, meaning, project
from ..ops.logprob import score
from .groups import Batch, Differentiated, Evaluate, Results, train_in_one_pass
from .outputs import METRIC_STATS, ScoredTokens

# of a module, with their defaults; the others belong to a call
HEAD_OPTIONS = {
    name: inspect.signature(project).parameters[name].default
    for name in PROJECTION_OPTIONS
    if name not in ("token_index", "vocab_group")
}


class HeadLoss(nn.Module):
    """A loss straight from hidden states; options of the projection as in `linear_logprob`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_keywords(f"{type(self).__name__} takes the options", dict.fromkeys(HEAD_OPTIONS, False), options)
        self.head_options = HEAD_OPTIONS | options
        check_options(**{name: v for name, v in self.head_options.items() if name not in ("backend", "validate")})
        backends.check_name(self.head_options["backend"])

    @property
    def ignore_index(self) -> int:
        return self.head_options["ignore_index"]

    @property
    def validate(self) -> bool | None:
        return self.head_options["validate"]

    def run(
        self,
        projection: Projection,
        batch: Batch,
        evaluate: Evaluate,
        stats: Sequence[str],
        one_pass: bool = True,
        differentiated: Differentiated | None = None,  # the same with its gradient, where that needs no autograd
    ) -> tuple[Results, ScoredTokens]:
        """The loss in one pass where that is allowed and applies, otherwise from token log-probabilities."""
        bits = self.bits(stats)
        if bits & backends.IS_TOP1:
            bits |= backends.LSE  # which shows where a distribution is none
        values: Sequence[Tensor | None]
        trained = train_in_one_pass(projection, batch, evaluate, bits, differentiated) if one_pass else None
        if trained is not None:
            results, values = trained
        else:
            logps, *values = score(projection, bits, differentiate_entropy=False)
            results = evaluate(logps, batch)
        named = dict(zip(backends.STATS, values, strict=True))
        asked: dict[str, Any] = {name: named[name].detach() for name in stats}  # type: ignore[union-attr]
        if "is_top1" in asked:
            asked["is_top1"] = torch.where(named["lse"].isnan(), torch.nan, asked["is_top1"].double())  # type: ignore[union-attr]
        return results, ScoredTokens(batch.labels, batch.offsets, batch.sequences, self.ignore_index, **asked)

    @staticmethod
    def bits(stats: Sequence[str]) -> int:
        """Statistics for `metrics()` as bits of backends.STATS; a ValueError for anything else."""
        return backends.stat_bits(stats, METRIC_STATS)

    def alike(self, asked: Any, data: dict[str, Any]) -> dict[str, Any]:
        """What the processes have to have the same of that each hold a part of every sequence, by name."""
        return {"what is asked for": (asked, meaning(self.head_options)), "data": data}

    def extra_repr(self) -> str:
        """The options of the projection that are not the default ones."""
        changed = {name: value for name, value in self.head_options.items() if value != HEAD_OPTIONS[name]}
        return ", ".join(f"{name}={value}" for name, value in changed.items())


def divisor(name: str, value: Any, device: torch.device) -> float | Tensor | None:
    """A number, or a 0-d tensor, that means are divided by."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        check_number(name, value, positive=True)
        return float(value)
    check_tensor(name, value)
    if value.dim() or value.device != device:
        raise ValueError(
            f"{name} must be a number or a 0-d tensor on {device}; got shape {tuple(value.shape)} on {value.device}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(value):
        check_number(name, value.item(), positive=True)
    return savable(value.detach())
