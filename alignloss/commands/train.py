"""The command `alignloss train`."""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .arguments import BadRows, Cpu, Data, Dtype, Gguf, Model, file
from .errors import UserError, need

HELP = """Train a causal language model on preferences, on one device, without ever storing logits.

DATA is a file of one JSON object per line: "prompt", "chosen", "rejected", as text or as lists of messages; KTO
and other unpaired losses also take "prompt", "completion", "label" (true or false); sft takes "prompt", "completion".

The folder OUT gets log.jsonl, curves.png, checkpoints, and in the end the trained model in model/. The same command
again goes on where it was stopped.

field=value sets an option of the loss (gamma=1.0) or any field of TRL's configuration (warmup_steps=10,
gradient_accumulation_steps=4, lr_scheduler_type=cosine). --config reads options and fields from a YAML file.

    alignloss train --model ./SmolLM2-135M-Instruct --data pairs.jsonl --eval-data held_out.jsonl --out run --lora 16
"""


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """The options in a YAML file as defaults of the command line; the other entries are left for the configuration."""
    if path is not None:
        from .training.settings import read_config

        entries = read_config(path)
        known = {parameter.name for parameter in context.command.params} - {"config", "assignments"}
        for name, kind in get_type_hints(train).items():  # true would be 1 where a number is read
            if isinstance(entries.get(name), bool) and kind is not bool:
                raise UserError(f"{path}: {name} cannot be {str(entries[name]).lower()}")
        context.default_map = {name: value for name, value in entries.items() if name in known}
        context.obj = {name: value for name, value in entries.items() if name not in known}
    return path


def _number(text: str, **limits: Any) -> Any:
    """An option whose default depends on others."""
    return typer.Option(help=text, show_default=False, **limits)


Beta = Annotated[float | None, _number("Of the loss.  [default: 0.1; simpo: 2]")]
Steps = Annotated[int | None, _number("Optimizer steps, instead of --epochs.", min=1)]
Epochs = Annotated[float | None, _number("Passes over the data.  [default: 1]", min=0)]
BatchSize = Annotated[int | None, _number("Pairs, or rows of an unpaired loss, of a step.  [default: 8]", min=1)]
Rate = Annotated[float | None, _number("The peak.  [default: TRL's, 1e-6, sft: 2e-5; ten times that for LoRA]")]
MaxLength = Annotated[int | None, _number("Tokens of prompt and completion.  [default: 1024]", min=2)]
SaveEvery = Annotated[int | None, _number("Steps between checkpoints, and evaluations.  [default: 100]", min=1)]
Seed = Annotated[int | None, _number("Of the order of the data, dropout and new adapters.  [default: 42]")]
Report = Annotated[str | None, _number("tensorboard, trackio or wandb, beside log.jsonl.  [default: none]")]
Loss = Annotated[str, typer.Option(help="dpo, ipo, kto, cpo, orpo, simpo, sft or any name of alignloss.losses.LOSSES.")]
Lora = Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters; 0 trains every parameter.")]
Qlora = Annotated[
    bool, typer.Option("--qlora", help="LoRA beside weights of 4 bits (bitsandbytes); rank 16 without --lora.")
]
Share = Annotated[bool, typer.Option("--share-prompts", help="Compute the prompt of a pair once.")]
Config = Annotated[Path | None, typer.Option(help="YAML with options and fields.", callback=_from_file, is_eager=True)]
Fields = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Of the loss or of TRL's configuration.")
]


def train(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, file("Folder of the run.")],
    eval_data: Annotated[Path | None, file("JSONL held out, evaluated before, during and after.")] = None,
    loss: Loss = "dpo",
    beta: Beta = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: Rate = None,
    max_length: MaxLength = None,
    lora: Lora = 0,
    qlora: Qlora = False,
    share_prompts: Share = False,
    gguf: Gguf = None,
    dtype: Dtype = "auto",
    cpu: Cpu = False,
    save_every: SaveEvery = None,
    references: Annotated[
        Path | None, file("Folder of cached reference log-probabilities.  [default: OUT/references]")
    ] = None,
    bad_rows: BadRows = "skip",
    report: Report = None,
    seed: Seed = None,
    config: Config = None,
    assignments: Fields = None,
) -> None:
    prepare()
    from .training.model import source
    from .training.settings import assignments as parsed
    from .training.settings import settle

    options: dict[str, Any] = {
        "beta": beta, "steps": steps, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "max_length": max_length, "save_every": save_every, "report": report, "seed": seed, "cpu": cpu or None,
    }  # fmt: skip
    explicit = {n for n in options if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}
    names = [parameter.name for parameter in context.command.params if parameter.name]
    settings = settle(loss, options, explicit, context.obj or {}, parsed(assignments or []), names)
    if share_prompts and settings.objective.kind != "paired":
        raise UserError(f"--share-prompts is for pairs, which --loss {loss} does not take")
    if out == Path() or out.resolve() == Path(model).resolve():
        raise UserError("--out must name a folder of its own")
    origin = source(model, gguf, dtype, cpu, lora, qlora)
    from rich.console import Console

    from .training.run import train as run

    run(
        settings, origin, data, out,
        held_out=eval_data, share_prompts=share_prompts, policy=bad_rows, references=references,
        console=Console(stderr=True),
    )  # fmt: skip


def prepare() -> None:
    """Look for the packages, keep to one device, and quieten what the libraries beneath say of themselves."""
    need("train", "transformers", "trl", "peft", "matplotlib")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command trains in one process; in several, use the trainers of alignloss.trl in a script")
    # the Trainer would split a batch over every GPU that it sees, by DataParallel
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(trl|transformers|peft|torch|accelerate|datasets)\b")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
