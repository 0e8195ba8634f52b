"""What unpaired losses compare rewards with: KTO's estimate of the KL divergence, BCO's shift."""

import torch
from torch import Tensor

from ..checks import check_binary, check_number, check_tensor, validates


def kto_kl(
    kl_logps: Tensor,  # (B,)
    ref_kl_logps: Tensor,  # (B,)
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """max(0, mean(log pi - log pi_ref)) in nats over mismatched pairs, 0-d and detached: the `kl` of `KTOLoss`.

    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. With `group`, the mean runs over all its processes.

    Example:
        >>> alignloss.kto_kl(torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -8.0]))  # the mean of 1 and 3
        tensor(2.)
    """
    for name, value in (("kl_logps", kl_logps), ("ref_kl_logps", ref_kl_logps)):
        check_tensor(name, value, "; pass .logps")
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {value.dtype}: sums lose whole nats in 16 bits")
    if kl_logps.shape != ref_kl_logps.shape or kl_logps.dim() != 1:
        raise ValueError(f"kl_logps and ref_kl_logps must both be (B,); got {kl_logps.shape} and {ref_kl_logps.shape}")
    logratios = (kl_logps - ref_kl_logps).detach().double()
    total = torch.stack([logratios.sum(), torch.full_like(logratios.sum(), logratios.numel())])
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0).to(kl_logps.dtype)


class RunningShift:
    """BCO's shift delta: the mean of the mean rewards of desirable and of undesirable sequences, over the steps so far.

    Jung et al. 2024 (arXiv:2404.04656). Give `delta` to the loss and its rewards to `update`::

        out = bco(hidden, weight, labels, ref_logps=ref_logps, desirable=desirable, delta=shift.delta)
        shift.update(out.rewards, desirable)

    Args:
        momentum: what remains of the older rewards at each update, in [0, 1): an exponential average, unbiased from the
            first step on. None, the default, counts every reward alike.
        device: where it is kept at first; it follows the rewards of the first update.

    It has `state_dict` and `load_state_dict`, like an optimizer, and is no module: sums and counts stay float64.

    Example:
        >>> shift = alignloss.RunningShift()
        >>> shift.update(torch.tensor([1.0, 3.0, -4.0]), torch.tensor([True, True, False]))
        >>> shift.delta  # the mean of 2 and -4
        tensor(-1., dtype=torch.float64)
    """

    def __init__(self, momentum: float | None = None, *, device: torch.device | str = "cpu") -> None:
        if momentum is not None:
            check_number("momentum", momentum)
            if not 0 <= momentum < 1:
                raise ValueError(f"momentum must be None or lie in [0, 1), got {momentum!r}")
        self.momentum = momentum
        with torch.inference_mode(False):  # where it is updated later, perhaps in another mode
            self.totals = torch.zeros(2, 2, dtype=torch.float64, device=device)  # sums and counts, undesirable first

    @property
    def delta(self) -> Tensor:
        """The shift, 0-d float64, the mean of the two means, the only one while one kind has not been seen, or 0."""
        sums, counts = self.totals
        seen = counts > 0
        means = torch.where(seen, sums / torch.where(seen, counts, 1), 0)
        return means.sum() / seen.sum().clamp(min=1)

    @torch.no_grad()
    def update(
        self,
        rewards: Tensor,  # (B,)
        desirable: Tensor | bool,  # (B,) or 0-d, bool or 0 and 1
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Add the rewards of a step, those that are finite; with `group`, those of all its processes.

        Raises:
            ValueError: for shapes that differ and, on a CPU, for `desirable` that is neither 0 nor 1.
        """
        check_tensor("rewards", rewards)
        self.totals = self.totals.to(rewards.device)
        good = torch.as_tensor(desirable, device=rewards.device)
        if rewards.dim() != 1 or good.shape not in ((), rewards.shape):
            raise ValueError(
                f"rewards must be a tensor (B,) and desirable (B,) or 0-d, got {tuple(rewards.shape)} and "
                f"{tuple(good.shape)}"
            )
        if validates(None, good.device):
            check_binary("desirable", good)
        rewards = rewards.double()
        kinds = torch.stack([good == 0, good == 1]).view(2, -1) & rewards.isfinite()
        new = torch.stack([torch.where(kinds, rewards, 0).sum(1), kinds.double().sum(1)])
        if group is not None:
            torch.distributed.all_reduce(new, group=group)
        self.totals.mul_(1.0 if self.momentum is None else self.momentum).add_(new)

    def state_dict(self) -> dict[str, Tensor]:
        return {"totals": self.totals.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["totals"].shape != self.totals.shape:
            raise ValueError(f"totals must be (2, 2), got {tuple(state['totals'].shape)}")
        self.totals.copy_(state["totals"])
