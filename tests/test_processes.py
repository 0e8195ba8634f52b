"""The code of docs/processes.md, the loss inside the forward of a wrapped module: two processes against one."""

import copy
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import error
from torch import nn

import alignloss

PAGE = (Path(__file__).parents[1] / "docs" / "processes.md").read_text(encoding="utf-8")
CODE = r"```python\n(class WithLoss.*?)\n(wrapped = .*?)\n(out = .*?)\n```"
WITH_LOSS, WRAP, CALL = re.search(CODE, PAGE, re.S).groups()
B, T, H, V = 4, 5, 8, 23


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, H), nn.Linear(H, H)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=torch.tanh(self.layer(self.embedding(input_ids))))


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.model.embedding.weight


def problem(tied):
    """The names that the page leaves open, its class, and a batch."""
    torch.manual_seed(0)
    names = {"torch": torch, "model": Model(tied), "loss_fn": alignloss.DPOLoss(beta=0.5)}
    exec(WITH_LOSS, names)
    ids = torch.randint(0, V, (2 * B, T))
    labels = alignloss.next_token_labels(ids, torch.ones_like(ids))
    return names, ids, labels, torch.linspace(-16, -14, 2 * B)


def sharded(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module.model.model.layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def half_of_the_pairs(rank: int, folder: str, how: str, tied: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    names, ids, labels, ref_logps = problem(tied)
    module = names["WithLoss"](names["model"], names["loss_fn"])
    single = copy.deepcopy(module)
    single(ids, None, labels, ref_logps).loss.backward()
    mine = torch.tensor([2 * rank, 2 * rank + 1])
    mine = torch.cat([mine, B + mine])
    names["batch"] = {"input_ids": ids[mine], "attention_mask": None}
    names |= {"labels": labels[mine], "ref_logps": ref_logps[mine]}
    if how == "DDP":
        exec(WRAP, names)
    else:
        names["wrapped"] = sharded(module)
    exec(CALL, names)
    names["out"].loss.backward()
    for (name, got), expected in zip(module.named_parameters(), single.parameters(), strict=True):
        gradient = got.grad.full_tensor() if how == "FSDP2" else got.grad
        assert error(gradient, expected.grad) <= 1e-5, name
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter ends, which is not what this is about


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_the_gradients_are_those_of_one_process(how, tied, tmp_path):
    torch.multiprocessing.spawn(half_of_the_pairs, (str(tmp_path), how, tied), nprocs=2)
