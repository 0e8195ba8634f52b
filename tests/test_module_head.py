"""A head given as its module: the results of its weight and bias, inside its own call, in one process and several."""

import copy
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import error, inputs
from torch import nn

import alignloss

B, T, H, V = 2, 5, 8, 23
DOCS = Path(__file__).parents[1] / "docs" / "processes.md"
(PAGE,) = re.findall(r"```python\n([^`]*sharded\.lm_head[^`]*)```", DOCS.read_text(encoding="utf-8"))
ROUTES = {
    "log-probabilities": lambda h, w, y, **o: alignloss.linear_logprob(h, w, y, **o),
    "statistics": lambda h, w, y, **o: alignloss.linear_logprob_stats(h, w, y, stats=("entropy",), **o),
    "sequences": lambda h, w, y, **o: alignloss.sequence_logprob(h, weight=w, labels=y, **o),
    "KL": lambda h, w, y, **o: alignloss.linear_kl(
        h, w, h.detach().flip(0), w, y, **o, **({"ref_bias": o["bias"]} if o else {})
    ),
    "loss of one's own": lambda h, w, y, **o: alignloss.one_pass_loss(h, w, y, lambda logps, _: -logps.mean(), **o),
    "DPO": lambda h, w, y, **o: alignloss.DPOLoss()(h, w, y, ref_logps=torch.full((2 * B,), -9.0), **o),
    "DPO with a projected reference": lambda h, w, y, **o: alignloss.DPOLoss()(
        h, w, y, ref_hidden=h.detach().flip(0), ref_weight=w, **o, **({"ref_bias": o["bias"]} if o else {})
    ),
    "KTO": lambda h, w, y, **o: alignloss.KTOLoss()(
        h, w, y, ref_logps=torch.full((2 * B,), -9.0), desirable=torch.tensor([True, False, True, False]),
        kl=torch.tensor(0.1), **o,
    ),
    "SFT": lambda h, w, y, **o: alignloss.SFTLoss()(hidden=h, weight=w, labels=y, **o),
    "mixture": lambda h, w, y, **o: alignloss.MixtureLoss([alignloss.CPOLoss(), alignloss.SimPOLoss()], [1.0, 0.5])(
        h, w, y, **o
    ),
}  # fmt: skip


def total(result):
    """A number that every differentiable part of a result has a share in."""
    parts = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
    return sum(t.double().sum() for t in parts if t.requires_grad)


def problem(bias, frozen=False):
    hidden, *_, labels = inputs(2 * B, T, hidden_size=H, vocabulary=V, dtype=torch.float32)
    head = nn.Linear(H, V, bias=bias).requires_grad_(not frozen)
    return hidden.requires_grad_(), head, labels


class Hooks:
    """What gathers a weight before the forward and the backward of its layer, and frees it after the forward."""

    def __init__(self, layer):
        self.whole = {p: p.detach().clone() for p in layer.parameters()}
        self.seen = []
        self.free(layer)
        layer.register_forward_pre_hook(lambda layer, _: self.gather("forward"))
        layer.register_forward_hook(self.after)

    def gather(self, when):
        self.seen.append(when)
        for parameter, values in self.whole.items():
            parameter.untyped_storage().resize_(values.untyped_storage().size())
            with torch.autograd._unsafe_preserve_version_counter(parameter):  # as FSDP2 does
                parameter.detach().copy_(values)

    def free(self, layer):
        for parameter in self.whole:
            parameter.untyped_storage().resize_(0)

    def after(self, layer, _, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: self.gather("backward"))
        self.free(layer)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_module_is_its_weight_and_bias_whether_or_not_hooks_bring_them(route, bias, frozen):
    hidden, head, labels = problem(bias, frozen)
    results = []
    for hooked in (None, False, True):
        layer = copy.deepcopy(head)
        if hooked is None:
            out = ROUTES[route](hidden, layer.weight, labels, **({"bias": layer.bias} if bias else {}))
        else:
            hooks = Hooks(layer) if hooked else None
            out = ROUTES[route](hidden, layer, labels)
        (total(out)).backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad] + [hidden.grad]
        results.append([total(out).detach(), *gradients])
        hidden.grad = None
        assert "forward" not in vars(layer)
        if hooked:
            assert hooks.seen == ["forward", "backward"]
        if isinstance(out, alignloss.modules.outputs.PairedOutput):
            assert out.metrics()
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


class Scaled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.module = layer

    def forward(self, hidden):
        return 2 * self.module(hidden)


def with_another_forward():
    layer = nn.Linear(H, V)
    layer.forward = lambda hidden: 0 * hidden
    return layer


OTHERS = {
    "an embedding": nn.Embedding(V, H),
    "a layer of another forward": Scaled(H, V),
    "another forward": with_another_forward(),
    "a wrapper that may do anything": Wrapper(nn.Linear(H, V)),
    "several layers": nn.Sequential(nn.Linear(H, V)),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("route", ROUTES)
def test_another_layer_is_sent_to_head_call(route, kind):
    hidden, _, labels = problem(True)
    with pytest.raises(ValueError, match=r"(?s)weight.*nn\.Linear.*alignloss\.hf\.head_call"):
        ROUTES[route](hidden, OTHERS[kind], labels)


def test_bad_calls_leave_the_layer_as_it_was():
    hidden, head, labels = problem(True)
    with pytest.raises(ValueError, match="leave bias out"):
        alignloss.linear_logprob(hidden, head, labels, head.bias)
    seen = head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="labels must have the leading shape"):
        alignloss.linear_logprob(hidden, head, labels[0])
    with pytest.raises(ValueError, match=r"hidden must be a torch\.Tensor"):
        alignloss.linear_logprob([1.0], head, labels)
    with pytest.raises(TypeError, match="missing 1 required"):
        alignloss.linear_logprob(hidden, head)
    with pytest.raises(TypeError, match="multiple values"):
        alignloss.linear_logprob(hidden, head, labels, weight=head)
    assert "forward" not in vars(head)
    seen.remove()
    with pytest.raises(ValueError, match="lm_head"):
        alignloss.linear_logprob(hidden, head.weight.detach().numpy(), labels)


@pytest.mark.parametrize("call", [alignloss.linear_logprob, alignloss.SFTLoss(), alignloss.CPOLoss()])
def test_a_module_in_a_compiled_step(call):
    hidden, head, labels = problem(True)
    step = torch.compile(lambda h: total(call(h, head, labels)), fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, lambda h: total(call(h, head, labels))):
        run(hidden).backward()
        results.append([hidden.grad, head.weight.grad, head.bias.grad])
        hidden.grad = head.weight.grad = head.bias.grad = None
    assert all(error(got, expected) <= 1e-6 for got, expected in zip(*results, strict=True))


def adds_an_adapter(layer):
    extra = torch.randn(H, V)
    return layer.register_forward_hook(lambda layer, given, out: out + given[0] @ extra)


def doubled_in_place(layer, given, out):
    out.mul_(2)


CHANGES = {
    "scaled": lambda layer: layer.register_forward_hook(lambda layer, given, out: 2 * out),
    "in place": lambda layer: layer.register_forward_hook(doubled_in_place),
    "an adapter": adds_an_adapter,
    "in place, unseen": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: (out.data.mul_(2), None)[1]
    ),
    "a view in place": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: (out.view(-1).neg_(), None)[1]
    ),
    "rows in place": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: [r.data.neg_() for r in out] and None
    ),
    "a part in place": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: (out[..., 0].fill_(2), None)[1]
    ),
    "by data": lambda layer: layer.register_forward_hook(lambda layer, given, out: setattr(out, "data", out.data * 2)),
    "by NumPy": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: (out.detach().numpy().__imul__(2), None)[1]
    ),
    "a leaf": lambda layer: layer.register_forward_hook(lambda layer, given, out: out.detach().clone().neg()),
    "eight bits": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: out.to(torch.float8_e4m3fn).to(out.dtype)
    ),
    "an entry": lambda layer: layer.register_forward_hook(lambda layer, given, out: out.__setitem__((..., 0), 1.0)),
    "cut": lambda layer: layer.register_forward_hook(lambda layer, given, out: out[..., :4]),
    "banned tokens": lambda layer: layer.register_forward_hook(
        lambda layer, given, out: out.masked_fill(torch.arange(out.shape[-1]) >= 4, -1e9)
    ),
    "clamped": lambda layer: layer.register_forward_hook(lambda layer, given, out: out.clamp(-1, 1)),
    "a power": lambda layer: layer.register_forward_hook(lambda layer, given, out: (out.float() ** 2).to(out.dtype)),
    "detached": lambda layer: layer.register_forward_hook(lambda layer, given, out: out.detach().clone().abs_()),
    "rounded": lambda layer: layer.register_forward_hook(lambda layer, given, out: out.to(torch.int32).to(out.dtype)),
    "another one": lambda layer: layer.register_forward_hook(lambda layer, given, out: torch.ones_like(out)),
    "a tuple": lambda layer: layer.register_forward_hook(lambda layer, given, out: (out,)),
    "before the backward": lambda layer: layer.register_full_backward_pre_hook(lambda layer, grads: (2 * grads[0],)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trains", [False, True])
def test_hooks_that_change_logits_or_their_gradient_are_refused(change, mode, trains):
    hidden, head, labels = problem(True, frozen=not trains)
    CHANGES[change](head)
    with pytest.raises(ValueError, match="hook"), mode():
        alignloss.linear_logprob(hidden if trains else hidden.detach(), head, labels)
    assert "forward" not in vars(head)


def test_a_hook_under_one_of_the_backward_and_one_that_cuts_the_gradient():
    hidden, head, labels = problem(True)
    head.register_full_backward_hook(lambda *_: None)
    alignloss.linear_logprob(hidden, head, labels)
    for hook in (
        lambda layer, given, out: out.clamp(-1, 1),
        lambda layer, given, out: out.detach(),
        lambda layer, given, out: out.detach().requires_grad_(),
    ):
        handle = head.register_forward_hook(hook)
        with pytest.raises(ValueError, match="hooks change what it returns"):
            alignloss.linear_logprob(hidden, head, labels)
        handle.remove()


def looks(layer, given, out):
    print(out.shape, out.dtype, out.float().abs().sum().item(), out.isnan().any(), out.data.mean(), repr(out))
    out.detach().double().clamp_(-1, 1)
    assert torch.equal(copy.deepcopy(out.detach()), out) and type(copy.copy(out.detach().cpu())) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_hooks_that_change_the_input_or_only_look_take_part(mode):
    hidden, head, labels = problem(True)
    head.register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    head.register_forward_hook(looks)
    head.register_forward_hook(lambda layer, given, out: out.double())
    with mode():
        got = alignloss.linear_logprob(hidden, head, labels)
        assert torch.equal(got, alignloss.linear_logprob(2 * hidden, head.weight, labels, head.bias))
        assert alignloss.linear_logprob(hidden[:0], head, labels[:0]).shape == (0, T)


def test_hooks_of_every_module_take_part():
    hidden, head, labels = problem(True)
    of_every_module = torch.nn.modules.module
    handle = of_every_module.register_module_forward_pre_hook(lambda layer, given: (2 * given[0],))
    with handle:
        got = alignloss.linear_logprob(hidden, head, labels)
    assert torch.equal(got, alignloss.linear_logprob(2 * hidden, head.weight, labels, head.bias))
    for register, hook in (
        (of_every_module.register_module_forward_hook, lambda layer, given, out: 2 * out),
        (of_every_module.register_module_full_backward_pre_hook, lambda layer, grads: None),
    ):
        with register(hook), pytest.raises(ValueError, match="hook"):
            alignloss.linear_logprob(hidden, head, labels)


def test_a_hooked_module_under_vmap():
    hidden, head, labels = problem(True)
    head.register_forward_hook(lambda *_: None)
    every = torch.arange(T)
    with torch.no_grad():
        expected = alignloss.linear_logprob(hidden, head, labels)
        got = torch.func.vmap(lambda h, y: alignloss.linear_logprob(h, head, y, token_index=every))(hidden, labels)
    assert error(got, expected) <= 1e-6


@pytest.mark.parametrize("hooked", [False, True])
def test_a_loss_that_uses_the_head_beside(hooked):
    hidden, head, labels = problem(True)
    if hooked:
        head.register_forward_hook(lambda *_: None)

    def loss_fn(logps, _):
        return -logps.mean() + head(hidden[:1]).logsumexp(-1).sum()

    loss = alignloss.one_pass_loss(hidden, head, labels, loss_fn)
    exact = -alignloss.linear_logprob(hidden, head.weight, labels, head.bias)[labels != -100].sum() / labels.numel()
    exact = exact + nn.functional.linear(hidden[:1], head.weight, head.bias).logsumexp(-1).sum()
    assert error(loss.detach(), exact.detach()) <= 1e-6


def test_another_thread_has_its_logits_and_no_loss():
    hidden, head, labels = problem(True)
    head.register_forward_hook(lambda *_: None)
    expected, found = head(hidden), []

    def elsewhere():
        found.append(head(hidden))
        with pytest.raises(ValueError, match="another thread"):
            alignloss.linear_logprob(hidden, head, labels)

    def meanwhile(logps, _):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return -logps.mean()

    alignloss.one_pass_loss(hidden, head, labels, meanwhile)
    assert len(found) >= 1 and all(torch.equal(logits, expected) for logits in found)


def test_one_module_as_two_heads_whose_hooks_change_its_input():
    head, hidden, labels = nn.Linear(8, 20), torch.randn(4, 5, 8), torch.randint(0, 20, (4, 5))
    ref = {"ref_hidden": hidden, "ref_weight": head}
    handle = head.register_forward_pre_hook(lambda layer, given: None)  # that looks on
    assert float(alignloss.linear_kl(hidden, head, hidden, head, labels).abs().max().detach()) <= 1e-6
    assert error(alignloss.DPOLoss()(hidden, head, labels, **ref).loss.detach(), torch.tensor(2.0).log()) <= 1e-6
    handle.remove()
    head.register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    for call in (
        lambda: alignloss.linear_kl(hidden, head, hidden, head, labels),
        lambda: alignloss.DPOLoss()(hidden, head, labels, **ref),
    ):
        with pytest.raises(ValueError, match="are one module whose hooks change its input"):
            call()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, H), nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V)

    def forward(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


def shard(model, how, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if how.startswith("FSDP1"):
        options = {"device_id": torch.device("cpu"), "use_orig_params": "flat" not in how}
        model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
        return FullyShardedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (size,))
    kept = {"reshard_after_forward": "kept" not in how}
    fully_shard([model.layer, model.lm_head] if "grouped" in how else model.lm_head, mesh=mesh, **kept)
    return fully_shard(model, mesh=mesh, **kept)


def gradients_of(model, how):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if how.startswith("FSDP2"):
        return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, with_grads="flat" not in how):
        if "flat" not in how:
            return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in model.named_parameters()}
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}


def in_units_of_their_own(rank, size, how):
    torch.manual_seed(0)
    model = Model()
    single = copy.deepcopy(model)
    wrapped = model if how == "page" else shard(model, how, size)
    ids, labels = torch.randint(0, V, (2, 2 * B * size, T))
    ref_logps = torch.linspace(-16, -14, 2 * B * size)
    chosen = torch.arange(rank * B, rank * B + B)
    mine = torch.cat([chosen, chosen + B * size])
    loss_fn = alignloss.DPOLoss(beta=0.5)
    if how == "page":
        names = {"torch": torch, "model": wrapped, "loss_fn": loss_fn, "batch": {"input_ids": ids[mine]}}
        names |= {"labels": labels[mine], "ref_logps": ref_logps[mine]}
        exec(PAGE, names)
        names["out"].loss.backward()
        loss_fn(single(ids), single.lm_head, labels, ref_logps=ref_logps).loss.backward()
        assert error(model.lm_head.weight.grad.full_tensor(), single.lm_head.weight.grad) <= 1e-5
        return
    if "grouped" in how:
        with pytest.raises(ValueError, match="shares its unit of FSDP2"):
            loss_fn(wrapped(ids[mine]), wrapped.lm_head, labels[mine], ref_logps=ref_logps[mine])
        return
    optimizer, optimizers = torch.optim.SGD(single.parameters(), 1.0), torch.optim.SGD(wrapped.parameters(), 1.0)
    for _ in range(2):  # the second step finds what the first one left
        optimizer.zero_grad()
        optimizers.zero_grad()
        whole = loss_fn(single(ids), single.lm_head, labels, ref_logps=ref_logps)
        out = loss_fn(wrapped(ids[mine]), wrapped.lm_head, labels[mine], ref_logps=ref_logps[mine])
        whole.loss.backward()
        out.loss.backward()
        mean = out.loss.detach().clone()
        dist.all_reduce(mean)
        assert error(mean / size, whole.loss) <= 1e-5 and out.metrics()
        if "flat" not in how:
            found = gradients_of(wrapped, how)
            for name, parameter in single.named_parameters():
                assert error(found[name], parameter.grad) <= 1e-5, name
        optimizer.step()
        optimizers.step()
        if "flat" in how:  # whose gradients have no names
            found = gradients_of(wrapped, how)
            for name, parameter in single.named_parameters():
                assert error(found[name], parameter) <= 1e-5, name


@pytest.mark.parametrize("how", ["FSDP1", "FSDP1 flat", "FSDP2", "FSDP2 kept", "FSDP2 grouped", "page"])
def test_the_gradients_of_a_sharded_head_are_those_of_one_process(how, tmp_path):
    run_processes(in_units_of_their_own, 2, tmp_path, how)
