"""The ops of log-probabilities and statistics of tokens: forward, and the backward that recomputes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..backends import ENTROPY, STATS
from ..checks import check_kept, check_values, kept
from ..kernels.state import STATE_ROWS
from .columns import first_trained
from .context import UNSAFE_IN_GRAPHS, Op, computing, no_double_backward, within_memory
from .head import Options, Projection
from .sizes import accumulation_dtype
from .walk import Scored, Upstream, Walk

COLUMNS = 5  # of linear_logprob_fwd's arguments


def score(projection: Projection, stats: int = 0, differentiate_entropy: bool = True) -> tuple[Tensor, ...]:
    """logps, in float64, and stats of each token, (M,) or empty."""
    derivatives = int(torch.is_grad_enabled() and projection.hidden.requires_grad)
    if derivatives and stats & ENTROPY and differentiate_entropy:
        derivatives = 2
    recomputed = torch.is_grad_enabled() and projection.trains_head
    weight, bias, columns = projection.head
    tensors = projection.hidden, weight, bias, projection.labels, projection.token_index, columns
    outputs = linear_logprob_fwd(*tensors, stats, derivatives, recomputed, *projection.options)
    return outputs[: 1 + len(STATS)]


@partial(Op, tags=UNSAFE_IN_GRAPHS)
def linear_logprob_fwd(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,) int64
    token_index: Tensor | None,  # (N,) int64 rows to score; None: every row, or see `select`
    columns: Tensor | None,  # (V, r), the last of weight, where they train and weight does not
    stats: int,  # bits of backends.STATS
    derivatives: int,  # how many to keep: of logp, then of entropy, with respect to hidden
    recomputed: bool,  # the head trains: a backward will recompute the logits
    select: bool,
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    workspace_bytes: int,
    validate: bool,
    vocab_group: str | None = None,
    vocab_parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, *stats, state, dlogp, dentropy); what was not asked for is empty.

    logps are float64, so that their gradient is: d loss / d log p may be as large as 1 / (1 - p), beyond float32, where
    the factor 1 - p that belongs to it is still to come.
    """
    options = Options(
        select, compute_dtype, ignore_index, logit_scale, softcap, temperature, backend, workspace_bytes, validate,
        vocab_group, vocab_parts,
    )  # fmt: skip
    if validate:
        check_values(labels, token_index, ignore_index, options.vocabulary(weight))
    with computing(hidden, compute_dtype):
        walk = Walk(hidden, weight, bias, labels, token_index, options, first_trained(weight, columns))
        # under `select` the shape has to be known to the compiler: the rows beyond the scored ones are unused
        reserved = labels.shape[0] if select else walk.rows
        new = labels.new_zeros if select else labels.new_empty
        state = new((STATE_ROWS, reserved), dtype=walk.accum_dtype)
        saved = [new((reserved, hidden.shape[1]) if derivatives > i else 0, dtype=compute_dtype) for i in range(2)]
        # a position that is not scored is 0
        new = labels.new_empty if walk.tokens.token_index is None else labels.new_zeros
        asked = [True, *(bool(stats >> i & 1) for i in range(len(STATS)))]
        kinds = output_dtypes(walk.accum_dtype)
        outputs = [new(labels.shape if wanted else 0, dtype=kind) for wanted, kind in zip(asked, kinds, strict=True)]
        given = [output if wanted else None for wanted, output in zip(asked, outputs, strict=True)]
        dlogp, dentropy = (t if t.dim() == 2 else None for t in saved)
        with within_memory(hidden.device, workspace_bytes):
            walk.forward(state, given, stats, dlogp, dentropy, recomputed=recomputed)
        return (*outputs, state, *saved)  # type: ignore[return-value]


def output_dtypes(accum_dtype: torch.dtype) -> list[torch.dtype]:
    """Of logps and STATS."""
    return [torch.float64, *(torch.bool if name == "is_top1" else accum_dtype for name in STATS)]


@linear_logprob_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, token_index, columns, stats, derivatives, recomputed, select, compute_dtype, *rest
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
        outputs.append(labels.new_empty((rows, hidden.shape[1]) if derivatives > i else 0, dtype=compute_dtype))
    return tuple(outputs)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, token_index, columns, stats, derivatives, _, *options = inputs
    *_, state, dlogp, dentropy = output
    ctx.set_materialize_grads(False)  # zeros for the gradient of the saved (N, H) would cost its memory again
    trains_head = any(ctx.needs_input_grad[i] for i in (1, 2, COLUMNS))
    head = (hidden, weight, bias) if trains_head else (None, None, None)
    ctx.save_for_backward(*head, labels, token_index, state, dlogp, dentropy)
    ctx.kept = kept(hidden=hidden, weight=weight, bias=bias)
    ctx.asked, ctx.options = (hidden.dtype, stats, derivatives), options
    ctx.trained_from = first_trained(weight, columns)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dlogps, dlse, dentropies, *rest):  # type: ignore[no-untyped-def]
    arguments = len(ctx.needs_input_grad)
    if dlogps is None and dentropies is None:
        return (None,) * arguments
    hidden, weight, bias, labels, token_index, state, dlogp, dentropy = ctx.saved_tensors
    check_kept(ctx.kept, hidden=hidden, weight=weight, bias=bias)
    _, stats, _ = ctx.asked
    dlogps = (torch.zeros_like(dentropies) if dlogps is None else dlogps).double().contiguous()
    dentropies = None if dentropies is None or not stats & ENTROPY else dentropies.contiguous()
    weight_needs, columns_need = ctx.needs_input_grad[1], ctx.needs_input_grad[COLUMNS]
    needs = ctx.needs_input_grad[0], weight_needs or columns_need, ctx.needs_input_grad[2]
    gradients = linear_logprob_bwd(
        dlogps, dentropies, hidden, weight, bias, labels, token_index, state, dlogp, dentropy, *ctx.asked, *needs[1:],
        ctx.trained_from, *ctx.options,
    )  # fmt: skip
    dhidden, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    found: list[Tensor | None] = [None] * arguments
    found[:3] = dhidden, dweight if weight_needs else None, None if dbias is None else dbias.to(ctx.bias_dtype)
    found[COLUMNS] = dweight if columns_need else None
    return tuple(found)


@partial(Op, tags=UNSAFE_IN_GRAPHS)
def linear_logprob_bwd(
    dlogps: Tensor,  # (M,) float64
    dentropies: Tensor | None,  # (M,)
    hidden: Tensor | None,  # (M, H), for dweight and dbias
    weight: Tensor | None,  # (V, H), for dweight and dbias
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,)
    token_index: Tensor | None,  # (N,)
    state: Tensor,  # (9, N), or more rows under `select`
    dlogp: Tensor,  # (N, H) or empty
    dentropy: Tensor,  # (N, H) or empty
    hidden_dtype: torch.dtype,
    stats: int,  # of the forward, as the next
    derivatives: int,
    need_dweight: bool,
    need_dbias: bool,
    trained_from: int,  # the first column of weight that dweight is of
    select: bool,
    compute_dtype: torch.dtype,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    workspace_bytes: int,
    validate: bool,
    vocab_group: str | None = None,
    vocab_parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); what was not asked for is empty."""
    options = Options(
        select, compute_dtype, ignore_index, logit_scale, softcap, temperature, backend, workspace_bytes, validate,
        vocab_group, vocab_parts,
    )  # fmt: skip
    with computing(dlogps, compute_dtype):
        head = None if hidden is None or weight is None else (hidden, weight, bias)
        scored = (
            Scored(None, labels, token_index, options)
            if head is None
            else Walk(*head, labels, token_index, options, trained_from)
        )
        dhidden = dlogp.new_empty(0, dtype=hidden_dtype)
        if dlogp.dim() == 2:
            # a position that is not scored has no gradient
            new = dlogp.new_empty if scored.tokens.token_index is None else dlogp.new_zeros
            dhidden = new((len(labels), dlogp.shape[1]), dtype=hidden_dtype)
        upstream = Upstream(scored, state, dlogps, dentropies, dlogp, dentropy, dhidden)
        dweight, dbias = scored.empty(0), scored.empty(0)
        if isinstance(scored, Walk):
            if need_dweight:
                dweight = torch.empty_like(scored.weight[:, trained_from:])
            if need_dbias:
                dbias = scored.empty(scored.vocabulary)
            with within_memory(dlogps.device, workspace_bytes):
                scored.backward(upstream, dweight, dbias, False, stats, derivatives)
        else:
            upstream.weigh(slice(0, scored.rows))
        return dhidden, dweight, dbias


@linear_logprob_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dlogps, dentropies, hidden, weight, bias, labels, token_index, state, dlogp, dentropy, hidden_dtype, stats,
    derivatives, need_dweight, need_dbias, trained_from, *rest,
):  # fmt: skip
    shape = (labels.shape[0], dlogp.shape[1]) if dlogp.dim() == 2 else (0,)
    return (
        dlogps.new_empty(shape, dtype=hidden_dtype),
        torch.empty_like(weight[:, trained_from:]) if need_dweight else state.new_empty(0),
        state.new_empty(weight.shape[0]) if need_dbias else state.new_empty(0),
    )


linear_logprob_fwd.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_bwd.register_autograd(no_double_backward)
