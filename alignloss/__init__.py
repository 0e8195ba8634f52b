"""Exact preference losses and chunked log-probabilities straight from hidden states, without storing the logits."""

from importlib.metadata import PackageNotFoundError, version

from . import losses
from .kto import MismatchedPairs, kto_kl, mismatched_pairs
from .logprob import (
    LogprobStats,
    SequenceLogprob,
    linear_logprob,
    linear_logprob_stats,
    next_token_labels,
    sequence_logprob,
)
from .modules import (
    CPOLoss,
    DPOLoss,
    IPOLoss,
    KTOLoss,
    PairedOutput,
    PreferenceLoss,
    SFTLoss,
    UnpairedOutput,
)
from .planning import Plan, plan

try:
    __version__ = version("alignloss")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "IPOLoss",
    "KTOLoss",
    "LogprobStats",
    "MismatchedPairs",
    "PairedOutput",
    "Plan",
    "PreferenceLoss",
    "SFTLoss",
    "SequenceLogprob",
    "UnpairedOutput",
    "kto_kl",
    "linear_logprob",
    "linear_logprob_stats",
    "losses",
    "mismatched_pairs",
    "next_token_labels",
    "plan",
    "sequence_logprob",
]
