"""What only a GPU can show: real vocabularies in 16 bit, no syncs, graphs, streams, offsets past 2^31, equal bits."""

import re

import pytest
import torch
from reference import error, token_logps, within

import alignloss
from alignloss.commands.measure import peak_bytes

pytestmark = pytest.mark.gpu
MIB = 1 << 20
HEADS = [(896, 151936), (2048, 128256), (4096, 128256), (2304, 262144)]


def problem(N=1000, H=256, V=8192, dtype=torch.bfloat16, masked=0.3):
    """hidden, weight and labels with a probability around one half, of 4 sequences."""
    weight = torch.randn(V, H) * H**-0.5
    labels = torch.randint(0, V, (4, N // 4))
    peak = torch.log(torch.tensor(float(V))) + 0.5
    hidden = torch.randn(4, N // 4, H) + peak * torch.nn.functional.normalize(weight[labels], dim=-1)
    labels[torch.rand(labels.shape) < masked] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def gradients(loss_of, hidden, weight):
    return torch.autograd.grad(loss_of(hidden, weight), (hidden, weight))


@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, 0.3), (torch.float16, 0.0), (torch.float32, 0.98)])
@pytest.mark.parametrize(("H", "V"), HEADS)
def test_errors_at_most_twice_those_of_plain_torch(H, V, dtype, masked):
    hidden, weight, labels = problem(1000, H, V, dtype, masked)
    labels[2] = -100
    upstream = torch.randn(labels.shape)
    rows, targets = hidden.detach().flatten(0, 1), labels.flatten()

    def compute(cast):
        h, w = rows.to(cast).requires_grad_(), weight.detach().to(cast).requires_grad_()
        logits = (h @ w.T).to(torch.promote_types(cast, torch.float32))
        values = torch.log_softmax(logits, -1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        values = torch.where(targets == -100, 0, values)
        gradients = torch.autograd.grad(values, (h, w), upstream.flatten().to(values.dtype))
        return float(logits.detach().abs().max()), values.detach(), *gradients

    (largest, *exact), (_, *naive) = compute(torch.float64), compute(dtype)
    logps = alignloss.linear_logprob(hidden, weight, labels)
    ours = logps.detach().flatten(), *torch.autograd.grad(logps, (hidden, weight), upstream)
    assert within(ours, naive, exact)
    # tensor cores add 16 products of 16 bits a step and cut the sum to the 24 bits of float32, always towards zero;
    # float32 products round to nearest, whose errors of half a unit grow with the root of their number, here 4 sigma
    steps = H / 16 if dtype.itemsize == 2 else 4 * H**0.5 / 2
    assert float((ours[0] - exact[0]).abs().max()) <= 2 * steps * 2**-23 * largest  # of a logit and of the log-sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_divergence_of_two_heads_errs_at_most_twice_as_plain_torch(dtype):
    hidden, weight, labels = problem(dtype=dtype)
    ref_hidden, ref_weight, _ = (t.detach() for t in problem(dtype=dtype))
    upstream = torch.randn(labels.shape)

    def full(cast):
        h, w = (t.detach().to(cast).requires_grad_() for t in (hidden, weight))
        wide = torch.promote_types(cast, torch.float32)
        log_p = torch.log_softmax((h @ w.T).to(wide), -1)
        log_q = torch.log_softmax((ref_hidden.to(cast) @ ref_weight.to(cast).T).to(wide), -1)
        values = torch.where(labels == -100, 0, (log_q.exp() * (log_q - log_p)).sum(-1))
        return values.detach(), *torch.autograd.grad(values, (h, w), upstream.to(values.dtype))

    kl = alignloss.linear_kl(hidden, weight, ref_hidden, ref_weight, labels)
    ours = kl.detach(), *torch.autograd.grad(kl, (hidden, weight), upstream)
    assert within(ours, full(dtype), full(torch.float64))


@pytest.mark.parametrize("workspace", [None, 8 * MIB])
def test_a_step_against_float64_in_one_pass_and_recomputed(workspace):
    hidden, weight, labels = problem(dtype=torch.float32)
    ref = torch.full((4,), -150.0)

    def full(h, w):
        c, r = token_logps(h, w, labels).sum(1).chunk(2)
        return alignloss.losses.dpo_loss(c, r, *ref.to(c.dtype).chunk(2), beta=0.1)[0].mean()

    module = alignloss.DPOLoss(workspace_bytes=workspace)
    ours = gradients(lambda h, w: module(h, w, labels, ref_logps=ref).loss, hidden, weight)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for got, truth in zip(ours, gradients(full, *wide), strict=True):
        assert error(got, truth) <= 2e-5


@pytest.mark.parametrize("trains", ["hidden", "hidden weight", "step"])
def test_50_runs_are_bitwise_equal(trains):
    hidden, weight, labels = problem()
    loss_fn = alignloss.CPOLoss()
    weight.requires_grad_(trains != "hidden")
    leaves = [t for t in (hidden, weight) if t.requires_grad]

    def run():
        loss = (
            loss_fn(hidden, weight, labels).loss
            if trains == "step"
            else (alignloss.linear_logprob(hidden, weight, labels).square().sum())
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first = run()
    for _ in range(49):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("workspace", [None, MIB], ids=["one tile", "many tiles"])
def test_1000_runs_are_bitwise_equal(workspace):
    """A race between warps or programs shows now and then."""
    hidden, weight, labels = problem(N=256, H=192, V=20001)
    leaves = hidden, weight

    def run():
        logps = alignloss.linear_logprob(hidden, weight, labels, softcap=30.0, workspace_bytes=workspace)
        return [logps.detach(), *torch.autograd.grad(logps.sum(), leaves)]

    first = run()
    different = torch.zeros((), dtype=torch.int64)
    for _ in range(999):
        different += sum((a != b).sum() for a, b in zip(first, run(), strict=True))
    assert int(different) == 0


@pytest.mark.parametrize("trains", ["", "hidden", "hidden weight"])
def test_no_synchronization_with_a_token_index(trains):
    hidden, weight, labels = problem()
    hidden.requires_grad_("hidden" in trains)
    weight.requires_grad_("weight" in trains)
    index = torch.nonzero(labels.flatten() != -100).squeeze(1)
    ref = torch.zeros(4)

    def step():
        loss = alignloss.DPOLoss()(hidden, weight, labels, ref_logps=ref, token_index=index).loss
        logps = alignloss.linear_logprob(hidden, weight, labels, token_index=index)
        if trains:
            (loss + logps.sum()).backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("workspace", [None, 8 * MIB], ids=["one pass", "recomputed"])
def test_a_cuda_graph_replays_a_step_on_new_inputs(workspace):
    hidden, weight, labels = problem(dtype=torch.float32)
    index, ref = torch.arange(labels.numel()), torch.zeros(4)
    leaves = (hidden, weight)
    loss_fn = alignloss.DPOLoss(workspace_bytes=workspace)

    def step():
        loss = loss_fn(hidden, weight, labels, ref_logps=ref, token_index=index).loss
        return loss, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    with torch.no_grad():
        hidden.mul_(0.5)
        labels.fill_(7)
    graph.replay()
    for replayed, expected in zip(outputs, step(), strict=True):
        torch.testing.assert_close(replayed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_offsets_past_two_to_the_31(which):
    rows = (1 << 31) // 4096 + 512
    M, V = (rows, 1000) if which == "hidden" else (256, rows)
    hidden = torch.zeros(M, 4096, dtype=torch.bfloat16)
    weight = torch.randn(V, 4096, dtype=torch.bfloat16) / 64
    labels = torch.full((M,), -100)
    labels[-8:] = torch.arange(V - 8, V)
    hidden[-8:] = torch.randn(8, 4096)
    hidden.requires_grad_()
    weight.requires_grad_(which == "weight")
    logps = alignloss.linear_logprob(hidden, weight, labels)
    logps.sum().backward()
    tail, head = hidden.detach()[-8:].float(), weight.detach().float()
    log_softmax = torch.log_softmax(tail @ head.T, -1)
    torch.testing.assert_close(logps[-8:], log_softmax.gather(1, labels[-8:, None]).squeeze(1), rtol=0, atol=1e-3)
    picked = torch.nn.functional.one_hot(labels[-8:], V).float() - log_softmax.exp()
    assert error(hidden.grad[-8:], picked @ head) <= 1e-2
    assert float(hidden.grad[:-8].abs().max()) == 0


def test_labels_out_of_range_are_nan_rows():
    hidden, weight, labels = problem(masked=0)
    labels[0, 0], labels[1, 1] = weight.shape[0], -5
    logps = alignloss.linear_logprob(hidden, weight, labels)
    expected = torch.zeros_like(labels, dtype=torch.bool)
    expected[0, 0] = expected[1, 1] = True
    assert torch.equal(logps.isnan(), expected)
    with pytest.raises(ValueError, match="labels must lie in"):
        alignloss.linear_logprob(hidden, weight, labels, validate=True)


@pytest.mark.parametrize("trains", ["hidden", "hidden weight"])
def test_compiled_equals_eager(trains):
    hidden, weight, labels = problem(dtype=torch.float32)
    weight.requires_grad_("weight" in trains)
    ref = torch.zeros(4)
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    loss_fn = alignloss.DPOLoss()

    def loss_of(h, w):
        return loss_fn(h, w, labels, ref_logps=ref).loss

    eager = torch.autograd.grad(loss_of(hidden, weight), leaves)
    compiled = torch.autograd.grad(torch.compile(loss_of, fullgraph=True)(hidden, weight), leaves)
    for a, b in zip(eager, compiled, strict=True):
        assert error(b, a) <= 1e-5


def test_streams_do_not_disturb_each_other():
    problems = [problem() for _ in range(4)]
    alone = [gradients(lambda h, w, p=p: alignloss.SFTLoss()(h, w, p[2]).loss, *p[:2]) for p in problems]
    torch.cuda.synchronize()
    together = []
    for p in problems:
        with torch.cuda.stream(torch.cuda.Stream()):
            together.append(gradients(lambda h, w, p=p: alignloss.SFTLoss()(h, w, p[2]).loss, *p[:2]))
    torch.cuda.synchronize()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_go_to_the_device_of_the_tensors():
    hidden, weight, labels = (t.detach().to("cuda:1") for t in problem())
    logps = alignloss.linear_logprob(hidden, weight, labels)
    torch.testing.assert_close(logps, alignloss.linear_logprob(hidden, weight, labels, backend="torch"))


@pytest.mark.parametrize("workspace", [32 * MIB, 256 * MIB])
@pytest.mark.parametrize("trains", ["hidden", "hidden weight"])
def test_the_workspace_is_a_bound_and_the_plan_is_near(trains, workspace):
    N, H, V = 8192, 1024, 65536
    hidden, weight, labels = problem(N, H, V, masked=0)
    weight.requires_grad_("weight" in trains)

    def step():
        alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=workspace).sum().backward()

    step()
    hidden.grad = weight.grad = None
    peak = peak_bytes(step)
    gradient_bytes = hidden.nbytes + weight.nbytes * ("weight" in trains)
    assert peak - gradient_bytes <= workspace + N * H * 2 + 16 * MIB
    expected = alignloss.plan(N, H, V, train_head="weight" in trains, device="cuda", workspace_bytes=workspace)
    assert peak == pytest.approx(expected.peak_bytes, rel=0.1, abs=8 * MIB)


@pytest.mark.parametrize("trains", ["hidden", "hidden weight"])
def test_out_of_memory_says_which_workspace_would_fit(trains):
    N, H, V = 8192, 1024, 131072
    hidden, weight, labels = problem(N, H, V, masked=0)
    weight.requires_grad_("weight" in trains)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = 2 * hidden.nbytes + 2 * weight.nbytes + 256 * MIB
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + room) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="would fit") as caught:
            alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=8 << 30).sum().backward()
        hidden.grad = weight.grad = None
        (fits,) = re.findall(r"workspace_bytes=(\d+) would fit", str(caught.value))
        alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=int(fits)).sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert hidden.grad.isfinite().all()
