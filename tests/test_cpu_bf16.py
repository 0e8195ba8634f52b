"""bf16 on a CPU: its products leave logits exact, and torch's process-wide switch comes back as it was."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from threading import Barrier, Event, Thread

import pytest
import torch
from reference import error, inputs, leaf, token_logps

import alignloss
from alignloss.ops import cpu_bf16

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has no switch to test"
)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def switch(monkeypatch):
    """The switch on any CPU, set to something that is not its default."""
    monkeypatch.setattr(cpu_bf16, "available", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield matmul
    matmul.fp32_precision = before


def test_only_bf16_on_a_cpu_uses_the_switch_and_an_error_returns_it(switch):
    with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
        assert switch.fp32_precision == "bf16"
    for dtype, device in ((torch.float32, "cpu"), (torch.float16, "cpu"), (torch.bfloat16, "cuda")):
        with cpu_bf16.bf16_products(dtype, device):
            assert switch.fp32_precision == "ieee"
    with pytest.raises(KeyError), cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
        raise KeyError
    assert switch.fp32_precision == "ieee"


def test_what_is_set_meanwhile_stays_and_what_is_inherited_stays_inherited(switch):
    with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
        switch.fp32_precision = "tf32"
    assert switch.fp32_precision == "tf32"
    parent, switch.fp32_precision = torch.backends.mkldnn, "none"
    try:
        parent.fp32_precision = "ieee"
        with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
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
        with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
            entered.wait()
        left.wait()

    thread = Thread(target=first_in_first_out)
    thread.start()
    with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
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


@pytest.mark.parametrize(
    ("capabilities", "used"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9755"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC 7763"}, False),
        ({"avx512_bf16": True, "cpu_name": None}, False),
        ({}, False),
    ],
)
def test_where_the_switch_is_used(monkeypatch, capabilities, used):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_bf16.available() is used


@pytest.mark.parametrize(
    "isa", ["AVX512_CORE_BF16", *(pytest.param(isa, marks=pytest.mark.nightly) for isa in ("AVX512_CORE", "AVX2"))]
)
def test_logits_stay_exact_with_what_onednn_has_besides_amx(isa):
    code = """
import torch
from alignloss.ops import cpu_bf16
cpu_bf16.available = lambda: True
torch.manual_seed(0)
rows, columns = torch.randn(64, 1024).bfloat16().float(), torch.randn(512, 1024).bfloat16().float()
exact = rows.double() @ columns.double().T
with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
    print(((rows @ columns.T - exact).norm() / exact.norm()).item())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) <= 1e-6


def in_a_forked_child(look):
    """What `look` returns in a child, as text; "hangs" if it does not end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(write, str(look()).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    ready = select.select([read], [], [], 60)[0]
    seen = os.read(read, 4096).decode() if ready else "hangs"
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    os.waitpid(child, 0)
    return seen


@contextmanager
def another_thread_inside():
    entered, left = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def stay():
        with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
            entered.wait()
            left.wait()

    thread = Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        left.wait()
        thread.join()


def calls(switch):
    """The switch at first, inside a call, inside one of another thread, and at the end."""
    seen = [switch.fp32_precision]
    with cpu_bf16.bf16_products(torch.bfloat16, "cpu"), cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
        seen.append(switch.fp32_precision)
    with another_thread_inside():
        seen.append(switch.fp32_precision)
    return " ".join([*seen, switch.fp32_precision])


@needs_fork
def test_a_child_forked_while_another_thread_computes_has_the_old_setting(switch):
    with another_thread_inside():
        assert in_a_forked_child(lambda: calls(switch)) == "ieee bf16 bf16 ieee"
        assert switch.fp32_precision == "bf16"
    assert switch.fp32_precision == "ieee"
    assert in_a_forked_child(lambda: calls(switch)) == "ieee bf16 bf16 ieee"
    assert calls(switch) == "ieee bf16 bf16 ieee"


@needs_fork
def test_a_child_forked_inside_a_call_ends_that_call(switch):
    def leave():
        inside = switch.fp32_precision
        stack.close()
        return f"{inside} {calls(switch)}"

    with another_thread_inside(), ExitStack() as stack:
        stack.enter_context(cpu_bf16.bf16_products(torch.bfloat16, "cpu"))
        assert in_a_forked_child(leave) == "bf16 ieee bf16 bf16 ieee"
    assert switch.fp32_precision == "ieee"


@needs_fork
def test_a_child_forked_while_another_thread_enters_or_leaves_does_not_hang(switch):
    stop = Event()

    def enter_and_leave():
        while not stop.is_set():
            with cpu_bf16.bf16_products(torch.bfloat16, "cpu"):
                pass

    thread = Thread(target=enter_and_leave)
    thread.start()
    try:
        seen = {in_a_forked_child(lambda: calls(switch)) for _ in range(30)}
    finally:
        stop.set()
        thread.join()
    assert seen == {"ieee bf16 bf16 ieee"}


@needs_fork
def test_a_child_forked_while_the_lock_is_held_does_not_hang(switch):
    held = Event()

    def hold():
        with cpu_bf16._lock:
            held.set()
            time.sleep(0.2)

    thread = Thread(target=hold)
    thread.start()
    held.wait(60)
    assert in_a_forked_child(lambda: calls(switch)) == "ieee bf16 bf16 ieee"
    thread.join()
