"""Any preference loss as a module: from hidden states to one scalar, around a function of sequence log-probabilities.

loss = sum(losses) / num_sequences + nll_weight * sum(NLL over the chosen tokens) / num_tokens
"""

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    check_binary,
    check_keywords,
    check_like,
    check_number,
    check_tensor,
    checked_labels,
    savable,
    validates,
)
from ..logprob import sequence_logprob
from ..losses import LOSSES
from ..ops.head import Projection, project
from ..ops.module_head import takes_modules
from ..ops.preference import preference, preference_backward
from ..ops.processes import sums_over
from ..ops.sequence import checked_token_weights, labelled_tokens, masked_weights, parts_layout, sequence_sum
from .function import LossFunction, WeightedSum, parameters_of
from .groups import Batch, NeedsGraph, Results
from .head import HEAD_OPTIONS, HeadLoss, divisor
from .outputs import PairedOutput, ScoredTokens, UnpairedOutput, measured


class PreferenceLoss(HeadLoss):
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

    Example:
        >>> def cubed(chosen_logps, rejected_logps, *, beta):
        ...     margins = beta * (chosen_logps - rejected_logps)
        ...     return (1 - margins) ** 3, (beta * chosen_logps).detach(), (beta * rejected_logps).detach()
        >>> loss_fn = alignloss.PreferenceLoss(cubed, beta=0.1)
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> labels = torch.tensor([[7, 0, 1], [2, 5, 6]])  # a chosen and a rejected sequence
        >>> loss_fn(hidden, weight, labels).loss
        tensor(1.)
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Tensor, ...]] | str,
        *,
        nll_weight: float | None = None,
        couples_batch: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**{name: options.pop(name) for name in HEAD_OPTIONS.keys() & options})
        if isinstance(fn, str):
            if fn not in LOSSES:
                raise ValueError(f"the losses by name are {sorted(LOSSES)}; got {fn!r}")
            fn = LOSSES[fn]
        if not callable(fn):
            raise ValueError(f"fn must be the name of a loss or a function, got {type(fn).__name__}")
        if nll_weight is not None and any(p.name == "nll_weight" for p in parameters_of(fn)):
            options["nll_weight"], nll_weight = nll_weight, None
        function = LossFunction(fn, options, reserved=inspect.signature(self.forward).parameters)
        self._take(function, nll_weight, couples_batch)

    def _take(self, function: LossFunction | WeightedSum, nll_weight: float | None, couples_batch: bool) -> None:
        """Become the module of a loss function."""
        self.function = function
        self.couples_batch = couples_batch or function.couples_batch
        self._needs_graph = False  # the loss differentiates something beside the log-probabilities
        self.nll_weight = 0.0 if nll_weight is None else nll_weight
        check_number("nll_weight", self.nll_weight)
        if nll_weight and not self.paired:
            raise ValueError(
                f"nll_weight adds the NLL of chosen sequences and {function.name} is unpaired; use SFTLoss beside it"
            )

    @property
    def paired(self) -> bool:
        return self.function.paired

    @property
    def needs_reference(self) -> bool:
        return self.function.needs_reference

    @property
    def data(self) -> dict[str, bool]:
        """The data of the call, by name, and whether each is required."""
        return self.function.data

    def extra_repr(self) -> str:
        nll = f"nll_weight={self.nll_weight}" if self.nll_weight else ""
        return ", ".join(filter(None, [repr(self.function), nll, super().extra_repr()]))

    @takes_modules("weight")
    def forward(
        self,
        hidden: Tensor,  # (2B, T, H), or (B, T, H) if unpaired; packed (tokens, H) or (1, tokens, H)
        weight: Tensor | nn.Module,  # (V, H)
        labels: Tensor,  # hidden's shape without H
        bias: Tensor | None = None,  # (V,)
        *,
        ref_logps: Tensor | None = None,  # (2B,), or (B,) if unpaired
        ref_hidden: Tensor | None = None,  # hidden's leading shape, of any H
        ref_weight: Tensor | nn.Module | None = None,  # (V, H of the reference)
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
        sequence_group: Any = None,
        vocab_group: Any = None,
        **data: Any,
    ) -> Any:
        """The loss for labels aligned with hidden: `labels[..., t]` is what `hidden[..., t]` predicts, not HF's labels.

        Args:
            hidden, weight, labels, bias, token_index, vocab_group: as in `linear_logprob`. For a paired loss the B
                chosen sequences come first, then the B rejected ones, padded or packed.
            ref_logps: the reference's sums in nats, in the order of the batch, without gradient. Or:
            ref_hidden, ref_weight, ref_bias: the reference's hidden states and head, projected here without gradient,
                with this module's logit_scale, softcap and temperature; with vocab_group a part of its head too.
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
            sequence_group: the processes that each hold a part of every sequence, as in `sequence_logprob`: the loss is
                that of whole sequences, and so are its gradients once they are averaged over the processes; ref_logps,
                pair_weights and data are those of whole sequences, the same on every process. The logits are computed
                again in the backward, 4 GEMMs; `metrics()` counts the tokens of this process.
            data: the other positional parameters of the loss function, each (B,) or 0-d; `desirable` is bool, or 0 and
                1, whoever's the function is: `metrics()` splits its means by it.

        Returns:
            PairedOutput or UnpairedOutput, in float32 (float64 for float64 input).

        Raises:
            ValueError: for anything missing, unknown, of the wrong shape, or that the loss would ignore. Under
                torch.compile, where a number may be symbolic, numbers are not checked.
        """
        check_keywords(f"{type(self).__name__} takes the data", self.data, data)
        self._check_reference(ref_logps=ref_logps, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
        self._check_nll(nll_labels=nll_labels, num_tokens=num_tokens)
        labels, checks = checked_labels("labels", labels), (self.validate, real_sequences, self.ignore_index)
        asked = self.function.made_of, self.nll_weight, self.couples_batch, self.bits(stats)
        whole = {"ref_logps": ref_logps, "pair_weights": pair_weights} | data
        whole |= {"num_sequences": num_sequences, "num_tokens": num_tokens}
        groups = sequence_group, vocab_group, self.alike(asked, whole)
        offsets, sequences, group = parts_layout(labels, cu_seqlens, *checks, *groups)
        of_call = {"token_index": token_index, "vocab_group": vocab_group}
        layout = {"cu_seqlens": cu_seqlens, "real_sequences": real_sequences, "token_weights": token_weights}
        nll_labels, scored_labels = self._scored_labels(nll_labels, labels, offsets, sequences)
        compared = whole | layout | {"nll_labels": nll_labels}
        projection = project(hidden, weight, scored_labels, bias, asked, compared, **of_call, **self.head_options)
        batch = Batch(labels.reshape(-1), offsets, sequences, self.paired, projection.options.backend, group=group)
        batch = self._with_data(batch, labels, token_weights, pair_weights, nll_labels, num_sequences, num_tokens, data)
        if ref_hidden is not None and ref_weight is not None:
            layout |= {"sequence_group": group, **of_call}
            batch = batch._replace(ref_logps=self._reference_logps(ref_hidden, ref_weight, labels, ref_bias, **layout))
        elif ref_logps is not None:
            batch = batch._replace(ref_logps=_given_reference(ref_logps, sequences, labels.device))
        return self._output(*self._evaluated(projection, batch, stats), batch, projection.result_dtype)

    def _check_nll(self, **given: Any) -> None:
        if not self.nll_weight and any(value is not None for value in given.values()):
            raise ValueError(f"{type(self).__name__} has nll_weight=0: {' and '.join(given)} would be ignored")

    def _check_reference(self, **reference: Tensor | nn.Module | None) -> None:
        name, given = type(self).__name__, {name for name, value in reference.items() if value is not None}
        if given and not self.needs_reference:
            raise ValueError(f"{name} is reference-free and would ignore {sorted(given)}; leave them out")
        projected = {"ref_hidden", "ref_weight"}
        if self.needs_reference and given not in ({"ref_logps"}, projected, projected | {"ref_bias"}):
            raise ValueError(
                f"{name} needs a reference: either ref_logps, or ref_hidden with ref_weight (and ref_bias); "
                f"got {sorted(given) or 'none'}"
            )

    def _scored_labels(
        self, nll_labels: Tensor | None, labels: Tensor, offsets: Tensor | None, sequences: int
    ) -> tuple[Tensor | None, Tensor]:
        """nll_labels with the rejected sequences ignored, and the labels of both."""
        if self.paired and sequences % 2:
            raise ValueError(f"a paired loss takes 2B sequences, chosen then rejected; got {sequences}, an odd number")
        if nll_labels is None:
            return None, labels
        check_like("nll_labels", nll_labels, "labels", labels)
        nll_labels = checked_labels("nll_labels", nll_labels)
        end = sequences // 2 * labels.shape[1] if offsets is None else offsets[sequences // 2]
        position = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        nll_labels = nll_labels.masked_fill(position >= end, self.ignore_index)
        if validates(self.validate, labels.device) and not torch.compiler.is_compiling():
            both = (labels != self.ignore_index) & (nll_labels != self.ignore_index)
            if bool((both & (labels != nll_labels)).any()):
                raise ValueError("labels and nll_labels must agree where both are set: each is the next token")
        return nll_labels, torch.where(labels != self.ignore_index, labels, nll_labels)

    def _with_data(
        self,
        batch: Batch,
        labels: Tensor,
        token_weights: Tensor | None,
        pair_weights: Tensor | None,
        nll_labels: Tensor | None,
        num_sequences: float | Tensor | None,
        num_tokens: float | Tensor | None,
        data: dict[str, Any],
    ) -> Batch:
        """A batch with all that a call gives beside labels and reference, checked."""
        device = labels.device
        columns = {n: _column(n, value, batch.units, device) for n, value in data.items() if value is not None}
        if "desirable" in columns and validates(self.validate, device) and not torch.compiler.is_compiling():
            check_binary("desirable", columns["desirable"])
        if pair_weights is not None:
            pair_weights = _column("pair_weights", pair_weights, batch.units, device).detach()
        return batch._replace(
            token_weights=checked_token_weights(token_weights, labels),
            nll_labels=None if nll_labels is None else nll_labels.reshape(-1),
            data=columns,
            pair_weights=pair_weights,
            num_sequences=divisor("num_sequences", num_sequences, device),
            num_tokens=divisor("num_tokens", num_tokens, device),
        )

    def _reference_logps(
        self, hidden: Tensor, weight: Tensor | nn.Module, labels: Tensor, bias: Tensor | None, **layout: Any
    ) -> Tensor:
        try:
            with torch.no_grad():
                return sequence_logprob(hidden, weight, labels, bias, **layout, **self.head_options).logps
        except ValueError as error:
            raise ValueError(f"the reference, ref_hidden with ref_weight: {error}") from error

    def _evaluated(self, projection: Projection, batch: Batch, stats: Sequence[str]) -> tuple[Results, ScoredTokens]:
        trained_data = any(value.requires_grad for value in batch.data.values())
        # what this process has learnt of the loss, others of the vocabulary may not have
        needs_graph = trained_data or (self._needs_graph and projection.options.split is None)
        # how many groups it would take differs between processes, which sum up their sequences together
        one_pass = not (self.couples_batch or needs_graph or batch.group is not None)
        differentiated = None if self._kernel(batch) is None else self._differentiated
        try:
            return self.run(projection, batch, self._evaluate, stats, one_pass, differentiated)
        except NeedsGraph:
            self._needs_graph = True
            return self.run(projection, batch, self._evaluate, stats, one_pass=False)

    def _output(
        self, results: Results, scored: ScoredTokens, batch: Batch, dtype: torch.dtype
    ) -> PairedOutput | UnpairedOutput:
        loss = results.loss.to(dtype)
        losses, sums, rewards, nll_loss = (t.detach().to(dtype) for t in results[1:])
        if not batch.paired:
            scored = scored._replace(desirable=batch.data.get("desirable"), kl=batch.data.get("kl"))
            return measured(UnpairedOutput(loss, losses, sums, rewards), scored)
        count = batch.units
        halves = sums[:count], sums[count:], rewards[:count], rewards[count:]
        return measured(PairedOutput(loss, losses, *halves, nll_loss), scored)

    def _kernel(self, batch: Batch) -> str | None:
        """The name of the kernels that compute the loss with its sums."""
        return self.function.kernel if batch.backend == "triton" and batch.group is None else None

    def _evaluate(self, tokens: Tensor, batch: Batch) -> Results:
        """The loss of a batch from its token log-probabilities (M,)."""
        return self._plain(tokens, batch) if self._kernel(batch) is None else self._fused(tokens, batch)[0]

    def _differentiated(self, tokens: Tensor, batch: Batch) -> tuple[Results, Tensor]:
        """The loss by kernels, and its gradient with respect to the token log-probabilities (M,), without a graph."""
        results, slopes, scales = self._fused(tokens, batch)
        vectors = batch.token_weights, batch.labels, batch.nll_labels, batch.offsets
        one = torch.ones_like(results.loss)
        return results, preference_backward(one, slopes, scales, *vectors, self.paired, self.ignore_index)

    def _plain(self, tokens: Tensor, batch: Batch) -> Results:
        """By plain torch around the loss function."""
        offsets, sequences, labels = batch.offsets, batch.sequences, batch.labels
        count = batch.units
        weights = masked_weights(batch.token_weights, labels, self.ignore_index)
        if batch.nll_labels is not None:
            preferred = labels != self.ignore_index
            weights = preferred.double() if weights is None else weights * preferred
        sums = nll_sums = sequence_sum(tokens, offsets, sequences, weights, batch.backend)
        lengths = nll_lengths = labelled_tokens(labels, offsets, sequences, self.ignore_index)
        if self.paired and weights is not None:
            counted = labels if batch.nll_labels is None else batch.nll_labels
            nll_mask = (counted != self.ignore_index).double()
            nll_sums = sequence_sum(tokens, offsets, sequences, nll_mask, batch.backend)
            if batch.nll_labels is not None:
                nll_lengths = labelled_tokens(counted, offsets, sequences, self.ignore_index)
        sums, lengths, nll_sums, nll_lengths = sums_over(batch.group, sums, lengths, nll_sums, nll_lengths)
        logps, data, factors = sums, {n: _widened(value) for n, value in batch.data.items()}, batch.pair_weights
        if factors is not None and not self.couples_batch:
            # no gradient into dropped pairs, whose loss need not be finite; the losses of others may need them
            dropped = (factors == 0).expand(count)
            logps = torch.where(dropped.repeat(2 if self.paired else 1), sums.detach(), sums)
            data = {n: torch.where(dropped, v.detach(), v) if v.requires_grad else v for n, v in data.items()}
        columns = {"logps": logps, "ref_logps": _widened(batch.ref_logps), "lengths": lengths.long().clamp(min=1)}
        losses, *rewards = self.function(columns, data, count)
        weighted = losses if factors is None else torch.where(factors == 0, 0, losses * factors)
        loss = weighted.sum() / (max(count, 1) if batch.num_sequences is None else batch.num_sequences)
        if not self.paired:
            return Results(loss, losses, sums, rewards[0], torch.zeros_like(loss))
        num_tokens = batch.num_tokens
        if num_tokens is None:
            num_tokens = nll_lengths[:count].sum().clamp(min=1)
        nll_loss = -nll_sums[:count].sum() / num_tokens
        if self.nll_weight:
            loss = loss + self.nll_weight * nll_loss
        return Results(loss, losses, sums, torch.cat(rewards), nll_loss)

    def _fused(self, tokens: Tensor, batch: Batch) -> tuple[Results, Tensor, Tensor]:
        """By kernels, with the slopes and scales that its gradient is made of."""
        options = {"label_smoothing": 0.0, "desirable_weight": 1.0, "undesirable_weight": 1.0} | self.function.options
        divisors = (
            torch.full((), value, device=tokens.device, dtype=torch.float64) if isinstance(value, float) else value
            for value in (batch.num_sequences, batch.num_tokens)
        )
        *results, slopes, scales = preference(
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
            self._kernel(batch),
            self.ignore_index,
            float(self.nll_weight),
            *(float(options[name]) for name in ("beta", "label_smoothing", "desirable_weight", "undesirable_weight")),
        )
        return Results(*results), slopes, scales


def _column(name: str, value: Any, count: int, device: torch.device) -> Tensor:
    """A datum as a tensor (count,) or 0-d."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a tensor ({count},) or 0-d, or a number; got {type(value).__name__}")
        # not torch.tensor, whose copy to a GPU waits for it
        value = torch.full((), float(value), device=device, dtype=torch.float64)
    check_tensor(name, value)
    if value.dim() and value.shape != (count,):
        raise ValueError(f"{name} must be ({count},), in the order of the batch, or 0-d; got {tuple(value.shape)}")
    if value.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype}")
    if value.dim() == 0 and value.device.type == "cpu" != device.type and not value.requires_grad:
        value = torch.full((), value.item(), device=device, dtype=torch.float64)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, hidden on {device}; move one of them")
    return savable(value)


def _given_reference(ref_logps: Any, sequences: int, device: torch.device) -> Tensor:
    check_tensor("ref_logps", ref_logps, f"; give the sums of {sequences} sequences")
    fits = ref_logps.shape == (sequences,)
    ref = _column("ref_logps", ref_logps, sequences, device) if fits else ref_logps
    if ref.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"ref_logps must be float32 or float64, got {ref.dtype}: sums in nats lose whole nats in 16 bits. "
            "FSDP2's cast_forward_inputs casts what a wrapped forward is given: set it False, or pass them around it"
        )
    if ref.requires_grad or not fits or not ref.is_floating_point():
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
