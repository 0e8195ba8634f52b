"""A vocabulary split over processes: each holds some rows of the head, and all of them have the same tokens.

What is summed over the vocabulary is summed over the part of a process, then over the processes: per block of rows the
maxima, the sums of their exponentials, and U once the target's row has joined it, before it is rounded. From then on
every process has the sums of the whole vocabulary, so that the gradients of its part need nothing of the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from ..checks import check_tensor, is_dtensor
from ..kernels.state import (
    KL_GAP,
    KL_REF_SUM,
    KL_REF_TOP,
    KL_SUM,
    KL_TOP,
    REF,
    ROUNDED,
    ROUNDED_ZE,
    SUM,
    SUM_EE,
    SUM_Z,
    SUM_ZE,
    TARGET,
    TOP,
    rest_mean,
)
from .processes import check_agreement, gathered, split_by_rows

# labels in a part: of positions that are not scored, and of those whose target is in another part
IGNORED, ELSEWHERE = -100, -1


class Split(NamedTuple):
    """The parts of a vocabulary, one for each process of a group."""

    group: str  # the name of the ProcessGroup
    parts: tuple[int, ...]  # vocabulary entries, by rank in the group

    @property
    def total(self) -> int:
        return sum(self.parts)

    @property
    def widest(self) -> int:
        """What sizes follow from, so that they are the same on every process."""
        return max(self.parts)

    @property
    def process_group(self) -> Any:
        resolve: Any = dist.distributed_c10d._resolve_process_group
        return resolve(self.group)

    def local_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels (M,) of the whole vocabulary as those of this process's part, ELSEWHERE or IGNORED."""
        rank = dist.get_rank(self.process_group)
        local = labels - sum(self.parts[:rank])
        there = (local >= 0) & (local < self.parts[rank])
        return torch.where(there, local, ELSEWHERE).masked_fill_(labels == ignore_index, IGNORED)

    def combine(self, labels: Tensor, state: Tensor, u: Tensor | None, u2: Tensor | None) -> None:
        """Make sums over a part (9, C) those over the whole vocabulary; u and u2 become relative to them.

        In float64: with one centre of z - m for every part, what rounding leaves of a centred sum would cancel.
        """
        here = labels >= 0
        wide = state.double()
        mean = rest_mean(wide[SUM], wide[SUM_ZE])
        tops = self._largest(state, REF, TOP)
        shift = (state[REF] - tops[0]).double()
        decay = shift.exp()
        sums = torch.stack(
            [
                decay * wide[SUM],
                decay * (wide[SUM_ZE] + shift * wide[SUM]),
                wide[SUM_Z],
                decay**2 * wide[SUM_EE],
                decay * wide[ROUNDED],
                decay * (wide[ROUNDED_ZE] + (shift + mean) * wide[ROUNDED]),
                torch.where(here, wide[TARGET], 0),
                here.double(),
            ]
        )
        self.add_up(sums)
        whole_mean = rest_mean(sums[0], sums[1])
        if u is not None:
            if u2 is not None:
                moved = torch.where(decay == 0, 0, shift + mean - whole_mean)
                u2.addcmul_(u, moved.to(u.dtype)[:, None]).mul_(decay.to(u.dtype)[:, None])
            u.mul_(decay.to(u.dtype)[:, None])
        state[REF], state[TOP] = tops
        for row, values in zip((SUM, SUM_ZE, SUM_Z, SUM_EE, ROUNDED), sums[:5], strict=True):
            state[row] = values
        state[ROUNDED_ZE] = sums[5] - whole_mean * sums[4]
        state[TARGET] = torch.where(sums[7] == 1, sums[6], torch.nan)

    def combine_kl(self, state: Tensor) -> None:
        """Make the sums of a KL over a part, (5, C), those over the whole vocabulary."""
        tops = self._largest(state, KL_TOP, KL_REF_TOP)
        decay = (state[KL_TOP] - tops[0]).double().exp()
        ref_decay = (state[KL_REF_TOP] - tops[1]).double().exp()
        sums = torch.stack([decay * state[KL_SUM], ref_decay * state[KL_REF_SUM], ref_decay * state[KL_GAP]])
        self.add_up(sums)
        state[KL_TOP], state[KL_REF_TOP] = tops
        state[KL_SUM], state[KL_REF_SUM], state[KL_GAP] = sums

    def add_up(self, values: Tensor) -> None:
        """The sum over the processes, in place."""
        dist.all_reduce(values, group=self.process_group)

    def _largest(self, state: Tensor, *rows: int) -> Tensor:
        tops = torch.stack([state[row] for row in rows])
        dist.all_reduce(tops, dist.ReduceOp.MAX, group=self.process_group)
        return tops


def local_part(name: str, value: Any, group: Any) -> Any:
    """This process's part of a weight or bias: of a DTensor split over the group; anything else as it is."""
    if not is_dtensor(value):
        return value
    if not split_by_rows(value, group):
        raise ValueError(
            f"with vocab_group {name} must be a plain part of it, or a DTensor with the placement Shard(0) on the "
            f"processes of the group, {dist.get_process_group_ranks(group)}; got {value.placements} on "
            f"{value.device_mesh.mesh.tolist()}. Under FSDP2 across the data the head belongs into the unit of the "
            "whole, and the loss inside its forward"
        )
    return value.to_local()


def unwritten(**given: Any) -> Callable[[Tensor], None] | None:
    """A hook of a backward that needs DTensors: a RuntimeError where one was written to since; None without any.

    The local part, which an op saves, has a version of its own.
    """
    before = {name: value._version for name, value in given.items() if is_dtensor(value)}

    def check(_: Tensor) -> None:
        for name, version in before.items():
            if given[name]._version != version:
                raise RuntimeError(
                    f"the backward needs {name} as the forward had it, and it was written to in place: at version "
                    f"{given[name]._version} after {version}"
                )

    return check if before else None


def check_part(name: str, weight: Tensor) -> None:
    """A ValueError for what cannot be a part (rows, H), be it an empty one."""
    check_tensor(name, weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"with vocab_group {name} must be a part (rows, H) of the head, got {tuple(weight.shape)}")


def agree(
    group: Any,
    rows: int,
    hidden: Tensor,
    labels: Tensor,
    token_index: Tensor | None,
    same: dict[str, Any],
    least: tuple[int, ...],
) -> tuple[Split, list[int]]:
    """The parts of every process, and the least of each of some numbers; a ValueError on each of them otherwise.

    rows: of the part of this process; hidden: (M, H), which may differ by rounding; same: what has to be the same on
    all of them, by name. One collective, and one wait for a GPU.
    """
    tokens = {"tokens": len(labels), "labels": labels, "positions": token_index}
    numbers = {f"least {place}": number for place, number in enumerate(least)}
    found, measures = gathered(group, {"rows": rows} | numbers | tokens | same, _measures(hidden, token_index))
    if any(len(set(found[name])) > 1 for name in tokens):
        raise ValueError(
            "with vocab_group every process has the same hidden states and labels, and a part of the head; the "
            f"processes of the group have {found['tokens']} tokens, with other labels or token_index on some. The "
            "processes of FSDP or DDP, which have tokens of their own, are no vocab_group"
        )
    check_agreement("vocab_group", found, same)
    if apart := _apart(measures).nonzero().flatten().tolist():
        raise ValueError(
            f"with vocab_group every process has the same hidden states; those of ranks {apart} in the group differ "
            "from those of rank 0 by more than rounding, as where each drops out values of its own"
        )
    if sum(found["rows"]) == 0:
        raise ValueError("with vocab_group the parts of the head are all empty: V must be at least 1")
    return Split(group.group_name, tuple(found["rows"])), [min(found[name]) for name in numbers]


def _measures(hidden: Tensor, token_index: Tensor | None) -> Tensor:
    """Of 64 scored rows at most, spread over all of them, the norms and two projections, (3 * 64,)."""
    found = torch.zeros(3, 64, dtype=torch.float64, device=hidden.device)
    scored = len(hidden) if token_index is None else len(token_index)
    if scored and len(hidden) and not is_batchedtensor(hidden):
        rows = torch.arange(0, scored, -(-scored // 64), device=hidden.device)
        if token_index is not None:  # what padding holds need not be the same
            rows = token_index[rows].clamp(0, len(hidden) - 1)
        rows = hidden.detach()[rows].double()
        angles = torch.arange(1.0, hidden.shape[1] + 1, dtype=torch.float64, device=hidden.device)
        sums = [(rows * directions).sum(1) for directions in (angles.cos(), angles.sin())]
        found[:, : len(rows)] = torch.stack([rows.norm(dim=1), *sums]).nan_to_num(0, 0, 0)
    return found.flatten()


def _apart(measures: Tensor) -> Tensor:
    """Which processes have other rows than the first, (processes,): by more than 5 % of their length in a projection.

    Rounding to bf16 moves it by 0.2 %.
    """
    lengths, *projections = measures.view(len(measures), 3, 64).unbind(1)
    longest = torch.maximum(lengths, lengths[0])
    return torch.stack([(each - each[0]).abs() > 0.05 * longest for each in projections], 2).flatten(1).any(1)
