"""Kernels on rows, one program each: what a block of rows needs before and after the GEMMs of its tiles.

`gather_fwd_kernel` collects the scored rows and begins their running statistics; with the target's logit, by a dot
product of its own, where the GEMM to come leaves no logits. `finish_fwd_kernel` turns the sums over the whole
vocabulary into results per token and, from the accumulated U, into the derivative; `rows_bwd_kernel` weighs the rows by
their upstream gradient. The arithmetic of a row is done in fp64, little beside a row of H.

With s, m and x_y as in `state`, gap = log s - (z_y - m) = log((1 - p_y) / p_y): log p_y = log sigmoid(-gap) and
1 - p_y = sigmoid(gap), both exact as p_y -> 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import OPTIONS, ROW_WARPS, SCALE_PROGRAMS, WIDTH_BLOCK, cdiv, next_power_of_2
from .math import (
    LOWEST,
    ROUNDED,
    ROUNDED_ZE,
    SUM,
    SUM_EE,
    SUM_Z,
    SUM_ZE,
    TARGET,
    TOP,
    log_sigmoid64,
    sech2,
    sigmoid64,
    softcap_logit,
)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _position(index, n, M, HAS_INDEX: tl.constexpr):
    """Where row n is among the M tokens, and whether it is there: an index out of range reads and writes nothing."""
    position = tl.load(index + n) if HAS_INDEX else n
    return position, (position >= 0) & (position < M)


@triton.jit
def gather_fwd_kernel(
    hidden,  # (M, H)
    labels,  # (M,) int64
    index,  # (N,) int64
    rows,  # (N, H) in the dtype of the GEMM
    row_labels,  # (N,) int64
    state,  # (9, N) fp32
    weight,  # (V, H)
    bias,  # (V,) fp32, times linear
    M,
    H,
    V,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    state_stride,
    ignore_index,
    linear,
    HAS_INDEX: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TARGETS: tl.constexpr,  # whether the state begins with x_y
    HAS_BIAS: tl.constexpr,
    REFERENCE: tl.constexpr,  # whether m does
    COMPUTE: tl.constexpr,  # dtype that rows are rounded to first
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    position, there = _position(index, n, M, HAS_INDEX)
    label = tl.load(labels + position, mask=there, other=ignore_index)
    if HAS_INDEX:
        tl.store(row_labels + n, label)
    known = (label >= 0) & (label < V)
    w_row = weight + tl.where(known, label, 0) * weight_stride
    x = 0.0
    if HAS_ROWS or TARGETS:
        k = tl.arange(0, BLOCK)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, H, BLOCK):
            inside = (start + k < H) & (label != ignore_index)
            at = position * hidden_stride + (start + k).to(tl.int64) * hidden_step
            h = tl.load(hidden + at, mask=inside, other=0.0).to(COMPUTE)
            if HAS_ROWS:
                tl.store(rows + n * H + start + k, h.to(rows.dtype.element_ty), mask=start + k < H)
            if TARGETS:
                # of a wider weight what the GEMM takes of it
                at = (start + k).to(tl.int64) * weight_step
                w = tl.load(w_row + at, mask=inside & known, other=0.0).to(COMPUTE)
                products += h.to(tl.float32) * w.to(tl.float32)
        if TARGETS:
            x = tl.sum(products, 0) * linear
            if HAS_BIAS:
                x += tl.load(bias + label, mask=known, other=0.0)
    x = tl.where(known & TARGETS, x, float("nan"))
    step = tl.cast(state_stride, tl.int64)
    # any number serves a row whose target has none; a huge one would not move by the some nats that others need
    tl.store(state + n, tl.where(tl.abs(x) < 1e6, x, 0.0) if REFERENCE else LOWEST)
    tl.store(state + n + SUM * step, 0.0)
    tl.store(state + n + TARGET * step, x)
    tl.store(state + n + SUM_ZE * step, 0.0)
    tl.store(state + n + SUM_Z * step, 0.0)
    tl.store(state + n + SUM_EE * step, 0.0)
    tl.store(state + n + TOP * step, -float("inf"))
    tl.store(state + n + ROUNDED * step, 0.0)
    tl.store(state + n + ROUNDED_ZE * step, 0.0)


@triton.jit
def _row(state, n, step, cap, HAS_CAP: tl.constexpr):
    """m, s, z_y, log((1 - p_y) / p_y) of a row in fp64."""
    m = tl.load(state + n).to(tl.float64)
    s = tl.load(state + n + SUM * step).to(tl.float64)
    z = tl.load(state + n + TARGET * step).to(tl.float64)
    if HAS_CAP:
        z = softcap_logit(z, cap)
    # an infinite logit of the target leaves no distribution either
    return m, s, z, tl.log(s) - (tl.where(z == float("inf"), float("nan"), z) - m)


@triton.jit
def _bounded(x):
    return tl.where(x > 128, 128.0, tl.where(x < -128, -128.0, x))


@triton.jit
def _entropy_terms(m, s, z, gap, ze):
    """mu = p d + (1 - p) mu' and pull = p (d - mu'), with d = z_y - m and mu' the mean of z - m over v != y."""
    p = sigmoid64(-gap)
    pd = tl.where(p == 0, 0.0, p * (z - m))
    rest_mean = tl.where(s == 0, 0.0, ze / s)
    mu, pull = pd + sigmoid64(gap) * rest_mean, pd - p * rest_mean
    # beyond, 1 - p_y, which multiplies them, is 0 in fp32, and their products with W need not fit 16 bits
    return _bounded(mu), _bounded(pull)


@triton.jit
def _finish_derivatives(
    u, u2, w_row, dlogp, dentropy, n, H, weight_step, known, ignored, at_target, inverse, pull, rest,
    SAVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogp = D_y W_y - U / s and dentropy = -pull dlogp - (U2 - rest U / s) / s of one row, U2 centred."""
    k = tl.arange(0, BLOCK)
    for start in range(0, H, BLOCK):
        inside = start + k < H
        w = tl.load(w_row + (start + k).to(tl.int64) * weight_step, mask=inside & known, other=0.0)
        # rounded as in U, or their difference would be off
        target = w.to(dlogp.dtype.element_ty).to(tl.float32) * at_target
        u_k = tl.load(u + n * H + start + k, mask=inside, other=0.0) * inverse
        d = tl.where(ignored, 0.0, target - u_k)
        tl.store(dlogp + n * H + start + k, d.to(dlogp.dtype.element_ty), mask=inside)
        if SAVE > 1:
            u2_k = tl.load(u2 + n * H + start + k, mask=inside, other=0.0) * inverse
            d = tl.where(ignored, 0.0, -pull * (target - u_k) - (u2_k - rest * u_k))
            tl.store(dentropy + n * H + start + k, d.to(dentropy.dtype.element_ty), mask=inside)


@triton.jit
def finish_fwd_kernel(
    state,  # (9, N) fp32: m, s, x_y, sum (z - m) e, sum z, sum e^2, max z, rounded sums
    labels,  # (N,) int64
    index,  # (N,) int64
    u,  # (N, H) fp32
    u2,  # (N, H) fp32
    weight,  # (V, H)
    logps,  # (M,) fp64
    lse,  # (M,) fp32
    entropy,  # (M,) fp32
    mean_logits,  # (M,) fp32
    is_top1,  # (M,) bool
    log_sum_sq,  # (M,) fp32
    dlogp,  # (N, H) d logp / d hidden, divided by slope (1 - p_y)
    dentropy,  # (N, H) d entropy / d hidden, divided likewise
    M,
    V,
    H,
    state_stride,
    weight_stride,
    weight_step,
    ignore_index,
    cap: "fp64",  # noqa: F821
    HAS_INDEX: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LSE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGITS: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LOG_SUM_SQ: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    position, there = _position(index, n, M, HAS_INDEX)
    label = tl.load(labels + n)
    ignored = label == ignore_index
    m, s, z, gap = _row(state, n, step, cap, HAS_CAP)
    logp, log_rest = log_sigmoid64(-gap), log_sigmoid64(gap)
    tl.store(logps + position, tl.where(ignored, 0.0, logp), mask=there)
    if LSE:
        value = tl.where(gap > 0, m + tl.log(s) - log_rest, z - logp)
        tl.store(lse + position, tl.where(ignored, 0.0, value).to(tl.float32), mask=there)
    if ENTROPY:
        p, rest = sigmoid64(-gap), sigmoid64(gap)
        inside_rest = tl.log(s) - tl.load(state + n + SUM_ZE * step).to(tl.float64) / s - log_rest
        # conditions leave a NaN where it is
        value = tl.where(rest == 0, 0.0, rest * inside_rest) - tl.where(p == 0, 0.0, p * logp)
        tl.store(entropy + position, tl.where(ignored, 0.0, value).to(tl.float32), mask=there)
    if MEAN_LOGITS:
        value = tl.where(logp != logp, logp, tl.load(state + n + SUM_Z * step).to(tl.float64) / V)
        tl.store(mean_logits + position, tl.where(ignored, 0.0, value).to(tl.float32), mask=there)
    if LOG_SUM_SQ:
        of_rest = 2 * (log_rest - tl.log(s)) + tl.log(tl.load(state + n + SUM_EE * step).to(tl.float64))
        gap_sq = 2 * logp - of_rest
        value = tl.where(s == 0, 2 * logp, tl.where(gap_sq > 0, 2 * logp, of_rest) - log_sigmoid64(tl.abs(gap_sq)))
        tl.store(log_sum_sq + position, tl.where(ignored, 0.0, value).to(tl.float32), mask=there)
    if IS_TOP1:
        # in fp32, as the maximum was found
        x = tl.load(state + n + TARGET * step)
        x = softcap_logit(x, tl.full((), cap, tl.float32)) if HAS_CAP else x
        top1 = (x >= tl.load(state + n + TOP * step)) & (logp == logp)
        tl.store(is_top1 + position, top1 & (ignored == 0), mask=there)
    if SAVE > 0:
        known = (label >= 0) & (label < V) & (ignored == 0)
        at_target = sech2(tl.load(state + n + TARGET * step)) if HAS_CAP else 1.0
        _, pull = _entropy_terms(m, s, z, gap, tl.load(state + n + SUM_ZE * step).to(tl.float64))
        rounded = tl.load(state + n + ROUNDED * step)
        inverse = tl.where(rounded == 0, 0.0, 1.0 / rounded)
        rest = tl.load(state + n + ROUNDED_ZE * step) * inverse
        w_row = weight + tl.where(known, label, 0) * weight_stride
        _finish_derivatives(
            u, u2, w_row, dlogp, dentropy, n, H, weight_step, known, ignored, at_target, inverse,
            pull.to(tl.float32), rest, SAVE, BLOCK,
        )  # fmt: skip


@triton.jit
def rows_bwd_kernel(
    dlogps,  # (M,) fp64
    dentropies,  # (M,) fp32
    labels,  # (M,) int64
    index,  # (N,) int64
    hidden,  # (M, H)
    state,  # (9, N) fp32
    dlogp,  # (N, H)
    dentropy,  # (N, H)
    unit,  # 0-d fp32 divisor of the coefficients
    dhidden,  # (M, H)
    row_labels,  # (N,) int64
    coefficient,  # (N,) fp32: slope (1 - p_y) times the upstream gradient, or its scale if the entropy has one too
    mix,  # (3, N) fp32 of the entropy: factor of q_v, its slope in z_v - m, and the value at the target
    rows,  # (N, H) in the dtype of the GEMM
    scaled,  # (N, H) rows times coefficient
    M,
    H,
    hidden_stride,
    hidden_step,
    state_stride,
    mix_stride,
    ignore_index,
    slope: "fp64",  # noqa: F821
    cap: "fp64",  # noqa: F821
    HAS_INDEX: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    ENTROPY: tl.constexpr,
    DHIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    position, there = _position(index, n, M, HAS_INDEX)
    label = tl.load(labels + position, mask=there, other=ignore_index)
    ignored = label == ignore_index
    if HAS_INDEX:
        tl.store(row_labels + n, label)
    m, s, z, gap = _row(state, n, step, cap, HAS_CAP)
    rest = sigmoid64(gap) * slope
    g = tl.where(ignored, 0.0, tl.load(dlogps + position, mask=there, other=0.0).to(tl.float64))
    g_entropy, scale = tl.zeros_like(g), g
    if ENTROPY:
        g_entropy = tl.where(ignored, 0.0, tl.load(dentropies + position, mask=there, other=0.0).to(tl.float64))
        scale = tl.abs(g) + tl.abs(g_entropy)
        divisor = tl.where(scale == 0, 1.0, scale)
        a, b = g / divisor, g_entropy / divisor
        mu, pull = _entropy_terms(m, s, z, gap, tl.load(state + n + SUM_ZE * step).to(tl.float64))
        mix_step = tl.cast(mix_stride, tl.int64)
        tl.store(mix + n, tl.where(ignored, 0.0, a - b * mu).to(tl.float32))
        tl.store(mix + n + mix_step, b.to(tl.float32))
        tl.store(mix + n + 2 * mix_step, tl.where(ignored, 0.0, a - b * pull).to(tl.float32))
    # a row without a gradient upstream has none, whatever is in it: a product would keep what is not finite
    of_logp = tl.where(g == 0, 0.0, rest * g).to(tl.float32)
    of_entropy = tl.where(g_entropy == 0, 0.0, rest * g_entropy).to(tl.float32)
    weight_of_row = tl.where(scale == 0, 0.0, rest * scale).to(tl.float32)
    if HAS_UNIT:
        weight_of_row /= tl.load(unit)
    tl.store(coefficient + n, weight_of_row)
    k = tl.arange(0, BLOCK)
    for start in range(0, H, BLOCK):
        inside = start + k < H
        if DHIDDEN:
            d = tl.load(dlogp + n * H + start + k, mask=inside, other=0.0).to(tl.float32)
            d = tl.where(of_logp == 0, 0.0, d * of_logp)
            if ENTROPY:
                more = tl.load(dentropy + n * H + start + k, mask=inside, other=0.0).to(tl.float32)
                d += tl.where(of_entropy == 0, 0.0, more * of_entropy)
            tl.store(dhidden + position * H + start + k, d.to(dhidden.dtype.element_ty), mask=inside & there)
        if SCALED:
            at = position * hidden_stride + (start + k).to(tl.int64) * hidden_step
            h = tl.load(hidden + at, mask=inside & (ignored == 0), other=0.0).to(COMPUTE)
            if ROWS:
                tl.store(rows + n * H + start + k, h.to(rows.dtype.element_ty), mask=inside)
            h = tl.where(weight_of_row == 0, 0.0, h.to(tl.float32) * weight_of_row)
            tl.store(scaled + n * H + start + k, h.to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows_bwd_kernel(
    values,  # (N, H)
    coefficient,  # (N,) fp32
    factor,  # 0-d fp32
    index,  # (N,) int64
    out,  # (M, H)
    M,
    H,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    position, there = _position(index, n, M, HAS_INDEX)
    by_all = tl.load(factor)
    by = tl.where(by_all == 0, 0.0, tl.load(coefficient + n) * by_all)
    k = tl.arange(0, BLOCK)
    for start in range(0, H, BLOCK):
        inside = start + k < H
        value = tl.load(values + n * H + start + k, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(by == 0, 0.0, value * by)  # not 0 * NaN
        tl.store(out + position * H + start + k, value.to(out.dtype.element_ty), mask=inside & there)


@triton.jit
def scale_bwd_kernel(
    gradient,  # (count,)
    factor,  # 0-d
    count,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor).to(tl.float32)
    first, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, tl.where(by == 1, 0, count), step):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + i, mask=i < count, other=0.0).to(tl.float32)
        tl.store(gradient + i, (value * by).to(gradient.dtype.element_ty), mask=i < count)


def gather_fwd(
    hidden: Tensor,  # (M, H)
    labels: Tensor,  # (M,) contiguous
    index: Tensor | None,  # (N,) contiguous
    rows: Tensor | None,  # (N, H) contiguous; filled
    row_labels: Tensor,  # (N,) contiguous; filled if there is an index
    state: Tensor,  # (9, N), rows contiguous; filled
    ignore_index: int,
    compute_dtype: torch.dtype,
    weight: Tensor | None = None,  # (V, H): the state begins with x_y = (h w_y + b_y) * linear, NaN for an unknown y
    bias: Tensor | None = None,  # (V,) fp32, times linear
    linear: float = 1.0,
    reference: bool = False,  # and with it as the reference m
) -> None:
    """Collect rows, zero where the label is ignored, and labels, and begin the state."""
    targets = weight is not None
    weight = hidden if weight is None else weight
    V, H = weight.shape
    gather_fwd_kernel[(state.shape[1],)](
        hidden,
        labels,
        index,
        rows,
        row_labels,
        state,
        weight,
        bias,
        len(labels),
        H,
        V,
        hidden.stride(0),
        hidden.stride(1),
        weight.stride(0),
        weight.stride(1),
        state.stride(0),
        ignore_index,
        linear,
        HAS_INDEX=index is not None,
        HAS_ROWS=rows is not None,
        TARGETS=targets,
        HAS_BIAS=bias is not None,
        REFERENCE=reference,
        COMPUTE=DTYPES[compute_dtype],
        BLOCK=_block(H),
        num_warps=ROW_WARPS,
        **OPTIONS,
    )


def finish_fwd(
    state: Tensor,  # (9, N), rows contiguous
    labels: Tensor,  # (N,) contiguous
    index: Tensor | None,  # (N,) contiguous
    u: Tensor | None,  # (N, H) contiguous
    u2: Tensor | None,  # (N, H) contiguous
    weight: Tensor,  # (V, H)
    logps: Tensor,  # (M,) fp64; filled at the scored positions, as the next five where they are given
    lse: Tensor | None,
    entropy: Tensor | None,
    mean_logits: Tensor | None,
    is_top1: Tensor | None,
    log_sum_sq: Tensor | None,
    dlogp: Tensor | None,  # (N, H) contiguous; filled
    dentropy: Tensor | None,  # (N, H) contiguous; filled
    ignore_index: int,
    cap: float | None,
) -> None:
    """Results per token from the sums over the vocabulary, and the derivatives from u and u2."""
    V, H = weight.shape
    finish_fwd_kernel[(state.shape[1],)](
        state,
        labels,
        index,
        u,
        u2,
        weight,
        logps,
        lse,
        entropy,
        mean_logits,
        is_top1,
        log_sum_sq,
        dlogp,
        dentropy,
        len(logps),
        V,
        H,
        state.stride(0),
        weight.stride(0),
        weight.stride(1),
        ignore_index,
        cap or 1.0,
        HAS_INDEX=index is not None,
        HAS_CAP=cap is not None,
        LSE=lse is not None,
        ENTROPY=entropy is not None,
        MEAN_LOGITS=mean_logits is not None,
        LOG_SUM_SQ=log_sum_sq is not None,
        IS_TOP1=is_top1 is not None,
        SAVE=0 if dlogp is None else 1 if dentropy is None else 2,
        BLOCK=_block(H),
        num_warps=ROW_WARPS,
        **OPTIONS,
    )


def rows_bwd(
    dlogps: Tensor,  # (M,) contiguous
    dentropies: Tensor | None,  # (M,) contiguous
    labels: Tensor,  # (M,) contiguous
    index: Tensor | None,  # (N,) contiguous
    hidden: Tensor | None,  # (M, H)
    state: Tensor,  # (9, N), rows contiguous
    dlogp: Tensor | None,  # (N, H) contiguous
    dentropy: Tensor | None,  # (N, H) contiguous
    unit: Tensor | None,  # 0-d
    dhidden: Tensor | None,  # (M, H) contiguous; filled at the scored positions
    row_labels: Tensor,  # (N,) contiguous; filled if there is an index
    coefficient: Tensor,  # (N,) contiguous; filled
    mix: Tensor | None,  # (3, N), rows contiguous; filled
    rows: Tensor | None,  # (N, H) contiguous; filled
    scaled: Tensor | None,  # (N, H) contiguous; filled
    ignore_index: int,
    slope: float,
    cap: float | None,
    compute_dtype: torch.dtype,
) -> None:
    """Coefficients of the rows; on request the gradient of hidden, and hidden rows as they are and weighed."""
    wide = dhidden if hidden is None else hidden
    H = 0 if wide is None else wide.shape[1]
    rows_bwd_kernel[(state.shape[1],)](
        dlogps,
        dentropies,
        labels,
        index,
        hidden,
        state,
        dlogp,
        dentropy,
        unit,
        dhidden,
        row_labels,
        coefficient,
        mix,
        rows,
        scaled,
        len(labels),
        H,
        0 if hidden is None else hidden.stride(0),
        0 if hidden is None else hidden.stride(1),
        state.stride(0),
        0 if mix is None else mix.stride(0),
        ignore_index,
        slope,
        cap or 1.0,
        HAS_INDEX=index is not None,
        HAS_CAP=cap is not None,
        HAS_UNIT=unit is not None,
        ENTROPY=mix is not None,
        DHIDDEN=dhidden is not None,
        ROWS=rows is not None,
        SCALED=scaled is not None,
        COMPUTE=DTYPES[compute_dtype],
        BLOCK=_block(H),
        num_warps=ROW_WARPS,
        **OPTIONS,
    )


def scale_rows_bwd(
    values: Tensor,  # (N, H) contiguous
    coefficient: Tensor,  # (N,) fp32 contiguous
    factor: Tensor,  # 0-d fp32
    index: Tensor | None,  # (N,) contiguous
    out: Tensor,  # (M, H) contiguous; filled at the scored positions
) -> None:
    """Rows times their coefficients and a factor, in fp32; 0 where either of those is, whatever is in a row."""
    M, H = out.shape
    scale_rows_bwd_kernel[(len(values),)](
        values,
        coefficient,
        factor,
        index,
        out,
        M,
        H,
        HAS_INDEX=index is not None,
        BLOCK=_block(H),
        num_warps=ROW_WARPS,
        **OPTIONS,
    )


def scale_bwd(
    gradient: Tensor,  # dense, in any order; overwritten
    factor: Tensor,  # 0-d
) -> None:
    """Multiply a gradient by a factor, in fp32, without a touch of its memory where the factor is 1."""
    if gradient.numel():
        programs = min(SCALE_PROGRAMS, cdiv(gradient.numel(), WIDTH_BLOCK))
        scale_bwd_kernel[(programs,)](
            gradient, factor, gradient.numel(), BLOCK=WIDTH_BLOCK, num_warps=ROW_WARPS, **OPTIONS
        )


def _block(width: int) -> int:
    return min(WIDTH_BLOCK, next_power_of_2(max(width, 1)))
