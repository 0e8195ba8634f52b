"""The primitives in plain torch, for any device: the specification of `_triton`."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..kernels.state import (
    KL_GAP,
    KL_REF_SUM,
    KL_REF_TOP,
    KL_SUM,
    KL_TOP,
    LOWEST,
    REF,
    ROUNDED,
    ROUNDED_ZE,
    SUM,
    SUM_EE,
    SUM_Z,
    SUM_ZE,
    TARGET,
    TOP,
    rest_mean,
)
from . import ENTROPY, IS_TOP1, LOG_SUM_SQ, LSE, MEAN_LOGITS, WEIGHED_AT_ONCE, Targets, Tokens, Transform, asked


def gather(
    tokens: Tokens,
    part: slice,  # of the N scored tokens, C of them
    labels: Tensor,  # (C,); filled if tokens.token_index is given
    rows: Tensor | None,  # (C, H) in the dtype of the GEMM; filled
    state: Tensor,  # (9, C); filled
    targets: Targets | None = None,  # for a GEMM that leaves no logits, of which there is none here
) -> None:
    """Begin a block: its rows, rounded to the compute dtype, zero where the label is ignored; labels; empty sums."""
    state.zero_()
    state[REF], state[TOP], state[TARGET] = LOWEST, -torch.inf, torch.nan
    _gather_rows(tokens, part, labels, rows)


def _gather_rows(tokens: Tokens, part: slice, labels: Tensor, rows: Tensor | None) -> None:
    at = part if tokens.token_index is None else tokens.token_index[part]
    if tokens.token_index is not None:
        labels.copy_(tokens.labels[at])
    if rows is not None and tokens.hidden is not None:
        if tokens.token_index is not None and tokens.hidden.dtype == rows.dtype == tokens.compute_dtype:
            torch.index_select(tokens.hidden, 0, tokens.token_index[part], out=rows)
        else:
            rows.copy_(tokens.hidden[at].to(tokens.compute_dtype))
        rows.masked_fill_((labels == tokens.ignore_index)[:, None], 0)


def fold(
    tile: Tensor,  # (C, Vs) x without the bias; overwritten
    bias: Tensor | None,  # (Vs,) times linear
    scratch: Tensor,  # (tiles, C, Vs)
    state: Tensor,  # (9, C); updated
    labels: Tensor,  # (C,)
    first: int,  # vocabulary index of the tile's first column
    transform: Transform,
    stats: int,
    derivatives: int,  # that accumulate: none, by `u`, by `u` and `u2`
    u: Tensor | None,  # (C, H) sum of exp(z - m) sech^2 W over v != y so far; rescaled
    u2: Tensor | None,  # (C, H) the same with (z - m - c) exp(z - m), c the mean of z - m so far
    dtype: torch.dtype,  # of the result, an operand of the next GEMM
    out: Tensor | None = None,  # (C, Vs) of this dtype: where to keep what `u` has to accumulate
) -> tuple[Tensor, Tensor | None]:
    """Fold one tile into the running statistics; return what `u` and `u2` have to accumulate by W_slice."""
    _add_bias(tile, bias)
    index, inside = _target_column(tile, labels, first)
    target = tile.gather(1, index)
    state[TARGET] = torch.where(inside, target, state[TARGET, :, None]).squeeze(1)
    slope = None
    if transform.cap is not None:
        if derivatives:
            slope = _sech2(tile, out=scratch[0])
        tile.tanh_().mul_(transform.cap)
    if stats & MEAN_LOGITS:
        state[SUM_Z] += tile.sum(1)
    tile.scatter_(1, index, torch.where(inside, -torch.inf, tile.gather(1, index)))

    top = tile.amax(1)
    old = state[REF].clone()
    torch.maximum(old, top.clamp(min=LOWEST), out=state[REF])
    shift = old - state[REF]
    decay = shift.exp()
    if stats & IS_TOP1:
        torch.maximum(state[TOP], top, out=state[TOP])
    old_centre = rest_mean(state[SUM], state[SUM_ZE])
    exps = tile.sub_(state[REF, :, None]).exp_()
    z_exps = None
    if stats & LOG_SUM_SQ:
        state[SUM_EE].mul_(decay**2).add_(torch.mul(exps, exps, out=scratch[-1]).sum(1))
    if stats & ENTROPY or derivatives == 2:
        # e ln e = (z - m) e, and 0 at e = 0
        z_exps = torch.special.entr(exps, out=scratch[-1]).neg_()
        state[SUM_ZE].addcmul_(state[SUM], shift).mul_(decay).add_(z_exps.sum(1))
    total = exps.sum(1)
    state[SUM].mul_(decay).add_(total)
    moved = None
    if derivatives == 2 and z_exps is not None:
        centre = rest_mean(state[SUM], state[SUM_ZE])
        moved = shift + old_centre - centre
        z_exps.addcmul_(exps, centre[:, None], value=-1)
        if u2 is not None and u is not None:
            u2.addcmul_(u, moved[:, None]).mul_(decay[:, None])
    if u is not None:
        u.mul_(decay[:, None])
    if slope is not None:
        exps.mul_(slope)
        if derivatives == 2 and z_exps is not None:
            z_exps.mul_(slope)
    kept = exps.to(dtype) if out is None else out.copy_(exps)
    if slope is None and dtype != exps.dtype:
        total = kept.sum(1, dtype=exps.dtype)
    kept_ze = None if z_exps is None else z_exps.to(dtype)
    if moved is not None and kept_ze is not None and slope is None:
        state[ROUNDED_ZE].addcmul_(state[ROUNDED], moved).mul_(decay).add_(kept_ze.sum(1, dtype=exps.dtype))
    state[ROUNDED].mul_(decay).add_(total)
    return kept, kept_ze


def statistics(
    hidden: Tensor,  # (C, H)
    weight: Tensor,  # (V, H), of the same dtype
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (C,)
    state: Tensor,  # (9, C); filled
    transform: Transform,
    stats: int,
    workspace_bytes: int,
) -> bool:
    """A fused path from hidden states to `state` without a tile in memory; False where the backend has none."""
    return False


def finish(
    tokens: Tokens,
    part: slice,  # of the N scored tokens, C of them
    labels: Tensor,  # (C,)
    state: Tensor,  # (9, C)
    u: Tensor | None,  # (C, H); overwritten
    u2: Tensor | None,  # (C, H); overwritten
    weight: Tensor,  # (V, H)
    transform: Transform,
    outputs: Sequence[Tensor | None],  # logps and STATS, (M,); filled at the positions of `part`
    dlogp: Tensor | None,  # (C, H); filled
    dentropy: Tensor | None,  # (C, H); filled
) -> None:
    """Log-probabilities, the asked statistics and the derivatives from the sums over the whole vocabulary."""
    if u is not None and dlogp is not None:
        derivatives(tokens, labels, state, u, u2, weight, transform, dlogp, dentropy)
    results(tokens, part, labels, state, len(weight), transform, outputs)


def results(
    tokens: Tokens,
    part: slice,  # of the N scored tokens, C of them
    labels: Tensor,  # (C,)
    state: Tensor,  # (9, C)
    vocabulary: int,  # V
    transform: Transform,
    outputs: Sequence[Tensor | None],  # logps and STATS, (M,); filled at the positions of `part`
) -> None:
    ignored = labels == tokens.ignore_index
    at = part if tokens.token_index is None else tokens.token_index[part]
    for output, value in zip(outputs, _row_stats(state, vocabulary, transform, asked(outputs[1:])), strict=True):
        if output is not None and value is not None:
            output[at] = value.masked_fill(ignored, 0).to(output.dtype)


def _row_stats(state: Tensor, vocabulary: int, transform: Transform, stats: int) -> list[Tensor | None]:
    # in float64: log p of a nearly certain token is finer than float32. Conditions leave a NaN where it is
    z, log_sum, gap = _logit(state[TARGET].double(), transform), state[SUM].double().log(), _gap(state, transform)
    logps, log_rest = F.logsigmoid(-gap), F.logsigmoid(gap)
    lse = entropy = mean_logits = is_top1 = log_sum_sq = None
    if stats & LSE:
        lse = torch.where(gap > 0, state[REF] + log_sum - log_rest, z - logps)
    if stats & ENTROPY:
        p, rest = logps.exp(), torch.sigmoid(gap)
        inside_rest = log_sum - state[SUM_ZE].double() / state[SUM] - log_rest
        entropy = torch.where(rest == 0, 0, rest * inside_rest) - torch.where(p == 0, 0, p * logps)
    if stats & MEAN_LOGITS:
        mean_logits = torch.where(logps.isnan(), logps, state[SUM_Z].double() / vocabulary)
    if stats & IS_TOP1:
        # in the dtype that the maximum was found in
        is_top1 = (_logit(state[TARGET], transform) >= state[TOP]) & ~logps.isnan()
    if stats & LOG_SUM_SQ:
        of_rest = 2 * (log_rest - log_sum) + state[SUM_EE].double().log()
        log_sum_sq = torch.where(state[SUM] == 0, 2 * logps, torch.logaddexp(2 * logps, of_rest))
    return [logps, lse, entropy, mean_logits, is_top1, log_sum_sq]


def derivatives(
    tokens: Tokens,
    labels: Tensor,  # (C,)
    state: Tensor,  # (9, C)
    u: Tensor,  # (C, H); overwritten
    u2: Tensor | None,  # (C, H); overwritten
    weight: Tensor,  # (V, H), or a part of it; of a target that is not in it, W_y is left out
    transform: Transform,
    dlogp: Tensor,  # (C, H); filled; may be `u`
    dentropy: Tensor | None,  # (C, H); filled; may be `u2`
) -> None:
    """d logp / d hidden and d entropy / d hidden of each row, both divided by slope (1 - p_y).

    dlogp = D_y W_y - U / s and dentropy = -((U2 - r U / s) / s + pull dlogp), where D = sech^2(x) or 1, s = ROUNDED,
    r = ROUNDED_ZE, pull as in `_entropy_terms`, and U2 is centred. W_y is rounded to the compute dtype as in U, or
    their difference would be off.
    """
    inverse = torch.where(state[ROUNDED] == 0, 0, 1 / state[ROUNDED])[:, None]
    u.mul_(inverse)
    if u2 is not None and dentropy is not None:
        u2.mul_(inverse).addcmul_(u, state[ROUNDED_ZE, :, None] * inverse, value=-1)
    if len(weight):
        target = weight[labels.clamp(0, len(weight) - 1)].to(tokens.compute_dtype).to(u.dtype)
        target.masked_fill_(((labels < 0) | (labels >= len(weight)))[:, None], 0)
        if transform.cap is not None:
            target.mul_(_sech2(state[TARGET])[:, None])
        torch.sub(target, u, out=u)
    else:
        u.neg_()
    ignored = (labels == tokens.ignore_index)[:, None]
    if u2 is not None and dentropy is not None:
        _, pull = _entropy_terms(state, transform)
        dentropy.copy_(u2.addcmul_(u, pull.to(u.dtype)[:, None]).neg_()).masked_fill_(ignored, 0)
    dlogp.copy_(u).masked_fill_(ignored, 0)


def weigh(
    tokens: Tokens,
    part: slice,  # of the N scored tokens, C of them
    labels: Tensor,  # (C,); filled if tokens.token_index is given
    state: Tensor,  # (9, C)
    transform: Transform,
    dlogps: Tensor,  # (M,) float64
    dentropies: Tensor | None,  # (M,)
    coefficient: Tensor,  # (C,); filled with slope (1 - p_y) times the upstream gradient, or times its scale
    mix: Tensor | None,  # (3, C), given with dentropies; filled for `dlogits`
    unit: Tensor | None,  # 0-d divisor of the coefficients
    dlogp: Tensor | None,  # (C, H)
    dentropy: Tensor | None,  # (C, H)
    dhidden: Tensor | None,  # (M, H); filled at the positions of `part`
    rows: Tensor | None,  # (C, H); filled as by `gather`
    scaled: Tensor | None,  # (C, H); filled with the rows times coefficient
) -> None:
    """Weigh the rows of a block by their upstream gradients.

    An entropy with gradient shares a row with the log-probability: with g and g' upstream of the two, the coefficient
    takes the scale |g| + |g'|, and A = g / scale, B = g' / scale go to the tile by `mix`: A - B mu, B, A - B pull.
    """
    _gather_rows(tokens, part, labels, rows)
    at = part if tokens.token_index is None else tokens.token_index[part]
    ignored = labels == tokens.ignore_index
    rest = torch.sigmoid(_gap(state, transform)) * transform.slope
    g = dlogps[at].double().masked_fill(ignored, 0)
    g_entropy, scale = None, g
    if dentropies is not None and mix is not None:
        g_entropy = dentropies[at].double().masked_fill(ignored, 0)
        scale = g.abs() + g_entropy.abs()
        divisor = torch.where(scale == 0, 1, scale)
        mu, pull = (term.masked_fill(ignored, 0) for term in _entropy_terms(state, transform))
        a, b = g / divisor, g_entropy / divisor
        mix[0], mix[1], mix[2] = a - b * mu, b, a - b * pull
    # an upstream gradient may be as large as 1 / (1 - p): float64 holds both, and their product is narrow again
    coefficient.copy_(torch.where(scale == 0, 0, scale * rest))
    if unit is not None:
        coefficient.div_(unit)
    if scaled is not None and tokens.hidden is not None:
        torch.mul(tokens.hidden[part] if rows is None else rows, coefficient[:, None], out=scaled)
        _clear(scaled, coefficient)
    if dhidden is None or dlogp is None:
        return
    factors = [torch.where(upstream == 0, 0, upstream * rest) for upstream in (g, g_entropy) if upstream is not None]
    of_logp, *of_entropy = (factor.to(state.dtype) for factor in factors)
    for some in _weighed_at_once(dlogp):
        d = dlogp[some] * of_logp[some, None]
        if of_entropy and dentropy is not None:
            d += dentropy[some] * of_entropy[0][some, None]
        _clear(d, coefficient[some])
        to = slice(part.start + some.start, part.start + some.start + len(d)) if isinstance(at, slice) else at[some]
        dhidden[to] = d.to(dhidden.dtype)


def _weighed_at_once(rows: Tensor) -> Iterator[slice]:
    """Blocks of the rows (C, H) of a gradient, whose product with a coefficient is wider than they are."""
    block = max(16, WEIGHED_AT_ONCE // rows.shape[1])
    for start in range(0, rows.shape[0], block):
        yield slice(start, start + block)


def scale_rows(
    values: Tensor,  # (N, H)
    coefficient: Tensor,  # (N,)
    factor: Tensor,  # 0-d
    index: Tensor | None,  # (N,) where each row is among the M; None: where it is
    out: Tensor,  # (M, H); filled there
) -> None:
    """Rows times their coefficients and a factor, rounded once; 0 where either is, whatever is in the other two."""
    by = torch.where(factor == 0, 0, coefficient * factor)
    for some in _weighed_at_once(values):
        d = values[some] * by[some, None]
        _clear(d, by[some])
        out[some if index is None else index[some]] = d.to(out.dtype)


def dlogits(
    tile: Tensor,  # (C, Vs) x without the bias; overwritten by the result
    bias: Tensor | None,  # (Vs,) times linear
    scratch: Tensor,  # (tiles, C, Vs)
    state: Tensor,  # (9, C)
    labels: Tensor,  # (C,)
    first: int,
    transform: Transform,
    coefficient: Tensor,  # (C,) from `weigh`; where it is 0 the result is too, whatever the logits
    mix: Tensor | None,  # (3, C) from `weigh`, for an entropy with gradient
    dtype: torch.dtype,  # of the result, an operand of the next GEMM
) -> Tensor:
    """Turn a tile into dL / d(hW + b), divided by slope (1 - p_y) and by one scale per row.

    With q_v = exp(z_v - m) / s over v != y this is D_y at the target and -q_v D_v elsewhere: free of cancellation and
    of the size of the upstream gradient. With A and B as in `weigh` it is D_y (A - B pull) and
    -q_v D_v (A + B (z_v - m - mu)).
    """
    _add_bias(tile, bias)
    index, inside = _target_column(tile, labels, first)
    slope = None
    if transform.cap is not None:
        slope = _sech2(tile, out=scratch[0])
        tile.tanh_().mul_(transform.cap)
    tile.sub_(state[REF, :, None])
    negative_inverse = torch.where(state[SUM] == 0, 0, -1 / state[SUM])
    at_target = torch.ones_like(negative_inverse)
    tilt = None
    if mix is not None:
        at_target = mix[2]
        tilt = torch.clamp(tile, min=LOWEST, out=scratch[-1]).mul_(mix[1, :, None]).add_(mix[0, :, None])
    if transform.cap is not None:
        at_target = at_target * _sech2(state[TARGET])
    tile.exp_().mul_(negative_inverse[:, None])
    if tilt is not None:
        tile.mul_(tilt)
    if slope is not None:
        tile.mul_(slope)
    tile.scatter_(1, index, torch.where(inside, at_target[:, None], tile.gather(1, index)))
    _clear(tile, coefficient)
    return tile.to(dtype)


def held_dlogits(
    tile: Tensor,  # (C, Vs) exponentials as `fold` left them, in the dtype of the GEMM; overwritten
    reference: Tensor,  # (C,) that they are relative to
    state: Tensor,  # (9, C)
    labels: Tensor,  # (C,)
    first: int,
    transform: Transform,
    coefficient: Tensor,  # (C,) as in `dlogits`
) -> None:
    """Turn a tile of exponentials into what `dlogits` makes of its logits."""
    index, inside = _target_column(tile, labels, first)
    factor = torch.where(state[ROUNDED] == 0, 0, -(reference - state[REF]).exp() / state[ROUNDED])
    tile.mul_(factor[:, None])
    at_target = torch.ones_like(factor) if transform.cap is None else _sech2(state[TARGET])
    tile.scatter_(1, index, torch.where(inside, at_target[:, None].to(tile.dtype), tile.gather(1, index)))
    _clear(tile, coefficient)


def _clear(rows: Tensor, coefficient: Tensor) -> None:
    """Set the rows to 0 whose coefficient is 0: a product would keep what is not finite in them."""
    unused = coefficient == 0
    if _may_hold(unused):
        rows.masked_fill_(unused[:, None], 0)


def _may_hold(flags: Tensor) -> bool:
    """Whether any flag is set. True where asking would wait for a device, or where there are no values to ask."""
    return flags.device.type != "cpu" or is_fake(flags) or bool(flags.any())


def _entropy_terms(state: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """mu = p d + (1 - p) mu' and pull = p (d - mu'), with d = z_y - m and mu' the mean of z - m over v != y."""
    gap = _gap(state, transform)
    d = _logit(state[TARGET].double(), transform) - state[REF]
    mean = rest_mean(state[SUM].double(), state[SUM_ZE].double())
    p = torch.sigmoid(-gap)
    pd = torch.where(p == 0, 0, p * d)
    mu, pull = pd + torch.sigmoid(gap) * mean, pd - p * mean
    if state.dtype == torch.float64:
        return mu, pull
    # beyond, 1 - p_y, which multiplies them, is 0 in fp32, and their products with W need not fit 16 bits
    return mu.clamp(-128, 128), pull.clamp(-128, 128)


def kl_fold(
    tile: Tensor,  # (C, Vs) x of the policy, without the bias; overwritten
    ref_tile: Tensor,  # (C, Vs) x of the reference, likewise
    bias: Tensor | None,  # (Vs,) of the policy, times linear
    ref_bias: Tensor | None,  # (Vs,) of the reference
    scratch: Tensor,  # (C, Vs)
    state: Tensor,  # (5, C); updated
    transform: Transform,
) -> None:
    """Fold one tile of a policy and of a reference into the statistics of their KL."""
    _add_bias(tile, bias)
    _add_bias(ref_tile, ref_bias)
    if transform.cap is not None:
        for x in (tile, ref_tile):
            x.tanh_().mul_(transform.cap)
    _add_exponentials(tile, scratch, state[KL_TOP], state[KL_SUM])
    torch.sub(ref_tile, tile, out=tile)
    decay = _add_exponentials(ref_tile, scratch, state[KL_REF_TOP], state[KL_REF_SUM])
    state[KL_GAP].mul_(decay).add_(tile.mul_(scratch).masked_fill_(scratch == 0, 0).sum(1))  # not 0 * inf


def _add_exponentials(z: Tensor, exps: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Fold a tile into a running maximum and sum; `exps` is filled with exp(z - top). The decay of older sums."""
    old = top.clone()
    torch.maximum(old, z.amax(1), out=top)
    decay = (old - top).exp()
    total.mul_(decay).add_(torch.sub(z, top[:, None], out=exps).exp_().sum(1))
    return decay


def kl_dlogits(
    tile: Tensor,  # (C, Vs) x of the policy, without the bias; overwritten
    ref_tile: Tensor,  # (C, Vs) x of the reference, likewise
    bias: Tensor | None,  # (Vs,) of the policy, times linear
    ref_bias: Tensor | None,  # (Vs,) of the reference
    scratch: Tensor,  # (C, Vs)
    state: Tensor,  # (5, C), with log-sums
    transform: Transform,
    coefficient: Tensor,  # (C,) of the rows; where it is 0 the result is too
    lift: float,
    dtype: torch.dtype,  # of the result, an operand of the next GEMM
) -> Tensor:
    """Turn tiles into lift (p - q) dz / dx, with p of the policy and q of the reference."""
    _add_bias(tile, bias)
    _add_bias(ref_tile, ref_bias)
    slope = None
    if transform.cap is not None:
        slope = _sech2(tile, out=scratch)
        for x in (tile, ref_tile):
            x.tanh_().mul_(transform.cap)
    tile.sub_(state[KL_TOP, :, None]).sub_(state[KL_SUM, :, None]).exp_()
    tile.sub_(ref_tile.sub_(state[KL_REF_TOP, :, None]).sub_(state[KL_REF_SUM, :, None]).exp_())
    if slope is not None:
        tile.mul_(slope)
    _clear(tile, coefficient)
    return (tile if lift == 1 else tile.mul_(lift)).to(dtype)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient by a factor, 0-d, in place; on a CPU not by 1."""
    if _may_hold(factor != 1):
        # one dimension more, or a 16-bit gradient would round the factor first
        gradient.mul_(factor.view((1,) * gradient.dim()))


def sequence_sum(
    values: Tensor,  # (M,) per token
    cu_seqlens: Tensor | None,  # (S + 1,) int64 offsets, all -1 if they did not fit: NaN; None: equal parts
    sequences: int,
    token_weights: Tensor | None,  # (M,)
) -> Tensor:  # (S,) fp64
    """Sum tokens per sequence in fp64, in a fixed order."""
    values = values.double()
    if token_weights is not None:
        values = torch.where(token_weights == 0, 0, values * token_weights)  # not 0 * inf
    if cu_seqlens is None:
        return values.view(sequences, len(values) // max(sequences, 1)).sum(1)
    sums = torch.segment_reduce(values, "sum", offsets=cu_seqlens.clamp(min=0), unsafe=True, initial=0)
    return torch.where(cu_seqlens[0] < 0, torch.nan, sums)


def sequence_scatter(
    dsums: Tensor,  # (S,)
    cu_seqlens: Tensor | None,  # (S + 1,)
    token_weights: Tensor | None,  # (M,)
    tokens: int,  # M
) -> Tensor:  # (M,) fp64
    """The adjoint of `sequence_sum`: each token takes its sequence's gradient times its weight; 0 outside of all."""
    if cu_seqlens is None:
        spread = dsums.repeat_interleave(tokens // max(len(dsums), 1))
    else:
        position = torch.arange(tokens, device=dsums.device)
        sequence = torch.searchsorted(cu_seqlens, position, right=True)
        padded = F.pad(dsums, (1, 1))  # positions before the first and after the last offset belong to no sequence
        spread = padded[sequence]
    if token_weights is not None:
        spread = torch.where(token_weights == 0, 0, spread * token_weights)  # not 0 * inf
    return spread if cu_seqlens is None else torch.where(cu_seqlens[0] < 0, torch.nan, spread)


def _add_bias(tile: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        tile.add_(bias)


def _target_column(tile: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    column = (labels - first)[:, None]
    inside = (column >= 0) & (column < tile.shape[1])
    return column.clamp(0, tile.shape[1] - 1), inside


def _sech2(x: Tensor, out: Tensor | None = None) -> Tensor:
    # 1 / cosh^2, not 1 - tanh^2: no cancellation where tanh saturates
    return torch.cosh(x, out=out).square_().reciprocal_()


def _logit(x: Tensor, transform: Transform) -> Tensor:
    return x if transform.cap is None else transform.cap * torch.tanh(x)


def _gap(state: Tensor, transform: Transform) -> Tensor:
    """log((1 - p_y) / p_y) in float64; the reference leaves before the log-sum joins: a shared offset costs nothing."""
    z = _logit(state[TARGET].double(), transform)
    # an infinite logit of the target leaves no distribution either
    return state[SUM].double().log() - (z.masked_fill(z == torch.inf, torch.nan) - state[REF])
