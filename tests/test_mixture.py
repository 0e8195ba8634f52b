"""Several losses in one pass over the hidden states, e.g. MPO."""

import copy
import pickle

import pytest
import torch
from reference import error, inputs, leaf

import alignloss
from alignloss.modules import groups

B, T = 3, 9


def case():
    hidden, weight, _, labels = inputs(2 * B, T)
    return hidden, weight, labels, torch.randn(2 * B, dtype=torch.float64) - 20


@pytest.mark.parametrize("workspace", [None, 9_000, 2_000], ids=["one group", "groups", "recomputed"])
def test_a_mixture_is_the_weighted_sum_of_its_losses(workspace):
    hidden, weight, labels, ref = case()
    dpo, bco = alignloss.DPOLoss(beta=0.3), alignloss.PreferenceLoss("bco_pair", beta=0.2)
    cpo, nll = alignloss.CPOLoss(beta=0.1, nll_weight=0.5), 0.6
    h, w = leaf(hidden), leaf(weight)
    first = dpo(h, w, labels, ref_logps=ref)
    second, third = bco(h, w, labels, ref_logps=ref), cpo(h, w, labels)
    nll_loss = alignloss.SFTLoss()(h[:B], w, labels[:B]).loss
    expected = 0.8 * first.loss + 0.2 * second.loss + 0.4 * third.loss + nll * nll_loss
    expected.backward()
    h2, w2 = leaf(hidden), leaf(weight)
    mixture = alignloss.MixtureLoss([dpo, bco, cpo], weights=[0.8, 0.2, 0.4], nll_weight=nll, workspace_bytes=workspace)
    out = mixture(h2, w2, labels, ref_logps=ref)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    torch.testing.assert_close(out.chosen_rewards, first.chosen_rewards)
    assert error(h2.grad, h.grad) < 1e-12
    assert error(w2.grad, w.grad) < 1e-12


def test_it_takes_one_pass(monkeypatch):
    hidden, weight, labels, ref = case()
    calls = []
    original = groups.one_pass
    monkeypatch.setattr(groups, "one_pass", lambda *a: calls.append(1) or original(*a))
    mixture = alignloss.MixtureLoss([alignloss.DPOLoss(), alignloss.PreferenceLoss("nca", beta=0.1)], [0.5, 0.5])
    mixture(leaf(hidden), leaf(weight), labels, ref_logps=ref).loss.backward()
    assert calls == [1]
    coupled = alignloss.MixtureLoss([alignloss.DPOLoss(), alignloss.PreferenceLoss("aot", beta=0.1)], [0.5, 0.5])
    coupled(leaf(hidden), leaf(weight), labels, ref_logps=ref).loss.backward()
    assert calls == [1]


def test_data_of_all_its_losses_are_keywords_of_its_call():
    hidden, weight, labels, ref = case()
    scores = {"chosen_scores": torch.tensor([3.0, 2.0, 1.0]), "rejected_scores": torch.zeros(3)}
    rebel, simpo = alignloss.PreferenceLoss("rebel", beta=0.1), alignloss.SimPOLoss()
    mixture = alignloss.MixtureLoss([rebel, simpo], [1.0, 2.0])
    out = mixture(hidden, weight, labels, ref_logps=ref, **scores)
    parts = rebel(hidden, weight, labels, ref_logps=ref, **scores), simpo(hidden, weight, labels)
    torch.testing.assert_close(out.losses, parts[0].losses + 2 * parts[1].losses)
    with pytest.raises(ValueError, match="missing: \\['chosen_scores', 'rejected_scores'\\]"):
        mixture(hidden, weight, labels, ref_logps=ref)


def test_copies_are_mixtures_of_their_own():
    hidden, weight, labels, ref = case()
    mixture = alignloss.MixtureLoss([alignloss.DPOLoss(beta=0.1)], [1.0])
    expected = mixture(hidden, weight, labels, ref_logps=ref).loss
    torch.testing.assert_close(
        pickle.loads(pickle.dumps(mixture))(hidden, weight, labels, ref_logps=ref).loss, expected
    )
    copied = copy.deepcopy(mixture)
    copied.mixed[0].function.options["beta"] = 1.0
    torch.testing.assert_close(
        copied(hidden, weight, labels, ref_logps=ref).loss,
        alignloss.DPOLoss(beta=1.0)(hidden, weight, labels, ref_logps=ref).loss,
    )
    torch.testing.assert_close(mixture(hidden, weight, labels, ref_logps=ref).loss, expected)


def test_unpaired_losses_mix():
    hidden, weight, labels, ref = case()
    data = {"ref_logps": ref, "desirable": torch.arange(2 * B) % 2 == 0, "kl": 0.1}
    kto, npo = alignloss.KTOLoss(), alignloss.PreferenceLoss("npo", beta=0.1)
    out = alignloss.MixtureLoss([kto, npo], [1.0, 0.5])(hidden, weight, labels, **data)
    expected = kto(hidden, weight, labels, **data).loss + 0.5 * npo(hidden, weight, labels, ref_logps=ref).loss
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(
    ("modules", "weights", "message"),
    [
        ([], [], "a weight for each loss; got 0 and 0"),
        ([alignloss.DPOLoss()], 1.0, "a list of losses and one of weights"),
        ([alignloss.DPOLoss()], [1.0, 2.0], "a weight for each loss; got 1 and 2"),
        ([alignloss.DPOLoss(), alignloss.KTOLoss()], [1, 1], "all paired or all unpaired"),
        ([alignloss.DPOLoss(), alignloss.SFTLoss()], [1, 1], "is nll_weight"),
        ([alignloss.DPOLoss(softcap=3.0)], [1.0], "give softcap=3.0 to the mixture"),
        ([alignloss.DPOLoss()], [float("nan")], "a weight must be a finite number"),
    ],
)
def test_what_it_refuses(modules, weights, message):
    with pytest.raises(ValueError, match=message):
        alignloss.MixtureLoss(modules, weights)


@pytest.mark.parametrize("option", ["beta", "tempreature", "label_smoothing"])
def test_an_option_that_it_would_ignore_is_refused(option):
    with pytest.raises(ValueError, match=f"its losses have their own.*unknown: ..{option}"):
        alignloss.MixtureLoss([alignloss.DPOLoss(), alignloss.IPOLoss()], [1.0, 1.0], **{option: 0.5})
