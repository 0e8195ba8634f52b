"""The plan of the paper's runs: what stands in the YAML file."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

MT_BENCH = "mt_bench"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Plan:
    """The entries of a plan; `paper.yaml` says what each one is."""

    base: str
    instruct: str
    sft_data: dict[str, str]
    pairs: dict[str, str]
    count: int
    methods: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    sizes: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    train: dict[str, Any] | None = None
    sft: dict[str, Any] | None = None
    task_folder: str | None = None
    evaluation_batch: int = 8
    limit: int | None = None
    mt_bench: str | None = None
    answer_tokens: int = 1024

    @property
    def families(self) -> dict[str, str]:
        return {MT_BENCH: "dialogue"} | {task: options["family"] for task, options in self.tasks.items()}


def read_plan(path: Path) -> Plan:
    import yaml

    entries = yaml.safe_load(path.read_text("utf-8"))
    known = {field.name for field in fields(Plan)}
    unknown, missing = set(entries) - known, {"base", "instruct", "sft_data", "pairs", "count", "methods", "tasks"}
    if unknown or missing - set(entries):
        raise SystemExit(f"{path}: unknown entries {sorted(unknown)}, missing ones {sorted(missing - set(entries))}")
    for method, options in entries["methods"].items():
        if "learning_rate" not in (options or {}):
            raise SystemExit(f"{path}: methods.{method} needs a learning_rate")
    for task, options in entries["tasks"].items():
        if not {"metric", "family"} <= set(options):
            raise SystemExit(f"{path}: tasks.{task} needs metric and family")
    return Plan(**entries)


def as_text(messages: Messages) -> str:
    """A conversation for a model without a chat template."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])
