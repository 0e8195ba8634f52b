"""Kernels over two tiles of logits, of a policy and of a reference, one program per row: their KL and its gradient.

`kl_fwd_kernel` folds both tiles into the running statistics of their rows: maxima and sums of exponentials of both, and
the sum of exp(z_ref - max) (z_ref - z). With p and q the distributions of policy and reference, `kl_bwd_kernel`
overwrites the policy's tile by (p - q) dz / dx times a factor, a result that may be half as wide as the tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import KL_BLOCK, KL_WARPS, OPTIONS, next_power_of_2
from .math import KL_GAP, KL_REF_SUM, KL_REF_TOP, KL_SUM, sech2, softcap_logit
from .tile import load_logits, narrowed, reach


@triton.jit
def kl_fwd_kernel(
    tile,  # (C, Vs) fp32 x of the policy, without the bias
    ref_tile,  # (C, Vs) fp32 x of the reference, likewise
    bias,  # (Vs,) fp32, times linear
    ref_bias,  # (Vs,) fp32
    state,  # (5, C): max, sum, max and sum of the reference, sum exp(z_ref - max) (z_ref - z)
    Vs,
    reach,  # Vs, and the padding of rows
    tile_stride,
    state_stride,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    at = state + row
    c = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), -float("inf"), tl.float32)
    ref_tops = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, reach, BLOCK):
        v = start + c
        x = load_logits(tile + row * tile_stride, bias, v, Vs, reach, HAS_BIAS)
        x_ref = load_logits(ref_tile + row * tile_stride, ref_bias, v, Vs, reach, HAS_REF_BIAS)
        tops = tl.maximum(tops, tl.where(v < Vs, x, -float("inf")))
        ref_tops = tl.maximum(ref_tops, tl.where(v < Vs, x_ref, -float("inf")))
    top, ref_top = tl.max(tops, 0), tl.max(ref_tops, 0)
    if HAS_CAP:  # monotone
        top, ref_top = softcap_logit(top, cap), softcap_logit(ref_top, cap)

    old, ref_old = tl.load(at), tl.load(at + KL_REF_TOP * step)
    top, ref_top = tl.maximum(old, top), tl.maximum(ref_old, ref_top)
    sums = tl.zeros((BLOCK,), tl.float32)
    ref_sums = tl.zeros((BLOCK,), tl.float32)
    gaps = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, reach, BLOCK):
        v = start + c
        # in this order: in the other ptxas spills under Triton 3.9
        z_ref = load_logits(ref_tile + row * tile_stride, ref_bias, v, Vs, reach, HAS_REF_BIAS)
        z = load_logits(tile + row * tile_stride, bias, v, Vs, reach, HAS_BIAS)
        if HAS_CAP:
            z, z_ref = softcap_logit(z, cap), softcap_logit(z_ref, cap)
        e_ref = tl.where(v < Vs, tl.exp(z_ref - ref_top), 0.0)
        sums += tl.where(v < Vs, tl.exp(z - top), 0.0)
        ref_sums += e_ref
        gaps += tl.where(e_ref > 0, e_ref * (z_ref - z), 0.0)  # not 0 * inf
    ref_decay = tl.exp(ref_old - ref_top)
    # every load of the state comes before a reduction, whose barrier comes before every store
    s, ref_s, gap = tl.load(at + KL_SUM * step), tl.load(at + KL_REF_SUM * step), tl.load(at + KL_GAP * step)
    total = tl.sum(sums, 0)
    tl.store(at, top)
    tl.store(at + KL_SUM * step, s * tl.exp(old - top) + total)
    tl.store(at + KL_REF_TOP * step, ref_top)
    tl.store(at + KL_REF_SUM * step, ref_s * ref_decay + tl.sum(ref_sums, 0))
    tl.store(at + KL_GAP * step, gap * ref_decay + tl.sum(gaps, 0))


@triton.jit
def kl_bwd_kernel(
    tile,  # (C, Vs) fp32 x of the policy, without the bias
    ref_tile,  # (C, Vs) fp32 x of the reference, likewise
    bias,  # (Vs,) fp32, times linear
    ref_bias,  # (Vs,) fp32
    out,  # (C, Vs), in the memory of `tile`
    state,  # (5, C): max, log-sum, max and log-sum of the reference
    coefficient,  # (C,); where it is 0 the result is too, whatever the logits
    Vs,
    reach,  # Vs, and the padding of rows
    tile_stride,
    out_stride,
    state_stride,
    cap,
    lift,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.cast(state_stride, tl.int64)
    top, log_sum = tl.load(state + row), tl.load(state + row + KL_SUM * step)
    ref_top, ref_log_sum = tl.load(state + row + KL_REF_TOP * step), tl.load(state + row + KL_REF_SUM * step)
    used = tl.load(coefficient + row) != 0
    c = tl.arange(0, BLOCK)
    for start in range(0, reach, BLOCK):
        v = start + c
        x = load_logits(tile + row * tile_stride, bias, v, Vs, reach, HAS_BIAS)
        z, z_ref = x, load_logits(ref_tile + row * tile_stride, ref_bias, v, Vs, reach, HAS_REF_BIAS)
        if HAS_CAP:
            z, z_ref = softcap_logit(z, cap), softcap_logit(z_ref, cap)
        d = tl.exp(z - top - log_sum) - tl.exp(z_ref - ref_top - ref_log_sum)
        if HAS_CAP:
            d *= sech2(x)
        d = tl.where(used, d, 0.0)
        if NARROW:
            tl.debug_barrier()
        tl.store(out + row * out_stride + v, (d * lift).to(out.dtype.element_ty), mask=v < reach)


def program(columns: int) -> dict[str, int]:
    """Entries that a program takes at once, and its warps: of four entries per thread where the tile is narrow."""
    block = min(KL_BLOCK, next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(KL_WARPS, block * KL_WARPS // KL_BLOCK))} | OPTIONS


def kl_fwd(
    tile: Tensor,  # (C, Vs) fp32, rows contiguous, without the bias
    ref_tile: Tensor,  # (C, Vs) fp32, rows contiguous, without the bias
    bias: Tensor | None,  # (Vs,) fp32 contiguous, times linear
    ref_bias: Tensor | None,  # (Vs,) fp32 contiguous, times linear
    state: Tensor,  # (5, C), rows contiguous
    cap: float | None,
) -> None:
    """Fold tiles of policy and reference into `state`."""
    C, Vs = tile.shape
    kl_fwd_kernel[(C,)](
        tile,
        ref_tile,
        bias,
        ref_bias,
        state,
        Vs,
        reach(tile, ref_tile),
        tile.stride(0),
        state.stride(0),
        cap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_REF_BIAS=ref_bias is not None,
        HAS_CAP=cap is not None,
        **program(Vs),
    )


def kl_bwd(
    tile: Tensor,  # (C, Vs) fp32, rows contiguous, without the bias; overwritten
    ref_tile: Tensor,  # (C, Vs) fp32, rows contiguous, without the bias
    bias: Tensor | None,  # (Vs,) fp32 contiguous, times linear
    ref_bias: Tensor | None,  # (Vs,) fp32 contiguous, times linear
    state: Tensor,  # (5, C), rows contiguous
    coefficient: Tensor,  # (C,) contiguous
    cap: float | None,
    lift: float,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """Overwrite the policy's tile by the gradient of its logits, times `lift`."""
    C, Vs = tile.shape
    out = narrowed(tile, dtype)
    kl_bwd_kernel[(C,)](
        tile,
        ref_tile,
        bias,
        ref_bias,
        out,
        state,
        coefficient,
        Vs,
        reach(tile, ref_tile),
        tile.stride(0),
        out.stride(0),
        state.stride(0),
        cap or 1.0,
        lift,
        HAS_BIAS=bias is not None,
        HAS_REF_BIAS=ref_bias is not None,
        HAS_CAP=cap is not None,
        NARROW=dtype != tile.dtype,
        **program(Vs),
    )
    return out
