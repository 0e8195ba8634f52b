"""Losses by weights: LD-DPO and SamPO weigh tokens, WPO weighs pairs."""

import pytest
import torch
from reference import inputs, statistics, token_logps

import alignloss

# one pair: chosen with 4 labelled tokens, rejected with 2; a label stands for its place in the sequence
LABELS = torch.tensor([[-100, 1, 2, -100, 3, 4], [1, -100, -100, 2, -100, -100]])


def packed(values):
    return values.reshape(-1), torch.tensor([0, 6, 12])


def test_ld_dpo_weighs_the_tokens_beyond_the_shorter_length():
    expected = [[0, 1, 1, 0, 0.25, 0.25], [1, 0, 0, 1, 0, 0]]
    assert alignloss.ld_dpo_token_weights(LABELS, tail_weight=0.25).tolist() == expected
    flat, offsets = packed(LABELS)
    got = alignloss.ld_dpo_token_weights(flat, tail_weight=0.25, cu_seqlens=offsets)
    assert got.tolist() == [*expected[0], *expected[1]]
    with pytest.raises(ValueError, match=r"tail_weight must lie in \[0, 1\]"):
        alignloss.ld_dpo_token_weights(LABELS, tail_weight=2)
    with pytest.raises(ValueError, match="tail_weight must be a finite number"):
        alignloss.ld_dpo_token_weights(LABELS, tail_weight=None)
    assert alignloss.ld_dpo_token_weights(LABELS[:0], tail_weight=0.5).shape == (0, 6)
    with pytest.raises(ValueError, match="2B sequences, chosen then rejected; got 1"):
        alignloss.ld_dpo_token_weights(LABELS[:1], tail_weight=0.5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sampo_keeps_as_many_tokens_of_either_sequence(layout):
    drawn = torch.zeros(12)
    generator = torch.Generator(LABELS.device).manual_seed(0)
    for _ in range(300):
        if layout == "padded":
            weights = alignloss.sampo_token_weights(LABELS, generator=generator)
        else:
            flat, offsets = packed(LABELS)
            weights = alignloss.sampo_token_weights(flat, cu_seqlens=offsets, generator=generator)
        assert weights.view(2, 6).sum(1).tolist() == [2, 2]
        drawn += weights.view(-1)
    drawn = drawn.view(2, 6) / 300
    assert drawn[LABELS == -100].sum() == 0
    assert drawn[1, [0, 3]].tolist() == [1, 1]
    assert float((drawn[0, [1, 2, 4, 5]] - 0.5).abs().max()) < 0.1  # 2 of 4: each half of the time; 3.5 sigma


def test_wpo_is_the_likelihood_of_the_pair_under_the_policy():
    hidden, weight, _, labels = inputs(4, 9)
    stats = alignloss.linear_logprob_stats(hidden, weight, labels, stats=("log_sum_sq_probs",))
    exact = token_logps(hidden, weight, labels) - statistics(hidden, weight, labels)["log_sum_sq_probs"]
    means = exact.sum(1) / (labels != -100).sum(1)
    expected = (means[:2] + means[2:]).exp()
    torch.testing.assert_close(alignloss.wpo_pair_weights(stats, labels), expected)
    flat = alignloss.LogprobStats(stats.logps.view(-1), log_sum_sq_probs=stats.log_sum_sq_probs.view(-1))
    got = alignloss.wpo_pair_weights(flat, labels.view(-1), cu_seqlens=torch.arange(5) * 9)
    torch.testing.assert_close(got, expected)
    none = alignloss.LogprobStats(stats.logps[:0], log_sum_sq_probs=stats.logps[:0])
    assert alignloss.wpo_pair_weights(none, labels[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"stats\.logps must have the shape and device of labels"):
        alignloss.wpo_pair_weights(stats, labels[:2])
    with pytest.raises(ValueError, match="stats must be what linear_logprob_stats returns, got Tensor"):
        alignloss.wpo_pair_weights(stats.logps, labels)
    with pytest.raises(ValueError, match="ask linear_logprob_stats"):
        alignloss.wpo_pair_weights(alignloss.linear_logprob_stats(hidden, weight, labels), labels)


def test_statistics_of_another_shape_are_no_weights():
    labels = torch.zeros(4, 5, dtype=torch.int64)
    stats = alignloss.LogprobStats(torch.zeros(4, 5), log_sum_sq_probs=torch.zeros(5))
    with pytest.raises(ValueError, match=r"stats.log_sum_sq_probs must have the shape and device of labels, \(4, 5\)"):
        alignloss.wpo_pair_weights(stats, labels)
