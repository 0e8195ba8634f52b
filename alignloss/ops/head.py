"""The checked call that every op starts from: tensors, and one block of options."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_gradtrackingtensor
from torch.autograd import forward_ad

from .. import backends
from ..checks import (
    DTYPES,
    INTEGERS,
    check_head,
    check_options,
    check_savable,
    check_tensor,
    check_values_exist,
    checked_labels,
    is_dtensor,
    savable,
    validates,
)
from ..kernels import blocks
from .columns import first_trained, trained_columns
from .processes import check_gradient_meets_others, checked_group
from .sizes import (
    Footprint,
    accumulation_dtype,
    architecture,
    default_workspace,
    one_pass_workspace,
    total_memory,
)
from .vocabulary import Split, agree, check_part, local_part, unwritten


class Options(NamedTuple):
    """How to project, in the order in which every op takes it after its tensors and what is asked of it."""

    select: bool  # choose the labelled rows inside the op
    compute_dtype: torch.dtype
    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    backend: str  # "torch" or "triton"
    workspace_bytes: int
    validate: bool
    vocab_group: str | None = None  # the name of the processes that the vocabulary is split over
    vocab_parts: Sequence[int] | None = None  # entries of each of them

    @property
    def split(self) -> Split | None:
        if self.vocab_group is None or self.vocab_parts is None:
            return None
        return Split(self.vocab_group, tuple(self.vocab_parts))

    def vocabulary(self, weight: Tensor) -> int:
        """V of a weight, or of the head that it is a part of."""
        return len(weight) if self.split is None else self.split.total

    @property
    def transform(self) -> backends.Transform:
        return backends.Transform.of(self.logit_scale, self.softcap, self.temperature)

    def footprint(
        self,
        vocabulary: int,
        width: int,  # H
        hidden_dtype: torch.dtype,
        weight_dtype: torch.dtype,
        device_type: str,
        indexed: bool,  # the scored tokens are picked out of the positions
        trained_from: int = 0,
        bias: bool = False,
    ) -> Footprint:
        """What the sizes of a call's buffers follow from, for operands in contiguous rows."""
        dtypes, softcap = (self.compute_dtype, hidden_dtype, weight_dtype), self.softcap is not None
        exponentials = (
            self.backend == "triton"
            and self.compute_dtype == torch.bfloat16
            and not (bias or width % 8)
            and self.vocab_group is None  # its reference is the logit of the target, which one part has
        )
        if exponentials:
            kind, cap = architecture(device_type), self.transform.cap
            exponentials = blocks.takes_cap(kind, cap) if softcap else kind in blocks.EXPONENTIALS
        return Footprint(
            vocabulary, width, *dtypes, indexed, softcap, device_type, self.backend, trained_from, exponentials
        )

    def footprint_of(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, indexed: bool, trained_from: int = 0
    ) -> Footprint:
        vocabulary, width = weight.shape
        if self.split is not None:
            vocabulary = self.split.widest
        dtypes = hidden.dtype, weight.dtype
        found = self.footprint(vocabulary, width, *dtypes, weight.device.type, indexed, trained_from, bias is not None)
        if found.exponentials:
            reached = (found.copies_rows or blocks.reached(hidden)) and weight.stride(1) == 1
            reached &= found.casts_weight or blocks.reached(weight)
            found = found._replace(exponentials=reached)
        return found


class Projection(NamedTuple):
    """A checked call on flattened tokens, with its options resolved."""

    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (M,) int64
    token_index: Tensor | None  # (N,) int64 positions to score; None: every one, or see `Options.select`
    sorted_index: bool  # token_index holds the labelled positions in rising order
    one_pass_workspace: int  # bytes that one pass may take where it applies
    options: Options

    @property
    def result_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.options.compute_dtype)

    @property
    def trains_head(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def for_one_pass(self) -> "Projection":
        return self._replace(options=self.options._replace(workspace_bytes=self.one_pass_workspace))

    @property
    def footprint(self) -> Footprint:
        indexed = self.token_index is not None
        return self.options.footprint_of(self.hidden, self.weight, self.bias, indexed, self.trained_from)

    @property
    def trained_from(self) -> int:
        return first_trained(self.weight, trained_columns(self.weight))

    @property
    def head(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """weight and bias as an op takes them, and the columns of the weight that a gradient reaches past it."""
        columns = trained_columns(self.weight)
        return (self.weight if columns is None else self.weight.detach()), self.bias, columns


def project(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    bias: Tensor | None,
    asked: Any = None,  # for what: the same on every process of a vocab_group, as is `data`
    data: dict[str, Any] | None = None,
    *,
    token_index: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    validate: bool | None = None,
    vocab_group: Any = None,
) -> Projection:
    """Check the arguments of a call and resolve its options."""
    group = checked_group("vocab_group", vocab_group)
    if group is not None:
        weight, bias = _parts(weight, bias, group)
    _check_tensors(hidden, weight, labels, bias, token_index, whole=group is None)
    assert isinstance(weight, Tensor)
    _check_modes(hidden, weight, bias, token_index, validates(validate, hidden.device), group)
    check_options(ignore_index, logit_scale, softcap, temperature, workspace_bytes)
    compute_dtype = _compute_dtype(hidden, weight, bias)
    flat_labels = checked_labels("labels", labels).reshape(-1)
    select, given = False, token_index is not None
    if token_index is not None:
        token_index = savable(token_index.long())
    elif is_batchedtensor(flat_labels):
        raise ValueError(
            "under torch.func.vmap over labels each call would score its own number of positions: give token_index, "
            "padded to one number by positions that carry ignore_index"
        )
    elif torch.compiler.is_compiling():
        select = True  # a shape that depends on data would break the graph
    else:
        token_index = torch.nonzero(flat_labels != ignore_index).squeeze(1)
        if token_index.numel() == flat_labels.numel():
            token_index = None
    where = hidden.device.type, total_memory(hidden.device)
    options = Options(
        select,
        compute_dtype,
        ignore_index,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        backends.resolve(backend, hidden.device, compute_dtype),
        int(workspace_bytes or default_workspace(*where)),
        validates(validate, hidden.device),
    )
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    one_pass = int(workspace_bytes or one_pass_workspace(*where))
    if group is not None:
        same = _alike(hidden, weight, bias, options) | {"token_index": given, "what is asked for": asked, "data": data}
        of_all = group, len(weight), flat_hidden, flat_labels, token_index, same
        split, (least, one_pass) = agree(*of_all, (options.workspace_bytes, one_pass))
        options = options._replace(workspace_bytes=least, vocab_group=split.group, vocab_parts=split.parts)
    return Projection(flat_hidden, weight, bias, flat_labels, token_index, not given, one_pass, options)


_DEFAULTS = {name: p.default for name, p in inspect.signature(project).parameters.items() if p.kind is p.KEYWORD_ONLY}
# by name, and whether it is required, as `check_keywords` takes them
PROJECTION_OPTIONS = dict.fromkeys(_DEFAULTS, False)


def meaning(options: dict[str, Any]) -> list[Any]:
    """Of the options of a projection, some of them given, those that its results depend on."""
    return [options.get(name, _DEFAULTS[name]) for name in ("ignore_index", "logit_scale", "softcap", "temperature")]


def _parts(weight: Tensor | nn.Module, bias: Tensor | None, group: Any) -> tuple[Tensor, Tensor | None]:
    """This process's part of a head that is split over a group."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "a call with vocab_group is not compiled, for its processes talk while it is prepared: give the function "
            "that calls it to torch.compiler.disable"
        )
    part, part_of_bias = local_part("weight", weight, group), local_part("bias", bias, group)
    check_part("weight", part)
    check = unwritten(weight=weight, bias=bias)
    for each in (part, part_of_bias):
        if check is not None and each is not None and each.requires_grad:  # whose gradient comes of both
            each.register_hook(check)
    return part, part_of_bias


def _alike(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> dict[str, Any]:
    """What the processes of one split vocabulary have to share, by name: sizes and collectives follow from it."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    grads = [name for name, value in tensors.items() if value.requires_grad and torch.is_grad_enabled()]
    return {
        "hidden": (tuple(hidden.shape), hidden.dtype),
        "weight": (weight.shape[1], weight.dtype),
        "bias": None if bias is None else bias.dtype,
        "what requires a gradient": grads,
        "options": options._replace(workspace_bytes=0)._asdict(),
    }


def _check_tensors(
    hidden: Tensor, weight: Any, labels: Tensor, bias: Tensor | None, token_index: Tensor | None, whole: bool
) -> None:
    required = {"hidden": hidden, "weight": weight, "labels": labels}
    given = {name: value for name, value in (("bias", bias), ("token_index", token_index)) if value is not None}
    if is_dtensor(hidden):
        raise ValueError(
            "hidden is a DTensor, of which this call would see a part: give the hidden states of every token, "
            "hidden.redistribute(placements=[Replicate()]).to_local()"
        )
    hints = {"weight": "; pass lm_head or lm_head.weight", "hidden": "; pass the model's last hidden states"}
    for name, value in (required | given).items():
        if isinstance(value, Tensor):
            _check_transforms(name, value)
        check_tensor(name, value, hints.get(name, ""))
    if whole or weight.dtype not in DTYPES:
        check_head("weight", weight)
    empty = 0 in weight.shape[1 - whole :]
    if hidden.dim() < 1 or weight.dim() != 2 or empty or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (..., H) and weight (V, H) with one H >= 1 and V >= 1; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have the leading shape of hidden, {tuple(hidden.shape[:-1])}, one label per position; "
            f"got {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if token_index is not None and (token_index.dim() != 1 or token_index.dtype not in INTEGERS):
        raise ValueError(f"token_index must be (N,) integers, got {tuple(token_index.shape)} {token_index.dtype}")
    for name, value in (required | given).items():
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}; move one of them")


def _check_modes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_index: Tensor | None, validate: bool, group: Any
) -> None:
    """Tensors without values, those of inference mode that a backward would need, gradients that would not meet."""
    if torch.compiler.is_compiling():
        return
    check_values_exist(hidden, token_index is None or validate)
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains_head:
        check_savable(hidden=hidden, weight=weight, bias=bias)
    if (trains_head or hidden.requires_grad) and torch.is_grad_enabled():
        check_gradient_meets_others(weight, group)


def _check_transforms(name: str, value: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name} carries a forward-mode tangent; alignloss differentiates in reverse mode only")
    if is_gradtrackingtensor(value):
        raise RuntimeError(f"{name} is inside torch.func.grad or a relative of it; alignloss takes backward() alone")
    if is_batchedtensor(value) and torch.is_grad_enabled() and get_unwrapped(value).requires_grad:
        raise RuntimeError(
            f"{name} requires a gradient inside torch.func.vmap, where alignloss has none: one call with the batch as "
            "a leading dimension gives it"
        )


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    dtypes = {value.dtype for value in tensors.values()}
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(hidden.device.type)
    if len(dtypes) == 1:
        return hidden.dtype
    if torch.float64 in dtypes or {torch.bfloat16, torch.float16} <= dtypes:
        got = ", ".join(f"{name} {value.dtype}" for name, value in tensors.items())
        raise ValueError(
            f"hidden, weight and bias must have one dtype, or one of 16 bits and float32, outside autocast; got {got}"
        )
    return torch.float32
