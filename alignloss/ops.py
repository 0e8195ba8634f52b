"""The custom ops: walk the vocabulary tile by tile, forward and backward, over the primitives of a backend.

Three regimes, by what has to be differentiated (V vocabulary, N scored tokens, H hidden; a GEMM is 2 N V H FLOPs):

1. nothing: statistics alone, 1 GEMM;
2. hidden states alone: while the tiles pass, U = sum over v != y of exp(z_v - m) D_v W_v is accumulated too, so that
   d logp / d hidden is finished in the forward and the backward scales its rows: 2 GEMMs;
4. weight or bias as well: the forward of regime 2 (or 1), and a backward that recomputes the tiles in vocabulary slices
   with every row, so that each slice of dweight is accumulated in fp32 and rounded once: 4 GEMMs.

With the target y left out of every sum, q_v = exp(z_v - m) / s over v != y, and D_v = dz_v / d(h W_v):

    d logp / d h = (1 - p_y) (D_y W_y - sum_{v != y} q_v D_v W_v)

so every gradient is a well-scaled matrix with one factor g (1 - p_y) per row, which is applied in fp32 to rows.
"""

import torch
from torch import Tensor

from . import backends
from .backends import ENTROPY, REF, SAVED_ROWS, STATE_ROWS, STATS, TARGET, TOP, Transform

__all__ = [
    "linear_logprob_bwd",
    "linear_logprob_fwd",
    "preference",
    "sequence_offsets",
    "sequence_scatter",
    "sequence_sum",
]

MIB = 1 << 20


def default_workspace(device: torch.device) -> int:
    """Workspace in bytes when the caller names none: a function of the device's total memory, never of its free one."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(64 * MIB, min(512 * MIB, total // 256))
    return 32 * MIB


def tile_shape(
    rows: int,  # N
    vocabulary: int,  # V
    row_bytes: int,  # buffers per row of a block
    column_bytes: int,  # buffers per vocabulary entry of a slice
    cell_bytes: int,  # bytes per entry of the tile
    workspace_bytes: int,
    device: torch.device,
) -> tuple[int, int]:
    """Rows per block C and vocabulary entries per slice Vs that fit the workspace; never below 16 x 16."""
    most_rows, most_columns = 8192, vocabulary
    if device.type != "cuda":
        # a tile that stays in the cache between the passes over it; more rows where every block casts the weight anew
        most_rows, most_columns = (1024 if column_bytes else 512), 2048
    block = _even_parts(rows, max(16, min(most_rows, workspace_bytes // 4 // max(row_bytes, 1))), 16)
    free = workspace_bytes - block * row_bytes
    columns = max(16, min(most_columns, free // (block * cell_bytes + column_bytes)))
    return block, _even_parts(vocabulary, columns, 128 if columns >= 128 else 16)


def _even_parts(total: int, most: int, multiple: int) -> int:
    """The size of parts of `total` of nearly one size, at most `most` each, a multiple of `multiple` if several."""
    parts = -(-total // most)
    if parts <= 1:
        return max(total, 1)
    size = -(-total // parts)
    return min(most // multiple * multiple, -(-size // multiple) * multiple)


class _Problem:
    """One call on its scored tokens: dtypes, buffers and the two GEMMs of a tile."""

    def __init__(
        self,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (M,)
        token_index: Tensor | None,  # (N,)
        select: bool,
        compute_dtype: torch.dtype,
        ignore_index: int,
        transform: Transform,
    ) -> None:
        self.hidden, self.weight, self.transform = hidden, weight, transform
        self.index = torch.nonzero(labels != ignore_index).squeeze(1) if select else token_index
        labels = labels.contiguous() if self.index is None else labels[self.index]
        # rows with an ignored label score token 0 and are zeroed at the end
        self.ignored = None if select else labels == ignore_index
        self.labels = labels if self.ignored is None else labels.masked_fill(self.ignored, 0)
        self.rows, self.vocabulary, self.width = labels.numel(), weight.shape[0], hidden.shape[1]
        self.compute_dtype = compute_dtype
        self.accum_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        # CPU GEMMs of 16-bit operands round their result to 16 bits: widen the operands instead
        self.gemm_dtype = self.accum_dtype if hidden.device.type == "cpu" else compute_dtype
        self.cast_weight = {weight.dtype, compute_dtype} != {self.gemm_dtype}
        cast_rows = {hidden.dtype, compute_dtype} != {self.gemm_dtype}
        self.copy_rows = self.index is not None or self.ignored is not None or cast_rows
        self.bias = None if bias is None else bias.to(compute_dtype).to(self.accum_dtype) * transform.linear

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.accum_dtype, device=self.hidden.device)

    def row_buffer(self, block: int) -> Tensor | None:
        return self.empty(block, self.width, dtype=self.gemm_dtype) if self.copy_rows else None

    def weight_buffer(self, columns: int) -> Tensor | None:
        return self.empty(columns, self.width, dtype=self.gemm_dtype) if self.cast_weight else None

    def hidden_rows(self, start: int, stop: int, buffer: Tensor | None) -> Tensor:
        """Rows of the scored tokens in the dtype of the GEMM, rounded to the compute dtype first."""
        if buffer is None:
            return self.hidden[start:stop]
        rows = self.hidden[start:stop] if self.index is None else self.hidden[self.index[start:stop]]
        out = buffer[: stop - start].copy_(rows.to(self.compute_dtype))
        return out if self.ignored is None else out.masked_fill_(self.ignored[start:stop, None], 0)

    def weight_slice(self, first: int, last: int, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            return self.weight[first:last]
        return buffer[: last - first].copy_(self.weight[first:last].to(self.compute_dtype))

    def logits_tile(self, rows: Tensor, weight: Tensor, first: int, out: Tensor) -> Tensor:
        """x = (h W_slice^T + b) * linear in the accumulation dtype."""
        if self.bias is None:
            _addmm(out, rows, weight.T, out, beta=0, alpha=self.transform.linear)
        else:
            bias = self.bias[first : first + weight.shape[0]]
            _addmm(bias.expand_as(out), rows, weight.T, out, beta=1, alpha=self.transform.linear)
        return out

    def put(self, values: Tensor, tokens: int) -> Tensor:
        """Spread per-row results to the (M,) tokens; 0 elsewhere."""
        if self.ignored is not None:
            values = values.masked_fill(self.ignored, 0)
        if self.index is None:
            return values
        return values.new_zeros(tokens).index_put_((self.index,), values)


def _addmm(base: Tensor, a: Tensor, b: Tensor, out: Tensor, beta: float = 1, alpha: float = 1) -> None:
    """out = beta base + alpha a b, accumulated and returned in the dtype of `out`, which may be wider than a and b."""
    if a.dtype == out.dtype:
        torch.addmm(base, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(base, a, b, out.dtype, beta=beta, alpha=alpha, out=out)


def _check_values(labels: Tensor, token_index: Tensor | None, ignore_index: int, vocabulary: int, tokens: int) -> None:
    labelled = labels != ignore_index
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


@torch.library.custom_op("alignloss::linear_logprob_fwd", mutates_args=())
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
    backend: str,
    workspace_bytes: int,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, *stats, state, dlogp, dentropy); what was not asked for is empty."""
    if validate:
        _check_values(labels, token_index, ignore_index, weight.shape[0], labels.shape[0])
    with torch.autocast(hidden.device.type, enabled=False), _device(hidden):
        transform = Transform.of(logit_scale, softcap, temperature)
        problem = _Problem(hidden, weight, bias, labels, token_index, select, compute_dtype, ignore_index, transform)
        state, dlogp, dentropy = _walk_forward(problem, stats, save, backend, workspace_bytes)
        row_stats = backends.get(backend).finish(state, problem.vocabulary, transform, stats)
        tokens = labels.shape[0]
        outputs = [problem.put(values, tokens) if values is not None else state.new_empty(0) for values in row_stats]
        if not stats & backends.IS_TOP1:
            outputs[1 + STATS.index("is_top1")] = labels.new_empty(0, dtype=torch.bool)
        saved = state[:SAVED_ROWS].clone()
        if select:
            # a fixed shape for the compiler: the rows beyond the scored ones are unused
            saved, dlogp, dentropy = (_pad_rows(t, tokens, dim) for t, dim in ((saved, 1), (dlogp, 0), (dentropy, 0)))
        return (*outputs, saved, dlogp, dentropy)  # type: ignore[return-value]


def _pad_rows(values: Tensor, rows: int, dim: int) -> Tensor:
    if values.dim() == 1:
        return values
    shape = list(values.shape)
    shape[dim] = rows - shape[dim]
    return torch.cat([values, values.new_zeros(shape)], dim)


def _device(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def _walk_forward(
    problem: _Problem, stats: int, save: int, backend: str, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    primitives, transform = backends.get(backend), problem.transform
    state = problem.empty(STATE_ROWS, problem.rows).zero_()
    state[REF], state[TOP], state[TARGET] = -1e30, -torch.inf, torch.nan
    dlogp = problem.empty(problem.rows, problem.width, dtype=problem.compute_dtype) if save else state.new_empty(0)
    dentropy = torch.empty_like(dlogp) if save == 2 else state.new_empty(0)
    if problem.rows == 0:
        return state, dlogp, dentropy

    accum, gemm = state.element_size(), problem.gemm_dtype.itemsize
    narrow = gemm * (problem.gemm_dtype != problem.accum_dtype)  # a tile rounded for the second GEMM
    tiles = primitives.scratch_tiles(transform.cap, stats, save)
    block, columns = tile_shape(
        problem.rows,
        problem.vocabulary,
        problem.width * (save * accum + problem.copy_rows * gemm + (save > 0) * accum),
        problem.width * gemm * problem.cast_weight,
        accum * (1 + tiles) + narrow * save,
        workspace_bytes,
        state.device,
    )
    row_buffer, weight_buffer = problem.row_buffer(block), None
    tile = scratch = accumulators = None
    for start in range(0, problem.rows, block):
        stop = min(start + block, problem.rows)
        rows, labels = problem.hidden_rows(start, stop, row_buffer), problem.labels[start:stop]
        part = state[:, start:stop]
        if save == 0 and primitives.statistics(
            rows, problem.weight, problem.bias, labels, part, transform, stats, workspace_bytes
        ):
            continue
        if tile is None:
            tile, scratch = problem.empty(block * columns), problem.empty(tiles, block * columns)
            weight_buffer = problem.weight_buffer(columns)
            accumulators = problem.empty(save, block, problem.width)
        assert scratch is not None and accumulators is not None
        accumulated = accumulators[:, : stop - start].zero_()
        u, u2 = (accumulated[i] if i < save else None for i in range(2))
        for first in range(0, problem.vocabulary, columns):
            last = min(first + columns, problem.vocabulary)
            shape = (stop - start, last - first)
            weight = problem.weight_slice(first, last, weight_buffer)
            x = problem.logits_tile(rows, weight, first, tile[: shape[0] * shape[1]].view(shape))
            spare = scratch[:, : x.numel()].view(tiles, *shape)
            exps, z_exps = primitives.fold(
                x, spare, part, labels, first, transform, stats, save, u, u2, problem.gemm_dtype
            )
            if u is not None:
                _addmm(u, exps, weight, u)
            if u2 is not None:
                _addmm(u2, z_exps, weight, u2)
        if u is not None:
            primitives.derivative(
                u,
                u2,
                part,
                problem.weight,
                labels,
                transform,
                dlogp[start:stop],
                dentropy[start:stop] if u2 is not None else None,
            )
    return state, dlogp, dentropy


@torch.library.custom_op("alignloss::linear_logprob_bwd", mutates_args=())
def linear_logprob_bwd(
    dlogps: Tensor,  # (M,)
    dentropies: Tensor | None,  # (M,)
    hidden: Tensor | None,  # (M, H), for dweight and dbias
    weight: Tensor | None,  # (V, H), for dweight and dbias
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,)
    token_index: Tensor | None,  # (N,)
    state: Tensor,  # (4, N)
    dlogp: Tensor,  # (N, H) or empty
    dentropy: Tensor,  # (N, H) or empty
    select: bool,
    hidden_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); what was not asked for is empty."""
    with torch.autocast(dlogps.device.type, enabled=False), _device(dlogps):
        transform = Transform.of(logit_scale, softcap, temperature)
        index = torch.nonzero(labels != ignore_index).squeeze(1) if select else token_index
        if select and index is not None:
            count = index.numel()
            state, dlogp, dentropy = state[:, :count], dlogp[:count], dentropy[:count]
        primitives = backends.get(backend)
        g = dlogps if index is None else dlogps[index]
        g_entropy = None if dentropies is None else dentropies if index is None else dentropies[index]
        if not select:
            ignored = (labels if index is None else labels[index]) == ignore_index
            g = g.masked_fill(ignored, 0)
            g_entropy = None if g_entropy is None else g_entropy.masked_fill(ignored, 0)
        rest = primitives.rest_probability(state, transform) * transform.slope

        dhidden = state.new_empty(0, dtype=hidden_dtype)
        if dlogp.dim() == 2:
            of_entropy = None if g_entropy is None else rest * g_entropy
            dhidden = _scale_rows(dlogp, rest * g, dentropy, of_entropy, index, len(labels), hidden_dtype)
        dweight, dbias = state.new_empty(0), state.new_empty(0)
        if need_dweight or need_dbias:
            assert hidden is not None and weight is not None
            problem = _Problem(
                hidden, weight, bias, labels, token_index, select, compute_dtype, ignore_index, transform
            )
            dweight, dbias = _walk_backward(
                problem, state, rest, g, g_entropy, need_dweight, need_dbias, backend, workspace_bytes
            )
        return dhidden, dweight, dbias


def _scale_rows(
    dlogp: Tensor,  # (N, H)
    coefficient: Tensor,  # (N,)
    dentropy: Tensor,  # (N, H) or empty
    entropy_coefficient: Tensor | None,  # (N,)
    index: Tensor | None,  # (N,)
    tokens: int,  # M
    dtype: torch.dtype,
) -> Tensor:  # (M, H)
    shape = (tokens, dlogp.shape[1])
    dhidden = dlogp.new_empty(shape, dtype=dtype) if index is None else dlogp.new_zeros(shape, dtype=dtype)
    block = max(16, MIB // dlogp.shape[1])
    for start in range(0, dlogp.shape[0], block):
        part = slice(start, start + block)
        rows = dlogp[part] * coefficient[part, None]
        if entropy_coefficient is not None:
            rows += dentropy[part] * entropy_coefficient[part, None]
        if index is None:
            dhidden[part] = rows
        else:
            dhidden[index[part]] = rows.to(dtype)
    return dhidden


def _walk_backward(
    problem: _Problem,
    state: Tensor,  # (4, N)
    rest: Tensor,  # (N,) slope (1 - p_y)
    g: Tensor,  # (N,) upstream of the log-probabilities
    g_entropy: Tensor | None,  # (N,)
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    primitives, transform, weight = backends.get(backend), problem.transform, problem.weight
    dweight = torch.empty_like(weight) if need_dweight else state.new_empty(0)
    dbias = state.new_zeros(problem.vocabulary) if need_dbias else state.new_empty(0)
    if problem.rows == 0:
        return dweight.zero_(), dbias

    logp_weight = entropy_weight = None
    scale = g
    if g_entropy is not None:
        scale = g.abs() + g_entropy.abs()
        divisor = torch.where(scale == 0, 1, scale)
        logp_weight, entropy_weight = g / divisor, g_entropy / divisor
    coefficient = scale * rest
    unit = None
    if problem.gemm_dtype == torch.float16:
        # coefficients of a scaled loss may leave the range of fp16: a power of two goes round the GEMM
        unit = coefficient.abs().amax().clamp(min=2.0**-100).log2().ceil().exp2()
        coefficient = coefficient / unit

    accum, gemm = state.element_size(), problem.gemm_dtype.itemsize
    narrow = gemm * (problem.gemm_dtype != problem.accum_dtype)
    tiles = primitives.dlogits_tiles(transform.cap, g_entropy is not None)
    direct = dweight.dtype == problem.accum_dtype and dweight.is_contiguous()
    block, columns = tile_shape(
        problem.rows,
        problem.vocabulary,
        problem.width * (gemm * (1 + problem.copy_rows) + accum),
        problem.width * (gemm * problem.cast_weight + accum * (need_dweight and not direct)),
        accum * (1 + tiles) + narrow,
        workspace_bytes,
        state.device,
    )
    row_buffer, weight_buffer = problem.row_buffer(block), problem.weight_buffer(columns)
    scaled = problem.empty(block, problem.width, dtype=problem.gemm_dtype)
    tile, scratch = problem.empty(block * columns), problem.empty(tiles, block * columns)
    partial = problem.empty(columns, problem.width) if need_dweight and not direct else None
    for first in range(0, problem.vocabulary, columns):
        last = min(first + columns, problem.vocabulary)
        w = problem.weight_slice(first, last, weight_buffer)
        dw = dweight[first:last] if partial is None else partial[: last - first]
        for start in range(0, problem.rows, block):
            part = slice(start, min(start + block, problem.rows))
            rows = problem.hidden_rows(part.start, part.stop, row_buffer)
            shape = (len(rows), last - first)
            x = problem.logits_tile(rows, w, first, tile[: shape[0] * shape[1]].view(shape))
            dz = primitives.dlogits(
                x,
                scratch[:, : x.numel()].view(tiles, *shape),
                state[:, part],
                problem.labels[part],
                first,
                transform,
                None if entropy_weight is None else entropy_weight[part],
                None if logp_weight is None else logp_weight[part],
                problem.gemm_dtype,
            )
            if need_dweight:
                scaled_rows = torch.mul(rows, coefficient[part, None], out=scaled[: shape[0]])
                _addmm(dw, dz.T, scaled_rows, dw, beta=int(start > 0))
            if need_dbias:
                row = coefficient[None, part].to(problem.gemm_dtype)
                db = dbias[None, first:last]
                _addmm(db, row, dz, db)
        if partial is not None:
            dweight[first:last] = dw if unit is None else dw * unit
    return dweight, dbias if unit is None else dbias * unit


@linear_logprob_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, token_index, select, compute_dtype, ignore_index, logit_scale, softcap,
    temperature, stats, save, backend, workspace_bytes, validate,
):  # fmt: skip
    tokens = labels.shape[0]
    rows = tokens if token_index is None else token_index.shape[0]
    dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    none = labels.new_empty(0, dtype=dtype)
    outputs = [labels.new_empty(tokens, dtype=dtype)]
    for i, name in enumerate(STATS):
        kind = torch.bool if name == "is_top1" else dtype
        outputs.append(labels.new_empty(tokens if stats >> i & 1 else 0, dtype=kind))
    outputs.append(labels.new_empty((SAVED_ROWS, rows), dtype=dtype))
    for i in range(2):
        outputs.append(labels.new_empty((rows, hidden.shape[1]), dtype=compute_dtype) if save > i else none.clone())
    return tuple(outputs)


@linear_logprob_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dlogps, dentropies, hidden, weight, bias, labels, token_index, state, dlogp, dentropy, select, hidden_dtype,
    compute_dtype, ignore_index, logit_scale, softcap, temperature, need_dweight, need_dbias, backend, workspace_bytes,
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
    select, compute_dtype, ignore_index, logit_scale, softcap, temperature, stats, _, backend, workspace, _ = (
        ctx.options
    )
    need_dhidden, need_dweight, need_dbias = ctx.needs_input_grad[:3]
    if dlogps is None and dentropies is None:
        return (None,) * 16
    dhidden, dweight, dbias = linear_logprob_bwd(
        (torch.zeros_like(dentropies) if dlogps is None else dlogps).contiguous(),
        None if dentropies is None or not stats & ENTROPY else dentropies.contiguous(),
        hidden, weight, bias, labels, token_index, state, dlogp, dentropy, select, ctx.hidden_dtype, compute_dtype,
        ignore_index, logit_scale, softcap, temperature, need_dweight, need_dbias, backend, workspace,
    )  # fmt: skip
    return (
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
        dbias.to(ctx.bias_dtype) if need_dbias else None,
        *(None,) * 13,
    )


def _no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "alignloss does not support double backward: its gradients have no gradient of their own. "
        "Call backward() without create_graph=True, or use full logits for second derivatives."
    )


linear_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_bwd.register_autograd(_no_double_backward)


@torch.library.custom_op("alignloss::sequence_offsets", mutates_args=())
def sequence_offsets(cu_seqlens: Tensor, tokens: int, validate: bool) -> Tensor:
    """Offsets (S + 1,) as int64 within [0, tokens]; with `validate`, a ValueError unless they rise from 0 to tokens."""
    if validate:
        ordered = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not ordered or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {cu_seqlens.tolist()[:8]} ..."
            )
    return cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format).clamp_(0, tokens)


@sequence_offsets.register_fake
def _(cu_seqlens, tokens, validate):  # type: ignore[no-untyped-def]
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


@torch.library.custom_op("alignloss::sequence_sum", mutates_args=())
def sequence_sum(
    values: Tensor,  # (M,) per token
    cu_seqlens: Tensor,  # (S + 1,) int64
    token_weights: Tensor | None,  # (M,)
    backend: str,
) -> Tensor:  # (S,) fp64
    with _device(values):
        return backends.get(backend).sequence_sum(values, cu_seqlens, token_weights)


@torch.library.custom_op("alignloss::sequence_scatter", mutates_args=())
def sequence_scatter(
    dsums: Tensor,  # (S,) fp64
    cu_seqlens: Tensor,  # (S + 1,) int64
    token_weights: Tensor | None,  # (M,)
    tokens: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:  # (M,)
    with _device(dsums):
        return backends.get(backend).sequence_scatter(dsums, cu_seqlens, token_weights, tokens, dtype)


@sequence_sum.register_fake
def _(values, cu_seqlens, token_weights, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float64)


@sequence_scatter.register_fake
def _(dsums, cu_seqlens, token_weights, tokens, dtype, backend):  # type: ignore[no-untyped-def]
    return dsums.new_empty(tokens, dtype=dtype)


@torch.library.custom_op("alignloss::preference", mutates_args=())
def preference(
    values: Tensor,  # (M,) fp32 token log-probabilities
    cu_seqlens: Tensor,  # (S + 1,) int64
    token_weights: Tensor | None,  # (M,) fp64
    labels: Tensor,  # (M,) int64, for the lengths
    ref_logps: Tensor | None,  # (S,) fp64
    desirable: Tensor | None,  # (S,) or 0-d
    kl: Tensor | None,  # (S,) or 0-d
    loss: str,  # "dpo", "ipo", "kto" or "cpo"
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses (B,), sums (S,), rewards (S,), d losses / d sums (S,)) in fp64, by one Triton launch."""
    sequences = cu_seqlens.shape[0] - 1
    with _device(values):
        return backends.get("triton").preference(
            values,
            token_weights,
            labels,
            cu_seqlens,
            ref_logps,
            None if desirable is None else desirable.bool().to(torch.int8).expand(sequences),
            None if kl is None else kl.detach().double().expand(sequences),
            loss,
            ignore_index,
            beta,
            label_smoothing,
            desirable_weight,
            undesirable_weight,
        )


@preference.register_fake
def _(values, cu_seqlens, token_weights, labels, ref_logps, desirable, kl, loss, *options):  # type: ignore[no-untyped-def]
    sequences = cu_seqlens.shape[0] - 1
    count = sequences if loss == "kto" else sequences // 2
    return tuple(values.new_empty(n, dtype=torch.float64) for n in (count, sequences, sequences, sequences))


def _preference_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, cu_seqlens, token_weights, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, token_weights, output[3])
    ctx.tokens, ctx.dtype = values.shape[0], values.dtype


def _preference_backward(ctx, dlosses, dsums, *unused):  # type: ignore[no-untyped-def]
    cu_seqlens, token_weights, slopes = ctx.saved_tensors
    total = torch.zeros_like(slopes) if dsums is None else dsums
    if dlosses is not None:
        dlosses = dlosses if len(dlosses) == len(slopes) else dlosses.repeat(2)
        total = total + torch.where(dlosses == 0, 0, slopes * dlosses)  # not 0 * inf, for a dropped pair
    dvalues = sequence_scatter(total, cu_seqlens, token_weights, ctx.tokens, ctx.dtype, "triton")
    return dvalues, *(None,) * 12


preference.register_autograd(_preference_backward, setup_context=_preference_setup)


def _sequence_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, cu_seqlens, token_weights, backend = inputs
    ctx.save_for_backward(cu_seqlens, token_weights)
    ctx.tokens, ctx.dtype, ctx.backend = values.shape[0], values.dtype, backend


def _sequence_backward(ctx, dsums):  # type: ignore[no-untyped-def]
    cu_seqlens, token_weights = ctx.saved_tensors
    dvalues = sequence_scatter(dsums.contiguous(), cu_seqlens, token_weights, ctx.tokens, ctx.dtype, ctx.backend)
    return dvalues, None, None, None


sequence_sum.register_autograd(_sequence_backward, setup_context=_sequence_setup)
sequence_scatter.register_autograd(_no_double_backward)
