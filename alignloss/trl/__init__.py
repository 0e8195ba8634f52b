"""TRL's trainers on alignloss: its fused head replaced, its losses as they are, or any of ours in their place.

Imports hf, modules, recipes, ops, checks and `logprob`.
"""

from typing import Any

from .seam import add_fused_lm_head, patched
from .trainers import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

__all__ = [
    "CPOTrainer",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "RLOOTrainer",
    "SFTTrainer",
    "add_fused_lm_head",
    "patched",
]


def __getattr__(name: str) -> Any:
    # TRL warns where its experimental trainers are imported, so only those who use them hear of it
    if name in ("CPOTrainer", "ORPOTrainer"):
        from . import concatenated

        return getattr(concatenated, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
