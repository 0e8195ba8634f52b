"""What transformers makes of a config.json: the defaults of its class, and the parameters on the meta device.

Nothing is downloaded, and no code that comes with a checkpoint is run.
"""

import importlib.util
from typing import Any, NamedTuple

import torch

_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes: weights per scale, scales per scale of theirs


class Counted(NamedTuple):
    """A model as transformers builds it."""

    settings: dict[str, Any]  # of the decoder
    decoder_parameters: int  # with embeddings and head
    parameters: int
    vocabulary: int
    quantized_parameters: int
    quantized_bytes: int  # of those


def installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization that a config.json asks for, wherever it says so; empty for none.

    Raises:
        ValueError: for one whose bytes are not known.
    """
    places = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    found = [place[key] for place in places for key in ("quantization_config", "compression_config") if place.get(key)]
    if not found:
        return {}
    quantization = found[0]
    if not isinstance(quantization, dict) or any(other != quantization for other in found):
        raise ValueError(f"quantization_config must be one object, got {found}")
    bits = [n for n in (4, 8) if quantization.get(f"load_in_{n}bit")]
    method = quantization.get("quant_method", "bitsandbytes" if bits else None)
    if method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit") or len(bits) != 1:
        raise ValueError(
            f"the bytes of the quantization {method!r} are not known, only those of bitsandbytes with load_in_4bit or "
            "load_in_8bit; give the config.json of the model before quantization"
        )
    skipped = quantization.get("llm_int8_skip_modules")
    if skipped is not None and (not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped)):
        raise ValueError(f"llm_int8_skip_modules must be a list of names, got {skipped!r}")
    if bits == [8] and quantization.get("llm_int8_has_fp16_weight"):
        raise ValueError("llm_int8_has_fp16_weight is not estimated; leave quantization_config out for 16-bit weights")
    if bits == [4] and quantization.get("bnb_4bit_quant_type", "fp4") not in ("nf4", "fp4"):
        raise ValueError(f"bnb_4bit_quant_type must be nf4 or fp4, got {quantization['bnb_4bit_quant_type']!r}")
    return quantization


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def count(config: dict[str, Any], families: Any) -> Counted:
    """Build the model of a config.json on the meta device.

    Args:
        config: the content of the file.
        families: model types of decoders that are estimated; others are not built.

    Raises:
        ValueError: for a model that transformers does not know or cannot build, or another decoder.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    quantization = quantization_of(config)
    plain = _without_quantization(config)
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"the model type {kind!r} is not one of transformers, so not estimated")
    try:
        known = CONFIG_MAPPING[kind].from_dict(plain)
        text = known.get_text_config(decoder=True)
    except Exception as error:  # whatever the class makes of the values
        raise ValueError(f"transformers does not take this configuration: {error}") from error
    if text.model_type not in families:
        inside = "" if text is known else f" (the decoder in a {kind!r})"
        raise ValueError(
            f"the model type {text.model_type!r}{inside} is not estimated; those are: {', '.join(families)}"
        )
    try:
        seen = type(known) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        with torch.device("meta"):
            model = (AutoModelForImageTextToText if seen else AutoModelForCausalLM).from_config(known)
        head, decoder = model.get_output_embeddings(), model.get_decoder()
        parts = {*decoder.parameters(), *head.parameters()}
    except Exception as error:  # whatever the model makes of the values, or a package that it needs
        raise ValueError(f"transformers does not build this model: {error}") from error
    tied = head.weight is model.get_input_embeddings().weight
    return Counted(
        text.to_dict() | {"tie_word_embeddings": tied},
        sum(p.numel() for p in parts),
        sum(p.numel() for p in model.parameters()),
        len(head.weight),
        *(_quantized(model, quantization) if quantization else (0, 0)),
    )


def _quantized(model: torch.nn.Module, quantization: dict[str, Any]) -> tuple[int, int]:
    """How many weights transformers quantizes, and their bytes."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(
        model, quantization.get("llm_int8_skip_modules"), model._keep_in_fp32_modules
    )
    sizes = [
        (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, kept)
    ]
    return sum(i * o for i, o in sizes), sum(_linear_bytes(*size, quantization) for size in sizes)


def _linear_bytes(outputs: int, inputs: int, quantization: dict[str, Any]) -> int:
    """Bytes of one weight: 8 bits and a fp32 scale per output, or 4 bits, scales per block and the table of values."""
    numbers = outputs * inputs
    if quantization.get("load_in_8bit"):
        return numbers + 4 * outputs
    packed, scales = -(-numbers // 2), -(-numbers // _BLOCK)
    if not quantization.get("bnb_4bit_use_double_quant"):
        return packed + 4 * scales + 4 * 16
    # scales of 8 bits, theirs and their offset in fp32, and a table of 256 values
    return packed + scales + 4 * -(-scales // _NESTED_BLOCK) + 4 + 4 * 256 + 4 * 16
