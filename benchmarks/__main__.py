"""Measure time, memory and error of alignloss beside full logits and its peers; print, record and plot.

python -m benchmarks run --shapes smollm2-135m --tokens 1024 2048 --masked 0 0.5
python -m benchmarks plot benchmarks/results/NAME.json
"""

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from alignloss.fit import MODELS

from .cases import Case, case
from .measure import available, measure_error, measure_memory, measure_step, measure_time, peaks
from .providers import MODES, PROVIDERS
from .report import merge, plot, record, show

MEASURES = ("time", "memory", "error", "step")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure every combination of the cases named")
    run.add_argument("--shapes", nargs="+", default=["1024x32768"], help="models, or HxV")
    run.add_argument("--tokens", nargs="+", type=int, default=[2048], help="positions, of 4 pairs")
    run.add_argument("--vocabulary", nargs="+", type=int, default=[None], help="in place of the shape's own")
    run.add_argument("--masked", nargs="+", type=float, default=[0.0], help="fraction of positions without a label")
    run.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    run.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    run.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    run.add_argument("--measure", nargs="+", default=["time", "memory", "error"], choices=MEASURES)
    run.add_argument("--rounds", type=int, default=7, help="of the interleaved timing, after one that warms up")
    run.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    run.add_argument("--name", default="latest", help="of the file in it")
    drawing = commands.add_parser("plot", help="draw time and memory of a file that varies tokens or vocabulary")
    drawing.add_argument("files", nargs="+", type=Path)
    commands.add_parser("peaks").add_argument("what", type=json.loads)  # memory's fresh process
    arguments = parser.parse_args()
    if arguments.command == "run":
        measure(arguments)
    elif arguments.command == "plot":
        for path in arguments.files:
            if not plot(path):
                print(f"{path}: nothing to draw, neither tokens nor vocabulary vary")
    else:
        described, provider, modes = arguments.what
        print(json.dumps(peaks(Case(*described), provider, modes)))


def measure(arguments: argparse.Namespace) -> None:
    results: list[tuple[Case, list[dict[str, Any]]]] = []
    runs: dict[bool, list[tuple[str, str]]] = {}  # with a softcap or without
    path = arguments.out / f"{arguments.name}.json"
    command = "python -m benchmarks " + shlex.join(sys.argv[1:])
    cases = [
        case(shape, vocabulary, tokens=tokens, masked=masked, dtype=arguments.dtype, device=arguments.device)
        for shape, vocabulary, tokens, masked in product(
            arguments.shapes, arguments.vocabulary, arguments.tokens, arguments.masked
        )
    ]
    check(arguments)
    for chosen in cases:
        softcap = chosen.softcap is not None
        if softcap not in runs:
            runs[softcap] = available(chosen, arguments.providers, arguments.modes)
        pairs = runs[softcap]
        rows = merge(
            measure_time(chosen, pairs, arguments.rounds) if "time" in arguments.measure else [],
            measure_memory(chosen, pairs) if "memory" in arguments.measure else [],
            measure_error(chosen, pairs) if "error" in arguments.measure else [],
            measure_step(chosen, [name for name, mode in pairs if mode == "DPO step"], arguments.rounds)
            if "step" in arguments.measure
            else [],
        )
        if not rows:
            print(f"{chosen}: nothing of this was to be measured, or ran")
            continue
        show(chosen, rows)
        results.append((chosen, rows))
        record(path, command, results)  # after each case: a run that is cut short keeps what it has
    if results:
        plot(path)


def check(arguments: argparse.Namespace) -> None:
    """Refuse at the start what would fail after minutes of measuring."""
    if arguments.rounds < 1:
        raise SystemExit(f"rounds are at least 1; got {arguments.rounds}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; leave out --device cuda")
    if "step" in arguments.measure:
        unknown = [shape for shape in arguments.shapes if shape not in MODELS]
        if unknown or arguments.vocabulary != [None]:
            raise SystemExit(f"a whole step needs shapes of models, out of {', '.join(MODELS)}; got {unknown}")
        if find_spec("transformers") is None:
            raise SystemExit("a whole step needs transformers, which is not installed")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out is the folder of the results: {error}") from None


if __name__ == "__main__":
    main()
