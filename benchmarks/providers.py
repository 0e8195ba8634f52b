"""One way each to compute token log-probabilities, a DPO step and an SFT step, each as its users call it.

The DPO step has a reference whose log-probabilities are 0, since Liger's takes none; every provider has beta = 0.1 and
the mean over pairs. An SFT step is the mean negative log-likelihood of the labelled tokens. What a provider cannot do
here is a line in the output, never a crash.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import alignloss

from .cases import Inputs

# what is differentiated: hidden states, head
MODES = {
    "forward": (False, False),
    "frozen head": (True, False),
    "trainable head": (True, True),
    "DPO step": (True, True),
    "SFT step": (True, True),
}
# the fewest GEMMs that a mode needs when the logits are not kept between forward and backward; in a step they are
GEMMS = {"forward": 1, "frozen head": 2, "trainable head": 4, "DPO step": 3, "SFT step": 3}


class Provider(NamedTuple):
    logps: Callable[[Inputs], Tensor] | None = None  # (M,) in nats, 0 where masked
    dpo: Callable[[Inputs], Tensor] | None = None  # 0-d; by default from logps, like the next
    sft: Callable[[Inputs], Tensor] | None = None

    def run(self, inputs: Inputs, mode: str) -> Tensor:
        whole, of_logps = {"DPO step": (self.dpo, dpo_of), "SFT step": (self.sft, sft_of)}.get(mode, (None, None))
        if whole is not None:
            return whole(inputs)
        assert self.logps is not None
        logps = self.logps(inputs)
        return logps if of_logps is None else of_logps(logps, inputs)

    def modes(self) -> list[str]:
        steps = {"DPO step": self.dpo, "SFT step": self.sft}
        return [mode for mode in MODES if self.logps is not None or steps.get(mode) is not None]


def dpo_of(logps: Tensor, inputs: Inputs) -> Tensor:
    """The mean DPO loss of token log-probabilities (M,), 0 where masked."""
    sums = logps.view(inputs.labels.shape).sum(1)
    chosen, rejected = sums.chunk(2)
    zero = torch.zeros_like(chosen)
    return alignloss.losses.dpo_loss(chosen, rejected, zero, zero, beta=0.1)[0].mean()


def sft_of(logps: Tensor, inputs: Inputs) -> Tensor:
    """The mean negative log-likelihood of token log-probabilities (M,), 0 where masked."""
    return -logps.sum() / (inputs.labels != -100).sum()


def flat(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.hidden.flatten(0, 1), inputs.weight, inputs.labels.flatten()


def fused_logps(inputs: Inputs) -> Tensor:
    return alignloss.linear_logprob(*flat(inputs), softcap=inputs.softcap, workspace_bytes=inputs.workspace_bytes)


# a training loop makes its loss once
dpo_loss = cache(alignloss.DPOLoss)


def fused_dpo(inputs: Inputs) -> Tensor:
    loss_fn = dpo_loss(beta=0.1, softcap=inputs.softcap, workspace_bytes=inputs.workspace_bytes)
    ref_logps = torch.zeros(len(inputs.labels), device=inputs.labels.device)
    return loss_fn(inputs.hidden, inputs.weight, inputs.labels, ref_logps=ref_logps).loss


sft_loss = cache(alignloss.SFTLoss)


def fused_sft(inputs: Inputs) -> Tensor:
    loss_fn = sft_loss(softcap=inputs.softcap, workspace_bytes=inputs.workspace_bytes)
    return loss_fn(inputs.hidden, inputs.weight, inputs.labels).loss


def logps_of_logits(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = torch.log_softmax(wide, -1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels == -100, 0, picked)


def full_logits(inputs: Inputs) -> Tensor:
    return logps_of_logits(*flat(inputs), inputs.softcap)


def cross_entropy(inputs: Inputs) -> Tensor:
    """Full logits in the dtype of the inputs, which are never widened: the least that they can take."""
    hidden, weight, labels = flat(inputs)
    logits = hidden @ weight.T
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return -torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(logps_of_logits)


def compiled_logits(inputs: Inputs) -> Tensor:
    return compiled()(*flat(inputs), inputs.softcap)


def trl(inputs: Inputs, compact: bool | None = None, chunk: int = 32768) -> Tensor:
    """With its trainers' chunk of the vocabulary, and as they have it: labelled rows on a GPU, every row elsewhere."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, labels = flat(inputs)
    scored = labels != -100
    compact = hidden.is_cuda if compact is None else compact
    rows, targets = (hidden[scored], labels[scored]) if compact else (hidden, labels.clamp(min=0))
    # no bias, temperature 1, scale 1, no statistics
    values = ChunkedLogProbFunction.apply(rows, weight, None, targets, 1.0, chunk, inputs.softcap, 1.0, ())[0]
    if compact:
        return values.new_zeros(scored.shape).masked_scatter(scored, values)
    return values.masked_fill(~scored, 0)


@cache
def liger_loss() -> Callable[..., tuple[Tensor, ...]]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)


def liger_dpo(inputs: Inputs) -> Tensor:
    refuse_softcap(inputs)
    return liger_loss()(inputs.weight, inputs.hidden, inputs.labels)[0]


def liger_sft(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, weight, labels = flat(inputs)
    return LigerFusedLinearCrossEntropyLoss(softcap=inputs.softcap)(weight, hidden, labels)


def liger_hopper(inputs: Inputs) -> Tensor:
    """Its kernels for sm_90, which need the package nvidia-cutlass-dsl; elsewhere its name stands for another way."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    refuse_softcap(inputs)
    found = LigerFusedScaledCrossEntropySM90Function.apply(*flat(inputs))
    return -(found if isinstance(found, Tensor) else found[0])


def quack_sft(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import scaled_exp_lce_supported, scaled_exp_linear_cross_entropy

    refuse_softcap(inputs)
    hidden, weight, labels = flat(inputs)
    if not scaled_exp_lce_supported(hidden, weight, 4096, "mean"):
        raise NotImplementedError("it takes bfloat16 on sm_90 with a vocabulary of a multiple of 128")
    return scaled_exp_linear_cross_entropy(hidden, weight, labels)


def cce(inputs: Inputs) -> Tensor:
    return cce_with(inputs, filter_eps="high")


def cce_exact(inputs: Inputs) -> Tensor:
    return cce_with(inputs, filter_eps=None)


def cce_with(inputs: Inputs, filter_eps: str | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(*flat(inputs), softcap=inputs.softcap, reduction="none", filter_eps=filter_eps)


def torch_chunked(inputs: Inputs) -> Tensor:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    refuse_softcap(inputs)
    options = torch.nn.LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(*flat(inputs), reduction="none", options=options)


def refuse_softcap(inputs: Inputs) -> None:
    if inputs.softcap is not None:
        raise NotImplementedError("it has no softcap")


PROVIDERS = {
    "alignloss": Provider(fused_logps, fused_dpo, fused_sft),
    "full logits": Provider(full_logits),
    "TRL": Provider(trl),
    "cross entropy": Provider(cross_entropy),
    "CCE": Provider(cce),
    "CCE exact": Provider(cce_exact),
    "torch chunked": Provider(torch_chunked),
    # the slowest to begin come last, where time may run out
    "compiled logits": Provider(compiled_logits),
    "Liger": Provider(dpo=liger_dpo, sft=liger_sft),
    "Liger SM90": Provider(liger_hopper),
    "quack": Provider(sft=quack_sft),
}


def require(inputs: Inputs, mode: str) -> None:
    """Clear the gradients and set what the mode differentiates."""
    for tensor, wanted in zip((inputs.hidden, inputs.weight), MODES[mode], strict=True):
        tensor.grad = None
        tensor.requires_grad_(wanted)


def forward(provider: Provider, inputs: Inputs, mode: str) -> Tensor:
    with torch.set_grad_enabled(any(MODES[mode])):
        return provider.run(inputs, mode)


def backward(output: Tensor, inputs: Inputs, mode: str) -> None:
    if any(MODES[mode]):
        output.backward(inputs.upstream.to(output.dtype) if output.dim() else None)


def step(provider: Provider, inputs: Inputs, mode: str) -> None:
    """A whole step; the gradients stay on the leaves."""
    require(inputs, mode)
    backward(forward(provider, inputs, mode), inputs, mode)
