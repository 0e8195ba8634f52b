"""Log-probabilities, statistics and gradients equal full logits in float64, on both backends and in every regime."""

import itertools

import pytest
import torch
from reference import error, inputs, leaf, statistics, token_logps, within

import alignloss
from alignloss.ops import cpu_bf16, walk

TRANSFORMS = [{}, {"logit_scale": 1.3, "temperature": 0.7}, {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.5}]
BACKENDS = ["torch", "triton"]
FP32 = 2e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(compute, upstream, tensors, dtype, trained):
    """Outputs and gradients of compute(hidden, weight, bias), with `trained` naming what requires grad."""
    leaves = [leaf(t, dtype, name in trained) for t, name in zip(tensors, ("hidden", "weight", "bias"), strict=True)]
    outputs = compute(*leaves)
    if trained:
        torch.autograd.backward(list(outputs), [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [o.detach() for o in outputs] + [t.grad for t in leaves if t is not None and t.grad is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    "trained", ["", "hidden", "weight", "bias", "hidden weight", "hidden weight bias"], ids=lambda t: t or "nothing"
)
def test_log_probabilities_and_every_gradient(backend, transform, with_bias, trained):
    hidden, weight, bias, labels = inputs(3, 7)
    if not with_bias:
        bias, trained = None, trained.replace("bias", "")
    upstream = [torch.randn(3, 7, dtype=torch.float64)]

    def fused(h, w, b):
        # 12 kB: several row blocks and several vocabulary slices
        return [alignloss.linear_logprob(h, w, labels, b, backend=backend, workspace_bytes=12_000, **transform)]

    expected = run(
        lambda h, w, b: [token_logps(h, w, labels, b, **transform)],
        upstream,
        (hidden, weight, bias),
        torch.float64,
        trained,
    )
    got = run(fused, upstream, (hidden, weight, bias), torch.float32, trained)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        assert error(g, e) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "hidden weight bias"])
def test_statistics_and_the_gradient_of_the_entropy(backend, transform, trained):
    hidden, weight, bias, labels = inputs(3, 7)
    names = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    upstream = [torch.randn(3, 7, dtype=torch.float64) for _ in range(2)]
    got_stats = {}

    def fused(h, w, b):
        out = alignloss.linear_logprob_stats(
            h, w, labels, b, stats=names, backend=backend, workspace_bytes=12_000, **transform
        )
        got_stats.update(out._asdict())
        return out.logps, out.entropy

    def full(h, w, b):
        return token_logps(h, w, labels, b, **transform), statistics(h, w, labels, b, **transform)["entropy"]

    expected = run(full, upstream, (hidden, weight, bias), torch.float64, trained)
    got = run(fused, upstream, (hidden, weight, bias), torch.float32, trained)
    for g, e in zip(got, expected, strict=True):
        assert error(g, e) <= FP32
    for name, value in statistics(hidden, weight, labels, bias, **transform).items():
        assert got_stats[name].requires_grad == (name == "entropy")
        if name == "is_top1":
            assert torch.equal(got_stats[name], value)
        else:
            assert error(got_stats[name].detach(), value) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("trained", "gemms"), [("hidden", 2), ("hidden weight bias", 4)])
def test_an_entropy_that_is_only_logged_has_no_gradient_and_costs_no_gemm(trained, gemms, backend, monkeypatch):
    tensors, labels = inputs(3, 7)[:3], inputs(3, 7, masked=0)[3]
    work, results = [], []

    def counted(out, a, b, **options):
        work.append(a.shape[0] * a.shape[1] * b.shape[1])
        walk_addmm(out, a, b, **options)

    walk_addmm = walk.addmm
    monkeypatch.setattr(walk, "addmm", counted)
    for differentiable in (True, False):
        h, w, b = (
            leaf(t, torch.float32, n in trained) for t, n in zip(tensors, ("hidden", "weight", "bias"), strict=True)
        )
        out = alignloss.linear_logprob_stats(
            h, w, labels, b, stats=("entropy",), differentiable_entropy=differentiable, backend=backend
        )
        assert out.entropy.requires_grad == differentiable
        out.logps.sum().backward()
        gradients = [t.grad for t in (h, w, b) if t.grad is not None]
        results.append([out.logps.detach(), out.entropy.detach(), *gradients, sum(work)])
        work.clear()
    (*ours, fewer), (*theirs, more) = reversed(results)
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) <= FP32
    of_head = 21 * 101 * 37
    assert (more - fewer) // of_head == 1
    assert fewer // of_head == gemms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_16_bit_error_is_at_most_twice_that_of_naive_torch(dtype, trained):
    tensors = inputs(2, 40, hidden_size=64, vocabulary=301)
    hidden, weight, bias, labels = (t.to(dtype).double() if t.is_floating_point() else t for t in tensors)
    upstream = [torch.randn(2, 40, dtype=torch.float64)]

    def naive(h, w, b):
        picked = torch.log_softmax((h @ w.T + b).float(), -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return [torch.where(labels == -100, 0.0, picked)]

    exact = run(
        lambda h, w, b: [token_logps(h, w, labels, b)], upstream, (hidden, weight, bias), torch.float64, trained
    )
    plain = run(naive, upstream, (hidden, weight, bias), dtype, trained)
    fused = run(
        lambda h, w, b: [alignloss.linear_logprob(h, w, labels, b, workspace_bytes=100_000)],
        upstream, (hidden, weight, bias), dtype, trained,
    )  # fmt: skip
    assert [f.dtype for f in fused] == [p.dtype for p in plain]
    assert within(fused, plain, exact)


@pytest.mark.parametrize("workspace", [4_000, 30_000, 10_000_000])
def test_the_workspace_changes_no_result_beyond_rounding(workspace):
    tensors = hidden, weight, bias, labels = inputs(4, 30)
    upstream = [torch.randn(4, 30, dtype=torch.float64)]
    trained = "hidden weight bias"
    expected = run(lambda h, w, b: [token_logps(h, w, labels, b)], upstream, tensors[:3], torch.float64, trained)
    got = run(
        lambda h, w, b: [alignloss.linear_logprob(h, w, labels, b, workspace_bytes=workspace)],
        upstream, tensors[:3], torch.float64, trained,
    )  # fmt: skip
    assert max(error(g, e) for g, e in zip(got, expected, strict=True)) < 1e-13


@pytest.mark.nightly_where(
    lambda backend, dtype, narrow, **_: backend == "triton" and (dtype == torch.float16) == (narrow == "hidden")
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [12_000, 10_000_000])
@pytest.mark.parametrize("trained", ["", "hidden", "weight bias", "hidden weight bias"], ids=lambda t: t or "nothing")
@pytest.mark.parametrize("narrow", ["hidden", "weight bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_beside_16_bits_computes_in_float32(dtype, narrow, trained, workspace, backend):
    names = ("hidden", "weight", "bias")
    *tensors, labels = inputs(3, 7)
    dtypes = [dtype if name in narrow else torch.float32 for name in names]
    leaves = [leaf(tensor, kind, name in trained) for tensor, kind, name in zip(tensors, dtypes, names, strict=True)]
    exact = [leaf(tensor, torch.float64, tensor.requires_grad) for tensor in leaves]
    upstream = torch.randn(3, 7, dtype=torch.float64)
    logps = alignloss.linear_logprob(*leaves[:2], labels, leaves[2], backend=backend, workspace_bytes=workspace)
    expected = token_logps(*exact[:2], labels, exact[2])
    assert logps.dtype == torch.float32
    assert error(logps.detach(), expected.detach()) <= FP32
    if trained:
        (logps * upstream).sum().backward()
        (expected * upstream).sum().backward()
        loss_fn = alignloss.SFTLoss(backend=backend, workspace_bytes=workspace)
        sft = torch.autograd.grad(loss_fn(*leaves[:2], labels, leaves[2]).loss, [t for t in leaves if t.requires_grad])
        loss = -token_logps(*exact[:2], labels, exact[2]).sum() / (labels != -100).sum()
        of_loss = torch.autograd.grad(loss, [t for t in exact if t.requires_grad])
        found = [t.grad for t in leaves if t.requires_grad], [t.grad for t in exact if t.requires_grad]
        for got, truth in [*zip(*found, strict=True), *zip(sft, of_loss, strict=True)]:
            assert error(got, truth) <= (FP32 if got.dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize(("N", "H", "V"), list(itertools.product([1, 17], [1, 33], [1, 2, 97])))
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_are_no_multiple_of_any_block(backend, N, H, V):
    hidden, weight, _, labels = inputs(N, hidden_size=H, vocabulary=V, masked=0.0)
    expected = run(
        lambda h, w, b: [token_logps(h, w, labels)],
        [torch.ones(N)],
        (hidden, weight, None),
        torch.float64,
        "hidden weight",
    )
    got = run(
        lambda h, w, b: [alignloss.linear_logprob(h, w, labels, backend=backend, workspace_bytes=6_000)],
        [torch.ones(N)], (hidden, weight, None), torch.float32, "hidden weight",
    )  # fmt: skip
    for g, e in zip(got, expected, strict=True):
        assert float((g - e).abs().max()) <= FP32 * max(1.0, float(e.abs().max()))


def test_gradcheck_in_double():
    hidden, weight, bias, labels = inputs(2, 4, hidden_size=5, vocabulary=7)

    def run_all(h, w, b):
        out = alignloss.linear_logprob_stats(h, w, labels, b, stats=("entropy",), softcap=2.0, workspace_bytes=2_000)
        return out.logps, out.entropy

    arguments = tuple(leaf(t) for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(run_all, arguments)


def test_autocast_computes_in_its_dtype_and_returns_each_gradient_in_its_own():
    hidden, weight, bias, labels = inputs(3, 9)
    leaves = [leaf(t, torch.float32) for t in (hidden, weight, bias)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        logps = alignloss.linear_logprob(leaves[0], leaves[1], labels, leaves[2])
    logps.sum().backward()
    rounded = [leaf(t.detach(), torch.bfloat16) for t in leaves]
    same = alignloss.linear_logprob(rounded[0], rounded[1], labels, rounded[2])
    assert logps.dtype == torch.float32
    assert torch.equal(logps, same)
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3


def test_token_index_is_the_mask_without_its_lookup():
    hidden, weight, _, labels = inputs(3, 9, dtype=torch.float32)
    index = torch.nonzero(labels.view(-1) != -100).squeeze(1)
    padded = torch.cat([index, torch.nonzero(labels.view(-1) == -100).squeeze(1)[:2]])
    expected = alignloss.linear_logprob(h := leaf(hidden, torch.float32), w := leaf(weight, torch.float32), labels)
    expected.sum().backward()
    for rows in (index, padded, index.int()):
        got = alignloss.linear_logprob(
            h2 := leaf(hidden, torch.float32), w2 := leaf(weight, torch.float32), labels, token_index=rows
        )
        got.sum().backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(h2.grad, h.grad)
        torch.testing.assert_close(w2.grad, w.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled", "softcap"])
def test_padding_of_the_token_index_has_no_part_in_any_gradient(backend, transform):
    hidden, weight, bias, labels = inputs(12)
    index = torch.cat([torch.nonzero(labels != -100).squeeze(1), torch.nonzero(labels == -100).squeeze(1)])
    upstream = [torch.randn(12, dtype=torch.float64).masked_fill(labels == -100, torch.inf) for _ in range(2)]

    def fused(token_index):
        def compute(h, w, b):
            out = alignloss.linear_logprob_stats(
                h, w, labels, b, stats=("entropy",), backend=backend, token_index=token_index, **transform
            )
            return out.logps, out.entropy

        return compute

    expected = run(fused(None), upstream, (hidden, weight, bias), torch.float32, "hidden weight bias")
    got = run(fused(index), upstream, (hidden, weight, bias), torch.float32, "hidden weight bias")
    assert max(error(g, e) for g, e in zip(got, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_vectors_are_read_with_their_strides(backend):
    hidden, weight, _, labels = inputs(4, 6, masked=0.0, dtype=torch.float32)
    every_other = torch.stack([labels, labels + 1000], -1).view(4, 12)[:, ::2]
    weights = torch.rand(4, 12, dtype=torch.float64)[:, ::2]
    ref = torch.randn(4, 3, dtype=torch.float64)[:, 1]
    offsets = torch.tensor([0, 9, 6, 9, 12, 9, 18, 9, 24, 9])[::2]
    strided = alignloss.DPOLoss(backend=backend)(hidden, weight, every_other, ref_logps=ref, token_weights=weights)
    dense = alignloss.DPOLoss()(hidden, weight, labels, ref_logps=ref.clone(), token_weights=weights.contiguous())
    torch.testing.assert_close(strided, dense)
    packed = alignloss.sequence_logprob(
        hidden.view(24, -1), weight, labels.view(24), cu_seqlens=offsets, backend=backend
    )
    torch.testing.assert_close(packed.logps, alignloss.sequence_logprob(hidden, weight, labels).logps)


def test_autocast_rounds_the_target_row_like_the_others(monkeypatch):
    # rows of W share a mean 100 times their spread: W_y - sum q_v W_v is all cancellation, which shows any rounding,
    # that of q too where the products take it in bf16
    monkeypatch.setattr(cpu_bf16, "available", lambda: False)
    with torch.device("cpu"):  # a GPU's products take q in 16 bits
        hidden, weight, _, labels = inputs(30, masked=0.0, dtype=torch.float32)
    weight = 5 + 0.05 * weight
    h = leaf(hidden, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alignloss.linear_logprob(h, weight, labels).sum().backward()
    exact = leaf(hidden.bfloat16())
    token_logps(exact, weight.bfloat16().double(), labels).sum().backward()
    assert error(h.grad, exact.grad) <= 4e-3


def test_fp16_with_a_tiny_logit_scale_keeps_its_gradient():
    hidden, weight, _, labels = inputs(30, masked=0.0)
    h, exact = leaf(hidden, torch.float16), leaf(hidden.half())
    upstream = torch.full((30,), 65536.0)
    alignloss.linear_logprob(h, weight.half(), labels, logit_scale=1e-6).backward(upstream)
    token_logps(exact, weight.half().double(), labels, logit_scale=1e-6).backward(upstream.double())
    assert error(h.grad, exact.grad) <= 1e-3
