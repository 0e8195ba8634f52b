"""Errors against full logits in float64 where distributions are flat, trained, all but certain or impossible, and where
the logits of a row share an offset: of log-probabilities, of their sum, and of both gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case, Inputs
from .measure import Row, exact, reason
from .providers import PROVIDERS, backward, forward, logps_of_logits, require

# log-odds of a label in nats, about: by other logits that are standard normal, which those of a small H are not
PEAKS = {"flat": None, "trained": 0.0, "certain": 14.0, "impossible": -30.0}
# hidden states and rows of the head both have this much in a direction of their own, squared an offset of every logit
OFFSETS = (0.0, 30.0, 300.0)
SUMMED = 4096
# tokens of the gradients: through full logits those of all would need tens of GiB
TRAINED = 512


class Setting(NamedTuple):
    peak: str
    offset: float

    @property
    def name(self) -> str:
        return f"{self.peak}, offset {self.offset:g}"


def make(case: Case, setting: Setting, seed: int = 0) -> Inputs:
    """One sequence of tokens, every one labelled."""
    generator = torch.Generator(case.device).manual_seed(seed)
    options = {"generator": generator, "device": case.device}
    width = case.hidden - 1  # the last column holds the offset
    weight = torch.randn(case.vocabulary, width, **options) * width**-0.5
    labels = torch.randint(0, case.vocabulary, (case.tokens,), **options)
    hidden = torch.randn(case.tokens, width, **options)
    log_odds = PEAKS[setting.peak]
    if log_odds is not None:
        # the other logits are standard normal: their log-sum is log V + 1/2
        wanted = torch.log(torch.tensor(float(case.vocabulary))) + 0.5 + log_odds
        rows = weight[labels]
        hidden += ((wanted - (hidden * rows).sum(1)) / rows.square().sum(1))[:, None] * rows
    root = setting.offset**0.5
    hidden = torch.nn.functional.pad(hidden, (0, 1), value=root)
    weight = torch.nn.functional.pad(weight, (0, 1), value=root)
    dtype = getattr(torch, case.dtype)
    upstream = torch.randn(case.tokens, **options)
    return Inputs(hidden.to(dtype)[None], weight.to(dtype), labels[None], upstream, None, case.workspace_bytes)


def first(inputs: Inputs, tokens: int) -> Inputs:
    return inputs._replace(
        hidden=inputs.hidden.detach()[:, :tokens].clone(),
        labels=inputs.labels[:, :tokens],
        upstream=inputs.upstream[:tokens],
    )


@torch.no_grad()
def exact_logps(inputs: Inputs) -> Tensor:
    weight, rows, labels = inputs.weight.double(), inputs.hidden[0].split(256), inputs.labels[0].split(256)
    return torch.cat([logps_of_logits(h.double(), weight, y, None) for h, y in zip(rows, labels, strict=True)])


def measure_accuracy(case: Case, setting: Setting, names: list[str]) -> list[Row]:
    inputs = make(case, setting)
    logps = exact_logps(inputs)
    few = first(inputs, min(TRAINED, case.tokens))
    _, *gradients = exact(few, few.upstream.double())
    slopes = torch.full_like(few.upstream, -1 / len(few.upstream))
    of_mean = exact(few, slopes.double())[1:]
    found: list[Row] = []
    for name in names:
        provider = PROVIDERS[name]
        by_token = provider.logps is not None
        row: Row = {"provider": name, "mode": setting.name, "peak": setting.peak, "offset": setting.offset}
        found.append(row)
        try:
            if by_token:
                require(inputs, "forward")
                values = forward(provider, inputs, "forward").double()
                wrong = values - logps
                row |= {
                    "logps_error_rms": wrong.square().mean().sqrt().item(),
                    "logps_error_max": wrong.abs().max().item(),
                    "sum_error": abs(wrong.sum().item()),
                }
            mode = "trainable head" if by_token else "SFT step"
            require(few, mode)
            backward(forward(provider, few, mode), few, mode)
        except Exception as error:
            row["failed"] = reason(error)
            continue
        tensors = few.hidden, few.weight
        for which, tensor, truth in zip(
            ("dhidden", "dweight"), tensors, gradients if by_token else of_mean, strict=True
        ):
            assert tensor.grad is not None
            row[f"{which}_error"] = ((tensor.grad.double() - truth).norm() / truth.norm()).item()
            tensor.grad = None
    return found


def summary(rows: list[Row]) -> list[Row]:
    """Of each provider the largest error of all cases, and of its errors over ours the median."""
    ours = {(row["vocabulary"], row["mode"]): row for row in rows if row["provider"] == "alignloss"}
    lines: list[Row] = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == name]
        line: Row = {"provider": name, "mode": "all", "failed_cases": sum("failed" in row for row in mine)}
        for key in ("logps_error_rms", "logps_error_max", "sum_error", "dhidden_error", "dweight_error"):
            pairs = [(row[key], ours[row["vocabulary"], row["mode"]].get(key)) for row in mine if key in row]
            if pairs:
                line[key] = max(value for value, _ in pairs)
                ratios = torch.tensor([value / max(our, 1e-300) for value, our in pairs if our is not None])
                line[f"{key}_of_alignloss"] = ratios.median().item()
        lines.append(line)
    return lines
