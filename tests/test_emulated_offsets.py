"""With `--emulate`: entries past the first 2^31 of a tensor. Of a launch the last program alone runs, without shadows.

The tensors take memory where they are touched only.
"""

import pytest
import torch

pytest.importorskip("triton")

import emulator
from alignloss.kernels import blocks, kl, rows, stats, tile
from alignloss.kernels.state import STATE_ROWS
from emulator.driver import gpu
from reference import state_of_targets

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.nightly,
    pytest.mark.skipif(emulator.emulated is None, reason="needs --emulate"),
]
ROWS, COLUMNS = 16_800, 128_256
LAST = ROWS - 1


@pytest.fixture(autouse=True)
def _untouched_memory_and_no_shadows(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(gpu.settings, "shadows", False)
    yield
    gpu.only.clear()


def last_row_of(rows, columns, dtype=torch.float32):
    """A tensor of which the last row has values."""
    assert rows * columns > 1 << 31
    made = torch.empty(rows, columns, dtype=dtype)
    made[-1] = torch.randn(columns)
    return made, made[-1].double()


def test_a_tile_of_logits():
    t, x = last_row_of(ROWS, COLUMNS)
    labels, state = torch.full((ROWS,), 77), torch.zeros(STATE_ROWS, ROWS)
    state[0], state[6] = -1e30, -torch.inf
    gpu.only |= {"fold_fwd_kernel": {LAST}, "dlogits_bwd_kernel": {LAST}}
    block = blocks.SLICE  # a program holds no more of a row
    narrow = t[:, :block]
    out, _ = tile.fold_fwd(narrow, None, None, state, labels, None, None, 0, None, 1, False, torch.float32)
    m = float(state[0, LAST])
    exact = (x[:block] - m).exp()
    exact[77] = 0
    torch.testing.assert_close(out[LAST].double(), exact, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(state[1, LAST].double(), exact.sum(), rtol=1e-6, atol=0)
    assert float(state[2, LAST]) == pytest.approx(float(x[77]), rel=1e-7)
    t[-1] = x.float()
    d = tile.dlogits_bwd(narrow, None, state, labels, torch.ones(ROWS), None, 0, None, torch.float32)
    exact = -exact / exact.sum()
    exact[77] = 1
    torch.testing.assert_close(d[LAST].double(), exact, rtol=1e-5, atol=1e-12)


def test_two_tiles():
    (t, x), (t_ref, x_ref) = last_row_of(ROWS, COLUMNS), last_row_of(ROWS, COLUMNS)
    state = torch.zeros(5, ROWS)
    state[[0, 2]] = -1e30
    gpu.only |= {"kl_fwd_kernel": {LAST}}
    kl.kl_fwd(t, t_ref, None, None, state, None)
    for place, z in ((0, x), (2, x_ref)):
        top, total = state[place : place + 2, LAST].double()
        assert float(top + total.log()) == pytest.approx(float(z.logsumexp(0)), rel=1e-6)


def test_rows_of_hidden_states():
    count, width = 560_000, 4096
    hidden, x = last_row_of(count, width, torch.bfloat16)
    out, state = torch.empty(count, width, dtype=torch.bfloat16), torch.empty(STATE_ROWS, count)
    labels, index = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    row_labels = torch.empty(count, dtype=torch.int64)
    gpu.only |= {"gather_fwd_kernel": {count - 1}}
    rows.gather_fwd(hidden, labels, index, out, row_labels, state, -100, torch.bfloat16)
    assert torch.equal(out[-1].double(), x) and int(row_labels[-1]) == 0


@pytest.mark.skipif(emulator.emulated in ("sm_90", "sm_100"), reason="each program there takes a third of the tiles")
def test_rows_of_a_head():
    V, H, N = 560_000, 4096, 16
    weight, _ = last_row_of(V, H, torch.bfloat16)
    block_v = stats.gemm_blocks(stats.blocks.architecture(torch.device("cpu")), 2, False)[1]
    tiles = -(-V // block_v)
    weight[-block_v:] = torch.randn(block_v, H) / 64
    hidden, labels = torch.randn(N, H).bfloat16(), torch.full((N,), V - 3)
    state = state_of_targets(hidden, weight, labels)
    gpu.only |= {"stats_fwd_kernel": {tiles - 1}}
    real = torch.empty

    def kept(*shape, **options):
        made = real(*shape, **options)
        if made.dim() == 3:
            made[0], made[1:] = -torch.inf, 0  # the partial maxima and sums of the tiles that do not run
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", kept)
        stats.stats_fwd(hidden, weight, None, labels, state, 1.0, None, False, "ieee")
    first = (tiles - 1) * block_v
    x = hidden.double() @ weight[first:].double().T
    rest = x.clone()
    rest[:, V - 3 - first] = -torch.inf
    torch.testing.assert_close(state[0].double(), rest.amax(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(state[2].double(), x[:, V - 3 - first], rtol=1e-5, atol=1e-5)
