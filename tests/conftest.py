"""Tests run Triton kernels in its interpreter unless a GPU is there; memory from torch.empty is poisoned with NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _poisoned_memory_and_seed():
    """torch.empty returns NaN, so an output that nobody writes cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
