"""Bad input is a clear ValueError or a defined value: never an access out of bounds, never a plausible wrong number."""

import pytest
import torch
from processes import run_processes
from reference import error, inputs, leaf, token_logps

import alignloss
from alignloss import losses

BACKENDS = ["torch", "triton"]


def small(**options):
    hidden, weight, bias, labels = inputs(4, 5, dtype=torch.float32, **options)
    labels[0, 0] = 3
    return hidden, weight, bias, labels


@pytest.mark.parametrize("bad", [-1, -101, 101, 2**40])
def test_a_label_outside_the_vocabulary_raises(bad):
    hidden, weight, _, labels = small()
    labels[2, 3] = bad
    with pytest.raises(ValueError, match=rf"\[0, 101\).*got {bad} at flat position 13"):
        alignloss.linear_logprob(hidden, weight, labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 101, 2**40])
def test_unchecked_a_label_outside_the_vocabulary_is_nan_in_its_row_alone(backend, bad):
    hidden, weight, _, labels = small(masked=0.0)
    labels[2, 3] = bad
    h = leaf(hidden, torch.float32)
    logps = alignloss.linear_logprob(h, weight, labels, backend=backend, validate=False, workspace_bytes=8_000)
    logps.sum().backward()
    is_bad = labels == bad
    assert torch.equal(logps.isnan(), is_bad)
    assert torch.equal(h.grad.isnan().any(-1), is_bad)


def test_unchecked_a_token_index_out_of_range_is_never_an_address():
    hidden, weight, _, labels = small(masked=0.0)
    h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
    index = torch.tensor([*range(20), 20, -1, 2**40])
    logps = alignloss.linear_logprob(h, w, labels, token_index=index, backend="triton", validate=False)
    logps.sum().backward()
    exact = [leaf(t) for t in (hidden, weight)]
    expected = token_logps(*exact, labels)
    expected.sum().backward()
    for got, value in zip((logps, h.grad, w.grad), (expected, exact[0].grad, exact[1].grad), strict=True):
        assert error(got.detach(), value.detach()) <= 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (4, 0)])
def test_nothing_to_score_gives_zero_and_a_zero_gradient(backend, shape):
    hidden, weight, bias, labels = inputs(*shape, dtype=torch.float32)
    labels.fill_(-100)
    leaves = [leaf(t, torch.float32) for t in (hidden, weight, bias)]
    for module in (alignloss.CPOLoss(backend=backend), alignloss.SFTLoss(backend=backend)):
        out = module(leaves[0], leaves[1], labels, leaves[2])
        out.loss.backward()
        assert bool(out.loss.isfinite())
        assert all(float(t.grad.abs().sum()) == 0 for t in leaves)


def test_a_masked_sequence_keeps_a_constant_loss_and_counts():
    hidden, weight, _, labels = small(masked=0.0)
    labels[[1, 3]] = -100
    h = leaf(hidden, torch.float32)
    out = alignloss.DPOLoss()(h, weight, labels, ref_logps=torch.zeros(4))
    out.loss.backward()
    assert float(out.losses[1]) == pytest.approx(0.6931472)
    assert float(out.loss.detach()) == pytest.approx(float(out.losses.mean()))
    assert float(h.grad[[1, 3]].abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 5, 36)}, "one H"),
        ({"weight": torch.zeros(37)}, r"weight \(V, H\)"),
        ({"labels": torch.zeros(4, 4, dtype=torch.long)}, "leading shape of hidden"),
        ({"labels": torch.zeros(4, 5)}, "labels must be integers"),
        ({"bias": torch.zeros(100)}, "bias must be"),
        (
            {"weight": torch.zeros(101, 37, dtype=torch.float64)},
            "must have one dtype, or one of 16 bits",
        ),
        ({"weight": torch.zeros(101, 37, dtype=torch.int8)}, "dequantise"),
        ({"weight": torch.nn.Linear(37, 101)}, "leave bias out"),
        ({"weight": torch.nn.Embedding(101, 37), "bias": None}, "head_call"),
        ({"weight": torch.zeros(101, 37, device="meta")}, "weight is on meta"),
        ({"temperature": 0.0}, "temperature must be a positive"),
        ({"softcap": -1.0}, "softcap must be a positive"),
        ({"logit_scale": float("nan")}, "logit_scale must be a finite"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive"),
        ({"backend": "cuda"}, "'auto', 'torch' or 'triton'"),
        ({"token_index": [0, 1]}, "token_index must be a torch.Tensor"),
        ({"temperature": "1"}, "temperature must be a positive"),
        ({"token_index": torch.zeros(2)}, r"token_index must be \(N,\)"),
        ({"token_index": torch.tensor([20])}, r"token_index must lie in \[0, 20\)"),
        ({"token_index": torch.tensor([1])}, "every position with a label exactly once"),
        ({"token_index": torch.tensor([*range(20), 0])}, "every position with a label exactly once"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    hidden, weight, bias, labels = small()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        alignloss.linear_logprob(**arguments)


def test_float64_does_not_run_in_float32():
    hidden, weight, _, labels = inputs(3, 4)
    with pytest.raises(ValueError, match="float64"):
        alignloss.linear_logprob(hidden, weight, labels, backend="triton")


def test_unknown_statistics():
    hidden, weight, _, labels = small()
    for bad in (("perplexity",), "entropy"):
        with pytest.raises(ValueError, match="stats takes"):
            alignloss.linear_logprob_stats(hidden, weight, labels, stats=bad)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5], "rise from 0 to the number of tokens, 20"),
        ([0, 12, 7, 20], "rise from 0"),
        ([1, 20], "rise from 0"),
        ([0, 20, 20], "give real_sequences"),
        ([0, 0, 20], "give real_sequences"),
        ([0.0, 20.0], "integer tensor"),
    ],
)
def test_offsets_that_do_not_fit(offsets, message):
    hidden, weight, _, labels = small()
    with pytest.raises(ValueError, match=message):
        alignloss.sequence_logprob(hidden.view(20, 37), weight, labels.view(20), cu_seqlens=torch.tensor(offsets))


def test_layouts_that_do_not_fit():
    hidden, weight, _, labels = small()
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        alignloss.sequence_logprob(hidden.view(20, 37), weight, labels.view(20))
    with pytest.raises(ValueError, match=r"\(tokens,\) or \(1, tokens\)"):
        alignloss.sequence_logprob(hidden, weight, labels, cu_seqlens=torch.tensor([0, 20]))
    with pytest.raises(ValueError, match="token_weights must have the shape"):
        alignloss.sequence_logprob(hidden, weight, labels, token_weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"token_weights must be real, got torch\.complex64"):
        alignloss.sequence_logprob(hidden, weight, labels, token_weights=torch.ones(labels.shape) + 0j)
    with pytest.raises(ValueError, match="shape and device of input_ids"):
        alignloss.next_token_labels(labels, labels[:2])


DPO, CPO, KTO = alignloss.DPOLoss(), alignloss.CPOLoss(), alignloss.KTOLoss()
REF = {"ref_logps": torch.zeros(4)}


@pytest.mark.parametrize(
    ("module", "keywords", "message"),
    [
        (DPO, {}, "needs a reference"),
        (DPO, {"ref_hidden": torch.zeros(4, 5, 37)}, "ref_hidden with ref_weight"),
        (DPO, {**REF, "ref_hidden": torch.zeros(4, 5, 37), "ref_weight": torch.zeros(101, 37)}, "either ref_logps, or"),
        (DPO, {**REF, "ref_bias": torch.zeros(101)}, "either ref_logps, or"),
        (DPO, {"ref_logps": torch.zeros(2)}, r"ref_logps must be \(4,\)"),
        (DPO, {"ref_logps": torch.tensor(0.0)}, r"ref_logps must be \(4,\)"),
        (DPO, {"ref_logps": torch.zeros(4, requires_grad=True)}, "without gradient"),
        (DPO, {**REF, "nll_labels": torch.zeros(4, 5, dtype=torch.long)}, "would be ignored"),
        (DPO, {**REF, "num_tokens": 3}, "would be ignored"),
        (DPO, {**REF, "num_sequences": 0}, "num_sequences must be a positive"),
        (DPO, {"ref_logps": torch.zeros(4, dtype=torch.bool)}, "floating point"),
        (alignloss.SFTLoss(), REF, r"unknown: \['ref_logps'\]"),
        (DPO, {**REF, "pair_weights": torch.ones(4)}, r"pair_weights must be \(2,\)"),
        (DPO, {**REF, "pair_weights": torch.ones(2, dtype=torch.complex64)}, "pair_weights must be real"),
        (DPO, {**REF, "desirable": torch.ones(4)}, r"unknown: \['desirable'\]"),
        (CPO, REF, "reference-free and would ignore"),
        (CPO, {"nll_labels": torch.zeros(4, 4, dtype=torch.long)}, "nll_labels must have the shape"),
        (CPO, {"nll_labels": torch.full((4, 5), 7)}, "must agree where both are set"),
        (KTO, {**REF, "kl": 0.0}, r"missing: \['desirable'\]"),
        (KTO, {**REF, "desirable": torch.ones(4).bool()}, r"missing: \['kl'\]"),
        (KTO, {**REF, "kl": 0.0, "desirable": torch.ones(3).bool()}, r"desirable must be \(4,\)"),
        (KTO, {**REF, "kl": 0.0, "desirable": "yes"}, "desirable must be a tensor"),
    ],
)
def test_module_calls_that_do_not_fit(module, keywords, message):
    hidden, weight, _, labels = small()
    with pytest.raises(ValueError, match=message):
        module(hidden, weight, labels, **keywords)


def test_an_odd_batch():
    hidden, weight, _, labels = small()
    with pytest.raises(ValueError, match="2B sequences, chosen then rejected; got 3"):
        CPO(hidden[:3], weight, labels[:3])


def both(chosen_logps, rejected_logps, logps):
    raise NotImplementedError


def neither(scores):
    raise NotImplementedError


def reserved(chosen_logps, rejected_logps, labels):
    raise NotImplementedError


def wrong_shape(chosen_logps, rejected_logps):
    return chosen_logps.mean(), chosen_logps, rejected_logps


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: alignloss.DPOLoss(betta=0.1), r"unknown: \['betta'\]"),
        (lambda: alignloss.DPOLoss(beta=0.0), "beta must lie in"),
        (lambda: alignloss.DPOLoss(beta=None), r"missing: \['beta'\]"),
        (lambda: alignloss.DPOLoss(softcap=-1), "softcap must be a positive"),
        (lambda: alignloss.DPOLoss(backend="cuda"), "'auto', 'torch' or 'triton'"),
        (lambda: alignloss.CPOLoss(nll_weight=float("nan")), "nll_weight must be a finite"),
        (lambda: alignloss.SFTLoss(beta=0.1), r"unknown: \['beta'\]"),
        (lambda: alignloss.DPOLoss(label_smoothing=0.5), "label_smoothing must lie in"),
        (lambda: alignloss.PreferenceLoss(losses.dpo_loss), r"missing: \['beta'\]"),
        (lambda: alignloss.KTOLoss(nll_weight=1.0), "use SFTLoss"),
        (lambda: alignloss.PreferenceLoss(both), "must take chosen_logps and rejected_logps"),
        (lambda: alignloss.PreferenceLoss(neither), "must take chosen_logps and rejected_logps"),
        (lambda: alignloss.PreferenceLoss(reserved), "reserved names"),
    ],
)
def test_modules_that_cannot_be_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def imaginary(chosen_logps, rejected_logps):
    return chosen_logps * 1j, chosen_logps, rejected_logps


def a_list(chosen_logps, rejected_logps):
    return [chosen_logps, chosen_logps, rejected_logps]


@pytest.mark.parametrize(
    ("fn", "got"), [(wrong_shape, r"\[\(\), \(2,\)"), (imaginary, r"\[torch.complex"), (a_list, "list")]
)
def test_a_loss_function_that_returns_something_else(fn, got):
    hidden, weight, _, labels = small()
    with pytest.raises(ValueError, match=rf"must return a tuple of 3 float tensors of shape \(2,\), got {got}"):
        alignloss.PreferenceLoss(fn)(hidden, weight, labels)


def test_a_second_backward_and_another_upstream_gradient_are_exact():
    hidden, weight, _, labels = inputs(3, 6)
    exact = [leaf(hidden), leaf(weight)]
    expected = token_logps(*exact, labels)
    fused = [leaf(hidden), leaf(weight)]
    got = alignloss.linear_logprob(*fused, labels, workspace_bytes=8_000)
    for upstream in (torch.randn(3, 6).double(), torch.randn(3, 6).double() * 1e6):
        e = torch.autograd.grad(expected, exact, upstream, retain_graph=True)
        g = torch.autograd.grad(got, fused, upstream, retain_graph=True)
        assert max(error(a, b) for a, b in zip(g, e, strict=True)) < 1e-12


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_double_backward_is_refused(trained):
    hidden, weight, _, labels = inputs(3, 6)
    tensors = {
        "hidden": leaf(hidden, requires_grad=trained == "hidden"),
        "weight": leaf(weight, requires_grad=trained == "weight"),
    }
    logps = alignloss.linear_logprob(**tensors, labels=labels)
    upstream = torch.ones_like(logps, requires_grad=True)
    (grad,) = torch.autograd.grad(logps, tensors[trained], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_no_grad_computes_no_gradient():
    hidden, weight, _, labels = inputs(3, 6)
    with torch.no_grad():
        assert not alignloss.linear_logprob(leaf(hidden), leaf(weight), labels).requires_grad


def test_garbage_at_unlabelled_positions_is_never_read():
    hidden, weight, _, labels = inputs(3, 6, dtype=torch.float32)
    hidden[labels == -100] = torch.nan
    index = torch.arange(18)  # padded by the unlabelled positions
    for options in ({}, {"token_index": index}):
        h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
        alignloss.linear_logprob(h, w, labels, **options).sum().backward()
        assert bool(h.grad.isfinite().all())
        assert bool(w.grad.isfinite().all())


def test_the_same_call_is_bitwise_equal():
    hidden, weight, _, labels = inputs(4, 20, dtype=torch.float32)
    results = set()
    for _ in range(5):
        h, w = leaf(hidden, torch.float32), leaf(weight, torch.float32)
        out = alignloss.CPOLoss(workspace_bytes=20_000)(h, w, labels)
        out.loss.backward()
        results.add((float(out.loss.detach()), float(h.grad.sum()), float(w.grad.sum())))
    assert len(results) == 1


def test_forward_mode_is_refused():
    hidden, weight, _, labels = inputs(3, 6)
    with pytest.raises(RuntimeError, match="reverse mode only"):
        torch.func.jvp(lambda h: alignloss.linear_logprob(h, weight, labels), (hidden,), (hidden,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [[0, 2, 64], [0, 2, -1], [0, 3, 2], [1, 2, 4], [0, 1, 3], [0, 4, 4], [0, -9, 4]])
def test_offsets_that_do_not_fit_are_never_addresses_and_give_nan(offsets, backend):
    values, offsets = torch.ones(4, dtype=torch.float64, requires_grad=True), torch.tensor(offsets)
    checked = alignloss.ops.sequence.sequence_offsets(offsets, 4, True, False, False)
    sums = alignloss.ops.sequence.sequence_sum(values, checked, 2, None, backend)
    sums.sum().backward()
    assert bool(sums.isnan().all() & values.grad.isnan().all())
    with pytest.raises(ValueError, match="rise from 0"):
        alignloss.ops.sequence.sequence_offsets(offsets, 4, True, False, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weights_drop_what_is_not_finite(backend):
    hidden, weight, bias, labels = small(masked=0.0)
    bias[labels[1, 2]] = -torch.inf  # log-probability -inf in the second pair
    labels[0, 0] = labels[2, 0] = -100
    token_weights = torch.where(labels == -100, torch.nan, 1.0)
    keep = (labels != labels[1, 2]).float()
    for weights in ({"token_weights": token_weights * keep}, {"pair_weights": torch.tensor([1.0, 0.0])}):
        if "pair_weights" in weights:
            labels[[0, 2]] = torch.where(labels[[0, 2]] == labels[1, 2], -100, labels[[0, 2]])
        h = leaf(hidden, torch.float32)
        out = alignloss.DPOLoss(backend=backend)(h, weight, labels, bias, ref_logps=torch.zeros(4), **weights)
        out.loss.backward()
        assert bool(out.loss.isfinite())
        assert bool(h.grad.isfinite().all())


def refuse_a_sharded_head(rank, size) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    weight = distribute_tensor(torch.randn(11, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match="weight is a DTensor"):
        alignloss.linear_logprob(torch.randn(3, 4), weight, torch.tensor([1, 2, 3]))


def test_a_sharded_head_is_refused(tmp_path):
    run_processes(refuse_a_sharded_head, 1, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_a_narrow_dtype_mean_the_same(backend):
    hidden, weight, _, labels = inputs(4, 5, vocabulary=101, masked=0.0, dtype=torch.float32)
    for module, data in ((alignloss.CPOLoss, {}), (alignloss.IPOLoss, {"ref_logps": torch.full((4,), -9.0)})):
        loss = module(backend=backend)  # uint8 cannot hold its ignore_index, -100
        torch.testing.assert_close(
            loss(hidden, weight, labels.to(torch.uint8), **data), loss(hidden, weight, labels, **data)
        )
    weight = torch.randn(400, hidden.shape[-1])
    nll_labels = torch.tensor([[300, 301, 5, 0, 0]]).expand(4, 5)  # beyond uint8
    prompt = torch.tensor([[0, 0, 5, 0, 0]]).expand(4, 5)
    loss = alignloss.CPOLoss(backend=backend, ignore_index=0)
    narrow = loss(hidden, weight, prompt.to(torch.uint8), nll_labels=nll_labels)
    torch.testing.assert_close(narrow, loss(hidden, weight, prompt, nll_labels=nll_labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cap", [30.0, 1e3, 1e5])
def test_a_wide_softcap_costs_no_accuracy(cap, backend):
    hidden, weight, _, labels = inputs(20, dtype=torch.float32)
    expected = token_logps(hidden.double(), weight.double(), labels, softcap=cap)
    got = alignloss.linear_logprob(hidden, weight, labels, softcap=cap, backend=backend)
    assert float((got - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_gradient_of_a_certain_token_is_zero_in_fp16(backend):
    hidden, weight, bias, labels = (t.half() if t.is_floating_point() else t for t in inputs(6, masked=0.0))
    labels.fill_(100)
    for lowest in (-torch.inf, -60_000.0):
        bias[:-1] = lowest
        h = leaf(hidden, torch.float16)
        stats = alignloss.linear_logprob_stats(h, weight, labels, bias, stats=("entropy",), backend=backend)
        (stats.entropy + stats.logps).sum().backward()
        assert float(h.grad.abs().max()) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_tie_for_the_first_place_is_top1(trained, backend):
    weight = torch.randn(97, 33).repeat(2, 1)
    hidden = torch.randn(40, 33, requires_grad=trained)
    labels = (hidden @ weight[:97].T).argmax(-1) + 97
    stats = alignloss.linear_logprob_stats(hidden, weight, labels, stats=("is_top1",), backend=backend)
    assert bool(stats.is_top1.all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_rejected_sequence_costs_nothing(backend):
    hidden, weight, bias, labels = small(masked=0.0)
    labels[labels == 7] = 8
    labels[2, 0], bias[7] = 7, -torch.inf
    h = leaf(hidden, torch.float32)
    out = alignloss.DPOLoss(backend=backend)(h, weight, labels, bias, ref_logps=torch.zeros(4))
    out.loss.backward()
    assert float(out.losses[0]) == 0
    assert bool(h.grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_at_ignored_tokens_are_not_read(backend):
    hidden, weight, _, labels = small(masked=0.0)
    nll_labels, token_weights = labels.clone(), torch.ones(4, 5)
    labels[:, :2], token_weights[:, :2] = -100, torch.nan
    h = leaf(hidden, torch.float32)
    module = alignloss.CPOLoss(backend=backend)
    module(h, weight, labels, token_weights=token_weights, nll_labels=nll_labels).loss.backward()
    assert bool(h.grad.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_desirable_is_zero_or_one(backend):
    hidden, weight, _, labels = small()
    data = {"ref_logps": torch.zeros(4), "kl": 0.0}
    signs = torch.tensor([1, 1, -1, 0])
    with pytest.raises(ValueError, match="desirable must be bool, or 0 and 1; got"):
        alignloss.KTOLoss(backend=backend)(hidden, weight, labels, desirable=signs, **data)
    unchecked = alignloss.KTOLoss(backend=backend, validate=False)
    assert unchecked(hidden, weight, labels, desirable=signs, **data).losses.isnan().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("number", [0, -3, torch.tensor(0.0), torch.ones(2), "7"])
def test_divisors_are_positive_numbers(number):
    hidden, weight, _, labels = small()
    for module in (alignloss.SFTLoss(), alignloss.CPOLoss()):
        with pytest.raises(ValueError, match="num_tokens must be a"):
            module(hidden, weight, labels, num_tokens=number)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w, y: alignloss.next_token_labels([[1]], [[1]]), "input_ids must be a torch.Tensor"),
        (lambda h, w, y: alignloss.next_token_labels(y, None), "completion_mask must be a torch.Tensor"),
        (lambda h, w, y: alignloss.mismatched_pairs(y, y, None, 0), "completion_mask must be a torch.Tensor"),
        (lambda h, w, y: alignloss.mismatched_pairs(y, y, y, None), "pad_token_id must be an integer"),
        (lambda h, w, y: alignloss.kto_kl(*[alignloss.sequence_logprob(h, w, y)] * 2), "pass .logps"),
        (lambda h, w, y: alignloss.linear_logprob_stats(h, w, y, stats=None), "stats takes"),
        (lambda h, w, y: alignloss.linear_logprob(h, w, y, ignore_index=None), "ignore_index must be an integer"),
        (lambda h, w, y: alignloss.sequence_logprob(h, w, y, soft_cap=3.0), "unknown: .'soft_cap'"),
        (lambda h, w, y: alignloss.DPOLoss()(h, w, y, ref_logp=y), "unknown: .'ref_logp'"),
        (lambda h, w, y: alignloss.DPOLoss()(h, w, y, ref_logps=0.0), "ref_logps must be a torch.Tensor"),
        (lambda h, w, y: alignloss.DPOLoss()(h, w, y, ref_hidden=h[:2], ref_weight=w), "the reference, ref_hidden"),
        (lambda h, w, y: alignloss.DPOLoss()(object(), w, y, ref_logps=y), "pass the model's last hidden states"),
        (lambda h, w, y: alignloss.PreferenceLoss(lambda logps, beta=1: logps, beta=2), "put them after"),
        (lambda h, w, y: alignloss.CPOLoss()(h, w, y, nll_labels=y.double()), "nll_labels must be integers"),
    ],
)
def test_mistakes_get_their_way_out(call, message):
    hidden, weight, _, labels = small(masked=0.0)
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, labels)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    hidden, weight, _, labels = small()
    ref = torch.zeros(4)
    expected = alignloss.DPOLoss(beta=0.5)(hidden, weight, labels, ref_logps=ref, num_sequences=2).loss
    module = alignloss.DPOLoss(beta=numpy.float32(0.5))
    assert module(hidden, weight, labels, ref_logps=ref, num_sequences=numpy.int64(2)).loss == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w, y: alignloss.linear_logprob(h, w, y, ignore_index=True), "ignore_index must be an integer"),
        (lambda h, w, y: alignloss.linear_logprob(h, w, y, ignore_index=2**70), "ignore_index must be .* of 64 bits"),
        (lambda h, w, y: alignloss.linear_logprob(h, w, y, logit_scale=1e40), "within 1e30"),
        (lambda h, w, y: alignloss.linear_logprob(h, w, y, temperature=1e-40), "within 1e30"),
        (lambda h, w, y: alignloss.linear_logprob(h, w, y, softcap=1e300), "within 1e30"),
        (lambda h, w, y: alignloss.DPOLoss(softcap=1e-40), "within 1e30"),
        (lambda h, w, y: alignloss.DPOLoss()(h, w, y, ref_logps=torch.zeros(3)), r"ref_logps must be \(4,\) floating"),
        (lambda h, w, y: alignloss.next_token_labels(y.float(), y), "input_ids must be integers"),
        (lambda h, w, y: alignloss.next_token_labels(y > 0, y), "input_ids must be integers"),
        (lambda h, w, y: alignloss.mismatched_pairs(y.bfloat16(), y, y, 0), "input_ids must be integers"),
        (lambda h, w, y: alignloss.mismatched_pairs(y.cfloat(), y, y, 0), "input_ids must be integers"),
        (lambda h, w, y: alignloss.self_play_pairs([y[0] > 0], [y[0]], [y[0]], 0), "1-d integer"),
        (lambda h, w, y: alignloss.mismatched_pairs(y, y > 0, y > 99, 2**63), "pad_token_id must be .* of 64 bits"),
        (
            lambda h, w, y: alignloss.next_token_labels(
                y[0], y[0], cu_seqlens=torch.tensor([0, 5]), real_sequences=True
            ),
            "real_sequences must be an int",
        ),
    ],
)
def test_numbers_and_ids_out_of_range_say_so(call, message):
    hidden, weight, _, labels = inputs(4, 5, masked=0.0, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, labels)


@pytest.mark.parametrize("ignore_index", [-(2**63), 2**63 - 1, -1])
def test_any_ignore_index_of_64_bits(ignore_index):
    hidden, weight, _, labels = inputs(4, 5, masked=0.5, dtype=torch.float32)
    expected = alignloss.linear_logprob(hidden, weight, labels)
    got = alignloss.linear_logprob(
        hidden, weight, labels.where(labels != -100, ignore_index), ignore_index=ignore_index
    )
    assert torch.equal(got, expected)
    made = alignloss.next_token_labels(labels.clamp(min=0), labels != -100, ignore_index=ignore_index)
    assert set(made[:, -1].tolist()) == {ignore_index}
