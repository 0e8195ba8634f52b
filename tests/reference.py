"""Full-logits references in plain torch, and inputs to compare on; the judge runs them in float64."""

import torch
from torch import Tensor


def logits(hidden, weight, bias=None, *, logit_scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logps(hidden, weight, labels, bias=None, **transform) -> Tensor:
    logps = torch.log_softmax(logits(hidden, weight, bias, **transform), -1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels == -100, 0.0, picked)


def statistics(hidden, weight, labels, bias=None, **transform) -> dict[str, Tensor]:
    z = logits(hidden, weight, bias, **transform)
    p = z.softmax(-1)
    values = {
        "lse": z.logsumexp(-1),
        "entropy": torch.special.entr(p).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == labels,
        "log_sum_sq_probs": p.square().sum(-1).log(),
    }
    return {name: torch.where(labels == -100, torch.zeros_like(value), value) for name, value in values.items()}


def inputs(*shape, hidden_size=37, vocabulary=101, masked=0.3, peak=3.0, dtype=torch.float64):
    """hidden, weight, bias, labels with ragged masks and a trained head's confidence in its labels."""
    labels = torch.randint(0, vocabulary, shape)
    weight = torch.randn(vocabulary, hidden_size, dtype=torch.float64) * hidden_size**-0.5
    direction = torch.nn.functional.normalize(weight[labels], dim=-1)
    hidden = torch.randn(*shape, hidden_size, dtype=torch.float64) + peak * direction
    labels[torch.rand(shape) < masked] = -100
    bias = torch.randn(vocabulary, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def leaf(tensor: Tensor | None, dtype=torch.float64, requires_grad=True) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_(requires_grad)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN never passes a comparison."""
    scale = expected.double().norm()
    return float((got.double() - expected.double()).norm() / scale.clamp(min=1e-300))


def within(got, naive, exact, times: float = 2, beyond: float = 0.0) -> bool:
    """Whether each of some tensors errs at most `times` as much as the naive one, and `beyond`."""
    tensors = zip(got, naive, exact, strict=True)
    return all(error(g.view(e.shape), e) <= times * error(n, e) + beyond for g, n, e in tensors)


def replace_products(monkeypatch, addmm):
    from alignloss.ops import kl, onepass, walk

    for module in (walk, onepass, kl):
        monkeypatch.setattr(module, "addmm", addmm)


def as_on_a_gpu(monkeypatch):
    """Sizes, operand dtypes and wide products of a GPU on CPU tensors."""
    from alignloss.ops import head, sizes, walk

    def footprint(*fields):
        return sizes.Footprint(*fields)._replace(device_type="cuda")

    def addmm(out, a, b, beta=1, alpha=1):
        product = alpha * (a.to(out.dtype) @ b.to(out.dtype))
        out.copy_(product if beta == 0 else beta * out + product)

    monkeypatch.setattr(head, "Footprint", footprint)
    for module in (walk, sizes):
        monkeypatch.setattr(module, "gemm_dtype", lambda dtype, device_type: dtype)
    replace_products(monkeypatch, addmm)
    monkeypatch.setattr(sizes.Footprint, "least_group", 1)


def replace_kernels(monkeypatch, replacement):
    """Put replacement(module, name, kernel) in place of every Triton kernel."""
    from alignloss.kernels import exps, kl, rows, sequence, stats, sums, tile

    for module in (exps, kl, rows, sequence, stats, sums, tile):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, replacement(module, name, kernel))


def state_of_targets(hidden, weight, labels, bias=None, linear=1.0, reference=False) -> Tensor:
    """The state (9, N) that a GEMM which leaves no logits begins with, from the kernel that gathers rows."""
    from alignloss.kernels import rows
    from alignloss.kernels.state import STATE_ROWS

    state = torch.empty(STATE_ROWS, len(hidden), device=hidden.device)
    rows.gather_fwd(hidden, labels, None, None, labels, state, -100, hidden.dtype, weight, bias, linear, reference)
    return state


def body_of(name):
    """The function that a custom op of ours runs."""
    from alignloss.ops import kl, logprob, preference, sequence

    (op,) = {getattr(module, name) for module in (kl, logprob, preference, sequence) if hasattr(module, name)}
    return op.function
