"""Any loss of token log-probabilities, in one pass where the head trains."""

from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .. import backends
from ..checks import check_keywords
from ..logprob import LogprobStats
from ..ops.head import PROJECTION_OPTIONS, Projection, project
from ..ops.logprob import score
from ..ops.module_head import takes_modules
from ..ops.onepass import Share, by_autograd, one_pass
from .groups import Groups, NeedsGraph, check_leaves, fits_one_group, room, tokens_of_a_group

# logps (M,) and the statistics (M,) that are asked for -> a 0-d loss
Evaluate = Callable[[Tensor, Sequence[Tensor | None]], Tensor]
# code of the losses that depended on log-probabilities alone when they were last seen
_alone: "WeakSet[CodeType]" = WeakSet()


@takes_modules("weight")
def one_pass_loss(
    hidden: Tensor,  # (..., H)
    weight: Tensor | nn.Module,  # (V, H)
    labels: Tensor,  # (...)
    loss_fn: Callable[[Tensor, LogprobStats], Tensor],
    bias: Tensor | None = None,  # (V,)
    *,
    units: Iterable[Sequence[int]] | None = None,
    stats: Sequence[str] = (),
    **options: Any,
) -> Tensor:
    """Any loss of token log-probabilities, for labels aligned with hidden: 3 GEMMs where hidden states and head train.

    Args:
        hidden, weight, labels, bias: as in `linear_logprob`.
        loss_fn: a function of `logps` (M,), nats, float64, of the M flattened positions, 0 at ignored ones, and of a
            `LogprobStats` of the asked statistics (M,), detached. It returns the loss, 0-d, by any torch code. It runs
            several times with gradients enabled, on zeros until its code is known, and by groups of `units`, where
            log-probabilities and statistics of other groups may be 0; its values are not used then. At the end it runs
            once under `torch.no_grad()`, on everything: what should happen once, as metrics and collectives do, belongs
            where `torch.is_grad_enabled()` is False.
        units: rows of `labels` (indices of its first dimension) whose log-probabilities meet in the loss, e.g. the two
            of each pair, `[(i, i + B) for i in range(B)]`; every row in one of them. The loss then is a sum over units
            (divisors do not depend on log-probabilities), and where not all tokens fit the workspace, groups of units
            take turns. None, if any two rows may meet: the backward recomputes the logits there, 4 GEMMs.
        stats, options: as in `linear_logprob_stats`. No gradient passes through statistics.

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input). Gradients reach hidden, weight, bias, and whatever else
        `loss_fn` depends on (then with 4 GEMMs).

    Raises:
        ValueError: as `linear_logprob`, for units that are no partition of the rows, and for a loss that is no 0-d
            floating point tensor.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, -100]])
        >>> alignloss.one_pass_loss(hidden, weight, labels, lambda logps, stats: -logps.sum() / 5)
        tensor(2.0794)
    """
    check_keywords("one_pass_loss takes the options", PROJECTION_OPTIONS, options)
    bits = backends.stat_bits(stats)
    members = None if units is None else _checked_units(units, labels)
    asked = loss_fn, bits, members
    projection = project(hidden, weight, labels, bias, asked, **options)

    def evaluate(logps: Tensor, values: Sequence[Tensor | None]) -> Tensor:
        named = zip(backends.STATS, values, strict=True)
        # a copy: it may work in place, and is called again
        asked = {name: value.detach().clone() for name, value in named if value is not None and name in stats}
        loss: Any = loss_fn(logps, LogprobStats(logps, **asked))
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            got = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a 0-d floating point tensor, got {got}")
        return loss

    code = getattr(loss_fn, "__code__", None)
    try:
        trained = _trained_in_one_pass(projection, evaluate, members, bits, known=code in _alone)
    except NeedsGraph:
        trained = None
    if code is not None and torch.is_grad_enabled():
        (_alone.discard if trained is None else _alone.add)(code)
    values: Sequence[Tensor | None]
    if trained is not None:
        loss, logps, values = trained
    else:
        logps, *values = score(projection, bits, differentiate_entropy=False)
        loss = evaluate(logps, values) if torch.is_grad_enabled() else logps
    with torch.no_grad():
        value = evaluate(logps.detach(), values).to(projection.result_dtype)
    return _Valued.apply(loss, value) if loss.requires_grad else value


def _trained_in_one_pass(
    projection: Projection, evaluate: Evaluate, members: list[list[int]] | None, stats: int, known: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]] | None:
    """A tensor with the gradient of the loss, logps and statistics (M,); None where one pass cannot be."""
    indices: list[Tensor | None]
    projection = projection.for_one_pass()
    if fits_one_group(projection, stats):
        indices, held = [projection.token_index], 1
    else:
        most = 0 if members is None else tokens_of_a_group(projection, stats)
        if members is None or not most:
            return None
        labelled = projection.labels != projection.options.ignore_index
        scored = labelled.view(sum(map(len, members)), -1).sum(1).tolist()
        groups = Groups.of(projection, scored, members, most)
        if groups is None:
            return None
        indices, held = [*groups.indices], groups.held
    values = room(projection, stats)
    if not known:  # what it depends on shows without log-probabilities, before they are computed in vain
        zeros = torch.zeros(projection.labels.shape, dtype=torch.float64, device=projection.labels.device)
        check_leaves(evaluate(zeros.requires_grad_(), values), zeros)
    everything = projection.labels.new_zeros(projection.labels.shape, dtype=torch.float64)

    def share_of(index: Tensor | None) -> Share:
        def share(tokens: Tensor) -> Tensor:
            mine = tokens
            if index is not None:  # what the loss makes of other groups is no part of this one's gradient
                mine = torch.zeros_like(tokens).index_copy(0, index, tokens[index])
            loss = evaluate(mine, values)
            check_leaves(loss, tokens)
            everything.add_(mine.detach())
            return loss

        return by_autograd(share)

    return one_pass(projection, indices, [share_of(index) for index in indices], held, values), everything, values


def _checked_units(units: Any, labels: Tensor) -> list[list[int]]:
    rows = labels.shape[0] if labels.dim() else 0
    try:
        members = [[int(row) for row in unit] for unit in units]
    except TypeError:
        members = []
    if sorted(row for unit in members for row in unit) != list(range(rows)) or not all(members):
        raise ValueError(
            f"units must hold each of the {rows} rows of labels {tuple(labels.shape)} exactly once, e.g. "
            f"[(i, i + B) for i in range(B)] for B pairs; got {members[:4] or units!r}"
        )
    return members


class _Valued(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = differentiable.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.to(ctx.dtype), None
