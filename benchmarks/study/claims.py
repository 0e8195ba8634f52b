"""The claims of the paper that a table of runs can speak to, each with what was found."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pandas
from scipy import stats

from .methods import SCENARIOS

LEVEL = 0.95
HOLDS, FAILS, NOISE = "holds here", "does not hold here", "within noise"
ONE_SEED, NOT_RUN, TOO_SMALL = "one seed tells nothing", "not run", "cannot be tested at this size"
SETTING = ["beta", "learning_rate"]
ALIGNED = ["dpo", "ipo", "kto", "cpo"]


class Found(NamedTuple):
    claim: str
    verdict: str
    numbers: str = ""


class Difference(NamedTuple):
    name: str  # of what is subtracted from what
    mean: float
    half: float  # the width of the confidence interval to either side
    seeds: int


Decide = Callable[[Difference], bool]


def interval(values: pandas.Series) -> tuple[float, float]:
    """Mean and half the width of a confidence interval over seeds, by Student's t; nan for one seed."""
    half = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) if len(values) > 1 else float("nan")
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
            if others.empty:
                best = (1.0, group["learning_rate"].max())
            else:
                best = others.groupby(SETTING)[metric].mean().idxmax()
            found.append(own[(own["beta"] == best[0]) & (own["learning_rate"] == best[1])])
    return pandas.concat(found)


def difference(runs: pandas.DataFrame, scenario: str, method: str, other: str, metric: str) -> Difference:
    """Of two methods by seed. `other` may be "start", the model before alignment."""
    of = runs[runs["scenario"] == scenario].set_index(["method", "seed"])
    left = of.loc[method]
    right = left[f"start_{metric}"] if other == "start" else of.loc[other][metric]
    values = (left[metric] - right).dropna()
    return Difference(f"{method} − {other}", *interval(values), len(values))


def above(
    claim: str, runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str
) -> Found:
    """Whether each of some methods lies above each of some others."""
    decide = (lambda of: of.mean - of.half > 0), (lambda of: of.mean + of.half < 0)
    return _of_methods(claim, runs, scenario, methods, others, metric, *decide)


def near(
    claim: str, runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str, room: float
) -> Found:
    """Whether each of some methods lies within `room` of each of some others."""
    decide = (lambda of: abs(of.mean) + of.half < room), (lambda of: abs(of.mean) - of.half > room)
    return _of_methods(claim, runs, scenario, methods, others, metric, *decide)


def _of_methods(
    claim: str, runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str,
    holds: Decide, fails: Decide,
) -> Found:  # fmt: skip
    missing = {*methods, *others} - {"start", *runs[runs["scenario"] == scenario]["method"]}
    if missing:
        return Found(claim, NOT_RUN, ", ".join(sorted(missing)))
    found = [difference(runs, scenario, method, other, metric) for method in methods for other in others]
    return _decided(claim, f"{metric}, {scenario}", found, holds, fails)


def _decided(claim: str, where: str, found: list[Difference], holds: Decide, fails: Decide) -> Found:
    """All hold, or one fails, beyond its interval."""
    verdict = HOLDS if all(map(holds, found)) else FAILS if any(map(fails, found)) else NOISE
    seeds = min(of.seeds for of in found)
    numbers = "; ".join(f"{of.name}: {shown(of.mean, of.half, '+.2f')}" for of in found)
    return Found(claim, verdict if seeds > 1 else ONE_SEED, f"{where}, seeds {seeds}: {numbers}")


def claims(runs: pandas.DataFrame, sizes: pandas.DataFrame, families: dict[str, str]) -> list[Found]:
    """Of Saeidi, Verma and Baral 2024 (arXiv:2404.14723), by `tuned` runs, and by those of several set sizes.

    `families` says of each metric what it measures; a claim about a family that has none cannot be tested.
    """
    after, without, instruct = SCENARIOS
    judged, room = "dialogue", {"dialogue": 1.0, "reasoning": 0.05}
    cases: list[tuple[str, str, Callable[[str, str], Found]]] = [
        ("After SFT, KTO is best", family, lambda claim, metric: above(
            claim, runs, after, ["kto"], ["dpo", "ipo", "cpo"], metric))
        for family in dict.fromkeys([judged, *families.values()])
    ]  # fmt: skip
    cases += [
        ("After SFT, SFT stays best", "multi-task knowledge", lambda claim, metric: above(
            claim, runs, after, ["sft"], ALIGNED, metric)),
        ("Without SFT, KTO and CPO match SFT", judged, lambda claim, metric: near(
            claim, runs, without, ["kto", "cpo"], ["sft"], metric, room[judged])),
        ("Without SFT, DPO and IPO fall below SFT", judged, lambda claim, metric: above(
            claim, runs, without, ["sft"], ["dpo", "ipo"], metric)),
        ("Without SFT, KTO and CPO are above DPO and IPO", judged, lambda claim, metric: above(
            claim, runs, without, ["kto", "cpo"], ["dpo", "ipo"], metric)),
        ("Alignment after SFT gains", "mathematics", lambda claim, metric: above(
            claim, runs, after, ALIGNED, ["start"], metric)),
        ("Alignment after SFT gains", "truthfulness", lambda claim, metric: above(
            claim, runs, after, ALIGNED, ["start"], metric)),
        ("Alignment after SFT hardly changes it", "reasoning", lambda claim, metric: near(
            claim, runs, after, ALIGNED, ["start"], metric, room["reasoning"])),
        ("After instruction tuning, IPO leads", judged, lambda claim, metric: above(
            claim, runs, instruct, ["ipo"], ["dpo", "kto", "cpo"], metric)),
        ("After instruction tuning, CPO falls below SFT", judged, lambda claim, metric: above(
            claim, runs, instruct, ["sft"], ["cpo"], metric)),
        ("After instruction tuning, alignment gains", "truthfulness", lambda claim, metric: above(
            claim, runs, instruct, ALIGNED, ["start"], metric)),
        ("Small sets do best", judged, lambda claim, metric: small_sets(claim, sizes, metric)),
        ("A tenth of the pairs is as good", judged, lambda claim, metric: tenth(claim, sizes, metric, room[judged])),
    ]  # fmt: skip
    found = []
    for claim, family, test in cases:
        metrics = [metric for metric, of in families.items() if of == family and metric in runs]
        found += [test(f"{claim} ({family})", metric) for metric in metrics]
        if not metrics:
            found.append(Found(f"{claim} ({family})", TOO_SMALL))
    return found


def small_sets(claim: str, sizes: pandas.DataFrame, metric: str) -> Found:
    """The smallest set of those that were tried, less the largest, over methods."""
    counts = sorted(sizes["pairs"].unique())
    if len(counts) < 2:
        return Found(claim, NOT_RUN)
    found = [_of_sizes(sizes, counts[0], counts[-1], metric)]
    return _decided(claim, metric, found, lambda of: of.mean - of.half > 0, lambda of: of.mean + of.half < 0)


def tenth(claim: str, sizes: pandas.DataFrame, metric: str, room: float) -> Found:
    """A tenth of the largest set, less that, over methods: no more than `room` below."""
    most = sizes["pairs"].max()
    if most / 10 not in set(sizes["pairs"]):
        return Found(claim, NOT_RUN)
    found = [_of_sizes(sizes, most // 10, most, metric)]
    return _decided(claim, metric, found, lambda of: of.mean - of.half > -room, lambda of: of.mean + of.half < -room)


def _of_sizes(sizes: pandas.DataFrame, count: int, other: int, metric: str) -> Difference:
    by = sizes.groupby(["method", "seed", "pairs"])[metric].mean().unstack()
    values: Iterable[float] = (by[count] - by[other]).groupby("seed").mean()
    return Difference(f"{count} − {other} pairs, mean of the methods", *interval(values), len(values))
