"""What a model makes of the product in its output projection: measured on its own forward, not read in its config.

Whether a softcap, a factor or layers after the projection apply depends on the class of a model, not on its config. So
the projection returns known numbers once, and what comes out of the model is its transform, if it is one that we have:
y = s x, or y = c tanh(s x / c). Then the model's own logits of a few tokens are compared with that transform of
h W^T + b, from what its projection was given.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import leaves_of
from .takeover import (
    UnsupportedModel,
    call,
    config_of,
    find_head,
    input_device,
    inside_wrappers,
    name_of,
    projected,
    refusing,
    unwrapped,
)

# over ten decades, both signs; the last four show the cap
PROBE = (1e-3, -1e-3, 0.5, -0.5, 2.0, -3.0, 10.0, -17.0, 60.0, -90.0, 400.0, -1000.0, 3e4, -3e4, 3e5, -3e5)
# by dtype of the logits, relative to the largest
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOLERANCE_16_BIT = 2e-2
PACKS = "support_avx512bf16_for_cpu"  # of a Linear4bit of bitsandbytes

_checked: "WeakKeyDictionary[nn.Module, tuple[str, tuple[float, float | None]]]" = WeakKeyDictionary()


def check_model(model: nn.Module, batch: Mapping[str, Any] | None = None) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a model, measured on its own forward and compared with its own logits.

    Once per model; again where its head, its adapters or numbers of its config have changed since. The model, its modes
    and torch's random state are left as they were. All processes of a sharded model have to call it together.

    Args:
        model: a causal, encoder-decoder or vision-language model of transformers, also inside PEFT, DDP, FSDP,
            DeepSpeed or torch.compile.
        batch: inputs of the model without labels; by default a few tokens. Checked anew where it is given.

    Raises:
        UnsupportedModel: where scale and softcap of one projection of its hidden states are not the model's logits.

    Example:
        >>> from transformers import CohereConfig, CohereForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = CohereConfig(**sizes, num_attention_heads=2, pad_token_id=0, eos_token_id=1, logit_scale=0.0625)
        >>> check_model(CohereForCausalLM(config))
        (0.0625, None)
    """
    base = unwrapped(model)
    state = state_of(base, find_head(model))
    if batch is None and base in _checked and _checked[base][0] == state:
        return _checked[base][1]
    # what is inside computes the same, and no reducer waits for gradients, nothing is compiled for a few tokens
    inner, name = inside_wrappers(model, sharding=False), name_of(model)
    try:
        with left_as_it_is(inner), torch.no_grad():
            found = _measured(inner, dict(_tokens(inner) if batch is None else batch), name, batch is None)
    except UnsupportedModel as error:
        raise UnsupportedModel(str(error) if name in str(error) else f"{name}: {error}") from error
    _checked[base] = state, found
    return found


def _measured(model: nn.Module, batch: dict[str, Any], name: str, ours: bool) -> tuple[float, float | None]:
    products: list[Tensor] = []
    dtypes: list[torch.dtype] = []

    def recorded(layer: nn.Module, hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        parts, dtype = projected(layer, hidden), computed_in(hidden)
        parts = parts._replace(hidden=parts.hidden.to(dtype), weight=parts.weight.to(dtype))
        dtypes.append(dtype)
        # here, not after the forward: a sharded weight is freed then
        z = parts.hidden.double() @ parts.weight.double().T
        products.append(z if parts.bias is None else z + parts.bias.double())
        with torch.enable_grad():
            logits = own(hidden)
            lost = leaves_of(logits) - leaves_of(*projected(layer, hidden))
        if lost:
            names = sorted(name for name, parameter in layer.named_parameters() if parameter in lost)
            raise UnsupportedModel(
                f"its output embedding, a {type(layer).__name__}, trains more than weight and bias, {names}, which "
                "would get no gradient: freeze them"
            )
        return logits.detach()

    def known(layer: nn.Module, hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        # till the end of the caller's no_grad: a factor that is a parameter of the model shows
        torch.set_grad_enabled(True)
        values = torch.tensor(PROBE, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        return values.expand(*hidden.shape[:-1], len(PROBE)).clone()

    few_tokens = refusing(f"{name} does not run on a few tokens", ": give check_model a batch of yours")
    with few_tokens if ours else nullcontext():
        logits = logits_of(call(model, recorded, lambda: model(**batch)))
    more = f"{name} does more to its logits than scale and softcap"
    with refusing(f"{more}: with {len(PROBE)} numbers in their place it fails"), torch.no_grad():
        seen = logits_of(call(model, known, lambda: model(**batch)))
    scale, cap = _transform(seen, name)
    base = unwrapped(model)
    scale, cap = _written(scale, base), None if cap is None else _written(cap, base)
    own, mine = logits.double(), _transformed(products[0], scale, cap)
    if own.shape != mine.shape:
        raise UnsupportedModel(
            f"{name} gives logits {tuple(own.shape)}, its output embedding {tuple(mine.shape)}: they are not one "
            "projection of its hidden states"
        )
    difference = apart(mine, own)
    # what is returned may have been widened since, as accelerate does
    if not difference <= TOLERANCE.get(min(logits.dtype, *dtypes, key=lambda d: d.itemsize), TOLERANCE_16_BIT):
        raise UnsupportedModel(
            f"{name}: its logits differ from the projection of its hidden states by {difference:.1e} of their size: "
            "its output embedding is more than a linear layer, or other layers follow it"
        )
    return scale, cap


def apart(values: Tensor, expected: Tensor) -> float:
    """The largest difference, of the size of the largest of what was expected."""
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) if len(expected) else 0.0


def computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype that a linear layer multiplies in here."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def logits_of(outputs: Any) -> Tensor:
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def _transformed(x: Tensor, scale: float, cap: float | None) -> Tensor:
    return scale * x if cap is None else cap * torch.tanh(scale * x / cap)


def _transform(seen: Tensor, name: str) -> tuple[float, float | None]:
    """Scale and softcap from what a model made of PROBE."""
    if seen.shape[-1] != len(PROBE):
        raise UnsupportedModel(f"{name} changes the width of its logits, {len(PROBE)} to {seen.shape[-1]}")
    if seen.requires_grad:
        raise UnsupportedModel(
            f"{name} has parameters behind its output embedding, which would get no gradient: freeze them"
        )
    y = seen.double().reshape(-1, len(PROBE))
    if not bool((y == y[:1]).all()):
        raise UnsupportedModel(f"{name} treats positions or tokens differently behind its output embedding")
    x, y = torch.tensor(PROBE, dtype=torch.float64, device=y.device), y[0]
    tolerance = 1e-4 if seen.dtype.itemsize > 2 else TOLERANCE_16_BIT
    scale = float(y[0] / x[0])
    linear = bool(torch.isclose(y, scale * x, rtol=tolerance, atol=0).all())
    cap = None if linear else float(y[-2].abs())
    if not scale or cap == 0 or not torch.allclose(_transformed(x, scale, cap), y, rtol=tolerance, atol=1e-6):
        shown = ", ".join(f"{a:g} -> {b:g}" for a, b in zip(x.tolist()[4::4], y.tolist()[4::4], strict=True))
        raise UnsupportedModel(f"{name} does more to its logits than scale and softcap: {shown}")
    return scale, cap


def _written(measured: float, base: nn.Module) -> float:
    """A number of the model's config, or its inverse, that the measurement cannot tell from itself; else itself."""
    numbers = [number for number in _numbers(base) if number]
    candidates = [1.0, *numbers, *(1 / number for number in numbers)]
    nearest = min(candidates, key=lambda number: abs(number - measured))
    return float(nearest) if abs(nearest - measured) <= 1e-5 * abs(measured) else measured


def _numbers(base: nn.Module) -> list[float]:
    found: list[float] = []
    stack: list[Any] = [config_of(base), {k: v for k, v in vars(base).items() if not k.startswith("_")}]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(float(value))
    return found


def state_of(base: nn.Module, head: nn.Module) -> str:
    """What the result depends on, but for the values of parameters."""
    layers = [
        (
            name,
            type(layer).__qualname__,
            getattr(layer, "merged_adapters", None),
            getattr(layer, "active_adapters", None),
        )
        for name, layer in head.named_modules()
    ]
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in head.named_parameters()]
    others = {k: v for k, v in vars(base).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    # a trainer may name special tokens later
    config = {k: v for k, v in config_of(base).items() if not k.endswith("_token_id")}
    return json.dumps([id(head), layers, shapes, sorted(others.items()), config], default=str)


def keep_unpacked(model: nn.Module) -> list[Any]:
    """Tell layers of 4 bits that their weights stay as they are; those that have been told.

    In an evaluation on a CPU with AVX512-BF16 bitsandbytes 0.50 packs such a weight, for good: its products are then in
    bfloat16, and pass no gradient to their input, in training either.
    """
    layers = [module for module in model.modules() if getattr(module, PACKS, False)]
    for layer in layers:
        setattr(layer, PACKS, False)
    return layers


def packed_weights(model: nn.Module) -> list[str]:
    """Names of the weights to which that has happened."""
    states = {name: getattr(parameter, "quant_state", None) for name, parameter in model.named_parameters()}
    return [name for name, state in states.items() if getattr(state, "packing_format_for_cpu", False)]


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """In evaluation; modes, quantized weights and random states as they were afterwards."""
    modes, packing = [(module, module.training) for module in model.modules()], keep_unpacked(model)
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for layer in packing:
                setattr(layer, PACKS, True)


def _tokens(model: nn.Module, count: int = 16) -> dict[str, Any]:
    """A few tokens that stand for no image, sound or padding.

    Not 8 or 24, of which flex_attention, compiled for a CPU by torch 2.13, now and then makes NaN.
    """
    base = unwrapped(model)
    config: Any = base.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    special = {
        value
        for part in (config, text)
        for name, value in vars(part).items()
        if isinstance(value, int) and name.endswith(("_token_id", "_token_index"))
    }
    vocabulary = getattr(text, "vocab_size", 32)
    ids = [number for number in range(3, vocabulary) if number not in special][:count]
    tokens = torch.tensor([ids], device=input_device(model))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens.flip(1)
    return batch
