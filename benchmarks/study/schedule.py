"""All runs of a profile, gone on with where they were stopped; a line of `runs.csv` for each."""

import csv
import io
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from alignloss.commands.measure import environment
from alignloss.commands.training.checkpoints import write_whole

from . import generated, sentiment
from .methods import METHODS, SCENARIOS, Row, Run, objective

TABLE = "runs.csv"
# columns of a table that say where a line has come about, and all that are no numbers
WHERE = ("device", "alignloss", "torch", "transformers", "trl", "peft", "lm_eval", "commit")
WORDS = ("scenario", "method", "made_of", *WHERE)
# each has `data_of`, `judged`, FAMILIES, ABOUT, THREADS and whether each method's own OBJECTIVE is measured
WORLDS: dict[str, ModuleType] = {"generated": generated, "sentiment": sentiment}


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
    "tiny": Profile(
        1, ("sft", "dpo", "kto", "rso", "spin", "rlhf"), (1.0,), (1e-3,), 32, (16,), steps=6, batch=8, pretraining=60
    ),
    # a learning rate at which 250 steps suffice without SFT; it is too high for some methods after SFT
    "quick": Profile(1, tuple(METHODS), (1.0,), (1e-3,), 300, (30, 3000)),
    "sentiment": Profile(
        1, ("sft", "dpo", "ipo", "kto", "cpo"), (0.3, 1.0, 3.0), (5e-5,), 48, (), 12, 4, 12, "sentiment", processes=1
    ),
    "full": Profile(5, tuple(METHODS), (0.3, 1.0, 3.0), (1e-4, 3e-4, 1e-3), 300, (30, 1000, 3000)),
}


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a table; a last one that was cut off is left out.

    Raises:
        SystemExit: for what this study has not written: other cells than columns, no number where one belongs, two
            lines of one run that differ.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if not set(Row._fields) <= set(reader.fieldnames or ()):
        return list(reader)  # of something else
    found: dict[Row, dict[str, str]] = {}
    for line in reader:
        fault = _fault(line)
        if fault is None and found.setdefault(row_of(line), line) != line:
            fault = "another line of the same run says otherwise"
        if fault is not None:
            raise SystemExit(f"{path}, line {reader.line_num}: {fault}; mend it, or give another --out")
    return list(found.values())


def _fault(line: dict[str, str]) -> str | None:
    if None in line or None in line.values():
        return "it has other cells than the table has columns"
    for name, value in line.items():
        if name not in WORDS:
            try:
                (int if Row.__annotations__.get(name) is int else float)(value)
            except ValueError:
                return f"{name} is {value!r}, not a number"
    return None


def row_of(line: dict[str, str]) -> Row:
    """The run that a line of the table is of."""
    kinds = Row.__annotations__
    return Row(**{name: kinds[name](line[name]) for name in Row._fields})


def execute(world: str, row: Row, folder: Path) -> dict[str, Any]:
    """Train and judge; the metrics, with those of the start under `start_`.

    Equal rows give equal results in every bit, by the same versions on the same CPU, in the generated world.
    """
    begun, module = time.perf_counter(), WORLDS[world]
    torch.set_num_threads(module.THREADS or torch.get_num_threads())
    data = module.data_of(row, folder)
    run = Run(row, data)
    METHODS[row.method](run)
    unaligned = row._replace(method="", beta=0.0, learning_rate=0.0, steps=0, batch=0)
    found, start = module.judged(run.model, data, row), {**_start_judged(world, unaligned, folder)}
    if module.OBJECTIVE:
        found["objective"], start["objective"] = (objective(model, data, row) for model in (run.model, data.start))
    more = {f"start_{name}": value for name, value in start.items()}
    return {**found, **more, "seconds": time.perf_counter() - begun}


@cache
def _start_judged(world: str, unaligned: Row, folder: Path) -> dict[str, float]:
    data = WORLDS[world].data_of(unaligned, folder)
    return WORLDS[world].judged(data.start, data, unaligned)


def prepare(world: str, row: Row, folder: Path) -> None:
    """Make the start of a row, and what its data are made of, where they are not in the folder yet."""
    torch.set_num_threads(WORLDS[world].THREADS or torch.get_num_threads())
    WORLDS[world].data_of(row, folder)


def run_all(profile: Profile, out: Path, processes: int | None = None) -> tuple[list[dict[str, str]], list[str]]:
    """Run what the table in `out` lacks; its lines, in the order of the profile, and what failed.

    Raises:
        SystemExit: for a table of something else, or lines that another commit or other versions have written.
    """
    rows, processes = profile.rows(), profile.processes if processes is None else processes
    table = out / TABLE
    known = read_table(table)
    here = environment("torch", "transformers")
    where = {**here["versions"], "device": here["device"], "commit": here["commit"]}
    if known and not set(Row._fields) | set(where) <= set(known[0]):
        raise SystemExit(f"{table} is a table of something else: give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{out} cannot be made: {error}") from None
    done = {row_of(line) for line in known}
    missing = [row for row in rows if row not in done]
    if missing:
        others = [line for line in known if any(line[name] != str(value) for name, value in where.items())]
        if others:
            was = {name: others[0][name] for name in where}
            raise SystemExit(f"{table} has lines of {was}, this is {where}: go on there, or give another --out")
        write_whole(table, _text(known, header=True) if known else "")  # without a line that was cut off
    failures = []
    starts = out / f"starts-{here['commit']}"
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    # a forked process would hang in the threads that torch has started here
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            of_start = {(SCENARIOS[row.scenario], row.seed): row for row in missing}
            for first in (True, False):  # the pretrained models before those that are made of them
                kinds = [row for (kind, _), row in of_start.items() if (kind == "pretrained") is first]
                for made in as_completed([pool.submit(prepare, profile.world, row, starts) for row in kinds]):
                    made.result()
            futures = {pool.submit(execute, profile.world, row, starts): row for row in missing}
            for number, future in enumerate(as_completed(futures), 1):
                row = futures[future]
                if error := future.exception():
                    failures.append(f"{row.name}: {type(error).__name__}: {error}")
                    print(f"{number}/{len(missing)}  {failures[-1]}", flush=True)
                    continue
                line = {name: str(value) for name, value in {**row._asdict(), **future.result(), **where}.items()}
                if known and list(line) != list(known[0]):
                    raise SystemExit(f"{table} has other columns than this profile: give another --out")
                _append(table, line, header=not known)
                known.append(line)
                score = line[next(iter(WORLDS[profile.world].FAMILIES))]
                print(f"{number}/{len(missing)}  {row.name}  {float(score):.2f}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    by_row = {row_of(line): line for line in known}
    return [by_row[row] for row in rows if row in by_row], failures


def _append(path: Path, line: dict[str, str], header: bool) -> None:
    with open(path, "a", newline="", encoding="utf-8") as file:
        file.write(_text([line], header))


def _text(lines: list[dict[str, str]], header: bool) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(lines[0]))
    if header:
        writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
