"""What a loss module returns, and the metrics that training logs are made of."""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..losses.common import log_odds
from ..ops.sequence import labelled_tokens, sequence_sum

# statistics of `linear_logprob_stats` that metrics are made of
METRIC_STATS = ("entropy", "mean_logits", "is_top1")


class ScoredTokens(NamedTuple):
    """The M positions of a call with S sequences, and their statistics, detached; None where not asked for.

    It belongs to a result without being a field of it, and hangs on its tensor `losses`: what rebuilds the tuple from
    its fields (accelerate, DDP, FSDP2, `_replace`, a tree map) mostly hands that tensor on.
    """

    labels: Tensor  #: (M,)
    offsets: Tensor | None  #: (S + 1,) of packed sequences; None for S parts of one length
    sequences: int
    ignore_index: int
    entropy: Tensor | None = None  #: (M,) nats
    mean_logits: Tensor | None = None  #: (M,)
    is_top1: Tensor | None = None  #: (M,), 0 and 1; NaN where the distribution is none
    desirable: Tensor | None = None  #: (S,) or 0-d, of an unpaired loss, as given
    kl: Tensor | None = None  #: of an unpaired loss, as given
    versions: tuple[tuple[int, int], ...] = ()  #: of what is the caller's: identity, and how often it was written

    def _borrowed(self) -> dict[str, Tensor]:
        """What is the caller's, who may write to it."""
        given = {"labels": self.labels, "desirable": self.desirable, "kl": self.kl}
        return {name: value for name, value in given.items() if value is not None and not value.is_inference()}

    def _check_unchanged(self) -> None:
        if torch.compiler.is_compiling():
            return
        before = dict(self.versions)
        for name, value in self._borrowed().items():
            if before.get(id(value), value._version) != value._version:
                raise RuntimeError(
                    f"{name} were written to since this loss was computed, and metrics() would be those of other data: "
                    "call metrics() before the buffers are used again, or give the loss a clone of them"
                )

    def lengths(self) -> Tensor:
        """Labelled tokens of each sequence, (S,) float64, at least 1; NaN for offsets that did not fit."""
        lengths = labelled_tokens(self.labels, self.offsets, self.sequences, self.ignore_index).clamp(min=1).double()
        return lengths if self.offsets is None else torch.where(self.offsets[0] < 0, torch.nan, lengths)

    def mean(self, name: str, members: Tensor | None = None) -> Tensor:
        """Mean of a statistic over the labelled tokens of all sequences, or of those where `members` (S,) is 1; 0-d."""
        labelled = (self.labels != self.ignore_index).double()
        sums, counts = (
            sequence_sum(values, self.offsets, self.sequences, None, "torch")
            for values in (getattr(self, name) * labelled, labelled)
        )
        if members is not None:
            sums, counts = (torch.where(members > 0, values, 0) for values in (sums, counts))
        return sums.sum() / counts.sum()

    def metrics(
        self, groups: dict[str, Tensor | None], logps: Tensor, accuracy_of: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Means of what was asked for: of logits for each group of sequences, of hits for those of one.

        logps: of the sequences whose hits are counted; where one is not a number, neither is their share.
        """
        metrics = {}
        if self.entropy is not None:
            metrics["entropy"] = self.mean("entropy")
        if self.mean_logits is not None:
            metrics |= {f"logits{group}": self.mean("mean_logits", members) for group, members in groups.items()}
        if self.is_top1 is not None:
            share = self.mean("is_top1", accuracy_of)
            metrics["mean_token_accuracy"] = torch.where(logps.isnan().any(), torch.nan, share)
        return metrics


class _PairedFields(NamedTuple):
    loss: Tensor  #: 0-d
    losses: Tensor  #: (B,) as the function returned them, before pair_weights
    chosen_logps: Tensor  #: (B,)
    rejected_logps: Tensor  #: (B,)
    chosen_rewards: Tensor  #: (B,)
    rejected_rewards: Tensor  #: (B,)
    nll_loss: Tensor  #: 0-d, NLL per chosen token, before nll_weight


class PairedOutput(_PairedFields):
    """Result of a paired loss. Only `loss` is differentiable; log-probabilities are sums in nats."""

    def metrics(self) -> dict[str, Tensor]:
        """What TRL's DPO and ORPO trainers log, by their names: detached 0-d tensors of this process.

        Means over pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (chosen above
        rejected), `logps/chosen`, `logps/rejected` (sums in nats), `lengths/chosen`, `lengths/rejected`,
        `log_odds_chosen` (log odds ratio of the sequences' mean log-probabilities) and `log_odds_ratio` (its log
        sigmoid). `nll_loss` is per chosen token. `not_finite` counts the sequences whose log-probability is not finite:
        a NaN stays in its own sequence, but not out of the means. From the statistics that the call asked for, means
        over labelled tokens: `entropy`; `logits/chosen`, `logits/rejected` ("mean_logits"); `mean_token_accuracy` of
        the chosen ("is_top1"). Nothing waits for a GPU until a value is read.

        Raises:
            RuntimeError: for a result that something rebuilt around other tensors, which lost what they are made of; or
                where labels, desirable or kl were written to since the call.
        """
        scored = _scored(self)
        count, lengths = len(self.chosen_logps), scored.lengths()
        means = torch.cat([self.chosen_logps, self.rejected_logps]) / lengths
        odds = log_odds(means[:count]) - log_odds(means[count:])
        chosen = (torch.arange(2 * count, device=lengths.device) < count).double()
        margins = self.chosen_rewards - self.rejected_rewards
        right = torch.where(margins.isnan(), margins, (self.chosen_rewards > self.rejected_rewards).to(margins.dtype))
        metrics = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": right.mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
            "nll_loss": self.nll_loss,
            "lengths/chosen": lengths[:count].mean(),
            "lengths/rejected": lengths[count:].mean(),
            "log_odds_chosen": odds.mean(),
            "log_odds_ratio": torch.nn.functional.logsigmoid(odds).mean(),
            "not_finite": _not_finite(self.chosen_logps, self.rejected_logps),
            **scored.metrics({"/chosen": chosen, "/rejected": 1 - chosen}, self.chosen_logps, accuracy_of=chosen),
        }
        return {name: value.to(self.loss.dtype) for name, value in metrics.items()}


class _UnpairedFields(NamedTuple):
    loss: Tensor  #: 0-d
    losses: Tensor  #: (B,) as the function returned them, before pair_weights
    logps: Tensor  #: (B,)
    rewards: Tensor  #: (B,)


class UnpairedOutput(_UnpairedFields):
    """Result of an unpaired loss. Only `loss` is differentiable; log-probabilities are sums in nats."""

    def metrics(self) -> dict[str, Tensor]:
        """What TRL's KTO trainer logs, by its names: detached 0-d tensors of this process.

        Where the loss knows `desirable`: means over the desirable sequences ("chosen") and over the others
        ("rejected"), `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected` (sums in
        nats), NaN where there are none; otherwise `rewards` and `logps` over all. `lengths` and `kl` are means,
        `not_finite` a count as in `PairedOutput.metrics`. From the statistics that the call asked for, means over
        labelled tokens: `entropy`; `logits/chosen`, `logits/rejected` or `logits` ("mean_logits");
        `mean_token_accuracy` ("is_top1"). Nothing waits for a GPU until a value is read.

        Raises:
            RuntimeError: for a result that something rebuilt around other tensors, which lost what they are made of; or
                where labels, desirable or kl were written to since the call.
        """
        scored, metrics = _scored(self), {}
        if scored.kl is not None:
            metrics["kl"] = scored.kl.detach().double().clamp(min=0).mean()
        groups: dict[str, Tensor | None] = {"": None}
        if scored.desirable is not None:
            chosen = scored.desirable.double().expand(len(self.losses))
            groups = {"/chosen": chosen, "/rejected": 1 - chosen}
        for group, members in groups.items():
            for name, values in (("rewards", self.rewards), ("logps", self.logps)):
                kept = values if members is None else torch.where(members > 0, values, 0)
                metrics[name + group] = kept.sum() / (len(values) if members is None else members.sum())
        if scored.desirable is not None:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics |= {
            "lengths": scored.lengths().mean(),
            "not_finite": _not_finite(self.logps),
            **scored.metrics(groups, self.logps),
        }
        return {name: value.to(self.loss.dtype) for name, value in metrics.items()}


def _not_finite(*logps: Tensor) -> Tensor:
    return (~torch.cat(logps).isfinite()).sum()


_Output = TypeVar("_Output", PairedOutput, UnpairedOutput)


def measured(output: _Output, scored: ScoredTokens) -> _Output:
    """A result with what its metrics are made of."""
    # a compiler may know no attributes of tensors; there it stays with the tuple
    holder: Any = output if torch.compiler.is_compiling() else output.losses
    if not torch.compiler.is_compiling():
        scored = scored._replace(versions=tuple((id(t), t._version) for t in scored._borrowed().values()))
    holder._alignloss_scored = scored
    return output


def _scored(output: PairedOutput | UnpairedOutput) -> ScoredTokens:
    holder = output if hasattr(output, "_alignloss_scored") else output.losses
    scored: ScoredTokens | None = getattr(holder, "_alignloss_scored", None)
    if scored is None:
        raise RuntimeError(
            "this result was rebuilt around other tensors than the loss module returned, and what metrics() needs "
            "beside its fields stayed with those: call metrics() on the module's own result, and pass the dictionary on"
        )
    scored._check_unchanged()
    return scored
