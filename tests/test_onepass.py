"""The training step in one pass: which tokens go together, and the same result as full logits in float64."""

import pytest
import torch
from reference import error, inputs, leaf, token_logps, within

import alignloss
from alignloss import losses
from alignloss.modules import groups as groups_module
from alignloss.ops import head as head_module
from alignloss.ops import sizes
from alignloss.ops.sizes import Footprint, fill_groups

B, T, H, V = 4, 9, 37, 101
BACKENDS = ["torch", "triton"]
# tokens that a group has room for: every one; those of a few pairs; the longest pairs fit no group
ONE, SEVERAL, SOME = 2 * B * T, 20, 6


@pytest.fixture(autouse=True)
def _groups_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(sizes.Footprint, "least_group", 1)


def room(tokens, dtype=torch.float32, backend=None, hidden_size=H, vocabulary=V):
    """Bytes of workspace in which one of several groups holds so many tokens, on the device of the tests."""
    device = torch.get_default_device().type
    backend = backend or ("torch" if device == "cpu" or dtype == torch.float64 else "triton")
    foot = Footprint(vocabulary, hidden_size, dtype, dtype, dtype, True, False, device, backend)
    return foot.one_pass_bytes(tokens, True, foot.held_columns(1))


@pytest.fixture
def passes(monkeypatch):
    """(groups, tokens in groups) of every one-pass step."""
    counts = []
    original = groups_module.one_pass

    def spy(projection, indices, shares, groups, stats):
        counts.append((groups, sum(len(projection.labels if i is None else i) for i in indices[:groups])))
        return original(projection, indices, shares, groups, stats)

    monkeypatch.setattr(groups_module, "one_pass", spy)
    return counts


def ragged(*shape, **options):
    hidden, weight, bias, labels = inputs(*shape, masked=0.1, **options)
    for i, row in enumerate(labels):
        row[: i % shape[0] + 1] = -100
    return hidden, weight, bias, labels


def test_units_fill_groups_and_those_that_fit_nowhere_are_left():
    assert fill_groups([5, 2, 3, 8, 1], 6) == ([[0, 4], [1, 2]], [3])
    assert fill_groups([], 6) == ([], [])
    assert fill_groups([0, 7], 6) == ([[0]], [1])


@pytest.mark.nightly_where(lambda backend, tokens, name: backend == "triton" and tokens == ONE and name != "dpo")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [ONE, SEVERAL, SOME])
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "cpo", "sft"])
def test_loss_outputs_and_gradients(name, tokens, backend, passes):
    hidden, weight, bias, labels = ragged(2 * B, T, hidden_size=H, vocabulary=V)
    ref, pair_weights = torch.randn(2 * B, dtype=torch.float64) - 15, torch.tensor([1.0, 0.5, 0.0, 2.0])
    token_weights = torch.rand(2 * B, T, dtype=torch.float64)
    desirable, kl = torch.arange(2 * B) % 3 > 0, torch.rand(2 * B, dtype=torch.float64)
    options = {"backend": backend, "workspace_bytes": room(tokens, backend=backend)}
    module, data = {
        "dpo": lambda: (alignloss.DPOLoss(beta=0.3, **options), {"ref_logps": ref, "pair_weights": pair_weights}),
        "ipo": lambda: (alignloss.IPOLoss(beta=0.3, **options), {"ref_logps": ref, "token_weights": token_weights}),
        "kto": lambda: (alignloss.KTOLoss(**options), {"ref_logps": ref, "desirable": desirable, "kl": kl}),
        "cpo": lambda: (alignloss.CPOLoss(nll_weight=0.7, **options), {}),
        "sft": lambda: (alignloss.SFTLoss(**options), {"token_weights": token_weights}),
    }[name]()
    exact = [leaf(t) for t in (hidden, weight, bias)]
    logps = token_logps(*exact[:2], labels, exact[2])
    sums, lengths = (logps * token_weights).sum(1) if name in ("ipo", "sft") else logps.sum(1), (labels >= 0).sum(1)
    c, r, rc, rr = *sums.split(B), *ref.split(B)
    if name == "dpo":
        values, *rewards = losses.dpo_loss(c, r, rc, rr, beta=0.3)
        loss = (values * pair_weights).sum() / B
    elif name == "ipo":
        values, *rewards = losses.ipo_loss(c, r, rc, rr, *lengths.split(B), beta=0.3)
        loss = values.mean()
    elif name == "kto":
        values, *rewards = losses.kto_loss(sums, ref, desirable, kl, beta=0.1)
        loss = values.mean()
    elif name == "cpo":
        values, *rewards = losses.cpo_loss(c, r, beta=0.1)
        loss = values.mean() - 0.7 * c.sum() / lengths[:B].sum()
    else:
        values, rewards, loss = -sums, [torch.zeros_like(sums)], -sums.sum() / lengths.sum()
    (3 * loss).backward()
    h, w, b = (leaf(t, torch.float32) for t in (hidden, weight, bias))
    out = module(h, w, labels, b, **data)
    (3 * out.loss).backward()
    ((groups, in_groups),) = passes
    assert (groups == 1) == (tokens == ONE)
    assert (in_groups < int((labels >= 0).sum())) == (tokens == SOME)
    assert error(out.loss.detach(), loss.detach()) <= 2e-5
    assert error(out.losses, values.detach()) <= 2e-5
    logps = out.logps if hasattr(out, "logps") else torch.cat([out.chosen_logps, out.rejected_logps])
    assert error(logps, sums.detach()) <= 2e-5
    got = out.rewards if hasattr(out, "rewards") else torch.cat([out.chosen_rewards, out.rejected_rewards])
    assert error(got, torch.cat(rewards).detach()) <= 2e-5
    for ours, theirs in zip((h, w, b), exact, strict=True):
        assert error(ours.grad, theirs.grad) <= 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_held_tiles_of_an_older_reference(backend, passes):
    """The likeliest token is in the last of three held tiles, far above what the others are relative to."""
    torch.manual_seed(0)
    hidden, weight, _, labels = inputs(2, T, vocabulary=4500, masked=0.0)
    hidden[..., 0] = 1 + hidden[..., 0].abs()
    weight[:, 0] = 0
    weight[4400, 0] = 40
    gap = hidden @ weight.T
    assert (gap[..., 4096:].amax(-1) - gap[..., :4096].amax(-1)).min() > 25
    found = []
    for dtype in (torch.float32, torch.float64):
        h, w = leaf(hidden, dtype), leaf(weight, dtype)
        if dtype == torch.float32:
            loss = alignloss.SFTLoss(backend=backend)(h, w, labels).loss
        else:
            loss = -token_logps(h, w, labels).mean()
        loss.backward()
        found.append([loss.detach(), h.grad, w.grad, w.grad[:4096]])
    assert passes == [(1, 2 * T)]
    for got, exact in zip(*found, strict=True):
        assert error(got, exact) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [ONE, 14])
def test_16_bit_errs_at_most_twice_as_much_as_plain_torch(tokens, dtype):
    hidden, weight, _, labels = (t.to(dtype) if t.is_floating_point() else t for t in ragged(2 * B, T, hidden_size=H))
    ref = torch.full((2 * B,), -20.0)

    def step(loss_of, cast):
        h, w = leaf(hidden, cast), leaf(weight, cast)
        loss_of(h, w).backward()
        return h.grad, w.grad

    def plain(h, w):
        sums = token_logps(h, w, labels).sum(1)
        return losses.dpo_loss(*sums.split(B), *ref.to(sums.dtype).split(B), beta=0.1)[0].mean()

    module = alignloss.DPOLoss(workspace_bytes=room(tokens, dtype))
    exact = step(plain, torch.float64)
    ours = step(lambda h, w: module(h, w, labels, ref_logps=ref).loss, dtype)
    assert within(ours, step(plain, dtype), exact)


@pytest.mark.parametrize("tokens", [1e4, 1e8])
def test_a_scaled_loss_in_fp16_keeps_small_gradients(tokens, passes):
    hidden, weight, _, labels = (t.half() if t.is_floating_point() else t for t in ragged(2 * B, T))
    h, w = leaf(hidden, torch.float16), leaf(weight, torch.float16)
    loss = alignloss.SFTLoss()(h, w, labels, num_tokens=tokens).loss  # 1e-4 a token, or less
    (loss * 65536).backward()
    exact = [leaf(t) for t in (hidden, weight)]
    (-token_logps(*exact, labels).sum() / tokens * 65536).backward()
    assert len(passes) == 1
    assert error(h.grad, exact[0].grad) <= 1e-3
    assert error(w.grad, exact[1].grad) <= 1e-3


def narrow_step(tokens):
    """A module, and hidden, weight and bias with labels and a reference for it."""
    *tensors, labels = ragged(4, 4, hidden_size=3, vocabulary=300)
    module = alignloss.DPOLoss(workspace_bytes=room(tokens, torch.float64, hidden_size=3, vocabulary=300))
    return module, [leaf(t) for t in tensors], labels, torch.full((4,), -20.0)


@pytest.mark.parametrize("tokens", [ONE, 5])
def test_gradcheck(tokens):
    """Along random directions: entry by entry it takes thousands of steps."""
    module, leaves, labels, ref = narrow_step(tokens)
    loss = lambda h, w, b: module(h, w, labels, b, ref_logps=ref).loss
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("tokens", [ONE, 5])
def test_a_second_backward(tokens, passes):
    module, leaves, labels, ref = narrow_step(tokens)
    loss = module(*leaves[:2], labels, leaves[2], ref_logps=ref).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, torch.tensor(-2.0, dtype=torch.float64))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(b, -2 * a)
    assert {groups == 1 for groups, _ in passes} == {tokens == ONE}


@pytest.mark.parametrize("tokens", [ONE, SEVERAL, SOME, 0])
def test_double_backward_is_refused(tokens):
    hidden, weight, _, labels = ragged(2 * B, T)
    h, w = leaf(hidden), leaf(weight)
    for differentiate in (
        lambda gradient: gradient.square().sum().backward(),
        lambda gradient: torch.autograd.grad(gradient.square().sum(), (h, w), allow_unused=True),
    ):
        loss = alignloss.SFTLoss(workspace_bytes=room(tokens, torch.float64) or 1)(h, w, labels).loss
        (dhidden,) = torch.autograd.grad(loss, h, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            differentiate(dhidden)


@pytest.mark.parametrize("given", [None, 800])
def test_one_pass_takes_more_of_a_gpu_unless_the_caller_said_how_much(given, passes, monkeypatch):
    """A device whose 29th holds the step and whose default workspace does not."""
    step = room(2 * B * T)
    monkeypatch.setattr(head_module, "default_workspace", lambda *_: 800)
    monkeypatch.setattr(head_module, "total_memory", lambda _: 29 * step)
    monkeypatch.setattr(sizes, "default_workspace", lambda *_: 800)
    hidden, weight, _, labels = inputs(2 * B, T, hidden_size=H, vocabulary=V, masked=0)
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    alignloss.DPOLoss(workspace_bytes=given)(h, w, labels, ref_logps=torch.zeros(2 * B)).loss.backward()
    assert [groups for groups, _ in passes] == ([1] if given is None else [])


def test_gradients_accumulate_over_micro_batches(passes):
    hidden, weight, _, labels = ragged(2 * B, T)
    whole, parts = leaf(weight), leaf(weight)
    module = alignloss.CPOLoss()
    module(leaf(hidden), whole, labels).loss.backward()
    tokens = (labels[:B] != -100).sum()
    for i in range(B):
        rows = [i, B + i]
        module(leaf(hidden[rows]), parts, labels[rows], num_sequences=B, num_tokens=tokens).loss.backward()
    assert len(passes) == 1 + B
    torch.testing.assert_close(parts.grad, whole.grad)


def scaled(chosen_logps, rejected_logps, scores):
    return -torch.nn.functional.logsigmoid(scores * (chosen_logps - rejected_logps)), chosen_logps, rejected_logps


def test_a_loss_that_differentiates_more_keeps_its_graph(passes):
    hidden, weight, _, labels = ragged(2 * B, T)
    temperature, scores = (torch.ones(B, dtype=torch.float64, requires_grad=True) for _ in range(2))
    through_data = alignloss.PreferenceLoss(scaled)
    through_data(leaf(hidden), leaf(weight), labels, scores=scores).loss.backward()
    assert passes == []
    through_closure = alignloss.PreferenceLoss(lambda chosen_logps, rejected_logps: scaled(
        chosen_logps, rejected_logps, temperature
    ))  # fmt: skip
    through_closure(leaf(hidden), leaf(weight), labels).loss.backward()
    torch.testing.assert_close(temperature.grad, scores.grad)
    assert float(temperature.grad.abs().sum()) > 0


def relative(logps):
    return -(logps.log_softmax(0)), logps.detach()


def test_a_loss_that_couples_the_batch_declares_it(passes):
    hidden, weight, _, labels = ragged(2 * B, T)
    for workspace in (room(ONE, torch.float64), room(SOME, torch.float64)):
        exact, w = leaf(weight), leaf(weight)
        module = alignloss.PreferenceLoss(relative, couples_batch=True, workspace_bytes=workspace)
        module(leaf(hidden), w, labels).loss.backward()
        relative(token_logps(hidden, exact, labels).sum(1))[0].mean().backward()
        torch.testing.assert_close(w.grad, exact.grad)
    assert passes == []


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_one_pass_is_for_steps_that_train_both(frozen, passes):
    hidden, weight, _, labels = ragged(2 * B, T)
    h, w = leaf(hidden, requires_grad=frozen == "weight"), leaf(weight, requires_grad=frozen == "hidden")
    out = alignloss.CPOLoss()(h, w, labels)
    if frozen != "both":
        out.loss.backward()
    with torch.no_grad():
        alignloss.CPOLoss()(leaf(hidden), leaf(weight), labels)
    assert passes == []


@pytest.mark.parametrize("tokens", [ONE, SEVERAL])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_step_makes_the_pass_twice(tokens, reentrant, passes):
    """Once in the forward and once for the backward, with the gradients of a step outside of it."""
    hidden, weight, _, labels = ragged(2 * B, T, dtype=torch.float32)
    module = alignloss.DPOLoss(workspace_bytes=room(tokens))
    ref = torch.linspace(-20, -10, 2 * B)
    found = []
    for around in (False, True):
        passes.clear()
        h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
        step = lambda h, w: module(h, w, labels, ref_logps=ref).loss
        loss = torch.utils.checkpoint.checkpoint(step, h, w, use_reentrant=reentrant) if around else step(h, w)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
    # the one under torch.no_grad(), of a reentrant one, needs no gradients, and a GPU has another way to its sums
    assert len(passes) == 2 - reentrant
    (loss, *gradients), (again, *others) = found
    torch.testing.assert_close(again, loss, rtol=2e-7 * reentrant, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_a_step_outside_of_what_is_saved_elsewhere_saves_little(monkeypatch):
    """Hooks meet what the backward needs; not what the loss of a group keeps for the moment."""
    hidden, weight, _, labels = ragged(2 * B, T, dtype=torch.float32)
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    module, packed = alignloss.DPOLoss(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t.clone())[1], lambda t: t)
    with hooks:
        loss = module(h, w, labels, ref_logps=torch.zeros(2 * B)).loss
    loss.backward()
    shapes = {tuple(t.shape) for t in packed}
    assert tuple(w.shape) in shapes and not any(t.dtype == torch.float64 and t.shape == (B,) for t in packed)
    exact = leaf(hidden), leaf(weight)
    sums = token_logps(*exact, labels).sum(1)
    losses.dpo_loss(*sums.chunk(2), *torch.zeros(2, B), beta=0.1)[0].mean().backward()
    for got, truth in zip((h.grad, w.grad), exact, strict=True):
        assert error(got, truth.grad) <= 2e-5
