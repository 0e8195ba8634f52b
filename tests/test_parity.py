"""Every loss in the forward of a model that DDP or FSDP wraps: all gradients are those of one process.

Those are in float64, of the mean of the losses of all processes' parts, and of two steps that add up.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from processes import run_processes
from test_packing import data_of, module_of
from torch import nn

from alignloss.losses import LOSSES

SEQUENCES, T, H, V, FP32 = 4, 5, 16, 61, 1e-6
# ratios of probabilities, in which an error of a logarithm is one of the ratio: one process in float32 errs as much
RATIOS = {"chi_po": 1e-5, "discopop": 2e-6, "exo": 1e-5}


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, H), nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, loss_fn, ids, labels, data, by_module):
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        head = (self.lm_head, labels) if by_module else (self.lm_head.weight, labels, self.lm_head.bias)
        return loss_fn(hidden, *head, **data).loss


def wrapped(model, how, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

    if how.startswith("DDP"):
        return nn.parallel.DistributedDataParallel(model)
    if how.startswith("FSDP1"):
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        if "own unit" in how:
            model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
        return FullyShardedDataParallel(model, **options)
    mesh = (2, size // 2) if how.startswith("HSDP") else (size,)
    names = ("replicas", "shards")[-len(mesh) :]
    options = {"mesh": init_device_mesh("cpu", mesh, mesh_dim_names=names), "reshard_after_forward": "kept" not in how}
    if "16 bits" in how:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    fully_shard([model.layer, model.lm_head] if "grouped" in how else model.layer, **options)
    if "own unit" in how:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def gradients_of(model, how):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if how.startswith("DDP"):
        return [p.grad.clone() for p in model.parameters()]
    if how.startswith("FSDP1"):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return [p.grad.clone() for p in model.parameters()]
    return [p.grad.full_tensor() for p in model.parameters()]


def last_alone(model, how, last):
    """The context in which gradients of a step stay in their process, unless it is the last one."""
    if how.startswith(("DDP", "FSDP1")):
        return nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return nullcontext()


def part_of(name, step, rank):
    """ids, labels and data of a process in a step."""
    loss_fn = module_of(name, "torch")
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids, labels = torch.randint(0, V, (2, SEQUENCES, T), generator=generator)
    labels[:, 0] = -100
    labels[rank % SEQUENCES, 2:] = -100
    return loss_fn, ids, labels, data_of(loss_fn, SEQUENCES)


def expected_gradients(model, name, size):
    model.zero_grad()
    for step in range(2):
        for rank in range(size):
            (model(*part_of(name, step, rank), False) / size).backward()
    return [p.grad for p in model.parameters()]


def every_loss(rank, size, how):
    torch.manual_seed(0)
    model = Model(tied="tied" in how)
    single = copy.deepcopy(model).double()
    parallel = wrapped(model, how, size)
    by_module = "own unit" in how
    for name in sorted(LOSSES):
        parallel.zero_grad()
        for step in range(2):
            with last_alone(parallel, how, step == 1):
                parallel(*part_of(name, step, rank), by_module).backward()
        tolerance = 0.05 if "16 bits" in how else RATIOS.get(name, FP32)
        expected = expected_gradients(single, name, size)
        largest = max(float(gradient.norm()) for gradient in expected)
        for got, gradient in zip(gradients_of(parallel, how), expected, strict=True):
            off = float((got.double() - gradient).norm())
            assert off <= tolerance * largest, (name, off / max(largest, 1e-30))


BY_DAY = ["DDP tied", "FSDP1 own unit", "FSDP2 own unit"]
BY_NIGHT = [
    "DDP", "FSDP1", "FSDP2", "FSDP2 tied", "FSDP2 grouped", "FSDP2 kept", "FSDP2 own unit kept", "FSDP2 16 bits",
]  # fmt: skip


@pytest.mark.parametrize("how", [*BY_DAY, *(pytest.param(how, marks=pytest.mark.nightly) for how in BY_NIGHT)])
def test_two_processes(how, tmp_path):
    run_processes(every_loss, 2, tmp_path, how)


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["HSDP", "DDP", "FSDP1", "FSDP2 own unit"])
def test_four_processes(how, tmp_path):
    run_processes(every_loss, 4, tmp_path, how)
