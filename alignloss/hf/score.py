"""Log-probabilities of the completions of a data set, computed once: of a reference, by length, cached and resumed."""

import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int64, check_number
from ..logprob import sequence_logprob
from ..recipes.batches import joined, next_token_labels
from .check import check_model, left_as_it_is
from .head import Head, head_call
from .takeover import config_of, input_device, inside_wrappers, name_of, unwrapped

# the column of tokens, and the one that is made of it, by the names of TRL
COLUMNS = {
    "chosen_ids": "ref_chosen_logps",
    "rejected_ids": "ref_rejected_logps",
    "completion_ids": "ref_logps",
    "KL_completion_ids": "ref_KL_logps",
}
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged", "scaling")
FLUSH_SECONDS = 60.0


def score(
    model: nn.Module,
    dataset: Any,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16384,
    max_length: int | None = None,
    pad_token_id: int = 0,
    progress: bool = True,
) -> Any:
    """A data set with the log-probability of each completion after its prompt, a sum in nats, as columns of TRL.

    Long sequences come first, and sequences of nearly one length together, so that little is padded. Where `cache_dir`
    is given, what was computed is kept there under a fingerprint of the model's weights, buffers, config, adapters and
    the numbers of its layers (not of hooks and other code), of the tokens and `max_length`: it is read back by a later
    call, and resumed after an interruption. Files are complete or not there.

    Args:
        model: as in `check_model`, the reference: with adapters, it is scored as it is
            (`with model.disable_adapter(): ...` for its base). One process scores everything.
        dataset: a `datasets.Dataset` with the columns `prompt_ids` and `chosen_ids`, `rejected_ids`, or
            `completion_ids`, lists of token ids, as TRL's trainers make them.
        cache_dir: a folder, made where it is missing; None keeps nothing.
        batch_tokens: tokens of a batch with its padding, at least one sequence.
        max_length: tokens of prompt and completion that count, the first ones; None: all.
        pad_token_id: any token; padding is masked.
        progress: a bar of tokens.

    Returns:
        The data set with `ref_chosen_logps` and `ref_rejected_logps`, or `ref_logps`, float64. The trainers of
        `alignloss.trl` take them with `precompute_ref_log_probs=True`.

    Raises:
        UnsupportedModel: as `check_model`.
        ValueError: for a data set without these columns, and numbers that are not positive.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> data = Dataset.from_dict({"prompt_ids": [[3, 1]], "chosen_ids": [[4, 1, 5]], "rejected_ids": [[9]]})
        >>> score(model, data, progress=False).column_names[3:]
        ['ref_chosen_logps', 'ref_rejected_logps']
    """
    for name, number in (("batch_tokens", batch_tokens), ("max_length", max_length)):
        if number is not None:
            check_int64(name, number)
            check_number(name, number, positive=True)
    rows, made = _rows(dataset, max_length)
    base: Any = unwrapped(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"score takes decoders, whose prompt and completion are one sequence; {name_of(model)} is not")
    check_model(model)
    cache = _Cache(None if cache_dir is None else Path(cache_dir) / _fingerprint(model, rows, max_length))
    missing = sorted((i for i in range(len(rows)) if i not in cache.known), key=lambda i: (-len(rows[i][0]), i))
    with left_as_it_is(model), torch.no_grad(), _bar(rows, cache, progress) as bar:
        try:
            for batch in _batches(missing, rows, batch_tokens):
                values = _scored(model, [rows[i] for i in batch], pad_token_id)
                cache.add(dict(zip(batch, values.tolist(), strict=True)))
                bar.update(sum(len(rows[i][0]) for i in batch))
        finally:
            cache.flush()
    for k, name in enumerate(made):
        column = [cache.known[k * len(dataset) + i] for i in range(len(dataset))]
        dataset = dataset.add_column(name, column)
    return dataset


Row = tuple[list[int], int]  # tokens of prompt and completion, and how many are the prompt's


def _rows(dataset: Any, max_length: int | None) -> tuple[list[Row], list[str]]:
    names = list(getattr(dataset, "column_names", None) or ())
    there = [name for name in COLUMNS if name in names]
    if "prompt_ids" not in names or not there:
        raise ValueError(
            f"score takes a datasets.Dataset with prompt_ids and one or more of {list(COLUMNS)}, as TRL's trainers "
            f"make them (trainer.train_dataset); got {type(dataset).__name__} with the columns {names}"
        )
    taken = [COLUMNS[name] for name in there if COLUMNS[name] in names]
    if taken:
        raise ValueError(f"the data set has {taken} already: remove_columns({taken}) to have them computed again")
    prompts = [list(prompt) for prompt in dataset["prompt_ids"]]
    rows = [
        ((prompt + list(completion))[:max_length], len(prompt))
        for name in there
        for prompt, completion in zip(prompts, dataset[name], strict=True)
    ]
    return rows, [COLUMNS[name] for name in there]


def _batches(order: list[int], rows: list[Row], batch_tokens: int) -> Iterator[list[int]]:
    start = 0
    while start < len(order):
        count = max(1, int(batch_tokens) // max(1, len(rows[order[start]][0])))
        yield order[start : start + count]
        start += count


def _scored(model: nn.Module, rows: list[Row], pad_token_id: int) -> Tensor:
    """Sums in nats (S,), float64, on the CPU."""
    if not any(tokens for tokens, _ in rows):
        return torch.zeros(len(rows), dtype=torch.float64)
    whole = [(torch.tensor(tokens, dtype=torch.int64), prompt) for tokens, prompt in rows]
    parts = [(tokens[:prompt], tokens[prompt:]) for tokens, prompt in whole]
    ids, attended, completion = joined(parts, pad_token_id)
    labels, device = next_token_labels(ids, completion), input_device(model)

    def run(head: Head) -> Tensor:
        here = labels.to(head.hidden.device)
        return sequence_logprob(head.hidden, head.weight, here, head.bias, **head.transform).logps

    sums, _ = head_call(model, run, input_ids=ids.to(device), attention_mask=attended.to(device), use_cache=False)
    return sums.double().cpu()


class _Cache:
    """Sums by the number of their row, in files that are added under their names when they are whole."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.known: dict[int, float] = {}
        self.fresh: dict[int, float] = {}
        self.flushed = time.monotonic()
        if folder is None:
            return
        from safetensors import SafetensorError, safe_open

        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    part, said = {name: file.get_tensor(name) for name in ("index", "logps")}, file.metadata()
                if _digest(part) != (said or {}).get("digest"):
                    raise ValueError("its content is not what was written")
                self.known |= dict(zip(part["index"].tolist(), part["logps"].tolist(), strict=True))
            except (OSError, KeyError, ValueError, SafetensorError) as error:
                warnings.warn(f"{path} cannot be read, and is computed again: {error}", stacklevel=4)

    def add(self, values: dict[int, float]) -> None:
        self.known.update(values)
        self.fresh.update(values)
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.flushed = time.monotonic()
        if self.folder is None or not self.fresh:
            return
        from safetensors.torch import save_file

        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        whole = {
            "index": torch.tensor(list(self.fresh)),
            "logps": torch.tensor(list(self.fresh.values()), dtype=torch.float64),
        }
        unfinished = path.with_suffix(".unfinished")
        save_file(whole, unfinished, {"digest": _digest(whole)})
        os.replace(unfinished, path)
        self.fresh.clear()


def _digest(part: dict[str, Tensor]) -> str:
    return hashlib.blake2b(b"".join(part[name].numpy().tobytes() for name in ("index", "logps"))).hexdigest()


def _bar(rows: list[Row], cache: _Cache, progress: bool) -> Any:
    from tqdm.auto import tqdm

    done = sum(len(rows[i][0]) for i in cache.known)
    total = sum(len(tokens) for tokens, _ in rows)
    return tqdm(total=total, initial=done, unit=" tokens", unit_scale=True, desc="score", disable=not progress)


def _fingerprint(model: nn.Module, rows: list[Row], max_length: int | None) -> str:
    """Of what the numbers depend on, but for code: hooks, and methods that were replaced."""
    digest, outer, base = hashlib.blake2b(digest_size=16), inside_wrappers(model), unwrapped(model)
    adapters = [
        (name, *(str(getattr(layer, key, None)) for key in ADAPTER_STATE))
        for name, layer in outer.named_modules()
        if hasattr(layer, "base_layer")
    ]
    tuned = {name: value.to_dict() for name, value in getattr(outer, "peft_config", {}).items()}
    cast = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    settings = [
        type(base).__name__, config_of(base), adapters, tuned,
        getattr(outer, "active_adapter", None), getattr(outer, "_adapters_disabled", False), cast, max_length,
    ]  # fmt: skip
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, layer in outer.named_modules():  # eps, scaling
        digest.update(str([name, *((k, v) for k, v in sorted(vars(layer).items()) if isinstance(v, float))]).encode())
    # buffers that are not persistent too: frequencies of a rotary embedding
    for name, value in sorted({**outer.state_dict(), **dict(outer.named_buffers())}.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    for tokens, prompt in rows:
        digest.update(torch.tensor([len(tokens), prompt, *tokens], dtype=torch.int64).numpy().data)
    return digest.hexdigest()
