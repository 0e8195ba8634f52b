"""KL(reference || policy) per token over the vocabulary, in tiles of both heads; its gradient is the policy's.

With p and q the distributions of policy and reference, KL = sum_v q_v (log q_v - log p_v), and for the logits z of the
policy dKL/dz = p - q: an entry for every token of the vocabulary, which no scalar per token gives, so this is an op of
its own beside `ops`. The forward keeps two log-sums per token (2 GEMMs); the backward recomputes both tiles, a slice of
the vocabulary after the other with every row, so that each slice of dweight is rounded once (3 GEMMs, 4 with the head).
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .backends import KL_GAP, KL_REF_SUM, KL_REF_TOP, KL_ROWS, KL_SUM, KL_TOP, Transform
from .checks import check_kept, check_savable
from .logprob import check_known, project
from .ops import Problem
from .planning import BOTH_WIDE, Sizes, accumulation_dtype

__all__ = ["linear_kl"]


def linear_kl(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., H of the reference)
    ref_weight: Tensor,  # (V, H of the reference)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    **options: Any,
) -> Tensor:
    """KL(reference || policy) in nats at each position with a label, for labels aligned with hidden (not HF's labels).

    sum_v q_v (log q_v - log p_v), q of the reference, p of the policy: the term of TDPO (Zeng et al. 2024,
    arXiv:2404.11999), which sums it over a sequence. Labels only say which positions count.

    Args:
        hidden, weight, bias: of the policy, as in `linear_logprob`.
        ref_hidden, ref_weight, ref_bias: of the reference, with the same leading shape and vocabulary. No gradient
            reaches them, and none is kept for them.
        options: token_index, ignore_index, logit_scale, softcap, temperature (the same for both heads),
            backend, workspace_bytes and validate, as in `linear_logprob`.

    Returns:
        (...) float32, or float64 for float64 input: 0 with no gradient at ignored positions. Rounding may leave a KL of
        nearly 0 slightly negative. A backward through the head holds the gradient of hidden in float32 beside the
        workspace.

    Raises:
        ValueError: as `linear_logprob`, and where the vocabularies or precisions of the two differ.
        RuntimeError: when differentiated twice.
    """
    check_known("linear_kl", options)
    policy = project(hidden, weight, labels, bias, **options)
    with torch.no_grad():
        try:
            # the positions are looked up and checked already
            found = {"validate": False, "token_index": policy.token_index}
            reference = project(ref_hidden, ref_weight, labels, ref_bias, **(options | found))
        except ValueError as error:
            raise ValueError(f"the reference, ref_hidden with ref_weight: {error}") from error
    if (
        len(weight) != len(ref_weight)
        or accumulation_dtype(policy.compute_dtype) != accumulation_dtype(reference.compute_dtype)
        or (hidden.device != ref_hidden.device)
    ):
        raise ValueError(
            f"policy and reference must share vocabulary, precision and device; got V = {len(weight)}, {hidden.dtype}, "
            f"{hidden.device} and V = {len(ref_weight)}, {ref_hidden.dtype}, {ref_hidden.device}"
        )
    if hidden.requires_grad or policy.trains_head:
        check_savable(
            hidden=hidden, weight=weight, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        )
    kl, _ = linear_kl_fwd(
        policy.hidden, policy.weight, policy.bias, reference.hidden, reference.weight, reference.bias, policy.labels,
        policy.token_index, policy.select, policy.compute_dtype, reference.compute_dtype, policy.ignore_index,
        policy.logit_scale, policy.softcap, policy.temperature, policy.backend, policy.workspace_bytes, policy.validate,
    )  # fmt: skip
    return kl.view(labels.shape)


class _Heads:
    """Policy and reference on the same scored tokens, and the sizes of a tile of both.

    Forward and backward take one tile, the backward's: p - q cancels where the two are sharp, so the logits that it
    recomputes have to be those of the forward's sums to the last bit, and a GEMM rounds as its shape has it.
    """

    def __init__(self, policy: Problem, reference: Problem, workspace_bytes: int) -> None:
        self.policy, self.reference, self.transform = policy, reference, policy.transform
        feet = policy.footprint, reference.footprint
        accum = policy.accum_dtype.itemsize
        self.spare = int(feet[0].backend == "torch")
        sizes = Sizes(
            # rows as operands, and times their coefficient
            sum(foot.width * foot.gemm_dtype.itemsize * foot.copies_rows for foot in feet)
            + feet[0].width * feet[0].gemm_dtype.itemsize
            + feet[0].row_product_bytes,
            sum(foot.slice_bytes for foot in feet) + feet[0].width * accum * (not ops.writes_dweight(policy.weight)),
            # two tiles; in torch one for exponentials or sech^2, a mask, and the gradient as an operand
            (2 + self.spare) * accum + self.spare + feet[0].narrow_bytes,
        )
        self.block, self.columns, _ = feet[0].tile(policy.rows, sizes, workspace_bytes, BOTH_WIDE)
        self.both = [(problem, problem.row_buffer(self.block)) for problem in (policy, reference)]
        self.buffers = [problem.weight_buffer(self.columns) for problem, _ in self.both]
        self.tiles = policy.empty(2 + self.spare, self.block * feet[0].pitch(self.columns))
        self.unused = policy.empty(backends.STATE_ROWS, self.block)  # what `gather` begins for a log-probability
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
            for problem, buffer in self.both:
                count = part.stop - part.start
                copy = None if buffer is None else buffer[:count]
                problem.primitives.gather(problem.tokens, part, problem.labels[part], copy, self.unused[:, :count])
                self.operands.append(problem.hidden[part] if copy is None else copy)
        return self.operands

    def weights(self, first: int) -> list[Tensor]:
        last = min(first + self.columns, self.policy.vocabulary)
        return [
            problem.weight_slice(first, last, buffer)
            for (problem, _), buffer in zip(self.both, self.buffers, strict=True)
        ]

    def logits(self, rows: list[Tensor], weights: list[Tensor], first: int) -> tuple[Tensor | None, ...]:
        """What the primitives take as logits of both: products and biases; and a tile beside them, empty if unused."""
        shape = len(rows[0]), len(weights[0])
        tiles = [self.policy.tile_view(tile, *shape) for tile in self.tiles]
        for (problem, _), r, w, tile in zip(self.both, rows, weights, tiles, strict=False):
            problem.product_tile(r, w, tile)
        biases = [problem.bias_slice(first, first + shape[1]) for problem, _ in self.both]
        return *tiles[:2], *biases, tiles[2] if self.spare else self.tiles[:0]


def _computing(tensor: Tensor, dtype: torch.dtype, ref_dtype: torch.dtype) -> AbstractContextManager[None]:
    """As for one head; products of bf16 only where both heads are in it."""
    return ops.computing(tensor, dtype if dtype == ref_dtype else torch.float32)


def _heads(
    tensors: tuple[Any, ...], labels: Tensor, token_index: Tensor | None, select: bool, dtypes: tuple[Any, Any],
    ignore_index: int, transform: Transform, backend: str, workspace_bytes: int,
) -> _Heads:  # fmt: skip
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors
    rows, how = (labels, token_index, select), (ignore_index, transform, backend)
    policy = Problem(hidden, weight, bias, *rows, dtypes[0], *how)
    reference = Problem(ref_hidden, ref_weight, ref_bias, *rows, dtypes[1], *how)
    return _Heads(policy, reference, workspace_bytes)


@torch.library.custom_op("alignloss::linear_kl_fwd", mutates_args=(), tags=ops.UNSAFE_IN_GRAPHS)
def linear_kl_fwd(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (M, H of the reference)
    ref_weight: Tensor,  # (V, H of the reference)
    ref_bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) int64
    token_index: Tensor | None,  # (N,) int64
    select: bool,
    compute_dtype: torch.dtype,
    ref_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    workspace_bytes: int,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """KL (M,) and state (5, N), or more columns under `select`."""
    if validate:
        ops.check_values(labels, token_index, ignore_index, len(weight))
    with _computing(hidden, compute_dtype, ref_dtype):
        heads = _heads(
            (hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels, token_index, select,
            (compute_dtype, ref_dtype), ignore_index, Transform.of(logit_scale, softcap, temperature), backend,
            workspace_bytes,
        )  # fmt: skip
        policy = heads.policy
        kl = policy.empty(len(labels)).zero_()
        state = policy.empty(KL_ROWS, len(labels) if select else policy.rows).zero_()
        state[KL_TOP], state[KL_REF_TOP] = backends.LOWEST, backends.LOWEST
        for part in heads.blocks():
            rows, sums = heads.rows(part), state[:, part]
            for first in heads.slices():
                tiles = heads.logits(rows, heads.weights(first), first)
                policy.primitives.kl_fold(*tiles, sums, policy.transform)
            mean_gap = sums[KL_GAP] / sums[KL_REF_SUM]
            for row in (KL_SUM, KL_REF_SUM):
                sums[row].log_()
            value = mean_gap + (sums[KL_TOP] - sums[KL_REF_TOP]) + (sums[KL_SUM] - sums[KL_REF_SUM])
            at = part if policy.tokens.token_index is None else policy.tokens.token_index[part]
            kl[at] = value.masked_fill(policy.labels[part] == ignore_index, 0)
        return kl, state


@torch.library.custom_op("alignloss::linear_kl_bwd", mutates_args=(), tags=ops.UNSAFE_IN_GRAPHS)
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
    select: bool,
    compute_dtype: torch.dtype,
    ref_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    workspace_bytes: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of the policy; what was not asked for is empty."""
    with _computing(dkl, compute_dtype, ref_dtype):
        transform = Transform.of(logit_scale, softcap, temperature)
        dweight = torch.empty_like(weight) if need_dweight else state.new_empty(0)
        heads = _heads(
            (hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels, token_index, select,
            (compute_dtype, ref_dtype), ignore_index, transform, backend,
            workspace_bytes,
        )  # fmt: skip
        policy = heads.policy
        index, gemm_dtype = policy.tokens.token_index, policy.gemm_dtype
        g = dkl if index is None else dkl[index]
        scored = labels if index is None else labels[index]
        coefficient = g.to(policy.accum_dtype).masked_fill(scored == ignore_index, 0) * transform.slope
        # powers of two that keep p - q, and rows times their coefficients, within fp16
        lift, unit = 1.0, None
        if gemm_dtype == torch.float16 and policy.rows:
            lift, unit = 2.0**14, ops.power_of_two(coefficient)
        dh = policy.empty(policy.rows if need_dhidden else 0, policy.width).zero_()
        dbias = policy.empty(policy.vocabulary if need_dbias else 0).zero_()
        if need_dweight and policy.rows == 0:
            dweight.zero_()
        partial = None
        if need_dweight and not ops.writes_dweight(weight):
            partial = policy.empty(heads.columns, policy.width)
        scaled = policy.empty(heads.block if need_dweight else 0, policy.width, dtype=gemm_dtype)
        for first in heads.slices() if policy.rows else ():
            weights = heads.weights(first)
            columns = slice(first, first + len(weights[0]))
            dw = None
            if need_dweight:
                dw = dweight[columns] if partial is None else partial[: len(weights[0])]
            for part in heads.blocks():
                rows, sums = heads.rows(part), state[:, part]
                tiles = heads.logits(rows, weights, first)
                weighed = coefficient[part] if unit is None else coefficient[part] / unit
                dz = policy.primitives.kl_dlogits(*tiles, sums, transform, weighed, lift, gemm_dtype)
                if need_dhidden:
                    ops.addmm(dh[part], dz, weights[0], dh[part])
                if dw is not None:
                    weighed_rows = torch.mul(rows[0], weighed[:, None], out=scaled[: len(rows[0])])
                    weighed_rows.masked_fill_((weighed == 0)[:, None], 0)  # not 0 * inf
                    ops.addmm(dw, dz.T, weighed_rows, dw, beta=int(part.start > 0))
                if need_dbias:
                    db = dbias[None, columns]
                    ops.addmm(db, weighed[None].to(gemm_dtype), dz, db)
            if dw is not None:
                if unit is not None:
                    dw.mul_(unit / lift)
                if partial is not None:
                    dweight[columns] = dw
        if unit is not None:
            dbias.mul_(unit / lift)
        dhidden = dkl.new_empty(0, dtype=hidden.dtype)
        if need_dhidden:
            dh.mul_(coefficient[:, None] / lift)
            dhidden = dh.to(hidden.dtype)
            if index is not None:
                dhidden = torch.zeros_like(hidden).index_copy_(0, index, dhidden)
        return dhidden, dweight, dbias


@linear_kl_fwd.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, token_index, select, compute_dtype, *rest):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(compute_dtype)
    rows = labels.shape[0] if token_index is None else token_index.shape[0]
    return labels.new_empty(labels.shape, dtype=dtype), labels.new_empty((KL_ROWS, rows), dtype=dtype)


@linear_kl_bwd.register_fake
def _(dkl, hidden, weight, *rest):  # type: ignore[no-untyped-def]
    need_dhidden, need_dweight, need_dbias = rest[-3:]
    return (
        torch.empty_like(hidden) if need_dhidden else dkl.new_empty(0, dtype=hidden.dtype),
        torch.empty_like(weight) if need_dweight else dkl.new_empty(0),
        dkl.new_empty(weight.shape[0] if need_dbias else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, labels, token_index = inputs[:8]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, labels, token_index, output[1])
    ctx.options, ctx.bias_dtype = inputs[8:17], None if inputs[2] is None else inputs[2].dtype


def _backward(ctx, dkl, dstate):  # type: ignore[no-untyped-def]
    if dkl is None:
        return (None,) * 18
    needs = ctx.needs_input_grad[:3]
    names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    check_kept(**dict(zip(names, ctx.saved_tensors, strict=False)))
    gradients = linear_kl_bwd(dkl.contiguous(), *ctx.saved_tensors, *ctx.options, *needs)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return dhidden, dweight, None if dbias is None else dbias.to(ctx.bias_dtype), *(None,) * 15


linear_kl_fwd.register_autograd(_backward, setup_context=_setup_context)
linear_kl_bwd.register_autograd(ops.no_double_backward)
