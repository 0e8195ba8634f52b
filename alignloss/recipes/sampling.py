"""Data from what a model has written: which of its responses are trained on, and rounds of play against itself."""

import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..checks import check_number, check_tensor
from .batches import CompletionBatch, self_play_pairs


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
    enough. So a large `beta` takes the first ones, as random as pi itself, and a small one the best.

    Args:
        rewards: of the responses, floating, finite.
        count: of the responses to accept, at most K.
        beta: in the unit of the rewards, positive.
        generator: on the device of the rewards.

    Returns:
        (B, count) int64, places among the K in the order of acceptance, each of them once.

    Raises:
        ValueError: for rewards that are not (B, K) or not finite, `count` outside of [1, K] and a `beta` that is
            not positive and finite.

    Example:
        >>> rewards = torch.tensor([[0.0, 2.0, 1.0]])
        >>> alignloss.rejection_sample(rewards, 2, beta=1e-3)
        tensor([[1, 2]])
    """
    check_tensor("rewards", rewards)
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be (B, K) and floating, got {tuple(rewards.shape)} {rewards.dtype}")
    check_number("beta", beta, positive=True)
    count = _integer("count", count)
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


def self_play_rounds(
    prompts: Sequence[Tensor],  # B of (P_i,)
    completions: Sequence[Tensor],  # B of (C_i,)
    rounds: int,
    *,
    generate: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    score: Callable[[CompletionBatch], Tensor],
    pad_token_id: int,
) -> Iterator[tuple[CompletionBatch, Tensor]]:
    """SPIN's rounds: for each the pairs to train on, and their log-probs under the model at its start.

    Chen et al. 2024 (arXiv:2401.01335), algorithm 1. Train with `dpo_loss` in the body of the loop: a round begins when
    it is asked for, with the model as the round before has left it. Its opponent is kept as numbers, not as a copy of
    the model. A round that is trained to the optimum gives p' ~ p (p_data / p)^(1 / beta) (theorem 5.4), so that
    p_data alone stays as it is.

    Args:
        prompts, completions: the data, as `self_play_pairs` takes them.
        rounds: how many, at least 1.
        generate: the model's samples after the prompts, B of (S_i,). Without gradients.
        score: sums of log-probs in nats of the completions of a batch, (2B,), as `sequence_logprob` gives them.
            Without gradients.
        pad_token_id: as `self_play_pairs` takes it.

    Yields:
        `(pairs, ref_logps)`: a batch of 2B sequences, the data's before the model's own, and (2B,).

    Raises:
        ValueError: for `rounds` < 1, scores that are not (2B,) and finite, and what `self_play_pairs` refuses.

    Example:
        >>> data = [torch.tensor([1, 2])], [torch.tensor([3])]
        >>> write, score = lambda prompts: [torch.tensor([4])], lambda batch: torch.zeros(2)  # those of your model
        >>> for pairs, ref_logps in alignloss.self_play_rounds(*data, 2, generate=write, score=score, pad_token_id=0):
        ...     print(pairs.input_ids.tolist())
        [[1, 2, 3], [1, 2, 4]]
        [[1, 2, 3], [1, 2, 4]]
    """
    rounds = _integer("rounds", rounds)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return _rounds(prompts, completions, rounds, generate, score, pad_token_id)


def _rounds(
    prompts: Sequence[Tensor], completions: Sequence[Tensor], rounds: int,
    generate: Callable[[Sequence[Tensor]], Sequence[Tensor]], score: Callable[[CompletionBatch], Tensor],
    pad_token_id: int,
) -> Iterator[tuple[CompletionBatch, Tensor]]:  # fmt: skip
    for _ in range(rounds):
        with torch.no_grad():
            pairs = self_play_pairs(prompts, completions, generate(prompts), pad_token_id)
            ref_logps = score(pairs)
        check_tensor("what score returns", ref_logps)
        if ref_logps.shape != pairs.input_ids.shape[:1]:
            raise ValueError(
                f"score must return ({len(pairs.input_ids)},), a sum for each sequence; got {tuple(ref_logps.shape)}"
            )
        if not bool(ref_logps.isfinite().all()):
            raise ValueError("score must return finite log-probs")
        yield pairs, ref_logps


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
