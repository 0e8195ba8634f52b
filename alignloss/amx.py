"""Products of bf16 values by the matrix units of a CPU (AMX), with operands and results held in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

__all__ = ["available", "bf16_products"]

_lock = Lock()
_inside = 0  # calls under way, in any thread
_before = "none"


def available() -> bool:
    """Whether this CPU has the units, and this torch can be told to use them for float32 operands."""
    if not (hasattr(torch.cpu, "get_capabilities") and hasattr(torch.backends.mkldnn, "matmul")):
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@contextmanager
def bf16_products(dtype: torch.dtype, device_type: str) -> Iterator[None]:
    """Where the computation is in bf16 on such a CPU, let float32 products round their operands to bf16.

    A widened operand is not changed by that, so logits stay exact products with sums in float32, several times faster.
    torch has this switch for the process alone: it goes back when the last of the calls under way ends, and until then
    float32 products of other threads are rounded as well.
    """
    global _inside, _before
    if dtype != torch.bfloat16 or device_type != "cpu" or not available() or torch.backends.flags_frozen():
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        if _inside == 0:
            _before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and matmul.fp32_precision == "bf16":  # not where somebody set it meanwhile
                # a value that it had from its parent is not its own: later changes of the parent must reach it
                inherited = torch.backends.mkldnn.fp32_precision
                matmul.fp32_precision = "none" if _before == inherited else _before
