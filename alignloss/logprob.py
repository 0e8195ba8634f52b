"""Log-probabilities of tokens and sequences straight from hidden states, without the logits in memory.

Notation: N labelled tokens, H hidden size, V vocabulary, M positions, S sequences.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends
from .checks import check_keywords, check_savable, checked_labels
from .ops.head import PROJECTION_OPTIONS, Projection, meaning, project
from .ops.kl import linear_kl_fwd
from .ops.logprob import score
from .ops.module_head import takes_modules
from .ops.processes import sums_over
from .ops.sequence import checked_token_weights, labelled_tokens, masked_weights, parts_layout, sequence_sum
from .ops.vocabulary import unwritten


class LogprobStats(NamedTuple):
    """Result of `linear_logprob_stats`: each of the shape of labels; a statistic not asked for is None."""

    logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


class SequenceLogprob(NamedTuple):
    """Result of `sequence_logprob`: sums in nats (S,), differentiable, and labelled tokens (S,) int64, at least 1."""

    logps: Tensor
    lengths: Tensor


@takes_modules("weight")
def linear_logprob(
    hidden: Tensor,  # (..., H)
    weight: Tensor | nn.Module,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    token_index: Tensor | None = None,  # (N,)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    validate: bool | None = None,
    vocab_group: Any = None,
) -> Tensor:
    """Log-probability in nats of `labels[..., t]`, which `hidden[..., t]` predicts (never HF's unshifted labels).

    log p_y = z_y - logsumexp(z), z = softcap(logit_scale (h W^T + b)) / temperature, softcap(x) = c tanh(x / c).

    Args:
        hidden: (..., H) floating point, any layout of leading dimensions; one in which they cannot be viewed as one,
            as `hidden[:, :-1]`, is copied first, beside the workspace.
        weight: (V, H), or the module of the head, an `nn.Linear`, which brings its bias: the call then runs between
            its hooks, those of FSDP too. Of the dtype of hidden unless autocast is on; or float32 beside 16 bits: the
            product is computed in float32, of blocks and slices of what is narrow.
        labels: (...) integers in [0, V), or `ignore_index` where nothing is scored. Labels are aligned with hidden:
            `next_token_labels` makes them from token ids. HF's `labels`, which are not shifted, train the wrong thing.
        bias: (V,), optional.
        token_index: (N,) integers, the flat positions to score; every labelled position exactly once (unchecked, a
            repeated one counts twice in the gradient of weight), and ignored positions as padding if a fixed N is
            wanted. Without it the labelled positions are looked up, which costs one device synchronisation.
        ignore_index: the label of positions that are not scored.
        logit_scale: factor on the logits, before the softcap.
        softcap: positive bound c of the logits, or None.
        temperature: positive divisor of the logits, after the softcap.
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".
        workspace_bytes: bytes for temporary tiles. By default 160 MiB on a CPU and 1/256 of the memory of a GPU,
            between 64 and 512 MiB; in a loss module or `one_pass_loss` that trains hidden states and head up to 1/29
            of it, where one pass then fits. Below the few rows and columns that one tile needs, it is exceeded.
        validate: check values of labels and token_index on the host; by default on a CPU only. Unchecked, a label
            outside [0, V) gives NaN, in its gradient too, and never an access out of bounds.
        vocab_group: the processes, a ProcessGroup or a DeviceMesh of one dimension, that the head is split over by
            rows, in the order of their ranks: weight (and bias) is the part of this process, of any size, be it empty,
            plain or a DTensor with Shard(0); hidden and labels are the same on all of them, and labels those of the
            whole vocabulary. Results and the gradient of hidden are those of the whole head on each of them.

    Returns:
        (...) float32, or float64 for float64 input, 0 with no gradient at ignored positions. Gradients reach hidden,
        weight and bias, each in its own dtype; with hidden alone to differentiate the backward is a row scaling.

    Raises:
        ValueError: for shapes, dtypes, devices, options or (if validated) values that do not fit.
        RuntimeError: when differentiated twice.

    Example:
        A head of zeros gives each of its 8 tokens the probability 1 / 8; -100 is not scored:

        >>> hidden, weight = torch.randn(1, 3, 4), torch.zeros(8, 4)
        >>> alignloss.linear_logprob(hidden, weight, torch.tensor([[7, 0, -100]]))
        tensor([[-2.0794, -2.0794,  0.0000]])
    """
    projection = project(
        hidden,
        weight,
        labels,
        bias,
        "log-probabilities",
        token_index=token_index,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        backend=backend,
        workspace_bytes=workspace_bytes,
        validate=validate,
        vocab_group=vocab_group,
    )
    return score(projection)[0].to(projection.result_dtype).view(labels.shape)


@takes_modules("weight")
def linear_logprob_stats(
    hidden: Tensor,  # (..., H)
    weight: Tensor | nn.Module,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    stats: Sequence[str] = (),
    differentiable_entropy: bool = True,
    **options: Any,
) -> LogprobStats:
    """`linear_logprob` of labels aligned with hidden (not HF's unshifted labels), with statistics of each distribution.

    Args:
        stats: any of "lse" (logsumexp of the logits, nats), "entropy" (nats), "mean_logits" (mean of the logits over
            the vocabulary), "is_top1" (no token has a larger logit than the label), "log_sum_sq_probs" (log of the sum
            of squared probabilities, for WPO: Zhou et al. 2024, arXiv:2406.11827). All of the transformed logits.
        differentiable_entropy: whether the entropy has a gradient, as in an entropy bonus. Where hidden states train,
            that costs a third GEMM in the forward; False if it is only logged.
        options: the other arguments, as in `linear_logprob`, with the same errors.

    Returns:
        LogprobStats, each asked field of the shape of labels, 0 (False) at ignored positions. `logps` and, unless told
        otherwise, `entropy` are differentiable, the others are not.

    Example:
        >>> hidden, weight = torch.randn(1, 2, 4), torch.zeros(8, 4)
        >>> with torch.no_grad():
        ...     labels = torch.tensor([[7, 0]])
        ...     out = alignloss.linear_logprob_stats(hidden, weight, labels, stats=("entropy", "is_top1"))
        >>> out.entropy
        tensor([[2.0794, 2.0794]])
        >>> out.is_top1
        tensor([[True, True]])
    """
    check_keywords("linear_logprob_stats takes the options", PROJECTION_OPTIONS, options)
    bits = backends.stat_bits(stats)
    asked = "statistics", bits, differentiable_entropy
    projection = project(hidden, weight, labels, bias, asked, **options)
    outputs = score(projection, bits, differentiable_entropy)
    fields = {
        name: (value if name == "entropy" and differentiable_entropy else value.detach()).view(labels.shape)
        for name, value in zip(backends.STATS, outputs[1:], strict=False)
        if name in stats
    }
    return LogprobStats(outputs[0].to(projection.result_dtype).view(labels.shape), **fields)


@takes_modules("weight")
def sequence_logprob(
    hidden: Tensor,  # (S, T, H), or packed (tokens, H) or (1, tokens, H)
    weight: Tensor | nn.Module,  # (V, H)
    labels: Tensor,  # (S, T), (tokens,) or (1, tokens)
    bias: Tensor | None = None,  # (V,)
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    real_sequences: int | None = None,
    token_weights: Tensor | None = None,  # of the shape of labels
    sequence_group: Any = None,
    **options: Any,
) -> SequenceLogprob:
    """Log-probability in nats of each sequence, for labels aligned with hidden (never HF's unshifted labels).

    Under `torch.no_grad()` this is the way to compute and cache reference log-probabilities.

    Args:
        cu_seqlens: (S + 1,) integers, the offsets of packed sequences, rising from 0 to the number of tokens.
        real_sequences: how many sequences S are real, the first ones, where cu_seqlens is padded to a static shape by
            repeating its last offset. Without it an offset that does not rise is an error, or, where values are not
            validated, every sum NaN: a padded batch means something else than the same batch without padding.
            With it, tokens beyond the last real sequence belong to none, and must carry no label.
        token_weights: factors on the token log-probabilities, detached.
        sequence_group: the processes, a ProcessGroup or a DeviceMesh of one dimension, that each hold a part of every
            sequence, maybe without tokens. The results are those of the whole sequences on each of them; gradients
            count once for each process, for a mean over them (DDP, FSDP). One collective, two with validation.
        options: the other arguments, as in `linear_logprob`, with the same errors.

    Returns:
        `logps` (S,) float32 (float64 for float64 input), summed in float64 in a fixed order, and `lengths` (S,) int64,
        labelled tokens, at least 1. A sequence without labels has log-probability 0 and no gradient.

    Example:
        Two sequences, padded and packed:

        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, -100]])
        >>> alignloss.sequence_logprob(hidden, weight, labels)
        SequenceLogprob(logps=tensor([-6.2383, -4.1589]), lengths=tensor([3, 2]))
        >>> offsets = torch.tensor([0, 3, 5])
        >>> alignloss.sequence_logprob(hidden.view(6, 4)[:5], weight, labels.view(6)[:5], cu_seqlens=offsets).logps
        tensor([-6.2383, -4.1589])
    """
    check_keywords("sequence_logprob takes the options", PROJECTION_OPTIONS, options)
    ignore_index = options.get("ignore_index", -100)
    labels = checked_labels("labels", labels)
    layout = cu_seqlens, options.get("validate"), real_sequences, ignore_index
    groups = sequence_group, options.get("vocab_group"), {"what is asked for": ("sums", meaning(options)), "data": None}
    offsets, sequences, group = parts_layout(labels, *layout, *groups)
    weights = masked_weights(checked_token_weights(token_weights, labels), labels.reshape(-1), ignore_index)
    data = {"cu_seqlens": cu_seqlens, "real_sequences": real_sequences, "token_weights": token_weights}
    projection = project(hidden, weight, labels, bias, "sums", data, **options)
    sums = sequence_sum(score(projection)[0], offsets, sequences, weights, projection.options.backend)
    lengths = labelled_tokens(labels, offsets, sequences, ignore_index)
    sums, lengths = sums_over(group, sums, lengths)
    return SequenceLogprob(sums.to(projection.result_dtype), lengths.long().clamp(min=1))


@takes_modules("weight", "ref_weight")
def linear_kl(
    hidden: Tensor,  # (..., H)
    weight: Tensor | nn.Module,  # (V, H)
    ref_hidden: Tensor,  # (..., H of the reference)
    ref_weight: Tensor | nn.Module,  # (V, H of the reference)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    **options: Any,
) -> Tensor:
    """KL(reference || policy) in nats at each position with a label, for labels aligned with hidden (not HF's labels).

    sum_v q_v (log q_v - log p_v), q of the reference, p of the policy: the term of TDPO (Zeng et al. 2024,
    arXiv:2404.11999), which sums it over a sequence. Labels only say which positions count.

    Args:
        hidden, weight, bias: of the policy, as in `linear_logprob`.
        ref_hidden, ref_weight, ref_bias: of the reference, with the same leading shape and vocabulary. No gradient
            reaches them, and none is kept for them.
        options: token_index, ignore_index, logit_scale, softcap, temperature (the same for both heads),
            backend, workspace_bytes, validate and vocab_group (of both heads, in the same parts), as in
            `linear_logprob`.

    Returns:
        (...) float32, or float64 for float64 input, 0 with no gradient at ignored positions. Rounding may leave a KL of
        nearly 0 slightly negative. A backward through the head holds the gradient of hidden in float32 beside the
        workspace.

    Raises:
        ValueError: as `linear_logprob`, and where the vocabularies or precisions of the two differ.
        RuntimeError: when differentiated twice.

    Example:
        The two heads may have hidden states of different widths:

        >>> hidden, weight = torch.zeros(1, 2, 4), torch.zeros(2, 4)
        >>> ref_hidden, ref_weight = torch.ones(1, 2, 1), torch.tensor([[1.0], [3.0]]).log()
        >>> labels = torch.tensor([[0, -100]])
        >>> alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight, labels)  # of (1/4, 3/4) from (1/2, 1/2)
        tensor([[0.1308, 0.0000]])
    """
    check_keywords("linear_kl takes the options", PROJECTION_OPTIONS, options)
    policy = project(hidden, weight, labels, bias, "KL", **options)
    with torch.no_grad():
        try:
            # the positions are looked up and checked already
            found = {"validate": False, "token_index": policy.token_index}
            reference = project(ref_hidden, ref_weight, labels, ref_bias, "KL", **(options | found))
        except ValueError as error:
            raise ValueError(f"the reference, ref_hidden with ref_weight: {error}") from error
    if (
        _vocabulary(policy) != _vocabulary(reference)
        or policy.result_dtype != reference.result_dtype
        or (hidden.device != ref_hidden.device)
    ):
        raise ValueError(
            f"policy and reference must share vocabulary, precision and device; got V = {_vocabulary(policy)}, "
            f"{hidden.dtype}, {hidden.device} and V = {_vocabulary(reference)}, {ref_hidden.dtype}, {ref_hidden.device}"
        )
    if hidden.requires_grad or policy.trains_head:
        references = {"ref_hidden": ref_hidden, "ref_weight": reference.weight, "ref_bias": ref_bias}
        check_savable(hidden=hidden, weight=policy.weight, bias=bias, **references)
    kl, _ = linear_kl_fwd(
        policy.hidden, policy.weight, policy.bias, reference.hidden, reference.weight, reference.bias, policy.labels,
        policy.token_index, reference.options.compute_dtype, *policy.options,
    )  # fmt: skip
    # its backward multiplies by both heads again, whatever trains
    check = unwritten(weight=weight, bias=bias, ref_weight=ref_weight, ref_bias=ref_bias)
    if check is not None and kl.requires_grad:
        kl.register_hook(check)
    return kl.view(labels.shape)


def _vocabulary(projection: Projection) -> int | tuple[int, ...]:
    """V, or that of each part of a head that is split over processes."""
    split = projection.options.split
    return len(projection.weight) if split is None else split.parts
