"""The loss modules: every loss against full logits in float64, layouts, references, reductions, a user's own loss."""

from functools import partial, wraps

import pytest
import torch
from reference import error, inputs, leaf, token_logps

import alignloss
from alignloss import losses

B, T = 3, 9
FP32 = 2e-5
BACKENDS = ["torch", "triton"]


def case(name, backend="auto", **head):
    """(module, call keywords, plain loss of (sums, lengths)) for one loss on 2B sequences."""
    ref = torch.randn(2 * B, dtype=torch.float64) * 3 - 15
    half = slice(None, B), slice(B, None)
    options = {"backend": backend, **head}
    if name == "dpo":
        module = alignloss.DPOLoss(beta=0.3, label_smoothing=0.1, **options)
        plain = lambda s, n: losses.dpo_loss(
            s[half[0]], s[half[1]], ref[half[0]], ref[half[1]], beta=0.3, label_smoothing=0.1
        )
    elif name == "ipo":
        module = alignloss.IPOLoss(beta=0.2, **options)
        plain = lambda s, n: losses.ipo_loss(
            s[half[0]], s[half[1]], ref[half[0]], ref[half[1]], n[half[0]], n[half[1]], beta=0.2
        )
    elif name == "cpo":
        module = alignloss.CPOLoss(beta=0.2, nll_weight=0.7, **options)

        def plain(s, n):
            values, *rewards = losses.cpo_loss(s[half[0]], s[half[1]], beta=0.2)
            return values - 0.7 * s[half[0]].sum() / n[half[0]].sum(), *rewards

        return module, {}, plain
    else:
        desirable = torch.arange(2 * B) % 3 > 0
        module = alignloss.KTOLoss(beta=0.2, desirable_weight=1.3, **options)
        kl = torch.tensor(0.5, dtype=torch.float64)
        plain = lambda s, n: losses.kto_loss(s, ref, desirable, kl, beta=0.2, desirable_weight=1.3)
        return module, {"ref_logps": ref, "desirable": desirable, "kl": kl}, plain
    return module, {"ref_logps": ref}, plain


def sums_and_lengths(hidden, weight, labels, bias=None, **transform):
    return token_logps(hidden, weight, labels, bias, **transform).sum(1), (labels != -100).sum(1).clamp(min=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "cpo"])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_loss_and_gradients_match_full_logits(name, backend, trained):
    hidden, weight, bias, labels = inputs(2 * B, T)
    transform = {"logit_scale": 1.2, "softcap": 5.0, "temperature": 0.9}
    module, keywords, plain = case(name, backend, workspace_bytes=20_000, **transform)
    exact = [leaf(t) for t in (hidden, weight, bias)]
    expected = plain(*sums_and_lengths(exact[0], exact[1], labels, exact[2], **transform))
    expected[0].mean().backward()
    h, w, b = (
        leaf(t, torch.float32, n in trained) for t, n in ((hidden, "hidden"), (weight, "weight"), (bias, "weight"))
    )
    out = module(h, w, labels, b, **keywords)
    out.loss.backward()
    assert error(out.loss.detach(), expected[0].mean().detach()) <= FP32
    assert error(h.grad, exact[0].grad) <= FP32
    if "weight" in trained:
        assert error(w.grad, exact[1].grad) <= FP32
        assert error(b.grad, exact[2].grad) <= FP32
    rewards = torch.cat([out.chosen_rewards, out.rejected_rewards]) if module.paired else out.rewards
    assert error(rewards, torch.cat(expected[1:])) <= FP32
    assert [f for f in out._fields if getattr(out, f).requires_grad] == ["loss"]
    assert {getattr(out, f).dtype for f in out._fields} == {torch.float32}


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "cpo"])
def test_modules_pass_gradcheck(name):
    hidden, weight, _, labels = inputs(2 * B, 4, hidden_size=3, vocabulary=5)
    module, keywords, _ = case(name, workspace_bytes=2_000)
    assert torch.autograd.gradcheck(lambda h, w: module(h, w, labels, **keywords).loss, (leaf(hidden), leaf(weight)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "cpo"])
def test_packed_equals_padded(name, backend):
    hidden, weight, _, labels = inputs(2 * B, T, dtype=torch.float32)
    lengths = torch.tensor([9, 4, 1, 7, 9, 2])
    for i, n in enumerate(lengths):
        labels[i, n:] = -100
    keep = torch.arange(T) < lengths[:, None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    module, keywords, _ = case(name, backend)
    padded = module(h := leaf(hidden, torch.float32), weight, labels, **keywords)
    padded.loss.backward()
    for shape in ((-1,), (1, -1)):
        packed_hidden = leaf(hidden[keep].view(*shape, hidden.shape[-1]), torch.float32)
        packed = module(packed_hidden, weight, labels[keep].view(shape), cu_seqlens=offsets, **keywords)
        packed.loss.backward()
        torch.testing.assert_close(packed, padded)
        torch.testing.assert_close(packed_hidden.grad.view(-1, hidden.shape[-1]), h.grad[keep])


def test_a_reference_given_as_hidden_states_equals_its_log_probabilities():
    hidden, weight, _, labels = inputs(2 * B, T, dtype=torch.float32)
    ref_hidden, ref_weight, ref_bias, _ = inputs(2 * B, T, hidden_size=21, dtype=torch.float32)
    ref = alignloss.sequence_logprob(ref_hidden, ref_weight, labels, ref_bias).logps
    ref_weight.requires_grad_()
    for module in (alignloss.DPOLoss(), alignloss.IPOLoss()):
        given = module(hidden, weight, labels, ref_logps=ref)
        computed = module(
            leaf(hidden, torch.float32), weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        )
        computed.loss.backward()
        torch.testing.assert_close(computed, given)
    assert ref_weight.grad is None


def my_loss(chosen_logps, rejected_logps, chosen_lengths, scores, offset=None, *, beta, power=1.0):
    margins = beta * (chosen_logps - rejected_logps) / chosen_lengths + (0.0 if offset is None else offset)
    return scores**power * torch.nn.functional.softplus(-margins), margins.detach(), -margins.detach()


def test_a_loss_of_the_users_own():
    hidden, weight, _, labels = inputs(2 * B, T)
    scores, offset = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    module = alignloss.PreferenceLoss(my_loss, beta=0.7, power=2.0)
    assert (module.paired, module.needs_reference, module.data) == (True, False, {"scores": True, "offset": False})
    sums, lengths = sums_and_lengths(hidden, weight, labels)
    for given in ({}, {"offset": offset}):
        out = module(hidden, weight, labels, scores=scores, **given)
        expected = my_loss(sums[:B], sums[B:], lengths[:B], scores, *given.values(), beta=0.7, power=2.0)
        torch.testing.assert_close(out.losses, expected[0])
        torch.testing.assert_close(out.loss, expected[0].mean())


@pytest.mark.parametrize("name", ["dpo", "kto", "cpo"])
def test_micro_batches_with_global_counts_add_up(name):
    hidden, weight, _, labels = inputs(2 * B, T)
    module, keywords, _ = case(name)
    whole = module(h := leaf(hidden), weight, labels, **keywords).loss
    whole.backward()
    h2, total = leaf(hidden), 0.0
    count = 2 * B if name == "kto" else B
    for i in range(count):
        rows = [i] if name == "kto" else [i, B + i]
        part = {k: v[rows] if v.dim() else v for k, v in keywords.items()}
        if name == "cpo":
            part["num_tokens"] = (labels[:B] != -100).sum()
        loss = module(h2[rows], weight, labels[rows], num_sequences=count, **part).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(h2.grad, h.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_and_pair_weights(backend):
    hidden, weight, _, labels = inputs(2 * B, T)
    token_weights, pair_weights = torch.rand(2 * B, T, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5])
    ref = torch.full((2 * B,), -10.0)
    out = alignloss.DPOLoss(beta=0.3, backend=backend)(
        hidden.float(), weight.float(), labels, ref_logps=ref, token_weights=token_weights, pair_weights=pair_weights
    )
    logps = token_logps(hidden, weight, labels)
    sums = (logps * token_weights).sum(1)
    expected, *_ = losses.dpo_loss(sums[:B], sums[B:], ref[:B], ref[B:], beta=0.3)
    assert error(out.losses, expected) <= FP32
    assert error(out.loss, (expected * pair_weights).sum() / B) <= FP32
    # the NLL takes no token weights
    assert error(out.nll_loss, -logps[:B].sum() / (labels[:B] != -100).sum()) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
def test_nll_labels_extend_the_nll_to_the_prompt(backend):
    hidden, weight, _, full_labels = inputs(2 * B, T, masked=0.0)
    labels = full_labels.clone()
    labels[:, :4] = -100
    h = leaf(hidden, torch.float32)
    out = alignloss.CPOLoss(beta=0.2, backend=backend)(h, weight.float(), labels, nll_labels=full_labels)
    out.loss.backward()
    sums = token_logps(exact := leaf(hidden), weight, labels).sum(1)
    nll = -token_logps(exact, weight, full_labels)[:B].mean()
    expected = losses.cpo_loss(sums[:B], sums[B:], beta=0.2)[0].mean() + nll
    expected.backward()
    assert error(out.loss.detach(), expected.detach()) <= FP32
    assert error(out.nll_loss, nll.detach()) <= FP32
    assert error(h.grad, exact.grad) <= FP32


def test_sft_is_the_nll_per_labelled_token():
    hidden, weight, _, labels = inputs(B, T)
    out = alignloss.SFTLoss()(hidden, weight, labels)
    logps = token_logps(hidden, weight, labels)
    torch.testing.assert_close(out.loss, -logps.sum() / (labels != -100).sum())
    torch.testing.assert_close(out.losses, -logps.sum(1))
    assert float(out.rewards.abs().max()) == 0


def test_outputs_are_float32_under_autocast():
    hidden, weight, _, labels = inputs(2 * B, T, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = alignloss.DPOLoss()(hidden, weight, labels, ref_logps=torch.zeros(2 * B))
    assert {value.dtype for value in out} == {torch.float32}


def test_sequence_logprob_sums_and_counts():
    hidden, weight, _, labels = inputs(B, T)
    labels[1] = -100
    logps, lengths = alignloss.sequence_logprob(hidden, weight, labels)
    expected_sums, expected_lengths = sums_and_lengths(hidden, weight, labels)
    torch.testing.assert_close(logps, expected_sums)
    assert torch.equal(lengths, expected_lengths)
    assert (float(logps[1]), int(lengths[1])) == (0.0, 1)


def test_next_token_labels_shift_by_one_within_each_sequence():
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    assert alignloss.next_token_labels(ids, mask).tolist() == [[-100, 7, 8, -100]]
    packed = alignloss.next_token_labels(
        torch.tensor([5, 6, 7, 8, 9]), torch.ones(5), cu_seqlens=torch.tensor([0, 2, 2, 5]), ignore_index=-1
    )
    assert packed.tolist() == [6, -1, 8, 9, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kto_takes_a_baseline_per_sequence_and_data_0_d(backend):
    hidden, weight, _, labels = inputs(4, T)
    ref, kl = torch.zeros(4), torch.tensor([0.1, 0.5, 1.0, 2.0])
    sums = token_logps(hidden, weight, labels).sum(1)
    for desirable, baseline in ((torch.tensor([True, False, True, True]), kl), (torch.tensor(True), 0.3)):
        out = alignloss.KTOLoss(backend=backend)(
            hidden.float(), weight.float(), labels, ref_logps=ref, desirable=desirable, kl=baseline
        )
        expected, _ = losses.kto_loss(sums, ref, desirable, torch.as_tensor(baseline), beta=0.1)
        assert error(out.losses, expected) <= FP32


def with_defaults(chosen_logps, rejected_logps, delta=0.5, chosen_lengths=None, rejected_lengths=None):
    return chosen_logps / chosen_lengths - rejected_logps / rejected_lengths - delta, chosen_logps, rejected_logps


def test_names_after_an_omitted_default_are_filled_all_the_same():
    hidden, weight, _, labels = inputs(2 * B, T)
    loss = alignloss.PreferenceLoss(with_defaults)
    torch.testing.assert_close(loss(hidden, weight, labels).losses, loss(hidden, weight, labels, delta=0.5).losses)


def in_place(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, *, beta):
    chosen_logps /= chosen_lengths
    ref_chosen_logps -= 1
    chosen_lengths += 1
    losses = torch.nn.functional.softplus(
        beta * (rejected_logps - chosen_logps - ref_rejected_logps + ref_chosen_logps)
    )
    return losses, chosen_logps.detach(), rejected_logps.detach()


def out_of_place(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, *, beta):
    return in_place(
        chosen_logps / 1, rejected_logps, ref_chosen_logps / 1, ref_rejected_logps, chosen_lengths / 1, beta=beta
    )


def test_a_loss_that_works_in_place_changes_nothing_else():
    hidden, weight, _, labels = inputs(2 * B, T)
    ref = torch.randn(2 * B, dtype=torch.float64) - 20
    kept = ref.clone()
    results = [
        alignloss.PreferenceLoss(fn, beta=0.3, nll_weight=0.5)(hidden, weight, labels, ref_logps=ref)
        for fn in (in_place, out_of_place)
    ]
    torch.testing.assert_close(*results)
    assert torch.equal(ref, kept)


@pytest.mark.parametrize("name", ["aot_unpaired", "user"])
def test_a_dropped_pair_of_a_coupled_loss_keeps_its_part_in_the_others(name):
    def centred(chosen_logps, rejected_logps):
        margins = chosen_logps - rejected_logps
        return torch.nn.functional.softplus(margins.mean() - margins), margins.detach(), -margins.detach()

    hidden, weight, _, labels = inputs(2 * B, T)
    if name == "user":
        module, data = alignloss.PreferenceLoss(centred, couples_batch=True), {}
    else:
        module, data = alignloss.PreferenceLoss(name, beta=0.3), {"ref_logps": torch.linspace(-30, -10, 2 * B)}
    gradients = []
    for nothing in (0.0, 1e-13):
        h = leaf(hidden)
        module(h, weight, labels, pair_weights=torch.tensor([1.0, nothing, 0.5]).double(), **data).loss.backward()
        gradients.append(h.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_integer_data_neither_wrap_nor_lose_precision():
    hidden, weight, _, labels = inputs(2 * B, T)
    ref = torch.zeros(2 * B)
    rebel = alignloss.PreferenceLoss("rebel", beta=0.1)
    results = [
        rebel(
            hidden, weight, labels, ref_logps=ref,
            chosen_scores=torch.full((B,), 1, dtype=dtype), rejected_scores=torch.full((B,), 3, dtype=dtype),
        ).losses
        for dtype in (torch.uint8, torch.float64)
    ]  # fmt: skip
    assert torch.equal(*results)
    sums, lengths = sums_and_lengths(hidden, weight, labels)
    exact = 0.1 * (sums[:B] - sums[B:]) + 0.05 * (lengths[:B].double() - lengths[B:])
    out = alignloss.PreferenceLoss("r_dpo", beta=0.1, length_weight=0.05)(hidden, weight, labels, ref_logps=ref)
    torch.testing.assert_close(out.losses, torch.nn.functional.softplus(-exact), rtol=1e-12, atol=1e-12)


def by_domain(chosen_logps, rejected_logps, chosen_lengths, domain):
    margins = torch.tensor([0.1, 0.5])[domain] * (chosen_logps - rejected_logps) / torch.arange(1, 99)[chosen_lengths]
    return -margins, margins.detach(), margins.detach()


def test_a_users_function_takes_integers_as_integers():
    hidden, weight, _, labels = inputs(2 * B, T)
    sums, lengths = sums_and_lengths(hidden, weight, labels)
    domain = torch.tensor([0, 1, 1], dtype=torch.uint8)
    out = alignloss.PreferenceLoss(by_domain)(hidden, weight, labels, domain=domain)
    expected = torch.tensor([0.1, 0.5, 0.5]) * (sums[:B] - sums[B:]) / (lengths[:B] + 1)
    torch.testing.assert_close(out.losses, -expected)


@wraps(losses.aot_loss)
def decorated(*arguments, **options):
    return losses.aot_loss(*arguments, **options)


@pytest.mark.parametrize("fn", [partial(losses.aot_loss, beta=0.3), decorated, torch.compile(losses.aot_loss)])
def test_a_wrapped_coupled_loss_is_coupled(fn):
    module = alignloss.PreferenceLoss(fn, beta=0.3)
    assert module.couples_batch
    assert module.function.name == "aot_loss"
    with pytest.raises(ValueError, match="beta must lie in"):
        alignloss.PreferenceLoss(fn, beta=-1.0)


class Callable:
    """An object that is callable and not hashable."""

    __hash__ = None

    def __call__(self, logps):
        return -logps, logps.detach()


def test_a_callable_object_is_a_loss():
    hidden, weight, _, labels = inputs(B, T)
    out = alignloss.PreferenceLoss(Callable())(hidden, weight, labels)
    torch.testing.assert_close(out.losses, -token_logps(hidden, weight, labels).sum(1))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (torch.nn.Linear(2, 2), "Linear is a torch.nn.Module.*give its forward"),
        (torch.add, "does not say what it takes: wrap it"),
        (lambda self, chosen_logps, rejected_logps: None, r"reserved names, \['self'\]"),
    ],
)
def test_what_cannot_be_a_loss_says_why(fn, message):
    for options in ({}, {"nll_weight": 1.0}):
        with pytest.raises(ValueError, match=message):
            alignloss.PreferenceLoss(fn, **options)
