"""The model of a run and its tokenizer: from a folder, a name or a GGUF file, with or without adapters."""

import hashlib
import importlib.util
import io
import json
import os
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...hf.check import left_as_it_is
from ..errors import UserError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTERS = "adapter_config.json"
# what a model and its tokenizer are read from, and how much of a file is looked at
FILES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja"}
SAMPLES, SAMPLE = 256, 1 << 14


class Source(NamedTuple):
    """Where a model comes from."""

    model: str
    gguf: str | None = None  # file in the folder `model`
    dtype: str = "auto"
    cpu: bool = False
    lora: int = 0  # rank; 0: every parameter trains
    qlora: bool = False
    adapters: str | None = None  # folder of adapters that are merged into `model`

    @property
    def saved_whole(self) -> bool:
        """Whether adapters are merged when they are saved, since no folder or name holds what they stand beside."""
        return bool(self.lora and (self.gguf or self.adapters))

    @property
    def on_cpu(self) -> bool:
        return self.cpu or not torch.cuda.is_available()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the parameters. On a GPU what trains is in float32, under bf16 autocast, and what is frozen in bf16."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if self.on_cpu or not self.lora else torch.bfloat16


def source(model: str, gguf: str | None, dtype: str, cpu: bool, lora: int, qlora: bool) -> Source:
    """Look at what was asked for before anything is loaded.

    Raises:
        UserError: for files that are not there, and what does not go together.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")
    path = Path(model)
    if gguf and not (path / gguf).is_file() and Path(gguf).is_file():
        model, path, gguf = str(Path(gguf).parent), Path(gguf).parent, Path(gguf).name
    if path.suffix == ".gguf" and path.is_file():
        model, gguf, path = str(path.parent), path.name, path.parent
    if gguf is not None and importlib.util.find_spec("gguf") is None:
        raise UserError("--gguf needs the package gguf: pip install gguf")
    earlier = None
    if path.is_dir():
        wanted = gguf or "config.json"
        if gguf is None and not (path / wanted).exists() and (path / ADAPTERS).exists():
            earlier, model = model, _base_of(path)
        elif not (path / wanted).is_file():
            raise UserError(
                f"{model} has no {wanted}: give the folder of a model as save_pretrained writes it, or --gguf"
            )
    elif path.is_file():
        raise UserError(f"{model} is a file: give the folder that it lies in, or a file that ends in .gguf")
    elif "/" in model.strip("/").replace("/", "", 1) or model.startswith(("/", ".", "~")):
        raise UserError(f"there is no folder {model}")
    elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise UserError(f"there is no folder {model}, and HF_HUB_OFFLINE is set")
    if qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--qlora needs the package bitsandbytes: pip install bitsandbytes")
    if qlora and gguf is not None:
        raise UserError("--qlora quantizes a model itself: give it without --gguf")
    if qlora and earlier is not None:
        raise UserError(
            f"{earlier} holds adapters, which do not merge into weights of 4 bits: give the folder of the merged model "
            "(PEFT's merge_and_unload, save_pretrained)"
        )
    if (lora or qlora or earlier) and importlib.util.find_spec("peft") is None:
        raise UserError("--lora needs the package peft: pip install peft")
    return Source(model, gguf, dtype, cpu, lora or (16 if qlora else 0), qlora, earlier)


def _base_of(folder: Path) -> str:
    """The model that the adapters in a folder stand beside."""
    try:
        base = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTERS} names no base model: {one_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTERS} names no base model, but {base!r}")
    if base.startswith(("/", ".")) and not (Path(base) / "config.json").is_file():
        raise UserError(f"the adapters in {folder} belong to {base}, which is no folder of a model")
    return base


def fingerprint(source: Source) -> str:
    """Of the files that a model and its tokenizer are read from: their names and sizes, and samples of each.

    A name on the Hub stands for itself.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in map(Path, filter(None, (source.model, source.adapters))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix in FILES and path.is_file():
                size = path.stat().st_size
                digest.update(f"{path.name} {size} ".encode())
                with open(path, "rb") as file:
                    for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                        file.seek(start)
                        digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    more = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.adapters or source.model, **more)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"the tokenizer of {_named(source)} cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {source.model} has no eos_token, with which a completion ends")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: Source) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = {"dtype": source.torch_dtype}
    if source.gguf:
        more["gguf_file"] = source.gguf
    if source.qlora:
        from transformers import BitsAndBytesConfig

        compute = torch.float32 if source.on_cpu else torch.bfloat16
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    # the bar of the unpacking knows no switch
    unpacking: Any = redirect_stderr(io.StringIO()) if source.gguf else nullcontext()
    try:
        with unpacking:
            model, found = AutoModelForCausalLM.from_pretrained(source.model, output_loading_info=True, **more)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the model {_named(source)} cannot be loaded: {one_line(error)}") from error
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise UserError(
            f"the files of {source.model} lack {len(lacking)} weights of a {type(model).__name__}, which would be "
            f"random: {lacking[0]}"
        )
    if source.gguf:
        _unmark(model)
    if source.adapters:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, source.adapters).merge_and_unload()
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, AttributeError) as error:
            raise UserError(f"the adapters in {source.adapters} cannot be merged: {one_line(error)}") from error
    check_causal(model)
    return model


def _named(source: Source) -> str:
    model = source.model
    return model if Path(model).exists() else f"{model} (there is no folder of this name, so one on the Hub)"


def check_causal(model: Any) -> None:
    """Whether a token is predicted from those before it alone: the gradient of its logits reaches no later one.

    A model that takes no vectors in place of tokens is not looked at.

    Raises:
        UserError: for an encoder, which would be given what it is to predict.
    """
    count = min(8, model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(count, device=model.get_input_embeddings().weight.device)[None]
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with left_as_it_is(model), torch.enable_grad():
        try:
            logits = model(inputs_embeds=embedded).logits[0, count // 2]
        except Exception:  # whatever a model makes of vectors in place of tokens
            return
        directions = torch.linspace(-1, 1, len(logits), device=logits.device, dtype=logits.dtype)
        (gradient,) = torch.autograd.grad((logits * directions).sum(), embedded)
    reached = gradient.abs().amax((0, 2))
    if reached[count // 2 + 1 :].max() > 1e-6 * reached.max():
        raise UserError(
            f"a {type(model).__name__} sees the tokens after the one that it predicts, so that there is nothing to "
            "learn from; an encoder of transformers trains as a decoder with is_decoder=true in its config.json"
        )


def _unmark(model: Any) -> None:
    """Weights of a GGUF file have been unpacked; marked as quantized still, they would be refused for training."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def adapters(source: Source) -> Any:
    """The configuration of LoRA on every linear layer but the head, or None."""
    if not source.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(r=source.lora, lora_alpha=2 * source.lora, target_modules="all-linear", task_type="CAUSAL_LM")
