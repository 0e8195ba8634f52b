"""A loss function as a module sees it: what it takes, read off its signature once, and one way to call it."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..checks import check_keywords, check_ranges
from ..losses.common import weighted
from .head import HEAD_OPTIONS

# what the library fills in, by the name of the parameter: (column, half of the batch)
_UNPAIRED: dict[str, tuple[str, int | None]] = {
    "logps": ("logps", None),
    "ref_logps": ("ref_logps", None),
    "lengths": ("lengths", None),
}
_PAIRED: dict[str, tuple[str, int | None]] = {
    "chosen_logps": ("logps", 0),
    "rejected_logps": ("logps", 1),
    "ref_chosen_logps": ("ref_logps", 0),
    "ref_rejected_logps": ("ref_logps", 1),
    "chosen_lengths": ("lengths", 0),
    "rejected_lengths": ("lengths", 1),
}
# losses with a kernel that sums the tokens and computes loss, rewards and coefficients in one launch
_FUSED = ((losses.dpo_loss, "dpo"), (losses.ipo_loss, "ipo"), (losses.kto_loss, "kto"), (losses.cpo_loss, "cpo"))


class LossFunction:
    """A plain function on (B,) tensors with its options.

    Raises:
        ValueError: for an option that it lacks, a missing one, one of ours out of its range, or a signature that is
            neither paired nor unpaired, or takes a name of `reserved`.
    """

    def __init__(
        self, fn: Callable[..., tuple[Tensor, ...]], options: dict[str, Any], reserved: Iterable[str] = ()
    ) -> None:
        function = _unwrapped(fn)
        self.fn, self.options = fn, options
        self.name = getattr(function, "__name__", repr(fn))
        self.couples_batch = any(function is coupled for coupled in losses.COUPLED)
        self.ours = any(function is ours for ours in losses.LOSSES.values())
        parameters = parameters_of(fn)
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.names = [p.name for p in positional]
        self.paired = "chosen_logps" in self.names and "rejected_logps" in self.names
        if self.paired == ("logps" in self.names):
            raise ValueError(
                f"{self.name} must take chosen_logps and rejected_logps (a paired loss) or logps (an unpaired one) "
                f"as positional parameters; it takes {self.names}"
            )
        self.filled, foreign = (_PAIRED, _UNPAIRED) if self.paired else (_UNPAIRED, _PAIRED)
        self.needs_reference = any(self.filled[n][0] == "ref_logps" for n in self.names if n in self.filled)
        # of the call, by name, and whether it is required
        self.data = {p.name: p.default is p.empty for p in positional if p.name not in self.filled}
        self.defaults = {p.name: p.default for p in positional if p.default is not p.empty}
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        taken = set(self.data) & {*foreign, *reserved, "self"} | {p.name for p in keywords} & {
            *HEAD_OPTIONS, "fn", "couples_batch",
        }  # fmt: skip
        if taken:
            raise ValueError(f"parameters of {self.name} have reserved names, {sorted(taken)}; rename them")
        data = sorted(set(options) & set(self.data))
        hint = f". {data} are positional, so data of the call: put them after * to make them options" if data else ""
        known = {p.name: p.default is p.empty for p in keywords}
        check_keywords(f"{self.name} takes the options", known, options, hint)
        if self.ours:
            optional = {p.name for p in parameters_of(function) if p.default is None}
            bound = {p.name: p.default for p in keywords} | options
            check_ranges({n: v for n, v in bound.items() if v is not None or n not in optional})

    @property
    def kernel(self) -> str | None:
        """The name of the fused kernel that computes this loss, if there is one."""
        numbers = all(isinstance(value, Real) for value in self.options.values())
        return next((name for fn, name in _FUSED if fn is self.fn and numbers), None)

    def __call__(self, columns: dict[str, Tensor | None], data: dict[str, Tensor], count: int) -> tuple[Tensor, ...]:
        """What the function returns of its halves of the columns (S,) and its data, if it is of the right form."""
        halves = {None: slice(None), 0: slice(None, count), 1: slice(count, None)}
        arguments: list[Any] = []
        for name in self.names:
            if name in self.filled:
                column, half = self.filled[name]
                values = columns[column]
                assert values is not None
                arguments.append(values[halves[half]])
            else:
                arguments.append(data.get(name, self.defaults.get(name)))
        # it may work in place: not on what the NLL, the results, another loss or the caller hold
        copies = [self._copied(value) if isinstance(value, Tensor) else value for value in arguments]
        results: Any = self.fn(*copies, **self.options)
        expected = 3 if self.paired else 2
        got: Any = type(results).__name__
        if isinstance(results, tuple):
            got = [
                tuple(r.shape) if isinstance(r, Tensor) and r.is_floating_point() else getattr(r, "dtype", type(r))
                for r in results
            ]
        if got != [(count,)] * expected:
            raise ValueError(
                f"{self.name} must return a tuple of {expected} float tensors of shape ({count},), got {got}"
            )
        return results

    def _copied(self, value: Tensor) -> Tensor:
        # a number times integers is float32: our own functions take them in float64
        return value.to(torch.float64 if self.ours and value.dtype != torch.bool else value.dtype, copy=True)

    @property
    def made_of(self) -> Any:
        return self.fn, self.options

    def __repr__(self) -> str:
        return ", ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


class WeightedSum:
    """sum_i w_i loss_i as one loss function, whose data are those of all of them."""

    kernel: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, functions: list[Any], weights: list[float]) -> None:
        self.functions, self.weights = functions, weights
        self.name = "mixture of " + ", ".join(function.name for function in functions)
        self.paired = functions[0].paired
        self.couples_batch = any(function.couples_batch for function in functions)
        self.needs_reference = any(function.needs_reference for function in functions)
        self.data: dict[str, bool] = {}
        for function in functions:
            for name, required in function.data.items():
                self.data[name] = required or self.data.get(name, False)

    def __call__(self, columns: dict[str, Tensor | None], data: dict[str, Tensor], count: int) -> tuple[Tensor, ...]:
        results = [function(columns, data, count) for function in self.functions]
        terms = [weighted(weight, result[0]) for weight, result in zip(self.weights, results, strict=True)]
        return sum(terms[1:], terms[0]), *results[0][1:]

    @property
    def made_of(self) -> Any:
        return [function.made_of for function in self.functions], self.weights

    def __repr__(self) -> str:
        return f"{self.name}, weights={self.weights}"


def parameters_of(fn: Any) -> list[inspect.Parameter]:
    if isinstance(fn, torch.nn.Module):
        raise ValueError(
            f"{type(fn).__name__} is a torch.nn.Module, whose call does not say what it takes: give its forward, and "
            "keep the module where its parameters are seen"
        )
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError as error:  # of torch's own functions
        raise ValueError(f"{fn} does not say what it takes: wrap it in a function with named parameters") from error


def _unwrapped(fn: Any) -> Any:
    """The function in a partial, a compiled function or any other that says what it wraps."""
    inside = fn.func if isinstance(fn, partial) else getattr(fn, "__wrapped__", None)
    return fn if inside is None else _unwrapped(inside)
