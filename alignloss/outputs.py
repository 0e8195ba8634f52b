"""What a loss module returns, and the metrics that training logs are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .logprob import labelled_tokens
from .losses.common import log_odds

__all__ = ["PairedOutput", "ScoredTokens", "UnpairedOutput"]

# statistics of `linear_logprob_stats` that metrics are made of
STATS = ("entropy", "mean_logits", "is_top1")


class ScoredTokens(NamedTuple):
    """The M positions of a call with S sequences, and their statistics, detached; None where not asked for."""

    labels: Tensor  # (M,)
    offsets: Tensor | None  # (S + 1,) of packed sequences; None: S parts of one length
    sequences: int
    ignore_index: int
    entropy: Tensor | None = None  # (M,) nats
    mean_logits: Tensor | None = None  # (M,)
    is_top1: Tensor | None = None  # (M,)

    def lengths(self) -> Tensor:
        """Labelled tokens of each sequence, (S,) int64, at least 1."""
        return labelled_tokens(self.labels, self.offsets, self.sequences, self.ignore_index).clamp(min=1)

    def mean(self, name: str, members: Tensor | None = None) -> Tensor:
        """Mean of a statistic over the labelled tokens of all sequences, or of those where `members` (S,) is 1; 0-d."""
        labelled = (self.labels != self.ignore_index).double()
        sums, counts = (
            ops.sequence_sum(values, self.offsets, self.sequences, None, "torch")
            for values in (getattr(self, name) * labelled, labelled)
        )
        if members is not None:
            sums, counts = sums * members, counts * members
        return sums.sum() / counts.sum()

    def metrics(self, groups: dict[str, Tensor | None], accuracy_of: Tensor | None = None) -> dict[str, Tensor]:
        """Means of what was asked for: of logits for each group of sequences, of hits for those of one."""
        metrics = {}
        if self.entropy is not None:
            metrics["entropy"] = self.mean("entropy")
        if self.mean_logits is not None:
            metrics |= {f"logits{group}": self.mean("mean_logits", members) for group, members in groups.items()}
        if self.is_top1 is not None:
            metrics["mean_token_accuracy"] = self.mean("is_top1", accuracy_of)
        return metrics


class _PairedFields(NamedTuple):
    loss: Tensor  # 0-d
    losses: Tensor  # (B,) as the function returned them, before pair_weights
    chosen_logps: Tensor  # (B,)
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    nll_loss: Tensor  # 0-d, NLL per chosen token, before nll_weight


class PairedOutput(_PairedFields):
    """Result of a paired loss. Only `loss` is differentiable; log-probabilities are sums in nats."""

    # beside the tuple: of the 2B sequences; None where something rebuilt the tuple from its fields
    scored: ScoredTokens | None = None

    def metrics(self) -> dict[str, Tensor]:
        """What TRL's DPO and ORPO trainers log, by their names: detached 0-d tensors of this process.

        Means over pairs: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (chosen above
        rejected), `logps/chosen`, `logps/rejected` (sums in nats), `lengths/chosen`, `lengths/rejected`,
        `log_odds_chosen` (log odds ratio of the sequences' mean log-probabilities) and `log_odds_ratio` (its log
        sigmoid). `nll_loss` is per chosen token. From the statistics that the call asked for, means over labelled
        tokens: `entropy`; `logits/chosen`, `logits/rejected` ("mean_logits"); `mean_token_accuracy` of the chosen
        ("is_top1"). Nothing waits for a GPU until a value is read.
        """
        metrics = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/margins": (self.chosen_rewards - self.rejected_rewards).mean(),
            "rewards/accuracies": (self.chosen_rewards > self.rejected_rewards).double().mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
            "nll_loss": self.nll_loss,
        }
        if self.scored is not None:
            count, lengths = len(self.chosen_logps), self.scored.lengths()
            means = torch.cat([self.chosen_logps, self.rejected_logps]).double() / lengths
            odds = log_odds(means[:count]) - log_odds(means[count:])
            chosen = (torch.arange(2 * count, device=lengths.device) < count).double()
            metrics |= {
                "lengths/chosen": lengths[:count].double().mean(),
                "lengths/rejected": lengths[count:].double().mean(),
                "log_odds_chosen": odds.mean(),
                "log_odds_ratio": torch.nn.functional.logsigmoid(odds).mean(),
                **self.scored.metrics({"/chosen": chosen, "/rejected": 1 - chosen}, accuracy_of=chosen),
            }
        return {name: value.to(self.loss.dtype) for name, value in metrics.items()}


class _UnpairedFields(NamedTuple):
    loss: Tensor  # 0-d
    losses: Tensor  # (B,) as the function returned them, before pair_weights
    logps: Tensor  # (B,)
    rewards: Tensor  # (B,)


class UnpairedOutput(_UnpairedFields):
    """Result of an unpaired loss. Only `loss` is differentiable; log-probabilities are sums in nats."""

    # beside the tuple: of the B sequences; None where something rebuilt the tuple from its fields
    scored: ScoredTokens | None = None
    desirable: Tensor | None = None  # (B,) or 0-d, as given
    kl: Tensor | None = None  # as given

    def metrics(self) -> dict[str, Tensor]:
        """What TRL's KTO trainer logs, by its names: detached 0-d tensors of this process.

        Where the loss knows `desirable`: means over the desirable sequences ("chosen") and over the others
        ("rejected"), `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected` (sums in
        nats), NaN where there are none; otherwise `rewards` and `logps` over all. `lengths` and `kl` are means. From
        the statistics that the call asked for, means over labelled tokens: `entropy`; `logits/chosen`,
        `logits/rejected` or `logits` ("mean_logits"); `mean_token_accuracy` ("is_top1"). Nothing waits for a GPU until
        a value is read.
        """
        metrics = {}
        if self.kl is not None:
            metrics["kl"] = self.kl.detach().double().clamp(min=0).mean()
        groups: dict[str, Tensor | None] = {"": None}
        if self.desirable is not None:
            chosen = self.desirable.double().expand(len(self.losses))
            groups = {"/chosen": chosen, "/rejected": 1 - chosen}
        for group, members in groups.items():
            for name, values in (("rewards", self.rewards), ("logps", self.logps)):
                kept = values if members is None else torch.where(members > 0, values, 0)
                metrics[name + group] = kept.sum() / (len(values) if members is None else members.sum())
        if self.desirable is not None:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        if self.scored is not None:
            metrics |= {"lengths": self.scored.lengths().double().mean(), **self.scored.metrics(groups)}
        return {name: value.to(self.loss.dtype) for name, value in metrics.items()}
