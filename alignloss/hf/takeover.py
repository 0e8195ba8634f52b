"""The output projection of a model, and one call of the model with another forward in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import problem_of
from ..ops.columns import beside_frozen
from ..ops.module_head import Forward, UnsupportedModel, taken_over


def inside_wrappers(model: Any, sharding: bool = True) -> nn.Module:
    """The model inside DDP and torch.compile, and unless told otherwise FSDP1 and DeepSpeed, with its adapters."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel) or (sharding and type(model).__name__ in _SHARDING):
            model = model.module
        else:
            return model


def unwrapped(model: Any) -> nn.Module:
    """The model of transformers inside all of these and PEFT."""
    inner: Any = inside_wrappers(model)
    return unwrapped(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner


_SHARDING = ("FullyShardedDataParallel", "DeepSpeedEngine")


def name_of(model: nn.Module) -> str:
    return type(unwrapped(model)).__name__


def config_of(base: nn.Module) -> dict[str, Any]:
    config: Any = getattr(base, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return device
    return next((p.device for p in unwrapped(model).parameters() if p.device.type != "meta"), torch.device("cpu"))


@contextmanager
def refusing(what: str, way_out: str = "") -> Iterator[None]:
    """An UnsupportedModel for whatever goes wrong inside."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(f"{what} ({type(error).__name__}: {error}){way_out}") from error


def find_head(model: nn.Module) -> nn.Module:
    """The output projection: what get_output_embeddings() returns."""
    base: Any = unwrapped(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModel(
            f"{name_of(model)} has no output embedding (get_output_embeddings() gives {type(head).__name__}): call the "
            "loss modules in the forward of the model itself"
        )
    return head


class Projected(NamedTuple):
    """What an output projection multiplies: its logits are hidden W^T + b."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


def projected(layer: nn.Module, hidden: Tensor) -> Projected:
    """The product that a layer makes of its input, adapters of LoRA included: [h, s A h] and [W, B]."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if hasattr(layer, "base_layer"):
        return _adapted(layer, hidden, kind)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModel(f"its output embedding, {kind}, has no weight: it is no linear layer")
    problem = problem_of(weight)
    if problem is not None:
        raise UnsupportedModel(f"the weight of its output embedding is {problem}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise UnsupportedModel(
            f"its output embedding, {kind}, has a weight {tuple(weight.shape)} for hidden states "
            f"{tuple(hidden.shape)}: that is no linear layer"
        )
    return Projected(hidden, weight, getattr(layer, "bias", None))


def _adapted(layer: Any, hidden: Tensor, kind: str) -> Projected:
    """A layer of PEFT around a linear one."""
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        raise UnsupportedModel(
            f"its output embedding carries an adapter that is no LoRA, {kind}: leave the head out of target_modules, "
            "or merge the adapter"
        )
    base = projected(layer.base_layer, hidden)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return base
    if set(getattr(layer, "lora_variant", {})) & set(active) or len(getattr(layer, "lora_magnitude_vector", {})):
        raise UnsupportedModel(
            f"its output embedding carries a variant of LoRA ({kind}, DoRA or another) that is more than a product of "
            "low rank: leave the head out of target_modules"
        )
    rows, columns = [base.hidden], []
    for name in active:
        if getattr(layer.lora_B[name], "bias", None) is not None:
            raise UnsupportedModel("LoRA on its output embedding has a bias (lora_bias=True): leave it out")
        lifted = layer.lora_dropout[name](hidden.to(layer.lora_A[name].weight.dtype))
        rows.append((layer.lora_A[name](lifted) * layer.scaling[name]).to(hidden.dtype))
        columns.append(layer.lora_B[name].weight.to(base.weight.dtype))
    if base.weight.requires_grad:
        weight = torch.cat([base.weight, *columns], -1)
    else:
        weight = beside_frozen(base.weight, torch.cat(columns, -1))
    return Projected(torch.cat(rows, -1), weight, base.bias)


def branches(head: Any) -> list[nn.Module]:
    """The layers that may run where `head` is called: itself, or those of a ModulesToSaveWrapper of PEFT."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def call(model: nn.Module, forward: Forward, run: Callable[[], Any]) -> Any:
    """What a run of the model returns, whose output projection has another forward in place of its own."""
    with taken_over(branches(find_head(model)), forward) as calls:
        outputs = run()
    if len(calls) != 1:
        raise UnsupportedModel(
            f"{name_of(model)} called its output embedding {len(calls)} times in one forward, not once: its logits are "
            "not one projection of its hidden states"
        )
    return outputs
