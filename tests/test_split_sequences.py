"""Sequences of which every process of a group holds a part: losses and gradients are those of one process."""

import time

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import error, inputs, leaf
from test_packing import data_of, module_of

import alignloss
from alignloss.losses import LOSSES

SEQUENCES, T, FP32 = 4, 12, 1e-6
# where each process's part of the positions of a sequence ends; in the last cases a process has no position, no label
CUTS = {2: [(5, 12), (12, 12)], 4: [(2, 7, 8, 12), (0, 4, 11, 12)]}


def problem():
    torch.manual_seed(0)
    hidden, weight, _, labels = inputs(SEQUENCES, T, dtype=torch.float32)
    labels[1] = -100
    labels[:, -1] = -100
    return hidden, weight, labels, torch.rand(SEQUENCES, T)


def gradients(loss, *leaves):
    loss.backward()
    return [t.grad for t in leaves]


def parts(rank, cuts, packed, *tensors):
    """This process's positions of (S, T, ...) tensors, padded or packed, with the offsets."""
    start = cuts[rank - 1] if rank else 0
    mine = [t[:, start : cuts[rank]] for t in tensors]
    if not packed:
        return mine, {}
    length = cuts[rank] - start
    return [t.flatten(0, 1) for t in mine], {"cu_seqlens": torch.arange(SEQUENCES + 1) * length}


def check(cuts, call, name):
    """That call(hidden, weight, labels, token weights, group) has one process's values and, averaged, its gradients.

    Within 1e-6 of float64; where the loss is a ratio of probabilities, an error of the logarithm is one of the ratio.
    """
    hidden, weight, labels, factors = problem()
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = leaf(hidden, torch.float64), leaf(weight, torch.float64)
    values = call(*whole, labels, factors, {})
    dhidden, dweight = gradients(values[0], *whole)
    tolerance = 1e-5 if name == "chi_po" else FP32
    for packed in (False, True):
        (hidden_part, labels_part, factors_part), layout = parts(rank, cuts, packed, hidden, labels, factors)
        mine = leaf(hidden_part, torch.float32), leaf(weight, torch.float32)
        group = {"sequence_group": dist.group.WORLD}
        found = call(*mine, labels_part, factors_part, group | layout)
        for a, b in zip(found, values, strict=True):
            assert error(a, b) <= tolerance, name
        dhidden_part, dweight_part = gradients(found[0], *mine)
        dist.all_reduce(dweight_part)
        (expected,), _ = parts(rank, cuts, packed, dhidden)
        assert error(dweight_part / size, dweight) <= tolerance, name
        # each position's gradient is at one process, and counts as often as there are processes
        assert float((dhidden_part / size - expected).norm()) <= tolerance * float(dhidden.norm()), name


def every_loss(rank, size, cuts):
    for name in sorted(LOSSES):
        module = module_of(name, "torch")
        data = data_of(module, SEQUENCES)

        def call(hidden, weight, labels, factors, given, module=module, data=data):
            out = module(hidden, weight, labels, **data, **given)
            return out.loss, *out[1:]

        check(cuts, call, name)


def other_calls(rank, size, cuts):
    """With the NLL beside, token weights, a projected reference, mixtures, SFT and sequence_logprob."""
    ref = problem()[0].flip(0).double()

    def reference(hidden, given):
        cut = {"cu_seqlens"} & given.keys()
        whole = not given
        part = ref if whole else parts(rank, cuts, bool(cut), ref)[0][0]
        return part.to(hidden.dtype)

    mixture = alignloss.MixtureLoss([alignloss.DPOLoss(), alignloss.PreferenceLoss("bco_pair", beta=0.1)], [0.8, 0.2])
    logps = torch.linspace(-20, -10, SEQUENCES)

    def weighted(hidden, weight, labels, factors, given):
        loss_fn = alignloss.CPOLoss(nll_weight=0.7)
        out = loss_fn(hidden, weight, labels, token_weights=factors, pair_weights=torch.tensor([1.0, 0.5]), **given)
        return out.loss, *out[1:]

    def projected(hidden, weight, labels, factors, given):
        given = given | {"ref_hidden": reference(hidden, given), "ref_weight": weight.detach().flip(0)}
        out = alignloss.DPOLoss()(hidden, weight, labels, token_weights=factors, **given)
        return out.loss, *out[1:]

    def mixed(hidden, weight, labels, factors, given):
        out = mixture(hidden, weight, labels, ref_logps=logps, **given)
        return out.loss, *out[1:]

    def sft(hidden, weight, labels, factors, given):
        out = alignloss.SFTLoss()(hidden, weight, labels, token_weights=factors, **given)
        return out.loss, *out[1:]

    def sums(hidden, weight, labels, factors, given):
        out = alignloss.sequence_logprob(hidden, weight, labels, token_weights=factors, **given)
        return (out.logps * torch.arange(1, SEQUENCES + 1)).sum(), out.logps, out.lengths

    for call in (weighted, projected, mixed, sft, sums):
        check(cuts, call, call.__name__)


def collectives(rank, size, cuts):
    """One to a step, in the forward; another one where values are checked."""
    hidden, weight, labels, _ = problem()
    hidden, weight = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    called = []
    for name in ("all_reduce", "all_gather"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, real=real, **k: (called.append(name), real(*a, **k))[1])
    for validate, expected in ((False, ["all_reduce"]), (True, ["all_gather", "all_reduce"])):
        called.clear()
        loss_fn = alignloss.CPOLoss(nll_weight=1.0, validate=validate)
        loss_fn(hidden, weight, labels, sequence_group=dist.group.WORLD).loss.backward()
        assert called == expected


def refusals(rank, size, cuts):
    from torch.distributed.device_mesh import init_device_mesh

    hidden, weight, labels, _ = problem()
    mine = slice(0, SEQUENCES - 2 * (rank == 1))
    with pytest.raises(ValueError, match=r"\[4, 2(, 4)*\] sequences"):  # on every process
        alignloss.CPOLoss()(hidden[mine], weight, labels[mine], sequence_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="must be a ProcessGroup or a DeviceMesh of one dimension, got 'world'"):
        alignloss.CPOLoss()(hidden, weight, labels, sequence_group="world")
    with pytest.raises(ValueError, match="of one dimension"):
        alignloss.CPOLoss()(hidden, weight, labels, sequence_group=init_device_mesh("cpu", (1, size)))
    mesh = init_device_mesh("cpu", (size,))
    lengths = alignloss.sequence_logprob(hidden, weight, labels, sequence_group=mesh).lengths
    assert torch.equal(lengths, (size * (labels != -100).sum(1)).clamp(min=1))
    alone = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match=f"this process is in; rank {rank} is not"):
            alignloss.CPOLoss()(hidden, weight, labels, sequence_group=alone)


def data_that_differ(rank, size, cuts):
    """What belongs to whole sequences and one process has otherwise is an error on all of them."""
    hidden, weight, labels, factors = problem()
    given = {"sequence_group": dist.group.WORLD}
    logps, pairs = torch.linspace(-20, -10, SEQUENCES), torch.ones(2)
    elsewhere = rank == size - 1

    def dpo(beta=0.1, ref_logps=logps, validate=None, temperature=1.0, **data):
        loss_fn = alignloss.DPOLoss(beta=beta, validate=validate, temperature=temperature)
        return loss_fn(hidden, weight, labels, ref_logps=ref_logps, **data, **given)

    for name, value, other in (
        ("data", {"ref_logps": logps}, {"ref_logps": logps.flip(0)}),
        ("data", {"pair_weights": pairs}, {"pair_weights": pairs / 2}),
        ("data", {"num_sequences": 2}, {"num_sequences": 3}),
        ("what is asked for", {"beta": 0.1}, {"beta": 0.2}),
        ("what is asked for", {"temperature": 1.0}, {"temperature": 2.0}),
    ):
        dpo(**value)
        with pytest.raises(ValueError, match=rf"must agree, and these differ: {name} \(here"):
            dpo(**(other if elsewhere else value))
    inner = [alignloss.DPOLoss(beta=0.1 + elsewhere), alignloss.PreferenceLoss("bco_pair", beta=0.1)]
    with pytest.raises(ValueError, match="these differ: what is asked for"):
        alignloss.MixtureLoss(inner, [0.8, 0.2])(hidden, weight, labels, ref_logps=logps, **given)
    with pytest.raises(ValueError, match="these differ: what is asked for"):
        alignloss.sequence_logprob(hidden, weight, labels, temperature=1.0 + elsewhere, **given)
    with pytest.raises(ValueError, match="these differ: data"):
        alignloss.SFTLoss()(hidden, weight, labels, num_tokens=5 + elsewhere, **given)
    dpo(token_weights=factors * (1 + rank))  # of a part
    dpo(ref_logps=logps.flip(0) if elsewhere else logps, validate=False)


def one_that_raises(rank, size, cuts):
    """The others get an error of their own after the group's time-out, be the one still there."""
    hidden, weight, labels, _ = problem()
    if rank == 0:
        labels = labels.clone()
        labels[0, 0] = 10_000
        with pytest.raises(ValueError, match="10000"):
            alignloss.SFTLoss(validate=True)(hidden, weight, labels, sequence_group=dist.group.WORLD)
        time.sleep(6)
    else:
        with pytest.raises(RuntimeError):
            alignloss.SFTLoss(validate=True)(hidden, weight, labels, sequence_group=dist.group.WORLD)
    return False


@pytest.mark.parametrize(("size", "cuts"), [(size, cuts) for size in CUTS for cuts in CUTS[size]])
@pytest.mark.parametrize("work", [every_loss, other_calls])
def test_losses_and_gradients_are_those_of_one_process(work, size, cuts, tmp_path):
    run_processes(work, size, tmp_path, cuts)


@pytest.mark.parametrize(
    ("work", "seconds"), [(collectives, 300), (refusals, 300), (data_that_differ, 300), (one_that_raises, 3)]
)
def test_what_a_step_asks_of_the_group(work, seconds, tmp_path):
    run_processes(work, 2, tmp_path, CUTS[2][0], seconds=seconds)


def test_a_group_needs_processes():
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match=r"init_process_group\(\) before the call"):
        alignloss.SFTLoss()(hidden, weight, labels, sequence_group=object())
