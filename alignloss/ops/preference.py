"""The ops of DPO, IPO, KTO and CPO from token log-probabilities, by fused Triton kernels."""

import torch
from torch import Tensor

from .. import backends
from .context import Op, device_guard, no_double_backward


@Op
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


@Op
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
def _(  # type: ignore[no-untyped-def]
    values, token_weights, labels, nll_labels, cu_seqlens, sequences, ref_logps, desirable, kl, pair_weights,
    num_sequences, num_tokens, loss, *options,
):  # fmt: skip
    count = sequences if loss == "kto" else sequences // 2
    shapes = [(), (count,), (sequences,), (sequences,), ()]
    outputs = [values.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return (*outputs, *(values.new_empty(n, dtype=torch.float64) for n in (sequences, 2)))


@preference_backward.register_fake
def _(dloss, slopes, scales, token_weights, labels, *rest):  # type: ignore[no-untyped-def]
    return dloss.new_empty(labels.shape, dtype=torch.float64)


def _preference_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, token_weights, labels, nll_labels, cu_seqlens, *_, loss, ignore_index = inputs[:14]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-2:], token_weights, labels, nll_labels, cu_seqlens)
    ctx.paired, ctx.ignore_index = loss != "kto", ignore_index


def _preference_backward(ctx, dloss, *unused):  # type: ignore[no-untyped-def]
    arguments = len(ctx.needs_input_grad)
    if dloss is None:
        return (None,) * arguments
    dvalues = preference_backward(dloss, *ctx.saved_tensors, ctx.paired, ctx.ignore_index)
    return dvalues, *(None,) * (arguments - 1)


preference.register_autograd(_preference_backward, setup_context=_preference_setup)
preference_backward.register_autograd(no_double_backward)
