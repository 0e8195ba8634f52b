"""What a GPU runs, without one: its sizes, operand dtypes and GEMMs on CPU tensors, and its launches compiled for it.

On a CPU the ops widen 16-bit operands; here they do as on a GPU: tiles rounded in place to 16 bits for the second GEMM,
fp32 products of 16-bit operands, tall tiles. On `_torch`, or with `--emulate` on kernels compiled for a GPU.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from alignloss.kernels import blocks
from reference import (
    as_on_a_gpu,
    error,
    inputs,
    leaf,
    replace_kernels,
    replace_products,
    statistics,
    token_logps,
    within,
)
from torch.utils._python_dispatch import TorchDispatchMode

import alignloss
from alignloss.backends import _torch, _triton
from alignloss.commands.measure import peak_bytes
from alignloss.modules import groups
from alignloss.ops import onepass, walk
from alignloss.ops.walk import addmm as real_addmm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the other tests run on it")
B, T, H, V = 2, 8, 48, 133
RUNS = [("triton" if emulator.emulated else "torch", dtype) for dtype in (torch.bfloat16, torch.float16)]
CAPS = [None, 2.0]
# bytes: one tile of everything; groups of pairs in one pass; several blocks of rows and slices of the vocabulary
AMPLE, GROUPS, TIGHT = 1 << 22, 56_000, 9_000
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)
    # wherever the kernels that write exponentials run: heads with a bias go the other way
    for name in ("EXPONENTIALS", "CAPPED_EXPONENTIALS"):
        monkeypatch.setattr(blocks, name, ("sm_90", "sm_100"))


@pytest.fixture
def passes(monkeypatch):
    """The number of groups of each step that runs in one pass."""
    counts = []

    def one_pass(projection, indices, *rest):
        counts.append(len(indices))
        return onepass.one_pass(projection, indices, *rest)

    monkeypatch.setattr(groups, "one_pass", one_pass)
    return counts


def problem(dtype, sequences=2 * B):
    """hidden, weight, bias exactly as `dtype` holds them, in float64, and labels."""
    *tensors, labels = inputs(sequences, T, hidden_size=H, vocabulary=V)
    return *(t.to(dtype).double() for t in tensors), labels


def naive_logits(h, w, b, cap):
    """In the dtype of the operands up to the logits, in fp32 after them."""
    z = (h @ w.T + b).to(torch.promote_types(h.dtype, torch.float32))
    return z if cap is None else cap * torch.tanh(z / cap)


def naive_logps(h, w, b, labels, cap):
    picked = naive_logits(h, w, b, cap).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels == -100, 0, picked)


def check(ours, naive, exact, tensors, dtype, trained, beyond=0.0):
    """Outputs and gradients of functions of (hidden, weight, bias) err at most twice as much as plain torch."""
    results = []
    for compute, cast in ((ours, dtype), (naive, dtype), (exact, torch.float64)):
        leaves = [leaf(t, cast, name in trained) for t, name in zip(tensors, ("hidden", "weight", "bias"), strict=True)]
        outputs = compute(*leaves)
        if trained:
            sum((o.double() * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() for o in outputs).backward()
        results.append([o.detach() for o in outputs] + [t.grad for t in leaves if t.grad is not None])
    assert within(*results, beyond=beyond)


@pytest.mark.emulated
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("workspace", [AMPLE, TIGHT])
@pytest.mark.parametrize("trained", ["", "hidden", "hidden weight", "hidden weight bias"], ids=lambda t: t or "nothing")
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_log_probabilities(backend, dtype, trained, workspace, cap):
    *tensors, labels = problem(dtype)
    options = {"softcap": cap, "backend": backend, "workspace_bytes": workspace}
    biased = "bias" in trained or not trained
    check(
        lambda h, w, b: [alignloss.linear_logprob(h, w, labels, b if biased else None, **options)],
        lambda h, w, b: [naive_logps(h, w, b if biased else 0, labels, cap)],
        lambda h, w, b: [token_logps(h, w, labels, b if biased else None, softcap=cap)],
        tensors, dtype, trained,
    )  # fmt: skip


@pytest.mark.emulated
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_statistics_and_the_gradient_of_the_entropy(backend, dtype, cap):
    *tensors, labels = problem(dtype)
    names = ("lse", "entropy", "mean_logits", "log_sum_sq_probs")
    ignored = labels == -100

    def ours(h, w, b):
        out = alignloss.linear_logprob_stats(
            h, w, labels, b, stats=names, softcap=cap, backend=backend, workspace_bytes=TIGHT
        )
        return [out.logps, *(getattr(out, name) for name in names)]

    def naive(h, w, b):
        z = naive_logits(h, w, b, cap)
        p = z.softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        others = [z.logsumexp(-1), entropy, z.mean(-1), p.square().sum(-1).log()]
        others = [value if value is entropy else value.detach() for value in others]
        return [naive_logps(h, w, b, labels, cap), *(torch.where(ignored, 0, value) for value in others)]

    def exact(h, w, b):
        values = statistics(h, w, labels, b, softcap=cap)
        values = [values[name] if name == "entropy" else values[name].detach() for name in names]
        return [token_logps(h, w, labels, b, softcap=cap), *values]

    check(ours, naive, exact, tensors, dtype, "hidden weight bias")


@pytest.mark.emulated
@pytest.mark.parametrize("workspace", [AMPLE, GROUPS, TIGHT], ids=["one pass", "groups", "recomputed"])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_training_steps(backend, dtype, biased, cap, workspace, passes):
    *tensors, labels = problem(dtype, 8 * B)
    ref = torch.randn(8 * B, dtype=torch.float64) - 30
    module = alignloss.DPOLoss(softcap=cap, backend=backend, workspace_bytes=workspace)

    def full(h, w, b):
        c, r = naive_logps(h, w, b if biased else 0, labels, cap).double().sum(-1).chunk(2)
        return [alignloss.losses.dpo_loss(c, r, *ref.chunk(2), beta=0.1)[0].mean()]

    check(
        lambda h, w, b: [module(h, w, labels, b if biased else None, ref_logps=ref).loss],
        full, full, tensors, dtype, "hidden weight bias" if biased else "hidden weight",
    )  # fmt: skip
    # the sums of several groups in fp16 would need one scale
    several = workspace == GROUPS and dtype == torch.bfloat16
    assert [min(count, 2) for count in passes] == [1] * (workspace == AMPLE) + [2] * several


@pytest.mark.emulated
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_sequences_of_one_token(backend, dtype):
    *tensors, labels = problem(dtype)
    tensors[0], labels = tensors[0][:, :1], labels[:, :1].clamp(min=0)
    module = alignloss.DPOLoss(backend=backend)
    ref = torch.linspace(-6, -4, 2 * B, dtype=torch.float64)

    def full(h, w, b):
        c, r = naive_logps(h, w, 0, labels, None).double().sum(-1).chunk(2)
        return [alignloss.losses.dpo_loss(c, r, *ref.chunk(2), beta=0.1)[0].mean()]

    check(lambda h, w, b: [module(h, w, labels, ref_logps=ref).loss], full, full, tensors, dtype, "hidden weight")


def confident(dtype, alike, gap):
    """hidden, weight, bias, labels: nearly all the probability on some tokens, alike, of a head of similar rows.

    They lie in a late slice, `gap` nats above the first token and 20 more above all others, of which is the target.
    """
    hidden, weight = torch.zeros(2 * B, T, H), torch.randn(V, H) + 8 * torch.randn(H)
    weight[-5 : -5 + alike] = weight[-5]
    weight[:, -2], weight[:, -1] = -1, 0
    weight[0, -2], weight[-5 : -5 + alike, -2:] = 0, torch.tensor([0.0, 1.0])
    hidden[..., -2], hidden[..., -1] = 20, gap + 0.37 * torch.rand(2 * B, T)
    tensors = [t.to(dtype).double() for t in (hidden, weight, torch.zeros(V))]
    return *tensors, torch.randint(1, 100, (2 * B, T))


@pytest.mark.emulated
@pytest.mark.parametrize("gap", [7, 19, 90])
@pytest.mark.parametrize("alike", [1, 4])
@pytest.mark.parametrize("route", ["one slice", "slices", "slices, with a bias", "one pass", "recomputed"])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_what_the_rows_of_a_head_share_leaves_the_gradient(backend, dtype, route, alike, gap):
    *tensors, labels = confident(dtype, alike, gap)
    workspace = AMPLE if route in ("one slice", "one pass") else TIGHT
    options, trains = {"backend": backend, "workspace_bytes": workspace}, route in ("one pass", "recomputed")
    module, ref = alignloss.DPOLoss(**options), torch.zeros(2 * B, dtype=torch.float64)

    def full(h, w, b):
        logps = naive_logps(h, w, 0, labels, None).double()
        c, r = logps.sum(-1).chunk(2)
        return [alignloss.losses.dpo_loss(c, r, *ref.chunk(2), beta=0.1)[0].mean()] if trains else [logps]

    def ours(h, w, b):
        if trains:
            return [module(h, w, labels, ref_logps=ref).loss]
        return [alignloss.linear_logprob(h, w, labels, b if "bias" in route else None, **options)]

    # a loss in fp32 may be exact by luck
    check(ours, full, full, tensors, dtype, "hidden weight" if trains else "hidden", beyond=2e-7)


@pytest.mark.emulated
@pytest.mark.skipif(emulator.emulated not in ("sm_90", "sm_100"), reason="kernels that a copy engine feeds")
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("gap", [7, 35, 90])
@pytest.mark.parametrize("trained", ["", "weight"], ids=lambda t: t or "nothing")
def test_a_forward_relative_to_the_targets(trained, gap, fixed, monkeypatch):
    """Of targets `gap` + 20 nats below the likeliest token, some of them that token itself."""
    monkeypatch.setattr(blocks, "FIXED_REFERENCE", ("sm_90", "sm_100") if fixed else ())
    *tensors, labels = confident(torch.bfloat16, 1, gap)
    labels[::2] = V - 5
    launched = []
    for name in ("sums_fwd", "stats_fwd"):
        module = getattr(_triton, f"{name.split('_')[0]}_kernels")
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, real=real: (launched.append(n), real(*a)))
    check(
        lambda h, w, b: [alignloss.linear_logprob(h, w, labels, backend="triton", workspace_bytes=TIGHT)],
        lambda h, w, b: [naive_logps(h, w, 0, labels, None)],
        lambda h, w, b: [token_logps(h, w, labels, None)],
        tensors, torch.bfloat16, trained, beyond=2e-7,  # half a unit in the last place of fp32, which is 0 by luck
    )  # fmt: skip
    assert set(launched) == {"sums_fwd" if fixed else "stats_fwd"}


@pytest.mark.emulated
@pytest.mark.skipif(emulator.emulated not in ("sm_90", "sm_100"), reason="kernels that a copy engine feeds")
@pytest.mark.nightly_where(lambda trained, size, cap: (cap in (2.0, 30.0)) != (size == 3))
@pytest.mark.parametrize("cap", [2.0, 30.0, 60.0, 61.0])
@pytest.mark.parametrize("size", [0.1, 3, 100])
@pytest.mark.parametrize("trained", ["", "hidden", "hidden weight"], ids=lambda t: t or "nothing")
def test_a_softcap_that_bounds_logits_gives_their_exponentials_to_the_gemm(trained, size, cap, monkeypatch):
    """Of logits about `size` times the cap, tokens beyond one block of rows, and entries beyond one tile."""
    torch.manual_seed(int(cap))
    hidden, weight, labels = torch.randn(2, 70, H), torch.randn(300, H), torch.randint(0, 300, (2, 70))
    hidden *= size * cap / H**0.5
    tensors = [t.bfloat16().double() for t in (hidden, weight, torch.zeros(300))]
    labels[0, ::3] = -100
    launched = []
    for module, name in ((_triton.sums_kernels, "sums_fwd"), (_triton.exps_kernels, "exps_fwd")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, real=real: (launched.append(n), real(*a)))
    options = {"softcap": cap, "backend": "triton"}

    def ours(h, w, b):
        if trained != "hidden weight":
            return [alignloss.linear_logprob(h, w, labels, **options)]
        return [alignloss.SFTLoss(**options)(h, w, labels).loss]

    def full(h, w, b):
        logps = naive_logps(h, w, 0, labels, cap)
        return [logps] if trained != "hidden weight" else [-logps.sum() / (labels != -100).sum()]

    check(ours, full, full, tensors, torch.bfloat16, trained, beyond=2e-7)
    assert set(launched) == ({"exps_fwd" if trained else "sums_fwd"} if cap <= 60 else set())


@pytest.mark.emulated
@pytest.mark.parametrize("trained", ["hidden", "hidden weight"])
@pytest.mark.parametrize("gap", [7, 12, 19])
@pytest.mark.parametrize("alike", [1, 4])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_the_entropy_of_a_model_that_is_nearly_certain(backend, dtype, alike, gap, trained):
    *tensors, labels = confident(dtype, alike, gap)
    options = {"stats": ("entropy",), "backend": backend, "workspace_bytes": TIGHT}
    check(
        lambda h, w, b: [alignloss.linear_logprob_stats(h, w, labels, b, **options).entropy],
        lambda h, w, b: [torch.special.entr(naive_logits(h, w, b, None).softmax(-1)).sum(-1)],
        lambda h, w, b: [statistics(h, w, labels, b)["entropy"]],
        tensors, dtype, trained, beyond=2e-7,
    )  # fmt: skip


@pytest.mark.emulated
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("kind", ["flat", "random", "one above a flat tail"])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_the_entropy_of_a_head_whose_rows_share_a_large_part(backend, dtype, kind, cap):
    """Whatever the logits, nothing of what the rows share is left in the gradient."""
    hidden, weight = torch.randn(2 * B, T, H), torch.randn(V, H) + 8 * torch.randn(H)
    if kind == "random":
        hidden -= (hidden @ weight.mean(0))[..., None] * weight.mean(0) / weight.mean(0).square().sum()
        hidden *= 0.1
    else:
        hidden = torch.zeros_like(hidden)
        hidden[..., -1] = 3 * torch.rand(2 * B, T)
        weight[:, -1] = 0 if kind == "one above a flat tail" else 0.01 * torch.randn(V)
        weight[7, -1] = 1 if kind == "one above a flat tail" else 0
    tensors = [t.to(dtype).double() for t in (hidden, weight, torch.zeros(V))]
    labels, options = torch.randint(0, V, (2 * B, T)), {"softcap": cap, "backend": backend, "workspace_bytes": TIGHT}
    check(
        lambda h, w, b: [alignloss.linear_logprob_stats(h, w, labels, stats=("entropy",), **options).entropy],
        lambda h, w, b: [torch.special.entr(naive_logits(h, w, 0, cap).softmax(-1)).sum(-1)],
        lambda h, w, b: [statistics(h, w, labels, softcap=cap)["entropy"]],
        tensors, dtype, "hidden weight", beyond=2e-7,
    )  # fmt: skip


@pytest.mark.emulated
@pytest.mark.parametrize("trained", ["", "hidden", "weight", "hidden weight"], ids=lambda t: t or "nothing")
@pytest.mark.parametrize("vocabulary", [1, 2])
@pytest.mark.parametrize(("backend", "dtype"), [*RUNS, (RUNS[0][0], torch.float32)])
def test_a_vocabulary_of_one_or_two(backend, dtype, vocabulary, trained):
    """Numbers that Triton makes constants."""
    tensors = [torch.randn(size).to(dtype).double() for size in ((3, 5, 16), (vocabulary, 16), (vocabulary,))]
    labels = torch.randint(0, vocabulary, (3, 5))
    check(
        lambda h, w, b: [alignloss.linear_logprob(h, w, labels, backend=backend)],
        lambda h, w, b: [naive_logps(h, w, 0, labels, None)],
        lambda h, w, b: [token_logps(h, w, labels)],
        tensors, dtype, trained, beyond=2e-6,
    )  # fmt: skip


@pytest.mark.emulated
@pytest.mark.parametrize("target", [1e5, 1e10, -1e10, 1e30, -1e30])
def test_a_target_whose_logit_is_huge(target):
    """Beside others whose exponentials leave the range of float32."""
    hidden, weight = torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(V, 16, dtype=torch.bfloat16)
    hidden[0, :2] = torch.tensor([1.0, 100.0])
    weight[:, 1] = torch.linspace(2, 5, V)
    weight[0, :2] = torch.tensor([target, 0.0])
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        h, labels = leaf(hidden, dtype), torch.tensor([0])
        backend = RUNS[0][0] if dtype == torch.bfloat16 else "torch"
        logps = alignloss.linear_logprob(h, weight.to(dtype), labels, backend=backend)
        logps.sum().backward()
        found.append((logps.detach().double(), h.grad.double()))
    for exact, got in zip(*found, strict=True):
        assert got.isfinite().all() and float((got - exact).norm()) <= 1e-2 * float(exact.norm())


@pytest.mark.emulated
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_the_divergence_of_two_heads(backend, dtype):
    hidden, weight, bias, labels = problem(dtype)
    ref_hidden, ref_weight, ref_bias, _ = problem(dtype)

    def full(h, w, b):
        log_p = naive_logits(h, w, b, 2.0).log_softmax(-1)
        log_q = naive_logits(*(t.to(h.dtype) for t in (ref_hidden, ref_weight, ref_bias)), 2.0).log_softmax(-1)
        return [torch.where(labels == -100, 0, (log_q.exp() * (log_q - log_p)).sum(-1))]

    def ours(h, w, b):
        reference = (t.to(dtype) for t in (ref_hidden, ref_weight))
        return [
            alignloss.linear_kl(
                *(h, w, *reference, labels, b, ref_bias.to(dtype)),
                softcap=2.0,
                backend=backend,
                workspace_bytes=60_000,
            )
        ]

    check(ours, full, full, (hidden, weight, bias), dtype, "hidden weight bias")


def test_a_scaled_loss_in_fp16_with_a_float32_head():
    hidden, weight, _, labels = inputs(3, 6)
    exact, mine = ([leaf(hidden, dtype), leaf(weight, dtype)] for dtype in (torch.float64, torch.float32))
    (token_logps(*exact, labels).sum() * 65536).backward()
    with torch.autocast("cpu", torch.float16):
        logps = alignloss.linear_logprob(*mine, labels)
    (logps.sum() * 65536).backward()
    for ours, theirs in zip(mine, exact, strict=True):
        assert error(ours.grad, theirs.grad) <= 2e-3


@pytest.mark.parametrize("beta", [0, 1])
def test_wide_products_where_addmm_takes_no_wide_base(beta, monkeypatch):
    def mm(a, b, dtype, out=None):
        product = a.to(dtype) @ b.to(dtype)
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(walk, "_ADDMM_TAKES_A_WIDE_BASE", False)
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    out = torch.randn(3, 5) if beta else torch.full((3, 5), torch.nan)
    expected = 0.5 * (a.float() @ b.float()) + (out if beta else 0)
    real_addmm(out, a, b, beta=beta, alpha=0.5)
    torch.testing.assert_close(out, expected)


@pytest.mark.nightly_where(
    lambda softcap, masked, workspace, **_: softcap is not None or (masked == 0) != (workspace == 64 * MIB)
)
@pytest.mark.parametrize("workspace", [8 * MIB, 64 * MIB, 1024 * MIB])
@pytest.mark.parametrize("masked", [0, 0.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "trained", ["", "nothing, fixed", "hidden", "hidden weight", "step"], ids=lambda t: t or "nothing"
)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_call_allocates_what_the_plan_says(with_bias, stored, trained, softcap, masked, workspace, monkeypatch):
    """Within 2 % of the bytes that the kernels of a GPU are given; nothing is computed here."""
    pytest.importorskip("triton")
    stand_in(monkeypatch, lambda module, name: Launches())
    replace_products(monkeypatch, lambda *arguments, **options: None)
    if trained == "nothing, fixed":
        monkeypatch.setattr(blocks, "FIXED_REFERENCE", ("sm_90",))
        trained = ""
    S, length, width, vocabulary = 8, 512, 512, 49152
    hidden = torch.zeros(S, length, width, dtype=stored, requires_grad=bool(trained))
    weight = torch.zeros(vocabulary, width, dtype=stored, requires_grad=trained in ("hidden weight", "step"))
    bias = torch.zeros(vocabulary, dtype=stored, requires_grad=weight.requires_grad) if with_bias else None
    labels = torch.zeros(S, length, dtype=torch.int64)
    labels[:, : int(length * masked)] = -100
    options = {"softcap": softcap, "backend": "triton", "workspace_bytes": workspace}
    loss_fn = alignloss.DPOLoss(**options)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=stored == torch.float32):
            if trained == "step":
                loss = loss_fn(hidden, weight, labels, bias, ref_logps=torch.zeros(S)).loss
            else:
                loss = alignloss.linear_logprob(hidden, weight, labels, bias, **options).sum()
        if trained:
            loss.backward()

    call()
    hidden.grad = weight.grad = None
    if bias is not None:
        bias.grad = None
    tokens = int((labels != -100).sum())
    expected = alignloss.plan(
        *(tokens, width, vocabulary),
        train_hidden=bool(trained),
        train_head=weight.requires_grad,
        pair_tokens=2 * tokens // S if trained == "step" else None,
        positions=labels.numel(),
        bias=with_bias,
        weight_dtype=stored,
        device="cuda",
        device_memory=80 << 30,
        **options,
    )
    assert expected.workspace_bytes <= workspace + 4 * vocabulary * with_bias  # the tiles, and the widened bias
    assert peak_bytes(call) == pytest.approx(expected.peak_bytes, rel=0.02)


def test_a_transposed_head_stays_within_the_workspace(monkeypatch):
    stand_in(monkeypatch, lambda module, name: Launches())
    replace_products(monkeypatch, lambda *arguments, **options: None)
    hidden = torch.zeros(64, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(256, 50257, dtype=torch.bfloat16).T.requires_grad_()
    labels = torch.zeros(64, dtype=torch.int64)

    def call():
        alignloss.linear_logprob(hidden, weight, labels, backend="triton", workspace_bytes=8 * MIB).sum().backward()

    call()
    hidden.grad = weight.grad = None
    assert peak_bytes(call) - weight.nbytes - hidden.nbytes <= 8.5 * MIB


def stand_in(monkeypatch, replacement):
    """Put replacement(module, name) in place of every kernel, and Hopper's block sizes in that of the interpreter's."""
    replace_kernels(monkeypatch, lambda module, name, kernel: replacement(module.__name__, name))
    monkeypatch.setattr(blocks, "architecture", lambda device: "sm_90")


@pytest.mark.nightly
@pytest.mark.parametrize("extent", [["--first-and-last"], []], ids=["", "every case"])
@pytest.mark.parametrize(
    "name",
    [f"test_{n}.py" for n in ("kernels", "onepass", "exactness")],
)
def test_what_runs_on_a_gpu_gets_as_far_as_its_kernels(name, extent):
    """Devices that mix, autocast of another device, sizes of a CPU: see `pretended_gpu`."""
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    arguments = [
        "-q",
        "-p",
        "pretended_gpu",
        "-p",
        "no:cacheprovider",
        "-k",
        "not gradcheck",
        *extent,
    ]  # thousands of calls
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, str(tests / name)],
        capture_output=True,
        text=True,
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": str(tests)},
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_what_pretends_to_be_a_gpu_refuses_to_mix_devices():
    pytest.importorskip("triton")
    program = "import pretended_gpu, torch; torch.zeros(2, device='cuda') + torch.zeros(2)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "tests"},
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert "expected all tensors to be on the same device" in done.stderr


class Waits(TorchDispatchMode):
    """An error where a GPU would have to be waited for: a value read on the host, a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("workspace", [AMPLE, GROUPS, TIGHT])
@pytest.mark.parametrize("trained", ["", "hidden", "hidden weight bias"], ids=lambda t: t or "nothing")
def test_nothing_waits_for_the_gpu_with_a_token_index(trained, workspace, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("copies between host and device")

    *tensors, labels = problem(torch.bfloat16)
    h, w, b = (
        leaf(t, torch.bfloat16, name in trained) for t, name in zip(tensors, ("hidden", "weight", "bias"), strict=True)
    )
    ref = torch.zeros(2 * B)
    options = {"workspace_bytes": workspace, "validate": False}
    given = {"token_index": torch.arange(2 * B * T)}
    packed, offsets = (h.flatten(0, 1), w, labels.flatten(), b), torch.tensor([0, 3, 10, 25, 2 * B * T])
    mixture = alignloss.MixtureLoss(
        [alignloss.DPOLoss(), alignloss.PreferenceLoss("simpo", beta=2.0, gamma=1.0)], [0.5, 0.5], **options
    )
    for name in ("tolist", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    monkeypatch.setattr(torch, "tensor", refused)
    # which looks at its flags on a CPU alone
    monkeypatch.setattr(_torch, "_may_hold", lambda flags: True)
    with Waits():
        results = [
            alignloss.linear_logprob(h, w, labels, b, **given, **options),
            alignloss.linear_logprob_stats(h, w, labels, b, stats=("entropy",), **given, **options).entropy,
            alignloss.sequence_logprob(*packed, cu_seqlens=offsets, **given, **options).logps,
            alignloss.linear_kl(h, w, h.detach(), w.detach(), labels, b, **given, **options),
            alignloss.DPOLoss(**options)(h, w, labels, b, ref_logps=ref, **given, num_sequences=4).loss,
            alignloss.CPOLoss(**options)(*packed, cu_seqlens=offsets, **given).loss,
            alignloss.ORPOLoss(**options)(h, w, labels, b, pair_weights=torch.ones(B), **given).loss,
            alignloss.KTOLoss(**options)(h, w, labels, b, ref_logps=ref, desirable=ref == 0, kl=0.1, **given).loss,
            alignloss.SFTLoss(**options)(h, w, labels, b, **given).loss,
            mixture(h, w, labels, b, ref_logps=ref, **given).loss,
        ]
        for result in results:
            if trained:
                result.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_groups_wait_once_and_before_the_first_gemm(packed, passes, monkeypatch):
    *tensors, labels = problem(torch.bfloat16, 4 * B)
    h, w, b = (leaf(t, torch.bfloat16) for t in tensors)
    batch, layout = (h, w, labels, b), {}
    if packed:
        batch = (h.flatten(0, 1), w, labels.flatten(), b)
        layout = {"cu_seqlens": torch.tensor([0, 3, 10, 18, 24, 33, 40, 48, 4 * B * T])}
    loss_fn = alignloss.DPOLoss(workspace_bytes=GROUPS, validate=False)
    ref, events = torch.zeros(4 * B), []

    def noted(event, real):
        return lambda *args, **options: (events.append(event), real(*args, **options))[1]

    for name in ("tolist", "item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, noted("wait", getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "nonzero", noted("wait", torch.nonzero))
    monkeypatch.setattr(torch, "tensor", noted("copy", torch.tensor))
    replace_products(monkeypatch, noted("gemm", walk.addmm))
    loss_fn(*batch, ref_logps=ref, **layout).loss.backward()
    assert passes[0] > 1
    before, after = events[: events.index("gemm")], events[events.index("gemm") :]
    assert before.count("wait") == 2  # which positions are scored, and how many are whose
    assert set(after) == {"gemm"}


COMPILE = """
import importlib, json, sys

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    get_current_stream = lambda self, device=None: 0


class Unaligned(MockTensor):
    data_ptr = staticmethod(lambda: 8)


def argument(kind, value, *aligned):
    if kind == "tensor":
        return (MockTensor if aligned[0] else Unaligned)(getattr(torch, value))
    if kind == "blocks":
        return TensorDescriptor(MockTensor(getattr(torch, value)), [16, 16], [16, 1], aligned[0])
    return tl.dtype(value) if kind == "type" else value


driver.set_active(Hopper())
for module, name, arguments, options in json.load(sys.stdin):
    options = {key: argument(*value) for key, value in options.items()}
    kernel = getattr(importlib.import_module(module), name)
    compiled = kernel.warmup(*(argument(*value) for value in arguments), grid=(1,), **options)
    assert compiled.metadata.shared <= 227 << 10, name
"""


@pytest.mark.nightly  # by day the emulator compiles them
def test_every_launch_compiles_with_the_types_it_is_given(monkeypatch):
    pytest.importorskip("triton")
    launches = set()
    stand_in(monkeypatch, lambda module, name: Recorder(module, name, launches))
    offsets, every = torch.tensor([0, 3, 10, 25, 2 * B * T]), torch.arange(2 * B * T)
    for dtype, softcap, trained, plain in itertools.product(
        (torch.bfloat16, torch.float32), CAPS, ("", "hidden", "hidden weight bias"), (True, False)
    ):
        *tensors, labels = problem(dtype)
        h, w, b = (
            leaf(t, dtype, name in trained) for t, name in zip(tensors, ("hidden", "weight", "bias"), strict=True)
        )
        options = {"softcap": softcap, "backend": "triton", "workspace_bytes": AMPLE if plain else TIGHT}
        packed = h.flatten(0, 1), w, labels.flatten()
        data = {"ref_logps": torch.zeros(2 * B)}
        unpaired = data | {"desirable": torch.arange(2 * B) % 2, "kl": 0.1 if plain else torch.rand(2 * B)}
        if not plain:
            data |= {"pair_weights": torch.rand(B), "num_sequences": 2, "token_weights": torch.rand(labels.shape)}
        score = alignloss.linear_logprob_stats
        results = [
            alignloss.linear_logprob(h, w, labels, None if plain else b, token_index=every, **options),
            score(h, w, labels, b, stats=("entropy", "is_top1", "lse"), **options).entropy,
            score(h, w, labels, stats=("mean_logits", "log_sum_sq_probs"), **options).logps,
            alignloss.sequence_logprob(h, w, labels, **options).logps,
            alignloss.sequence_logprob(*packed, cu_seqlens=offsets, token_weights=torch.rand(32), **options).logps,
            alignloss.DPOLoss(**options)(h, w, labels, **data).loss,
            alignloss.IPOLoss(**options)(h, w, labels, b, **data).loss,
            alignloss.KTOLoss(**options)(h, w, labels, **unpaired).loss,
            alignloss.CPOLoss(**options)(*packed, cu_seqlens=offsets, num_tokens=30).loss,
            alignloss.ORPOLoss(**options)(h, w, labels).loss,
            alignloss.linear_kl(h, w, h.detach(), w.detach(), labels, **options),
        ]
        for result in results:
            if result.requires_grad:
                result.sum().backward()
    names = {json.loads(launch)[1] for launch in launches}
    assert len(names) == 22  # every kernel
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=f"[{','.join(sorted(launches))}]",
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr


class Launches:
    """Stands for a kernel and runs nothing."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        pass


class Recorder(Launches):
    """Notes the launches of a kernel by what the compiler goes by."""

    def __init__(self, module, name, launches):
        self.module, self.name, self.launches = module, name, launches

    def __call__(self, *arguments, **options):
        given = [self.describe(value) for value in arguments]
        constants = {name: ["value", v] if isinstance(v, int) else self.describe(v) for name, v in options.items()}
        self.launches.add(json.dumps([self.module, self.name, given, constants]))

    @staticmethod
    def describe(value):
        if isinstance(value, torch.Tensor):
            return ["tensor", str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0]
        if hasattr(value, "block_shape"):
            return ["blocks", str(value.base.dtype).removeprefix("torch."), value.block_shape]
        if isinstance(value, float):
            return ["value", 0.5]
        if isinstance(value, int):  # 1, a multiple of 16, or another number
            return ["value", 1 if value == 1 else 16 if value % 16 == 0 else 7]
        return ["value", value] if value is None or isinstance(value, str) else ["type", str(value)]
