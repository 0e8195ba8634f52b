"""What is measured: problems named after models, with the inputs of a trained head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignloss.commands.fit import MODELS, read_model


class Case(NamedTuple):
    shape: str  # the name of a model, or HxV
    hidden: int  # H
    vocabulary: int  # V
    softcap: float | None
    tokens: int  # M positions
    masked: float  # the fraction of positions without a label
    dtype: str
    device: str
    sequences: int = 8  # B = 4 pairs, the chosen ones first
    workspace_bytes: int | None = None  # of alignloss

    @property
    def labelled(self) -> int:
        """N, labelled tokens."""
        return max(self.sequences, round(self.tokens * (1 - self.masked)))

    @property
    def small(self) -> "Case":
        """The same at a size that takes no time: to find out what runs, and to load libraries."""
        return self._replace(tokens=16 * self.sequences, hidden=64, vocabulary=256)

    def __str__(self) -> str:
        return (
            f"{self.shape} (H {self.hidden:,}, V {self.vocabulary:,}), {self.tokens:,} tokens of "
            f"{self.sequences} sequences, {self.masked:.0%} masked, {self.dtype}, {self.device}"
            + (f", workspace {self.workspace_bytes / 2**20:,.0f} MiB" if self.workspace_bytes else "")
        )


def case(shape: str, vocabulary: int | None = None, **options) -> Case:
    """A case of a built-in model, or of HxV; `vocabulary` replaces that of the shape."""
    if shape in MODELS:
        model = read_model(shape)
        found = Case(shape, model.hidden_size, model.vocabulary, model.softcap, **options)
    else:
        try:
            hidden, size = (int(part) for part in shape.split("x"))
        except ValueError:
            raise SystemExit(f"a shape is HxV or one of {', '.join(MODELS)}; got {shape!r}") from None
        found = Case(shape, hidden, size, None, **options)
    found = found if vocabulary is None else found._replace(vocabulary=vocabulary)
    if min(found.hidden, found.vocabulary) < 1:
        raise SystemExit(f"H and V are at least 1; got {found.hidden} and {found.vocabulary}")
    if found.sequences < 2 or found.sequences % 2:
        raise SystemExit(f"sequences come in pairs; got {found.sequences}")
    if found.tokens < 1 or found.tokens % found.sequences:
        raise SystemExit(f"tokens are those of {found.sequences} sequences of one length; got {found.tokens}")
    if not 0 <= found.masked < 1:
        raise SystemExit(f"masked is the fraction of positions without a label, in [0, 1); got {found.masked}")
    return found


class Inputs(NamedTuple):
    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, T), -100 where masked
    upstream: Tensor  # (M,) gradient of the token log-probabilities
    softcap: float | None
    workspace_bytes: int | None


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Hidden states and a head that give the labels a probability around 0.5; prompts and padding are masked."""
    generator = torch.Generator(case.device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": case.device}
    weight = torch.randn(case.vocabulary, case.hidden, **options) * case.hidden**-0.5
    tokens = torch.randint(0, case.vocabulary, (case.tokens,), **options)
    # the other logits are standard normal: their log-sum is log V + 1/2
    peak = torch.log(torch.tensor(float(case.vocabulary))) + 0.5
    dtype = getattr(torch, case.dtype)
    hidden = torch.empty(case.tokens, case.hidden, dtype=dtype, device=case.device)
    for rows, targets in zip(hidden.split(4096), tokens.split(4096), strict=True):  # float32 of a few rows at a time
        rows.copy_(torch.randn(rows.shape, **options) + peak * torch.nn.functional.normalize(weight[targets], dim=-1))
    labels = tokens.view(case.sequences, -1)
    for row, count in zip(labels, ragged_lengths(case), strict=True):
        first = int(torch.randint(0, row.numel() - count + 1, (), **options))
        row[:first] = row[first + count :] = -100
    upstream = torch.randn(case.tokens, **options).masked_fill(labels.flatten() == -100, 0)
    hidden = hidden.view(case.sequences, -1, case.hidden)
    return Inputs(hidden, weight.to(dtype), labels, upstream, case.softcap, case.workspace_bytes)


def ragged_lengths(case: Case) -> list[int]:
    """Labelled tokens of each sequence, from half to one and a half times their mean as far as there is room."""
    length, total = case.tokens // case.sequences, case.labelled
    mean = total / case.sequences
    spread = min(mean / 2, length - mean)
    counts = [round(mean + spread * (2 * i / (case.sequences - 1) - 1)) for i in range(case.sequences)]
    counts[-1] += total - sum(counts)
    # neither all of the chosen nor all of the rejected are the short ones
    return [min(length, max(1, count)) for count in counts[::2] + counts[1::2]]
