"""The command `alignloss`."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated


def main() -> None:
    """Entry point of the command. What it needs beyond torch is optional, so it is looked for first."""
    _need("cli", "typer", "rich")
    import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True)

    @app.callback()
    def root() -> None:
        """Exact preference losses straight from hidden states, without logits."""

    @app.command()
    def demo(
        model: Annotated[
            str, typer.Option(help="smollm2 (135M parameters) or tiny (random, under a minute).")
        ] = "smollm2",
        steps: Annotated[int | None, typer.Option(min=1, help="Training steps for each loss.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-results"),
    ) -> None:
        """Train with DPO, IPO, KTO and CPO, through alignloss and through full logits, and compare the two."""
        _need("demo", "transformers", "gguf", "accelerate", "matplotlib")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.setdefault(name, "1")
        from alignloss.commands.demo import DemoError, run

        try:
            run(model, steps=steps, out=out)
        except DemoError as error:
            sys.exit(f"alignloss: {error}")

    @app.command()
    def fit(
        model: Annotated[str, typer.Option(help="A built-in name, a config.json, or a folder that holds one.")],
        tokens: Annotated[int, typer.Option(min=1, help="Positions of a micro-batch, padding included.")] = 8192,
        gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of the GPU.")] = 24.0,
        length: Annotated[int, typer.Option(min=1, help="Positions of a sequence.")] = 1024,
        labelled: Annotated[float, typer.Option(help="Fraction of the positions that are scored.")] = 1.0,
        precision: Annotated[str, typer.Option(help="bf16, or mixed: fp32 parameters under autocast.")] = "bf16",
        optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or sgd.")] = "adamw",
        rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapters.")] = 16,
        reference_model: Annotated[bool, typer.Option(help="A frozen copy of the model beside it.")] = False,
        reserve: Annotated[float, typer.Option(min=0, help="GiB left to the CUDA context and fragments.")] = 1.5,
    ) -> None:
        """Estimate whether a training step fits a GPU: full and LoRA, with alignloss and with full logits."""
        from alignloss.commands.fit_report import report

        options = {
            "length": min(length, tokens),
            "labelled": labelled,
            "precision": precision,
            "optimizer": optimizer,
            "rank": rank,
            "reference_model": reference_model,
        }
        try:
            report(model, tokens, gpu_memory=gpu_memory, reserve=reserve, **options)
        except ValueError as error:
            sys.exit(f"alignloss: {error}")

    app()


def _need(extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"alignloss: this needs {', '.join(missing)}; in the project's folder: pip install '.[{extra}]'")


if __name__ == "__main__":
    main()
