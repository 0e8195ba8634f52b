"""From tokens to sequences: where they begin and end, sums over them, and the adjoint of a sum."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_like, check_tensor, check_values_exist, savable, validates
from .context import Op, device_guard, no_double_backward
from .processes import check_apart, check_sequences, checked_group


def sequence_layout(
    labels: Tensor,  # of the positions, int64 wherever ignore_index is given
    cu_seqlens: Tensor | None,
    validate: bool | None,
    real_sequences: int | None,
    ignore_index: int | None = None,
    may_be_empty: bool = False,
) -> tuple[Tensor | None, int]:
    """Offsets (S + 1,) int64 of packed sequences in the flattened labels, None for padded ones, and their number S.

    Offsets that do not fit are a ValueError where values are validated; elsewhere all -1, which makes sums NaN. With
    `ignore_index`, labels beyond the last real sequence are looked for. Sequences without tokens are taken where their
    number is given, or `may_be_empty`.
    """
    check_values_exist(labels, validates(validate, labels.device))
    if real_sequences is not None and cu_seqlens is None:
        raise ValueError("real_sequences says how many of the sequences in cu_seqlens are real; it needs cu_seqlens")
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels must be (sequences, T); got {tuple(labels.shape)}. "
                "For packed tokens pass cu_seqlens, the (S + 1,) offsets of the sequences"
            )
        return None, labels.shape[0]
    if labels.dim() != 1 and not (labels.dim() == 2 and labels.shape[0] == 1):
        raise ValueError(f"with cu_seqlens, labels must be (tokens,) or (1, tokens); got {tuple(labels.shape)}")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
        raise ValueError(
            f"cu_seqlens must be a 1-d integer tensor (S + 1,); got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != labels.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, labels on {labels.device}; move one of them")
    if real_sequences is not None:
        slots = cu_seqlens.shape[0] - 1
        whole = isinstance(real_sequences, (Integral, torch.SymInt)) and not isinstance(real_sequences, bool)
        if not whole or not 0 <= real_sequences <= slots:
            raise ValueError(
                f"real_sequences must be an int in [0, {slots}], of the sequences in cu_seqlens; got {real_sequences!r}"
            )
        cu_seqlens = cu_seqlens[: real_sequences + 1]
    validated = validates(validate, labels.device)
    counted = real_sequences is not None
    offsets = sequence_offsets(cu_seqlens, labels.numel(), not counted, may_be_empty or counted, validated)
    if counted and ignore_index is not None and validated and not torch.compiler.is_compiling():
        beyond = labels.reshape(-1)[int(offsets[-1]) :]
        if bool((beyond != ignore_index).any()):
            raise ValueError(
                f"tokens beyond the {real_sequences} real sequences, which end at {int(offsets[-1])}, belong to none "
                "and must carry ignore_index as their label"
            )
    return offsets, cu_seqlens.shape[0] - 1


def parts_layout(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    validate: bool | None,
    real_sequences: int | None,
    ignore_index: int,
    sequence_group: Any,
    vocab_group: Any,
    same: dict[str, Any],
) -> tuple[Tensor | None, int, Any]:
    """`sequence_layout`, and the ProcessGroup whose processes each hold a part of every sequence, or an empty one.

    same: what those have to have alike, by name; compared where values are validated.
    """
    group = checked_group("sequence_group", sequence_group)
    if group is not None and vocab_group is not None:
        check_apart(group, checked_group("vocab_group", vocab_group))
    layout = cu_seqlens, validate, real_sequences, ignore_index
    offsets, sequences = sequence_layout(labels, *layout, may_be_empty=group is not None)
    if group is not None and validates(validate, labels.device):
        check_sequences(group, sequences, same, labels.device)
    return offsets, sequences, group


def labelled_tokens(labels: Tensor, offsets: Tensor | None, sequences: int, ignore_index: int) -> Tensor:
    """Labelled tokens per sequence, (S,) int64, between offsets or in equal parts."""
    labelled = (labels != ignore_index).reshape(-1)
    if offsets is None:
        return labelled.view(sequences, len(labelled) // max(sequences, 1)).sum(1)
    counts = torch.nn.functional.pad(labelled.cumsum(0), (1, 0))
    return counts[offsets[1:]] - counts[offsets[:-1]]


def checked_token_weights(token_weights: Tensor | None, labels: Tensor) -> Tensor | None:
    """Token weights of the shape of labels as (M,), detached."""
    if token_weights is None:
        return None
    check_like("token_weights", token_weights, "labels", labels)
    if token_weights.is_complex():
        raise ValueError(f"token_weights must be real, got {token_weights.dtype}")
    return savable(token_weights.detach()).reshape(-1)


def masked_weights(token_weights: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    """Checked token weights (M,) in float64, 0 at ignored positions."""
    return None if token_weights is None else token_weights.double().masked_fill(labels == ignore_index, 0)


@Op
def sequence_offsets(
    cu_seqlens: Tensor,  # (S + 1,)
    tokens: int,
    whole: bool,  # the last sequence ends with the tokens
    may_be_empty: bool,  # a sequence may have no tokens
    validate: bool,
) -> Tensor:
    """Offsets (S + 1,) as int64, if they rise from 0 to `tokens`; else a ValueError with `validate`, all -1 without."""
    offsets = cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    lengths = offsets.diff()
    fits = (lengths >= (0 if may_be_empty else 1)).all() & (offsets[0] == 0)
    fits &= (offsets[-1] == tokens) if whole else (offsets[-1] <= tokens)
    if not validate:
        return torch.where(fits, offsets, -1)
    if not bool(fits):
        empty = not may_be_empty and bool((lengths >= 0).all())
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {offsets.tolist()[:8]} ..."
            + ("; where it is padded by repeated offsets, give real_sequences, how many are real" if empty else "")
        )
    return offsets


@sequence_offsets.register_fake
def _(cu_seqlens, tokens, whole, may_be_empty, validate):  # type: ignore[no-untyped-def]
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


@Op
def sequence_sum(
    values: Tensor,  # (M,) per token
    cu_seqlens: Tensor | None,  # (S + 1,) int64; None: S parts of one length
    sequences: int,
    token_weights: Tensor | None,  # (M,)
    backend: str,
) -> Tensor:  # (S,) fp64
    with device_guard(values):
        return backends.get(backend).sequence_sum(values, cu_seqlens, sequences, token_weights)


@Op
def sequence_scatter(
    dsums: Tensor,  # (S,) fp64
    cu_seqlens: Tensor | None,  # (S + 1,) int64
    token_weights: Tensor | None,  # (M,)
    tokens: int,
    backend: str,
) -> Tensor:  # (M,) float64
    with device_guard(dsums):
        return backends.get(backend).sequence_scatter(dsums, cu_seqlens, token_weights, tokens)


@sequence_sum.register_fake
def _(values, cu_seqlens, sequences, token_weights, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(sequences, dtype=torch.float64)


@sequence_scatter.register_fake
def _(dsums, cu_seqlens, token_weights, tokens, backend):  # type: ignore[no-untyped-def]
    return dsums.new_empty(tokens)


def _sequence_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, cu_seqlens, _, token_weights, backend = inputs
    ctx.save_for_backward(cu_seqlens, token_weights)
    ctx.tokens, ctx.backend = values.shape[0], backend


def _sequence_backward(ctx, dsums):  # type: ignore[no-untyped-def]
    cu_seqlens, token_weights = ctx.saved_tensors
    dvalues = sequence_scatter(dsums.contiguous(), cu_seqlens, token_weights, ctx.tokens, ctx.backend)
    return dvalues, None, None, None, None


sequence_sum.register_autograd(_sequence_backward, setup_context=_sequence_setup)
sequence_scatter.register_autograd(no_double_backward)
