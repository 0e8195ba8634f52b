"""The ops under torch.compile and torch.library's own checks."""

from contextlib import nullcontext
from typing import ClassVar

import mpmath
import pytest
import torch
from reference import inputs, leaf
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import alignloss
from alignloss.losses.common import log_odds
from alignloss.ops import kl, logprob, preference, sequence

REF = torch.linspace(-9, -3, 4)


def compare(function, *tensors, **compile_options):
    """Outputs and gradients of a compiled function equal the eager ones."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, **compile_options)):
        leaves = [leaf(t, torch.float32) for t in tensors]
        out = run(*leaves)
        out.sum().backward()
        results.append((out.detach(), *(t.grad for t in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_log_probabilities_with_a_mask(backend):
    hidden, weight, _, labels = inputs(4, 7)
    compare(lambda h, w: alignloss.linear_logprob(h * 2, w, labels, softcap=3.0), hidden, weight, backend=backend)


def test_log_probabilities_with_a_token_index():
    hidden, weight, _, labels = inputs(4, 7)
    index = torch.nonzero(labels.view(-1) != -100).squeeze(1)
    compare(
        lambda h: alignloss.linear_logprob(h, weight.float(), labels, token_index=index), hidden, backend="aot_eager"
    )


def test_dpo_with_a_mask():
    hidden, weight, _, labels = inputs(4, 7)
    loss = alignloss.DPOLoss(beta=0.3)
    compare(lambda h, w: loss(h, w, labels, ref_logps=REF).loss, hidden, weight, backend="aot_eager")


def test_a_whole_result_and_its_metrics():
    hidden, weight, _, labels = inputs(4, 7, dtype=torch.float32)
    loss = alignloss.DPOLoss(beta=0.3)

    def run(h):
        out = loss(h, weight, labels, ref_logps=REF, stats=("entropy",))
        return out, out.metrics()

    (out, inside), (expected, metrics) = (
        f(hidden) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(inside, metrics)
    torch.testing.assert_close(out.metrics(), metrics)


def test_log_odds_as_a_probability_goes_to_1():
    logps = -torch.logspace(-37, 1, 200, dtype=torch.float64)
    exact = [float(mpmath.log(mpmath.exp(x) / -mpmath.expm1(x))) for x in logps.tolist()]
    for run in (log_odds, torch.compile(log_odds)):
        torch.testing.assert_close(run(logps), torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_shapes_and_numbers_that_vary():
    hidden, weight, _, labels = inputs(4, 7, dtype=torch.float32)
    loss = alignloss.DPOLoss(beta=0.3)
    run = lambda h, y, count: loss(h, weight, y, ref_logps=REF, num_sequences=count).loss
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length, count in ((7, 3.0), (6, 4.0), (5, 5.5)):
        h, y = hidden[:, :length].contiguous(), labels[:, :length].contiguous()
        torch.testing.assert_close(compiled(h, y, count), run(h, y, count))


def test_nothing_to_differentiate():
    hidden, weight, _, labels = inputs(4, 7, dtype=torch.float32)
    compiled = torch.compile(
        lambda h: alignloss.sequence_logprob(h, weight, labels).logps, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(hidden), alignloss.sequence_logprob(hidden, weight, labels).logps)


class Seen(TorchDispatchMode):
    """Names of our operators that a dispatch mode is given."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "alignloss":
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_plain_tensors_skip_the_dispatcher_and_whatever_watches_meets_operators():
    hidden, weight, bias, labels = inputs(4, 7, dtype=torch.float32)
    loss = alignloss.DPOLoss(beta=0.3)

    def run():
        leaves = [leaf(t, torch.float32) for t in (hidden, weight, bias)]
        out = alignloss.sequence_logprob(*leaves[:2], labels, leaves[2]).logps
        out = out.sum() + loss(leaves[0], weight, labels, bias, ref_logps=REF).loss
        out += alignloss.linear_kl(*leaves[:2], hidden, weight, labels, leaves[2], bias).sum()
        out.backward()
        return out.detach(), *(t.grad for t in leaves)

    def dispatched():
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        return {event.key for event in recorded.key_averages() if event.key.startswith("alignloss::")}

    plain = run()
    assert not dispatched()
    with torch.device("cpu"):  # a function mode
        assert {"alignloss::linear_logprob_fwd", "alignloss::sequence_sum"} <= dispatched()
        torch.testing.assert_close(run(), plain, rtol=0, atol=0)
    with Seen() as seen:
        watched = run()
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    ops = {"linear_logprob_fwd", "linear_kl_fwd", "linear_logprob_bwd", "linear_kl_bwd"}
    assert ops | {"sequence_sum", "sequence_scatter"} <= {*seen.names}


def test_an_operator_of_a_subclass_or_without_values_is_dispatched():
    class Mine(torch.Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    values = torch.arange(6.0)
    assert sequence.sequence_sum(values.as_subclass(Mine), None, 2, None, "torch").tolist() == [3.0, 12.0]
    assert any("alignloss.sequence_sum" in name for name in Mine.seen)
    assert sequence.sequence_sum(values.to("meta"), None, 2, None, "torch").is_meta
    traced = make_fx(lambda v: sequence.sequence_sum(v, None, 2, None, "torch"))(values)
    assert "alignloss.sequence_sum" in traced.code


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_batched_gradients_are_those_of_one_after_the_other(trained):
    hidden, weight, _, labels = inputs(2, 5, dtype=torch.float64)
    leaves = [leaf(t, torch.float64, name in trained) for t, name in ((hidden, "hidden"), (weight, "weight"))]
    logps = alignloss.linear_logprob(*leaves, labels)
    wanted = [tensor for tensor in leaves if tensor.requires_grad]
    upstream = torch.randn(3, *logps.shape, dtype=logps.dtype)
    batched = torch.autograd.grad(logps, wanted, upstream, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(logps, wanted, one, retain_graph=True) for one in upstream]
    for got, *expected in zip(batched, *single, strict=True):
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("watched", [False, True])
def test_no_second_derivative_of_an_op(watched):
    hidden, weight, _, labels = inputs(4, 7, dtype=torch.float32)
    hidden.requires_grad_()
    with Seen() if watched else nullcontext():
        logps = alignloss.sequence_logprob(hidden, weight, labels).logps
        (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="does not support double backward"):
            gradient.sum().backward()


@pytest.mark.parametrize("stats", [0, 31])
@pytest.mark.parametrize("with_index", [False, True])
def test_opcheck_of_the_log_probability(stats, with_index):
    hidden, weight, bias, labels = inputs(9, hidden_size=5, vocabulary=13, dtype=torch.float32)
    index = torch.nonzero(labels != -100).squeeze(1) if with_index else None
    arguments = (
        *(leaf(t, torch.float32) for t in (hidden, weight, bias)), labels, index, None, stats,
        2 if stats else 1, True, not with_index, torch.float32, -100, 1.2, 2.0, 0.9, "torch", 4_000, True,
    )  # fmt: skip
    torch.library.opcheck(logprob.linear_logprob_fwd.operator, arguments)


@pytest.mark.parametrize("with_index", [False, True])
def test_opcheck_of_the_kl(with_index):
    hidden, weight, bias, labels = inputs(9, hidden_size=5, vocabulary=13, dtype=torch.float32)
    index = torch.nonzero(labels != -100).squeeze(1) if with_index else None
    heads = *(leaf(t, torch.float32) for t in (hidden, weight, bias)), hidden.flip(0), weight.flip(0), None
    options = not with_index, torch.float32, -100, 1.2, 2.0, 0.9, "torch", 4_000, True
    torch.library.opcheck(kl.linear_kl_fwd.operator, (*heads, labels, index, torch.float32, *options))


@pytest.mark.parametrize("offsets", [torch.tensor([0, 4, 4, 9]), None])
def test_opcheck_of_the_sequence_ops(offsets):
    values, weights, dsums = torch.randn(9, requires_grad=True), torch.rand(9).double(), torch.randn(3).double()
    torch.library.opcheck(sequence.sequence_sum.operator, (values, offsets, 3, None, "torch"))
    torch.library.opcheck(sequence.sequence_sum.operator, (values, offsets, 3, weights, "torch"))
    torch.library.opcheck(sequence.sequence_scatter.operator, (dsums, offsets, None, 9, "torch"))


@pytest.mark.parametrize("offsets", [torch.tensor([0, 2, 4, 4, 8]), None])
def test_opcheck_of_the_fused_losses(offsets):
    pytest.importorskip("triton")
    values, ref, labels = torch.randn(8, requires_grad=True), torch.randn(4).double(), torch.arange(8)
    options = (-100, 0.5, 0.1, 0.0, 1.0, 1.0)
    data = (None, None, torch.ones(2), None, None)
    torch.library.opcheck(
        preference.preference.operator, (values, None, labels, None, offsets, 4, ref, *data, "dpo", *options)
    )
    slopes, scales = torch.randn(4).double(), torch.rand(2).double()
    backward = (torch.tensor(2.0), slopes, scales, None, labels, None, offsets, True, -100)
    torch.library.opcheck(preference.preference_backward.operator, backward)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_no_cuda_graph_is_made_of_an_op_that_looks_for_its_rows():
    names = [name for name in dir(torch.ops.alignloss) if hasattr(getattr(torch.ops.alignloss, name), "default")]
    assert {"linear_logprob_fwd", "linear_logprob_bwd", "linear_kl_fwd", "linear_kl_bwd", "preference"} <= set(names)
    for name in names:
        op = getattr(torch.ops.alignloss, name).default
        selects = any(argument.name == "select" for argument in op._schema.arguments)
        assert (torch.Tag.cudagraph_unsafe in op.tags) == selects, name
