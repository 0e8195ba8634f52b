"""Heads of DDP and DTensor whose gradients would be those of one process are refused, and the ways out work."""

import copy
import io
import itertools

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import error
from torch import nn

import alignloss

B, T, H, V = 2, 4, 8, 16


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, H), nn.Linear(H, H)

    def forward(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


class Model(nn.Module):
    def __init__(self, tied=False, frozen=False):
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.model.embedding.weight
        self.lm_head.weight.requires_grad_(not frozen)

    def forward(self, ids):
        return self.model(ids)


def batch(rank):
    torch.manual_seed(rank)
    return torch.randint(0, V, (2 * B, T)), torch.randint(0, V, (2 * B, T))


CALLS = {
    "CPO": lambda h, w, y: alignloss.CPOLoss()(h, w, y).loss,
    "SFT": lambda h, w, y: alignloss.SFTLoss()(h, w, y).loss,
    "logprob": lambda h, w, y: alignloss.linear_logprob(h, w, y).sum(),
    "sums": lambda h, w, y: alignloss.sequence_logprob(h, w, y).logps.sum(),
    "kl": lambda h, w, y: alignloss.linear_kl(h, w, h.detach(), w.detach().flip(0), y).sum(),
}


def data_parallel(rank, size):
    """The module inside of DDP is refused, whoever calls; its wrapper is not, whatever ran before."""
    ids, labels = batch(rank)
    for tied, frozen in ((False, False), (True, False), (False, True)):
        for name, call in CALLS.items():
            torch.manual_seed(0)
            model = Model(tied, frozen)
            single = copy.deepcopy(model)
            call(model(ids), model.lm_head.weight, labels)  # before there is a wrapper
            ddp = nn.parallel.DistributedDataParallel(model)
            torch.save(ddp.state_dict(), io.BytesIO())
            with pytest.raises(ValueError, match="never ran with gradients"):
                call(ddp.module(ids), ddp.module.lm_head.weight, labels)
            with torch.no_grad():  # where there is nothing to average
                call(ddp.module(ids), ddp.module.lm_head.weight, labels)
            for _ in range(2):
                hidden = ddp(ids)
                call(hidden, ddp.module.lm_head.weight, labels).backward()
            for other in range(size):
                other_ids, other_labels = batch(other)
                for _ in range(2):
                    (call(single(other_ids), single.lm_head.weight, other_labels) / size).backward()
            for (parameter, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
                if p.grad is not None:
                    assert error(p.grad, q.grad) <= 1e-5, (name, parameter)


def saved_whole(rank, size):
    ids, labels = batch(rank)
    ddp = nn.parallel.DistributedDataParallel(Model())
    with pytest.raises(ValueError, match="never ran with gradients"):
        CALLS["SFT"](ddp.module(ids), ddp.module.lm_head.weight, labels)
    hooks = copy.deepcopy(ddp._forward_hooks)
    assert len(hooks) == 1
    torch.save(hooks, io.BytesIO())


def gathered(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial, Replicate

    _, labels = batch(rank)
    torch.manual_seed(rank)
    hidden = torch.randn(2 * B, T, H, requires_grad=True)
    torch.manual_seed(0)
    model = fully_shard(Model(), mesh=init_device_mesh("cpu", (size,)))
    weight = model.lm_head.weight
    for name, call in CALLS.items():
        for whole in (weight.full_tensor(), weight.full_tensor().double().float()[:]):
            with pytest.raises(ValueError, match="without grad_placements"):
                call(hidden, whole, labels)
        with pytest.raises(ValueError, match="local shard of a DTensor"):
            call(hidden, weight.to_local(), labels)
        call(hidden, weight.detach().full_tensor(), labels)  # which does not train
        with torch.no_grad():
            call(hidden, weight.full_tensor(), labels)
        single = nn.Parameter(weight.detach().full_tensor().clone())
        call(hidden, single, labels).backward()
        dist.all_reduce(single.grad)
        model.zero_grad()
        call(hidden, weight.full_tensor(grad_placements=[Partial("avg")]), labels).backward()
        assert error(weight.grad.full_tensor(), single.grad / size) <= 1e-5, name
        call(hidden, weight.full_tensor(grad_placements=[Replicate()]), labels).backward()


def summoned(rank, size):
    from torch.distributed.fsdp import FullyShardedDataParallel

    ids, labels = batch(rank)
    for (name, call), named in itertools.product(CALLS.items(), (False, True)):
        options = {"device_id": torch.device("cpu"), "use_orig_params": named}
        model = Model()
        model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
        wrapped = FullyShardedDataParallel(model, **options)
        for _ in range(4):  # the second step has another parameter, or the same one
            hidden = wrapped(ids)
            for outer in (wrapped, wrapped.lm_head):
                with FullyShardedDataParallel.summon_full_params(outer):
                    with pytest.raises(ValueError, match="summon_full_params"):
                        call(hidden, wrapped.lm_head.weight, labels)
                    call(hidden, wrapped.lm_head.weight.detach(), labels)
            if name != "kl":  # which takes the tensor of the weight for its reference
                call(hidden, wrapped.lm_head, labels).backward()
                assert sum(float(p.grad.norm()) for p in wrapped.lm_head.parameters() if p.grad is not None) > 0


def names_of_torch(rank, size):
    """The private names that the refusals rest on."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import distribute_tensor

    weight = distribute_tensor(torch.randn(V, H), init_device_mesh("cpu", (size,))).requires_grad_()
    node = weight.full_tensor().grad_fn
    assert node.dtensor_spec.mesh.size() == size and node.grad_placements is None
    ddp = nn.parallel.DistributedDataParallel(Model())
    assert ddp._active_ddp_module is None and ddp._lazy_init_ran is False
    seen = []
    ddp.module.model.register_forward_hook(lambda *_: seen.append(type(ddp)._active_ddp_module))
    ddp(batch(rank)[0])
    assert seen == [ddp] and ddp._lazy_init_ran
    fsdp = FullyShardedDataParallel(Model(), device_id=torch.device("cpu"))
    fsdp(batch(rank)[0])
    with FullyShardedDataParallel.summon_full_params(fsdp):
        assert fsdp.training_state.name == "SUMMON_FULL_PARAMS"


@pytest.mark.parametrize("work", [data_parallel, saved_whole, gathered, summoned, names_of_torch])
def test_two_processes(work, tmp_path):
    run_processes(work, 2, tmp_path)
