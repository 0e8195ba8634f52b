"""What a call will run, and the bytes it holds.

Notation: N scored tokens of M positions, H hidden, V vocabulary; a GEMM is 2 N V H FLOPs.
"""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from . import backends
from .checks import DTYPES, check_number
from .kernels import blocks
from .kernels.state import STATE_ROWS
from .ops.head import Options
from .ops.sizes import (
    MIB,
    Footprint,
    Tile,
    accumulation_dtype,
    architecture,
    default_workspace,
    fill_groups,
    one_pass_workspace,
    total_memory,
)


def full_logits_bytes(positions: int, vocabulary: int, dtype: torch.dtype, training: bool) -> int:
    """Peak bytes of `log_softmax(logits.float())` and a gather, above inputs and gradients.

    Two tensors of logits in the accumulation dtype at once; in a training step three: the log-softmax, its gradient and
    that of the logits.
    """
    return positions * vocabulary * accumulation_dtype(dtype).itemsize * (3 if training else 2)


class Plan(NamedTuple):
    """What a call will run and hold. Bytes are beside its inputs, hidden, weight, bias and labels."""

    tokens: int  #: N
    regime: int  #: 1 nothing trains, 2 hidden states alone, 3 one pass, 4 the backward recomputes
    groups: int  #: of whole pairs in regime 3; 0 in the others
    recomputed_tokens: int  #: whose logits are computed twice, all in regime 4, in regime 3 of pairs that fit no group
    gemms: float  #: in units of 2 N V H FLOPs
    flops: int
    budget_bytes: int  #: the workspace that may be used
    workspace_bytes: int  #: the workspace that is used, at the peak of forward or backward
    saved_bytes: int  #: kept from the forward to the backward
    gradient_bytes: int  #: dhidden, dweight and dbias
    peak_bytes: int  #: of all of these at once
    one_pass_bytes: int | None  #: the least budget that runs every pair in one pass; None where that cannot be
    full_logits_bytes: int  #: what full logits of every position hold at their peak, above gradients
    tiles: tuple[tuple[int, int], ...]  #: tokens and vocabulary entries of a tile: forward, a backward that recomputes

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
        bias, softcap: whether the head has one; of the logits, or None.
        dtype: of the computation: of the inputs, or of autocast.
        weight_dtype: of hidden states, weight and bias, if autocast makes it another one.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        device_memory: total bytes of a GPU that is not in this machine; by default those of the current one. Where
            there is no GPU here, what runs is what runs on Hopper: elsewhere one pass takes more workspace.
        backend, workspace_bytes: as in `linear_logprob`.

    Returns:
        Plan, whose str() is a summary. FLOPs count the GEMMs alone. Bytes count tensors; what a GEMM library takes for
        itself is not in them. A reference projected by a loss module (`ref_hidden`) is a call of its own, with
        `train_hidden=False`. A frozen weight under a trained bias takes one GEMM less than `train_head` says.

    Raises:
        ValueError: for numbers that are not positive, pairs that do not sum to `tokens`, unknown names.

    Example:
        >>> alignloss.plan(4096, 2048, 32768, train_head=True, pair_tokens=1024, device="cpu").gemms
        4.0
    """
    tokens, vocabulary = _whole("tokens", tokens), _whole("vocabulary", vocabulary)
    hidden_size = _whole("hidden_size", hidden_size)
    positions = tokens if positions is None else _whole("positions", positions)
    if positions < tokens:
        raise ValueError(f"positions counts labelled and other tokens, so at least tokens={tokens}; got {positions}")
    for name, flag in (("train_hidden", train_hidden), ("train_head", train_head), ("bias", bias)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
    stored = dtype if weight_dtype is None else weight_dtype
    pairs = None if pair_tokens is None else _pairs(tokens, pair_tokens)
    kind, options, most = _options(dtype, stored, softcap, device, device_memory, backend, workspace_bytes)
    budget = options.workspace_bytes
    head = options.footprint(vocabulary, hidden_size, stored, stored, kind, positions > tokens, bias=bias)
    arranged, one_pass_bytes = _Arranged(0, 0, tokens), None
    if train_hidden and train_head and pairs is not None:
        arranged, one_pass_bytes = _arrange(head, tokens, pairs, most), _least_budget(head, tokens, pairs)
        budget = most if arranged.groups else budget
    if arranged.groups > 1 or (arranged.groups and arranged.recomputed):
        head = head._replace(indexed=True)
    regime = 3 if arranged.groups else 4 if train_head else 2 if train_hidden else 1
    recomputed = arranged.recomputed if regime > 2 else 0
    gemms = {1: 1.0, 2: 2.0, 3: 3 + recomputed / tokens, 4: 3.0 + train_hidden}[regime]
    tiles = _tiles(head, tokens, regime, int(train_hidden), arranged, budget)
    workspace = _workspace(head, regime, arranged, tiles, budget)
    held = _held(head, tokens, positions, regime, train_hidden, train_head, bias, workspace)
    return Plan(
        tokens, regime, arranged.groups, recomputed, gemms, round(gemms * 2 * tokens * vocabulary * hidden_size),
        budget, *held, one_pass_bytes, full_logits_bytes(positions, vocabulary, dtype, regime > 1),
        tuple((tile.rows, tile.columns) for tile in tiles),
    )  # fmt: skip


def _options(
    dtype: torch.dtype,
    stored: torch.dtype,
    softcap: float | None,
    device: str | torch.device | None,
    device_memory: int | None,
    backend: str,
    workspace_bytes: int | None,
) -> tuple[str, Options, int]:
    """The type of the device, the options of the call as they would be resolved there, and the bytes of one pass."""
    for name, number in (("softcap", softcap), ("workspace_bytes", workspace_bytes)):
        if number is not None:
            check_number(name, number, positive=True)
    backends.check_name(backend)
    for name, kind_of in (("dtype", dtype), ("weight_dtype", stored)):
        if kind_of not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {kind_of}")
    if stored != dtype and torch.float64 in (stored, dtype):
        raise ValueError(f"autocast never casts from or to float64; got dtype {dtype}, weight_dtype {stored}")
    kind, total = _device(device, device_memory)
    if backend == "auto" or dtype == torch.float64:
        backend = "torch" if kind == "cpu" or dtype == torch.float64 else "triton"
    budget = default_workspace(kind, total) if workspace_bytes is None else int(workspace_bytes)
    most = one_pass_workspace(kind, total) if workspace_bytes is None else budget
    options = Options(
        select=False, compute_dtype=dtype, ignore_index=-100, logit_scale=1.0, softcap=softcap, temperature=1.0,
        backend=backend, workspace_bytes=budget, validate=False,
    )  # fmt: skip
    return kind, options, most


class _Held(NamedTuple):
    """Bytes, as in `Plan`."""

    workspace: int
    saved: int
    gradients: int
    peak: int


def _held(
    head: Footprint,
    tokens: int,
    positions: int,
    regime: int,
    train_hidden: bool,
    train_head: bool,
    bias: bool,
    workspace: tuple[int, int],  # of forward and backward
) -> _Held:
    accum, stored = head.accum_dtype.itemsize, head.weight_dtype.itemsize
    forward, backward = workspace
    index, state = 8 * tokens * head.indexed, accum * STATE_ROWS * tokens
    kept = accum * tokens if regime == 3 else state  # of one pass the coefficients alone
    saved = index + (kept + tokens * head.width * head.dtype.itemsize * train_hidden) * (regime > 1)
    dweight = head.vocabulary * (head.width * stored + accum * bias) * train_head
    gradients = positions * head.width * stored * train_hidden + dweight
    # one pass without a wider accumulator makes the gradient of the head itself in the forward
    early = dweight if regime == 3 and not backward else 0
    results = 8 * positions  # log-probabilities in float64; their gradients
    widened = accum * head.vocabulary * bias  # while logits are computed
    forward, backward = forward + widened, backward + widened * (regime == 4)
    peak = saved + results + index + early + forward + state * (regime in (1, 3))
    if regime > 1:
        weighing = head.weigh_bytes(tokens) * train_hidden
        peak = max(peak, saved + 2 * results + gradients + weighing + backward)
    return _Held(max(forward, backward), saved, gradients, peak)


class _Arranged(NamedTuple):
    """How the pairs of a step go through one pass."""

    groups: int
    largest: int  # tokens of the largest group
    recomputed: int  # tokens of pairs that fit no group


def _tiles(head: Footprint, tokens: int, regime: int, derivatives: int, arranged: _Arranged, budget: int) -> list[Tile]:
    """The tile of the forward, with its bytes, and where it recomputes that of the backward."""
    several = arranged.groups > 1 or arranged.recomputed > 0
    if regime == 3:
        columns = head.held_columns(arranged.largest)
        tiles = [Tile(arranged.largest, columns, head.one_pass_bytes(arranged.largest, several, columns))]
        if not arranged.recomputed:
            return tiles
        budget -= head.accumulator_bytes(several)
        rest = arranged.recomputed
        tiles.append(head.forward_tile(rest, 0, derivatives, budget, recomputed=True))
        return [*tiles, head.backward_tile(rest, 0, derivatives, True, budget)[0]]
    tiles = [head.forward_tile(tokens, 0, derivatives, budget, regime == 4, head.wide_weight)]
    if regime == 4:
        tiles.append(head.backward_tile(tokens, 0, derivatives, head.wide_weight, budget)[0])
    return tiles


def _workspace(head: Footprint, regime: int, arranged: _Arranged, tiles: list[Tile], budget: int) -> tuple[int, int]:
    """Bytes of workspace in the forward and in the backward."""
    if regime == 3:
        shared = head.accumulator_bytes(arranged.groups > 1 or arranged.recomputed > 0)
        return max(tiles[0].bytes, *(shared + tile.bytes for tile in tiles[1:]), 0), shared
    if regime == 1 and head.backend == "triton" and not head.casts_weight:
        # the fused kernel holds partial statistics of a block of rows instead of a tile
        rows = tiles[0].rows
        kind = architecture(head.device_type)
        known = head.exponentials and (head.softcap or kind in blocks.FIXED_REFERENCE)
        of_head = head.gemm_dtype.itemsize, head.vocabulary, head.softcap
        partials = rows * blocks.partial_bytes_per_row(kind, *of_head, known)
        return rows * head.width * head.gemm_dtype.itemsize * head.copies_rows + min(budget, partials), 0
    return tiles[0].bytes, tiles[1].bytes if regime == 4 else 0


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
    if device_memory is not None:
        check_number("device_memory", device_memory, positive=True)
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
