"""Properties of every loss in a module, over random lengths, masks and confidence: what must not change its result."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import inputs, leaf, token_logps
from test_losses import OPTIONS, call

import alignloss
from alignloss.losses import COUPLED, LOSSES

H, V = 5, 23
NAMES = list(LOSSES)


def problem(pairs, longest, seed, peak):
    """Hidden states, head, ragged labels of 2B sequences, some without any, and whatever data a loss may name."""
    torch.manual_seed(seed)
    hidden, weight, _, labels = inputs(2 * pairs, longest, hidden_size=H, vocabulary=V, masked=0.2, peak=peak)
    lengths = torch.randint(0, longest + 1, (2 * pairs, 1))
    labels[torch.arange(longest) >= lengths] = -100
    return hidden, weight, labels


def data_for(module, pairs, ref):
    count = pairs if module.paired else 2 * pairs
    given = {name: torch.rand(count, dtype=torch.float64) for name in module.data}
    if "chosen_scores" in given:
        given["chosen_scores"] = given["rejected_scores"] + 1
    if "desirable" in given:
        given["desirable"] = torch.arange(count) % 2 == 0
    return given | ({"ref_logps": ref} if module.needs_reference else {})


def picked(data, order):
    """Data of pairs in another order; the reference is one of sequences."""
    pairs = order[: len(order) // 2]
    return {
        name: value[order] if len(value) == len(order) else value[pairs if len(value) == len(pairs) else order]
        for name, value in data.items()
    }


def step(module, hidden, weight, labels, data, **layout):
    h, w = leaf(hidden), leaf(weight)
    out = module(h, w, labels, **data, **layout)
    out.loss.backward()
    return out, h.grad, w.grad


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    pairs=st.integers(1, 4),
    longest=st.integers(1, 7),
    seed=st.integers(0, 2**16),
    peak=st.sampled_from([0.0, 3.0, 30.0]),
    workspace=st.sampled_from([900, 2_500, 6_000]),
)
def test_chunks_padding_packing_and_order_change_nothing(name, pairs, longest, seed, peak, workspace):
    hidden, weight, labels = problem(pairs, longest, seed, peak)
    ref = token_logps(hidden, weight, labels).sum(1) + torch.randn(2 * pairs, dtype=torch.float64)
    module = alignloss.PreferenceLoss(name, **OPTIONS[name])
    data = data_for(module, pairs, ref)
    out, dhidden, dweight = step(module, hidden, weight, labels, data)

    # the loss is its function of plain sums
    sums, lengths = token_logps(hidden, weight, labels).sum(1), (labels != -100).sum(1).clamp(min=1)
    columns = {"logps": sums, "ref_logps": ref, "lengths": lengths}
    halves = {
        ("ref_" if n == "ref_logps" else "") + side + "_" + n.removeprefix("ref_"): v[part]
        for n, v in columns.items()
        for side, part in (("chosen", slice(pairs)), ("rejected", slice(pairs, None)))
    }
    torch.testing.assert_close(out.losses, call(name, columns | halves | data, **OPTIONS[name])[0])

    scale = max(1.0, float(dweight.norm()))
    chunked = alignloss.PreferenceLoss(name, **OPTIONS[name], workspace_bytes=workspace)
    padded_hidden, padded_labels = (
        torch.nn.functional.pad(hidden, (0, 0, 0, 3), value=7.0),
        torch.nn.functional.pad(labels, (0, 3), value=-100),
    )
    keep = torch.rand(labels.shape) < 0.5
    keep |= labels != -100
    offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    for same, h, w in (
        step(chunked, hidden, weight, labels, data),
        step(module, padded_hidden, weight, padded_labels, data),
        step(chunked, hidden[keep], weight, labels[keep], data, cu_seqlens=offsets, real_sequences=len(hidden)),
    ):
        torch.testing.assert_close(same, out)
        got = torch.zeros_like(hidden)
        if h.dim() == 3:
            got = h[:, :longest]
        else:
            got[keep] = h
        assert float((got - dhidden).norm()) <= 1e-9 * scale
        assert float((w - dweight).norm()) <= 1e-9 * scale

    swap = torch.randperm(pairs)
    order = torch.cat([swap, pairs + swap])
    moved, h, w = step(module, hidden[order], weight, labels[order], picked(data, order))
    expected = out.losses[swap if module.paired else order]
    if module.couples_batch:  # which of two equal margins comes first has no meaning
        moved, expected = moved._replace(losses=moved.losses.sort().values), expected.sort().values
    torch.testing.assert_close(moved.losses, expected)
    assert float((h - dhidden[order]).norm()) <= 1e-9 * scale


@pytest.mark.parametrize("name", sorted(NAMES))
def test_only_coupled_losses_are_kept_together(name):
    module = alignloss.PreferenceLoss(name, **OPTIONS[name])
    assert module.couples_batch == (LOSSES[name] in COUPLED)
    assert set(inspect.signature(LOSSES[name]).parameters) >= set(OPTIONS[name])
