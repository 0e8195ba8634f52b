"""What a call will run, and the bytes it holds: `plan`, and the sizes that the ops themselves take from here.

Notation: N scored tokens of M positions, H hidden, V vocabulary; a GEMM is 2 N V H FLOPs.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch

from . import backends
from .backends import STATE_ROWS
from .kernels import blocks

__all__ = [
    "DTYPES", "Footprint", "Plan", "accumulation_dtype", "check_number", "default_workspace", "fill_groups",
    "full_logits_bytes", "gemm_dtype", "plan", "total_memory",
]  # fmt: skip

MIB = 1 << 20
# tokens that a group of several has room for, on a GPU: each reads and writes dweight, 971 / tokens of a GEMM in
# float32 on an H100 (3 TB/s, 728 TFLOP/s), and with fewer that costs more than the GEMM that it saves
LEAST_GROUP = 1024
# vocabulary entries of a slice that forward and backward share, on a GPU
BOTH_WIDE = 4096
# vocabulary entries of a slice on a GPU, at most: 264 rows of a tile under way on an H100, 17 MB with such slices, find
# their second read in L2; at least, where the workspace allows: each slice of a forward reads and writes U
SLICE = 16384
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_number(name: str, value: Any, positive: bool = False) -> None:
    if torch.compiler.is_compiling():
        return  # a number that varies is symbolic there
    if not isinstance(value, Real) or not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be a {'positive' if positive else 'finite'} number, got {value!r}")


def default_workspace(device_type: str, total_memory: int) -> int:
    """Workspace in bytes when the caller names none: a function of the device's total memory, never of its free one."""
    if device_type != "cuda":
        return 160 * MIB
    return max(64 * MIB, min(512 * MIB, total_memory // 256))


def total_memory(device: torch.device) -> int:
    """Total bytes of a GPU; 0 for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results for a dtype of the operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    cell: int  # per entry of the tile


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

    def fold_tiles(self, stats: int, save: int) -> int:
        """How many tiles beside the logits tile a fold needs: for sech^2, and for (z - m) exp(z - m)."""
        if self.backend == "triton":
            return int(save == 2)
        wide = save == 2 or bool(stats & (backends.ENTROPY | backends.LOG_SUM_SQ))
        return int(self.softcap and save > 0) + int(wide)

    def dlogits_tiles(self, entropy: bool) -> int:
        """How many tiles beside the logits tile the gradient of the logits needs."""
        return 0 if self.backend == "triton" else int(self.softcap) + int(entropy)

    @property
    def recomputes_exactly(self) -> bool:
        """Whether a backward has to recompute the logits to the last bit, or the forward's sums would not be theirs.

        A GEMM rounds as its shape has it, so then both take one tile. With 16-bit operands the gradient is rounded by
        more than that, and each takes the tile that suits it.
        """
        return self.dtype == self.accum_dtype

    def _forward_bytes(self, stats: int, save: int) -> "Sizes":
        accum, gemm = self.accum_dtype.itemsize, self.gemm_dtype.itemsize
        return Sizes(
            self.width * (save * accum + self.copies_rows * gemm) + (save > 0) * self.target_bytes,
            self.slice_bytes,
            accum * (1 + self.fold_tiles(stats, save)) + self.narrow_bytes * save,
        )

    def _backward_bytes(self, entropy: bool, direct: bool) -> "Sizes":
        accum, gemm = self.accum_dtype.itemsize, self.gemm_dtype.itemsize
        return Sizes(
            self.width * gemm * (1 + self.copies_rows) + self.row_product_bytes,
            self.slice_bytes + self.width * accum * (not direct),
            accum * (1 + self.dlogits_tiles(entropy)) + self.narrow_bytes,
        )

    def forward(
        self, rows: int, stats: int, save: int, workspace_bytes: int, recomputed: bool = False, direct: bool = True
    ) -> Tile:
        """The tile of a forward that saves so many derivatives of N = `rows` tokens.

        recomputed: a backward will recompute it; direct: as in `backward`.
        """
        sizes, wide = self._forward_bytes(stats, save), SLICE  # a slice reads and writes U once
        if not (recomputed and self.recomputes_exactly):
            return self.tile(rows, sizes, workspace_bytes, wide)
        other = self._backward_bytes(bool(stats & backends.ENTROPY), direct)
        return self.tile(rows, sizes, workspace_bytes, BOTH_WIDE, other)

    @property
    def gemm_rounds_dweight(self) -> bool:
        """Whether a GEMM over every row can write a slice of dweight itself, rounding its fp32 sums.

        Once, unless a GEMM library splits the rows and is allowed to add parts in bf16
        (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction). Not in fp16, where a slice of a scaled loss
        may leave the range.
        """
        return self.weight_dtype == self.gemm_dtype == torch.bfloat16

    def backward(
        self, rows: int, stats: int, save: int, direct: bool, workspace_bytes: int, rounded: bool = True
    ) -> tuple[Tile, bool]:
        """The tile of a backward that recomputes, and whether dweight is written without a slice in the wide dtype.

        stats, save: of the forward. direct: such a slice is not needed, whatever the tile. rounded: a GEMM may round
        it, where it can.
        """
        if not direct and rounded and self.gemm_rounds_dweight:
            tile, _ = self.backward(rows, stats, save, True, workspace_bytes)
            if tile.rows >= rows:
                return tile, True
        sizes, wide = self._backward_bytes(bool(stats & backends.ENTROPY), direct), 2048  # a block adds to dweight once
        if not self.recomputes_exactly:
            return self.tile(rows, sizes, workspace_bytes, wide), direct
        return self.tile(rows, sizes, workspace_bytes, BOTH_WIDE, self._forward_bytes(stats, save)), direct

    def tile(
        self,
        rows: int,
        sizes: "Sizes",
        workspace_bytes: int,
        wide: int,  # vocabulary entries of a slice beyond which a GPU gains more from further rows
        other: "Sizes | None" = None,  # of another walk that the same tile has to fit
    ) -> Tile:
        """Rows per block and vocabulary entries per slice that fit the workspace; never below 16 x 16."""
        row_bytes, column_bytes, cell_bytes = map(max, sizes, other or sizes)
        if self.device_type == "cuda":
            most_columns = SLICE
            wide = max(16, min(wide, self.vocabulary, workspace_bytes // 4 // max(column_bytes, 1)))
            most_rows = (workspace_bytes - wide * column_bytes) // (row_bytes + wide * cell_bytes)
        else:
            # a tile that stays in the cache between the passes over it; more rows where every block casts the weight
            most_columns = 2048
            most_rows = min(2048 if column_bytes else 512, workspace_bytes // 4 // max(row_bytes, 1))
        block = _even_parts(rows, max(16, most_rows), 16)
        free = workspace_bytes - block * row_bytes
        least = self.pitch(16)
        most = max(least, min(most_columns, free // (block * cell_bytes + column_bytes)))
        columns = min(self.vocabulary, _even_parts(self.pitch(self.vocabulary), most, 128 if most >= 128 else least))
        cells = block * self.pitch(columns)
        return Tile(block, columns, block * sizes.row + columns * sizes.column + cells * sizes.cell)

    def held_columns(self, rows: int) -> int:
        """Vocabulary entries of a tile that is held: on a CPU, what the cache holds between two passes over it."""
        if self.device_type != "cuda":
            return min(self.vocabulary, max(256, min(2048, MIB // max(rows, 1) // 128 * 128)))
        return min(self.vocabulary, SLICE)

    def weigh_bytes(self, rows: int) -> int:
        """What a backward takes to weigh the rows of dhidden."""
        at_once = min(rows, max(16, backends.WEIGHED_AT_ONCE // self.width)) * (self.backend == "torch")
        return at_once * self.width * self.accum_dtype.itemsize

    def accumulator_bytes(self, several: bool) -> int:
        """Workspace of the dweight that `several` groups of one pass share, where the gradient itself is too narrow."""
        narrow = self.weight_dtype != self.accum_dtype
        return self.accum_dtype.itemsize * self.vocabulary * self.width * (several and narrow)

    def one_pass_bytes(self, rows: int, several: bool, columns: int, stats: int = 0) -> int:
        """Workspace of one pass whose largest group has so many tokens; `several` groups share an accumulator."""
        accum, gemm = self.accum_dtype.itemsize, self.gemm_dtype.itemsize
        copies = self.copies_rows or several  # rows of a group are picked out of the others
        direct = self.weight_dtype == self.accum_dtype or self.gemm_rounds_dweight
        held = rows * (self.pitch(self.vocabulary) * gemm + accum * -(-self.vocabulary // columns))
        held += self.accumulator_bytes(several)
        cell = accum * (self.fold_tiles(stats, 1) + (gemm != accum))
        first = rows * (self.pitch(columns) * cell + self.width * (accum + gemm * copies) + self.target_bytes)
        first += columns * self.slice_bytes
        second = rows * self.width * gemm * (1 + copies)
        second += columns * self.width * accum * (not direct and not several)
        return held + max(first, second)

    def capacity(self, several: bool, workspace_bytes: int, stats: int = 0) -> int:
        """How many tokens a group of one pass may hold, if there are `several` groups or one; 0 for none."""
        if several and self.dtype == torch.float16:
            return 0  # sums of several groups would need one scale
        columns = self.held_columns(1)
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
        return LEAST_GROUP if self.device_type == "cuda" else 1


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


def full_logits_bytes(positions: int, vocabulary: int, dtype: torch.dtype, training: bool) -> int:
    """Peak bytes of `log_softmax(logits.float())` and a gather, above inputs and gradients.

    Two tensors of logits in the accumulation dtype at once; in a training step three: the log-softmax, its gradient and
    that of the logits.
    """
    return positions * vocabulary * accumulation_dtype(dtype).itemsize * (3 if training else 2)


class Plan(NamedTuple):
    """What a call will run and hold. Bytes are beside its inputs, hidden, weight, bias and labels."""

    tokens: int  # N
    regime: int  # 1 nothing trains, 2 hidden states alone, 3 one pass, 4 the backward recomputes
    groups: int  # of whole pairs in regime 3; 0 in the others
    recomputed_tokens: int  # whose logits are computed twice: all in regime 4, in regime 3 of pairs that fit no group
    gemms: float  # in units of 2 N V H FLOPs
    flops: int
    budget_bytes: int  # the workspace that may be used
    workspace_bytes: int  # the workspace that is used, at the peak of forward or backward
    saved_bytes: int  # kept from the forward to the backward
    gradient_bytes: int  # dhidden, dweight and dbias
    peak_bytes: int  # of all of these at once
    one_pass_bytes: int | None  # the least budget that runs every pair in one pass; None where that cannot be
    full_logits_bytes: int  # what full logits of every position hold at their peak, above gradients

    def __str__(self) -> str:
        runs = {
            1: "nothing trains",
            2: "the hidden states train, the derivative is finished in the forward",
            3: f"one pass over {self.groups} group{'s' * (self.groups != 1)} of whole pairs",
            4: "the head trains, the backward recomputes the logits",
        }[self.regime]
        if self.regime == 3 and self.recomputed_tokens:
            runs += f"; {self.recomputed_tokens:,} tokens of pairs too long for it are recomputed"
        lines = [
            f"regime {self.regime}: {runs}",
            f"work             {self.gemms:.3g} GEMMs of {self.flops / self.gemms / 1e12:.3g} TFLOP",
            f"workspace        {_mib(self.workspace_bytes)}, of a budget of {_mib(self.budget_bytes)}",
            f"saved            {_mib(self.saved_bytes)} from forward to backward",
            f"gradients        {_mib(self.gradient_bytes)}",
            f"peak             {_mib(self.peak_bytes)} beside the inputs",
            f"full logits      {_mib(self.full_logits_bytes)}, above gradients",
        ]
        if self.one_pass_bytes is not None:
            lines.append(f"one pass needs   workspace_bytes >= {self.one_pass_bytes:,} ({_mib(self.one_pass_bytes)})")
        return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f} MiB"


def plan(
    tokens: int,  # N
    hidden_size: int,  # H
    vocabulary: int,  # V
    *,
    train_hidden: bool = True,
    train_head: bool = False,
    pair_tokens: int | Iterable[int] | None = None,
    positions: int | None = None,  # M
    bias: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_memory: int | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Plan:
    """Which regime a call of such a shape will run, its work, and its memory in bytes; nothing is computed.

    Args:
        tokens: N, labelled tokens of the call.
        hidden_size: H.
        vocabulary: V.
        train_hidden, train_head: what requires a gradient; the head is weight and, if there is one, bias.
        pair_tokens: labelled tokens of the pairs of a loss module (of the sequences, if it is unpaired): one number
            for all, or one each, which sum to `tokens`. Regime 3 groups whole pairs. None for `linear_logprob` and
            `sequence_logprob` by themselves, for a loss that couples the batch, and under torch.compile. With a
            `token_index` of the caller's, `tokens`: there are no groups but one of all.
        positions: M, labelled or not; by default `tokens`.
        bias: whether the head has one.
        softcap: of the logits, or None.
        dtype: of the computation: of the inputs, or of autocast.
        weight_dtype: of hidden states, weight and bias, if autocast makes it another one.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        device_memory: total bytes of a GPU that is not in this machine; by default those of the current one.
        backend, workspace_bytes: as in `linear_logprob`.

    Returns:
        Plan, whose str() is a summary. FLOPs count the GEMMs alone. Bytes count tensors; what a GEMM library takes for
        itself is not in them. A reference projected by a loss module (`ref_hidden`) is a call of its own, with
        `train_hidden=False`. A frozen weight under a trained bias takes one GEMM less than `train_head` says.

    Raises:
        ValueError: for numbers that are not positive, pairs that do not sum to `tokens`, unknown names.
    """
    tokens, hidden_size, vocabulary = (
        _whole(name, number)
        for name, number in (("tokens", tokens), ("hidden_size", hidden_size), ("vocabulary", vocabulary))
    )
    positions = tokens if positions is None else _whole("positions", positions)
    if positions < tokens:
        raise ValueError(f"positions counts labelled and other tokens, so at least tokens={tokens}; got {positions}")
    for name, flag in (("train_hidden", train_hidden), ("train_head", train_head), ("bias", bias)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
    for name, number in (
        ("softcap", softcap), ("workspace_bytes", workspace_bytes), ("device_memory", device_memory),
    ):  # fmt: skip
        if number is not None:
            check_number(name, number, positive=True)
    backends.check_name(backend)
    stored = dtype if weight_dtype is None else weight_dtype
    for name, kind_of in (("dtype", dtype), ("weight_dtype", stored)):
        if kind_of not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {kind_of}")
    if stored != dtype and torch.float64 in (stored, dtype):
        raise ValueError(f"autocast never casts from or to float64; got dtype {dtype}, weight_dtype {stored}")
    pairs = None if pair_tokens is None else _pairs(tokens, pair_tokens)
    kind, total = _device(device, device_memory)
    if backend == "auto" or dtype == torch.float64:
        backend = "torch" if kind == "cpu" or dtype == torch.float64 else "triton"
    budget = default_workspace(kind, total) if workspace_bytes is None else int(workspace_bytes)
    head = Footprint(
        vocabulary, hidden_size, dtype, stored, stored, positions > tokens, softcap is not None, kind, backend
    )
    accum, save = head.accum_dtype.itemsize, int(train_hidden)

    one_pass = train_hidden and train_head and pairs is not None
    arranged = _arrange(head, tokens, pairs, budget) if one_pass and pairs is not None else _Arranged(0, 0, tokens)
    if arranged.groups > 1 or (arranged.groups and arranged.recomputed):
        head = head._replace(indexed=True)
    regime = 3 if arranged.groups else 4 if train_head else 2 if train_hidden else 1
    recomputed = arranged.recomputed if regime > 2 else 0
    gemms = {1: 1.0, 2: 2.0, 3: 3 + recomputed / tokens, 4: 3.0 + save}[regime]
    forward, backward = _workspace(head, tokens, regime, save, arranged, budget)

    index, state = 8 * tokens * head.indexed, accum * STATE_ROWS * tokens
    saved = index + (state + tokens * hidden_size * dtype.itemsize * save) * (regime > 1)
    dweight = vocabulary * (hidden_size * stored.itemsize + accum * bias) * train_head
    gradients = positions * hidden_size * stored.itemsize * save + dweight
    # one pass without a wider accumulator makes the gradient of the head itself in the forward
    early = dweight if regime == 3 and not backward else 0
    results = 8 * positions  # log-probabilities in float64; their gradients
    widened = accum * vocabulary * bias  # while logits are computed
    forward, backward = forward + widened, backward + widened * (regime == 4)
    peak = saved + results + index + early + forward + state * (regime == 1)
    if regime > 1:
        peak = max(peak, saved + 2 * results + gradients + head.weigh_bytes(tokens) * save + backward)
    return Plan(
        tokens, regime, arranged.groups, recomputed, gemms, round(gemms * 2 * tokens * vocabulary * hidden_size),
        budget, max(forward, backward), saved, gradients, peak,
        _least_budget(head, tokens, pairs) if one_pass and pairs is not None else None,
        full_logits_bytes(positions, vocabulary, dtype, regime > 1),
    )  # fmt: skip


class _Arranged(NamedTuple):
    """How the pairs of a step go through one pass."""

    groups: int
    largest: int  # tokens of the largest group
    recomputed: int  # tokens of pairs that fit no group


def _workspace(
    head: Footprint, tokens: int, regime: int, save: int, arranged: _Arranged, budget: int
) -> tuple[int, int]:
    """Bytes of workspace in the forward and in the backward."""
    if regime == 3:
        several = arranged.groups > 1 or arranged.recomputed > 0
        shared = head.accumulator_bytes(several)
        forward = head.one_pass_bytes(arranged.largest, several, head.held_columns(arranged.largest))
        if arranged.recomputed:
            tiles = (
                head.forward(arranged.recomputed, 0, save, budget - shared, recomputed=True),
                head.backward(arranged.recomputed, 0, save, True, budget - shared)[0],
            )
            forward = max(forward, *(shared + tile.bytes for tile in tiles))
        return forward, shared
    direct = head.weight_dtype == head.accum_dtype
    tile = head.forward(tokens, 0, save, budget, regime == 4, direct)
    if regime == 1 and head.backend == "triton" and not head.casts_weight:
        # the fused kernel holds partial statistics of a block of rows instead of a tile
        block_v = blocks.gemm_blocks(_architecture(head), head.gemm_dtype.itemsize, head.softcap)[1]
        partials = tile.rows * blocks.partial_bytes_per_row(head.vocabulary, block_v, extras=False)
        return tile.rows * head.width * head.gemm_dtype.itemsize * head.copies_rows + min(budget, partials), 0
    return tile.bytes, head.backward(tokens, 0, save, direct, budget)[0].bytes if regime == 4 else 0


def _architecture(head: Footprint) -> str:
    """The key of the table of blocks; without a GPU that of Hopper."""
    here = head.device_type == "cpu" or torch.cuda.is_available()
    return blocks.architecture(torch.device(head.device_type)) if here else "sm_90"


def _arrange(head: Footprint, tokens: int, pairs: int | list[int], workspace_bytes: int) -> _Arranged:
    if tokens <= head.capacity(several=False, workspace_bytes=workspace_bytes):
        return _Arranged(1, tokens, 0)
    most = head.capacity(several=True, workspace_bytes=workspace_bytes)
    if isinstance(pairs, int):
        return _evenly(tokens, pairs, most)
    groups, rest = fill_groups(pairs, most) if most else ([], [])
    largest = max((sum(pairs[unit] for unit in group) for group in groups), default=0)
    return _Arranged(len(groups), largest, sum(pairs[unit] for unit in rest) if groups else tokens)


def _evenly(tokens: int, pair: int, most: int) -> _Arranged:
    """`fill_groups` for pairs of one size and what remains, without a list of them."""
    whole, remainder = divmod(tokens, pair)
    if pair > most:
        kept = remainder if remainder <= most else 0
        return _Arranged(int(kept > 0), kept, tokens - kept)
    per_group = most // pair
    groups = -(-whole // per_group)
    full, last = per_group * pair, (whole - (groups - 1) * per_group) * pair
    largest = full if groups > 1 else last
    if groups > 1 and full + remainder <= most:
        largest = full + remainder
    elif last + remainder <= most:
        largest = max(largest, last + remainder)
    elif remainder:
        groups += 1
    return _Arranged(groups, largest, 0)


def _least_budget(head: Footprint, tokens: int, pairs: int | list[int]) -> int:
    """The least workspace with which every unit goes through one pass, in one group or in several."""
    columns = head.held_columns(1)
    one = head.one_pass_bytes(tokens, False, columns)
    largest = pairs if isinstance(pairs, int) else max(pairs)
    several = head.one_pass_bytes(max(largest, head.least_group), True, columns)
    return one if head.dtype == torch.float16 else min(one, several)


def _whole(name: str, value: Any, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be {'a positive integer' if least else 'an integer, at least 0'}, got {value!r}")
    return number


def _pairs(tokens: int, pair_tokens: Any) -> int | list[int]:
    if isinstance(pair_tokens, Iterable) and not isinstance(pair_tokens, str) and getattr(pair_tokens, "ndim", 1) > 0:
        pairs = [_whole("each of pair_tokens", count, least=0) for count in pair_tokens]
        if sum(pairs) != tokens:
            raise ValueError(f"pair_tokens must sum to tokens={tokens}, got {sum(pairs)}")
        return pairs
    pair = _whole("pair_tokens", pair_tokens)
    if pair > tokens:
        raise ValueError(f"pair_tokens, of one pair, must be at most tokens={tokens}; got {pair}")
    return pair


def _device(device: str | torch.device | None, device_memory: int | None) -> tuple[str, int]:
    """The type of a device and its total memory in bytes."""
    if device is None:
        device = "cuda" if device_memory or torch.cuda.is_available() else "cpu"
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device_memory is not None:
        if kind == "cpu":
            raise ValueError(f"device_memory is that of a GPU; leave it out for device='cpu', got {device_memory}")
        return kind, int(device_memory)
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here whose memory could be read; give device_memory in bytes")
    return kind, total_memory(torch.device(device))
