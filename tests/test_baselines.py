"""What unpaired losses compare rewards with: KTO's KL estimate and BCO's shift, over one process and over two."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import inputs

import alignloss
from alignloss import losses


def test_kto_kl_is_the_mean_log_ratio_clamped_and_detached():
    kl = alignloss.kto_kl(torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -7.0]))
    assert kl.item() == 1.5
    assert not kl.requires_grad
    assert alignloss.kto_kl(torch.tensor([-5.0]), torch.tensor([-4.0])).item() == 0
    with pytest.raises(ValueError, match=r"both be \(B,\)"):
        alignloss.kto_kl(torch.zeros(2), torch.zeros(3))


def worker(rank: int, size: int) -> None:
    policy, reference = torch.tensor([-3.0, -5.0, -1.0]), torch.tensor([-4.0, -7.0, -1.5])
    mine = slice(0, 1) if rank == 0 else slice(1, 3)  # uneven shares: the mean is over samples, not over processes
    kl = alignloss.kto_kl(policy[mine], reference[mine], group=dist.group.WORLD)
    torch.testing.assert_close(kl, torch.tensor((1 + 2 + 0.5) / 3))
    shift = alignloss.RunningShift()
    shift.update(policy[mine], torch.tensor([True, True, False])[mine], group=dist.group.WORLD)
    assert shift.delta.item() == (-4 + -1) / 2


def test_both_over_two_processes(tmp_path):
    run_processes(worker, 2, tmp_path)


def test_the_shift_is_the_mean_of_two_running_means():
    shift = alignloss.RunningShift()
    assert shift.delta.item() == 0
    shift.update(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))
    assert shift.delta.item() == 2  # the only kind seen
    shift.update(torch.tensor([5.0, -1.0]), torch.tensor([True, False]))
    assert shift.delta.item() == ((1 + 3 + 5) / 3 + -1) / 2
    restored = alignloss.RunningShift()
    restored.load_state_dict(shift.state_dict())
    assert restored.delta.item() == shift.delta.item()


def test_what_the_shift_refuses_and_leaves_out():
    shift = alignloss.RunningShift()
    shift.update(torch.tensor([1.0, -torch.inf, torch.nan]), torch.tensor([True, False, False]))
    shift.update(torch.tensor([3.0]), True)
    assert shift.delta.item() == 2
    with pytest.raises(ValueError, match=r"desirable must be bool, or 0 and 1; got \[-1, 1\]"):
        shift.update(torch.zeros(2), torch.tensor([1, -1]))
    for rewards, desirable in ((torch.zeros(2), torch.ones(3)), (torch.zeros(2, 2), True), (1.0, True)):
        with pytest.raises(ValueError, match=r"rewards must be a (tensor|torch\.Tensor)"):
            shift.update(rewards, desirable)


def test_momentum_forgets_without_a_bias_from_its_start():
    shift = alignloss.RunningShift(momentum=0.5)
    for reward in (4.0, 1.0):
        shift.update(torch.tensor([reward]), torch.tensor(True))
    assert shift.delta.item() == (0.5 * 4 + 1) / 1.5
    with pytest.raises(ValueError, match=r"momentum must be None or lie in \[0, 1\), got 1"):
        alignloss.RunningShift(momentum=1)
    with pytest.raises(ValueError, match="momentum must be a finite number"):
        alignloss.RunningShift(momentum="a")


def test_bco_takes_the_shift():
    hidden, weight, _, labels = inputs(4, 6)
    desirable, ref = torch.arange(4) % 2 == 0, torch.zeros(4)
    module, shift = alignloss.PreferenceLoss("bco", beta=0.1), alignloss.RunningShift()
    for _ in range(2):
        out = module(hidden, weight, labels, ref_logps=ref, desirable=desirable, delta=shift.delta)
        expected, _ = losses.bco_loss(out.logps, ref, desirable, shift.delta, beta=0.1)
        torch.testing.assert_close(out.losses, expected)
        shift.update(out.rewards, desirable)
    assert shift.delta != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_sums_of_16_bits_are_no_estimate(dtype):
    sums = torch.tensor([-300.3, -20.0])
    with pytest.raises(ValueError, match=f"ref_kl_logps must be float32 or float64, got {dtype}"):
        alignloss.kto_kl(sums, sums.to(dtype))
