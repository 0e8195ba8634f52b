"""The model of a run and its tokenizer: from a folder, a name or a GGUF file, with or without adapters."""

import glob
import hashlib
import importlib.util
import io
import os
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...hf.check import TOLERANCE, TOLERANCE_16_BIT, apart, left_as_it_is
from ..errors import UserError, one_line
from .adapters import CONFIG, base_of, merged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what a model and its tokenizer are read from, and how much of a file is looked at
FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*", "*token*", "vocab*",
    "merges.txt", "chat_template*", "*.model",
)  # fmt: skip
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
        if gguf is None and not (path / wanted).exists() and (path / CONFIG).exists():
            earlier, model = model, base_of(path)
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
    if Path(model).is_dir():  # adapters name their base, wherever they are loaded from
        model = str(Path(model).resolve())
    earlier = None if earlier is None else str(Path(earlier).resolve())
    return Source(model, gguf, dtype, cpu, lora or (16 if qlora else 0), qlora, earlier)


def fingerprint(source: Source) -> str:
    """Of the files that a model and its tokenizer are read from: their names and sizes, and samples of each.

    A name on the Hub stands for itself.
    """
    digest = hashlib.blake2b(digest_size=16)
    patterns = FILES if source.gguf is None else (glob.escape(source.gguf),)
    for folder in map(Path, filter(None, (source.model, source.adapters))):
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            if path.is_file():
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
    place = source.model
    if source.adapters and any(Path(source.adapters).glob("tokenizer*")):
        place = source.adapters
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
    except Exception as error:  # whatever its class makes of the files
        raise UserError(f"the tokenizer of {_named(place)} cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {source.model} has no eos_token, with which a completion ends")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: Source) -> Any:
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
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its class makes of config and files
        raise UserError(f"the model {_named(source.model)} cannot be loaded: {one_line(error)}") from error
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise UserError(
            f"the files of {source.model} lack {len(lacking)} weights of a {type(model).__name__}, which would be "
            f"random: {lacking[0]}"
        )
    if source.gguf:
        _unmark(model)
    if source.adapters:
        model = merged(model, source.adapters)
    check_causal(model)
    return model


def _named(model: str) -> str:
    return model if Path(model).exists() else f"{model} (there is no folder of this name, so one on the Hub)"


def check_causal(model: Any) -> None:
    """Whether a token is predicted from those before it alone.

    The gradient of its logits reaches no later one; of a model that takes no vectors in place of tokens, they are the
    same before another last token.

    Raises:
        UserError: for an encoder, which would be given what it is to predict.
    """
    embeddings = model.get_input_embeddings()
    count = min(8, embeddings.weight.shape[0])
    tokens, middle = torch.arange(count, device=embeddings.weight.device)[None], count // 2
    embedded = embeddings(tokens).detach().requires_grad_()
    with left_as_it_is(model), torch.enable_grad():
        try:
            logits = model(inputs_embeds=embedded).logits[0, middle]
            directions = torch.linspace(-1, 1, len(logits), device=logits.device, dtype=logits.dtype)
            (gradient,) = torch.autograd.grad((logits * directions).sum(), embedded)
            reached = gradient.abs().amax((0, 2))
            later, tolerance = float(reached[middle + 1 :].max() / reached.max()), 1e-6
        except Exception:  # whatever a model makes of vectors in place of tokens
            later, tolerance = _moved(model, tokens, middle), TOLERANCE.get(model.dtype, TOLERANCE_16_BIT)
    if later > tolerance:
        raise UserError(
            f"a {type(model).__name__} sees the tokens after the one that it predicts, so that there is nothing to "
            "learn from; an encoder of transformers trains as a decoder with is_decoder=true in its config.json"
        )


def _moved(model: Any, tokens: torch.Tensor, place: int) -> float:
    """How far the logits at a place move with the last token, of their size; 0 for a model that does not run so."""
    others = torch.cat([tokens[:, :-1], tokens[:, :1]], 1)
    try:
        with torch.no_grad():
            first, second = (model(input_ids=ids).logits[0, place].double() for ids in (tokens, others))
    except Exception:
        return 0.0
    return apart(second, first)


def _unmark(model: Any) -> None:
    """Weights of a GGUF file have been unpacked; marked as quantized still, they would be refused for training."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
