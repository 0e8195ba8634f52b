"""Batches from prompts and completions: mismatched pairs for KTO, pairs of self-play for SPIN."""

import pytest
import torch

import alignloss


def test_mismatched_pairs_put_the_previous_completion_after_each_prompt():
    # 1x: prompts, 2x: completions, 0: padding, on the left for the first and on the right for the others
    ids = torch.tensor([[0, 11, 12, 21], [13, 22, 23, 0], [14, 15, 24, 0]])
    attention = (ids != 0).long()
    completion = ((ids > 20) & (ids != 0)).long()
    pairs = alignloss.mismatched_pairs(ids, attention, completion, pad_token_id=99)
    assert [row[mask.bool()].tolist() for row, mask in zip(pairs.input_ids, pairs.attention_mask, strict=True)] == [
        [11, 12, 24],
        [13, 21],
        [14, 15, 22, 23],
    ]
    assert [row[mask.bool()].tolist() for row, mask in zip(pairs.input_ids, pairs.completion_mask, strict=True)] == [
        [24],
        [21],
        [22, 23],
    ]
    assert set(pairs.input_ids[pairs.attention_mask == 0].tolist()) == {99}


def test_a_pair_cannot_be_mismatched_with_itself():
    one = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        alignloss.mismatched_pairs(one, one, one, 0)
    with pytest.raises(ValueError, match="one shape"):
        alignloss.mismatched_pairs(torch.ones(2, 4).long(), torch.ones(2, 4), torch.ones(2, 3), 0)


def test_self_play_pairs_reject_what_the_model_wrote():
    t = torch.tensor
    batch = alignloss.self_play_pairs([t([1, 2]), t([3])], [t([21]), t([22, 23])], [t([31, 32, 33]), t([34])], 0)
    assert batch.input_ids.tolist() == [[1, 2, 21, 0, 0], [3, 22, 23, 0, 0], [1, 2, 31, 32, 33], [3, 34, 0, 0, 0]]
    assert torch.equal(batch.attention_mask, (batch.input_ids != 0).long())
    assert torch.equal(batch.completion_mask, (batch.input_ids > 20).long())
    labels = alignloss.next_token_labels(batch.input_ids, batch.completion_mask)
    assert labels[0].tolist() == [-100, 21, -100, -100, -100]
    with pytest.raises(ValueError, match="as many, at least one; got 1, 1 and 0"):
        alignloss.self_play_pairs([t([1])], [t([2])], [], 0)
    with pytest.raises(ValueError, match=r"pad_token_id must be an integer, got 0\.5"):
        alignloss.self_play_pairs([t([1])], [t([2])], [t([3])], 0.5)
    with pytest.raises(ValueError, match="1-d integer"):
        alignloss.self_play_pairs([t([1])], [t([2.0])], [t([3])], 0)


@pytest.mark.parametrize(
    ("mask", "row"),
    [
        ([[0, 1, 0, 1, 1], [0, 0, 1, 1, 1]], 0),  # two turns of the assistant
        ([[0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], 1),  # a completion before its prompt
        ([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], 1),  # prompt tokens at the end
    ],
)
def test_a_completion_that_is_not_the_end_of_its_row(mask, row):
    ids, mask = torch.arange(10).view(2, 5), torch.tensor(mask)
    with pytest.raises(ValueError, match=f"end of its row; in row {row} prompt tokens follow"):
        alignloss.mismatched_pairs(ids, torch.ones_like(ids), mask, 0)


def test_padding_on_either_side_is_no_gap():
    ids = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 0, 0]])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    completion = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]])
    mixed = alignloss.mismatched_pairs(ids, real, completion, 0)
    assert mixed.input_ids.tolist() == [[1, 5, 6], [4, 2, 3]]


def test_padding_between_tokens_is_no_padding():
    ids = torch.tensor([[1, 2, 6, 7, 8], [3, 4, 5, 9, 0]])
    attention = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
    completion = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"attention_mask must be one block in each row.*row 0 has 2"):
        alignloss.mismatched_pairs(ids, attention, completion, 0)
    for side in ((0, 0, 1, 1, 1), (1, 1, 1, 0, 0)):
        mask = torch.tensor([side, side])
        alignloss.mismatched_pairs(ids, mask, mask * torch.tensor([0, 0, 1, 0, 0]) * 0, 0)
