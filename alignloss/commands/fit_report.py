"""What `alignloss fit` shows."""

from itertools import product
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..checks import check_number
from .errors import UserError
from .fit import Estimate, Model, estimate, most_tokens, read_model

GIB = 1 << 30
HEADERS = ("weights", "grads", "optim.", "activ.", "loss", "total", "fits", "most\ntokens")


def fit(
    model: Annotated[str, typer.Option(help="A built-in name, a config.json, or a folder that holds one.")],
    tokens: Annotated[int, typer.Option(min=1, help="Positions of a micro-batch, padding included.")] = 8192,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of the GPU, or with --cpu of the process.")] = 24.0,
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


def report(
    name: str,
    tokens: int,
    *,
    gpu_memory: float,
    reserve: float,
    qlora: bool = False,
    train: str | None = None,
    checkpointing: bool | None = None,
    **options: Any,
) -> bool:
    """Print the table of a model, and return whether a row of it fits with alignloss.

    Args:
        gpu_memory, reserve: in GiB.
        qlora: as in `read_model`.
        train: "full" or "lora" alone; None: both.
        checkpointing: with or without alone; None: both.
        options: as in `estimate`.
    """
    check_number("gpu_memory", gpu_memory, positive=True)
    check_number("reserve", reserve)
    if gpu_memory > 1 << 20:
        raise ValueError(f"gpu_memory is in GiB, of one GPU; got {gpu_memory:g}")
    if train not in (None, "full", "lora"):
        raise ValueError(f"train must be full or lora, got {train!r}")
    model = read_model(name, qlora=qlora)
    memory = round(gpu_memory * GIB)
    options |= {"gpu_memory": memory}
    table = Table(
        title=f"{name}, {tokens:,} tokens, {gpu_memory:g} GiB: estimate in GiB", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.padding = (0, 0)
    table.add_column("train", no_wrap=True)
    table.add_column("head", no_wrap=True)
    for header in HEADERS:
        table.add_column(header, justify="right", no_wrap=True)
    plans: dict[str, str] = {}
    fits = False
    ways = [lora for lora in (False, True) if train is None or lora == (train == "lora")]
    if model.quantized_parameters and train is None:
        ways = [True]
    for lora, recomputes in product(ways, (False, True) if checkpointing is None else (checkpointing,)):
        options |= {"lora": lora, "checkpointing": recomputes}
        step = estimate(model, tokens, **options)
        room = memory - round(reserve * GIB)
        most = [most_tokens(model, room, full, **options) for full in (False, True)]
        fits = fits or step.total() <= room
        way = ("LoRA" if lora else "full") + ("\n+checkpoint" if recomputes else "\n")
        table.add_row(way, "alignloss\nfull logits", *_cells(step, room), "\n".join(f"{n:,}" for n in most))
        plans["LoRA" if lora else "full"] = _loss_line(step)
    console = Console()
    # in a narrow terminal lines wrap, where numbers would be cut
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)
    for way, line in plans.items():
        console.print(f"Loss layer, {way}: {line}", highlight=False)
    console.print(_notes(model, reserve, options), highlight=False)
    return fits


def _cells(step: Estimate, room: int) -> list[str]:
    def gib(*counts: int) -> str:
        return "\n".join(f"{count / GIB:.{1 if count >= 10 * GIB else 2}f}" for count in counts)

    totals = step.total(), step.total(full_logits=True)
    return [
        *(gib(count) for count in (step.weights, step.gradients, step.optimizer, step.activations)),
        gib(step.loss_bytes, step.full_logits_bytes),
        gib(*totals),
        "\n".join("yes" if total <= room else "no" for total in totals),
    ]


def _loss_line(step: Estimate) -> str:
    loss = step.loss_layer
    line = f"regime {loss.regime}, {loss.gemms:.3g} GEMMs, workspace {loss.workspace_bytes / (1 << 20):,.0f} MiB"
    if loss.one_pass_bytes is not None and (loss.regime == 4 or loss.recomputed_tokens):
        line += f"; one pass (3 GEMMs) from workspace_bytes={loss.one_pass_bytes:,}"
    return line


def _notes(model: Model, reserve: float, options: dict[str, Any]) -> str:
    bits = 32 if options["precision"] == "fp32" else 16  # of what is frozen
    copy = "a frozen copy, " + ("quantized too" if model.quantized_parameters else f"in {bits} bits")
    reference = copy if options["reference_model"] else "cached, or the base without adapters"
    beside = quantized = ""
    gradients = "Gradients count as held from the micro-batch before"
    if not options.get("accumulates", True):
        gradients = "A step is one micro-batch, after which gradients are freed"
    shared = ", prompts shared by their pairs" if options.get("share_prompts") else ""
    if model.beside_parameters:
        beside = (
            f", {model.beside_parameters / 1e6:,.0f}M of them beside the decoder (vision tower, projector): frozen, in "
            "weights alone; positions of images count as tokens"
        )
    if model.quantized_parameters:
        quantized = (
            f"{model.quantized_parameters / 1e6:,.0f}M quantized by bitsandbytes to "
            f"{model.quantized_bytes / GIB:.2f} GiB, the others in {bits} bits (PEFT's prepare_model_for_kbit_training "
            "makes those 32): LoRA alone, adapters as the precision says; "
        )
    return (
        f"{model.parameters / 1e6:,.0f}M parameters{beside}; {quantized}{options['precision']}, "
        f"{options['optimizer']}, LoRA rank {options['rank']} on every linear layer of the decoder but the head; "
        f"reference: {reference}. Sequences of {options['length']:,} in pairs, {options['labelled']:.0%} labelled, "
        f"padded{shared}, fused attention. Fits: total <= memory - {reserve:g} GiB. With checkpoints the backward "
        f"recomputes a layer, which counts where it exceeds the loss. {gradients}. An "
        "estimate: the loss layer is checked against measurement, activations against what autograd saves in "
        "transformers."
    )
