"""Host time of a call on a GPU, counted without one: Python, autograd and Triton's way to a launch.

Kernels are compiled for sm_90 and looked up by Triton as for any launch, which then does nothing; a GEMM is one of
2 x 2. N and V are those of the case divided by `SCALE`, as are the slices of the vocabulary and the chunks of TRL, so
that both take as many turns of a loop as with the whole head, and the arithmetic that PyTorch does on the CPU for
everything else takes next to nothing. A GPU's driver adds some microseconds to every launch, and what it takes to
encode the blocks that a copy engine reads.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from alignloss.modules import groups
from alignloss.ops.sizes import Footprint

from .cases import Case, Inputs, make_inputs
from .measure import Row, interleave
from .providers import PROVIDERS, Provider, backward, forward, require, trl

SCALE = 128
MODES = ("forward", "frozen head", "DPO step", "SFT step")
# the emulated driver, and the stand-ins for what a GPU does otherwise, are those of the tests
TESTS = Path(__file__).parents[1] / "tests"
# launches so far, by kernel
launches: Counter[str] = Counter()


def measure_host(case: Case, rounds: int) -> list[Row]:
    """Seconds of the host in forward and backward, interleaved, and the launches of one of our steps.

    For a process of its own: the driver of the emulated GPU stays.
    """
    launch_nothing()
    small = case._replace(
        tokens=max(case.sequences, case.tokens // SCALE // case.sequences * case.sequences),
        hidden=16, vocabulary=max(1, case.vocabulary // SCALE), device="cpu", dtype="bfloat16",
    )  # fmt: skip
    inputs = make_inputs(small)
    providers = {
        "alignloss": PROVIDERS["alignloss"],
        "TRL": Provider(lambda given: trl(given, compact=True, chunk=32768 // SCALE)),
    }
    work: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {
        (name, mode): lambda provider=provider, mode=mode: timed(provider, inputs, mode)
        for mode in MODES
        for name, provider in providers.items()
    }
    taken, failed = interleave(work, rounds)
    rows = []
    for (name, mode), values in taken.items():
        row: Row = {"provider": name, "mode": mode}
        rows.append(row)
        if (name, mode) in failed:
            row["failed"] = failed[name, mode]
            continue
        row["forward_seconds"], row["backward_seconds"] = map(statistics.median, zip(*values, strict=True))
        row["seconds"] = statistics.median(map(sum, values))
        if name == "alignloss":
            launches.clear()
            work[name, mode]()
            row |= {"calls": launches.total(), "launches": dict(launches)}
        if ("alignloss", mode) not in failed:
            both = zip(values, taken["alignloss", mode], strict=True)
            row["of_alignloss"] = statistics.median(sum(theirs) / sum(ours) for theirs, ours in both)
    return [*rows, measure_group(small, rounds)]


def measure_group(case: Case, rounds: int) -> Row:
    """A further group of a DPO step in one pass: what several take more than one, shared out among them."""
    one = case._replace(tokens=64, sequences=64, workspace_bytes=None)
    bf16, softcap = torch.bfloat16, case.softcap is not None
    footprint = Footprint(case.vocabulary, case.hidden, bf16, bf16, bf16, True, softcap, "cuda", "triton")
    several = one._replace(workspace_bytes=footprint.one_pass_bytes(16, True, footprint.held_columns(16)))
    found: list[int] = []
    real = groups.one_pass

    def noted(projection: Any, indices: Any, *rest: Any) -> Any:
        found.append(len(indices))
        return real(projection, indices, *rest)

    groups.one_pass = noted
    given = {"one": make_inputs(one), "several": make_inputs(several)}
    work = {
        name: lambda inputs=inputs: sum(timed(PROVIDERS["alignloss"], inputs, "DPO step"))
        for name, inputs in given.items()
    }
    taken, failed = interleave(work, rounds)
    groups.one_pass = real
    row: Row = {"provider": "alignloss", "mode": "DPO step, a further group"}
    if failed or max(found) == 1:
        return row | {"failed": "; ".join(failed.values()) or "the least workspace holds the whole step"}
    more = max(found) - 1
    seconds = statistics.median((b - a) / more for a, b in zip(taken["one"], taken["several"], strict=True))
    return row | {"seconds": seconds, "groups": more + 1}


def timed(provider: Provider, inputs: Inputs, mode: str) -> tuple[float, float]:
    require(inputs, mode)
    start = time.perf_counter()
    output = forward(provider, inputs, mode)
    middle = time.perf_counter()
    backward(output, inputs, mode)
    return middle - start, time.perf_counter() - middle


@cache
def launch_nothing() -> None:
    """Sizes, operands and kernels of an H100 for CPU tensors from now on; what is launched is counted by name."""
    sys.path.append(str(TESTS))
    import emulator
    import pytest
    import reference
    from alignloss.kernels import blocks
    from emulator import driver

    from alignloss import backends

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *arguments: Any) -> None:
            launches[self.name] += 1

    small = torch.zeros(2, 2)

    def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1) -> None:
        launches["GEMM"] += 1
        torch.addmm(small, small, small, beta=beta, alpha=alpha, out=small)

    driver.program_of = lambda ptx: None
    driver.Driver.launcher_cls = Launcher
    emulator.emulate("sm_90")
    patch = pytest.MonkeyPatch()
    reference.as_on_a_gpu(patch)
    reference.replace_products(patch, product)
    patch.setattr(backends, "resolve", lambda *arguments: "triton")
    blocks.SLICE, blocks.CAPPED_SLICE = blocks.SLICE // SCALE, blocks.CAPPED_SLICE // SCALE
