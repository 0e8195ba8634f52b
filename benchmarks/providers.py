"""One function per way to compute token log-probabilities, of (hidden, weight, labels), and the inputs they run on.

Three modes differentiate token log-probabilities with a random upstream gradient; the fourth is a training step of a
scalar loss, the mean NLL of 8 sequences, for which alignloss has its loss module.
"""

import torch
from torch import Tensor

import alignloss


def inputs(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, seed: int = 0):
    """Hidden states and a head that gives the labels a probability around 0.5, as a trained one does."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, hidden_size, generator=generator) * hidden_size**-0.5
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    # the other logits are standard normal: their log-sum is log V + 1/2
    peak = torch.log(torch.tensor(float(vocabulary))) + 0.5
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    hidden += peak * torch.nn.functional.normalize(weight[labels], dim=-1)
    return hidden.to(dtype), weight.to(dtype), labels


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return alignloss.linear_logprob(hidden, weight, labels)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None]).squeeze(1)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # TRL's own default chunk of the vocabulary, no bias, temperature 1
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


PROVIDERS = {"alignloss": fused, "full logits": full_logits, "TRL": trl}
SEQUENCES = 8
# whether hidden and weight are differentiated
MODES = {
    "forward": (False, False),
    "frozen head": (True, False),
    "trainable head": (True, True),
    "training step": (True, True),
}
GEMMS = {"forward": 1, "frozen head": 2, "trainable head": 4, "training step": 3}  # of alignloss: 2 N V H FLOPs each


def step(provider, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, mode: str) -> None:
    """Forward, and backward where the mode differentiates; the gradients stay on the leaves."""
    hidden.grad = weight.grad = None
    hidden.requires_grad_(MODES[mode][0])
    weight.requires_grad_(MODES[mode][1])
    if mode == "training step":
        if provider is fused:
            rows = hidden.view(SEQUENCES, -1, hidden.shape[1]), weight, labels.view(SEQUENCES, -1)
            loss = alignloss.SFTLoss()(*rows).loss
        else:
            loss = -provider(hidden, weight, labels).mean()
        loss.backward()
        return
    with torch.set_grad_enabled(any(MODES[mode])):
        logps = provider(hidden, weight, labels)
    if any(MODES[mode]):
        logps.backward(upstream)
