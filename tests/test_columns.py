"""A head of which the last columns alone train has their gradient, and no memory or products for that of the others."""

import pytest
import torch
from reference import error, inputs, leaf, token_logps
from test_onepass import BACKENDS, ONE, SEVERAL, SOME, B, T, V, room
from torch.profiler import ProfilerActivity, profile

import alignloss
from alignloss.commands.measure import peak_bytes
from alignloss.ops import sizes
from alignloss.ops.columns import beside_frozen

H, R = 37, 3
PAIRS = [(i, i + B) for i in range(B)]


@pytest.fixture(autouse=True)
def _groups_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(sizes.Footprint, "least_group", 1)


def parts(dtype, masked=0.2):
    """Hidden states (2B, T, H + R), frozen columns, those that train, bias and labels; the same in every dtype."""
    torch.manual_seed(0)
    hidden, weight, bias, labels = inputs(2 * B, T, hidden_size=H + R, vocabulary=V, masked=masked)
    frozen, trained = weight[:, :H].to(dtype), leaf(weight[:, H:], dtype)
    return leaf(hidden, dtype), frozen, trained, leaf(bias, dtype), labels


@pytest.mark.parametrize(
    ("tokens", "backend"),
    [
        pytest.param(tokens, backend, marks=pytest.mark.nightly if long else (), id=f"{name} {backend}")
        for name, tokens in {"one": ONE, "several": SEVERAL, "some": SOME, "recomputed": None}.items()
        for backend in BACKENDS
        for long in [backend == "triton" and name in ("one", "recomputed")]
    ],
)
def test_gradients(tokens, backend):
    found = []
    for dtype in (torch.float64, torch.float32):
        hidden, frozen, trained, bias, labels = parts(dtype)
        if dtype == torch.float64:
            loss = token_logps(hidden, torch.cat([frozen, trained], 1), labels, bias).square().sum()
        else:
            head = (hidden, beside_frozen(frozen, trained), labels)
            options = {"backend": backend, "workspace_bytes": room(tokens or 1, backend=backend, hidden_size=H + R)}
            if tokens is None:
                loss = alignloss.linear_logprob(*head, bias, **options).square().sum()
            else:
                loss = alignloss.one_pass_loss(
                    *head, lambda logps, _: logps.square().sum(), bias, units=PAIRS, **options
                )  # fmt: skip
        (2 * loss).backward()
        found.append([loss.detach(), hidden.grad, trained.grad, bias.grad])
    for ours, exact in zip(*reversed(found), strict=True):
        assert ours.shape == exact.shape and error(ours, exact) <= 2e-5


@pytest.mark.parametrize(("one_pass", "gemms"), [(True, 2 + R / (H + R)), (False, 3 + R / (H + R))])
def test_products(one_pass, gemms):
    hidden, frozen, trained, _, labels = parts(torch.float32, masked=0)
    weight = beside_frozen(frozen, trained)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as prof:
        if one_pass:
            alignloss.one_pass_loss(hidden, weight, labels, lambda logps, _: logps.sum(), backend="torch").backward()
        else:
            alignloss.linear_logprob(hidden, weight, labels, backend="torch").sum().backward()
    flops = sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert flops == pytest.approx(gemms * 2 * labels.numel() * V * (H + R))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_of_the_frozen_columns_is_allocated(dtype):
    vocabulary, width, rank = 20_000, 256, 4
    frozen = torch.zeros(vocabulary, width, dtype=dtype)
    trained = torch.zeros(vocabulary, rank, dtype=dtype, requires_grad=True)
    hidden = torch.zeros(2, 4, width + rank, dtype=dtype, requires_grad=True)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    loss_fn = alignloss.SFTLoss(workspace_bytes=1 << 20)
    logps = lambda weight: alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=1 << 20).sum()
    for run in (logps, lambda weight: loss_fn(hidden, weight, labels).loss):
        weight = beside_frozen(frozen, trained)
        loss = run(weight)
        assert peak_bytes(loss.backward) < frozen.nbytes / 4
        trained.grad = None


def test_a_weight_that_is_used_twice_and_by_others():
    hidden, frozen, trained, _, labels = parts(torch.float32)
    weight = beside_frozen(frozen, trained)
    both = (
        alignloss.linear_logprob(hidden, weight, labels).sum()
        + alignloss.linear_logprob(2 * hidden, weight, labels).sum()
    )
    (both + weight.square().sum()).backward()
    got = trained.grad
    other = leaf(trained.detach(), torch.float64)
    weight, hidden = torch.cat([frozen.double(), other], 1), hidden.detach().double()
    both = token_logps(hidden, weight, labels).sum() + token_logps(2 * hidden, weight, labels).sum()
    (both + weight.square().sum()).backward()
    assert error(got, other.grad) <= 2e-5


@pytest.mark.parametrize("one_pass", [False, True])
def test_the_gradient_goes_past_the_weight(one_pass):
    """So that nothing that looks at the weight's sees one without meaning."""
    hidden, frozen, trained, _, labels = parts(torch.float32)
    weight = beside_frozen(frozen, trained)
    seen = []
    weight.register_hook(seen.append)
    weight.retain_grad()
    if one_pass:
        loss = alignloss.one_pass_loss(hidden, weight, labels, lambda logps, _: logps.sum())
    else:
        loss = alignloss.linear_logprob(hidden, weight, labels).sum()
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward()
    assert seen == [] and weight.grad is None and trained.grad is not None


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled():
    hidden, frozen, trained, _, labels = parts(torch.float32)

    def run(hidden, trained):
        return alignloss.linear_logprob(hidden, beside_frozen(frozen, trained), labels).sum()

    run(hidden, trained).backward()
    expected = trained.grad
    trained.grad = None
    torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, trained).backward()
    torch.testing.assert_close(trained.grad, expected)
