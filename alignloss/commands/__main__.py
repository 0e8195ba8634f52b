"""The command `alignloss`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from .errors import UserError, need

INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Entry point of the command: ends with 0, with 2 and one line where something is asked that cannot be done."""
    try:
        need("cli", "typer", "rich")
        code = _app()(standalone_mode=False)
        if code == INTERRUPTED:
            _failed("interrupted; a run goes on by the same command")
    except UserError as error:
        code = _failed(str(error))
    except Exception as error:
        said = getattr(error, "format_message", None)  # of the parser: an unknown option, a missing one
        if said is None:
            raise
        code = _failed(said())
    sys.exit(code)


def _failed(text: str) -> int:
    print(f"alignloss: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _app() -> Any:
    import typer

    from . import fit_report as fitting
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

    @app.callback()
    def root() -> None:
        """Exact preference losses straight from hidden states, without logits."""

    app.command(help=training.HELP)(training.train)
    app.command()(scoring.score)
    app.command()(fitting.fit)
    return app


if __name__ == "__main__":
    main()
