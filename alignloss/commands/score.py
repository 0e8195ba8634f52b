"""The command `alignloss score`."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError


def score(
    model: Annotated[
        str, typer.Option(help="The reference: folder, name on the Hub, or GGUF file.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="JSONL of pairs, or of prompt and completion.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="JSONL to write: the rows with their log-probabilities.", show_default=False)
    ],
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and completion that count.")] = 1024,
    cache: Annotated[
        Path | None, typer.Option(help="Folder in which what is computed is kept, for a later start.")
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="GGUF file in the folder of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")] = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")] = False,
    bad_rows: Annotated[str, typer.Option(help="skip, or stop at the first.")] = "skip",
) -> None:
    """Log-probabilities, in nats, of the completions of a data set after their prompts.

    Rows get ref_chosen_logps and ref_rejected_logps, or ref_logps, which `alignloss train` takes where they are.
    """
    if bad_rows not in ("skip", "stop"):
        raise UserError(f"--bad-rows must be skip or stop, got {bad_rows!r}")
    from .train import one_device, quiet

    one_device()
    quiet()
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
