"""A head whose rows are split over processes: results and gradients are those of one process with the whole head."""

import itertools
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import error, inputs, leaf, replace_products
from test_packing import data_of, module_of

import alignloss
from alignloss.losses import LOSSES

SEQUENCES, T, V, FP32 = 4, 12, 101, 1e-6
STATS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# vocabulary entries of each process: one part is huge, one a single row, one empty
PARTS = {2: [(100, 1), (0, 101)], 4: [(3, 90, 0, 8)]}


def problem(dtype=torch.float32, **options):
    torch.manual_seed(0)
    hidden, weight, bias, labels = inputs(SEQUENCES, T, vocabulary=V, dtype=torch.float32, **options)
    labels[1] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def check(parts, call, name, tolerance=FP32, dtype=torch.float32, bias=True, trains=(True, True), **options):
    """That call(hidden, weight, labels, bias, keywords) gives what it gives with the whole head in float64.

    Its gradients too: of hidden on every process, of the head of its part. `trains`: hidden, the head.
    """
    hidden, weight, b, labels = problem(dtype, **options)
    tensors, rank = (hidden, weight, *([b] if bias else [])), dist.get_rank()
    needs = (trains[0], trains[1], trains[1])[: len(tensors)]
    whole = [leaf(t, torch.float64, need) for t, need in zip(tensors, needs, strict=True)]
    values = call(whole[0], whole[1], labels, whole[2] if bias else None, {})
    part = hidden, *(tensor.split(parts)[rank] for tensor in tensors[1:])
    mine = [leaf(t, dtype, need) for t, need in zip(part, needs, strict=True)]
    found = call(mine[0], mine[1], labels, mine[2] if bias else None, {"vocab_group": dist.group.WORLD})
    for a, b in zip(found, values, strict=True):
        off = error(a.detach(), b.detach())
        assert a.isfinite().all() and off <= tolerance, (name, off)
    for loss in (values[0], found[0]):
        loss.backward()
    for which, (a, b) in enumerate(zip(mine, whole, strict=True)):
        if not needs[which]:
            assert a.grad is None
            continue
        expected = b.grad if which == 0 else b.grad.split(parts)[rank]
        # relative to the gradient of the whole head, of which a part may hold next to nothing
        off = float((a.grad.double() - expected).norm() / b.grad.norm().clamp(min=1e-30))
        assert off <= tolerance, (name, ("hidden", "weight", "bias")[which], off)


def padded_and_packed(labels, hidden, packed):
    if not packed:
        return hidden, labels, {}
    return hidden.flatten(0, 1), labels.flatten(), {"cu_seqlens": torch.arange(SEQUENCES + 1) * T}


def every_loss(rank, size, parts):
    for name in sorted(LOSSES):
        for packed in (False, True):
            module = module_of(name, "torch")
            data = data_of(module, SEQUENCES)

            def call(hidden, weight, labels, bias, given, module=module, data=data, packed=packed):
                hidden, labels, layout = padded_and_packed(labels, hidden, packed)
                out = module(hidden, weight, labels, bias, **data, **layout, **given)
                return out.loss, *out[1:]

            # a loss that is a ratio of probabilities has the error of a logarithm; one process errs as much
            check(parts, call, name, 1e-5 if name in ("chi_po", "exo") else FP32, bias=packed)


def chosen(given, backend):
    """Options of a call with few bytes, and of the one in float64 that it is compared with."""
    return {"workspace_bytes": 20_000, "backend": backend} if given else {}


def weighed(values):
    """A loss with another coefficient for each token."""
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64).view(values.shape)
    return (values * factors).sum()


def token_calls(rank, size, parts, backend):
    """Log-probabilities and statistics by every regime, softcap, workspaces of one and several blocks."""

    def logps(options, hidden, weight, labels, bias, given):
        found = alignloss.linear_logprob(hidden, weight, labels, bias, **options, **given)
        return weighed(found), found

    def stats(options, hidden, weight, labels, bias, given):
        found = alignloss.linear_logprob_stats(hidden, weight, labels, bias, stats=STATS, **options, **given)
        return weighed(found.logps) + weighed(found.entropy), *found

    def kl(options, hidden, weight, labels, bias, given):
        ref = problem(weight.dtype)[1].flip(0)  # of the whole head
        if given:
            ref = ref.split(parts)[rank]
        found = alignloss.linear_kl(hidden, weight, hidden.detach().flip(0), ref, labels, bias, **options, **given)
        return weighed(found), found

    transform = {"softcap": 5.0, "logit_scale": 1.5, "temperature": 0.7}
    for few, options in ((False, {}), (True, {}), (True, transform)):
        for trains in ((True, True), (True, False), (False, True)):
            for call in (logps, stats, kl):
                name = f"{call.__name__} {few} {options} {trains}"

                def run(*args, call=call, few=few, options=options):
                    return call(options | (chosen(args[-1], backend) if few else {}), *args)

                check(parts, run, name, 2e-6, trains=trains, bias=bool(options))


def module_calls(rank, size, parts, backend):
    """The NLL beside, a projected reference, mixtures, SFT, a loss of one's own, ignored positions of another label."""
    logps = torch.linspace(-20, -10, SEQUENCES)
    mixture = alignloss.MixtureLoss([alignloss.DPOLoss(), alignloss.PreferenceLoss("bco_pair", beta=0.1)], [0.8, 0.2])

    def weighted(hidden, weight, labels, bias, given):
        weights = {"token_weights": torch.linspace(0, 1, labels.numel()).view(labels.shape)}
        out = alignloss.CPOLoss(nll_weight=0.7, **chosen(given, backend))(
            hidden, weight, labels, bias, **weights, **given
        )
        return out.loss, *out[1:]

    def projected(hidden, weight, labels, bias, given):
        ref = problem(weight.dtype)[1].flip(0)
        ref = {"ref_hidden": hidden.detach().flip(0), "ref_weight": ref.split(parts)[rank] if given else ref}
        out = alignloss.DPOLoss(**chosen(given, backend))(hidden, weight, labels, bias, **ref, **given)
        return out.loss, *out[1:]

    def mixed(hidden, weight, labels, bias, given):
        out = mixture(hidden, weight, labels, bias, ref_logps=logps, stats=("entropy", "is_top1"), **given)
        return out.loss, *out[1:], *out.metrics().values()

    def sft(hidden, weight, labels, bias, given):
        # 7 is a label of the vocabulary, and here that of what is not scored
        labels = labels.masked_fill(labels == -100, 7)
        out = alignloss.SFTLoss(ignore_index=7, **chosen(given, backend))(hidden, weight, labels, bias, **given)
        return out.loss, *out[1:]

    def sums(hidden, weight, labels, bias, given):
        out = alignloss.sequence_logprob(hidden, weight, labels, bias, **chosen(given, backend), **given)
        return (out.logps * torch.arange(1, SEQUENCES + 1)).sum(), out.logps, out.lengths

    def own(hidden, weight, labels, bias, given):
        units = [[row] for row in range(SEQUENCES)]
        return (
            alignloss.one_pass_loss(
                hidden, weight, labels, own_loss, bias, units=units, **chosen(given, backend), **given
            ),
        )

    def indexed(hidden, weight, labels, bias, given):
        index = (labels.flatten() != -100).nonzero().flatten().flip(0)
        index = torch.cat([index, torch.tensor([T])])  # padded by an ignored position
        found = alignloss.linear_logprob(
            hidden, weight, labels, bias, token_index=index, **chosen(given, backend), **given
        )
        return weighed(found), found

    for call in (weighted, projected, mixed, sft, sums, own, indexed):
        check(parts, call, call.__name__, 2e-6)


def own_loss(logps, stats):
    return (logps.view(SEQUENCES, T).sum(1) ** 2).sum() / 100


def sharp(rank, size, parts, backend):
    """Log-probabilities of nearly certain tokens, and an entropy whose terms are far from its mean, in 16 bits."""

    def bf16(hidden, weight, labels, bias, given):
        hidden = 20 * hidden
        found = alignloss.linear_logprob_stats(
            hidden, weight, labels, stats=("entropy",), **chosen(given, backend), **given
        )
        return weighed(found.logps), found.logps

    check(parts, bf16, "bf16", 1e-2, torch.bfloat16, bias=False)
    hidden, weight, _, labels = problem(torch.float64)
    weight[labels.clamp(min=0)] *= 4
    with torch.no_grad():
        part = weight.split(parts)[rank]
        found = alignloss.linear_logprob(20 * hidden, part, labels, vocab_group=dist.group.WORLD)
        exact = alignloss.linear_logprob(20 * hidden, weight, labels)
    assert 0 < exact[labels != -100].abs().min() < 1e-12
    assert torch.allclose(found, exact, rtol=1e-9, atol=0)


def rounded_once(rank, size, parts):
    """In 16 bits the gradient of hidden errs as that of one process does."""
    hidden, weight, _, labels = problem(torch.bfloat16)
    found = []
    for dtype, part in ((torch.float64, weight), (torch.bfloat16, weight), (torch.bfloat16, weight.split(parts)[rank])):
        mine = leaf(hidden, dtype)
        group = {} if len(part) == V else {"vocab_group": dist.group.WORLD}
        weighed(alignloss.linear_logprob(mine, part.to(dtype), labels, **group)).backward()
        found.append(mine.grad)
    exact, whole, split = found
    assert error(split, exact) <= 1.1 * error(whole, exact)


def split_twice(rank, size, parts):
    """Sequences over one dimension of a mesh, the vocabulary over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    hidden, weight, _, labels = problem()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "vocabulary"))
    place, part = mesh["sequence"].get_local_rank(), mesh["vocabulary"].get_local_rank()
    whole = leaf(hidden), leaf(weight)
    loss = alignloss.CPOLoss(nll_weight=1.0)(*whole, labels)
    loss.loss.backward()
    half = slice(None, 5) if place == 0 else slice(5, None)
    mine = leaf(hidden[:, half], torch.float32), leaf(weight.split([90, 11])[part], torch.float32)
    groups = {"sequence_group": mesh["sequence"], "vocab_group": mesh["vocabulary"]}
    found = alignloss.CPOLoss(nll_weight=1.0)(*mine, labels[:, half], **groups)
    assert error(found.loss.detach(), loss.loss.detach()) <= FP32
    found.loss.backward()
    assert error(mine[0].grad / 2, whole[0].grad[:, half]) <= FP32
    gradient = mine[1].grad.clone()
    dist.all_reduce(gradient, group=mesh["sequence"].get_group())
    assert error(gradient / 2, whole[1].grad.split([90, 11])[part]) <= FP32


def tensor_parallel(rank, size, parts):
    """DTensors of torch's own splits, as a model with tensor parallelism has them, and one of FSDP2 across."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    hidden, weight, bias, labels = problem()
    whole = leaf(hidden), leaf(weight), leaf(bias)
    expected = alignloss.SFTLoss()(whole[0], whole[1], labels, whole[2]).loss
    expected.backward()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "vocabulary"))
    columns = mesh["vocabulary"]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(hidden.shape[-1]))
            self.lm_head = torch.nn.Linear(hidden.shape[-1], V)
            with torch.no_grad():
                self.lm_head.weight.copy_(weight)
                self.lm_head.bias.copy_(bias)

        def forward(self, hidden, by_module):
            head = (self.lm_head,) if by_module else (self.lm_head.weight,)
            given = {} if by_module else {"bias": self.lm_head.bias}
            return alignloss.SFTLoss()(hidden * self.scale, *head[:1], labels, **given, vocab_group=columns).loss

    for across in (False, True):
        for by_module in (False, True):
            model = Model()
            parallelize_module(model, columns, {"lm_head": ColwiseParallel()})
            if across:
                fully_shard(model, mesh=mesh["data"])
            mine = leaf(hidden, torch.float32)
            loss = model(mine, by_module)
            assert error(loss.detach(), expected.detach()) <= FP32
            loss.backward()
            assert error(mine.grad, whole[0].grad) <= FP32
            for name, gradient in (("weight", whole[1].grad), ("bias", whole[2].grad)):
                assert error(getattr(model.lm_head, name).grad.full_tensor(), gradient) <= FP32, (across, by_module)


def work_is_divided(rank, size, parts):
    """GEMMs, tiles and the gradient of the head: of the part of each process."""
    calls, largest = [], []

    def addmm(out, a, b, beta=1, alpha=1):
        calls.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        largest.append(out.numel())
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)

    with pytest.MonkeyPatch.context() as patch:
        replace_products(patch, addmm)
        torch.manual_seed(0)
        hidden, weight, _, labels = inputs(2, 16, vocabulary=4096, masked=0, dtype=torch.float32)
        product = 2 * labels.numel() * weight.numel()
        part = weight.chunk(size)[rank]
        for trains_head, gemms in ((True, 3), (False, 2)):
            calls.clear()
            mine = leaf(hidden, torch.float32), leaf(part, torch.float32, trains_head)
            out = alignloss.SFTLoss()(*mine, labels, vocab_group=dist.group.WORLD)
            out.loss.backward()
            assert sum(calls) == gemms * product / size
        assert max(largest) <= max(labels.numel(), weight.shape[1]) * len(weight) / size


def collectives(rank, size, parts):
    """One for what processes agree on; then two for a block of rows, and one for each derivative of it."""
    hidden, weight, _, labels = problem()
    called = []
    for name in ("all_reduce", "all_gather"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, real=real, **k: (called.append(name), real(*a, **k))[1])
    group = {"vocab_group": dist.group.WORLD}

    def made(function, *args, **options):
        called.clear()
        tensors = [leaf(hidden, torch.float32), leaf(weight.split(parts)[rank], torch.float32)]
        result = function(*tensors, *args, **options, **group)
        in_forward = list(called)
        (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()
        assert called == in_forward or function is alignloss.linear_kl
        return called

    agreed, block = ["all_gather"], ["all_reduce", "all_reduce"]
    with torch.no_grad():
        called.clear()
        alignloss.linear_logprob(hidden, weight.split(parts)[rank], labels, **group)
        assert called == agreed + block
    assert made(alignloss.linear_logprob, labels) == [*agreed, *block, "all_reduce"]
    assert made(alignloss.CPOLoss(), labels) == [*agreed, *block, "all_reduce"]
    stats = {"stats": ("entropy",)}
    assert made(alignloss.linear_logprob_stats, labels, **stats) == [*agreed, *block, "all_reduce", "all_reduce"]
    several = made(alignloss.linear_logprob, labels, workspace_bytes=12_000)
    assert len(several) > 4 and len(several) % 3 == 1
    other = hidden.flip(0), weight.split(parts)[rank].flip(0), labels
    # both heads agree, a block, and the gradient of hidden in the backward
    assert made(alignloss.linear_kl, *other) == [*agreed, *agreed, *block, "all_reduce"]


def refusals(rank, size, parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden, weight, bias, labels = problem()
    part, group = weight.split(parts)[rank], {"vocab_group": dist.group.WORLD}

    def refused(match, call, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            call(*args, **options)

    score = partial(alignloss.linear_logprob, **group)
    other = labels.clone()
    other[0, 0] = rank  # as processes with tokens of their own
    refused("same hidden states and labels.*no vocab_group", score, hidden, part, other)
    refused("same hidden states and labels", score, hidden[: 4 - rank], part, labels[: 4 - rank])
    differ = "must agree, and these differ: "
    refused(f"{differ}options.*'temperature': {1.0 + rank}", score, hidden, part, labels, temperature=1.0 + rank)
    refused(f"{differ}what requires a gradient", score, leaf(hidden, torch.float32, rank == 0), part, labels)
    refused(f"{differ}bias", score, hidden, part, labels, bias.split(parts)[rank] if rank else None)
    refused("are all empty", score, hidden, part[:0], labels)
    refused(r"labels must lie in \[0, 101\)", score, hidden, part, labels.masked_fill(labels == -100, 101))
    refused(r"a part \(rows, H\)", score, hidden, part[0], labels)
    mesh = init_device_mesh("cpu", (size,))
    for placement in (Replicate(), Shard(1)):
        refused(r"the placement Shard\(0\)", score, hidden, distribute_tensor(weight, mesh, [placement]), labels)
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    refused("a DTensor", alignloss.linear_logprob, hidden, sharded, labels)
    trained = torch.nn.Parameter(sharded)
    refused("give them as vocab_group", alignloss.linear_logprob, hidden, trained.to_local(), labels)
    of_others = {"vocab_group": dist.group.WORLD, "sequence_group": dist.group.WORLD}
    refused("other tokens each", alignloss.CPOLoss(), hidden, part, labels, **of_others)
    index = (labels.flatten() != -100).nonzero().flatten()
    refused(f"{differ}token_index", score, hidden, part, labels, token_index=index if rank else None)
    one, other = (alignloss.SimPOLoss(), alignloss.CPOLoss()) if rank else (alignloss.CPOLoss(), alignloss.CPOLoss())
    refused(f"{differ}what is asked for", one, hidden, part, labels, **group)
    refused(
        f"{differ}what is asked for",
        alignloss.DPOLoss(beta=0.1 + rank),
        hidden,
        part,
        labels,
        **group,
        ref_logps=torch.zeros(4),
    )
    refused(f"{differ}what is asked for", other, hidden, part, labels, **group, stats=("entropy",) * rank)
    stats = partial(alignloss.linear_logprob_stats, **group)
    refused(f"{differ}what is asked for", stats, hidden, part, labels, stats=("entropy",) * rank)
    batched = torch.func.vmap(lambda y: score(hidden[0], part, y, token_index=torch.arange(T)))
    refused("no torch.func.vmap", batched, labels)
    ref = (hidden, weight.split(parts[::-1])[rank], labels)
    refused("must share vocabulary", partial(alignloss.linear_kl, **group), hidden, part, *ref)
    compiled = torch.compile(partial(alignloss.SFTLoss(), **group), fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        compiled(hidden, part, labels)
    # unchecked, a label outside of every part gives NaN on each process, and its gradient too
    mine = leaf(hidden, torch.float32)
    outside = labels.clone()
    outside[0, :2] = torch.tensor([101, -1])
    found = score(mine, part, outside, validate=False)
    assert found[0, :2].isnan().all() and found.isnan().sum() == 2
    found.sum().backward()
    assert mine.grad[0, :2].isnan().all() and not mine.grad[0, 2:].isnan().any() and not mine.grad[1:].isnan().any()
    for value in ("world", init_device_mesh("cpu", (1, size))):
        match = "must be a ProcessGroup or a DeviceMesh"
        refused(match, alignloss.linear_logprob, hidden, part, labels, vocab_group=value)


def with_margins(chosen_logps, rejected_logps, margins, desirable):
    gaps = chosen_logps - rejected_logps - margins
    return -gaps * desirable, chosen_logps.detach(), rejected_logps.detach()


def scaled_loss(logps, stats, factor):
    return -factor * logps.sum()


def data_of_other_kinds(rank, size, parts):
    """Tensors without values of their own, of one process or all: an error on each, as without a group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    hidden, weight, _, labels = problem()
    part, plain = weight.split(parts)[rank], torch.ones(2)
    kinds = {
        "DTensor": distribute_tensor(plain, init_device_mesh("cpu", (size,)), [Replicate()]),
        "layout": plain.to_sparse(),
        "nested": torch.nested.nested_tensor([plain, plain]),
        "meta": plain.to("meta"),
        "real": plain + 0j,
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
    }
    for group in ({"vocab_group": dist.group.WORLD}, {"sequence_group": dist.group.WORLD}):
        head = part if "vocab_group" in group else weight
        for name, value in kinds.items():
            for given in (value, value if rank else plain):
                with pytest.raises(ValueError, match=f"{name}|these differ: data"):
                    alignloss.CPOLoss()(hidden, head, labels, pair_weights=given, **group)


def data_that_differ(rank, size, parts):
    """Whatever results depend on and one process has otherwise is an error on all of them; hidden states may err."""
    hidden, weight, _, labels = problem()
    part, group = weight.split(parts)[rank], {"vocab_group": dist.group.WORLD}
    loss_fn = alignloss.PreferenceLoss(with_margins, nll_weight=1.0)
    margins = {"margins": torch.tensor([0.5, 0.25]), "desirable": torch.tensor([True, False])}
    dpo, logps = alignloss.DPOLoss(), torch.linspace(-20, -10, SEQUENCES)
    elsewhere = rank == size - 1  # the one process whose data are others

    def others(values):
        values = values.clone()
        values.view(-1)[-1] = not values.view(-1)[-1] if values.dtype == torch.bool else 1.5
        return values

    def moved(offsets):
        return offsets + torch.tensor([0, 0, 1, 0, 0])

    packed = partial(alignloss.sequence_logprob, hidden.flatten(0, 1), part, labels.flatten())
    ones, offsets = torch.ones(labels.shape), torch.arange(SEQUENCES + 1) * T
    cases = [
        (partial(dpo, hidden, part, labels), {"ref_logps": logps}, others),
        (partial(dpo, hidden, part, labels, ref_logps=logps), {"pair_weights": torch.ones(2)}, others),
        (partial(dpo, hidden, part, labels, ref_logps=logps), {"token_weights": ones}, others),
        (partial(dpo, hidden, part, labels, ref_logps=logps), {"num_sequences": 4.0}, lambda number: number + 1),
        (partial(loss_fn, hidden, part, labels), margins, lambda margin: others(margin)),
        (
            partial(loss_fn, hidden, part, labels, **margins),
            {"nll_labels": labels},
            lambda y: y.masked_fill(y > 50, -100),
        ),
        (partial(loss_fn, hidden, part, labels, **margins), {"num_tokens": torch.tensor(8)}, lambda number: number + 1),
        (partial(alignloss.SFTLoss(), hidden, part, labels), {"token_weights": ones}, others),
        (partial(alignloss.SFTLoss(), hidden, part, labels), {"num_tokens": 3}, lambda number: number + 1),
        (packed, {"cu_seqlens": offsets}, moved),
        (partial(packed, cu_seqlens=offsets), {"token_weights": ones.flatten()}, others),
    ]
    for call, data, changed in cases:
        call(**data, **group)
        for name, value in data.items():
            mine = data | ({name: changed(value)} if elsewhere else {})
            with pytest.raises(ValueError, match=rf"must agree, and these differ: data \(here .*'{name}'"):
                call(**mine, **group)
    mine = partial(torch.add, alpha=2) if elsewhere else partial(torch.add, alpha=1)
    pick = mine.keywords["alpha"]
    bound = partial(LOSSES["dpo"], beta=pick)
    mixed = [alignloss.DPOLoss(beta=pick), alignloss.PreferenceLoss("bco_pair", beta=0.1)]
    heads = hidden, part, hidden.flip(0), part, labels
    calls = [
        partial(alignloss.MixtureLoss(mixed, [0.8, 0.2]), hidden, part, labels, ref_logps=logps),
        partial(alignloss.PreferenceLoss(bound), hidden, part, labels, ref_logps=logps),
        partial(alignloss.one_pass_loss, hidden, part, labels, partial(scaled_loss, factor=torch.tensor(pick))),
        partial(alignloss.linear_kl, *heads) if elsewhere else partial(alignloss.linear_logprob, hidden, part, labels),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="these differ: what is asked for"):
            call(**group)
    # the same values in other places
    weighted = partial(dpo, hidden, part, labels, ref_logps=logps)
    for kind in (torch.bool, torch.int32, torch.float32):
        mine = torch.tensor([1, 0, 0, 1] if elsewhere else [0, 1, 1, 0], dtype=kind).repeat(T).view(SEQUENCES, T)
        with pytest.raises(ValueError, match="these differ: data"):
            weighted(token_weights=mine, **group)
    other_labels = labels.masked_fill(labels == -100, 0)
    other_labels[:, :4] = torch.tensor([7, 5, 5, 7] if elsewhere else [5, 7, 7, 5])
    with pytest.raises(ValueError, match="with other labels"):
        alignloss.linear_logprob(hidden, part, other_labels, **group)
    array = np.arange(2000.0)
    array[1000] += 1e-9 * elsewhere
    with pytest.raises(ValueError, match="these differ: what is asked for"):
        alignloss.one_pass_loss(hidden, part, labels, partial(scaled_loss, factor=array), **group)
    trained = {"margins": torch.zeros(2, requires_grad=elsewhere), "desirable": torch.tensor([True, False])}
    with pytest.raises(ValueError, match="these differ: data"):
        loss_fn(hidden, part, labels, **trained, **group)
    generator = torch.Generator().manual_seed(rank)
    dropped = hidden * (torch.rand(hidden.shape, generator=generator) > 0.1) / 0.9
    rounded = hidden * (1 + 2**-9 * torch.randn(hidden.shape, generator=generator))
    unknown = hidden.index_fill(1, torch.tensor([0]), torch.nan)
    with pytest.raises(ValueError, match=r"same hidden states; those of ranks \[.*drops out"):
        alignloss.linear_logprob(dropped, part, labels, **group)
    last = hidden.flatten(0, 1)[:47].clone()
    last[46] += torch.randn(last.shape[1], generator=generator)
    long = torch.cat([torch.zeros(80, last.shape[1]), last])
    for rows in (last, long):
        with pytest.raises(ValueError, match="same hidden states"):
            alignloss.linear_logprob(rows, part, torch.zeros(len(rows)).long(), **group)
    for one in (slice(0, 1), slice(1, 2), slice(2, 3)):
        alignloss.linear_logprob(rounded[one, :1], part, labels[one, :1].clamp(min=0), **group)
    alignloss.linear_logprob(rounded, part, labels, **group)
    padding = torch.where((labels == -100)[..., None], torch.randn(hidden.shape, generator=generator), hidden)
    alignloss.SFTLoss()(padding, part, labels, **group)
    # the same in other forms
    same = {"num_sequences": 2.0, "pair_weights": torch.tensor([torch.nan, 1.0], dtype=torch.float64)}
    other = {"pair_weights": torch.tensor([-torch.nan, 1.0]), "num_sequences": 2, "token_weights": None}
    dpo(hidden, part, labels, ref_logps=logps, **(other if elsewhere else same), **group)
    packed(cu_seqlens=offsets.int() if elsewhere else offsets, **group)
    assert alignloss.linear_logprob(unknown, part, labels, **group)[:, 1:].isfinite().all()


def dtensors_of_other_splits(rank, size, parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    hidden, weight, _, labels = problem()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "vocabulary"))
    columns, rows = mesh["vocabulary"], mesh["data"]

    def part_of(mesh, *placements):
        return torch.nn.Parameter(distribute_tensor(weight, mesh, placements))

    gathered = part_of(columns, Shard(0)).full_tensor(grad_placements=[Replicate()])
    for other in (part_of(mesh, Shard(0), Shard(0)).to_local(), part_of(rows, Shard(0)).to_local(), gathered):
        with pytest.raises(ValueError, match=r"was made of a DTensor .*; with vocab_group it is a part"):
            alignloss.linear_logprob(hidden, other, labels, vocab_group=columns)
    right = alignloss.linear_logprob(hidden, part_of(columns, Shard(0)).to_local(), labels, vocab_group=columns)
    assert error(right.detach(), alignloss.linear_logprob(hidden, weight, labels)) <= FP32
    whole = distribute_tensor(hidden, columns, [Replicate()])
    with pytest.raises(ValueError, match=r"hidden is a DTensor.*redistribute"):
        alignloss.linear_logprob(whole, part_of(columns, Shard(0)), labels, vocab_group=columns)
    model = torch.nn.Sequential()
    model.lm_head = torch.nn.Linear(hidden.shape[-1], V)
    parallelize_module(model, columns, {"lm_head": ColwiseParallel()})
    alignloss.SFTLoss()(hidden, model.lm_head, labels, vocab_group=columns)
    for register in (model.lm_head.register_forward_hook, model.lm_head.register_forward_pre_hook):
        handle = register(lambda *_: None)
        with pytest.raises(ValueError, match="has hooks of its own"):
            alignloss.SFTLoss()(hidden, model.lm_head, labels, vocab_group=columns)
        handle.remove()


def written_to(rank, size, parts):
    """A DTensor that is written to between forward and backward; plain tensors are refused by torch itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, _, labels = problem()
    mesh = init_device_mesh("cpu", (size,))
    for wrapped in (False, True):
        head = torch.nn.Linear(weight.shape[1], V, bias=False)
        head.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        given = head if wrapped else head.weight
        alignloss.SFTLoss()(leaf(hidden, torch.float32), given, labels, vocab_group=mesh).loss.backward()
        loss = alignloss.linear_logprob(leaf(hidden, torch.float32), given, labels, vocab_group=mesh).sum()
        with torch.no_grad():
            head.weight.mul_(2)
        with pytest.raises(RuntimeError, match="needs weight as the forward had it, and it was written to in place"):
            loss.backward()
    bias = torch.zeros(V)
    for name, frozen in itertools.product(("weight", "bias"), ("", "weight", "bias")):
        given = {"weight": weight, "bias": bias}
        given = {
            n: distribute_tensor(value, mesh, [Shard(0)]).requires_grad_(n != frozen) for n, value in given.items()
        }
        loss = alignloss.SFTLoss(workspace_bytes=12_000)(hidden, labels=labels, vocab_group=mesh, **given).loss
        with torch.no_grad():
            given[name].add_(1)
        with pytest.raises(RuntimeError, match=f"needs {name} as the forward had it"):
            loss.backward()
    # whose backward multiplies by both heads
    for name, trains in itertools.product(("weight", "bias", "ref_weight", "ref_bias"), (False, True)):
        given = {"weight": weight, "bias": bias, "ref_weight": weight.flip(0), "ref_bias": bias}
        given = {n: distribute_tensor(value, mesh, [Shard(0)]) for n, value in given.items()}
        given["weight"].requires_grad_(trains)
        mine = leaf(hidden, torch.float32)
        kl = alignloss.linear_kl(mine, ref_hidden=hidden, labels=labels, vocab_group=mesh, **given).sum()
        with torch.no_grad():
            given[name].add_(1)
        with pytest.raises(RuntimeError, match=f"needs {name} as the forward had it"):
            torch.autograd.grad(kl, mine)


def transposed(rank, size, parts):
    """Parts in other layouts, of which one of a row, or none, has none."""
    hidden, weight, _, labels = problem()
    whole = leaf(hidden), leaf(weight)
    weighed(alignloss.linear_logprob(*whole, labels)).backward()
    for sizes in ([60, 41], [100, 1], [101, 0]):
        for of in ([True, True], [True, False]):  # which are stored by columns
            part = weight.split(sizes)[rank]
            part = part.T.contiguous().T if of[rank] else part
            part.requires_grad_()
            mine = leaf(hidden, torch.float32)
            options = {"workspace_bytes": 12_000, "vocab_group": dist.group.WORLD}
            weighed(alignloss.linear_logprob(mine, part, labels, **options)).backward()
            assert error(mine.grad, whole[0].grad) <= FP32
            off = (part.grad - whole[1].grad.split(sizes)[rank]).norm() / whole[1].grad.norm()
            assert off <= FP32
            part = part.detach()


def one_that_raises(rank, size, parts):
    """The others get an error of their own after the group's time-out."""
    hidden, weight, _, labels = problem()
    part, group = weight.split(parts)[rank], {"vocab_group": dist.group.WORLD}
    if rank == 0:
        with pytest.raises(ValueError, match="positive"):
            alignloss.linear_logprob(hidden, part, labels, temperature=-1.0, **group)
        time.sleep(6)
    else:
        with pytest.raises(RuntimeError):
            alignloss.linear_logprob(hidden, part, labels, **group)
    return False


CASES = [(size, parts) for size in PARTS for parts in PARTS[size]]


@pytest.mark.parametrize(("size", "parts"), CASES)
def test_losses_and_gradients_are_those_of_one_process(size, parts, tmp_path):
    run_processes(every_loss, size, tmp_path, parts)


@pytest.mark.parametrize(("size", "parts"), CASES)
@pytest.mark.parametrize("work", [token_calls, module_calls, sharp])
def test_every_call(work, size, parts, tmp_path):
    run_processes(work, size, tmp_path, parts, "torch")


@pytest.mark.parametrize("work", [pytest.param(token_calls, marks=pytest.mark.nightly), module_calls, sharp])
def test_the_kernels_take_a_part(work, tmp_path):
    run_processes(work, 2, tmp_path, (100, 1), "triton")


@pytest.mark.parametrize("work", [split_twice, tensor_parallel])
def test_beside_other_splits(work, tmp_path):
    run_processes(work, 4, tmp_path, None)


def test_dtensors_of_other_splits(tmp_path):
    run_processes(dtensors_of_other_splits, 4, tmp_path, None)


def test_data_of_every_process_are_the_same(tmp_path):
    run_processes(data_that_differ, 4, tmp_path, (30, 30, 30, 11))


def test_data_of_other_kinds(tmp_path):
    run_processes(data_of_other_kinds, 2, tmp_path, (60, 41))


def test_a_head_is_written_to_before_the_backward(tmp_path):
    run_processes(written_to, 2, tmp_path, None)


def test_parts_lie_in_memory_as_they_like(tmp_path):
    run_processes(transposed, 2, tmp_path, None)


def test_a_gradient_is_rounded_once(tmp_path):
    run_processes(rounded_once, 4, tmp_path, (30, 30, 30, 11))


@pytest.mark.parametrize(
    ("work", "seconds"), [(work_is_divided, 300), (collectives, 300), (refusals, 300), (one_that_raises, 3)]
)
def test_what_a_step_asks_of_the_group(work, seconds, tmp_path):
    run_processes(work, 2, tmp_path, (60, 41), seconds=seconds)
