"""The custom ops: walk the vocabulary tile by tile, forward and backward, over the primitives of a backend.

Three regimes, by what has to be differentiated (V vocabulary, N scored tokens, H hidden; a GEMM is 2 N V H FLOPs); the
third of the design, which needs the loss beside the log-probabilities, is in `onepass`, made of the parts below:

1. nothing: statistics alone, 1 GEMM;
2. hidden states alone: while the tiles pass, U = sum over v != y of exp(z_v - m) D_v W_v is accumulated too, so that
   d logp / d hidden is finished in the forward and the backward scales its rows: 2 GEMMs;
4. weight or bias as well: the forward of regime 2 (or 1), and a backward that recomputes the tiles in vocabulary slices
   with every row, so that each slice of dweight is accumulated in fp32 and rounded once: 4 GEMMs.

With the target y left out of every sum, q_v = exp(z_v - m) / s over v != y, and D_v = dz_v / d(h W_v):

    d logp / d h = (1 - p_y) (D_y W_y - sum_{v != y} q_v D_v W_v)

so every gradient is a well-scaled matrix with one factor g (1 - p_y) per row, which is applied in fp32 to rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import backends, cpu_bf16
from .backends import ENTROPY, REF, STATE_ROWS, STATS, Tokens, Transform
from .checks import check_kept
from .planning import Footprint, accumulation_dtype, gemm_dtype

__all__ = [
    "HeadGradient",
    "Held",
    "Problem",
    "addmm",
    "computing",
    "linear_logprob_bwd",
    "linear_logprob_fwd",
    "no_double_backward",
    "power_of_two",
    "preference",
    "preference_backward",
    "sequence_offsets",
    "sequence_scatter",
    "sequence_sum",
    "walk_forward",
]


class Problem:
    """One call on its scored tokens: dtypes, buffers and the GEMM of a tile."""

    def __init__(
        self,
        hidden: Tensor | None,  # (M, H); None if the head is not trained, in the backward
        weight: Tensor | None,  # (V, H); None likewise
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (M,)
        token_index: Tensor | None,  # (N,)
        select: bool,
        compute_dtype: torch.dtype,
        ignore_index: int,
        transform: Transform,
        backend: str,
    ) -> None:
        self.primitives = backends.get(backend)
        labels = labels.contiguous()
        index = torch.nonzero(labels != ignore_index).squeeze(1) if select else token_index
        index = None if index is None else index.contiguous()
        self.tokens = Tokens(hidden, labels, index, ignore_index, compute_dtype)
        self.device, self.transform = labels.device, transform
        self.rows = labels.numel() if index is None else index.numel()
        # filled block by block
        self.labels = labels if index is None else labels.new_empty(self.rows)
        self.accum_dtype = accumulation_dtype(compute_dtype)
        self.gemm_dtype = gemm_dtype(compute_dtype, self.device.type)
        if hidden is None or weight is None:
            return
        self.hidden, self.weight = hidden, weight
        self.vocabulary, self.width = weight.shape
        self.footprint = Footprint(
            self.vocabulary, self.width, compute_dtype, hidden.dtype, weight.dtype, index is not None,
            transform.cap is not None, self.device.type, backend,
        )  # fmt: skip
        self.bias = self.widened(bias)

    def widened(self, bias: Tensor | None) -> Tensor | None:  # (V,)
        """b * linear in the accumulation dtype, of what the compute dtype holds of b."""
        dtype = self.tokens.compute_dtype
        return None if bias is None else bias.to(dtype).to(self.accum_dtype) * self.transform.linear

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.accum_dtype, device=self.device)

    def tile_view(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        """The tile (rows, columns) in a buffer (..., at least rows x pitch of the columns)."""
        pitch = self.footprint.pitch(columns)
        return buffer[..., : rows * pitch].view(*buffer.shape[:-1], rows, pitch)[..., :columns]

    def row_buffer(self, block: int) -> Tensor | None:
        return self.empty(block, self.width, dtype=self.gemm_dtype) if self.footprint.copies_rows else None

    def weight_buffer(self, columns: int) -> Tensor | None:
        return self.empty(columns, self.width, dtype=self.gemm_dtype) if self.footprint.casts_weight else None

    def weight_slice(self, first: int, last: int, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            return self.weight[first:last]
        part, compute_dtype = self.weight[first:last], self.tokens.compute_dtype
        # the copy rounds to the dtype of the GEMM, unless that is wider than the one to compute in
        return buffer[: last - first].copy_(part if compute_dtype == self.gemm_dtype else part.to(compute_dtype))

    def product_tile(self, rows: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """h W_slice^T * linear in the accumulation dtype: logits but for the bias, which the primitives add."""
        addmm(out, rows, weight.T, out, beta=0, alpha=self.transform.linear)
        return out

    def bias_slice(self, first: int, last: int) -> Tensor | None:
        """Of `widened`, for the logits of a slice."""
        return None if self.bias is None else self.bias[first:last]


def addmm(base: Tensor, a: Tensor, b: Tensor, out: Tensor, beta: float = 1, alpha: float = 1) -> None:
    """out = beta base + alpha a b, accumulated and returned in the dtype of `out`, which may be wider than a and b."""
    if a.dtype == out.dtype:
        torch.addmm(base, a, b, beta=beta, alpha=alpha, out=out)
    elif _ADDMM_TAKES_A_WIDE_BASE:
        torch.addmm(base, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    elif beta == 0:
        torch.mm(a, b, out.dtype, out=out).mul_(alpha)
    else:
        torch.add(base.mul(beta), torch.mm(a, b, out.dtype), alpha=alpha, out=out)


_ADDMM_TAKES_A_WIDE_BASE = torch.__version__ >= "2.10"  # pytorch/pytorch#167931


def check_values(labels: Tensor, token_index: Tensor | None, ignore_index: int, vocabulary: int) -> None:
    labelled, tokens = labels != ignore_index, labels.shape[0]
    outside = labelled & ((labels < 0) | (labels >= vocabulary))
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or equal ignore_index={ignore_index}; "
            f"got {int(labels[at])} at flat position {at}"
        )
    if token_index is None:
        return
    if token_index.numel() and not bool(((token_index >= 0) & (token_index < tokens)).all()):
        raise ValueError(f"token_index must lie in [0, {tokens}), got values outside")
    scored = torch.zeros_like(labels).index_add_(0, token_index, torch.ones_like(token_index))
    if bool((labelled & (scored != 1)).any()):
        raise ValueError(
            "token_index must hold every position with a label exactly once (positions with ignore_index may pad it)"
        )


# `select` looks for the labelled rows on the host, which no CUDA graph can hold
UNSAFE_IN_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("alignloss::linear_logprob_fwd", mutates_args=(), tags=UNSAFE_IN_GRAPHS)
def linear_logprob_fwd(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) int64
    token_index: Tensor | None,  # (N,) int64 rows to score; None: every row, or see `select`
    select: bool,  # choose the labelled rows inside the op
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: int,  # bits of backends.STATS
    save: int,  # 0: nothing; 1: d logp / d hidden; 2: and d entropy / d hidden
    recomputed: bool,  # the head trains: a backward will recompute the logits
    backend: str,
    workspace_bytes: int,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, *stats, state, dlogp, dentropy); what was not asked for is empty.

    logps are float64, so that their gradient is: d loss / d log p may be as large as 1 / (1 - p), beyond float32, where
    the factor 1 - p that belongs to it is still to come.
    """
    if validate:
        check_values(labels, token_index, ignore_index, weight.shape[0])
    with computing(hidden, compute_dtype):
        transform = Transform.of(logit_scale, softcap, temperature)
        problem = Problem(
            hidden, weight, bias, labels, token_index, select, compute_dtype, ignore_index, transform, backend
        )
        # under `select` the shape has to be known to the compiler: the rows beyond the scored ones are unused
        kept = labels.shape[0] if select else problem.rows
        new = labels.new_zeros if select else labels.new_empty
        state = new((STATE_ROWS, kept), dtype=problem.accum_dtype)
        saved = [new((kept, hidden.shape[1]) if save > i else 0, dtype=compute_dtype) for i in range(2)]
        # a position that is not scored is 0
        new = labels.new_empty if problem.tokens.token_index is None else labels.new_zeros
        asked = [True, *(bool(stats >> i & 1) for i in range(len(STATS)))]
        kinds = output_dtypes(problem.accum_dtype)
        outputs = [new(labels.shape if wanted else 0, dtype=kind) for wanted, kind in zip(asked, kinds, strict=True)]
        given = [output if wanted else None for wanted, output in zip(asked, outputs, strict=True)]
        dlogp, dentropy = (t if t.dim() == 2 else None for t in saved)
        walk_forward(problem, state, given, stats, dlogp, dentropy, workspace_bytes, recomputed=recomputed)
        return (*outputs, state, *saved)  # type: ignore[return-value]


def output_dtypes(accum_dtype: torch.dtype) -> list[torch.dtype]:
    """Of logps and STATS."""
    return [torch.float64, *(torch.bool if name == "is_top1" else accum_dtype for name in STATS)]


@contextmanager
def computing(tensor: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """What every walk runs under: no autocast, the device of `tensor`, the products that suit the dtype."""
    kind = tensor.device.type
    with torch.autocast(kind, enabled=False), device_guard(tensor), cpu_bf16.bf16_products(dtype, kind):
        yield


def device_guard(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def walk_forward(
    problem: Problem,
    state: Tensor,  # (7, N or more)
    outputs: list[Tensor | None],  # logps and STATS, (M,)
    stats: int,
    dlogp: Tensor | None,  # (N or more, H)
    dentropy: Tensor | None,  # (N or more, H)
    workspace_bytes: int,
    held: "Held | None" = None,  # keeps the tiles
    recomputed: bool = False,  # a backward will recompute them
) -> None:
    if problem.rows == 0:
        return
    primitives, transform = problem.primitives, problem.transform
    save = (dlogp is not None) + (dentropy is not None)
    tiles = problem.footprint.fold_tiles(stats, save)
    direct = writes_dweight(problem.weight)
    block, columns, _ = problem.footprint.forward(problem.rows, stats, save, workspace_bytes, recomputed, direct)
    if held is not None:
        block, columns = problem.rows, held.columns
    in_place = held is not None and held.in_place
    row_buffer = problem.row_buffer(block)
    weight_buffer = tile = scratch = accumulators = None
    for start in range(0, problem.rows, block):
        part = slice(start, min(start + block, problem.rows))
        count = part.stop - start
        labels, sums = problem.labels[part], state[:, part]
        copy = None if row_buffer is None else row_buffer[:count]
        rows = problem.hidden[part] if copy is None else copy
        primitives.gather(problem.tokens, part, labels, copy, sums)
        u = u2 = None
        fused = not save and not problem.footprint.casts_weight
        fused &= not (recomputed and problem.footprint.recomputes_exactly)
        if not fused or not primitives.statistics(
            rows, problem.weight, problem.bias, labels, sums, transform, stats, workspace_bytes
        ):
            if tile is None:
                cells = block * problem.footprint.pitch(columns)
                tile, scratch = problem.empty(cells * (not in_place)), problem.empty(tiles, cells)
                weight_buffer = problem.weight_buffer(columns)
                accumulators = problem.empty(save, block, problem.width)
            assert scratch is not None and accumulators is not None
            u, u2 = (accumulators[i, :count] if i < save else None for i in range(2))
            for first in range(0, problem.vocabulary, columns):
                last = min(first + columns, problem.vocabulary)
                weight = problem.weight_slice(first, last, weight_buffer)
                kept = None if held is None else held.tile(first, last)
                if kept is not None and in_place:
                    x, kept = kept, None
                else:
                    x = problem.tile_view(tile, count, last - first)
                problem.product_tile(rows, weight, x)
                spare = problem.tile_view(scratch, count, last - first)
                begun = first > 0
                exps, z_exps = primitives.fold(
                    x,
                    problem.bias_slice(first, last),
                    spare,
                    sums,
                    labels,
                    first,
                    transform,
                    stats,
                    save,
                    u if begun else None,
                    u2 if begun else None,
                    problem.gemm_dtype,
                    kept,
                )
                if held is not None:
                    held.references[first // columns].copy_(sums[REF])
                if u is not None:
                    addmm(u, exps, weight, u, beta=int(begun))
                if u2 is not None:
                    addmm(u2, z_exps, weight, u2, beta=int(begun))
        derivatives = (None if t is None else t[part] for t in (dlogp, dentropy))
        primitives.finish(problem.tokens, part, labels, sums, u, u2, problem.weight, transform, outputs, *derivatives)


def writes_dweight(weight: Tensor) -> bool:
    """Whether a GEMM can write slices of the gradient of a weight like this, which is wide enough and contiguous."""
    return weight.dtype == accumulation_dtype(weight.dtype) and weight.is_contiguous()


class Held:
    """The tiles of a walk, kept as exponentials in the dtype of the GEMM, with the references they are relative to."""

    def __init__(self, problem: Problem, tiles: Tensor) -> None:
        self.rows, self.vocabulary = problem.rows, problem.vocabulary
        self.columns = problem.footprint.held_columns(max(self.rows, 1))
        self.problem = problem
        self.tiles = tiles  # room for N rows of V entries
        self.references = problem.empty(-(-self.vocabulary // self.columns), self.rows)
        self.in_place = problem.gemm_dtype == problem.accum_dtype  # logits are computed where they are held

    def tile(self, first: int, last: int) -> Tensor:
        return self.problem.tile_view(self.tiles[self.rows * first :], self.rows, last - first)


class HeadGradient:
    """dweight and dbias of a loss with upstream gradient 1, added up over groups of rows."""

    def __init__(self, weight: Tensor, need_dweight: bool, need_dbias: bool, problem: Problem, several: bool) -> None:
        accum = problem.accum_dtype
        self.primitives = problem.primitives
        self.weight_dtype = weight.dtype
        shape = weight.shape if need_dweight else (0,)
        self.dweight = problem.empty(*shape, dtype=accum if several else weight.dtype)
        self.dbias = problem.empty(problem.vocabulary if need_dbias else 0)
        self.unit: Tensor | None = None
        self.begun = 0

    def add_held(self, problem: Problem, held: Held, state: Tensor, dlogps: Tensor) -> None:
        """Add the part of a group, overwriting its tiles by the gradient of their logits."""
        primitives = problem.primitives
        weighed = _Rows(problem, state, dlogps)
        if torch.float16 in (problem.gemm_dtype, self.dweight.dtype):
            self.unit = weighed.find_unit()
        scaled = problem.empty(problem.rows, problem.width, dtype=problem.gemm_dtype)
        weighed.weigh(slice(0, problem.rows), problem.row_buffer(problem.rows), scaled)
        wide = self.dweight.dtype == problem.accum_dtype or problem.footprint.gemm_rounds_dweight
        partial = None if self.dweight.dim() < 2 or wide else problem.empty(held.columns, problem.width)
        for first in range(0, problem.vocabulary, held.columns):
            last = min(first + held.columns, problem.vocabulary)
            reference = held.references[first // held.columns]
            dz = held.tile(first, last)
            primitives.held_dlogits(dz, reference, state, problem.labels, first, problem.transform, weighed.coefficient)
            if self.dweight.dim() == 2:
                dw = self.dweight[first:last] if partial is None else partial[: last - first]
                addmm(dw, dz.T, scaled, dw, beta=self.begun)
                if partial is not None:
                    self.dweight[first:last] = dw
            if self.dbias.numel():
                db = self.dbias[None, first:last]
                addmm(db, weighed.coefficient[None].to(dz.dtype), dz, db, beta=self.begun)
        self.begun = 1

    def add_recomputed(self, problem: Problem, state: Tensor, dlogps: Tensor, stats: int, workspace_bytes: int) -> None:
        """Add the part of rows whose tiles are not held, after groups whose tiles were: in the accumulation dtype."""
        rows = _Rows(problem, state, dlogps)
        _walk_backward(problem, rows, self.dweight, self.dbias, self.begun, stats, 1, workspace_bytes)
        self.begun = 1

    def times(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(dweight, dbias) for an upstream gradient, in the buffers themselves where the dtype is the weight's."""
        factor = (upstream if self.unit is None else upstream * self.unit).to(self.dbias.dtype)
        for gradient in (self.dweight, self.dbias):
            self.primitives.scale(gradient, factor)
        dweight = self.dweight.to(self.weight_dtype) if self.dweight.dim() == 2 else None
        return dweight, self.dbias if self.dbias.numel() else None


@torch.library.custom_op("alignloss::linear_logprob_bwd", mutates_args=(), tags=UNSAFE_IN_GRAPHS)
def linear_logprob_bwd(
    dlogps: Tensor,  # (M,) float64
    dentropies: Tensor | None,  # (M,)
    hidden: Tensor | None,  # (M, H), for dweight and dbias
    weight: Tensor | None,  # (V, H), for dweight and dbias
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,)
    token_index: Tensor | None,  # (N,)
    state: Tensor,  # (7, N), or more rows under `select`
    dlogp: Tensor,  # (N, H) or empty
    dentropy: Tensor,  # (N, H) or empty
    select: bool,
    hidden_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    stats: int,  # of the forward, as the next
    save: int,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); what was not asked for is empty."""
    with computing(dlogps, compute_dtype):
        transform = Transform.of(logit_scale, softcap, temperature)
        problem = Problem(
            hidden, weight, bias, labels, token_index, select, compute_dtype, ignore_index, transform, backend
        )
        dhidden = dlogp.new_empty(0, dtype=hidden_dtype)
        if dlogp.dim() == 2:
            # a position that is not scored has no gradient
            new = dlogp.new_empty if problem.tokens.token_index is None else dlogp.new_zeros
            dhidden = new((len(labels), dlogp.shape[1]), dtype=hidden_dtype)
        rows = _Rows(problem, state, dlogps, dentropies, dlogp, dentropy, dhidden)
        dweight = state.new_empty(0) if weight is None or not need_dweight else torch.empty_like(weight)
        dbias = problem.empty(problem.vocabulary if need_dbias else 0)
        if need_dweight or need_dbias:
            _walk_backward(problem, rows, dweight, dbias, 0, stats, save, workspace_bytes)
        else:
            rows.weigh(slice(0, problem.rows))
        return dhidden, dweight, dbias


def power_of_two(values: Tensor) -> Tensor:
    """The least power of two that no value exceeds in size, 0-d, at least 2^-100."""
    return values.abs().amax().clamp(min=2.0**-100).log2().ceil().exp2()


class _Rows:
    """The rows of a backward: their coefficients, and dhidden, which is filled the first time that a row is weighed."""

    def __init__(
        self,
        problem: Problem,
        state: Tensor,  # (7, N or more)
        dlogps: Tensor,  # (M,)
        dentropies: Tensor | None = None,  # (M,)
        dlogp: Tensor | None = None,  # (N or more, H) or empty
        dentropy: Tensor | None = None,  # (N or more, H) or empty
        dhidden: Tensor | None = None,  # (M, H) or empty
    ) -> None:
        self.problem, self.state, self.primitives = problem, state, problem.primitives
        self.dlogps, self.dentropies = dlogps, dentropies
        self.dlogp, self.dentropy, self.dhidden = (
            None if t is None or t.dim() < 2 else t for t in (dlogp, dentropy, dhidden)
        )
        self.coefficient = problem.empty(problem.rows)
        self.mix = None if dentropies is None else problem.empty(3, problem.rows)
        self.unit: Tensor | None = None
        self.filled = problem.rows if self.dhidden is None else 0

    def find_unit(self) -> Tensor:
        """A power of two to go round a GEMM in fp16, whose range the coefficients of a scaled loss may leave."""
        self.weigh(slice(0, self.problem.rows))
        self.unit = power_of_two(self.coefficient)
        return self.unit

    def weigh(self, part: slice, rows: Tensor | None = None, scaled: Tensor | None = None) -> None:
        """Fill coefficients, mix and dhidden of a part, and on request its hidden rows, as they are and weighed."""
        if part.start == part.stop:
            return
        fill = part.start >= self.filled
        self.filled = max(self.filled, part.stop)
        self.primitives.weigh(
            self.problem.tokens,
            part,
            self.problem.labels[part],
            self.state[:, part],
            self.problem.transform,
            self.dlogps,
            self.dentropies,
            self.coefficient[part],
            None if self.mix is None else self.mix[:, part],
            self.unit,
            self.dlogp[part] if fill and self.dlogp is not None else None,
            self.dentropy[part] if fill and self.dentropy is not None else None,
            self.dhidden if fill else None,
            rows,
            scaled,
        )


def _walk_backward(
    problem: Problem,
    weighed: _Rows,
    dweight: Tensor,  # (V, H), of the weight's dtype or of the accumulation, or empty (0,)
    dbias: Tensor,  # (V,) or empty
    begun: int,  # 0: they are filled; 1: they are added to, in the accumulation dtype
    stats: int,  # of the forward, as the next
    save: int,
    workspace_bytes: int,
) -> None:
    primitives, transform = weighed.primitives, problem.transform
    need_dweight, need_dbias = dweight.dim() == 2, dbias.numel() > 0
    if problem.rows == 0:
        if not begun:
            dweight.zero_()
            dbias.zero_()
        return

    if problem.gemm_dtype == torch.float16:
        weighed.find_unit()

    tiles = problem.footprint.dlogits_tiles(weighed.mix is not None)
    # the tile of the forward, which knew the weight and not whether it trains
    direct = writes_dweight(dweight if need_dweight else problem.weight)
    assert not begun or (direct and weighed.unit is None)
    (block, columns, _), direct = problem.footprint.backward(
        problem.rows, stats, save, direct, workspace_bytes, rounded=dweight.is_contiguous()
    )
    weight_buffer = problem.weight_buffer(columns)
    row_buffer = problem.row_buffer(block)
    scaled_buffer = problem.empty(block, problem.width, dtype=problem.gemm_dtype)
    cells = block * problem.footprint.pitch(columns)
    tile, scratch = problem.empty(cells), problem.empty(tiles, cells)
    partial = problem.empty(columns, problem.width) if need_dweight and not direct else None
    for first in range(0, problem.vocabulary, columns):
        last = min(first + columns, problem.vocabulary)
        w = problem.weight_slice(first, last, weight_buffer)
        dw = dweight[first:last] if partial is None else partial[: last - first]
        for start in range(0, problem.rows, block):
            part = slice(start, min(start + block, problem.rows))
            count, beta = part.stop - start, int(start > 0) or begun
            copy = None if row_buffer is None else row_buffer[:count]
            rows, scaled = problem.hidden[part] if copy is None else copy, scaled_buffer[:count]
            if first == 0 or block < problem.rows:
                weighed.weigh(part, copy, scaled)
            x = problem.product_tile(rows, w, problem.tile_view(tile, count, last - first))
            dz = primitives.dlogits(
                x,
                problem.bias_slice(first, last),
                problem.tile_view(scratch, count, last - first),
                weighed.state[:, part],
                problem.labels[part],
                first,
                transform,
                weighed.coefficient[part],
                None if weighed.mix is None else weighed.mix[:, part],
                problem.gemm_dtype,
            )
            if need_dweight:
                addmm(dw, dz.T, scaled, dw, beta=beta)
            if need_dbias:
                coefficient = weighed.coefficient[None, part].to(problem.gemm_dtype)
                db = dbias[None, first:last]
                addmm(db, coefficient, dz, db, beta=beta)
        if weighed.unit is not None and need_dweight:
            dw.mul_(weighed.unit)
        if partial is not None:
            dweight[first:last] = dw
    if weighed.unit is not None:
        dbias.mul_(weighed.unit)


@linear_logprob_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, token_index, select, compute_dtype, ignore_index, logit_scale, softcap,
    temperature, stats, save, recomputed, backend, workspace_bytes, validate,
):  # fmt: skip
    tokens = labels.shape[0]
    rows = tokens if token_index is None else token_index.shape[0]
    dtype = accumulation_dtype(compute_dtype)
    asked = [True, *(bool(stats >> i & 1) for i in range(len(STATS)))]
    outputs = [
        labels.new_empty(tokens if wanted else 0, dtype=kind)
        for wanted, kind in zip(asked, output_dtypes(dtype), strict=True)
    ]
    outputs.append(labels.new_empty((STATE_ROWS, rows), dtype=dtype))
    for i in range(2):
        outputs.append(labels.new_empty((rows, hidden.shape[1]) if save > i else 0, dtype=compute_dtype))
    return tuple(outputs)


@linear_logprob_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dlogps, dentropies, hidden, weight, bias, labels, token_index, state, dlogp, dentropy, select, hidden_dtype,
    compute_dtype, ignore_index, logit_scale, softcap, temperature, stats, save, need_dweight, need_dbias, backend,
    workspace_bytes,
):  # fmt: skip
    shape = (labels.shape[0], dlogp.shape[1]) if dlogp.dim() == 2 else (0,)
    return (
        dlogps.new_empty(shape, dtype=hidden_dtype),
        torch.empty_like(weight) if need_dweight else state.new_empty(0),
        state.new_empty(weight.shape[0]) if need_dbias else state.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, token_index, *options = inputs
    *_, state, dlogp, dentropy = output
    ctx.set_materialize_grads(False)  # zeros for the gradient of the saved (N, H) would cost its memory again
    trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    head = (hidden, weight, bias) if trains_head else (None, None, None)
    ctx.save_for_backward(*head, labels, token_index, state, dlogp, dentropy)
    ctx.options, ctx.hidden_dtype, ctx.bias_dtype = options, hidden.dtype, None if bias is None else bias.dtype


def _backward(ctx, dlogps, dlse, dentropies, *rest):  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, token_index, state, dlogp, dentropy = ctx.saved_tensors
    select, compute_dtype, ignore_index, logit_scale, softcap, temperature, stats, save, _, backend, workspace, _ = (
        ctx.options
    )
    need_dhidden, need_dweight, need_dbias = ctx.needs_input_grad[:3]
    if dlogps is None and dentropies is None:
        return (None,) * 17
    check_kept(hidden=hidden, weight=weight, bias=bias)
    dhidden, dweight, dbias = linear_logprob_bwd(
        (torch.zeros_like(dentropies) if dlogps is None else dlogps).double().contiguous(),
        None if dentropies is None or not stats & ENTROPY else dentropies.contiguous(),
        hidden, weight, bias, labels, token_index, state, dlogp, dentropy, select, ctx.hidden_dtype, compute_dtype,
        ignore_index, logit_scale, softcap, temperature, stats, save, need_dweight, need_dbias, backend, workspace,
    )  # fmt: skip
    return (
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
        dbias.to(ctx.bias_dtype) if need_dbias else None,
        *(None,) * 14,
    )


def no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "alignloss does not support double backward: its gradients have no gradient of their own. "
        "Call backward() without create_graph=True, or use full logits for second derivatives."
    )


linear_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_bwd.register_autograd(no_double_backward)


@torch.library.custom_op("alignloss::sequence_offsets", mutates_args=())
def sequence_offsets(
    cu_seqlens: Tensor,  # (S + 1,)
    tokens: int,
    whole: bool,  # the last sequence ends with the tokens
    may_be_empty: bool,  # a sequence may have no tokens
    validate: bool,
) -> Tensor:
    """Offsets (S + 1,) as int64, if they rise from 0 to `tokens`; else a ValueError with `validate`, all -1 without."""
    offsets = cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    lengths = offsets.diff()
    fits = (lengths >= (0 if may_be_empty else 1)).all() & (offsets[0] == 0)
    fits &= (offsets[-1] == tokens) if whole else (offsets[-1] <= tokens)
    if not validate:
        return torch.where(fits, offsets, -1)
    if not bool(fits):
        empty = not may_be_empty and bool((lengths >= 0).all())
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {offsets.tolist()[:8]} ..."
            + ("; where it is padded by repeated offsets, give real_sequences, how many are real" if empty else "")
        )
    return offsets


@sequence_offsets.register_fake
def _(cu_seqlens, tokens, whole, may_be_empty, validate):  # type: ignore[no-untyped-def]
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


@torch.library.custom_op("alignloss::sequence_sum", mutates_args=())
def sequence_sum(
    values: Tensor,  # (M,) per token
    cu_seqlens: Tensor | None,  # (S + 1,) int64; None: S parts of one length
    sequences: int,
    token_weights: Tensor | None,  # (M,)
    backend: str,
) -> Tensor:  # (S,) fp64
    with device_guard(values):
        return backends.get(backend).sequence_sum(values, cu_seqlens, sequences, token_weights)


@torch.library.custom_op("alignloss::sequence_scatter", mutates_args=())
def sequence_scatter(
    dsums: Tensor,  # (S,) fp64
    cu_seqlens: Tensor | None,  # (S + 1,) int64
    token_weights: Tensor | None,  # (M,)
    tokens: int,
    backend: str,
) -> Tensor:  # (M,) float64
    with device_guard(dsums):
        return backends.get(backend).sequence_scatter(dsums, cu_seqlens, token_weights, tokens)


@sequence_sum.register_fake
def _(values, cu_seqlens, sequences, token_weights, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(sequences, dtype=torch.float64)


@sequence_scatter.register_fake
def _(dsums, cu_seqlens, token_weights, tokens, backend):  # type: ignore[no-untyped-def]
    return dsums.new_empty(tokens)


def _sequence_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, cu_seqlens, _, token_weights, backend = inputs
    ctx.save_for_backward(cu_seqlens, token_weights)
    ctx.tokens, ctx.backend = values.shape[0], backend


def _sequence_backward(ctx, dsums):  # type: ignore[no-untyped-def]
    cu_seqlens, token_weights = ctx.saved_tensors
    dvalues = sequence_scatter(dsums.contiguous(), cu_seqlens, token_weights, ctx.tokens, ctx.backend)
    return dvalues, None, None, None, None


sequence_sum.register_autograd(_sequence_backward, setup_context=_sequence_setup)
sequence_scatter.register_autograd(no_double_backward)


@torch.library.custom_op("alignloss::preference", mutates_args=())
def preference(
    values: Tensor,  # (M,) token log-probabilities
    token_weights: Tensor | None,  # (M,)
    labels: Tensor,  # (M,) int64: where the sums run
    nll_labels: Tensor | None,  # (M,) int64: where the NLL of the chosen sequences runs; by default at labels
    cu_seqlens: Tensor | None,  # (S + 1,) int64; None: S parts of one length
    sequences: int,
    ref_logps: Tensor | None,  # (S,)
    desirable: Tensor | None,  # (S,) or 0-d
    kl: Tensor | None,  # (S,) or 0-d
    pair_weights: Tensor | None,  # (B,) or 0-d
    num_sequences: Tensor | None,  # 0-d
    num_tokens: Tensor | None,  # 0-d
    loss: str,  # "dpo", "ipo", "kto" or "cpo"
    ignore_index: int,
    nll_weight: float,
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, losses (B,), sums (S,), rewards (S,), nll_loss, slopes, scales), by two Triton launches.

    Only the loss has a gradient; slopes and scales are what it needs.
    """
    with device_guard(values):
        return backends.get("triton").preference(
            values,
            token_weights,
            labels,
            labels if nll_labels is None else nll_labels,
            cu_seqlens,
            sequences,
            ref_logps,
            desirable,
            kl,
            pair_weights,
            num_sequences,
            num_tokens,
            loss,
            ignore_index,
            nll_weight,
            beta,
            label_smoothing,
            desirable_weight,
            undesirable_weight,
        )


@torch.library.custom_op("alignloss::preference_backward", mutates_args=())
def preference_backward(
    dloss: Tensor,  # 0-d
    slopes: Tensor,  # (S,)
    scales: Tensor,  # (2,)
    token_weights: Tensor | None,  # (M,)
    labels: Tensor,  # (M,)
    nll_labels: Tensor | None,  # (M,)
    cu_seqlens: Tensor | None,  # (S + 1,)
    paired: bool,
    ignore_index: int,
) -> Tensor:  # (M,) float64
    with device_guard(dloss):
        return backends.get("triton").preference_backward(
            dloss,
            slopes,
            scales,
            token_weights,
            labels,
            labels if nll_labels is None else nll_labels,
            cu_seqlens,
            paired,
            ignore_index,
        )


@preference.register_fake
def _(values, token_weights, labels, nll_labels, cu_seqlens, sequences, *data):  # type: ignore[no-untyped-def]
    count = sequences if data[6] == "kto" else sequences // 2
    shapes = [(), (count,), (sequences,), (sequences,), ()]
    outputs = [values.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return (*outputs, *(values.new_empty(n, dtype=torch.float64) for n in (sequences, 2)))


@preference_backward.register_fake
def _(dloss, slopes, scales, token_weights, labels, *rest):  # type: ignore[no-untyped-def]
    return dloss.new_empty(labels.shape, dtype=torch.float64)


def _preference_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, token_weights, labels, nll_labels, cu_seqlens, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-2:], token_weights, labels, nll_labels, cu_seqlens)
    ctx.paired, ctx.ignore_index = inputs[12] != "kto", inputs[13]


def _preference_backward(ctx, dloss, *unused):  # type: ignore[no-untyped-def]
    if dloss is None:
        return (None,) * 19
    return preference_backward(dloss, *ctx.saved_tensors, ctx.paired, ctx.ignore_index), *(None,) * 18


preference.register_autograd(_preference_backward, setup_context=_preference_setup)
preference_backward.register_autograd(no_double_backward)
