"""A call that finds no memory says which workspace would fit, leaves all as it was, and runs with that workspace."""

import re

import pytest
import torch
from reference import inputs, leaf
from torch.utils._python_dispatch import TorchDispatchMode

import alignloss
from alignloss.ops import context, walk

N, H, V = 64, 32, 900
CALLS = {
    "log-probabilities": lambda h, w, y, **o: alignloss.linear_logprob(h, w, y, **o).mean(),
    "entropy": lambda h, w, y, **o: alignloss.linear_logprob_stats(h, w, y, stats=("entropy",), **o).entropy.mean(),
    "KL": lambda h, w, y, **o: alignloss.linear_kl(h, w, h.detach(), w.detach().flip(0), y, **o).mean(),
    "SFT": lambda h, w, y, **o: alignloss.SFTLoss(**o)(h, w, y).loss,
    "CPO": lambda h, w, y, **o: alignloss.CPOLoss(**o)(h, w, y).loss,
}


class Limited(TorchDispatchMode):
    """A device on which nothing larger than so many bytes can be had; inside of an op, which a mode sees whole, too."""

    def __init__(self, most):
        super().__init__()
        self.most, self.patch = most, pytest.MonkeyPatch()

    def checked(self, made):
        if made.nbytes > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {made.nbytes} bytes")
        return made

    def __enter__(self):
        empty = walk.Scored.empty
        self.patch.setattr(walk.Scored, "empty", lambda *args, **kwargs: self.checked(empty(*args, **kwargs)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.checked(out) if func.overloadpacket.__name__.startswith(("empty", "new_empty")) else out


def step(call, hidden, weight, labels, **options):
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    call(h, w, labels, **options).backward()
    return h.grad, w.grad


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("log-probabilities", 100_000), ("log-probabilities", 120_000), ("entropy", 100_000), ("KL", 150_000),
        ("SFT", 150_000), ("CPO", 150_000),
    ],
)  # fmt: skip
def test_the_error_says_which_workspace_would_fit(name, most, monkeypatch):
    """Of all logits, 230,400 bytes, there is no room, beside a gradient of the head of 115,200 bytes or without."""
    hidden, weight, _, labels = inputs(8, N // 8, hidden_size=H, vocabulary=V, dtype=torch.float32, masked=0.0)
    expected = step(CALLS[name], hidden, weight, labels)
    monkeypatch.setattr(context, "_free_bytes", lambda device: 200_000)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught, Limited(most):
        step(CALLS[name], hidden, weight, labels)
    (fits,) = re.findall(r"workspace_bytes=(\d+) would fit", str(caught.value))
    assert 0 < int(fits) <= 180_000
    found = [step(CALLS[name], hidden, weight, labels)]
    with Limited(200_000):
        found.append(step(CALLS[name], hidden, weight, labels, workspace_bytes=int(fits)))
    for gradients in found:
        for got, exact in zip(gradients, expected, strict=True):
            assert float((got - exact).norm()) <= 1e-5 * float(exact.norm())


def test_nothing_is_advised_where_the_results_alone_do_not_fit(monkeypatch):
    hidden, weight, _, labels = inputs(8, N // 8, hidden_size=H, vocabulary=V, dtype=torch.float32, masked=0.0)
    monkeypatch.setattr(context, "_free_bytes", lambda device: 1000)
    with pytest.raises(torch.OutOfMemoryError, match=r"no workspace would fit: give fewer tokens"), Limited(1000):
        step(CALLS["CPO"], hidden, weight, labels)
