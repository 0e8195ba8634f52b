"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Folder of a transformers model, its name on the Hub, or a GGUF file.", show_default=False)
]
Gguf = Annotated[str | None, typer.Option(help="GGUF file in the folder of the model.", show_default=False)]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: auto, float32 or bfloat16. auto: bfloat16 if frozen on a GPU.")
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")]
BadRows = Annotated[str, typer.Option(help="skip: leave them out and count them; stop: at the first.")]


def file(text: str) -> typer.models.OptionInfo:
    """An option that names a file or folder."""
    return typer.Option(help=text, show_default=False)


Data = Annotated[Path, file("JSONL, one object in a line.")]
