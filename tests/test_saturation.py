"""Confident tokens, shared offsets and extreme margins keep their relative precision."""

import pytest
import torch
from reference import error, inputs, leaf, token_logps
from test_packing import FUSED, data_of, module_of

import alignloss
from alignloss import losses


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_log_probability_is_never_positive(backend):
    hidden, weight, _, labels = inputs(48, masked=0.0, peak=60.0, dtype=torch.float32)
    logps = alignloss.linear_logprob(hidden, weight, labels, backend=backend)
    assert float(logps.max()) <= 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("gap", [1.0, 10.0, 20.0, 27.0])
def test_one_minus_p_is_exact_down_to_1e_12(backend, gap):
    # z = (gap, 0): 1 - p = 1 / (1 + e^gap), which is 1.9e-12 at gap 27
    hidden = leaf(torch.tensor([[gap]]), torch.float32)
    weight = torch.tensor([[1.0], [0.0]])
    labels = torch.tensor([0])
    logps = alignloss.linear_logprob(hidden, weight, labels, backend=backend)
    logps.sum().backward()
    rest = 1 / (1 + torch.tensor(gap, dtype=torch.float64).exp())
    assert error(-torch.expm1(logps.detach().double()), rest.view(1)) <= 1e-4
    # d logp / d h = (1 - p) (W_y - W_other) = 1 - p
    assert error(hidden.grad, rest.view(1, 1)) <= 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_offset_shared_by_all_logits_costs_nothing(backend):
    hidden, weight, bias, labels = inputs(20, masked=0.0)
    offset = (bias + 1024.0).float()
    expected = token_logps(hidden.float().double(), weight.float().double(), labels, offset.double())
    got = alignloss.linear_logprob(hidden.float(), weight.float(), labels, offset, backend=backend)
    # the logits themselves are rounded to 2^-14 = 6e-5 at 1024; log-sum and gradient must add nothing to that
    assert float((got - expected).abs().max()) <= 2e-4
    # rows of dz sum to 0: 1 - p_y at the target against -sum of the others
    bias_leaf = leaf(offset, torch.float32)
    alignloss.linear_logprob(hidden.float(), weight.float(), labels, bias_leaf, backend=backend)[:1].sum().backward()
    assert abs(float(bias_leaf.grad.double().sum())) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forbidden_tokens_with_a_bias_of_minus_infinity(backend):
    hidden, weight, bias, labels = inputs(10, masked=0.0)
    bias[50:] = -torch.inf
    labels = labels % 50
    expected_leaf, got_leaf = leaf(hidden), leaf(hidden, torch.float32)
    expected = token_logps(expected_leaf, weight, labels, bias)
    expected.sum().backward()
    got = alignloss.linear_logprob(
        got_leaf, weight.float(), labels, bias.float(), backend=backend, workspace_bytes=8_000
    )
    got.sum().backward()
    assert error(got.detach(), expected.detach()) <= 2e-5
    assert error(got_leaf.grad, expected_leaf.grad) <= 2e-5


def test_fp16_with_a_scaled_loss_keeps_small_gradients():
    # gradients of 1e-4 x (1 - p) would vanish in fp16 logit gradients without the row factor
    hidden, weight, _, labels = inputs(64, hidden_size=32, vocabulary=200, masked=0.0, peak=8.0)
    upstream = torch.full((64,), 1e-4 * 65536)
    exact_h, exact_w = (leaf(t.half()) for t in (hidden, weight))
    token_logps(exact_h, exact_w, labels).backward(upstream.double())
    h, w = leaf(hidden, torch.float16), leaf(weight, torch.float16)
    alignloss.linear_logprob(h, w, labels).backward(upstream)
    assert error(h.grad, exact_h.grad) <= 1e-3
    assert error(w.grad, exact_w.grad) <= 1e-3


@pytest.mark.parametrize("margin", [-1e4, -50.0, 50.0, 1e4])
def test_losses_are_finite_at_extreme_margins(margin):
    chosen = leaf(torch.tensor([margin]))
    zero = torch.zeros(1, dtype=torch.float64)
    desirable = torch.tensor([True])
    for values in (
        losses.dpo_loss(chosen, zero, zero, zero, beta=1.0, label_smoothing=0.1)[0],
        losses.cpo_loss(chosen, zero, beta=1.0)[0],
        losses.ipo_loss(chosen, zero, zero, zero, zero + 1, zero + 1, beta=0.1)[0],
        losses.kto_loss(chosen, zero, desirable, zero, beta=1.0)[0],
    ):
        (slope,) = torch.autograd.grad(values.sum(), chosen)
        assert bool(values.isfinite().all())
        assert bool(slope.isfinite().all())


def test_saturated_kto_keeps_relative_precision():
    # w sigmoid(-x) at x = 40 is e^-40 = 4.2e-18, far below 1 - sigmoid(40) = 0 in fp32
    hidden, weight, _, labels = inputs(4, 6, masked=0.0, dtype=torch.float32)
    logps = alignloss.sequence_logprob(hidden, weight, labels).logps
    h = leaf(hidden, torch.float32)
    out = alignloss.KTOLoss(beta=1.0)(
        h, weight, labels, ref_logps=logps - 40, desirable=torch.ones(4, dtype=torch.bool), kl=0.0
    )
    out.loss.backward()
    sums = token_logps(exact := leaf(hidden), weight.double(), labels).sum(1)
    expected = torch.sigmoid(-(sums - (logps.double() - 40))).mean()
    expected.backward()
    assert error(out.loss.detach(), expected.detach()) <= 2e-5
    assert error(h.grad, exact.grad) <= 2e-5


GAPS = [-1e4, -300.0, -100.0, -30.0, 0.5, 30.0, 60.0, 84.0, 89.0, 95.0, 100.0, 300.0, 600.0]
# hidden states alone; the head too: one pass, recomputed
REGIMES = {"frozen": (False, None), "one pass": (True, None), "recomputed": (True, 16)}


def of_gaps(gaps, dtype, trained):
    """Sequences of one token whose logit is `gap` above that of the only other token."""
    hidden = leaf(gaps[:, None, None], dtype)
    weight = leaf(torch.tensor([[1.0], [0.0]]), dtype, trained)
    return hidden, weight, torch.zeros(len(gaps), 1, dtype=torch.int64)


@pytest.mark.parametrize("scale", [1.0, 65_536.0])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("name", "backend"), [*((n, "torch") for n in sorted(losses.LOSSES)), ("orpo", "triton")])
def test_the_gradient_of_a_module_is_exact_at_every_gap(name, backend, regime, scale):
    """Against float64, where log p = log sigmoid(gap): as p -> 1 the slope of a loss in log p leaves float32."""
    trained, workspace = REGIMES[regime]
    gaps = torch.tensor(GAPS if backend == "torch" else GAPS[2::3])
    gaps = torch.cartesian_prod(gaps, gaps).T.reshape(-1)
    module = module_of(name, backend)
    module.head_options["workspace_bytes"] = workspace
    if workspace is not None:
        module.couples_batch = True  # the whole batch is recomputed
    data = data_of(module, len(gaps))
    hidden, weight, labels = of_gaps(gaps, torch.float32, trained)
    out = module(hidden, weight, labels, **data, num_sequences=1)
    (scale * out.loss).backward()
    assert bool(hidden.grad.isfinite().all())
    assert weight.grad is None or bool(weight.grad.isfinite().all())

    exact = leaf(gaps)
    logps = torch.nn.functional.logsigmoid(exact)
    count = len(gaps) // 2 if module.paired else len(gaps)
    columns = {"logps": logps, "ref_logps": data.get("ref_logps"), "lengths": torch.ones(len(gaps)).double()}
    arguments = []
    for parameter in module.function.names:
        if parameter in module.function.filled:
            column, half = module.function.filled[parameter]
            value = columns[column].double()
            arguments.append(value if half is None else value[:count] if half == 0 else value[count:])
        else:
            arguments.append(data[parameter].double() if parameter != "desirable" else data[parameter])
    values = module.function.fn(*arguments, **module.function.options)[0]
    (scale * values.sum()).backward()
    got, expected = hidden.grad.flatten().double(), exact.grad
    # relative, down to where float32 ends; logits of 1e4 round to 1e-3, of which exponentials make 1e-3
    tiny = 1e-30 * scale
    assert bool(((got - expected).abs() <= 1e-4 * expected.abs() + tiny).all())


@pytest.mark.parametrize("name", FUSED)
def test_the_gradient_of_a_fused_loss_is_finite_at_every_gap(name):
    gaps = torch.tensor(GAPS).repeat(2)
    module = module_of(name, "triton")
    hidden, weight, labels = of_gaps(gaps, torch.float32, True)
    (65_536 * module(hidden, weight, labels, **data_of(module, len(gaps))).loss).backward()
    assert bool(hidden.grad.isfinite().all()) and bool(weight.grad.isfinite().all())
