"""Tests run on a GPU where there is one, else in Triton's interpreter; torch.empty is poisoned with NaN.

With `--emulate sm_90` (sm_80, sm_86, sm_89, sm_90, sm_100, sm_120) the tests marked `emulated` run on kernels that are
compiled for that GPU and whose PTX is executed on the CPU (`emulator`); they fail if that finds a race or an access out
of bounds. `emulated("forward", "reverse")` runs a test once in each of these orders of warps.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    torch.set_default_device("cuda")

torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_addoption(parser):
    parser.addoption("--emulate", choices=[f"sm_{n}" for n in (80, 86, 89, 90, 100, 120)])


def pytest_configure(config):
    # before triton is imported
    if config.getoption("--emulate"):
        from emulator import emulate

        emulate(config.getoption("--emulate"))
    elif not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("emulated")
    if metafunc.config.getoption("--emulate") and mark and mark.args:
        metafunc.fixturenames.append("order_of_warps")
        metafunc.parametrize("order_of_warps", mark.args, indirect=True)


@pytest.fixture
def order_of_warps(request):
    from emulator.driver import gpu

    gpu.settings.order = request.param
    yield
    gpu.settings.order = "together"


@pytest.hookimpl(tryfirst=True)  # before `-m` looks
def pytest_collection_modifyitems(config, items):
    for item in items:
        mark = item.get_closest_marker("nightly_where")
        if mark and mark.args[0](**item.callspec.params):
            item.add_marker(pytest.mark.nightly)
    if config.getoption("--emulate"):
        chosen = [item for item in items if item.get_closest_marker("emulated")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _poisoned_memory_and_seed():
    """torch.empty returns NaN, so an output that nobody writes cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_findings(request):
    """With `--emulate`: no launch of the test races, or reads what nothing wrote."""
    if request.config.getoption("--emulate") is None:
        yield
        return
    from emulator.driver import gpu

    gpu.clear()
    yield
    if gpu.findings:
        pytest.fail(gpu.report())
