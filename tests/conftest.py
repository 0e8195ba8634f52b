"""Tests run on a GPU where there is one, else in Triton's interpreter; torch.empty is poisoned with NaN."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    torch.set_default_device("cuda")
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
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
