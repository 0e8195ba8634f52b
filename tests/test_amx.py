"""bf16 on a CPU: its matrix units leave logits exact, and torch's process-wide switch comes back as it was."""

from threading import Barrier, Thread

import pytest
import torch
from reference import error, inputs, leaf, token_logps

import alignloss
from alignloss import amx

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has no switch to test"
)


@pytest.fixture
def switch(monkeypatch):
    """The switch on any CPU, set to something that is not its default."""
    monkeypatch.setattr(amx, "available", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield matmul
    matmul.fp32_precision = before


def test_only_bf16_on_a_cpu_uses_the_switch_and_an_error_returns_it(switch):
    with amx.bf16_products(torch.bfloat16, "cpu"):
        assert switch.fp32_precision == "bf16"
    for dtype, device in ((torch.float32, "cpu"), (torch.float16, "cpu"), (torch.bfloat16, "cuda")):
        with amx.bf16_products(dtype, device):
            assert switch.fp32_precision == "ieee"
    with pytest.raises(KeyError), amx.bf16_products(torch.bfloat16, "cpu"):
        raise KeyError
    assert switch.fp32_precision == "ieee"


def test_what_is_set_meanwhile_stays_and_what_is_inherited_stays_inherited(switch):
    with amx.bf16_products(torch.bfloat16, "cpu"):
        switch.fp32_precision = "tf32"
    assert switch.fp32_precision == "tf32"
    parent, switch.fp32_precision = torch.backends.mkldnn, "none"
    try:
        parent.fp32_precision = "ieee"
        with amx.bf16_products(torch.bfloat16, "cpu"):
            assert switch.fp32_precision == "bf16"
        parent.fp32_precision = "tf32"
        assert switch.fp32_precision == "tf32"
    finally:
        parent.fp32_precision = "none"


def test_a_loss_function_runs_beside_the_switch(switch):
    seen = []

    def watching(logps):
        seen.append(switch.fp32_precision)
        return -logps, logps.detach()

    hidden, weight, _, labels = inputs(4, 6, dtype=torch.bfloat16)
    module = alignloss.PreferenceLoss(watching)
    module(leaf(hidden, torch.bfloat16), leaf(weight, torch.bfloat16), labels).loss.backward()
    assert seen == ["ieee"]


def test_the_last_of_several_threads_returns_the_switch(switch):
    entered, left = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def first_in_first_out():
        with amx.bf16_products(torch.bfloat16, "cpu"):
            entered.wait()
        left.wait()

    thread = Thread(target=first_in_first_out)
    thread.start()
    with amx.bf16_products(torch.bfloat16, "cpu"):
        entered.wait()
        left.wait()
        assert switch.fp32_precision == "bf16"
    thread.join()
    assert switch.fp32_precision == "ieee"


def test_logits_of_bf16_operands_are_exact_and_nothing_stays_switched():
    before = torch.backends.mkldnn.matmul.fp32_precision
    hidden, weight, _, labels = inputs(4, 64, hidden_size=256, vocabulary=4096, dtype=torch.bfloat16)
    exact = token_logps(hidden.double(), weight.double(), labels)
    hidden, weight = leaf(hidden, torch.bfloat16), leaf(weight, torch.bfloat16)
    for module in (alignloss.SFTLoss(), alignloss.SFTLoss(workspace_bytes=1 << 18)):  # one pass; recomputed
        out = module(hidden, weight, labels)
        out.loss.backward()
        assert error(out.logps, exact.sum(1)) <= 1e-6
    assert torch.backends.mkldnn.matmul.fp32_precision == before
