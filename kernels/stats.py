"""Statistics of the logits of every row in one GEMM that never writes a logits tile, and their combination.

For each row and each tile of BLOCK_V vocabulary entries, over v != y:

    m = max z_v,  s = sum e_v,  and on request sum (z_v - m) e_v, sum z_v (y included), sum e_v^2,  e_v = exp(z_v - m)

`combine_fwd_kernel` merges the tiles of a row in a fixed order. The logit of the target is in the state before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import blocks
from .blocks import COMBINE_BLOCK_N, COMBINE_BLOCK_T, COPY_ENGINE, OPTIONS, cdiv, gemm_blocks, reached
from .math import LOWEST, SUM, SUM_EE, SUM_Z, SUM_ZE, TOP, softcap_logit


@triton.jit
def place(program, blocks_n, tiles, GROUP: tl.constexpr):
    """The block of rows and the tile of a program: GROUP blocks share each tile of the weight while it is cached."""
    group = program // (GROUP * tiles)
    first = group * GROUP
    size = tl.minimum(blocks_n - first, GROUP)
    return first + (program % (GROUP * tiles)) % size, (program % (GROUP * tiles)) // size


@triton.jit
def store_statistics(
    x,  # (BLOCK_N, BLOCK_V) fp32 products
    block_n,
    tile,
    bias,
    labels,
    partials,
    N,
    V,
    linear,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The statistics of one tile of logits."""
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x *= linear
    if HAS_BIAS:
        x += tl.load(bias + v, mask=v < V, other=0.0)[None, :]
    z = softcap_logit(x, cap) if HAS_CAP else x
    label = tl.load(labels + n, mask=n < N, other=-1)
    rest = z
    # few tiles hold the end of the vocabulary or a label of theirs; elsewhere nothing is compared entry by entry
    first = tile * BLOCK_V
    here = tl.max(((label >= first) & (label < first + BLOCK_V)).to(tl.int32), 0)
    if (here > 0) | (first + BLOCK_V > V):
        rest = tl.where((v < V)[None, :] & (v[None, :] != label[:, None]), z, -float("inf"))
    m = tl.max(rest, 1)
    base = tl.where(m == -float("inf"), 0.0, m)
    e = tl.exp(rest - base[:, None])

    field = tl.cast(tl.cdiv(V, BLOCK_V), tl.int64) * N
    out = partials + tl.cast(tile, tl.int64) * N + n
    tl.store(out, m, mask=n < N)
    tl.store(out + field, tl.sum(e, 1), mask=n < N)
    if EXTRAS:
        tl.store(out + 2 * field, tl.sum(tl.where(e > 0, (rest - base[:, None]) * e, 0.0), 1), mask=n < N)
        tl.store(out + 3 * field, tl.sum(tl.where((v < V)[None, :], z, 0.0), 1), mask=n < N)
        # the choice keeps the product from being fused into the sum's first exchange, which lanes would round apart
        tl.store(out + 4 * field, tl.sum(tl.where(e == 0, 0.0, e * e), 1), mask=n < N)


@triton.jit
def stats_fwd_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    bias,  # (V,) fp32, times linear
    labels,  # (N,) int64
    partials,  # (fields, tiles, N) fp32: m, s, then sum (z - m) e, sum z, sum e^2
    N,
    V,
    H,
    linear,  # x = (h w + b) * linear
    cap,
    hidden_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block_n, tile = place(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_H)
    # rows beyond the end repeat the last one, so that only the tail of H needs a mask
    h_rows = hidden + tl.minimum(n, N - 1).to(tl.int64)[:, None] * hidden_stride
    w_rows = weight + tl.minimum(v, V - 1).to(tl.int64)[None, :] * weight_stride
    x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        inside = start + k < H
        h = tl.load(h_rows + (start + k)[None, :], mask=inside[None, :], other=0.0)
        w = tl.load(w_rows + (start + k)[:, None], mask=inside[:, None], other=0.0)
        x = tl.dot(h, w, x, input_precision=PRECISION)
    store_statistics(
        x, block_n, tile, bias, labels, partials, N, V, linear, cap, HAS_BIAS, HAS_CAP, EXTRAS, BLOCK_N, BLOCK_V
    )


@triton.jit
def multiply(
    hidden, weight, block_n, tile, H,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The products of a block of rows and a tile of entries, (BLOCK_N, BLOCK_V), which the copy engine brings."""
    x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for step in range(tl.cdiv(H, BLOCK_H)):
        h = hidden.load([block_n * BLOCK_N, step * BLOCK_H])
        w = weight.load([tile * BLOCK_V, step * BLOCK_H])
        x = tl.dot(h, w.T, x, input_precision=PRECISION)
    return x


@triton.jit
def stats_copied_fwd_kernel(
    hidden,  # descriptor of blocks (BLOCK_N, BLOCK_H) of (N, H); what lies beyond reads as 0
    weight,  # descriptor of blocks (BLOCK_V, BLOCK_H) of (V, H)
    bias,
    labels,
    partials,
    N,
    V,
    H,
    linear,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`stats_fwd_kernel` for operands that the copy engine reaches: a program takes one tile after the other."""
    blocks_n, tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    # as one loop with the one inside it: the copies for the next tile are under way while statistics are taken
    for program in tl.range(tl.program_id(0), blocks_n * tiles, tl.num_programs(0), flatten=True):
        block_n, tile = place(program, blocks_n, tiles, GROUP)
        x = multiply(hidden, weight, block_n, tile, H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H)
        store_statistics(
            x, block_n, tile, bias, labels, partials, N, V, linear, cap, HAS_BIAS, HAS_CAP, EXTRAS, BLOCK_N, BLOCK_V
        )


@triton.jit
def largest(tops, n, N, tiles, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of rows n the maximum of `tops`, (tiles, N)."""
    t = tl.arange(0, BLOCK_T)
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        at = (start + t).to(tl.int64)[:, None] * N + n[None, :]
        mask = (start + t < tiles)[:, None] & (n < N)[None, :]
        top = tl.maximum(top, tl.max(tl.load(tops + at, mask=mask, other=-float("inf")), 0))
    return top


@triton.jit
def combine_fwd_kernel(
    partials,  # (fields, tiles, N)
    state,  # (9, N) fp32: m, s, then sum (z - m) e, sum z, sum e^2, max z
    N,
    tiles,
    state_stride,
    EXTRAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    t = tl.arange(0, BLOCK_T)
    field = tl.cast(tiles, tl.int64) * N
    top = largest(partials, n, N, tiles, BLOCK_N, BLOCK_T)
    m = tl.where(top == -float("inf"), LOWEST, top)
    s = tl.zeros((BLOCK_N,), tl.float32)
    ze = tl.zeros((BLOCK_N,), tl.float32)
    z = tl.zeros((BLOCK_N,), tl.float32)
    ee = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        at = (start + t).to(tl.int64)[:, None] * N + n[None, :]
        mask = (start + t < tiles)[:, None] & inside[None, :]
        m_t = tl.load(partials + at, mask=mask, other=-float("inf"))
        s_t = tl.load(partials + at + field, mask=mask, other=0.0)
        decay = tl.exp(m_t - m[None, :])
        s += tl.sum(s_t * decay, 0)
        if EXTRAS:
            z += tl.sum(tl.load(partials + at + 3 * field, mask=mask, other=0.0), 0)
            shift = tl.where(m_t == -float("inf"), 0.0, m_t - m[None, :])
            ze_t = tl.load(partials + at + 2 * field, mask=mask, other=0.0)
            ze += tl.sum((ze_t + s_t * shift) * decay, 0)
            ee += tl.sum(tl.load(partials + at + 4 * field, mask=mask, other=0.0) * decay * decay, 0)
    out = state + n
    step = tl.cast(state_stride, tl.int64)
    tl.store(out, m, mask=inside)
    tl.store(out + SUM * step, s, mask=inside)
    tl.store(out + SUM_ZE * step, ze, mask=inside)
    tl.store(out + SUM_Z * step, z, mask=inside)
    tl.store(out + SUM_EE * step, ee, mask=inside)
    tl.store(out + TOP * step, top, mask=inside)


def copies(kind: str, *operands: Tensor) -> bool:
    """Whether the copy engine of this architecture reaches the blocks of the operands."""
    if kind not in COPY_ENGINE or (operands[0].element_size() != 2 and kind != "interpreter"):
        return False
    return all(map(reached, operands))


def multiprocessors(device: torch.device) -> int:
    return blocks.gpu_properties(device).multi_processor_count if device.type == "cuda" else 3


def blocks_of(hidden: Tensor, weight: Tensor, block_n: int, block_v: int, block_h: int) -> list[TensorDescriptor]:
    """What the copy engine reads the operands of a GEMM by."""
    return [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, block_h])
        for t, rows in ((hidden, block_n), (weight, block_v))
    ]


def stats_fwd(
    hidden: Tensor,  # (N, H), rows contiguous
    weight: Tensor,  # (V, H) of the same dtype, rows contiguous
    bias: Tensor | None,  # (V,) fp32, times linear
    labels: Tensor,  # (N,) int64
    state: Tensor,  # (9, N) fp32, rows contiguous, with the logits of the targets; all else is filled
    linear: float,
    cap: float | None,
    extras: bool,
    precision: str,
) -> None:
    """Fill `state` with the sums over v != y and the maximum of each row."""
    (N, H), V = hidden.shape, weight.shape[0]
    kind = blocks.architecture(hidden.device)
    block_n, block_v, block_h, warps, stages = gemm_blocks(kind, hidden.element_size(), extras or cap is not None)
    tiles = cdiv(V, block_v)
    programs = cdiv(N, block_n) * tiles
    partials = torch.empty((5 if extras else 2, tiles, N), dtype=torch.float32, device=hidden.device)
    shared = bias, labels, partials, N, V, H, linear, cap or 1.0
    constants = {
        "HAS_BIAS": bias is not None, "HAS_CAP": cap is not None, "EXTRAS": extras, "GROUP": 8, "PRECISION": precision,
        "BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_H": block_h, "num_warps": warps, "num_stages": stages,
    } | OPTIONS  # fmt: skip
    if copies(kind, hidden, weight):
        operands = blocks_of(hidden, weight, block_n, block_v, block_h)
        stats_copied_fwd_kernel[(min(programs, multiprocessors(hidden.device)),)](*operands, *shared, **constants)
    else:
        strides = hidden.stride(0), weight.stride(0)
        stats_fwd_kernel[(programs,)](hidden, weight, *shared, *strides, **constants)
    combine_fwd_kernel[(cdiv(N, COMBINE_BLOCK_N),)](
        partials, state, N, tiles, state.stride(0),
        EXTRAS=extras, BLOCK_N=COMBINE_BLOCK_N, BLOCK_T=COMBINE_BLOCK_T, **OPTIONS,
    )  # fmt: skip
