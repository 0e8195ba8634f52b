"""All runs of a profile, two at a time, gone on with where they were stopped; a line of `runs.csv` for each."""

import csv
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from alignloss.commands.measure import environment
from alignloss.commands.training.checkpoints import write_whole

from .runs import METHODS, SCENARIOS, Row, execute, starting_model

TABLE, STARTS = "runs.csv", "starts"


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


def run_all(profile: Profile, out: Path, processes: int = 2) -> list[dict[str, str]]:
    """Run what the table in `out` lacks; all of its lines, in the order of the profile."""
    rows = profile.rows()
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
    # one thread each; forked before torch has started any
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        seeds = sorted({row.seed for row in missing})
        for kinds in (["pretrained"], ["sft", "instruct"]):
            waited = [
                pool.submit(_make_start, kind, seed, profile.pretraining, starts) for seed in seeds for kind in kinds
            ]
            for future in as_completed(waited):
                future.result()
        futures = {pool.submit(execute, row, starts): row for row in missing}
        for number, future in enumerate(as_completed(futures), 1):
            line = {name: str(value) for name, value in (futures[future]._asdict() | future.result() | where).items()}
            known.append(line)
            _append(table, line)
            print(f"{number}/{len(missing)}  {futures[future].name}  judge {float(line['judge']):.2f}", flush=True)
    by_row = {row_of(line): line for line in known}
    return [by_row[row] for row in rows]


def _make_start(kind: str, seed: int, steps: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    starting_model(kind, seed, steps, folder)


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
