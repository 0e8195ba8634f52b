"""One page of a table of runs: claims, tables and plots, with everything inside."""

import base64
import io
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .claims import FAMILIES, claims, interval, shown, tuned
from .runs import SCENARIOS

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>alignloss: the study</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #ccc; padding: .2rem .6rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
</style></head><body>
<h1>Methods of alignment in three scenarios</h1>
<p>{{ count }} runs of a model of 100,000 parameters on a generated world; {{ seeds }} seeds;
<code>{{ command }}</code>, {{ where }}. The judge gives 0 to 10. Intervals are of 95 %, by Student's t over seeds. Each
method's setting (beta times its default, learning rate) is the best by the judge over the other seeds.</p>
<h2>Claims of the paper</h2>
<table><tr><th>claim</th><th>here</th><th>numbers</th></tr>
{% for claim in claims %}<tr><td>{{ claim.claim }}</td><td>{{ claim.verdict }}</td><td>{{ claim.numbers }}</td></tr>
{% endfor %}</table>
{% for scenario, lines in tables.items() %}<h2>{{ scenario }}</h2>
<table><tr><th>method</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for method, cells in lines.items() %}<tr><td>{{ method }}</td>
{% for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for title, image in plots.items() %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}</body></html>
"""
WHERE = ["device", "torch", "transformers", "commit"]
COLUMNS = [*FAMILIES, "kl", "length", "chosen_logps", "rejected_logps"]


def write_report(lines: list[dict[str, str]], out: Path) -> Path:
    """`report.html` in a folder, of the lines of a table."""
    runs = pandas.DataFrame(lines)
    words = ["scenario", "method", *WHERE]
    runs[runs.columns.difference(words)] = runs[runs.columns.difference(words)].apply(pandas.to_numeric)
    usual = runs["pairs"].mode()[0]
    best = tuned(runs[runs["pairs"] == usual])
    sizes = runs[(runs["scenario"] == "after SFT") & (runs["beta"] == 1)]
    sizes = sizes[sizes["learning_rate"] == sizes[sizes["pairs"] != usual]["learning_rate"].max()]
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    where = "; ".join(f"{name} {', '.join(map(str, runs[name].unique()))}" for name in WHERE)
    page = Environment(autoescape=True).from_string(PAGE).render(
        count=len(runs), seeds=runs["seed"].nunique(), command=command,
        where=where, claims=claims(best, sizes), columns=COLUMNS, tables=_tables(best),
        plots={
            "The judge, by method": _bars(best),
            "The judge, by the number of pairs": _sizes(sizes),
            "The judge against the divergence from the start, every run": _frontier(runs[runs["pairs"] == usual]),
        },
    )  # fmt: skip
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _tables(best: pandas.DataFrame) -> dict[str, dict[str, list[str]]]:
    """For each scenario a line for each method, and one for the start."""
    tables: dict[str, dict[str, list[str]]] = {}
    for scenario in SCENARIOS:
        here = best[best["scenario"] == scenario]
        first = here.drop_duplicates("seed")
        tables[scenario] = {"start": [_cell(first[f"start_{name}"]) for name in COLUMNS]}
        for method, group in here.groupby("method", sort=False):
            tables[scenario][str(method)] = [_cell(group[name]) for name in COLUMNS]
    return tables


def _cell(values: pandas.Series) -> str:
    return shown(*interval(values))


def _image(figure: Any) -> str:
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=110, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _bars(best: pandas.DataFrame) -> str:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, scenario in zip(figure.subplots(1, len(SCENARIOS), sharey=True), SCENARIOS, strict=True):
        here = best[best["scenario"] == scenario]
        names = list(dict.fromkeys(here["method"]))
        values = [interval(here[here["method"] == name]["judge"]) for name in names]
        axes.bar(names, [mean for mean, _ in values], yerr=[half for _, half in values], capsize=3)
        axes.axhline(here.drop_duplicates("seed")["start_judge"].mean(), color="gray", lw=1, ls="--")
        axes.set(title=scenario, ylim=(0, 10))
        axes.tick_params(axis="x", rotation=60)
    return _image(figure)


def _sizes(sizes: pandas.DataFrame) -> str:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, group in sizes.groupby("method", sort=False):
        by = group.groupby("pairs")["judge"].apply(interval)
        axes.errorbar(by.index, [m for m, _ in by], yerr=[h for _, h in by], label=method, marker="o", capsize=2)
    axes.set(xscale="log", xlabel="pairs", ylabel="judge", ylim=(0, 10))
    axes.legend(ncols=2)
    return _image(figure)


def _frontier(runs: pandas.DataFrame) -> str:
    figure = Figure(figsize=(12, 4), layout="constrained")
    grid = figure.subplots(1, len(SCENARIOS), sharey=True)
    for axes, scenario in zip(grid, SCENARIOS, strict=True):
        for method, group in runs[runs["scenario"] == scenario].groupby("method", sort=False):
            axes.scatter(group["kl"], group["judge"], label=method, s=14)
        axes.set(title=scenario, xlabel="KL from the start, nats", ylim=(0, 10))
    grid[0].set(ylabel="judge")
    grid[-1].legend(fontsize="small", ncols=2)
    return _image(figure)
