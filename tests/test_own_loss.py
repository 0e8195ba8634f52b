"""`one_pass_loss`: any loss of token log-probabilities has its value and gradients, in one pass if the head trains."""

import pytest
import torch
from reference import error, inputs, leaf, statistics, token_logps
from test_onepass import BACKENDS, ONE, SEVERAL, SOME, B, H, T, V, ragged, room
from torch.profiler import ProfilerActivity, profile

import alignloss
from alignloss import losses
from alignloss.modules import own_loss
from alignloss.ops import sizes

PAIRS = [(i, i + B) for i in range(B)]


@pytest.fixture(autouse=True)
def _groups_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(sizes.Footprint, "least_group", 1)


@pytest.fixture
def passes(monkeypatch):
    """(groups, those held) of every one-pass step."""
    counts = []
    original = own_loss.one_pass

    def spy(projection, indices, shares, held, stats):
        counts.append((len(indices), held))
        return original(projection, indices, shares, held, stats)

    monkeypatch.setattr(own_loss, "one_pass", spy)
    return counts


def weighed_dpo(logps, weights, labels):
    """DPO on weighed tokens, and the NLL of the chosen ones."""
    sums = (logps * weights.flatten()).view(2 * B, -1).sum(1)
    zero = torch.zeros_like(sums[:B])
    nll = -logps.view(2 * B, -1)[:B].sum() / (labels[:B] >= 0).sum()
    return losses.dpo_loss(*sums.split(B), zero, zero, beta=0.3)[0].mean() + 0.5 * nll


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "units", "expected"),
    [(ONE, None, "one"), (SEVERAL, PAIRS, "groups"), (SOME, PAIRS, "some"), (SEVERAL, None, "recomputed")],
)
def test_value_and_gradients(tokens, units, expected, backend, passes):
    hidden, weight, bias, labels = ragged(2 * B, T, hidden_size=H, vocabulary=V)
    weights = torch.rand(2 * B, T, dtype=torch.float64)
    exact = [leaf(t) for t in (hidden, weight, bias)]
    loss = weighed_dpo(token_logps(*exact[:2], labels, exact[2]).flatten(), weights, labels)
    (3 * loss).backward()
    h, w, b = (leaf(t, torch.float32) for t in (hidden, weight, bias))
    out = alignloss.one_pass_loss(
        h, w, labels, lambda logps, _: weighed_dpo(logps, weights, labels), b,
        units=units, backend=backend, workspace_bytes=room(tokens, backend=backend),
    )  # fmt: skip
    (3 * out).backward()
    assert (out.shape, out.dtype) == ((), torch.float32)
    assert error(out.detach(), loss.detach()) <= 2e-5
    for ours, theirs in zip((h, w, b), exact, strict=True):
        assert error(ours.grad, theirs.grad) <= 2e-5
    kind = {(): "recomputed"} | {(1, 1): "one"}
    found = kind.get(*passes or [()]) or ("groups" if passes[0][0] == passes[0][1] else "some")
    assert found == expected


@pytest.mark.parametrize(("tokens", "units"), [(ONE, None), (SOME, PAIRS), (SEVERAL, None)])
def test_the_last_call_sees_everything_and_no_gradient(tokens, units):
    hidden, weight, _, labels = ragged(2 * B, T, hidden_size=H, vocabulary=V)
    h, w = (leaf(t, torch.float32) for t in (hidden, weight))
    calls = []

    def loss_fn(logps, stats):
        calls.append((torch.is_grad_enabled(), logps.detach().clone(), stats))
        return logps.mean()

    options = {"workspace_bytes": room(tokens)}
    out = alignloss.one_pass_loss(h, w, labels, loss_fn, units=units, stats=("entropy", "is_top1"), **options)
    exact = token_logps(hidden, weight, labels).flatten()
    values = statistics(hidden, weight, labels)
    *before, (enabled, logps, stats) = calls
    assert all(flag for flag, *_ in before)
    assert not enabled
    assert logps.dtype == torch.float64
    assert error(logps, exact) <= 2e-5
    assert error(out.detach(), exact.mean()) <= 2e-5
    assert error(stats.entropy, values["entropy"].flatten()) <= 2e-5
    assert stats.is_top1.equal(values["is_top1"].flatten())
    assert stats.lse is None
    assert stats.logps is not None and not stats.entropy.requires_grad
    # each token is in one group
    assert torch.stack([seen != 0 for _, seen, _ in before]).sum(0).equal((labels.flatten() >= 0).long())


@pytest.mark.parametrize(
    ("trains", "tokens", "units", "gemms"),
    [
        ("", ONE, None, 1),
        ("hidden", ONE, None, 2),
        ("hidden weight", ONE, None, 3),
        ("hidden weight", SEVERAL, PAIRS, 3),
        ("hidden weight", SEVERAL, None, 4),
    ],
)
def test_gemms(trains, tokens, units, gemms):
    hidden, weight, _, labels = inputs(2 * B, T, hidden_size=H, vocabulary=V, masked=0)
    h, w = (leaf(t, torch.float32, name in trains) for t, name in ((hidden, "hidden"), (weight, "weight")))
    options = {"units": units, "backend": "torch", "workspace_bytes": 2 * room(tokens, backend="torch")}
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as prof:
        loss = alignloss.one_pass_loss(h, w, labels, lambda logps, _: -logps.mean(), stats=("is_top1",), **options)
        if trains:
            loss.backward()
    flops = sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert flops == gemms * 2 * labels.numel() * V * H


def test_what_else_the_loss_depends_on_gets_its_gradient():
    hidden, weight, _, labels = ragged(2 * B, T, hidden_size=H, vocabulary=V)
    found = []
    for dtype in (torch.float64, torch.float32):
        h, w = leaf(hidden, dtype), leaf(weight, dtype)
        factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        loss_fn = lambda logps, _, factor=factor: torch.nn.functional.softplus(-factor * logps).sum()
        if dtype == torch.float64:
            loss = loss_fn(token_logps(h, w, labels).flatten(), None)
        else:
            loss = alignloss.one_pass_loss(h, w, labels, loss_fn)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad, factor.grad))
    for ours, theirs in zip(*reversed(found), strict=True):
        assert error(ours, theirs) <= 2e-5


def test_a_loss_with_parameters_of_its_own_computes_nothing_in_vain():
    hidden, weight, _, labels = inputs(2 * B, T, hidden_size=H, vocabulary=V, masked=0)
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    factor = torch.ones((), requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as prof:
        alignloss.one_pass_loss(h, w, labels, lambda logps, _: -(factor * logps).mean(), backend="torch").backward()
    flops = sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert flops == 4 * 2 * labels.numel() * V * H


def test_zeros_are_for_a_loss_that_is_not_known_and_what_is_known_may_change():
    hidden, weight, _, labels = ragged(2 * B, T, hidden_size=H, vocabulary=V)
    calls = []

    def made(factor):
        def loss_fn(logps, _):
            calls.append(bool((logps != 0).any()))
            return (factor * logps).mean()

        return loss_fn

    def step(factor):
        h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
        calls.clear()
        alignloss.one_pass_loss(h, w, labels, made(factor)).backward()
        return list(calls), h.grad, w.grad

    first, *gradients = step(2.0)
    known, *again = step(2.0)
    assert (first, known) == ([False, True, True], [True, True])
    factor = torch.tensor(2.0, requires_grad=True)
    _, *through_graph = step(factor)
    assert factor.grad is not None
    for others in (again, through_graph):
        for ours, theirs in zip(others, gradients, strict=True):
            assert error(ours, theirs) <= 2e-5
    # and is looked at on zeros from then on
    assert step(factor)[0] == [False, True, True]


def test_statistics_are_the_losses_own():
    hidden, weight, _, labels = inputs(2, 5)
    values = []
    for trained in (False, True):
        h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32, trained)

        def loss_fn(logps, stats):
            return (logps * stats.entropy.mul_(0.5)).sum()

        values.append(alignloss.one_pass_loss(h, w, labels, loss_fn, stats=("entropy",)).detach())
    torch.testing.assert_close(*values)


def test_a_reference_pass_runs_the_loss_once():
    hidden, weight, _, labels = inputs(2, 5, dtype=torch.float32)
    calls = []
    with torch.no_grad():
        loss = alignloss.one_pass_loss(hidden, weight, labels, lambda logps, _: (calls.append(1), logps.sum())[1])
    assert calls == [1]
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": lambda logps, _: logps}, r"0-d floating point tensor, got \(10,\)"),
        ({"loss_fn": lambda logps, _: 1.0}, "got float"),
        ({"units": [(0,)]}, "each of the 2 rows .* exactly once"),
        ({"units": [(0, 1), (1,)]}, "exactly once"),
        ({"units": [(0, 1), ()]}, "exactly once"),
        ({"units": 2}, "exactly once"),
        ({"stats": ("entropie",)}, "stats takes"),
        ({"softcapp": 1.0}, "unknown: .'softcapp'"),
    ],
)
def test_bad_input(arguments, message):
    hidden, weight, _, labels = inputs(2, 5, dtype=torch.float32)
    arguments = {"loss_fn": lambda logps, _: logps.sum()} | arguments
    with pytest.raises(ValueError, match=message):
        alignloss.one_pass_loss(leaf(hidden, torch.float32), leaf(weight, torch.float32), labels, **arguments)
