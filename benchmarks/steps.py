"""Whole training steps of a randomly initialised model: time, memory, and the share of the loss layer."""

import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignloss.commands.fit import MODELS, estimate, read_model
from alignloss.commands.measure import peak_bytes

from .cases import Case, Inputs, make_inputs
from .measure import Row, interleave, reason, search, synchronize
from .providers import PROVIDERS

RANK = 16


class Run(NamedTuple):
    """How a model is trained."""

    train: str  # "full", or "lora": adapters of rank 16 on every linear layer but the head
    checkpointing: bool  # recompute each layer in the backward
    optimizer: bool  # AdamW, in the dtype of the parameters

    def __str__(self) -> str:
        return self.train + ", checkpointing" * self.checkpointing + ", AdamW" * self.optimizer


class Trained(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    @property
    def held_bytes(self) -> int:
        """What stays between two steps: weights and states."""
        states = () if self.optimizer is None else self.optimizer.state.values()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *tensors))


def build(case: Case, run: Run, layers: int | None = None) -> Trained:
    """The model of the shape and vocabulary of a case, randomly initialised, and its optimizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = MODELS[case.shape] | {"vocab_size": case.vocabulary}
    settings |= {} if layers is None else {"num_hidden_layers": layers}
    config = CONFIG_MAPPING[settings["model_type"]](**settings, use_cache=False)
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    if run.train == "lora":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False).get_base_model()
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trained(model.train(), torch.optim.AdamW(trained, lr=1e-6, fused=True) if run.optimizer else None)


def take_step(case: Case, trained: Trained, inputs: Inputs, name: str) -> tuple[float, float, float]:
    """Seconds of the model's forward, of the loss layer, and of the model's backward with the optimizer."""
    model = trained.model
    model.zero_grad(set_to_none=True)
    scored = inputs.labels != -100
    # the prompt before the labels is attended to, the padding after them is not
    padded = scored.flip(1).cumsum(1).flip(1) > 0
    times = [now(case)]
    mask = padded if case.masked else None
    hidden = model.model(inputs.labels.clamp(min=0), attention_mask=mask).last_hidden_state
    times.append(now(case))
    leaf = hidden.detach().requires_grad_()
    head = inputs._replace(hidden=leaf, weight=model.lm_head.weight)
    PROVIDERS[name].run(head, "DPO step").backward()
    times.append(now(case))
    hidden.backward(leaf.grad)
    if trained.optimizer is not None:
        trained.optimizer.step()
    times.append(now(case))
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


def now(case: Case) -> float:
    synchronize(case.device)
    return time.perf_counter()


def make_labels(case: Case) -> Inputs:
    """The inputs of a case without hidden states and head, which are the model's."""
    return make_inputs(case._replace(hidden=1))._replace(hidden=torch.empty(0), weight=torch.empty(0))


def measure_steps(case: Case, run: Run, names: list[str], rounds: int) -> list[Row]:
    """Seconds, interleaved, and peak bytes of a DPO step, one row for each provider."""
    try:
        trained, inputs = build(case, run), make_labels(case)
    except Exception as error:  # a model that does not fit
        return [{"provider": name, "mode": str(run), "failed": reason(error)} for name in names]
    steps = {name: partial(take_step, case, trained, inputs, name) for name in names}
    taken, failed = interleave(steps, rounds)  # the round that warms up makes the states
    rows: list[Row] = []
    for name in names:
        row: Row = {"provider": name, "mode": str(run)}
        rows.append(row)
        if name in failed:
            row["failed"] = failed[name]
            continue
        whole = [sum(times) for times in taken[name]]
        trained.model.zero_grad(set_to_none=True)
        row |= {
            "seconds": statistics.median(whole),
            "seconds_spread": [min(whole), max(whole)],
            "tokens_per_second": case.tokens / statistics.median(whole),
            "loss_seconds": statistics.median(loss for _, loss, _ in taken[name]),
            "loss_share": statistics.median(times[1] / sum(times) for times in taken[name]),
            "peak_bytes": trained.held_bytes + peak_bytes(steps[name]),
            **_estimated(case, run, name),
        }
    return rows


def measure_longest_steps(case: Case, run: Run, names: list[str], memory: int, most: int) -> list[Row]:
    """The longest sequences, of the number of a case, whose step fits `memory` bytes, and those that `fit` expects."""
    trained = build(case, run)
    rows: list[Row] = []
    for name in names:

        def sized(length: int) -> Case:
            return case._replace(tokens=length * case.sequences)

        def needed(length: int, name: str = name) -> int:
            inputs = make_labels(sized(length))
            take_step(sized(length), trained, inputs, name)
            trained.model.zero_grad(set_to_none=True)
            return trained.held_bytes + peak_bytes(lambda: take_step(sized(length), trained, inputs, name))

        start = case.tokens // case.sequences
        row: Row = {"provider": name, "mode": str(run), "memory_bytes": memory}
        row["most_length"], row["stopped_by"] = search(needed, memory, start, most, 1)
        if _estimated(case, run, name):
            row["estimated_most_length"], _ = search(
                lambda length, name=name: _estimated(sized(length), run, name)["estimated_bytes"],
                memory, start, most, 1,
            )  # fmt: skip
        trained.model.zero_grad(set_to_none=True)
        rows.append(row)
    return rows


def _estimated(case: Case, run: Run, name: str) -> dict[str, Any]:
    """What `alignloss fit` expects, where it estimates such a step."""
    if case.dtype != "bfloat16" or name not in ("alignloss", "full logits"):
        return {}
    memory = torch.cuda.get_device_properties(0).total_memory if case.device == "cuda" else 80 << 30
    return {"estimated_bytes": expected_bytes(case, run, name, gpu_memory=memory)}


def expected_bytes(case: Case, run: Run, name: str, **machine: Any) -> int:
    """Bytes that `alignloss fit` expects of a step; `machine` and its precision as in `estimate`."""
    step = estimate(
        read_model(case.shape)._replace(vocabulary=case.vocabulary),
        case.tokens,
        length=case.tokens // case.sequences,
        labelled=case.labelled / case.tokens,
        lora=run.train == "lora",
        rank=RANK,
        checkpointing=run.checkpointing,
        optimizer="adamw" if run.optimizer else "sgd",
        workspace_bytes=case.workspace_bytes,
        **machine,
    )
    return step.total(name == "full logits")
