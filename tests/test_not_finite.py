"""What is not finite stays where it is: no trace of what was dropped, and no number where there is none."""

import inspect

import pytest
import torch
from reference import error, inputs, leaf
from test_packing import data_of, module_of

import alignloss
from alignloss import losses

BACKENDS = ["torch", "triton"]
# what trains, and a workspace for 4 x 5 tokens at V = 101: one group, groups, recomputed
REGIMES = [
    ("hidden", None),
    ("weight bias", None),
    ("hidden weight bias", None),
    ("hidden weight bias", 9_000),
    ("hidden weight bias", 2_000),
]


def small(**options):
    hidden, weight, bias, labels = inputs(4, 5, masked=0.0, dtype=torch.float32, **options)
    return hidden, weight, bias, labels


def gradients(module, hidden, weight, bias, labels, trained=("hidden", "weight", "bias"), **call):
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: leaf(value, torch.float32, name in trained) for name, value in named.items()}
    out = module(leaves["hidden"], leaves["weight"], labels, leaves["bias"], **call)
    out.loss.backward()
    return out, {name: value.grad for name, value in leaves.items() if name in trained}


@pytest.mark.nightly_where(
    lambda backend, dropped, workspace, **_: backend == "triton" and dropped != "pair" and workspace != 2_000
)
@pytest.mark.parametrize(("backend", "bad"), [("torch", torch.nan), ("torch", torch.inf), ("triton", torch.nan)])
@pytest.mark.parametrize(("trained", "workspace"), REGIMES)
@pytest.mark.parametrize("dropped", ["pair", "token", "sequence"])
def test_what_is_dropped_leaves_no_trace(dropped, trained, workspace, bad, backend):
    hidden, weight, bias, labels = small()
    trained = trained.split()
    if dropped == "sequence":
        module = alignloss.PreferenceLoss("npo", beta=0.1, backend=backend, workspace_bytes=workspace)
        call = {"ref_logps": torch.zeros(4), "pair_weights": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    else:
        module = alignloss.DPOLoss(backend=backend, workspace_bytes=workspace)
        call = {"ref_logps": torch.zeros(4)}
        if dropped == "pair":
            call["pair_weights"] = torch.tensor([1.0, 0.0])
        else:
            call["token_weights"] = torch.ones(4, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.0))
    expected, clean = gradients(module, hidden, weight, bias, labels, trained, **call)
    hidden[1, 2] = bad
    out, got = gradients(module, hidden, weight, bias, labels, trained, **call)
    assert torch.equal(out.loss, expected.loss)
    for name in trained:
        assert error(got[name], clean[name]) <= 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_upstream_gradient_leaves_no_trace(backend):
    hidden, weight, bias, labels = small()
    hidden[1, 2] = torch.nan
    upstream = torch.ones(4, 5)
    upstream[1, 2] = 0
    for stats in ((), ("entropy",)):
        leaves = [leaf(t, torch.float32) for t in (hidden, weight, bias)]
        result = alignloss.linear_logprob_stats(
            leaves[0], leaves[1], labels, leaves[2], stats=stats, backend=backend, workspace_bytes=9_000
        )
        values = [result.logps, *([result.entropy] if stats else [])]
        torch.autograd.backward(values, [upstream] * len(values))
        assert all(bool(t.grad.isfinite().all()) for t in leaves)
    leaves = [leaf(t, torch.float32) for t in (hidden, weight)]
    reference = torch.randn(4, 5, 37), torch.randn(101, 37)
    kl = alignloss.linear_kl(*leaves, *reference, labels, backend=backend, workspace_bytes=30_000)
    kl.backward(upstream)
    assert all(bool(t.grad.isfinite().all()) for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_of_a_dropped_pair_leave_no_trace(backend):
    hidden, weight, bias, labels = small()
    tdpo = alignloss.PreferenceLoss("tdpo1", beta=0.1, backend=backend)
    data = {"chosen_seq_kl": torch.tensor([torch.nan, 0.1]), "rejected_seq_kl": torch.tensor([torch.inf, 0.2])}
    data = {name: value.requires_grad_() for name, value in data.items()}
    out, got = gradients(
        tdpo, hidden, weight, bias, labels, ref_logps=torch.zeros(4), pair_weights=torch.tensor([0.0, 1.0]), **data
    )
    assert bool(out.loss.isfinite()) and all(bool(g.isfinite().all()) for g in got.values())
    for value in data.values():
        assert bool(value.grad.isfinite().all()) and float(value.grad[0]) == 0 and float(value.grad[1]) != 0


DISABLED = {
    "robust_dpo": {"label_smoothing": 0.0},
    "dpo": {"label_smoothing": 0.0},
    "dpop": {"penalty_weight": 0.0},
    "irpo": {"nll_weight": 0.0},
    "simpo": {"label_smoothing": 0.0, "gamma": 1.0},
    "cpo": {"label_smoothing": 0.0},
    "aot": {"label_smoothing": 0.0},
    "aot_unpaired": {"label_smoothing": 0.0},
    "tdpo2": {"kl_weight": 0.0},
    "r_dpo": {"length_weight": 0.0},
}


@pytest.mark.parametrize("name", DISABLED)
def test_a_term_of_weight_0_is_left_out(name):
    """Beside an impossible rejected sequence, whose margin is infinite: the loss is 0 there, and so is its slope."""
    function = losses.LOSSES[name]
    chosen, rejected = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([-5.0], [-torch.inf]))
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    data = {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_lengths": one, "rejected_lengths": one}
    data |= {"chosen_seq_kl": zero, "rejected_seq_kl": zero + torch.inf}
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    values, *_ = function(*(data.get(n, zero) for n in names), beta=0.1, **DISABLED[name])
    assert float(values.detach()) == 0
    for slope in torch.autograd.grad(values.sum(), (chosen, rejected)):
        assert float(slope) == 0


def test_an_impossible_chosen_sequence_and_disabled_penalties():
    chosen = torch.tensor([-torch.inf], dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert float(losses.dpop_loss(chosen, zero, zero, zero, beta=0.1, penalty_weight=0.0)[0]) == torch.inf
    assert float(losses.irpo_loss(chosen, zero, zero, zero, one, beta=0.1, nll_weight=0.0)[0]) == torch.inf
    kto = losses.kto_loss(-chosen, zero, torch.tensor([False]), zero, beta=0.1, undesirable_weight=0.0)[0]
    assert float(kto) == 0


@pytest.mark.parametrize("impossible", ["chosen", "rejected"])
@pytest.mark.parametrize(("name", "backend"), [*((n, "torch") for n in sorted(losses.LOSSES)), ("orpo", "triton")])
def test_an_impossible_sequence_has_no_gradient_that_is_no_number_where_the_loss_is_finite(name, backend, impossible):
    module = module_of(name, backend)
    hidden, weight, bias, labels = small()
    labels[labels == 7] = 8
    labels[2 if impossible == "rejected" else 0, 0], bias[7] = 7, -torch.inf
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    out = module(h, w, labels, bias, **data_of(module, 4))
    out.loss.backward()
    if bool(out.loss.detach().isfinite()):
        assert bool(h.grad.isfinite().all()) and bool(w.grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixture_leaves_out_what_weighs_0(backend):
    hidden, weight, bias, labels = small()
    labels[labels == 7] = 8
    labels[2, 0], bias[7] = 7, -torch.inf  # the first pair's rejected sequence is impossible
    dpo, ipo = alignloss.DPOLoss(beta=0.1), alignloss.IPOLoss(beta=0.1)
    mixture = alignloss.MixtureLoss([dpo, ipo], [1.0, 0.0], backend=backend)
    out, got = gradients(mixture, hidden, weight, bias, labels, ("hidden", "weight"), ref_logps=torch.zeros(4))
    alone = alignloss.DPOLoss(beta=0.1, backend="torch")
    expected, exact = gradients(alone, hidden, weight, bias, labels, ("hidden", "weight"), ref_logps=torch.zeros(4))
    assert float(out.losses[0]) == 0
    assert error(out.loss.detach(), expected.loss.detach()) <= 1e-6
    assert max(error(got[name], exact[name]) for name in got) <= 1e-6
    with pytest.raises(ValueError, match="nothing is left to train"):
        alignloss.MixtureLoss([dpo, ipo], [0.0, 0.0])


def test_a_metric_of_one_group_is_not_spoilt_by_the_other():
    hidden, weight, bias, labels = small()
    hidden[2, 1] = torch.nan  # a rejected sequence
    out = alignloss.CPOLoss()(hidden, weight, labels, bias, stats=("mean_logits", "entropy"))
    metrics = out.metrics()
    assert bool(metrics["logits/chosen"].isfinite()) and bool(metrics["logits/rejected"].isnan())
    assert bool(metrics["rewards/accuracies"].isnan()) and bool(metrics["entropy"].isnan())


STATS = ("lse", "entropy", "mean_logits", "log_sum_sq_probs")


@pytest.mark.nightly_where(lambda backend, where, trained, **_: backend == "triton" and (where == "first") == trained)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["first", "last", "target"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("trained", "workspace"), [(False, None), (True, 4_000)])
def test_a_logit_that_is_no_number_gives_none(trained, bad, where, workspace, backend):
    hidden, weight, bias, labels = small(vocabulary=101)
    labels[:] = 50
    bias[{"first": 0, "last": 100, "target": 50}[where]] = bad
    h = leaf(hidden, torch.float32, trained)
    options = {"backend": backend, "workspace_bytes": workspace}
    stats = alignloss.linear_logprob_stats(h, weight, labels, bias, stats=(*STATS, "is_top1"), **options)
    assert bool(stats.logps.isnan().all())
    for name in ("entropy", "log_sum_sq_probs"):
        assert bool(getattr(stats, name).isnan().all()), name
    assert not bool(stats.lse.isfinite().any()) and not bool(stats.mean_logits.isfinite().any())
    assert not bool(stats.is_top1.any())
    if trained:
        gradient = [torch.autograd.grad(v.sum(), h, retain_graph=True)[0] for v in (stats.logps, stats.entropy)]
        assert all(bool(g.isnan().all()) for g in gradient)
    kl = alignloss.linear_kl(hidden, weight, hidden, weight, labels, bias, backend=backend)
    assert bool(kl.isnan().all())
    out = alignloss.CPOLoss(**options)(hidden, weight, labels, bias, stats=("entropy", "mean_logits"))
    metrics = out.metrics()
    for name in ("entropy", "logps/chosen", "rewards/margins", "rewards/accuracies", "log_odds_ratio", "nll_loss"):
        assert bool(metrics[name].isnan()), name


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_loss_of_no_number_is_none(name):
    module = module_of(name, "torch")
    hidden, weight, bias, labels = small()
    hidden[:] = torch.nan
    out = module(hidden, weight, labels, bias, **data_of(module, 4))
    assert bool(out.losses.isnan().all()) and bool(out.loss.isnan())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("option", "row"), [("desirable_weight", 1), ("undesirable_weight", 2)])
def test_sequences_whose_weight_is_0_leave_no_trace(option, row, bad, backend):
    hidden, weight, bias, labels = small()
    desirable = torch.tensor([True, True, False, False])
    call = {"desirable": desirable, "kl": 0.0, "num_sequences": 4}
    module = alignloss.KTOLoss(backend=backend, **{option: 0.0})
    ref_logps = torch.linspace(-20, -18, 4)
    out, got = gradients(
        module, hidden, weight, bias, labels, ref_logps=ref_logps.index_fill(0, torch.tensor(row), bad), **call
    )
    clean, expected = gradients(module, hidden, weight, bias, labels, ref_logps=ref_logps, **call)
    assert torch.equal(out.loss, clean.loss) and torch.equal(out.losses, clean.losses)
    assert float(out.losses[row]) == 0
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
