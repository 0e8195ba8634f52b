"""Will a training step fit? Bytes of weights, gradients, optimizer, activations and loss layer of a decoder.

Activations are what autograd saves in transformers' implementation of the model, per token and layer, with fused
attention (`attn_implementation="sdpa"`) and a padding mask, so that grouped key and value heads are repeated. With
Hq = heads x head_dim, I the intermediate size and r the rank of an adapter, 16-bit numbers being 2 bytes:

    attention   2 (q + k + v + output) Hq and 4 heads for its log-sums, and the mask, 2 T for sequences of T
    MLP         gate, its activation, up, and their product: 8 I
    norm        its input in fp32, 4 H, and what its weight multiplies, if that trains: 2 H (4 H in Gemma, and
                under autocast)
    linear      the inputs of those that train or carry an adapter: shared where they are one tensor, one copy for
                each where autocast casts it; an adapter's r numbers

In float32 (`precision="fp32"`) 16-bit numbers have 4 bytes, and a norm keeps its input without a copy. With shared
prompts a pair is one sequence of its prompt and both completions.

Gemma 2 counts as by fused attention too; by eager attention, which transformers 5.24 takes unless it is told
"flex_attention", it needs more.

What stands beside the decoder, a vision tower and its projector, is frozen: weights alone. Its forward leaves nothing
for the backward; the positions of an image count as tokens.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..planning import Plan, plan
from .fit_config import count, installed, quantization_of

MODELS: dict[str, dict[str, Any]] = json.loads(
    files("alignloss.commands").joinpath("data/models.json").read_text("utf-8")
)
# what a config.json may leave out, of the families that are estimated
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {
        "num_key_value_heads": 4, "head_dim": 256, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
# the decoder of a model that sees images, and the family whose layers it has
_SAME_LAYERS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
QLORA = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
OPTIMIZER_STATES = {"adamw": 2, "adamw8bit": 2, "sgd": 0}


class Model(NamedTuple):
    """A decoder as its config.json describes it."""

    family: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    softcap: float | None
    beside_parameters: int = 0  # of a vision tower and its projector
    quantized_parameters: int = 0
    quantized_bytes: int = 0  # of those

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def norms(self) -> int:
        """Norms over the hidden size in a layer."""
        return 4 if self.family == "gemma2" else 2

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a decoder layer."""
        H, I, Q, K = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size  # noqa: E741
        return [(H, Q), (H, K), (H, K), (Q, H), (H, I), (H, I), (I, H)]

    @property
    def layer_parameters(self) -> int:
        biases = self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.output_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = self.norms * self.hidden_size + 2 * self.head_dim * (self.family == "qwen3")
        return sum(i * o for i, o in self.linears) + biases + norms

    @property
    def decoder_parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden_size

    @property
    def parameters(self) -> int:
        return self.decoder_parameters + self.beside_parameters

    def frozen_bytes(self, width: int) -> int:
        """Of all weights where none trains, of `width` bytes each unless they are quantized."""
        return width * (self.parameters - self.quantized_parameters) + self.quantized_bytes

    @property
    def unpacked(self) -> int:
        """Numbers of the largest quantized matrix, of which a backward unpacks one at a time."""
        return max(i * o for i, o in self.linears) if self.quantized_parameters else 0

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer but the head."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears)

    def layer_activations(self, length: int, lora: bool, rank: int, precision: str) -> int:
        """Bytes per token that autograd saves in one layer, for sequences of `length` tokens."""
        H, Q, I = self.hidden_size, self.query_size, self.intermediate_size  # noqa: E741
        mixed, wide = precision == "mixed", 4 if precision == "fp32" else 2
        trained_norm = 0 if lora else 4 if mixed or self.family == "gemma2" else wide
        total = 4 * wide * Q + 4 * self.heads + wide * length + 4 * wide * I
        total += self.norms * ((4 + trained_norm) * H + 4)
        if self.family == "qwen3":
            total += (4 + (0 if lora else wide)) * (Q + self.kv_size) + 4 * (self.heads + self.kv_heads)
        total += wide * H * (5 if mixed else 2)
        if lora:
            total += wide * rank * len(self.linears) + 2 * Q * mixed
        return total


def read_model(name: str, *, qlora: bool = False) -> Model:
    """A built-in configuration, or that of a config.json or of a folder that holds one.

    With `qlora` its linear layers are quantized as `alignloss train --qlora` does it: NF4, scales quantized too.

    Raises:
        ValueError: for an unknown name, a file that is no configuration, or an architecture that is not estimated.
    """
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if name.lower() in MODELS:
        config = MODELS[name.lower()]
    elif path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    else:
        raise ValueError(f"{name!r} is neither a config.json nor one of {', '.join(MODELS)}")
    if not isinstance(config, dict):
        raise ValueError(f"{name} is not the configuration of a model: it holds a {type(config).__name__}")
    try:
        if not isinstance(config.get("model_type", ""), str):
            raise ValueError(f"model_type must be a string, got {config['model_type']!r}")
        if qlora:
            if quantization_of(config):
                raise ValueError("it is quantized already: leave qlora out")
            config = config | {"quantization_config": QLORA}
        if (qlora or name.lower() not in MODELS) and installed():
            return _built(config)
        _check_plain(config)
        return _plain(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _built(config: dict[str, Any]) -> Model:
    """With what transformers knows: defaults, what stands beside the decoder, quantization."""
    if _has(config, "auto_map"):
        raise ValueError(
            "auto_map names code that comes with the checkpoint, which is never run; where transformers has the model "
            "itself, take auto_map out of the config.json"
        )
    counted = count(config, (*_FAMILIES, *_SAME_LAYERS))
    settings = counted.settings
    model = _plain(settings | {"model_type": _SAME_LAYERS.get(settings["model_type"], settings["model_type"])})
    if (model.decoder_parameters, model.vocabulary) != (counted.decoder_parameters, counted.vocabulary):
        raise ValueError(
            f"the decoder has {counted.decoder_parameters:,} parameters and {counted.vocabulary:,} tokens where "
            f"{model.family!r} with these sizes has {model.decoder_parameters:,} and {model.vocabulary:,}: a variant "
            "that is not estimated"
        )
    beside = counted.parameters - counted.decoder_parameters
    return model._replace(
        beside_parameters=beside,
        quantized_parameters=counted.quantized_parameters,
        quantized_bytes=counted.quantized_bytes,
    )


def _has(config: dict[str, Any], key: str) -> bool:
    return bool(config.get(key)) or any(_has(value, key) for value in config.values() if isinstance(value, dict))


def _check_plain(config: dict[str, Any]) -> None:
    if _has(config, "auto_map") or any(
        key.endswith("_config") and isinstance(value, dict) for key, value in config.items()
    ):
        quantization_of(config)
        raise ValueError(
            "a configuration with parts (text_config, vision_config, quantization_config) or with code (auto_map) is "
            "read through transformers; in the project's folder: pip install '.[fit]'"
        )


def _plain(config: dict[str, Any]) -> Model:
    """A decoder alone, from the content of its config.json."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"the model type {family!r} is not estimated; those are: {', '.join(_FAMILIES)}")
    config = _FAMILIES[family] | config
    hidden_size, intermediate_size, layers, heads, vocabulary = (_size(config, key) for key in _SIZES)
    kv_heads = _size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings must be true or false, got {tied!r}")
    bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3", "gemma2")
    return Model(
        family,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        _size(config, "head_dim", max(hidden_size // heads, 1)),
        vocabulary,
        tied,
        bias or family == "qwen2",
        bias,
        bool(config.get("mlp_bias", False)) and family == "llama",
        config.get("final_logit_softcapping"),
    )


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


class Estimate(NamedTuple):
    """Bytes of one training step, for one way to train."""

    weights: int
    gradients: int
    head_gradient: int  # of those, the first that a backward makes
    optimizer: int
    activations: int  # saved from forward to backward
    recomputed: int  # in the backward of one layer: by checkpointing, and a quantized matrix in 16 bits
    loss_layer: Plan
    loss_bytes: int  # of alignloss's loss layer, above inputs and the gradient of the head
    full_logits_bytes: int  # the same of full logits
    accumulates: bool

    def total(self, full_logits: bool = False) -> int:
        """At the larger of two moments: the loss, with every activation alive, and a layer's backward.

        Where gradients are not held from a micro-batch before, the backward's moment is its first layer, with every
        activation and the head's gradient, or its last, with every gradient. alignloss makes the head's gradient in the
        loss layer; full logits make it when two of their three tensors of logits are gone.
        """
        held = self.weights + self.optimizer
        loss = self.full_logits_bytes if full_logits else self.loss_bytes
        if self.accumulates:
            return held + self.gradients + self.activations + max(loss, self.recomputed)
        if full_logits:
            loss = max(loss, loss // 3 + self.head_gradient)
        else:
            loss += self.head_gradient
        early = self.activations + max(loss, self.head_gradient + self.recomputed)
        return held + max(early, self.gradients + self.recomputed)


def estimate(
    model: Model,
    tokens: int,
    *,
    length: int,
    labelled: float = 1.0,
    lora: bool = False,
    rank: int = 16,
    checkpointing: bool = False,
    precision: str = "bf16",
    optimizer: str = "adamw",
    reference_model: bool = False,
    paired: bool = True,
    share_prompts: bool = False,
    accumulates: bool = True,
    device: str = "cuda",
    gpu_memory: int = 80 << 30,
    workspace_bytes: int | None = None,
) -> Estimate:
    """Bytes of a training step on one GPU, or on a CPU.

    Args:
        model: from `read_model`.
        tokens: positions of a micro-batch, padding included: of 2B sequences if `paired`, else of B.
        length: positions of a sequence.
        labelled: the fraction of positions that are scored.
        lora: train adapters of `rank` on every linear layer but the head, instead of every parameter.
        checkpointing: keep the input of each layer alone, and recompute the layer in the backward.
        precision: "bf16": everything, adapters too (PEFT makes those beside 8-bit weights fp32, with a copy of their
            inputs, unless they are cast); "mixed": bf16 autocast, with what trains, its gradients and states in fp32
            and what is frozen in bf16; "fp32": everything.
        optimizer: "adamw" (two states in the dtype of the parameter), "adamw8bit" (two of one byte) or "sgd" (none).
        reference_model: a frozen copy beside the model, quantized like it; else references are cached, or the base.
        share_prompts: a pair is computed as one sequence, of its prompt and both completions.
        accumulates: gradients are held from the micro-batch before; False: they are freed after a step of one.
        device, gpu_memory, workspace_bytes: "cuda" or "cpu", total bytes, bytes: from which the workspace follows.

    Raises:
        ValueError: for a name or number out of range, and for quantized weights without `lora`.
    """
    if share_prompts and not paired:
        raise ValueError("share_prompts is for pairs")
    _check_step(model, tokens, length, labelled, lora, rank, precision, optimizer)
    scored = max(1, round(tokens * labelled))
    unit = max(1, round(length * labelled)) * (2 if paired else 1)
    if share_prompts:  # of two sequences of prompt and completion, the one prompt less
        tokens, length = round(tokens * (1 + labelled) / 2), round(length * (1 + labelled))
    mixed = precision == "mixed"
    trained = model.adapter_parameters(rank) if lora else model.decoder_parameters
    width = 4 if precision == "fp32" else 2  # of what is frozen
    wide = 4 if mixed else width
    weights = wide * trained + (model.frozen_bytes(width) if lora else width * model.beside_parameters)
    weights += model.frozen_bytes(width) * reference_model
    states = OPTIMIZER_STATES[optimizer] * (1 if optimizer == "adamw8bit" else wide)
    residual = 4 if mixed and not lora else width
    layer = tokens * model.layer_activations(length, lora, rank, precision)
    # autocast keeps a 16-bit copy of each trained matrix for the backward
    layer += 2 * (trained // model.layers if lora else model.layer_parameters) * mixed
    layers = model.layers * (tokens * model.hidden_size * residual if checkpointing else layer)
    # the last norm, and the hidden states that the loss takes, gathered where prompts are shared
    norm = 4 if lora else 8 if mixed else 4 + width
    activations = layers + (tokens * (norm + residual) + scored * residual * share_prompts) * model.hidden_size
    loss = plan(
        *(scored, model.hidden_size, model.vocabulary), train_head=not lora, pair_tokens=min(unit, scored),
        positions=scored if share_prompts else tokens, softcap=model.softcap, workspace_bytes=workspace_bytes,
        weight_dtype=torch.float32 if residual == 4 else None, **_machine(precision, device, gpu_memory),
    )  # fmt: skip
    head = model.vocabulary * model.hidden_size * wide * (not lora)
    return Estimate(
        weights=weights,
        gradients=wide * trained,
        head_gradient=head,
        optimizer=states * trained,
        activations=activations,
        recomputed=layer * checkpointing + width * model.unpacked,
        loss_layer=loss,
        loss_bytes=loss.peak_bytes - head * (loss.regime > 2),
        full_logits_bytes=loss.full_logits_bytes + tokens * model.hidden_size * residual,  # and dhidden
        accumulates=accumulates,
    )


def _machine(precision: str, device: str, gpu_memory: int) -> dict[str, Any]:
    """Where the loss layer computes, as `plan` takes it."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return {"dtype": dtype, "device": device, "device_memory": gpu_memory if device == "cuda" else None}


def _check_step(
    model: Model, tokens: int, length: int, labelled: float, lora: bool, rank: int, precision: str, optimizer: str
) -> None:
    if precision not in ("bf16", "mixed", "fp32") or optimizer not in OPTIMIZER_STATES:
        raise ValueError(
            f"precision must be 'bf16', 'mixed' or 'fp32', optimizer one of {sorted(OPTIMIZER_STATES)}; "
            f"got {precision!r}, {optimizer!r}"
        )
    if not 0 < labelled <= 1 or not 1 <= length <= tokens or rank < 1:
        raise ValueError(
            "labelled must lie in (0, 1], length in [1, tokens], rank be positive; "
            f"got {labelled}, {length} of {tokens}, {rank}"
        )
    if model.quantized_parameters and not lora:
        raise ValueError(
            "quantized weights do not train: lora=True trains adapters beside them; to train every parameter, give the "
            "config.json without quantization_config"
        )


def most_tokens(model: Model, memory: int, full_logits: bool, length: int, **options: Any) -> int:
    """The most positions, in whole pairs (sequences, if not `paired`), whose step fits `memory` bytes; 0 for none."""
    unit = length * (2 if options.get("paired", True) else 1)

    def fits(units: int) -> bool:
        return estimate(model, units * unit, length=length, **options).total(full_logits) <= memory

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit
