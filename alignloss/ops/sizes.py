"""The sizes of a call's buffers and tiles, which the ops and `alignloss.plan` both take from here.

Notation: N scored tokens of M positions, H hidden, V vocabulary; a GEMM is 2 N V H FLOPs.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..kernels import blocks

MIB = 1 << 20
# tokens that a group of several has room for, on a GPU: each reads and writes dweight, 971 / tokens of a GEMM in
# float32 on an H100 (3 TB/s, 728 TFLOP/s), and with fewer that costs more than the GEMM that it saves
LEAST_GROUP = 1024
# and tokens x V x H of such a group in 16 bits: it saves one GEMM of four, and takes the host 1.9 ms, in which an H100
# makes four of this size
LEAST_PRODUCTS = 1.7e11
# vocabulary entries of a slice that forward and backward share, on a GPU
BOTH_WIDE = 4096


def default_workspace(device_type: str, total_memory: int) -> int:
    """Workspace in bytes when the caller names none: a function of the device's total memory, never of its free one."""
    if device_type != "cuda":
        return 160 * MIB
    return max(64 * MIB, min(512 * MIB, total_memory // 256))


def one_pass_workspace(device_type: str, total_memory: int) -> int:
    """Likewise, for one pass of a step that trains its head: the GEMM that it saves takes tiles of all of its tokens.

    8,192 tokens of a head of 128,256 x 4,096 fit into that of 80 GB.
    """
    return max(default_workspace(device_type, total_memory), total_memory // 29)


def total_memory(device: torch.device) -> int:
    """Total bytes of a GPU; 0 for any other device."""
    return blocks.gpu_properties(device).total_memory if device.type == "cuda" else 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results for a dtype of the operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def architecture(device_type: str) -> str:
    """The key of the tables of blocks; without a GPU that of Hopper."""
    here = device_type == "cpu" or torch.cuda.is_available()
    return blocks.architecture(torch.device(device_type)) if here else "sm_90"


def writes_dweight(weight: Tensor) -> bool:
    """Whether a GEMM can write slices of the gradient of a weight like this: `wide_weight`, and contiguous."""
    return weight.dtype == accumulation_dtype(weight.dtype) and weight.is_contiguous()


def gemm_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of the operands of the GEMMs: CPU GEMMs round the result to 16 bits, so operands are widened there."""
    return accumulation_dtype(dtype) if device_type == "cpu" else dtype


class Tile(NamedTuple):
    """One tile of logits of a walk over the vocabulary, and the bytes of every temporary buffer beside it."""

    rows: int
    columns: int
    bytes: int


class Sizes(NamedTuple):
    """Bytes of the temporary buffers of a walk."""

    row: int  # per row of a block
    column: int  # per vocabulary entry of a slice
    cell: float  # per entry of the tile


class Footprint(NamedTuple):
    """What the sizes of a call's buffers follow from."""

    vocabulary: int
    width: int  # H
    dtype: torch.dtype  # of the computation
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    indexed: bool  # the scored tokens are picked out of the positions
    softcap: bool
    device_type: str
    backend: str  # "torch" or "triton"
    trained_from: int = 0  # the first column of the weight that trains where it does
    exponentials: bool = False  # a GEMM can write those of a tile

    @property
    def trained_width(self) -> int:
        return self.width - self.trained_from

    @property
    def accum_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    @property
    def gemm_dtype(self) -> torch.dtype:
        return gemm_dtype(self.dtype, self.device_type)

    @property
    def copies_rows(self) -> bool:
        return self.indexed or {self.hidden_dtype, self.dtype} != {self.gemm_dtype}

    @property
    def casts_weight(self) -> bool:
        return {self.weight_dtype, self.dtype} != {self.gemm_dtype}

    @property
    def slice(self) -> int:
        """Vocabulary entries of a slice on a GPU, at most."""
        return blocks.CAPPED_SLICE if self.softcap else blocks.SLICE

    @property
    def wide_weight(self) -> bool:
        """Whether the gradient of the weight is of the dtype that it is accumulated in."""
        return self.weight_dtype == self.accum_dtype

    @property
    def slice_bytes(self) -> int:
        """Bytes per vocabulary entry of a slice of the weight in the dtype of the GEMM, where it has another."""
        twice = self.dtype != self.gemm_dtype and self.weight_dtype != self.dtype  # rounded, then widened
        return self.width * (self.gemm_dtype.itemsize + self.dtype.itemsize * twice) * self.casts_weight

    @property
    def narrow_bytes(self) -> int:
        """Bytes per entry of a tile's copy in the dtype of a second GEMM; kernels round a tile in its own memory."""
        return self.gemm_dtype.itemsize * (self.gemm_dtype != self.accum_dtype and self.backend == "torch")

    @property
    def row_product_bytes(self) -> int:
        """Bytes per row of a product that torch makes of 16-bit rows and wider factors; kernels make none."""
        return self.width * self.accum_dtype.itemsize * (self.backend == "torch")

    def pitch(self, columns: int) -> int:
        """Entries from one row of a tile to the next."""
        return -(-columns // blocks.PITCH) * blocks.PITCH if self.device_type == "cuda" else columns

    @property
    def target_bytes(self) -> int:
        """Bytes per row of the weight's row of the label, which torch rounds and widens."""
        rounded = self.width * self.dtype.itemsize * (self.backend == "torch" and self.dtype != self.accum_dtype)
        return self.row_product_bytes + rounded

    def fold_scratch(self, stats: int, derivatives: int) -> int:
        """How many tiles beside the logits tile a fold needs: for sech^2, and for (z - m) exp(z - m)."""
        if self.backend == "triton":
            return int(derivatives == 2)
        wide = derivatives == 2 or bool(stats & (backends.ENTROPY | backends.LOG_SUM_SQ))
        return int(self.softcap and derivatives > 0) + int(wide)

    def dlogits_scratch(self, entropy: bool) -> int:
        """How many tiles beside the logits tile the gradient of the logits needs."""
        return 0 if self.backend == "triton" else int(self.softcap) + int(entropy)

    @property
    def recomputes_exactly(self) -> bool:
        """Whether a backward has to recompute the logits to the last bit, or the forward's sums would not be theirs.

        A GEMM rounds as its shape has it, so then both take one tile. With 16-bit operands the gradient is rounded by
        more than that, and each takes the tile that suits it.
        """
        return self.dtype == self.accum_dtype

    def writes_exponentials(self, stats: int, derivatives: int) -> bool:
        """Whether a GEMM writes the exponentials of a forward: of one derivative, and with no sums but their own."""
        return self.exponentials and derivatives == 1 and not stats & ~backends.LSE

    @property
    def _exponential_bytes(self) -> Sizes:
        gemm = self.gemm_dtype.itemsize
        block_v = blocks.exponential_blocks(architecture(self.device_type), gemm, self.softcap)[1]
        partials = 4 * blocks.exponential_fields(self.softcap)
        # a last tile has as many partials as a whole one
        row = self.width * (self.accum_dtype.itemsize + self.copies_rows * gemm) + partials
        return Sizes(row, self.slice_bytes, gemm + partials / block_v)

    def _forward_bytes(self, stats: int, derivatives: int) -> Sizes:
        accum, gemm = self.accum_dtype.itemsize, self.gemm_dtype.itemsize
        return Sizes(
            self.width * (derivatives * accum + self.copies_rows * gemm) + (derivatives > 0) * self.target_bytes,
            self.slice_bytes,
            accum * (1 + self.fold_scratch(stats, derivatives)) + self.narrow_bytes * derivatives,
        )

    def _backward_bytes(self, entropy: bool, direct: bool) -> Sizes:
        accum, gemm = self.accum_dtype.itemsize, self.gemm_dtype.itemsize
        return Sizes(
            self.width * gemm * (1 + self.copies_rows) + self.row_product_bytes,
            self.slice_bytes + self.trained_width * accum * (not direct),
            accum * (1 + self.dlogits_scratch(entropy)) + self.narrow_bytes,
        )

    def forward_tile(
        self,
        rows: int,
        stats: int,
        derivatives: int,
        workspace_bytes: int,
        recomputed: bool = False,
        direct: bool = True,
    ) -> Tile:
        """The tile of a forward that saves so many derivatives of N = `rows` tokens.

        recomputed: a backward will recompute it; direct: as in `backward_tile`.
        """
        if self.writes_exponentials(stats, derivatives):
            most = self.pitch(self.vocabulary)
            return self.fit_tile(rows, self._exponential_bytes, workspace_bytes, 2 * blocks.SLICE, most=most)
        sizes, wide = self._forward_bytes(stats, derivatives), self.slice  # a slice reads and writes U once
        if not (recomputed and self.recomputes_exactly):
            return self.fit_tile(rows, sizes, workspace_bytes, wide)
        other = self._backward_bytes(bool(stats & backends.ENTROPY), direct)
        return self.fit_tile(rows, sizes, workspace_bytes, BOTH_WIDE, other)

    @property
    def gemm_rounds_dweight(self) -> bool:
        """Whether a GEMM over every row can write a slice of dweight itself, rounding its fp32 sums.

        Once, unless a GEMM library splits the rows and is allowed to add parts in bf16
        (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction). Not in fp16, where a slice of a scaled loss
        may leave the range.
        """
        return self.weight_dtype == self.gemm_dtype == torch.bfloat16

    def backward_tile(
        self, rows: int, stats: int, derivatives: int, direct: bool, workspace_bytes: int, rounded: bool = True
    ) -> tuple[Tile, bool]:
        """The tile of a backward that recomputes, and whether dweight is written without a slice in the wide dtype.

        stats, derivatives: of the forward. direct: such a slice is not needed, whatever the tile. rounded: a GEMM may
        round it, where it can.
        """
        if not direct and rounded and self.gemm_rounds_dweight:
            tile, _ = self.backward_tile(rows, stats, derivatives, True, workspace_bytes)
            if tile.rows >= rows:
                return tile, True
        sizes, wide = self._backward_bytes(bool(stats & backends.ENTROPY), direct), 2048  # a block adds to dweight once
        if not self.recomputes_exactly:
            return self.fit_tile(rows, sizes, workspace_bytes, wide), direct
        return self.fit_tile(rows, sizes, workspace_bytes, BOTH_WIDE, self._forward_bytes(stats, derivatives)), direct

    def fit_tile(
        self,
        rows: int,
        sizes: Sizes,
        workspace_bytes: int,
        wide: int,  # vocabulary entries of a slice beyond which a GPU gains more from further rows
        other: Sizes | None = None,  # of another walk that the same tile has to fit
        most: int | None = None,  # vocabulary entries of a slice on a GPU, by default what registers hold
    ) -> Tile:
        """Rows per block and vocabulary entries per slice that fit the workspace; never below 16 x 16 (64 on a GPU)."""
        other = other or sizes
        row_bytes, column_bytes = max(sizes.row, other.row), max(sizes.column, other.column)
        cell_bytes = max(sizes.cell, other.cell)

        def fitting(columns: int) -> int:
            """Rows that fit beside slices of so many entries."""
            beside = workspace_bytes - columns * column_bytes
            return int(beside // (row_bytes + self.pitch(columns) * cell_bytes))

        least = self.pitch(16)
        if self.device_type == "cuda":
            most_columns = most or self.slice
            most_rows = fitting(min(wide, self.vocabulary, max(least, workspace_bytes // 4 // max(column_bytes, 1))))
        else:
            # a tile that stays in the cache between the passes over it; more rows where every block casts the weight
            most_columns = 2048
            most_rows = min(2048 if column_bytes else 512, workspace_bytes // 4 // max(row_bytes, 1))
        block = _even_parts(rows, max(16, min(most_rows, fitting(min(least, self.vocabulary)))), 16)
        free = workspace_bytes - block * row_bytes
        widest = max(least, min(most_columns, int(free // (block * cell_bytes + column_bytes))))
        multiple = 128 if widest >= 128 else least
        columns = min(self.vocabulary, _even_parts(self.pitch(self.vocabulary), widest, multiple))
        cells = block * self.pitch(columns)
        return Tile(block, columns, int(block * sizes.row + columns * sizes.column + cells * sizes.cell))

    def held_columns(self, rows: int, stats: int = 0) -> int:
        """Vocabulary entries of a tile that is held: on a CPU, what the cache holds between two passes over it."""
        if self.device_type != "cuda":
            return min(self.vocabulary, max(256, min(2048, MIB // max(rows, 1) // 128 * 128)))
        if self.writes_exponentials(stats, 1) and not self.casts_weight:
            return self.vocabulary
        return min(self.vocabulary, self.slice)

    def weigh_bytes(self, rows: int) -> int:
        """What a backward takes to weigh the rows of dhidden."""
        at_once = min(rows, max(16, backends.WEIGHED_AT_ONCE // self.width)) * (self.backend == "torch")
        return at_once * self.width * self.accum_dtype.itemsize

    def accumulator_bytes(self, several: bool) -> int:
        """Workspace of the dweight that `several` groups of one pass share, where the gradient itself is too narrow."""
        return self.accum_dtype.itemsize * self.vocabulary * self.trained_width * (several and not self.wide_weight)

    def one_pass_bytes(self, rows: int, several: bool, columns: int, stats: int = 0) -> int:
        """Workspace of one pass whose largest group has so many tokens; `several` groups share an accumulator."""
        accum, gemm = self.accum_dtype.itemsize, self.gemm_dtype.itemsize
        copies = self.copies_rows or several  # rows of a group are picked out of the others
        direct = self.wide_weight or self.gemm_rounds_dweight
        held = rows * (self.pitch(self.vocabulary) * gemm + accum * -(-self.vocabulary // columns))
        held += self.accumulator_bytes(several)
        cell: float = accum * (self.fold_scratch(stats, 1) + (gemm != accum))
        if self.writes_exponentials(stats, 1):  # where they are held
            cell = self._exponential_bytes.cell - gemm
        first = rows * (int(self.pitch(columns) * cell) + self.width * (accum + gemm * copies) + self.target_bytes)
        first += columns * self.slice_bytes
        second = rows * self.width * gemm * (1 + copies)
        second += min(columns, self.slice) * self.trained_width * accum * (not direct and not several)
        return held + max(first, second)

    @lru_cache  # noqa: B019
    def capacity(self, several: bool, workspace_bytes: int, stats: int = 0) -> int:
        """How many tokens a group of one pass may hold, if there are `several` groups or one; 0 for none."""
        if several and self.dtype == torch.float16:
            return 0  # sums of several groups would need one scale
        columns = self.held_columns(1, stats)
        low, high = 0, workspace_bytes // (self.vocabulary * self.gemm_dtype.itemsize)
        while low < high:
            middle = (low + high + 1) // 2
            if self.one_pass_bytes(middle, several, columns, stats) <= workspace_bytes:
                low = middle
            else:
                high = middle - 1
        return 0 if several and low < self.least_group else low

    @property
    def least_group(self) -> int:
        """Tokens that a group of several has to have room for."""
        if self.device_type != "cuda":
            return 1
        products = LEAST_PRODUCTS if self.gemm_dtype.itemsize == 2 else 0
        return max(LEAST_GROUP, math.ceil(products / (self.vocabulary * self.width)))


def _even_parts(total: int, most: int, multiple: int) -> int:
    """The size of parts of `total` of nearly one size, at most `most` each, a multiple of `multiple` if several."""
    parts = -(-total // most)
    if parts <= 1:
        return max(total, 1)
    size = -(-total // parts)
    return min(most // multiple * multiple, -(-size // multiple) * multiple)


def fill_groups(counts: Sequence[int], most: int) -> tuple[list[list[int]], list[int]]:
    """Units of `counts` tokens in groups of at most `most`, first fit in decreasing order, and those that fit nowhere.

    The units of a group are in rising order, as the groups are by their first unit.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(range(len(counts)), key=lambda u: -counts[u]):
        if counts[unit] > most:
            continue
        at = next((i for i, free in enumerate(room) if free >= counts[unit]), len(groups))
        if at == len(groups):
            groups.append([])
            room.append(most)
        groups[at].append(unit)
        room[at] -= counts[unit]
    return sorted(sorted(group) for group in groups), [u for u, count in enumerate(counts) if count > most]
