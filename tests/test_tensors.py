"""Tensors that are not what they look like: named for what they are, before shapes, dtypes and devices are compared."""

import inspect

import pytest
import torch
from processes import run_processes
from reference import inputs, leaf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import alignloss


def call(weight, **changes):
    hidden, _, _, labels = inputs(4, 5, dtype=torch.float32)
    return alignloss.linear_logprob(changes.pop("hidden", hidden), weight, labels, **changes)


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes has it: bytes of another shape, with what they mean beside them."""

    quant_state = None


def with_attribute(tensor, **attributes):
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def freed():
    weight = torch.nn.Parameter(torch.randn(101, 37))
    weight.untyped_storage().resize_(0)
    return weight


KINDS = {
    "4-bit": (
        lambda: Params4bit(torch.zeros(1869, 1, dtype=torch.uint8), requires_grad=False),
        r"a quantised weight of bitsandbytes \(Params4bit\): dequantise",
    ),
    "wrapper subclass": (
        lambda: TwoTensor(torch.randn(101, 37), torch.randn(101, 37)),
        "a TwoTensor, whose values are those of other tensors, e.g. quantised ones: dequantise",
    ),
    "int8": (lambda: torch.zeros(101, 37, dtype=torch.int8), "dequantise"),
    "packed bytes": (lambda: torch.zeros(1869, 1, dtype=torch.uint8), "as a quantisation packs it.*: dequantise"),
    "packed by columns": (lambda: torch.zeros(5, 101, dtype=torch.int32), "as a quantisation packs it.*: dequantise"),
    "sparse": (lambda: torch.zeros(101, 37).to_sparse(), r"in the layout torch\.sparse_coo.*to_dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(3, 37)], layout=torch.jagged), "a nested tensor"),
    "float8": (lambda: torch.zeros(101, 37).to(torch.float8_e4m3fn), "dequantise"),
    "meta": (lambda: torch.nn.Parameter(torch.zeros(101, 37, device="meta")), "on meta, a device without values"),
    "ZeRO-3": (
        lambda: with_attribute(torch.nn.Parameter(torch.zeros(0)), ds_id=3),
        "emptied by DeepSpeed ZeRO-3: compute the loss inside the forward",
    ),
    "emptied": (lambda: torch.nn.Parameter(torch.zeros(0)), "ZeRO-3 and FSDP1 empty parameters"),
    "without rows": (lambda: torch.nn.Parameter(torch.zeros(0, 37)), "ZeRO-3 and FSDP1 empty parameters"),
    "flat": (lambda: torch.nn.Parameter(torch.zeros(101 * 37)), "FSDP1 makes one flat parameter of several"),
    "freed": (freed, "freed, its storage is empty, as FSDP leaves a parameter between forwards"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_named_for_what_it_is(kind):
    make, message = KINDS[kind]
    hidden, weight, _, labels = inputs(4, 5, dtype=torch.float32)
    calls = [
        lambda w: alignloss.linear_logprob(hidden, w, labels),
        lambda w: alignloss.sequence_logprob(hidden, w, labels),
        lambda w: alignloss.SFTLoss()(hidden, w, labels),
        lambda w: alignloss.DPOLoss()(hidden, weight, labels, ref_hidden=hidden, ref_weight=w),
        lambda w: alignloss.linear_kl(hidden, w, hidden, weight, labels),
        lambda w: alignloss.linear_kl(hidden, weight, hidden, w, labels),
    ]
    for run in calls:
        with pytest.raises(ValueError, match=message):
            run(make())


def replaced(*shape, dtype=torch.float32):
    def release(weight):
        weight.data = torch.zeros(shape, dtype=dtype)

    return release


def release_storage(weight):
    weight.untyped_storage().resize_(0)


RELEASES = {
    "emptied": replaced(0),
    "without rows": replaced(0, 37),
    "another vocabulary": replaced(7, 37),
    "another dtype": replaced(101, 37, dtype=torch.bfloat16),
    "freed": release_storage,
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("op", ["log-probability", "KL", "one pass"])
def test_a_weight_that_is_gone_in_the_backward(op, release):
    hidden, weight, _, labels = inputs(4, 5, dtype=torch.float32)
    h, w = leaf(hidden, torch.float32), torch.nn.Parameter(weight.clone())
    if op == "KL":
        result = alignloss.linear_kl(h, w, hidden, weight, labels)
    elif op == "one pass":
        result = alignloss.CPOLoss()(h, w, labels).loss
    else:
        result = alignloss.linear_logprob(h, w, labels)
    RELEASES[release](w)
    if (op, release) == ("one pass", "freed"):  # the gradient is made, and fits
        result.backward()
        assert bool(w.grad.isfinite().all())
        return
    with pytest.raises(RuntimeError, match="the backward needs weight as the forward had it, and it is"):
        result.sum().backward()


def test_one_pass_does_not_need_the_weight_again_and_a_second_backward_says_so():
    hidden, weight, _, labels = inputs(4, 5, dtype=torch.float32)
    h, w = leaf(hidden, torch.float32), torch.nn.Parameter(weight)
    loss = alignloss.CPOLoss()(h, w, labels).loss
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    release_storage(w)
    assert bool(first.isfinite().all())
    with pytest.raises(RuntimeError, match="the backward needs weight"):
        loss.backward()


def sharded_weight(rank, size) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    weight = distribute_tensor(torch.randn(11, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    hidden, labels = torch.randn(3, 4), torch.tensor([1, 2, 3])
    for run in (alignloss.linear_logprob, torch.compile(alignloss.linear_logprob, backend="eager")):
        with pytest.raises(Exception, match=r"(?s)weight is a DTensor.*Partial\(.avg.\)"):
            run(hidden, weight, labels)
    reference = torch.nn.Linear(4, 11, bias=False)
    model = torch.nn.Linear(4, 11, bias=False)
    model.weight = torch.nn.Parameter(weight)
    reference.weight = torch.nn.Parameter(distribute_tensor(torch.zeros(11, 4), weight.device_mesh, [Shard(0)]))
    alignloss.update_reference(reference, model, mix=0.5)
    assert torch.equal(reference.weight.to_local(), 0.5 * weight.to_local())


def test_a_sharded_weight(tmp_path):
    run_processes(sharded_weight, 1, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [alignloss.DPOLoss(), alignloss.PreferenceLoss("npo", beta=0.1)])
def test_16_bit_references_are_refused(loss, dtype):
    hidden, weight, _, labels = inputs(4, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"ref_logps must be float32 or float64.*cast_forward_inputs"):
        loss(hidden, weight, labels, ref_logps=torch.zeros(4, dtype=dtype))


UNREAL = {
    "emptied": lambda: torch.zeros(0),
    "meta": lambda: torch.zeros(3, 4, device="meta"),
    "freed": lambda: with_attribute(torch.zeros(3, 4)),
}


@pytest.mark.parametrize("side", ["reference", "model"])
@pytest.mark.parametrize("unreal", UNREAL)
def test_a_reference_is_not_updated_from_nothing(unreal, side):
    models = {
        name: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(4, 3)) for name in ("reference", "model")
    }
    if unreal == "emptied":
        for model in models.values():  # both, as ZeRO-3 does
            model[1].weight = torch.nn.Parameter(torch.zeros(0))
    elif unreal == "meta":
        models[side][1].weight = torch.nn.Parameter(torch.zeros(3, 4, device="meta"))
    else:
        models[side][1].weight.untyped_storage().resize_(0)
    before = models["reference"][0].weight.clone()
    with pytest.raises(ValueError, match=r"1\.weight is"):
        alignloss.update_reference(models["reference"], models["model"])
    assert torch.equal(models["reference"][0].weight, before)


def test_a_reference_without_parameters():
    with pytest.raises(ValueError, match="nothing to move"):
        alignloss.update_reference(torch.nn.ReLU(), torch.nn.ReLU())


# every tensor that a call takes, of 4 sequences of 5 tokens or packed
def arguments_of(function, packed=False):
    hidden, weight, bias, labels = inputs(4, 5, masked=0.0, dtype=torch.float32)
    given = {
        "hidden": hidden, "weight": weight, "labels": labels, "bias": bias,
        "ref_hidden": hidden.roll(1, 0), "ref_weight": weight.roll(1, 0), "ref_bias": bias.roll(1, 0),
        "token_index": torch.arange(20), "token_weights": torch.rand(4, 5) + 0.5, "nll_labels": labels,
        "pair_weights": torch.rand(2) + 0.5, "num_sequences": torch.tensor(3.0), "num_tokens": torch.tensor(7.0),
        "desirable": torch.tensor([True, False, True, False]), "kl": torch.tensor(0.1),
        "chosen_scores": torch.rand(2) + 1, "rejected_scores": torch.rand(2),
        "chosen_seq_kl": torch.rand(2), "rejected_seq_kl": torch.rand(2), "delta": torch.tensor(0.2),
    }  # fmt: skip
    if packed:
        flat = ("hidden", "labels", "ref_hidden", "token_weights", "nll_labels")
        given = {n: v.flatten(0, 1) if n in flat else v for n, v in given.items()}
        given["cu_seqlens"] = torch.tensor([0, 5, 10, 15, 20])
    return {name: given[name] for name in function if name in given}


HEAD = ("hidden", "weight", "labels", "bias", "token_index")
LOGPS = {"ref_logps": torch.linspace(-20, -18, 4)}
CALLS = {
    "linear_logprob": (lambda **a: alignloss.linear_logprob(**a), HEAD),
    "linear_logprob_stats": (lambda **a: alignloss.linear_logprob_stats(**a, stats=("entropy",)).entropy, HEAD),
    "sequence_logprob": (lambda **a: alignloss.sequence_logprob(**a).logps, (*HEAD, "token_weights")),
    "linear_kl": (lambda **a: alignloss.linear_kl(**a), (*HEAD, "ref_hidden", "ref_weight", "ref_bias")),
    "one_pass_loss": (lambda **a: alignloss.one_pass_loss(**a, loss_fn=lambda logps, _: logps.sum()), HEAD),
    "SFT": (lambda **a: alignloss.SFTLoss()(**a).loss, (*HEAD, "token_weights", "num_tokens")),
    "CPO": (
        lambda **a: alignloss.CPOLoss()(**a).loss,
        (*HEAD, "token_weights", "nll_labels", "pair_weights", "num_sequences", "num_tokens"),
    ),
    "DPO": (lambda **a: alignloss.DPOLoss()(**a).loss, (*HEAD, "ref_hidden", "ref_weight", "ref_bias", "pair_weights")),
    "KTO": (lambda **a: alignloss.KTOLoss()(**a, **LOGPS).loss, (*HEAD, "desirable", "kl")),
    "ODPO": (
        lambda **a: alignloss.PreferenceLoss("odpo", beta=0.1, offset_weight=1.0)(**a, **LOGPS).loss,
        (*HEAD, "chosen_scores", "rejected_scores"),
    ),
    "BCO": (
        lambda **a: alignloss.PreferenceLoss("bco", beta=0.1)(**a, **LOGPS).loss, (*HEAD, "desirable", "delta"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "weight", "hidden weight bias"])
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_may_come_from_inference_mode_or_says_why_not(name, trained, packed):
    """Alone and all together; what a backward of the head would need of the three is a clear error."""
    function, takes = CALLS[name]
    takes = (
        (*takes, "cu_seqlens")
        if packed and name not in ("linear_logprob", "linear_logprob_stats", "linear_kl", "one_pass_loss")
        else takes
    )
    plain = arguments_of(takes, packed)
    trained = trained.split()

    def run(inference):
        with torch.inference_mode():
            made = {n: plain[n].clone() for n in inference}
        given = {n: leaf(v, torch.float32) if n in trained else v for n, v in (plain | made).items()}
        function(**given).sum().backward()
        return [given[n].grad for n in trained]

    expected = run(())
    for inference in [(n,) for n in takes if n not in trained] + [tuple(n for n in takes if n not in trained)]:
        needed = {n for n in takes if n.endswith(("hidden", "weight", "bias"))} if name == "linear_kl" else set()
        if {"weight", "bias"} & set(trained):
            needed |= {"hidden", "weight", "bias"}
        if needed & set(inference):
            with pytest.raises(ValueError, match=r"torch.inference_mode\(\).*torch.no_grad"):
                run(inference)
            continue
        for got, value in zip(run(inference), expected, strict=True):
            assert torch.equal(got, value)


def test_everything_runs_inside_inference_mode():
    for name, (function, takes) in CALLS.items():
        given = arguments_of(takes)
        expected = function(**given)
        with torch.inference_mode():
            assert torch.equal(function(**given), expected), name


REGIMES = {
    "nothing": ("", None), "frozen": ("hidden", None), "one pass": ("hidden weight bias", None),
    "groups": ("hidden weight bias", 9_000), "recomputed": ("hidden weight bias", 2_000), "head": ("weight bias", None),
}  # fmt: skip


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", CALLS)
def test_every_regime_traces_without_values(name, regime):
    trained, workspace = REGIMES[regime]
    function, takes = CALLS[name]
    loss = {"SFT": alignloss.SFTLoss, "CPO": alignloss.CPOLoss, "DPO": alignloss.DPOLoss, "KTO": alignloss.KTOLoss}
    if name in loss:
        module, extra = loss[name](validate=False, workspace_bytes=workspace), LOGPS if name == "KTO" else {}
        function = lambda **a: module(**a, **extra).loss
    elif name in ("ODPO", "BCO"):
        options = {"offset_weight": 1.0} if name == "ODPO" else {}
        module = alignloss.PreferenceLoss(name.lower(), beta=0.1, validate=False, workspace_bytes=workspace, **options)
        function = lambda **a: module(**a, **LOGPS).loss
    else:
        plain = function
        function = lambda **a: plain(**a, validate=False, workspace_bytes=workspace)
    given = arguments_of(takes)
    expected = function(**given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v).requires_grad_(n in trained.split()) for n, v in given.items()}
        result = function(**fake)
        assert result.shape == expected.shape and result.dtype == expected.dtype
        if trained:
            result.sum().backward()
            for n in trained.split():
                assert fake[n].grad.shape == given[n].shape
        for missing in ({"token_index": None}, {"validate": True}):
            if "validate" in missing and name in (*loss, "ODPO", "BCO"):
                continue
            with pytest.raises(ValueError, match="give token_index and validate=False"):
                (function if "token_index" in missing else CALLS[name][0])(**(fake | missing))


def test_a_step_in_one_pass_has_no_kernels_under_fake_tensors():
    options = {"backend": "triton", "validate": False}
    with FakeTensorMode():
        for loss_fn in (alignloss.SFTLoss(**options), alignloss.CPOLoss(**options), alignloss.ORPOLoss(**options)):
            h, w = torch.randn(4, 5, 8, requires_grad=True), torch.randn(19, 8, requires_grad=True)
            labels, index = torch.zeros(4, 5, dtype=torch.long), torch.arange(11)
            loss_fn(h, w, labels, token_index=index).loss.backward()
            assert h.grad.shape == h.shape and w.grad.shape == w.shape


@pytest.mark.parametrize("what", ["nll_labels", "real_sequences"])
def test_values_that_are_looked_at_are_missing_by_name_under_fake_tensors(what):
    with FakeTensorMode():
        hidden, weight, labels = torch.randn(20, 8), torch.randn(19, 8), torch.zeros(20, dtype=torch.long)
        given = {"token_index": torch.arange(20), "cu_seqlens": torch.arange(0, 21, 5)}
        given |= {"nll_labels": labels} if what == "nll_labels" else {"real_sequences": 4}
        with pytest.raises(ValueError, match="under FakeTensorMode there are no values"):
            alignloss.CPOLoss()(hidden, weight, labels, **given)


def test_every_function_with_labels_takes_narrow_ones():
    """uint8 holds neither -100 nor 300: an id of 156 is not ignored by the first, nor 44 by the second."""
    ids = torch.tensor([[156, 44, 3, 7], [44, 156, 9, 200]])
    hidden, weight = torch.randn(2, 4, 8), torch.randn(256, 8)
    both = torch.cat([ids, ids.flip(1)])
    wide = torch.cat([hidden, hidden.flip(1)])
    stats = alignloss.linear_logprob_stats(wide, weight, both, stats=("log_sum_sq_probs",))
    generator = lambda: torch.Generator().manual_seed(0)
    calls = {
        "linear_logprob": lambda y, **o: alignloss.linear_logprob(wide, weight, y, **o),
        "linear_logprob_stats": lambda y, **o: alignloss.linear_logprob_stats(wide, weight, y, stats=("lse",), **o).lse,
        "sequence_logprob": lambda y, **o: (
            alignloss.sequence_logprob(wide, weight, y, token_weights=torch.full(y.shape, 0.5), **o).logps
        ),
        "sequence lengths": lambda y, **o: alignloss.sequence_logprob(wide, weight, y, **o).lengths,
        "one_pass_loss": lambda y, **o: alignloss.one_pass_loss(wide, weight, y, lambda logps, _: logps.sum(), **o),
        "linear_kl": lambda y, **o: alignloss.linear_kl(wide, weight, wide.flip(0), weight, y, **o),
        "ld_dpo_token_weights": lambda y, **o: alignloss.ld_dpo_token_weights(y, tail_weight=0.5, **o),
        "sampo_token_weights": lambda y, **o: alignloss.sampo_token_weights(y, generator=generator(), **o),
        "wpo_pair_weights": lambda y, **o: alignloss.wpo_pair_weights(stats, y, **o),
        "next_token_labels": lambda y, **o: alignloss.next_token_labels(y, torch.ones_like(y), **o),
        "SFT": lambda y, **o: alignloss.SFTLoss(**o)(wide, weight, y).losses,
        "CPO": lambda y, **o: alignloss.CPOLoss(**o)(wide, weight, y, nll_labels=y).losses,
        "metrics": lambda y, **o: torch.stack([*alignloss.CPOLoss(**o)(wide, weight, y).metrics().values()]),
    }
    named = {
        name
        for name in alignloss.__all__
        if inspect.isfunction(value := getattr(alignloss, name)) and "labels" in inspect.signature(value).parameters
    }
    assert named <= set(calls)
    for name, function in calls.items():
        for ignore_index in (-100, 300):
            for dtype in (torch.uint8, torch.int16, torch.int32):
                got, expected = (function(both.to(t), ignore_index=ignore_index) for t in (dtype, torch.int64))
                assert torch.equal(got, expected), (name, dtype, ignore_index)
        with pytest.raises(ValueError, match="must be integers"):
            function(both.double())


@pytest.mark.parametrize("ambient", ["bfloat16", "float64", "meta"])
def test_ambient_defaults_change_nothing(ambient):
    ids = torch.randint(0, 101, (4, 6))

    given = arguments_of((*HEAD, "ref_hidden", "ref_weight", "desirable"))
    head = {n: given[n] for n in HEAD}
    pair = {n: given[n] for n in ("hidden", "weight", "labels", "bias")}
    packed = {"cu_seqlens": torch.tensor([0, 5, 10, 15, 20])}
    stats = alignloss.linear_logprob_stats(**pair, stats=("log_sum_sq_probs",))
    rows = torch.randint(0, 9, (3, 6)), torch.ones(3, 6, dtype=torch.int64), torch.arange(6).expand(3, 6) > 2

    def everything():
        shift = alignloss.RunningShift()
        shift.update(LOGPS["ref_logps"], given["desirable"])
        h, w = leaf(given["hidden"], torch.float32), leaf(given["weight"], torch.float32)
        out = alignloss.DPOLoss(nll_weight=0.1)(h, w, given["labels"], **LOGPS, stats=("entropy", "is_top1"))
        out.loss.backward()
        results = [out.loss.detach(), out.losses, *out.metrics().values(), h.grad, w.grad, shift.delta]
        results += [*alignloss.linear_logprob_stats(**head, stats=("entropy", "lse"))[:3]]
        results += alignloss.sequence_logprob(
            given["hidden"].flatten(0, 1), given["weight"], given["labels"].flatten(), **packed
        )
        results.append(alignloss.linear_kl(**pair, ref_hidden=given["ref_hidden"], ref_weight=given["ref_weight"]))
        results.append(alignloss.ld_dpo_token_weights(given["labels"], tail_weight=0.3))
        results.append(alignloss.sampo_token_weights(given["labels"], generator=torch.Generator().manual_seed(0)))
        results.append(alignloss.wpo_pair_weights(stats, given["labels"]))
        results.append(alignloss.next_token_labels(ids, ids > 3))
        results += [*alignloss.mismatched_pairs(*rows, 0)]
        results += [*alignloss.self_play_pairs([rows[0][0]], [rows[0][1]], [rows[0][2]], 0)]
        results.append(alignloss.kto_kl(LOGPS["ref_logps"], LOGPS["ref_logps"] - 0.3))
        f_dpo = alignloss.PreferenceLoss("f_dpo", beta=0.1, divergence=alignloss.losses.js_divergence)
        results.append(f_dpo(**pair, **LOGPS).losses)
        kto = alignloss.KTOLoss()(**pair, **LOGPS, desirable=given["desirable"], kl=0.1, num_sequences=3)
        results += [kto.loss, *kto.metrics().values()]
        results.append(alignloss.ORPOLoss()(**pair, pair_weights=torch.tensor([0.5, 1.0], device="cpu")).loss)
        mixture = alignloss.MixtureLoss([alignloss.DPOLoss(), alignloss.IPOLoss()], [0.5, 0.5])
        results.append(mixture(**pair, **LOGPS).loss)
        several = {n: leaf(v, torch.float32) if n in ("hidden", "weight") else v for n, v in pair.items()}
        out = alignloss.CPOLoss(workspace_bytes=REGIMES["groups"][1])(**several)
        out.loss.backward()
        results += [out.loss.detach(), out.losses, several["weight"].grad]
        return results

    expected = everything()
    if ambient == "meta":
        with torch.device("meta"):
            got = everything()
    else:
        torch.set_default_dtype(getattr(torch, ambient))
        try:
            got = everything()
        finally:
            torch.set_default_dtype(torch.float32)
    for i, (value, exact) in enumerate(zip(got, expected, strict=True)):
        assert value.dtype == exact.dtype and value.device == exact.device, i
        assert torch.equal(value, exact), i


@pytest.mark.parametrize("unreal", [freed, lambda: torch.zeros(2, device="meta")], ids=["freed", "meta"])
def test_data_without_values_are_named_everywhere(unreal):
    hidden, weight, _, labels = inputs(4, 5, dtype=torch.float32)
    real = torch.zeros(2)
    calls = {
        "kl_logps": lambda: alignloss.kto_kl(unreal(), real),
        "ref_kl_logps": lambda: alignloss.kto_kl(real, unreal()),
        "rewards": lambda: alignloss.RunningShift().update(unreal(), True),
        "attention_mask": lambda: alignloss.mismatched_pairs(labels, unreal(), labels, 0),
        "each of prompts, completions and samples": lambda: alignloss.self_play_pairs(
            [unreal()], [real.long()], [real.long()], 0
        ),
        "num_sequences": lambda: alignloss.CPOLoss()(hidden, weight, labels, num_sequences=unreal()),
        "num_tokens": lambda: alignloss.SFTLoss()(hidden, weight, labels, num_tokens=unreal()),
        "pair_weights": lambda: alignloss.CPOLoss()(hidden, weight, labels, pair_weights=unreal()),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}.* is (freed|on meta)"):
            call()


def test_a_shift_that_was_made_in_inference_mode_can_be_updated():
    with torch.inference_mode():
        shift = alignloss.RunningShift()
    shift.update(torch.tensor([3.0]), True)
    assert shift.delta.item() == 3


def test_a_reference_beside_nll_labels_is_scored_at_the_given_positions(monkeypatch):
    """No look-up, which would wait for a GPU, in either projection."""
    hidden, weight, _, labels = inputs(4, 5, masked=0.0, dtype=torch.float32)
    labels[:, :2] = -100
    nll_labels = torch.randint(0, 101, (4, 5)).where(labels == -100, labels)
    given = {"ref_hidden": hidden.roll(1, 0), "ref_weight": weight, "nll_labels": nll_labels}
    module = alignloss.DPOLoss(nll_weight=0.1)
    expected = module(hidden, weight, labels, **given)

    def looked_up(*arguments):
        raise AssertionError("positions were looked up")

    monkeypatch.setattr(torch, "nonzero", looked_up)
    got = module(hidden, weight, labels, **given, token_index=torch.arange(20))
    assert torch.equal(got.losses, expected.losses) and torch.equal(got.loss, expected.loss)


def test_vmap_says_what_it_does_not_do():
    hidden, weight = torch.randn(2, 4, 5, 8), torch.randn(23, 8)
    labels, index = torch.randint(0, 23, (2, 4, 5)), torch.arange(20)
    call = lambda h, y, **o: alignloss.linear_logprob(h, weight, y, **o)
    got = torch.func.vmap(lambda h, y: call(h, y, token_index=index))(hidden, labels)
    assert torch.equal(got, call(hidden, labels))
    with pytest.raises(ValueError, match=r"under torch\.func\.vmap over labels.*give token_index"):
        torch.func.vmap(call)(hidden, labels)
    with pytest.raises(RuntimeError, match=r"hidden requires a gradient inside torch\.func\.vmap"):
        torch.func.vmap(call, (0, None))(hidden.requires_grad_(), labels[0])
