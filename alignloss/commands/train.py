"""The command `alignloss train`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError

HELP = """Train a causal language model on preferences, on one device, without ever storing logits.

DATA is a file of one JSON object per line: "prompt", "chosen", "rejected", as text or as lists of messages; KTO
and other unpaired losses also take "prompt", "completion", "label" (true or false); sft takes "prompt", "completion".

The folder OUT gets log.jsonl, curves.png, checkpoints, and in the end the trained model in model/. The same command
again goes on where it was stopped.

field=value sets an option of the loss (gamma=1.0) or any field of TRL's configuration (warmup_steps=10,
gradient_accumulation_steps=4, lr_scheduler_type=cosine). --config reads options and fields from a YAML file.

    alignloss train --model ./SmolLM2-135M-Instruct --data pairs.jsonl --eval-data held_out.jsonl --out run --lora 16
"""
TRAINING = "What is trained"
DEVICE = "How"
FOLDER = "What is kept"


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """The options in a YAML file as defaults of the command line; the other entries are left for the configuration."""
    if path is not None:
        from .training.settings import read_config

        entries = read_config(path)
        known = {parameter.name for parameter in context.command.params} - {"config", "assignments"}
        context.default_map = {name: value for name, value in entries.items() if name in known}
        context.obj = {name: value for name, value in entries.items() if name not in known}
    return path


def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="Folder of a transformers model, its name on the Hub, or a GGUF file.", show_default=False),
    ],
    data: Annotated[Path, typer.Option(help="JSONL to train on.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run.", show_default=False)],
    eval_data: Annotated[Path | None, typer.Option(help="JSONL held out, evaluated before, during and after.")] = None,
    loss: Annotated[
        str, typer.Option(help="dpo, ipo, kto, cpo, orpo, simpo, sft or any name of alignloss.losses.LOSSES.")
    ] = "dpo",
    beta: Annotated[
        float | None, typer.Option(help="Of the loss.  [default: 0.1; simpo 2.0]", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over the data.  [default: 1]", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pairs (rows, if unpaired) of a step.  [default: 8]", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The peak.  [default: TRL's, 1e-6; ten times that for LoRA]", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and completion.  [default: 1024]", show_default=False)
    ] = None,
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters; 0 trains every parameter.")] = 0,
    qlora: Annotated[bool, typer.Option("--qlora", help="LoRA beside weights of 4 bits (bitsandbytes).")] = False,
    share_prompts: Annotated[bool, typer.Option("--share-prompts", help="Compute the prompt of a pair once.")] = False,
    gguf: Annotated[str | None, typer.Option(help="GGUF file in the folder of the model.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16. auto: bfloat16 for LoRA on a GPU.")
    ] = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")] = False,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.  [default: 100]", show_default=False)
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="Folder of cached reference log-probabilities.  [default: OUT/references]", show_default=False
        ),
    ] = None,
    bad_rows: Annotated[str, typer.Option(help="skip, or stop at the first.")] = "skip",
    report: Annotated[
        str | None,
        typer.Option(
            help="tensorboard, trackio, wandb or none, beside log.jsonl.  [default: none]", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the order of the data and of new adapters.  [default: 42]", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with options and fields.", callback=_from_file, is_eager=True)
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Of the loss or of TRL's configuration.")
    ] = None,
) -> None:
    if steps is not None and epochs is not None:
        raise UserError("--steps and --epochs are both given; leave one out")
    if bad_rows not in ("skip", "stop"):
        raise UserError(f"--bad-rows must be skip or stop, got {bad_rows!r}")
    one_device()
    from .training.model import source
    from .training.settings import assignments as parsed
    from .training.settings import settle

    options: dict[str, Any] = {
        "beta": beta, "steps": steps, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "max_length": max_length, "save_every": save_every, "report": report, "seed": seed, "cpu": cpu or None,
    }  # fmt: skip
    explicit = {n for n in options if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}
    settings = settle(loss, options, explicit, context.obj or {}, parsed(assignments or []))
    if share_prompts and settings.objective.kind != "paired":
        raise UserError(f"--share-prompts is for pairs, which --loss {loss} does not take")
    origin = source(model, gguf, dtype, cpu, lora, qlora)
    quiet()
    from rich.console import Console

    from .training.run import train as run

    run(
        settings, origin, data, out,
        held_out=eval_data, share_prompts=share_prompts, policy=bad_rows, references=references,
        console=Console(stderr=True),
    )  # fmt: skip


def one_device() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command trains in one process; in several, use the trainers of alignloss.trl in a script")
    # the Trainer would split a batch over every GPU that it sees, by DataParallel
    if "," in os.environ.get("CUDA_VISIBLE_DEVICES", ",") and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def quiet() -> None:
    """What the libraries beneath say of themselves."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", module=r"(trl|transformers|peft|torch|accelerate|datasets)\b")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
