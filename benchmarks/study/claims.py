"""The claims of the paper that a table of runs can speak to, each with what was found."""

from collections.abc import Callable
from typing import NamedTuple

import pandas
from scipy import stats

from .runs import SCENARIOS

LEVEL = 0.95
ONE_SEED = "one seed tells nothing"
# what stands for a benchmark of the paper
FAMILIES = {
    "judge": "dialogue", "addition": "mathematics", "reversal": "reasoning", "maximum": "reasoning",
    "truth": "truthfulness", "recall": "multi-task knowledge",
}  # fmt: skip
SETTING = ["beta", "learning_rate"]


class Found(NamedTuple):
    claim: str
    verdict: str  # "holds here", "does not hold here", "within noise", ONE_SEED, "not run", or that it cannot be tested
    numbers: str


def interval(values: pandas.Series) -> tuple[float, float]:
    """Mean and half the width of a confidence interval over seeds, by Student's t; nan for one seed."""
    half = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) if len(values) > 1 else float("nan")
    return float(values.mean()), float(half)


def shown(mean: float, half: float, form: str = ".2f") -> str:
    return f"{mean:{form}}" + (f" ± {half:.2f}" if half == half else "")


def tuned(runs: pandas.DataFrame) -> pandas.DataFrame:
    """For each scenario, method and seed the run of the setting with the best judge over the other seeds.

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
                best = others.groupby(SETTING)["judge"].mean().idxmax()
            found.append(own[(own["beta"] == best[0]) & (own["learning_rate"] == best[1])])
    return pandas.concat(found)


def difference(runs: pandas.DataFrame, scenario: str, method: str, other: str, metric: str) -> tuple[float, float, int]:
    """Mean of the differences of two methods by seed, half of its interval, and the number of seeds.

    `other` may be "start", the model before alignment.
    """
    of = runs[runs["scenario"] == scenario].set_index(["method", "seed"])
    left = of.loc[method]
    right = left[f"start_{metric}"] if other == "start" else of.loc[other][metric]
    values = (left[metric] - right).dropna()
    return *interval(values), len(values)


def above(runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str = "judge") -> Found:
    """Whether each of some methods lies above each of some others."""
    return _found(runs, scenario, methods, others, metric, lambda mean, half: (mean - half > 0, mean + half < 0))


def near(
    runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str, room: float
) -> Found:
    """Whether each of some methods lies within `room` of each of some others."""
    return _found(
        runs, scenario, methods, others, metric,
        lambda mean, half: (abs(mean) + half < room, abs(mean) - half > room),
    )  # fmt: skip


def _found(
    runs: pandas.DataFrame, scenario: str, methods: list[str], others: list[str], metric: str,
    decide: Callable[[float, float], tuple[bool, bool]],
) -> Found:  # fmt: skip
    holds, fails, parts, seeds = [], [], [], 0
    missing = {*methods, *others} - {"start", *runs["method"]}
    if missing:
        return Found("", "not run", ", ".join(sorted(missing)))
    for method in methods:
        for other in others:
            mean, half, seeds = difference(runs, scenario, method, other, metric)
            yes, no = decide(mean, half)
            holds.append(yes)
            fails.append(no)
            parts.append(f"{method} − {other}: {shown(mean, half, '+.2f')}")
    verdict = "holds here" if all(holds) else "does not hold here" if any(fails) else "within noise"
    if seeds < 2:
        verdict = ONE_SEED
    return Found("", verdict, f"{metric}, {scenario}, seeds {seeds}: " + "; ".join(parts))


def claims(runs: pandas.DataFrame, sizes: pandas.DataFrame) -> list[Found]:
    """Of Saeidi, Verma and Baral 2024 (arXiv:2404.14723), by `tuned` runs, and by those of several set sizes."""
    after, without, tuned_before = SCENARIOS
    aligned = ["dpo", "ipo", "kto", "cpo"]
    found = [
        ("After SFT, KTO is best", above(runs, after, ["kto"], ["dpo", "ipo", "cpo"])),
        ("Without SFT, KTO and CPO match SFT on dialogue", near(runs, without, ["kto", "cpo"], ["sft"], "judge", 1.0)),
        ("Without SFT, DPO and IPO fall below SFT on dialogue", above(runs, without, ["sft"], ["dpo", "ipo"])),
        ("Without SFT, KTO and CPO are above DPO and IPO", above(runs, without, ["kto", "cpo"], ["dpo", "ipo"])),
        ("Alignment after SFT gains in mathematics", above(runs, after, aligned, ["start"], "addition")),
        ("Alignment after SFT gains in truthfulness", above(runs, after, aligned, ["start"], "truth")),
        ("Reasoning hardly changes (reversal)", near(runs, after, aligned, ["start"], "reversal", 0.05)),
        ("Reasoning hardly changes (maximum)", near(runs, after, aligned, ["start"], "maximum", 0.05)),
        ("After instruction tuning, IPO leads on dialogue", above(runs, tuned_before, ["ipo"], ["dpo", "kto", "cpo"])),
        ("After instruction tuning, CPO falls below SFT", above(runs, tuned_before, ["sft"], ["cpo"])),
        ("Small sets do best", _small_sets(sizes)),
        ("The order on 13 benchmarks and MT-Bench with 7B models", Found("", "cannot be tested at this size", "")),
    ]
    return [result._replace(claim=claim) for claim, result in found]


def _small_sets(sizes: pandas.DataFrame) -> Found:
    """The judge of the smallest set of those that were tried, less that of the largest, over methods and seeds."""
    least, most = sizes["pairs"].min(), sizes["pairs"].max()
    by = sizes.groupby(["method", "seed", "pairs"])["judge"].mean().unstack()
    mean, half = interval((by[least] - by[most]).groupby("seed").mean())
    seeds = sizes["seed"].nunique()
    verdict = "holds here" if mean - half > 0 else "does not hold here" if mean + half < 0 else "within noise"
    if seeds < 2:
        verdict = ONE_SEED
    where = f"judge, {least} − {most} pairs, mean of the methods, seeds {seeds}"
    return Found("", verdict, f"{where}: {shown(mean, half, '+.2f')}")
