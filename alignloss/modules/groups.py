"""A batch of pairs or sequences, and how it goes through one pass: in groups of whole ones that fit the workspace."""

from collections.abc import Callable
from itertools import accumulate, chain, pairwise, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import is_fake, leaves_of
from ..ops.head import Projection
from ..ops.logprob import output_dtypes
from ..ops.onepass import Share, by_autograd, one_pass
from ..ops.sequence import labelled_tokens
from ..ops.sizes import fill_groups


class Results(NamedTuple):
    """What a loss gives for a batch of S sequences, B pairs (sequences if unpaired)."""

    loss: Tensor  # 0-d
    losses: Tensor  # (B,)
    sums: Tensor  # (S,)
    rewards: Tensor  # (S,)
    nll_loss: Tensor  # 0-d


class Batch(NamedTuple):
    """What a loss takes beside the token log-probabilities of S sequences with M tokens, checked."""

    labels: Tensor  # (M,)
    offsets: Tensor | None  # (S + 1,) int64; None: S parts of one length
    sequences: int
    paired: bool
    backend: str
    token_weights: Tensor | None = None  # (M,)
    nll_labels: Tensor | None = None  # (M,)
    ref_logps: Tensor | None = None  # (S,)
    data: dict[str, Tensor] = {}  # each (B,) or 0-d  # noqa: RUF012
    pair_weights: Tensor | None = None  # (B,) or 0-d
    num_sequences: float | Tensor | None = None
    num_tokens: float | Tensor | None = None
    group: Any = None  # the processes that each hold a part of every sequence

    @property
    def units(self) -> int:
        """B, pairs, or sequences if unpaired."""
        return self.sequences // 2 if self.paired else self.sequences

    def nll_tokens(self, ignore_index: int) -> Tensor:
        """Tokens of the NLL, at least 1: of the chosen sequences if paired, of all otherwise."""
        labels = self.labels if self.nll_labels is None else self.nll_labels
        return labelled_tokens(labels, self.offsets, self.sequences, ignore_index)[: self.units].sum().clamp(min=1)

    def select(self, units: list[int], numbers: list[int], lengths: list[int], positions: Tensor) -> "Batch":
        """Some pairs (sequences if unpaired) as a packed batch, given the numbers and tokens of their sequences."""

        def take(values: Tensor, which: list[int]) -> Tensor:
            return values[torch.tensor(which, device=values.device)] if values.dim() else values

        return self._replace(
            token_weights=None if self.token_weights is None else self.token_weights[positions],
            labels=self.labels[positions],
            nll_labels=None if self.nll_labels is None else self.nll_labels[positions],
            offsets=torch.tensor([0, *accumulate(lengths)], device=self.labels.device),
            sequences=len(numbers),
            ref_logps=None if self.ref_logps is None else take(self.ref_logps, numbers),
            data={name: take(value, units) for name, value in self.data.items()},
            pair_weights=None if self.pair_weights is None else take(self.pair_weights, units),
        )


# a loss of a batch from its token log-probabilities (M,), and the same with its gradient with respect to them
Evaluate = Callable[[Tensor, Batch], Results]
Differentiated = Callable[[Tensor, Batch], tuple[Results, Tensor]]


class NeedsGraph(Exception):
    """The loss differentiates something beside the log-probabilities, which only a graph of the whole step reaches."""


def train_in_one_pass(
    projection: Projection,
    batch: Batch,
    evaluate: Evaluate,
    stats: int,  # bits of backends.STATS
    differentiated: Differentiated | None = None,
) -> tuple[Results, list[Tensor | None]] | None:
    """Results and statistics (M,) of a step that trains hidden states and head, in one pass; None if that cannot be.

    Pairs (sequences, if unpaired) go into groups whose tiles fit the workspace; those that fit no group are a last one,
    whose tiles are recomputed. Raises NeedsGraph.
    """
    found: list[Results] = []
    projection = projection.for_one_pass()
    if fits_one_group(projection, stats):
        values = room(projection, stats)
        share = _share(evaluate, differentiated, batch, None, found)
        loss = one_pass(projection, [projection.token_index], [share], 1, values)
        return found[0]._replace(loss=loss), values
    most = tokens_of_a_group(projection, stats)
    if not most:
        return None
    labels, ignore_index = projection.labels, projection.options.ignore_index
    counts = labelled_tokens(labels, batch.offsets, batch.sequences, ignore_index)
    # all that the host has to know of a batch, in one wait for a GPU
    known = (counts if batch.offsets is None else torch.cat([counts, batch.offsets])).tolist()
    if batch.offsets is None:
        length = labels.numel() // batch.sequences
        bounds = [(s * length, (s + 1) * length) for s in range(batch.sequences)]
    else:
        bounds = list(pairwise(known[batch.sequences :]))
    # the sequences of each pair
    members = [[unit, batch.units + unit] if batch.paired else [unit] for unit in range(batch.units)]
    groups = Groups.of(projection, known[: batch.sequences], members, most)
    if groups is None:
        return None
    batch = batch._replace(
        num_sequences=float(batch.units) if batch.num_sequences is None else batch.num_sequences,
        num_tokens=batch.nll_tokens(ignore_index) if batch.num_tokens is None else batch.num_tokens,
    )
    shares = []
    for units, chosen in zip(groups.units, groups.sequences, strict=True):
        ranges = [torch.arange(*bounds[s], device=labels.device) for s in chosen]
        positions = torch.cat(ranges)
        selected = batch.select(units, chosen, [len(each) for each in ranges], positions)
        shares.append(_share(evaluate, differentiated, selected, positions, found))
    values, order = room(projection, stats), _Order.of(groups.sequences, batch.units, labels.device)
    loss = one_pass(projection, groups.indices, shares, groups.held, values)
    return order.merged(loss, found), values


def fits_one_group(projection: Projection, stats: int) -> bool:
    """Whether a step trains hidden states and head, and the tiles of all of its tokens fit the workspace."""
    rows = _rows(projection)
    return 0 < rows <= projection.footprint.capacity(False, projection.options.workspace_bytes, stats)


def tokens_of_a_group(projection: Projection, stats: int) -> int:
    """Tokens that one of several groups may have in such a step; 0 where there can be none."""
    # which tokens are whose is not known of an index that the caller made, and not worth waiting for a GPU
    if _rows(projection) == 0 or (projection.token_index is not None and not projection.sorted_index):
        return 0
    return projection.footprint.capacity(True, projection.options.workspace_bytes, stats)


def _rows(projection: Projection) -> int:
    """N of a step that one pass can train, else 0."""
    trains = projection.hidden.requires_grad and projection.trains_head
    if not (torch.is_grad_enabled() and trains) or torch.compiler.is_compiling():
        return 0
    if torch._C._are_functorch_transforms_active():
        return 0
    if projection.options.backend == "triton" and is_fake(projection.hidden):  # a pass launches kernels itself
        return 0
    index = projection.token_index
    return projection.labels.numel() if index is None else index.numel()


def room(projection: Projection, stats: int) -> list[Tensor | None]:
    """Zeros (M,) for each of backends.STATS that is asked for."""
    _, *kinds = output_dtypes(projection.result_dtype)
    labels = projection.labels
    return [labels.new_zeros(labels.shape, dtype=kind) if stats >> i & 1 else None for i, kind in enumerate(kinds)]


class Groups(NamedTuple):
    """Units (pairs, or sequences) in groups whose tiles fit the workspace, and a last one of those that fit none."""

    units: list[list[int]]
    sequences: list[list[int]]  # of the units: the first one of each, then the second ones
    indices: list[Tensor]  # scored positions
    held: int  # how many groups have their tiles held

    @staticmethod
    def of(projection: Projection, scored: list[int], members: list[list[int]], most: int) -> "Groups | None":
        """From the labelled tokens of each sequence and the sequences of each unit; None if no unit fits a group."""
        labels, index = projection.labels, projection.token_index
        if index is None:
            index = torch.arange(labels.numel(), device=labels.device)
        if sum(scored) != index.numel():  # tokens that belong to no sequence
            return None
        groups, rest = fill_groups([sum(scored[s] for s in unit) for unit in members], most)
        if not groups:
            return None
        units = [*groups, rest] if rest else groups
        sequences = []
        for group in units:
            turns = zip_longest(*(members[unit] for unit in group))
            sequences.append([s for turn in turns for s in turn if s is not None])
        ends = list(accumulate(scored, initial=0))
        indices = [torch.cat([index[ends[s] : ends[s + 1]] for s in chosen]) for chosen in sequences]
        return Groups(units, sequences, indices, len(groups))


def _share(
    evaluate: Evaluate,
    differentiated: Differentiated | None,
    batch: Batch,
    positions: Tensor | None,  # of the tokens of the batch; None: all
    found: list[Results],  # what it computes is kept there
) -> Share:
    """The loss of a batch as a share of that of all token log-probabilities (M,)."""

    def by_kernels(logps: Tensor) -> tuple[Tensor, Tensor]:
        assert differentiated is not None
        results, slopes = differentiated(logps if positions is None else logps[positions], batch)
        found.append(results)
        everywhere = slopes if positions is None else torch.zeros_like(logps).index_copy_(0, positions, slopes)
        return results.loss, everywhere

    def share(tokens: Tensor) -> Tensor:
        results = evaluate(tokens if positions is None else tokens[positions], batch)
        check_leaves(results.loss, tokens)
        found.append(Results(*(value.detach() for value in results)))
        return results.loss

    return by_autograd(share) if differentiated is None else by_kernels


def check_leaves(loss: Tensor, tokens: Tensor) -> None:
    """NeedsGraph for a loss of one pass that depends on more than the log-probabilities, or not on them."""
    if tokens.is_leaf and leaves_of(loss) != {tokens}:
        raise NeedsGraph


class _Order(NamedTuple):
    """Where the results of groups belong in the batch."""

    sequences: Tensor  # (S,)
    units: Tensor  # (B,)

    @staticmethod
    def of(numbers: list[list[int]], units: int, device: torch.device) -> "_Order":
        """From the sequences of each group, the first ones of its units first; made before the pass, so that the copy
        to a GPU does not wait for it."""
        sequences = list(chain.from_iterable(numbers))
        both = (sequences, [number for number in sequences if number < units])
        return _Order(*(torch.tensor(order, device="cpu").argsort().to(device) for order in both))

    def merged(self, loss: Tensor, found: list[Results]) -> Results:
        sums, rewards = (
            torch.cat(values)[self.sequences] for values in ([r.sums for r in found], [r.rewards for r in found])
        )
        losses = torch.cat([results.losses for results in found])[self.units]
        return Results(loss, losses, sums, rewards, torch.stack([results.nll_loss for results in found]).sum())
