"""KTO's baseline: mismatched pairs, and the KL estimate over one process and over two."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
        alignloss.mismatched_pairs(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 3), 0)


def test_kto_kl_is_the_mean_log_ratio_clamped_and_detached():
    kl = alignloss.kto_kl(torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -7.0]))
    assert kl.item() == 1.5
    assert not kl.requires_grad
    assert alignloss.kto_kl(torch.tensor([-5.0]), torch.tensor([-4.0])).item() == 0
    with pytest.raises(ValueError, match=r"both be \(B,\)"):
        alignloss.kto_kl(torch.zeros(2), torch.zeros(3))


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    policy, reference = torch.tensor([-3.0, -5.0, -1.0]), torch.tensor([-4.0, -7.0, -1.5])
    mine = slice(0, 1) if rank == 0 else slice(1, 3)  # uneven shares: the mean is over samples, not over processes
    kl = alignloss.kto_kl(policy[mine], reference[mine], group=dist.group.WORLD)
    torch.testing.assert_close(kl, torch.tensor((1 + 2 + 0.5) / 3))
    dist.destroy_process_group()


def test_kto_kl_over_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
