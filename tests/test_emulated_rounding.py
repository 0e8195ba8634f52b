"""With `--emulate`: kernels are as exact where hardware rounds as badly as it may, and where engines work at once."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import emulator
from alignloss.kernels import stats, tile
from alignloss.kernels.state import STATE_ROWS
from emulator import arithmetic
from emulator.driver import gpu
from reference import error, inputs, state_of_targets

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulator.emulated is None, reason="needs --emulate"),
]


@pytest.fixture(params=[True, False], ids=["late", "at once"])
def _rough(request, monkeypatch):
    """Approximate instructions err by as much as their specification allows, tensor cores truncate."""
    monkeypatch.setattr(arithmetic, "rough", np.random.default_rng(0))
    monkeypatch.setattr(gpu.settings, "late", request.param)


@pytest.mark.usefixtures("_rough")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_exponentials_within_the_tolerance_of_the_others(dtype):
    hidden, weight, _, labels = inputs(40, vocabulary=300, hidden_size=264, dtype=dtype, masked=0.0)
    x = hidden.double() @ weight.double().T
    rest = x.scatter(1, labels[:, None], -torch.inf)

    state = state_of_targets(hidden, weight, labels)
    stats.stats_fwd(hidden, weight, None, labels, state, 1.0, None, False, "ieee")
    assert error(state[1], (rest - state[0, :, None].double()).exp().sum(1)) <= 2e-5
    assert error(state[2], x.gather(1, labels[:, None]).squeeze(1)) <= 2e-5
    state = torch.zeros(STATE_ROWS, 40)
    state[0], state[6] = -1e30, -torch.inf
    e, _ = tile.fold_fwd(x.float(), None, None, state, labels, None, None, 0, None, 1, False, torch.float32)
    exact = (rest - state[0, :, None].double()).exp()
    assert error(e, exact) <= 2e-6 and error(state[1], exact.sum(1)) <= 2e-6
