"""The one function of TRL that its trainers compute log-probabilities through, by alignloss."""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_keywords
from ..hf.check import UnsupportedModel, check_model, keep_unpacked, packed_weights
from ..hf.head import Head, run_in_head
from ..logprob import LogprobStats, linear_logprob_stats
from ..modules.own_loss import one_pass_loss
from ..ops.head import PROJECTION_OPTIONS
from ..ops.sizes import accumulation_dtype
from ..recipes.batches import next_token_labels

try:
    import trl
    from trl.trainer import utils
except ImportError as error:
    raise ImportError("alignloss.trl needs TRL >= 1.15, < 2: pip install 'alignloss[trl]'") from error

KNOWN = "1.15 and 1.16"
SIGNATURE = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
FIELDS = {"loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"}
# of the projection, which the head of a model or TRL's own arguments give
OWN = {"logit_scale", "softcap", "temperature", "token_index", "ignore_index"}
HEAD_OPTIONS = {name: False for name in PROJECTION_OPTIONS if name not in OWN}


def check_seam() -> None:
    """An ImportError where TRL is not one whose fused head is known."""
    theirs = getattr(utils, "add_fused_lm_head", None)
    output = getattr(utils, "FusedCausalLMOutput", None)
    signature = [] if theirs is None else list(inspect.signature(theirs).parameters)
    fields = set() if output is None else set(inspect.signature(output).parameters)
    if signature != SIGNATURE or fields != FIELDS:
        raise ImportError(
            f"alignloss.trl knows TRL {KNOWN}, whose add_fused_lm_head takes {SIGNATURE} and gives {sorted(FIELDS)}; "
            f"in TRL {trl.__version__} it takes {signature or 'nothing, for there is none'} and gives {sorted(fields)}"
        )


check_seam()
LossFn = Callable[[Any], Tensor]  # of a FusedCausalLMOutput to a 0-d loss


class _FusedHead(NamedTuple):
    """What the output projection of a model does in place of logits."""

    temperature: float
    cast_lm_head_to_fp32: bool
    stats: tuple[str, ...]
    differentiable_entropy: bool
    options: dict[str, Any]  # of the projection

    def run(self, head: Head, target: Tensor, last: int | None, loss_fn: LossFn | None, units: Any) -> Any:
        """Fields, or the loss of them, for labels aligned with hidden states, of which `last` ones belong to none."""
        hidden, target = head.hidden, target.to(head.hidden.device)
        autocast: Any = nullcontext()
        if self.cast_lm_head_to_fp32:
            hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        dtype = accumulation_dtype(hidden.dtype)

        def fields(logps: Tensor, stats: LogprobStats) -> Any:
            found = {name: getattr(stats, name).view(target.shape)[:, :last] for name in self.stats}
            logps = logps.to(dtype).view(target.shape)[:, :last]
            return utils.FusedCausalLMOutput(log_probs=logps, label_mask=(target != -100)[:, :last], **found)

        call = (hidden, head.weight, target)
        options = {
            "bias": head.bias, "stats": self.stats, "temperature": self.temperature, **head.transform, **self.options,
        }  # fmt: skip
        with autocast:
            if loss_fn is not None:
                return one_pass_loss(*call, lambda logps, stats: loss_fn(fields(logps, stats)), units=units, **options)
            stats = linear_logprob_stats(*call, differentiable_entropy=self.differentiable_entropy, **options)
        return fields(stats.logps, stats)


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    *,
    differentiable_entropy: bool = False,
    **head_options: Any,
) -> None:
    """TRL's function of this name, by alignloss: `model(..., labels=..., fused_lm_head=True)` gives log-probabilities.

    The forward of the model runs whole, its output projection by `head_call`: its softcap and factor are measured, and
    router losses, images and adapters are those of any forward. A model that is called so also takes `loss_fn`, a
    function of the `FusedCausalLMOutput` to a 0-d loss, which is made in the projection, with 3 GEMMs where hidden
    states and head train; and `units`, both as in `one_pass_loss`. Weights of 4 bits pass gradients after an evaluation
    too, where bitsandbytes would pack them on some CPUs.

    Args:
        model: a model of transformers, inside of PEFT, if any.
        temperature, cast_lm_head_to_fp32, outputs: as in TRL.
        differentiable_entropy: whether `entropy` has a gradient, which costs a GEMM.
        head_options: backend, workspace_bytes, validate, as in `linear_logprob`.

    Raises:
        UnsupportedModel: as `check_model`, and for a model that trains beside packed weights.
    """
    check_keywords("add_fused_lm_head takes the options", HEAD_OPTIONS, head_options)
    packed = packed_weights(model)
    if packed and any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedModel(
            f"{len(packed)} weights of 4 bits, {packed[0]} the first, have been packed by bitsandbytes in an "
            "evaluation on this CPU, after which they pass no gradients: load the model anew, and evaluate it in the "
            "trainer"
        )
    keep_unpacked(model)
    transform, before = check_model(model), model.forward
    function = getattr(before, "__func__", None)
    stats = tuple(name for name in outputs if name != "log_probs")
    fused = _FusedHead(temperature, cast_lm_head_to_fp32, stats, differentiable_entropy, head_options)

    # the signature stays: generate checks arguments against it
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Any = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        loss_fn: LossFn | None = None,
        units: Any = None,
        **kwargs: Any,
    ) -> Any:
        # of this model, which may be a copy of the one that was given
        original = before if function is None else types.MethodType(function, self)
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(*args, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        target, last = (aligned(labels), -1) if shift_labels is None else (shift_labels, None)
        kwargs["use_cache"] = False
        result, outputs = run_in_head(
            self,
            lambda head: fused.run(head, target, last, loss_fn, units),
            transform,
            lambda: original(*args, **kwargs),
        )
        aux = getattr(outputs, "aux_loss", None)
        if loss_fn is not None:
            return utils.FusedCausalLMOutput(loss=result, aux_loss=aux)
        count = result.label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        result.loss = -result.log_probs.sum() / count
        if aux is not None:
            result.aux_loss = aux
            result.loss = result.loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux
        return result

    model.forward = types.MethodType(forward, model)


def aligned(labels: Tensor) -> Tensor:
    """Labels of transformers, which are not shifted, as hidden states predict them."""
    return next_token_labels(labels, labels != -100)


@contextmanager
def patched(**head_options: Any) -> Iterator[None]:
    """While this is active, TRL's own trainers are built on alignloss, and stay so; nothing of TRL stays changed.

    Args:
        head_options: as in `add_fused_lm_head`, with `differentiable_entropy`.
    """
    check_keywords("patched takes the options", HEAD_OPTIONS | {"differentiable_entropy": False}, head_options)
    theirs, ours = utils.add_fused_lm_head, functools.partial(add_fused_lm_head, **head_options)

    def replace(old: Any, new: Any) -> None:
        # those that import TRL's function by name, also while this is active
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "trl" and module is not None and vars(module).get("add_fused_lm_head") is old:
                module.add_fused_lm_head = new  # type: ignore[attr-defined]

    replace(theirs, ours)
    try:
        yield
    finally:
        replace(ours, theirs)
