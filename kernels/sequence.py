"""Sums of token log-probabilities per sequence, their adjoint, and the losses that are computed in the same launch.

One program per sequence, or per pair of sequences (i and B + i), walks its tokens in a fixed order in fp64: sums are
deterministic, and the mathematics of a loss keeps full relative precision when it saturates. `preference_fwd_kernel`
returns, beside losses and rewards, d loss / d s for the sum s of each sequence. Its formulas restate those of the plain
losses (dpo, ipo, kto, cpo), against which it is tested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import SEQUENCE_BLOCK
from .math import log_sigmoid64, sigmoid64


@triton.jit
def _sum_tokens(values, weights, labels, offsets, sequence, ignore_index, HAS_WEIGHTS, COUNT, BLOCK: tl.constexpr):
    start, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    t = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int64)
    for at in range(start, stop, BLOCK):
        mask = at + t < stop
        value = tl.load(values + at + t, mask=mask, other=0.0).to(tl.float64)
        if HAS_WEIGHTS:
            weight = tl.load(weights + at + t, mask=mask, other=0.0)
            value = tl.where(weight == 0, 0.0, value * weight)  # not 0 * inf
        sums += value
        if COUNT:
            counts += (tl.load(labels + at + t, mask=mask, other=ignore_index) != ignore_index).to(tl.int64)
    return tl.sum(sums, 0), tl.sum(counts, 0)


@triton.jit
def sequence_fwd_kernel(
    values,  # (M,) fp32
    weights,  # (M,) fp64
    offsets,  # (S + 1,) int64
    sums,  # (S,) fp64
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    total, _ = _sum_tokens(values, weights, values, offsets, sequence, 0, HAS_WEIGHTS, False, BLOCK)
    tl.store(sums + sequence, total)


@triton.jit
def sequence_bwd_kernel(
    dsums,  # (S,) fp64
    weights,  # (M,) fp64
    offsets,  # (S + 1,) int64
    dvalues,  # (M,) fp32
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    dsum = tl.load(dsums + sequence)
    t = tl.arange(0, BLOCK)
    for at in range(start, stop, BLOCK):
        mask = at + t < stop
        spread = tl.zeros((BLOCK,), tl.float64) + dsum
        if HAS_WEIGHTS:
            spread *= tl.load(weights + at + t, mask=mask, other=0.0)
        tl.store(dvalues + at + t, spread.to(tl.float32), mask=mask)


@triton.jit
def preference_fwd_kernel(
    values,  # (M,) fp32 token log-probabilities
    weights,  # (M,) fp64
    labels,  # (M,) int64, for the lengths
    offsets,  # (S + 1,) int64
    ref,  # (S,) fp64
    desirable,  # (S,) int8, for kto
    kl,  # (S,) fp64, for kto
    losses,  # (B,) fp64
    sums,  # (S,) fp64
    rewards,  # (S,) fp64
    slopes,  # (S,) fp64, d losses / d sums
    B,
    ignore_index,
    beta: "fp64",  # noqa: F821
    label_smoothing: "fp64",  # noqa: F821
    desirable_weight: "fp64",  # noqa: F821
    undesirable_weight: "fp64",  # noqa: F821
    LOSS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    ref_i = tl.load(ref + i) if LOSS != "cpo" else tl.full((), 0.0, tl.float64)
    total, count = _sum_tokens(values, weights, labels, offsets, i, ignore_index, HAS_WEIGHTS, LOSS == "ipo", BLOCK)
    logratio = total - ref_i
    tl.store(sums + i, total)
    tl.store(rewards + i, beta * logratio)
    if LOSS == "kto":
        wanted = tl.load(desirable + i) != 0
        one = tl.full((), 1.0, tl.float64)
        weight = tl.where(wanted, one * desirable_weight, one * undesirable_weight)
        gap = beta * (logratio - tl.maximum(tl.load(kl + i), 0.0))
        x = tl.where(wanted, -gap, gap)
        loss = weight * sigmoid64(x)
        slope = beta * loss * sigmoid64(-x)
        tl.store(losses + i, loss)
        tl.store(slopes + i, tl.where(wanted, -slope, slope))
    else:
        j = B + i
        ref_j = tl.load(ref + j) if LOSS != "cpo" else tl.full((), 0.0, tl.float64)
        total_j, count_j = _sum_tokens(
            values, weights, labels, offsets, j, ignore_index, HAS_WEIGHTS, LOSS == "ipo", BLOCK
        )
        logratio_j = total_j - ref_j
        tl.store(sums + j, total_j)
        tl.store(rewards + j, beta * logratio_j)
        if LOSS == "ipo":
            length_i = tl.maximum(count, 1).to(tl.float64)
            length_j = tl.maximum(count_j, 1).to(tl.float64)
            error = logratio / length_i - logratio_j / length_j - 0.5 / beta
            tl.store(losses + i, error * error)
            tl.store(slopes + i, 2 * error / length_i)
            tl.store(slopes + j, -2 * error / length_j)
        else:
            margin = beta * (logratio - logratio_j)
            right, wrong = 1 - label_smoothing, label_smoothing
            loss = -right * log_sigmoid64(margin) - wrong * log_sigmoid64(-margin)
            slope = beta * (wrong * sigmoid64(margin) - right * sigmoid64(-margin))
            tl.store(losses + i, loss)
            tl.store(slopes + i, slope)
            tl.store(slopes + j, -slope)


def sequence_fwd(values: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """(S,) fp64 sums of the (M,) values, times weights, between the (S + 1,) offsets."""
    sequences = offsets.shape[0] - 1
    sums = torch.empty(sequences, dtype=torch.float64, device=values.device)
    if sequences:
        sequence_fwd_kernel[(sequences,)](
            values, weights, offsets, sums, HAS_WEIGHTS=weights is not None, BLOCK=SEQUENCE_BLOCK
        )
    return sums


def sequence_bwd(dsums: Tensor, weights: Tensor | None, offsets: Tensor, tokens: int) -> Tensor:
    """(M,) fp32: each token's sequence gradient times its weight, 0 outside of all sequences."""
    dvalues = torch.zeros(tokens, dtype=torch.float32, device=dsums.device)
    if dsums.shape[0]:
        sequence_bwd_kernel[(dsums.shape[0],)](
            dsums, weights, offsets, dvalues, HAS_WEIGHTS=weights is not None, BLOCK=SEQUENCE_BLOCK
        )
    return dvalues


def preference_fwd(
    values: Tensor,  # (M,) fp32
    weights: Tensor | None,  # (M,) fp64
    labels: Tensor,  # (M,) int64
    offsets: Tensor,  # (S + 1,) int64
    ref: Tensor | None,  # (S,) fp64
    desirable: Tensor | None,  # (S,) int8
    kl: Tensor | None,  # (S,) fp64
    loss: str,
    ignore_index: int,
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses (B,), sums (S,), rewards (S,), d losses / d sums (S,)) in fp64; B = S for kto, S / 2 otherwise."""
    sequences = offsets.shape[0] - 1
    count = sequences if loss == "kto" else sequences // 2
    losses = torch.empty(count, dtype=torch.float64, device=values.device)
    sums, rewards, slopes = (torch.empty(sequences, dtype=torch.float64, device=values.device) for _ in range(3))
    if count:
        preference_fwd_kernel[(count,)](
            values,
            weights,
            labels,
            offsets,
            ref,
            desirable,
            kl,
            losses,
            sums,
            rewards,
            slopes,
            count,
            ignore_index,
            beta,
            label_smoothing,
            desirable_weight,
            undesirable_weight,
            LOSS=loss,
            HAS_WEIGHTS=weights is not None,
            BLOCK=SEQUENCE_BLOCK,
        )
    return losses, sums, rewards, slopes
