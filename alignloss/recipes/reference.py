"""A reference that follows the policy."""

import torch
from torch import nn

from ..checks import DTYPES, check_number, check_tensor, is_dtensor


@torch.no_grad()
def update_reference(reference: nn.Module, model: nn.Module, *, mix: float = 1.0) -> None:
    """TR-DPO: move every parameter of the reference towards the model's, ref = mix model + (1 - mix) ref, in place.

    Gorbatovski et al. 2024 (arXiv:2404.09656), whose alpha is `mix` in (0, 1]: 1 is the hard update, a copy. Call it
    every tau optimizer steps; log-probabilities of the reference that were cached before are those of the old one.
    Buffers stay. In bf16 a parameter does not move by less than 1/256 of itself: keep a reference that moves by a small
    `mix` in float32.

    Raises:
        ValueError: where names or shapes of the parameters differ, as between a model and one with adapters; for
            parameters without values (emptied by ZeRO-3 or FSDP1, on the meta device), of which nothing would be
            copied, quantised ones, and those of a reference that cannot be written; before any parameter moves.

    Example:
        >>> reference, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(reference.weight), torch.nn.init.ones_(model.weight)
        >>> alignloss.update_reference(reference, model, mix=0.25)
        >>> reference.weight.item()
        0.25
    """
    for name, value in (("reference", reference), ("model", model)):
        if not isinstance(value, nn.Module):
            raise ValueError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    check_number("mix", mix)
    if not 0 < mix <= 1:
        raise ValueError(f"mix must lie in (0, 1], got {mix!r}")
    ours, theirs = dict(reference.named_parameters()), dict(model.named_parameters())
    different = sorted(
        name for name in {*ours, *theirs} if name not in ours or name not in theirs or
        ours[name].shape != theirs[name].shape
    )  # fmt: skip
    if different:
        raise ValueError(
            f"reference and model must have the same parameters; {len(different)} differ, e.g. {different[:3]}"
        )
    if not ours:
        raise ValueError("reference and model have no parameters, so there is nothing to move")
    for what, parameters in (("reference", ours), ("model", theirs)):
        for name, parameter in parameters.items():
            if not is_dtensor(parameter):  # of which every process moves its shard
                check_tensor(f"{what}.{name}", parameter)
            if parameter.dtype not in DTYPES:
                raise ValueError(f"{what}.{name} is {parameter.dtype}: dequantise it first")
            if parameter.numel() == 0:
                raise ValueError(
                    f"{what}.{name} is empty here, {tuple(parameter.shape)}: gather the parameters of both first "
                    "(deepspeed.zero.GatheredParameters, FullyShardedDataParallel.summon_full_params)"
                )
    for name, parameter in ours.items():
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"reference.{name} was made under torch.inference_mode() and cannot move outside of it")
        if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            raise ValueError(f"reference.{name} is expanded: several of its entries share memory; give a copy of it")
    for name, parameter in ours.items():
        target = theirs[name].to(parameter)
        if mix == 1:
            parameter.copy_(target)
        elif parameter.dtype.itemsize < 4:
            parameter.copy_(parameter.float().mul_(1 - mix).add_(target, alpha=mix))  # rounded once
        else:
            # not lerp, whose difference of two equal infinities, as of a masked vocabulary, is NaN
            parameter.mul_(1 - mix).add_(target, alpha=mix)
