"""What an op is, what every one of them runs under, and what none of them can do."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import cpu_bf16

# `select` looks for the labelled rows on the host, which no CUDA graph can hold
UNSAFE_IN_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

R = TypeVar("R")


class Op(Generic[R]):
    """A function of tensors that compilers, dispatch modes and tensor subclasses meet as one custom operator.

    Plain tensors in eager mode skip the dispatcher, which takes 0.1 ms and more for the many arguments of an operator
    in Python: as long as the kernels of a small head run.
    """

    def __init__(self, function: Callable[..., R], tags: Sequence[torch.Tag] = ()) -> None:
        self.name, self.function = function.__name__, function
        self.operator = torch.library.custom_op(f"alignloss::{self.name}", function, mutates_args=(), tags=tags)
        self.register_fake = self.operator.register_fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        self.operator.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> R:
            output = self.function(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.differentiable: Any = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any) -> R:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if _is_watched(tensors):
            return self.operator(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.differentiable.apply(*arguments)
        return self.function(*arguments)


def _is_watched(tensors: list[Tensor]) -> bool:
    """Whether anything but autograd has to see an op that takes these tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors)
        or any(is_legacy_batchedtensor(tensor) for tensor in tensors)  # of autograd's batched gradients
    )


def computing(tensor: Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What every walk runs under: no autocast, the device of `tensor`, the products that suit the dtype."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) or cpu_bf16.rounds(dtype, kind):
        return _without_autocast(tensor, dtype)
    return device_guard(tensor)


@contextmanager
def _without_autocast(tensor: Tensor, dtype: torch.dtype) -> Iterator[None]:
    kind = tensor.device.type
    with torch.autocast(kind, enabled=False), device_guard(tensor), cpu_bf16.bf16_products(dtype, kind):
        yield


@contextmanager
def within_memory(
    device: torch.device, workspace_bytes: int, result_bytes: Callable[[], int] = lambda: 0
) -> Iterator[None]:
    """Where a GPU has no memory left, the error says which workspace would fit.

    result_bytes: what the call inside allocates beside its workspace.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise
        traceback.clear_frames(error.__traceback__)  # whose locals hold what was allocated
        free, results = _free_bytes(device), result_bytes()
        # a tenth for what lies between the pieces that are free
        fits = min((free - results) * 9 // 10, workspace_bytes // 2) >> 10 << 10
        beside = f" beside {results:,} for its results" if results else ""
        found = f"alignloss had a workspace of {workspace_bytes:,} bytes; {free:,} are free for it{beside}"
        advice = f"workspace_bytes={fits} would fit" if fits > 0 else "no workspace would fit: give fewer tokens"
        raise torch.OutOfMemoryError(f"{error}\n{found}: {advice}") from None


def _free_bytes(device: torch.device) -> int:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # a share of the device that the process keeps to, if torch tells it (from 2.8 on)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free, int(share * total) - torch.cuda.memory_allocated(device))


def device_guard(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "alignloss does not support double backward: its gradients have no gradient of their own. "
        "Call backward() without create_graph=True, or use full logits for second derivatives."
    )
