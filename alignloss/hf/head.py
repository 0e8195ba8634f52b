"""The loss inside the forward of the output projection, or what the projection is given, for a loss afterwards."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from ..checks import is_dtensor
from ..ops.module_head import standing_for, through
from .check import check_model, logits_of
from .takeover import UnsupportedModel, call, inside_wrappers, name_of, projected, unwrapped

T = TypeVar("T")


class Head(NamedTuple):
    """What the output projection of a model is given, and what the model makes of its product.

    Logits are z = softcap(logit_scale (hidden weight^T + bias)). With LoRA on the projection hidden is [h, s A h] and
    weight [W, B], so that H is larger by its rank; where W is frozen our ops hand the gradient to B, past `weight`.
    """

    hidden: Tensor  #: (..., H)
    weight: Tensor  #: (V, H)
    bias: Tensor | None  #: (V,)
    logit_scale: float
    softcap: float | None

    @property
    def transform(self) -> dict[str, Any]:
        """logit_scale and softcap, as `linear_logprob` takes them."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}


def head_call(model: nn.Module, fn: Callable[[Head], T], /, **inputs: Any) -> tuple[T, Any]:
    """Call a model whose output projection runs `fn` on what it is given, instead of computing logits.

    The outermost model runs as always: hooks, autocast, adapters, checkpointing, merging of images, router losses,
    gathering of DDP and FSDP. So the head is whole where `fn` runs, and a loss made there has its gradients.

    Args:
        model: as in `check_model`, which is called first.
        fn: a function of `Head`, e.g. to the result of a loss module. Under prompt tuning, hidden has no positions of
            virtual tokens. For `torch.compile` it is opaque.
        inputs: of the model, by keyword, without labels.

    Returns:
        What `fn` returned, with the same tensors, and the outputs of the model, whose logits mean nothing.

    Raises:
        UnsupportedModel: as `check_model`.
        ValueError: for labels among the inputs: they belong to `fn`, aligned with the hidden states.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
        >>> model, ids = LlamaForCausalLM(config), torch.tensor([[3, 1, 4, 1]])
        >>> labels = alignloss.next_token_labels(ids, torch.ones_like(ids))
        >>> logps, outputs = head_call(
        ...     model, lambda head: alignloss.linear_logprob(head.hidden, head.weight, labels), input_ids=ids
        ... )
        >>> logps.shape
        torch.Size([1, 4])
    """
    if inputs.get("labels") is not None:
        raise ValueError(
            "labels are among the inputs: the model would make its own loss of logits that are not there. Give them to "
            "fn, aligned with the hidden states (alignloss.next_token_labels)"
        )
    return run_in_head(model, fn, check_model(model), lambda: model(**inputs), _virtual_tokens(model))


def run_in_head(
    model: nn.Module, fn: Callable[[Head], T], transform: tuple[float, float | None], run: Callable[[], Any],
    virtual: int = 0,
) -> tuple[T, Any]:  # fmt: skip
    """`head_call` of a run of the model whose transform is known; `virtual` positions come before its tokens."""
    found: list[Any] = []

    def forward(layer: nn.Module, hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        parts = projected(layer, hidden)
        result = fn(Head(parts.hidden[:, virtual:] if virtual else parts.hidden, parts.weight, parts.bias, *transform))
        found.append(result)
        return standing_for(result, hidden)

    outputs = call(model, forward, run)
    (result,) = found
    return through(result, logits_of(outputs)), outputs


def hidden_and_head(model: nn.Module, batch: Mapping[str, Any]) -> Head:
    """What the output projection is given in one forward, for a loss outside of it.

    For models that are not sharded: outside of their forward the head of the others is a shard again, whose gradient
    would be wrong without a word.

    Args:
        model: as in `check_model`, which is called first, but not sharded.
        batch: inputs of the model, without labels.

    Raises:
        UnsupportedModel: for a sharded model (FSDP, DeepSpeed, tensor parallelism), or one behind DDP, whose gradients
            would not be reduced; and as `check_model`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
        >>> head = hidden_and_head(LlamaForCausalLM(config), {"input_ids": torch.tensor([[3, 1, 4, 1]])})
        >>> head.hidden.shape, head.weight.shape, head.logit_scale, head.softcap
        (torch.Size([1, 4, 16]), torch.Size([32, 16]), 1.0, None)
    """
    kind = sharded(model)
    if kind is not None:
        raise UnsupportedModel(
            f"{name_of(model)} is {kind}: a loss outside of its forward would have wrong gradients. Use "
            "head_call(model, fn, **batch), which runs the loss inside"
        )
    found: list[Head] = []

    def kept(head: Head) -> Tensor:
        found.append(head)
        return head.hidden

    head_call(model, kept, **batch)
    return found[0]


def learned_prompt(model: Any) -> Any:
    """The config of an active adapter of PEFT that is a prompt or prefix; else None."""
    model = inside_wrappers(model)
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    disabled = getattr(model, "_adapters_disabled", False)  # within `disable_adapter()`
    return config if config is not None and config.is_prompt_learning and not disabled else None


def _virtual_tokens(model: Any) -> int:
    """Positions that prompt tuning puts before the tokens of a sequence."""
    config = learned_prompt(model)
    return 0 if config is None or config.peft_type.value == "PREFIX_TUNING" else config.num_virtual_tokens


def sharded(model: nn.Module) -> str | None:
    """How a model is spread over processes, if it is."""
    kinds = {type(module).__name__ for module in model.modules()}
    if any(kind == "FullyShardedDataParallel" or "FSDP" in kind for kind in kinds):
        return "sharded by FSDP"
    if type(model).__name__ == "DeepSpeedEngine":
        return "behind DeepSpeed"
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        return "sharded, with DTensors as parameters"
    if any(hasattr(parameter, "ds_id") for parameter in unwrapped(model).parameters()):
        return "sharded by DeepSpeed ZeRO-3"
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "behind DDP, which reduces gradients of its own outputs"
    return None
