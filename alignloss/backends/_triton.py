"""The primitives as launches of the Triton kernels, with the signatures of `_torch`; sums on rows stay with torch."""

from typing import Any

import torch
from torch import Tensor

from ..kernels import blocks, sequence, stats, tile
from . import ENTROPY, LOG_SUM_SQ, MEAN_LOGITS, Transform, _torch
from ._torch import derivative, finish, rest_probability

__all__ = [
    "derivative",
    "dlogits",
    "dlogits_tiles",
    "finish",
    "fold",
    "preference",
    "rest_probability",
    "scratch_tiles",
    "sequence_scatter",
    "sequence_sum",
    "statistics",
]


def scratch_tiles(cap: float | None, stats: int, save: int) -> int:
    return int(save == 2)


def dlogits_tiles(cap: float | None, entropy: bool) -> int:
    return 0


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    transform: Transform,
    wanted: int,
    workspace_bytes: int,
) -> bool:
    # the fused GEMM reads both operands in one 32- or 16-bit dtype; other cases go tile by tile
    if weight.dtype != hidden.dtype or weight.stride(1) != 1 or hidden.stride(1) != 1:
        return False
    extras = _extras(wanted)
    row_bytes = stats.partial_bytes_per_row(weight, transform.cap, extras)
    rows = max(blocks.COMBINE_BLOCK_N, workspace_bytes // row_bytes)
    precision = "tf32" if hidden.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        stats.stats_fwd(
            hidden[part],
            weight,
            bias,
            labels[part],
            state[:, part],
            transform.linear,
            transform.cap,
            extras,
            precision,
        )
    return True


def fold(
    x: Tensor,
    scratch: Tensor,
    state: Tensor,
    labels: Tensor,
    first: int,
    transform: Transform,
    wanted: int,
    save: int,
    u: Tensor | None,
    u2: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    spare = scratch[0] if save == 2 else None
    return tile.fold_fwd(
        x, spare, state, labels, u, u2, first, transform.cap, save, _extras(wanted) or save == 2, dtype
    )


def dlogits(
    x: Tensor,
    scratch: Tensor,
    state: Tensor,
    labels: Tensor,
    first: int,
    transform: Transform,
    entropy_weight: Tensor | None,
    logp_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    entropy = None
    if entropy_weight is not None and logp_weight is not None:
        entropy = (logp_weight, entropy_weight, *_torch.entropy_terms(state, transform))
    return tile.dlogits_bwd(x, state, labels, entropy, first, transform.cap, dtype)


def sequence_sum(values: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None) -> Tensor:
    return sequence.sequence_fwd(*_contiguous(values, token_weights, cu_seqlens))


def sequence_scatter(
    dsums: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None, tokens: int, dtype: torch.dtype
) -> Tensor:
    return sequence.sequence_bwd(*_contiguous(dsums, token_weights, cu_seqlens), tokens)


def preference(
    values: Tensor,
    token_weights: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    desirable: Tensor | None,
    kl: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = _contiguous(values, token_weights, labels, cu_seqlens, ref_logps, desirable, kl)
    return sequence.preference_fwd(*vectors, *options)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels index vectors as contiguous."""
    return [None if t is None else t.contiguous() for t in tensors]


def _extras(wanted: int) -> bool:
    return bool(wanted & (ENTROPY | MEAN_LOGITS | LOG_SUM_SQ))
