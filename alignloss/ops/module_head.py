"""A head given as its module: the call takes the place of its forward, between the hooks that gather its weight.

FSDP, DeepSpeed ZeRO-3 and offloading hold a weight only while its module runs, and reduce its gradient because of what
its forward returns. So a call with a module runs inside that module's own call, and gradients of its results pass what
the module returned.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules import module as every_module
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..checks import check_tensor, is_dtensor

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
# of a layer, its input and the forward that it had, what it returns instead
Forward = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], Tensor]
# what the wrappers of torch and DeepSpeed that leave the product of a layer as it is call what they wrap
_WRAPPED = {
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
_lock = threading.Lock()


class UnsupportedModel(ValueError):
    """A model whose logits are not scale and softcap of one projection of hidden states, as far as can be seen."""


def takes_modules(*weights: str) -> Callable[[F], F]:
    """Let a function of hidden states take the module of a head where it takes one of these weights.

    The module brings its own bias, the argument beside the weight, and its input is the `hidden` beside it.
    """

    def decorate(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        places = {name: names.index(name) for name in weights if name in names}

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            for name, place in places.items():
                head = named[name] if name in named else args[place] if place < len(args) else None
                if isinstance(head, nn.Module):
                    break
            else:
                return function(*args, **named)
            if len(args) > len(names) or any(name in named for name in names[: len(args)]):
                return function(*args, **named)  # a TypeError
            given = dict(zip(names, args, strict=False)) | named
            prefix = name.removesuffix("weight")
            if given.get(f"{prefix}bias") is not None:
                raise ValueError(f"{name} is a module, which brings its own bias: leave {prefix}bias out")
            return _inside(head, f"{prefix}hidden", name, f"{prefix}bias", given, call)

        return call  # type: ignore[return-value]

    return decorate


def _inside(
    head: nn.Module, hidden: str, weight: str, bias: str, given: dict[str, Any], function: Callable[..., T]
) -> T:
    """The function with weight and bias of a head, while the head runs on its hidden states."""
    compiled: Any = head
    head = getattr(compiled, "_orig_mod", head)  # nothing of a compiled forward is needed
    layer = _linear(head, weight)
    if layer._backward_pre_hooks or every_module._global_backward_pre_hooks:
        raise ValueError(
            f"{weight} is a module with a hook before its backward, which would see no gradient of logits: remove the "
            "hook, or give the weight"
        )
    own = layer is not head or any(getattr(head, hooks) for hooks in _HOOKS)
    split = given.get("vocab_group") is not None and is_dtensor(layer.weight) and not hasattr(head, "_get_fsdp_state")
    if own and split:
        _check_hooks_of_split(layer, weight)
    if _runs(layer) or split or not (own or any(getattr(every_module, f"_global{hooks}") for hooks in _HOOKS)):
        return function(**given | {weight: layer.weight, bias: layer.bias})
    check_tensor(hidden, given.get(hidden))
    return _between_hooks(head, layer, hidden, weight, bias, given, function)


def _check_hooks_of_split(layer: nn.Module, name: str) -> None:
    """Hooks by which torch makes logits of the parts of a head gather nothing, and are left out; others are not."""
    hooks = [hook for kind in _HOOKS for hook in getattr(layer, kind).values()]
    if not all(getattr(hook, "__module__", "").startswith("torch.distributed.tensor") for hook in hooks):
        raise ValueError(
            f"{name} is a module that is split over vocab_group and has hooks of its own, which would see no logits: "
            "remove them, or give the weight"
        )


@torch.compiler.disable
def _between_hooks(
    head: nn.Module,
    layer: nn.Module,
    hidden: str,
    weight: str,
    bias: str,
    given: dict[str, Any],
    function: Callable[..., T],
) -> T:
    _check_unit(head, weight)
    found: list[T] = []
    made: list[Tensor] = []

    def forward(layer: nn.Module, rows: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        _check_input(rows, layer, hidden, weight, given)
        found.append(function(**given | {hidden: rows, weight: layer.weight, bias: layer.bias}))
        made.append(_watched(standing_for(found[0], rows)))
        return made[0]

    with taken_over([layer], forward) as calls:
        returned = head(given[hidden])
    if len(calls) != 1:
        raise ValueError(f"{weight} is a {type(head).__name__} that ran its linear layer {len(calls)} times, not once")
    _check_unchanged(made[0], returned, weight)
    return through(found[0], returned)


def _check_input(rows: Tensor, layer: nn.Module, hidden: str, weight: str, given: dict[str, Any]) -> None:
    """Where one module is two heads of a call, it runs once: its hooks must leave the hidden states as they are."""
    heads = {name: value for name, value in given.items() if name.endswith("weight") and name != weight}
    for name, head in heads.items():
        if not isinstance(head, nn.Module) or _linear(getattr(head, "_orig_mod", head), name) is not layer:
            continue
        if rows.dtype != given[hidden].dtype or not torch.equal(rows, given[hidden]):
            raise ValueError(
                f"{weight} and {name} are one module whose hooks change its input, and it runs once in a call: "
                f"give the weight as {name}, with hidden states as the head takes them"
            )


# what gives a tensor with the values of the one before; attributes but for `data` give other tensors
_SAME = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous", "cpu", "cuda",
    "view_as", "alias", "detach", "detach_", "requires_grad_",
)  # fmt: skip
_WRITES = ("__set__", "__setitem__", "set_")


class _Memory:
    """What is known of the memory of some tensors."""

    written = False


class _Watched(Tensor):
    """What stands for logits, in the sight of hooks: what they make of it knows that it is something else."""

    memory: _Memory
    other = False  # than what stands for logits

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        name, given = getattr(function, "__name__", ""), _watched_in((args, kwargs))
        same = name in _SAME or function == Tensor.data.__get__  # type: ignore[attr-defined]
        for tensor in _watched_in(result):
            if any(tensor is each for each in given):  # in place, or as it was
                tensor.memory.written |= not same
                continue
            origin = given[0] if given else None
            narrow = not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2
            tensor.other = origin is None or origin.other or not same or narrow
            shares = (each.memory for each in given if _address(each) == _address(tensor))
            # what was written to before a copy is in the copy
            tensor.memory = next(shares, None) or _Memory()
            tensor.memory.written |= any(each.memory.written for each in given)
        if name in _WRITES and given:
            given[0].memory.written = True
        return result

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _watched_in(values: Any) -> list[_Watched]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, _Watched)]


def _address(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -1


def _watched(made: Tensor) -> Tensor:
    if is_functorch_wrapped_tensor(made):
        return made
    watched = made.as_subclass(_Watched)
    watched.memory = _Memory()
    return watched


def _check_unchanged(made: Tensor, returned: Any, name: str) -> None:
    """A hook may pass on what stands for logits, as wrappers do, in another dtype too; nothing else."""
    same = isinstance(returned, Tensor) and returned.shape == made.shape and returned.is_floating_point()
    if same and is_functorch_wrapped_tensor(returned):  # has no values to look at
        same = returned is made and made._version == 0
    elif same:
        if isinstance(returned, _Watched):
            same = not (returned.other or returned.memory.written)
        elif made.grad_fn is None:  # nothing but its values tells where it came from
            same = bool((returned == 1).all())
        if made.grad_fn is not None:
            same &= _passed_on(returned.grad_fn, made.grad_fn)
        if same and isinstance(made, _Watched):
            # NumPy writes to a CPU's memory without torch
            same = not made.memory.written and (made.device.type != "cpu" or bool((made == 1).all()))
    if not same:
        raise ValueError(
            f"{name} is a module whose hooks change what it returns: the logits would not be those of its weight and "
            "bias. Remove the hooks, or give the weight"
        )


def _passed_on(node: Any, source: Any) -> bool:
    """Whether a graph from a tensor to another one holds nothing but casts, views and functions of Python."""
    while node is not None and node is not source:
        operator = type(node).__name__.rstrip("0123456789")
        following = [after for after, _ in node.next_functions if after is not None]
        if (operator != type(node).__name__ and operator not in _PASSES) or not following:
            return False
        node = source if source in following else following[0] if len(following) == 1 else None
    return node is source


_PASSES = ("ToCopyBackward", "ViewBackward", "AliasBackward", "CloneBackward", "UnsafeViewBackward")


def _linear(head: nn.Module, name: str) -> nn.Linear:
    """The linear layer in wrappers."""
    layer: Any = head
    while type(layer).__name__ in _WRAPPED and type(layer).__module__.split(".")[0] in ("torch", "deepspeed"):
        layer = getattr(layer, _WRAPPED[type(layer).__name__])
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    if plain and ("forward" not in vars(layer) or _runs(layer)):
        return layer
    if hasattr(vars(layer).get("forward"), "replaced_by"):
        raise ValueError(f"{name} is a module that a call in another thread is using: one call of it at a time")
    what = f"a {type(layer).__module__}.{type(layer).__name__}"
    raise ValueError(
        f"{name} must be a tensor (V, H) or the module of a head, an nn.Linear with the forward of one; got "
        f"{what + ' whose forward was replaced' * plain}. For whatever else is in its place (adapters, quantised "
        "weights, offloading): alignloss.hf.head_call, around the whole model"
    )


def _runs(layer: nn.Module) -> bool:
    """Whether this thread is inside a call that took the place of the layer's forward: its weight is there."""
    own: Any = vars(layer).get("forward")
    return hasattr(own, "replaced_by") and own.replaced_by == threading.get_ident()


def _check_unit(head: Any, name: str) -> None:
    """FSDP2 reduces the gradients of a unit of several modules only where all of them ran."""
    state: Any = head._get_fsdp_state() if hasattr(head, "_get_fsdp_state") else None
    modules, context = getattr(state, "_modules", ()), getattr(state, "_state_ctx", None)
    if len(modules) > 1 and getattr(context, "iter_forward_root", state) is None:
        raise ValueError(
            f"{name} is a module that shares its unit of FSDP2 with others (fully_shard of a list): outside of the "
            "forward of the whole model its gradient would be lost. Compute the loss inside that forward, or give the "
            "head a unit of its own"
        )


@contextmanager
def taken_over(layers: Sequence[nn.Module], forward: Forward) -> Iterator[list[nn.Module]]:
    """Another forward for a few layers, then exactly what was there before; gives the layers that were called."""
    calls: list[nn.Module] = []
    running: list[nn.Module] = []
    # under a hook of accelerate (device_map, offload) the forward inside of the hook, where the weight is there
    named = [(layer, "_old_forward" if hasattr(layer, "_hf_hook") else "forward") for layer in layers]

    def replacement(layer: nn.Module, own: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        @torch.compiler.disable
        def run(hidden: Tensor, *more: Any, **named: Any) -> Tensor:
            if layer in running or threading.get_ident() != run.replaced_by:
                return own(hidden, *more, **named)  # of a loss that uses the layer too, or of another thread
            if more or named:
                raise UnsupportedModel(
                    f"its output embedding is given more than hidden states, {sorted(named) or len(more)}"
                )
            calls.append(layer)
            running.append(layer)
            try:
                return forward(layer, hidden, own)
            finally:
                running.pop()

        run.replaced_by = threading.get_ident()
        return run

    replaced: list[tuple[nn.Module, str, Any]] = []
    try:
        with _lock:
            forwards = [getattr(layer, name) for layer, name in named]
            if any(hasattr(own, "replaced_by") for own in forwards):
                raise UnsupportedModel(
                    "its output embedding is taken over already, by a call in another thread or further out: one call "
                    "of a model at a time"
                )
            for (layer, name), own in zip(named, forwards, strict=True):
                replaced.append((layer, name, layer.__dict__.get(name)))
                setattr(layer, name, replacement(layer, own))
        yield calls
    finally:
        for layer, name, old in replaced:
            if old is None:
                layer.__dict__.pop(name, None)
            else:
                setattr(layer, name, old)


def standing_for(result: Any, hidden: Tensor) -> Tensor:
    """In place of logits, for whatever looks at what a layer returns: ones (..., 1) that depend on a result."""
    leaves = [leaf for leaf in tree_flatten(result)[0] if _trains(leaf)]
    return _InPlaceOf.apply(hidden.detach(), *leaves) if leaves else hidden.detach().new_ones(*hidden.shape[:-1], 1)


def through(result: T, returned: Any) -> T:
    """A result whose gradients pass what a module returned, where FSDP2 waits for them."""
    if not _trains(returned):
        return result
    leaves, spec = tree_flatten(result)
    return tree_unflatten([_Through.apply(leaf, returned) if _trains(leaf) else leaf for leaf in leaves], spec)


def _trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _InPlaceOf(torch.autograd.Function):
    """Ones (..., 1) that depend on tensors, to whose gradients they add nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return hidden.new_ones(*hidden.shape[:-1], 1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class _Through(torch.autograd.Function):
    """A tensor, whose gradient passes another one, with zeros for that."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        ctx.like = other.shape, other.dtype, other.device
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return upstream, torch.zeros(shape, dtype=dtype, device=device)
