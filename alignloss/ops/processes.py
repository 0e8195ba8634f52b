"""Calls that concern other processes: sequences of which each holds a part, and heads whose gradients would not meet.

What is known of DistributedDataParallel and DTensor rests on private names of torch, which tests pin; where another
version has none of them, nothing is refused.
"""

import gc
import re
import weakref
import zlib
from collections.abc import Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..checks import GATHERED, INSIDE, problem_of


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


def check_apart(sequence_group: Any, vocab_group: Any) -> None:
    """A ValueError for processes that would have the same tokens, of one vocabulary, and parts of one sequence."""
    both = set(dist.get_process_group_ranks(sequence_group)) & set(dist.get_process_group_ranks(vocab_group))
    if len(both) > 1:
        raise ValueError(
            f"processes {sorted(both)} are in sequence_group, whose processes have other tokens each, and in "
            "vocab_group, whose processes have the same ones: give the two dimensions of a mesh"
        )


def check_sequences(group: Any, sequences: int, same: dict[str, Any], device: torch.device) -> None:
    """A ValueError on every process of a group whose parts are of different numbers of sequences, or data differ."""
    found, _ = gathered(group, {"sequences": sequences} | same, torch.empty(0, dtype=torch.float64, device=device))
    if len(set(found["sequences"])) > 1:
        raise ValueError(
            "with sequence_group every process has a part of every sequence, be it an empty one; the processes of the "
            f"group have {found['sequences']} sequences. Processes that have sequences of their own need no group"
        )
    check_agreement("sequence_group", found, same)


def gathered(group: Any, values: dict[str, Any], measures: Tensor) -> tuple[dict[str, list[int]], Tensor]:
    """By name what stands for a value on each process, and the measures (k,) float64 of each, (processes, k).

    An int stands for itself, for anything else a sum of its `_leaves`. Names and k are the same on every process,
    whatever their calls are. One collective, on the device of the measures, and one wait for a GPU.
    """
    numbers, sums = [], []
    for name, value in values.items():
        leaves = dict(_leaves("", value))
        tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
        if any(map(is_batchedtensor, tensors.values())):
            raise ValueError(
                f"between processes there is no torch.func.vmap over {name}: give the batch as a leading dimension"
            )
        texts = sorted(f"{path}={_kind(leaf) if path in tensors else leaf}" for path, leaf in leaves.items())
        numbers.append(value if type(value) is int else zlib.crc32("\n".join(texts).encode()))
        sums.append([(2 * zlib.crc32(path.encode()) + 1) * _checksum(leaf) for path, leaf in tensors.items()])
    mine = torch.tensor(numbers, dtype=torch.int64, device=measures.device)
    for place, parts in enumerate(sums):
        for part in parts:
            mine[place] += part.to(mine.device)
    mine = torch.cat([mine, measures.view(torch.int64)])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    table = torch.stack(every)
    found = dict(zip(values, table[:, : len(values)].T.tolist(), strict=True))
    return found, table[:, len(values) :].view(torch.float64)


def check_agreement(argument: str, found: dict[str, list[int]], same: dict[str, Any]) -> None:
    """A ValueError for what is not the same on every process, where what stands for it was gathered."""
    differing = [f"{name} (here {_shown(value)})" for name, value in same.items() if len(set(found[name])) > 1]
    if differing:
        raise ValueError(
            f"with {argument} the calls of all processes must agree, and these differ: {', '.join(differing)}"
        )


def _shown(value: Any) -> str:
    """A value without those of tensors."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_shown(each)}" for name, each in value.items() if each is not None) + "}"
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {value.dtype}" if problem_of(value) is None else f"a {type(value).__name__}"


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors in a value, and the texts that stand for whatever else is in it, by path.

    None is the same as nothing, 2 as 2.0, a function its name and what a partial binds: not what it closes over.
    """
    if isinstance(value, partial):
        value = {"function": value.func, "given": value.args} | value.keywords
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(f"{path}.{name}", each)
    elif isinstance(value, Tensor):
        yield path, value if problem_of(value) is None else f"{type(value).__name__} {value.layout} {value.device.type}"
    elif isinstance(value, Integral) and not isinstance(value, bool):
        yield path, repr(int(value))
    elif isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        yield path, repr(int(number) if number.is_integer() else number)
    elif hasattr(value, "__qualname__"):
        yield path, f"{value.__module__}.{value.__qualname__}"
    elif getattr(getattr(value, "dtype", None), "kind", "O") in "biufc":  # which prints some of its numbers
        yield path, torch.as_tensor(value)
    elif value is not None:
        yield path, re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _kind(values: Tensor) -> tuple[Any, ...]:
    """What of a tensor is compared beside its values: not its precision."""
    trains = values.requires_grad and torch.is_grad_enabled()
    return tuple(values.shape), values.is_floating_point(), values.is_complex(), values.dtype == torch.bool, trains


def _checksum(values: Tensor) -> Tensor:
    """0-d int64 that tells values and their order apart."""
    values = values.detach().reshape(-1)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj()).reshape(-1)
    if values.is_floating_point():  # one NaN, one 0
        values = values.double()
        values = torch.where(values.isnan(), torch.nan, values + 0).view(torch.int64)
    # the place goes in before the bits are mixed: a sum of products would be the same of values that change places
    mixed = (
        values.long() ^ (torch.arange(1, len(values) + 1, device=values.device) * 2654435761)
    ) * 6364136223846793005
    mixed = (mixed ^ (mixed >> 29)) * 2862933555777941757
    return (mixed ^ (mixed >> 32)).sum()


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


def check_gradient_meets_others(weight: Tensor, group: Any) -> None:
    """A ValueError for a head whose gradients, or those of the hidden states, would be those of this process alone.

    group: the processes that it is split over, or None.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if weight.grad_fn is not None:
        _check_gathered(weight, group)
    elif isinstance(weight, nn.Parameter):
        _check_owners(weight)


def split_by_rows(value: Any, group: Any) -> bool:
    """Whether a DTensor, or the spec of one, is split by rows over the processes of a group, in their order."""
    from torch.distributed.tensor import Shard

    ranks = value.device_mesh.mesh.flatten().tolist()
    return value.placements == (Shard(0),) and ranks == dist.get_process_group_ranks(group)


def _check_gathered(weight: Tensor, group: Any) -> None:
    node: Any = weight.grad_fn
    while node is not None and not hasattr(node, "dtensor_spec"):  # casts and views of what left a DTensor
        following = [after for after, _ in node.next_functions if after is not None]
        node = following[0] if len(following) == 1 else None
    if node is None or node.dtensor_spec.mesh.size() == 1:
        return
    placements = node.dtensor_spec.placements
    if group is not None:
        if not split_by_rows(node.dtensor_spec, group):
            raise ValueError(
                f"weight was made of a DTensor {placements} on the processes {node.dtensor_spec.mesh.mesh.tolist()}; "
                "with vocab_group it is a part of the head, split by Shard(0) over those of the group, "
                f"{dist.get_process_group_ranks(group)}"
            )
        return
    if any(placement.is_shard() for placement in placements):
        raise ValueError(
            f"weight is the local shard of a DTensor {placements}; its probabilities would be those of a part of the "
            "head. Where the processes of its mesh have the same tokens, give them as vocab_group; elsewhere "
            f"{INSIDE}, or, {GATHERED}"
        )
    if node.grad_placements is None:
        raise ValueError(
            "weight was gathered by full_tensor() without grad_placements, whose backward keeps the gradient of this "
            f"process alone: {INSIDE}, or, {GATHERED}; [Replicate()] where every process has the same tokens"
        )


class _Owners:
    """The wrappers that a weight belongs to, as far as they were found: DDP, and whether its forward ran, and FSDP1."""

    def __init__(self) -> None:
        self.data_parallel: weakref.ref[nn.Module] | None = None
        self.begun = False
        self.fully_sharded: list[weakref.ref[nn.Module]] = []
        self.calls = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:  # with a wrapper that is saved whole, whose hook it is
        return _Owners, ()

    def look(self, weight: Tensor) -> None:
        """Search at the first call, the second, the fourth and so on: a weight may be wrapped after its first loss."""
        self.calls += 1
        if self.data_parallel is not None or self.fully_sharded or self.calls & (self.calls - 1):
            return
        for found in gc.get_objects():
            if type(found).__name__ not in _WRAPPERS or not isinstance(found, nn.Module):
                continue
            if any(weight is parameter for parameter in found.parameters()):
                if type(found).__name__ == "FullyShardedDataParallel":
                    self.fully_sharded.append(weakref.ref(found))
                elif self.data_parallel is None:
                    self.data_parallel = weakref.ref(found)
                    self.begun = getattr(found, "_lazy_init_ran", True)
                    found.register_forward_hook(self.ran)

    def ran(self, *forward: Any) -> None:
        self.begun |= torch.is_grad_enabled()


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
_owners = WeakTensorKeyDictionary()


def _check_owners(weight: Tensor) -> None:
    """DDP averages gradients of what its own forward began; FSDP1 keeps none of parameters that it only summoned."""
    if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", weight) is not None:
        return
    if weight not in _owners:
        _owners[weight] = _Owners()
    owners = _owners[weight]
    owners.look(weight)
    states = [getattr(wrapper(), "training_state", None) for wrapper in owners.fully_sharded]
    if weight.requires_grad and any(getattr(state, "name", "") == "SUMMON_FULL_PARAMS" for state in states):
        raise ValueError(
            "weight was gathered by FSDP1's summon_full_params(), which keeps no gradient of it: "
            f"{INSIDE}, or give the module of the head, where it is a unit of its own"
        )
    if owners.data_parallel is not None and owners.data_parallel() is not None and not owners.begun:
        raise ValueError(
            "weight belongs to a DistributedDataParallel whose forward never ran with gradients, so that nothing would "
            f"average them over the processes: call the wrapped module, not its .module; {INSIDE}"
        )
