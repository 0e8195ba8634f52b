"""The data of a run: rows whose tokens can be trained on, and TRL's data set of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from ..errors import UserError, one_line
from .objective import Objective
from .rows import SCORED_LENGTH, Rows, read_rows


class Data(NamedTuple):
    """Training rows, and held-out ones if there are any."""

    train: Rows
    held_out: Rows | None

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for rows in self:
            digest.update(json.dumps(None if rows is None else rows.rows, sort_keys=True).encode())
        return digest.hexdigest()


def token_fault(
    tokenizer: Any, max_length: int | None, references: bool = False
) -> Callable[[dict[str, Any]], str | None]:
    """What is wrong with the tokens of a row, as TRL makes them of text or messages, and where it has been scored."""

    def template(messages: list[Any], **options: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])

    def fault(row: dict[str, Any]) -> str | None:
        prompt = row["prompt"]
        names = [name for name in ("chosen", "rejected", "completion") if name in row]
        if isinstance(prompt, str):
            end = tokenizer.eos_token
            texts = [row[name] if row[name].endswith(end) else row[name] + end for name in names]
            first, *rest = tokenizer([prompt, *(prompt + text for text in texts)])["input_ids"]
        else:
            try:
                first = template(prompt, add_generation_prompt=True)
                rest = [template(prompt + row[name]) for name in names]
            except (ValueError, TypeError, TemplateError) as error:  # what a template makes of roles
                return f"chat template: {one_line(error)}"
        whole, longest = dict(zip(names, rest, strict=True)), max(map(len, rest))
        if max_length is not None and len(first) >= max_length:
            return f"over-long prompt: {len(first):,} tokens, max_length is {max_length:,}"
        if "chosen" in whole and whole["chosen"][:max_length] == whole["rejected"][:max_length]:
            cut = max_length is not None and longest > max_length
            return f"chosen = rejected: in their first {max_length:,} tokens" if cut else "chosen = rejected: in tokens"
        counted = row.get(SCORED_LENGTH) if references else None
        if counted is None:  # references that say nothing of it
            return None
        if isinstance(counted, bool) or not isinstance(counted, (int, float)) or counted != counted // 1:
            return f"wrong type: {SCORED_LENGTH} must be a number of tokens, got {counted!r}"
        if counted != max_length and longest > min(counted, max_length or counted):
            return (
                f"other references: of the first {counted:,.0f} tokens, where this run counts {max_length or longest:,}"
            )
        return None

    return fault


def read_data(
    objective: Objective, data: Path, held_out: Path | None, policy: str, tokenizer: Any, max_length: int | None
) -> Data:
    references = objective.needs_reference and not objective.needs_reference_model
    of_tokens = token_fault(tokenizer, max_length, references)

    def read(path: Path) -> Rows:
        return read_rows(
            path,
            objective.kind,
            numbers=objective.numbers,
            references=references,
            policy=policy,
            fault=lambda row: of_tokens(row) or objective.data_fault(row),
        )

    train = read(data)
    rest = None if held_out is None else read(held_out)
    if rest is not None and rest.kind != train.kind:
        raise UserError(f"{data} holds {train.kind} rows and {held_out} {rest.kind} ones")
    return Data(train, rest)


def dataset_of(rows: Rows, objective: Objective, seed: int) -> Any:
    """A data set for TRL's trainer, which shuffles pairs; completions of unpaired losses are shuffled here.

    TRL takes KTO's mismatched completion from the row before in a batch, and so keeps the order of the rows. Pairs give
    their chosen and their rejected completions in turn, in two rounds, so that a batch of any size has as many of both,
    each next to one of another prompt. `pair` is then the number of the pair.
    """
    from datasets import Dataset

    whole = rows.rows
    if objective.loss is None or objective.loss.paired:
        return Dataset.from_list(whole)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [whole[i] for i in order]
    if rows.kind == "paired":
        sides = "chosen", "rejected"
        shuffled = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "pair": i}
            | ({"ref_logps": row[f"ref_{side}_logps"]} if f"ref_{side}_logps" in row else {})
            for turn in range(2)
            for i, row in enumerate(shuffled)
            for side in [sides[(i + turn) % 2]]
        ]
    elif rows.kind == "unlabelled":
        shuffled = [row | {"label": False} for row in shuffled]
    return Dataset.from_list(shuffled)
