"""The primitives of the ops, twice with one signature: `_torch` (any device, the specification) and `_triton`.

Imports kernels alone.

Both work on a tile h W_slice^T * linear of C tokens and Vs vocabulary entries, in fp32 (fp64 for fp64 input), to which
they add the slice of the bias, b * linear, so that x = (h W_slice^T + b) * linear, and on `state`, a tensor (9, C) of
running sums over the vocabulary without the target column y, whose rows `kernels.state` names. The logits are z = x, or
z = cap tanh(x) under a softcap. Leaving the target out keeps 1 - p_y and log p_y exact as p_y -> 1.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

# entries of a product of rows, in the accumulation dtype, that _torch makes at once
WEIGHED_AT_ONCE = 1 << 18

# what the caller asks for beyond log-probabilities, as bits of one int
STATS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
LSE, ENTROPY, MEAN_LOGITS, IS_TOP1, LOG_SUM_SQ = (1 << i for i in range(len(STATS)))


def stat_bits(names: Sequence[str], known: Sequence[str] = STATS) -> int:
    """The bits of names out of `known`, themselves out of STATS."""
    if not isinstance(names, Sequence) or isinstance(names, str) or any(name not in known for name in names):
        raise ValueError(f"stats takes a sequence of names out of {tuple(known)}, got {names!r}")
    return sum(1 << i for i, name in enumerate(STATS) if name in names)


def asked(values: Sequence[object | None]) -> int:
    """Bits of STATS that have a place to go, `values` of each."""
    return sum(1 << i for i, value in enumerate(values) if value is not None)


class Transform(NamedTuple):
    """z = softcap(logit_scale * (hW + b)) / temperature, as a factor on the GEMM and one elementwise function."""

    linear: float  # x = (hW + b) * linear
    cap: float | None  # z = cap * tanh(x), or x when None
    slope: float  # dz / d(hW + b) = slope * sech^2(x), or slope when cap is None

    @staticmethod
    def of(logit_scale: float, softcap: float | None, temperature: float) -> "Transform":
        slope = logit_scale / temperature
        if softcap is None:
            return Transform(slope, None, slope)
        return Transform(logit_scale / softcap, softcap / temperature, slope)


class Tokens(NamedTuple):
    """The tokens of a call: M positions, of which N are scored."""

    hidden: torch.Tensor | None  # (M, H); None where only the gradient of hidden is wanted
    labels: torch.Tensor  # (M,) int64
    token_index: torch.Tensor | None  # (N,) int64 positions; None: every one
    ignore_index: int
    compute_dtype: torch.dtype


class Targets(NamedTuple):
    """What the logits x_y of the targets follow from, for a state that begins with them: its GEMM leaves no logits."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,) of b * linear
    linear: float
    reference: bool  # m begins with them as well


def get(name: str) -> ModuleType:
    """The backend module of a resolved name, "torch" or "triton"."""
    if name == "torch":
        from . import _torch

        return _torch
    from . import _triton

    return _triton


def check_name(name: str) -> None:
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {name!r}")


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Turn the public `backend` argument into "torch" or "triton" for this device and compute dtype."""
    check_name(name)
    if name == "torch":
        return name
    if name == "auto" and device.type == "cpu":
        return "torch"
    problem = _triton_problem(device, dtype)
    if problem and name == "triton":
        raise ValueError(f"backend='triton' cannot run here: {problem}; use backend='auto' or 'torch'")
    return "torch" if problem else "triton"


_TRITON_INSTALLED = find_spec("triton") is not None


def _triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32 and the input is float64"
    if not _TRITON_INSTALLED:
        return "the package triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1), meant for tests"
    if device.type not in ("cpu", "cuda"):
        return f"device type {device.type!r} is not an NVIDIA or AMD GPU"
    return None
