"""Exact preference losses and chunked log-probabilities straight from hidden states, without storing the logits."""

from importlib.metadata import PackageNotFoundError, version

from . import losses
from .baselines import RunningShift, kto_kl
from .batches import CompletionBatch, mismatched_pairs, self_play_pairs
from .kl import linear_kl
from .logprob import (
    LogprobStats,
    SequenceLogprob,
    linear_logprob,
    linear_logprob_stats,
    next_token_labels,
    sequence_logprob,
)
from .mixture import MixtureLoss
from .modules import (
    CPOLoss,
    DPOLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    PreferenceLoss,
    SFTLoss,
    SimPOLoss,
)
from .outputs import PairedOutput, ScoredTokens, UnpairedOutput
from .planning import Plan, plan
from .reference import update_reference
from .weights import ld_dpo_token_weights, sampo_token_weights, wpo_pair_weights

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
    "plan",
    "sampo_token_weights",
    "self_play_pairs",
    "sequence_logprob",
    "update_reference",
    "wpo_pair_weights",
]
