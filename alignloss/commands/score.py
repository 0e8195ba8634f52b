"""The command `alignloss score`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import BadRows, Cpu, Data, Dtype, Gguf, Model, file
from .errors import UserError
from .train import prepare


def score(
    model: Model,
    data: Data,
    out: Annotated[Path, file("JSONL to write: the rows with their log-probabilities.")],
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and completion that count.")] = 1024,
    cache: Annotated[Path | None, file("Folder in which what is computed is kept, for a later start.")] = None,
    gguf: Gguf = None,
    dtype: Dtype = "auto",
    cpu: Cpu = False,
    bad_rows: BadRows = "skip",
) -> None:
    """Log-probabilities, in nats, of the completions of a data set after their prompts.

    Rows get ref_chosen_logps and ref_rejected_logps, or ref_logps, which `alignloss train` takes where they are.
    """
    prepare()
    from rich.console import Console

    from .training.checkpoints import explained, write_whole
    from .training.model import source
    from .training.run import scored

    origin = source(model, gguf, dtype, cpu, 0, False)
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out} must be a file in a folder that is there")
    console = Console(stderr=True)
    with explained(out):
        rows = scored(origin, data, bad_rows, max_length, cache, console)
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows))
    console.print(f"{len(rows):,} rows in {out}", highlight=False, soft_wrap=True)
