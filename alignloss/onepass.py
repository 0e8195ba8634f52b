"""Regime 3: a training step of a trainable head in one pass over its tokens, 3 GEMMs.

For a group of whole sequences whose logits fit the workspace: the tiles stay in memory as exponentials while U and the
statistics accumulate as in regime 2; then the loss of the group, a plain torch function of its log-probabilities, gives
one coefficient per token by autograd; then every tile becomes the gradient of its logits in place, and adds its part
to dweight. Sequences that fit no group come last: their tiles are computed a second time and add to the same dweight,
4 GEMMs. That gradient belongs to a loss with upstream gradient 1; the backward multiplies it by the real one and hands
its buffers over, so that a second backward (retain_graph=True) has to make the pass again.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .backends import STATE_ROWS
from .checks import check_kept
from .logprob import Projection, labelled_tokens
from .planning import fill_groups

__all__ = ["Batch", "NeedsGraph", "Results", "train_in_one_pass"]


class Results(NamedTuple):
    """What a loss gives for a batch of S sequences, B pairs (sequences if unpaired)."""

    loss: Tensor  # 0-d
    losses: Tensor  # (B,)
    sums: Tensor  # (S,)
    rewards: Tensor  # (S,)
    nll_loss: Tensor  # 0-d


class Batch(NamedTuple):
    """What a loss takes beside the token log-probabilities of S sequences with M tokens, checked."""

    token_weights: Tensor | None  # (M,)
    labels: Tensor  # (M,)
    nll_labels: Tensor | None  # (M,)
    offsets: Tensor | None  # (S + 1,) int64; None: S parts of one length
    sequences: int
    paired: bool
    ref_logps: Tensor | None  # (S,)
    data: dict[str, Tensor]  # each (B,) or 0-d
    pair_weights: Tensor | None  # (B,) or 0-d
    num_sequences: float | Tensor | None
    num_tokens: float | Tensor | None
    backend: str

    def nll_tokens(self, ignore_index: int) -> Tensor:
        """Tokens of the NLL, at least 1: of the chosen sequences if paired, of all otherwise."""
        labels = self.labels if self.nll_labels is None else self.nll_labels
        counts = labelled_tokens(labels, self.offsets, self.sequences, ignore_index)
        return counts[: self.sequences // 2 if self.paired else None].sum().clamp(min=1)

    def select(self, units: list[int], numbers: list[int], parts: list[slice]) -> "Batch":
        """Some pairs (sequences if unpaired) as a packed batch, given the numbers and tokens of their sequences."""
        offsets = [0, *accumulate(part.stop - part.start for part in parts)]

        def take(values: Tensor, which: list[int]) -> Tensor:
            return values[torch.tensor(which, device=values.device)] if values.dim() else values

        return self._replace(
            token_weights=None if self.token_weights is None else pieces(self.token_weights, parts),
            labels=pieces(self.labels, parts),
            nll_labels=None if self.nll_labels is None else pieces(self.nll_labels, parts),
            offsets=torch.tensor(offsets, device=self.labels.device),
            sequences=len(numbers),
            ref_logps=None if self.ref_logps is None else take(self.ref_logps, numbers),
            data={name: take(value, units) for name, value in self.data.items()},
            pair_weights=None if self.pair_weights is None else take(self.pair_weights, units),
        )


def pieces(values: Tensor, parts: list[slice]) -> Tensor:
    return torch.cat([values[part] for part in parts])


class NeedsGraph(Exception):
    """The loss differentiates something beside the log-probabilities, which only a graph of the whole step reaches."""


def train_in_one_pass(
    projection: Projection,
    batch: Batch,
    evaluate: Callable[[Tensor, Batch], Results],
    stats: Sequence[Tensor | None] = (),  # (M,) of each of backends.STATS that is asked for; filled
) -> Results | None:
    """The results of a step that trains hidden states and head, in one pass; None where that does not apply.

    Pairs (sequences, if unpaired) go into groups whose tiles fit the workspace; those that fit no group are a last one,
    whose tiles are recomputed. Raises NeedsGraph.
    """
    trains = projection.hidden.requires_grad and projection.trains_head
    if not (torch.is_grad_enabled() and trains) or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    index = projection.token_index
    rows = projection.labels.numel() if index is None else index.numel()
    if rows == 0:
        return None
    if rows <= projection.footprint.capacity(False, projection.workspace_bytes, asked(stats)):
        found: list[Results] = []
        loss = _one_pass(projection, [index], [_share(evaluate, batch, None, found)], 1, stats)
        return found[0]._replace(loss=loss)
    return _in_groups(projection, batch, evaluate, stats)


def asked(stats: Sequence[Tensor | None]) -> int:
    """Bits of the statistics of backends.STATS that have a place to go."""
    return sum(1 << i for i, values in enumerate(stats) if values is not None)


def _share(
    evaluate: Callable[[Tensor, Batch], Results], batch: Batch, parts: list[slice] | None, found: list[Results]
) -> Callable[[Tensor], Tensor]:
    """A function from the token log-probabilities (M,) to the loss of a batch, which keeps its results in `found`."""

    def share(tokens: Tensor) -> Tensor:
        results = evaluate(tokens if parts is None else pieces(tokens, parts), batch)
        if tokens.is_leaf and _leaves(results.loss) != {tokens}:
            raise NeedsGraph
        found.append(Results(*(value.detach() for value in results)))
        return results.loss

    return share


def _leaves(value: Tensor) -> set[Tensor]:
    """The tensors that a graph ends in."""
    leaves, seen, stack = set(), set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        stack.extend(next_node for next_node, _ in node.next_functions)
    return leaves


def _in_groups(
    projection: Projection,
    batch: Batch,
    evaluate: Callable[[Tensor, Batch], Results],
    stats: Sequence[Tensor | None],
) -> Results | None:
    tokens, index = projection.labels.numel(), projection.token_index
    ignore_index = projection.ignore_index
    most = projection.footprint.capacity(True, projection.workspace_bytes, asked(stats))
    # which tokens are whose is not known of an index that the caller made, and not worth waiting for a GPU
    if most == 0 or (index is not None and not projection.sorted_index):
        return None
    per_sequence = labelled_tokens(projection.labels, batch.offsets, batch.sequences, ignore_index).tolist()
    if sum(per_sequence) != (tokens if index is None else index.numel()):
        return None
    if index is None:
        index = torch.arange(tokens, device=projection.labels.device)
    if batch.offsets is None:
        length = tokens // batch.sequences
        bounds = [(s * length, (s + 1) * length) for s in range(batch.sequences)]
    else:
        bounds = list(pairwise(batch.offsets.tolist()))
    half = batch.sequences // 2
    counts = (
        [a + b for a, b in zip(per_sequence[:half], per_sequence[half:], strict=True)] if batch.paired else per_sequence
    )
    groups, rest = fill_groups(counts, most)
    if not groups:
        return None
    batch = batch._replace(
        num_sequences=float(len(counts)) if batch.num_sequences is None else batch.num_sequences,
        num_tokens=batch.nll_tokens(ignore_index) if batch.num_tokens is None else batch.num_tokens,
    )
    ends = list(accumulate(per_sequence, initial=0))
    found: list[Results] = []
    indices, shares, numbers = [], [], []
    for units in [*groups, rest] if rest else groups:
        chosen = units + [half + unit for unit in units] if batch.paired else units
        parts = [slice(*bounds[s]) for s in chosen]
        numbers.append(chosen)
        indices.append(torch.cat([index[ends[s] : ends[s + 1]] for s in chosen]))
        shares.append(_share(evaluate, batch.select(units, chosen, parts), parts, found))
    return _merged(_one_pass(projection, indices, shares, len(groups), stats), found, numbers)


def _merged(loss: Tensor, found: list[Results], numbers: list[list[int]]) -> Results:
    """The results of groups in the order of the batch; `numbers` holds the sequences of each, units first."""
    units = [chosen[: len(results.losses)] for chosen, results in zip(numbers, found, strict=True)]
    order, unit_order = (
        torch.tensor(list(chain.from_iterable(lists)), device=loss.device).argsort() for lists in (numbers, units)
    )
    sums, rewards = (torch.cat(values)[order] for values in ([r.sums for r in found], [r.rewards for r in found]))
    losses = torch.cat([results.losses for results in found])[unit_order]
    return Results(loss, losses, sums, rewards, torch.stack([results.nll_loss for results in found]).sum())


def _one_pass(
    projection: Projection,
    indices: Sequence[Tensor | None],  # scored positions of each group; None: every position
    shares: Sequence[Callable[[Tensor], Tensor]],  # of each group, its share of the loss from log-probabilities (M,)
    groups: int,  # whose tiles are held; those of what is left are recomputed
    stats: Sequence[Tensor | None],  # (M,) of each of backends.STATS; filled
) -> Tensor:
    """The sum of the groups' shares, 0-d, differentiable with respect to hidden, weight and bias."""
    if projection.validate:
        ops.check_values(
            projection.labels,
            projection.token_index,
            projection.ignore_index,
            len(projection.weight),
        )
    tensors = (projection.hidden, projection.weight, projection.bias)
    return _OnePass.apply(*tensors, projection, indices, shares, groups, stats)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        projection: Projection,
        indices: Sequence[Tensor | None],
        shares: Sequence[Callable[[Tensor], Tensor]],
        groups: int,
        stats: Sequence[Tensor | None],
    ) -> Tensor:
        projection = projection._replace(hidden=hidden, weight=weight, bias=bias)
        ctx.needs = ctx.needs_input_grad[1:3]
        losses: list[Tensor] = []
        slopes: list[Tensor] = []

        def differentiate(i: int, logps: Tensor) -> Tensor:
            with torch.enable_grad():
                tokens = logps.detach().requires_grad_()
                share = shares[i](tokens)
                slopes.extend(torch.autograd.grad(share, tokens))
            losses.append(share.detach())
            return slopes[-1]

        gradient, state, dlogp = _pass(projection, indices, groups, ctx.needs, differentiate, stats)
        dlogps = slopes[0] if len(slopes) == 1 else torch.stack(slopes).sum(0)
        ctx.save_for_backward(hidden, weight, bias, projection.labels, state, dlogp, dlogps, *indices)
        # without its tensors, which autograd has to guard
        ctx.options = projection[4:]
        ctx.gradient, ctx.groups = gradient, groups
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _OnePass.gradients(ctx, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.ones((), device=upstream.device, requires_grad=True)
            gradients = _OnlyFirstDerivatives.apply(anchor, *gradients)
        return *gradients, *[None] * 5

    @staticmethod
    def gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """dhidden, dweight and dbias."""
        hidden, weight, bias, labels, state, dlogp, dlogps, *indices = ctx.saved_tensors
        projection = Projection(hidden, weight, bias, labels, *ctx.options)
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            check_kept(hidden=hidden, weight=weight, bias=bias)
            gradient, *_ = _pass(projection, indices, ctx.groups, ctx.needs, lambda i, logps: dlogps)
        index = indices[0] if len(indices) == 1 else torch.cat(indices)
        dhidden, *_ = ops.linear_logprob_bwd(
            dlogps * upstream, None, None, None, None, labels, index, state, dlogp, dlogp.new_empty(0), False,
            hidden.dtype, projection.compute_dtype, projection.ignore_index, projection.logit_scale,
            projection.softcap, projection.temperature, 0, 1, False, False, projection.backend,
            projection.workspace_bytes,
        )  # fmt: skip
        with ops.device_guard(labels):
            dweight, dbias = gradient.times(upstream)
        return dhidden, dweight, None if dbias is None or bias is None else dbias.to(bias.dtype)


class _OnlyFirstDerivatives(torch.autograd.Function):
    """Gradients that raise an error where they would be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    backward = staticmethod(ops.no_double_backward)


def _pass(
    projection: Projection,
    indices: Sequence[Tensor | None],
    groups: int,  # the first ones, whose tiles are held
    needs: tuple[bool, bool],  # dweight, dbias
    differentiate: Callable[[int, Tensor], Tensor],  # group, log-probabilities (M,) -> their gradient (M,)
    stats: Sequence[Tensor | None] = (),  # (M,) of each of backends.STATS; filled
) -> tuple[ops.HeadGradient, Tensor, Tensor]:
    """The gradient of the head, and state (7, N) and d logp / d hidden (N, H) of the groups, one after the other."""
    hidden, weight, labels = projection.hidden, projection.weight, projection.labels
    options = projection.compute_dtype, projection.ignore_index, projection.transform, projection.backend
    wanted = list(stats) or [None] * len(backends.STATS)
    several = len(indices) > 1
    with ops.device_guard(hidden):
        problems = [ops.Problem(hidden, weight, None, labels, index, False, *options) for index in indices]
        bias = problems[0].widened(projection.bias)
        for problem in problems:
            problem.bias = bias
        new, rows = problems[0].empty, sum(problem.rows for problem in problems)
        state, dlogp = new(STATE_ROWS, rows), new(rows, hidden.shape[1], dtype=projection.compute_dtype)
        gradient = ops.HeadGradient(weight, *needs, problem=problems[0], several=several)
        largest = max(problem.rows for problem in problems[:groups])
        tiles: Tensor | None = new(largest * problems[0].footprint.pitch(len(weight)), dtype=problems[0].gemm_dtype)
        left = projection.workspace_bytes - problems[0].footprint.accumulator_bytes(several)
        start = 0
        for i, problem in enumerate(problems):
            part = slice(start, start := start + problem.rows)
            logps = new(labels.numel(), dtype=torch.float64)
            if indices[i] is not None:
                logps.zero_()
            outputs = [logps, *wanted]
            if i == groups:
                tiles = None
            held = None if tiles is None else ops.Held(problem, tiles)
            with ops.computing(hidden, projection.compute_dtype):
                ops.walk_forward(
                    problem, state[:, part], outputs, asked(stats), dlogp[part], None, left, held, recomputed=True
                )
            dlogps = differentiate(i, logps)
            with ops.computing(hidden, projection.compute_dtype):
                if held is not None:
                    gradient.add_held(problem, held, state[:, part], dlogps)
                else:
                    gradient.add_recomputed(problem, state[:, part], dlogps, asked(stats), left)
            del held
    return gradient, state, dlogp
