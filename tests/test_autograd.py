"""What stands around a call in a training loop: checkpoints, hooks on what is saved, offloading, a scaled loss."""

import pytest
import torch
from reference import error, inputs, leaf
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import alignloss

B, T, V = 2, 6, 101
FACTORS = torch.linspace(0.5, 1.5, 2 * B * T, dtype=torch.float64).view(2 * B, T)


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight, bias, labels = inputs(2 * B, T, vocabulary=V)
    return leaf(hidden, dtype), leaf(weight, dtype), leaf(bias, dtype), labels


def logps(hidden, weight, bias, labels):
    return (alignloss.linear_logprob(hidden, weight, labels, bias) * FACTORS).sum()


def entropy(hidden, weight, bias, labels):
    found = alignloss.linear_logprob_stats(hidden, weight, labels, bias, stats=("entropy",))
    return (found.logps * FACTORS).sum() + found.entropy.sum()


def sequences(hidden, weight, bias, labels):
    return alignloss.sequence_logprob(hidden, weight, labels, bias).logps.square().sum() / 100


def kl(hidden, weight, bias, labels):
    ref = hidden.detach().flip(0), weight.detach().flip(0)
    return alignloss.linear_kl(hidden, weight, *ref, labels, bias).sum()


def own(hidden, weight, bias, labels):
    return alignloss.one_pass_loss(hidden, weight, labels, lambda logps, stats: logps.square().sum() / 100, bias)


def dpo(hidden, weight, bias, labels):
    return alignloss.DPOLoss()(hidden, weight, labels, bias, ref_logps=torch.zeros(2 * B)).loss


def sft(hidden, weight, bias, labels):
    return alignloss.SFTLoss()(hidden, weight, labels, bias).loss


CALLS = (logps, entropy, sequences, kl, own, dpo, sft)


def through_hooks(call, *args):
    with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        return call(*args)


def offloaded(call, *args):
    with save_on_cpu():
        return call(*args)


AROUND = {
    "a reentrant checkpoint": lambda call, *args: checkpoint(call, *args, use_reentrant=True),
    "a checkpoint": lambda call, *args: checkpoint(call, *args, use_reentrant=False),
    "a checkpoint in a checkpoint": lambda call, *args: checkpoint(
        lambda *inner: checkpoint(call, *inner, use_reentrant=False), *args, use_reentrant=False
    ),
    "hooks": through_hooks,
    "offloading": offloaded,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_gradients_are_the_same_to_the_bit(call, around, trained):
    found = []
    for way in (lambda call, *args: call(*args), AROUND[around]):
        hidden, weight, bias, labels = problem()
        hidden.requires_grad_(trained != "head")
        for tensor in (weight, bias):
            tensor.requires_grad_(trained != "hidden")
        loss = way(call, hidden, weight, bias, labels)
        loss.backward()
        found.append([loss.detach(), *(t.grad for t in (hidden, weight, bias) if t.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", CALLS)
def test_a_step_of_a_scaled_loss_that_overflows_is_skipped_and_the_next_is_right(call):
    hidden, weight, bias, labels = problem()  # the optimizer's, beside what is computed in 16 bits
    optimizer = torch.optim.SGD([hidden, weight, bias], 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-34, growth_interval=1000)
    before = hidden.detach().clone(), weight.detach().clone(), bias.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(call(hidden.half(), weight.half(), bias.half(), labels)).backward()
        if step == 0:
            assert not all(t.grad.isfinite().all() for t in (hidden, weight, bias))
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert all(torch.equal(t, old) for t, old in zip((hidden, weight, bias), before, strict=True))
    assert scaler.get_scale() == 64
    exact = [leaf(t.half()) for t in before]
    call(*exact, labels).backward()
    for got, truth in zip((hidden, weight, bias), exact, strict=True):  # which the step has unscaled
        assert error(got.grad, truth.grad) <= 5e-3


@pytest.mark.parametrize("call", CALLS)
def test_in_inference_mode_the_value_is_that_of_a_training(call):
    with torch.inference_mode():
        hidden, weight, bias, labels = problem()
        value = call(hidden.detach(), weight.detach(), bias.detach(), labels)
    assert torch.allclose(value, call(*problem()).detach(), rtol=1e-6)
