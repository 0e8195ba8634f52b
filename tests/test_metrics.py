"""`metrics()` of the results: the same in every regime, and only what was asked for."""

import copy
import pickle

import accelerate
import pytest
import torch
from reference import inputs, leaf, statistics, token_logps
from torch.utils._python_dispatch import TorchDispatchMode

import alignloss

B, T = 3, 9
STATS = ("entropy", "mean_logits", "is_top1")
BACKENDS = ["torch", "triton"]


def close(got, expected):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["", "hidden", "hidden weight"], ids=lambda t: t or "nothing")
@pytest.mark.parametrize("workspace", [None, 9_000, 2_000], ids=["one group", "groups", "recomputed"])
def test_paired(backend, trained, workspace):
    hidden, weight, _, labels = inputs(2 * B, T)
    ref = torch.full((2 * B,), -20.0, dtype=torch.float64)
    h, w = (leaf(t, torch.float32, n in trained) for t, n in ((hidden, "hidden"), (weight, "weight")))
    module = alignloss.DPOLoss(beta=0.3, backend=backend, workspace_bytes=workspace)
    out = module(h, w, labels, ref_logps=ref, stats=STATS)
    metrics = out.metrics()
    assert not any(value.requires_grad or value.dim() for value in metrics.values())
    labelled, exact = labels != -100, statistics(hidden, weight, labels)
    sums, lengths = token_logps(hidden, weight, labels).sum(1), labelled.sum(1).double()
    rewards = 0.3 * (sums - ref)
    means = sums / lengths
    odds = means - torch.log1p(-means.exp())
    odds = odds[:B] - odds[B:]
    expected = {
        "rewards/chosen": rewards[:B].mean(),
        "rewards/rejected": rewards[B:].mean(),
        "rewards/margins": (rewards[:B] - rewards[B:]).mean(),
        "rewards/accuracies": (rewards[:B] > rewards[B:]).double().mean(),
        "logps/chosen": sums[:B].mean(),
        "logps/rejected": sums[B:].mean(),
        "lengths/chosen": lengths[:B].mean(),
        "lengths/rejected": lengths[B:].mean(),
        "nll_loss": -sums[:B].sum() / lengths[:B].sum(),
        "not_finite": 0.0,
        "log_odds_chosen": odds.mean(),
        "log_odds_ratio": torch.nn.functional.logsigmoid(odds).mean(),
        "entropy": exact["entropy"][labelled].mean(),
        "logits/chosen": exact["mean_logits"][:B][labelled[:B]].mean(),
        "logits/rejected": exact["mean_logits"][B:][labelled[B:]].mean(),
        "mean_token_accuracy": exact["is_top1"][:B][labelled[:B]].double().mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        close(metrics[name], value)


def test_nothing_extra_is_computed_unless_asked_for():
    hidden, weight, _, labels = inputs(2 * B, T)
    extra = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    assert not extra & set(alignloss.CPOLoss()(hidden, weight, labels).metrics())
    out = alignloss.CPOLoss()(hidden, weight, labels, stats=("entropy",))
    assert extra & set(out.metrics()) == {"entropy"}
    with pytest.raises(ValueError, match="stats takes a sequence of names out of"):
        alignloss.CPOLoss()(hidden, weight, labels, stats=("lse",))


@pytest.mark.parametrize("stats", [None, 3, "entropy", ("entropy", 3), ("entropy", None), {"entropy"}, ("lse",)])
@pytest.mark.parametrize("loss_fn", [alignloss.CPOLoss(), alignloss.SFTLoss()])
def test_other_statistics_are_refused(loss_fn, stats):
    with pytest.raises(ValueError, match="stats takes a sequence of names out of"):
        loss_fn(torch.randn(2, 3, 4), torch.randn(8, 4), torch.zeros(2, 3).long(), stats=stats)


@pytest.mark.parametrize("trained", [False, True])
def test_asking_changes_no_gradient(trained):
    hidden, weight, _, labels = inputs(2 * B, T)
    results = []
    for stats in ((), STATS):
        h, w = leaf(hidden), leaf(weight, requires_grad=trained)
        alignloss.CPOLoss()(h, w, labels, stats=stats).loss.backward()
        results.append((h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None)


def test_unpaired_and_kto():
    hidden, weight, _, labels = inputs(2 * B, T)
    ref = torch.full((2 * B,), -20.0, dtype=torch.float64)
    desirable = torch.tensor([True, False, True, True, False, True])
    out = alignloss.KTOLoss(beta=0.3)(
        hidden, weight, labels, ref_logps=ref, desirable=desirable, kl=torch.tensor(0.4), stats=STATS
    )
    metrics, exact, labelled = out.metrics(), statistics(hidden, weight, labels), labels != -100
    sums = token_logps(hidden, weight, labels).sum(1)
    for group, rows in (("chosen", desirable), ("rejected", ~desirable)):
        close(metrics[f"rewards/{group}"], 0.3 * (sums - ref)[rows].mean())
        close(metrics[f"logps/{group}"], sums[rows].mean())
        close(metrics[f"logits/{group}"], exact["mean_logits"][rows][labelled[rows]].mean())
    close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    close(metrics["entropy"], exact["entropy"][labelled].mean())
    close(metrics["mean_token_accuracy"], exact["is_top1"][labelled].double().mean())
    close(metrics["kl"], 0.4)
    close(metrics["lengths"], labelled.sum(1).double().mean())

    only = alignloss.KTOLoss()(hidden, weight, labels, ref_logps=ref, desirable=torch.tensor(True), kl=0.0).metrics()
    assert only["rewards/rejected"].isnan()
    sft = alignloss.SFTLoss()(hidden, weight, labels).metrics()
    close(sft["logps"], sums.mean())
    assert set(sft) == {"lengths", "logps", "not_finite", "rewards"}


def test_prompts_that_the_nll_runs_over_are_not_counted():
    hidden, weight, _, full_labels = inputs(2 * B, T, masked=0.0)
    labels = full_labels.clone()
    labels[:, :4] = -100
    h, w = leaf(hidden), leaf(weight)
    got = alignloss.ORPOLoss()(h, w, labels, nll_labels=full_labels, stats=STATS).metrics()
    expected = alignloss.ORPOLoss()(h, w, labels, stats=STATS).metrics()
    assert got.pop("nll_loss") != expected.pop("nll_loss")
    torch.testing.assert_close(got, expected)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host():
    hidden, weight, _, labels = inputs(2 * B, T)
    paired = alignloss.CPOLoss()(hidden, weight, labels, stats=STATS)
    kto = alignloss.KTOLoss()(
        hidden, weight, labels, ref_logps=torch.zeros(2 * B), desirable=torch.tensor(True), kl=0.0, stats=STATS
    )
    with Operators() as seen:
        paired.metrics()
        kto.metrics()
    assert seen.names
    assert not seen.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}


def test_packed_equals_padded():
    hidden, weight, _, labels = inputs(2 * B, T)
    offsets = torch.arange(2 * B + 1) * T
    padded = alignloss.CPOLoss()(hidden, weight, labels, stats=STATS).metrics()
    packed = alignloss.CPOLoss()(
        hidden.view(2 * B * T, -1), weight, labels.view(-1), cu_seqlens=offsets, stats=STATS
    ).metrics()
    torch.testing.assert_close(packed, padded)


REBUILDS = {
    "from its fields": lambda out: type(out)(*out),
    "by a tree map": lambda out: torch.utils._pytree.tree_map(lambda t: t.float(), out),
    "by accelerate": lambda out: accelerate.utils.convert_outputs_to_fp32(lambda: out)(),
    "with another loss": lambda out: out._replace(loss=2 * out.loss),
    "by copy": copy.copy,
    "by pickle": lambda out: pickle.loads(pickle.dumps(out._replace(loss=out.loss.detach()))),
}


@pytest.mark.parametrize("rebuild", REBUILDS.values(), ids=REBUILDS)
@pytest.mark.parametrize("loss", ["cpo", "kto"])
def test_a_result_that_is_rebuilt_keeps_its_metrics(loss, rebuild):
    hidden, weight, _, labels = inputs(2 * B, T, dtype=torch.float32)
    if loss == "cpo":
        out = alignloss.CPOLoss()(leaf(hidden, torch.float32), weight, labels, stats=STATS)
        assert len(out) == 7
    else:
        data = {"ref_logps": torch.zeros(2 * B), "desirable": torch.arange(2 * B) % 2 == 0, "kl": 0.5}
        out = alignloss.KTOLoss()(leaf(hidden, torch.float32), weight, labels, stats=STATS, **data)
        assert len(out) == 4
    rebuilt = rebuild(out)
    assert rebuilt is not out
    assert rebuilt.metrics() == out.metrics()


@pytest.mark.parametrize("changed", [torch.clone, torch.Tensor.double, lambda t: t * 1])
def test_a_result_around_other_tensors_says_what_it_lost(changed):
    hidden, weight, _, labels = inputs(2 * B, T, dtype=torch.float32)
    out = torch.utils._pytree.tree_map(changed, alignloss.CPOLoss()(hidden, weight, labels))
    with pytest.raises(RuntimeError, match="call metrics\\(\\) on the module's own result"):
        out.metrics()


@pytest.mark.parametrize("buffer", ["labels", "desirable", "kl"])
def test_metrics_of_buffers_that_were_used_again_are_refused(buffer):
    hidden, weight, _, labels = inputs(4, 5, dtype=torch.float32)
    call = {"desirable": torch.tensor([True, True, False, False]), "kl": torch.tensor(0.5)}
    out = alignloss.KTOLoss()(hidden, weight, labels, ref_logps=torch.full((4,), -20.0), **call)
    kept = copy.deepcopy(out)
    expected = out.metrics()
    value = {"labels": labels, **call}[buffer]
    value.copy_(value)
    with pytest.raises(RuntimeError, match=f"{buffer} were written to since this loss was computed"):
        out.metrics()
    assert {name: v.item() for name, v in kept.metrics().items()} == {name: v.item() for name, v in expected.items()}


@pytest.mark.parametrize("module", [alignloss.SFTLoss(), alignloss.CPOLoss()])
def test_the_share_of_hits_is_no_number_beside_a_token_that_is_none(module):
    hidden, weight, _, labels = inputs(4, 5, masked=0.0, dtype=torch.float32)
    hidden[1, 2] = torch.nan
    metrics = module(hidden, weight, labels, stats=("is_top1", "entropy")).metrics()
    assert metrics["mean_token_accuracy"].isnan() and metrics["entropy"].isnan()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("module", [alignloss.SFTLoss, alignloss.CPOLoss])
def test_a_token_of_weight_0_that_is_no_number_leaves_no_share_of_hits(module, backend):
    hidden, weight, _, labels = inputs(4, 5, masked=0.0, dtype=torch.float32)
    hidden[1, 2] = torch.nan
    weights = torch.ones(4, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.0))
    out = module(backend=backend)(hidden, weight, labels, token_weights=weights, stats=("is_top1",))
    assert out.metrics()["mean_token_accuracy"].isnan()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("module", [alignloss.SFTLoss, alignloss.CPOLoss])
def test_sequences_that_are_no_number_are_counted(module, backend):
    """And leave no trace in the others: their log-probabilities, and the gradients of their hidden states."""
    hidden, weight, _, labels = inputs(4, 5, masked=0.0, dtype=torch.float32)
    broken = hidden.clone()
    broken[0, 2], broken[3, 1] = torch.nan, torch.inf
    found = []
    for states in (hidden, broken):
        states.requires_grad_()
        out = module(backend=backend)(states, weight, labels)
        logps = out.logps if hasattr(out, "logps") else torch.cat([out.chosen_logps, out.rejected_logps])
        found.append((out.metrics()["not_finite"], logps, alignloss.linear_logprob(states, weight, labels)))
    assert [float(count) for count, *_ in found] == [0, 2]
    (_, whole, tokens), (_, logps, broken_tokens) = found
    assert not logps[[0, 3]].isfinite().any() and torch.equal(logps[1:3], whole[1:3])
    fine = torch.ones(4, 5, dtype=torch.bool)
    fine[0, 2] = fine[3, 1] = False
    assert torch.equal(broken_tokens[fine], tokens[fine]) and not broken_tokens[~fine].isfinite().any()
    (clean,), (of_others,) = (
        torch.autograd.grad(t[fine].sum(), h) for t, h in ((tokens, hidden), (broken_tokens, broken))
    )
    assert torch.equal(of_others[fine], clean[fine]) and not of_others[~fine].any()
