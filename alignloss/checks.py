"""What a tensor has to be before anything is computed from it."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INSIDE = "compute the loss inside the forward of the wrapped module, where its hooks have gathered the weight"
_DEQUANTISE = "dequantise the head first, or leave it out of the quantisation"


def check_tensor(name: str, value: Any, hint: str = "") -> None:
    """A ValueError unless `value` is a tensor that holds values of its own, which names what else it is."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hint}")
    problem = problem_of(value)
    if problem is not None:
        raise ValueError(f"{name} is {problem}")


def is_dtensor(value: Tensor) -> bool:
    # by name: its module takes half a second to import
    return type(value).__name__ == "DTensor"


def problem_of(value: Tensor) -> str | None:
    """What keeps a tensor from being used as it is, and the way out; None for a plain one.

    Comes before shapes, dtypes and devices, which say little of a placeholder.
    """
    if is_dtensor(value):
        return (
            f"a DTensor, of which this call would see a shard: {_INSIDE} (under FSDP2 with the head in the root unit), "
            'or, under FSDP2, give full_tensor(grad_placements=[Partial("avg")]); without grad_placements its gradient '
            "is wrong"
        )
    if torch.compiler.is_compiling() or is_fake(value) or is_functorch_wrapped_tensor(value):
        return None
    kind = type(value).__name__
    if kind in ("Params4bit", "Int8Params") or hasattr(value, "quant_state"):
        return f"a quantised weight of bitsandbytes ({kind}): {_DEQUANTISE} (llm_int8_skip_modules)"
    if is_traceable_wrapper_subclass(value) and kind != "AsyncCollectiveTensor":  # which waits when it is read
        return f"a {kind}, whose values are those of other tensors, e.g. quantised ones: {_DEQUANTISE}"
    if value.is_meta:
        return (
            "on meta, a device without values: offloaded (accelerate keeps them elsewhere between forwards) or never "
            f"loaded. Load it, or {_INSIDE}"
        )
    if hasattr(value, "ds_id") and value.numel() == 0:
        return f"emptied by DeepSpeed ZeRO-3: {_INSIDE}, or gather a frozen one with deepspeed.zero.GatheredParameters"
    if value.numel() and value.layout == torch.strided and value.untyped_storage().size() == 0:
        return f"freed, its storage is empty, as FSDP leaves a parameter between forwards: {_INSIDE}"
    return None


def check_head(name: str, weight: Tensor) -> None:
    """A ValueError for a parameter that is emptied or flat in place of (V, H)."""
    if weight.dim() == 1:
        what = "FSDP1 makes one flat parameter of several" if weight.numel() else "ZeRO-3 and FSDP1 empty parameters"
        raise ValueError(f"{name} must be {name} (V, H), got {tuple(weight.shape)}. {what}: if so, {_INSIDE}")


def check_kept(**tensors: Tensor | None) -> None:
    """A RuntimeError for one of hidden, weight and bias that was emptied or freed between forward and backward."""
    for name, value in tensors.items():
        if value is None:
            continue
        problem = problem_of(value)
        if problem is None and value.dim() < (1 if name.endswith("bias") else 2):
            problem = f"emptied, {tuple(value.shape)}: {_INSIDE}"
        if problem is not None:
            raise RuntimeError(f"the backward needs {name} as the forward had it, and it is {problem}")


def check_savable(**tensors: Tensor | None) -> None:
    """A ValueError for a tensor of inference mode that a backward will need; one too large to be copied silently."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if value is not None and value.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode(), and the backward needs it, where autograd takes no "
                f"such tensor: make it under torch.no_grad(), or give {name}.clone()"
            )


def savable(value: Tensor) -> Tensor:
    """A tensor that autograd may keep: a copy of one that was made under torch.inference_mode()."""
    if torch.compiler.is_compiling() or not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    return value.clone()


def checked_labels(name: str, labels: Any) -> Tensor:
    """Labels as int64: a narrower dtype need not hold what they are compared with, ignore_index and V."""
    check_tensor(name, labels)
    if labels.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    return savable(labels.long())
