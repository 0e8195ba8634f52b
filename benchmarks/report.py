"""What was measured, as a table, a file and plots."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from alignloss.measure import environment

from .cases import Case
from .measure import BARE, WHOLE_STEP
from .providers import MODES

MIB = 1 << 20
# key of a row: header, format, factor
COLUMNS = {
    "forward_seconds": ("forward\nms", ",.2f", 1e3),
    "backward_seconds": ("backward\nms", ",.2f", 1e3),
    "seconds": ("both\nms", ",.2f", 1e3),
    "loss_seconds": ("loss layer\nms", ",.2f", 1e3),
    "loss_share": ("loss layer\nshare", ".1%", 1),
    "of_alignloss": ("of\nalignloss", ".2f", 1),
    "tflops": ("TFLOP/s", ".3g", 1),
    "of_bare_gemms": ("of bare\nGEMMs", ".2f", 1),
    "workspace_bytes": ("workspace\nMiB", ",.1f", 1 / MIB),
    "resident_workspace_bytes": ("resident\nMiB", ",.1f", 1 / MIB),
    "logps_error_rms": ("error\nlogps", ".1e", 1),
    "dhidden_error": ("error\ndhidden", ".1e", 1),
    "dweight_error": ("error\ndweight", ".1e", 1),
}
# of a plot: key of a row, factor, label
METRICS = (("seconds", 1e3, "forward and backward, ms"), ("workspace_bytes", 1 / MIB, "workspace, MiB"))


def table(case: Case, rows: list[dict[str, Any]]) -> Table:
    """A row for each mode and provider, with the columns that were measured."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    result = Table(title=str(case), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("mode", no_wrap=True)
    result.add_column("provider", no_wrap=True)
    for header, _, _ in columns.values():
        result.add_column(header, justify="right", no_wrap=True)
    for mode in (*MODES, WHOLE_STEP):
        chosen = [row for row in rows if row["mode"] == mode]
        for i, row in enumerate(chosen):
            cells = [
                format(row[key] * factor, form) if key in row else "" for key, (_, form, factor) in columns.items()
            ]
            if "failed" in row:
                cells = [row["failed"][:60]]
            gemms = f" ({row['bare_gemms']:.3g})" if row["provider"] == BARE else ""
            result.add_row(mode if i == 0 else "", row["provider"] + gemms, *cells, end_section=i == len(chosen) - 1)
    return result


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    Console(width=150).print(table(case, rows))


def merge(*lists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one provider and mode as one."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for rows in lists for row in rows):
        merged.setdefault((row["provider"], row["mode"]), {}).update(row)
    return list(merged.values())


def record(path: Path, command: str, results: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    """Write every row with device, versions and commit."""
    document = {
        "command": command,
        **environment("alignloss", "torch", "triton", "trl", "liger_kernel", "cut_cross_entropy"),
        "units": {
            "seconds": "medians over rounds; ratios are medians of the ratios within a round",
            "bytes": "inputs, gradients of the leaves, and workspace: the peak above both, as the allocator counts",
            "error": "against float64: log-probabilities in nats, gradients relative to the norm of the exact one",
            "tflops": "tflops_gemms x 2 x labelled x V x H FLOPs, the same for every provider, over seconds",
            "of_bare_gemms": "over the bare_gemms that alignloss's regime takes, on its tiles, in the same process",
        },
        "rows": [case._asdict() | {"labelled": case.labelled} | row for case, rows in results for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")


def plot(path: Path) -> list[Path]:
    """Draw time and memory against tokens, or against vocabulary, whichever the file varies; a panel for each mode."""
    drawn = []
    try:
        document = json.loads(path.read_text())
        rows = [row for row in document["rows"] if "failed" not in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no file that `run` wrote: {error!r}") from None
    rows = [row for row in rows if any(key in row for key, *_ in METRICS) and row["mode"] in MODES]
    for against, other in (("tokens", "vocabulary"), ("vocabulary", "tokens")):
        same = ("shape", "masked", other)
        chosen = [row for row in rows if all(row[key] == rows[0][key] for key in same)]
        if len({row[against] for row in chosen}) > 1:
            figure = _figure(chosen, against)
            first = rows[0]
            title = f"{first['shape']}, {first['dtype']}, {other} {first[other]:,}, {first['masked']:.0%} masked"
            figure.suptitle(f"{title}; {document['device']}, commit {document['commit']}", fontsize=9)
            target = path.with_name(f"{path.stem}-{against}.png")
            figure.savefig(target, dpi=110)
            print(f"wrote {target}")
            drawn.append(target)
    return drawn


def _figure(rows: list[dict[str, Any]], against: str) -> Figure:
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    names = list(dict.fromkeys([BARE, *(row["provider"] for row in rows)]))
    figure = Figure(figsize=(3.4 * len(modes), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Any] = {}
    for panels, (key, factor, label) in zip(figure.subplots(2, len(modes), squeeze=False), METRICS, strict=True):
        for axes, mode in zip(panels, modes, strict=True):
            for i, name in enumerate(names):
                found = [row for row in rows if (row["provider"], row["mode"]) == (name, mode) and key in row]
                points = sorted((row[against], row[key] * factor) for row in found)
                if points:
                    style = "k:" if name == BARE else f"C{i - 1}o-"
                    (lines[name],) = axes.plot(*zip(*points, strict=True), style, label=name)
            axes.set(xscale="log", yscale="log", xlabel=against, title=mode)
            axes.set_xticks(ticks := sorted({row[against] for row in rows}), [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(label)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)
    return figure
