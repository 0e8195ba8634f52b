"""The README's section on losses: its table names every loss and its code runs."""

import re
from pathlib import Path

import torch
from reference import inputs
from torch import nn

import alignloss

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LOSSES = re.search(r"\n## Losses\n(.*?)\n## ", README, re.S).group(1)


def test_the_table_has_every_loss_once():
    names = re.findall(r"^\| `(\w+)` \|", LOSSES, re.M)
    assert sorted(names) == sorted(alignloss.losses.LOSSES)
    assert re.findall(r"any of (\d+) \[losses\]", README) == [str(len(names))]


def test_the_code_of_the_losses_runs():
    B = 2
    hidden, weight, _, labels = inputs(2 * B, 6, dtype=torch.float32)
    ref_hidden, ref_weight, _, _ = inputs(2 * B, 6, dtype=torch.float32)
    names = {
        "alignloss": alignloss,
        "torch": torch,
        "B": B,
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "ref_logps": torch.zeros(2 * B),
        "desirable": torch.arange(2 * B) % 2 == 0,
        "loss_fn": alignloss.DPOLoss(),
        "model": nn.Linear(2, 2),
        "ref_model": nn.Linear(2, 2),
        "prompts": [torch.tensor([1])],
        "completions": [torch.tensor([2])],
        "samples": [torch.tensor([3])],
        "pad_token_id": 0,
        "temperature": 0.7,
        "old_logps": torch.zeros(2 * B, 6),
        "advantages": torch.ones(2 * B),
    }
    for block in re.findall(r"```python\n(.*?)```", LOSSES, re.S):
        exec(block, names)
    names["loss"].backward()
    assert hidden.grad.isfinite().all()
    assert names["logged"]["rewards/accuracies"] <= 1
