"""Log-probabilities of tokens and sequences straight from hidden states, without the logits in memory.

Notation: N labelled tokens, H hidden size, V vocabulary, M positions, S sequences.
"""

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from . import backends, ops
from .checks import check_head, check_savable, check_tensor, checked_labels, savable
from .planning import DTYPES, Footprint, accumulation_dtype, check_number, default_workspace, total_memory

__all__ = [
    "LogprobStats",
    "SequenceLogprob",
    "linear_logprob",
    "linear_logprob_stats",
    "next_token_labels",
    "sequence_logprob",
]


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


def linear_logprob(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
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
) -> Tensor:
    """Log-probability in nats of `labels[..., t]`, which `hidden[..., t]` predicts (never HF's unshifted labels).

    log p_y = z_y - logsumexp(z), z = softcap(logit_scale (h W^T + b)) / temperature, softcap(x) = c tanh(x / c).

    Args:
        hidden: (..., H) floating point, any layout of leading dimensions.
        weight: (V, H), of the dtype of hidden unless autocast is on.
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
            between 64 and 512 MiB. Below the few rows and columns that one tile needs, it is exceeded.
        validate: check values of labels and token_index on the host; by default on a CPU only. Unchecked, a label
            outside [0, V) gives NaN, in its gradient too, and never an access out of bounds.

    Returns:
        (...) float32, or float64 for float64 input: 0 with no gradient at ignored positions. Gradients reach hidden,
        weight and bias, each in its own dtype; with hidden alone to differentiate the backward is a row scaling.

    Raises:
        ValueError: for shapes, dtypes, devices, options or (if validated) values that do not fit.
        RuntimeError: when differentiated twice.
    """
    projection = project(
        hidden,
        weight,
        labels,
        bias,
        token_index=token_index,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        backend=backend,
        workspace_bytes=workspace_bytes,
        validate=validate,
    )
    return projection.score()[0].to(projection.result_dtype).view(labels.shape)


def linear_logprob_stats(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    stats: Sequence[str] = (),
    **options: Any,
) -> LogprobStats:
    """`linear_logprob` of labels aligned with hidden (not HF's unshifted labels), with statistics of each distribution.

    Args:
        stats: any of "lse" (logsumexp of the logits, nats), "entropy" (nats), "mean_logits" (mean of the logits over
            the vocabulary), "is_top1" (no token has a larger logit than the label), "log_sum_sq_probs" (log of the sum
            of squared probabilities, for WPO: Zhou et al. 2024, arXiv:2406.11827). All of the transformed logits.
        options: the other arguments, as in `linear_logprob`, with the same errors.

    Returns:
        LogprobStats, each asked field of the shape of labels, 0 (False) at ignored positions. `logps` and `entropy` are
        differentiable, the others are not. An entropy to be differentiated costs a third GEMM in the forward: ask for
        it under `torch.no_grad()` if it is only logged.
    """
    check_known("linear_logprob_stats", options)
    bits = stat_bits(stats, backends.STATS)
    projection = project(hidden, weight, labels, bias, **options)
    outputs = projection.score(bits)
    fields = {
        name: (value if name == "entropy" else value.detach()).view(labels.shape)
        for name, value in zip(backends.STATS, outputs[1:], strict=False)
        if name in stats
    }
    return LogprobStats(outputs[0].to(projection.result_dtype).view(labels.shape), **fields)


def sequence_logprob(
    hidden: Tensor,  # (S, T, H), or packed (tokens, H) or (1, tokens, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (S, T), (tokens,) or (1, tokens)
    bias: Tensor | None = None,  # (V,)
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    real_sequences: int | None = None,
    token_weights: Tensor | None = None,  # of the shape of labels
    **options: Any,
) -> SequenceLogprob:
    """Log-probability in nats of each sequence, for labels aligned with hidden (never HF's unshifted labels).

    Under `torch.no_grad()` this is the way to compute and cache reference log-probabilities.

    Args:
        cu_seqlens: (S + 1,) integers, the offsets of packed sequences, rising from 0 to the number of tokens.
        real_sequences: how many sequences S are real, the first ones, where cu_seqlens is padded to a static shape by
            repeating its last offset. Without it an offset that does not rise is an error, or, where values are not
            validated, every result NaN: a padded batch means something else than the same batch without padding.
            With it, tokens beyond the last real sequence belong to none, and must carry no label.
        token_weights: factors on the token log-probabilities, detached.
        options: the other arguments, as in `linear_logprob`, with the same errors.

    Returns:
        (logps, lengths): (S,) float32 (float64 for float64 input), summed in float64 in a fixed order, and (S,) int64
        labelled tokens, at least 1. A sequence without labels has log-probability 0 and no gradient.
    """
    check_known("sequence_logprob", options)
    ignore_index = options.get("ignore_index", -100)
    labels = checked_labels("labels", labels)
    offsets, sequences = sequence_offsets(labels, cu_seqlens, options.get("validate"), real_sequences, ignore_index)
    if token_weights is not None:
        check_like("token_weights", token_weights, "labels", labels)
    weights = flat_token_weights(token_weights, labels, ignore_index)
    projection = project(hidden, weight, labels, bias, **options)
    tokens = projection.score()[0]
    sums = ops.sequence_sum(tokens, offsets, sequences, weights, projection.backend)
    lengths = labelled_tokens(labels, offsets, sequences, ignore_index).clamp(min=1)
    return SequenceLogprob(sums.to(projection.result_dtype), lengths)


def next_token_labels(
    input_ids: Tensor,  # (S, T), or packed (tokens,) or (1, tokens)
    completion_mask: Tensor,  # of the same shape, nonzero at tokens to score
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    real_sequences: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels aligned with hidden states: position t gets token t + 1 if the mask holds there, else `ignore_index`.

    The last position of every sequence predicts nothing. Same shape as `input_ids`, int64. Packed sequences need
    `cu_seqlens` here too: a (1, tokens) input without it is one sequence, scored across the borders. Repeated offsets
    are empty sequences; tokens beyond the last of `real_sequences` get `ignore_index`. On a GPU, where values are not
    validated, offsets that do not rise from 0 to the number of tokens give labels outside of every vocabulary.
    """
    check_tensor("input_ids", input_ids)
    check_like("completion_mask", completion_mask, "input_ids", input_ids)
    if input_ids.dim() not in (1, 2) or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers (S, T) or packed (tokens,); got {tuple(input_ids.shape)} {input_ids.dtype}"
        )
    offsets, _ = sequence_offsets(input_ids, cu_seqlens, None, real_sequences, may_be_empty=True)
    labels = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    keep = completion_mask[..., 1:].bool()
    labels[..., :-1] = torch.where(keep, input_ids[..., 1:].long(), ignore_index)
    if offsets is None:
        return labels
    # an entry for the position before each offset, the first one for that of offset 0
    flat = torch.nn.functional.pad(labels.reshape(-1), (1, 0)).index_fill_(0, offsets.clamp(min=0), ignore_index)[1:]
    beyond = torch.arange(labels.numel(), device=labels.device) >= offsets[-1]
    flat = torch.where(beyond, torch.where(offsets[-1] < 0, -1 - abs(ignore_index), ignore_index), flat)
    return flat.view(labels.shape)


def sequence_offsets(
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
        if not isinstance(real_sequences, (Integral, torch.SymInt)) or not 0 <= real_sequences <= slots:
            raise ValueError(
                f"real_sequences must be an int in [0, {slots}], of the sequences in cu_seqlens; got {real_sequences!r}"
            )
        cu_seqlens = cu_seqlens[: real_sequences + 1]
    validated = validates(validate, labels.device)
    counted = real_sequences is not None
    offsets = ops.sequence_offsets(cu_seqlens, labels.numel(), not counted, may_be_empty or counted, validated)
    if counted and ignore_index is not None and validated and not torch.compiler.is_compiling():
        beyond = labels.reshape(-1)[int(offsets[-1]) :]
        if bool((beyond != ignore_index).any()):
            raise ValueError(
                f"tokens beyond the {real_sequences} real sequences, which end at {int(offsets[-1])}, belong to none "
                "and must carry ignore_index as their label"
            )
    return offsets, cu_seqlens.shape[0] - 1


def stat_bits(stats: Sequence[str], known: Sequence[str]) -> int:
    """Names out of `known`, themselves out of `backends.STATS`, as bits."""
    if not isinstance(stats, Sequence) or isinstance(stats, str) or any(name not in known for name in stats):
        raise ValueError(f"stats takes a sequence of names out of {tuple(known)}, got {stats!r}")
    return sum(1 << i for i, name in enumerate(backends.STATS) if name in stats)


def check_known(what: str, options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - PROJECTION_OPTIONS)
    if unknown:
        raise ValueError(f"{what} takes the options {sorted(PROJECTION_OPTIONS)}; unknown: {unknown}")


def labelled_tokens(labels: Tensor, offsets: Tensor | None, sequences: int, ignore_index: int) -> Tensor:
    """Labelled tokens per sequence, (S,) int64, between offsets or in equal parts."""
    labelled = (labels != ignore_index).reshape(-1)
    if offsets is None:
        return labelled.view(sequences, len(labelled) // max(sequences, 1)).sum(1)
    counts = torch.nn.functional.pad(labelled.cumsum(0), (1, 0))
    return counts[offsets[1:]] - counts[offsets[:-1]]


def flat_token_weights(token_weights: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    """Token weights as (M,) float64, detached, 0 at ignored positions."""
    if token_weights is None:
        return None
    return savable(token_weights.detach()).double().masked_fill(labels == ignore_index, 0).reshape(-1)


def check_like(name: str, value: Tensor, model_name: str, model: Tensor) -> None:
    check_tensor(name, value)
    if value.shape != model.shape or value.device != model.device:
        raise ValueError(
            f"{name} must have the shape and device of {model_name}, {tuple(model.shape)} on {model.device}; "
            f"got {tuple(value.shape)} on {value.device}"
        )


def check_binary(name: str, value: Tensor) -> None:
    if not bool(((value == 0) | (value == 1)).all()):
        raise ValueError(f"{name} must be bool, or 0 and 1; got {value.unique().tolist()[:8]}")


def validates(validate: bool | None, device: torch.device) -> bool:
    """Whether values are checked on the host: as asked, by default on a CPU."""
    return device.type == "cpu" if validate is None else validate


class Projection(NamedTuple):
    """A checked call on flattened tokens, with its options resolved."""

    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (M,) int64
    token_index: Tensor | None  # (N,) int64 positions to score; None: every one, or see `select`
    select: bool  # the op looks the labelled positions up inside
    compute_dtype: torch.dtype
    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    backend: str  # "torch" or "triton"
    workspace_bytes: int
    validate: bool
    sorted_index: bool  # token_index holds the labelled positions in rising order

    @property
    def result_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.compute_dtype)

    @property
    def trains_head(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def footprint(self) -> Footprint:
        vocabulary, width = self.weight.shape
        indexed, softcap = self.token_index is not None, self.softcap is not None
        dtypes = self.compute_dtype, self.hidden.dtype, self.weight.dtype
        return Footprint(vocabulary, width, *dtypes, indexed, softcap, self.weight.device.type, self.backend)

    @property
    def transform(self) -> backends.Transform:
        return backends.Transform.of(self.logit_scale, self.softcap, self.temperature)

    def score(self, stats: int = 0, differentiate_entropy: bool = True) -> tuple[Tensor, ...]:
        """logps, in float64, and stats of each token, (M,) or empty."""
        save = int(torch.is_grad_enabled() and self.hidden.requires_grad)
        if save and stats & backends.ENTROPY and differentiate_entropy:
            save = 2
        *arguments, backend, workspace_bytes, validate, _ = self
        recomputed = torch.is_grad_enabled() and self.trains_head
        outputs = ops.linear_logprob_fwd(*arguments, stats, save, recomputed, backend, workspace_bytes, validate)
        return outputs[: 1 + len(backends.STATS)]


def project(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    token_index: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    validate: bool | None = None,
) -> Projection:
    """Check the arguments of a call and resolve its options."""
    _check_tensors(hidden, weight, labels, bias, token_index)
    _check_modes(hidden, weight, bias, token_index, validates(validate, hidden.device))
    check_options(ignore_index, logit_scale, softcap, temperature, workspace_bytes)
    compute_dtype = _compute_dtype(hidden, weight, bias)
    flat_labels = checked_labels("labels", labels).reshape(-1)
    select, given = False, token_index is not None
    if token_index is not None:
        token_index = savable(token_index.long())
    elif torch.compiler.is_compiling():
        select = True  # a shape that depends on data would break the graph
    else:
        token_index = torch.nonzero(flat_labels != ignore_index).squeeze(1)
        if token_index.numel() == flat_labels.numel():
            token_index = None
    return Projection(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat_labels,
        token_index,
        select,
        compute_dtype,
        ignore_index,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        backends.resolve(backend, hidden.device, compute_dtype),
        int(workspace_bytes or default_workspace(hidden.device.type, total_memory(hidden.device))),
        validates(validate, hidden.device),
        not given,
    )


PROJECTION_OPTIONS = frozenset(inspect.signature(project).parameters) - {"hidden", "weight", "labels", "bias"}


def _check_tensors(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, token_index: Tensor | None
) -> None:
    required = {"hidden": hidden, "weight": weight, "labels": labels}
    given = {name: value for name, value in (("bias", bias), ("token_index", token_index)) if value is not None}
    hints = {"weight": "; pass lm_head.weight", "hidden": "; pass the model's last hidden states"}
    for name, value in (required | given).items():
        if isinstance(value, Tensor):
            _check_transforms(name, value)
        check_tensor(name, value, hints.get(name, ""))
    check_head("weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2 or 0 in weight.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (..., H) and weight (V, H) with one H >= 1 and V >= 1; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have the leading shape of hidden, {tuple(hidden.shape[:-1])}, one label per position; "
            f"got {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if token_index is not None and (token_index.dim() != 1 or token_index.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"token_index must be (N,) int64, got {tuple(token_index.shape)} {token_index.dtype}")
    for name, value in (required | given).items():
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}; move one of them")


def _check_modes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_index: Tensor | None, validate: bool
) -> None:
    """Tensors without values, and those of inference mode that a backward would need."""
    if torch.compiler.is_compiling():
        return
    if is_fake(hidden) and (token_index is None or validate):
        raise ValueError(
            "under FakeTensorMode there are no values to look labelled positions up in, or to check: give token_index "
            "and validate=False"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        check_savable(hidden=hidden, weight=weight, bias=bias)


def _check_transforms(name: str, value: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name} carries a forward-mode tangent; alignloss differentiates in reverse mode only")
    if is_gradtrackingtensor(value):
        raise RuntimeError(f"{name} is inside torch.func.grad or a relative of it; alignloss takes backward() alone")


def check_options(
    ignore_index: int, logit_scale: float, softcap: float | None, temperature: float, workspace_bytes: int | None
) -> None:
    if not isinstance(ignore_index, Integral):
        raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
    for name, number, positive in (
        ("logit_scale", logit_scale, False),
        ("softcap", softcap, True),
        ("temperature", temperature, True),
        ("workspace_bytes", workspace_bytes, True),
    ):
        if number is not None:
            check_number(name, number, positive)


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}; dequantise the head first"
            )
    dtypes = {value.dtype for value in tensors.values()}
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(hidden.device.type)
    if len(dtypes) > 1:
        got = ", ".join(f"{name} {value.dtype}" for name, value in tensors.items())
        raise ValueError(f"hidden, weight and bias must have one dtype outside autocast; got {got}")
    return hidden.dtype
