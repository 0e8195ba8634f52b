"""Measure, print and record.

python -m benchmarks time    time per step, interleaved, as ratios to the bare GEMMs of the same process
python -m benchmarks memory  peak memory of a step above its inputs and gradients, each in a fresh process
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from alignloss.measure import environment, peak_bytes
from alignloss.ops import default_workspace, tile_shape

from .providers import GEMMS, MODES, PROVIDERS, inputs, step

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    for name, tokens, hidden_size, vocabulary in (("time", 2048, 1024, 32768), ("memory", 4096, 576, 49152)):
        command = commands.add_parser(name)
        command.add_argument("--tokens", type=int, default=tokens)
        command.add_argument("--hidden", type=int, default=hidden_size)
        command.add_argument("--vocabulary", type=int, default=vocabulary)
        command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
        command.add_argument("--out", type=Path, default=RESULTS)
    commands.choices["time"].add_argument("--rounds", type=int, default=7)
    commands.choices["memory"].add_argument("--one", nargs=2, metavar=("PROVIDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for command in [arguments.command] if arguments.command else ["time", "memory"]:
        chosen = arguments if arguments.command else parser.parse_args([command])
        (measure_time if command == "time" else measure_memory)(chosen)


def measure_time(arguments: argparse.Namespace) -> None:
    hidden, weight, labels = inputs(
        arguments.tokens, arguments.hidden, arguments.vocabulary, getattr(torch, arguments.dtype)
    )
    upstream = torch.randn(arguments.tokens)
    work = {("GEMMs", mode): bare_gemms(hidden, weight, mode) for mode in MODES}
    for name, provider in available().items():
        for mode in MODES:
            work[name, mode] = lambda p=provider, m=mode: step(p, hidden, weight, labels, upstream, m)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for i in range(arguments.rounds + 1):
        for key, run in work.items():
            start = time.perf_counter()
            run()
            if i:  # the first round warms up
                seconds[key].append(time.perf_counter() - start)
    rows = []
    for (name, mode), values in seconds.items():
        # a ratio per round: what disturbs a round disturbs both of its terms
        ratios = [v / g for v, g in zip(values, seconds["GEMMs", mode], strict=True)]
        row = {
            "provider": name,
            "mode": mode,
            "seconds": statistics.median(values),
            "seconds_spread": [min(values), max(values)],
            "of_bare_gemms": statistics.median(ratios),
            "bare_gemms": GEMMS[mode],
        }
        rows.append(row)
        print(f"{mode:15} {name:12} {row['seconds']:7.3f} s  {row['of_bare_gemms']:5.2f} x its {GEMMS[mode]} GEMMs")
    record("time", arguments, rows)


def bare_gemms(hidden: torch.Tensor, weight: torch.Tensor, mode: str):
    """The matrix products of alignloss's regime alone, on its tiles, in float32 on a CPU, into preallocated outputs."""
    hidden, weight = hidden.detach().float(), weight.detach().float()
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    block, columns = tile_shape(tokens, vocabulary, 8 * width, 0, 4, default_workspace(hidden.device), hidden.device)
    tile, u, dw = torch.empty(block * columns), torch.zeros(block, width), torch.empty(columns, width)

    def run() -> None:
        for start in range(0, tokens, block):
            rows = hidden[start : start + block]
            for first in range(0, vocabulary, columns):
                part = weight[first : first + columns]
                out = tile[: len(rows) * len(part)].view(len(rows), len(part))
                torch.mm(rows, part.T, out=out)
                if GEMMS[mode] > 1:
                    u[: len(rows)].addmm_(out, part)
                if GEMMS[mode] > 3:
                    torch.mm(rows, part.T, out=out)
                if GEMMS[mode] > 2:
                    torch.mm(out.T, rows, out=dw[: len(part)])

    return run


def measure_memory(arguments: argparse.Namespace) -> None:
    shape = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "hidden", "vocabulary", "dtype")]
    if arguments.one:
        print(json.dumps(one_peak(arguments, *arguments.one)))
        return
    rows = []
    for mode in MODES:
        for name in available():
            command = [sys.executable, "-m", "benchmarks", "memory", *shape, "--one", name, mode]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"provider": name, "mode": mode} | json.loads(printed.splitlines()[-1]))
            resident, allocated = (rows[-1][key] / MIB for key in ("resident_bytes", "allocated_bytes"))
            print(f"{mode:15} {name:12} {resident:8.0f} MiB resident, {allocated:8.0f} MiB in tensors")
    record("memory", arguments, rows)


def one_peak(arguments: argparse.Namespace, name: str, mode: str) -> dict[str, int]:
    """Peak bytes of one step above inputs and required gradients: of the process, and of the tensor allocator."""
    hidden, weight, labels = inputs(
        arguments.tokens, arguments.hidden, arguments.vocabulary, getattr(torch, arguments.dtype)
    )
    upstream = torch.randn(arguments.tokens)
    small = inputs(64, 16, 128, torch.float32)
    step(PROVIDERS[name], *small, torch.randn(64), mode)  # libraries and threads, outside of the count
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step(PROVIDERS[name], hidden, weight, labels, upstream, mode)
    gradients = sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None)
    resident = _status("VmHWM") - before - gradients
    hidden.grad = weight.grad = None
    allocated = peak_bytes(lambda: step(PROVIDERS[name], hidden, weight, labels, upstream, mode)) - gradients
    return {"resident_bytes": resident, "allocated_bytes": allocated}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def available() -> dict:
    """The providers that can run; a missing peer is a line that says so."""
    found = {}
    for name, provider in PROVIDERS.items():
        try:
            provider(*inputs(4, 8, 16, torch.float32))
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            found[name] = provider
    return found


def record(kind: str, arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Write the rows with device, versions and commit."""
    shape = {name: getattr(arguments, name) for name in ("tokens", "hidden", "vocabulary", "dtype")}
    document = {
        "command": f"python -m benchmarks {kind} " + " ".join(f"--{k} {v}" for k, v in shape.items()),
        **environment("alignloss", "torch", "triton", "trl"),
        "shape": shape,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{kind}-cpu-{shape['dtype']}-{shape['tokens']}x{shape['hidden']}x{shape['vocabulary']}.json"
    (arguments.out / name).write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.out / name}")


if __name__ == "__main__":
    main()
