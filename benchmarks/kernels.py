"""Block sizes of the Triton kernels: what a table of `alignloss.kernels.blocks` is chosen by.

The statistics of the forward are had in two ways, which are timed beside the bare GEMM: by a Triton GEMM that writes no
logits, at several block sizes, and by cuBLAS with one kernel over each tile of its result. The kernels over tiles are
timed at several block sizes beside a copy of their bytes. Whole calls are timed with tiles that are folded, and with
exponentials that a GEMM writes wherever the copy engine is: what `blocks.EXPONENTIALS` is chosen by, and
`blocks.CAPPED_EXPONENTIALS` under a softcap; a forward with sums relative to the largest logit of a tile, and to the
target's: `blocks.FIXED_REFERENCE`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from alignloss.kernels.state import STATE_ROWS

from alignloss.ops.sizes import Footprint, default_workspace, total_memory
from alignloss.ops.walk import addmm

from .cases import Case, Inputs, make_inputs
from .measure import BARE, Row, interleave, timed, timed_step
from .providers import PROVIDERS

# operand bytes -> (BLOCK_N, BLOCK_V, BLOCK_H, num_warps, num_stages) of stats_fwd_kernel
GEMM_CANDIDATES = {
    2: [
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4), (128, 128, 128, 8, 2), (64, 256, 64, 8, 4), (128, 256, 32, 8, 4),
    ],
    4: [(128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (64, 128, 32, 8, 3), (128, 64, 32, 4, 3)],
}  # fmt: skip
# warps of the kernels over a tile
TILE_CANDIDATES = [4, 8, 16, 32]
INTERPRETED = [(16, 32, 16, 1, 1)]
COPY = "copy of as many bytes"
Timed = Callable[[], float]


def measure_kernels(case: Case, rounds: int) -> list[Row]:
    """Seconds of the forward's statistics, and of each kernel over one tile, for every candidate of block sizes."""
    from alignloss.kernels import blocks, stats, sums, tile

    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    inputs = make_inputs(case)
    linear, cap = (1.0, None) if case.softcap is None else (1 / case.softcap, case.softcap)
    V, H = case.vocabulary, case.hidden
    budget = case.workspace_bytes or default_workspace(case.device, total_memory(device))
    N, columns, _ = Footprint(V, H, dtype, dtype, dtype, False, cap is not None, "cuda", "triton").forward_tile(
        case.tokens, 0, 0, budget
    )
    hidden, weight = inputs.hidden.flatten(0, 1)[:N], inputs.weight
    labels = inputs.labels.flatten()[:N].clamp(min=0)
    logits, state = torch.empty(N * columns, device=device), torch.empty(STATE_ROWS, N, device=device)

    def begin() -> None:
        state.zero_()
        state[0], state[6] = -1e30, -torch.inf

    def prepared(work: Callable[[], Any], prepare: Callable[[], Any] = begin) -> Timed:
        def run() -> float:
            prepare()
            return timed(case.device, work, queued=True)

        return run

    def gemms(wide: bool, fold: bool = False) -> None:
        for first in range(0, V, columns):
            part = weight[first : first + columns]
            tiled = (logits if wide else logits.view(dtype))[: N * len(part)].view(N, -1)
            addmm(tiled, hidden, part.T, beta=0, alpha=linear)
            if fold:
                tile.fold_fwd(tiled, None, None, state, labels, None, None, first, cap, 0, False, torch.float32)

    def fused(config: tuple[int, ...], fixed: bool = False) -> Callable[[], None]:
        def run() -> None:
            with replaced(blocks.GEMM_BLOCKS[blocks.architecture(device)], weight.element_size(), config):
                if fixed:
                    sums.sums_fwd(hidden, weight, labels, state, linear, cap)
                else:
                    stats.stats_fwd(hidden, weight, None, labels, state, linear, cap, False, "ieee")

        return run

    ways: dict[str, Timed] = {
        BARE: prepared(lambda: gemms(wide=False)),
        "GEMM to float32": prepared(lambda: gemms(wide=True)),
        "GEMM to float32, then fold": prepared(lambda: gemms(wide=True, fold=True)),
    }
    candidates = GEMM_CANDIDATES[weight.element_size()] if hidden.is_cuda else INTERPRETED
    ways |= {f"Triton GEMM {config}": prepared(fused(config)) for config in candidates}
    if (cap or 0) <= blocks.LARGEST_CAP and stats.copies(blocks.architecture(device), hidden, weight):
        what = "relative to the target" if cap is None else "relative to 0"
        relative = {f"Triton GEMM {config}, {what}": fused(config, True) for config in candidates[:2]}
        ways |= {name: prepared(work) for name, work in relative.items()}
    rows = _rows("statistics", ways, rounds, {"tflops": 2e-12 * N * V * H})

    source = torch.randn(N, columns, device=device)
    x = logits.view(N, columns)
    exps = source.exp().to(dtype)
    reference, used = torch.zeros(N, device=device), torch.ones(N, device=device)
    held = torch.empty_like(exps)
    wide, thin = source.element_size(), exps.element_size()
    kinds: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "fold, for U": (
            lambda: tile.fold_fwd(x, None, None, state, labels, None, None, 0, cap, 1, False, dtype),
            lambda: (begin(), x.copy_(source)),
            wide + thin,
        ),
        "gradient of the logits": (
            lambda: tile.dlogits_bwd(x, None, state, labels, used, None, 0, cap, dtype),
            lambda: (state.fill_(1), x.copy_(source)),
            wide + thin,
        ),
        "gradient of held logits": (
            lambda: tile.held_bwd(held, reference, state, labels, used, 0, cap),
            lambda: (state.fill_(1), held.copy_(exps)),
            2 * thin,
        ),
    }
    for kind, (work, prepare, cell) in kinds.items():
        moved = N * columns * cell
        copied = torch.empty(2, moved // 2, dtype=torch.uint8, device=device)
        ways = {COPY: prepared(lambda copied=copied: copied[0].copy_(copied[1]))}
        for warps in TILE_CANDIDATES if hidden.is_cuda else TILE_CANDIDATES[:1]:

            def run(work: Callable[[], Any] = work, warps: int = warps) -> None:
                with replaced(vars(tile), "TILE_ENTRIES", 1), replaced(vars(tile), "TILE_WARPS", warps):
                    work()

            ways[f"{warps} warps"] = prepared(run, prepare)
        rows += _rows(kind, ways, rounds, {"gigabytes_per_second": 1e-9 * moved})
    return rows + _whole_calls(case, inputs, rounds)


def _whole_calls(case: Case, inputs: Inputs, rounds: int) -> list[Row]:
    """Seconds of calls with tiles that are folded, and with exponentials that a GEMM writes where it can."""
    from alignloss.kernels import blocks

    rows: list[Row] = []
    kept, written = ("tiles folded", "exponentials by the GEMM"), "EXPONENTIALS"
    known, fixed = ("relative to the largest", "relative to the target"), "FIXED_REFERENCE"
    if case.softcap is not None:
        known, written, fixed = ("relative to the largest", "relative to 0"), *["CAPPED_EXPONENTIALS"] * 2
    for mode, products, names, switch in (
        ("forward", 1, known, fixed),
        ("frozen head", 2, kept, written),
        ("DPO step", 3, kept, written),
    ):
        step = timed_step(case, PROVIDERS["alignloss"], inputs, mode)

        def whole(
            where: tuple[str, ...], switch: str = switch, step: Callable[[], tuple[float, float]] = step
        ) -> Timed:
            def run() -> float:
                with replaced(vars(blocks), switch, where):
                    return sum(step())

            return run

        ways = dict(zip(names, (whole(()), whole(blocks.COPY_ENGINE)), strict=True))
        rows += _rows(mode, ways, rounds, {"tflops": products * 2e-12 * case.labelled * case.vocabulary * case.hidden})
    return rows


def _rows(mode: str, ways: dict[str, Timed], rounds: int, rate: dict[str, float]) -> list[Row]:
    """A row for each way, with its ratio to the first one and a rate: so much in a run, over its seconds."""
    taken, failed = interleave(ways, rounds)
    bare = taken[next(iter(ways))]
    rows: list[Row] = []
    for name, values in taken.items():
        row: Row = {"provider": name, "mode": mode}
        rows.append(row)
        if name in failed:
            row["failed"] = failed[name]
            continue
        row |= {"seconds": median(values), "of_bare": median(a / b for a, b in zip(values, bare, strict=True))}
        row |= {key: amount / median(values) for key, amount in rate.items()}
    return rows


@contextmanager
def replaced(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    kept, table[key] = table[key], value
    try:
        yield
    finally:
        table[key] = kept
