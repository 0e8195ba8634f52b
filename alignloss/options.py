"""The options of our losses, by name: the ranges that they must lie in."""

import math
from typing import Any

import torch
from torch import Tensor

from .planning import check_number

__all__ = ["check_ranges"]

# (lower bound, whether it is allowed, upper bound, whether it is allowed)
_RANGES: dict[str, tuple[float, bool, float, bool]] = {
    "alpha": (-math.inf, False, math.inf, False),
    "beta": (0, False, math.inf, False),
    "delta": (0, True, math.inf, False),
    "desirable_weight": (0, True, math.inf, False),
    "epsilon": (0, False, 0.5, False),
    "gamma": (-math.inf, False, math.inf, False),
    "kl_weight": (0, True, math.inf, False),
    "label_smoothing": (0, True, 0.5, False),
    "length_weight": (0, True, math.inf, False),
    "nll_weight": (-math.inf, False, math.inf, False),
    "offset_weight": (0, False, math.inf, False),
    "penalty_weight": (0, True, math.inf, False),
    "rejected_scale": (0, False, 1, True),
    "reward_bound": (0, False, math.inf, False),
    "tau": (0, False, 1, True),
    "undesirable_weight": (0, True, math.inf, False),
}


def check_ranges(options: dict[str, Any]) -> None:
    if "divergence" in options:
        _check_divergence(options["divergence"])
    for name, value in options.items():
        if name not in _RANGES:
            continue
        check_number(name, value)
        low, with_low, high, with_high = _RANGES[name]
        if not (low <= value <= high) or (value == low and not with_low) or (value == high and not with_high):
            interval = f"{'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}"
            raise ValueError(f"{name} must lie in {interval}, got {value}")


def _check_divergence(divergence: Any) -> None:
    problem = "is not callable"
    if callable(divergence):
        try:
            value = divergence(torch.zeros(2, dtype=torch.float64, device="cpu"))
            if isinstance(value, Tensor) and value.shape == (2,) and bool(value.isfinite().all()):
                return
            problem = f"gives {value} for log u = [0, 0]"
        except Exception as error:
            problem = f"fails: {error}"
    raise ValueError(
        "divergence must be a function from log u (B,) to f'(u) (B,), e.g. losses.js_divergence or "
        f"functools.partial(losses.alpha_divergence, divergence_alpha=0.5); {divergence!r} {problem}"
    )
