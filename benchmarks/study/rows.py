"""The rows that the paper's runs are trained on, from a file or a data set of the Hub."""

import hashlib
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from alignloss.commands.training.checkpoints import write_whole

from .plan import Messages, Plan, Source, as_text


def write_rows(plan: Plan, out: Path, method: str, seed: int, pairs: int | None, chat: bool) -> Path:
    """The rows of a run: pairs, the chosen ones of them for SFT, or without a number the data of the first SFT."""
    kind = "sft_data" if pairs is None else "chosen" if method == "sft" else "pairs"
    source = plan.sft_data if pairs is None else plan.pairs
    path = out / "data" / f"{kind}-{seed}-{pairs or 'all'}-{'chat' if chat else 'text'}-{_identity(source)}.jsonl"
    if not path.exists():
        rows = list(_read(source))
        random.Random(seed).shuffle(rows)
        if pairs is not None and pairs > len(rows):
            raise SystemExit(f"{source.name} has {len(rows)} pairs; the plan asks for {pairs}")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_line(*row, kind == "pairs", chat) for row in rows[:pairs]]
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


@cache
def _read_file(path: str) -> str:
    return Path(path).read_text("utf-8")


def _identity(source: Source) -> str:
    content = _read_file(source.name) if Path(source.name).is_file() else ""
    return digest(source.model_dump_json() + content)


def _line(prompt: Messages, chosen: str, rejected: str | None, paired: bool, chat: bool) -> dict[str, Any]:
    def answer(text: str) -> Any:
        return [{"role": "assistant", "content": text}] if chat else " " + text

    answers = {"chosen": chosen, "rejected": rejected} if paired else {"completion": chosen}
    return {"prompt": prompt if chat else as_text(prompt), **{name: answer(text) for name, text in answers.items()}}


def _read(source: Source) -> Iterator[tuple[Messages, str, str | None]]:
    """Prompt, chosen completion and, of pairs, the rejected one, of a file or a data set of the Hub."""
    if Path(source.name).is_file():
        found: Any = (json.loads(line) for line in _read_file(source.name).splitlines() if line.strip())
    else:
        import datasets

        options = source.model_dump()
        found = datasets.load_dataset(options.pop("name"), **options)
    for number, row in enumerate(found, 1):
        try:
            yield read_row(row)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise SystemExit(f"{source.name}, row {number}, with {', '.join(row)}: {error!r}") from None


def read_row(row: dict[str, Any]) -> tuple[Messages, str, str | None]:
    """A row of pairs (chosen, rejected) or of SFT (messages, or completion), as text or as messages.

    Raises:
        KeyError: for a column that is missing.
        ValueError: for a conversation that does not end with the assistant.
    """
    column = next((name for name in ("chosen", "messages", "completion") if name in row), "completion")
    chosen = row[column]
    prompt = chosen[:-1] if isinstance(chosen, list) and len(chosen) > 1 else row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    rejected = _last(row["rejected"]) if column == "chosen" else None
    return messages, _last(chosen), rejected


def _last(completion: str | Messages) -> str:
    if isinstance(completion, str):
        return completion
    if completion[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return completion[-1]["content"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
