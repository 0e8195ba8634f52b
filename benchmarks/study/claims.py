"""The claims of the paper that a table of runs can speak to, each with what was found."""

from collections.abc import Callable
from typing import NamedTuple

import pandas
from scipy import stats

from .methods import FAMILIES, SCENARIOS

LEVEL = 0.95
HOLDS, FAILS, NOISE = "holds here", "does not hold here", "within noise"
ONE_SEED, NOT_RUN, TOO_SMALL = "one seed tells nothing", "not run", "cannot be tested at this size"
SETTING = ["beta", "learning_rate"]
ALIGNED = ["dpo", "ipo", "kto", "cpo"]
START, SFT_MODEL = "start", "the SFT model"  # before alignment: of the scenario itself, and of the first one


class Found(NamedTuple):
    claim: str
    verdict: str
    numbers: str = ""


class Difference(NamedTuple):
    name: str  # of what is subtracted from what
    values: pandas.Series  # by seed


Decide = Callable[[float, float], bool]  # of the mean and of half the width of its interval


def interval(values: pandas.Series, many: int = 1) -> tuple[float, float]:
    """Mean and half the width of a confidence interval over seeds, by Student's t; nan for one seed.

    Of `many` intervals all hold together at the level (Bonferroni).
    """
    missed = (1 - LEVEL) / many
    half = stats.sem(values) * stats.t.ppf(1 - missed / 2, len(values) - 1) if len(values) > 1 else float("nan")
    return float(values.mean()), float(half)


def shown(mean: float, half: float, form: str = ".2f") -> str:
    return f"{mean:{form}}" + (f" ± {half:.2f}" if half == half else "")


def tuned(runs: pandas.DataFrame, metric: str) -> pandas.DataFrame:
    """For each scenario, method and seed the run of the setting with the best mean of a metric over the other seeds.

    A setting chosen on the seeds that it is reported on would look better than it is. With one seed: the default beta
    and the largest learning rate.
    """
    found = []
    for _, group in runs.groupby(["scenario", "method"], sort=False):
        for seed, own in group.groupby("seed"):
            others = group[group["seed"] != seed]
            if len(own) == 1:
                found.append(own)
                continue
            if others.empty:
                best = (1.0, group["learning_rate"].max())
            else:
                best = others.groupby(SETTING)[metric].mean().idxmax()
            found.append(own[(own["beta"] == best[0]) & (own["learning_rate"] == best[1])])
    return pandas.concat(found)


def difference(runs: pandas.DataFrame, scenario: str, method: str, other: str, metric: str) -> Difference:
    """Of two of methods, START and SFT_MODEL, by seed."""
    left, right = (_by_seed(runs, scenario, name, metric) for name in (method, other))
    return Difference(f"{method} − {other}", (left - right).dropna())


def _by_seed(runs: pandas.DataFrame, scenario: str, name: str, metric: str) -> pandas.Series:
    here = runs[runs["scenario"] == (next(iter(SCENARIOS)) if name == SFT_MODEL else scenario)]
    if name in (START, SFT_MODEL):
        return here.groupby("seed")[f"start_{metric}"].first()
    return here[here["method"] == name].set_index("seed")[metric]


def above(
    claim: str, runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str
) -> Found:
    """Whether each of some methods lies above each of some others."""
    decide = (lambda mean, half: mean - half > 0), (lambda mean, half: mean + half < 0)
    return _of_methods(claim, runs, scenario, methods, others, metric, *decide)


def near(
    claim: str, runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str, room: float
) -> Found:
    """Whether each of some methods lies within `room` of each of some others."""
    decide = (lambda mean, half: abs(mean) + half < room), (lambda mean, half: abs(mean) - half > room)
    return _of_methods(claim, runs, scenario, methods, others, metric, *decide)


def _of_methods(
    claim: str, runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str,
    holds: Decide, fails: Decide,
) -> Found:  # fmt: skip
    present = {START, *runs[runs["scenario"] == scenario]["method"]}
    present |= {SFT_MODEL} if (runs["scenario"] == next(iter(SCENARIOS))).any() else set()
    missing = {*methods, *others} - present
    if missing:
        return Found(claim, NOT_RUN, ", ".join(sorted(missing)))
    found = [difference(runs, scenario, method, other, metric) for method in methods for other in others]
    return _decided(claim, f"{metric}, {scenario}", found, holds, fails)


def _decided(
    claim: str, where: str, found: list[Difference], holds: Decide, fails: Decide, some: bool = False
) -> Found:
    """All hold, or one fails, beyond its interval; with `some`, one holds or all fail."""
    seeds = min(len(of.values) for of in found)
    if seeds == 0:
        return Found(claim, NOT_RUN, where)
    intervals = [interval(of.values, len(found)) for of in found]
    held, failed = ([test(*at) for at in intervals] for test in (holds, fails))
    yes, no = (any(held), all(failed)) if some else (all(held), any(failed))
    numbers = "; ".join(f"{of.name}: {shown(*at, '+.2f')}" for of, at in zip(found, intervals, strict=True))
    verdict = ONE_SEED if seeds == 1 else HOLDS if yes else FAILS if no else NOISE
    return Found(claim, verdict, f"{where}, seeds {seeds}: {numbers}")


def claims(
    runs: pandas.DataFrame, sizes: pandas.DataFrame, families: dict[str, str], untested: str = TOO_SMALL
) -> list[Found]:
    """Of Saeidi, Verma and Baral 2024 (arXiv:2404.14723), by `tuned` runs, and by those of several set sizes.

    `families` says of each metric what it measures; of a family that has none `untested` is said.
    """
    after, without, instruct = SCENARIOS
    judged, room = FAMILIES[0], {"dialogue": 1.0, "reasoning": 0.05}
    best = lambda claim, metric: above(claim, runs, after, ["kto"], ["dpo", "ipo", "cpo"], metric)  # noqa: E731
    cases: list[tuple[str, str, Callable[[str, str], Found]]] = [
        ("After SFT, KTO is best", family, best) for family in FAMILIES
    ]
    cases += [
        ("After SFT, alignment stays below the SFT model", "multi-task knowledge", lambda claim, metric: above(
            claim, runs, after, [START], ALIGNED, metric)),
        ("Without SFT, KTO and CPO match the SFT model", judged, lambda claim, metric: near(
            claim, runs, without, ["kto", "cpo"], [SFT_MODEL], metric, room[judged])),
        ("Without SFT, DPO and IPO fall below the SFT model", judged, lambda claim, metric: above(
            claim, runs, without, [SFT_MODEL], ["dpo", "ipo"], metric)),
        ("Without SFT, KTO and CPO are above DPO and IPO", judged, lambda claim, metric: above(
            claim, runs, without, ["kto", "cpo"], ["dpo", "ipo"], metric)),
        ("After SFT, alignment gains", "mathematics", lambda claim, metric: above(
            claim, runs, after, ALIGNED, [START], metric)),
        ("After SFT, alignment gains", "truthfulness", lambda claim, metric: above(
            claim, runs, after, ALIGNED, [START], metric)),
        ("After SFT, alignment hardly changes it", "reasoning", lambda claim, metric: near(
            claim, runs, after, ALIGNED, [START], metric, room["reasoning"])),
        ("After instruction tuning, IPO leads", judged, lambda claim, metric: above(
            claim, runs, instruct, ["ipo"], ["dpo", "kto", "cpo"], metric)),
        ("After instruction tuning, CPO falls below SFT", judged, lambda claim, metric: above(
            claim, runs, instruct, ["sft"], ["cpo"], metric)),
        ("After instruction tuning, alignment gains", "truthfulness", lambda claim, metric: above(
            claim, runs, instruct, ALIGNED, [START], metric)),
        ("A smaller set does better than the largest", judged, lambda claim, metric: smaller(claim, sizes, metric)),
        ("A part of the set is as good as all of it", judged, lambda claim, metric: part(
            claim, sizes, metric, room[judged])),
    ]  # fmt: skip
    found = []
    for claim, family, test in cases:
        name, metrics = f"{claim} ({family})", [metric for metric, of in families.items() if of == family]
        for metric in metrics:
            known = metric in runs and runs[metric].notna().any()
            found.append(test(name, metric) if known else Found(name, NOT_RUN, metric))
        if not metrics:
            found.append(Found(name, untested))
    return found


def smaller(claim: str, sizes: pandas.DataFrame, metric: str) -> Found:
    """Whether one of the smaller sets does better than the largest, in the mean of the four methods."""
    counts = sorted(sizes["pairs"].unique())
    if len(counts) < 2:
        return Found(claim, NOT_RUN)
    found = [_of_sizes(sizes, count, counts[-1], metric) for count in counts[:-1]]
    decide = (lambda mean, half: mean - half > 0), (lambda mean, half: mean + half < 0)
    return _decided(claim, metric, found, *decide, some=True)


def part(claim: str, sizes: pandas.DataFrame, metric: str, room: float) -> Found:
    """Whether the largest set of at most a fifth of all is no more than `room` below, in the mean of the methods."""
    counts = sorted(sizes["pairs"].unique())
    smaller = [count for count in counts if count * 5 <= counts[-1]]
    if not smaller:
        return Found(claim, NOT_RUN)
    found = [_of_sizes(sizes, smaller[-1], counts[-1], metric)]
    decide = (lambda mean, half: mean - half > -room), (lambda mean, half: mean + half < -room)
    return _decided(claim, metric, found, *decide)


def _of_sizes(sizes: pandas.DataFrame, count: int, most: int, metric: str) -> Difference:
    aligned = sizes[sizes["method"].isin(ALIGNED)]
    by = aligned.groupby(["method", "seed", "pairs"])[metric].mean().unstack()
    return Difference(f"{count} − {most} pairs", (by[count] - by[most]).groupby("seed").mean().dropna())
