"""What every op runs under, and what none of them can do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import cpu_bf16

# `select` looks for the labelled rows on the host, which no CUDA graph can hold
UNSAFE_IN_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@contextmanager
def computing(tensor: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """What every walk runs under: no autocast, the device of `tensor`, the products that suit the dtype."""
    kind = tensor.device.type
    with torch.autocast(kind, enabled=False), device_guard(tensor), cpu_bf16.bf16_products(dtype, kind):
        yield


def device_guard(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "alignloss does not support double backward: its gradients have no gradient of their own. "
        "Call backward() without create_graph=True, or use full logits for second derivatives."
    )
