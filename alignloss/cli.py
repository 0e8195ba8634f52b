"""The command `alignloss`."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

PACKAGES = ("typer", "rich", "transformers", "gguf", "accelerate", "matplotlib")


def main() -> None:
    """Entry point of the command. What the demo needs beyond torch is optional, so it is looked for first."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"alignloss: the demo needs {', '.join(missing)}; in the project's folder: pip install '.[demo]'")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")

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
        from alignloss.demo import DemoError, run

        try:
            run(model, steps=steps, out=out)
        except DemoError as error:
            sys.exit(f"alignloss: {error}")

    app()


if __name__ == "__main__":
    main()
