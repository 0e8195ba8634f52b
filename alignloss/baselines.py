"""What unpaired losses compare rewards with: KTO's estimate of the KL divergence, BCO's shift."""

import torch
from torch import Tensor, nn

__all__ = ["RunningShift", "kto_kl"]


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


class RunningShift(nn.Module):
    """BCO's shift delta: the mean of the mean rewards of desirable and of undesirable sequences, over the steps so far.

    Jung et al. 2024 (arXiv:2404.04656). Give `delta` to the loss and its rewards to `update`:

        out = bco(hidden, weight, labels, ref_logps=ref_logps, desirable=desirable, delta=shift.delta)
        shift.update(out.rewards, desirable)

    Args:
        momentum: what remains of the older rewards at each update, in [0, 1): an exponential average, unbiased from the
            first step on. None, the default, counts every reward alike.

    Sums and counts are buffers, (2,) float64, undesirable first, and are saved with a state_dict.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__()
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum must be None or lie in [0, 1), got {momentum!r}")
        self.momentum = momentum
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.float64))

    @property
    def delta(self) -> Tensor:
        """The shift, 0-d float64: the mean of the two means, the only one while one kind has not been seen, or 0."""
        seen = self.counts > 0
        means = torch.where(seen, self.sums / torch.where(seen, self.counts, 1), 0)
        return means.sum() / seen.sum().clamp(min=1)

    @torch.no_grad()
    def update(
        self,
        rewards: Tensor,  # (B,)
        desirable: Tensor,  # (B,) or 0-d, bool or 0 and 1
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Add the rewards of a step; with `group`, those of all its processes."""
        good = desirable.to(self.sums.device, torch.float64).expand(rewards.shape)
        kinds = torch.stack([1 - good, good])
        new = torch.stack([(kinds * rewards.to(self.sums)).sum(1), kinds.sum(1)])
        if group is not None:
            torch.distributed.all_reduce(new, group=group)
        keep = 1.0 if self.momentum is None else self.momentum
        self.sums.mul_(keep).add_(new[0])
        self.counts.mul_(keep).add_(new[1])
