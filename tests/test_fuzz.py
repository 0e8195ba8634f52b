"""Calls of any shape, layout, dtype, mask and options, against full logits in float64 by the 2x rule."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import leaf, logits
from test_losses import OPTIONS
from test_losses import call as loss_of
from torch import Tensor

import alignloss
from alignloss.backends import STATS
from alignloss.losses import LOSSES

BEYOND = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = st.sampled_from([0, 1, 2, 3, 7])


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other places in memory."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "every other":
        return torch.stack([tensor, tensor + 1], -1).flatten(-2)[..., ::2]
    if layout == "inside":
        return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
    return tensor


def spoilt(hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """NaN where nothing is scored."""
    return hidden.masked_fill((labels.long() == ignore_index)[..., None], torch.nan)


LAYOUTS = st.sampled_from(["contiguous", "transposed", "every other", "inside"])


@st.composite
def calls(draw):
    """Tensors in float64, dtypes, what trains, and the options of a call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = [draw(SIZES) for _ in range(draw(st.integers(0, 3)))]
    width, vocabulary = draw(st.sampled_from([1, 2, 5, 16, 33])), draw(st.sampled_from([1, 2, 3, 16, 37, 130, 700]))
    dtype = draw(st.sampled_from(list(BEYOND)))
    stored = draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize == 2 else dtype]))
    ignore_index = draw(st.sampled_from([-100, 0, 1 << 40]))
    spread = draw(st.sampled_from([0.0, 1.0, 30.0]))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(*shape, width) * spread, normal(vocabulary, width)
    weight += draw(st.sampled_from([0.0, 5.0])) * normal(width)
    bias = normal(vocabulary) if draw(st.booleans()) else None
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    kept = draw(st.sampled_from([0.0, 0.5, 1.0]))
    labels = labels.masked_fill(torch.rand(shape, generator=generator) >= kept, ignore_index)
    if ignore_index == -100:
        labels = labels.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))
    options = {
        "ignore_index": ignore_index,
        "logit_scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "softcap": draw(st.sampled_from([None, 3.0, 30.0])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 4.0])),
        "workspace_bytes": draw(st.sampled_from([None, 1, 3_000, 30_000])),
        "validate": draw(st.sampled_from([None, False])),
    }
    if draw(st.booleans()):
        places = torch.nonzero(labels.reshape(-1) != ignore_index).squeeze(1)
        ignored = torch.nonzero(labels.reshape(-1) == ignore_index).squeeze(1)[:2]
        places = torch.cat([places, ignored])
        options["token_index"] = places[torch.randperm(len(places), generator=generator)]
    dtypes = [dtype, stored, stored]
    tensors = [None if t is None else t.to(d).double() for t, d in zip((hidden, weight, bias), dtypes, strict=True)]
    trained = [draw(st.booleans()) for _ in tensors]
    return tensors, dtypes, [draw(LAYOUTS), draw(LAYOUTS)], labels, trained, options


def full(hidden, weight, bias, labels, ignore_index, stats, dtype, **transform):
    """Log-probabilities and statistics of full logits."""
    tensors = [t if t is None else t.to(dtype) for t in (hidden, weight, bias)]
    z = logits(*tensors[:2], tensors[2], **transform).to(torch.promote_types(dtype, torch.float32))
    ignored = labels.long() == ignore_index
    logps = z.log_softmax(-1)
    values = {
        "logps": logps.gather(-1, labels.long().masked_fill(ignored, 0)[..., None]).squeeze(-1),
        "lse": z.logsumexp(-1),
        "entropy": -(logps.exp() * logps).sum(-1),
        "mean_logits": z.mean(-1),
        "log_sum_sq_probs": (2 * logps).logsumexp(-1),
    }
    return [values[name].masked_fill(ignored, 0) for name in ("logps", *stats)]


def judge(call, ours, theirs, upstream, differentiated, logs=()):
    """Compare outputs, and gradients of the first ones by `upstream`, of two functions of hidden, weight and bias.

    logs: which outputs are logarithms of sums.
    """
    tensors, dtypes, layouts, labels, trained, options = call
    dtype = torch.float32 if dtypes[0] != dtypes[1] else dtypes[0]  # that it is computed in
    results = []
    for kind in ("ours", "naive", "exact"):
        wanted = [torch.float64] * 3 if kind == "exact" else dtypes
        leaves = [None if t is None else leaf(t, d, on) for t, d, on in zip(tensors, wanted, trained, strict=True)]
        hidden, weight, bias = leaves
        if kind == "ours":
            hidden = laid_out(spoilt(hidden, labels, options["ignore_index"]), layouts[0])
            outputs = ours(hidden, laid_out(weight, layouts[1]), bias)
        else:
            outputs = theirs(hidden, weight, bias, torch.float64 if kind == "exact" else dtype)
        differentiable = [o for o in outputs[:differentiated] if o.requires_grad]
        if differentiable:
            sum((o.double() * upstream).sum() for o in differentiable).backward()
        grads = [t.grad for t in leaves if t is not None and t.grad is not None]
        results.append([o.detach() for o in outputs] + grads)
    compare(results, call, float(upstream.norm()), logs)


def in_full(call):
    """`full` of the labels and options of a call."""
    labels, options = call[3], call[-1]
    transform = {name: options[name] for name in ("logit_scale", "softcap", "temperature")}
    return lambda h, w, b, dtype, stats=(): full(h, w, b, labels, options["ignore_index"], stats, dtype, **transform)


def check(call, stats):
    labels, options = call[3], call[-1]
    theirs = in_full(call)

    def ours(hidden, weight, bias):
        out = alignloss.linear_logprob_stats(hidden, weight, labels, bias, stats=stats, **options)
        return [out.logps, *(getattr(out, name) for name in stats)]

    upstream = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64).view(labels.shape)
    logs = [1 + i for i, name in enumerate(stats) if name == "log_sum_sq_probs"]
    judge(call, ours, lambda *args: theirs(*args, stats), upstream, 1 + (stats[:1] == ("entropy",)), logs)


def compare(results, call, upstream, logs=()):
    """Errors are at most twice the naive ones, and what no arithmetic in the dtype can promise."""
    tensors, (dtype, *_), *_, options = call
    hidden, weight, bias = tensors
    x = logits(hidden, weight, bias) * options["logit_scale"] / options["temperature"]
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    # a logit is rounded by its size, and all that follows from a difference of two
    beyond = BEYOND[dtype] + 8 * torch.finfo(accumulated).eps * float(x.abs().max() if x.numel() else 0)
    # float64 itself loses what is small beside hidden states, head and gradients upstream
    lost = 1e-13 * (1 + sum(float(t.norm()) for t in tensors if t is not None)) * (1 + upstream)
    for i, (got, naive, exact) in enumerate(zip(*results, strict=True)):
        # where a sum is nearly 1, its logarithm errs by units of it
        units = 2 * torch.finfo(accumulated).eps * exact.numel() ** 0.5 * (i in logs)
        err, of_naive = (float((value.double() - exact).norm()) for value in (got.view(exact.shape), naive))
        if exact.numel() and float(exact.abs().max()) > torch.finfo(dtype).max / 2:
            continue  # float16 cannot hold it
        of_naive = of_naive if math.isfinite(of_naive) else 0.0
        assert err <= 2 * of_naive + beyond * float(exact.norm()) + lost + units


@st.composite
def steps(draw):
    """A call of 2B sequences, a loss, and the data that goes beside."""
    tensors, dtypes, layouts, _, trained, options = draw(calls())
    pairs, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    (vocabulary, width), ignore_index = tensors[1].shape, options["ignore_index"]
    hidden = torch.randn(2 * pairs, length, width, generator=generator).to(dtypes[0]).double()
    labels = torch.randint(0, vocabulary, (2 * pairs, length), generator=generator)
    kept = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    labels = torch.where(kept, labels, ignore_index)
    weighted, count = draw(st.booleans()), {"num_sequences": 2.5} if draw(st.booleans()) else {}
    options.pop("token_index", None)
    call = [hidden, *tensors[1:]], dtypes, layouts, labels, trained, options
    return call, draw(st.sampled_from(sorted(LOSSES))), weighted, count, draw(st.booleans())


def check_loss(call, name, weighted, count, packed):
    tensors, *_, labels, _, options = call
    theirs, module = in_full(call), alignloss.PreferenceLoss(name, **OPTIONS[name], **options)
    sequences = len(labels)
    units = sequences // 2 if module.paired else sequences
    if weighted:
        count = count | {"pair_weights": torch.linspace(0, 2, units)}
    data = {key: torch.linspace(0.1, 0.9, units, dtype=torch.float64) for key in module.data}
    if "desirable" in data:
        data["desirable"] = torch.arange(units) % 2 == 0
    if "chosen_scores" in data:
        data["chosen_scores"] = data["rejected_scores"] + 1
    lengths = (labels != options["ignore_index"]).sum(1).clamp(min=1).double()
    # a reference near the policy, as in training
    ref = theirs(*tensors, torch.float64)[0].sum(1) + torch.linspace(-0.5, 0.5, sequences, dtype=torch.float64)

    def ours(hidden, weight, bias):
        given, y = data | count | ({"ref_logps": ref} if module.needs_reference else {}), labels
        if packed:
            given["cu_seqlens"] = torch.arange(0, labels.numel() + 1, labels.shape[1])
            hidden, y = hidden.flatten(0, 1), labels.flatten()
        return [module(hidden, weight, y, bias, **given).loss]

    def plain(*head):
        columns = {"logps": theirs(*head)[0].double().sum(1), "ref_logps": ref, "lengths": lengths}
        half = slice(sequences // 2), slice(sequences // 2, None)
        halves = {
            ("ref_" if key == "ref_logps" else "") + side + "_" + key.removeprefix("ref_"): value[part]
            for key, value in columns.items()
            for side, part in zip(("chosen", "rejected"), half, strict=True)
        }
        losses = loss_of(name, columns | halves | data, **OPTIONS[name])[0] * count.get("pair_weights", 1)
        return [losses.sum() / count.get("num_sequences", units)]

    judge(call, ours, plain, torch.ones((), dtype=torch.float64), 1)


SETTINGS = {
    "deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True,
}  # fmt: skip
SOME_STATS = st.sampled_from([(), ("entropy",), ("entropy", *(n for n in STATS if n not in ("entropy", "is_top1")))])


@settings(max_examples=500, **SETTINGS)
@given(calls(), SOME_STATS)
def test_log_probabilities_and_statistics(call, stats):
    check(call, stats)


@settings(max_examples=500, **SETTINGS)
@given(steps())
def test_losses(step):
    check_loss(*step)


@pytest.mark.nightly
@settings(max_examples=10_000, **SETTINGS)
@given(calls(), SOME_STATS)
def test_many_log_probabilities_and_statistics(call, stats):
    check(call, stats)


@pytest.mark.nightly
@settings(max_examples=10_000, **SETTINGS)
@given(steps())
def test_many_losses(step):
    check_loss(*step)


def by_kernels(call):
    """The same call on Triton's kernels, which compute in float32."""
    tensors, dtypes, *rest, options = call
    return tensors, [torch.float32 if d == torch.float64 else d for d in dtypes], *rest, options | {"backend": "triton"}


@settings(max_examples=5, **SETTINGS)
@given(calls(), SOME_STATS, steps())
def test_kernels(call, stats, step):
    check(by_kernels(call), stats)
    check_loss(by_kernels(step[0]), *step[1:])


@pytest.mark.nightly
@settings(max_examples=500, **SETTINGS)
@given(calls(), SOME_STATS, steps())
def test_many_by_kernels(call, stats, step):
    check(by_kernels(call), stats)
    check_loss(by_kernels(step[0]), *step[1:])
