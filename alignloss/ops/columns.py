"""A head of which the last columns alone train, as LoRA adds them: a gradient of theirs, and none of the others'."""

from typing import Any

import torch
from torch import Tensor


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frozen: Tensor, trained: Tensor) -> Tensor:
        ctx.trained_from = frozen.shape[1]
        return torch.cat([frozen, trained], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[:, ctx.trained_from :]


def beside_frozen(frozen: Tensor, trained: Tensor) -> Tensor:
    """[frozen, trained] (V, H + r), whose gradient our ops make for the r columns of `trained` alone."""
    return _Columns.apply(frozen, trained)


def trained_from(weight: Tensor) -> int:
    """The first column that a gradient of the weight is wanted of."""
    # a compiler has to know the strides of a gradient
    return 0 if torch.compiler.is_compiling() else getattr(weight.grad_fn, "trained_from", 0)


def gradient_of(columns: Tensor, width: int) -> Tensor:
    """The gradient (V, r) of the last columns as autograd takes it, of the shape of the weight, (V, width).

    Its rows lie in each other: it takes the memory of (V, r), and what is in the other columns means nothing.
    """
    vocabulary, trained = columns.shape
    storage = columns.new_empty(width - trained + columns.numel())
    storage[: width - trained] = 0
    storage[width - trained :].view(columns.shape).copy_(columns)
    return storage.as_strided((vocabulary, width), (trained, 1))
