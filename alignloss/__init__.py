"""Exact preference losses and chunked log-probabilities straight from hidden states, without storing the logits."""

from importlib.metadata import PackageNotFoundError, version

from . import losses
from .logprob import (
    LogprobStats,
    SequenceLogprob,
    linear_kl,
    linear_logprob,
    linear_logprob_stats,
    sequence_logprob,
)
from .modules.mixture import MixtureLoss
from .modules.named import CPOLoss, DPOLoss, IPOLoss, KTOLoss, ORPOLoss, SimPOLoss
from .modules.outputs import PairedOutput, ScoredTokens, UnpairedOutput
from .modules.own_loss import one_pass_loss
from .modules.preference import PreferenceLoss
from .modules.sft import SFTLoss
from .planning import Plan, plan
from .recipes.baselines import RunningShift, kto_kl
from .recipes.batches import CompletionBatch, mismatched_pairs, next_token_labels, self_play_pairs
from .recipes.reference import update_reference
from .recipes.sampling import rejection_sample, self_play_rounds
from .recipes.weights import ld_dpo_token_weights, sampo_token_weights, wpo_pair_weights

try:
    __version__ = version("alignloss")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "CPOLoss",
    "CompletionBatch",
    "DPOLoss",
    "IPOLoss",
    "KTOLoss",
    "LogprobStats",
    "MixtureLoss",
    "ORPOLoss",
    "PairedOutput",
    "Plan",
    "PreferenceLoss",
    "RunningShift",
    "SFTLoss",
    "ScoredTokens",
    "SequenceLogprob",
    "SimPOLoss",
    "UnpairedOutput",
    "kto_kl",
    "ld_dpo_token_weights",
    "linear_kl",
    "linear_logprob",
    "linear_logprob_stats",
    "losses",
    "mismatched_pairs",
    "next_token_labels",
    "one_pass_loss",
    "plan",
    "rejection_sample",
    "sampo_token_weights",
    "self_play_pairs",
    "self_play_rounds",
    "sequence_logprob",
    "update_reference",
    "wpo_pair_weights",
]
