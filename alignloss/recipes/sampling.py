"""Which of the responses that a model has written are trained on."""

import operator

import torch
from torch import Tensor

from ..checks import check_number, check_tensor


def rejection_sample(
    rewards: Tensor,  # (B, K)
    count: int,
    *,
    beta: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Statistical rejection sampling: `count` of the K responses of each prompt, as from pi* ~ pi exp(reward / beta).

    Liu et al. 2023 (arXiv:2309.06657), section 3.3 and algorithm 1: the responses, samples of pi in the order in which
    they were drawn, are gone through, and each is accepted with probability exp((r - max r) / beta), where the maximum
    is over those that remain. Those that were not are gone through again, with a maximum of their own, until there are
    enough. So `beta` -> inf takes the first ones, as random as pi itself, and `beta` -> 0 the best ones.

    Args:
        rewards: of the responses, floating, finite.
        count: of the responses to accept, at most K.
        beta: in the unit of the rewards, positive: that of the loss which trains on them, in the paper.
        generator: on the device of the rewards.

    Returns:
        (B, count) int64, places among the K in the order of acceptance, each of them once.

    Raises:
        ValueError: for rewards that are not (B, K) or not finite, `count` outside of [1, K] and `beta` <= 0.

    Example:
        >>> rewards = torch.tensor([[0.0, 2.0, 1.0]])
        >>> alignloss.rejection_sample(rewards, 2, beta=1e-3)
        tensor([[1, 2]])
    """
    check_tensor("rewards", rewards)
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be (B, K) and floating, got {tuple(rewards.shape)} {rewards.dtype}")
    check_number("beta", beta, positive=True)
    try:
        count = operator.index(count)
    except TypeError:
        raise ValueError(f"count must be an integer, got {count!r}") from None
    if not 1 <= count <= rewards.shape[1]:
        raise ValueError(f"count must lie in [1, {rewards.shape[1]}], the number of responses; got {count}")
    if not bool(rewards.isfinite().all()):
        raise ValueError("rewards must be finite")
    rewards = rewards.double()
    # the pass in which each response is accepted; within a pass they are in their order
    accepted = torch.full_like(rewards, torch.inf)
    turn = 0
    while bool(((accepted < torch.inf).sum(1) < count).any()):
        left = accepted == torch.inf
        best = rewards.masked_fill(~left, -torch.inf).amax(1, keepdim=True)
        draws = torch.rand(rewards.shape, generator=generator, dtype=rewards.dtype, device=rewards.device)
        accepted[left & (draws < ((rewards - best) / beta).exp())] = turn
        turn += 1
    return accepted.argsort(dim=1, stable=True)[:, :count]
