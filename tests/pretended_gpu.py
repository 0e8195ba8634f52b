"""A pytest plugin: torch with a GPU that is not there, so that a CPU shows what fails on one before a kernel is tested.

    python -m pytest -p pretended_gpu tests/test_kernels.py

Its tensors are CPU tensors in a wrapper that names the device "cuda:0". An operator that mixes them with others raises
as on a GPU; sizes, regimes and autocast are a GPU's. Kernels run in Triton's interpreter, 16-bit products in float32.
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from alignloss.kernels import blocks
from reference import body_of, replace_kernels
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.tools.tensor_descriptor import TensorDescriptor

from alignloss import backends
from alignloss.ops import context, onepass, preference, sequence

CUDA = torch.device("cuda:0")


def pytest_addoption(parser):
    parser.addoption("--first-and-last", action="store_true", help="of the cases of each test")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-and-last"):
        cases = {}
        for item in items:
            cases.setdefault(item.function, []).append(item)
        items[:] = [item for found in cases.values() for item in dict.fromkeys((found[0], found[-1]))]


class OnGpu(torch.Tensor):
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, data):
        # to torch's own code they are meta tensors: a CUDA device needs a torch that was built for it
        shape = {"strides": data.stride(), "storage_offset": data.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, data.size(), dtype=data.dtype, device="meta", **shape)

    def __init__(self, data):
        self.on_cpu = data

    def __getitem__(self, index):
        # torch would make a list a meta tensor, without values
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index, value):
        super().__setitem__(torch.tensor(index) if isinstance(index, list) else index, value)

    def tolist(self):
        return self.on_cpu.tolist()

    def __repr__(self, **options):
        return f"OnGpu({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


mode = PretendedGpu()


def unwrapped(value):
    if isinstance(value, TensorDescriptor):
        return replace(value, base=unwrapped(value.base))
    return value.on_cpu if isinstance(value, OnGpu) else value


def wide_product(*operands, beta=1, alpha=1, out=None):
    """addmm and mm of 16-bit operands with a float32 result, which torch has for a GPU alone."""
    *base, a, b, dtype = operands
    product = alpha * (a.to(dtype) @ b.to(dtype))
    result = product + beta * base[0] if base and beta else product
    return result if out is None else out.copy_(result)


def run(function, args, kwargs):
    namespace, name = function._schema.name.split("::")
    if namespace == "alignloss":
        with mode:
            return body_of(name)(*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    wrapped = [t for t in tensors if isinstance(t, OnGpu)]
    assert len(wrapped) == sum(t.is_meta or t.is_cuda for t in tensors), "a meta tensor has no values"
    device = kwargs.get("device")
    to_gpu = bool(wrapped) if device is None else torch.device(device).type in ("cuda", "meta")
    if "device" in kwargs:
        kwargs = kwargs | {"device": device and torch.device("cpu")}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if wrapped and name not in ("copy_", "_to_copy"):
        # the indices of a GPU tensor may be on the CPU
        operands = [args[0], *kwargs.values()] if name.startswith(("index", "_index")) else tensors
        if any(isinstance(t, torch.Tensor) and t.dim() and not isinstance(t, OnGpu) for t in operands):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    owners = {id(t.on_cpu): t for t in wrapped}
    plain, options = tree_map(unwrapped, (args, kwargs))
    with _disable_current_modes():
        result = (wide_product if name in ("mm", "addmm") and "dtype" in function._overloadname else function)(
            *plain, **options
        )
    if not to_gpu:
        return result
    return tree_map(lambda t: owners.get(id(t), OnGpu(t)) if isinstance(t, torch.Tensor) else t, result)


class OnCpu:
    """A kernel in Triton's interpreter, given the CPU tensors."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            with _disable_current_modes():
                self.kernel[grid](*map(unwrapped, args), **options)

        return launch


def resolve(name, device, dtype, real=backends.resolve):
    # arithmetic in bf16 is beyond the interpreter
    return "torch" if name == "auto" and dtype == torch.bfloat16 else real(name, device, dtype)


def to(tensor, *args, real=torch.Tensor.to, **options):
    # a device without an index would be looked up
    args = [CUDA if str(arg) == "cuda" else arg for arg in args]
    if isinstance(tensor, OnGpu):
        args = [arg for arg in args if arg != CUDA]
    return real(tensor, *args, **options) if args or options else tensor


def tensor(data, *, device=None, requires_grad=False, real=torch.tensor, **options):
    made = real(data, device="cpu", **options)
    return (made if str(device) == "cpu" else OnGpu(made)).requires_grad_(requires_grad)


patch = pytest.MonkeyPatch()
for name, value in {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "_lazy_init": None,
    "current_device": 0,
    "get_device_properties": SimpleNamespace(total_memory=80 << 30, multi_processor_count=132),
}.items():
    patch.setattr(torch.cuda, name, lambda *args, value=value, **options: value)
patch.setattr(torch.Tensor, "to", to)
patch.setattr(torch, "tensor", tensor)
for module in (context, onepass, preference, sequence):
    patch.setattr(module, "device_guard", lambda tensor: nullcontext())
patch.setattr(backends, "resolve", resolve)
patch.setattr(blocks, "architecture", lambda device: "interpreter")
replace_kernels(patch, lambda module, name, kernel: OnCpu(kernel))
torch._C._set_only_lift_cpu_tensors(True)
mode.__enter__()
