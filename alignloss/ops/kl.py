"""KL(reference || policy) per token over the vocabulary, in tiles of both heads; its gradient is the policy's.

With p and q the distributions of policy and reference, KL = sum_v q_v (log q_v - log p_v), and for the logits z of the
policy dKL/dz = p - q: an entry for every token of the vocabulary, which no scalar per token gives, so this is an op of
its own beside `logprob`. The forward keeps two log-sums per token (2 GEMMs); the backward recomputes both tiles, a
slice of the vocabulary after the other with every row, so that each slice of dweight is rounded once (3 GEMMs, 4 with
the head).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_kept, check_values, kept
from ..kernels.state import KL_GAP, KL_REF_SUM, KL_REF_TOP, KL_ROWS, KL_SUM, KL_TOP, LOWEST, STATE_ROWS
from .context import UNSAFE_IN_GRAPHS, Op, computing, no_double_backward, within_memory
from .head import Options
from .sizes import BOTH_WIDE, Sizes, accumulation_dtype, writes_dweight
from .walk import Walk, addmm, power_of_two


class _Heads:
    """Policy and reference on the same scored tokens, and the sizes of a tile of both.

    Forward and backward take one tile, the backward's: p - q cancels where the two are sharp, so the logits that it
    recomputes have to be those of the forward's sums to the last bit, and a GEMM rounds as its shape has it.
    """

    def __init__(
        self, tensors: tuple[Any, ...], labels: Tensor, token_index: Tensor | None, ref_dtype: torch.dtype,
        options: Options,
    ) -> None:  # fmt: skip
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors
        self.policy = policy = Walk(hidden, weight, bias, labels, token_index, options)
        self.reference = Walk(
            ref_hidden, ref_weight, ref_bias, labels, token_index, options._replace(compute_dtype=ref_dtype)
        )
        feet = policy.footprint, self.reference.footprint
        accum = policy.accum_dtype.itemsize
        self.spare = int(feet[0].backend == "torch")
        sizes = Sizes(
            # rows as operands, and times their coefficient
            sum(foot.width * foot.gemm_dtype.itemsize * foot.copies_rows for foot in feet)
            + feet[0].width * feet[0].gemm_dtype.itemsize
            + feet[0].row_product_bytes,
            sum(foot.slice_bytes for foot in feet) + feet[0].width * accum * (not policy.sized_direct),
            # two tiles; in torch one for exponentials or sech^2, a mask, and the gradient as an operand
            (2 + self.spare) * accum + self.spare + feet[0].narrow_bytes,
        )
        self.block, self.columns, _ = feet[0].fit_tile(policy.rows, sizes, policy.workspace_bytes, BOTH_WIDE)
        self.both = [(walk, walk.row_buffer(self.block)) for walk in (policy, self.reference)]
        self.buffers = [walk.weight_buffer(self.columns) for walk, _ in self.both]
        self.tiles = policy.empty(2 + self.spare, self.block * feet[0].pitch(self.columns))
        self.unused = policy.empty(STATE_ROWS, self.block)  # what `gather` begins for a log-probability
        self.gathered: slice | None = None
        self.operands: list[Tensor] = []

    def slices(self) -> range:
        return range(0, self.policy.vocabulary, self.columns)

    def blocks(self) -> list[slice]:
        starts = range(0, self.policy.rows, self.block)
        return [slice(start, min(start + self.block, self.policy.rows)) for start in starts]

    def rows(self, part: slice) -> list[Tensor]:
        """The hidden states of a block, as operands of a GEMM; the buffers hold those of the last one."""
        if part != self.gathered:
            self.gathered, self.operands = part, []
            for walk, buffer in self.both:
                count = part.stop - part.start
                copy = None if buffer is None else buffer[:count]
                walk.primitives.gather(walk.tokens, part, walk.labels[part], copy, self.unused[:, :count])
                self.operands.append(walk.hidden[part] if copy is None else copy)
        return self.operands

    def weights(self, first: int) -> list[Tensor]:
        last = min(first + self.columns, self.policy.vocabulary)
        return [
            walk.weight_slice(first, last, buffer) for (walk, _), buffer in zip(self.both, self.buffers, strict=True)
        ]

    def logits(self, rows: list[Tensor], weights: list[Tensor], first: int) -> tuple[Tensor | None, ...]:
        """What the primitives take as logits of both: products and biases; and a tile beside them, empty if unused."""
        shape = len(rows[0]), len(weights[0])
        tiles = [self.policy.tile_view(tile, *shape) for tile in self.tiles]
        for (walk, _), r, w, tile in zip(self.both, rows, weights, tiles, strict=False):
            walk.product_tile(r, w, tile)
        biases = [walk.bias_slice(first, first + shape[1]) for walk, _ in self.both]
        return *tiles[:2], *biases, tiles[2] if self.spare else self.tiles[:0]


def _computing(tensor: Tensor, dtype: torch.dtype, ref_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """As for one head; products of bf16 only where both heads are in it."""
    return computing(tensor, dtype if dtype == ref_dtype else torch.float32)


@partial(Op, tags=UNSAFE_IN_GRAPHS)
def linear_kl_fwd(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (M, H of the reference)
    ref_weight: Tensor,  # (V, H of the reference)
    ref_bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) int64
    token_index: Tensor | None,  # (N,) int64
    ref_dtype: torch.dtype,  # to compute the reference in
    select: bool,
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    workspace_bytes: int,
    validate: bool,
    vocab_group: str | None = None,
    vocab_parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """KL (M,) and state (5, N), or more columns under `select`."""
    options = Options(
        select, compute_dtype, ignore_index, logit_scale, softcap, temperature, backend, workspace_bytes, validate,
        vocab_group, vocab_parts,
    )  # fmt: skip
    if validate:
        check_values(labels, token_index, ignore_index, options.vocabulary(weight))
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    with _computing(hidden, compute_dtype, ref_dtype), within_memory(hidden.device, workspace_bytes):
        heads = _Heads(tensors, labels, token_index, ref_dtype, options)
        policy = heads.policy
        kl = policy.empty(len(labels)).zero_()
        state = policy.empty(KL_ROWS, len(labels) if select else policy.rows).zero_()
        state[KL_TOP], state[KL_REF_TOP] = LOWEST, LOWEST
        for part in heads.blocks():
            rows, sums = heads.rows(part), state[:, part]
            for first in heads.slices():
                tiles = heads.logits(rows, heads.weights(first), first)
                policy.primitives.kl_fold(*tiles, sums, policy.transform)
            if policy.split is not None:
                policy.split.combine_kl(sums)
            mean_gap = sums[KL_GAP] / sums[KL_REF_SUM]
            for row in (KL_SUM, KL_REF_SUM):
                sums[row].log_()
            value = mean_gap + (sums[KL_TOP] - sums[KL_REF_TOP]) + (sums[KL_SUM] - sums[KL_REF_SUM])
            at = part if policy.tokens.token_index is None else policy.tokens.token_index[part]
            kl[at] = value.masked_fill(policy.labels[part] == policy.tokens.ignore_index, 0)
        return kl, state


def _walk_backward(
    heads: _Heads,
    state: Tensor,  # (5, N)
    weighed: Tensor,  # (N,) coefficients over `unit`
    lift: float,
    unit: Tensor | None,  # 0-d
    dhidden: Tensor,  # (N, H) or (0, H), in the accumulation dtype; added to, without the coefficients of its rows
    dweight: Tensor,  # (V, H) or empty (0,); filled
    dbias: Tensor,  # (V,) or empty; added to, times lift / unit
) -> None:
    policy = heads.policy
    need_dweight, gemm_dtype = dweight.dim() == 2, policy.gemm_dtype
    partial = None
    if need_dweight and not writes_dweight(policy.weight):
        partial = policy.empty(heads.columns, policy.width)
    scaled = policy.empty(heads.block if need_dweight else 0, policy.width, dtype=gemm_dtype)
    for first in heads.slices():
        weights = heads.weights(first)
        columns = slice(first, first + len(weights[0]))
        dw = None
        if need_dweight:
            dw = dweight[columns] if partial is None else partial[: len(weights[0])]
        for part in heads.blocks():
            rows, factors = heads.rows(part), weighed[part]
            tiles = heads.logits(rows, weights, first)
            dz = policy.primitives.kl_dlogits(*tiles, state[:, part], policy.transform, factors, lift, gemm_dtype)
            if len(dhidden):
                addmm(dhidden[part], dz, weights[0])
            if dw is not None:
                weighed_rows = torch.mul(rows[0], factors[:, None], out=scaled[: len(rows[0])])
                weighed_rows.masked_fill_((factors == 0)[:, None], 0)  # not 0 * inf
                addmm(dw, dz.T, weighed_rows, beta=int(part.start > 0))
            if dbias.numel():
                addmm(dbias[None, columns], factors[None].to(gemm_dtype), dz)
        if dw is not None:
            if unit is not None:
                dw.mul_(unit / lift)
            if partial is not None:
                dweight[columns] = dw


@partial(Op, tags=UNSAFE_IN_GRAPHS)
def linear_kl_bwd(
    dkl: Tensor,  # (M,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    labels: Tensor,
    token_index: Tensor | None,
    state: Tensor,  # (5, N)
    ref_dtype: torch.dtype,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    select: bool,
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    workspace_bytes: int,
    validate: bool,
    vocab_group: str | None = None,
    vocab_parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of the policy; what was not asked for is empty."""
    options = Options(
        select, compute_dtype, ignore_index, logit_scale, softcap, temperature, backend, workspace_bytes, validate,
        vocab_group, vocab_parts,
    )  # fmt: skip
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    with _computing(dkl, compute_dtype, ref_dtype), within_memory(dkl.device, workspace_bytes):
        dweight = torch.empty_like(weight) if need_dweight else state.new_empty(0)
        heads = _Heads(tensors, labels, token_index, ref_dtype, options)
        policy, index = heads.policy, heads.policy.tokens.token_index
        g = dkl if index is None else dkl[index]
        scored = labels if index is None else labels[index]
        coefficient = g.to(policy.accum_dtype).masked_fill(scored == ignore_index, 0) * policy.transform.slope
        # powers of two that keep p - q, and rows times their coefficients, within fp16
        lift, unit = 1.0, None
        if policy.gemm_dtype == torch.float16 and policy.rows:
            lift, unit = 2.0**14, power_of_two(coefficient)
        dh = policy.empty(policy.rows if need_dhidden else 0, policy.width).zero_()
        dbias = policy.empty(policy.vocabulary if need_dbias else 0).zero_()
        if need_dweight and policy.rows == 0:
            dweight.zero_()
        if policy.rows:
            weighed = coefficient if unit is None else coefficient / unit
            _walk_backward(heads, state, weighed, lift, unit, dh, dweight, dbias)
        if unit is not None:
            dbias.mul_(unit / lift)
        dhidden = dkl.new_empty(0, dtype=hidden.dtype)
        if need_dhidden:
            if policy.split is not None:
                policy.split.add_up(dh)
            dh.mul_(coefficient[:, None] / lift)
            dhidden = dh.to(hidden.dtype)
            if index is not None:
                dhidden = torch.zeros_like(hidden).index_copy_(0, index, dhidden)
        return dhidden, dweight, dbias


@linear_kl_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, token_index, ref_dtype, select, compute_dtype, *rest
):
    dtype = accumulation_dtype(compute_dtype)
    rows = labels.shape[0] if token_index is None else token_index.shape[0]
    return labels.new_empty(labels.shape, dtype=dtype), labels.new_empty((KL_ROWS, rows), dtype=dtype)


@linear_kl_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dkl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, token_index, state, ref_dtype, need_dhidden,
    need_dweight, need_dbias, *rest,
):  # fmt: skip
    return (
        torch.empty_like(hidden) if need_dhidden else dkl.new_empty(0, dtype=hidden.dtype),
        torch.empty_like(weight) if need_dweight else dkl.new_empty(0),
        dkl.new_empty(weight.shape[0] if need_dbias else 0),
    )


_TENSORS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, labels, token_index = inputs[:8]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, labels, token_index, output[1])
    ctx.kept = kept(**dict(zip(_TENSORS, tensors, strict=True)))
    _, ctx.ref_dtype, *ctx.options = inputs[7:]
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype


def _backward(ctx, dkl, dstate):  # type: ignore[no-untyped-def]
    arguments = len(ctx.needs_input_grad)
    if dkl is None:
        return (None,) * arguments
    needs, saved = ctx.needs_input_grad[:3], ctx.saved_tensors  # once: a checkpoint unpacks them no second time
    check_kept(ctx.kept, **dict(zip(_TENSORS, saved, strict=False)))
    gradients = linear_kl_bwd(dkl.contiguous(), *saved, ctx.ref_dtype, *needs, *ctx.options)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return dhidden, dweight, None if dbias is None else dbias.to(ctx.bias_dtype), *(None,) * (arguments - 3)


linear_kl_fwd.register_autograd(_backward, setup_context=_setup_context)
linear_kl_bwd.register_autograd(no_double_backward)
