"""Exponentials of the logits of every row, written in 16 bits by the GEMM that computes the logits.

    e_v = exp(z_v - m) and 0 at the target,  s = sum e_v

The reference m of a row is known before its GEMM: the logit of its target, from `rows.gather_fwd_kernel`. It need not
be near the largest logit: bf16 has the range of fp32, and a rounding of e_v is as large relative to it whatever m is.
What leaves that range is repaired without the host's knowing: `exps_fwd_kernel` also writes, for each row and each tile
of BLOCK_V entries, the sum of e, that of e as rounded, and the maximum of z - m; where the maximum over the slice is
further than `FAR` nats, `repair_fwd_kernel` computes the blocks of such rows again with m moved to the largest logit,
and returns at once from every other; `settle_fwd_kernel` adds the slice to the running state of the rows, and rescales
U where m moved.

Under a softcap, z = c tanh(x), logits are bounded: where c is at most `blocks.LARGEST_CAP` every m is 0, and nothing is
ever repaired. What is written is e_v (1 - tanh(x_v)^2), the sums are those of e_v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import blocks
from .blocks import COMBINE_BLOCK_N, COMBINE_BLOCK_T, OPTIONS, REPAIR_STAGES, cdiv, exponential_blocks
from .math import ROUNDED, SUM
from .stats import blocks_of, largest, multiply, multiprocessors, place
from .tile import column, reach

# nats: a sum over 2^20 entries stays below e^75, far inside fp32, and what is 20 below the largest is above its least
FAR = tl.constexpr(60.0)


# in place of a logit: of the target, and past the end of a slice
NONE = tl.constexpr(-3e38)


@triton.jit
def others(x, none, n, tile, labels, N, first, Vs, BLOCK_V: tl.constexpr):
    """A tile (BLOCK_N, BLOCK_V) with `none` at the targets and past the end of the slice."""
    label = column(tl.load(labels + n, mask=n < N, other=-1), first, Vs)
    # few tiles hold the end of the vocabulary or a label of theirs; elsewhere nothing is compared entry by entry
    begin = tile * BLOCK_V
    here = tl.max(((label >= begin) & (label < begin + BLOCK_V)).to(tl.int32), 0)
    if (here > 0) | (begin + BLOCK_V > Vs):
        v = begin + tl.arange(0, BLOCK_V)
        x = tl.where((v < Vs)[None, :] & (v[None, :] != label[:, None]), x, none)
    return x


@triton.jit
def capped(x, n, tile, labels, N, first, Vs, linear, cap, BLOCK_V: tl.constexpr):
    """Of products x: exp(z) and exp(z) (1 - t^2), z = cap t, t = tanh(x linear); both 0 for the target.

    By r = 1 / (1 + exp(2 x linear)): t = 1 - 2 r, and 1 - t^2 = 4 (r - r^2).
    """
    x = x * (linear * 2.8853900817779268)  # 2 / log 2
    x = others(x, NONE, n, tile, labels, N, first, Vs, BLOCK_V)
    r = 1.0 / (1.0 + tl.exp2(x))
    bits = cap * 1.4426950408889634  # 1 / log 2
    e = tl.where(x == NONE, 0.0, tl.exp2(bits - 2 * bits * r))
    return e, 4 * e * (r - r * r)


@triton.jit
def _add(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def write(x, exps, partials, n, block_n, tile, N, field, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The exponentials of a tile, and of each row their sums before and after rounding."""
    e = tl.exp(x)
    rounded = e.to(exps.dtype)
    # in one reduction, or registers spill
    total, rounded_total = tl.reduce((e, rounded.to(tl.float32)), 1, _add)
    out = partials + tl.cast(tile, tl.int64) * N + n
    tl.store(out, total, mask=n < N)
    tl.store(out + field, rounded_total, mask=n < N)
    exps.store([block_n * BLOCK_N, tile * BLOCK_V], rounded)


@triton.jit
def exps_fwd_kernel(
    hidden,  # descriptor of blocks (BLOCK_N, BLOCK_H) of (N, H); what lies beyond reads as 0
    weight,  # descriptor of blocks (BLOCK_V, BLOCK_H) of the slice, (Vs, H)
    exps,  # descriptor of blocks (BLOCK_N, BLOCK_V) of (N, Vs) and its padding; filled
    labels,  # (N,) int64
    state,  # (9, N) fp32: m
    partials,  # (3, tiles, N) fp32: sum of e, sum of rounded e, max of z - m; (1, tiles, N): sum of e under a softcap
    N,
    Vs,
    H,
    first,  # vocabulary index of column 0
    linear,  # x = h w * linear
    cap,
    HAS_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    blocks_n, tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(Vs, BLOCK_V)
    field = tl.cast(tiles, tl.int64) * N
    # as one loop with the one inside it: the copies for the next tile are under way while this one is written
    for program in tl.range(tl.program_id(0), blocks_n * tiles, tl.num_programs(0), flatten=True):
        block_n, tile = place(program, blocks_n, tiles, GROUP)
        x = multiply(hidden, weight, block_n, tile, H, "ieee", BLOCK_N, BLOCK_V, BLOCK_H)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_CAP:
            e, d = capped(x, n, tile, labels, N, first, Vs, linear, cap, BLOCK_V)
            d = d.to(exps.dtype)
            # beside the other in one reduction, or registers spill
            total, _ = tl.reduce((e, d.to(tl.float32)), 1, _add)
            tl.store(partials + tile.to(tl.int64) * N + n, total, mask=n < N)
            exps.store([block_n * BLOCK_N, tile * BLOCK_V], d)
        else:
            reference = tl.load(state + n, mask=n < N, other=0.0)
            x = others(x * linear - reference[:, None], -float("inf"), n, tile, labels, N, first, Vs, BLOCK_V)
            # before x is overwritten: in the other order registers spill
            tl.store(partials + 2 * field + tile.to(tl.int64) * N + n, tl.max(x, 1), mask=n < N)
            write(x, exps, partials, n, block_n, tile, N, field, BLOCK_N, BLOCK_V)


@triton.jit
def moved(reference, top, s):
    """The reference after a slice whose largest z - m is `top`, on top of a sum s: once there is one, it only rises."""
    too_low = (s == 0) & (top < -FAR) & (top > -float("inf"))
    return tl.where((top > FAR) | too_low, reference + top, reference)


@triton.jit
def repair_fwd_kernel(
    hidden,  # as in exps_fwd_kernel
    weight,
    exps,
    labels,
    state,  # (9, N) fp32: m, s before the slice
    partials,  # (3, tiles, N) fp32: sums, written anew; max of z - m, relative to the m of the state
    N,
    Vs,
    H,
    first,
    state_stride,
    linear,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block_n, tiles = tl.program_id(0), tl.cdiv(Vs, BLOCK_V)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    reference = tl.load(state + n, mask=n < N, other=0.0)
    s = tl.load(state + n + SUM * tl.cast(state_stride, tl.int64), mask=n < N, other=1.0)
    field = tl.cast(tiles, tl.int64) * N
    found = moved(reference, largest(partials + 2 * field, n, N, tiles, BLOCK_N, BLOCK_T), s)
    if tl.max((found != reference).to(tl.int32), 0) > 0:
        for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
            x = multiply(hidden, weight, block_n, tile, H, "ieee", BLOCK_N, BLOCK_V, BLOCK_H)
            x = others(x * linear - found[:, None], -float("inf"), n, tile, labels, N, first, Vs, BLOCK_V)
            write(x, exps, partials, n, block_n, tile, N, field, BLOCK_N, BLOCK_V)


@triton.jit
def settle_fwd_kernel(
    state,  # (9, N) fp32: m and the two sums of e are those after the slice
    partials,  # as exps_fwd_kernel and repair_fwd_kernel leave them: sums relative to the m after the slice
    u,  # (N, H) fp32, once it holds sums; rescaled where m moved
    N,
    H,
    tiles,
    state_stride,
    HAS_CAP: tl.constexpr,
    BEGUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, t = n < N, tl.arange(0, BLOCK_T)
    step, field = tl.cast(state_stride, tl.int64), tl.cast(tiles, tl.int64) * N
    sums, rounded_sums = state + n + SUM * step, state + n + ROUNDED * step
    reference, s = tl.load(state + n, mask=inside, other=0.0), tl.load(sums, mask=inside, other=1.0)
    if HAS_CAP:
        found = tl.zeros_like(reference)
    else:
        found = moved(reference, largest(partials + 2 * field, n, N, tiles, BLOCK_N, BLOCK_T), s)
    decay = tl.where(s == 0, 0.0, tl.exp(reference - found))
    total, rounded = s * decay, tl.load(rounded_sums, mask=inside, other=1.0) * decay
    for start in range(0, tiles, BLOCK_T):
        at = (start + t).to(tl.int64)[:, None] * N + n[None, :]
        mask = (start + t < tiles)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partials + at, mask=mask, other=0.0), 0)
        if not HAS_CAP:
            rounded += tl.sum(tl.load(partials + field + at, mask=mask, other=0.0), 0)
    if HAS_CAP:
        rounded = total
    tl.debug_barrier()  # before a faster warp overwrites the state that another has to read
    tl.store(state + n, found, mask=inside)
    tl.store(sums, total, mask=inside)
    tl.store(rounded_sums, rounded, mask=inside)
    if BEGUN and not HAS_CAP:
        if tl.max((found != reference).to(tl.int32), 0) > 0:
            k = tl.arange(0, BLOCK_H)
            for start in range(0, H, BLOCK_H):
                at = u + n.to(tl.int64)[:, None] * H + (start + k)[None, :]
                mask = inside[:, None] & (start + k < H)[None, :]
                tl.store(at, tl.load(at, mask=mask, other=0.0) * decay[:, None], mask=mask)


def exps_fwd(
    hidden: Tensor,  # (N, H), reached by the copy engine, as are weight and out
    weight: Tensor,  # (Vs, H) of the same dtype
    labels: Tensor,  # (N,) int64
    state: Tensor,  # (9, N) fp32, rows contiguous
    u: Tensor | None,  # (N, H) contiguous, once it holds sums
    out: Tensor,  # (N, Vs); filled
    first: int,
    linear: float,
    cap: float | None,
) -> None:
    """Write the exponentials of a slice, add their sums to `state`, and rescale u where the reference moved."""
    (N, H), Vs = hidden.shape, weight.shape[0]
    kind = blocks.architecture(hidden.device)
    block_n, block_v, block_h, warps, stages = exponential_blocks(kind, hidden.element_size(), cap is not None)
    blocks_n, tiles = cdiv(N, block_n), cdiv(Vs, block_v)
    fields = blocks.exponential_fields(cap is not None)
    partials = torch.empty((fields, tiles, N), dtype=torch.float32, device=hidden.device)
    # with its padding, which is written as zeros
    filled = TensorDescriptor(out, [N, reach(out)], list(out.stride()), [block_n, block_v])
    shared = *blocks_of(hidden, weight, block_n, block_v, block_h), filled, labels, state, partials, N, Vs, H, first
    constants = {
        "BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_H": block_h,
        "num_warps": warps, "num_stages": stages,
    } | OPTIONS  # fmt: skip
    most = multiprocessors(hidden.device)
    of_call = linear, cap or 1.0
    exps_fwd_kernel[(min(blocks_n * tiles, most),)](*shared, *of_call, HAS_CAP=cap is not None, GROUP=8, **constants)
    if cap is None:
        parts = min(tiles, cdiv(most, blocks_n))
        constants["num_stages"] = REPAIR_STAGES.get(kind, stages)
        repair_fwd_kernel[(blocks_n, parts)](*shared, state.stride(0), linear, BLOCK_T=COMBINE_BLOCK_T, **constants)
    settle(state, partials, u, H, cap)


def settle(state: Tensor, partials: Tensor, u: Tensor | None, H: int, cap: float | None) -> None:
    _, tiles, N = partials.shape
    settle_fwd_kernel[(cdiv(N, COMBINE_BLOCK_N),)](
        state, partials, u, N, H, tiles, state.stride(0), HAS_CAP=cap is not None, BEGUN=u is not None,
        BLOCK_N=COMBINE_BLOCK_N, BLOCK_T=COMBINE_BLOCK_T, BLOCK_H=64, **OPTIONS,
    )  # fmt: skip
