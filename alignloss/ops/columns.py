"""A head of which the last columns alone train, as LoRA adds them: a gradient of theirs, and none of the others'."""

from typing import Any

import torch
from torch import Tensor


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frozen: Tensor, trained: Tensor) -> Tensor:
        ctx.trained_columns = trained
        return torch.cat([frozen, trained], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[:, -ctx.trained_columns.shape[1] :]


def beside_frozen(frozen: Tensor, trained: Tensor) -> Tensor:
    """[frozen, trained] (V, H + r), past which our ops hand a gradient to the r columns of `trained` alone."""
    return _Columns.apply(frozen, trained)


def trained_columns(weight: Tensor) -> Tensor | None:
    """What `beside_frozen` was given to train, (V, r), of a weight that it made."""
    # a compiler does not see what made its inputs
    return None if torch.compiler.is_compiling() else getattr(weight.grad_fn, "trained_columns", None)


def first_trained(weight: Tensor, columns: Tensor | None) -> int:
    """The first column of a weight that trains, if it does."""
    return 0 if columns is None else weight.shape[1] - columns.shape[1]
