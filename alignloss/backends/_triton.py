"""The primitives as launches of the Triton kernels, with the signatures of `_torch`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import blocks
from ..kernels import exps as exps_kernels
from ..kernels import kl as kl_kernels
from ..kernels import rows as row_kernels
from ..kernels import sequence as sequence_kernels
from ..kernels import stats as stats_kernels
from ..kernels import sums as sums_kernels
from ..kernels import tile as tile_kernels
from . import ENTROPY, IS_TOP1, LOG_SUM_SQ, MEAN_LOGITS, Targets, Tokens, Transform


def gather(
    tokens: Tokens, part: slice, labels: Tensor, rows: Tensor | None, state: Tensor, targets: Targets | None = None
) -> None:
    hidden, all_labels, index = _of_part(tokens, part)
    assert hidden is not None
    given = hidden, all_labels, index, rows, labels, state, tokens.ignore_index, tokens.compute_dtype
    row_kernels.gather_fwd(*given, *(targets or ()))


def _of_part(tokens: Tokens, part: slice) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """hidden, labels, index such that scored token i of the part is row index[i], or row i without an index."""
    if tokens.token_index is not None:
        return tokens.hidden, tokens.labels, tokens.token_index[part]
    return None if tokens.hidden is None else tokens.hidden[part], tokens.labels[part], None


def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    transform: Transform,
    stats: int,
    workspace_bytes: int,
) -> bool:
    # is_top1 compares the target with the others: it takes all logits from one GEMM, or ties would break
    if stats & IS_TOP1 or weight.stride(1) != 1 or hidden.stride(1) != 1:
        return False
    extras, cap = _extras(stats), transform.cap
    kind = blocks.architecture(weight.device)
    # whether the reference of a row is known before its GEMM
    known = kind in blocks.FIXED_REFERENCE if cap is None else blocks.takes_cap(kind, cap)
    plain = weight.dtype == torch.bfloat16 and bias is None and not extras
    known = known and plain and stats_kernels.copies(kind, hidden, weight)
    row_bytes = blocks.partial_bytes_per_row(kind, weight.element_size(), len(weight), cap is not None, known, extras)
    block = max(blocks.COMBINE_BLOCK_N, workspace_bytes // row_bytes)
    precision = _gemm_precision()
    for start in range(0, len(labels), block):
        part = slice(start, start + block)
        if known:
            sums_kernels.sums_fwd(hidden[part], weight, labels[part], state[:, part], transform.linear, cap)
            continue
        stats_kernels.stats_fwd(
            hidden[part],
            weight,
            bias,
            labels[part],
            state[:, part],
            transform.linear,
            cap,
            extras,
            precision,
        )
    return True


def _gemm_precision() -> str:
    """How cuBLAS multiplies float32 operands as torch is set: "tf32" or "ieee"."""
    matmul = torch.backends.cuda.matmul
    # the older switch raises once the newer ones were used; torch before 2.9 has the older one alone
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def fold(
    tile: Tensor,
    bias: Tensor | None,
    scratch: Tensor,
    state: Tensor,
    labels: Tensor,
    first: int,
    transform: Transform,
    stats: int,
    derivatives: int,
    u: Tensor | None,
    u2: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    both = derivatives == 2
    spare, extras = scratch[0] if both else None, both or _extras(stats)
    return tile_kernels.fold_fwd(
        tile, bias, spare, state, labels, u, u2, first, transform.cap, derivatives, extras, dtype, out
    )


def exponentials(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    state: Tensor,
    u: Tensor | None,
    out: Tensor,
    first: int,
    transform: Transform,
) -> None:
    """`fold` of one derivative with the GEMM before it, for operands that the copy engine reaches."""
    exps_kernels.exps_fwd(rows, weight, labels, state, u, out, first, transform.linear, transform.cap)


def finish(
    tokens: Tokens,
    part: slice,
    labels: Tensor,
    state: Tensor,
    u: Tensor | None,
    u2: Tensor | None,
    weight: Tensor,
    transform: Transform,
    outputs: Sequence[Tensor | None],
    dlogp: Tensor | None,
    dentropy: Tensor | None,
) -> None:
    index = None
    if tokens.token_index is None:
        outputs = [None if output is None else output[part] for output in outputs]
    else:
        index = tokens.token_index[part]
    row_kernels.finish_fwd(
        state, labels, index, u, u2, weight, *outputs, dlogp, dentropy, tokens.ignore_index, transform.cap
    )


def weigh(
    tokens: Tokens,
    part: slice,
    labels: Tensor,
    state: Tensor,
    transform: Transform,
    dlogps: Tensor,
    dentropies: Tensor | None,
    coefficient: Tensor,
    mix: Tensor | None,
    unit: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    dhidden: Tensor | None,
    rows: Tensor | None,
    scaled: Tensor | None,
) -> None:
    hidden, all_labels, index = _of_part(tokens, part)
    if index is None:
        dlogps = dlogps[part]
        dentropies, dhidden = (None if t is None else t[part] for t in (dentropies, dhidden))
    row_kernels.rows_bwd(
        dlogps,
        dentropies,
        all_labels,
        index,
        hidden,
        state,
        dlogp,
        dentropy,
        unit,
        dhidden,
        labels,
        coefficient,
        mix,
        rows,
        scaled,
        tokens.ignore_index,
        transform.slope,
        transform.cap,
        tokens.compute_dtype,
    )


def dlogits(
    tile: Tensor,
    bias: Tensor | None,
    scratch: Tensor,
    state: Tensor,
    labels: Tensor,
    first: int,
    transform: Transform,
    coefficient: Tensor,
    mix: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return tile_kernels.dlogits_bwd(tile, bias, state, labels, coefficient, mix, first, transform.cap, dtype)


def held_dlogits(
    tile: Tensor,
    reference: Tensor,
    state: Tensor,
    labels: Tensor,
    first: int,
    transform: Transform,
    coefficient: Tensor,
) -> None:
    tile_kernels.held_bwd(tile, reference, state, labels, coefficient, first, transform.cap)


def kl_fold(
    tile: Tensor,
    ref_tile: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    scratch: Tensor,
    state: Tensor,
    transform: Transform,
) -> None:
    kl_kernels.kl_fwd(tile, ref_tile, bias, ref_bias, state, transform.cap)


def kl_dlogits(
    tile: Tensor,
    ref_tile: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    scratch: Tensor,
    state: Tensor,
    transform: Transform,
    coefficient: Tensor,
    lift: float,
    dtype: torch.dtype,
) -> Tensor:
    return kl_kernels.kl_bwd(tile, ref_tile, bias, ref_bias, state, coefficient, transform.cap, lift, dtype)


def scale_rows(values: Tensor, coefficient: Tensor, factor: Tensor, index: Tensor | None, out: Tensor) -> None:
    row_kernels.scale_rows_bwd(values, coefficient, factor, *_contiguous(index), out)


def scale(gradient: Tensor, factor: Tensor) -> None:
    row_kernels.scale_bwd(gradient, factor)


def sequence_sum(values: Tensor, cu_seqlens: Tensor | None, sequences: int, token_weights: Tensor | None) -> Tensor:
    return sequence_kernels.sequence_fwd(*_contiguous(values, token_weights, cu_seqlens), sequences)


def sequence_scatter(dsums: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None, tokens: int) -> Tensor:
    return sequence_kernels.sequence_bwd(*_contiguous(dsums, token_weights, cu_seqlens), tokens)


def preference(
    values: Tensor,
    token_weights: Tensor | None,
    labels: Tensor,
    nll_labels: Tensor,
    cu_seqlens: Tensor | None,
    sequences: int,
    ref_logps: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    vectors = _contiguous(values, token_weights, labels, nll_labels, cu_seqlens)
    return sequence_kernels.preference_fwd(*vectors, sequences, *_contiguous(ref_logps), *options)


def preference_backward(
    dloss: Tensor,
    slopes: Tensor,
    scales: Tensor,
    token_weights: Tensor | None,
    labels: Tensor,
    nll_labels: Tensor,
    cu_seqlens: Tensor | None,
    paired: bool,
    ignore_index: int,
) -> Tensor:
    vectors = _contiguous(token_weights, labels, nll_labels, cu_seqlens)
    return sequence_kernels.preference_bwd(dloss, slopes, scales, *vectors, paired, ignore_index)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels index vectors as contiguous."""
    return [None if t is None else t.contiguous() for t in tensors]


def _extras(stats: int) -> bool:
    return bool(stats & (ENTROPY | MEAN_LOGITS | LOG_SUM_SQ))
