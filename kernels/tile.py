"""Kernels over a logits tile that a GEMM wrote, one program per row, held in registers: the tile is read once.
`held_bwd_kernel` takes several programs for a row of more than `SLICE` entries.

The GEMM leaves out the bias: the kernels add it as they read, a vector that all rows share and L2 holds.

`fold_fwd_kernel` folds the tile into the running statistics of its rows and, when the derivative is wanted, overwrites
it by e_v sech^2(x_v) with e_v = exp(z_v - m) and 0 at the target. The reference m of a row is kept until the maximum
exceeds it by `slack` nats, so the accumulated U = sum e_v W_v is rescaled almost never. The rounded e_v are summed too:
divided by that sum, the weights of the rows in U add up to 1, and what all rows share leaves the derivative. So it
does from that of the entropy, for which U2 = sum (z_v - m - c) e_v W_v is centred: c is the mean of z - m over the
entries so far, and where it moves U2 is made relative to the new one. What rounding leaves of the sum of its weights,
which is 0, is summed as well, for U to take away.

`dlogits_bwd_kernel` overwrites the tile by the gradient of the logits, divided by one factor per row: with q_v = e_v/s
over v != y it is D_y at the target and -q_v D_v elsewhere. A gradient of the entropy mixes in by three numbers per row:
then it is mix_2 D_y at the target, -q_v D_v (mix_0 + mix_1 (z_v - m)) elsewhere.

`held_bwd_kernel` makes the same of a tile that was kept as the exponentials of `fold_fwd_kernel`.

The result may be half as wide as the tile: it then fills the first half of each row's memory, which is written only
after the whole row has been read; hence the barriers.

Where rows are padded to a multiple of `PITCH` entries, the padding is read and written with them: memory is reached in
vectors only where the bound of a row is a multiple of their length. What is read there counts for nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import CAPPED_SLICE, OPTIONS, PITCH, SLICE, TILE_ENTRIES, TILE_WARPS, WIDTH_BLOCK, cdiv, next_power_of_2
from .math import ROUNDED, ROUNDED_ZE, SUM, SUM_EE, SUM_Z, SUM_ZE, TARGET, TOP, sech2, softcap_logit


@triton.jit
def column(label, first, Vs):
    """The column of an int64 label in a tile of Vs entries from `first` on, as int32; -1 where it is in none."""
    v = label - first
    return tl.where((v >= 0) & (v < Vs), v, -1).to(tl.int32)


@triton.jit
def load_logits(x_row, bias, v, Vs, reach, HAS_BIAS: tl.constexpr):
    """x at the entries v of a row, with the bias up to Vs."""
    # a mask that followed the target would split the load into single entries
    x = tl.load(x_row + v, mask=v < reach, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + v, mask=v < Vs, other=0.0)
    return x


@triton.jit
def rescale(u, u2, row, H, moved, decay, SAVE: tl.constexpr, BLOCK: tl.constexpr):
    """Make the sums of a row relative to another reference, and U2 to a centre that is `moved` lower."""
    c = tl.arange(0, BLOCK)
    for start in range(0, H, BLOCK):
        k = start + c
        u_k = tl.load(u + row * H + k, mask=k < H, other=0.0)
        if SAVE > 1:
            u2_k = tl.load(u2 + row * H + k, mask=k < H, other=0.0)
            tl.store(u2 + row * H + k, (u2_k + u_k * moved) * decay, mask=k < H)
        tl.store(u + row * H + k, u_k * decay, mask=k < H)


@triton.jit
def keep(out, mask, d, total, HAS_CAP: tl.constexpr):
    """Write the exponentials; their sum as rounded, or `total`, that of e."""
    kept = d.to(out.dtype.element_ty)
    tl.store(out, kept, mask=mask)
    if not HAS_CAP and out.dtype.element_ty != tl.float32:
        total = tl.sum(kept.to(tl.float32), 0)
    return total


@triton.jit
def keep_centred(
    out2, mask, x, d, ze, s, ze_total, sums, shift, HAS_CAP: tl.constexpr, sum_at, rounded_ze, rounded, decay
):
    """Write (z - m - c) d and add up what rounding leaves of its sum; how much lower than before c is."""
    old_centre, centre = tl.where(s == 0, 0.0, ze / s), tl.where(sums == 0, 0.0, ze_total / sums)
    moved = shift + old_centre - centre
    zd = tl.where(d == 0, 0.0, (x - centre) * d).to(out2.dtype.element_ty)
    tl.store(out2, zd, mask=mask)
    if not HAS_CAP:
        tl.store(sum_at, (rounded_ze + rounded * moved) * decay + tl.sum(zd.to(tl.float32), 0))
    return moved


@triton.jit
def fold_fwd_kernel(
    tile,  # (C, Vs) fp32 x without the bias
    bias,  # (Vs,) fp32, times linear
    out,  # (C, Vs) exponentials, in the memory of `tile` or of their own
    out2,  # (C, Vs) (z - m - c) times the exponentials
    state,  # (9, C): m, s, x_y, sum (z - m) e, sum z, sum e^2, max z, rounded sums
    labels,  # (C,) int64
    u,  # (C, H) fp32
    u2,  # (C, H) fp32
    first,  # vocabulary index of column 0
    Vs,
    reach,  # Vs, and the padding
    H,
    tile_stride,
    out_stride,
    out2_stride,
    state_stride,
    cap,
    slack,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SAVE: tl.constexpr,
    EXTRAS: tl.constexpr,
    RESCALE: tl.constexpr,  # whether u (and u2) hold sums of earlier slices
    BLOCK: tl.constexpr,  # at least reach
    ROW_BLOCK: tl.constexpr,  # of H
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    at = state + row
    x_row = tile + row * tile_stride
    target = column(tl.load(labels + row), first, Vs)
    v = tl.arange(0, BLOCK)
    x = load_logits(x_row, bias, v, Vs, reach, HAS_BIAS)
    z = softcap_logit(x, cap) if HAS_CAP else x
    if EXTRAS:
        z_total = tl.sum(tl.where(v < Vs, z, 0.0), 0)
    # with nothing to mask later a row takes 57 registers for 32 of its entries, not 90
    z = tl.where((v < Vs) & (v != target), z, -float("inf"))
    top = tl.max(z, 0)
    if target >= 0:
        tl.store(at + TARGET * step, load_logits(x_row, bias, target, Vs, reach, HAS_BIAS))
    if SAVE > 0:
        tl.debug_barrier()  # before a faster warp overwrites what another has to read

    old = tl.load(at)
    m = tl.where(top > old + slack, top, old)
    shift = old - m
    decay = tl.exp(shift)
    e = tl.exp(z - m)
    # every load of the state comes before a reduction, whose barrier comes before every store
    s, largest = tl.load(at + SUM * step), tl.load(at + TOP * step)
    rounded, rounded_ze = tl.load(at + ROUNDED * step), tl.load(at + ROUNDED_ZE * step)
    if EXTRAS:
        ze, z_sum, ee = tl.load(at + SUM_ZE * step), tl.load(at + SUM_Z * step), tl.load(at + SUM_EE * step)
    total = tl.sum(e, 0)
    sums = s * decay + total
    tl.store(at, m)
    tl.store(at + SUM * step, sums)
    tl.store(at + TOP * step, tl.maximum(largest, top))
    if EXTRAS:
        ze_total = (ze + s * shift) * decay + tl.sum(tl.where(e == 0, 0.0, (z - m) * e), 0)
        tl.store(at + SUM_ZE * step, ze_total)
        tl.store(at + SUM_Z * step, z_sum + z_total)
        # the choice keeps the product from being fused into the sum's first exchange, which lanes would round apart
        tl.store(at + SUM_EE * step, ee * decay * decay + tl.sum(tl.where(e == 0, 0.0, e * e), 0))
    if SAVE > 0:
        d = e * sech2(x) if HAS_CAP else e
        kept = keep(out + row * out_stride + v, v < reach, d, total, HAS_CAP)
        tl.store(at + ROUNDED * step, rounded * decay + kept)
        if SAVE > 1:
            moved = keep_centred(
                out2 + row * out2_stride + v, v < reach, z - m, d, ze, s, ze_total, sums, shift, HAS_CAP,
                at + ROUNDED_ZE * step, rounded_ze, rounded, decay,
            )  # fmt: skip
    if RESCALE:
        if SAVE > 1:
            rescale(u, u2, row, H, moved, decay, SAVE, ROW_BLOCK)
        elif m != old:
            rescale(u, u2, row, H, 0.0, decay, SAVE, ROW_BLOCK)


@triton.jit
def dlogits_bwd_kernel(
    tile,  # (C, Vs) fp32 x without the bias
    bias,  # (Vs,) fp32, times linear
    out,  # (C, Vs), in the memory of `tile`
    state,  # (9, C): m, s
    labels,  # (C,) int64
    coefficient,  # (C,); where it is 0 the result is too, whatever the logits
    mix,  # (3, C)
    first,
    Vs,
    reach,
    tile_stride,
    out_stride,
    state_stride,
    mix_stride,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    m, s = tl.load(state + row), tl.load(state + row + SUM * step)
    used = tl.load(coefficient + row) != 0
    target = column(tl.load(labels + row), first, Vs)
    inverse = tl.where(s == 0, 0.0, 1.0 / s)
    a, b, at_target = 1.0, 0.0, 1.0
    if ENTROPY:
        mix_step = tl.cast(mix_stride, tl.int64)
        a, b = tl.load(mix + row), tl.load(mix + row + mix_step)
        at_target = tl.load(mix + row + 2 * mix_step)
    v = tl.arange(0, BLOCK)
    x = load_logits(tile + row * tile_stride, bias, v, Vs, reach, HAS_BIAS)
    z = softcap_logit(x, cap) if HAS_CAP else x
    # not exp(z - m - log s): rounding log s together with a large m would unbalance the sum of the q
    q = tl.exp(z - m) * inverse
    if ENTROPY:
        q = tl.where(q == 0, 0.0, q * (a + b * (z - m)))
    d = tl.where(v == target, at_target, -q)
    if HAS_CAP:
        d *= sech2(x)
    d = tl.where(used, d, 0.0)
    if NARROW:
        tl.debug_barrier()
    tl.store(out + row * out_stride + v, d.to(out.dtype.element_ty), mask=v < reach)


@triton.jit
def held_bwd_kernel(
    tile,  # (C, Vs) e sech^2(x) relative to `reference`, 0 at the target
    reference,  # (C,)
    state,  # (9, C): m, x_y, sum of rounded e
    labels,  # (C,) int64
    coefficient,  # (C,); where it is 0 the result is too
    first,
    Vs,
    reach,
    tile_stride,
    state_stride,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,  # entries of a program
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    m, rounded = tl.load(state + row), tl.load(state + row + ROUNDED * step)
    target = column(tl.load(labels + row), first, Vs)
    at_target = sech2(tl.load(state + row + TARGET * step)) if HAS_CAP else 1.0
    factor = tl.where(rounded == 0, 0.0, -tl.exp(tl.load(reference + row) - m) / rounded)
    used = tl.load(coefficient + row) != 0
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tile + row * tile_stride + v
    e = tl.load(at, mask=v < reach, other=0.0).to(tl.float32)
    d = tl.where(used, tl.where(v == target, at_target, e * factor), 0.0)
    tl.store(at, d.to(tile.dtype.element_ty), mask=v < reach)


def narrowed(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """The first part of each row's memory as a tile of another dtype; the tile itself for its own dtype."""
    return tile if dtype == tile.dtype else tile.view(dtype)[:, : tile.shape[1]]


def reach(*tiles: Tensor | None) -> int:
    """Entries of a row that the kernels may touch: those of tiles (C, Vs), and their padding where every one has it."""
    given = [tile for tile in tiles if tile is not None]
    columns = given[0].shape[1]
    padded = cdiv(columns, PITCH) * PITCH
    return padded if all(tile.stride(0) == padded for tile in given) else columns


def program(reach: int) -> dict[str, int]:
    """The entries of a program that holds a row of a tile, and its warps."""
    block = next_power_of_2(reach)
    return {"BLOCK": block, "num_warps": max(1, min(TILE_WARPS, block // TILE_ENTRIES))} | OPTIONS


def fold_fwd(
    tile: Tensor,  # (C, Vs) fp32, rows contiguous, without the bias; overwritten if save
    bias: Tensor | None,  # (Vs,) fp32 contiguous, times linear
    spare: Tensor | None,  # (C, Vs) fp32, for save == 2
    state: Tensor,  # (9, C)
    labels: Tensor,  # (C,)
    u: Tensor | None,  # (C, H) contiguous, once it holds sums
    u2: Tensor | None,  # (C, H) contiguous, once it holds sums
    first: int,
    cap: float | None,
    save: int,
    extras: bool,
    dtype: torch.dtype,  # of the result
    out: Tensor | None = None,  # (C, Vs) of this dtype, for the result in a memory of its own
) -> tuple[Tensor, Tensor | None]:
    """Fold a tile into `state`, rescale u and u2 where the reference moved, return what they have to accumulate."""
    C, Vs = tile.shape
    narrows = out is None and dtype != tile.dtype
    out = narrowed(tile, dtype) if out is None else out
    out2 = None if spare is None else narrowed(spare, dtype)
    # fp16 exponentials must stay under 65,504, and sums of their squares over the vocabulary within fp32
    slack = 8.0 if dtype == torch.float16 else 20.0
    if extras:  # the entropy of a nearly certain token would be a difference of terms as large as z - m
        slack = 0.0
    end = reach(tile, spare, None if narrows else out)
    fold_fwd_kernel[(C,)](
        tile,
        bias,
        out,
        out2,
        state,
        labels,
        u,
        u2,
        first,
        Vs,
        end,
        0 if u is None else u.shape[1],
        tile.stride(0),
        out.stride(0),
        0 if out2 is None else out2.stride(0),
        state.stride(0),
        cap or 1.0,
        slack,
        HAS_BIAS=bias is not None,
        HAS_CAP=cap is not None,
        SAVE=save,
        EXTRAS=extras,
        RESCALE=u is not None,
        ROW_BLOCK=WIDTH_BLOCK,
        **program(end),
    )
    return out, out2


def dlogits_bwd(
    tile: Tensor,  # (C, Vs) fp32, rows contiguous, without the bias; overwritten
    bias: Tensor | None,  # (Vs,) fp32 contiguous, times linear
    state: Tensor,  # (9, C)
    labels: Tensor,  # (C,)
    coefficient: Tensor,  # (C,) contiguous
    mix: Tensor | None,  # (3, C), for a gradient of the entropy
    first: int,
    cap: float | None,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """Overwrite a tile of logits by their gradient, divided by one factor per row."""
    C, Vs = tile.shape
    out, end = narrowed(tile, dtype), reach(tile)
    dlogits_bwd_kernel[(C,)](
        tile,
        bias,
        out,
        state,
        labels,
        coefficient,
        mix,
        first,
        Vs,
        end,
        tile.stride(0),
        out.stride(0),
        state.stride(0),
        0 if mix is None else mix.stride(0),
        cap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_CAP=cap is not None,
        ENTROPY=mix is not None,
        NARROW=dtype != tile.dtype,
        **program(end),
    )
    return out


def held_bwd(
    tile: Tensor,  # (C, Vs) rows contiguous; overwritten
    reference: Tensor,  # (C,) contiguous
    state: Tensor,  # (9, C)
    labels: Tensor,  # (C,)
    coefficient: Tensor,  # (C,) contiguous
    first: int,
    cap: float | None,
) -> None:
    """Overwrite a tile of exponentials by the gradient of its logits, divided by one factor per row."""
    C, Vs = tile.shape
    end = reach(tile)
    width = min(end, SLICE if cap is None else CAPPED_SLICE)
    held_bwd_kernel[(C, cdiv(end, width))](
        tile,
        reference,
        state,
        labels,
        coefficient,
        first,
        Vs,
        end,
        tile.stride(0),
        state.stride(0),
        HAS_CAP=cap is not None,
        **program(width),
    )
