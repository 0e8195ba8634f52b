"""With `--emulate`: what a kernel executes, counted in instructions of PTX, since nothing is timed here."""

import pytest
import torch

pytest.importorskip("triton")

import emulator
from alignloss.kernels import blocks, stats, sums
from alignloss.kernels.state import STATE_ROWS
from emulator.driver import gpu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulator.emulated not in ("sm_90", "sm_100"), reason="needs --emulate sm_90 or sm_100"),
]
PROGRAMS = 3


def executed(tiles, label, monkeypatch, fixed=False, cap=None):
    """Instructions of a thread of the first program, with so many tiles to each program."""
    kind, capped = emulator.emulated, cap is not None
    block_v = (blocks.exponential_blocks if fixed else blocks.gemm_blocks)(kind, 2, capped)[1]
    V, H = PROGRAMS * tiles * block_v, 64
    for module in (stats, sums):
        monkeypatch.setattr(module, "multiprocessors", lambda device: PROGRAMS)
    labels, state = torch.full((128,), label), torch.zeros(STATE_ROWS, 128)
    state[0] = -1e30
    hidden, weight = torch.randn(128, H).bfloat16(), torch.randn(V, H).bfloat16()
    if fixed:
        sums.sums_fwd(hidden, weight, labels, state, 1.0, cap)
    else:
        stats.stats_fwd(hidden, weight, None, labels, state, 1.0, cap, False, "ieee")
    launch = gpu.launches["sums_fwd_kernel" if fixed else "stats_copied_fwd_kernel"]
    return sum(len(launch.program.text.blocks[place]) for place in launch.path)


def test_a_tile_without_a_label_compares_no_entry_with_one(monkeypatch):
    """A step of the product and the statistics of 128 x 256 logits, 128 of them in each thread."""
    counts = {}
    for label in (0, -100):  # in the first tile; in none
        few, many = (executed(tiles, label, monkeypatch) for tiles in (2, 5))
        counts[label] = (few, (many - few) / 3)
    print(f"{emulator.emulated}: {counts[-100][1]:.0f} instructions a thread and tile, without a label in it")
    assert counts[0][1] == counts[-100][1] <= 1200
    # two comparisons, their conjunction and a choice for each of 128
    assert counts[0][0] - counts[-100][0] >= 3 * 128


def test_a_reference_that_is_known_saves_the_maximum(monkeypatch):
    counts = []
    for fixed in (False, True):
        few, many = (executed(tiles, -100, monkeypatch, fixed) for tiles in (2, 5))
        counts.append((many - few) / 3)
    print(f"{emulator.emulated}: {counts[1]:.0f} instructions a thread and tile, {counts[0]:.0f} with the maximum")
    assert counts[1] <= 0.85 * counts[0]


def test_a_softcap_that_bounds_logits_saves_more(monkeypatch):
    """Per 256 entries: the maximum, and what keeps tanh exact relative to a small logit."""
    counts = []
    for fixed in (False, True):
        few, many = (executed(tiles, -100, monkeypatch, fixed, 30.0) for tiles in (2, 5))
        entries = (blocks.exponential_blocks if fixed else blocks.gemm_blocks)(emulator.emulated, 2, True)[1]
        counts.append((many - few) / 3 * 256 / entries)
    print(
        f"{emulator.emulated}: {counts[1]:.0f} instructions a thread and 256 entries, {counts[0]:.0f} with the maximum"
    )
    assert counts[1] <= 0.6 * counts[0]
