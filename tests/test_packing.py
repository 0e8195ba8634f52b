"""Offsets padded to a static shape: the number of real sequences is said, or nothing plausible comes out."""

import inspect

import pytest
import torch
from reference import error, inputs, leaf

import alignloss
from alignloss.losses import LOSSES

T = 6
OPTIONS = {
    "robust_dpo": {"label_smoothing": 0.1},
    "r_dpo": {"length_weight": 0.01},
    "dpop": {"penalty_weight": 2.0},
    "odpo": {"offset_weight": 1.0},
    "dpo_shift": {"rejected_scale": 0.8},
    "f_dpo": {"divergence": alignloss.losses.js_divergence},
    "exo": {"epsilon": 0.1},
    "simpo": {"gamma": 1.0},
    "alphapo": {"gamma": 1.0, "alpha": 0.5},
    "slic": {"delta": 1.0},
}


def packed(sequences=4, dtype=torch.float32):
    hidden, weight, _, labels = inputs(sequences * T, dtype=dtype)
    return hidden, weight, labels, torch.arange(0, (sequences + 1) * T, T)


def module_of(name, backend):
    options = OPTIONS.get(name, {})
    if "beta" in inspect.signature(LOSSES[name]).parameters:
        options = options | {"beta": 0.3}
    return alignloss.PreferenceLoss(name, backend=backend, **options)


def data_of(module, sequences):
    count = sequences // 2 if module.paired else sequences
    data = {"ref_logps": torch.linspace(-20, -10, sequences)} if module.needs_reference else {}
    return data | {
        name: (torch.arange(count) % 2 == 0) if name == "desirable" else torch.linspace(0.1, 0.9, count)
        for name in module.data
    }


def step(module, hidden, weight, labels, offsets, **data):
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    out = module(h, w, labels, cu_seqlens=offsets, **data)
    out.loss.backward()
    return out, h.grad, w.grad


FUSED = ["dpo", "ipo", "kto", "cpo"]  # by a kernel of their own


@pytest.mark.parametrize(
    ("name", "backend"), [*((n, "torch") for n in sorted(LOSSES)), *((n, "triton") for n in FUSED)]
)
def test_padded_offsets_mean_what_the_plain_ones_do(name, backend):
    hidden, weight, labels, offsets = packed()
    module = module_of(name, backend)
    data = data_of(module, 4)
    expected = step(module, hidden, weight, labels, offsets, **data)
    padded = torch.cat([offsets, offsets[-1:].expand(4)])
    got = step(module, hidden, weight, labels, padded, real_sequences=4, **data)
    for a, b in zip(got[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    assert got[0].metrics() == expected[0].metrics()
    with pytest.raises(ValueError, match="give real_sequences"):
        step(module, hidden, weight, labels, padded, **data)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((n, "torch") for n in (*FUSED, "orpo", "npo", "sft")),
        *(pytest.param(n, "triton", marks=pytest.mark.nightly if n != "dpo" else ()) for n in FUSED),
    ],
)
@pytest.mark.parametrize("bad", ["repeated last", "repeated first", "short", "long", "falling", "from 1"])
def test_unchecked_offsets_that_do_not_fit_give_no_number(bad, name, backend):
    hidden, weight, labels, offsets = packed()
    offsets = {
        "repeated last": torch.tensor([0, 12, 24, 24, 24]),
        "repeated first": torch.tensor([0, 0, 6, 12, 24]),
        "short": torch.tensor([0, 6, 12, 18, 23]),
        "long": torch.tensor([0, 6, 12, 18, 25]),
        "falling": torch.tensor([0, 12, 6, 18, 24]),
        "from 1": torch.tensor([1, 6, 12, 18, 24]),
    }[bad]
    module = module_of(name, backend)
    module.head_options["validate"] = False
    data = data_of(module, 4)
    out, dhidden, dweight = step(module, hidden, weight, labels, offsets, **data)
    assert bool(out.loss.isnan()) and bool(out.losses.isnan().all())
    labelled = labels != -100
    assert bool(dhidden[labelled].isnan().all()) and bool(dweight.isnan().all())
    sums = alignloss.sequence_logprob(hidden, weight, labels, cu_seqlens=offsets, validate=False, backend=backend)
    assert bool(sums.logps.isnan().all())


def test_a_reference_and_weights_take_the_same_padding():
    hidden, weight, labels, offsets = packed()
    padded = torch.cat([offsets, offsets[-1:].expand(2)])
    tokens = alignloss.ld_dpo_token_weights(labels, tail_weight=0.5, cu_seqlens=offsets)
    assert torch.equal(
        tokens, alignloss.ld_dpo_token_weights(labels, tail_weight=0.5, cu_seqlens=padded, real_sequences=4)
    )
    drawn = [
        alignloss.sampo_token_weights(labels, cu_seqlens=o, generator=torch.Generator().manual_seed(1), **real)
        for o, real in ((offsets, {}), (padded, {"real_sequences": 4}))
    ]
    assert torch.equal(*drawn)
    stats = alignloss.linear_logprob_stats(hidden, weight, labels, stats=("log_sum_sq_probs",))
    pairs = alignloss.wpo_pair_weights(stats, labels, cu_seqlens=offsets)
    assert torch.equal(pairs, alignloss.wpo_pair_weights(stats, labels, cu_seqlens=padded, real_sequences=4))
    reference = {"ref_hidden": hidden.roll(1, 0), "ref_weight": weight, "token_weights": tokens, "pair_weights": pairs}
    expected = alignloss.DPOLoss()(hidden, weight, labels, cu_seqlens=offsets, **reference)
    got = alignloss.DPOLoss()(hidden, weight, labels, cu_seqlens=padded, real_sequences=4, **reference)
    assert torch.equal(got.losses, expected.losses)
    for call in (
        lambda: alignloss.ld_dpo_token_weights(labels, tail_weight=0.5, cu_seqlens=padded),
        lambda: alignloss.sampo_token_weights(labels, cu_seqlens=padded),
        lambda: alignloss.wpo_pair_weights(stats, labels, cu_seqlens=padded),
        lambda: alignloss.SFTLoss()(hidden, weight, labels, cu_seqlens=padded),
        lambda: alignloss.sequence_logprob(hidden, weight, labels, cu_seqlens=padded),
    ):
        with pytest.raises(ValueError, match="give real_sequences"):
            call()


def test_tokens_beyond_the_real_sequences_carry_no_label():
    hidden, weight, labels, offsets = packed()
    tail = torch.cat([offsets[:3], torch.tensor([18, 24])])
    with pytest.raises(ValueError, match="beyond the 2 real sequences, which end at 12"):
        alignloss.CPOLoss()(hidden, weight, labels, cu_seqlens=tail, real_sequences=2)
    labels[12:] = -100
    out = alignloss.CPOLoss()(hidden, weight, labels, cu_seqlens=tail, real_sequences=2)
    expected = alignloss.CPOLoss()(hidden[:12], weight, labels[:12], cu_seqlens=offsets[:3])
    assert error(out.loss, expected.loss) <= 1e-6


@pytest.mark.parametrize(
    ("real", "message"),
    [(3, "an odd number"), (5, r"int in \[0, 4\]"), (-2, r"int in \[0, 4\]"), (2.0, r"int in \[0, 4\]")],
)
def test_numbers_of_real_sequences_that_do_not_fit(real, message):
    hidden, weight, labels, offsets = packed()
    labels[int(max(real, 0)) * T :] = -100
    with pytest.raises(ValueError, match=message):
        alignloss.CPOLoss()(hidden, weight, labels, cu_seqlens=offsets, real_sequences=real)


def test_real_sequences_need_offsets():
    hidden, weight, labels, _ = packed()
    with pytest.raises(ValueError, match="it needs cu_seqlens"):
        alignloss.CPOLoss()(hidden.view(4, T, -1), weight, labels.view(4, T), real_sequences=4)


def test_labels_of_padded_offsets():
    ids = torch.arange(1, 25)
    mask, offsets = torch.ones_like(ids), torch.tensor([0, 5, 12])
    expected = alignloss.next_token_labels(ids[:12], mask[:12], cu_seqlens=offsets)
    assert expected.tolist() == [2, 3, 4, 5, -100, 7, 8, 9, 10, 11, 12, -100]
    padded = torch.tensor([0, 0, 5, 5, 12, 12])
    assert torch.equal(alignloss.next_token_labels(ids[:12], mask[:12], cu_seqlens=padded), expected)
    tail = alignloss.next_token_labels(ids, mask, cu_seqlens=torch.tensor([0, 5, 12, 24]), real_sequences=2)
    assert torch.equal(tail, torch.cat([expected, torch.full((12,), -100)]))
    with pytest.raises(ValueError, match="rise from 0 to the number of tokens, 24"):
        alignloss.next_token_labels(ids, mask, cu_seqlens=offsets)


def test_one_graph_serves_every_number_of_real_sequences():
    hidden, weight, labels, _ = packed(8)
    module, step = alignloss.CPOLoss(validate=False), None
    step = torch.compile(
        lambda h, y, offsets, real: module(h, weight, y, cu_seqlens=offsets, real_sequences=real).loss,
        fullgraph=True,
        dynamic=True,
    )
    for real in (4, 6, 8):
        ends = [T * s for s in range(real + 1)]
        offsets = torch.tensor(ends + ends[-1:] * (8 - real))
        y = labels.clone()
        y[ends[-1] :] = -100
        got = step(hidden, y, offsets, real)
        expected = alignloss.CPOLoss()(hidden, weight, y, cu_seqlens=offsets, real_sequences=real).loss
        assert error(got, expected) <= 1e-6


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft"])
def test_every_metric_of_offsets_that_do_not_fit_is_no_number(loss):
    hidden, weight, _, labels = inputs(12, dtype=torch.float32)
    module = alignloss.SFTLoss(validate=False)
    data = {} if loss == "sft" else {"ref_logps": torch.zeros(6)}
    if loss != "sft":
        module = alignloss.PreferenceLoss(loss, beta=0.1, validate=False)
    if loss == "kto":
        data |= {"desirable": True, "kl": 0.1}
    offsets = torch.tensor([0, 3, 6, 9, 12, 12, 12])
    metrics = module(hidden, weight, labels, cu_seqlens=offsets, stats=("entropy", "is_top1"), **data).metrics()
    given = {"kto": {"kl": 0.1}, "sft": {"rewards": 0.0}}.get(loss, {})  # whatever the offsets
    for name, value in given.items():
        assert float(metrics.pop(name)) == pytest.approx(value)
    assert metrics.pop("not_finite") == 6
    assert all(value.isnan() for value in metrics.values()), metrics


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_offsets_that_do_not_fit_reach_the_gradient_of_every_token(backend):
    hidden, weight, _, labels = inputs(12, masked=0.0, dtype=torch.float32)
    hidden.requires_grad_()
    weights = torch.ones(12).index_fill(0, torch.tensor([2, 5]), 0.0)
    module = alignloss.CPOLoss(validate=False, backend=backend)
    module(hidden, weight, labels, cu_seqlens=torch.tensor([0, 6, 12, 12, 12]), token_weights=weights).loss.backward()
    assert bool(hidden.grad.isnan().all())
