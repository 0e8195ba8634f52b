"""The command `alignloss score`."""

import json
import tempfile
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

    from .training.checkpoints import write_whole
    from .training.model import load_tokenizer, source
    from .training.rows import REFERENCES
    from .training.run import scored

    origin = source(model, gguf, dtype, cpu, 0, False)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    tokenizer = load_tokenizer(origin)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows, columns = scored(origin, data, bad_rows, tokenizer, max_length, Path(scratch), cache, console)
    names = REFERENCES[rows.kind]
    lines = [
        json.dumps({n: v for n, v in row.items() if n != "line"} | dict(zip(names, values, strict=True)))
        for row, *values in zip(rows.rows, *(columns[name] for name in names), strict=True)
    ]
    write_whole(out, "".join(line + "\n" for line in lines))
    console.print(f"{len(lines):,} rows in {out}", highlight=False, soft_wrap=True)
