"""Peak memory: the workspace is a bound, and the fused step stays far below the logits."""

import pytest
import torch
from reference import error, token_logps

import alignloss
from alignloss.commands.measure import peak_bytes
from alignloss.ops import cpu_bf16

MIB = 1 << 20
H, V = 128, 8192


@pytest.fixture(autouse=True)
def _plain_products(monkeypatch):
    """With its matrix units oneDNN takes a copy of a tile for itself, beside the tensors that are counted here."""
    monkeypatch.setattr(cpu_bf16, "available", lambda: False)


def vectors(positions):
    """Bytes for a position of what has no H or V: labels, index, seven sums, log-probabilities and their gradients."""
    return 256 * positions + 64 * 1024


def step_peak(N, dtype, trained, workspace, **options):
    """Peak bytes of forward and backward above inputs and required gradients, half of the positions masked."""
    hidden = torch.randn(2 * N, H).to(dtype).requires_grad_("hidden" in trained)
    weight = (torch.randn(V, H) * H**-0.5).to(dtype).requires_grad_("weight" in trained)
    labels = torch.randint(0, V, (2 * N,))
    labels[::2] = -100

    def step():
        alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=workspace, **options).sum().backward()

    peak = peak_bytes(step)
    return peak - sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "workspace"),
    [
        (4096, 32 * MIB),
        (4096, 256 * MIB),
        pytest.param(16384, 32 * MIB, marks=pytest.mark.nightly),
        pytest.param(16384, 256 * MIB, marks=pytest.mark.nightly),
    ],
)
def test_the_workspace_is_a_bound(N, workspace, dtype, trained):
    saved = N * H * dtype.itemsize
    assert step_peak(N, dtype, trained, workspace) <= workspace + saved + vectors(2 * N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [32 * MIB, 256 * MIB])
def test_the_workspace_is_a_bound_in_one_pass(workspace, dtype):
    sequences, length = 32, 128
    hidden = torch.randn(sequences, length, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * H**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (sequences, length))
    module = alignloss.SFTLoss(workspace_bytes=workspace)
    peak = peak_bytes(lambda: module(hidden, weight, labels).loss.backward())
    assert peak - 2 * hidden.nbytes - weight.nbytes <= workspace + vectors(sequences * length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_the_workspace_is_a_bound_in_one_pass_for_any_layout_of_the_head(layout, dtype):
    hidden = torch.randn(4, 20, H).to(dtype).requires_grad_()
    weight = torch.randn(H, V).to(dtype).T if layout == "transposed" else torch.randn(V, 2 * H).to(dtype)[:, ::2]
    weight.requires_grad_()
    labels = torch.randint(0, V, (4, 20))
    module = alignloss.SFTLoss(workspace_bytes=4 * MIB)
    peak = peak_bytes(lambda: module(hidden, weight, labels).loss.backward())
    gradients = hidden.nbytes + weight.grad.nbytes
    assert peak - gradients - hidden.nbytes <= 4 * MIB + vectors(80)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (-token_logps(*exact, labels).mean()).backward()
    assert error(weight.grad, exact[1].grad) <= (2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.nightly
def test_groups_of_one_pass_share_a_widened_bias():
    sequences, length, vocabulary = 32, 8, 32768
    hidden = torch.randn(sequences, length, 16).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, 16).bfloat16().requires_grad_()
    bias = torch.randn(vocabulary).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (sequences, length))
    # float32 logits of a sequence take 1 MiB, the shared dweight 2 MiB
    module = alignloss.SFTLoss(workspace_bytes=4 * MIB)
    tokens, pairs = sequences * length, {"pair_tokens": length, "workspace_bytes": 4 * MIB, "device": "cpu"}
    assert alignloss.plan(tokens, 16, vocabulary, train_head=True, bias=True, **pairs).groups >= 16
    plain, biased = (peak_bytes(lambda b=b: module(hidden, weight, labels, b).loss.backward()) for b in (None, bias))
    assert biased - plain <= 6 * 4 * vocabulary  # widened, its gradient in two dtypes, and transient copies


def test_a_bf16_head_has_no_fp32_gradient():
    V, H = 65536, 512
    hidden = torch.randn(256, H).bfloat16().requires_grad_()
    weight = (torch.randn(V, H) * H**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (256,))
    fp32_head = 4 * V * H
    for workspace in (16 * MIB, 64 * MIB):

        def step(workspace=workspace):
            alignloss.linear_logprob(hidden, weight, labels, workspace_bytes=workspace).sum().backward()

        hidden.grad = weight.grad = None
        peak = peak_bytes(step) - hidden.nbytes - weight.nbytes
        assert peak < fp32_head / 1.9


@pytest.mark.nightly_where(lambda softcap, workspace, **_: (softcap is None) == (workspace == 2 * MIB))
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("trained", ["hidden", "weight", "hidden weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [2 * MIB, 8 * MIB])
def test_the_workspace_is_a_bound_with_softcap_and_entropy(workspace, dtype, trained, softcap):
    N = 500
    hidden = torch.randn(N, H).to(dtype).requires_grad_("hidden" in trained)
    weight = (torch.randn(V, H) * H**-0.5).to(dtype).requires_grad_("weight" in trained)
    labels = torch.randint(0, V, (N,))

    def step():
        stats = alignloss.linear_logprob_stats(
            hidden, weight, labels, stats=("entropy",), softcap=softcap, workspace_bytes=workspace
        )
        (stats.logps + stats.entropy).sum().backward()

    gradients = sum(t.nbytes for t in (hidden, weight) if t.requires_grad)
    saved = 2 * hidden.nbytes * ("hidden" in trained)
    assert peak_bytes(step) - gradients <= workspace + saved + vectors(N)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [2 * MIB, 8 * MIB])
def test_the_workspace_is_a_bound_of_the_kl(workspace, dtype, trained):
    N = 500
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * H**-0.5).to(dtype).requires_grad_("weight" in trained)
    reference, labels = hidden.detach().roll(1, 0), torch.randint(0, V, (N,))

    def step():
        kl = alignloss.linear_kl(hidden, weight, reference, weight.detach(), labels, workspace_bytes=workspace)
        kl.sum().backward()

    gradients = hidden.nbytes + weight.nbytes * weight.requires_grad
    assert peak_bytes(step) - gradients <= workspace + 4 * hidden.numel() + vectors(N)


def test_a_fused_step_peaks_under_an_eighth_of_full_logits():
    N = 8192
    fused = step_peak(N, torch.float32, "hidden weight", None)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    full = peak_bytes(lambda: token_logps(hidden, weight, labels).sum().backward()) - hidden.nbytes - weight.nbytes
    assert fused < full / 8
