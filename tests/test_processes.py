"""The code of docs/processes.md, the loss inside the forward of a wrapped module: two processes against one."""

import copy
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_processes
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


def half_of_the_pairs(rank: int, size: int, how: str, tied: bool) -> None:
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


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("how", "tied"), [("DDP", True), ("FSDP2", False), nightly("DDP", False), nightly("FSDP2", True)]
)
def test_the_gradients_are_those_of_one_process(how, tied, tmp_path):
    run_processes(half_of_the_pairs, 2, tmp_path, how, tied)


def whole_model(rank: int, size: int, how: str, tied: bool) -> None:
    """A model of transformers, as it comes, sharded in several ways, by head_call."""
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from alignloss.hf import UnsupportedModel, check_model, head_call, hidden_and_head

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=V, hidden_size=H, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, final_logit_softcapping=2.0, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    single = copy.deepcopy(model)
    if how.startswith("DDP"):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters="unused" in how)
    elif how == "FSDP1":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers if "layers" in how else ():
            fully_shard(layer, mesh=mesh)
        if "head" in how:
            fully_shard(model.lm_head, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    ids = torch.randint(1, V, (2 * B, T))
    labels = alignloss.next_token_labels(ids, torch.ones_like(ids))
    ref_logps = torch.linspace(-16, -14, 2 * B)
    loss_fn = alignloss.DPOLoss(beta=0.5, softcap=2.0)

    def loss_of(model, rows):
        run = lambda head: loss_fn(head.hidden, head.weight, labels[rows], head.bias, ref_logps=ref_logps[rows])
        return head_call(model, run, input_ids=ids[rows], use_cache=False)[0].loss

    assert check_model(wrapped) == (1.0, 2.0)
    mine = torch.tensor([2 * rank, 2 * rank + 1])
    for _ in range(2):  # the second step finds what the first one left
        single.zero_grad()
        wrapped.zero_grad()
        loss_of(single, torch.arange(2 * B)).backward()
        loss_of(wrapped, torch.cat([mine, B + mine])).backward()
        summoned = nullcontext()
        if how == "FSDP1":
            summoned = FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True)
        with summoned:
            for (name, got), expected in zip(model.named_parameters(), single.parameters(), strict=True):
                gradient = got.grad.full_tensor() if how.startswith("FSDP2") else got.grad
                assert error(gradient, expected.grad) <= 2e-5, name
    with pytest.raises(UnsupportedModel, match="head_call"):
        hidden_and_head(wrapped, {"input_ids": ids})


@pytest.mark.parametrize(
    ("how", "tied"),
    [
        ("DDP", True),
        nightly("DDP unused", False),
        nightly("FSDP2", True),
        nightly("FSDP2 layers", True),
        nightly("FSDP2 layers", False),
        ("FSDP2 layers head", False),
        nightly("FSDP1", False),
        nightly("FSDP1", True),
    ],
)
def test_a_model_of_transformers_has_the_gradients_of_one_process(how, tied, tmp_path):
    pytest.importorskip("transformers")
    run_processes(whole_model, 2, tmp_path, how, tied)


def shared_prompts_of_two(rank: int, size: int, how: str) -> None:
    """Rows that grow in one process alone, whose comparison with padded rows must not be one that others wait for."""
    import transformers

    from alignloss.hf import share_prompts

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    single = copy.deepcopy(model)
    if how == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss_fn = alignloss.DPOLoss(beta=0.5)

    def backward(model, batch, factor=1.0):
        ref_logps = torch.full((len(batch.cu_seqlens) - 1,), -9.0)
        run = lambda head: loss_fn(
            head.hidden, head.weight, batch.labels, head.bias, ref_logps=ref_logps, **batch.layout
        )  # fmt: skip
        (factor * batch.head_call(model, run)[0].loss).backward()

    for lengths in ((4, 4), (3, 9), (8, 7), (12, 2)):  # of the prompt in either process
        pair = {"chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}
        batches = [share_prompts([{"prompt_ids": [3 + i % 4 for i in range(n)], **pair}]) for n in lengths]
        single.zero_grad()
        wrapped.zero_grad()
        for batch in batches:
            backward(single, batch, 0.5)
        backward(wrapped, batches[rank])
        for (name, got), expected in zip(model.named_parameters(), single.parameters(), strict=True):
            gradient = got.grad if how == "DDP" else got.grad.full_tensor()
            assert error(gradient, expected.grad) <= 2e-5, name


@pytest.mark.parametrize("how", ["DDP", pytest.param("FSDP2", marks=pytest.mark.nightly)])
def test_shared_prompts_that_grow_in_one_process(how, tmp_path):
    pytest.importorskip("transformers")
    run_processes(shared_prompts_of_two, 2, tmp_path, how)


SPLIT = re.search(r"```python\n(part = .*?)```", PAGE, re.S)[1]


def split_sequences(rank: int, size: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2 * B, T, H), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (2 * B, T))
    single = weight.detach().clone().requires_grad_()
    alignloss.CPOLoss()(hidden, single, labels).loss.backward()
    exec(SPLIT, {"torch": torch, "alignloss": alignloss, "rank": rank, "bounds": [0, 2, T]} | locals())
    torch.distributed.all_reduce(weight.grad)
    assert error(weight.grad / 2, single.grad) <= 1e-5


def test_the_gradients_of_split_sequences_are_those_of_one_process(tmp_path):
    run_processes(split_sequences, 2, tmp_path)


VOCABULARY = re.search(r"```python\n(part = torch.*?)```", PAGE, re.S)[1]


def split_vocabulary(rank: int, size: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2 * B, T, H, requires_grad=True), torch.randn(V, H)
    labels = torch.randint(0, V, (2 * B, T))
    single = hidden.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    alignloss.CPOLoss()(*single, labels).loss.backward()
    names = {"torch": torch, "alignloss": alignloss} | locals()
    exec(VOCABULARY, names)
    assert error(hidden.grad, single[0].grad) <= 1e-5
    assert error(names["part"].grad, single[1].grad.chunk(size)[rank]) <= 1e-5


def test_the_gradients_of_a_split_vocabulary_are_those_of_one_process(tmp_path):
    run_processes(split_vocabulary, 2, tmp_path)
