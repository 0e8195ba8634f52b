"""Sums of token log-probabilities per sequence, their adjoint, and the losses that are computed in the same launch.

One program per sequence, or per pair of sequences (i and B + i), walks its tokens in a fixed order in fp64: sums are
deterministic, and the mathematics of a loss keeps full relative precision when it saturates. Sequences are packed
between `offsets` (all -1 where they do not fit: then every result is NaN), or all of one `length`.
`preference_fwd_kernel` computes losses, rewards and d loss / d s for the sum s of each sequence, by formulas that
restate those of the plain losses (dpo, ipo, kto, cpo), against which it is tested; one more program reduces them to the
scalar loss, and `preference_bwd_kernel` carries its gradient back to the tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import OPTIONS, SEQUENCE_BLOCK
from .math import log_sigmoid64, sigmoid64


@triton.jit
def _span(offsets, length, sequence, PACKED: tl.constexpr):
    """First token of a sequence, and the one past its last."""
    if PACKED:
        start = tl.load(offsets + sequence)
        stop = tl.load(offsets + sequence + 1)
    else:
        start = sequence.to(tl.int64) * length
        stop = start + length
    return start, stop


@triton.jit
def sequence_fwd_kernel(
    values,  # (M,)
    weights,  # (M,)
    offsets,  # (S + 1,) int64
    sums,  # (S,) fp64
    length,
    PACKED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start, stop = _span(offsets, length, sequence, PACKED)
    t = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(start, stop, BLOCK):
        mask = at + t < stop
        value = tl.load(values + at + t, mask=mask, other=0.0).to(tl.float64)
        if HAS_WEIGHTS:
            weight = tl.load(weights + at + t, mask=mask, other=0.0)
            value = tl.where(weight == 0, 0.0, value * weight)  # not 0 * inf
        total += value
    tl.store(sums + sequence, tl.where(start < 0, float("nan"), tl.sum(total, 0)))


@triton.jit
def sequence_bwd_kernel(
    dsums,  # (S,) fp64
    weights,  # (M,)
    offsets,  # (S + 1,) int64
    dvalues,  # (M,) fp64
    length,
    PACKED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start, stop = _span(offsets, length, sequence, PACKED)
    dsum = tl.load(dsums + sequence)
    t = tl.arange(0, BLOCK)
    for at in range(start, stop, BLOCK):
        mask = at + t < stop
        spread = tl.zeros((BLOCK,), tl.float64) + dsum
        if HAS_WEIGHTS:
            weight = tl.load(weights + at + t, mask=mask, other=0.0)
            spread = tl.where(weight == 0, 0.0, spread * weight)
        tl.store(dvalues + at + t, spread, mask=mask)


@triton.jit
def _sum_tokens(
    values, weights, labels, nll_labels, offsets, length, sequence, ignore_index, PACKED, HAS_WEIGHTS, NLL, BLOCK
):
    """Weighted sum over the labelled tokens and their number; the same over nll_labels, without weights, if NLL."""
    start, stop = _span(offsets, length, sequence, PACKED)
    t = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int64)
    nll_sums = tl.zeros((BLOCK,), tl.float64)
    nll_counts = tl.zeros((BLOCK,), tl.int64)
    for at in range(start, stop, BLOCK):
        mask = at + t < stop
        value = tl.load(values + at + t, mask=mask, other=0.0).to(tl.float64)
        labelled = mask & (tl.load(labels + at + t, mask=mask, other=0) != ignore_index)
        if NLL:
            in_nll = mask & (tl.load(nll_labels + at + t, mask=mask, other=0) != ignore_index)
            nll_sums += tl.where(in_nll, value, 0.0)
            nll_counts += in_nll.to(tl.int64)
        if HAS_WEIGHTS:
            weight = tl.load(weights + at + t, mask=mask, other=0.0)
            value = tl.where(weight == 0, 0.0, value * weight)  # not 0 * inf
        sums += tl.where(labelled, value, 0.0)
        counts += labelled.to(tl.int64)
    unknown = tl.where(start < 0, float("nan"), tl.zeros((), tl.float64))
    return tl.sum(sums, 0) + unknown, tl.sum(counts, 0), tl.sum(nll_sums, 0) + unknown, tl.sum(nll_counts, 0)


@triton.jit
def _kto(logratio, given, baseline, beta, desirable_weight, undesirable_weight):
    """Loss of a sequence and its slope in the log-probability; NaN where desirable is neither 0 nor 1."""
    wanted = given == 1
    one = tl.full((), 1.0, tl.float64)
    weight = tl.where(wanted, one * desirable_weight, one * undesirable_weight)
    gap = beta * (logratio - tl.where(baseline < 0, 0.0, baseline))  # a NaN stays
    gap = tl.where(wanted | (given == 0), gap, float("nan"))
    x = tl.where(wanted, -gap, gap)
    loss = tl.where(weight == 0, 0.0, weight * sigmoid64(x))  # not 0 * NaN
    slope = tl.where(weight == 0, 0.0, beta * loss * sigmoid64(-x))
    return loss, tl.where(wanted, -slope, slope)


@triton.jit
def preference_fwd_kernel(
    values,  # (M,) fp64 token log-probabilities
    weights,  # (M,)
    labels,  # (M,) int64: where the sums run
    nll_labels,  # (M,) int64: where the NLL of chosen sequences runs
    offsets,  # (S + 1,) int64
    ref,  # (S,)
    desirable,  # (S,) or 0-d bool, for kto
    kl,  # (S,) or 0-d, for kto
    pair_weights,  # (B,) or 0-d
    losses,  # (B,) fp32
    sums,  # (S,) fp32
    rewards,  # (S,) fp32
    slopes,  # (S,) fp64, pair_weights * d losses / d sums
    nll,  # (2, B) fp64: sums of log-probabilities of chosen sequences, and numbers of tokens
    B,
    length,
    desirable_stride,
    kl_stride,
    pair_stride,
    ignore_index,
    beta: "fp64",  # noqa: F821
    label_smoothing: "fp64",  # noqa: F821
    desirable_weight: "fp64",  # noqa: F821
    undesirable_weight: "fp64",  # noqa: F821
    LOSS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_PAIR_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    ref_i = tl.load(ref + i).to(tl.float64) if LOSS != "cpo" else tl.full((), 0.0, tl.float64)
    total, count, nll_sum, nll_count = _sum_tokens(
        values, weights, labels, nll_labels, offsets, length, i, ignore_index, PACKED, HAS_WEIGHTS, LOSS != "kto", BLOCK
    )
    logratio = total - ref_i
    tl.store(sums + i, total.to(tl.float32))
    tl.store(rewards + i, (beta * logratio).to(tl.float32))
    factor = tl.full((), 1.0, tl.float64)
    if HAS_PAIR_WEIGHTS:
        factor = tl.load(pair_weights + i * pair_stride).to(tl.float64)
    if LOSS == "kto":
        given = tl.load(desirable + i * desirable_stride).to(tl.float64)
        baseline = tl.load(kl + i * kl_stride).to(tl.float64)
        loss, slope = _kto(logratio, given, baseline, beta, desirable_weight, undesirable_weight)
        tl.store(losses + i, loss.to(tl.float32))
        tl.store(slopes + i, tl.where(factor == 0, 0.0, slope * factor))
    else:
        tl.store(nll + i, nll_sum)
        tl.store(nll + B + i, nll_count.to(tl.float64))
        j = B + i
        ref_j = tl.load(ref + j).to(tl.float64) if LOSS != "cpo" else tl.full((), 0.0, tl.float64)
        total_j, count_j, _, _ = _sum_tokens(
            values, weights, labels, nll_labels, offsets, length, j, ignore_index, PACKED, HAS_WEIGHTS, False, BLOCK
        )
        logratio_j = total_j - ref_j
        tl.store(sums + j, total_j.to(tl.float32))
        tl.store(rewards + j, (beta * logratio_j).to(tl.float32))
        if LOSS == "ipo":
            length_i = tl.maximum(count, 1).to(tl.float64)
            length_j = tl.maximum(count_j, 1).to(tl.float64)
            error = logratio / length_i - logratio_j / length_j - 0.5 / beta
            loss = error * error
            slope_i = 2 * error / length_i
            slope_j = -2 * error / length_j
        else:
            margin = beta * (logratio - logratio_j)
            right, wrong = 1 - label_smoothing, label_smoothing
            loss = -right * log_sigmoid64(margin)
            if wrong != 0:  # not 0 * inf
                loss -= wrong * log_sigmoid64(-margin)
            slope_i = beta * (wrong * sigmoid64(margin) - right * sigmoid64(-margin))
            slope_j = -slope_i
        tl.store(losses + i, loss.to(tl.float32))
        tl.store(slopes + i, tl.where(factor == 0, 0.0, slope_i * factor))  # not 0 * inf, for a dropped pair
        tl.store(slopes + j, tl.where(factor == 0, 0.0, slope_j * factor))


@triton.jit
def preference_reduce_fwd_kernel(
    losses,  # (B,) fp32
    nll,  # (2, B) fp64
    pair_weights,  # (B,) or 0-d
    num_sequences,  # 0-d; B (at least 1) without it
    num_tokens,  # 0-d; the counted tokens (at least 1) without it
    loss,  # 0-d fp32: sum(pair_weights losses) / num_sequences + nll_weight * nll_loss
    nll_loss,  # 0-d fp32: -sum(nll) / num_tokens
    scales,  # (2,) fp64: 1 / num_sequences, nll_weight / num_tokens
    B,
    pair_stride,
    nll_weight: "fp64",  # noqa: F821
    PAIRED: tl.constexpr,
    HAS_PAIR_WEIGHTS: tl.constexpr,
    HAS_NUM_SEQUENCES: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK,), tl.float64)
    nll_totals = tl.zeros((BLOCK,), tl.float64)
    token_totals = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, B, BLOCK):
        at, mask = start + i, start + i < B
        value = tl.load(losses + at, mask=mask, other=0.0).to(tl.float64)
        if HAS_PAIR_WEIGHTS:
            factor = tl.load(pair_weights + at * pair_stride, mask=mask, other=0.0).to(tl.float64)
            value = tl.where(factor == 0, 0.0, value * factor)
        totals += value
        if PAIRED:
            nll_totals += tl.load(nll + at, mask=mask, other=0.0)
            token_totals += tl.load(nll + B + at, mask=mask, other=0.0)
    one = tl.full((), 1.0, tl.float64)
    if HAS_NUM_SEQUENCES:
        per_sequence = one / tl.load(num_sequences).to(tl.float64)
    else:
        per_sequence = one / tl.maximum(B, 1).to(tl.float64)
    value = tl.sum(totals, 0) * per_sequence
    tl.store(scales, per_sequence)
    if PAIRED:
        tokens = tl.maximum(tl.sum(token_totals, 0), one)
        if HAS_NUM_TOKENS:
            tokens = tl.load(num_tokens).to(tl.float64)
        nll_value = -tl.sum(nll_totals, 0) / tokens
        tl.store(nll_loss, nll_value.to(tl.float32))
        tl.store(scales + 1, nll_weight / tokens)
        if nll_weight != 0:
            value += nll_weight * nll_value
    tl.store(loss, value.to(tl.float32))


@triton.jit
def preference_bwd_kernel(
    dloss,  # 0-d fp32
    slopes,  # (S,) fp64
    scales,  # (2,) fp64
    weights,  # (M,)
    labels,  # (M,) int64
    nll_labels,  # (M,) int64
    offsets,  # (S + 1,) int64
    dvalues,  # (M,) fp64
    B,
    length,
    ignore_index,
    PAIRED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start, stop = _span(offsets, length, sequence, PACKED)
    upstream = tl.load(dloss).to(tl.float64)
    dsum = upstream * tl.load(slopes + sequence) * tl.load(scales)
    dnll = tl.zeros((), tl.float64)
    if PAIRED:
        dnll = tl.where(sequence < B, -upstream * tl.load(scales + 1), 0.0)
    t = tl.arange(0, BLOCK)
    for at in range(start, stop, BLOCK):
        mask = at + t < stop
        labelled = tl.load(labels + at + t, mask=mask, other=0) != ignore_index
        spread = tl.zeros((BLOCK,), tl.float64) + dsum
        if HAS_WEIGHTS:
            weight = tl.load(weights + at + t, mask=mask, other=0.0)
            spread = tl.where(weight == 0, 0.0, spread * weight)
        spread = tl.where(labelled, spread, 0.0)
        if PAIRED:
            in_nll = tl.load(nll_labels + at + t, mask=mask, other=0) != ignore_index
            spread += tl.where(in_nll, dnll, 0.0)
        tl.store(dvalues + at + t, spread, mask=mask)


def sequence_fwd(values: Tensor, weights: Tensor | None, offsets: Tensor | None, sequences: int) -> Tensor:
    """(S,) fp64 sums of the (M,) values, times weights, between the (S + 1,) offsets, or of equal parts."""
    sums = torch.empty(sequences, dtype=torch.float64, device=values.device)
    if sequences:
        sequence_fwd_kernel[(sequences,)](
            values,
            weights,
            offsets,
            sums,
            len(values) // sequences,
            PACKED=offsets is not None,
            HAS_WEIGHTS=weights is not None,
            BLOCK=SEQUENCE_BLOCK,
            **OPTIONS,
        )
    return sums


def sequence_bwd(dsums: Tensor, weights: Tensor | None, offsets: Tensor | None, tokens: int) -> Tensor:
    """(M,) fp64: each token's sequence gradient times its weight, 0 outside of all sequences."""
    dvalues = _token_gradients(tokens, offsets, dsums.device)
    if dsums.shape[0]:
        sequence_bwd_kernel[(dsums.shape[0],)](
            dsums,
            weights,
            offsets,
            dvalues,
            tokens // dsums.shape[0],
            PACKED=offsets is not None,
            HAS_WEIGHTS=weights is not None,
            BLOCK=SEQUENCE_BLOCK,
            **OPTIONS,
        )
    return dvalues


def _token_gradients(tokens: int, offsets: Tensor | None, device: torch.device) -> Tensor:
    if offsets is None:
        return torch.empty(tokens, dtype=torch.float64, device=device)
    # offsets may leave tokens out, or not fit
    return torch.where(offsets[0] < 0, torch.nan, torch.zeros(tokens, dtype=torch.float64, device=device))


def _stride(value: Tensor | None) -> int:
    """0 for one value that serves all."""
    return 0 if value is None or value.dim() == 0 else value.stride(0)


def preference_fwd(
    values: Tensor,  # (M,)
    weights: Tensor | None,  # (M,)
    labels: Tensor,  # (M,) int64
    nll_labels: Tensor,  # (M,) int64
    offsets: Tensor | None,  # (S + 1,) int64
    sequences: int,
    ref: Tensor | None,  # (S,)
    desirable: Tensor | None,  # (S,) or 0-d
    kl: Tensor | None,  # (S,) or 0-d
    pair_weights: Tensor | None,  # (B,) or 0-d
    num_sequences: Tensor | None,  # 0-d
    num_tokens: Tensor | None,  # 0-d
    loss: str,
    ignore_index: int,
    nll_weight: float,
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss 0-d, losses (B,), sums (S,), rewards (S,), nll_loss 0-d) in fp32, (slopes (S,), scales (2,)) in fp64.

    B = S for kto, S / 2 otherwise. Slopes and scales are what `preference_bwd` takes.
    """
    count = sequences if loss == "kto" else sequences // 2
    shapes, device = ((), (count,), (sequences,), (sequences,), ()), values.device
    total, losses, sums, rewards, nll_loss = (torch.empty(s, dtype=torch.float32, device=device) for s in shapes)
    slopes, nll, scales = (torch.empty(n, dtype=torch.float64, device=device) for n in (sequences, 2 * count, 2))
    flags = {"HAS_PAIR_WEIGHTS": pair_weights is not None, "BLOCK": SEQUENCE_BLOCK} | OPTIONS
    if count:
        preference_fwd_kernel[(count,)](
            values,
            weights,
            labels,
            nll_labels,
            offsets,
            ref,
            desirable,
            kl,
            pair_weights,
            losses,
            sums,
            rewards,
            slopes,
            nll,
            count,
            len(values) // sequences,
            _stride(desirable),
            _stride(kl),
            _stride(pair_weights),
            ignore_index,
            beta,
            label_smoothing,
            desirable_weight,
            undesirable_weight,
            LOSS=loss,
            PACKED=offsets is not None,
            HAS_WEIGHTS=weights is not None,
            **flags,
        )
    preference_reduce_fwd_kernel[(1,)](
        losses,
        nll,
        pair_weights,
        num_sequences,
        num_tokens,
        total,
        nll_loss,
        scales,
        count,
        _stride(pair_weights),
        nll_weight,
        PAIRED=loss != "kto",
        HAS_NUM_SEQUENCES=num_sequences is not None,
        HAS_NUM_TOKENS=num_tokens is not None,
        **flags,
    )
    return total, losses, sums, rewards, nll_loss, slopes, scales


def preference_bwd(
    dloss: Tensor,  # 0-d
    slopes: Tensor,  # (S,)
    scales: Tensor,  # (2,)
    weights: Tensor | None,  # (M,)
    labels: Tensor,  # (M,)
    nll_labels: Tensor,  # (M,)
    offsets: Tensor | None,  # (S + 1,)
    paired: bool,
    ignore_index: int,
) -> Tensor:
    """(M,) fp64: the gradient of the loss with respect to the token log-probabilities."""
    sequences, tokens = len(slopes), len(labels)
    dvalues = _token_gradients(tokens, offsets, labels.device)
    if sequences:
        preference_bwd_kernel[(sequences,)](
            dloss,
            slopes,
            scales,
            weights,
            labels,
            nll_labels,
            offsets,
            dvalues,
            sequences // 2,
            tokens // sequences,
            ignore_index,
            PAIRED=paired,
            PACKED=offsets is not None,
            HAS_WEIGHTS=weights is not None,
            BLOCK=SEQUENCE_BLOCK,
            **OPTIONS,
        )
    return dvalues
