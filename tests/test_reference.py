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


def models(*rows):
    made = [torch.nn.Module(), torch.nn.Module()]
    for module, values in zip(made, rows, strict=True):
        module.weight = torch.nn.Parameter(torch.tensor(values))
    return made


def test_the_hard_update_is_a_copy_whatever_was_there():
    reference, model = models([torch.nan, torch.inf, -3e38, -torch.inf], [1.0, 2.0, 3e38, -torch.inf])
    alignloss.update_reference(reference, model)
    assert torch.equal(reference.weight, model.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_vocabulary_stays_masked(dtype):
    reference, model = (module.to(dtype) for module in models([-torch.inf, 1.0], [-torch.inf, 3.0]))
    alignloss.update_reference(reference, model, mix=0.5)
    assert reference.weight.tolist() == [-torch.inf, 2.0]


@pytest.mark.parametrize("kind", ["int8", "float8", "expanded", "inference"])
def test_nothing_moves_where_one_parameter_cannot(kind):
    with torch.inference_mode(kind == "inference"):
        last = torch.ones(2, 2)
    if kind in ("int8", "float8"):
        last = last.to(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    elif kind == "expanded":
        last = torch.ones(2, 1).expand(2, 2)
    reference, model = models([1.0], [2.0])
    for module in (reference, model):
        module.last = torch.nn.Parameter(last, requires_grad=False)
    with pytest.raises(ValueError, match=r"last (is|was made)"):
        alignloss.update_reference(reference, model, mix=0.5)
    assert reference.weight.tolist() == [1.0]
