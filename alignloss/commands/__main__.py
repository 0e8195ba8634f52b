"""The command `alignloss`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from .errors import UserError, need


def main() -> None:
    """Entry point of the command: ends with 0, with 2 and one line where something is asked that cannot be done."""
    try:
        need("cli", "typer", "rich")
        code = _app()(standalone_mode=False)
    except UserError as error:
        code = _failed(str(error))
    except KeyboardInterrupt:
        code = _failed("interrupted", 130)
    except Exception as error:
        said = getattr(error, "format_message", None)  # of the parser: an unknown option, a missing one
        if said is None:
            raise
        code = _failed(said())
    sys.exit(code)


def _failed(text: str, code: int = 2) -> int:
    print(f"alignloss: {' '.join(text.split())}", file=sys.stderr)
    return code


def _app() -> Any:
    import typer

    from . import score as scoring
    from . import train as training

    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def demo(
        model: Annotated[
            str, typer.Option(help="smollm2 (135M parameters) or tiny (random, under a minute).")
        ] = "smollm2",
        steps: Annotated[int | None, typer.Option(min=1, help="Training steps for each loss.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-results"),
    ) -> None:
        """Train with DPO, IPO, KTO and CPO, through alignloss and through full logits, and compare the two."""
        need("demo", "transformers", "gguf", "accelerate", "matplotlib")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.setdefault(name, "1")
        from .demo import run

        run(model, steps=steps, out=out)

    @app.command()
    def fit(
        model: Annotated[str, typer.Option(help="A built-in name, a config.json, or a folder that holds one.")],
        tokens: Annotated[int, typer.Option(min=1, help="Positions of a micro-batch, padding included.")] = 8192,
        gpu_memory: Annotated[
            float, typer.Option(min=0.1, help="GiB of the GPU, or with --cpu of the process.")
        ] = 24.0,
        length: Annotated[int, typer.Option(min=1, help="Positions of a sequence.")] = 1024,
        labelled: Annotated[float, typer.Option(help="Fraction of the positions that are scored.")] = 1.0,
        precision: Annotated[str, typer.Option(help="bf16, fp32, or mixed: fp32 parameters under autocast.")] = "bf16",
        optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or sgd.")] = "adamw",
        rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapters.")] = 16,
        train: Annotated[str | None, typer.Option(help="full or lora alone.", show_default="both")] = None,
        qlora: Annotated[bool, typer.Option("--qlora", help="LoRA beside weights of 4 bits, as in `train`.")] = False,
        checkpointing: Annotated[
            bool | None, typer.Option(help="With layers recomputed alone, or without.", show_default="both")
        ] = None,
        share_prompts: Annotated[bool, typer.Option("--share-prompts", help="A pair's prompt computed once.")] = False,
        reference_model: Annotated[
            bool, typer.Option("--reference-model", help="A frozen copy of the model beside it; else precomputed.")
        ] = False,
        accumulate: Annotated[bool, typer.Option(help="Gradients held from the micro-batch before, or freed.")] = True,
        cpu: Annotated[bool, typer.Option("--cpu", help="On a CPU.")] = False,
        reserve: Annotated[float, typer.Option(min=0, help="GiB left to the CUDA context and fragments.")] = 1.5,
    ) -> None:
        """Estimate whether a training step fits: full and LoRA, with alignloss and with full logits.

        Ends with 0 where a line of the table fits with alignloss, with 1 where none does, with 2 for an error.
        """
        from .fit_report import report

        options: dict[str, Any] = {
            "length": min(length, tokens),
            "labelled": labelled,
            "precision": precision,
            "optimizer": optimizer,
            "rank": rank,
            "reference_model": reference_model,
            "share_prompts": share_prompts,
            "accumulates": accumulate,
            "device": "cpu" if cpu else "cuda",
            "qlora": qlora,
            "train": train,
            "checkpointing": checkpointing,
        }
        try:
            fits = report(model, tokens, gpu_memory=gpu_memory, reserve=reserve, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        if not fits:
            raise typer.Exit(1)

    @app.callback()
    def root() -> None:
        """Exact preference losses straight from hidden states, without logits."""

    app.command(help=training.HELP)(training.train)
    app.command()(scoring.score)
    return app


if __name__ == "__main__":
    main()
