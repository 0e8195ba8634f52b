"""Sequences of which each process of a group holds a part: their sums, alike on every process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def checked_group(name: str, group: Any) -> Any:
    """The ProcessGroup of a group, or of a DeviceMesh of one dimension, that this process is in; None for None."""
    if group is None:
        return None
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh) and group.ndim == 1:
            group = group.get_group()
        if isinstance(group, dist.ProcessGroup):
            return group
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name} must be a group that this process is in; rank {dist.get_rank()} is not")
    elif not isinstance(group, (str, int, list, tuple)):
        raise ValueError(f"{name} needs torch.distributed.init_process_group() before the call")
    raise ValueError(f"{name} must be a ProcessGroup or a DeviceMesh of one dimension, got {group!r}")


def check_sequences(group: Any, sequences: int, device: torch.device) -> None:
    """A ValueError on every process of a group, where they have parts of different numbers of sequences."""
    mine = torch.tensor([sequences], device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    counts = [int(count) for count in every]
    if len(set(counts)) > 1:
        raise ValueError(
            "with sequence_group every process has a part of every sequence, be it an empty one; the processes of the "
            f"group have {counts} sequences. Processes that have sequences of their own need no group"
        )


def sums_over(group: Any, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of some (S,) added up over the processes of a group in float64, in one collective; as they are without one.

    Every process goes on with the same sums to the same loss. Its gradient counts once for each of them, so that the
    mean of the processes' gradients, which DDP and FSDP take, is that of one process with whole sequences.
    """
    if group is None:
        return values
    return tuple(_SumsOver.apply(torch.stack([value.double() for value in values]), group).unbind())


class _SumsOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.size = dist.get_world_size(group)
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None
