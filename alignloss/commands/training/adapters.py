"""Adapters: those that a run trains, and those of an earlier one, which are merged into their base."""

import json
from pathlib import Path
from typing import Any

import torch

from ...hf.check import TOLERANCE, TOLERANCE_16_BIT, apart, left_as_it_is, logits_of
from ..errors import UserError, one_line

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def new_adapters(rank: int) -> Any:
    """The configuration of LoRA on every linear layer but the head, or None for rank 0."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def base_of(folder: Path) -> str:
    """The model that the adapters in a folder stand beside.

    Raises:
        UserError: where it is not said, or where files are not there.
    """
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} names no base model: {one_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise UserError(
            f"the adapters in {folder} name no base model; those in a checkpoint of a run beside merged adapters or a "
            "GGUF file stand beside something that is no folder: take model/ of that run"
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(f"{folder} has no {WEIGHTS[0]}")
    if base.startswith(("/", ".", "~")) and not (Path(base) / "config.json").is_file():
        raise UserError(f"the adapters in {folder} belong to {base}, which is no folder of a model")
    return base


def merged(model: Any, folder: str) -> Any:
    """A model with the adapters in a folder merged into it, every parameter to be trained.

    Raises:
        UserError: for adapters that do not fit the model, and those whose merging makes another one of it.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    tokens = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=model.device)[None]

    def logits(of: Any) -> torch.Tensor:
        with left_as_it_is(of), torch.no_grad():
            return logits_of(of(input_ids=tokens)).double()

    try:
        adapted = PeftModel.from_pretrained(model, folder)
        there = load_peft_weights(folder, device="cpu").keys()
        lacking = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - there)
        if lacking:
            raise UserError(f"the files of {folder} lack {len(lacking)} weights of its adapters: {lacking[0]}")
        before = logits(adapted)
        result = adapted.merge_and_unload()
        difference = apart(logits(result), before)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT makes of a configuration and files
        raise UserError(f"the adapters in {folder} cannot be merged: {one_line(error)}") from error
    if not difference <= 10 * TOLERANCE.get(result.dtype, TOLERANCE_16_BIT):
        raise UserError(
            f"merging the adapters in {folder} makes another model, whose logits differ by {difference:.1e} of their "
            "size: those on embeddings that are also the head cannot be merged"
        )
    return result.requires_grad_(True)
