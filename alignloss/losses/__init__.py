"""Preference losses as plain functions of sequence log-probabilities.

Positional parameters are data, keyword-only parameters are options. Every log-probability is a sum in nats over the
labelled tokens of a sequence; a loss that normalises by length divides by `lengths` itself. A paired loss returns
`(losses, chosen_rewards, rejected_rewards)`, an unpaired one `(losses, rewards)`, each (B,), unreduced, in the order of
the batch, the rewards detached. The implied reward is r = beta log(pi / pi_ref) (Rafailov et al. 2023, eq. 5).

A function of this kind, a user's own included, becomes a module by `alignloss.PreferenceLoss(function, **options)`;
those of `LOSSES` by their names too. Losses over lists of more than two sequences are out of scope.

Example:
    >>> zero = torch.zeros(2)
    >>> chosen = torch.tensor([0.0, 10.0])
    >>> losses, chosen_rewards, rejected_rewards = alignloss.losses.dpo_loss(chosen, zero, zero, zero, beta=0.1)
    >>> losses  # -log sigmoid of 0 and of 1
    tensor([0.6931, 0.3133])
    >>> chosen_rewards
    tensor([0., 1.])

Imports nothing of ours: torch alone.
"""

from collections.abc import Callable

from torch import Tensor

from .divergences import alpha_divergence, forward_kl, js_divergence, reverse_kl
from .dpo import (
    aot_loss,
    aot_unpaired_loss,
    chi_po_loss,
    discopop_loss,
    dpo_loss,
    dpo_shift_loss,
    dpop_loss,
    f_dpo_loss,
    irpo_loss,
    length_normalized_dpo_loss,
    odpo_loss,
    r_dpo_loss,
    robust_dpo_loss,
    tdpo1_loss,
    tdpo2_loss,
)
from .pairwise import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    cal_dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    nca_loss,
    rebel_loss,
    sppo_loss,
)
from .reference_free import (
    alphapo_loss,
    cpo_hinge_loss,
    cpo_ipo_loss,
    cpo_loss,
    orpo_loss,
    simper_loss,
    simpo_loss,
    slic_loss,
)
from .unpaired import apo_zero_unpaired_loss, bco_loss, kto_loss, npo_loss, sft_loss

#: every loss by its name, which `PreferenceLoss` takes
LOSSES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "dpo": dpo_loss,
    "robust_dpo": robust_dpo_loss,
    "length_normalized_dpo": length_normalized_dpo_loss,
    "r_dpo": r_dpo_loss,
    "irpo": irpo_loss,
    "dpop": dpop_loss,
    "odpo": odpo_loss,
    "dpo_shift": dpo_shift_loss,
    "f_dpo": f_dpo_loss,
    "chi_po": chi_po_loss,
    "discopop": discopop_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "tdpo1": tdpo1_loss,
    "tdpo2": tdpo2_loss,
    "ipo": ipo_loss,
    "ipo_sum": ipo_sum_loss,
    "hinge": hinge_loss,
    "exo": exo_loss,
    "nca": nca_loss,
    "sppo": sppo_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "bco_pair": bco_pair_loss,
    "cal_dpo": cal_dpo_loss,
    "rebel": rebel_loss,
    "cpo": cpo_loss,
    "cpo_hinge": cpo_hinge_loss,
    "cpo_ipo": cpo_ipo_loss,
    "simpo": simpo_loss,
    "alphapo": alphapo_loss,
    "orpo": orpo_loss,
    "slic": slic_loss,
    "simper": simper_loss,
    "kto": kto_loss,
    "apo_zero_unpaired": apo_zero_unpaired_loss,
    "bco": bco_loss,
    "npo": npo_loss,
    "sft": sft_loss,
}

COUPLED = (aot_loss, aot_unpaired_loss)  #: an element of their losses depends on the whole batch

__all__ = [
    "COUPLED",
    "LOSSES",
    "alpha_divergence",
    "forward_kl",
    "js_divergence",
    "reverse_kl",
    *(f"{name}_loss" for name in LOSSES),
]
