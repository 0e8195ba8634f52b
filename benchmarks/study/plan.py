"""The plan of the paper's runs: what stands in the YAML file, and whether it can be run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from .methods import FAMILIES

MT_BENCH = "mt_bench"
Messages = list[dict[str, str]]
Count = Annotated[int, Field(gt=0)]


class Source(BaseModel, extra="allow"):
    """A file of JSON lines, or a data set of the Hub with what else `load_dataset` takes."""

    name: str
    split: str = "train"

    @field_validator("name")
    @classmethod
    def there(cls, name: str) -> str:
        if (name.startswith(("/", ".", "~")) or name.endswith((".json", ".jsonl"))) and not Path(name).is_file():
            raise ValueError(f"there is no file {name}")
        return name


class Options(BaseModel, extra="allow"):
    """Of `alignloss train`."""

    learning_rate: float


class Task(BaseModel, extra="forbid"):
    metric: str
    family: Literal[FAMILIES]
    examples: int | None = None


class Plan(BaseModel, extra="forbid"):
    """The entries of a plan; `paper.yaml` says what each one is. Paths are relative to the working directory."""

    base: str
    instruct: str
    sft_data: Source
    pairs: Source
    count: Count
    methods: Annotated[dict[str, Options], Field(min_length=1)]
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    sft: Options
    sizes: list[Count] = []
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    train: dict[str, Any] = {}
    task_folder: str | None = None
    evaluation_batch: Count = 8
    chat_template: bool = False
    limit: Count | None = None
    mt_bench: str | None = None
    answer_tokens: Count = 1024

    @property
    def families(self) -> dict[str, str]:
        return {MT_BENCH: "dialogue"} | {name: task.family for name, task in self.tasks.items()}

    @field_validator("methods")
    @classmethod
    def known(cls, methods: dict[str, Options]) -> dict[str, Options]:
        from alignloss.commands.errors import UserError
        from alignloss.commands.training.objective import known_options

        for method in methods:
            try:
                known_options(method)
            except UserError as error:
                raise ValueError(str(error)) from error
        return methods

    @field_validator("task_folder", "mt_bench")
    @classmethod
    def there(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).exists():
            raise ValueError(f"there is no {path}")
        return path


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        SystemExit: for what is missing, unknown or of another form, before anything is trained.
    """
    import yaml

    try:
        return Plan.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        said = [f"{'.'.join(map(str, of['loc'])) or 'the file'}: {of['msg']}" for of in error.errors()]
        raise SystemExit(f"{path}: " + "; ".join(said)) from None


def as_text(messages: Messages) -> str:
    """A conversation for a model without a chat template."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])
