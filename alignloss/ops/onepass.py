"""Regime 3: a training step of a trainable head in one pass over its tokens, 3 GEMMs.

For a group of tokens whose logits fit the workspace: the tiles stay in memory as exponentials while U and the
statistics accumulate as in regime 2; then the loss of the group, a plain torch function of its log-probabilities, gives
one coefficient per token, by autograd or a kernel of its own; then every tile becomes the gradient of its logits in
place, and adds its part to dweight. Groups whose tiles are not held come last: they are computed a second time and add
to the same dweight, 4 GEMMs. That gradient belongs to a loss with upstream gradient 1; the backward multiplies it by
the real one and hands its buffers over, so that a second backward (retain_graph=True) has to make the pass again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import backends
from ..checks import check_kept, check_values, kept
from ..kernels.state import STATE_ROWS
from .columns import first_trained
from .context import computing, device_guard, no_double_backward, within_memory
from .head import Projection
from .sizes import Footprint
from .walk import HeldTiles, Upstream, Walk, addmm

# from the log-probabilities (M,) of a group to its share of the loss, 0-d, and the gradient of that share (M,)
Share = Callable[[Tensor], tuple[Tensor, Tensor]]


def one_pass(
    projection: Projection,
    indices: Sequence[Tensor | None],  # scored positions of each group; None: every position
    shares: Sequence[Share],
    held: int,  # how many groups, the first ones, have their tiles held; those of the others are recomputed
    stats: Sequence[Tensor | None],  # (M,) of each of backends.STATS; filled
) -> Tensor:
    """The sum of the groups' shares, 0-d, differentiable with respect to hidden, weight and bias."""
    options = projection.options
    if options.validate:
        vocabulary = options.vocabulary(projection.weight)
        check_values(projection.labels, projection.token_index, options.ignore_index, vocabulary)
    return _OnePass.apply(projection.hidden, *projection.head, projection, indices, shares, held, stats)


def by_autograd(share: Callable[[Tensor], Tensor]) -> Share:
    """A share of the loss with the gradient that autograd finds."""

    def differentiated(logps: Tensor) -> tuple[Tensor, Tensor]:
        # under a checkpoint, hooks would make the whole pass again for the few numbers that are saved here
        with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            tokens = logps.detach().requires_grad_()
            loss = share(tokens)
            (slopes,) = torch.autograd.grad(loss, tokens)
        return loss.detach(), slopes

    return differentiated


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        columns: Tensor | None,  # (V, r), the last of weight, where they train and weight does not
        projection: Projection,
        indices: Sequence[Tensor | None],
        shares: Sequence[Share],
        held: int,
        stats: Sequence[Tensor | None],
    ) -> Tensor:
        projection = projection._replace(hidden=hidden, weight=weight, bias=bias)
        _, weight_needs, bias_needs, ctx.columns_need, *_ = ctx.needs_input_grad
        ctx.needs = weight_needs or ctx.columns_need, bias_needs
        losses: list[Tensor] = []
        slopes: list[Tensor] = []

        def differentiate(i: int, logps: Tensor) -> Tensor:
            loss, slope = shares[i](logps)
            losses.append(loss)
            slopes.append(slope)
            return slope

        trained_from, bits = first_trained(weight, columns), backends.asked(stats)
        results = partial(_result_bytes, projection, indices)
        with within_memory(hidden.device, projection.options.workspace_bytes, results):
            gradient, coefficient, dlogp = _pass(
                projection, indices, held, ctx.needs, differentiate, trained_from, bits, stats
            )
        dlogps = slopes[0] if len(slopes) == 1 else torch.stack(slopes).sum(0)
        ctx.save_for_backward(hidden, weight, bias, projection.labels, coefficient, dlogp, dlogps, *indices)
        ctx.kept = kept(hidden=hidden, weight=weight, bias=bias)
        ctx.options, ctx.gradient, ctx.rest = projection.options, gradient, (held, trained_from, bits)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them no second time
        with torch.no_grad():
            gradients = _OnePass.gradients(ctx, saved, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _OnlyFirstDerivatives.apply(4, *saved[:3], upstream, *gradients)
        return *gradients, *[None] * 5

    @staticmethod
    def gradients(ctx: Any, saved: Sequence[Any], upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dhidden, dweight, dbias and dcolumns."""
        hidden, weight, bias, labels, coefficient, dlogp, dlogps, *indices = saved
        gradient, ctx.gradient = ctx.gradient, None
        # one that is made already has to fit what it belongs to
        check_kept(ctx.kept, values=gradient is None, hidden=hidden, weight=weight, bias=bias)
        if gradient is None:
            projection = Projection(hidden, weight, bias, labels, None, True, ctx.options.workspace_bytes, ctx.options)
            held, trained_from, bits = ctx.rest
            results = partial(_result_bytes, projection, indices)
            with within_memory(hidden.device, projection.options.workspace_bytes, results):
                gradient, *_ = _pass(projection, indices, held, ctx.needs, lambda i, logps: dlogps, trained_from, bits)
        index = indices[0] if len(indices) == 1 else torch.cat(indices)
        # a position that is not scored has no gradient
        new = dlogp.new_empty if index is None else dlogp.new_zeros
        dhidden = new((len(labels), dlogp.shape[1]), dtype=hidden.dtype)
        with device_guard(labels):
            factor = gradient.factor(upstream)
            gradient.primitives.scale_rows(dlogp, coefficient, factor, index, dhidden)
            dweight, dbias = gradient.times(factor)
        dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
        return (dhidden, None, dbias, dweight) if ctx.columns_need else (dhidden, dweight, dbias, None)


class _OnlyFirstDerivatives(torch.autograd.Function):
    """Gradients that raise an error where they would be differentiated in what they were made from."""

    @staticmethod
    def forward(ctx: Any, made_from: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = tensors[made_from:]
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    backward = staticmethod(no_double_backward)


def _result_bytes(projection: Projection, indices: Sequence[Tensor | None]) -> int:
    """Bytes of the gradient of the head, state, coefficients and d logp / d hidden."""
    rows = sum(projection.labels.numel() if index is None else index.numel() for index in indices)
    footprint = projection.footprint
    row = (STATE_ROWS + 1) * footprint.accum_dtype.itemsize + footprint.width * footprint.dtype.itemsize
    return rows * row + footprint.vocabulary * footprint.trained_width * footprint.weight_dtype.itemsize


def _pass(
    projection: Projection,
    indices: Sequence[Tensor | None],
    held: int,
    needs: tuple[bool, bool],  # dweight, dbias
    differentiate: Callable[[int, Tensor], Tensor],  # group, log-probabilities (M,) -> their gradient (M,)
    trained_from: int,  # the first column of weight that trains where it does
    bits: int,  # of the stats that the first pass was asked for: a second one has to go the same way
    stats: Sequence[Tensor | None] = (),  # (M,) of each of backends.STATS; filled
) -> tuple["HeadGradient", Tensor, Tensor]:
    """The gradient of the head; coefficients (N,) and d logp / d hidden (N, H) of the groups, one after the other."""
    hidden, weight, bias, labels, *_, options = projection
    wanted = list(stats) or [None] * len(backends.STATS)
    several = len(indices) > 1
    footprint = options.footprint_of(hidden, weight, bias, indices[0] is not None, trained_from)
    options = options._replace(workspace_bytes=options.workspace_bytes - footprint.accumulator_bytes(several))
    counts = [labels.numel() if index is None else index.numel() for index in indices]
    with device_guard(hidden):
        state = hidden.new_empty((STATE_ROWS, sum(counts)), dtype=footprint.accum_dtype)
        coefficient = state.new_empty(sum(counts))
        dlogp = hidden.new_empty((sum(counts), hidden.shape[1]), dtype=footprint.dtype)
        gradient = HeadGradient(weight, footprint, *needs, several)
        cells = max(counts[:held]) * footprint.pitch(len(weight))
        tiles: Tensor | None = hidden.new_empty(cells, dtype=footprint.gemm_dtype)
        start = 0
        for i, index in enumerate(indices):
            part = slice(start, start := start + counts[i])
            logps = labels.new_empty(labels.numel(), dtype=torch.float64)
            if index is not None:
                logps.zero_()
            if i == held:
                tiles = None
            with computing(hidden, options.compute_dtype):
                walk = Walk(hidden, weight, bias, labels, index, options, trained_from, footprint)
                kept = None if tiles is None else HeldTiles(walk, tiles, bits)
                walk.forward(state[:, part], [logps, *wanted], bits, dlogp[part], None, kept, recomputed=True)
            dlogps = differentiate(i, logps)
            with computing(hidden, options.compute_dtype):
                upstream = Upstream(walk, state[:, part], dlogps, coefficient=coefficient[part])
                if kept is not None:
                    gradient.add_held(walk, upstream, kept)
                else:  # to the sums of the groups before
                    walk.backward(upstream, gradient.dweight, gradient.dbias, True, bits, derivatives=1)
            del walk, kept, upstream
    return gradient, coefficient, dlogp


class HeadGradient:
    """dweight and dbias of a loss with upstream gradient 1, added up over groups of rows."""

    def __init__(
        self, weight: Tensor, footprint: Footprint, need_dweight: bool, need_dbias: bool, several: bool
    ) -> None:
        self.primitives = backends.get(footprint.backend)
        self.weight_dtype, accum_dtype = weight.dtype, footprint.accum_dtype
        dtype = accum_dtype if several else weight.dtype
        # in the layout of the weight, which autograd would copy it to; contiguous where a recomputed group adds to it,
        # and for products wider than their operands
        wider = dtype.itemsize > footprint.gemm_dtype.itemsize
        layout = torch.contiguous_format if several or wider else torch.preserve_format
        self.dweight = weight.new_empty(0, dtype=dtype)
        if need_dweight:
            trained = weight[:, footprint.trained_from :]
            self.dweight = torch.empty_like(trained, dtype=dtype, memory_format=layout)
        self.dbias = torch.empty(len(weight) if need_dbias else 0, dtype=accum_dtype, device=weight.device)
        self.need_dbias = need_dbias
        self.unit: Tensor | None = None
        self.begun = False

    def add_held(self, walk: Walk, upstream: Upstream, held: HeldTiles) -> None:
        """Add the part of a group, overwriting its tiles by the gradient of their logits."""
        if torch.float16 in (walk.gemm_dtype, self.dweight.dtype):
            self.unit = upstream.find_unit()
        scaled = walk.empty(walk.rows, walk.width, dtype=walk.gemm_dtype)
        upstream.weigh(slice(0, walk.rows), walk.row_buffer(walk.rows), scaled)
        wide = self.dweight.dtype == walk.accum_dtype or walk.footprint.gemm_rounds_dweight
        # where no GEMM can write dweight itself, a slice of it in the accumulation dtype
        most = held.columns if wide else min(held.columns, walk.footprint.slice)
        buffer = None if self.dweight.dim() < 2 or wide else walk.empty(most, self.dweight.shape[1])
        for first, dz, reference in held:
            walk.primitives.held_dlogits(
                dz, reference, upstream.state, walk.labels, first, walk.transform, upstream.coefficient
            )
            columns = slice(first, first + dz.shape[1])
            for begin in range(0, dz.shape[1], most) if self.dweight.dim() == 2 else ():
                dw, dz_part = self.dweight[columns][begin : begin + most], dz[:, begin : begin + most]
                out = dw if buffer is None else buffer[: len(dw)]
                addmm(out, dz_part.T, scaled[:, walk.footprint.trained_from :], beta=int(self.begun))
                if buffer is not None:
                    dw.copy_(out)
            if self.need_dbias:
                addmm(self.dbias[None, columns], upstream.coefficient[None].to(dz.dtype), dz, beta=int(self.begun))
        self.begun = True

    def factor(self, upstream: Tensor) -> Tensor:
        """What the coefficients of the rows, which made these gradients, lack of an upstream gradient."""
        return (upstream if self.unit is None else upstream * self.unit).to(self.dbias.dtype)

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(dweight, dbias) times a factor, in the buffers themselves where the dtype is the weight's."""
        for gradient in (self.dweight, self.dbias):
            self.primitives.scale(gradient, factor)
        dweight = self.dweight.to(self.weight_dtype) if self.dweight.dim() == 2 else None
        return dweight, self.dbias if self.need_dbias else None
