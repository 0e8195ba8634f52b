"""TR-DPO: a reference that follows the policy."""

import pytest
import torch
from torch import nn

import alignloss


def test_soft_and_hard_updates():
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    alignloss.update_reference(reference, model, mix=0.25)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(p, 0.25 * dict(model.named_parameters())[name] + 0.75 * before[name])
        assert p.grad is None
    alignloss.update_reference(reference, model)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), model.parameters(), strict=True))


def test_models_that_do_not_match_and_a_mix_out_of_range():
    with pytest.raises(ValueError, match=r"1 differ, e\.g\. \['bias'\]"):
        alignloss.update_reference(nn.Linear(3, 2), nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match=r"mix must lie in \(0, 1\], got 0"):
        alignloss.update_reference(nn.Linear(3, 2), nn.Linear(3, 2), mix=0)
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got dict"):
        alignloss.update_reference(nn.Linear(3, 2), {})
