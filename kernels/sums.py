"""Sums of the exponentials of every row, by a GEMM that knows beforehand what they are relative to.

    s = sum over v != y of exp(z_v - z_y)

As in `exps` the reference is the logit of the target, from `rows.gather_fwd_kernel`, so that the epilogue of a tile
needs no maximum, which takes a fifth to a quarter of the instructions of `stats.stats_copied_fwd_kernel`'s. Where a sum
is not between `LEAST` and `MOST`, `repair_sums_kernel` takes the statistics of the row's block as that kernel does, and
returns at once from every other; `settle_sums_kernel` chooses.

Under a softcap that is at most `blocks.LARGEST_CAP` the sums are those of exp(z_v), as in `exps`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import blocks
from .blocks import COMBINE_BLOCK_N, COMBINE_BLOCK_T, OPTIONS, REPAIR_STAGES, cdiv, exponential_blocks
from .exps import capped, others, settle
from .math import LOWEST, SUM, TARGET
from .stats import blocks_of, largest, multiply, multiprocessors, place, store_statistics

# within 60 nats of 1: what is lost below fp32's least number is small beside it, and a backward may use its reference
LEAST, MOST = tl.constexpr(1e-26), tl.constexpr(1e26)
# in those bounds: of two kernels that add in another order, the one that reads a repair asks for less of them
SLACK = tl.constexpr(2.0)


@triton.jit
def reference_of(state, n, N, state_stride):
    """The logits of the targets; 0 for a row whose target has none, or a huge one."""
    x = tl.load(state + n + TARGET * tl.cast(state_stride, tl.int64), mask=n < N, other=0.0)
    return tl.where(tl.abs(x) < 1e6, x, 0.0)


@triton.jit
def sums_fwd_kernel(
    hidden,  # descriptor of blocks (BLOCK_N, BLOCK_H) of (N, H); what lies beyond reads as 0
    weight,  # descriptor of blocks (BLOCK_V, BLOCK_H) of (V, H)
    labels,  # (N,) int64
    state,  # (9, N) fp32: the logits of the targets
    partials,  # (3, tiles, N) fp32: sum of e; the others are those of `repair_sums_kernel`, which a softcap has not
    N,
    V,
    H,
    state_stride,
    linear,  # x = h w * linear
    cap,
    HAS_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    blocks_n, tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    # as one loop with the one inside it: the copies for the next tile are under way while sums are taken
    for program in tl.range(tl.program_id(0), blocks_n * tiles, tl.num_programs(0), flatten=True):
        block_n, tile = place(program, blocks_n, tiles, GROUP)
        x = multiply(hidden, weight, block_n, tile, H, "ieee", BLOCK_N, BLOCK_V, BLOCK_H)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_CAP:
            e, _ = capped(x, n, tile, labels, N, 0, V, linear, cap, BLOCK_V)
        else:
            x = x * linear - reference_of(state, n, N, state_stride)[:, None]
            e = tl.exp(others(x, -float("inf"), n, tile, labels, N, 0, V, BLOCK_V))
        tl.store(partials + tl.cast(tile, tl.int64) * N + n, tl.sum(e, 1), mask=n < N)


@triton.jit
def summed(partials, n, N, tiles, slack, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """The sums of rows n, and whether the reference of one is too far from its other logits, or one is no number."""
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        at = (start + t).to(tl.int64)[:, None] * N + n[None, :]
        mask = (start + t < tiles)[:, None] & (n < N)[None, :]
        total += tl.sum(tl.load(partials + at, mask=mask, other=0.0), 0)
    near = (total > LEAST / slack) & (total < MOST * slack)
    return total, (n < N) & (near == 0)


@triton.jit
def repair_sums_kernel(
    hidden,  # as in sums_fwd_kernel
    weight,
    labels,
    partials,  # (3, tiles, N) fp32: sum of e; then m and s of the tiles of blocks with a row that is to be repaired
    N,
    V,
    H,
    linear,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block_n, tiles = tl.program_id(0), tl.cdiv(V, BLOCK_V)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    _, far = summed(partials, n, N, tiles, 1.0, BLOCK_N, BLOCK_T)
    if tl.max(far.to(tl.int32), 0) > 0:
        found = partials + tl.cast(tiles, tl.int64) * N
        for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
            x = multiply(hidden, weight, block_n, tile, H, "ieee", BLOCK_N, BLOCK_V, BLOCK_H)
            store_statistics(
                x, block_n, tile, None, labels, found, N, V, linear, 1.0, False, False, False, BLOCK_N, BLOCK_V
            )


@triton.jit
def settle_sums_kernel(
    state,  # (9, N) fp32: the logits of the targets; m and s are filled
    partials,  # (3, tiles, N) fp32, as repair_sums_kernel leaves them
    N,
    tiles,
    state_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s, far = summed(partials, n, N, tiles, SLACK, BLOCK_N, BLOCK_T)
    m = reference_of(state, n, N, state_stride)
    if tl.max(far.to(tl.int32), 0) > 0:
        t, field = tl.arange(0, BLOCK_T), tl.cast(tiles, tl.int64) * N
        top = tl.maximum(largest(partials + field, n, N, tiles, BLOCK_N, BLOCK_T), LOWEST)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, tiles, BLOCK_T):
            at = (start + t).to(tl.int64)[:, None] * N + n[None, :]
            mask = (start + t < tiles)[:, None] & (n < N)[None, :]
            m_t = tl.load(partials + field + at, mask=mask, other=-float("inf"))
            total += tl.sum(tl.load(partials + 2 * field + at, mask=mask, other=0.0) * tl.exp(m_t - top[None, :]), 0)
        m, s = tl.where(far, top, m), tl.where(far, total, s)
    tl.store(state + n, m, mask=n < N)
    tl.store(state + n + SUM * tl.cast(state_stride, tl.int64), s, mask=n < N)


def sums_fwd(
    hidden: Tensor,  # (N, H), reached by the copy engine, as is weight
    weight: Tensor,  # (V, H) of the same dtype
    labels: Tensor,  # (N,) int64
    state: Tensor,  # (9, N) fp32, rows contiguous, with the logits of the targets; m and s are filled
    linear: float,
    cap: float | None,
) -> None:
    """Fill `state` with the sums of exponentials over v != y of each row, and what they are relative to."""
    (N, H), V = hidden.shape, weight.shape[0]
    kind = blocks.architecture(hidden.device)
    block_n, block_v, block_h, warps, stages = exponential_blocks(kind, hidden.element_size(), cap is not None)
    blocks_n, tiles = cdiv(N, block_n), cdiv(V, block_v)
    fields = blocks.exponential_fields(cap is not None)
    partials = torch.empty((fields, tiles, N), dtype=torch.float32, device=hidden.device)
    operands = blocks_of(hidden, weight, block_n, block_v, block_h)
    constants = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_H": block_h, "num_warps": warps} | OPTIONS
    combine, most = {"BLOCK_T": COMBINE_BLOCK_T}, multiprocessors(hidden.device)
    sums_fwd_kernel[(min(blocks_n * tiles, most),)](
        *operands, labels, state, partials, N, V, H, state.stride(0), linear, cap or 1.0,
        HAS_CAP=cap is not None, GROUP=8, num_stages=stages, **constants,
    )  # fmt: skip
    if cap is not None:
        settle(state, partials, None, H, cap)
        return
    constants |= combine | {"num_stages": REPAIR_STAGES.get(kind, stages)}
    parts = min(tiles, cdiv(most, blocks_n))
    repair_sums_kernel[(blocks_n, parts)](*operands, labels, partials, N, V, H, linear, **constants)
    settle_sums_kernel[(cdiv(N, COMBINE_BLOCK_N),)](
        state, partials, N, tiles, state.stride(0), BLOCK_N=COMBINE_BLOCK_N, **combine, **OPTIONS
    )
