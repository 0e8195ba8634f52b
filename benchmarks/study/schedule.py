"""All runs of a profile, gone on with where they were stopped; a line of `runs.csv` for each."""

import csv
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from alignloss.commands.measure import environment
from alignloss.commands.training.checkpoints import write_whole

from . import runs, sentiment
from .methods import METHODS, SCENARIOS, Row

TABLE, STARTS = "runs.csv", "starts"
WORLDS: dict[str, ModuleType] = {"generated": runs, "sentiment": sentiment}


class Profile(NamedTuple):
    """What is swept. Every method gets every beta and every learning rate, in every scenario, with the same seeds."""

    seeds: int
    methods: tuple[str, ...]
    betas: tuple[float, ...]  # times the default of a method
    learning_rates: tuple[float, ...]
    pairs: int
    sizes: tuple[int, ...]  # of the data set, at the default beta and the middle learning rate, after SFT
    steps: int = 250
    batch: int = 32
    pretraining: int = 1800
    world: str = "generated"  # of WORLDS
    processes: int = 2  # of the machine's cores

    def rows(self) -> list[Row]:
        found = [
            Row(scenario, method, seed, self.pairs, beta, rate, self.steps, self.batch, self.pretraining)
            for seed in range(self.seeds)
            for scenario in SCENARIOS
            for method in self.methods
            for beta in (self.betas if method != "sft" else (1.0,))  # SFT has none
            for rate in self.learning_rates
        ]
        rate = self.learning_rates[len(self.learning_rates) // 2]
        found += [
            Row("after SFT", method, seed, pairs, 1.0, rate, self.steps, self.batch, self.pretraining)
            for seed in range(self.seeds)
            for method in self.methods
            for pairs in self.sizes
        ]
        return list(dict.fromkeys(found))


PROFILES = {
    "tiny": Profile(1, ("sft", "dpo", "kto"), (1.0,), (1e-3,), 32, (16,), steps=6, batch=8, pretraining=60),
    "quick": Profile(1, tuple(METHODS), (1.0,), (3e-4,), 300, (30,)),
    "sentiment": Profile(
        1, ("sft", "dpo", "ipo", "kto", "cpo"), (0.3, 1.0, 3.0), (2e-5,), 64, (), 24, 8, 12, "sentiment", processes=1
    ),
    "full": Profile(5, tuple(METHODS), (0.3, 1.0, 3.0), (1e-4, 3e-4, 1e-3), 300, (30, 1000, 3000)),
}


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole lines of a table; one that was cut off is left out."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if None not in line.values() and None not in line]


def row_of(line: dict[str, str]) -> Row:
    """The run that a line of the table is of."""
    kinds = Row.__annotations__
    return Row(**{name: kinds[name](line[name]) for name in Row._fields})


def run_all(profile: Profile, out: Path, processes: int | None = None) -> list[dict[str, str]]:
    """Run what the table in `out` lacks; all of its lines, in the order of the profile."""
    rows, processes = profile.rows(), processes or profile.processes
    out.mkdir(parents=True, exist_ok=True)
    table, starts = out / TABLE, out / STARTS
    known = read_table(table)
    if known:
        write_whole(table, _text(known, header=True))  # without a line that was cut off
    else:
        table.unlink(missing_ok=True)
    done = {row_of(line) for line in known}
    missing = [row for row in rows if row not in done]
    here = environment("torch", "transformers")
    where = {**here["versions"], "device": here["device"], "commit": here["commit"]}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    # a forked process would hang in the threads that torch has started here
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        of_start = {(SCENARIOS[row.scenario], row.seed): row for row in missing}
        for first in (True, False):  # the pretrained models before those that are made of them
            kinds = [row for (kind, _), row in of_start.items() if (kind == "pretrained") is first]
            for made in as_completed([pool.submit(_prepare, profile.world, row, starts) for row in kinds]):
                made.result()
        futures = {pool.submit(_execute, profile.world, row, starts): row for row in missing}
        for number, future in enumerate(as_completed(futures), 1):
            row, found = futures[future], future.result()
            line = {name: str(value) for name, value in {**row._asdict(), **found, **where}.items()}
            known.append(line)
            _append(table, line)
            score = found.get("judge", found.get("reward"))
            print(f"{number}/{len(missing)}  {row.name}  {score:.2f}", flush=True)
    by_row = {row_of(line): line for line in known}
    return [by_row[row] for row in rows]


def _prepare(world: str, row: Row, folder: Path) -> None:
    WORLDS[world].prepare(row, folder)


def _execute(world: str, row: Row, folder: Path) -> dict[str, Any]:
    return WORLDS[world].execute(row, folder)


def _append(path: Path, line: dict[str, str]) -> None:
    text = _text([line], header=not path.exists())
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(text)


def _text(lines: list[dict[str, str]], header: bool) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(lines[0]))
    if header:
        writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
