"""DeepSpeed ZeRO-2 and ZeRO-3 in two processes: every loss, by every way to the head, has the gradients of one."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from test_parity import FP32, RATIOS, H, Model, V, part_of

from alignloss.losses import LOSSES

pytest.importorskip("deepspeed", exc_type=ImportError)

TEXT = (Path(__file__).parents[1] / "docs" / "processes.md").read_text(encoding="utf-8")
PAGE = re.search(r"```python\n(engine = .*?)```", TEXT, re.S)[1]
# where the loss is: in the forward with the weight or the module, or after it, from the hidden states that it returns
ROUTES = ("weight", "module", "after")


class Body(Model):
    def forward(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


def configured(model, stage, rate=1.0):
    """What `deepspeed.initialize` takes."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), rate), "config": config}


def engine(model, *how, **options):
    import deepspeed

    return deepspeed.initialize(**configured(model, *how, **options))[0]


def loss_of(model, route, name, rank):
    loss_fn, ids, labels, data = part_of(name, 0, rank)
    if route == "after":
        return loss_fn(model(ids), model.lm_head, labels, **data).loss
    return model(loss_fn, ids, labels, data, route == "module")


def as_on_the_page(rank, size):
    import deepspeed

    torch.manual_seed(0)
    model = Body()
    single = copy.deepcopy(model).double()
    loss_fn, ids, labels, data = part_of("dpo", 0, rank)
    names = {"deepspeed": deepspeed, "loss_fn": loss_fn, "batch": {"input_ids": ids}, "labels": labels, **data}
    exec(PAGE, names | configured(model, 3))
    for other in range(size):
        (loss_of(single, "after", "dpo", other) / size).backward()
    torch.optim.SGD(single.parameters(), 1.0).step()
    for got, expected in zip(parameters_of(model), single.parameters(), strict=True):
        assert float((got - expected).norm() / expected.norm()) <= 1e-6


def test_the_code_of_the_page(tmp_path):
    run_processes(as_on_the_page, 2, tmp_path)


def refuses_a_weight_that_is_not_there(rank, size):
    model = Body()
    parallel = engine(model, 3)
    loss_fn, ids, labels, data = part_of("dpo", 0, rank)
    hidden = parallel(ids)
    with pytest.raises(ValueError, match="emptied by DeepSpeed ZeRO-3"):
        loss_fn(hidden, model.lm_head.weight, labels, model.lm_head.bias, **data)


def parameters_of(model):
    import deepspeed

    found = []
    for p in model.parameters():
        with deepspeed.zero.GatheredParameters([p]):
            found.append(p.detach().clone())
    return found


def every_loss(rank, size, stage, route):
    from deepspeed.utils import safe_get_full_grad

    torch.manual_seed(0)
    model = Body() if route == "after" else Model()
    single = copy.deepcopy(model).double()
    parallel = engine(model, stage, rate=0.0)
    for name in sorted(LOSSES):
        parallel.backward(loss_of(parallel, route, name, rank))
        found = [safe_get_full_grad(p) for p in model.parameters()]
        parallel.step()
        single.zero_grad()
        for other in range(size):
            (loss_of(single, route, name, other) / size).backward()
        expected = [p.grad for p in single.parameters()]
        largest = max(float(gradient.norm()) for gradient in expected)
        for got, gradient in zip(found, expected, strict=True):
            assert float((got - gradient).norm()) <= RATIOS.get(name, FP32) * largest, name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_those_of_one_process(stage, route, tmp_path):
    run_processes(every_loss, 2, tmp_path, stage, route)


def test_a_weight_after_the_forward_is_refused(tmp_path):
    run_processes(refuses_a_weight_that_is_not_there, 2, tmp_path)


def a_model_of_transformers(rank, size, stage):
    import transformers

    from alignloss.hf import head_call

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    single = copy.deepcopy(model)
    parallel = engine(model, stage)
    optimizer = torch.optim.SGD(single.parameters(), 1.0)

    def loss_of(model, rank):
        loss_fn, ids, labels, data = part_of("dpo", 0, rank)
        run = lambda head: loss_fn(head.hidden, head.weight, labels, head.bias, **data)
        return head_call(model, run, input_ids=ids, use_cache=False)[0].loss

    for _ in range(2):
        parallel.backward(loss_of(parallel, rank))
        parallel.step()
        optimizer.zero_grad()
        for other in range(size):
            (loss_of(single, other) / size).backward()
        optimizer.step()
    for got, expected in zip(parameters_of(model), single.parameters(), strict=True):
        assert float((got - expected).norm() / expected.norm()) <= 2e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_of_transformers_takes_the_steps_of_one_process(stage, tmp_path):
    run_processes(a_model_of_transformers, 2, tmp_path, stage)
