"""What tensors and options have to be before anything is computed from them."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INSIDE = "compute the loss inside the forward of the wrapped module, where its hooks have gathered the weight"
GATHERED = 'under FSDP2, give full_tensor(grad_placements=[Partial("avg")])'
_DEQUANTISE = "dequantise the head first, or leave it out of the quantisation"


def check_tensor(name: str, value: Any, hint: str = "") -> None:
    """A ValueError unless `value` is a tensor that holds values of its own, which names what else it is."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hint}")
    problem = problem_of(value)
    if problem is not None:
        raise ValueError(f"{name} is {problem}")


def is_dtensor(value: Any) -> bool:
    # by name: its module takes half a second to import
    return type(value).__name__ == "DTensor"


def is_fake(value: Tensor) -> bool:
    """torch's, which takes two microseconds of the host, for tensors that may be one."""
    wrapped = torch._is_functional_tensor(value) or is_functorch_wrapped_tensor(value)
    return (type(value) not in _PLAIN or wrapped) and fake_tensor.is_fake(value)


def problem_of(value: Tensor) -> str | None:
    """What keeps a tensor from being used as it is, and the way out; None for a plain one.

    Comes before shapes, dtypes and devices, which say little of a placeholder.
    """
    if is_dtensor(value):
        return (
            f"a DTensor, of which this call would see a shard: {INSIDE} (under FSDP2 with the head in the root unit), "
            f"or, {GATHERED}; without grad_placements its gradient is wrong"
        )
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(value) or is_fake(value):
        return None
    subclass, kind = type(value) not in _PLAIN, type(value).__name__
    if value.is_nested:
        return "a nested tensor: give its values() as packed tokens, with cu_seqlens=offsets()"
    if kind in ("Params4bit", "Int8Params") or hasattr(value, "quant_state"):
        return f"a quantised weight of bitsandbytes ({kind}): {_DEQUANTISE} (llm_int8_skip_modules)"
    # AsyncCollectiveTensor waits when it is read
    if subclass and is_traceable_wrapper_subclass(value) and kind != "AsyncCollectiveTensor":
        return f"a {kind}, whose values are those of other tensors, e.g. quantised ones: {_DEQUANTISE}"
    if value.is_quantized:
        return f"quantised by torch ({value.dtype}): give dequantize()"
    if value.layout != torch.strided:
        return f"in the layout {value.layout}, not a dense one: give to_dense()"
    if value.is_meta:
        return (
            "on meta, a device without values: offloaded (accelerate keeps them elsewhere between forwards) or never "
            f"loaded. Load it, or {INSIDE}"
        )
    if hasattr(value, "ds_id") and value.numel() == 0:
        return f"emptied by DeepSpeed ZeRO-3: {INSIDE}, or gather a frozen one with deepspeed.zero.GatheredParameters"
    if value.numel() and value.untyped_storage().size() == 0:
        return f"freed, its storage is empty, as FSDP leaves a parameter between forwards: {INSIDE}"
    return None


def check_head(name: str, weight: Tensor) -> None:
    """A ValueError for a parameter that is emptied or flat in place of (V, H), or packed by a quantisation."""
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64, got {weight.dtype} {tuple(weight.shape)}, as a "
            f"quantisation packs it (GPTQ, AWQ, bitsandbytes, fp8): {_DEQUANTISE}"
        )
    if weight.dim() == 1 or weight.numel() == 0:
        what = "FSDP1 makes one flat parameter of several" if weight.numel() else "ZeRO-3 and FSDP1 empty parameters"
        raise ValueError(f"the head must be {name} (V, H), got {tuple(weight.shape)}. {what}: if so, {INSIDE}")


Kept = dict[str, tuple[torch.Size, torch.dtype]]


def kept(**tensors: Tensor | None) -> Kept:
    """What `check_kept` compares in the backward: shape and dtype of the tensors that the forward had."""
    return {name: (value.shape, value.dtype) for name, value in tensors.items() if value is not None}


def check_kept(before: Kept, *, values: bool = True, **tensors: Tensor | None) -> None:
    """A RuntimeError for a tensor that was emptied, freed or replaced between forward and backward.

    values: they are read again; otherwise one whose storage is freed still takes its gradient.
    """
    for name, value in tensors.items():
        if value is None:
            continue
        problem = problem_of(value) if values else None
        if problem is None and (value.shape, value.dtype) != before[name]:
            shape, dtype = before[name]
            flat = "flattened" if value.dim() < len(shape) else "another one"
            what = flat if value.numel() else "emptied"
            problem = f"{what}, {tuple(value.shape)} {value.dtype} after {tuple(shape)} {dtype}: {INSIDE}"
        if problem is not None:
            raise RuntimeError(f"the backward needs {name} as the forward had it, and it is {problem}")


def leaves_of(*values: Tensor | None) -> set[Tensor]:
    """The tensors that require a gradient in the graphs of values."""
    given = [value for value in values if value is not None]
    leaves = {value for value in given if value.is_leaf and value.requires_grad}
    seen, stack = set(), [value.grad_fn for value in given]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        stack.extend(next_node for next_node, _ in node.next_functions)
    return leaves


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


def check_integers(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integers, got {value.dtype}")


def checked_labels(name: str, labels: Any) -> Tensor:
    """Labels as int64: a narrower dtype need not hold what they are compared with, ignore_index and V."""
    check_integers(name, labels)
    return savable(labels.long())


def check_like(name: str, value: Tensor, model_name: str, model: Tensor) -> None:
    check_tensor(name, value)
    if value.shape != model.shape or value.device != model.device:
        raise ValueError(
            f"{name} must have the shape and device of {model_name}, {tuple(model.shape)} on {model.device}; "
            f"got {tuple(value.shape)} on {value.device}"
        )


def check_binary(name: str, value: Tensor) -> None:
    if not bool(((value == 0) | (value == 1)).all()):
        raise ValueError(f"{name} must be bool, or 0 and 1; got {value.unique().tolist()[:8]}")


def check_values_exist(value: Tensor, needed: bool) -> None:
    if needed and not torch.compiler.is_compiling() and is_fake(value):
        raise ValueError(
            "under FakeTensorMode there are no values to look labelled positions up in, or to check: give token_index "
            "and validate=False"
        )


def validates(validate: bool | None, device: torch.device) -> bool:
    """Whether values are checked on the host: as asked, by default on a CPU."""
    return device.type == "cpu" if validate is None else validate


def check_values(labels: Tensor, token_index: Tensor | None, ignore_index: int, vocabulary: int) -> None:
    labelled, tokens = labels != ignore_index, labels.shape[0]
    outside = labelled & ((labels < 0) | (labels >= vocabulary))
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or equal ignore_index={ignore_index}; "
            f"got {int(labels[at])} at flat position {at}"
        )
    if token_index is None:
        return
    if token_index.numel() and not bool(((token_index >= 0) & (token_index < tokens)).all()):
        raise ValueError(f"token_index must lie in [0, {tokens}), got values outside")
    scored = torch.zeros_like(labels).index_add_(0, token_index, torch.ones_like(token_index))
    if bool((labelled & (scored != 1)).any()):
        raise ValueError(
            "token_index must hold every position with a label exactly once (positions with ignore_index may pad it)"
        )


def check_keywords(what: str, known: dict[str, bool], given: dict[str, Any], hint: str = "") -> None:
    """`known` maps each name to whether it is required."""
    unknown = sorted(set(given) - set(known))
    missing = sorted(name for name, required in known.items() if required and given.get(name) is None)
    if unknown or missing:
        raise ValueError(f"{what} {sorted(known)}; unknown: {unknown}, missing: {missing}{hint}")


def check_number(name: str, value: Any, positive: bool = False) -> None:
    if torch.compiler.is_compiling():
        return  # a number that varies is symbolic there
    try:
        finite = isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # of an int beyond float64
        finite = False
    if not finite or (positive and value <= 0):
        raise ValueError(f"{name} must be a {'positive' if positive else 'finite'} number, got {value!r}")


def check_options(
    ignore_index: int, logit_scale: float, softcap: float | None, temperature: float, workspace_bytes: int | None
) -> None:
    check_int64("ignore_index", ignore_index)
    for name, number, positive in (
        ("logit_scale", logit_scale, False),
        ("softcap", softcap, True),
        ("temperature", temperature, True),
        ("workspace_bytes", workspace_bytes, True),
    ):
        if number is not None:
            check_number(name, number, positive)
    if torch.compiler.is_compiling():
        return
    cap = 1.0 if softcap is None else softcap
    for factor in (logit_scale / temperature, logit_scale / cap, cap / temperature, cap, 1 / cap, 1 / temperature):
        if not abs(factor) <= 1e30:
            raise ValueError(
                "logit_scale, softcap, temperature and their ratios must lie within 1e30, or float32 cannot hold the "
                f"logits; got {logit_scale}, {softcap}, {temperature}"
            )


def check_int64(name: str, value: Any) -> None:
    whole: Any = value if isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool) else None
    if whole is None or not -(2**63) <= whole < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value!r}")


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
