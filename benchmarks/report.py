"""What was measured, as a table, a file and plots."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from alignloss.commands.measure import environment

from .cases import Case
from .measure import BARE
from .providers import MODES

MIB = 1 << 20
# key of a row: header, format, factor
COLUMNS = {
    "kernel": ("kernel", ".60", 1),
    "calls": ("calls", "d", 1),
    "share": ("share", ".1%", 1),
    "forward_seconds": ("forward\nms", ",.2f", 1e3),
    "backward_seconds": ("backward\nms", ",.2f", 1e3),
    "seconds": ("both\nms", ",.2f", 1e3),
    "loss_seconds": ("loss layer\nms", ",.2f", 1e3),
    "loss_share": ("loss layer\nshare", ".1%", 1),
    "tokens_per_second": ("tokens/s", ",.0f", 1),
    "of_alignloss": ("of\nalignloss", ".2f", 1),
    "tflops": ("TFLOP/s", ".3g", 1),
    "gigabytes_per_second": ("GB/s", ",.0f", 1),
    "of_bare_gemms": ("of bare\nGEMMs", ".2f", 1),
    "of_bare": ("of the\nfirst", ".2f", 1),
    "workspace_bytes": ("workspace\nMiB", ",.1f", 1 / MIB),
    "resident_workspace_bytes": ("resident\nMiB", ",.1f", 1 / MIB),
    "peak_bytes": ("peak\nMiB", ",.0f", 1 / MIB),
    "estimated_bytes": ("estimate\nMiB", ",.0f", 1 / MIB),
    "most_tokens": ("most\ntokens", ",d", 1),
    "most_length": ("longest", ",d", 1),
    "estimated_most_length": ("longest,\nestimate", ",d", 1),
    "most_vocabulary": ("largest\nvocabulary", ",d", 1),
    "estimated_most_vocabulary": ("vocabulary,\nestimate", ",d", 1),
    "estimate_of_measured": ("estimate of\nmeasured", ".2f", 1),
    "stopped_by": ("stopped by", ".50", 1),
    "logps_error_rms": ("error\nlogps", ".1e", 1),
    "logps_error_max": ("largest\nlogps", ".1e", 1),
    "sum_error": ("error of\ntheir sum", ".1e", 1),
    "sum_error_of_alignloss": ("of\nalignloss", ".2g", 1),
    "dhidden_error": ("error\ndhidden", ".1e", 1),
    "dhidden_error_of_alignloss": ("of\nalignloss", ".2g", 1),
    "dweight_error": ("error\ndweight", ".1e", 1),
    "dweight_error_of_alignloss": ("of\nalignloss", ".2g", 1),
}
# of a plot: keys of a row, the first that it has, factor, label
METRICS = (
    (("seconds",), 1e3, "forward and backward, ms"),
    (("workspace_bytes",), 1 / MIB, "workspace, MiB"),
    (("logps_error_rms", "dhidden_error"), 1, "error of log p, nats (forward);\nof dhidden, relative"),
)
ROOF = (("tflops",), 1, "TFLOP/s")


def table(case: Case, rows: list[dict[str, Any]]) -> Table:
    """A row for each mode and provider, with the columns that were measured."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    result = Table(title=str(case), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("mode", no_wrap=True)
    result.add_column("provider", no_wrap=True)
    for header, _, _ in columns.values():
        result.add_column(header, justify="right", no_wrap=True)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        for i, row in enumerate(chosen):
            cells = [
                format(row[key] * factor, form) if key in row else "" for key, (_, form, factor) in columns.items()
            ]
            if "failed" in row:
                cells = [row["failed"][:60]]
            gemms = f" ({row['bare_gemms']:.3g})" if "bare_gemms" in row and row["provider"] == BARE else ""
            result.add_row(mode if i == 0 else "", row["provider"] + gemms, *cells, end_section=i == len(chosen) - 1)
    return result


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    Console(width=150).print(table(case, rows))


def merge(*lists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one provider and mode (and kernel, of a profile) as one."""
    merged: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in (row for rows in lists for row in rows):
        merged.setdefault((row["provider"], row["mode"], row.get("kernel", "")), {}).update(row)
    return list(merged.values())


def record(path: Path, command: str, results: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    """Write every row with device, versions and commit."""
    document = {
        "command": command,
        **environment(
            "alignloss",
            "torch",
            "triton",
            "trl",
            "liger_kernel",
            "cut_cross_entropy",
            "quack_kernels",
            "nvidia_cutlass_dsl",
        ),
        "units": {
            "seconds": "medians over rounds; ratios are medians of the ratios within a round",
            "bytes": "inputs, gradients of the leaves, and workspace: the peak above both, as the allocator counts; "
            "of a whole step the peak of weights, states, gradients and everything else",
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
    """Draw what the file varies, a panel for each mode: time, memory and error against tokens or vocabulary, and the
    rate against the hidden size, under the roof of the memory's bandwidth."""
    try:
        document = json.loads(path.read_text())
        rows = [row for row in document["rows"] if "failed" not in row and row["mode"] in MODES]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no file that `run` wrote: {error!r}") from None
    drawn = []
    for against, same, metrics in (
        ("tokens", ("shape", "masked", "vocabulary"), METRICS),
        ("vocabulary", ("shape", "masked", "tokens"), METRICS),
        ("hidden", ("masked", "tokens"), (ROOF,)),
    ):
        chosen = [row for row in rows if all(row[key] == rows[0][key] for key in same)]
        metrics = [metric for metric in metrics if any(_value(row, metric[0]) for row in chosen)]
        if metrics and len({row[against] for row in chosen}) > 1:
            figure = _figure(chosen, against, metrics)
            fixed = ", ".join(f"{key} {chosen[0][key]:,}" for key in same if key != "shape")
            title = f"{chosen[0]['shape']}, " if "shape" in same else ""
            title += f"{chosen[0]['dtype']}, {fixed}\n{document['device']}, commit {document['commit']}"
            figure.suptitle(title, fontsize=9)
            target = path.with_name(f"{path.stem}-{against}.png")
            figure.savefig(target, dpi=110)
            print(f"wrote {target}")
            drawn.append(target)
    return drawn


def _value(row: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    return next((row[key] for key in keys if key in row), None)


def _figure(rows: list[dict[str, Any]], against: str, metrics: list[Any]) -> Figure:
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    names = list(dict.fromkeys([BARE, *(row["provider"] for row in rows)]))
    ticks = sorted({row[against] for row in rows})
    figure = Figure(figsize=(3.4 * len(modes), 0.8 + 2.7 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Any] = {}
    grid = figure.subplots(len(metrics), len(modes), squeeze=False, sharey="row")
    for panels, (keys, factor, label) in zip(grid, metrics, strict=True):
        for axes, mode in zip(panels, modes, strict=True):
            here = [row for row in rows if row["mode"] == mode]
            for i, name in enumerate(names):
                values = [(row[against], _value(row, keys)) for row in here if row["provider"] == name]
                points = sorted((x, value * factor) for x, value in values if value)
                if points:
                    style = "k:" if name == BARE else f"C{i - 1}o-"
                    (lines[name],) = axes.plot(*zip(*points, strict=True), style, label=name)
            speeds = [row["copy_bytes_per_second"] for row in here if "copy_bytes_per_second" in row]
            if keys == ROOF[0] and speeds:
                # each GEMM writes a float32 logit, which is read once: 2H FLOPs for 8 bytes
                roof = [2 * H / 8 * max(speeds) * 1e-12 for H in ticks]
                (lines["roof"],) = axes.plot(
                    ticks, roof, "k--", label="roof: a float32 logit written and read per GEMM"
                )
            axes.set(xscale="log", yscale="log", xlabel=against, title=mode)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.set_visible(bool(axes.lines))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(label)
    figure.legend(lines.values(), [line.get_label() for line in lines.values()], loc="outside lower center", ncols=5)
    return figure
