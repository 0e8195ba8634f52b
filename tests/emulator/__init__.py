"""A GPU in NumPy: executes the PTX that Triton makes of a kernel, on CPU tensors, and reports what is wrong with it.

Written from NVIDIA's specification, the "Parallel Thread Execution ISA", version 8.7; comments name its sections. An
instruction, modifier or operand that is not in `instructions` is refused.

    text         PTX to blocks of instructions
    arithmetic   numbers as the hardware rounds them
    memory       global and shared memory, bounds and alignment, and the shadow that finds races
    machine      warps, barriers and branches: who executes what, and in which order
    registers    operands of an instruction as functions that read and write arrays
    instructions arithmetic, loads, stores, shuffles, barriers
    asynchronous copies of global memory into shared memory, and the barriers that count them
    products     tensor cores: mma, wgmma, tcgen05
    driver       Triton's driver of this GPU

What it does not cover: what ptxas makes of the PTX (SASS), memory that is weaker than one order of all accesses, what
is faster, and cuBLAS.
"""

import torch

emulated: str | None = None  # the GPU that kernels are compiled for


def emulate(name: str) -> None:
    """Compile for this GPU and launch on it from now on, with its block sizes."""
    global emulated
    from alignloss.kernels import aot, blocks

    from alignloss import backends

    from . import driver

    emulated = name
    target, row, shared_bytes = aot.TARGETS[name]
    driver.install(target, shared_bytes)
    blocks.architecture = lambda device: row
    problem = backends._triton_problem
    # to the backend it is a GPU
    backends._triton_problem = lambda device, dtype: problem(torch.device("cuda"), dtype)
