"""Weights of tokens and pairs: losses that differ from DPO by what counts, not by a formula."""

import torch
from torch import Tensor

from ..checks import check_like, check_number, checked_labels
from ..logprob import LogprobStats
from ..ops.sequence import labelled_tokens, sequence_layout, sequence_sum


def ld_dpo_token_weights(
    labels: Tensor,  # (2B, T), or packed (tokens,) or (1, tokens)
    *,
    tail_weight: float,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    real_sequences: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`token_weights` of LD-DPO, for labels aligned with hidden: 1 up to the shorter length of a pair, then less.

    Liu et al. 2024 (arXiv:2409.06411), whose alpha is `tail_weight` in [0, 1]: the log-probabilities of labelled tokens
    beyond min(|y_chosen|, |y_rejected|) count by it. The first half of the sequences are the chosen ones.
    `cu_seqlens` and `real_sequences` as in `sequence_logprob`.

    Returns:
        The shape of labels, float32; 0 at ignored positions.

    Example:
        >>> labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
        >>> alignloss.ld_dpo_token_weights(labels, tail_weight=0.5)
        tensor([[1.0000, 1.0000, 0.5000],
                [1.0000, 1.0000, 0.0000]])
    """
    check_number("tail_weight", tail_weight)
    if not 0 <= tail_weight <= 1:
        raise ValueError(f"tail_weight must lie in [0, 1], got {tail_weight!r}")
    labels = checked_labels("labels", labels)
    offsets, sequences = _pair_offsets(labels, cu_seqlens, real_sequences, ignore_index)
    rank, shorter = _ranks(labels, offsets, sequences, ignore_index)
    weights = torch.full(labels.shape, tail_weight, dtype=torch.float32, device=labels.device)
    return _of_labels(weights.masked_fill_(rank < shorter, 1), labels, offsets, ignore_index)


def sampo_token_weights(
    labels: Tensor,  # (2B, T), or packed (tokens,) or (1, tokens)
    *,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    real_sequences: int | None = None,
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`token_weights` of SamPO, for labels aligned with hidden: as many tokens of either sequence of a pair, at random.

    Lu et al. 2024 (arXiv:2406.10957): min(|y_chosen|, |y_rejected|) labelled tokens of each sequence keep weight 1,
    drawn without replacement. Policy and reference take the same ones: compute `ref_logps` by `sequence_logprob` with
    these weights, or give `ref_hidden`. `cu_seqlens` and `real_sequences` as in `sequence_logprob`.

    Returns:
        The shape of labels, float32, of 0 and 1.

    Example:
        >>> labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
        >>> alignloss.sampo_token_weights(labels).sum(1)
        tensor([2., 2.])
    """
    labels = checked_labels("labels", labels)
    noise = torch.rand(labels.shape, generator=generator, device=labels.device, dtype=torch.float64)
    offsets, sequences = _pair_offsets(labels, cu_seqlens, real_sequences, ignore_index)
    rank, shorter = _ranks(labels, offsets, sequences, ignore_index, noise)
    return _of_labels((rank < shorter).to(torch.float32), labels, offsets, ignore_index)


def _of_labels(weights: Tensor, labels: Tensor, offsets: Tensor | None, ignore_index: int) -> Tensor:
    """Weights with 0 at ignored positions; all NaN for offsets that did not fit."""
    weights = weights.masked_fill(labels == ignore_index, 0)
    return weights if offsets is None else torch.where(offsets[0] < 0, torch.nan, weights)


def _pair_offsets(
    labels: Tensor, cu_seqlens: Tensor | None, real_sequences: int | None, ignore_index: int
) -> tuple[Tensor | None, int]:
    """`sequence_layout` of 2B sequences."""
    offsets, sequences = sequence_layout(labels, cu_seqlens, None, real_sequences, ignore_index)
    if sequences % 2:
        raise ValueError(f"weights of pairs take 2B sequences, chosen then rejected; got {sequences}, an odd number")
    return offsets, sequences


def _ranks(
    labels: Tensor, offsets: Tensor | None, sequences: int, ignore_index: int, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of each position, its rank among the labelled tokens of its sequence, by `order` or from left to right, and the
    shorter length of its pair; both of the shape of labels."""
    counts = labelled_tokens(labels, offsets, sequences, ignore_index)
    shorter = torch.minimum(*counts.view(2, sequences // 2)).repeat(2)
    flat, position = labels.reshape(-1), torch.arange(labels.numel(), device=labels.device)
    if offsets is None:
        sequence = position // max(labels.shape[1], 1)
    else:
        sequence = torch.searchsorted(offsets[1:], position, right=True).clamp(max=max(sequences - 1, 0))
    keys = position if order is None else order.reshape(-1).argsort().argsort()
    # one sort: by sequence, in it the labelled before the others, then by key; ranks count from a sequence's first
    total = max(len(flat), 1)
    sorting = ((2 * sequence + (flat == ignore_index)) * total + keys).argsort()
    first = torch.searchsorted(sequence[sorting].contiguous(), torch.arange(sequences, device=flat.device))
    rank = torch.empty_like(position)
    rank[sorting] = position - first[sequence[sorting]] if sequences else position
    return rank.view(labels.shape), shorter[sequence].view(labels.shape)


def wpo_pair_weights(
    stats: LogprobStats,
    labels: Tensor,  # (2B, T), or packed (tokens,) or (1, tokens)
    *,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    real_sequences: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`pair_weights` of WPO: how likely the policy itself is to write the two sequences, on average per token.

    Zhou et al. 2024 (arXiv:2406.11827), eq. 2, with its sampled alignment: the product over both sequences of
    exp(mean over tokens of log p_y - log sum_v p_v^2). `stats` are those of the policy, from
    `linear_logprob_stats(..., stats=("log_sum_sq_probs",))` under `torch.no_grad()`. `cu_seqlens` and `real_sequences`
    as in `sequence_logprob`.

    Returns:
        (B,), detached.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, -100]])
        >>> with torch.no_grad():
        ...     stats = alignloss.linear_logprob_stats(hidden, weight, labels, stats=("log_sum_sq_probs",))
        >>> alignloss.wpo_pair_weights(stats, labels)  # no token is likelier than another
        tensor([1.])
    """
    if not isinstance(stats, LogprobStats):
        raise ValueError(f"stats must be what linear_logprob_stats returns, got {type(stats).__name__}")
    if stats.log_sum_sq_probs is None:
        raise ValueError('WPO needs log_sum_sq_probs: ask linear_logprob_stats for stats=("log_sum_sq_probs",)')
    labels = checked_labels("labels", labels)
    for name in ("logps", "log_sum_sq_probs"):
        check_like(f"stats.{name}", getattr(stats, name), "labels", labels)
    offsets, sequences = _pair_offsets(labels, cu_seqlens, real_sequences, ignore_index)
    values = (stats.logps - stats.log_sum_sq_probs).detach().masked_fill(labels == ignore_index, 0).reshape(-1)
    sums = sequence_sum(values, offsets, sequences, None, "torch")
    means = sums / labelled_tokens(labels, offsets, sequences, ignore_index).clamp(min=1)
    return means.view(2, sequences // 2).sum(0).exp().to(stats.logps.dtype)
