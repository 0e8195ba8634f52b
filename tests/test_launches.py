"""At small shapes launches decide: a step of a fused loss takes at most 8 forward and 6 backward.

A step in one pass does the work of its backward in the forward, and takes a GEMM and its tile's kernel less.
"""

import pytest
import torch
from reference import body_of, inputs, leaf, replace_kernels
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

import alignloss

# operators that allocate or describe memory and launch nothing
FREE = {
    *(
        "alias",
        "as_strided",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
    ),
    *("_unsafe_view", "numpy_T", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Launches(TorchDispatchMode):
    """Names of the kernels that a GPU would launch: torch operators, inside the custom ops too, and Triton kernels."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        replace_kernels(monkeypatch, lambda module, name, kernel: Counted(kernel, name, self.names))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "alignloss":
            with self:
                return body_of(name)(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if name not in FREE and isinstance(result, torch.Tensor) and result.numel():
            self.names.append(name)
        return result

    def clear(self):
        names, self.names[:] = list(self.names), []
        return names


class Counted:
    def __init__(self, kernel, name, names):
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


# what is trained: most launches forward and backward
LIMITS = {"": (7, 0), "hidden": (8, 3), "hidden weight, recomputed": (8, 6), "hidden weight": (14, 4)}


@pytest.mark.parametrize("trained", LIMITS)
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "cpo"])
def test_a_step_takes_few_launches(name, trained, monkeypatch):
    hidden, weight, _, labels = inputs(4, 6, dtype=torch.float32)
    index = torch.nonzero(labels.view(-1) != -100).squeeze(1)
    h, w = (leaf(t, torch.float32, n in trained) for t, n in ((hidden, "hidden"), (weight, "weight")))
    module, data = {
        "dpo": (alignloss.DPOLoss, {"ref_logps": torch.zeros(4)}),
        "ipo": (alignloss.IPOLoss, {"ref_logps": torch.zeros(4)}),
        "kto": (
            alignloss.KTOLoss,
            {"ref_logps": torch.zeros(4), "desirable": torch.arange(4) % 2 == 0, "kl": torch.tensor(0.1)},
        ),
        "cpo": (alignloss.CPOLoss, {}),
    }[name]
    one = torch.ones(())
    loss_fn = module(backend="triton", validate=False, couples_batch="recomputed" in trained)
    most_forward, most_backward = LIMITS[trained]
    with Launches(monkeypatch) as launches:
        loss = loss_fn(h, w, labels, token_index=index, **data).loss
        forward = launches.clear()
        assert len(forward) <= most_forward, forward
        if trained:
            torch.autograd.grad(loss, [t for t in (h, w) if t.requires_grad], grad_outputs=one)
            backward = launches.clear()
            assert len(backward) <= most_backward, backward
