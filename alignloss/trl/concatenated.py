"""CPO and ORPO, whose trainers in TRL are experimental, and make full logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer as _CPOTrainer
from trl.experimental.orpo import ORPOTrainer as _ORPOTrainer

from ..hf.head import Head, head_call
from ..logprob import LogprobStats
from ..modules.own_loss import one_pass_loss
from .seam import aligned
from .trainers import AlignlossTrainer


class _Scored(NamedTuple):
    """In place of a model of CPO and ORPO: what its head has given."""

    logps: Tensor  # (2B, T)
    mean_logits: Tensor  # (2B, T)
    scored: Tensor  # (2B, T), where the sums run
    nll: Tensor  # (B, T), where the NLL runs


class _Concatenated(AlignlossTrainer):
    """CPO and ORPO, whose trainers in TRL make full logits."""

    paired = True
    has_reference = False
    nll_of_prompts = False

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Any], train_eval: str = "train") -> Any:
        if self.is_encoder_decoder and self._loss is not None:
            raise ValueError("a loss of ours needs a decoder: leave out `loss`, or give it to a loop of your own")
        if self.is_encoder_decoder or (self.aux_loss_enabled and self._loss is None):
            return super().get_batch_loss_metrics(model, batch, train_eval)
        both = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=getattr(self, "padding_value", None) or self.pad_token_id,
            device=self.accelerator.device,
        )
        ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
        if self._loss is not None:
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": both["concatenated_labels"]}
            known = {name: batch[name].to(ids.device) for name in self._loss.data.keys() & batch.keys()}
            _, loss, found = self._output(model, inputs, **known)
            prefix = "eval_" if train_eval == "eval" else ""
            return loss, {f"{prefix}{name}": value for name, value in self._logged(found).items()}
        scored, pairs = aligned(both["concatenated_labels"]), len(ids) // 2
        nll = (aligned(ids.masked_fill(mask == 0, -100)) if self.nll_of_prompts else scored)[:pairs]
        target = scored.clone()
        target[:pairs] = torch.where(scored[:pairs] != -100, scored[:pairs], nll)
        theirs, metrics = super().get_batch_loss_metrics, {}

        def loss_fn(logps: Tensor, stats: LogprobStats) -> Tensor:
            assert stats.mean_logits is not None
            values = logps.to(stats.mean_logits.dtype).view(target.shape)
            there = _Scored(values, stats.mean_logits.view(target.shape), scored != -100, nll != -100)
            loss, found = self._heard_once(lambda: theirs(there, batch, train_eval))
            metrics.update(found)
            return loss

        def run(head: Head) -> Tensor:
            return one_pass_loss(
                head.hidden, head.weight, target.to(head.hidden.device), loss_fn, head.bias,
                units=[(i, i + pairs) for i in range(pairs)], stats=("mean_logits",), **head.transform,
                **self._head_options,
            )  # fmt: skip

        loss, _ = head_call(model, run, input_ids=ids, attention_mask=mask, use_cache=False)
        return loss, metrics

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        if not isinstance(model, _Scored):
            return super().concatenated_forward(model, batch)
        pairs, scored = len(model.nll), model.scored
        sums = (model.logps * scored).sum(-1)
        logps = sums / scored.sum(-1) if self._averages() else sums
        nll = -(model.logps[:pairs] * model.nll).sum() / model.nll.sum()
        if getattr(self, "cpo_alpha", 1) == 0:
            nll = torch.zeros_like(nll)
        logits = model.mean_logits[:pairs][scored[:pairs]], model.mean_logits[pairs:][scored[pairs:]]
        return logps[:pairs], logps[pairs:], *logits, nll

    def _averages(self) -> bool:
        """Whether log-probabilities of sequences are means, not sums."""
        return True


class CPOTrainer(_Concatenated, _CPOTrainer):
    """TRL's CPOTrainer on alignloss, with `head_options`. Its `logits/*` are means over labelled tokens alone."""

    def _averages(self) -> bool:
        return self.loss_type in ("ipo", "simpo")


class ORPOTrainer(_Concatenated, _ORPOTrainer):
    """TRL's ORPOTrainer on alignloss, with `head_options`. Its `logits/*` are means over labelled tokens alone."""

    nll_of_prompts = True
