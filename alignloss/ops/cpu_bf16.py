"""Products of bf16 values at the rate that a CPU has for them, with operands and results held in float32."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock, local
from typing import Any

import torch

_lock = RLock()  # a signal handler that forks must not wait for its own thread
_inside = 0  # calls under way, in any thread
_own = local()  # .inside: those of this thread
_before = "none"


def capabilities() -> Mapping[str, Any]:
    """What torch says of this CPU; nothing if it does not say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def available() -> bool:
    """Whether this torch can be told to multiply float32 operands as bf16, and gains from it on this CPU.

    That hands products to oneDNN. With AMX it rounds their operands and uses the matrix units. With AVX512-BF16
    alone it multiplies in float32 by AVX-512: slower than MKL on Intel, and faster where MKL is held to AVX2, as is to
    be expected on AMD (not measured there).
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    cpu = capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and str(cpu.get("cpu_name")).startswith("AMD")))


def rounds(dtype: torch.dtype, device_type: str) -> bool:
    """Whether `bf16_products` changes anything."""
    return dtype == torch.bfloat16 and device_type == "cpu" and available() and not torch.backends.flags_frozen()


@contextmanager
def bf16_products(dtype: torch.dtype, device_type: str) -> Iterator[None]:
    """Where the computation is in bf16 on such a CPU, let float32 products round their operands to bf16.

    A widened operand is not changed by that, so logits stay exact products with sums in float32, several times faster
    with AMX. torch has this switch for the process alone: it goes back when the last of the calls under way ends, and
    until then float32 products of other threads may be rounded as well. A forked child keeps the calls of its thread.
    """
    global _inside, _before
    if not rounds(dtype, device_type):
        yield
        return
    with _lock:
        if _inside == 0:
            _before = _matmul().fp32_precision
            _matmul().fp32_precision = "bf16"
        _count(1)
    try:
        yield
    finally:
        with _lock:
            _count(-1)
            if _inside == 0:
                _restore()


def _matmul() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _count(calls: int) -> None:
    global _inside
    _inside += calls
    _own.inside = getattr(_own, "inside", 0) + calls


def _restore() -> None:
    if _matmul().fp32_precision == "bf16":  # not where somebody set it meanwhile
        # a value that it had from its parent is not its own: later changes of the parent must reach it
        inherited = torch.backends.mkldnn.fp32_precision
        _matmul().fp32_precision = "none" if _before == inherited else _before


def _forked() -> None:
    """In a child only the thread that forked lives on: the calls of the others never end there."""
    global _inside
    others = _inside - getattr(_own, "inside", 0)
    _inside -= others
    _lock.release()
    if others and _inside == 0:
        _restore()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)
