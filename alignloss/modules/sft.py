"""Supervised fine-tuning: the likelihood alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_keywords, checked_labels
from ..losses import sft_loss
from ..ops.head import project
from ..ops.module_head import takes_modules
from ..ops.processes import sums_over
from ..ops.sequence import (
    checked_token_weights,
    labelled_tokens,
    masked_weights,
    parts_layout,
    sequence_scatter,
    sequence_sum,
)
from .groups import Batch, Results
from .head import HeadLoss, divisor
from .outputs import UnpairedOutput, measured


class SFTLoss(HeadLoss):
    """The negative log-likelihood alone, in nats per labelled token. Options as in `linear_logprob`.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 4), torch.zeros(8, 4)
        >>> alignloss.SFTLoss()(hidden, weight, torch.tensor([[7, 0, 1], [2, 5, -100]])).loss
        tensor(2.0794)
    """

    @takes_modules("weight")
    def forward(
        self,
        hidden: Tensor,  # (B, T, H), or packed (tokens, H) or (1, tokens, H)
        weight: Tensor | nn.Module,  # (V, H)
        labels: Tensor,  # hidden's shape without H
        bias: Tensor | None = None,  # (V,)
        *,
        cu_seqlens: Tensor | None = None,  # (B + 1,)
        real_sequences: int | None = None,
        token_index: Tensor | None = None,  # (N,)
        token_weights: Tensor | None = None,  # the shape of labels
        num_tokens: float | Tensor | None = None,
        stats: Sequence[str] = (),
        sequence_group: Any = None,
        vocab_group: Any = None,
        **unknown: Any,
    ) -> UnpairedOutput:
        """The loss for labels aligned with hidden: `labels[..., t]` is what `hidden[..., t]` predicts, not HF's labels.

        loss = -sum of (weighted) token log-probabilities / num_tokens, by default the labelled tokens of this call.
        `losses` are the sequences' NLL sums (nats), `logps` their negatives; NLL implies no reward: `rewards` are 0.
        `cu_seqlens` and `real_sequences` as in `sequence_logprob`, `vocab_group` as in `linear_logprob`, `stats` and
        `sequence_group` as in `PreferenceLoss`.
        """
        check_keywords("SFTLoss takes no further data", {}, unknown)
        labels = checked_labels("labels", labels)
        layout = cu_seqlens, self.validate, real_sequences, self.ignore_index
        asked, data = ("SFT", self.bits(stats)), {"num_tokens": num_tokens}
        offsets, sequences, group = parts_layout(labels, *layout, sequence_group, vocab_group, self.alike(asked, data))
        data |= {"cu_seqlens": cu_seqlens, "real_sequences": real_sequences, "token_weights": token_weights}
        token_weights = checked_token_weights(token_weights, labels)
        of_call = {"token_index": token_index, "vocab_group": vocab_group}
        projection = project(hidden, weight, labels, bias, asked, data, **of_call, **self.head_options)
        batch = Batch(
            projection.labels,
            offsets,
            sequences,
            False,
            projection.options.backend,
            token_weights=token_weights,
            num_tokens=divisor("num_tokens", num_tokens, labels.device),
            group=group,
        )
        found, scored = self.run(projection, batch, self._evaluate, stats, group is None, self._differentiated)
        loss, values, logps, rewards, _ = found
        dtype = projection.result_dtype
        output = UnpairedOutput(*(t.to(dtype) for t in (loss, values.detach(), logps.detach(), rewards)))
        return measured(output, scored)

    def _evaluate(self, tokens: Tensor, batch: Batch) -> Results:
        return self._scored(tokens, batch)[0]

    def _differentiated(self, tokens: Tensor, batch: Batch) -> tuple[Results, Tensor]:
        """The loss and its gradient: a weighted token counts -1 / num_tokens."""
        results, weights, num_tokens = self._scored(tokens, batch)
        dsums = -torch.ones_like(results.sums) / num_tokens
        return results, sequence_scatter(dsums, batch.offsets, weights, len(tokens), batch.backend)

    def _scored(self, tokens: Tensor, batch: Batch) -> tuple[Results, Tensor | None, float | Tensor]:
        weights = masked_weights(batch.token_weights, batch.labels, self.ignore_index)
        sums = sequence_sum(tokens, batch.offsets, batch.sequences, weights, batch.backend)
        num_tokens = batch.num_tokens
        if num_tokens is None:
            lengths = labelled_tokens(batch.labels, batch.offsets, batch.sequences, self.ignore_index)
            sums, lengths = sums_over(batch.group, sums, lengths)
            num_tokens = lengths.sum().clamp(min=1)
        else:
            (sums,) = sums_over(batch.group, sums)
        values, rewards = sft_loss(sums)
        loss = values.sum() / num_tokens
        return Results(loss, values, sums, rewards, loss), weights, num_tokens
