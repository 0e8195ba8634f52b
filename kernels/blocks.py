"""The one table of block sizes: per architecture, fixed, so that results never depend on a timing.

Shared memory bounds the GEMM tile: 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120, and
64 KB of LDS on gfx942. A tile of 128 x 256 needs 8 warps (4 spill). On a GPU only the 16-bit tile of
sm_90 and the warps of the kernels over tiles were compared with others (docs/gpu.md).
"""

from functools import cache
from typing import Any

import torch

# architecture -> operand bytes -> (BLOCK_N, BLOCK_V, BLOCK_H, num_warps, num_stages) of stats_fwd_kernel
GEMM_BLOCKS = {
    "sm_90": {2: (128, 256, 64, 8, 3), 4: (128, 128, 32, 8, 3)},
    "sm_100": {2: (128, 256, 64, 8, 3), 4: (128, 128, 32, 8, 3)},
    "sm_80": {2: (128, 128, 64, 8, 3), 4: (128, 128, 32, 8, 3)},
    "small": {2: (128, 128, 32, 8, 3), 4: (64, 128, 32, 8, 2)},
    "gfx942": {2: (128, 128, 64, 8, 2), 4: (64, 128, 32, 8, 2)},
    "interpreter": {2: (16, 32, 16, 1, 1), 4: (16, 32, 16, 1, 1)},
}
# with an engine that copies blocks of 16-bit operands while the tensor cores multiply others; and the interpreter
COPY_ENGINE = ("sm_90", "sm_100", "interpreter")
# where a GEMM writes exponentials: measured on sm_90 (docs/gpu.md); compiled and emulated for sm_100 as well
EXPONENTIALS = ("sm_90",)
# where a forward without derivatives sums exponentials relative to the target's logit, in bf16 too: nowhere before a
# GPU has measured it (docs/gpu.md); compiled and emulated for sm_90 and sm_100
FIXED_REFERENCE: tuple[str, ...] = ()
# where GEMMs take them under a softcap, with or without derivatives, in bf16: nowhere before a GPU has measured it;
# compiled and emulated for sm_90 and sm_100
CAPPED_EXPONENTIALS: tuple[str, ...] = ()
# the largest bound of logits, in nats, for that: exp(-60) and 2^20 exp(60) are far inside fp32
LARGEST_CAP = 60.0
# of the kernels that repair them, where those of the GEMM spill registers
REPAIR_STAGES = {"sm_90": 2, "sm_100": 1}
# with a softcap or further statistics in the epilogue, wider tiles spill
FULL_EPILOGUE_BLOCK_V = 128
# of every launch: products and sums fuse, by default up to Triton 3.9
OPTIONS = {"enable_fp_fusion": True}
COMBINE_BLOCK_N, COMBINE_BLOCK_T = 16, 64
# vocabulary entries of a slice on a GPU, at most: a program holds a row of its tile in registers, three an entry where
# there is a softcap; at least, where the workspace allows: each slice of a forward reads and writes U
SLICE, CAPPED_SLICE = 16384, 8192
# of such a program: entries per warp, and the most warps
TILE_ENTRIES, TILE_WARPS = 512, 16
# one program per row of two tiles, block by block, of 1,024 threads: so few rows are under way that their second read
# finds them in L2
KL_BLOCK, KL_WARPS = 4096, 16 if torch.version.hip else 32
# entries that the rows of a tile of logits are a multiple of on a GPU: cuBLAS has kernels for aligned rows, and ours
# reach memory 16 bytes at a time
PITCH = 64
# one program per row of H
WIDTH_BLOCK, ROW_WARPS = 1024, 4
SEQUENCE_BLOCK = 512
# a few for each multiprocessor: where nothing is to be done, as many launches of nothing
SCALE_PROGRAMS = 1024


# triton's own, which kernels may call as well, take three microseconds of the host
def cdiv(count: int, size: int) -> int:
    """How many blocks of a size it takes."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least one that is no smaller than a count >= 1."""
    return 1 << (count - 1).bit_length()


def architecture(device: torch.device) -> str:
    """The key of `GEMM_BLOCKS` for a device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    known = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    properties = gpu_properties(device)
    return known.get((properties.major, properties.minor), "small")


def gpu_properties(device: torch.device) -> Any:
    """torch's, of a GPU or the current one: kept, since a call asks several times and torch takes 5 microseconds."""
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def reached(tensor: torch.Tensor) -> bool:
    """Whether the copy engine, of an architecture that has one, reaches the blocks of a matrix: 16 bytes at a time."""
    size, (pitch, step) = tensor.element_size(), tensor.stride()
    return tensor.data_ptr() % 16 == 0 and pitch * size % 16 == 0 and pitch >= tensor.shape[1] and step == 1


def gemm_blocks(architecture: str, itemsize: int, full_epilogue: bool) -> tuple[int, int, int, int, int]:
    """(BLOCK_N, BLOCK_V, BLOCK_H, num_warps, num_stages); full_epilogue: softcap or statistics beyond the log-sum."""
    block_n, block_v, *rest = GEMM_BLOCKS[architecture][itemsize]
    return (block_n, min(block_v, FULL_EPILOGUE_BLOCK_V) if full_epilogue else block_v, *rest)  # type: ignore[return-value]


def exponential_blocks(architecture: str, itemsize: int, capped: bool) -> tuple[int, int, int, int, int]:
    """The same of the GEMMs that take exponentials; capped: under a softcap, where sm_100 has no registers for more."""
    return gemm_blocks(architecture, itemsize, capped and architecture == "sm_100")


def exponential_fields(capped: bool) -> int:
    """Numbers of each row and tile beside exponentials or their sums: under a softcap nothing is repaired."""
    return 1 if capped else 3


def partial_bytes_per_row(
    architecture: str, itemsize: int, vocabulary: int, capped: bool, known: bool, extras: bool = False
) -> int:
    """Bytes of partial statistics that a forward's GEMM writes for one row.

    known: sums_fwd_kernel, to which the reference of a row is known; otherwise stats_fwd_kernel.
    """
    fields = exponential_fields(capped) if known else 5 if extras else 2
    block_v = (exponential_blocks if known else gemm_blocks)(architecture, itemsize, capped or extras)[1]
    return 4 * fields * cdiv(vocabulary, block_v)


def takes_cap(architecture: str, cap: float | None) -> bool:
    """Whether GEMMs take exponentials under this softcap of the logits."""
    return cap is not None and cap <= LARGEST_CAP and architecture in CAPPED_EXPONENTIALS
