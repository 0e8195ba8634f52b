"""Host time of a call on a GPU, counted without one: Python, autograd and Triton's way to a launch.

Kernels are compiled for sm_90 and looked up by Triton as for any launch, which then does nothing; a GEMM is one of
2 x 2. N and V are those of the case divided by `SCALE`, as are the slices of the vocabulary and the chunks of TRL, so
that both take as many turns of a loop as with the whole head, and the arithmetic that PyTorch does on the CPU for
everything else takes next to nothing. A GPU's driver adds some microseconds to every launch, and what it takes to
encode the blocks that a copy engine reads.
"""

import statistics
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch

from alignloss.modules import groups
from alignloss.ops.sizes import Footprint

from .cases import Case, make_inputs
from .measure import Row, interleave, row_of, timed_step
from .providers import PROVIDERS, Provider, trl

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
    work = {
        (name, mode): timed_step(small, provider, inputs, mode)
        for mode in MODES
        for name, provider in providers.items()
    }
    taken, failed = interleave(work, rounds)
    rows = []
    for name, mode in work:
        row = row_of(name, mode, taken, failed)
        rows.append(row)
        if name == "alignloss" and "failed" not in row:
            launches.clear()
            work[name, mode]()
            row |= {"calls": launches.total(), "launches": dict(launches)}
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
    work = {
        name: timed_step(chosen, PROVIDERS["alignloss"], make_inputs(chosen), "DPO step")
        for name, chosen in (("one", one), ("several", several))
    }
    taken, failed = interleave(work, rounds)
    groups.one_pass = real
    row: Row = {"provider": "alignloss", "mode": "DPO step, a further group"}
    if failed or max(found) == 1:
        return row | {"failed": "; ".join(failed.values()) or "the least workspace holds the whole step"}
    more = max(found) - 1
    both = zip(taken["one"], taken["several"], strict=True)
    seconds = statistics.median((sum(several) - sum(one)) / more for one, several in both)
    return row | {"seconds": seconds, "groups": more + 1}


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
    from alignloss.modules import preference
    from alignloss.ops import head, sequence

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
    for module in (preference, head, sequence):  # values are looked at where they are on a CPU
        patch.setattr(module, "validates", lambda asked, device: bool(asked))
    for name in ("SLICE", "CAPPED_SLICE"):
        patch.setattr(blocks, name, getattr(blocks, name) // SCALE)
