"""What a run shows and keeps of its steps: a bar or lines, `log.jsonl`, and a figure of the curves."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .checkpoints import diverged, write_whole

LOG = "log.jsonl"
# what differs from run to run
TIMES = ("tokens_per_second", "seconds", "peak_memory_bytes")
_NOT_KEPT = ("runtime", "_per_second", "step_time", "total_flos")


def peak_memory() -> int:
    """Bytes: of the GPU's allocator, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_log(path: Path, until: float = float("inf")) -> list[dict[str, Any]]:
    """The entries up to a step; a last line that was cut off is none."""
    entries = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= until:
                    entries.append(entry)
            except (ValueError, KeyError, TypeError):
                continue
    return entries


class Log(TrainerCallback):
    """Writes each entry of the trainer into `log.jsonl`, from the step that the run goes on from, and shows it."""

    def __init__(self, out: Path, console: Console, tokens_before: int) -> None:
        self.path, self.console = out / LOG, console
        self.tokens, self.seconds = tokens_before, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = read_log(self.path, state.global_step if state.global_step else -1)
        write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.started = self.last = time.perf_counter()
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        kept = {name: value for name, value in logs.items() if not any(part in name for part in _NOT_KEPT)}
        # JSON has no NaN
        kept = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in kept.items()}
        entry = {"step": state.global_step, **kept}
        for name, text in (("loss", "the loss"), ("eval_loss", "the held-out loss")):
            if name in logs and kept[name] is None:
                self.bar.stop()
                raise diverged(f"{text} of step {state.global_step}", f" ({logs[name]})")
        now = time.perf_counter()
        if "loss" in logs:
            tokens = logs.get("num_tokens", self.tokens)
            entry["tokens_per_second"] = round((tokens - self.tokens) / (now - self.last), 1)
            self.tokens = tokens
        self.last = now
        entry |= {"seconds": round(self.seconds + now - self.started, 3), "peak_memory_bytes": peak_memory()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._show(entry, state.max_steps)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.stop()

    def _show(self, entry: dict[str, Any], steps: int) -> None:
        text = shown(entry)
        if "eval_loss" in entry or not self.console.is_terminal:
            self.console.print(f"step {entry['step']}/{steps}  {text}", highlight=False, soft_wrap=True)
        if "loss" in entry:
            self.bar.update(self.task, description=text)


def shown(entry: dict[str, Any]) -> str:
    """An entry of the log in a few words."""
    prefix = "eval_" if "eval_loss" in entry else ""
    loss = entry[f"{prefix}loss"]
    parts = [f"{'held-out ' if prefix else ''}loss {'is not finite' if loss is None else format(loss, '.4f')}"]
    accuracy = entry.get(f"{prefix}rewards/accuracies")
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.0%}")
    if "tokens_per_second" in entry:
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"peak {entry['peak_memory_bytes'] / (1 << 30):.2f} GiB")
    return "  ".join(parts)


PANELS = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}


def draw(entries: list[dict[str, Any]], path: Path, title: str) -> None:
    """A PNG of loss, accuracy and margin, in training and held out, as far as they were logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: label for name, label in PANELS.items() if any(name in entry for entry in entries)}
    if not panels:  # fewer steps than logging_steps
        return
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, style, legend in ((name, {"lw": 1.0}, "training"), (f"eval_{name}", {"marker": "o"}, "held out")):
            points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=legend, **style)
        axes.set(title=label, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    unfinished = path.with_suffix(".unfinished")
    figure.savefig(unfinished, dpi=150, format="png")
    unfinished.replace(path)
