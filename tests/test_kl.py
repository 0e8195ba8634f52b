"""KL(reference || policy) per token: values and gradients against full logits in float64, and TDPO on top of it."""

import pytest
import torch
from reference import error, inputs, leaf, logits, token_logps, within

import alignloss

B, T = 2, 9
FP32 = 2e-5
TRANSFORMS = [{}, {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.5}]


def full_kl(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, **transform):
    log_q = logits(ref_hidden, ref_weight, ref_bias, **transform).log_softmax(-1).detach()
    log_p = logits(hidden, weight, bias, **transform).log_softmax(-1)
    return torch.where(labels == -100, 0.0, (log_q.exp() * (log_q - log_p)).sum(-1))


def problem(dtype=torch.float64):
    hidden, weight, bias, labels = inputs(2 * B, T, dtype=dtype)
    ref_hidden, ref_weight, ref_bias, _ = inputs(2 * B, T, hidden_size=21, dtype=dtype)
    return hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap"])
@pytest.mark.parametrize(
    ("backend", "workspace", "trained"),
    [
        pytest.param(
            backend,
            workspace,
            trained,
            marks=pytest.mark.nightly if long else (),
            id=f"{backend} {workspace} {trained}",
        )
        for backend in ("torch", "triton")
        for workspace in (4_000, 1 << 20)
        for trained in ("", "hidden", "weight", "hidden weight bias")
        for long in [backend == "triton" and (trained, workspace) != ("hidden weight bias", 4_000)]
    ],
)
def test_values_and_gradients(backend, transform, trained, workspace):
    *tensors, labels = problem()
    upstream = torch.randn(2 * B, T, dtype=torch.float64)
    exact = [
        leaf(t, requires_grad=n in trained) for t, n in zip(tensors[:3], ("hidden", "weight", "bias"), strict=True)
    ]
    expected = full_kl(*exact, *tensors[3:], labels, **transform)
    got_leaves = [leaf(t.detach(), torch.float32, t.requires_grad) for t in exact]
    ref_hidden, ref_weight, ref_bias = (t.float() for t in tensors[3:])
    got = alignloss.linear_kl(
        got_leaves[0], got_leaves[1], ref_hidden, ref_weight, labels, got_leaves[2], ref_bias,
        backend=backend, workspace_bytes=workspace, **transform,
    )  # fmt: skip
    assert got.dtype == torch.float32
    assert error(got.detach(), expected.detach()) <= FP32
    if trained:
        expected.backward(upstream)
        got.backward(upstream.float())
        for g, e in zip(got_leaves, exact, strict=True):
            assert (g.grad is None) == (e.grad is None)
            assert g.grad is None or error(g.grad, e.grad) <= FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_that_of_naive_torch(dtype):
    *tensors, labels = problem()
    rounded = [t.to(dtype) for t in tensors]
    results = []
    for kind, compute in ((torch.float64, full_kl), (dtype, full_kl), (dtype, None)):
        leaves = [leaf(t, kind) for t in rounded[:3]]
        rest = [t.to(kind) for t in rounded[3:]]
        if compute is None:
            kl = alignloss.linear_kl(leaves[0], leaves[1], *rest[:2], labels, leaves[2], rest[2], workspace_bytes=9_000)
        else:
            kl = compute(*leaves, *rest, labels)
        kl.sum().backward()
        results.append([kl.detach(), *(t.grad for t in leaves)])
    exact, naive, fused = results
    assert within(fused, naive, exact)


def test_gradcheck_and_no_second_derivative():
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels = problem()
    few = (hidden[:1, :4, :5], weight[:11, :5], bias[:11])
    fixed = ref_hidden[:1, :4], ref_weight[:11], labels[:1, :4].clamp(max=10)

    def kl(h, w, b):
        return alignloss.linear_kl(h, w, *fixed, b, ref_bias[:11], softcap=3.0)

    leaves = tuple(leaf(t) for t in few)
    assert torch.autograd.gradcheck(kl, leaves)
    (gradient,) = torch.autograd.grad(kl(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        gradient.sum().backward()


def test_the_same_head_gives_0_and_no_gradient():
    hidden, weight, *_, labels = problem(torch.float32)
    h = leaf(hidden, torch.float32)
    kl = alignloss.linear_kl(h, weight, hidden, weight, labels)
    kl.sum().backward()
    assert float(kl.detach().abs().max()) < 1e-6
    assert float(h.grad.abs().max()) < 1e-6


def test_ignored_positions_empty_batches_and_token_index():
    hidden, weight, _, ref_hidden, ref_weight, _, labels = problem()
    labels[1] = -100
    h = leaf(hidden)
    kl = alignloss.linear_kl(h, weight, ref_hidden, ref_weight, labels)
    kl.sum().backward()
    assert float(kl.detach()[labels == -100].abs().max()) == 0
    assert float(h.grad[labels == -100].abs().max()) == 0
    index = torch.cat([torch.nonzero(labels.view(-1) != -100).squeeze(1), torch.nonzero(labels.view(-1) == -100)[0]])
    h2 = leaf(hidden)
    same = alignloss.linear_kl(h2, weight, ref_hidden, ref_weight, labels, token_index=index)
    same.sum().backward()
    torch.testing.assert_close(same, kl)
    torch.testing.assert_close(h2.grad, h.grad)
    for none in (torch.full_like(labels, -100), labels[:0]):
        h, w = leaf(hidden[: len(none)]), leaf(weight)
        kl = alignloss.linear_kl(h, w, ref_hidden[: len(none)], ref_weight, none)
        kl.sum().backward()
        assert kl.shape == none.shape
        assert float(w.grad.abs().max()) == 0


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
def test_impossible_tokens_of_both_heads_count_nothing(backend, dtype):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels = problem(dtype)
    labels = labels.clamp(max=90)
    bias, ref_bias = bias.clone(), ref_bias.clone()
    bias[95:] = ref_bias[95:] = -torch.inf
    got = alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, backend=backend)
    expected = full_kl(hidden, weight[:95], bias[:95], ref_hidden, ref_weight[:95], ref_bias[:95], labels)
    torch.testing.assert_close(got, expected)


def test_compiled_equals_eager():
    hidden, weight, _, ref_hidden, ref_weight, _, labels = problem(torch.float32)
    results = []
    for run in (alignloss.linear_kl, torch.compile(alignloss.linear_kl, fullgraph=True, backend="aot_eager")):
        h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
        kl = run(h, w, ref_hidden, ref_weight, labels)
        kl.sum().backward()
        results.append((kl.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_trains_through_it(name):
    hidden, weight, _, ref_hidden, ref_weight, _, labels = problem()
    module = alignloss.PreferenceLoss(name, beta=0.3)
    h, w = leaf(hidden), leaf(weight)
    kl = alignloss.linear_kl(h, w, ref_hidden, ref_weight, labels).sum(-1)
    out = module(
        h, w, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, chosen_seq_kl=kl[:B], rejected_seq_kl=kl[B:]
    )
    out.loss.backward()
    exact = leaf(hidden), leaf(weight)
    sums, ref = (token_logps(*head, labels).sum(1) for head in (exact, (ref_hidden, ref_weight)))
    kl = full_kl(*exact, None, ref_hidden, ref_weight, None, labels).sum(-1)
    margins = 0.3 * ((sums - ref)[:B] - (sums - ref)[B:])
    weighted = {"tdpo1": 0.3 * (kl[B:] - kl[:B]), "tdpo2": 0.5 * 0.3 * (kl[B:] - kl[:B].detach())}
    margins = margins - weighted[name]
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    expected.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    assert error(h.grad, exact[0].grad) < 1e-12
    assert error(w.grad, exact[1].grad) < 1e-12


def test_what_it_refuses():
    hidden, weight, _, ref_hidden, ref_weight, _, labels = problem()
    with pytest.raises(ValueError, match="share vocabulary, precision and device; got V = 101"):
        alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight[:-1], labels)
    with pytest.raises(ValueError, match="share vocabulary, precision and device"):
        alignloss.linear_kl(hidden, weight, ref_hidden.float(), ref_weight.float(), labels)
    with pytest.raises(ValueError, match="the reference, ref_hidden with ref_weight: labels must have the leading"):
        alignloss.linear_kl(hidden, weight, ref_hidden[:1], ref_weight, labels)
    with pytest.raises(ValueError, match="backend='triton' cannot run here: it computes in float32"):
        alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight, labels, backend="triton")
    with pytest.raises(ValueError, match="labels must lie in"):
        alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight, labels.masked_fill(labels >= 0, 101))


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
def test_the_workspace_is_a_bound(trained):
    from alignloss.commands.measure import peak_bytes

    M, H, V, workspace = 2048, 64, 8192, 8 << 20
    hidden, ref_hidden = torch.randn(M, H, requires_grad=True), torch.randn(M, H)
    weight, ref_weight = torch.randn(V, H, requires_grad="weight" in trained), torch.randn(V, H)
    labels = torch.randint(0, V, (M,))

    def step():
        alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight, labels, workspace_bytes=workspace).sum().backward()

    gradients = hidden.nbytes + weight.nbytes * ("weight" in trained)
    # 8 saved or temporary numbers per token beside it
    assert peak_bytes(step) - gradients <= workspace + hidden.nbytes + (1 << 20)
