"""One page of a table of runs: claims, tables and plots, with everything inside."""

import base64
import io
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas
from jinja2 import Environment
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .claims import SETTING, TOO_SMALL, claims, interval, shown, tuned
from .methods import FAMILIES, SCENARIOS
from .schedule import WHERE, WORDS

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>alignloss: the study</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #ccc; padding: .2rem .6rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
</style></head><body>
<h1>Methods of alignment in three scenarios</h1>
<p>{{ about }} {{ count }} runs, seeds: {{ seeds }}; <code>{{ command }}</code>; {{ where }}. Intervals are of 95 %, by
Student's t over seeds, those of one claim together (Bonferroni). Each method's setting (beta and learning rate) is the
best over the other seeds; with one seed the default beta and the largest learning rate. A dashed line is the start.</p>
{% if claims %}<h2>Claims of Saeidi, Verma and Baral 2024</h2>
<table><tr><th>claim</th><th>here</th><th>numbers</th></tr>
{% for claim in claims %}<tr><td>{{ claim.claim }}</td><td>{{ claim.verdict }}</td><td>{{ claim.numbers }}</td></tr>
{% endfor %}</table>{% endif %}
{% for scenario, lines in tables.items() %}<h2>{{ scenario }}</h2>
<table><tr><th>method</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for method, cells in lines.items() %}<tr><td>{{ method }}</td>
{% for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for title, image in plots.items() %}<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}</body></html>
"""
MORE = ["kl", "length", "chosen_logps", "rejected_logps"]


class Runs(NamedTuple):
    """The runs of a table, and which of them are compared."""

    metric: str  # by which settings are chosen
    all: pandas.DataFrame
    swept: pandas.DataFrame  # with the usual number of pairs
    best: pandas.DataFrame  # of each seed the setting that is best over the others
    default: pandas.DataFrame  # the same at the default beta
    sizes: pandas.DataFrame


def runs_of(lines: list[dict[str, str]], families: dict[str, str]) -> Runs:
    """`families` says of each metric what it measures; settings are chosen by the first that every line has."""
    runs = pandas.DataFrame(lines)
    numbers = runs.columns.difference(WORDS)
    runs[numbers] = runs[numbers].map(lambda text: float(text or "nan"))
    runs = runs.astype({"seed": int, "pairs": int})
    metric = next(name for name in families if name in runs and runs[name].notna().all())
    usual = runs["pairs"].mode()[0]
    swept = runs[runs["pairs"] == usual]
    default = tuned(swept[swept["beta"] == usual_beta(swept)], metric)
    return Runs(metric, runs, swept, tuned(swept, metric), default, sizes_of(runs, usual))


def usual_beta(runs: pandas.DataFrame) -> pandas.Series:
    """For each run the default beta of its method: 1, or the only one where the table has a plan's own."""
    return runs.groupby("method")["beta"].transform(lambda betas: 1.0 if (betas == 1).any() else betas.mode()[0])


def write_report(
    lines: list[dict[str, str]], out: Path, families: dict[str, str], about: str, untested: str = TOO_SMALL
) -> Path:
    """`report.html` in a folder, of the lines of a table, and its plots as files too.

    `about` is said at the top, `untested` of claims about what is not measured.
    """
    runs = runs_of(lines, families)
    metric = runs.metric
    plots = {"measures": ("Every measure, by method", _bars(runs.best, families))}
    if "kl" in runs.all:
        plots["frontier"] = (f"{metric} against the divergence from the start", _frontier(runs.swept, metric))
    if runs.sizes["pairs"].nunique() > 1:
        plots["sizes"] = (f"{metric}, by the number of pairs", _sizes(runs.sizes, metric))
    for name, (_, image) in plots.items():
        (out / f"{name}.png").write_bytes(image)
    columns = [name for name in (*families, *MORE) if name in runs.all]
    page = Environment(autoescape=True).from_string(PAGE).render(
        about=about, count=len(runs.all), seeds=runs.all["seed"].nunique(),
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        where="; ".join(f"{name} {', '.join(map(str, runs.all[name].unique()))}" for name in WHERE if name in runs.all),
        claims=claims(runs.best, runs.sizes, families, untested) if set(families.values()) & set(FAMILIES) else [],
        columns=["chosen beta, learning rate", f"{metric}, default beta", *columns],
        tables=_tables(runs, columns),
        plots={title: base64.b64encode(image).decode() for title, image in plots.values()},
    )  # fmt: skip
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def sizes_of(runs: pandas.DataFrame, usual: int) -> pandas.DataFrame:
    """The runs after SFT that differ in the number of pairs alone: at the default beta and one rate of each method."""
    runs = runs[(runs["scenario"] == next(iter(SCENARIOS))) & (runs["beta"] == usual_beta(runs))]
    rates = runs[runs["pairs"] != usual][["method", "learning_rate"]].drop_duplicates()
    return runs.merge(rates, on=["method", "learning_rate"])


def _tables(runs: Runs, columns: list[str]) -> dict[str, dict[str, list[str]]]:
    """For each scenario a line for each method, and one for the start."""
    tables: dict[str, dict[str, list[str]]] = {}
    for scenario in SCENARIOS:
        here, usual, swept = (of[of["scenario"] == scenario] for of in (runs.best, runs.default, runs.swept))
        first = here.drop_duplicates("seed")
        tables[scenario] = {"start": ["", "", *(_cell(first[f"start_{name}"]) for name in columns)]}
        for method, group in here.groupby("method", sort=False):
            tables[scenario][str(method)] = [
                setting(group, swept[swept["method"] == method]),
                _cell(usual[usual["method"] == method][runs.metric]),
                *(_cell(group[name]) for name in columns),
            ]
    return tables


def setting(chosen: pandas.DataFrame, swept: pandas.DataFrame) -> str:
    """The settings that were chosen, the most frequent first, where the sweep ends, and whether anything was learnt."""
    counts = chosen[SETTING].value_counts()
    names = ", ".join(f"{beta:g} at {rate:g}" for beta, rate in counts.index)
    at_end = [
        name.replace("_", " ")
        for name in SETTING
        if swept[name].nunique() > 1 and (chosen[name].isin([swept[name].min(), swept[name].max()])).all()
    ]
    said = f"{names}; end of the sweep of {' and '.join(at_end)}" if at_end else names
    # RSO without a pair, RLHF without a response of another score
    unmoved = "kl" in chosen and bool((chosen["kl"] == 0).all())
    return f"{said}; nothing to learn from" if unmoved else said


def _cell(values: pandas.Series) -> str:
    return shown(*interval(values))


def _image(figure: Any) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def _colors(runs: pandas.DataFrame) -> dict[str, Any]:
    return dict(zip(runs["method"].unique(), colormaps["tab20"].colors, strict=False))


def _bars(best: pandas.DataFrame, families: dict[str, str]) -> bytes:
    """A row for each scenario, a column for each metric; a line where the start is."""
    metrics = [metric for metric in families if metric in best]
    figure = Figure(figsize=(3.2 * max(2, len(metrics)), 7.5), layout="constrained")
    grid = figure.subplots(len(SCENARIOS), len(metrics), sharex=True, sharey="col", squeeze=False)
    for row, scenario in zip(grid, SCENARIOS, strict=True):
        here = best[best["scenario"] == scenario]
        names = list(dict.fromkeys(here["method"]))
        for axes, metric in zip(row, metrics, strict=True):
            values = [interval(here[here["method"] == name][metric]) for name in names]
            axes.bar(names, [mean for mean, _ in values], yerr=[half for _, half in values], capsize=2)
            axes.axhline(here.drop_duplicates("seed")[f"start_{metric}"].mean(), color="gray", lw=1, ls="--")
            axes.tick_params(axis="x", rotation=90)
        row[0].set_ylabel(scenario)
    for axes, metric in zip(grid[0], metrics, strict=True):
        axes.set_title(f"{metric} ({families[metric]})")
    return _image(figure)


def _sizes(sizes: pandas.DataFrame, metric: str) -> bytes:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, color in _colors(sizes).items():
        group = sizes[sizes["method"] == method]
        by = group.groupby("pairs")[metric].apply(interval)
        means, halves = zip(*by, strict=True)
        axes.errorbar(by.index, means, yerr=halves, label=method, marker="o", capsize=2, color=color)
    axes.set(xscale="log", xlabel="pairs", ylabel=metric)
    figure.legend(loc="outside right center")
    return _image(figure)


def _frontier(runs: pandas.DataFrame, metric: str) -> bytes:
    """A point for each setting, the mean of the seeds; those of one learning rate are joined by their beta."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    grid = figure.subplots(1, len(SCENARIOS), sharey=True)
    colors = _colors(runs)
    for axes, scenario in zip(grid, SCENARIOS, strict=True):
        here = runs[runs["scenario"] == scenario]
        for method, color in colors.items():
            means = here[here["method"] == method].groupby(["learning_rate", "beta"])[["kl", metric]].mean()
            for place, (_, line) in enumerate(means.groupby(level=0)):
                label = method if place == 0 else None
                axes.plot(line["kl"], line[metric], marker="o", ms=3, lw=0.8, label=label, color=color)
        axes.axhline(here[f"start_{metric}"].mean(), color="gray", lw=1, ls="--")
        axes.set(title=scenario, xlabel="KL from the start, nats")
    grid[0].set(ylabel=metric)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center")
    return _image(figure)
