"""The KL estimate that KTO takes as its baseline, from mismatched pairs of prompt and completion."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MismatchedPairs", "kto_kl", "mismatched_pairs"]


class MismatchedPairs(NamedTuple):
    """Result of `mismatched_pairs`: right-padded, (B, T') each, int64."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


def mismatched_pairs(
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T) nonzero at real tokens
    completion_mask: Tensor,  # (B, T) nonzero at completion tokens
    pad_token_id: int,
) -> MismatchedPairs:
    """Put completion i - 1 (the last for i = 0) after prompt i: samples for KTO's estimate of KL(policy || reference).

    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. Neighbouring rows must have different prompts, or a pair
    is matched after all. Padding may be on either side; the result is padded on the right. Runs on the host: call it in
    the collator.

    Raises:
        ValueError: for fewer than two sequences (a pair would match itself), or shapes that differ.
    """
    for name, value in (("attention_mask", attention_mask), ("completion_mask", completion_mask)):
        if not isinstance(input_ids, Tensor) or not isinstance(value, Tensor):
            raise ValueError(f"input_ids and {name} must be torch.Tensors, got {type(input_ids)} and {type(value)}")
    if not isinstance(pad_token_id, int):
        raise ValueError(f"pad_token_id must be an integer, got {pad_token_id!r}; any token id serves")
    shapes = {tuple(t.shape) for t in (input_ids, attention_mask, completion_mask)}
    if len(shapes) != 1 or input_ids.dim() != 2:
        raise ValueError(f"input_ids, attention_mask and completion_mask must share one shape (B, T), got {shapes}")
    count = input_ids.shape[0]
    if count < 2:
        raise ValueError(f"mismatched pairs need at least 2 sequences, got {count}; raise the batch size")
    real, completion = attention_mask.bool(), completion_mask.bool() & attention_mask.bool()
    prompts = [ids[keep] for ids, keep in zip(input_ids, real & ~completion, strict=True)]
    completions = [ids[keep] for ids, keep in zip(input_ids, completion, strict=True)]
    width = max(len(prompts[i]) + len(completions[i - 1]) for i in range(count))
    ids = torch.full((count, width), pad_token_id, dtype=torch.int64, device=input_ids.device)
    attention, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for i in range(count):
        start, stop = len(prompts[i]), len(prompts[i]) + len(completions[i - 1])
        ids[i, :stop] = torch.cat([prompts[i], completions[i - 1]])
        attention[i, :stop] = 1
        scored[i, start:stop] = 1
    return MismatchedPairs(ids, attention, scored)


def kto_kl(
    kl_logps: Tensor,  # (B,)
    ref_kl_logps: Tensor,  # (B,)
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """max(0, mean(log pi - log pi_ref)) in nats over mismatched pairs, 0-d and detached: the `kl` of `KTOLoss`.

    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. With `group`, the mean runs over all its processes.
    """
    for name, value in (("kl_logps", kl_logps), ("ref_kl_logps", ref_kl_logps)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor (B,), got {type(value).__name__}; pass .logps")
    if kl_logps.shape != ref_kl_logps.shape or kl_logps.dim() != 1:
        raise ValueError(f"kl_logps and ref_kl_logps must both be (B,); got {kl_logps.shape} and {ref_kl_logps.shape}")
    logratios = (kl_logps - ref_kl_logps).detach().double()
    total = torch.stack([logratios.sum(), torch.full_like(logratios.sum(), logratios.numel())])
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0).to(kl_logps.dtype)
