"""Time, memory and error of the providers on one case."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import alignloss
from alignloss.commands.measure import peak_bytes
from alignloss.ops import cpu_bf16
from alignloss.ops.sizes import gemm_dtype
from alignloss.planning import Plan

from .cases import Case, Inputs, make_inputs
from .providers import (
    GEMMS,
    MODES,
    PROVIDERS,
    Provider,
    backward,
    dpo_of,
    forward,
    logps_of_logits,
    require,
    sft_of,
    step,
)

BARE = "bare GEMMs"
LINEAR = "F.linear"
Row = dict[str, Any]
K, T = TypeVar("K"), TypeVar("T")


def available(case: Case, names: list[str], modes: list[str]) -> list[tuple[str, str]]:
    """(provider, mode) of what runs here, found out on a small problem; what does not is a line that says why."""
    found = []
    for name in names:
        try:
            for mode in PROVIDERS[name].modes():
                if mode in modes:
                    step(PROVIDERS[name], make_inputs(case.small), mode)
                    found.append((name, mode))
        except ImportError as error:
            print(f"{name} is left out: {error}")
        except Exception as error:  # whatever a peer does not support here
            print(f"{name} does not run here: {reason(error)}")
    return found


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def planned(case: Case, mode: str) -> Plan:
    """What alignloss runs in a mode."""
    train_hidden, train_head = MODES[mode]
    units = {"DPO step": 2, "SFT step": 1}  # sequences that stay together
    return alignloss.plan(
        case.labelled,
        case.hidden,
        case.vocabulary,
        train_hidden=train_hidden,
        train_head=train_head,
        pair_tokens=-(-units[mode] * case.labelled // case.sequences) if mode in units else None,
        positions=case.tokens,
        softcap=case.softcap,
        dtype=getattr(torch, case.dtype),
        device=case.device,
        workspace_bytes=case.workspace_bytes,
    )


def bare_gemms(case: Case, inputs: Inputs, mode: str) -> Callable[[], None]:
    """The matrix products of alignloss's regime alone, on its tiles, into preallocated outputs."""
    expected, dtype = planned(case, mode), getattr(torch, case.dtype)
    wide = gemm_dtype(dtype, case.device)
    hidden = inputs.hidden.detach().flatten(0, 1)[: case.labelled].to(wide)
    weight = inputs.weight.detach().to(wide)
    passes = [(1, expected.gemms > 1, expected.regime == 3)]  # logits, U, dweight
    if expected.regime == 4:
        passes.append((1, False, True))
    tiles = expected.tiles[: len(passes)]
    tile = weight.new_empty(max(rows * columns for rows, columns in tiles))
    u = weight.new_empty(max(rows for rows, _ in tiles), case.hidden)
    dweight = weight.new_empty(max(columns for _, columns in tiles), case.hidden)

    @cpu_bf16.bf16_products(dtype, case.device)
    def run() -> None:
        for (block, columns), (logits, derivative, head_gradient) in zip(tiles, passes, strict=True):
            for start in range(0, case.labelled, block):
                rows = hidden[start : start + block]
                for first in range(0, case.vocabulary, columns):
                    part = weight[first : first + columns]
                    out = tile[: len(rows) * len(part)].view(len(rows), len(part))
                    if logits:
                        torch.mm(rows, part.T, out=out)
                    if derivative:
                        torch.mm(out, part, out=u[: len(rows)])
                    if head_gradient:
                        torch.mm(out.T, rows, out=dweight[: len(part)])

    return run


def linear_gemms(case: Case, inputs: Inputs, mode: str) -> Callable[[], None]:
    """F.linear of every labelled row, and its backward: the products as PyTorch makes them for logits that are kept."""
    wanted = MODES[mode]
    leaves = [
        t.detach().requires_grad_(need)
        for t, need in zip((inputs.hidden.flatten(0, 1)[: case.labelled], inputs.weight), wanted, strict=True)
    ]

    def run() -> None:
        logits = torch.nn.functional.linear(*leaves)
        if any(wanted):
            torch.autograd.grad(logits, [leaf for leaf in leaves if leaf.requires_grad], logits.detach())

    return run


def measure_time(case: Case, pairs: list[tuple[str, str]], rounds: int) -> list[Row]:
    """Seconds of forward and backward, interleaved, the medians over rounds; ratios are of one round each.

    A step begins with an idle device, and does not wait for it between forward and backward.
    """
    inputs = make_inputs(case)
    work: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {}
    for mode in dict.fromkeys(mode for _, mode in pairs):
        # those of a mode one after the other: a ratio is of neighbours in time
        for name, gemms in ((BARE, bare_gemms(case, inputs, mode)), (LINEAR, linear_gemms(case, inputs, mode))):
            work[name, mode] = lambda gemms=gemms: (timed(case.device, gemms), 0.0)
        for name in (name for name, its_mode in pairs if its_mode == mode):
            work[name, mode] = timed_step(case, PROVIDERS[name], inputs, mode)
    seconds, failed = interleave(work, rounds)
    copied = copy_bandwidth(case.device)
    rows = []
    for name, mode in seconds:
        row = row_of(name, mode, seconds, failed)
        rows.append(row)
        if "failed" in row:
            continue
        useful = GEMMS[mode] * 2 * case.labelled * case.vocabulary * case.hidden
        row |= {
            "of_bare_gemms": ratio(seconds[name, mode], seconds[BARE, mode]),
            "bare_gemms": planned(case, mode).gemms,
            "tflops_gemms": GEMMS[mode],
            "tflops": useful / row["seconds"] * 1e-12,
        }
        if name == BARE:
            row["copy_bytes_per_second"] = copied
    return rows


Timings = dict[tuple[str, str], list[tuple[float, float]]]


def row_of(name: str, mode: str, seconds: Timings, failed: dict[tuple[str, str], str]) -> Row:
    """The medians of one provider's forwards and backwards in a mode, and their ratio to ours; or why it failed."""
    row: Row = {"provider": name, "mode": mode}
    if (name, mode) in failed:
        return row | {"failed": failed[name, mode]}
    values = seconds[name, mode]
    both = [sum(pair) for pair in values]
    row |= {
        "forward_seconds": statistics.median(pair[0] for pair in values),
        "backward_seconds": statistics.median(pair[1] for pair in values),
        "seconds": statistics.median(both),
        "seconds_spread": [min(both), max(both)],
    }
    ours = ("alignloss", mode)
    return row | ({"of_alignloss": ratio(values, seconds[ours])} if ours in seconds and ours not in failed else {})


def ratio(pairs: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Of each round, its median: what disturbs a round disturbs both of its terms."""
    return statistics.median(sum(a) / sum(b) for a, b in zip(pairs, others, strict=True))


def interleave(work: dict[K, Callable[[], T]], rounds: int) -> tuple[dict[K, list[T]], dict[K, str]]:
    """What each piece of work returns in every round but a first one that warms up; and why some failed."""
    taken: dict[K, list[T]] = {key: [] for key in work}
    failed: dict[K, str] = {}
    for i in range(rounds + 1):
        for key, run in work.items():
            if key in failed:
                continue
            try:
                found = run()
            except Exception as error:  # a peer that runs out of memory, or of whatever else, at this size
                failed[key] = reason(error)
                continue
            if i:
                taken[key].append(found)
    return taken, failed


def mark(device: str) -> Any:
    """A point in time, on a GPU of the work that it was given so far."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) * 1e-3


def timed(device: str, work: Callable[[], Any], queued: bool = False) -> float:
    """Seconds of some work and of everything that it has a device do.

    Of the device alone, where all of it is `queued` before the device begins: that holds for what takes the host less
    than some milliseconds.
    """
    synchronize(device)
    if queued and device == "cuda":
        torch.cuda._sleep(10_000_000)
    start = mark(device)
    work()
    end = mark(device)
    synchronize(device)
    return seconds_between(start, end)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source, target = torch.ones(2, 64 << 20, device=device)
    taken, _ = interleave({"copy": lambda: timed(device, lambda: target.copy_(source), queued=True)}, 5)
    return 2 * source.nbytes / statistics.median(taken["copy"])


def timed_step(case: Case, provider: Provider, inputs: Inputs, mode: str) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        require(inputs, mode)
        # pages of the gradients, just used and freed, for every provider, whatever ran before it: the first touch of a
        # page that a virtual machine had handed back costs more than to compute what goes there
        _ = [torch.zeros_like(t).add_(1) for t in (inputs.hidden, inputs.weight) if t.requires_grad]
        del _
        synchronize(case.device)
        start = mark(case.device)
        output = forward(provider, inputs, mode)
        middle = mark(case.device)
        backward(output, inputs, mode)
        end = mark(case.device)
        synchronize(case.device)
        return seconds_between(start, middle), seconds_between(middle, end)

    return run


def measure_profile(case: Case, pairs: list[tuple[str, str]], most: int = 12) -> list[Row]:
    """The kernels (on a CPU, operators) that take the most of a step, with their calls and seconds."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops
    inputs = make_inputs(case)
    kind = ProfilerActivity.CUDA if case.device == "cuda" else ProfilerActivity.CPU
    rows: list[Row] = []
    for name, mode in pairs:
        step(PROVIDERS[name], inputs, mode)
        with profile(activities=[kind], acc_events=True) as recorded:
            step(PROVIDERS[name], inputs, mode)
            synchronize(case.device)
        events = [
            (event.self_device_time_total if case.device == "cuda" else event.self_cpu_time_total, event)
            for event in recorded.key_averages()
        ]
        total = sum(taken for taken, _ in events) or 1
        for taken, event in sorted(events, key=lambda pair: -pair[0])[:most]:
            row = {"provider": name, "mode": mode, "kernel": event.key, "calls": event.count}
            rows.append(row | {"seconds": taken * 1e-6, "share": taken / total})
    return rows


def measure_memory(case: Case, pairs: list[tuple[str, str]]) -> list[Row]:
    """Peak bytes of a step, split into inputs, gradients and workspace; each provider in a fresh process."""
    return _in_fresh_processes("peaks", case, pairs)


def measure_longest(case: Case, pairs: list[tuple[str, str]], memory: int, most: int) -> list[Row]:
    """The most tokens whose step fits `memory` bytes, up to `most`; each provider in a fresh process."""
    return _in_fresh_processes("longest", case, pairs, memory, most)


def _in_fresh_processes(what: str, case: Case, pairs: list[tuple[str, str]], *options: int) -> list[Row]:
    """What `peaks` or `longest` finds for each provider."""
    rows = []
    if case.device == "cuda":  # which this process may hold for itself
        gc.collect()
        torch.cuda.empty_cache()
    for name in dict.fromkeys(name for name, _ in pairs):
        modes = [mode for provider, mode in pairs if provider == name]
        command = [sys.executable, "-m", "benchmarks", "alone", json.dumps([what, case, name, modes, *options])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows += [{"provider": name, "mode": mode, "failed": last_line(done.stderr)} for mode in modes]
        else:
            rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def alone(what: str, case: list[Any], name: str, modes: list[str], *options: int) -> list[Row]:
    """What a fresh process of `_in_fresh_processes` runs."""
    return {"peaks": peaks, "longest": longest}[what](Case(*case), name, modes, *options)


def peaks(case: Case, name: str, modes: list[str]) -> list[Row]:
    """The memory of one provider, in this process."""
    inputs, small = make_inputs(case), make_inputs(case.small)
    provider = PROVIDERS[name]
    rows = []
    for mode in modes:
        step(provider, small, mode)  # libraries and threads, outside of the count
        row: Row = {"provider": name, "mode": mode, "input_bytes": _given(inputs)}
        rows.append(row)
        try:
            require(inputs, mode)
            if case.device == "cpu":
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
                before = _status("VmRSS")
                step(provider, inputs, mode)
                resident = _status("VmHWM") - before
            else:
                step(provider, inputs, mode)
            gradients = sum(t.grad.nbytes for t in (inputs.hidden, inputs.weight) if t.grad is not None)
            inputs.hidden.grad = inputs.weight.grad = None
            row |= {
                "gradient_bytes": gradients,
                "workspace_bytes": peak_bytes(lambda mode=mode: step(provider, inputs, mode)) - gradients,
            }
            if case.device == "cpu":
                row["resident_workspace_bytes"] = resident - gradients
        except Exception as error:
            row["failed"] = reason(error)
        inputs.hidden.grad = inputs.weight.grad = None
    return rows


def longest(case: Case, name: str, modes: list[str], memory: int, most: int) -> list[Row]:
    """The most tokens of one provider, in this process."""
    provider = PROVIDERS[name]
    rows = []
    for mode in modes:
        step(provider, make_inputs(case.small), mode)  # libraries and threads, outside of the count
        row: Row = {"provider": name, "mode": mode, "memory_bytes": memory}

        def needed(tokens: int, mode: str = mode) -> int:
            inputs = make_inputs(case._replace(tokens=tokens))
            return _given(inputs) + peak_bytes(lambda: step(provider, inputs, mode))

        row["most_tokens"], row["stopped_by"] = search(needed, memory, case.tokens, most, case.sequences)
        rows.append(row)
    return rows


def search(
    needed: Callable[[int], int], memory: int, start: int, most: int, multiple: int, closing: int = 3
) -> tuple[int, str]:
    """The largest size that needs at most `memory` bytes, and what stopped a larger one.

    Sizes double from `start` up to `most`, and then close in on the last that ran in `closing` steps, as multiples.
    """
    low, high, stopped = 0, start, ""

    def fits(size: int) -> bool:
        nonlocal stopped
        try:
            found = needed(size)
        except Exception as error:  # out of memory, or whatever else happens at this size
            stopped = f"{size:,}: {reason(error)}"
            return False
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if found > memory:
            stopped = f"{size:,}: {found / 2**30:.3g} GiB"
        return found <= memory

    while high <= most and fits(high):
        low, high = high, 2 * high
    for _ in range(closing if stopped else 0):
        middle = (low + high) // 2 // multiple * multiple
        if low < middle and fits(middle):
            low = middle
        else:
            high = middle
    return low, stopped or f"the most that was tried, {most:,}"


def _given(inputs: Inputs) -> int:
    return sum(tensor.nbytes for tensor in inputs if isinstance(tensor, Tensor))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_error(case: Case, pairs: list[tuple[str, str]]) -> list[Row]:
    """Errors against full logits in float64: of log-probabilities in nats, of gradients relative to their norm."""
    inputs = make_inputs(case)
    logps, *gradients = exact(inputs, inputs.upstream.double())
    truths = {"trainable head": gradients}
    for mode, loss in (("DPO step", dpo_of), ("SFT step", sft_of)):
        if any(mode == of for _, of in pairs):
            leaf = logps.clone().requires_grad_()
            (upstream,) = torch.autograd.grad(loss(leaf, inputs), leaf)
            truths[mode] = exact(inputs, upstream)[1:]
    rows = []
    for name, mode in pairs:
        if mode == "frozen head":
            continue
        row: Row = {"provider": name, "mode": mode}
        rows.append(row)
        require(inputs, mode)
        try:
            output = forward(PROVIDERS[name], inputs, mode)
            backward(output, inputs, mode)
        except Exception as error:
            row["failed"] = reason(error)
            continue
        if mode == "forward":
            wrong = (output.double() - logps)[inputs.labels.flatten() != -100]
            row |= {"logps_error_rms": wrong.square().mean().sqrt().item(), "logps_error_max": wrong.abs().max().item()}
            continue
        for which, tensor, truth in zip(
            ("dhidden", "dweight"), (inputs.hidden, inputs.weight), truths[mode], strict=True
        ):
            assert tensor.grad is not None
            row[f"{which}_error"] = ((tensor.grad.double() - truth).norm() / truth.norm()).item()
    require(inputs, "forward")
    return rows


def exact(inputs: Inputs, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logps (M,), dhidden, dweight) through full logits in float64, some tokens at a time."""
    hidden, labels = inputs.hidden.detach().flatten(0, 1).double(), inputs.labels.flatten()
    weight = inputs.weight.detach().double().requires_grad_()
    logps, dhidden = [], []
    for rows, targets, slopes in zip(hidden.split(512), labels.split(512), upstream.split(512), strict=True):
        rows = rows.clone().requires_grad_()
        part = logps_of_logits(rows, weight, targets, inputs.softcap)
        part.backward(slopes)
        logps.append(part.detach())
        dhidden.append(rows.grad)
    assert weight.grad is not None
    return torch.cat(logps), torch.cat(dhidden).view(inputs.hidden.shape), weight.grad
