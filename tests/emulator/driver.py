"""Triton's driver of this GPU: after `install`, `kernel[grid](cpu_tensors)` compiles for it and runs on it."""

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.tools.tensor_descriptor import TensorDescriptor

from . import asynchronous, plain, products
from .asynchronous import TensorMap
from .machine import Finding, Launch, Program, Settings
from .memory import Region
from .text import PTXError, parse
from .translation import translate

assert plain and asynchronous and products  # their instructions are in the table now
_FORMATS = {"f32": "<f", "f64": "<d"}
_programs: dict[str, Program] = {}


@dataclass
class Gpu:
    """What is installed; tests read and change it."""

    settings: Settings = field(default_factory=Settings)
    findings: Counter[Finding] = field(default_factory=Counter)
    details: dict[Finding, str] = field(default_factory=dict)
    target: GPUTarget | None = None
    shared_bytes: int = 0  # of a block, at most
    only: dict[str, set[int]] = field(default_factory=dict)  # kernel -> the blocks of its grid that run; absent: all
    change: Callable[[str], str] | None = None  # of the PTX, before it runs
    launches: dict[str, Launch] = field(default_factory=dict)  # kernel -> its last one

    def clear(self) -> None:
        for found in (self.findings, self.details, self.launches):
            found.clear()

    def report(self) -> str:
        return "\n".join(
            f"{f.kernel}: {f.kind} at {f.source}{f' and {f.other}' if f.other else ''}, {n} times, {self.details[f]}"
            for f, n in self.findings.most_common()
        )


gpu = Gpu()


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the byte behind its last row, whose padding belongs to it."""
    spans = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    entries = sum(spans) + 1
    if tensor.dim() > 1:
        entries = max(entries, tensor.shape[0] * tensor.stride(0))
    storage, first = tensor.untyped_storage(), tensor.data_ptr()
    return first, min(first + entries * tensor.element_size(), storage.data_ptr() + storage.nbytes())


def regions(tensors: dict[str, torch.Tensor]) -> list[Region]:
    """Where they lie; those that share memory as one."""
    spans = sorted((*extent(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    found: list[Region] = []
    for first, end, name in spans:
        if found and first < found[-1].first + found[-1].size:
            before = found.pop()
            end = max(end, before.first + before.size)
            found.append(Region(f"{before.name}, {name}", before.first, end - before.first))
        else:
            found.append(Region(name, first, end - first))
    return found


def _raw(value: Any, type_: str) -> bytes:
    if type_ in _FORMATS:
        return struct.pack(_FORMATS[type_], value)
    size = int(type_[1:]) // 8
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


# of a tensor map: bytes that a swizzle spans, by its number
_SWIZZLES = {1: 32, 2: 64, 3: 128}


def _tensor_map(given: TensorDescriptor, metadata: dict[str, Any]) -> TensorMap:
    size, (rows, columns) = metadata["elem_size"], given.shape
    if given.padding != "zero" or metadata["fp4_padded"] or given.strides[1] != 1:
        raise PTXError(f"a tensor map of {given}")
    return TensorMap(
        given.base.data_ptr(), size, rows, columns, given.strides[0] * size, tuple(metadata["block_size"]),
        _SWIZZLES[metadata["swizzle"]],
    )  # fmt: skip


class Launcher:
    def __init__(self, source: Any, metadata: Any):
        self.names = [name for name, type_ in source.signature.items() if type_ != "constexpr"]
        self.places = [i for i, type_ in enumerate(source.signature.values()) if type_ != "constexpr"]
        self.metadata = metadata

    def __call__(self, x, y, z, stream, program, packed, launch_metadata, enter, leave, *arguments) -> None:
        if gpu.change is not None:
            program = program_of(gpu.change(program.text.ptx))
        given = {name: arguments[place] for name, place in zip(self.names, self.places, strict=True)}
        tensors, maps, values = {}, {}, []
        described = iter(self.metadata.tensordesc_meta or ())
        for name, value in given.items():
            if isinstance(value, TensorDescriptor):
                maps[program.text.parameters[len(values)].name] = _tensor_map(value, next(described))
                values += [0, *value.shape, *value.strides]
                tensors[name] = value.base
            elif isinstance(value, torch.Tensor):
                values.append(value.data_ptr())
                tensors[name] = value
            else:
                values.append(0 if value is None else value)
        parameters = program.text.parameters
        values += [0] * (len(parameters) - len(values))  # scratch memory, of which our kernels ask for none
        raw = {p.name: _raw(value, p.type) for p, value in zip(parameters, values, strict=True)}
        launch = Launch(program, raw, regions(tensors), self.metadata.shared, gpu.settings)
        launch.tensor_maps = maps
        gpu.launches[program.text.name] = launch
        launch.run((x, y, z), gpu.only.get(program.text.name))
        gpu.findings += launch.findings
        for finding, detail in launch.details.items():
            gpu.details.setdefault(finding, detail)


class Utils:
    pending: Program

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": gpu.shared_bytes, "multiprocessor_count": 3, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple:
        return self, Utils.pending, 0, 0, 1024


class Driver(DriverBase):
    launcher_cls = Launcher
    utils = Utils()

    def __init__(self):
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_current_target(self) -> GPUTarget:
        assert gpu.target is not None
        return gpu.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> None:
        return None


def program_of(ptx: str) -> Program:
    if ptx not in _programs:
        _programs[ptx] = translate(parse(ptx))
    return _programs[ptx]


def install(target: GPUTarget, shared_bytes: int) -> None:
    real = triton.compiler.CompiledKernel._init_handles

    def init_handles(kernel: Any) -> None:
        if kernel.module is None:
            Utils.pending = program_of(kernel.asm["ptx"])
        real(kernel)

    gpu.target, gpu.shared_bytes = target, shared_bytes
    triton.compiler.CompiledKernel._init_handles = init_handles
    triton.runtime.driver.set_active(Driver())
