"""Models of transformers, with or without PEFT: the loss inside the forward of the output projection.

Imports checks, `logprob`, ops and recipes. Neither transformers nor PEFT: a model brings them along.
"""

from .check import UnsupportedModel, check_model
from .head import Head, head_call, hidden_and_head
from .prompts import SharedPrompts, share_prompts
from .score import score

__all__ = [
    "Head",
    "SharedPrompts",
    "UnsupportedModel",
    "check_model",
    "head_call",
    "hidden_and_head",
    "score",
    "share_prompts",
]
