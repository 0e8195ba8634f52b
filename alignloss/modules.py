"""Loss modules: from hidden states to one scalar, around any plain loss function of sequence log-probabilities.

loss = sum(losses) / num_sequences + nll_weight * sum(NLL over the chosen tokens) / num_tokens
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from . import backends, losses, ops
from .checks import check_tensor, checked_labels, savable
from .logprob import (
    PROJECTION_OPTIONS,
    Projection,
    check_binary,
    check_like,
    check_options,
    flat_token_weights,
    labelled_tokens,
    project,
    sequence_logprob,
    sequence_offsets,
    stat_bits,
    validates,
)
from .onepass import Batch, NeedsGraph, Results, train_in_one_pass
from .options import check_ranges
from .outputs import STATS, PairedOutput, ScoredTokens, UnpairedOutput, measured
from .planning import check_number

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "IPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PreferenceLoss",
    "SFTLoss",
    "SimPOLoss",
]

_COLUMNS = ("logps", "ref_logps", "lengths")
# what the library fills in, by the name of the parameter: (column, half of the batch)
_FILLED_UNPAIRED: dict[str, tuple[str, int | None]] = {name: (name, None) for name in _COLUMNS}
_FILLED_PAIRED: dict[str, tuple[str, int | None]] = {
    ("ref_" if column == "ref_logps" else "") + side + "_" + column.removeprefix("ref_"): (column, half)
    for column in _COLUMNS
    for half, side in enumerate(("chosen", "rejected"))
}
# losses with a kernel that sums the tokens and computes loss, rewards and coefficients in one launch
_FUSED = ((losses.dpo_loss, "dpo"), (losses.ipo_loss, "ipo"), (losses.kto_loss, "kto"), (losses.cpo_loss, "cpo"))


class _HeadLoss(nn.Module):
    """The options of the projection, shared by every loss module."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        backend: str = "auto",
        workspace_bytes: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        check_options(ignore_index, logit_scale, softcap, temperature, workspace_bytes)
        backends.check_name(backend)
        self.ignore_index, self.validate = ignore_index, validate
        self.head_options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "backend": backend,
            "workspace_bytes": workspace_bytes,
            "validate": validate,
        }

    def _evaluate(self, tokens: Tensor, batch: Batch) -> Results:
        """The loss of a batch from its token log-probabilities (M,)."""
        raise NotImplementedError

    def _run(
        self, projection: Projection, batch: Batch, stats: Sequence[str], one_pass: bool = True
    ) -> tuple[Results, ScoredTokens]:
        """The loss in one pass where that is allowed and applies, otherwise from token log-probabilities."""
        bits, results = stat_bits(stats, STATS), None
        values: Sequence[Tensor | None] = ()
        if one_pass:
            kinds = {name: torch.bool if name == "is_top1" else projection.result_dtype for name in stats}
            values = [
                batch.labels.new_zeros(batch.labels.shape, dtype=kinds[name]) if name in kinds else None
                for name in backends.STATS
            ]
            results = train_in_one_pass(projection, batch, self._evaluate, values)
        if results is None:
            logps, *values = projection.score(bits, differentiate_entropy=False)
            results = self._evaluate(logps, batch)
        asked = {
            name: value.detach()
            for name, value in zip(backends.STATS, values, strict=True)
            if value is not None and name in stats
        }
        return results, ScoredTokens(batch.labels, batch.offsets, batch.sequences, self.ignore_index, **asked)

    def projection_repr(self) -> str:
        """The options of the projection that are not the default ones."""
        defaults = inspect.signature(_HeadLoss.__init__).parameters
        changed = {name: value for name, value in self.head_options.items() if value != defaults[name].default}
        return ", ".join(f"{name}={value}" for name, value in changed.items())

    def extra_repr(self) -> str:
        return self.projection_repr()


_HEAD_OPTIONS = PROJECTION_OPTIONS - {"token_index"}


class PreferenceLoss(_HeadLoss):
    """Any preference loss as a module over hidden states, a user's own included.

    Args:
        fn: the name of one of `losses.LOSSES`, or a plain torch function on (B,) tensors. Its positional parameters are
            data: the library fills `chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
            chosen_lengths, rejected_lengths` (a paired loss), or `logps, ref_logps, lengths` (an unpaired one), and any
            other name is a keyword of the module's call. Its keyword-only parameters are options, given here. It
            returns (losses, chosen_rewards, rejected_rewards), or (losses, rewards), each (B,), unreduced.
            Floating data come to it in float64, lengths and other integers in int64, as copies that it may work on.
        nll_weight: weight of the NLL (nats) per chosen token that is added to a paired loss. Where `fn` has an option
            of this name (`irpo_loss`), it is that option.
        couples_batch: declares that an element of `losses` depends on more than its own pair. Without it a step that
            trains the head may call `fn` on one group of pairs after the other, as they fit the workspace (3 GEMMs);
            with it, always on the whole batch (4 GEMMs). Our own losses that need it (`losses.COUPLED`) have it.
        options: the options of `fn`, and of the projection as in `linear_logprob`: ignore_index, logit_scale, softcap,
            temperature, backend, workspace_bytes, validate.

    Raises:
        ValueError: for an option that `fn` lacks, a missing one, one of ours out of its range, an unknown name, or a
            signature that is neither paired nor unpaired.
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Tensor, ...]] | str,
        *,
        nll_weight: float | None = None,
        couples_batch: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**{name: options.pop(name) for name in _HEAD_OPTIONS & set(options)})
        if isinstance(fn, str):
            if fn not in losses.LOSSES:
                raise ValueError(f"the losses by name are {sorted(losses.LOSSES)}; got {fn!r}")
            fn = losses.LOSSES[fn]
        if not callable(fn):
            raise ValueError(f"fn must be the name of a loss or a function, got {type(fn).__name__}")
        function = _unwrapped(fn)
        self.couples_batch = couples_batch or any(function is coupled for coupled in losses.COUPLED)
        self.ours = any(function is ours for ours in losses.LOSSES.values())
        self.fn, self.options = fn, options
        self._needs_graph = False  # the loss differentiates something beside the log-probabilities
        self.fn_name = getattr(function, "__name__", repr(fn))
        parameters = inspect.signature(fn).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.names = [p.name for p in positional]
        self.paired = "chosen_logps" in self.names and "rejected_logps" in self.names
        if self.paired == ("logps" in self.names):
            raise ValueError(
                f"{self.fn_name} must take chosen_logps and rejected_logps (a paired loss) or logps (an unpaired one) "
                f"as positional parameters; it takes {self.names}"
            )
        self.filled, foreign = (_FILLED_PAIRED, _FILLED_UNPAIRED) if self.paired else (_FILLED_UNPAIRED, _FILLED_PAIRED)
        self.data = {p.name: p.default is p.empty for p in positional if p.name not in self.filled}
        self.defaults = {p.name: p.default for p in positional if p.default is not p.empty}
        self.needs_reference = any(self.filled[n][0] == "ref_logps" for n in self.names if n in self.filled)
        known = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
        optional = {p.name for p in inspect.signature(function).parameters.values() if p.default is None}
        taken = set(self.data) & {*foreign, *inspect.signature(self.forward).parameters}
        taken |= set(known) & {*_HEAD_OPTIONS, "fn", "couples_batch"}
        if taken:
            raise ValueError(f"parameters of {self.fn_name} have reserved names, {sorted(taken)}; rename them")
        data = sorted(set(options) & set(self.data))
        hint = f". {data} are positional, so data of the call: put them after * to make them options" if data else ""
        if "nll_weight" in known and nll_weight is not None:
            options["nll_weight"], nll_weight = nll_weight, None
        _check_keywords(f"{self.fn_name} takes the options", known, options, hint)
        if self.ours:
            bound = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | options
            check_ranges({n: v for n, v in bound.items() if v is not None or n not in optional})
        self.nll_weight = 0.0 if nll_weight is None else nll_weight
        check_number("nll_weight", self.nll_weight)
        if nll_weight and not self.paired:
            raise ValueError(
                f"nll_weight adds the NLL of chosen sequences and {self.fn_name} is unpaired; use SFTLoss beside it"
            )

    def extra_repr(self) -> str:
        options = self.options | ({"nll_weight": self.nll_weight} if self.nll_weight else {})
        named = ", ".join([self.fn_name, *(f"{name}={value}" for name, value in options.items())])
        return ", ".join(filter(None, [named, self.projection_repr()]))

    def forward(
        self,
        hidden: Tensor,  # (2B, T, H), or (B, T, H) if unpaired; packed (tokens, H) or (1, tokens, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # hidden's shape without H
        bias: Tensor | None = None,  # (V,)
        *,
        ref_logps: Tensor | None = None,  # (2B,), or (B,) if unpaired
        ref_hidden: Tensor | None = None,  # hidden's leading shape, of any H
        ref_weight: Tensor | None = None,  # (V, H of the reference)
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (sequences + 1,)
        real_sequences: int | None = None,
        token_index: Tensor | None = None,  # (N,)
        token_weights: Tensor | None = None,  # the shape of labels
        pair_weights: Tensor | None = None,  # (B,)
        nll_labels: Tensor | None = None,  # the shape of labels
        num_sequences: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        stats: Sequence[str] = (),
        **data: Any,
    ) -> Any:
        """The loss for labels aligned with hidden: `labels[..., t]` is what `hidden[..., t]` predicts, not HF's labels.

        Args:
            hidden, weight, labels, bias, token_index: as in `linear_logprob`. For a paired loss the B chosen sequences
                come first, then the B rejected ones, padded or packed.
            ref_logps: the reference's sums in nats, in the order of the batch, without gradient. Or:
            ref_hidden, ref_weight, ref_bias: the reference's hidden states and head, projected here without gradient,
                with this module's logit_scale, softcap and temperature.
            cu_seqlens, real_sequences: offsets of packed sequences, and how many are real where they are padded, as in
                `sequence_logprob`: the halves of chosen and rejected ones, counts and means are those of the real ones.
            token_weights: factors on the tokens in the sums of policy and reference (not in the NLL), detached.
            pair_weights: factors on `losses`, detached. A pair of weight 0 leaves the sum, not the count; under a loss
                that couples the batch it still takes part in the losses of the others.
            nll_labels: where the NLL of the chosen sequences runs; by default at labels.
            num_sequences, num_tokens: what sum(losses) and the NLL are divided by; by default this call's pairs
                (sequences if unpaired) and chosen NLL tokens. Give totals of all micro-batches for accumulation.
                Under DDP or FSDP, which average gradients over processes, give totals of all processes divided by
                their number, or processes with few pairs weigh theirs more.
            stats: statistics of the scored tokens for `metrics()` of the result, any of "entropy", "mean_logits",
                "is_top1"; each costs a reduction over the logits as they pass, and has no gradient.
            data: the other positional parameters of the loss function, each (B,) or 0-d.

        Returns:
            PairedOutput or UnpairedOutput, in float32 (float64 for float64 input).

        Raises:
            ValueError: for anything missing, unknown, of the wrong shape, or that the loss would ignore. Under
                torch.compile, where a number may be symbolic, numbers are not checked.
        """
        _check_keywords(f"{type(self).__name__} takes the data", self.data, data)
        self._check_reference(ref_logps=ref_logps, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
        if not self.nll_weight and (nll_labels is not None or num_tokens is not None):
            raise ValueError(f"{type(self).__name__} has nll_weight=0: nll_labels and num_tokens would be ignored")
        labels = checked_labels("labels", labels)
        offsets, sequences = sequence_offsets(labels, cu_seqlens, self.validate, real_sequences, self.ignore_index)
        if self.paired and sequences % 2:
            raise ValueError(f"a paired loss takes 2B sequences, chosen then rejected; got {sequences}, an odd number")
        count = sequences // 2 if self.paired else sequences
        if token_weights is not None:
            check_like("token_weights", token_weights, "labels", labels)
        scored_labels = labels
        if nll_labels is not None:
            end = count * labels.shape[1] if offsets is None else offsets[count]
            nll_labels = self._chosen_nll_labels(nll_labels, labels, end)
            scored_labels = torch.where(labels != self.ignore_index, labels, nll_labels)
        projection = project(hidden, weight, scored_labels, bias, token_index=token_index, **self.head_options)
        device = labels.device
        extra = {n: _column(n, value, count, device) for n, value in data.items() if value is not None}
        if "desirable" in extra and validates(self.validate, device) and not torch.compiler.is_compiling():
            check_binary("desirable", extra["desirable"])
        factors = None if pair_weights is None else _column("pair_weights", pair_weights, count, device).detach()
        num_sequences = _divisor("num_sequences", num_sequences, device)
        num_tokens = _divisor("num_tokens", num_tokens, device)
        ref = None
        if ref_hidden is not None and ref_weight is not None:
            options = self.head_options | {"token_index": token_index if nll_labels is None else None}
            layout: dict[str, Any] = {
                "cu_seqlens": cu_seqlens,
                "real_sequences": real_sequences,
                "token_weights": token_weights,
            }
            try:
                with torch.no_grad():
                    ref = sequence_logprob(ref_hidden, ref_weight, labels, ref_bias, **layout, **options).logps
            except ValueError as error:
                raise ValueError(f"the reference, ref_hidden with ref_weight: {error}") from error
        elif ref_logps is not None:
            ref = _given_reference(ref_logps, sequences, device)

        batch = Batch(
            None if token_weights is None else savable(token_weights.detach()).reshape(-1),
            labels.reshape(-1),
            None if nll_labels is None else nll_labels.reshape(-1),
            offsets,
            sequences,
            self.paired,
            ref,
            extra,
            factors,
            num_sequences,
            num_tokens,
            projection.backend,
        )
        one_pass = not (self.couples_batch or self._needs_graph or any(v.requires_grad for v in extra.values()))
        try:
            results, scored = self._run(projection, batch, stats, one_pass)
        except NeedsGraph:
            self._needs_graph = True
            results, scored = self._run(projection, batch, stats, one_pass=False)
        loss, values, sums, rewards, nll_loss = results
        dtype = projection.result_dtype
        values, sums, rewards, nll_loss = (t.detach().to(dtype) for t in (values, sums, rewards, nll_loss))
        if not self.paired:
            scored = scored._replace(desirable=extra.get("desirable"), kl=extra.get("kl"))
            return measured(UnpairedOutput(loss.to(dtype), values, sums, rewards), scored)
        halves = sums[:count], sums[count:], rewards[:count], rewards[count:]
        return measured(PairedOutput(loss.to(dtype), values, *halves, nll_loss), scored)

    def _check_reference(self, **reference: Tensor | None) -> None:
        name, given = type(self).__name__, {name for name, value in reference.items() if value is not None}
        if given and not self.needs_reference:
            raise ValueError(f"{name} is reference-free and would ignore {sorted(given)}; leave them out")
        projected = {"ref_hidden", "ref_weight"}
        if self.needs_reference and given not in ({"ref_logps"}, projected, projected | {"ref_bias"}):
            raise ValueError(
                f"{name} needs a reference: either ref_logps, or ref_hidden with ref_weight (and ref_bias); "
                f"got {sorted(given) or 'none'}"
            )

    def _chosen_nll_labels(self, nll_labels: Tensor, labels: Tensor, end: int | Tensor) -> Tensor:
        """nll_labels with the rejected sequences, from flat position `end` on, ignored."""
        check_like("nll_labels", nll_labels, "labels", labels)
        nll_labels = checked_labels("nll_labels", nll_labels)
        position = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        nll_labels = nll_labels.masked_fill(position >= end, self.ignore_index)
        if validates(self.validate, labels.device) and not torch.compiler.is_compiling():
            both = (labels != self.ignore_index) & (nll_labels != self.ignore_index)
            if bool((both & (labels != nll_labels)).any()):
                raise ValueError("labels and nll_labels must agree where both are set: each is the next token")
        return nll_labels

    def _evaluate(self, tokens: Tensor, batch: Batch) -> Results:
        """The loss of a batch from its token log-probabilities (M,)."""
        fused = self._fused_name() if batch.backend == "triton" else None
        return self._plain(tokens, batch) if fused is None else self._fused(fused, tokens, batch)

    def _plain(self, tokens: Tensor, batch: Batch) -> Results:
        """By plain torch around the loss function."""
        offsets, sequences, labels = batch.offsets, batch.sequences, batch.labels
        count = sequences // 2 if self.paired else sequences
        weights = flat_token_weights(batch.token_weights, labels, self.ignore_index)
        if batch.nll_labels is not None:
            preferred = labels != self.ignore_index
            weights = preferred.double() if weights is None else weights * preferred
        sums = ops.sequence_sum(tokens, offsets, sequences, weights, batch.backend)
        logps, data, factors = sums, {n: _widened(value) for n, value in batch.data.items()}, batch.pair_weights
        if factors is not None and not self.couples_batch:
            # no gradient into dropped pairs, whose loss need not be finite; the losses of others may need them
            dropped = (factors == 0).expand(count)
            logps = torch.where(dropped.repeat(2 if self.paired else 1), sums.detach(), sums)
            data = {n: torch.where(dropped, v.detach(), v) if v.requires_grad else v for n, v in data.items()}
        lengths = labelled_tokens(labels, offsets, sequences, self.ignore_index).clamp(min=1)
        columns = {"logps": logps, "ref_logps": _widened(batch.ref_logps), "lengths": lengths}
        losses, *rewards = self._call(columns, data, count)
        weighted = losses if factors is None else torch.where(factors == 0, 0, losses * factors)
        loss = weighted.sum() / (max(count, 1) if batch.num_sequences is None else batch.num_sequences)
        if not self.paired:
            return Results(loss, losses, sums, rewards[0], torch.zeros_like(loss))
        nll_sums, counted = sums, labels
        if weights is not None:
            counted = labels if batch.nll_labels is None else batch.nll_labels
            nll_mask = (counted != self.ignore_index).double()
            nll_sums = ops.sequence_sum(tokens, offsets, sequences, nll_mask, batch.backend)
        num_tokens = batch.num_tokens
        if num_tokens is None:
            num_tokens = batch.nll_tokens(self.ignore_index)
        nll_loss = -nll_sums[:count].sum() / num_tokens
        if self.nll_weight:
            loss = loss + self.nll_weight * nll_loss
        return Results(loss, losses, sums, torch.cat(rewards), nll_loss)

    def _call(self, columns: dict[str, Tensor | None], extra: dict[str, Tensor], count: int) -> tuple[Tensor, ...]:
        """Call the loss function on its halves of the batch."""
        halves = {None: slice(None), 0: slice(None, count), 1: slice(count, None)}
        arguments: list[Any] = []
        for name in self.names:
            if name in self.filled:
                column, half = self.filled[name]
                values = columns[column]
                assert values is not None
                arguments.append(values[halves[half]])
            else:
                arguments.append(extra.get(name, self.defaults.get(name)))
        return self.evaluated(arguments, count)

    def evaluated(self, arguments: list[Any], count: int) -> tuple[Tensor, ...]:
        """What the loss function returns, if it is of the right form."""
        # it may work in place: not on what the NLL, the results, another loss or the caller hold
        copies = [self._copied(value) if isinstance(value, Tensor) else value for value in arguments]
        results: Any = self.fn(*copies, **self.options)
        expected = 3 if self.paired else 2
        got: Any = type(results).__name__
        if isinstance(results, tuple):
            got = [
                tuple(r.shape) if isinstance(r, Tensor) and r.is_floating_point() else getattr(r, "dtype", type(r))
                for r in results
            ]
        if got != [(count,)] * expected:
            raise ValueError(
                f"{self.fn_name} must return a tuple of {expected} float tensors of shape ({count},), got {got}"
            )
        return results

    def _copied(self, value: Tensor) -> Tensor:
        # a number times integers is float32: our own functions take them in float64
        return value.to(torch.float64 if self.ours and value.dtype != torch.bool else value.dtype, copy=True)

    def _fused_name(self) -> str | None:
        """The name of the fused kernel that computes this loss, if there is one."""
        numbers = all(isinstance(value, Real) for value in self.options.values())
        return next((name for fn, name in _FUSED if fn is self.fn and numbers), None)

    def _fused(self, loss: str, tokens: Tensor, batch: Batch) -> Results:
        """By the kernels that compute the loss with its sums."""
        defaults = {"label_smoothing": 0.0, "desirable_weight": 1.0, "undesirable_weight": 1.0}
        divisors = (
            torch.full((), value, device=tokens.device, dtype=torch.float64) if isinstance(value, float) else value
            for value in (batch.num_sequences, batch.num_tokens)
        )
        results = ops.preference(
            tokens,
            batch.token_weights,
            batch.labels,
            batch.nll_labels,
            batch.offsets,
            batch.sequences,
            batch.ref_logps,
            batch.data.get("desirable"),
            batch.data.get("kl"),
            batch.pair_weights,
            *divisors,
            loss,
            ignore_index=self.ignore_index,
            nll_weight=float(self.nll_weight),
            **{name: float(value) for name, value in (defaults | self.options).items()},
        )
        return Results(*results[:5])


def _check_keywords(what: str, known: dict[str, bool], given: dict[str, Any], hint: str = "") -> None:
    """`known` maps each name to whether it is required."""
    unknown = sorted(set(given) - set(known))
    missing = sorted(name for name, required in known.items() if required and given.get(name) is None)
    if unknown or missing:
        raise ValueError(f"{what} {sorted(known)}; unknown: {unknown}, missing: {missing}{hint}")


def _column(name: str, value: Any, count: int, device: torch.device) -> Tensor:
    """A datum as a tensor (count,) or 0-d."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a tensor ({count},) or 0-d, or a number; got {type(value).__name__}")
        # not torch.tensor, whose copy to a GPU waits for it
        value = torch.full((), float(value), device=device, dtype=torch.float64)
    if value.dim() and value.shape != (count,):
        raise ValueError(f"{name} must be ({count},), in the order of the batch, or 0-d; got {tuple(value.shape)}")
    if value.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype}")
    check_tensor(name, value)
    if value.dim() == 0 and value.device.type == "cpu" != device.type and not value.requires_grad:
        value = torch.full((), value.item(), device=device, dtype=torch.float64)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, hidden on {device}; move one of them")
    return savable(value)


def _given_reference(ref_logps: Any, sequences: int, device: torch.device) -> Tensor:
    if not isinstance(ref_logps, Tensor):
        raise ValueError(f"ref_logps must be a torch.Tensor ({sequences},), got {type(ref_logps).__name__}")
    ref = ref_logps if ref_logps.dim() == 0 else _column("ref_logps", ref_logps, sequences, device)
    if ref.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"ref_logps must be float32 or float64, got {ref.dtype}: sums in nats lose whole nats in 16 bits. "
            "FSDP2's cast_forward_inputs casts what a wrapped forward is given: set it False, or pass them around it"
        )
    if ref.requires_grad or ref.dim() == 0 or not ref.is_floating_point():
        raise ValueError(
            f"ref_logps must be ({sequences},) floating point without gradient, sums made under torch.no_grad(); "
            f"got {tuple(ref.shape)} {ref.dtype}, requires_grad={ref.requires_grad}"
        )
    return ref


def _widened(value: Any) -> Any:
    """In float64, or int64, in which differences of narrow integers do not wrap."""
    if value is None or value.dtype == torch.bool:
        return value
    return value.double() if value.is_floating_point() else value.long()


def _unwrapped(fn: Any) -> Any:
    """The function in a partial, a compiled function or any other that says what it wraps."""
    inside = fn.func if isinstance(fn, partial) else getattr(fn, "__wrapped__", None)
    return fn if inside is None else _unwrapped(inside)


def _divisor(name: str, value: Any, device: torch.device) -> float | Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        check_number(name, value, positive=True)
        return float(value)
    if value.dim() or value.device != device:
        raise ValueError(
            f"{name} must be a number or a 0-d tensor on {device}; got shape {tuple(value.shape)} on {value.device}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(value):
        check_number(name, value.item(), positive=True)
    return savable(value.detach())


class DPOLoss(PreferenceLoss):
    """`losses.dpo_loss` as a module: -log sigmoid(r_chosen - r_rejected), with r = beta log(pi / pi_ref).

    `label_smoothing` in [0, 0.5) gives cDPO. Other arguments as in `PreferenceLoss`.
    """

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(losses.dpo_loss, beta=beta, label_smoothing=label_smoothing, **options)


class IPOLoss(PreferenceLoss):
    """`losses.ipo_loss` as a module: (h - 1 / (2 beta))^2 on log-ratios per token. Arguments as in `PreferenceLoss`."""

    def __init__(self, *, beta: float = 0.1, **options: Any) -> None:
        super().__init__(losses.ipo_loss, beta=beta, **options)


class KTOLoss(PreferenceLoss):
    """`losses.kto_loss` as a module: w (1 - sigmoid(s (r - beta kl))), unpaired. Arguments as in `PreferenceLoss`.

    w is `desirable_weight` where s = +1, `undesirable_weight` where s = -1. The call takes `desirable`, bool (B,) or
    0-d, and `kl` in nats, 0-d or (B,), clamped at 0: 0.0 for none, or what `kto_kl` estimates from `mismatched_pairs`.
    """

    def __init__(
        self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(
            losses.kto_loss,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            **options,
        )


class CPOLoss(PreferenceLoss):
    """`losses.cpo_loss` with the NLL of the chosen tokens: -log sigmoid(beta (log pi_c - log pi_r)) + nll_weight NLL.

    Xu et al. 2024 (arXiv:2401.08417), eq. 5, with the NLL per token instead of per sequence. Reference-free. Other
    arguments as in `PreferenceLoss`.
    """

    def __init__(
        self, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(losses.cpo_loss, beta=beta, label_smoothing=label_smoothing, nll_weight=nll_weight, **options)


class ORPOLoss(PreferenceLoss):
    """`losses.orpo_loss` with the NLL of the chosen tokens: -beta log sigmoid(log odds ratio) + nll_weight NLL.

    Hong et al. 2024 (arXiv:2403.07691), eq. 6, with lambda = beta. The paper's NLL runs over prompt and response: give
    `nll_labels` for that. Reference-free. Other arguments as in `PreferenceLoss`.
    """

    def __init__(self, *, beta: float = 0.1, nll_weight: float = 1.0, **options: Any) -> None:
        super().__init__(losses.orpo_loss, beta=beta, nll_weight=nll_weight, **options)


class SimPOLoss(PreferenceLoss):
    """`losses.simpo_loss` as a module: -log sigmoid(r_chosen - r_rejected - gamma), r = beta log pi / |y|.

    Reference-free; CPO-SimPO with `nll_weight`. Other arguments as in `PreferenceLoss`.
    """

    def __init__(self, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(losses.simpo_loss, beta=beta, gamma=gamma, label_smoothing=label_smoothing, **options)


class SFTLoss(_HeadLoss):
    """The negative log-likelihood alone, in nats per labelled token. Options as in `linear_logprob`."""

    def __init__(self, **options: Any) -> None:
        _check_keywords("SFTLoss takes the options", dict.fromkeys(_HEAD_OPTIONS, False), options)
        super().__init__(**options)

    def forward(
        self,
        hidden: Tensor,  # (B, T, H), or packed (tokens, H) or (1, tokens, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # hidden's shape without H
        bias: Tensor | None = None,  # (V,)
        *,
        cu_seqlens: Tensor | None = None,  # (B + 1,)
        real_sequences: int | None = None,
        token_index: Tensor | None = None,  # (N,)
        token_weights: Tensor | None = None,  # the shape of labels
        num_tokens: float | Tensor | None = None,
        stats: Sequence[str] = (),
        **unknown: Any,
    ) -> UnpairedOutput:
        """The loss for labels aligned with hidden: `labels[..., t]` is what `hidden[..., t]` predicts, not HF's labels.

        loss = -sum of (weighted) token log-probabilities / num_tokens, by default the labelled tokens of this call.
        `losses` are the sequences' NLL sums (nats), `logps` their negatives; NLL implies no reward: `rewards` are 0.
        `cu_seqlens` and `real_sequences` as in `sequence_logprob`, `stats` as in `PreferenceLoss`.
        """
        _check_keywords("SFTLoss takes no further data", {}, unknown)
        labels = checked_labels("labels", labels)
        offsets, sequences = sequence_offsets(labels, cu_seqlens, self.validate, real_sequences, self.ignore_index)
        if token_weights is not None:
            check_like("token_weights", token_weights, "labels", labels)
            token_weights = savable(token_weights.detach()).reshape(-1)
        projection = project(hidden, weight, labels, bias, token_index=token_index, **self.head_options)
        divisor = _divisor("num_tokens", num_tokens, labels.device)
        batch = Batch(
            token_weights,
            projection.labels,
            None,
            offsets,
            sequences,
            False,
            ref_logps=None,
            data={},
            pair_weights=None,
            num_sequences=None,
            num_tokens=divisor,
            backend=projection.backend,
        )
        (loss, values, logps, rewards, _), scored = self._run(projection, batch, stats)
        dtype = projection.result_dtype
        output = UnpairedOutput(*(t.to(dtype) for t in (loss, values.detach(), logps.detach(), rewards)))
        return measured(output, scored)

    def _evaluate(self, tokens: Tensor, batch: Batch) -> Results:
        weights = flat_token_weights(batch.token_weights, batch.labels, self.ignore_index)
        sums = ops.sequence_sum(tokens, batch.offsets, batch.sequences, weights, batch.backend)
        num_tokens = batch.num_tokens
        if num_tokens is None:
            num_tokens = batch.nll_tokens(self.ignore_index)
        values, rewards = losses.sft_loss(sums)
        loss = values.sum() / num_tokens
        return Results(loss, values, sums, rewards, loss)
